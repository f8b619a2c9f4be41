//! The simulator's runs: a corpus of seeds, each of them reproducible. `MUSTER_SIM_SEED=n` replays one,
//! `MUSTER_SIM_RUNS=n` plays that many new ones, from a seed that is printed.

use std::collections::BTreeMap;

use muster_integration_tests::sim::{self, Summary};

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}: no number")))
}

fn run(seed: u64) -> Summary {
    let echo = std::env::var_os("MUSTER_SIM_TRACE").is_some();
    sim::run(seed, echo).unwrap_or_else(|failure| panic!("{failure}"))
}

#[test]
fn what_must_hold_holds() {
    let first = number("MUSTER_SIM_SEED").unwrap_or(1);
    for seed in first..first + number("MUSTER_SIM_RUNS").unwrap_or(1) {
        println!("{:?}", run(seed));
    }
}
