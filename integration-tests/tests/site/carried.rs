//! What a gate carries is reached as long as it runs, whether a registrar can be reached or not: agents know of it from
//! disk, as they do of everything else.

use muster_agent::state::{Peers, State};
use muster_integration_tests::{LabError, Result, expect, scenario};
use muster_proto::registration::{DeviceConfig, ProxiedDevice};

use crate::lan::{Lan, is_reached, reaches};

fn failed(error: impl ToString) -> LabError {
    LabError::Command { command: "state on disk".into(), reason: error.to_string() }
}

/// A virtual address that no device of a lab gets, in the pool of `own`.
fn spare(config: &DeviceConfig, own: &str) -> Result<String> {
    let own = own.parse::<std::net::IpAddr>().map_err(failed)?;
    let routes = config.routes.iter().filter_map(|route| route.parse::<ipnet::IpNet>().ok());
    let pool = routes.into_iter().find(|route| route.contains(&own)).ok_or_else(|| failed("no pool"))?;
    let last = pool.broadcast();
    Ok(match last {
        std::net::IpAddr::V4(v4) => std::net::Ipv4Addr::from(u32::from(v4) - 9).to_string(),
        std::net::IpAddr::V6(v6) => std::net::Ipv6Addr::from(u128::from(v6) - 9).to_string(),
    })
}

/// Writes what a registrar says that has taken the printer, and approved the subnet. Returns the printer's addresses.
fn take(lan: &Lan) -> Result<[String; 2]> {
    let gate = State::new(&lan.gate.state());
    let mut config = gate.config().ok_or_else(|| failed("the gate has no configuration"))?;
    let (v4, v6) = (spare(&config, &config.virtual_ipv4)?, spare(&config, &config.virtual_ipv6)?);
    let device = |name: &str, lan_address: &str| ProxiedDevice {
        name: name.into(),
        lan_address: lan_address.into(),
        ..ProxiedDevice::default()
    };
    config.proxied_devices = vec![
        ProxiedDevice { virtual_ipv4: v4.clone(), ..device("printer", "192.168.7.9") },
        ProxiedDevice { virtual_ipv6: v6.clone(), ..device("printer-6", "fd07::9") },
        ProxiedDevice { refused: "no operator has allowed it".into(), ..device("camera", "192.168.7.10") },
        // The configuration offers none of these.
        ProxiedDevice { virtual_ipv4: "100.64.0.0".into(), ..device("hq", "198.51.100.200") },
    ];
    config.subnets = vec!["192.168.7.0/24".into(), "192.168.8.0/24".into()];
    config.active_subnets.clone_from(&config.subnets);
    gate.set_config(&config).map_err(failed)?;

    let caller = State::new(&lan.caller.state());
    let mut config = caller.config().ok_or_else(|| failed("the caller has no configuration"))?;
    config.site_routes.extend(["192.168.7.0/24".into(), "192.168.8.0/24".into()]);
    caller.set_config(&config).map_err(failed)?;
    let Peers { epoch, revision, mut peers } = caller.peers();
    let gate = peers.iter_mut().find(|peer| peer.name == "gate").ok_or_else(|| failed("no peer"))?;
    gate.virtual_addresses.extend([v4.clone(), v6.clone()]);
    gate.subnets = vec!["192.168.7.0/24".into(), "192.168.8.0/24".into()];
    caller.set_peers(&Peers { epoch, revision, peers }).map_err(failed)?;
    Ok([v4, v6])
}

#[test]
fn what_a_gate_carries_is_reached_without_a_registrar_and_nothing_else_is() {
    scenario("a site without a registrar", |lab| {
        let mut lan = Lan::new(lab)?;
        let before = lan.traces()?;
        expect(!before.contains("muster"), "nothing is translated before anybody has allowed it", &before)?;
        let status = lan.gate.ask(&["status"])?;
        expect(status.contains("192.168.7.0/24, unapproved"), "the subnet is unapproved", &status)?;
        lan.gate.stop()?;
        lan.caller.stop()?;
        lan.registrar.stop()?;
        let [v4, v6] = take(&lan)?;
        lan.gate.start()?;
        lan.caller.start()?;

        let caller = lan.caller.host().clone();
        for target in [v4.as_str(), &v6, "192.168.7.10", "192.168.7.1"] {
            reaches(&caller, target)?;
        }
        // The gate offers none of them, and the last one not even the registrar speaks of.
        for target in ["192.168.8.9", "-I muster0 198.51.100.200"] {
            expect(!is_reached(&caller, target)?, "the gate is no open router", target)?;
        }
        let status = lan.gate.ask(&["status"])?;
        for line in [
            &format!("printer (192.168.7.9) at {v4}"),
            &format!("printer-6 (fd07::9) at {v6}"),
            "camera (192.168.7.10), refused: no operator has allowed it",
            "192.168.7.0/24, active",
        ] {
            expect(status.contains(line), line, &status)?;
        }
        let log = lan.gate.process().map(|process| process.log()).unwrap_or_default();
        expect(log.matches("no operator has allowed it").count() == 1, "the log says it once", &log)?;

        // Real programs: a page, and 100 MB, octet by octet the same.
        let printer = lan.printer.clone();
        printer.sh(&format!(
            "mkdir -p {0}; cd {0}; echo hello >small; head -c 100000000 /dev/urandom >large",
            printer.directory().join("files").display()
        ))?;
        let mut servers = Vec::new();
        for bind in ["192.168.7.9", "fd07::9"] {
            let mut server = printer.command("python3");
            let files = printer.directory().join("files");
            server.args(["-m", "http.server", "8000", "--bind", bind, "--directory"]).arg(files);
            servers.push(printer.spawn(&format!("http-{}", bind.len()), server)?);
        }
        let sum = printer.sh(&format!("sha256sum <{}", printer.directory().join("files/large").display()))?;
        for at in [format!("http://{v4}:8000"), format!("http://[{v6}]:8000")] {
            let curl = "curl -sf --retry 20 --retry-connrefused --retry-delay 1";
            let small = caller.sh(&format!("{curl} {at}/small"))?;
            expect(small == "hello\n", "the page arrives", &small)?;
            let large = caller.sh(&format!("{curl} {at}/large | sha256sum"))?;
            expect(large == sum, "100 MB arrive whole", &format!("{at}: {large}"))?;
        }

        // Killed, it leaves all behind, which the next one takes over.
        lan.gate.kill();
        let left = lan.traces()?;
        expect(left.contains("muster_muster0"), "a killed gate leaves its table", &left)?;
        lan.gate.start()?;
        reaches(&caller, &v4)?;
        lan.gate.stop()?;
        let after = lan.traces()?;
        expect(after == before, "nothing is left of a gate that has stopped", &after)?;
        expect(!is_reached(&caller, &v4)?, "nobody is reached through a gate that has stopped", &v4)
    });
}
