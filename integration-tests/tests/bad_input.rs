//! Bad input of every sort gets one clear error, the right exit code, and leaves everything as it was.

use std::{fs, os::unix::fs::PermissionsExt, process::Command, time::Duration};

use muster_integration_tests::{
    Host, Lab, LabError, Output, Result,
    muster::{Agent, JoinCommand, Registrar, binary},
    process, scenario,
};

const ADDRESS: &str = "198.51.100.10";

/// A registrar that serves, and one more host beside it.
fn pair(lab: &Lab) -> Result<(Registrar, Host, Host)> {
    let switch = lab.switch("lan")?;
    let (hq, other) = (lab.host("hq")?, lab.host("other")?);
    switch.plug(&hq, &["198.51.100.10/24"])?;
    switch.plug(&other, &["198.51.100.20/24"])?;
    hq.route("default via 198.51.100.1")?;
    let mut registrar = Registrar::init(&hq, "net.example", ADDRESS, "")?;
    registrar.serve()?;
    Ok((registrar, hq, other))
}

fn fails(output: &Output, code: i32, says: &[&str]) -> Result {
    let text = output.stderr.to_lowercase();
    for part in says {
        if output.status.code() != Some(code) || !text.contains(&part.to_lowercase()) {
            let command = format!("a failure with exit code {code} that says {part:?}");
            return Err(LabError::Command { command, reason: format!("{output:?}") });
        }
    }
    if text.contains("panicked") {
        return Err(LabError::Command { command: "a clear error".into(), reason: text });
    }
    Ok(())
}

fn write(path: &std::path::Path, contents: &[u8]) -> Result {
    fs::write(path, contents).map_err(|source| LabError::File { path: path.display().to_string(), source })
}

/// Everything in the registrar's data directory, to see that nothing has changed.
fn contents(registrar: &Registrar, host: &Host) -> Result<String> {
    host.sh(&format!(
        "cd {} && find . -type f ! -name '*-shm' ! -name '*-wal' ! -name '*.lock' -exec sha256sum {{}} + | sort",
        registrar.data().display()
    ))
}

fn serve_once(registrar: &Registrar, host: &Host) -> Result<Output> {
    let mut command = host.command("timeout");
    command.arg("20").arg(binary("muster-registrar")?).arg("serve").arg("--config").arg(registrar.config());
    process::run(command)
}

/// Runs `muster-agent` with its clock shifted by `shift`, as in "+10m".
fn agent_at(agent: &Agent, shift: &str, arguments: &[&str]) -> Result<Command> {
    let mut command = agent.host().command("faketime");
    command.args(["-f", shift]).arg(binary("muster-agent")?).args(arguments);
    command.arg("--config").arg(agent.config());
    Ok(command)
}

#[test]
fn a_second_init_refuses_and_changes_nothing() {
    scenario("second init", |lab| {
        let (mut registrar, hq, _) = pair(lab)?;
        registrar.stop()?;
        let before = contents(&registrar, &hq)?;
        let again = process::run(registrar.init_command("other.example", ADDRESS)?)?;
        fails(&again, 1, &["exist"])?;
        assert_eq!(before, contents(&registrar, &hq)?);
        registrar.serve()
    });
}

#[test]
fn bad_databases_are_refused_and_kept() {
    scenario("bad databases", |lab| {
        let (mut registrar, hq, _) = pair(lab)?;
        registrar.stop()?;
        let path = registrar.data().join("registry.db");
        let good = fs::read(&path).unwrap_or_default();
        assert!(good.len() > 4096, "the database is where the test expects it");
        hq.sh(&format!("rm -f {0} && sqlite3 {0} 'create table notes(text)'", path.display()))?;
        let foreign = fs::read(&path).unwrap_or_default();
        let truncated = good.get(..good.len() / 2 + 100).unwrap_or_default().to_vec();
        let damaged: Vec<u8> = (0..good.len()).map(|i| (i % 251) as u8).collect();
        for (bad, what) in [(foreign, "foreign"), (truncated, "truncated"), (damaged, "damaged")] {
            write(&path, &bad)?;
            let output = serve_once(&registrar, &hq)?;
            fails(&output, 1, &["registry.db"])?;
            assert!(fs::read(&path).unwrap_or_default() == bad, "the {what} database is left as it was");
        }
        hq.sh(&format!("rm {}", path.display()))?;
        fails(&serve_once(&registrar, &hq)?, 1, &["registry.db", "init"])?;
        write(&path, &good)?;
        registrar.serve()
    });
}

