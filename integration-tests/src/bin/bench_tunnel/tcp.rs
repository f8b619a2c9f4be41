//! TCP: what arrives of one stream, of four, and of one in reverse, and the tunnel's processor time for it.

use muster_integration_tests::Result;

use crate::{
    Link, Options, iperf,
    pair::Pair,
    peers::Peer,
    results::{Better, Results},
    stop,
};

/// Name of a measure, and what makes iperf3 do it. The congestion control is the kernel's default, set explicitly.
const WAYS: [(&str, &str); 3] = [
    ("one TCP stream", "-C cubic"),
    ("four TCP streams", "-C cubic -P 4"),
    ("one TCP stream in reverse", "-C cubic -R"),
];

/// Measures the peers that are `named` over links of kind `link`.
pub(crate) fn measure(
    options: &Options,
    link: Link,
    named: impl Fn(Peer) -> bool,
    pairs: &mut [Pair],
    results: &mut Results,
) -> Result {
    for (way, arguments) in WAYS {
        let way = format!("{way}, {}", link.name());
        for _ in 0..options.rounds {
            for pair in pairs.iter_mut().filter(|pair| named(pair.peer)) {
                stop::check()?;
                let turn = turn(pair, &way, arguments, options.seconds, results);
                results.note(pair.peer, &way, turn);
            }
        }
    }
    Ok(())
}

fn turn(pair: &mut Pair, way: &str, arguments: &str, seconds: u32, results: &mut Results) -> Result {
    let run = iperf::run(pair, arguments, seconds)?;
    let rate = run.number("/end/sum_received/bits_per_second")?;
    let bytes = run.number("/end/sum_received/bytes")?;
    results.add(way, "Gbit/s", Better::More, pair.peer, rate / 1e9);
    if let Some(usage) = run.usage {
        let per_gb = usage.processor.as_secs_f64() / (bytes / 1e9);
        results.add(&format!("{way}: tunnel CPU"), "s/GB", Better::Less, pair.peer, per_gb);
        #[expect(clippy::cast_precision_loss, reason = "a count of context switches")]
        let switches = usage.switches as f64 / (bytes / 1e6);
        results.add(&format!("{way}: thread switches"), "per MB", Better::Less, pair.peer, switches);
    }
    Ok(())
}
