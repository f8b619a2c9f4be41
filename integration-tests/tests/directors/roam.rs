//! Hosts that move while a transfer runs: another address, another interface, another port of the NAT. And one that is
//! not told that somebody is about to call.

use std::time::Duration;

use muster_integration_tests::{Host, Result, expect, nat::Kind, process::wait_for, scenario};

use crate::{
    site::{Internet, Joined},
    traffic::{Pings, Transfer, reaches},
};

/// Addresses behind a NAT that change again soon are told after half a minute.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest that pings may stay away. What is usual is far less, and printed.
const GAP: Duration = Duration::from_secs(10);

/// Waits until both use such a path to each other.
pub(crate) fn wait_path(a: &Joined, b: &Joined, path: &str) -> Result {
    wait_for(&format!("a path that is {path}"), PATIENCE, || {
        let of = |from: &Joined, to: &Joined| {
            from.agent.path_to(to.site.host.name()).map(|(path, _)| path).map_err(|e| e.to_string())
        };
        let paths = (of(a, b)?, of(b, a)?);
        if paths.0 == path && paths.1 == path { Ok(()) } else { Err(format!("{paths:?}")) }
    })
}

/// Transfers both ways, and a hundred pings a second, go on while `change` is made.
#[expect(clippy::print_stderr, reason = "the gap is a figure worth to be seen")]
fn survives(what: &str, port: u16, a: &Host, b: &Host, change: impl FnOnce() -> Result) -> Result {
    let transfers = [Transfer::start(a, b, port)?, Transfer::start(b, a, port)?];
    let pings = Pings::start(a, b.name())?;
    pings.more(100)?;
    change()?;
    pings.more(100)?;
    transfers.iter().try_for_each(Transfer::more)?;
    let pinged = pings.end()?;
    transfers.into_iter().try_for_each(Transfer::end)?;
    eprintln!("{what}: {pinged:?}");
    expect(pinged.gap < GAP, "pings stay away for a moment only", &format!("{what}: {pinged:?}"))
}

pub(crate) fn transfers_survive_other_addresses_and_interfaces() {
    scenario("roaming", |lab| {
        let mut internet = Internet::new(lab, 1)?;
        let alice = internet.host("alice", Kind::Open)?;
        let bob = internet.host("bob", Kind::PortRestricted)?;
        let cafe = internet.site("cafe", Kind::PortRestricted)?;
        internet.directors[0].wait_attached(2)?;
        let host = &alice.site.host;
        reaches(host, "bob")?;
        wait_path(&alice, &bob, "direct")?;
        survives("another address", 9001, host, &bob.site.host, || {
            host.sh("ip addr del 198.51.100.1/24 dev eth0; ip addr add 198.51.100.120/24 dev eth0")?;
            host.sh("ip route replace default via 198.51.100.254").map(drop)
        })?;
        wait_path(&alice, &bob, "direct")?;
        // From the internet to behind a NAT.
        survives("another interface", 9002, host, &bob.site.host, || {
            host.sh("ip link set eth0 down")?;
            cafe.plug(host, 7)
        })?;
        wait_path(&alice, &bob, "direct")
    });
}

pub(crate) fn transfers_survive_a_nat_that_forgets() {
    scenario("rebinding in mid-transfer", |lab| {
        let mut internet = Internet::new(lab, 1)?;
        for (n, kind, path) in [(0, Kind::PortRestricted, "direct"), (1, Kind::Symmetric, "relay")] {
            let mut host = |name: &str| internet.host(&format!("{name}-{}", kind.name()), kind);
            let (alice, bob) = (host("alice")?, host("bob")?);
            reaches(&alice.site.host, bob.site.host.name())?;
            wait_path(&alice, &bob, path)?;
            let what = format!("a rebound NAT, {path}");
            survives(&what, 9003 + n, &alice.site.host, &bob.site.host, || alice.site.rebind())?;
            wait_path(&alice, &bob, path)?;
        }
        Ok(())
    });
}

pub(crate) fn a_lost_introduction_costs_a_few_seconds() {
    scenario("lost introduction", |lab| {
        let mut internet = Internet::new(lab, 1)?;
        let (alice, bob) = (internet.host("alice", Kind::Symmetric)?, internet.host("bob", Kind::Symmetric)?);
        internet.directors[0].wait_attached(2)?;
        wait_for("the registrar to know where both are", PATIENCE, || {
            let shown = internet.registrar.muster(&["get", "devices", "-o", "wide"]);
            let shown = shown.map_err(|e| e.to_string())?;
            if shown.matches("relay-1").count() == 2 { Ok(()) } else { Err(shown) }
        })?;
        // Bob's connections to the registrar are reset, of which the registrar is not told: what it says gets lost.
        let rule = "ip daddr 198.51.100.200 tcp dport 7500 reject with tcp reset";
        bob.site.host.sh(&format!(
            "nft add table inet lost; nft add chain inet lost out '{{ type filter hook output priority 0; }}'; \
             nft add rule inet lost out {rule}; \
             nft add rule inet lost out ip6 daddr 2001:db8::200 drop; \
             ss -K dport 7500 || true"
        ))?;
        wait_for("bob to lose the registrar", PATIENCE, || {
            let status = bob.agent.ask(&["status", "-o", "json"]).map_err(|e| e.to_string())?;
            let status: serde_json::Value = serde_json::from_str(&status).map_err(|e| e.to_string())?;
            match status.pointer("/registrar/connected") {
                Some(serde_json::Value::Bool(true)) => Err(status.to_string()),
                _ => Ok(()),
            }
        })?;
        let address = alice.site.host.sh("dig +short bob.net.example")?;
        alice.site.host.try_sh(&format!("ping -c 2 -i 0.5 -W 1 {address}"))?;
        expect(bob.agent.path_to("alice")?.0 == "none", "bob knows nothing of alice", "he does")?;
        bob.site.host.sh("nft delete table inet lost")?;
        reaches(&alice.site.host, "bob")
    });
}
