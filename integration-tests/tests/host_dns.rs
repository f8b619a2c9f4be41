//! The agent's hook into the host's own DNS, through a resolv.conf that is a mount of its own, as in containers.

use std::{fs, time::Duration};

use muster_integration_tests::{
    Host, Lab, Process, Result, expect,
    muster::{Agent, Registrar, binary},
    process::{Output, run, wait_for},
    scenario,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
const BEFORE: &str = "# ours\nsearch corp.example\nnameserver 10.1.0.53\noptions timeout:1 attempts:1\n";

/// A registrar, a name server that the host has, and a device.
struct Site {
    host: Host,
    agent: Agent,
    _registrar: Registrar,
    _dns: Process,
}

fn site(lab: &Lab) -> Result<Site> {
    let lan = lab.switch("lan")?;
    let (hq, host, up) = (lab.host("hq")?, lab.host("alice")?, lab.host("up")?);
    lan.plug(&hq, &["10.1.0.1/24"])?;
    lan.plug(&host, &["10.1.0.10/24"])?;
    lan.plug(&up, &["10.1.0.53/24"])?;
    let mut dnsmasq = up.command("dnsmasq");
    dnsmasq.args([
        "--no-daemon",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
        "--user=root",
        "--pid-file=",
    ]);
    dnsmasq.args(["--address=/intranet.corp.example/10.9.9.9"]);
    let dns = up.spawn("dnsmasq", dnsmasq)?;
    let mut registrar = Registrar::init(&hq, "net.example", "10.1.0.1", "")?;
    registrar.serve()?;
    let agent = Agent::new(&host, "")?;
    agent.join(&registrar.join_command()?, "alice")?;
    host.write_etc("resolv.conf", BEFORE)?;
    Ok(Site { host, agent, _registrar: registrar, _dns: dns })
}

impl Site {
    fn start(&self) -> Result<Process> {
        let mut command = self.host.command(binary("muster-agent")?);
        command.arg("run").arg("--config").arg(self.agent.config()).env("MUSTER_RESOLVER_HOST", "auto");
        self.host.spawn("muster-agent", command)
    }

    fn resolv_conf(&self) -> Result<String> {
        self.host.sh("cat /etc/resolv.conf")
    }

    fn hooked(&self) -> Result {
        wait_for("resolv.conf to name the agent alone", PATIENCE, || {
            let text = self.resolv_conf().map_err(|e| e.to_string())?;
            let servers: Vec<&str> = text.lines().filter(|line| line.starts_with("nameserver")).collect();
            if servers == ["nameserver 169.254.20.10"] { Ok(()) } else { Err(text) }
        })
    }

    fn doctor(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = self.host.command(binary("muster-agent")?);
        command.arg("doctor").args(arguments).arg("--config").arg(self.agent.config());
        command.env("MUSTER_RESOLVER_HOST", "auto");
        run(command)
    }

    fn address_of(&self, name: &str) -> Result<String> {
        self.host.sh(&format!("getent ahostsv4 {name} | cut -d' ' -f1 | sort -u"))
    }
}

#[test]
fn programs_find_names_of_both_and_the_doctor_is_content() {
    scenario("the host's own DNS", |lab| {
        let site = site(lab)?;
        let mut agent = site.start()?;
        site.hooked()?;
        wait_for("names of the network", PATIENCE, || {
            let found = site.address_of("alice.net.example").map_err(|e| e.to_string())?;
            if found.starts_with("100.") { Ok(()) } else { Err(found) }
        })?;
        // The host's own server, and its search list.
        for name in ["intranet.corp.example", "intranet"] {
            let found = site.address_of(name)?;
            expect(found.trim() == "10.9.9.9", name, &found)?;
        }
        let doctor = site.doctor(&["-o", "json"])?;
        let report: Value = serde_json::from_str(&doctor.stdout).unwrap_or_default();
        let checks = report["checks"].as_array().cloned().unwrap_or_default();
        let fine = checks.len() >= 7 && checks.iter().all(|check| check["outcome"] == "ok");
        expect(doctor.status.success() && fine, "the doctor", &format!("{doctor:?}"))?;
        // It takes nothing away from an agent that runs.
        site.doctor(&["--fix"])?;
        site.hooked()?;
        agent.signal(rustix::process::Signal::TERM)?;
        expect(agent.wait(PATIENCE)?.success(), "a clean end", &agent.log())?;
        let left = site.resolv_conf()?;
        expect(left == BEFORE, "what was there before", &left)
    });
}

#[test]
fn after_a_kill_the_doctor_or_the_next_start_restores_the_host() {
    scenario("an agent that is killed", |lab| {
        let site = site(lab)?;
        let mut agent = site.start()?;
        site.hooked()?;
        agent.kill();
        let found = site.doctor(&[])?;
        let seen = format!("{found:?}");
        expect(
            found.status.code() == Some(1) && seen.contains("doctor --fix"),
            "the doctor's advice",
            &seen,
        )?;
        let fixed = site.doctor(&["--fix", "--quiet"])?;
        expect(fixed.status.success() && fixed.stdout.is_empty(), "a quiet fix", &format!("{fixed:?}"))?;
        let text = site.resolv_conf()?;
        expect(text == BEFORE, "what was there before", &text)?;
        // Killed again: the next start undoes, and hooks in anew.
        let mut agent = site.start()?;
        site.hooked()?;
        agent.kill();
        let mut agent = site.start()?;
        site.hooked()?;
        // Killed at any moment of its life.
        agent.kill();
        for kill in 0..100_u64 {
            let mut agent = site.start()?;
            std::thread::sleep(Duration::from_millis(kill * 7 % 250));
            agent.kill();
            site.doctor(&["--fix", "--quiet"])?;
            let text = site.resolv_conf()?;
            expect(text == BEFORE, &format!("after kill {kill}"), &text)?;
        }
        Ok(())
    });
}

#[test]
fn what_dhcp_writes_is_followed_and_left_behind() {
    scenario("a DHCP client", |lab| {
        let site = site(lab)?;
        let mut agent = site.start()?;
        site.hooked()?;
        let lease = BEFORE.replace("# ours", "# a new lease");
        site.host.write_etc("resolv.conf", &lease)?;
        site.hooked()?;
        let backup = fs::read_to_string(site.agent.state().join("resolv.conf.backup"));
        expect(backup.as_ref().is_ok_and(|text| *text == lease), "the backup", &format!("{backup:?}"))?;
        agent.signal(rustix::process::Signal::TERM)?;
        expect(agent.wait(PATIENCE)?.success(), "a clean end", &agent.log())?;
        let left = site.resolv_conf()?;
        expect(left == lease, "what DHCP wrote", &left)
    });
}
