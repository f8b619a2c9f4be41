//! The director on a host.

use std::ops::{Deref, DerefMut};

use super::{
    Registrar,
    program::{Kind, Program, READY, write},
};
use crate::{Host, Result, process::wait_for};

/// A director with its files, running or not.
pub struct Director(Program);

impl Deref for Director {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.0
    }
}

impl DerefMut for Director {
    fn deref_mut(&mut self) -> &mut Program {
        &mut self.0
    }
}

impl Director {
    /// UDP and TCP port of a director that is configured as usual.
    pub const PORT: u16 = 7501;

    /// A director that has yet to join, with `more` appended to its configuration file.
    pub fn new(host: &Host, more: &str) -> Result<Self> {
        let director = Self(Program::new(host, Kind { name: "director", run: "run", http: 7582 })?);
        let state = director.directory().join("state");
        write(&director.config(), &format!("state_dir = \"{}\"\n{more}\n", state.display()))?;
        Ok(director)
    }

    /// Makes `host` a director of the registrar's network, called as the host, and waits until it relays.
    pub fn serve(host: &Host, registrar: &Registrar, more: &str) -> Result<Self> {
        let mut director = Self::new(host, more)?;
        director.join(&registrar.new_join_command(&["--director"])?, host.name())?;
        director.run()?;
        Ok(director)
    }

    /// The sum of its metrics whose name and labels begin with `muster_director_` and `name`.
    pub fn metric(&self, name: &str) -> Result<u64> {
        let text = self.metrics()?;
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

    /// SIGTERM, and does not wait for the end: devices are asked to leave.
    pub fn drain(&self) -> Result {
        self.terminate()
    }
}
