//! What an agent's metrics tell of directors and paths.

use std::time::Duration;

use muster_integration_tests::{
    Result,
    muster::Agent,
    nat::Kind::{Open, Symmetric},
    process::wait_for,
    scenario,
};

use crate::site::Internet;

/// Metrics of the data plane are up to 15 s old.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until each metric, with its labels, is at least so much, and no more if that is 0 or 1.
fn wait_metrics(agent: &Agent, expected: &[(&str, f64)]) -> Result {
    wait_for("metrics as expected", PATIENCE, || {
        let text = agent.metrics().map_err(|e| e.to_string())?;
        let value = |name: &str| -> Option<f64> {
            let start = format!("muster_agent_{name} ");
            text.lines().find_map(|line| line.strip_prefix(&start))?.parse().ok()
        };
        let wrong: Vec<_> = expected
            .iter()
            .map(|(name, least)| (name, *least, value(name).unwrap_or(-1.0)))
            .filter(|(_, least, is)| if *least <= 1.0 { is != least } else { is < least })
            .collect();
        if wrong.is_empty() { Ok(()) } else { Err(format!("{wrong:?}")) }
    })
}

#[test]
fn metrics_tell_of_directors_relayed_frames_and_paths() {
    scenario("metrics of directors", |lab| {
        let mut internet = Internet::new(lab, 2)?;
        let alice = internet.host("alice", Symmetric)?;
        let bob = internet.host("bob", Symmetric)?;
        let carol = internet.host("carol", Open)?;
        for director in &internet.directors {
            director.wait_attached(3)?;
        }
        // Nothing leads from the one to the other but a director.
        let ping = |host: &muster_integration_tests::Host, name: &str| {
            host.sh(&format!("ping -c 20 -i 0.05 -s 1000 $(dig +short {name}.net.example)")).map(drop)
        };
        ping(&alice.site.host, "bob")?;
        for agent in [&alice.agent, &bob.agent] {
            wait_metrics(
                agent,
                &[
                    ("relay_packets_total{direction=\"sent\"}", 20.0),
                    ("relay_packets_total{direction=\"received\"}", 20.0),
                    ("relay_bytes_total{direction=\"sent\"}", 20_000.0),
                    ("relay_bytes_total{direction=\"received\"}", 20_000.0),
                    ("peer_paths{path=\"relay\"}", 1.0),
                    ("peer_paths{path=\"direct\"}", 0.0),
                    ("path_changes_total{to=\"direct\"}", 0.0),
                    ("directors{role=\"home\",transport=\"udp\"}", 1.0),
                    ("directors{role=\"second\",transport=\"udp\"}", 1.0),
                    ("director_failures_total{reason=\"lost\"}", 0.0),
                    ("director_home_changes_total", 0.0),
                    ("port_mapping{protocol=\"pcp\"}", 0.0),
                ],
            )?;
        }
        // A director comes first to everybody else, too.
        ping(&alice.site.host, "carol")?;
        let direct = ("peer_paths{path=\"direct\"}", 1.0);
        wait_metrics(&alice.agent, &[("path_changes_total{to=\"direct\"}", 1.0), direct])?;
        wait_metrics(&carol.agent, &[direct])?;
        // Of two directors, one is the home of alice.
        for director in &mut internet.directors {
            director.kill();
        }
        wait_metrics(
            &alice.agent,
            &[
                ("director_failures_total{reason=\"lost\"}", 2.0),
                ("director_failures_total{reason=\"unavailable\"}", 2.0),
                ("directors{role=\"home\",transport=\"none\"}", 1.0),
            ],
        )
    });
}
