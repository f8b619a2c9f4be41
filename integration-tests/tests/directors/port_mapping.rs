//! Gateways that map ports, as home routers do: with miniupnpd for PCP, NAT-PMP and UPnP, and with one that speaks NAT-PMP
//! alone. Devices behind NATs that nothing passes otherwise reach each other directly then.

use std::{fs, path::Path, time::Duration};

use muster_integration_tests::{
    Host, LabError, Process, Result, expect,
    nat::Kind::{PortRestricted, Symmetric},
    process::wait_for,
    scenario,
};

use crate::{
    netcheck::netcheck,
    site::{Internet, Joined},
};

const PATIENCE: Duration = Duration::from_secs(60);
/// The gateway's address that it maps ports of. miniupnpd maps none where the address outside is kept for documentation,
/// as all others of the lab are.
const OUTSIDE: &str = "5.45.1.9";

/// Starts miniupnpd on a router of the lab. It keeps its rules in a table of its own.
fn miniupnpd(router: &Host, options: &str) -> Result<Process> {
    router.sh(&format!("ip address add {OUTSIDE}/24 dev eth1"))?;
    router.sh(
        "nft -f - <<'RULES'\n\
         table inet upnp { \
         chain forwarded { type filter hook forward priority filter; jump accepted; }; chain accepted { }; \
         chain before { type nat hook prerouting priority dstnat; jump mapped; }; chain mapped { }; \
         chain after { type nat hook postrouting priority srcnat - 1; jump translated; }; chain translated { }; \
         }\nRULES",
    )?;
    let directory = router.directory();
    let file = |path: &Path| {
        let path = path.display().to_string();
        move |source| LabError::File { path, source }
    };
    fs::create_dir_all(&directory).map_err(file(&directory))?;
    let config = directory.join("miniupnpd.conf");
    let text = format!(
        "ext_ifname=eth1\next_ip={OUTSIDE}\nlistening_ip=eth0\nport=5000\nsecure_mode=yes\n\
         uuid=5b2f1f4e-3c5b-4c6e-9d0a-0123456789ab\n\
         upnp_table_name=upnp\nupnp_nat_table_name=upnp\nupnp_forward_chain=accepted\nupnp_nat_chain=mapped\n\
         upnp_nat_postrouting_chain=translated\n{options}\n\
         allow 1024-65535 192.168.0.0/16 1024-65535\n"
    );
    fs::write(&config, text).map_err(file(&config))?;
    let mut command = router.command("/usr/sbin/miniupnpd");
    command.arg("-d").arg("-f").arg(&config).arg("-P").arg(directory.join("miniupnpd.pid"));
    let daemon = router.spawn("miniupnpd", command)?;
    wait_says(&daemon, "HTTP listening")?;
    Ok(daemon)
}

fn wait_says(daemon: &Process, text: &str) -> Result {
    wait_for("the gateway to listen", PATIENCE, || {
        let log = daemon.log();
        if log.contains(text) { Ok(()) } else { Err(log) }
    })
}

/// What the gateway has mapped to the tunnel's port.
fn mapped(router: &Host) -> Result<bool> {
    Ok(router.sh("nft list chain inet upnp mapped")?.contains("dnat ip to 192.168"))
}

fn wait_mapped(joined: &Joined, router: &Host, protocol: &str) -> Result {
    wait_for("the gateway to map the tunnel's port", PATIENCE, || {
        let found = netcheck(&joined.agent).map_err(|e| e.to_string())?;
        let text = |key: &str| found.pointer(key).and_then(|value| value.as_str()).unwrap_or_default();
        let external = (text("/portMapping/protocol"), text("/portMapping/external/address"));
        let first = text("/reflexiveEndpoints/0/address");
        let is_there = mapped(router).map_err(|e| e.to_string())?;
        if external == (protocol, OUTSIDE) && first == OUTSIDE && is_there {
            Ok(())
        } else {
            Err(format!("{found:#}"))
        }
    })
}

#[test]
fn symmetric_nats_are_passed_where_one_maps_a_port() {
    scenario("port mapping", |lab| {
        let mut internet = Internet::new(lab, 1)?;
        let alice = internet.site("alice", Symmetric)?;
        let bob = internet.host("bob", Symmetric)?;
        let router = alice.routers[0].host();
        let mut daemon = miniupnpd(router, "enable_natpmp=yes\nenable_upnp=yes")?;
        bob.site.routers[0].host().sh("ip route add 5.45.1.0/24 dev eth1")?;
        let agent = internet.agent(&alice.host, Symmetric)?;
        let mut alice = Joined { site: alice, agent };
        let router = alice.site.routers[0].host().clone();
        wait_mapped(&alice, &router, "pcp")?;
        let found = netcheck(&alice.agent)?;
        let protocols = found.pointer("/portMapping/protocols").cloned().unwrap_or_default();
        let available: Vec<bool> = protocols
            .as_array()
            .into_iter()
            .flatten()
            .map(|protocol| {
                protocol.get("available").is_some_and(|is| is == true)
                    && protocol.get("externalAddress").is_some_and(|address| address == OUTSIDE)
            })
            .collect();
        expect(available == [true; 3], "all three protocols answer", &protocols.to_string())?;

        // Neither could be reached otherwise.
        wait_for("a direct path between symmetric NATs", PATIENCE, || {
            let ping = bob.site.host.sh("ping -c 1 -W 1 $(dig +short alice.net.example)");
            let path = alice.agent.path_to("bob").map_err(|e| e.to_string())?;
            let back = bob.agent.path_to("alice").map_err(|e| e.to_string())?;
            let is_direct = ping.is_ok() && path.0 == "direct" && back.0 == "direct";
            if is_direct { Ok(()) } else { Err(format!("{ping:?}; {path:?}, {back:?}")) }
        })?;
        let endpoint = bob.agent.endpoint_of("alice")?;
        expect(endpoint == OUTSIDE, "bob sends to the mapped address", &endpoint)?;

        // An agent that was killed gave nothing back, and is given the same again.
        alice.agent.kill();
        expect(mapped(&router)?, "the mapping outlives the agent", "it is gone")?;
        alice.agent.run()?;
        wait_mapped(&alice, &router, "pcp")?;

        // One that stops does.
        alice.agent.stop()?;
        expect(!mapped(&router)?, "nothing is mapped any more", &daemon.log())?;
        expect(daemon.is_running(), "miniupnpd runs", &daemon.log())
    });
}

