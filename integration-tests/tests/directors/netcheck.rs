//! What `muster-agent netcheck` says behind each kind of NAT.

use std::time::Duration;

use muster_integration_tests::{
    LabError, Result, expect,
    muster::Agent,
    nat::Kind::{self, DualStack, Ipv6Only, Open, PortRestricted, Symmetric, UdpBlocked},
    process::wait_for,
    scenario,
};
use serde_json::Value;

use crate::site::Internet;

/// Until the agent is attached to both directors, and one that UDP does not reach has given it up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What netcheck prints for programs.
pub(crate) fn netcheck(agent: &Agent) -> Result<Value> {
    let text = agent.ask(&["netcheck", "-o", "json"])?;
    serde_json::from_str(&text)
        .map_err(|e| LabError::Command { command: "netcheck -o json".into(), reason: format!("{e}: {text}") })
}

#[test]
fn netcheck_tells_kinds_of_nat_apart() {
    scenario("netcheck", |lab| {
        let mut internet = Internet::new(lab, 2)?;
        let expected = [
            // Kind, mapping, UDP, IPv4, IPv6.
            (Open, "none", true, true, false),
            (PortRestricted, "endpoint-independent", true, true, false),
            (Symmetric, "address-dependent", true, true, false),
            (UdpBlocked, "unknown", false, true, false),
            (Ipv6Only, "none", true, false, true),
            (DualStack, "none", true, true, true),
        ];
        let kinds = expected.map(|(kind, ..)| kind);
        let hosts = kinds.iter().map(|kind| internet.host(kind.name(), *kind)).collect::<Result<Vec<_>>>()?;
        for (host, (kind, mapping, udp, ipv4, ipv6)) in hosts.iter().zip(expected) {
            wait_for(&format!("netcheck of {kind:?}"), PATIENCE, || {
                let found = netcheck(&host.agent).map_err(|e| e.to_string())?;
                let is = |key: &str, value: bool| found.get(key) == Some(&value.into());
                let as_expected = found.get("mapping").is_some_and(|found| found == mapping)
                    && is("udp", udp)
                    && is("ipv4", ipv4)
                    && is("ipv6", ipv6)
                    && are_attached(&found, if udp { "udp" } else { "tcp" });
                if as_expected { Ok(()) } else { Err(format!("{found:#}")) }
            })?;
            let text = host.agent.ask(&["netcheck"])?;
            let lines = ["relay-1", "relay-2", "home", "second", "Port mapping"];
            expect(lines.iter().all(|line| text.contains(line)), "a report for people", &text)?;
        }
        Ok(())
    });
}

/// Whether there are a home and a second director, each with a distance, and that transport.
fn are_attached(found: &Value, transport: &str) -> bool {
    let directors = found.get("directors").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let text = |director: &Value, key: &str| director.pointer(key).and_then(Value::as_str).map(str::to_owned);
    let mut roles: Vec<_> = directors.iter().filter_map(|director| text(director, "/status/role")).collect();
    roles.sort();
    roles == ["home", "second"]
        && directors.iter().all(|director| {
            text(director, "/status/transport").as_deref() == Some(transport)
                && text(director, "/status/roundTrip").is_some()
                && (text(director, "/ipv4Connect").is_some() || text(director, "/ipv6Connect").is_some())
        })
}

/// Nothing is known, and that is said.
#[test]
fn netcheck_without_directors_says_so() {
    scenario("netcheck without directors", |lab| {
        let mut internet = Internet::new(lab, 0)?;
        let host = internet.host("alone", Kind::Open)?;
        let found = netcheck(&host.agent)?;
        let is_open = ["udp", "ipv4", "ipv6"].iter().all(|key| found.get(key).is_none_or(Value::is_null));
        expect(
            is_open && found.get("mapping").is_some_and(|m| m == "unknown"),
            "all open",
            &found.to_string(),
        )?;
        let text = host.agent.ask(&["netcheck"])?;
        expect(text.contains("attached to no director"), "an explanation", &text)
    });
}
