//! `make bench-relay`: what a director relays a second on one processor, beside coturn and beside a bare forwarder of the
//! same system calls. Without a subcommand it makes the lab and reports; `forward`, `load`, … run inside it.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a report is what this program is for")]

mod agents;
mod coturn;
mod crowd;
mod director;
mod forwarder;
mod load;
mod peers;
mod tcp;
mod turns;

use std::{net::SocketAddr, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};
use muster_integration_tests::device::Error;

use crate::peers::Peer;

/// Measures relays: datagrams that arrive behind them, and the processor time that they take.
///
/// Prints one line a figure, separated by tabs, and writes the same to target/bench/relay.tsv; each sample goes to
/// standard error. Give the machine nothing else to do meanwhile.
#[derive(Parser)]
#[command(name = "bench-relay", after_help = "Example:\n  bench-relay --peer coturn --rounds 1")]
struct Options {
    /// Measure this alone (repeat for more)
    #[arg(long = "only", value_enum, value_name = "PART")]
    parts: Vec<Part>,
    /// Measure this relay alone (repeat for more)
    #[arg(long = "peer", value_enum, value_name = "PEER")]
    peers: Vec<Peer>,
    /// Rounds, in each of which every relay has one turn; medians are reported
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Length of one turn
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// What the links do; without it, both in turn
    #[arg(long, value_enum)]
    link: Option<Link>,
    #[command(subcommand)]
    role: Option<Role>,
}

/// What can be measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Datagrams, beside other relays
    Udp,
    /// Frames over TCP
    Tcp,
    /// Agents: first packets, direct paths, roaming, and directors that drain
    Agents,
    /// Ten thousand devices: memory, and how soon they are back after a restart
    Devices,
}

/// What the links between the hosts do.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Link {
    /// A veth as it is: hands runs of datagrams over whole, as no cable does
    Veth,
    /// Segmentation off at the sender, GRO on at the receiver: the closest to network cards
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

/// What this program does inside the lab.
#[derive(Subcommand)]
enum Role {
    /// Forwards what comes to a port
    #[command(hide = true)]
    Forward {
        port: u16,
        to: SocketAddr,
        #[arg(long)]
        offloads: bool,
    },
    /// Sends as fast as it can, until it is ended
    #[command(hide = true)]
    Load(load::Load),
    /// Holds a port and reads nothing
    #[command(hide = true)]
    Hold { address: SocketAddr },
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = match &options.role {
        Some(Role::Forward { port, to, offloads }) => forwarder::run(*port, *to, *offloads),
        Some(Role::Load(load)) => load::run(load),
        Some(Role::Hold { address }) => load::hold(*address),
        None => turns::bench(&options).map_err(Error::from),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-relay: {error}");
            ExitCode::FAILURE
        }
    }
}