#[test]
fn bad_configurations_are_refused() {
    scenario("bad configurations", |lab| {
        let (mut registrar, hq, other) = pair(lab)?;
        let good = fs::read_to_string(registrar.config()).unwrap_or_default();
        // The registrar that serves has the data directory, and with another one, the port.
        fails(&serve_once(&registrar, &hq)?, 1, &["data directory", "another process"])?;
        let elsewhere = registrar.data().display().to_string();
        write(&registrar.config(), good.replace(&elsewhere, &format!("{elsewhere}-2")).as_bytes())?;
        fails(&serve_once(&registrar, &hq)?, 1, &["7500", "another program"])?;
        write(&registrar.config(), good.as_bytes())?;
        registrar.stop()?;

        write(&registrar.config(), format!("grpc_port = 1\n{good}").as_bytes())?;
        fails(&serve_once(&registrar, &hq)?, 1, &["registrar.toml", "grpc_port"])?;
        write(&registrar.config(), b"[listen\n")?;
        fails(&serve_once(&registrar, &hq)?, 1, &["registrar.toml"])?;
        write(&registrar.config(), &[0xFF, 0xFE])?;
        fails(&serve_once(&registrar, &hq)?, 1, &["registrar.toml"])?;
        write(&registrar.config(), good.as_bytes())?;
        registrar.serve()?;

        let agent = Agent::new(&other, "")?;
        let good = fs::read_to_string(agent.config()).unwrap_or_default();
        write(&agent.config(), format!("{good}\n[tunnel]\nprot = 1\n").as_bytes())?;
        fails(&agent.try_ask(&["run"])?, 1, &["agent.toml", "prot"])?;
        write(&agent.config(), good.as_bytes())?;
        fails(&agent.try_ask(&["run"])?, 1, &["join"])?;
        let mut missing = other.command(binary("muster-agent")?);
        missing.args(["run", "--config", "/nowhere/agent.toml"]);
        fails(&process::run(missing)?, 1, &["/nowhere/agent.toml"])?;
        let mut usage = other.command(binary("muster-agent")?);
        usage.arg("dance");
        fails(&process::run(usage)?, 2, &["dance"])
    });
}

#[test]
fn clocks_may_differ_by_minutes_but_not_by_years() {
    scenario("clock skew", |lab| {
        let (registrar, _, other) = pair(lab)?;
        let join = registrar.new_join_command(&["--reusable"])?;
        let agent = Agent::new(&other, "")?;
        let at = |shift: &str, name: &str| {
            let mut arguments: Vec<&str> = vec!["join", "--name", name];
            arguments.extend(join.0.iter().map(String::as_str));
            process::run(agent_at(&agent, shift, &arguments)?)
        };
        for (shift, says) in [("-1y", "valid from"), ("+1y", "expired")] {
            fails(&at(shift, "years")?, 1, &[says, "clock"])?;
            assert!(!registrar.muster(&["get", "devices", "-o", "name"])?.contains("years"));
        }
        for (shift, name) in [("-10m", "behind"), ("+10m", "ahead")] {
            let joined = at(shift, name)?;
            assert!(joined.status.success(), "{shift}: {joined:?}");
            other.sh(&format!("rm -r {}", agent.state().display()))?;
        }
        let devices = registrar.muster(&["get", "devices", "-o", "name"])?;
        assert!(devices.contains("behind") && devices.contains("ahead"), "{devices}");
        Ok(())
    });
}

