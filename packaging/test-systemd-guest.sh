#!/bin/sh
# Runs inside the machine of test-systemd.sh: installs Muster, and checks that its units do what they promise.
# The last line is PASSED, or there is none.
set -eu

step() { echo "== $*"; }

fail() {
    echo "FAILED: $*"
    systemctl status --no-pager --full muster-registrar muster-agent muster-director || :
    journalctl --no-pager -o short-monotonic -u muster-registrar -u muster-agent -u muster-director -n 60 || :
    exit 1
}

# Waits until a command succeeds: within TIME seconds.
within() {
    time=$1
    shift
    for _ in $(seq "$time"); do
        if "$@" >/dev/null 2>&1; then return 0; fi
        sleep 1
    done
    fail "not within $time s: $*"
}

property() { systemctl show --value -p "$2" "$1"; }

is() {
    found=$(property "$1" "$2")
    [ "$found" = "$3" ] || fail "$1: $2 is $found, not $3"
}

# The virtual address; the resolver's link-local one is on the interface, too.
address() { ip -4 -o addr show dev muster0 | awk '$4 !~ /^169\.254\./ { print $4 }'; }

# The address that programs on this host get for the device's name.
resolved() { getent ahostsv4 web.net.example | awk 'NR == 1 { print $1 }'; }

resolves() {
    found=$(resolved)
    [ "$found" = "${1%/*}" ] || fail "active, but its name resolves to '$found', not ${1%/*}; the agent says: $(muster-agent resolve web 2>&1)"
}

# Kills the main process of a unit, and waits until another is there and ready.
killed_comes_back() {
    unit=$1 signal=$2 patience=$3
    before=$(property "$unit" MainPID)
    kill "-$signal" "$before"
    back() { [ "$(property "$unit" ActiveState)" = active ] && [ "$(property "$unit" MainPID)" != "$before" ]; }
    within "$patience" back
}

step "install"
cd /payload
sh packaging/install.sh >/dev/null
for unit in muster-registrar muster-agent muster-director; do
    systemd-analyze verify --man=no "$unit.service" || fail "$unit.service"
    systemctl enable --quiet "$unit" || fail "$unit cannot be enabled"
done
for made in share/man/man1/muster-create-token.1 share/bash-completion/completions/muster \
    share/zsh/site-functions/_muster share/fish/vendor_completions.d/muster.fish; do
    [ -s "/usr/local/$made" ] || fail "$made is missing"
done
[ "$(stat -c %U:%a /var/lib/muster)" = root:755 ] || fail "mode of /var/lib/muster"
echo '# mine' >>/etc/muster/agent.toml
sh packaging/install.sh >/dev/null
grep -q '# mine' /etc/muster/agent.toml || fail "an existing configuration was replaced"

step "a host that has not joined runs no agent and no director"
systemctl start muster-agent muster-director
is muster-agent ActiveState inactive
is muster-director ActiveState inactive

step "registrar: init as root, then the unit"
ip link add lan0 type dummy
ip addr add 198.51.100.10/24 dev lan0
ip link set lan0 up
sed -i \
    -e 's|^#dns = "\[::\]:53"|dns = "198.51.100.10:53"|' \
    -e 's|^#registrars = .*|registrars = ["198.51.100.10:7500"]|' \
    -e 's|^#dns = \[\]|dns = ["198.51.100.10:853"]|' /etc/muster/registrar.toml
muster-registrar init --config /etc/muster/registrar.toml --domain net.example --public-address 198.51.100.10 \
    >/tmp/init || fail "init: $(cat /tmp/init)"
systemctl start muster-registrar || fail "the registrar does not start"
is muster-registrar ActiveState active
[ "$(stat -c %U "/proc/$(property muster-registrar MainPID)")" = muster ] || fail "the registrar runs as another user"
[ -z "$(find /var/lib/muster/registrar ! -user muster)" ] || fail "files of another user in the state directory"
[ -z "$(find /var/lib/muster/registrar -perm /077)" ] || fail "files that others can read"
curl -sf http://127.0.0.1:7580/readyz >/dev/null || fail "active, but not ready"
muster version | grep -q SERVING || fail "not healthy"

