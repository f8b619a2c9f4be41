//! Round trips of ping: every 5 ms on an idle tunnel, and each sent when the last is back. What a tunnel adds is
//! counted from the bare link's, measured in the same round.

use std::time::Duration;

use muster_integration_tests::{LabError, Result, figures::quantile};

use crate::{
    Options,
    pair::Pair,
    results::{Better, Results},
    stop,
};

/// Milliseconds between pings of an idle tunnel.
const INTERVAL: u32 = 5;

/// Measures all peers. The first of `pairs` is the bare link.
pub(crate) fn measure(options: &Options, pairs: &mut [Pair], results: &mut Results) -> Result {
    let idle = format!("-i 0.00{INTERVAL} -c {}", options.seconds * 1000 / INTERVAL);
    let hot = format!("-A -w {}", options.seconds);
    for (way, arguments) in [("idle round trip", idle), ("hot round trip", hot)] {
        for _ in 0..options.rounds {
            let mut bare = None;
            for pair in pairs.iter() {
                stop::check()?;
                let turn = turn(pair, way, &arguments, &mut bare, results);
                results.note(pair.peer, way, turn);
            }
        }
    }
    Ok(())
}

fn turn(pair: &Pair, way: &str, arguments: &str, bare: &mut Option<f64>, results: &mut Results) -> Result {
    // Wakes up what slept while others were measured.
    pair.left.sh(&format!("ping -q -n -i 0.01 -c 10 {}", pair.target))?;
    let printed = pair.left.sh(&format!("ping -n {arguments} {}", pair.target))?;
    let mut times: Vec<Duration> = printed
        .lines()
        .filter_map(|line| line.split_once("time=")?.1.strip_suffix(" ms")?.parse::<f64>().ok())
        .map(|milliseconds| Duration::from_secs_f64(milliseconds / 1e3))
        .collect();
    if times.is_empty() {
        return Err(LabError::Command { command: format!("ping {arguments}"), reason: printed });
    }
    let p50 = quantile(&mut times, 0.5).as_secs_f64() * 1e6;
    results.add(&format!("{way}, p50"), "µs", Better::Less, pair.peer, p50);
    match bare {
        None => *bare = Some(p50),
        Some(bare) => {
            let added = p50 - *bare;
            results.add(&format!("{way}, p50 above bare"), "µs", Better::Less, pair.peer, added);
        }
    }
    Ok(())
}
