//! UDP: packets that arrive of as many as the sender can send, and the tunnel's processor time for each.

use muster_integration_tests::Result;

use crate::{
    Options, iperf,
    pair::Pair,
    peers::Peer,
    results::{Better, Results},
    stop,
};

/// Name of a measure, and what makes iperf3 do it.
const WAYS: [(&str, &str); 3] = [
    ("UDP 64 B", "-u -b 0 -l 64"),
    ("UDP 1200 B", "-u -b 0 -l 1200"),
    // 20,000 × 1,200 × 8
    ("UDP 1200 B at 20k/s", "-u -b 192M -l 1200"),
];

/// Measures the peers that are `named`.
pub(crate) fn measure(
    options: &Options,
    named: impl Fn(Peer) -> bool,
    pairs: &mut [Pair],
    results: &mut Results,
) -> Result {
    for (way, arguments) in WAYS {
        for _ in 0..options.rounds {
            for pair in pairs.iter_mut().filter(|pair| named(pair.peer)) {
                stop::check()?;
                let turn = turn(pair, way, arguments, options.seconds, results);
                results.note(pair.peer, way, turn);
            }
        }
    }
    Ok(())
}

fn turn(pair: &mut Pair, way: &str, arguments: &str, seconds: u32, results: &mut Results) -> Result {
    let run = iperf::run(pair, arguments, seconds)?;
    let received = run.number("/end/sum/packets")? - run.number("/end/sum/lost_packets")?;
    let rate = received / run.number("/end/sum/seconds")? / 1e3;
    results.add(&format!("{way}, received"), "k/s", Better::More, pair.peer, rate);
    if let Some(usage) = run.usage {
        let per_packet = usage.processor.as_secs_f64() * 1e6 / received;
        results.add(&format!("{way}: tunnel CPU"), "µs/packet", Better::Less, pair.peer, per_packet);
    }
    Ok(())
}
