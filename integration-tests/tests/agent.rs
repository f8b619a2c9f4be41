//! The agent on a host that does not behave: state that is damaged, processes that are killed, interfaces and addresses
//! that change under it, a registrar that is away, moves or drains.
#![allow(clippy::print_stderr, reason = "scenarios tell the times that they have measured")]

use std::{fs, time::Duration};

use muster_integration_tests::{
    Host, Lab, LabError, Process, Result, Switch, expect,
    muster::{Agent, Registrar, binary},
    process::{run, wait_for},
    scenario,
};
use rustix::process::Signal;
use serde_json::Value;

const DOMAIN: &str = "net.example";
const PATIENCE: Duration = Duration::from_secs(30);

/// A registrar (10.1.0.1) and two devices on one LAN, which has a second network, 10.2.0.0/24, for all but `alice`.
struct Site {
    lan: Switch,
    hq: Host,
    registrar: Registrar,
    alice: Agent,
    bob: Agent,
}

fn site(lab: &Lab) -> Result<Site> {
    site_with(lab, "", "")
}

/// `alice` and `bob` are appended to the agents' configuration files.
fn site_with(lab: &Lab, alice: &str, bob: &str) -> Result<Site> {
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
    fn join(&self) -> Result {
        let join = self.registrar.new_join_command(&["--reusable"])?;
        self.alice.join(&join, "alice")?;
        self.bob.join(&join, "bob").map(drop)
    }

    fn up(&mut self) -> Result {
        self.join()?;
        self.alice.run()?;
        self.bob.run()
    }
}

fn network(lab: &Lab) -> Result<Site> {
    let mut site = site(lab)?;
    site.up()?;
    Ok(site)
}

