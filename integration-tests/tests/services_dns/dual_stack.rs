//! Both families: Services with two ClusterIPs, headless ones with slices of each, and reverse names under
//! `in-addr.arpa` and `ip6.arpa`; through the agent, and from the registrar over TLS.

use muster_integration_tests::{Host, Result, process::wait_for, scenario};

use super::{PATIENCE, expect, prints, shop_with_agent, status_of, with_certificate};

/// What has two families, what has only IPv6, and a headless Service of both.
const SERVICES: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: both, namespace: shop}
spec: {ipFamilyPolicy: RequireDualStack, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: six, namespace: shop}
spec: {ipFamilies: [IPv6], ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: pair, namespace: shop}
spec: {clusterIP: None, ipFamilyPolicy: RequireDualStack, ports: [{name: pg, port: 5432}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: pair-4, namespace: shop, labels: {kubernetes.io/service-name: pair}}
addressType: IPv4
ports: [{name: pg, port: 15432}]
endpoints:
- {addresses: [OWN4], hostname: one}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: pair-6, namespace: shop, labels: {kubernetes.io/service-name: pair}}
addressType: IPv6
ports: [{name: pg, port: 15432}]
endpoints:
- {addresses: [OWN6], hostname: one}
- {addresses: ["2001:db8::"]}
"#;

/// The one address that `name` has in the family of `kind`.
fn address(host: &Host, name: &str, kind: &str) -> Result<String> {
    wait_for(&format!("an address of {name}"), PATIENCE, || {
        let script = format!("dig +short @169.254.20.10 {name} {kind}");
        let found = host.sh(&script).map_err(|error| error.to_string())?;
        if found.lines().count() == 1 { Ok(found.trim().to_owned()) } else { Err(found) }
    })
}

#[test]
fn both_families_are_answered_and_point_back() {
    scenario("dual stack", |lab| {
        let reverse = "[dns]\nreverse_zones = [\"2001:db8::/32\"]\n";
        let (registrar, mut agent) = shop_with_agent(lab, reverse, "")?;
        agent.run()?;
        let host = agent.host().clone();
        // The device's own addresses are the endpoint's, too.
        let own4 = address(&host, "alice.net.example", "A")?;
        let own6 = address(&host, "alice.net.example", "AAAA")?;
        for own in [&own4, &own6] {
            prints(&host, &format!("dig +short @169.254.20.10 -x {own}"), &["alice.net.example."])?;
        }
        registrar.apply(&SERVICES.replace("OWN4", &own4).replace("OWN6", &format!("\"{own6}\"")))?;
        let (both4, both6) = (
            address(&host, "both.shop.svc.net.example", "A")?,
            address(&host, "both.shop.svc.net.example", "AAAA")?,
        );
        let six = address(&host, "six.shop.svc.net.example", "AAAA")?;
        let pools = both4.starts_with("100.") && both6.starts_with("fd") && six.starts_with("fd");
        expect(pools && six != both6, "ClusterIPs of the pools", &format!("{both4} {both6} {six}"))?;
        let tls = with_certificate(&agent)?;
        for way in ["dig @169.254.20.10", &tls] {
            let short = |question: &str| format!("{way} +short {question}");
            // 2: A for IPv4, AAAA for IPv6; both point back (7).
            for (question, wanted) in [
                ("both.shop.svc.net.example A", &both4),
                ("both.shop.svc.net.example AAAA", &both6),
                ("_http._tcp.both.shop.svc.net.example A", &both4),
                ("_http._tcp.both.shop.svc.net.example AAAA", &both6),
                ("six.shop.svc.net.example AAAA", &six),
                ("pair.shop.svc.net.example A", &own4),
                ("one.pair.shop.svc.net.example A", &own4),
                ("one.pair.shop.svc.net.example AAAA", &own6),
            ] {
                prints(&host, &short(question), &[wanted])?;
            }
            prints(&host, &short("pair.shop.svc.net.example AAAA"), &[&own6, "2001:db8::"])?;
            prints(&host, &short("2001-db8--0.pair.shop.svc.net.example AAAA"), &["2001:db8::"])?;
            for (address, name) in [
                (&both4, "both.shop.svc.net.example."),
                (&both6, "both.shop.svc.net.example."),
                (&six, "six.shop.svc.net.example."),
                (&own4, "one.pair.shop.svc.net.example."),
                (&own6, "one.pair.shop.svc.net.example."),
            ] {
                prints(&host, &short(&format!("-x {address}")), &[name])?;
            }
            // Weights count both families; equal records appear once.
            prints(
                &host,
                &short("_http._tcp.both.shop.svc.net.example SRV"),
                &["0 50 80 both.shop.svc.net.example."],
            )?;
            prints(
                &host,
                &short("_pg._tcp.pair.shop.svc.net.example SRV"),
                &[
                    "0 33 15432 one.pair.shop.svc.net.example.",
                    "0 33 15432 2001-db8--0.pair.shop.svc.net.example.",
                ],
            )?;
            // A family that is missing is NODATA, not NXDOMAIN.
            for question in [
                "six.shop.svc.net.example A",
                "web.shop.svc.net.example AAAA",
                "2001-db8--0.pair.shop.svc.net.example A",
            ] {
                prints(&host, &short(question), &[])?;
                prints(&host, &status_of(&format!("{way} {question}")), &["NOERROR"])?;
            }
            // Nor do other addresses of either pool exist, or names that are no whole address.
            let beside = both6.rsplit_once(':').map_or("", |(left, _)| left);
            for question in [format!("-x {beside}:ffff"), "-x 100.111.255.254".to_owned()] {
                prints(&host, &status_of(&format!("{way} {question}")), &["NXDOMAIN"])?;
            }
        }
        // SRV brings the addresses of both families along.
        let question = "+noall +additional _http._tcp.both.shop.svc.net.example SRV";
        let glue = host.sh(&format!("{tls} {question}"))?;
        expect(glue.contains(&both4) && glue.contains(&both6), "glue of both families", &glue)?;
        // A reverse zone beside the pools.
        let target = "2001-db8--0.pair.shop.svc.net.example.";
        prints(&host, &format!("{tls} +short -x 2001:db8::"), &[target])?;
        // Programs get both.
        let found = "getent ahosts both.shop.svc.net.example | cut -d' ' -f1 | sort -u";
        prints(&host, found, &[&both4, &both6])?;
        // A slice that goes takes its family along, and no more.
        registrar.muster(&["delete", "endpointslice", "pair-6", "-n", "shop"])?;
        for way in ["dig @169.254.20.10", &tls] {
            prints(&host, &format!("{way} +short pair.shop.svc.net.example AAAA"), &[])?;
            prints(&host, &format!("{way} +short pair.shop.svc.net.example A"), &[&own4])?;
            prints(&host, &format!("{way} +short -x {own6}"), &["alice.net.example."])?;
            prints(&host, &format!("{way} +short -x {own4}"), &["one.pair.shop.svc.net.example."])?;
        }
        Ok(())
    });
}
