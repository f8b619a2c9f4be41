//! The peers: which there are, where their programs are, and how each is started.

use std::{env, path::PathBuf};

use clap::ValueEnum;
use muster_integration_tests::{
    Lab, LabError, Result,
    muster::{Agent, Registrar},
};

use crate::{
    copier, nebula,
    pair::{LEFT, Pair, Tunnel, hosts},
    wireguard,
};

/// What carries packets between two hosts.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Peer {
    /// No tunnel: the bare veth
    None,
    /// This build's muster-agent
    Muster,
    /// wireguard-go of this Debian (of Debian 12: of 2022, one packet a system call)
    WireguardGo,
    /// Debian's newest wireguard-go, which `make bench-peers` fetches
    WireguardGoNew,
    /// Mullvad's GotaTun
    Gotatun,
    /// Cloudflare's BoringTun
    Boringtun,
    /// Nebula, with AES-256-GCM as by default
    Nebula,
    /// No tunnel, but a program at each end that only copies packets (socat): what waking up costs; round trips alone
    Copier,
}

impl Peer {
    /// As it is called in figures and options.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Muster => "muster",
            Self::WireguardGo => "wireguard-go",
            Self::WireguardGoNew => "wireguard-go-new",
            Self::Gotatun => "gotatun",
            Self::Boringtun => "boringtun",
            Self::Nebula => "nebula",
            Self::Copier => "copier",
        }
    }
}

/// Starts `peer` on two hosts of its own.
pub(crate) fn start(peer: Peer, lab: &Lab) -> Result<Pair> {
    match peer {
        Peer::None => Pair::new(peer, hosts(lab, peer)?, crate::pair::RIGHT, Tunnel::None),
        Peer::Muster => muster(lab),
        Peer::Nebula => nebula::start(lab),
        Peer::Copier => copier::start(lab),
        Peer::WireguardGo => wireguard::start(lab, peer, "wireguard-go", &["-f"]),
        Peer::WireguardGoNew => wireguard::start(lab, peer, "wireguard-go-new", &["-f"]),
        Peer::Gotatun => {
            wireguard::start(lab, peer, "gotatun", &["--foreground", "--disable-drop-privileges"])
        }
        Peer::Boringtun => {
            wireguard::start(lab, peer, "boringtun-cli", &["--foreground", "--disable-drop-privileges"])
        }
    }
}

/// Agents on both hosts, and a registrar beside the left one.
fn muster(lab: &Lab) -> Result<Pair> {
    let (left, right) = hosts(lab, Peer::Muster)?;
    let mut registrar = Registrar::init(&left, "net.example", LEFT, "")?;
    registrar.serve()?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let mut agents = [Agent::new(&left, "")?, Agent::new(&right, "")?];
    for (agent, name) in agents.iter_mut().zip(["left", "right"]) {
        agent.join(&join, name)?;
        agent.run()?;
    }
    let target = left.sh("dig +short right.net.example")?.trim().to_owned();
    Pair::new(
        Peer::Muster,
        (left, right),
        &target,
        Tunnel::Muster { agents: Box::new(agents), _registrar: Box::new(registrar) },
    )
}

/// Where `program` is: in `target/tools/bin`, which `make bench-peers` fills, else on the path.
pub(crate) fn tool(program: &str) -> Result<PathBuf> {
    let own = env::current_exe().unwrap_or_default();
    let tools = own.ancestors().skip(1).take(3).map(|directory| directory.join("tools/bin"));
    // Where this program was built with another target directory.
    let tools = tools.chain([PathBuf::from("target/tools/bin")]);
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut all = tools.chain(env::split_paths(&path)).chain(system).map(|directory| directory.join(program));
    all.find(|file| file.is_file()).and_then(|file| file.canonicalize().ok()).ok_or_else(|| {
        let remedy = match program {
            "wg" => "install Debian's wireguard-tools",
            "wireguard-go" => "install Debian's wireguard-go",
            "socat" => "install Debian's socat",
            _ => "`make bench-peers` gets it",
        };
        LabError::Command { command: program.to_owned(), reason: format!("not installed; {remedy}") }
    })
}
