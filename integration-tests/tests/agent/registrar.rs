//! A registrar that moves, drains, or is away.

use std::{fs, time::Duration};

use muster_integration_tests::{Result, expect, muster::Agent, process::wait_for, scenario};

use crate::site::{PATIENCE, connected, file_error, log, network, reaches, status};

#[test]
fn a_registrar_moves_to_another_address() {
    scenario("registrar moves", |lab| {
        let mut site = network(lab)?;
        reaches(site.alice.host(), "bob.net.example")?;
        // Agents have to be told while the old address still works.
        site.alice.host().sh("ip addr add 10.2.0.10/24 dev eth0")?;
        site.registrar.stop()?;
        let config = site.registrar.config();
        site.hq.sh(&format!("sed -i 's/10\\.1\\.0\\.1:/10.2.0.1:/g' {}", config.display()))?;
        site.registrar.serve()?;
        let told = |agent: &Agent| {
            wait_for("the new address to be on disk", PATIENCE, || {
                let text = fs::read_to_string(agent.state().join("config")).unwrap_or_default();
                if text.contains("10.2.0.1:7500") { Ok(()) } else { Err(text) }
            })
        };
        told(&site.alice)?;
        told(&site.bob)?;
        site.registrar.kill();
        site.hq.sh("ip addr del 10.1.0.1/24 dev eth0")?;
        site.registrar.serve()?;
        connected(&site.alice, true)?;
        connected(&site.bob, true)?;
        expect(
            status(&site.alice)?["registrar"]["address"] == "10.2.0.1:7500",
            "at the new address",
            &status(&site.alice)?.to_string(),
        )?;
        // DNS follows, too: of a device that nobody has asked for before.
        let carol = lab.host("carol")?;
        site.lan.plug(&carol, &["10.2.0.30/24"])?;
        let mut carol = Agent::new(&carol, "")?;
        let join = site.registrar.new_join_command(&[]).or_else(|_| {
            let file = site.registrar.credential();
            site.hq.sh(&format!("sed -i 's/10\\.1\\.0\\.1:/10.2.0.1:/g' {}", file.display()))?;
            site.registrar.new_join_command(&[])
        })?;
        carol.join(&join.with("registrar", "10.2.0.1:7500"), "carol")?;
        carol.run()?;
        reaches(site.alice.host(), "carol.net.example")
    });
}

/// CPU time of a process in ticks of 10 ms, and how often its threads have slept.
fn effort(pid: u32) -> Result<(u64, u64)> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).map_err(file_error(path.as_ref()))?;
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let number = |n: usize| fields.get(n).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
    let mut switches = 0;
    let tasks = format!("/proc/{pid}/task");
    for task in fs::read_dir(&tasks).map_err(file_error(tasks.as_ref()))?.flatten() {
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        switches += line.and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0);
    }
    Ok((number(11) + number(12), switches))
}

#[test]
fn without_a_registrar_an_agent_is_quiet() {
    scenario("nobody home for long", |lab| {
        let mut site = network(lab)?;
        site.alice.stop()?;
        site.registrar.kill();
        // Without names on disk, not even the device's own resolves.
        let names = site.alice.state().join("names");
        fs::remove_file(&names).map_err(file_error(&names))?;
        site.alice.run()?;
        std::thread::sleep(Duration::from_secs(10));
        let pid = site.alice.process().map(|p| p.id()).unwrap_or_default();
        let (lines, before) = (log(&mut site.alice).lines().count(), effort(pid)?);
        std::thread::sleep(Duration::from_secs(10));
        let (after, log) = (effort(pid)?, log(&mut site.alice));
        let (ticks, sleeps, written) = (after.0 - before.0, after.1 - before.1, log.lines().count() - lines);
        eprintln!(
            "without a registrar, in 10 s: {ticks} ticks, {sleeps} context switches, {written} lines of log"
        );
        expect(ticks <= 10, "no spinning: CPU ticks in 10 s", &ticks.to_string())?;
        expect(sleeps <= 60, "no spinning: context switches in 10 s", &sleeps.to_string())?;
        expect(written <= 3, "no flood of log lines", &log)
    });
}

#[test]
fn a_registrar_drains_and_comes_back() {
    scenario("drain", |lab| {
        let mut site = network(lab)?;
        let host = site.alice.host().clone();
        reaches(&host, "bob.net.example")?;
        let address = host.sh("dig +short bob.net.example")?.trim().to_owned();
        let mut command = host.command("ping");
        command.args(["-i", "0.2", "-W", "1", "-c", "40", &address]);
        let mut pings = host.spawn("ping", command)?;
        let attempts = || -> Result<u64> {
            let text = host.sh("curl -sf http://127.0.0.1:7581/metrics")?;
            let line = text.lines().find_map(|l| l.strip_prefix("muster_agent_registrar_attempts_total "));
            Ok(line.and_then(|n| n.trim().parse().ok()).unwrap_or(0))
        };
        let before = attempts()?;
        site.registrar.stop()?;
        connected(&site.alice, false)?;
        std::thread::sleep(Duration::from_secs(3));
        let during = attempts()? - before;
        expect((1..=8).contains(&during), "attempts back off", &during.to_string())?;
        site.registrar.serve()?;
        connected(&site.alice, true)?;
        connected(&site.bob, true)?;
        expect(pings.wait(PATIENCE)?.success(), "ping", &pings.log())?;
        expect(pings.log().contains(" 0% packet loss"), "traffic does not notice", &pings.log())
    });
}
