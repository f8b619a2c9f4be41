//! An internet with a registrar, directors, and hosts connected to it in one way or another.

use muster_integration_tests::{
    Host, Lab, Result, Switch,
    attachments::Issuer,
    failed,
    muster::{Agent, Director, JoinCommand, Registrar},
    nat::{Kind, Site},
};

/// The domain of the network, and the trust domain.
pub(crate) const DOMAIN: &str = "net.example";

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
    /// With a registrar at 198.51.100.200 and 2001:db8::200, and so many directors at the addresses after these.
    pub(crate) fn new(lab: &'a Lab, directors: u8) -> Result<Self> {
        Self::prepared(lab, directors, |_| Ok(()))
    }

    /// As [`Self::new`]; the registrar is prepared before it runs.
    pub(crate) fn prepared(
        lab: &'a Lab,
        directors: u8,
        prepare: impl FnOnce(&Registrar) -> Result,
    ) -> Result<Self> {
        let switch = lab.switch("internet")?;
        let hq = plugged(lab, &switch, "hq", 200)?;
        let mut registrar = Registrar::init(&hq, DOMAIN, "198.51.100.200 2001:db8::200", "")?;
        prepare(&registrar)?;
        registrar.serve()?;
        let directors = (1..=directors)
            .map(|n| {
                let host = plugged(lab, &switch, &format!("relay-{n}"), 200 + n)?;
                Director::serve(&host, &registrar, "drain = 25")
            })
            .collect::<Result<_>>()?;
        let join = registrar.new_join_command(&["--reusable"])?;
        Ok(Self { lab, switch, registrar, directors, join, sites: 0 })
    }

    /// A further host, called `name`, whose agent joins and runs.
    pub(crate) fn host(&mut self, name: &str, kind: Kind) -> Result<Joined> {
        let site = self.site(name, kind)?;
        let agent = self.agent(&site.host, kind)?;
        Ok(Joined { site, agent })
    }

    /// A further host, called `name`, without an agent.
    pub(crate) fn site(&mut self, name: &str, kind: Kind) -> Result<Site> {
        self.sites += 1;
        Site::new(self.lab, &self.switch, name, kind, self.sites)
    }

    /// A further host, called `name`, on the LAN of one that is there, whose agent joins and runs.
    pub(crate) fn beside(&self, site: &Site, name: &str) -> Result<(Host, Agent)> {
        let host = site.add_host(self.lab, name, 3)?;
        let agent = self.agent(&host, site.kind)?;
        Ok((host, agent))
    }

    /// A host with the addresses 198.51.100.`number` and 2001:db8::`number`, which are 150 to 199, and no agent.
    pub(crate) fn stranger(&self, name: &str, number: u8) -> Result<Host> {
        plugged(self.lab, &self.switch, name, number)
    }

    /// Who issues certificates as the registrar does.
    pub(crate) fn issuer(&self) -> Result<Issuer> {
        Issuer::of(&self.registrar.data(), DOMAIN).map_err(|error| failed("the registrar's CA", &error))
    }

    /// Has `host`, connected as `kind` says, join, and its agent run.
    pub(crate) fn agent(&self, host: &Host, kind: Kind) -> Result<Agent> {
        let mut agent = Agent::new(host, "")?;
        let over_ipv6 = self.join.with("registrar", "[2001:db8::200]:7500");
        agent.join(if kind.has_ipv4() { &self.join } else { &over_ipv6 }, host.name())?;
        agent.run()?;
        Ok(agent)
    }
}

fn plugged(lab: &Lab, switch: &Switch, name: &str, number: u8) -> Result<Host> {
    let host = lab.host(name)?;
    switch.plug(&host, &[&format!("198.51.100.{number}/24"), &format!("2001:db8::{number}/64")])?;
    Ok(host)
}

/// Runs scenarios at the same time that have little to do and much to wait for.
pub(crate) fn together(scenarios: &[fn()]) {
    std::thread::scope(|scope| {
        for scenario in scenarios {
            scope.spawn(scenario);
        }
    });
}