#[test]
fn an_agent_without_tun_root_or_registrar_says_so() {
    scenario("bare agent", |lab| {
        let (mut registrar, _, other) = pair(lab)?;
        let agent = Agent::new(&other, "")?;
        let run = |prefix: &[&str]| {
            let mut command = other.command("timeout");
            command.arg("20").args(prefix).arg(binary("muster-agent")?).arg("run");
            command.arg("--config").arg(agent.config());
            process::run(command)
        };
        agent.join(&registrar.join_command()?, "bare")?;
        let hidden = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /dev/net && exec \"$@\"", "sh"];
        fails(&run(&hidden)?, 1, &["/dev/net/tun"])?;

        // As a user who may read all of the agent's files, but has no privilege.
        other.sh(&format!(
            "chown -R 65534 {0} && chmod 755 {0}/..",
            agent.state().parent().unwrap_or(&agent.state()).display()
        ))?;
        other.sh(&format!("chmod 755 {}", lab.directory().display()))?;
        let nobody = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"];
        fails(&run(&nobody)?, 1, &["root"])?;

        // The device is as it was, and runs once it may.
        other.sh(&format!("chown -R 0 {}", agent.state().parent().unwrap_or(&agent.state()).display()))?;
        let mut agent = agent;
        agent.run()?;
        registrar.stop()?;
        let status = agent.ask(&["status"])?;
        assert!(status.contains("198.51.100.10:7500"), "{status}");
        Ok(())
    });
}

#[test]
fn networks_and_devices_are_checked() {
    scenario("bad resources", |lab| {
        let (registrar, _, _) = pair(lab)?;
        let before = registrar.muster(&["get", "networks,devices,tokens", "-o", "name"])?;
        for (arguments, says) in [
            (
                &["create", "network", "b", "--domain", "b.example", "--device-pool-v4", "100.64.0.0/16"][..],
                "overlap",
            ),
            (&["create", "network", "b", "--domain", "net.example"], "net.example"),
            (
                &["create", "network", "b", "--domain", "b.example", "--device-pool-v4", "10.0.0.1/24"],
                "10.0.0",
            ),
            (&["create", "network", "b", "--domain", "example"], "domain"),
            (&["create", "device", "svc"], "reserved"),
            (&["create", "device", "x-"], "x-"),
            (&["create", "device", "x", "--virtual-ipv4", "10.0.0.1"], "10.0.0.1"),
            (&["delete", "device", "nobody"], "nobody"),
            (&["label", "device", "nobody", "a=b"], "nobody"),
        ] {
            let output = registrar.try_muster(arguments)?;
            assert!(!output.status.success() && output.stderr.contains(says), "{arguments:?}: {output:?}");
        }
        assert_eq!(before, registrar.muster(&["get", "networks,devices,tokens", "-o", "name"])?);
        // A name that is taken, and a chosen address that is.
        registrar.muster(&["create", "device", "x", "--virtual-ipv4", "100.64.0.9"])?;
        fails(&registrar.try_muster(&["create", "device", "x"])?, 1, &["exists"])?;
        fails(
            &registrar.try_muster(&["create", "device", "y", "--virtual-ipv4", "100.64.0.9"])?,
            1,
            &["100.64.0.9"],
        )?;
        Ok(())
    });
}