fn file_error(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> LabError {
    let path = path.display().to_string();
    move |source| LabError::File { path, source }
}

fn ping(from: &Host, target: &str) -> Result {
    from.sh(&format!("ping -c 1 -W 1 {target}")).map(drop)
}

/// Waits until `from` reaches `target`.
fn reaches(from: &Host, target: &str) -> Result {
    wait_for(&format!("{} to reach {target}", from.name()), PATIENCE, || {
        ping(from, target).map_err(|e| e.to_string())
    })
}

fn status(agent: &Agent) -> Result<Value> {
    let text = agent.ask(&["status", "-o", "json"])?;
    serde_json::from_str(&text)
        .map_err(|e| LabError::Command { command: "status -o json".into(), reason: format!("{e}: {text}") })
}

fn connected(agent: &Agent, expected: bool) -> Result {
    wait_for(&format!("connected: {expected}"), PATIENCE, || {
        let status = status(agent).map_err(|e| e.to_string())?;
        if status["registrar"]["connected"].as_bool().unwrap_or(false) == expected {
            Ok(())
        } else {
            Err(status.to_string())
        }
    })
}

fn log(agent: &mut Agent) -> String {
    agent.process().map(|p| p.log()).unwrap_or_default()
}

/// Seconds since boot.
fn seconds() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

/// Runs `muster-agent run` with the configuration `config` on `host`; it must end by itself, with 1.
fn refused(host: &Host, config: &std::path::Path, parts: &[&str]) -> Result {
    let mut command = host.command("timeout");
    command.arg("20").arg(binary("muster-agent")?).arg("run").arg("--config").arg(config);
    let output = run(command)?;
    expect(output.status.code() == Some(1), "exit code 1", &format!("{output:?}"))?;
    for part in parts {
        expect(output.stderr.contains(part), part, &output.stderr)?;
    }
    Ok(())
}

#[test]
fn a_warm_start_needs_no_registrar() {
    scenario("warm start", |lab| {
        let mut site = network(lab)?;
        reaches(site.alice.host(), "bob.net.example")?;
        reaches(site.bob.host(), "alice.net.example")?;
        // What has been learnt is on disk within half a second; and the registrar's host does not even refuse.
        std::thread::sleep(Duration::from_secs(1));
        site.registrar.kill();
        site.hq.sh("ip link set eth0 down")?;
        for agent in [&mut site.alice, &mut site.bob] {
            agent.kill();
            let started = seconds();
            agent.start()?;
            let host = agent.host().clone();
            wait_for("the address", PATIENCE, || {
                host.sh("ip -o addr show dev muster0 | grep -q 'inet 100\\.'").map_err(|e| e.to_string())
            })?;
            let bound = seconds() - started;
            let other = if host.name() == "alice" { "bob" } else { "alice" };
            wait_for("the name", PATIENCE, || {
                host.sh(&format!(
                    "dig +short +tries=1 +time=3 @169.254.20.10 {other}.net.example | grep -q '^100\\.'"
                ))
                .map_err(|e| e.to_string())
            })?;
            let known = seconds() - started;
            eprintln!("warm start of {}: address after {bound:.3} s, name after {known:.3} s", host.name());
            expect(known < 1.5, "names are known at once", &format!("after {known} s"))?;
            agent.wait_ready()?;
            expect(status(agent)?["peers"].to_string().contains(other), "the peer is known", "")?;
        }
        let from = seconds();
        reaches(site.alice.host(), "bob.net.example")?;
        eprintln!("warm start: tunnel {:.3} s after both were up", seconds() - from);
        reaches(site.bob.host(), "alice.net.example")
    });
}

#[test]
fn damaged_state_is_set_aside() {
    scenario("damaged state", |lab| {
        let mut site = network(lab)?;
        reaches(site.alice.host(), "bob.net.example")?;
        let damage = |path: &std::path::Path, how: &str| -> Result {
            let mut bytes = fs::read(path).map_err(file_error(path))?;
            match how {
                "truncated" => bytes.truncate(bytes.len() / 2),
                "garbled" => {
                    let at = bytes.len() / 2;
                    bytes.iter_mut().skip(at).take(4).for_each(|byte| *byte ^= 0x55);
                }
                _ => bytes.clear(),
            }
            fs::write(path, bytes).map_err(file_error(path))
        };
        for file in ["config", "peers", "names"] {
            for how in ["truncated", "garbled", "emptied"] {
                site.alice.stop()?;
                damage(&site.alice.state().join(file), how)?;
                site.alice.run()?;
                let log = log(&mut site.alice);
                let reported = log
                    .lines()
                    .rev()
                    .take(40)
                    .any(|line| line.contains("set it aside") && line.contains(&format!("/{file}")));
                expect(reported, &format!("{how} {file} is reported"), &log)?;
                reaches(site.alice.host(), "bob.net.example")?;
            }
        }
        let aside = site.alice.host().sh(&format!("ls {}", site.alice.state().display()))?;
        expect(aside.contains("config.corrupt-") && aside.contains("peers.corrupt-"), "set aside", &aside)?;
        // The identity alone is indispensable, and never touched.
        let identity = site.alice.state().join("identity");
        let good = fs::read(&identity).map_err(file_error(&identity))?;
        for how in ["truncated", "garbled", "emptied"] {
            site.alice.stop()?;
            damage(&identity, how)?;
            let bad = fs::read(&identity).map_err(file_error(&identity))?;
            let path = identity.display().to_string();
            refused(site.alice.host(), &site.alice.config(), &[&path, "identity", "remedy"])?;
            expect(fs::read(&identity).ok() == Some(bad), "the file is as it was", "")?;
            fs::write(&identity, &good).map_err(file_error(&identity))?;
            site.alice.run()?;
        }
        reaches(site.alice.host(), "bob.net.example")
    });
}

#[test]
fn killed_a_dozen_times_while_starting() {
    scenario("kill -9", |lab| {
        let mut site = network(lab)?;
        let addresses = "ip -o addr show dev muster0 | awk '{print $4}' | sort";
        let before = site.alice.host().sh(addresses)?;
        for milliseconds in [0, 5, 10, 20, 30, 45, 60, 80, 110, 150, 250, 500] {
            site.alice.kill();
            site.alice.start()?;
            std::thread::sleep(Duration::from_millis(milliseconds));
        }
        site.alice.kill();
        site.alice.run()?;
        let after = site.alice.host().sh(addresses)?;
        expect(before == after, "the same addresses", &format!("{before}\n{after}"))?;
        let log = log(&mut site.alice);
        expect(!log.contains("panicked") && !log.contains("set it aside"), "nothing was damaged", &log)?;
        let files = site.alice.host().sh(&format!("ls -A {}", site.alice.state().display()))?;
        expect(files.lines().count() <= 5, "no temporary files pile up", &files)?;
        reaches(site.alice.host(), "bob.net.example")?;
        site.alice.stop()?;
        let left = site.alice.host().sh("ip -o link; ip route; ip -6 route; ip -o addr")?;
        expect(!left.contains("muster0") && !left.contains("100.64"), "all is swept", &left)
    });
}

/// A configuration for a second agent on a host: `name` tells its files from the first one's.
fn second(host: &Host, name: &str, text: &str) -> Result<std::path::PathBuf> {
    let directory = host.directory().join(name);
    fs::create_dir_all(&directory).map_err(file_error(&directory))?;
    let path = directory.join("agent.toml");
    let text = text.replace("DIR", &directory.display().to_string());
    fs::write(&path, text).map_err(file_error(&path))?;
    Ok(path)
}

#[test]
fn a_crash_leaves_no_keys_behind() {
    scenario("core dump", |lab| {
        use std::os::unix::process::ExitStatusExt;
        let mut site = network(lab)?;
        let host = site.alice.host().clone();
        site.alice.stop()?;
        let mut command = host.command("sh");
        command.args(["-c", "ulimit -c unlimited; cd \"$2\"; exec \"$0\" run --config \"$1\""]);
        command.arg(binary("muster-agent")?).arg(site.alice.config()).arg(host.directory());
        let mut agent = host.spawn("crash", command)?;
        wait_for("the agent to be ready", PATIENCE, || {
            host.sh("curl -sf http://127.0.0.1:7581/readyz").map_err(|e| e.to_string())
        })?;
        agent.signal(Signal::ABORT)?;
        let status = agent.wait(PATIENCE)?;
        expect(status.signal().is_some() && !status.core_dumped(), "no core dump", &status.to_string())
    });
}

#[test]
fn two_agents_share_a_host_or_are_refused() {
    scenario("two agents", |lab| {
        let mut site = network(lab)?;
        let host = site.alice.host().clone();
        // The same state.
        refused(&host, &site.alice.config(), &["another muster-agent", "state directory", "remedy"])?;
        // A device of its own, with one setting after the other still that of the first.
        let whole = "state_dir = \"DIR/state\"\nruntime_dir = \"DIR/run\"\nsocket = \"DIR/run/agent.sock\"\n\
                     [interface]\nname = \"muster1\"\n[tunnel]\nport = 7552\n\
                     [resolver]\nlisten = [\"169.254.20.11:53\"]\n[http]\nlisten = \"127.0.0.1:7582\"\n";
        let config = second(&host, "carol", whole)?;
        let join = site.registrar.new_join_command(&[])?;
        let mut command = host.command(binary("muster-agent")?);
        command.arg("join").args(&join.0).args(["--name", "carol", "--config"]).arg(&config);
        muster_integration_tests::process::check(command)?;
        let first_socket = format!("{}/run/agent.sock", host.directory().join("agent").display());
        for (ours, theirs, part) in [
            ("name = \"muster1\"", "name = \"muster0\"", "muster0"),
            ("port = 7552", "port = 7551", "7551"),
            ("127.0.0.1:7582", "127.0.0.1:7581", "7581"),
            ("DIR/run/agent.sock", first_socket.as_str(), "agent.sock"),
            ("169.254.20.11:53", "169.254.20.10:53", "169.254.20.10:53"),
        ] {
            second(&host, "carol", &whole.replace(ours, theirs))?;
            refused(&host, &config, &[part]).map_err(|e| LabError::Command {
                command: format!("second agent with {theirs}"),
                reason: e.to_string(),
            })?;
            ping(&host, "bob.net.example")?;
        }
        second(&host, "carol", whole)?;
        let mut command = host.command(binary("muster-agent")?);
        command.arg("run").arg("--config").arg(&config);
        let mut carol = host.spawn("carol", command)?;
        wait_for("carol to be ready", PATIENCE, || {
            host.sh("curl -sf http://127.0.0.1:7582/readyz").map_err(|e| e.to_string())
        })?;
        // Both are in one network, so the host has two ways into it: the operator is told, and the first stays.
        expect(carol.log().contains("overlaps with the network's pool"), "a warning", &carol.log())?;
        ping(&host, "bob.net.example")?;
        carol.signal(Signal::TERM)?;
        expect(carol.wait(PATIENCE)?.success(), "a clean end", &carol.log())?;
        ping(&host, "bob.net.example")?;
        let links = host.sh("ip -o link; ip route")?;
        expect(!links.contains("muster1") && links.contains("muster0"), "only the second is gone", &links)?;
        expect(site.alice.process().is_some_and(Process::is_running), "the first runs", "")
    });
}

#[test]
fn what_is_changed_on_the_interface_by_hand_is_healed() {
    scenario("interface", |lab| {
        let mut site = network(lab)?;
        let host = site.alice.host().clone();
        let bob6 = host.sh("dig +short AAAA bob.net.example")?.trim().to_owned();
        let works = || {
            reaches(&host, "bob.net.example")?;
            reaches(&host, &bob6)
        };
        works()?;
        host.sh("ip link set muster0 down")?;
        // Down is the operator's will.
        std::thread::sleep(Duration::from_secs(2));
        expect(!host.sh("ip -o link show muster0")?.contains(",UP"), "down stays down", "")?;
        host.sh("ip link set muster0 up")?;
        works()?;
        for change in [
            "ip addr del $(ip -o -4 addr show dev muster0 | awk '/ 100\\./{print $4}') dev muster0",
            "ip -6 addr del $(ip -o -6 addr show dev muster0 | awk '{print $4}') dev muster0",
            "ip route del 100.64.0.0/11",
            "ip addr flush dev muster0",
            "ip route flush dev muster0; ip -6 route flush dev muster0",
        ] {
            host.sh(change)?;
            works().map_err(|e| LabError::Command { command: change.into(), reason: e.to_string() })?;
        }
        // A deleted interface ends the agent; its service manager starts it again.
        host.sh("ip link del muster0")?;
        let process = site.alice.process();
        let status = process.map(|p| p.wait(PATIENCE)).transpose()?;
        let log = log(&mut site.alice);
        expect(status.and_then(|s| s.code()) == Some(1), "exit code 1", &format!("{status:?}\n{log}"))?;
        expect(log.contains("deleted") && log.contains("restart the agent"), "the reason", &log)?;
        site.alice.run()?;
        works()
    });
}

#[test]
fn a_transfer_survives_a_new_address() {
    /// Octets of the file: enough that it is still under way when its receiver has moved twice and caught up.
    const FILE: usize = 64 << 20;
    scenario("roaming", |lab| {
        let mut site = network(lab)?;
        let (alice, bob) = (site.alice.host().clone(), site.bob.host().clone());
        let address = alice.sh("dig +short bob.net.example")?.trim().to_owned();
        // As with a gateway on either network, which this lab does without.
        alice.sh("ip route add default dev eth0")?;
        let files = lab.directory().join("www");
        fs::create_dir_all(&files).map_err(file_error(&files))?;
        fs::write(files.join("large"), vec![7u8; FILE]).map_err(file_error(&files))?;
        let mut command = bob.command("python3");
        command.args(["-m", "http.server", "8000", "--bind", &address, "--directory"]).arg(&files);
        let _server = bob.spawn("http", command)?;
        let url = format!("http://{address}:8000/large");
        wait_for("the server", PATIENCE, || {
            alice.sh(&format!("curl -sfI {url}")).map_err(|e| e.to_string())
        })?;
        let output = lab.directory().join("got");
        let mut command = alice.command("curl");
        command.args(["-sS", "--fail", "--limit-rate", "4M", "-o"]).arg(&output).arg(&url);
        let mut curl = alice.spawn("curl", command)?;
        let length = || fs::metadata(&output).map(|m| m.len()).unwrap_or(0);
        for (new, old) in [("10.2.0.10", "10.1.0.10"), ("10.1.0.11", "10.2.0.10")] {
            let before = length();
            wait_for("some of the file", PATIENCE, || {
                let now = length();
                if now > before + (2 << 20) { Ok(()) } else { Err(now.to_string()) }
            })?;
            // The second time there is no registrar that could tell bob.
            if new == "10.1.0.11" {
                site.registrar.kill();
            }
            alice.sh(&format!("ip addr add {new}/24 dev eth0; ip addr del {old}/24 dev eth0"))?;
            let (at, moved) = (length(), seconds());
            wait_for("the transfer to go on", Duration::from_secs(10), || {
                let now = length();
                if now > at + (1 << 20) { Ok(()) } else { Err(now.to_string()) }
            })?;
            eprintln!("roaming from {old} to {new}: the transfer went on after {:.3} s", seconds() - moved);
        }
        let status = curl.wait(Duration::from_secs(90))?;
        expect(
            status.success() && length() == FILE as u64,
            "the whole file",
            &format!("{status} {}", curl.log()),
        )?;
        // And a third time with nothing to send, which would tell bob by itself.
        let own = alice.sh("ip -o -4 addr show dev muster0 | awk '/ 100\\./{print $4}' | cut -d/ -f1")?;
        reaches(&bob, own.trim())?;
        alice.sh("ip addr add 10.2.0.12/24 dev eth0; ip addr del 10.1.0.11/24 dev eth0")?;
        wait_for("bob to reach alice where she is now", Duration::from_secs(8), || {
            ping(&bob, own.trim()).map_err(|e| e.to_string())
        })?;
        site.registrar.serve()?;
        connected(&site.alice, true)?;
        // Whoever looks alice up now is told of her new address.
        wait_for("the new endpoint", PATIENCE, || {
            let answer = bob.sh("dig +noall +additional alice.net.example").map_err(|e| e.to_string())?;
            if answer.contains("10.2.0.12") && !answer.contains("10.1.0.11") { Ok(()) } else { Err(answer) }
        })?;
        expect(site.bob.process().is_some_and(Process::is_running), "bob runs", "")
    });
}

#[test]
fn a_peer_comes_back_on_another_port() {
    scenario("new port", |lab| {
        let mut site = site_with(lab, "", "[tunnel]\nport = 0")?;
        site.up()?;
        let alice = site.alice.host().clone();
        let endpoint =
            |site: &Site| -> Result<String> { Ok(status(&site.bob)?["privateEndpoints"].to_string()) };
        reaches(&alice, "bob.net.example")?;
        for _ in 0..2 {
            let before = endpoint(&site)?;
            site.bob.kill();
            site.bob.run()?;
            expect(endpoint(&site)? != before, "another port", &before)?;
            let from = seconds();
            reaches(&alice, "bob.net.example")?;
            eprintln!("new port: reached again after {:.3} s", seconds() - from);
        }
        Ok(())
    });
}

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

#[test]
fn a_host_keeps_its_own_routes_in_the_pool() {
    scenario("pool overlap", |lab| {
        let mut site = site(lab)?;
        site.join()?;
        let host = site.alice.host().clone();
        host.sh("ip route add 100.64.7.0/24 via 10.1.0.1; ip route add 100.70.0.0/16 dev eth0")?;
        let own = "ip route | grep -v muster0";
        let before = host.sh(own)?;
        site.alice.run()?;
        site.bob.run()?;
        expect(host.sh(own)? == before, "the host's routes", &host.sh("ip route")?)?;
        let log = log(&mut site.alice);
        for route in ["100.64.7.0/24", "100.70.0.0/16"] {
            let warned =
                log.lines().any(|l| l.contains("WARN") && l.contains(route) && l.contains("overlaps"));
            expect(warned, &format!("a warning of {route}"), &log)?;
        }
        site.alice.stop()?;
        expect(host.sh(own)? == before, "the host's routes after the end", &host.sh("ip route")?)
    });
}

#[test]
fn large_packets_pass_and_too_large_ones_are_answered() {
    scenario("mtu", |lab| {
        let site = network(lab)?;
        let host = site.alice.host();
        let six = host.sh("dig +short AAAA bob.net.example")?.trim().to_owned();
        reaches(host, "bob.net.example")?;
        for target in ["bob.net.example", six.as_str()] {
            host.sh(&format!("ping -c 3 -i 0.2 -W 2 -s 8000 {target}"))?;
        }
        host.sh("ping -4 -c 2 -i 0.2 -W 2 -M do -s 1392 bob.net.example")?;
        host.sh(&format!("ping -c 2 -i 0.2 -W 2 -M do -s 1372 {six}"))?;
        for (target, size) in [("-4 bob.net.example", 1393), (&six, 1373)] {
            let output = host.try_sh(&format!("ping -c 1 -W 2 -M do -s {size} {target} 2>&1"))?;
            let told = output.stdout.to_lowercase().contains("too long") && output.stdout.contains("1420");
            expect(!output.status.success() && told, "told of the MTU", &output.stdout)?;
        }
        Ok(())
    });
}

#[test]
fn ipv6_alone_is_enough_underneath() {
    scenario("ipv6 underlay", |lab| {
        let lan = lab.switch("lan")?;
        let (hq, a, b) = (lab.host("hq")?, lab.host("alice")?, lab.host("bob")?);
        lan.plug(&hq, &["fd10::1/64"])?;
        lan.plug(&a, &["fd10::a/64"])?;
        lan.plug(&b, &["fd10::b/64"])?;
        let mut registrar = Registrar::init(&hq, DOMAIN, "fd10::1", "")?;
        for file in [registrar.config(), registrar.credential()] {
            hq.sh(&format!("sed -i 's/\"fd10::1:/\"[fd10::1]:/g' {}", file.display()))?;
        }
        registrar.serve()?;
        let join = registrar.new_join_command(&["--reusable"])?.with("registrar", "[fd10::1]:7500");
        let (mut alice, mut bob) = (Agent::new(&a, "")?, Agent::new(&b, "")?);
        alice.join(&join, "alice")?;
        bob.join(&join, "bob")?;
        alice.run()?;
        bob.run()?;
        reaches(&a, "bob.net.example")?;
        reaches(&b, &a.sh("dig +short AAAA alice.net.example")?)?;
        a.sh("ping -4 -c 2 -i 0.2 -W 2 -s 8000 bob.net.example")?;
        expect(status(&alice)?.to_string().contains("fd10::b"), "the path", &status(&alice)?.to_string())
    });
}

#[test]
fn six_devices_reach_each_other() {
    scenario("six devices", |lab| {
        let lan = lab.switch("lan")?;
        let hq = lab.host("hq")?;
        lan.plug(&hq, &["10.1.0.1/24"])?;
        let mut registrar = Registrar::init(&hq, DOMAIN, "10.1.0.1", "")?;
        registrar.serve()?;
        let join = registrar.new_join_command(&["--reusable"])?;
        let mut agents = Vec::new();
        for n in 1..=6 {
            let host = lab.host(&format!("d{n}"))?;
            lan.plug(&host, &[&format!("10.1.0.{}/24", 10 + n)])?;
            let mut agent = Agent::new(&host, "")?;
            agent.join(&join, host.name())?;
            agent.run()?;
            agents.push(agent);
        }
        for from in &agents {
            for to in agents.iter().filter(|to| to.host().name() != from.host().name()) {
                let target = format!("{}.net.example", to.host().name());
                from.host().sh(&format!("ping -c 1 -W 3 {target}"))?;
            }
        }
        for agent in &agents {
            let peers = status(agent)?["peers"].as_array().map(Vec::len);
            expect(peers == Some(5), "five peers", &format!("{peers:?}"))?;
        }
        Ok(())
    });
}

#[test]
fn what_does_not_exist_is_answered_at_once() {
    scenario("nobody there", |lab| {
        let mut site = network(lab)?;
        let host = site.alice.host().clone();
        let six = host.sh("dig +short AAAA bob.net.example")?.trim().to_owned();
        let prefix: String = six.split(':').take(3).collect::<Vec<_>>().join(":");
        let unreachable = |target: &str, limit: f64| -> Result {
            let from = seconds();
            let output = host.try_sh(&format!("ping -c 1 -W 20 {target} 2>&1"))?;
            let took = seconds() - from;
            let told = output.stdout.contains("nreachable") && !output.status.success();
            expect(told && took < limit, "unreachable", &format!("after {took} s: {}", output.stdout))
        };
        unreachable("100.64.200.200", 1.5)?;
        unreachable(&format!("{prefix}::dead"), 1.5)?;
        let from = seconds();
        let refused = host.try_sh("curl -sS --connect-timeout 20 http://100.64.200.201/ 2>&1")?;
        expect(
            !refused.status.success() && seconds() - from < 2.0,
            "programs hear of it",
            &format!("after {} s: {}", seconds() - from, refused.stdout),
        )?;
        let answer = host.sh("dig nothing.net.example")?;
        expect(answer.contains("NXDOMAIN"), "NXDOMAIN", &answer)?;
        // With nobody to ask, the answer takes as long as somebody might come back.
        site.registrar.kill();
        connected(&site.alice, false)?;
        unreachable("100.64.200.202", 9.0)?;
        let answer = host.sh("dig +time=7 +tries=1 other.net.example")?;
        expect(answer.contains("SERVFAIL"), "SERVFAIL", &answer)
    });
}

/// A DNS server that knows one answer, with two threads' worth of patience.
const UPSTREAM: &str = r"
import socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], int(sys.argv[2])))
while True:
    q, a = s.recvfrom(4096)
    end = 12
    while q[end]: end += q[end] + 1
    end += 5
    kind = struct.unpack('>H', q[end-4:end-2])[0]
    n = 1 if kind == 1 else 0
    r = q[:2] + b'\x81\x80' + struct.pack('>HHHH', 1, n, 0, 0) + q[12:end]
    if n: r += b'\xc0\x0c' + struct.pack('>HHIH', 1, 1, 5, 4) + bytes([192, 0, 2, 77])
    s.sendto(r, a)
