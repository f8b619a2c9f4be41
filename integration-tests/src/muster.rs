//! Muster's own binaries on hosts of a lab: a registrar, directors, agents, the operator's command, each with its
//! configuration and state in the host's directory.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::process::Signal;

use crate::{
    Host, LabError, Output, Process, Result,
    process::{self, wait_for},
};

/// How long a component may take until it is ready. Generous: test machines are slow and noisy.
const READY: Duration = Duration::from_secs(30);

/// Where the binaries under test are: beside the test's own, in Cargo's target directory.
pub fn binary(name: &str) -> Result<PathBuf> {
    let missing = |reason: String| LabError::Command {
        command: name.to_owned(),
        reason: format!("{reason}; build it first: cargo build --workspace"),
    };
    let own = std::env::current_exe().map_err(|e| missing(e.to_string()))?;
    own.ancestors()
        .skip(1)
        .take(3)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| missing(format!("not found near {}", own.display())))
}

/// A registrar with its files, running or not.
pub struct Registrar {
    host: Host,
    directory: PathBuf,
    /// What `init` printed.
    pub printed: String,
    process: Option<Process>,
}

/// What an agent or a director needs to join, read from the command that the registrar or `muster` printed.
#[derive(Clone, Debug)]
pub struct JoinCommand(pub Vec<String>);

impl JoinCommand {
    /// The arguments of the `muster-agent join …` or `muster-director join …` line in `text`.
    pub fn find(text: &str) -> Result<Self> {
        let programs = ["muster-agent join ", "muster-director join "];
        text.lines()
            .find_map(|line| programs.iter().find_map(|program| line.trim().split_once(program)))
            .map(|(_, arguments)| Self(arguments.split_whitespace().map(str::to_owned).collect()))
            .ok_or_else(|| LabError::Command {
                command: "reading the join command".into(),
                reason: format!("there is none in:\n{text}"),
            })
    }

    /// The value of `--<option>`.
    pub fn option(&self, option: &str) -> Option<&str> {
        let position = self.0.iter().position(|a| a.strip_prefix("--") == Some(option))?;
        self.0.get(position + 1).map(String::as_str)
    }

    /// The same command with another value of `--<option>`.
    #[must_use]
    pub fn with(&self, option: &str, value: &str) -> Self {
        let mut arguments = self.0.clone();
        let position = arguments.iter().position(|a| a.strip_prefix("--") == Some(option));
        if let Some(slot) = position.and_then(|p| arguments.get_mut(p + 1)) {
            value.clone_into(slot);
        }
        Self(arguments)
    }
}

impl Registrar {
    /// Runs `muster-registrar init` on `host`, which others reach as `address` (several: with blanks between), with
    /// `more` appended to the configuration file.
    pub fn init(host: &Host, domain: &str, address: &str, more: &str) -> Result<Self> {
        let directory = host.directory().join("registrar");
        create(&directory)?;
        let mut registrar = Self { host: host.clone(), directory, printed: String::new(), process: None };
        write(&registrar.config(), &configuration(&registrar.data(), address, more))?;
        registrar.printed = process::check(registrar.init_command(domain, address)?)?;
        Ok(registrar)
    }

    /// A further registrar of the deployment of `first`, on `host`, as an operator adds one: with the files of the
    /// CA, on the same store, which `more` names as it did for the first. Others reach it as `address`.
    pub fn beside(first: &Self, host: &Host, address: &str, more: &str) -> Result<Self> {
        let directory = host.directory().join("registrar");
        let registrar = Self { host: host.clone(), directory, printed: String::new(), process: None };
        create(&registrar.data())?;
        write(&registrar.config(), &configuration(&registrar.data(), address, more))?;
        for file in ["ca.key", "ca.crt"] {
            copy(&first.data().join(file), &registrar.data().join(file))?;
        }
        copy(&first.credential(), &registrar.credential())?;
        Ok(registrar)
    }

    /// The `init` command, to be run (again) by hand.
    pub fn init_command(&self, domain: &str, address: &str) -> Result<Command> {
        let mut command = self.host.command(binary("muster-registrar")?);
        command.arg("init").arg("--config").arg(self.config());
        command.args(["--domain", domain]);
        for address in address.split(' ') {
            command.args(["--public-address", address]);
        }
        command.arg("--credential").arg(self.credential());
        Ok(command)
    }

