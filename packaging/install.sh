#!/bin/sh
# Installs what `cargo build --release` made: binaries, units, completions, man pages, and configuration where there
# is none yet. For packagers: DESTDIR is put before every path, and nothing outside it is touched.
#
#   PREFIX     where programs go          [/usr/local]
#   SYSCONFDIR where configuration goes   [/etc]
#   BUILD_DIR  where the binaries are     [target/release, of the project]
set -eu

DESTDIR=${DESTDIR:+$(realpath -m "$DESTDIR")}
cd "$(dirname "$0")/.."
PREFIX=${PREFIX:-/usr/local}
SYSCONFDIR=${SYSCONFDIR:-/etc}
BUILD_DIR=${BUILD_DIR:-target/release}

bin=$PREFIX/bin
share=$DESTDIR$PREFIX/share
lib=$DESTDIR$PREFIX/lib

for program in muster muster-registrar muster-agent muster-director; do
    if [ ! -x "$BUILD_DIR/$program" ]; then
        echo "$BUILD_DIR/$program is missing; build it first: cargo build --release --workspace" >&2
        exit 1
    fi
    install -D -m 755 "$BUILD_DIR/$program" "$DESTDIR$bin/$program"
    # Those that can tell their own grammar get completions and man pages.
    if "$BUILD_DIR/$program" completion bash >/dev/null 2>&1; then
        install -d "$share/bash-completion/completions" "$share/zsh/site-functions" "$share/fish/vendor_completions.d"
        "$BUILD_DIR/$program" completion bash >"$share/bash-completion/completions/$program"
        "$BUILD_DIR/$program" completion zsh >"$share/zsh/site-functions/_$program"
        "$BUILD_DIR/$program" completion fish >"$share/fish/vendor_completions.d/$program.fish"
        "$BUILD_DIR/$program" man --dir "$share/man/man1"
    fi
done

for unit in muster-registrar muster-agent muster-director; do
    install -d "$lib/systemd/system"
    sed -e "s|@BINDIR@|$bin|" "packaging/systemd/$unit.service" >"$lib/systemd/system/$unit.service"
    chmod 644 "$lib/systemd/system/$unit.service"
done
install -D -m 644 packaging/systemd/sysusers.conf "$lib/sysusers.d/muster.conf"
install -D -m 644 packaging/systemd/tmpfiles.conf "$lib/tmpfiles.d/muster.conf"
install -d -m 755 "$DESTDIR$SYSCONFDIR/muster" "$DESTDIR/var/lib/muster"

for config in registrar agent director; do
    # The explained defaults, for comparison; and as configuration, unless there is one.
    install -D -m 644 "packaging/config/$config.toml" "$share/doc/muster/$config.toml"
    target=$DESTDIR$SYSCONFDIR/muster/$config.toml
    if [ -e "$target" ]; then
        echo "kept $target"
    else
        install -m 644 "packaging/config/$config.toml" "$target"
    fi
done

[ -n "$DESTDIR" ] && exit 0
if [ "$(id -u)" -eq 0 ] && [ -d /run/systemd/system ]; then
    systemd-sysusers
    systemd-tmpfiles --create "$lib/tmpfiles.d/muster.conf"
    systemctl daemon-reload
fi
cat <<'NEXT'
Installed. To start a network:  muster-registrar init --domain net.example   (prints how hosts join)
                                systemctl enable --now muster-registrar
On hosts that join:             muster-agent join …                          (as printed)
                                systemctl enable --now muster-agent
On a host that relays:          muster create token --director               (prints how it joins)
                                systemctl enable --now muster-director
NEXT