";

#[test]
fn other_names_go_upstream_whoever_is_away() {
    scenario("upstream", |lab| {
        let mut site = site_with(lab, "[resolver]\nupstream = [\"10.1.0.1:5353\"]", "")?;
        let script = lab.directory().join("upstream.py");
        fs::write(&script, UPSTREAM).map_err(file_error(&script))?;
        let mut command = site.hq.command("python3");
        command.arg(&script).args(["10.1.0.1", "5353"]);
        let mut upstream = site.hq.spawn("upstream", command)?;
        site.up()?;
        let host = site.alice.host().clone();
        let asked = |name: &str| -> Result {
            let answer = wait_for("an answer", PATIENCE, || {
                let answer = host.sh(&format!("dig +short {name}")).map_err(|e| e.to_string())?;
                if answer.contains("192.0.2.77") { Ok(answer) } else { Err(answer) }
            })?;
            expect(answer.trim() == "192.0.2.77", name, &answer)
        };
        asked("www.example.org")?;
        expect(status(&site.alice)?.to_string().contains("10.1.0.1"), "status names the upstream", "")?;
        reaches(&host, "bob.net.example")?;
        // What has been learnt is on disk within half a second.
        std::thread::sleep(Duration::from_secs(1));
        site.registrar.kill();
        asked("www2.example.org")?;
        site.alice.kill();
        site.alice.run()?;
        asked("www3.example.org")?;
        // And the network's names do not need the upstream.
        upstream.kill();
        reaches(&host, "bob.net.example")?;
        let answer = host.sh("dig +time=7 +tries=1 www4.example.org")?;
        expect(answer.contains("SERVFAIL"), "SERVFAIL", &answer)
    });
}

