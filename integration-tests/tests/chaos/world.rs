//! Three etcd members, three registrars, two directors and three hosts with agents, on one network.

use std::{collections::BTreeMap, time::Duration};

use muster_integration_tests::{
    Host, Lab, Process, Result, failed,
    muster::{Agent, Director, JoinCommand, Program, Registrar},
    process::wait_for,
};
use muster_registrar::store::etcd::{EtcdConfig, EtcdStore};
use rustix::process::Signal;

pub(crate) const MEMBERS: [&str; 3] = ["198.51.100.1", "198.51.100.2", "198.51.100.3"];
pub(crate) const REGISTRARS: [&str; 3] = ["198.51.100.11", "198.51.100.12", "198.51.100.13"];
const DIRECTORS: [&str; 2] = ["198.51.100.21", "198.51.100.22"];
const AGENTS: [(&str, &str); 3] =
    [("alice", "198.51.100.31"), ("bob", "198.51.100.32"), ("carol", "198.51.100.33")];
const CLIENTS: &str = "198.51.100.41";
const PATIENCE: Duration = Duration::from_secs(90);
/// Where the C library is told so.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// Has a program see the wall clock that `FAKETIME` says from its next start on. Etcd cannot be made to: it asks the kernel
/// without the C library, and a namespace has no wall clock of its own.
fn see_own_clock(program: &mut Program) {
    for (name, value) in [("LD_PRELOAD", FAKETIME), ("FAKETIME_DONT_FAKE_MONOTONIC", "1"), ("FAKETIME", "+0")]
    {
        program.set_environment(name, value);
    }
}

/// A member of etcd on a host of its own.
pub(crate) struct Member {
    pub(crate) host: Host,
    number: usize,
    process: Option<Process>,
}

impl Member {
    pub(crate) fn start(&mut self) -> Result {
        let me = MEMBERS[self.number];
        let cluster: Vec<String> =
            MEMBERS.iter().enumerate().map(|(n, at)| format!("m{n}=http://{at}:2380")).collect();
        let mut command = self.host.command("etcd");
        command.args(["--name", &format!("m{}", self.number), "--log-level", "error", "--logger", "zap"]);
        command.arg("--data-dir").arg(self.host.directory().join("etcd"));
        for (option, port) in [("client", 2379), ("peer", 2380)] {
            let url = format!("http://{me}:{port}");
            let listen = format!("--listen-{option}-urls");
            let advertise =
                if option == "peer" { "--initial-advertise-peer-urls" } else { "--advertise-client-urls" };
            command.args([&listen, &url, advertise, &url]);
        }
        command.args(["--initial-cluster", &cluster.join(","), "--initial-cluster-state", "new"]);
        self.process = Some(self.host.spawn("etcd", command)?);
        Ok(())
    }

    pub(crate) fn kill(&mut self) {
        self.process = None;
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result {
        self.process.as_ref().map_or(Ok(()), |process| process.signal(signal))
    }
}

pub(crate) struct World {
    pub(crate) members: Vec<Member>,
    pub(crate) registrars: Vec<Registrar>,
    pub(crate) directors: Vec<Director>,
    pub(crate) agents: Vec<Agent>,
    pub(crate) clients: Host,
    /// Joins devices, at any of the registrars.
    pub(crate) join: JoinCommand,
}

impl World {
    pub(crate) fn new(lab: &Lab) -> Result<Self> {
        let core = lab.switch("core")?;
        let on_core = |name: &str, address: &str| -> Result<Host> {
            let host = lab.host(name)?;
            core.plug(&host, &[&format!("{address}/24")])?;
            Ok(host)
        };
        let mut members = Vec::new();
        for (number, address) in MEMBERS.iter().enumerate() {
            let host = on_core(&format!("m{number}"), address)?;
            members.push(Member { host, number, process: None });
        }
        for member in &mut members {
            member.start()?;
        }
        wait_for("etcd to be healthy", PATIENCE, || {
            let health = format!("curl -sf http://{}:2379/health", MEMBERS[0]);
            members[0].host.sh(&health).map(drop).map_err(|e| e.to_string())
        })?;

        let urls: Vec<String> = MEMBERS.iter().map(|at| format!("\"http://{at}:2379\"")).collect();
        let more = format!(
            "drain = \"3s\"\n[limits]\njoins_per_second = 1000\njoins_burst = 1000\n[store]\nkind = \"etcd\"\n\
             [store.etcd]\nendpoints = [{}]\n",
            urls.join(", ")
        );
        let mut registrars: Vec<Registrar> = Vec::new();
        for (number, address) in REGISTRARS.iter().enumerate() {
            let host = on_core(&format!("r{number}"), address)?;
            let mut registrar = match registrars.first() {
                None => Registrar::init(&host, "net.example", address, &more)?,
                Some(first) => Registrar::beside(first, &host, address, &more)?,
            };
            see_own_clock(&mut registrar);
            registrar.serve()?;
            registrars.push(registrar);
        }
        let mut directors = Vec::new();
        for (number, address) in DIRECTORS.iter().enumerate() {
            let host = on_core(&format!("d{number}"), address)?;
            let mut director = Director::serve(&host, &registrars[number], "")?;
            see_own_clock(&mut director);
            directors.push(director);
        }
        let mut agents = Vec::new();
        for (number, (name, address)) in AGENTS.iter().enumerate() {
            let host = on_core(name, address)?;
            let agent = Agent::new(&host, "")?;
            let join = registrars[number].new_join_command(&[])?;
            agent.join(&join, name)?;
            agents.push(agent);
        }
        // Alice and Bob have nothing but directors between them.
        for (agent, other) in [(0, AGENTS[1].1), (1, AGENTS[0].1)] {
            let rules = format!(
                "table inet apart {{ chain in {{ type filter hook input priority 0; ip saddr {other} drop; }}; }}"
            );
            agents[agent].host().sh(&format!("echo '{rules}' | nft -f -"))?;
        }
        for agent in &mut agents {
            agent.run()?;
        }
        let join = registrars[0].new_join_command(&["--reusable"])?;
        let clients = on_core("clients", CLIENTS)?;
        Ok(Self { members, registrars, directors, agents, clients, join })
    }

