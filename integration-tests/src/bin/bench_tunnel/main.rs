//! `make bench-tunnel`: Muster's tunnel beside other userspace tunnels and beside none, in turn in the same run.
//! Each peer has two hosts of its own with a veth between them. Throughput, processor time, packets, round trips.
#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, reason = "a report is what this program is for")]

mod copier;
mod iperf;
mod latency;
mod limit;
mod nebula;
mod pair;
mod peers;
mod results;
mod stop;
mod tcp;
mod udp;
mod wireguard;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use muster_integration_tests::{Lab, Result, figures::Figures};

use crate::{pair::Pair, peers::Peer, results::Results};

/// Measures Muster's tunnel beside other userspace tunnels.
///
/// Prints one line a figure, separated by tabs, and writes the same to target/bench/tunnel.tsv; each sample goes to
/// standard error. Give the machine nothing else to do meanwhile.
#[derive(Parser)]
#[command(name = "bench-tunnel", after_help = "Example:\n  bench-tunnel --peer muster --only tcp --rounds 1")]
struct Options {
    /// Measure this peer alone (repeat for more); without it, every peer that is installed
    #[arg(long = "peer", value_enum, value_name = "PEER")]
    peers: Vec<Peer>,
    /// Measure this part alone (repeat for more)
    #[arg(long = "only", value_enum, value_name = "PART")]
    parts: Vec<Part>,
    /// Rounds, in each of which every peer has one turn; medians are reported
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Length of one turn
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// What the link between the hosts does, of TCP; without it, both in turn
    #[arg(long, value_enum)]
    link: Option<Link>,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// TCP: one stream, four streams, reverse
    Tcp,
    /// UDP: payloads of 64 and of 1,200 octets
    Udp,
    /// Round trips: idle, and one after the other
    Latency,
    /// The ciphers alone, on one core
    Limit,
}

/// What the link between two hosts does.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Link {
    /// A veth as it is: hands super-packets over whole, as no cable does
    Veth,
    /// Segmentation off at the sender, GRO on at the receiver: the closest to two network cards
    Cards,
}

impl Link {
    const fn name(self) -> &'static str {
        match self {
            Self::Veth => "veth",
            Self::Cards => "as cards",
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    stop::listen();
    match bench(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench-tunnel: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Measures what is asked for; whether every turn of every peer went well.
fn bench(options: &Options) -> Result<bool> {
    let wanted = |part| options.parts.is_empty() || options.parts.contains(&part);
    let named = |peer| options.peers.is_empty() || options.peers.contains(&peer);
    let networks = [Part::Tcp, Part::Udp, Part::Latency].into_iter().any(wanted);
    let lab = Lab::new()?;
    let mut figures = Figures::new("tunnel");
    let mut results = Results::default();
    let mut pairs: Vec<Pair> = Vec::new();
    for peer in Peer::value_variants().iter().copied().filter(|_| networks) {
        stop::check()?;
        // Round trips are those above the bare link's.
        let needed = named(peer) || (peer == Peer::None && wanted(Part::Latency));
        // Nobody would carry bytes so; but no tunnel wakes up in less time.
        if !needed || (peer == Peer::Copier && !wanted(Part::Latency)) {
            continue;
        }
        match peers::start(peer, &lab) {
            Ok(pair) => pairs.push(pair),
            Err(error) if peer == Peer::Muster => return Err(error),
            Err(error) => figures.missing(peer.name(), &error.to_string().replace(['\n', '\t'], " ")),
        }
    }
    let carries = |peer| named(peer) && peer != Peer::Copier;
    if wanted(Part::Tcp) {
        for link in [Link::Veth, Link::Cards] {
            if options.link.is_none_or(|only| only == link) {
                for pair in &pairs {
                    pair.set_link(link)?;
                }
                tcp::measure(options, link, carries, &mut pairs, &mut results)?;
            }
        }
        for pair in &pairs {
            pair.set_link(Link::Veth)?;
        }
    }
    if wanted(Part::Udp) {
        udp::measure(options, carries, &mut pairs, &mut results)?;
    }
    if wanted(Part::Latency) {
        latency::measure(options, &mut pairs, &mut results)?;
    }
    results.report(&mut figures);
    if wanted(Part::Limit) {
        limit::measure(options.rounds, &results, &mut figures)?;
    }
    figures.write()?;
    Ok(results.complete())
}
