//! An internet with a registrar, directors, and hosts connected to it in one way or another.

use muster_integration_tests::{
    Lab, Result, Switch,
    muster::{Agent, Director, JoinCommand, Registrar},
    nat::{Kind, Site},
};

/// What the scenarios begin with.
pub(crate) struct Internet<'a> {
    lab: &'a Lab,
    pub(crate) switch: Switch,
    pub(crate) registrar: Registrar,
    pub(crate) directors: Vec<Director>,
    join: JoinCommand,
    sites: u8,
}

/// A host with its agent, which runs.
pub(crate) struct Joined {
    pub(crate) site: Site,
    pub(crate) agent: Agent,
}

impl<'a> Internet<'a> {
    /// With a registrar at 198.51.100.200, and so many directors at the addresses after it, all of both families.
    pub(crate) fn new(lab: &'a Lab, directors: u8) -> Result<Self> {
        let switch = lab.switch("internet")?;
        let plugged = |name: &str, number: u8| -> Result<_> {
            let host = lab.host(name)?;
            switch.plug(&host, &[&format!("198.51.100.{number}/24"), &format!("2001:db8::{number}/64")])?;
            Ok(host)
        };
        let hq = plugged("hq", 200)?;
        let advertise = "";
        let mut registrar = Registrar::init(&hq, "net.example", "198.51.100.200", advertise)?;
        registrar.serve()?;
        let directors = (1..=directors)
            .map(|n| Director::serve(&plugged(&format!("relay-{n}"), 200 + n)?, &registrar, "drain = 25"))
            .collect::<Result<_>>()?;
        let join = registrar.new_join_command(&["--reusable"])?;
        Ok(Self { lab, switch, registrar, directors, join, sites: 0 })
    }

    /// A further host, called `name`, whose agent joins and runs.
    pub(crate) fn host(&mut self, name: &str, kind: Kind) -> Result<Joined> {
        self.sites += 1;
        let site = Site::new(self.lab, &self.switch, name, kind, self.sites)?;
        let mut agent = Agent::new(&site.host, "")?;
        agent.join(&self.join, name)?;
        agent.run()?;
        Ok(Joined { site, agent })
    }
}
