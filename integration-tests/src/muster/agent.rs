//! The agent on a host.

use std::{
    ops::{Deref, DerefMut},
    path::PathBuf,
};

use super::program::{Kind, Program, write};
use crate::{Host, LabError, Result};

/// An agent with its files, running or not.
pub struct Agent(Program);

impl Deref for Agent {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.0
    }
}

impl DerefMut for Agent {
    fn deref_mut(&mut self) -> &mut Program {
        &mut self.0
    }
}

impl Agent {
    /// An agent that has yet to join, with `more` appended to its configuration file.
    pub fn new(host: &Host, more: &str) -> Result<Self> {
        let agent = Self(Program::new(host, Kind { name: "agent", run: "run", http: 7581 })?);
        let config = format!(
            "state_dir = \"{0}/state\"\nruntime_dir = \"{0}/run\"\nsocket = \"{0}/run/agent.sock\"\n{more}\n",
            agent.directory().display()
        );
        write(&agent.config(), &config)?;
        Ok(agent)
    }

    /// Starts `muster-agent run` and waits until it is ready; names of the host then resolve through it.
    pub fn run(&mut self) -> Result {
        self.start()?;
        self.wait_ready()
    }

    /// Starts `muster-agent run` without waiting.
    pub fn start(&mut self) -> Result {
        self.0.start()?;
        self.host().write_etc("resolv.conf", "nameserver 169.254.20.10\n")
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

    /// Its state directory.
    pub fn state(&self) -> PathBuf {
        self.directory().join("state")
    }
}
