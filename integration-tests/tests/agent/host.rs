//! What the host brings: a name server of its own, and a service manager.

use std::{fs, time::Duration};

use muster_integration_tests::{Result, expect, muster::binary, process::wait_for, scenario};
use rustix::process::Signal;

use crate::site::{PATIENCE, file_error, reaches, site, site_with, status};

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