    /// Starts `muster-registrar serve` and waits until it is ready.
    pub fn serve(&mut self) -> Result {
        self.start()?;
        self.wait_ready()
    }

    /// Starts `muster-registrar serve` without waiting.
    pub fn start(&mut self) -> Result {
        let mut command = self.host.command(binary("muster-registrar")?);
        command.arg("serve").arg("--config").arg(self.config());
        self.process = Some(self.host.spawn("muster-registrar", command)?);
        Ok(())
    }

    /// Waits until `/readyz` says so.
    pub fn wait_ready(&mut self) -> Result {
        let (host, process) = (self.host.clone(), &mut self.process);
        wait_for("the registrar to be ready", READY, || {
            if !process.as_mut().is_some_and(Process::is_running) {
                return Err("it is not running".into());
            }
            host.sh("curl -sf http://127.0.0.1:7580/readyz").map(drop).map_err(|e| e.to_string())
        })
    }

    /// Its process, while it runs.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// SIGTERM, and waits for a clean exit.
    pub fn stop(&mut self) -> Result {
        stop(self.process.take())
    }

    /// The join command that `init` printed; its token lets one device join.
    pub fn join_command(&self) -> Result<JoinCommand> {
        JoinCommand::find(&self.printed)
    }

    /// A join command with a new token, made with `muster create token` and `options`.
    pub fn new_join_command(&self, options: &[&str]) -> Result<JoinCommand> {
        JoinCommand::find(&self.muster(&[&["create", "token"], options].concat())?)
    }

    /// Runs `muster` with the operator's credential; an error unless it succeeds.
    pub fn muster(&self, arguments: &[&str]) -> Result<String> {
        process::check(self.muster_command(arguments)?)
    }

    /// Has `manifest` applied.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        let path = self.host.directory().join("manifest.yaml").display().to_string();
        std::fs::write(&path, manifest).map_err(|source| LabError::File { path: path.clone(), source })?;
        self.muster(&["apply", "-f", &path])
    }

    /// Runs `muster` with the operator's credential to its end, whatever that is.
    pub fn try_muster(&self, arguments: &[&str]) -> Result<Output> {
        process::run(self.muster_command(arguments)?)
    }

    /// The `muster` command with the operator's credential, to be started by hand.
    pub fn muster_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.host.command(binary("muster")?);
        command.arg("--credential").arg(self.credential()).args(arguments);
        Ok(command)
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.directory.join("registrar.toml")
    }

    /// The operator's credential file.
    pub fn credential(&self) -> PathBuf {
        self.directory.join("operator.toml")
    }

    /// Its data directory: CA and store.
    pub fn data(&self) -> PathBuf {
        self.directory.join("data")
    }
}

/// An agent with its files, running or not.
pub struct Agent {
    host: Host,
    directory: PathBuf,
    process: Option<Process>,
}

impl Agent {
    /// An agent that has yet to join, with `more` appended to its configuration file.
    pub fn new(host: &Host, more: &str) -> Result<Self> {
        let directory = host.directory().join("agent");
        create(&directory)?;
        let agent = Self { host: host.clone(), directory, process: None };
        let config = format!(
            "state_dir = \"{0}/state\"\nruntime_dir = \"{0}/run\"\nsocket = \"{0}/run/agent.sock\"\n{more}\n",
            agent.directory.display()
        );
        write(&agent.config(), &config)?;
        Ok(agent)
    }

    /// Runs `muster-agent join` to its end, whatever that is.
    pub fn try_join(&self, join: &JoinCommand, name: &str) -> Result<Output> {
        process::run(self.join_command(join, name)?)
    }

    /// Runs `muster-agent join`.
    pub fn join(&self, join: &JoinCommand, name: &str) -> Result<String> {
        process::check(self.join_command(join, name)?)
    }

    fn join_command(&self, join: &JoinCommand, name: &str) -> Result<Command> {
        let mut command = self.host.command(binary("muster-agent")?);
        command.arg("join").args(&join.0).args(["--name", name, "--config"]).arg(self.config());
        Ok(command)
    }

    /// Starts `muster-agent run` and waits until it is ready; names of the host then resolve through it.
    pub fn run(&mut self) -> Result {
        self.start()?;
        self.wait_ready()
    }

