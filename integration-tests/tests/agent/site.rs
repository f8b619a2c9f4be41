//! The site that most scenarios begin with: a registrar and two devices on one LAN, and what is asked of them.

use std::time::Duration;

use muster_integration_tests::{
    Host, Lab, LabError, Result, Switch, expect,
    muster::{Agent, Registrar, binary},
    process::{run, wait_for},
};
use serde_json::Value;

pub(crate) const DOMAIN: &str = "net.example";
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A registrar (10.1.0.1) and two devices on one LAN, which has a second network, 10.2.0.0/24, for all but `alice`.
pub(crate) struct Site {
    pub(crate) lan: Switch,
    pub(crate) hq: Host,
    pub(crate) registrar: Registrar,
    pub(crate) alice: Agent,
    pub(crate) bob: Agent,
}

pub(crate) fn site(lab: &Lab) -> Result<Site> {
    site_with(lab, "", "")
}

/// `alice` and `bob` are appended to the agents' configuration files.
pub(crate) fn site_with(lab: &Lab, alice: &str, bob: &str) -> Result<Site> {
    let lan = lab.switch("lan")?;
    let (hq, a, b) = (lab.host("hq")?, lab.host("alice")?, lab.host("bob")?);
    lan.plug(&hq, &["10.1.0.1/24", "10.2.0.1/24"])?;
    lan.plug(&a, &["10.1.0.10/24"])?;
    lan.plug(&b, &["10.1.0.20/24", "10.2.0.20/24"])?;
    let mut registrar = Registrar::init(&hq, DOMAIN, "10.1.0.1", "")?;
    registrar.serve()?;
    Ok(Site { lan, hq, registrar, alice: Agent::new(&a, alice)?, bob: Agent::new(&b, bob)? })
}

impl Site {
    pub(crate) fn join(&self) -> Result {
        let join = self.registrar.new_join_command(&["--reusable"])?;
        self.alice.join(&join, "alice")?;
        self.bob.join(&join, "bob").map(drop)
    }

    pub(crate) fn up(&mut self) -> Result {
        self.join()?;
        self.alice.run()?;
        self.bob.run()
    }
}

pub(crate) fn network(lab: &Lab) -> Result<Site> {
    let mut site = site(lab)?;
    site.up()?;
    Ok(site)
}

pub(crate) fn file_error(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> LabError {
    let path = path.display().to_string();
    move |source| LabError::File { path, source }
}

pub(crate) fn ping(from: &Host, target: &str) -> Result {
    from.sh(&format!("ping -c 1 -W 1 {target}")).map(drop)
}

/// Waits until `from` reaches `target`.
pub(crate) fn reaches(from: &Host, target: &str) -> Result {
    wait_for(&format!("{} to reach {target}", from.name()), PATIENCE, || {
        ping(from, target).map_err(|e| e.to_string())
    })
}

pub(crate) fn status(agent: &Agent) -> Result<Value> {
    let text = agent.ask(&["status", "-o", "json"])?;
    serde_json::from_str(&text)
        .map_err(|e| LabError::Command { command: "status -o json".into(), reason: format!("{e}: {text}") })
}

pub(crate) fn connected(agent: &Agent, expected: bool) -> Result {
    wait_for(&format!("connected: {expected}"), PATIENCE, || {
        let status = status(agent).map_err(|e| e.to_string())?;
        if status["registrar"]["connected"].as_bool().unwrap_or(false) == expected {
            Ok(())
        } else {
            Err(status.to_string())
        }
    })
}

pub(crate) fn log(agent: &mut Agent) -> String {
    agent.process().map(|p| p.log()).unwrap_or_default()
}

/// Seconds since boot.
pub(crate) fn seconds() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

/// Runs `muster-agent run` with the configuration `config` on `host`; it must end by itself, with 1.
pub(crate) fn refused(host: &Host, config: &std::path::Path, parts: &[&str]) -> Result {
    let mut command = host.command("timeout");
    command.arg("20").arg(binary("muster-agent")?).arg("run").arg("--config").arg(config);
    let output = run(command)?;
    expect(output.status.code() == Some(1), "exit code 1", &format!("{output:?}"))?;
    for part in parts {
        expect(output.stderr.contains(part), part, &output.stderr)?;
    }
    Ok(())
}
