//! Two agents behind one NAT: a third reaches both, and they reach each other without leaving their LAN.

use std::time::Duration;

use muster_integration_tests::{Result, expect, nat::Kind, process::wait_for, scenario};

use crate::{site::Internet, traffic::reaches};

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn two_behind_one_nat_reach_a_third_and_each_other() {
    scenario("two behind one NAT", |lab| {
        let mut internet = Internet::new(lab, 1)?;
        let alice = internet.host("alice", Kind::PortRestricted)?;
        let (host, agent) = internet.beside(&alice.site, "anna")?;
        let carol = internet.host("carol", Kind::Open)?;
        let dora = internet.host("dora", Kind::PortRestricted)?;
        let director = internet.directors.remove(0);
        director.wait_attached(4)?;
        for (name, path) in [("carol", ["direct"].as_slice()), ("dora", &["direct", "relay"])] {
            for (host, agent) in [(&alice.site.host, &alice.agent), (&host, &agent)] {
                reaches(host, name)?;
                // Where both have strict NATs, whoever got another port than its own is relayed.
                wait_for(&format!("{} to have a good path to {name}", host.name()), PATIENCE, || {
                    let used = agent.path_to(name).map_err(|e| e.to_string())?.0;
                    if path.contains(&used.as_str()) { Ok(()) } else { Err(used) }
                })?;
            }
        }
        // The third calls both.
        for third in [&carol, &dora] {
            reaches(&third.site.host, "alice")?;
            reaches(&third.site.host, "anna")?;
        }

        let before = director.metric("frames_total{transport=\"udp\",direction=\"sent\"}")?;
        reaches(&host, "alice")?;
        let on_the_lan = |expected: &str, seen: Result<String>| {
            let seen = seen.map_err(|e| e.to_string())?;
            if seen == expected { Ok(()) } else { Err(seen) }
        };
        wait_for("the LAN to be used", PATIENCE, || {
            on_the_lan("192.168.1.2", agent.endpoint_of("alice"))?;
            on_the_lan("192.168.1.3", alice.agent.endpoint_of("anna"))
        })?;
        let settled = director.metric("frames_total{transport=\"udp\",direction=\"sent\"}")?;
        host.sh("ping -c 100 -i 0.01 -W 5 $(dig +short alice.net.example)")?;
        let after = director.metric("frames_total{transport=\"udp\",direction=\"sent\"}")?;
        let relayed = (settled - before, after - settled);
        expect(relayed.1 < 50, "pings stay on the LAN", &format!("{relayed:?} frames relayed"))
    });
}
