//! A host that sleeps until its NAT and its director have forgotten it is reached again when it wakes up. Meanwhile there
//! is time for those that roam.

use std::time::Duration;

use muster_common::time::Instant;
use muster_integration_tests::{Result, expect, nat::Kind, process::wait_for, scenario};
use rustix::process::Signal;

use crate::{
    roam::{self, wait_path},
    site::{Internet, Joined, together},
    traffic::reaches,
};

/// A director forgets addresses after a minute.
const SLEEP: Duration = Duration::from_secs(70);

#[test]
fn hosts_sleep_and_move() {
    together(&[
        a_host_that_wakes_up_is_reached,
        roam::transfers_survive_other_addresses_and_interfaces,
        roam::transfers_survive_a_nat_that_forgets,
        roam::a_lost_introduction_costs_a_few_seconds,
    ]);
}

fn a_host_that_wakes_up_is_reached() {
    scenario("sleep", |lab| {
        let mut internet = Internet::new(lab, 1)?;
        let (alice, bob) = (internet.host("alice", Kind::Open)?, internet.host("bob", Kind::Symmetric)?);
        let mut dave = internet.host("dave", Kind::PortRestricted)?;
        let director = internet.directors.remove(0);
        director.wait_attached(3)?;
        for (peer, path) in [(&alice, "direct"), (&bob, "relay")] {
            reaches(&peer.site.host, "dave")?;
            wait_path(peer, &dave, path)?;
        }
        let signal = |dave: &mut Joined, signal| match dave.agent.process() {
            Some(process) => process.signal(signal),
            None => Ok(()),
        };
        signal(&mut dave, Signal::STOP)?;
        let asleep = Instant::now();
        wait_for("the end of the night", SLEEP * 2, || {
            if Instant::now() - asleep > SLEEP { Ok(()) } else { Err("it is early".into()) }
        })?;
        let bound = director.metric("bound ")?;
        expect(bound == 2, "the director does not know any more where it is", &bound.to_string())?;
        dave.site.rebind()?;
        signal(&mut dave, Signal::CONT)?;
        for (peer, path) in [(&alice, "direct"), (&bob, "relay")] {
            reaches(&peer.site.host, "dave")?;
            reaches(&dave.site.host, peer.site.host.name())?;
            wait_path(peer, &dave, path)?;
        }
        Result::Ok(())
    });
}