/// Writes each notification down; at READY=1 also what the host looks like at that moment.
const NOTIFIED: &str = r"
import os, socket, subprocess, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(sys.argv[1])
while True:
    text = s.recv(4096).decode()
    for line in text.splitlines():
        extra = ''
        if line == 'READY=1':
            bound = '100.' in subprocess.run(['ip', '-o', '-4', 'addr', 'show', 'dev', 'muster0'], capture_output=True, text=True).stdout
            dig = subprocess.run(['dig', '+short', '+tries=1', '+time=2', '@169.254.20.10', 'alice.net.example'], capture_output=True, text=True).stdout
            extra = f' bound={bound} resolves={dig.startswith(chr(49) + chr(48) + chr(48))}'
        print(line + extra, flush=True)
";

#[test]
fn the_service_manager_is_told() {
    scenario("notifications", |lab| {
        let mut site = site(lab)?;
        site.join()?;
        let host = site.alice.host().clone();
        let script = lab.directory().join("notified.py");
        fs::write(&script, NOTIFIED).map_err(file_error(&script))?;
        let socket = lab.directory().join("notify.sock");
        let mut command = host.command("python3");
        command.arg(&script).arg(&socket);
        let manager = host.spawn("manager", command)?;
        wait_for("the manager", PATIENCE, || if socket.exists() { Ok(()) } else { Err(String::new()) })?;
        // A device that has never been configured has no address, and is not ready, however long it waits.
        site.registrar.kill();
        let mut command = host.command(binary("muster-agent")?);
        command.arg("run").arg("--config").arg(site.alice.config());
        command.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", "900000");
        let mut agent = host.spawn("muster-agent", command)?;
        let told = |what: &str| {
            wait_for(what, PATIENCE, || {
                let log = manager.log();
                log.lines().find(|l| l.starts_with(what)).map(str::to_owned).ok_or(log)
            })
        };
        told("WATCHDOG=1")?;
        std::thread::sleep(Duration::from_secs(5));
        expect(!manager.log().contains("READY=1"), "not ready yet", &manager.log())?;
        site.registrar.serve()?;
        let ready = told("READY=1")?;
        expect(ready.contains("bound=True") && ready.contains("resolves=True"), "ready", &ready)?;
        let beats = manager.log().matches("WATCHDOG=1").count();
        wait_for("the watchdog to be fed", PATIENCE, || {
            let now = manager.log().matches("WATCHDOG=1").count();
            if now >= beats + 3 { Ok(()) } else { Err(now.to_string()) }
        })?;
        agent.signal(Signal::TERM)?;
        expect(agent.wait(PATIENCE)?.success(), "a clean end", &agent.log())?;
        told("STOPPING=1")?;
        let log = manager.log();
        expect(log.matches("READY=1").count() == 1, "once", &log)
    });
}
