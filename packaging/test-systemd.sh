#!/bin/sh
# Boots a small Debian 12, systemd as its process 1, in an emulated machine; installs Muster there with install.sh,
# and has test-systemd-guest.sh check the units. Needs debootstrap and QEMU, and root to make the image, which is
# then kept in target/systemd.
#
#   BUILD_DIR  where the binaries are  [target/release, of the project]
#   TIMEOUT    seconds for the machine [420]
#   ACCEL      how the machine is emulated; kvm is fast where it works  [tcg,thread=multi]
set -eu

cd "$(dirname "$0")/.."
BUILD_DIR=${BUILD_DIR:-target/release}
TIMEOUT=${TIMEOUT:-420}
ACCEL=${ACCEL:-tcg,thread=multi}

work=target/systemd
image=$work/base-1.ext4
PATH=$PATH:/usr/sbin:/sbin

say() { echo "test-systemd: $*"; }

# The machine: Debian, a kernel, and one unit that runs whatever the second disk brings.
make_image() {
    [ "$(id -u)" -eq 0 ] || { say "making the image needs root: sudo make test-systemd" >&2; exit 1; }
    say "making a Debian 12 image (once, about two minutes)"
    root=$work/base.new
    rm -rf "$root"
    mkdir -p "$work"
    packages=systemd-sysv,dbus,udev,kmod,iproute2,iputils-ping,curl,linux-image-cloud-amd64
    debootstrap --variant=minbase --include="$packages" bookworm "$root" >"$work/debootstrap.log" 2>&1 || {
        tail -n 20 "$work/debootstrap.log" >&2
        exit 1
    }
    cp "$root"/boot/vmlinuz-* "$work/vmlinuz"
    cp "$root"/boot/initrd.img-* "$work/initrd"
    rm -rf "$root"/boot/* "$root"/var/cache/apt "$root"/var/lib/apt/lists "$root"/usr/share/doc \
        "$root"/usr/share/locale "$root"/usr/share/man
    echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
    echo muster-test >"$root/etc/hostname"
    echo '/dev/vda / ext4 defaults 0 0' >"$root/etc/fstab"
    for unit in getty@.service serial-getty@.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
        e2scrub_all.timer e2scrub_reap.service fstrim.timer; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    cat >"$root/etc/systemd/system/payload.service" <<'UNIT'
[Unit]
Description=What the second disk brings
After=network.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'mkdir /payload && tar -xf /dev/vdb -C /payload && exec sh /payload/packaging/test-systemd-guest.sh'
StandardOutput=file:/dev/ttyS1
StandardError=file:/dev/ttyS1
ExecStopPost=/bin/systemctl poweroff --no-block
UNIT
    mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
    ln -s ../payload.service "$root/etc/systemd/system/multi-user.target.wants/"
    truncate -s 2G "$image.new"
    mke2fs -q -F -t ext4 -d "$root" "$image.new"
    mv "$image.new" "$image"
    rm -rf "$root"
}

for program in muster muster-registrar muster-agent muster-director; do
    [ -x "$BUILD_DIR/$program" ] || { say "$BUILD_DIR/$program is missing; build it first" >&2; exit 1; }
done
[ -f "$image" ] && [ -f "$work/initrd" ] && [ -f "$work/vmlinuz" ] || make_image

packaging/check-config.sh "$BUILD_DIR"

run=$(mktemp -d "$work/run.XXXXXX")
qemu=
cleanup() {
    [ -z "$qemu" ] || kill "$qemu" 2>/dev/null || :
    rm -rf "$run"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP PIPE

mkdir -p "$run/payload/target/release"
cp -a packaging "$run/payload/"
for program in muster muster-registrar muster-agent muster-director; do
    # Debugging information would only take time to copy.
    strip -o "$run/payload/target/release/$program" "$BUILD_DIR/$program"
done
tar -cf "$run/payload.tar" -C "$run/payload" .

say "booting"
begin=$(date +%s)
qemu-system-x86_64 -M pc -accel "$ACCEL" -cpu max -smp 2 -m 1024 -nodefaults -display none \
    -no-reboot -nic none -device virtio-rng-pci \
    -kernel "$work/vmlinuz" -initrd "$work/initrd" -append "root=/dev/vda rw console=ttyS0 panic=-1 loglevel=4" \
    -drive "file=$image,format=raw,if=virtio,snapshot=on" \
    -drive "file=$run/payload.tar,format=raw,if=virtio,readonly=on" \
    -serial "file:$work/console.log" -serial "file:$run/result" >"$work/qemu.log" 2>&1 &
qemu=$!

# Shows what the guest tells as it comes, until the machine ends or time is up.
touch "$run/result"
tail -n +1 -f --pid="$qemu" "$run/result" &
shown=$!
while kill -0 "$qemu" 2>/dev/null; do
    if [ $(($(date +%s) - begin)) -ge "$TIMEOUT" ]; then
        say "no end after $TIMEOUT s; the end of $work/console.log:" >&2
        tail -n 30 "$work/console.log" >&2
        exit 1
    fi
    sleep 1
done
wait "$shown" || :
cat "$work/qemu.log" >&2
if tr -d '\r' <"$run/result" | grep -qx 'PASSED'; then
    say "passed in $(($(date +%s) - begin)) s"
else
    say "failed; see above, and $work/console.log" >&2
    exit 1
fi
