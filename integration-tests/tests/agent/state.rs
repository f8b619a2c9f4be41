//! The state on disk: damaged, of processes that were killed, of two agents on one host.

use std::{fs, time::Duration};

use muster_integration_tests::{
    Host, LabError, Process, Result, expect, muster::binary, process::wait_for, scenario,
};
use rustix::process::Signal;

use crate::site::{PATIENCE, file_error, log, network, ping, reaches, refused, seconds, status};

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
