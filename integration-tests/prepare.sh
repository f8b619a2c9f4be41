#!/bin/sh
# Installs the Debian packages that a target of the Makefile needs: prepare.sh COMMAND=PACKAGE ...
# Installs nothing when every command is there; without root, says what to install.
set -eu

missing=
for pair in "$@"; do
    command=${pair%%=*} package=${pair#*=}
    PATH="$PATH:/usr/sbin:/sbin" command -v "$command" >/dev/null 2>&1 || missing="$missing $package"
done
[ -z "$missing" ] && exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "These Debian packages are missing:$missing" >&2
    echo "Install them first: sudo apt-get install --no-install-recommends$missing" >&2
    exit 1
fi
echo "Installing Debian packages:$missing"
export DEBIAN_FRONTEND=noninteractive
# Some of them are servers, which must not start here: they would take the ports that this host's own need.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
# shellcheck disable=SC2086
apt-get install -qq --no-install-recommends $missing >/dev/null 2>&1 || {
    apt-get update -qq
    apt-get install -qq --no-install-recommends $missing >/dev/null
}
