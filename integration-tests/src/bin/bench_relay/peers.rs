//! The relays that are compared: how each is started on its host, and what its load looks like.

use std::{path::PathBuf, time::Duration};

use clap::ValueEnum;
use muster_integration_tests::{LabError, Process, Result, process::wait_for};

use crate::{
    director::{LOAD_PORT, Network, Pair},
    load::Kind,
    turns::Hosts,
};

/// Where relays are reached by whoever sends, what they send from, and where the receiver is.
pub(crate) const RELAY: &str = "192.0.2.2";
pub(crate) const RELAY_BEHIND: &str = "198.51.100.2";
pub(crate) const RECEIVER: &str = "198.51.100.3:7600";
pub(crate) const PORT: u16 = 7501;

/// A relay.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Peer {
    /// Receives, overwrites a header, sends: one datagram a message
    Forwarder,
    /// The same with `UDP_GRO` and `UDP_SEGMENT`
    ForwarderRuns,
    /// muster-director with one thread, from one attached device to another
    Director,
    /// coturn with one relay thread, from a channel to a plain peer: its shortest way
    Coturn,
}

impl Peer {
    /// As it is called in figures and options.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Forwarder => "forwarder",
            Self::ForwarderRuns => "forwarder-runs",
            Self::Director => "director",
            Self::Coturn => "coturn",
        }
    }

    /// What it is sent.
    pub(crate) const fn kind(self) -> Kind {
        match self {
            Self::Forwarder | Self::ForwarderRuns | Self::Director => Kind::Frame,
            Self::Coturn => Kind::Channel,
        }
    }

    /// Octets before the payload in what it sends.
    pub(crate) const fn header(self) -> usize {
        match self {
            Self::Forwarder | Self::ForwarderRuns | Self::Director => muster_common::frame::HEADER,
            Self::Coturn => 0,
        }
    }
}

/// A relay that runs.
pub(crate) enum Relay<'a> {
    /// A process that needs no more.
    Process(Process),
    /// The director, and the two devices that are attached to it.
    Director(&'a mut Network, Box<Pair>),
}

impl<'a> Relay<'a> {
    /// Starts `peer` on processor `cpu`.
    pub(crate) fn start(peer: Peer, hosts: &Hosts, network: &'a mut Network, cpu: usize) -> Result<Self> {
        let host = &hosts.relay;
        let mut command = host.command("taskset");
        command.args(["-c", &cpu.to_string()]);
        match peer {
            Peer::Director => {
                network.start(Some(cpu))?;
                let pair = network.attach(&hosts.sender, &hosts.receiver);
                if pair.is_err() {
                    network.director.kill();
                }
                return Ok(Self::Director(network, Box::new(pair?)));
            }
            Peer::Forwarder | Peer::ForwarderRuns => {
                command.arg(own()?).args(["forward", &PORT.to_string(), RECEIVER]);
                command.args((peer == Peer::ForwarderRuns).then_some("--offloads"));
            }
            Peer::Coturn => {
                let database = host.directory().join("turndb");
                command.args(["turnserver", "-n", "--no-auth", "--no-tls", "--no-dtls", "--no-tcp"]);
                command.args(["--no-cli", "--simple-log", "--log-file", "stdout", "--relay-threads", "1"]);
                command.args(["--listening-ip", RELAY, "--listening-port", &PORT.to_string()]);
                command.args(["--relay-ip", RELAY_BEHIND, "--userdb"]).arg(database);
            }
        }
        let mut process = host.spawn(peer.name(), command)?;
        wait_for(peer.name(), Duration::from_secs(10), || {
            if !process.is_running() {
                return Err(format!("it ended: {}", process.log()));
            }
            let listening = format!("ss -Hlun 'sport = :{PORT}' | grep -q :{PORT}");
            host.sh(&listening).map(drop).map_err(|error| error.to_string())
        })?;
        Ok(Self::Process(process))
    }

    /// Time that it has had on the processor.
    pub(crate) fn processor_time(&mut self) -> Result<Duration> {
        match self {
            Self::Process(process) => process.processor_time(),
            Self::Director(network, _) => {
                network.director.process().map_or(Ok(Duration::ZERO), |process| process.processor_time())
            }
        }
    }

    /// What its load has to be told.
    pub(crate) fn load(&self) -> Vec<String> {
        match self {
            Self::Process(_) => Vec::new(),
            Self::Director(_, pair) => vec![
                format!("--port={LOAD_PORT}"),
                format!("--session={}", pair.session),
                format!("--handle={}", pair.handle.0),
            ],
        }
    }
}

impl Drop for Relay<'_> {
    fn drop(&mut self) {
        if let Self::Director(network, _) = self {
            network.director.kill();
        }
    }
}

/// This program.
pub(crate) fn own() -> Result<PathBuf> {
    std::env::current_exe().map_err(|source| LabError::File { path: "this program".into(), source })
}