    /// Starts `muster-agent run` without waiting.
    pub fn start(&mut self) -> Result {
        let mut command = self.host.command(binary("muster-agent")?);
        command.arg("run").arg("--config").arg(self.config());
        self.process = Some(self.host.spawn("muster-agent", command)?);
        self.host.write_etc("resolv.conf", "nameserver 169.254.20.10\n")
    }

    /// Waits until the agent says that it is ready.
    pub fn wait_ready(&mut self) -> Result {
        let (host, process) = (self.host.clone(), &mut self.process);
        wait_for("the agent to be ready", READY, || {
            if !process.as_mut().is_some_and(Process::is_running) {
                return Err("it is not running".into());
            }
            host.sh("curl -sf http://127.0.0.1:7581/readyz").map(drop).map_err(|e| e.to_string())
        })
    }

    /// Runs a command of `muster-agent` that asks the running agent; an error unless it succeeds.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        process::check(self.ask_command(arguments)?)
    }

    /// Runs a command of `muster-agent` to its end, whatever that is.
    pub fn try_ask(&self, arguments: &[&str]) -> Result<Output> {
        process::run(self.ask_command(arguments)?)
    }

    fn ask_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.host.command(binary("muster-agent")?);
        command.args(arguments).arg("--config").arg(self.config());
        Ok(command)
    }

    /// Its process, while it runs.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// SIGTERM, and waits for a clean exit.
    pub fn stop(&mut self) -> Result {
        stop(self.process.take())
    }

    /// How datagrams to the peer called `name` leave at present, and by way of which director, if any:
    /// `("relay", "relay-1")`, `("direct", "")`, or `("none", "")` if there is no such peer.
    pub fn path_to(&self, name: &str) -> Result<(String, String)> {
        let text = self.ask(&["status", "-o", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&text).map_err(|e| LabError::Command {
            command: "status -o json".into(),
            reason: format!("{e}: {text}"),
        })?;
        let peers = status.get("peers").and_then(serde_json::Value::as_array);
        let field = |peer: &serde_json::Value, field: &str| {
            peer.get(field).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
        };
        let peer = peers.and_then(|peers| peers.iter().find(|peer| field(peer, "name") == name));
        Ok(peer.map_or_else(
            || ("none".to_owned(), String::new()),
            |peer| (field(peer, "path"), field(peer, "director")),
        ))
    }

    /// The address that datagrams to the peer called `name` go to at present, if they go straight there.
    pub fn endpoint_of(&self, name: &str) -> Result<String> {
        let text = self.ask(&["status", "-o", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let peers = status.get("peers").and_then(serde_json::Value::as_array);
        let peer = peers.into_iter().flatten().find(|peer| peer.get("name").is_some_and(|n| n == name));
        let address = peer.and_then(|peer| peer.pointer("/endpoint/address")?.as_str());
        Ok(address.unwrap_or_default().to_owned())
    }

    /// The host that the agent is on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.directory.join("agent.toml")
    }

    /// Its state directory.
    pub fn state(&self) -> PathBuf {
        self.directory.join("state")
    }
}

/// A director with its files, running or not.
pub struct Director {
    host: Host,
    directory: PathBuf,
    process: Option<Process>,
}

impl Director {
    /// UDP and TCP port of a director that is configured as usual.
    pub const PORT: u16 = 7501;

    /// A director that has yet to join, with `more` appended to its configuration file.
    pub fn new(host: &Host, more: &str) -> Result<Self> {
        let directory = host.directory().join("director");
        create(&directory)?;
        let director = Self { host: host.clone(), directory, process: None };
        write(
            &director.config(),
            &format!("state_dir = \"{}/state\"\n{more}\n", director.directory.display()),
        )?;
        Ok(director)
    }

    /// Makes `host` a director of the registrar's network, called as the host, and waits until it relays.
    pub fn serve(host: &Host, registrar: &Registrar, more: &str) -> Result<Self> {
        let mut director = Self::new(host, more)?;
        director.join(&registrar.new_join_command(&["--director"])?, host.name())?;
        director.run()?;
        Ok(director)
    }

    /// Runs `muster-director join` to its end, whatever that is.
    pub fn try_join(&self, join: &JoinCommand, name: &str) -> Result<Output> {
        process::run(self.join_command(join, name)?)
    }

    /// Runs `muster-director join`.
    pub fn join(&self, join: &JoinCommand, name: &str) -> Result<String> {
        process::check(self.join_command(join, name)?)
    }

    fn join_command(&self, join: &JoinCommand, name: &str) -> Result<Command> {
        let mut command = self.host.command(binary("muster-director")?);
        command.arg("join").args(&join.0).args(["--name", name, "--config"]).arg(self.config());
        Ok(command)
    }

    /// Starts `muster-director run` and waits until it relays.
    pub fn run(&mut self) -> Result {
        self.start()?;
        self.wait_ready()
    }

    /// Starts `muster-director run` without waiting.
    pub fn start(&mut self) -> Result {
        let mut command = self.host.command(binary("muster-director")?);
        command.arg("run").arg("--config").arg(self.config());
        self.process = Some(self.host.spawn("muster-director", command)?);
        Ok(())
    }

    /// Waits until `/readyz` says so.
    pub fn wait_ready(&mut self) -> Result {
        let (host, process) = (self.host.clone(), &mut self.process);
        wait_for("the director to be ready", READY, || {
            if !process.as_mut().is_some_and(Process::is_running) {
                return Err("it is not running".into());
            }
            host.sh("curl -sf http://127.0.0.1:7582/readyz").map(drop).map_err(|e| e.to_string())
        })
    }

    /// The sum of its metrics whose name and labels begin with `muster_director_` and `name`.
    pub fn metric(&self, name: &str) -> Result<u64> {
        let text = self.host.sh("curl -sf http://127.0.0.1:7582/metrics")?;
        let wanted = format!("muster_director_{name}");
        let values = text.lines().filter(|line| line.starts_with(&wanted));
        Ok(values.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
    }

    /// Waits until so many devices are attached, with an address or a stream that frames go to.
    pub fn wait_attached(&self, devices: u64) -> Result {
        wait_for("devices to be attached", READY, || {
            let told = |name| self.metric(name).map_err(|e| e.to_string());
            let (attached, reached) = (told("attached ")?, told("bound ")? + told("streams ")?);
            if attached == devices && reached >= devices {
                Ok(())
            } else {
                Err(format!("{attached} attached, {reached} reached"))
            }
        })
    }

    /// Its process, while it runs.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// SIGTERM, and does not wait for the end: devices are asked to leave.
    pub fn drain(&self) -> Result {
        self.process.as_ref().map_or(Ok(()), |process| process.signal(Signal::TERM))
    }

    /// SIGTERM, and waits for a clean exit.
    pub fn stop(&mut self) -> Result {
        stop(self.process.take())
    }

    /// The host that the director is on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.directory.join("director.toml")
    }
}

fn stop(process: Option<Process>) -> Result {
    let Some(mut process) = process else { return Ok(()) };
    process.signal(Signal::TERM)?;
    let status = process.wait(READY)?;
    if status.success() {
        Ok(())
    } else {
        Err(LabError::Command { command: "SIGTERM".into(), reason: format!("{status}\n{}", process.log()) })
    }
}

fn configuration(data: &Path, addresses: &str, more: &str) -> String {
    let at = |port: u16| {
        let address = |address: &str| match address.contains(':') {
            true => format!("\"[{address}]:{port}\""),
            false => format!("\"{address}:{port}\""),
        };
        addresses.split(' ').map(address).collect::<Vec<_>>().join(", ")
    };
    format!(
        "data_dir = \"{}\"\n{more}\n[advertise]\nregistrars = [{}]\ndns = [{}]\n",
        data.display(),
        at(7500),
        at(853)
    )
}

/// Copies a file with its permissions.
fn copy(from: &Path, to: &Path) -> Result {
    fs::copy(from, to).map(drop).map_err(|e| LabError::File { path: from.display().to_string(), source: e })
}

fn create(directory: &Path) -> Result {
    fs::create_dir_all(directory)
        .map_err(|e| LabError::File { path: directory.display().to_string(), source: e })
}

fn write(path: &Path, contents: &str) -> Result {
    fs::write(path, contents).map_err(|e| LabError::File { path: path.display().to_string(), source: e })
}
