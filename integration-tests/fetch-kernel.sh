#!/bin/sh
# Makes a machine whose kernel has WireGuard, for the tests against it: fetch-kernel.sh DIRECTORY
# Unpacks a kernel of Debian's and Busybox without installing them, and puts them into DIRECTORY as `vmlinuz` and
# `initrd`: with wg, the modules that are needed, and kernel-init.sh as the first process.
set -eu

init=$(realpath "$(dirname "$0")/kernel-init.sh")
[ -e "$1/initrd" ] && [ "$1/initrd" -nt "$init" ] && exit 0
mkdir -p "$1"
directory=$(realpath "$1")
part=$(mktemp -d "$directory.XXXXXX")
trap 'rm -rf "$part"' EXIT
cd "$part"
PATH=$PATH:/usr/sbin:/sbin

# The package linux-image-cloud-amd64 only names the newest kernel.
kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: //p' | head -n 1)
[ -n "$kernel" ] && apt-get -qq -o APT::Sandbox::User=root download "$kernel" busybox-static || {
    echo "cannot download the Debian packages linux-image-cloud-amd64 and busybox-static" >&2
    exit 1
}
for package in ./*.deb; do dpkg -x "$package" unpacked; done

root=$part/root
mkdir -p "$root/bin" "$root/modules" "$root/proc" "$root/sys" "$root/dev" "$root/tmp"
cp unpacked/bin/busybox "$root/bin/"
install -m 755 "$init" "$root/init"
for file in $(command -v wg) $(ldd "$(command -v wg)" | grep -o '/[^ ]*'); do
    install -D "$file" "$root$file"
done

# A module after those that it needs, in the order of loading.
add() {
    for name in $(modinfo -F depends "$1" | tr , ' '); do
        add "$(find_module "$name")"
    done
    name=$(basename "$1")
    if [ ! -e "$root/modules/$name" ]; then
        cp "$1" "$root/modules/"
        echo "$name" >>"$root/modules/order"
    fi
}
find_module() {
    find unpacked/lib/modules -name "$(echo "$1" | sed 's/[-_]/[-_]/g').ko" | grep .
}
for module in virtio_pci virtio_net wireguard; do
    add "$(find_module "$module")"
done

(cd root && find . | ./bin/busybox cpio -o -H newc 2>/dev/null) | gzip -1 >initrd
cp unpacked/boot/vmlinuz-* vmlinuz
# The initrd last: whoever finds it finds both.
mv vmlinuz "$directory/"
mv initrd "$directory/"
