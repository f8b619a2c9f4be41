//! Muster's own binaries on hosts of a lab: a registrar, directors, agents, the operator's command, each with its
//! configuration and state in the host's directory.

mod agent;
mod director;
mod program;

use std::{
    fs,
    ops::{Deref, DerefMut, Range},
    path::{Path, PathBuf},
    process::Command,
};

pub use agent::Agent;
pub use director::Director;
pub use program::Program;

use crate::{Host, LabError, Output, Result, device::Error, failed, population, process};
use program::{Kind, create, write};

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
    program: Program,
    /// What `init` printed.
    pub printed: String,
}

impl Deref for Registrar {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.program
    }
}

impl DerefMut for Registrar {
    fn deref_mut(&mut self) -> &mut Program {
        &mut self.program
    }
}

/// What an agent or a director needs to join, read from the command that the registrar or `muster` printed.
#[derive(Clone, Debug)]
pub struct JoinCommand(pub Vec<String>);

impl JoinCommand {
    /// The arguments of the `muster-agent join …` line in `text`, or that of another program.
    pub fn find(text: &str) -> Result<Self> {
        let programs = ["muster-agent join ", "muster-director join ", "muster-registrar join "];
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
        let mut registrar = Self::empty(host)?;
        write(&registrar.config(), &configuration(&registrar.data(), address, more))?;
        registrar.printed = process::check(registrar.init_command(domain, address)?)?;
        Ok(registrar)
    }

    /// A further registrar of the deployment of `first`, which need not run, on `host`: with the files of the CA copied
    /// by hand, on the same store, which `more` names as it did for the first. Others reach it as `address`.
    pub fn beside(first: &Self, host: &Host, address: &str, more: &str) -> Result<Self> {
        let registrar = Self::empty(host)?;
        create(&registrar.data())?;
        write(&registrar.config(), &configuration(&registrar.data(), address, more))?;
        for file in ["ca.key", "ca.crt"] {
            copy(&first.data().join(file), &registrar.data().join(file))?;
        }
        copy(&first.credential(), &registrar.credential())?;
        Ok(registrar)
    }

    /// A further registrar of the deployment of `first`, which runs, on `host`: by one command on each. Others reach it as
    /// `address`.
    pub fn invited(first: &Self, host: &Host, address: &str) -> Result<Self> {
        let mut registrar = Self::empty(host)?;
        let join = first.invite()?;
        registrar.printed = process::check(registrar.join_deployment(&join, address)?)?;
        copy(&first.credential(), &registrar.credential())?;
        Ok(registrar)
    }

    /// The command that `muster-registrar invite` prints.
    pub fn invite(&self) -> Result<JoinCommand> {
        JoinCommand::find(&self.ask(&["invite"])?)
    }

    /// The `join` of an invitation, to be run by hand.
    pub fn join_deployment(&self, join: &JoinCommand, address: &str) -> Result<Command> {
        let mut command = self.command(&["join", "--address", address])?;
        command.arg("--data-dir").arg(self.data()).args(&join.0);
        Ok(command)
    }

    /// Files of a registrar on `host` that is none yet.
    pub fn empty(host: &Host) -> Result<Self> {
        let program = Program::new(host, Kind { name: "registrar", run: "serve", http: 7580 })?;
        Ok(Self { program, printed: String::new() })
    }

    /// The `init` command, to be run (again) by hand.
    pub fn init_command(&self, domain: &str, address: &str) -> Result<Command> {
        let mut command = self.command(&["init", "--domain", domain])?;
        for address in address.split(' ') {
            command.args(["--public-address", address]);
        }
        command.arg("--credential").arg(self.credential());
        Ok(command)
    }

    /// Fills its store with these devices, as [`population`] makes them, while it does not serve.
    pub fn fill(&self, devices: Range<u32>) -> Result {
        self.write(|path| async move { population::fill(&path, devices).await })
    }

    /// As [`Self::fill`], with these Services of so many endpoints each.
    pub fn fill_services(&self, services: Range<u32>, endpoints: u32) -> Result {
        self.write(|path| async move { population::fill_services(&path, services, endpoints).await })
    }

    fn write<F: Future<Output = Result<(), Error>>>(&self, fill: impl FnOnce(PathBuf) -> F) -> Result {
        let failed = |error: Error| failed("filling the registrar's store", error);
        let runtime = tokio::runtime::Runtime::new().map_err(|error| failed(error.into()))?;
        runtime.block_on(fill(self.data().join("registry.db"))).map_err(failed)
    }

    /// Starts `muster-registrar serve` and waits until it is ready.
    pub fn serve(&mut self) -> Result {
        self.run()
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
        let path = self.host().directory().join("manifest.yaml").display().to_string();
        write(Path::new(&path), manifest)?;
        self.muster(&["apply", "-f", &path])
    }

    /// Runs `muster` with the operator's credential to its end, whatever that is.
    pub fn try_muster(&self, arguments: &[&str]) -> Result<Output> {
        process::run(self.muster_command(arguments)?)
    }

    /// The `muster` command with the operator's credential, to be started by hand.
    pub fn muster_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.host().command(binary("muster")?);
        command.arg("--credential").arg(self.credential()).args(arguments);
        Ok(command)
    }

    /// The operator's credential file.
    pub fn credential(&self) -> PathBuf {
        self.directory().join("operator.toml")
    }

    /// Its data directory: CA and store.
    pub fn data(&self) -> PathBuf {
        self.directory().join("data")
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
