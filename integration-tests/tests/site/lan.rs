//! An internet with a registrar and a caller, and a LAN behind a gate: hosts on it have no agent and no route anywhere.

use std::time::Duration;

use muster_integration_tests::{
    Host, Lab, Result, Switch,
    muster::{Agent, JoinCommand, Registrar},
    process::wait_for,
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What the gates are configured with.
pub(crate) const SITE: &str = "[site]\n\
    hosts = [{ name = \"printer\", address = \"192.168.7.9\" }, { name = \"printer-6\", address = \"fd07::9\" }, \
    { name = \"camera\", address = \"192.168.7.10\" }]\n\
    subnets = [\"192.168.7.0/24\"]\n";

pub(crate) struct Lan {
    pub(crate) registrar: Registrar,
    /// On the internet, at 198.51.100.10.
    pub(crate) caller: Agent,
    /// On both, at 198.51.100.20 and 192.168.7.1.
    pub(crate) gate: Agent,
    /// At 192.168.7.9, 192.168.7.10 and 192.168.8.9, and the same of fd07::.
    pub(crate) printer: Host,
    join: JoinCommand,
    switches: [Switch; 2],
}

impl Lan {
    /// All joined; the agents run, and the caller has reached the gate.
    pub(crate) fn new(lab: &Lab) -> Result<Self> {
        let (internet, site) = (lab.switch("internet")?, lab.switch("site")?);
        let plugged = |name: &str, number: u8| -> Result<Host> {
            let host = lab.host(name)?;
            internet.plug(&host, &[&format!("198.51.100.{number}/24")])?;
            Ok(host)
        };
        let hq = plugged("hq", 200)?;
        let mut registrar = Registrar::init(&hq, "net.example", "198.51.100.200", "")?;
        registrar.serve()?;
        let join = registrar.new_join_command(&["--reusable"])?;
        let agent = |host: &Host, more: &str| -> Result<Agent> {
            let mut agent = Agent::new(host, more)?;
            agent.join(&join, host.name())?;
            agent.run()?;
            Ok(agent)
        };
        let caller = agent(&plugged("alice", 10)?, "")?;
        let gate = plugged("gate", 20)?;
        site.plug(&gate, &["192.168.7.1/24", "fd07::1/64"])?;
        gate.route("192.168.8.0/24 dev eth1")?;
        let printer = lab.host("printer")?;
        let addresses = ["192.168.7.9/24", "192.168.7.10/24", "192.168.8.9/32", "fd07::9/64", "fd07::10/64"];
        site.plug(&printer, &addresses)?;
        let gate = agent(&gate, SITE)?;
        let lan = Self { registrar, caller, gate, printer, join, switches: [internet, site] };
        reaches(lan.caller.host(), "gate.net.example")?;
        Ok(lan)
    }

    /// Another gate of the same LAN, which speaks for no hosts, at 198.51.100.`number` and 192.168.7.2.
    pub(crate) fn second_gate(&self, lab: &Lab, number: u8) -> Result<Agent> {
        let host = lab.host("gate-2")?;
        let [internet, site] = &self.switches;
        internet.plug(&host, &[&format!("198.51.100.{number}/24")])?;
        site.plug(&host, &["192.168.7.2/24", "fd07::2/64"])?;
        let mut agent = Agent::new(&host, "[site]\nsubnets = [\"192.168.7.0/24\"]\n")?;
        agent.join(&self.join, host.name())?;
        agent.run()?;
        Ok(agent)
    }

    /// All that speaking for others changes on the gate's host; the table of virtual IPs has nothing to do with that.
    pub(crate) fn traces(&self) -> Result<String> {
        self.gate.host().sh(
            "{ nft list tables | grep -v _services || true; }; cd /proc/sys/net; grep -H . ipv4/conf/*/forwarding ipv6/conf/*/forwarding \
             ipv6/conf/*/accept_ra | grep -v muster0; \
             for file in ipv6/conf/*/force_forwarding; do [ ! -e $file ] || grep -H . $file; done | grep -v muster0 || true",
        )
    }
}

/// Waits until a ping of `target` comes back.
pub(crate) fn reaches(host: &Host, target: &str) -> Result {
    wait_for(&format!("{} to reach {target}", host.name()), PATIENCE, || {
        let output = host.try_sh(&format!("ping -n -c 1 -W 1 {target}")).map_err(|e| e.to_string())?;
        if output.status.success() { Ok(()) } else { Err(format!("{}{}", output.stdout, output.stderr)) }
    })
}

/// Whether one of three pings of `target` comes back.
pub(crate) fn is_reached(host: &Host, target: &str) -> Result<bool> {
    Ok(host.try_sh(&format!("ping -n -c 3 -i 0.3 -W 1 {target}"))?.stdout.contains(" bytes from "))
}
