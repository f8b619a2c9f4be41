//! A program of Muster's on a host of a lab: its files, its process, and what every one of them can do.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::process::Signal;

use super::{JoinCommand, binary};
use crate::{
    Host, LabError, Output, Process, Result,
    process::{self, wait_for},
};

/// How long a component may take until it is ready. Generous: test machines are slow and noisy.
pub(super) const READY: Duration = Duration::from_secs(30);

/// A program with its files, running or not.
pub struct Program {
    kind: Kind,
    host: Host,
    directory: PathBuf,
    environment: Vec<(String, String)>,
    process: Option<Process>,
}

/// Which program.
pub(super) struct Kind {
    /// Its name, without `muster-`.
    pub(super) name: &'static str,
    /// The command that runs it.
    pub(super) run: &'static str,
    /// The port of its health and metrics, on loopback.
    pub(super) http: u16,
}

impl Program {
    /// On `host`, with a directory for its files that exists.
    pub(super) fn new(host: &Host, kind: Kind) -> Result<Self> {
        let directory = host.directory().join(kind.name);
        create(&directory)?;
        Ok(Self { kind, host: host.clone(), directory, environment: Vec::new(), process: None })
    }

    /// The host that it is on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.directory.join(format!("{}.toml", self.kind.name))
    }

    /// The directory of its files.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Sets an environment variable of all its commands from now on.
    pub fn set_environment(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// A command of it with its configuration file, to be started by hand.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<Command> {
        let mut command = self.host.command(binary(&self.binary())?);
        command.args(arguments).arg("--config").arg(self.config());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }

    /// Runs a command of it to its end, whatever that is.
    pub fn try_ask(&self, arguments: &[&str]) -> Result<Output> {
        process::run(self.command(arguments)?)
    }

    /// Runs a command of it; an error unless it succeeds.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        process::check(self.command(arguments)?)
    }

    /// Runs its `join` to the end, whatever that is.
    pub fn try_join(&self, join: &JoinCommand, name: &str) -> Result<Output> {
        self.try_ask(&join_arguments(join, name))
    }

    /// Runs its `join`.
    pub fn join(&self, join: &JoinCommand, name: &str) -> Result<String> {
        self.ask(&join_arguments(join, name))
    }

    /// Starts it and waits until it is ready.
    pub fn run(&mut self) -> Result {
        self.start()?;
        self.wait_ready()
    }

    /// Starts it without waiting.
    pub fn start(&mut self) -> Result {
        let command = self.command(&[self.kind.run])?;
        self.process = Some(self.host.spawn(&self.binary(), command)?);
        Ok(())
    }

    /// Waits until it says that it is ready.
    pub fn wait_ready(&mut self) -> Result {
        let what = format!("the {} to be ready", self.kind.name);
        let ready = self.http("readyz");
        let (host, process) = (&self.host, &mut self.process);
        wait_for(&what, READY, || {
            if !process.as_mut().is_some_and(Process::is_running) {
                return Err("it is not running".into());
            }
            host.sh(&ready).map(drop).map_err(|e| e.to_string())
        })
    }

    /// An error unless it says that it is ready.
    pub fn check_ready(&self) -> Result {
        self.host.sh(&self.http("readyz")).map(drop)
    }

    /// Its metrics.
    pub fn metrics(&self) -> Result<String> {
        self.host.sh(&self.http("metrics"))
    }

    /// Its process, while it runs.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// SIGTERM, and does not wait for the end.
    pub fn terminate(&self) -> Result {
        self.process.as_ref().map_or(Ok(()), |process| process.signal(Signal::TERM))
    }

    /// SIGTERM, and waits for a clean exit.
    pub fn stop(&mut self) -> Result {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        process.signal(Signal::TERM)?;
        let status = process.wait(READY)?;
        if status.success() {
            Ok(())
        } else {
            Err(LabError::Command {
                command: "SIGTERM".into(),
                reason: format!("{status}\n{}", process.log()),
            })
        }
    }

    fn binary(&self) -> String {
        format!("muster-{}", self.kind.name)
    }

    fn http(&self, path: &str) -> String {
        format!("curl -sf http://127.0.0.1:{}/{path}", self.kind.http)
    }
}

fn join_arguments<'a>(join: &'a JoinCommand, name: &'a str) -> Vec<&'a str> {
    let given = join.0.iter().map(String::as_str);
    std::iter::once("join").chain(given).chain(["--name", name]).collect()
}

pub(super) fn create(directory: &Path) -> Result {
    fs::create_dir_all(directory)
        .map_err(|e| LabError::File { path: directory.display().to_string(), source: e })
}

pub(super) fn write(path: &Path, contents: &str) -> Result {
    fs::write(path, contents).map_err(|e| LabError::File { path: path.display().to_string(), source: e })
}