#[test]
fn a_gateway_is_asked_by_upnp_and_again_when_it_is_another() {
    scenario("port mapping by UPnP", |lab| {
        let mut internet = Internet::new(lab, 2)?;
        let site = internet.site("alice", PortRestricted)?;
        let router = site.routers[0].host().clone();
        let daemon = miniupnpd(&router, "enable_natpmp=no\nenable_upnp=yes")?;
        let agent = internet.agent(&site.host, PortRestricted)?;
        let alice = Joined { site, agent };
        wait_mapped(&alice, &router, "upnp")?;
        // Another host behind it gets another port.
        let (_, twin) = internet.beside(&alice.site, "twin")?;
        wait_for("a port for the other host", PATIENCE, || {
            let found = netcheck(&twin).map_err(|e| e.to_string())?;
            let external = found.pointer("/portMapping/external");
            let is = |key: &str| external.and_then(|external| external.get(key)).cloned().unwrap_or_default();
            let is_another = is("address") == OUTSIDE && is("port").as_u64().is_some_and(|port| port != 7551);
            if is_another { Ok(()) } else { Err(format!("{found:#}")) }
        })?;
        // Without a gateway there is no mapping, and no gateway is asked; when it is back, it is asked at once.
        let address = alice.site.host.sh("ip -4 route show default")?;
        alice.site.host.sh("ip route del default")?;
        wait_for("the mapping to be forgotten", PATIENCE, || {
            let found = netcheck(&alice.agent).map_err(|e| e.to_string())?;
            let is_gone = found.pointer("/portMapping/gateway").is_none_or(|gateway| gateway == "")
                && found.pointer("/portMapping/external").is_none_or(|external| external.is_null());
            if is_gone { Ok(()) } else { Err(format!("{found:#}")) }
        })?;
        alice.site.host.sh(&format!("ip route add {address}"))?;
        wait_mapped(&alice, &router, "upnp").map_err(|error| {
            let reason = format!("{error}\n{}", daemon.log());
            LabError::Command { command: "map again".into(), reason }
        })
    });
}

/// Answers PCP as RFC 6886, 9 has it, and NAT-PMP.
const NAT_PMP: &str = r#"
import socket, struct
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 5351))
print("listening", flush=True)
while True:
    q, who = s.recvfrom(2000)
    if len(q) < 2 or q[0] != 0:
        s.sendto(struct.pack(">BBHI", 0, 128 | q[1], 1, 9), who)
    elif q[1] == 0:
        s.sendto(struct.pack(">BBHI", 0, 128, 0, 9) + socket.inet_aton("5.45.1.9"), who)
    else:
        _, op, _, inside, outside, lifetime = struct.unpack(">BBHHHI", q)
        print("map", op, inside, outside, lifetime, flush=True)
        s.sendto(struct.pack(">BBHIHHI", 0, 128 | op, 0, 9, inside, outside and 7777, lifetime), who)
"#;

#[test]
fn a_gateway_with_nat_pmp_alone_will_do_and_one_with_nothing_does_no_harm() {
    scenario("port mapping by NAT-PMP", |lab| {
        let mut internet = Internet::new(lab, 1)?;
        let without = internet.host("without", PortRestricted)?;
        let site = internet.site("alice", PortRestricted)?;
        let router = site.routers[0].host();
        let mut command = router.command("python3");
        command.args(["-c", NAT_PMP]);
        let daemon = router.spawn("nat-pmp", command)?;
        wait_says(&daemon, "listening")?;
        let mut alice = Joined { agent: internet.agent(&site.host, PortRestricted)?, site };
        wait_for("the gateway to map the tunnel's port", PATIENCE, || {
            let status = alice.agent.ask(&["netcheck"]).map_err(|e| e.to_string())?;
            if status.contains("5.45.1.9:7777 by nat-pmp") { Ok(()) } else { Err(status) }
        })?;
        expect(
            daemon.log().contains("map 1 7551 7551 7200"),
            "a mapping of UDP was asked for",
            &daemon.log(),
        )?;
        // A router that has restarted has forgotten it, and directors see other addresses.
        alice.site.rebind()?;
        wait_for("the gateway to be asked again", PATIENCE, || {
            let log = daemon.log();
            if log.contains("map 1 7551 7777 7200") { Ok(()) } else { Err(log) }
        })?;
        alice.agent.stop()?;
        expect(daemon.log().contains("map 1 7551 0 0"), "it was given back", &daemon.log())?;

        let found = netcheck(&without.agent)?;
        let is_without = found.pointer("/portMapping/gateway").is_some_and(|gateway| gateway != "")
            && found.pointer("/portMapping/external").is_none_or(|external| external.is_null());
        expect(is_without, "a gateway, and no mapping", &found.to_string())
    });
}
