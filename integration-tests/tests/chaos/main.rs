//! Everything fails in turn: registrars, etcd's members and directors are killed, frozen, cut off and given wrong clocks, in
//! random order, while devices come, go, look each other up and transfer. What has happened is then checked.
//!
//! `MUSTER_CHAOS_SECONDS` says for how long (default: 40), `MUSTER_CHAOS_SEED` which faults come when.
#![allow(
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says what it does"
)]

mod clients;
mod faults;
mod history;
mod traffic;
mod watches;
mod world;

use std::time::Duration;

use muster_common::time::Instant;
use muster_integration_tests::{Lab, Result, expect, scenario};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{clients::Clients, faults::Fault, traffic::Traffic, watches::Watches, world::World};

/// A number from the environment.
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn everything_fails_in_turn_and_nothing_is_lost() {
    scenario("chaos", |lab| {
        let seed = setting("MUSTER_CHAOS_SEED").unwrap_or_else(rand::random);
        let seconds = setting("MUSTER_CHAOS_SECONDS").unwrap_or(40);
        eprintln!("chaos: {seconds} s with MUSTER_CHAOS_SEED={seed}");
        run(lab, seed, Duration::from_secs(seconds))
    });
}

fn run(lab: &Lab, seed: u64, time: Duration) -> Result {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut world = World::new(lab)?;
    let watches = Watches::start(&world)?;
    let traffic = Traffic::start(&world)?;
    let clients = Clients::start(&world, rng.random())?;

    let start = Instant::now();
    while Instant::now() - start < time {
        let faults = Fault::draw(&mut rng);
        eprintln!("chaos: {:>6.1} s {faults:?}", (Instant::now() - start).as_secs_f64());
        for fault in &faults {
            fault.inject(&mut world)?;
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(1500..7000)));
        for fault in &faults {
            fault.heal(&mut world)?;
        }
        world.supervise()?;
        std::thread::sleep(Duration::from_millis(rng.random_range(500..4000)));
    }
    world.settle()?;
    traffic.end()?;
    let history = clients.end()?;
    eprintln!("chaos: {}", history.summary());
    let problems = history.check();
    expect(
        problems.is_empty(),
        "nothing had two owners, and nothing acknowledged was lost",
        &problems.join("\n"),
    )?;
    for registrar in 0..world.registrars.len() {
        let problems = history.check_final(&world.devices_at(registrar)?);
        expect(problems.is_empty(), "what is acknowledged is there", &problems.join("\n"))?;
    }
    watches.end(&world)?;
    world.stop()
}
