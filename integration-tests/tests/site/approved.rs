//! Hosts and subnets from the operator's first look to the last: refused, approved, taken over by another gate, and taken
//! back, with every program at work and none of them started anew.

use std::time::Duration;

use muster_integration_tests::{Host, Result, expect, muster::Agent, process::wait_for, scenario};

use crate::lan::{Lan, PATIENCE, is_reached, reaches};

/// In the subnet; nobody speaks for it.
const INSIDE: &str = "192.168.7.10";
const SUBNET: &str = "192.168.7.0/24";
/// Within which another gate takes over.
const TAKEOVER: Duration = Duration::from_secs(15);

/// Waits until `muster-agent status` says it.
fn says(agent: &Agent, line: &str) -> Result {
    wait_for(&format!("{} to say {line:?}", agent.host().name()), PATIENCE, || {
        let status = agent.ask(&["status"]).map_err(|error| error.to_string())?;
        if status.contains(line) { Ok(()) } else { Err(status) }
    })
}

/// Waits until a name resolves, or does not; returns the answer.
fn resolves(host: &Host, query: &str, wanted: bool) -> Result<String> {
    wait_for(&format!("an answer to {query}"), PATIENCE, || {
        let answer = host.sh(&format!("dig +short {query}")).map_err(|error| error.to_string())?;
        if answer.trim().is_empty() == wanted { Err(answer) } else { Ok(answer.trim().to_owned()) }
    })
}

/// Another gate carries the subnet within [`TAKEOVER`], as the caller sees it.
fn takes_over(lan: &Lan, what: &str) -> Result {
    wait_for(what, TAKEOVER, || {
        let ping = format!("ping -n -c 1 -W 1 {INSIDE}");
        let output = lan.caller.host().try_sh(&ping).map_err(|error| error.to_string())?;
        if output.status.success() { Ok(()) } else { Err(output.stdout) }
    })
}

#[test]
fn what_an_operator_approves_is_reached_and_what_he_takes_back_is_not() {
    scenario("a site that is approved", |lab| {
        let mut lan = Lan::new(lab)?;
        let caller = lan.caller.host().clone();
        let before = lan.traces()?;

        // Refused, with the way out.
        says(&lan.gate, "muster approve device gate --hosts")?;
        says(&lan.gate, "192.168.7.0/24, unapproved")?;
        resolves(&caller, "A printer.net.example", false)?;
        expect(!is_reached(&caller, INSIDE)?, "nobody carries the subnet", INSIDE)?;

        // Approved: all is there, without a restart.
        lan.registrar.muster(&["approve", "device", "gate", "--hosts", "--subnet", SUBNET])?;
        reaches(&caller, "printer.net.example")?;
        reaches(&caller, "printer-6.net.example")?;
        reaches(&caller, INSIDE)?;
        says(&lan.gate, "192.168.7.0/24, active")?;
        let address = resolves(&caller, "A printer.net.example", true)?;
        let name = resolves(&caller, &format!("-x {address}"), true)?;
        expect(name == "printer.net.example.", "PTR", &name)?;
        let private = resolves(&caller, "A private.printer.net.example", true)?;
        expect(private == "192.168.7.9", "the private address is that on the LAN", &private)?;
        let listed = lan.registrar.muster(&["get", "devices"])?;
        let proxied = listed.lines().find(|line| line.starts_with("printer ")).unwrap_or_default();
        expect(proxied.contains("Proxied"), "the printer is a device", &listed)?;
        let described = lan.registrar.muster(&["describe", "device", "printer"])?;
        expect(described.contains("gate"), "who speaks for it is told", &described)?;
        let pinged = lan.caller.ask(&["ping", "printer", "-c", "2"])?;
        expect(pinged.contains("direct"), "the agent pings it, too", &pinged)?;

        // The gate's own address in the subnet is no way to it: that would lead into the tunnel itself.
        let status = lan.caller.ask(&["status"])?;
        expect(!status.contains("192.168.7.1:"), "the path lies outside of the tunnel", &status)?;
        let mut server = lan.printer.command("python3");
        let directory = lan.printer.directory().join("pages");
        lan.printer.sh(&format!("mkdir -p {0}; echo hello >{0}/page", directory.display()))?;
        server.args(["-m", "http.server", "8000", "--directory"]).arg(&directory);
        let _server = lan.printer.spawn("http", server)?;
        let curl =
            "curl -sf --retry 20 --retry-connrefused --retry-delay 1 http://printer.net.example:8000/page";
        let page = caller.sh(curl)?;
        expect(page == "hello\n", "the page arrives by name", &page)?;

        // A second gate stands by, and takes over when the first one dies, however that is.
        let second = lan.second_gate(lab, 21)?;
        lan.registrar.muster(&["approve", "device", "gate-2", "--subnet", SUBNET])?;
        says(&second, "192.168.7.0/24, standby")?;
        lan.gate.kill();
        takes_over(&lan, "the second gate to take over from one that was killed")?;
        says(&second, "192.168.7.0/24, active")?;
        lan.gate.start()?;
        says(&lan.gate, "192.168.7.0/24, standby")?;
        reaches(&caller, "printer.net.example")?;
        second.host().sh("ip link set eth0 down")?;
        takes_over(&lan, "the first gate to take over from one that is cut off")?;
        says(&lan.gate, "192.168.7.0/24, active")?;
        second.host().sh("ip link set eth0 up")?;
        says(&second, "192.168.7.0/24, standby")?;
        std::thread::sleep(TAKEOVER);
        let metrics = lan.registrar.host().sh("curl -s http://127.0.0.1:7580/metrics")?;
        let takeovers =
            metrics.lines().find(|line| line.starts_with("muster_registrar_carrier_takeovers_total"));
        expect(takeovers.is_some_and(|line| line.ends_with(" 2")), "no other takeover", &metrics)?;

        // Taken back: nothing is left.
        lan.registrar.muster(&["disapprove", "device", "gate-2", "--all"])?;
        lan.registrar.muster(&["disapprove", "device", "gate", "--subnet", SUBNET])?;
        says(&lan.gate, "192.168.7.0/24, unapproved")?;
        reaches(&caller, "printer.net.example")?;
        expect(!is_reached(&caller, INSIDE)?, "the subnet is nobody's any more", INSIDE)?;
        lan.registrar.muster(&["disapprove", "device", "gate", "--hosts"])?;
        says(&lan.gate, "muster approve device gate --hosts")?;
        resolves(&caller, "A printer.net.example", false)?;
        expect(!is_reached(&caller, &address)?, "the printer is nobody's any more", &address)?;
        let after = lan.traces()?;
        expect(after == before, "the gate's host is as it was", &after)?;

        // Approved again, the printer is what it was; a gate that is revoked loses all.
        lan.registrar.muster(&["approve", "device", "gate", "--hosts", "--subnet", SUBNET])?;
        reaches(&caller, "printer.net.example")?;
        let again = resolves(&caller, "A printer.net.example", true)?;
        expect(again == address, "it keeps its address", &again)?;
        lan.registrar.muster(&["revoke", "device", "gate"])?;
        resolves(&caller, "A printer.net.example", false)?;
        wait_for("the revoked gate to be cut off", PATIENCE, || match is_reached(&caller, INSIDE) {
            Ok(false) => Ok(()),
            Ok(true) => Err("it is reached".to_owned()),
            Err(error) => Err(error.to_string()),
        })
    });
}
