//! The simulator's runs: a corpus of seeds, each of them reproducible. `MUSTER_SIM_SEED=n` replays one,
//! `MUSTER_SIM_RUNS=n` plays that many, from that seed or from one that is made up and printed.
#![allow(
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test fails by panicking, and tells what it ran"
)]

use std::collections::BTreeMap;

use muster_integration_tests::sim::{self, Counts, Scenario, Summary};

/// Played in every test run: some of all kinds, and then those that find the agent that spun while a renewal had no
/// answer and no connection.
const LIVES: [u64; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 32, 71];
/// As many as take half a minute without optimisation.
const PATHS: std::ops::Range<u64> = 1..33;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text}: write a number")))
}

fn run(scenario: Scenario, seed: u64) -> Summary {
    let echo = std::env::var_os("MUSTER_SIM_TRACE").is_some();
    sim::run(scenario, seed, echo).unwrap_or_else(|failure| panic!("{failure}"))
}

fn play(scenario: Scenario, corpus: &[u64]) {
    let (seed, runs) = (number("MUSTER_SIM_SEED"), number("MUSTER_SIM_RUNS"));
    let seeds: Vec<u64> = match (seed, runs) {
        (None, None) => corpus.to_vec(),
        (Some(seed), runs) => (seed..).take(runs.unwrap_or(1).try_into().unwrap()).collect(),
        (None, Some(runs)) => {
            let since = muster_common::time::Timestamp::now().since_epoch().as_nanos();
            let first = u64::try_from(since % 1_000_000_007).unwrap() * 1_000_000;
            (first..).take(runs.try_into().unwrap()).collect()
        }
    };
    let all = seeds.len();
    let mut failed = BTreeMap::new();
    for seed in seeds {
        let echo = std::env::var_os("MUSTER_SIM_TRACE").is_some();
        match sim::run(scenario, seed, echo) {
            Ok(summary) if all < 100 => println!("{summary:?}"),
            Ok(_) => {}
            Err(failure) => drop(failed.insert(seed, failure)),
        }
    }
    for failure in failed.values() {
        println!("seed {}: {}", failure.seed, failure.violation);
    }
    if let Some((_, first)) = failed.first_key_value() {
        panic!("{} of {all} runs failed; the first:\n{first}", failed.len());
    }
}

#[test]
fn what_must_hold_holds() {
    play(Scenario::Lives, &LIVES);
}

#[test]
fn paths_are_found() {
    play(Scenario::Paths, &PATHS.collect::<Vec<u64>>());
}

#[test]
fn a_seed_is_one_run() {
    for scenario in [Scenario::Lives, Scenario::Paths] {
        let (one, again, other) = (run(scenario, 1), run(scenario, 1), run(scenario, 2));
        assert_eq!(one, again);
        assert_ne!(one.hash, other.hash);
    }
}

/// A simulation in which nothing happens proves nothing.
#[test]
fn much_happens() {
    let counts: Vec<Counts> = (1..=6).map(|seed| run(Scenario::Lives, seed).counts).collect();
    let sum = |count: fn(&Counts) -> u64| counts.iter().map(count).sum::<u64>();
    assert!(sum(|c| c.joined) > 20 && sum(|c| c.sessions) > 60 && sum(|c| c.lookups) > 100, "{counts:?}");
    assert!(sum(|c| c.delivered) > 200 && sum(|c| c.unreachable) > 50, "{counts:?}");
    assert!(sum(|c| c.conflicts) > 0 && sum(|c| c.renewed) > 0 && sum(|c| c.seconds) > 86_400, "{counts:?}");
    let counts: Vec<Counts> = (1..=6).map(|seed| run(Scenario::Paths, seed).counts).collect();
    let sum = |count: fn(&Counts) -> u64| counts.iter().map(count).sum::<u64>();
    assert!(sum(|c| c.attached) > 60 && sum(|c| c.relayed) > 500, "{counts:?}");
    assert!(
        sum(|c| c.direct) > 10 && sum(|c| c.by_director) > 10 && sum(|c| c.delivered) > 1_000,
        "{counts:?}"
    );
}
