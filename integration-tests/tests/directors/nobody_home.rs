//! Nobody home: every registrar is gone, the directors have been started anew and know nobody, and then an agent starts. All
//! that it knew comes up from disk, and new connections to known peers work, by way of directors and straight.

use std::time::Duration;

use muster_common::time::Instant;
use muster_integration_tests::{Result, expect, process::wait_for, scenario};

use crate::{heal::two_hosts, traffic::reaches};

const PATIENCE: Duration = Duration::from_secs(30);
/// Until addresses, names and virtual IPs of an agent that starts are there. A second on a machine that has nothing else to
/// do; what is measured is in the benchmarks.
const SOON: Duration = Duration::from_secs(5);

#[test]
#[expect(clippy::print_stderr, reason = "how long it takes is worth to be seen")]
fn an_agent_starts_when_nobody_is_home() {
    scenario("nobody home", |lab| {
        let (mut internet, mut alice, bob, mut home, mut other) = two_hosts(lab)?;
        let (carol_host, _carol) = internet.beside(&alice.site, "carol")?;
        let host = alice.site.host.clone();
        reaches(&host, "carol")?;
        reaches(&carol_host, "alice")?;
        internet.registrar.muster(&["label", "device", "bob", "app=web"])?;
        internet.registrar.muster(&["create", "service", "clusterip", "web", "--tcp=80:8080"])?;
        let mut server = bob.site.host.command("python3");
        server.args(["-m", "http.server", "8080", "--directory", "/proc/sys/kernel"]);
        let _server = bob.site.host.spawn("server", server)?;
        let web = "curl -sf --max-time 2 -o /dev/null http://web.default.svc.net.example/ostype";
        wait_for("the Service", PATIENCE, || host.sh(web).map_err(|e| e.to_string()))?;
        let address = host.sh("ip -o -4 addr show dev muster0 | awk '{print $4}'")?;
        // What was learnt last is written within half a second.
        std::thread::sleep(Duration::from_secs(2));

        internet.registrar.kill();
        alice.agent.kill();
        home.kill();
        other.kill();
        home.run()?;
        other.run()?;
        let started = Instant::now();
        alice.agent.start()?;
        let soon = |what: &str, script: &str| -> Result<String> {
            let seen = wait_for(what, PATIENCE, || host.sh(script).map_err(|e| e.to_string()))?;
            let after = Instant::now() - started;
            eprintln!("nobody home: {what} after {:.3} s", after.as_secs_f64());
            expect(after < SOON, &format!("{what} at once"), &format!("after {after:?}"))?;
            Ok(seen)
        };
        let now = soon("the address", "ip -o -4 addr show dev muster0 | awk '{print $4}' | grep .")?;
        expect(now == address, "the same address", &format!("{now} {address}"))?;
        soon("the name", "dig +short +tries=1 +time=1 @169.254.20.10 bob.net.example | grep '^100\\.'")?;
        soon("the virtual IP", "nft list table inet muster_muster0_services | grep -q 'dnat'")?;
        // Through a director that has never seen it, without a registrar to vouch for it; and on the LAN.
        reaches(&host, "bob")?;
        expect(alice.agent.path_to("bob")?.0 == "relay", "a director relays", "none does")?;
        reaches(&host, "carol")?;
        reaches(&carol_host, "alice")?;
        wait_for("the Service", PATIENCE, || host.sh(web).map_err(|e| e.to_string()))?;

        // And all of it is as it should be once the registrar is back.
        internet.registrar.serve()?;
        internet.registrar.muster(&["label", "device", "carol", "seen=yes"])?;
        wait_for("the agent to be connected", PATIENCE, || {
            let status = alice.agent.ask(&["status", "-o", "json"]).map_err(|e| e.to_string())?;
            if status.contains("\"connected\": true") { Ok(()) } else { Err(status) }
        })?;
        internet.registrar.muster(&["delete", "service", "web"])?;
        wait_for("the Service to be gone", PATIENCE, || match host.try_sh(web) {
            Ok(output) if output.status.success() => Err("it answers".into()),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        })?;
        reaches(&host, "bob")
    });
}
