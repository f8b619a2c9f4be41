//! The store is away: what was read from it is served on, marked as stale, agents that are known come and go, and nothing can
//! be written; afterwards all is as before.

use std::time::Duration;

use muster_common::time::Instant;
use muster_integration_tests::{expect, process::wait_for};
use rustix::process::Signal;

use crate::site::{PATIENCE, REGISTRARS, wait_connected, with_site};

/// Until a write has failed at the latest.
const CLEARLY: Duration = Duration::from_secs(20);

#[test]
fn without_its_store_a_registrar_serves_on_and_says_so() {
    with_site("the store is away", |site| {
        let join = site.first.new_join_command(&["--reusable"])?;
        let mut alice = site.agent("alice", REGISTRARS[0], 20, &join)?;
        let mut bob = site.agent("bob", REGISTRARS[0], 21, &join)?;
        alice.run()?;
        bob.run()?;
        let soa = "dig +tries=1 +time=2 @127.0.0.1 net.example SOA";
        let answer = site.hosts[0].sh(soa)?;
        expect(answer.contains("NOERROR") && !answer.contains("EDE"), "an answer like any other", &answer)?;

        site.etcd.signal(Signal::STOP)?;
        wait_for("operators to be told", PATIENCE, || {
            let output = site.first.try_muster(&["get", "devices"]).map_err(|e| e.to_string())?;
            let is_told = output.stdout.contains("alice") && output.stderr.contains("may be out of date");
            if output.status.success() && is_told { Ok(()) } else { Err(format!("{output:?}")) }
        })?;
        let answer = site.hosts[0].sh(soa)?;
        expect(answer.contains("NOERROR") && answer.contains("EDE: 3"), "a stale answer", &answer)?;
        let asked = Instant::now();
        let output = site.first.try_muster(&["label", "device", "alice", "rack=1"])?;
        let took = Instant::now() - asked;
        expect(!output.status.success() && output.stderr.contains("store"), "a refusal", &output.stderr)?;
        expect(took < CLEARLY, "soon", &format!("{took:?}: {}", output.stderr))?;
        // One that is known starts anew, from nothing but its identity, and finds the other.
        alice.stop()?;
        let state = alice.state();
        alice.host().sh(&format!("cd {} && rm -f config peers names", state.display()))?;
        alice.run()?;
        wait_connected(&alice)?;
        wait_for("bob to be reached", PATIENCE, || {
            let ping = "ping -c 1 -W 1 $(dig +short bob.net.example)";
            alice.host().sh(ping).map_err(|e| e.to_string())
        })?;

        site.etcd.signal(Signal::CONT)?;
        wait_for("writes to be taken again", PATIENCE, || {
            site.first
                .muster(&["label", "device", "alice", "rack=1", "--overwrite"])
                .map_err(|e| e.to_string())
        })?;
        wait_for("nothing to be stale", PATIENCE, || {
            let output = site.first.try_muster(&["get", "devices"]).map_err(|e| e.to_string())?;
            if output.stderr.is_empty() { Ok(()) } else { Err(output.stderr) }
        })?;
        wait_connected(&alice)?;
        wait_connected(&bob)
    });
}
