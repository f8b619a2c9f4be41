//! What the agent's DNS says of a Service whose endpoints are selected, by the specification of DNS service discovery.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use muster_integration_tests::{Host, Result, expect, failed, process::wait_for, scenario};

use super::{PATIENCE, world};

const NAMED: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: db}
spec:
  clusterIP: None
  ipFamilyPolicy: RequireDualStack
  selector: {app: db}
  ports:
  - {name: pg, port: 5432, targetPort: pg}
  - {name: sig, port: 3868, protocol: SCTP}
"#;

/// The virtual addresses that a host has, IPv4 first.
fn addresses(host: &Host) -> Result<[IpAddr; 2]> {
    let printed = host.sh("ip -o addr show dev muster0 scope global")?;
    let words: Vec<&str> = printed.split_whitespace().collect();
    let after = |family: &str| {
        let pair = words.windows(2).find(|pair| pair[0] == family);
        pair.and_then(|pair| pair[1].split('/').next()?.parse().ok())
    };
    let found = after("inet").zip(after("inet6"));
    found.map(Into::into).ok_or_else(|| failed("the virtual addresses of a host", printed))
}

/// Waits until the agent of `host` answers all that the specification says of the Service `db`, with endpoints that
/// have these addresses, each with the port that its device has a label for.
fn named(host: &Host, endpoints: &[([IpAddr; 2], u16)]) -> Result {
    let name = "db.default.svc.net.example.";
    let (mut wanted, weight) = (BTreeMap::<String, BTreeSet<String>>::new(), 100 / (2 * endpoints.len()));
    let mut want = |owner: &str, kind: &str, data: String| {
        wanted.entry(format!("{owner} {kind}")).or_default().insert(data);
    };
    for (endpoint, port) in endpoints {
        for ip in endpoint {
            let kind = if ip.is_ipv4() { "A" } else { "AAAA" };
            let target = format!("{}.{name}", ip.to_string().replace(['.', ':'], "-"));
            want(name, kind, ip.to_string());
            want(&target, kind, ip.to_string());
            want(&format!("_pg._tcp.{name}"), "SRV", format!("0 {weight} {port} {target}"));
            want(&format!("_sig._sctp.{name}"), "SRV", format!("0 {weight} 3868 {target}"));
        }
    }
    for (question, data) in &wanted {
        wait_for(&format!("{question} to be {data:?}"), PATIENCE, || {
            let printed = host.sh(&format!("dig +short {question}")).map_err(|error| error.to_string())?;
            let found: BTreeSet<String> = printed.lines().map(str::to_owned).collect();
            if found == *data { Ok(()) } else { Err(printed) }
        })?;
    }
    for (endpoint, _) in endpoints {
        for ip in endpoint {
            let target = format!("{}.{name}", ip.to_string().replace(['.', ':'], "-"));
            let printed = host.sh(&format!("dig +short -x {ip}"))?;
            expect(
                printed.lines().any(|line| line == target),
                "the name of an endpoint's address",
                &printed,
            )?;
        }
    }
    Ok(())
}

#[test]
fn names_are_those_of_the_devices_that_a_selector_selects() {
    scenario("a headless Service with a selector", |lab| {
        let mut world = world(lab, &["a", "b", "c"])?;
        let a = world.host("a");
        let (b, c) = (addresses(&world.host("b"))?, addresses(&world.host("c"))?);
        let registrar = &world.registrar;
        registrar.apply(NAMED)?;
        registrar.muster(&["label", "device", "b", "app=db", "port.muster/pg=15432"])?;
        named(&a, &[(b, 15432)])?;
        registrar.muster(&["label", "device", "c", "app=db", "port.muster/pg=25432"])?;
        named(&a, &[(b, 15432), (c, 25432)])?;
        // Another port, by a label; then out by one.
        registrar.muster(&["label", "device", "b", "--overwrite", "port.muster/pg=15433"])?;
        named(&a, &[(b, 15433), (c, 25432)])?;
        registrar.muster(&["label", "device", "b", "app-"])?;
        named(&a, &[(c, 25432)])?;
        registrar.muster(&["label", "device", "b", "app=db"])?;
        named(&a, &[(b, 15433), (c, 25432)])?;
        // One that is away has no name, unless those that are not ready are published.
        let agent = world.agents.iter_mut().find(|agent| agent.host().name() == "c");
        agent.expect("a host of this name").kill();
        named(&a, &[(b, 15433)])?;
        let published = NAMED.replace("selector:", "publishNotReadyAddresses: true\n  selector:");
        world.registrar.apply(&published)?;
        named(&a, &[(b, 15433), (c, 25432)])
    });
}
