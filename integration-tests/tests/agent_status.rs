//! What `muster-agent status` and `/metrics` tell of traffic that has really passed.

use std::time::Duration;

use muster_integration_tests::{
    LabError, Result, expect,
    muster::{Agent, Registrar},
    process::wait_for,
    scenario,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);

fn json(agent: &Agent, arguments: &[&str]) -> Result<Value> {
    let text = agent.ask(arguments)?;
    serde_json::from_str(&text)
        .map_err(|e| LabError::Command { command: arguments.join(" "), reason: format!("{e}: {text}") })
}

/// A counter in a status; 64-bit numbers are texts in JSON, and 0 is left out.
fn count(value: &Value) -> u64 {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[test]
fn traffic_shows_in_status_and_metrics() {
    scenario("status", |lab| {
        let lan = lab.switch("lan")?;
        let (hq, a, b) = (lab.host("hq")?, lab.host("alice")?, lab.host("bob")?);
        lan.plug(&hq, &["10.1.0.1/24"])?;
        lan.plug(&a, &["10.1.0.10/24"])?;
        lan.plug(&b, &["10.1.0.20/24"])?;
        let mut registrar = Registrar::init(&hq, "net.example", "10.1.0.1", "")?;
        registrar.serve()?;
        let (mut alice, mut bob) = (Agent::new(&a, "")?, Agent::new(&b, "")?);
        let join = registrar.new_join_command(&["--reusable"])?;
        for (agent, name) in [(&mut alice, "alice"), (&mut bob, "bob")] {
            agent.join(&join, name)?;
            agent.run()?;
        }
        let address = a.sh("dig +short bob.net.example")?.trim().to_owned();
        wait_for("alice to reach bob", PATIENCE, || {
            a.sh(&format!("ping -c 1 -W 1 {address}")).map_err(|e| e.to_string())
        })?;
        let mut server = b.command("iperf3");
        server.args(["-s", "-1", "-B", &address]);
        let _server = b.spawn("iperf3", server)?;
        wait_for("iperf3", PATIENCE, || {
            b.sh("ss -Hltn sport = :5201 | grep -q 5201").map_err(|e| e.to_string())
        })?;
        let megabytes = 64;
        a.sh(&format!("iperf3 -c {address} -n {megabytes}M"))?;
        // Nobody is there, and multicast goes nowhere.
        let _ = a.sh("ping -c 2 -W 1 -I muster0 224.0.0.251");

        let status = json(&alice, &["status", "-o", "json"])?;
        let datapath = &status["datapath"];
        for name in ["tun_checksum", "tun_tso", "tun_uso", "udp_segment", "udp_gro"] {
            expect(datapath["offloads"][name].is_boolean(), name, &datapath.to_string())?;
        }
        let octets = megabytes * 1_000_000;
        let figure = |counter: &str, what: &str| count(&datapath[counter][what]);
        for counter in ["tunReceived", "udpSent"] {
            expect(figure(counter, "bytes") > octets, counter, &datapath.to_string())?;
            let per_call = figure(counter, "packets") as f64 / figure(counter, "calls") as f64;
            expect(per_call > 2.0, &format!("{counter} in batches"), &datapath.to_string())?;
        }
        for counter in ["tunSent", "udpReceived"] {
            let calls = figure(counter, "calls");
            let some = calls > 0 && calls <= figure(counter, "packets");
            expect(some, &format!("{counter}: acknowledgements"), &datapath.to_string())?;
        }
        expect(status["mtu"] == 1_420, "what fits into Ethernet", &status.to_string())?;
        expect(count(&datapath["drops"]["no_route"]) >= 2, "multicast is dropped", &datapath.to_string())?;

        // The same peer in the list, by name and by address.
        let peer = json(&alice, &["status", "--peer", "bob", "-o", "json"])?;
        let by_address = json(&alice, &["status", "--peer", &address, "-o", "json"])?;
        expect(by_address["deviceUid"] == peer["deviceUid"], "the same by address", &by_address.to_string())?;
        let listed = status["peers"].as_array().and_then(|peers| peers.iter().find(|p| p["name"] == "bob"));
        expect(
            listed.is_some_and(|p| count(&p["sentPackets"]) > 0),
            "packets in the list",
            &status.to_string(),
        )?;
        let good = count(&peer["sentBytes"]) > octets
            && count(&peer["sentPackets"]) > octets / 1_500
            && count(&peer["receivedPackets"]) > 100
            && count(&peer["receivedBytes"]) > count(&peer["receivedPackets"])
            && peer["path"] == "direct"
            && peer["pathMtu"] == 1_420
            && peer["endpoint"]["address"] == "10.1.0.20";
        expect(good, "all of the peer", &peer.to_string())?;
        let stranger = alice.ask(&["status", "--peer", "nobody"]);
        expect(stranger.is_err_and(|e| e.to_string().contains("remedy")), "no such peer", "")?;

        // For people: a line a peer, however much it has to tell.
        let text = alice.ask(&["status"])?;
        for title in ["MTU ", "Offloads ", "From host ", "To host ", "Dropped "] {
            expect(text.contains(&format!("\n{title}")), title, &text)?;
        }
        expect(text.lines().filter(|line| line.contains(" direct ")).count() == 1, "one line", &text)?;
        let details = alice.ask(&["status", "--peer", "bob"])?;
        for line in ["\nMTU          1420\n", "\nReceived "] {
            expect(details.contains(line), line, &details)?;
        }

        // Metrics follow within a quarter of a minute, and know no peers.
        wait_for("metrics of the transfer", PATIENCE, || {
            let metrics = a.sh("curl -sf http://127.0.0.1:7581/metrics").map_err(|e| e.to_string())?;
            let value = |name: &str| -> u64 {
                let line = metrics.lines().find_map(|line| line.strip_prefix(name));
                line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
            };
            let sent = "{side=\"udp\",direction=\"sent\"}";
            let (packets, calls) = (
                value(&format!("muster_agent_datapath_packets_total{sent}")),
                value(&format!("muster_agent_datapath_calls_total{sent}")),
            );
            let in_use = datapath["offloads"]["tun_tso"] == true;
            let good = packets > octets / 1_500
                && packets > 2 * calls
                && value("muster_agent_offload{name=\"tun_tso\"}") == u64::from(in_use)
                && value("muster_agent_datapath_drops_total{reason=\"no_route\"}") >= 2;
            if good && !metrics.contains("bob") { Ok(()) } else { Err(metrics) }
        })
    });
}
