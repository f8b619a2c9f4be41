//! What happens on the way of two hosts that only directors connect: one drains or is killed, a NAT forgets, no registrar is
//! there, a device is revoked.

use std::time::Duration;

use muster_integration_tests::{
    Lab, Result, expect, muster::Director, nat::Kind, process::wait_for, scenario,
};

use crate::{
    site::{Internet, Joined, together},
    traffic::{Pings, reaches},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// Two hosts behind symmetric NATs, with two directors, and their home: (internet, alice, bob, home, other director).
pub(crate) fn two_hosts(lab: &Lab) -> Result<(Internet<'_>, Joined, Joined, Director, Director)> {
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
    reaches(&alice.site.host, "bob")?;
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

#[test]
fn directors_come_and_go_and_nats_forget() {
    together(&[
        a_director_that_drains_loses_no_packet,
        a_director_that_dies_is_replaced_within_seconds,
        directors_do_without_registrars,
        a_nat_that_forgets_is_found_out,
    ]);
}

fn a_director_that_drains_loses_no_packet() {
    scenario("draining director", |lab| {
        let (_internet, alice, _bob, mut home, other) = two_hosts(lab)?;
        let ping = Pings::start(&alice.site.host, "bob")?;
        ping.more(100)?;
        home.stop()?;
        ping.more(300)?;
        let lost = ping.end()?.lost;
        expect(lost == 0, "no ping lost", &lost.to_string())?;
        expect(other.metric("frames_total")? > 600, "the other one relays", "it does not")
    });
}

fn a_director_that_dies_is_replaced_within_seconds() {
    scenario("dying director", |lab| {
        let (_internet, alice, _bob, mut home, _other) = two_hosts(lab)?;
        let ping = Pings::start(&alice.site.host, "bob")?;
        ping.more(100)?;
        home.kill();
        ping.more(300)?;
        let lost = ping.end()?.lost;
        // A hundred a second.
        expect(lost < 500, "less than five seconds of pings lost", &lost.to_string())
    });
}

fn directors_do_without_registrars() {
    scenario("directors without registrar", |lab| {
        let (mut internet, alice, _bob, mut home, mut other) = two_hosts(lab)?;
        let ping = Pings::start(&alice.site.host, "bob")?;
        internet.registrar.kill();
        ping.more(200)?;
        // One after the other is restarted, and admits the devices again.
        other.kill();
        other.run()?;
        other.wait_attached(2)?;
        home.stop()?;
        home.run()?;
        home.wait_attached(2)?;
        ping.more(200)?;
        let lost = ping.end()?.lost;
        expect(lost < 300, "hardly a ping lost", &lost.to_string())
    });
}

fn a_nat_that_forgets_is_found_out() {
    scenario("rebinding NATs", |lab| {
        let (_internet, alice, bob, _home, _other) = two_hosts(lab)?;
        let ping = Pings::start(&alice.site.host, "bob")?;
        ping.more(100)?;
        for side in [&alice, &bob] {
            side.site.rebind()?;
            ping.more(200)?;
        }
        let lost = ping.end()?.lost;
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
