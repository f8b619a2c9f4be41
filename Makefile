# Muster. `make demo` shows a network at work; `make test` runs every test.

CARGO ?= cargo
TOOLS := target/tools
AS_ROOT := integration-tests/as-root.sh
PREPARE := integration-tests/prepare.sh

# command=package, of Debian 12
BUILD_PACKAGES := cc=build-essential
LAB_PACKAGES := ip=iproute2 nft=nftables ping=iputils-ping curl=curl python3=python3
TEST_PACKAGES := $(LAB_PACKAGES) dig=dnsutils kdig=knot-dnsutils etcd=etcd-server wireguard-go=wireguard-go \
	wg=wireguard-tools openssl=openssl iperf3=iperf3 sqlite3=sqlite3 faketime=faketime man=man-db \
	delv=dnsutils dnsmasq=dnsmasq musl-gcc=musl-tools dbus-daemon=dbus-daemon \
	qemu-system-x86_64=qemu-system-x86 modinfo=kmod ethtool=ethtool tcpdump=tcpdump tinyproxy=tinyproxy-bin \
	miniupnpd=miniupnpd-nftables strace=strace mkfs.ext4=e2fsprogs e2fsck=e2fsprogs nsenter=util-linux
BENCH_PACKAGES := dig=dnsutils knotd=knot nsd=nsd unbound=unbound dnsmasq=dnsmasq openssl=openssl taskset=util-linux \
	etcd=etcd-server wireguard-go=wireguard-go wg=wireguard-tools iperf3=iperf3 ethtool=ethtool turnserver=coturn socat=socat
SYSTEMD_PACKAGES := debootstrap=debootstrap qemu-system-x86_64=qemu-system-x86 mke2fs=e2fsprogs strip=binutils

.PHONY: help demo test test-chaos test-systemd lint build release install fmt bench bench-build bench-control bench-agent bench-dns bench-tunnel bench-relay bench-services bench-peers fuzz clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

build: ## Build everything, for development
	@$(PREPARE) $(BUILD_PACKAGES)
	$(CARGO) build --workspace --locked

demo: build ## Make a network of three hosts in namespaces, and show it at work
	@$(PREPARE) $(LAB_PACKAGES) dig=dnsutils
	@MAKE_TARGET=demo $(AS_ROOT) target/debug/muster-demo

test: build ## Run every test (as root, or in a user namespace)
	@$(PREPARE) $(TEST_PACKAGES)
	@integration-tests/fetch-resolved.sh $(TOOLS)/resolved || true
	@integration-tests/fetch-kernel.sh $(TOOLS)/kernel || true
	packaging/check-config.sh target/debug
	$(CARGO) test --workspace --locked --no-run
	MAKE_TARGET=test MUSTER_REQUIRE_ROOT=1 $(AS_ROOT) $(CARGO) test --workspace --locked --no-fail-fast

release: ## Build everything, for use
	@$(PREPARE) $(BUILD_PACKAGES)
	$(CARGO) build --locked --release -p muster-cli -p muster-registrar -p muster-agent -p muster-director

bench: bench-control bench-agent bench-dns bench-tunnel bench-relay bench-services ## Measure everything (some minutes; on a machine that has nothing else to do)

bench-control bench-agent bench-dns bench-tunnel bench-relay bench-services: bench-build ## One part: registrar, agent, DNS, tunnel, relay, or Services
	@MAKE_TARGET=$@ $(AS_ROOT) target/release/$@

bench-peers: ## Install what else the tunnel is compared with: GotaTun, BoringTun, Debian's newest wireguard-go and Nebula
	@$(PREPARE) $(BUILD_PACKAGES)
	integration-tests/fetch-peers.sh $(TOOLS)
	$(CARGO) install --locked --quiet --root $(TOOLS) gotatun-cli boringtun-cli

bench-build: release
	@$(PREPARE) $(LAB_PACKAGES) $(BENCH_PACKAGES)
	$(CARGO) build --locked --release -p muster-integration-tests --bins

install: release ## Install binaries, units, configuration, completions, man pages (DESTDIR, PREFIX)
	DESTDIR="$(DESTDIR)" PREFIX="$(or $(PREFIX),/usr/local)" packaging/install.sh

fuzz: ## Test with many more random cases than `make test` (FUZZ_CASES each, SIM_RUNS; those of FUZZ_SEED again)
	@$(PREPARE) $(BUILD_PACKAGES)
	PROPTEST_CASES=$(or $(FUZZ_CASES),100000) PROPTEST_RNG_SEED=$(or $(FUZZ_SEED),$(shell date +%s)) \
		$(CARGO) test --release --locked -p muster-common -p muster-net -p muster-dns -p muster-cli -p muster-tunnel \
		-p muster-director --no-fail-fast
	MUSTER_SIM_SEED=$(or $(FUZZ_SEED),$(shell date +%s)) MUSTER_SIM_RUNS=$(or $(SIM_RUNS),1000) \
		$(CARGO) test --release --locked -p muster-integration-tests --test simulation

test-chaos: build ## Have everything fail in turn for CHAOS_SECONDS (default 600), and kill a registrar KILLS times (default 1000)
	@$(PREPARE) $(TEST_PACKAGES)
	$(CARGO) test -p muster-integration-tests --locked --no-run --test chaos --test registrar_faults
	MAKE_TARGET=test-chaos MUSTER_REQUIRE_ROOT=1 MUSTER_CHAOS_SECONDS=$(or $(CHAOS_SECONDS),600) \
		$(if $(CHAOS_SEED),MUSTER_CHAOS_SEED=$(CHAOS_SEED)) MUSTER_KILLS=$(or $(KILLS),1000) \
		$(AS_ROOT) $(CARGO) test -p muster-integration-tests --locked --no-fail-fast \
		--test chaos --test registrar_faults -- --nocapture --test-threads=1

test-systemd: build ## Boot a small Debian in an emulator, and see the units at work there
	@$(PREPARE) $(SYSTEMD_PACKAGES)
	BUILD_DIR=target/debug packaging/test-systemd.sh

fmt: ## Format the code
	$(CARGO) fmt --all

lint: $(TOOLS)/bin/cargo-deny $(TOOLS)/node_modules/.bin/buf ## Check format, lints, protos and dependencies
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(TOOLS)/node_modules/.bin/buf lint proto
	$(TOOLS)/bin/cargo-deny --all-features --locked check bans licenses sources

$(TOOLS)/bin/cargo-deny:
	@mkdir -p $(TOOLS)/bin
	if command -v cargo-deny >/dev/null; then ln -sf "$$(command -v cargo-deny)" $@; \
	else $(CARGO) install --locked --quiet --root $(TOOLS) cargo-deny; fi

$(TOOLS)/node_modules/.bin/buf:
	@$(PREPARE) npm=npm
	npm install --silent --no-save --prefix $(TOOLS) @bufbuild/buf

clean: ## Remove what was built
	$(CARGO) clean
