#!/bin/sh
# Runs a command as root of the network: as it is for root, else in a user namespace with network and mount
# namespaces of its own.
set -eu

[ "$(id -u)" -eq 0 ] && exec "$@"

# What `ip netns` writes to, /run and /etc/netns, is of this mount namespace alone.
if unshare --user --map-root-user --net --mount sh -ec 'mount -t tmpfs tmpfs /run' 2>/dev/null; then
    exec unshare --user --map-root-user --net --mount sh -ec '
        mount -t tmpfs tmpfs /run
        mkdir /run/etc /run/work
        mount -t overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/work overlay /etc
        mkdir -p /etc/netns
        mount -t tmpfs tmpfs /etc/netns
        ip link set lo up
        exec "$@"' sh "$@"
fi
cat >&2 <<MESSAGE
This needs root, or user namespaces, which this host does not allow. Either
    run it as root: sudo make ${MAKE_TARGET:-demo}
or  allow them:     sudo sysctl -w kernel.unprivileged_userns_clone=1
MESSAGE
exit 1
