//! Certificates over their life: renewal, replacement of the root, revocation, while everything runs.

use std::time::Duration;

use muster_integration_tests::{
    Host, Lab, Result, failed,
    muster::{Agent, Registrar, binary},
    process::{self, wait_for},
    scenario,
};

const PATIENCE: Duration = Duration::from_secs(45);

fn pair(lab: &Lab) -> Result<(Registrar, Agent, Host)> {
    let switch = lab.switch("lan")?;
    let (hq, host) = (lab.host("hq")?, lab.host("alice")?);
    switch.plug(&hq, &["198.51.100.10/24"])?;
    switch.plug(&host, &["198.51.100.20/24"])?;
    hq.route("default via 198.51.100.1")?;
    let mut registrar =
        Registrar::init(&hq, "net.example", "198.51.100.10", "[certificates]\ndevice_lifetime = \"1h\"\n")?;
    registrar.serve()?;
    let agent = Agent::new(&host, "")?;
    agent.join(&registrar.join_command()?, "alice")?;
    Ok((registrar, agent, hq))
}

/// The value of `key` in the agent's status.
fn status(agent: &Agent, key: &str) -> Result<String, String> {
    let text = agent.ask(&["status", "-o", "json"]).map_err(|e| e.to_string())?;
    text.split_once(&format!("\"{key}\": \""))
        .and_then(|(_, rest)| rest.split_once('"'))
        .map(|(value, _)| value.to_owned())
        .ok_or(text)
}

fn wait_connected(agent: &Agent) -> Result {
    wait_for("the agent to be connected", PATIENCE, || {
        let text = agent.ask(&["status", "-o", "json"]).map_err(|e| e.to_string())?;
        if text.contains("\"connected\": true") { Ok(()) } else { Err(text) }
    })
}

/// How often an agent has connected, by its log.
fn connections(log: &str) -> usize {
    log.matches("connected registrar=").count()
}

#[test]
fn a_certificate_is_renewed_without_dropping_the_session() {
    scenario("renewal", |lab| {
        let (registrar, mut agent, _) = pair(lab)?;
        agent.run()?;
        wait_connected(&agent)?;
        let first = status(&agent, "certificateExpiry").map_err(|seen| failed("certificateExpiry", seen))?;
        agent.stop()?;

        // Expiry is told in whole seconds: two certificates issued within one look the same.
        std::thread::sleep(Duration::from_millis(1100));
        // 50 minutes later, by the agent's clock, two thirds of the hour are over.
        let mut later = agent.host().command("faketime");
        later
            .args(["-f", "+50m"])
            .arg(binary("muster-agent")?)
            .arg("run")
            .arg("--config")
            .arg(agent.config());
        let process = agent.host().spawn("muster-agent-later", later)?;
        let renewed = wait_for("a new certificate", PATIENCE, || {
            let now = status(&agent, "certificateExpiry")?;
            if now > first { Ok(now) } else { Err(now) }
        })?;
        wait_connected(&agent)?;
        let log = process.log();
        if connections(&log) != 1 {
            return Err(failed("one session throughout the renewal", log));
        }
        // It is on disk, and used after a restart.
        drop(process);
        agent.run()?;
        wait_connected(&agent)?;
        let kept = status(&agent, "certificateExpiry").map_err(|seen| failed("certificateExpiry", seen))?;
        assert_eq!(kept, renewed);
        assert!(registrar.muster(&["get", "devices"])?.contains("Online"));
        Ok(())
    });
}

#[test]
fn the_root_is_replaced_while_agents_stay_connected() {
    scenario("root replacement", |lab| {
        let (mut registrar, mut agent, hq) = pair(lab)?;
        agent.run()?;
        wait_connected(&agent)?;
        let step = |registrar: &mut Registrar, step: &[&str]| -> Result<String> {
            let mut command = hq.command(binary("muster-registrar")?);
            command.args(["ca", "rotate"]).args(step).arg("--config").arg(registrar.config());
            let printed = process::check(command)?;
            if let Some(process) = registrar.process() {
                process.signal(rustix::process::Signal::HUP)?;
            }
            Ok(printed)
        };
        let roots = |agent: &Agent| -> Result<usize> {
            let text = agent
                .host()
                .sh(&format!("cat {}/* | grep -ao 'BEGIN CERTIFICATE' | wc -l", agent.state().display()))?;
            Ok(text.trim().parse().unwrap_or(0))
        };
        let before = roots(&agent)?;
        step(&mut registrar, &["prepare"])?;
        wait_for("the agent to have both roots on disk", PATIENCE, || {
            let now = roots(&agent).map_err(|e| e.to_string())?;
            if now > before { Ok(()) } else { Err(now.to_string()) }
        })?;
        let old_join = registrar.new_join_command(&[])?;
        step(&mut registrar, &["activate"])?;
        wait_for("join commands to name the new root", PATIENCE, || {
            let join = registrar.new_join_command(&[]).map_err(|e| e.to_string())?;
            if join.option("ca-hash") == old_join.option("ca-hash") {
                Err(format!("{join:?}"))
            } else {
                Ok(())
            }
        })?;
        let log = agent.process().map(|p| p.log()).unwrap_or_default();
        assert_eq!(connections(&log), 1, "the session went on: {log}");

        // Whoever comes anew, with the new hash or with the old one, gets in; and so does the agent, restarted.
        let lan = lab.switch("lan2")?;
        for (name, join) in [("bob", registrar.new_join_command(&[])?), ("carol", old_join)] {
            let host = lab.host(name)?;
            // On the registrar's own segment, through its second interface.
            let net = if name == "bob" { 1 } else { 2 };
            lan.plug(&host, &[&format!("203.0.113.{net}/24")])?;
            if net == 1 {
                lan.plug(&hq, &["203.0.113.10/24"])?;
            }
            host.route("198.51.100.0/24 via 203.0.113.10")?;
            Agent::new(&host, "")?.join(&join, name)?;
        }
        agent.stop()?;
        agent.run()?;
        wait_connected(&agent)
    });
}
