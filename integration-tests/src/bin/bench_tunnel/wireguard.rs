//! Userspace WireGuards that are configured through `wg`: wireguard-go, BoringTun, GotaTun.

use std::{process, time::Duration};

use muster_integration_tests::{Host, Lab, Process, Result, process::wait_for};

use crate::{
    pair::{LEFT, Pair, RIGHT, Tunnel, hosts},
    peers::{Peer, tool},
};

/// One end of a tunnel.
struct End<'a> {
    host: &'a Host,
    interface: String,
    private: String,
    public: String,
    /// The address inside.
    inner: &'static str,
    /// The address on the link.
    outer: &'static str,
}

impl<'a> End<'a> {
    /// Interface names are the host's own, but the directory of control sockets is everyone's: the name of `peer`'s
    /// interface is unlike any other's, also of another run.
    fn new(host: &'a Host, peer: Peer, side: char, inner: &'static str, outer: &'static str) -> Result<Self> {
        let private = host.sh("wg genkey")?.trim().to_owned();
        let public = host.sh(&format!("echo {private} | wg pubkey"))?.trim().to_owned();
        let interface = format!("b{}{}{side}", process::id(), peer as u8);
        Ok(Self { host, interface, private, public, inner, outer })
    }

    fn socket(&self) -> String {
        format!("/var/run/wireguard/{}.sock", self.interface)
    }

    /// Starts `program` and has it talk to `other`.
    fn start(&self, program: &str, arguments: &[&str], other: &Self) -> Result<Process> {
        let (host, interface) = (self.host, &self.interface);
        let mut command = host.command(tool(program)?);
        command.args(arguments).arg(interface);
        let mut process = host.spawn(program, command)?;
        wait_for(program, Duration::from_secs(10), || {
            if !process.is_running() {
                return Err(format!("it ended: {}", process.log()));
            }
            host.sh(&format!("wg show {interface}")).map_err(|e| e.to_string())
        })?;
        let file = host.directory().join("wg.key").display().to_string();
        // The MTU is what WireGuard has room for in a link's 1,500 octets.
        host.sh(&format!(
            "umask 077; echo {private} > {file}; \
             wg set {interface} private-key {file} listen-port 51820 peer {public} endpoint {outer}:51820 \
             allowed-ips {other_inner}/32; \
             ip address add {inner}/24 dev {interface}; ip link set {interface} mtu 1420 up",
            private = self.private,
            public = other.public,
            outer = other.outer,
            other_inner = other.inner,
            inner = self.inner,
        ))?;
        Ok(process)
    }
}

/// `program` on two hosts, with a tunnel of MTU 1,420.
pub(crate) fn start(lab: &Lab, peer: Peer, program: &str, arguments: &[&str]) -> Result<Pair> {
    tool(program)?;
    tool("wg")?;
    let (left, right) = hosts(lab, peer)?;
    let ends =
        [End::new(&left, peer, 'l', "10.9.0.1", LEFT)?, End::new(&right, peer, 'r', "10.9.0.2", RIGHT)?];
    let [a, b] = &ends;
    let mut tunnel = Tunnel::Processes { processes: Vec::new(), sockets: vec![a.socket(), b.socket()] };
    for (end, other) in [(a, b), (b, a)] {
        let process = end.start(program, arguments, other)?;
        if let Tunnel::Processes { processes, .. } = &mut tunnel {
            processes.push(process);
        }
    }
    Pair::new(peer, (left, right), "10.9.0.2", tunnel)
}
