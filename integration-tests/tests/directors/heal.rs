//! What happens on the way of two hosts that only directors connect: one drains or is killed, a NAT forgets, no registrar is
//! there, a device is revoked.

use std::time::Duration;

use muster_integration_tests::{
    Lab, Process, Result, expect, muster::Director, nat::Kind, process::wait_for, scenario,
};
use rustix::process::Signal;

use crate::site::{Internet, Joined};

const PATIENCE: Duration = Duration::from_secs(30);

/// Two hosts behind symmetric NATs, with two directors, and their home: (internet, alice, bob, home, other director).
fn two_hosts(lab: &Lab) -> Result<(Internet<'_>, Joined, Joined, Director, Director)> {
    let mut internet = Internet::new(lab, 2)?;
    let (alice, bob) = (internet.host("alice", Kind::Symmetric)?, internet.host("bob", Kind::Symmetric)?);
    let (mut one, mut two) = (internet.directors.remove(0), internet.directors.remove(0));
    one.wait_attached(2)?;
    two.wait_attached(2)?;
    wait_for("the registrar to know both directors of both", PATIENCE, || {
        let devices =
            internet.registrar.muster(&["get", "devices", "-o", "json"]).map_err(|e| e.to_string())?;
        if devices.matches("\"secondDirector\"").count() == 2 { Ok(()) } else { Err(devices) }
    })?;
    alice_reaches_bob(&alice)?;
    // The one that relays is called home here.
    let before = (one.metric("frames_total")?, two.metric("frames_total")?);
    let address = alice.site.host.sh("dig +short bob.net.example")?;
    alice.site.host.sh(&format!("ping -c 50 -i 0.01 -W 5 {address}"))?;
    let after = (one.metric("frames_total")?, two.metric("frames_total")?);
    if after.1 - before.1 > after.0 - before.0 {
        std::mem::swap(&mut one, &mut two);
    }
    Ok((internet, alice, bob, one, two))
}

fn alice_reaches_bob(alice: &Joined) -> Result {
    wait_for("alice to reach bob", PATIENCE, || {
        let ping = "ping -c 1 -W 1 $(dig +short bob.net.example)";
        alice.site.host.sh(ping).map(drop).map_err(|e| e.to_string())
    })
}

/// Pings bob a hundred times a second until it is told to stop.
fn pings(alice: &Joined) -> Result<Process> {
    let mut ping = alice.site.host.command("sh");
    ping.args(["-ec", "exec ping -i 0.01 $(dig +short bob.net.example)"]);
    alice.site.host.spawn("ping", ping)
}

/// How many answers the pings have had.
fn answers(ping: &Process) -> usize {
    ping.log().matches("bytes from").count()
}

/// Waits until the pings have had so many more answers.
fn more_answers(ping: &Process, more: usize) -> Result {
    let before = answers(ping);
    wait_for("answers to pings", PATIENCE, || {
        let had = answers(ping) - before;
        if had >= more { Ok(()) } else { Err(format!("{had} of {more}")) }
    })
}

/// Ends the pings: how many were not answered.
fn lost(mut ping: Process) -> Result<usize> {
    ping.signal(Signal::INT)?;
    ping.wait(PATIENCE)?;
    let log = ping.log();
    let number = |word: &str| {
        let line = log.lines().find(|line| line.contains("packets transmitted")).unwrap_or_default();
        let field = line.split(", ").find(|field| field.contains(word)).unwrap_or_default();
        field.split(' ').next().and_then(|n| n.parse::<usize>().ok()).unwrap_or(0)
    };
    let (sent, received) = (number("transmitted"), number("received"));
    expect(sent > 0 && received <= sent, "a summary", &log)?;
    // The last is still on its way when ping ends.
    Ok((sent - received).saturating_sub(1))
}

#[test]
fn a_director_that_drains_loses_no_packet() {
    scenario("draining director", |lab| {
        let (_internet, alice, _bob, mut home, other) = two_hosts(lab)?;
        let ping = pings(&alice)?;
        more_answers(&ping, 100)?;
        home.stop()?;
        more_answers(&ping, 300)?;
        let lost = lost(ping)?;
        expect(lost == 0, "no ping lost", &lost.to_string())?;
        expect(other.metric("frames_total")? > 600, "the other one relays", "it does not")
    });
}

#[test]
fn a_director_that_dies_is_replaced_within_seconds() {
    scenario("dying director", |lab| {
        let (_internet, alice, _bob, mut home, _other) = two_hosts(lab)?;
        let ping = pings(&alice)?;
        more_answers(&ping, 100)?;
        home.kill();
        more_answers(&ping, 300)?;
        let lost = lost(ping)?;
        // A hundred a second.
        expect(lost < 500, "less than five seconds of pings lost", &lost.to_string())
    });
}

#[test]
fn directors_do_without_registrars() {
    scenario("directors without registrar", |lab| {
        let (mut internet, alice, _bob, mut home, mut other) = two_hosts(lab)?;
        let ping = pings(&alice)?;
        internet.registrar.kill();
        more_answers(&ping, 200)?;
        // One after the other is restarted, and admits the devices again.
        for director in [&mut other, &mut home] {
            director.stop()?;
            director.run()?;
            director.wait_attached(2)?;
        }
        more_answers(&ping, 200)?;
        let lost = lost(ping)?;
        expect(lost < 300, "hardly a ping lost", &lost.to_string())
    });
}

#[test]
fn a_nat_that_forgets_is_found_out() {
    scenario("rebinding NATs", |lab| {
        let (_internet, alice, bob, _home, _other) = two_hosts(lab)?;
        let ping = pings(&alice)?;
        more_answers(&ping, 100)?;
        for side in [&alice, &bob] {
            side.site.rebind()?;
            more_answers(&ping, 200)?;
        }
        let lost = lost(ping)?;
        expect(lost < 600, "a few seconds of pings lost", &lost.to_string())
    });
}

#[test]
fn a_revoked_device_is_detached_within_a_second() {
    scenario("revoked device", |lab| {
        let (internet, _alice, _bob, home, other) = two_hosts(lab)?;
        internet.registrar.muster(&["revoke", "device", "bob"])?;
        for director in [&home, &other] {
            wait_for("bob to be detached", Duration::from_secs(1), || match director.metric("attached ") {
                Ok(1) => Ok(()),
                other => Err(format!("{other:?}")),
            })?;
        }
        Ok(())
    });
}
