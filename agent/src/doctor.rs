//! What `muster-agent doctor` looks at: the agent, its interface and resolver, and the host's own DNS.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use muster_proto::agent::GetStatusResponse;
use serde::Serialize;
use tokio::{task::JoinSet, time::timeout};

use crate::{
    config::Config,
    host_dns::{
        self, Mode, Paths,
        file::EditError,
        resolv_conf::{self, Mark},
        resolved::Resolved,
    },
    state::{State, StateError},
};

/// How long an upstream server may take.
const UPSTREAM_PATIENCE: Duration = Duration::from_secs(1);
const FIX: &str = "muster-agent doctor --fix";

/// How a check came out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// All is well.
    Ok,
    /// Something that may be meant so.
    Warn,
    /// Something is wrong.
    Fail,
}

/// One check.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub outcome: Outcome,
    /// What was found.
    pub message: String,
    /// What to do about it; empty if there is nothing to do.
    pub remedy: String,
}

impl Check {
    fn ok(name: &'static str, message: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Ok, message: message.into(), remedy: String::new() }
    }

    fn warn(name: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Warn, message: message.into(), remedy: remedy.into() }
    }

    fn fail(name: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Fail, message: message.into(), remedy: remedy.into() }
    }
}

/// Why leftovers were not undone.
#[derive(Debug, thiserror::Error)]
pub enum FixError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The file.
    #[error(transparent)]
    Edit(#[from] EditError),
}

/// What became of leftovers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fixed {
    /// They are gone.
    Undone,
    /// There were none.
    Nothing,
    /// An agent runs, and they are its own.
    AgentRuns,
}

/// Undoes what an agent that was killed has left in the host's DNS; never what a running one needs.
pub fn fix(config: &Config, paths: &Paths) -> Result<Fixed, FixError> {
    let _lock = if config.state_dir.exists() {
        match State::new(&config.state_dir).lock() {
            Ok(lock) => Some(lock),
            Err(StateError::InUse { .. }) => return Ok(Fixed::AgentRuns),
            Err(error) => return Err(error.into()),
        }
    } else {
        None
    };
    Ok(if paths.file().restore()? { Fixed::Undone } else { Fixed::Nothing })
}

/// Looks at everything. `status` is the running agent's, or why it cannot be asked.
pub async fn examine(
    config: &Config,
    paths: &Paths,
    status: &Result<GetStatusResponse, String>,
) -> Vec<Check> {
    let mut checks = vec![agent(status)];
    if let Ok(status) = status {
        checks.push(registrar(status));
        checks.push(interface(status));
    }
    if !config.resolver.enabled {
        checks.push(Check::ok("resolver", "switched off (resolver.enabled = false)"));
    } else if status.is_ok() {
        checks.push(resolver(config).await);
    }
    checks.push(host(config, paths, status.is_ok()).await);
    checks.extend(backup(paths));
    if config.resolver.enabled {
        checks.push(upstream(paths, status.as_ref().ok()).await);
    }
    checks
}

fn agent(status: &Result<GetStatusResponse, String>) -> Check {
    match status {
        Ok(status) if status.ready => {
            Check::ok("agent", format!("running as {} in {}", status.name, status.network))
        }
        Ok(status) => Check::warn(
            "agent",
            format!("running as {}, but not ready", status.name),
            "see the checks below, and `journalctl -u muster-agent`",
        ),
        Err(error) => {
            let (message, remedy) = error.split_once("\nremedy: ").unwrap_or((error, "see the agent's log"));
            Check::fail("agent", message, remedy)
        }
    }
}

fn registrar(status: &GetStatusResponse) -> Check {
    match &status.registrar {
        Some(registrar) if registrar.connected => {
            Check::ok("registrar", format!("connected to {}", registrar.address))
        }
        Some(registrar) => Check::warn(
            "registrar",
            format!("not connected to {}: {}", registrar.address, registrar.last_error),
            "peers and names that are known go on working; see that the registrar can be reached",
        ),
        None => Check::warn("registrar", "the agent has none", "see the agent's log"),
    }
}

fn interface(status: &GetStatusResponse) -> Check {
    let addresses = [&status.virtual_ipv4, &status.virtual_ipv6];
    let addresses: Vec<IpAddr> = addresses.iter().filter_map(|text| text.parse().ok()).collect();
    if addresses.is_empty() {
        return Check::fail(
            "interface",
            "the device has no address yet",
            "see that a registrar can be reached",
        );
    }
    // Only an address of this host can be bound.
    match addresses.iter().find(|address| UdpSocket::bind((**address, 0)).is_err()) {
        Some(missing) => Check::fail(
            "interface",
            format!("{missing} is not on this host, but should be on {}", status.interface),
            "restart the agent, and find out what removes the address",
        ),
        None => {
            let shown: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            Check::ok("interface", format!("{} on {}", shown.join(", "), status.interface))
        }
    }
}

async fn resolver(config: &Config) -> Check {
    for address in &config.resolver.listen {
        let asked = host_dns::server(&[*address]).unwrap_or(*address);
        if !host_dns::answers(asked).await {
            return Check::fail(
                "resolver",
                format!("does not answer at {asked}"),
                "see that no firewall rule drops port 53 on this host; restart the agent",
            );
        }
    }
    let shown: Vec<String> = config.resolver.listen.iter().map(ToString::to_string).collect();
    Check::ok("resolver", format!("answers at {}", shown.join(", ")))
}

