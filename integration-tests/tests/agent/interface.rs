//! Interface, addresses and packets: changed by hand, by the network, too large, to nowhere.

use std::{fs, time::Duration};

use muster_integration_tests::{
    LabError, Process, Result, expect,
    muster::{Agent, Registrar},
    process::wait_for,
    scenario,
};

use crate::site::{
    DOMAIN, PATIENCE, Site, connected, file_error, log, network, ping, reaches, seconds, site, site_with,
    status,
};

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