    /// The store, as a program of its own reads it. To be called on a runtime of `clients`.
    pub(crate) fn store() -> Result<EtcdStore> {
        let endpoints = MEMBERS.iter().map(|at| format!("http://{at}:2379")).collect();
        EtcdStore::open(&EtcdConfig { endpoints, ..EtcdConfig::default() })
            .map_err(|error| failed("opening the store", error))
    }

    /// Starts again what has given up, such as a registrar that has found no store, as systemd would.
    pub(crate) fn supervise(&mut self) -> Result {
        let registrars = self.registrars.iter_mut().map(|registrar| &mut **registrar);
        let directors = self.directors.iter_mut().map(|director| &mut **director);
        let agents = self.agents.iter_mut().map(|agent| &mut **agent);
        for program in registrars.chain(directors).chain(agents) {
            if !program.process().is_some_and(|process| process.is_running()) {
                program.start()?;
            }
        }
        Ok(())
    }

    /// Waits until everything runs, and all registrars show the same.
    pub(crate) fn settle(&mut self) -> Result {
        wait_for("everything to run", PATIENCE, || {
            self.supervise().map_err(|e| e.to_string())?;
            let ready = |program: &Program| program.check_ready().map_err(|e| e.to_string());
            self.registrars.iter().try_for_each(|registrar| ready(registrar))?;
            self.directors.iter().try_for_each(|director| ready(director))?;
            self.agents.iter().try_for_each(|agent| ready(agent))
        })?;
        for agent in &self.agents {
            wait_for("agents to be connected", PATIENCE, || {
                let text = agent.ask(&["status", "-o", "json"]).map_err(|e| e.to_string())?;
                let status: serde_json::Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
                let connected = status.pointer("/registrar/connected").and_then(serde_json::Value::as_bool);
                if connected == Some(true) { Ok(()) } else { Err(text) }
            })?;
        }
        for registrar in &self.registrars {
            wait_for("registrars to follow the store", PATIENCE, || {
                let text = registrar.metrics().map_err(|e| e.to_string())?;
                let line = text.lines().find(|line| line.starts_with("muster_registrar_store_age_seconds "));
                match line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok()) {
                    Some(age) if age < 3 => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            })?;
        }
        Ok(())
    }

    /// All devices as a registrar shows them: uid to name, address and private endpoints.
    pub(crate) fn devices_at(&self, registrar: usize) -> Result<BTreeMap<String, Shown>> {
        let address = format!("{}:7500", REGISTRARS[registrar]);
        let text =
            self.registrars[registrar].muster(&["get", "devices", "-o", "json", "--registrar", &address])?;
        let list: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| failed("reading the devices", error))?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let field = |device: &serde_json::Value, path: &str| {
            device.pointer(path).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
        };
        let shown = items.iter().map(|device| {
            let shown = Shown {
                name: field(device, "/metadata/name"),
                address: field(device, "/status/virtualIpv4"),
                endpoint: field(device, "/status/privateEndpoints/0/address"),
            };
            (field(device, "/metadata/uid"), shown)
        });
        Ok(shown.collect())
    }

    pub(crate) fn stop(mut self) -> Result {
        for agent in &mut self.agents {
            agent.stop()?;
        }
        for director in &mut self.directors {
            director.stop()?;
        }
        self.registrars.iter_mut().try_for_each(|registrar| registrar.stop())
    }
}

/// A device as a registrar shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) name: String,
    pub(crate) address: String,
    /// Its first private endpoint.
    pub(crate) endpoint: String,
}