step "registrar: what root's commands make belongs to the service"
muster-registrar credential --config /etc/muster/registrar.toml --name alice --output /root/alice.toml >/dev/null
MUSTER_CREDENTIAL=/root/alice.toml muster get networks -o name | grep -qx network/default || fail "alice's credential"
muster-registrar ca rotate prepare --config /etc/muster/registrar.toml >/dev/null || fail "ca rotate prepare"
[ -z "$(find /var/lib/muster/registrar ! -user muster)" ] || fail "files of another user in the state directory"
systemctl reload muster-registrar || fail "reload"
muster version | grep -q SERVING || fail "not healthy after the reload"

step "agent: join, then the unit"
join=$(muster create token -l role=web 2>/dev/null | grep 'muster-agent join')
[ -n "$join" ] || fail "no join command"
$join --name web >/dev/null || fail "join"
echo 'nameserver 198.51.100.53' >/etc/resolv.conf
systemctl start muster-agent || fail "the agent does not start"
is muster-agent ActiveState active
first=$(address)
[ -n "$first" ] || fail "active, but no address"
resolves "$first"
muster-agent status || fail "status"
muster get devices -o wide

step "kill -9: the agent comes back by itself, with its address"
killed_comes_back muster-agent KILL 60
[ "$(address)" = "$first" ] || fail "another address: $(address), not $first"
resolves "$first"

step "kill -9: the registrar comes back by itself"
killed_comes_back muster-registrar KILL 60
muster get devices -o name | grep -qx device/web || fail "the device is gone"

step "director: join as root, then the unit"
join=$(muster create token --director 2>/dev/null | grep 'muster-director join')
[ -n "$join" ] || fail "no join command for directors"
$join --name d1 >/dev/null || fail "join of the director"
systemctl start muster-director || fail "the director does not start"
is muster-director ActiveState active
[ "$(stat -c %U "/proc/$(property muster-director MainPID)")" = muster-director ] || fail "the director runs as another user"
[ -z "$(find /var/lib/muster/director ! -user muster-director)" ] || fail "files of another user in the director's state directory"
[ -z "$(find /var/lib/muster/director -perm /077)" ] || fail "files of the director that others can read"
curl -sf http://127.0.0.1:7582/readyz >/dev/null || fail "the director is active, but not ready"
attached() { muster get director d1 -o json | tr -d ' \n' | grep -q '"attached":"\?1"\?'; }
within 30 attached
muster get directors

step "kill -9: the director comes back by itself, and the agent to it"
killed_comes_back muster-director KILL 60
within 30 attached

step "an agent that hangs is found by the watchdog"
mkdir -p /run/systemd/system/muster-agent.service.d
printf '[Service]\nWatchdogSec=8s\nTimeoutAbortSec=2s\n' >/run/systemd/system/muster-agent.service.d/short.conf
systemctl daemon-reload
systemctl restart muster-agent
sleep 12
is muster-agent NRestarts 0
killed_comes_back muster-agent STOP 60

step "stop and start"
systemctl stop muster-agent
is muster-agent Result success
if ip link show muster0 >/dev/null 2>&1; then fail "the interface stayed"; fi
[ "$(cat /etc/resolv.conf)" = 'nameserver 198.51.100.53' ] || fail "resolv.conf stayed: $(cat /etc/resolv.conf)"
systemctl start muster-agent || fail "the agent does not start again"
[ "$(address)" = "$first" ] || fail "another address"

step "leave"
restarts=$(property muster-agent NRestarts)
muster-agent leave || fail "leave"
ended() { [ "$(property muster-agent ActiveState)" = inactive ]; }
within 20 ended
sleep 3
is muster-agent ActiveState inactive
is muster-agent Result success
is muster-agent NRestarts "$restarts"
if ip link show muster0 >/dev/null 2>&1; then fail "the interface stayed"; fi
[ -z "$(muster get devices -o name)" ] || fail "the device stayed"
systemctl start muster-agent
is muster-agent ActiveState inactive

step "director and registrar stop cleanly"
systemctl stop muster-director
is muster-director Result success
systemctl stop muster-registrar
is muster-registrar Result success

step "exposure: what the sandboxes leave open"
for unit in muster-registrar muster-agent muster-director; do
    systemd-analyze security --no-pager "$unit" | grep -E '✗|Overall'
    # The scale goes from 0 to 10; below 4 systemd calls it OK.
    systemd-analyze security --no-pager --threshold=25 "$unit" >/dev/null || fail "$unit is more exposed than 2.5"
done
echo PASSED
