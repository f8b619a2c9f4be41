#!/bin/sh
# Checks that the default configuration files name every key there is, and no other, each with its real default:
# check-config.sh [DIRECTORY OF THE BINARIES]
set -eu

build=$(realpath "${1:-$(dirname "$0")/../target/release}")
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$work/empty.toml"

# The keys of a file with their sections, one a line: section.key
keys() { awk '/^\[/ { gsub(/[][]/, ""); section = $1 "." } /^[a-z0-9_]+ *=/ { print section $1 }' "$1" | sort; }

check() {
    program=$1 config=$2
    shift 2
    # As if every default were written out.
    sed -E 's/^#([a-z0-9_]+ = )/\1/' "config/$config.toml" >"$work/all.toml"
    "$build/$program" "$@" --print-config --config "$work/all.toml" >"$work/printed-all"
    "$build/$program" "$@" --print-config --config "$work/empty.toml" >"$work/printed"
    diff -u "$work/printed" "$work/printed-all" || { echo "config/$config.toml has another default than $program"; exit 1; }
    keys "$work/all.toml" >"$work/keys-all"
    keys "$work/printed" >"$work/keys"
    diff -u "$work/keys" "$work/keys-all" || { echo "config/$config.toml does not name every key of $program once"; exit 1; }
}

check muster-registrar registrar serve
check muster-agent agent run
check muster-director director run
