//! Tests of the data plane against the kernel. They need root, and each makes network namespaces of its own.
//! Without root they say that they are skipped, or fail if `MUSTER_REQUIRE_ROOT=1`.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "what tests do, in functions that they share"
)]

mod datapath;
mod device;
mod flood;
mod interface;
mod kernel;
mod namespace;
mod offloads;
mod path_mtu;
mod ping;
mod private_addresses;
mod relayed;
mod site;
mod stream;
mod threads;
mod tun;
mod virtual_ips;
mod wireguard_go;
