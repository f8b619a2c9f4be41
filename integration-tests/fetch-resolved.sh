#!/bin/sh
# Unpacks Debian's systemd-resolved into a directory, for its test: fetch-resolved.sh DIRECTORY
# Installing the package would replace the host's /etc/resolv.conf.
set -eu

[ -x "$1/lib/systemd/systemd-resolved" ] && exit 0
mkdir -p "$1"
directory=$(realpath "$1")
part=$(mktemp -d "$directory.XXXXXX")
trap 'rm -rf "$part"' EXIT
cd "$part"
apt-get -qq -o APT::Sandbox::User=root download systemd-resolved libsystemd-shared || {
    echo "cannot download the Debian packages systemd-resolved and libsystemd-shared" >&2
    exit 1
}
mkdir root
for package in ./*.deb; do dpkg -x "$package" root; done
# Whole or not at all.
mv -T root "$directory" 2>/dev/null || [ -x "$directory/lib/systemd/systemd-resolved" ]
