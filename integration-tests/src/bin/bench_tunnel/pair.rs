//! Two hosts with a veth between them, the tunnel of one peer across, and what its processes use.

use std::{fs, path::Path, process::Command, time::Duration};

use muster_integration_tests::{
    Host, Lab, LabError, Process, Result,
    muster::{Agent, Registrar},
    process::{check, wait_for},
};

use crate::{Link, peers::Peer};

/// Addresses of the hosts on their link.
pub(crate) const LEFT: &str = "192.0.2.10";
pub(crate) const RIGHT: &str = "192.0.2.20";

/// One peer, ready to be measured.
pub(crate) struct Pair {
    pub(crate) peer: Peer,
    pub(crate) left: Host,
    pub(crate) right: Host,
    /// Where `right` is reached from `left`.
    pub(crate) target: String,
    server: Option<Process>,
    pub(crate) tunnel: Tunnel,
}

/// What carries packets between the hosts, ended when dropped.
pub(crate) enum Tunnel {
    None,
    Processes {
        processes: Vec<Process>,
        /// Files outside the lab that the processes leave behind.
        sockets: Vec<String>,
    },
    Muster {
        agents: Box<[Agent; 2]>,
        _registrar: Box<Registrar>,
    },
}

/// What the tunnel's processes at both ends have used so far.
#[derive(Clone, Copy, Default)]
pub(crate) struct Usage {
    /// Time on a processor, of all threads, in user and in system mode.
    pub(crate) processor: Duration,
    /// Times that a thread gave way to another.
    pub(crate) switches: u64,
}

/// Two new hosts, plugged into each other.
pub(crate) fn hosts(lab: &Lab, peer: Peer) -> Result<(Host, Host)> {
    let (left, right) = (lab.host(&format!("{}-l", peer.name()))?, lab.host(&format!("{}-r", peer.name()))?);
    let mut command = Command::new("ip");
    command.args(["-n", left.namespace(), "link", "add", "eth0", "type", "veth", "peer", "name", "eth0"]);
    command.args(["netns", right.namespace()]);
    check(command)?;
    for (host, address) in [(&left, LEFT), (&right, RIGHT)] {
        host.sh(&format!("ip link set eth0 up; ip address add {address}/24 dev eth0"))?;
    }
    Ok((left, right))
}

impl Pair {
    /// Waits until `tunnel` carries packets from `left` to `target`, which is `right`.
    pub(crate) fn new(peer: Peer, hosts: (Host, Host), target: &str, tunnel: Tunnel) -> Result<Self> {
        let (left, right) = hosts;
        let mut pair = Self { peer, left, right, target: target.to_owned(), server: None, tunnel };
        wait_for("an answer through the tunnel", Duration::from_secs(20), || {
            pair.left.sh(&format!("ping -c 1 -W 1 {target}")).map_err(|e| e.to_string())
        })?;
        if let Tunnel::Muster { agents, .. } = &pair.tunnel {
            let [left, _] = &**agents;
            wait_for("a direct path", Duration::from_secs(20), || {
                let status = left.ask(&["status", "-o", "json"]).map_err(|e| e.to_string())?;
                if status.contains("\"direct\"") { Ok(()) } else { Err(status) }
            })?;
        }
        pair.serve()?;
        Ok(pair)
    }

    /// Starts the server of iperf3 (again): after a client that broke off, the old one may be busy for long.
    pub(crate) fn serve(&mut self) -> Result {
        self.server = None;
        let mut command = self.right.command("iperf3");
        command.arg("-s");
        self.server = Some(self.right.spawn("iperf3", command)?);
        wait_for("iperf3 to listen", Duration::from_secs(10), || {
            self.right.sh("ss -Hltn 'sport = :5201' | grep -q 5201").map(drop).map_err(|e| e.to_string())
        })
    }

    /// Has the link of both hosts behave as `link`.
    pub(crate) fn set_link(&self, link: Link) -> Result {
        let features = match link {
            Link::Veth => "tso on gso on tx-udp-segmentation on gro off",
            Link::Cards => "tso off gso off tx-udp-segmentation off gro on",
        };
        for host in [&self.left, &self.right] {
            host.sh(&format!("PATH=$PATH:/usr/sbin:/sbin ethtool -K eth0 {features}"))?;
        }
        Ok(())
    }

    /// What the tunnel's processes have used so far; none without a tunnel.
    pub(crate) fn usage(&mut self) -> Result<Option<Usage>> {
        let processes: Vec<&Process> = match &mut self.tunnel {
            Tunnel::None => return Ok(None),
            Tunnel::Processes { processes, .. } => processes.iter().collect(),
            Tunnel::Muster { agents, .. } => {
                agents.iter_mut().filter_map(|agent| agent.process()).map(|process| &*process).collect()
            }
        };
        let mut total = Usage::default();
        for process in processes {
            // A thread may end while it is looked at; the next look does not see it.
            total.processor += process.processor_time().or_else(|_| process.processor_time())?;
            total.switches += switches(process.id())?;
        }
        Ok(Some(total))
    }
}

impl Usage {
    /// What was used from `earlier` to `self`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            processor: self.processor.saturating_sub(earlier.processor),
            switches: self.switches.saturating_sub(earlier.switches),
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if let Self::Processes { processes, sockets } = self {
            processes.clear();
            for socket in sockets {
                let _ = fs::remove_file(socket);
            }
        }
    }
}

/// Context switches of all threads of a process.
fn switches(process: u32) -> Result<u64> {
    let tasks = format!("/proc/{process}/task");
    let entries = fs::read_dir(&tasks).map_err(|source| LabError::File { path: tasks, source })?;
    let count = |path: &Path| -> u64 {
        let status = fs::read_to_string(path.join("status")).unwrap_or_default();
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().next_back()?.parse::<u64>().ok()).sum()
    };
    Ok(entries.flatten().map(|entry| count(&entry.path())).sum())
}
