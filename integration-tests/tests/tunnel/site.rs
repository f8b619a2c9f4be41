//! Two devices, a router between them that is the registrar, too, and ways to run code on them.

use std::{fs::File, net::IpAddr, os::fd::AsFd, time::Duration};

use muster_integration_tests::{
    Host, Lab, LabError, Result,
    muster::{Agent, Registrar},
    process::wait_for,
    router::Router,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const PATIENCE: Duration = Duration::from_secs(30);

/// `alice` (192.0.2.10, 2001:db8:a::10) and `bob` (198.51.100.20, 2001:db8:b::20), both running, each with a cable to
/// `router`: its interfaces are called after them.
pub(crate) struct Site {
    pub(crate) alice: Agent,
    pub(crate) bob: Agent,
    pub(crate) router: Router,
    _registrar: Registrar,
}

/// What a site is like.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    /// Of all cables, in octets.
    pub(crate) cable_mtu: u32,
    /// Of the agents' interfaces, in octets; 0 for what fits into the cables.
    pub(crate) mtu: u32,
    /// `tunnel.offloads` of alice and bob.
    pub(crate) offloads: [bool; 2],
    /// `tunnel.threads` of both; 0 for what agents choose.
    pub(crate) threads: usize,
    /// The family that the tunnel's own datagrams take.
    pub(crate) outer: Family,
}

impl Default for Plan {
    fn default() -> Self {
        Self { cable_mtu: 1500, mtu: 0, offloads: [true; 2], threads: 0, outer: Family::V4 }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Family {
    V4,
    V6,
}

pub(crate) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Site {
    pub(crate) fn new(lab: &Lab, plan: Plan) -> Result<Self> {
        let (gateway, a, b) = (lab.host("router")?, lab.host("alice")?, lab.host("bob")?);
        let cable_mtu = plan.cable_mtu;
        for (host, v4, v6, own, own6) in [
            (&a, "192.0.2.1", "2001:db8:a::1", "192.0.2.10", "2001:db8:a::10"),
            (&b, "198.51.100.1", "2001:db8:b::1", "198.51.100.20", "2001:db8:b::20"),
        ] {
            let name = host.name();
            gateway.sh(&format!(
                "ip link add {name} mtu {cable_mtu} type veth peer name eth0 mtu {cable_mtu} netns {}
                 ip addr add {v4}/24 dev {name}; ip addr add {v6}/64 dev {name} nodad; ip link set {name} up",
                host.namespace()
            ))?;
            host.sh(&format!(
                "ip addr add {own}/24 dev eth0; ip addr add {own6}/64 dev eth0 nodad; ip link set eth0 up
                 ip route add default via {v4}; ip -6 route add default via {v6}"
            ))?;
        }
        let router = Router::new(gateway)?;
        // The tunnel of the other family finds no way.
        let closed = if plan.outer == Family::V4 { "ip6 nexthdr udp" } else { "ip protocol udp" };
        nft(
            router.host(),
            &format!(
                "table inet closed {{ chain forward {{ type filter hook forward priority filter; {closed} drop; }}; }}"
            ),
        )?;
        let mut registrar = Registrar::init(router.host(), "net.example", "192.0.2.1", "")?;
        registrar.serve()?;
        let agent = |host: &Host, offloads: bool| {
            let Plan { mtu, threads, .. } = plan;
            let tunnel = format!("[tunnel]\noffloads = {offloads}\nthreads = {threads}\n");
            Agent::new(host, &format!("[interface]\nmtu = {mtu}\n{tunnel}"))
        };
        let (mut alice, mut bob) = (agent(&a, plan.offloads[0])?, agent(&b, plan.offloads[1])?);
        let join = registrar.new_join_command(&["--reusable"])?;
        for (agent, name) in [(&mut alice, "alice"), (&mut bob, "bob")] {
            agent.join(&join, name)?;
            agent.run()?;
        }
        let site = Self { alice, bob, router, _registrar: registrar };
        for family in FAMILIES {
            let address = site.address(&site.bob, family)?;
            wait_for("alice to reach bob", PATIENCE, || {
                site.alice.host().sh(&format!("ping -c 1 -W 1 {address}")).map_err(|e| e.to_string())
            })?;
        }
        wait_for("a direct path", PATIENCE, || {
            let status = site.alice.ask(&["status"]).map_err(|e| e.to_string())?;
            if status.contains("direct") { Ok(()) } else { Err(status) }
        })?;
        Ok(site)
    }

    /// A device's virtual address.
    pub(crate) fn address(&self, agent: &Agent, family: Family) -> Result<IpAddr> {
        let kind = if family == Family::V4 { "inet" } else { "inet6" };
        let text = agent.host().sh("ip -o addr show dev muster0 scope global")?;
        let words: Vec<&str> = text.split_whitespace().collect();
        let found = words.windows(2).find(|pair| pair[0] == kind);
        found.and_then(|pair| pair[1].split('/').next()?.parse().ok()).ok_or_else(|| LabError::Command {
            command: format!("finding an address of {kind}"),
            reason: text,
        })
    }

    /// Whether the kernel hands `agent` batches at the tunnel's interface.
    pub(crate) fn has_offloads(agent: &Agent) -> Result<bool> {
        let features = agent.host().sh("PATH=$PATH:/usr/sbin:/sbin ethtool -k muster0")?;
        Ok(features.contains("tcp-segmentation-offload: on"))
    }

    /// Both ways: from, to.
    pub(crate) fn directions(&self) -> [(&Agent, &Agent); 2] {
        [(&self.alice, &self.bob), (&self.bob, &self.alice)]
    }
}

/// Moves this thread to `namespace`: what it opens from now on is there.
pub(crate) fn enter(namespace: &str) {
    let file = File::open(format!("/run/netns/{namespace}")).expect("the namespace is there");
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).expect("this thread may enter");
}

/// Gives `rules` to nftables on `host`.
pub(crate) fn nft(host: &Host, rules: &str) -> Result {
    host.sh(&format!("nft -f - <<'RULES'\n{rules}\nRULES")).map(drop)
}
