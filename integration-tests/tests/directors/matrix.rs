//! All pairs of NATs: every pair is reached at once, and directly soon after, wherever that is possible.

use std::time::Duration;

use muster_integration_tests::{
    Result, expect,
    nat::{Kind, direct_possible},
    process::wait_for,
    scenario,
};

use crate::site::{Internet, Joined};

/// Until the first packets are through, and until paths are what they can be.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn every_pair_is_reached_and_directly_where_that_is_possible() {
    scenario("pairs of NATs", |lab| {
        let mut internet = Internet::new(lab, 1)?;
        let mut join = |side: &str| -> Result<Vec<Joined>> {
            Kind::ALL.iter().map(|kind| internet.host(&format!("{}-{side}", kind.name()), *kind)).collect()
        };
        let (from, to) = (join("a")?, join("b")?);
        let director = internet.directors.remove(0);
        director.wait_attached(18)?;
        wait_for("the registrar to know where all are", PATIENCE, || {
            let devices =
                internet.registrar.muster(&["get", "devices", "-o", "wide"]).map_err(|e| e.to_string())?;
            if devices.matches("relay-1").count() == 18 { Ok(()) } else { Err(devices) }
        })?;
        let pairs: Vec<(&Joined, &Joined)> =
            from.iter().enumerate().flat_map(|(n, a)| to.iter().skip(n).map(move |b| (a, b))).collect();
        let mut pings = Vec::new();
        for (a, b) in &pairs {
            let name = b.site.host.name();
            let mut ping = a.site.host.command("sh");
            ping.args(["-ec", &format!("exec ping -i 0.3 -w 120 $(dig +short {name}.net.example)")]);
            pings.push(a.site.host.spawn(&format!("ping-{name}"), ping)?);
        }
        for ((a, b), ping) in pairs.iter().zip(&pings) {
            let pair = format!("{:?} to {:?}", a.site.kind, b.site.kind);
            wait_for(&pair, PATIENCE, || {
                let log = ping.log();
                if log.contains("bytes from") { Ok(()) } else { Err(log) }
            })?;
        }
        let mut wrong = Vec::new();
        for (a, b) in &pairs {
            let pair = format!("{:?} to {:?}", a.site.kind, b.site.kind);
            let possible = direct_possible(a.site.kind, b.site.kind);
            let expected = if possible { "direct" } else { "relay" };
            let outcome = wait_for(&pair, Duration::from_secs(30), || {
                let path = |agent: &Joined, peer: &Joined| {
                    agent.agent.path_to(peer.site.host.name()).map_err(|e| e.to_string())
                };
                let paths = (path(a, b)?.0, path(b, a)?.0);
                if paths == (expected.into(), expected.into()) { Ok(()) } else { Err(format!("{paths:?}")) }
            });
            if let Err(error) = outcome {
                wrong.push(format!("{error}; expected {expected}"));
            }
        }
        expect(wrong.is_empty(), "paths as they can be", &wrong.join("\n"))
    });
}
