//! The relays that are compared: how each is started on its host, and what its load looks like.

use std::{path::PathBuf, time::Duration};

use clap::ValueEnum;
use muster_integration_tests::{Host, LabError, Process, Result, process::wait_for};

use crate::load::Kind;

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
    /// coturn with one relay thread, from a channel to a plain peer: its shortest way
    Coturn,
}

impl Peer {
    /// As it is called in figures and options.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Forwarder => "forwarder",
            Self::ForwarderRuns => "forwarder-runs",
            Self::Coturn => "coturn",
        }
    }

    /// What it is sent.
    pub(crate) const fn kind(self) -> Kind {
        match self {
            Self::Forwarder | Self::ForwarderRuns => Kind::Frame,
            Self::Coturn => Kind::Channel,
        }
    }

    /// Octets before the payload in what it sends.
    pub(crate) const fn header(self) -> usize {
        match self {
            Self::Forwarder | Self::ForwarderRuns => muster_common::frame::HEADER,
            Self::Coturn => 0,
        }
    }

    /// Starts it on `host`, on processor `cpu`.
    pub(crate) fn start(self, host: &Host, cpu: usize) -> Result<Process> {
        let mut command = host.command("taskset");
        command.args(["-c", &cpu.to_string()]);
        match self {
            Self::Forwarder | Self::ForwarderRuns => {
                command.arg(own()?).args(["forward", &PORT.to_string(), RECEIVER]);
                command.args((self == Self::ForwarderRuns).then_some("--offloads"));
            }
            Self::Coturn => {
                let database = host.directory().join("turndb");
                command.args(["turnserver", "-n", "--no-auth", "--no-tls", "--no-dtls", "--no-tcp"]);
                command.args(["--no-cli", "--simple-log", "--log-file", "stdout", "--relay-threads", "1"]);
                command.args(["--listening-ip", RELAY, "--listening-port", &PORT.to_string()]);
                command.args(["--relay-ip", RELAY_BEHIND, "--userdb"]).arg(database);
            }
        }
        let mut process = host.spawn(self.name(), command)?;
        wait_for(self.name(), Duration::from_secs(10), || {
            if !process.is_running() {
                return Err(format!("it ended: {}", process.log()));
            }
            let listening = format!("ss -Hlun 'sport = :{PORT}' | grep -q :{PORT}");
            host.sh(&listening).map(drop).map_err(|error| error.to_string())
        })?;
        Ok(process)
    }
}

/// This program.
pub(crate) fn own() -> Result<PathBuf> {
    std::env::current_exe().map_err(|source| LabError::File { path: "this program".into(), source })
}
