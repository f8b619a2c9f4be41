//! What any tunnel in userspace costs: packets are copied between a TUN device and a UDP socket, and nothing else is done.

use std::time::Duration;

use muster_integration_tests::{Host, Lab, Process, Result, process::wait_for};

use crate::{
    pair::{LEFT, Pair, RIGHT, Tunnel, hosts},
    peers::{Peer, tool},
};

/// socat on two hosts, with the MTU that the WireGuards have.
pub(crate) fn start(lab: &Lab) -> Result<Pair> {
    let socat = tool("socat")?;
    let (left, right) = hosts(lab, Peer::Copier)?;
    let start = |host: &Host, inner: &str, outer: &str, other: &str| -> Result<Process> {
        let mut command = host.command(&socat);
        command.arg(format!("TUN:{inner}/24,tun-name=copier0,iff-no-pi,iff-up"));
        command.arg(format!("UDP4-DATAGRAM:{other}:4242,bind={outer}:4242"));
        let process = host.spawn("socat", command)?;
        wait_for("the copier", Duration::from_secs(10), || {
            host.sh("ip link set copier0 mtu 1420").map_err(|error| error.to_string())
        })?;
        Ok(process)
    };
    let processes = vec![start(&left, "10.9.0.1", LEFT, RIGHT)?, start(&right, "10.9.0.2", RIGHT, LEFT)?];
    Pair::new(Peer::Copier, (left, right), "10.9.0.2", Tunnel::Processes { processes, sockets: Vec::new() })
}
