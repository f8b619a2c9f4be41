#!/bin/sh
# Unpacks Debian's systemd-resolved into a directory, for its test: fetch-resolved.sh DIRECTORY
# Installing the package would replace the host's /etc/resolv.conf.
set -eu

[ -x "$1/lib/systemd/systemd-resolved" ] && exit 0
mkdir -p "$1"
part=$(mktemp -d "$1.XXXXXX")
trap 'rm -rf "$part"' EXIT
cd "$part"
apt-get -qq -o APT::Sandbox::User=root download systemd-resolved libsystemd-shared || {
    echo "cannot download the Debian packages systemd-resolved and libsystemd-shared" >&2
    exit 1
}
mkdir root
for package in ./*.deb; do dpkg -x "$package" root; done
# Whole or not at all.
rmdir "$1" 2>/dev/null && mv -T root "$1" || [ -x "$1/lib/systemd/systemd-resolved" ]