/// Sends garbage of every size to every port of the registrar and the agent.
const GARBAGE: &str = r#"
import os, random, socket
random.seed(7)
targets = [(socket.SOCK_DGRAM, a, p) for a, p in [("198.51.100.10", 53), ("198.51.100.20", 7551), ("169.254.20.10", 53)]]
targets += [(socket.SOCK_STREAM, "198.51.100.10", p) for p in (53, 853, 7500)] + [(socket.SOCK_STREAM, "169.254.20.10", 53)]
for kind, address, port in targets:
    for i in range(20000 if kind == socket.SOCK_DGRAM else 200):
        size = random.choice([0, 1, 3, 12, 32, 92, 148, 200, 512, 1400, 9000, 60000])
        data = random.randbytes(size)
        if i % 3 == 0 and size >= 12:
            # Looks like a query, or like a handshake, at first.
            data = random.choice([b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00", b"\x01\x00\x00\x00", b"\x04\x00\x00\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"]) + data[12:]
        try:
            with socket.socket(socket.AF_INET, kind) as s:
                s.settimeout(1)
                if kind == socket.SOCK_STREAM:
                    s.connect((address, port))
                    s.sendall(data)
                else:
                    s.sendto(data, (address, port))
        except OSError:
            pass
"#;

#[test]
fn garbage_on_every_port_neither_ends_nor_swells_anything() {
    scenario("garbage", |lab| {
        let (mut registrar, hq, other) = pair(lab)?;
        let mut agent = Agent::new(&other, "")?;
        agent.join(&registrar.join_command()?, "target")?;
        agent.run()?;
        let ids = [registrar.process().map(|p| p.id()), agent.process().map(|p| p.id())];
        let resident = || -> Result<Vec<u64>> {
            ids.iter()
                .flatten()
                .map(|id| {
                    let text = hq.sh(&format!("grep VmRSS /proc/{id}/status"))?;
                    Ok(text.split_whitespace().filter_map(|w| w.parse::<u64>().ok()).next().unwrap_or(0))
                })
                .collect()
        };
        let script = lab.directory().join("garbage.py");
        write(&script, GARBAGE.as_bytes())?;
        let send = || other.sh(&format!("python3 {}", script.display()));
        // Once to fill what is bounded, then again to see that it is.
        send()?;
        let before = resident()?;
        send()?;
        let after = resident()?;
        for (before, after) in before.iter().zip(&after) {
            assert!(*before > 0 && *after < before + 32 * 1024, "from {before} to {after} KiB");
        }
        assert!(registrar.process().is_some_and(|p| p.is_running() && !p.log().contains("panicked")));
        assert!(agent.process().is_some_and(|p| p.is_running() && !p.log().contains("panicked")));
        registrar.wait_ready()?;
        agent.wait_ready()?;
        let name = other.sh("dig +short target.net.example")?;
        assert!(name.starts_with("100."), "{name}");
        Ok(())
    });
}

#[test]
fn tokens_of_every_bad_kind_are_refused() {
    scenario("bad tokens", |lab| {
        let (registrar, _, other) = pair(lab)?;
        let agent = Agent::new(&other, "")?;
        let refused = |join: &JoinCommand, says: &[&str]| fails(&agent.try_join(join, "nobody")?, 1, says);
        let good = registrar.new_join_command(&["--reusable"])?;
        let token = good.option("token").unwrap_or_default().to_owned();
        let (id, secret) = token.rsplit_once('.').unwrap_or_default();
        let wrong: String = secret.chars().rev().collect();
        refused(&good.with("token", &format!("{id}.{wrong}")), &["token", "muster create token"])?;
        refused(
            &good.with("token", "muster.zzzzzzzzzz.abcdefghijklmnopqrstuvwxyz234567"),
            &["token", "muster create token"],
        )?;
        refused(&good.with("token", "nonsense"), &["token"])?;
        let short = registrar.new_join_command(&["--ttl", "2s"])?;
        std::thread::sleep(Duration::from_millis(2100));
        refused(&short, &["expired", "muster create token"])?;
        registrar.muster(&["delete", "token", id.trim_start_matches("muster.")])?;
        refused(&good, &["token", "muster create token"])?;
        assert!(!registrar.muster(&["get", "devices", "-o", "name"])?.contains("nobody"));
        assert!(fs::metadata(registrar.credential()).is_ok_and(|m| m.permissions().mode() & 0o077 == 0));
        Ok(())
    });
}
