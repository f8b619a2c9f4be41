//! Two hosts that no direct path can be between: their first packet arrives, by way of the director, who reads nothing.

use std::{fs, path::Path, time::Duration};

use muster_integration_tests::{Host, LabError, expect, nat::Kind, process::wait_for, scenario};
use rustix::process::Signal;

use crate::site::Internet;

const PATIENCE: Duration = Duration::from_secs(30);

/// What the pings carry.
const MARK: &str = "MusterMarkInside";

#[test]
fn the_first_packet_arrives_through_the_director() {
    scenario("two symmetric NATs", |lab| {
        let mut internet = Internet::new(lab, 1)?;
        let alice = internet.host("alice", Kind::Symmetric)?;
        let bob = internet.host("bob", Kind::Symmetric)?;
        let director = internet.directors.remove(0);
        director.wait_attached(2)?;
        wait_for("the registrar to know where both are", PATIENCE, || {
            let devices =
                internet.registrar.muster(&["get", "devices", "-o", "wide"]).map_err(|e| e.to_string())?;
            if devices.matches("relay-1").count() == 2 {
                Ok(())
            } else {
                let metrics = director.host().sh("curl -sf http://127.0.0.1:7582/metrics | grep -v '^#'");
                Err(format!("{devices}\n{metrics:?}"))
            }
        })?;

        let capture = |host: &Host, interface: &str| {
            let file = host.directory().join("capture");
            let mut tcpdump = host.command("tcpdump");
            tcpdump
                .args(["-i", interface, "-s", "0", "-U", "--immediate-mode", "-Z", "root", "-w"])
                .arg(&file);
            let process = host.spawn("tcpdump", tcpdump)?;
            wait_for("tcpdump", Duration::from_secs(10), || {
                let log = process.log();
                if log.contains("listening") { Ok(()) } else { Err(log) }
            })?;
            Ok::<_, LabError>((process, file))
        };
        let (mut at_director, relayed) = capture(director.host(), "eth0")?;
        let (mut at_alice, inside) = capture(&alice.site.host, "muster0")?;

        let before = director.metric("frames_total")?;
        let address = alice.site.host.sh("dig +short bob.net.example")?.trim().to_owned();
        let pattern: String = MARK.bytes().map(|byte| format!("{byte:02x}")).collect();
        // One packet, the first ever.
        let ping = alice.site.host.try_sh(&format!("ping -c 1 -W 10 -s 200 -p {pattern} {address}"))?.stdout;
        if !ping.contains("1 received") {
            let told = (alice.agent.ask(&["status"])?, bob.agent.ask(&["status"])?);
            let devices = internet.registrar.muster(&["get", "devices", "-o", "wide"])?;
            let metrics = director.host().sh("curl -sf http://127.0.0.1:7582/metrics | grep -v '^#'")?;
            let seen = format!("{ping}\n{}\n{}\n{devices}\n{metrics}", told.0, told.1);
            expect(false, "the first packet is answered", &seen)?;
        }
        for (agent, peer) in [(&alice.agent, "bob"), (&bob.agent, "alice")] {
            let path = agent.path_to(peer)?;
            let expected = ("relay".to_owned(), "relay-1".to_owned());
            expect(path == expected, "the path is through the director", &format!("{path:?}"))?;
        }
        alice.site.host.sh(&format!("ping -c 20 -i 0.01 -W 2 -s 200 -p {pattern} {address}"))?;
        let frames = director.metric("frames_total")?.saturating_sub(before);
        // 21 pings each way, which come and go.
        expect(frames >= 84, "the director has relayed them", &frames.to_string())?;

        for process in [&mut at_director, &mut at_alice] {
            process.signal(Signal::INT)?;
            process.wait(Duration::from_secs(10))?;
        }
        let read = |path: &Path| {
            fs::read(path).map_err(|source| LabError::File { path: path.display().to_string(), source })
        };
        let contains = |octets: &[u8]| octets.windows(MARK.len()).any(|window| window == MARK.as_bytes());
        let relayed = read(&relayed)?;
        expect(contains(&read(&inside)?), "the pings carry the mark", "no mark on alice's muster0")?;
        expect(relayed.len() > 84 * 250, "the director's wire was captured", &relayed.len().to_string())?;
        expect(
            !contains(&relayed),
            "nobody between the two reads it",
            "the mark is in the director's capture",
        )
    });
}
