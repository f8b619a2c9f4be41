#!/bin/sh
# Unpacks Debian's newest wireguard-go and nebula into DIRECTORY/bin, for `make bench-tunnel`: fetch-peers.sh DIRECTORY
# They come from Debian unstable, whose package lists are kept apart from the host's own; nothing is installed.
set -eu

mkdir -p "$1/bin"
bin=$(realpath "$1/bin")
part=$(mktemp -d "$bin.XXXXXX")
trap 'rm -rf "$part"' EXIT
cd "$part"
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' | grep '/debian/$' | head -n 1)
key=/usr/share/keyrings/debian-archive-keyring.gpg
if [ -z "$mirror" ] || [ ! -e "$key" ]; then
    echo "this host's package sources are not Debian's: cannot fetch wireguard-go and nebula" >&2
    exit 1
fi
echo "deb [signed-by=$key] $mirror unstable main" >sources.list
mkdir -p lists/partial cache/archives/partial
apt() {
    apt-get -qq -o APT::Sandbox::User=root -o Dir::Etc::sourcelist="$part/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$part/lists" -o Dir::Cache="$part/cache" -o Acquire::Languages=none \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false "$@"
}
apt update
apt download wireguard-go nebula
for package in ./*.deb; do
    echo "$(basename "$package")"
    dpkg -x "$package" root
done
# Beside the wireguard-go of this Debian, which is measured too.
mv root/usr/bin/wireguard-go "$bin/wireguard-go-new"
mv root/usr/bin/nebula root/usr/bin/nebula-cert "$bin"