/// Whether the host's DNS is as it should be with the agent that runs, or does not.
async fn host(config: &Config, paths: &Paths, running: bool) -> Check {
    const NAME: &str = "host's DNS";
    let file = paths.file();
    let path = paths.resolv_conf.display();
    let text = match file.read() {
        Ok(text) => text,
        Err(error @ EditError::Missing(_)) => {
            return Check::warn(
                NAME,
                error.to_string(),
                "write one, if programs on this host are to find names",
            );
        }
        Err(error) => return Check::fail(NAME, error.to_string(), "run this command as root"),
    };
    match (resolv_conf::mark(&text), running) {
        (Mark::Damaged, _) => {
            let remedy = if running { "restart the agent" } else { FIX };
            return Check::fail(NAME, format!("somebody has cut into the agent's edit of {path}"), remedy);
        }
        (Mark::Edited, false) => {
            return Check::fail(
                NAME,
                format!("{path} names an agent that does not run: nothing resolves"),
                FIX,
            );
        }
        (Mark::Edited, true) => return Check::ok(NAME, format!("{path} names the agent's resolver")),
        (Mark::None, _) => {}
    }
    let servers = resolv_conf::servers(&text);
    let own = host_dns::server(&config.resolver.listen);
    if own.is_some_and(|own| servers.contains(&own.ip())) {
        let by_hand = format!("{path} names the agent's resolver, written by hand");
        return if running {
            Check::ok(NAME, by_hand)
        } else {
            Check::fail(NAME, by_hand + ", which does not run", "start the agent, or correct the file")
        };
    }
    let mode = config.resolver.host;
    if !running || !config.resolver.enabled || mode == Mode::None {
        return Check::ok(NAME, format!("{path} is the host's own"));
    }
    let stub = servers.contains(&IpAddr::from([127, 0, 0, 53]));
    if mode == Mode::Resolved || mode == Mode::Auto && (file.is_of_resolved() || stub) {
        return match resolved_runs(paths).await {
            Ok(true) => Check::ok(NAME, "systemd-resolved serves this host, and asks the agent's resolver"),
            Ok(false) => Check::fail(
                NAME,
                "systemd-resolved does not run",
                "systemctl start systemd-resolved, or set resolver.host = \"resolv.conf\"",
            ),
            Err(error) => {
                Check::fail(NAME, error, "see that dbus runs, or set resolver.host = \"resolv.conf\"")
            }
        };
    }
    Check::fail(
        NAME,
        format!("{path} does not name the agent's resolver, so programs do not find the network's names"),
        "see the agent's log for why; if another program writes the file, configure that, and set resolver.host = \"none\"",
    )
}

async fn resolved_runs(paths: &Paths) -> Result<bool, String> {
    let resolved = Resolved::connect(&paths.bus).await.map_err(|e| e.to_string())?;
    resolved.is_running().await.map_err(|e| e.to_string())
}

/// Of interest only while the file is edited.
fn backup(paths: &Paths) -> Option<Check> {
    let edited = paths.file().read().is_ok_and(|text| resolv_conf::mark(&text) != Mark::None);
    let path = paths.backup.display();
    edited.then(|| {
        if paths.backup.exists() {
            Check::ok("backup", format!("{path} keeps the host's own resolv.conf"))
        } else {
            Check::warn(
                "backup",
                format!("{path} is missing; the edited file itself still has the host's own lines"),
                "systemctl restart muster-agent",
            )
        }
    })
}

async fn upstream(paths: &Paths, status: Option<&GetStatusResponse>) -> Check {
    const NAME: &str = "other names";
    let told = status.and_then(|status| status.resolver.as_ref()).map(|resolver| &resolver.upstream);
    let servers: Vec<SocketAddr> = match told {
        Some(told) => told.iter().filter_map(|text| text.parse().ok()).collect(),
        None => {
            let text = paths.file().original().unwrap_or_default();
            resolv_conf::servers(&text).into_iter().map(|ip| SocketAddr::new(ip, 53)).collect()
        }
    };
    if servers.is_empty() {
        let remedy = "set resolver.upstream, or write name servers into /etc/resolv.conf";
        return Check::warn(NAME, "no server is known for names outside the network", remedy);
    }
    let mut asked = JoinSet::new();
    for server in servers {
        asked.spawn(async move { (server, reachable(server).await) });
    }
    let (mut answer, mut silent) = (Vec::new(), Vec::new());
    while let Some(Ok((server, answers))) = asked.join_next().await {
        if answers { answer.push(server.to_string()) } else { silent.push(server.to_string()) }
    }
    answer.sort();
    silent.sort();
    let remedy = "see that these servers can be reached, or name others in resolver.upstream";
    match (answer.is_empty(), silent.is_empty()) {
        (true, _) => Check::fail(NAME, format!("no answer from {}", silent.join(", ")), remedy),
        (false, false) => {
            Check::warn(NAME, format!("{} answers, but not {}", answer.join(", "), silent.join(", ")), remedy)
        }
        (false, true) => Check::ok(NAME, format!("{} answers", answer.join(", "))),
    }
}

/// Whether there is any answer to `. NS`.
async fn reachable(server: SocketAddr) -> bool {
    const QUESTION: &[u8] = b"\x01\0\0\x01\0\0\0\0\0\0\0\0\x02\0\x01";
    matches!(timeout(UPSTREAM_PATIENCE, host_dns::ask(server, QUESTION)).await, Ok(Some(())))
}

#[cfg(test)]
#[path = "doctor_tests.rs"]
mod tests;
