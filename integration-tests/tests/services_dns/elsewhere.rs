//! What the registrar's DNS has to do with the outside: external zones, targets of ExternalName Services, and names
//! that fall through to another server.

use muster_integration_tests::{Lab, Process, Result, scenario};

use super::{expect, prints, shop, status};

/// A name server at 192.0.2.53 that knows `example.org`, a host of `corp.example`, and a name of the network's domain.
pub(super) fn other_server(lab: &Lab, switch: &muster_integration_tests::Switch) -> Result<Process> {
    let up = lab.host("up")?;
    switch.plug(&up, &["192.0.2.53/24"])?;
    let mut dnsmasq = up.command("dnsmasq");
    dnsmasq.args(["--no-daemon", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--user=root"]);
    dnsmasq.args(["--pid-file=", "--local-ttl=77", "--address=/www.example.org/198.51.100.7"]);
    dnsmasq.args(["--address=/nothing.example.org/", "--address=/printer.net.example/198.51.100.8"]);
    dnsmasq.arg("--address=/web.shop.svc.net.example/198.51.100.9");
    dnsmasq.arg("--address=/printer.corp.example/198.51.100.10");
    up.spawn("dnsmasq", dnsmasq)
}

#[test]
fn names_that_are_elsewhere_are_asked_there() {
    scenario("names elsewhere", |lab| {
        let (hq, registrar) = shop(lab, "upstream = [\"192.0.2.53\"]\nfallthrough = [\"net.example\"]\n")?;
        let wire = lab.switch("up")?;
        // A second interface of the registrar's host leads to the other server alone.
        wire.plug(&hq, &["192.0.2.2/32"])?;
        let _server = other_server(lab, &wire)?;
        hq.route("192.0.2.53/32 dev eth1 src 192.0.2.2")?;
        // 5: CNAME, and what the server said, with its time to live.
        let away = "dig +short @192.0.2.1 away.shop.svc.net.example A";
        prints(&hq, away, &["www.example.org.", "198.51.100.7"])?;
        prints(
            &hq,
            "dig +noall +answer @192.0.2.1 away.shop.svc.net.example A | tr -s '\\t ' ' '",
            &[
                "away.shop.svc.net.example. 5 IN CNAME www.example.org.",
                "www.example.org. 77 IN A 198.51.100.7",
            ],
        )?;
        // A target that does not exist, and one that nobody answers for.
        for (name, target) in [("lost", "nothing.example.org"), ("failing", "www.example.net")] {
            let service = format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: \
                 {{type: ExternalName, externalName: {target}}}\n"
            );
            registrar.apply(&service)?;
            let name = format!("{name}.shop.svc.net.example A");
            prints(&hq, &format!("dig +short @192.0.2.1 {name}"), &[&format!("{target}.")])?;
            prints(&hq, &status(&name), &["NOERROR"])?;
        }
        // 16: what does not exist here is asked there; what exists is not, not even without records.
        prints(&hq, "dig +short @192.0.2.1 printer.net.example A", &["198.51.100.8"])?;
        let spelled = hq.sh("dig +noall +answer @192.0.2.1 PRINTER.Net.example A")?;
        expect(spelled.starts_with("PRINTER.Net.example."), "the owner as asked", &spelled)?;
        let own = hq.sh("dig +short @192.0.2.1 web.shop.svc.net.example A")?;
        expect(own.starts_with("100."), "the network's own address", &own)?;
        prints(&hq, "dig +short @192.0.2.1 web.shop.svc.net.example TXT", &[])?;
        prints(&hq, &status("www.example.org A"), &["REFUSED"])
    });
}

#[test]
fn external_addresses_are_in_a_zone_of_their_own() {
    scenario("an external zone", |lab| {
        let (hq, registrar) = shop(lab, "external_headless = true\nreverse_zones = [\"203.0.113.0/24\"]\n")?;
        registrar.apply("apiVersion: muster/v1\nkind: Network\nmetadata: {name: default}\nspec: {externalDomain: ext.example}\n---\n\
             apiVersion: v1\nkind: Service\nmetadata: {name: edge, namespace: shop}\nspec: {externalIPs: \
             [203.0.113.5], ports: [{name: http, port: 80}]}\n",
        )?;
        // 12.
        let dig = |question: &str| format!("dig +short @192.0.2.1 {question}");
        prints(&hq, &dig("edge.shop.ext.example A"), &["203.0.113.5"])?;
        prints(&hq, &dig("_http._tcp.edge.shop.ext.example SRV"), &["0 100 80 edge.shop.ext.example."])?;
        prints(&hq, &dig("-x 203.0.113.5"), &["edge.shop.ext.example."])?;
        prints(&hq, &dig("ext.example NS"), &["ns1.dns.ext.example."])?;
        prints(&hq, &dig("ns1.dns.ext.example A"), &["192.0.2.1"])?;
        let soa = hq.sh(&dig("ext.example SOA"))?;
        expect(soa.starts_with("ns1.dns.ext.example. hostmaster.dns.ext.example. "), "the SOA", &soa)?;
        prints(&hq, &dig("db.shop.ext.example A"), &["10.9.0.1", "10.9.0.2"])?;
        prints(&hq, &dig("primary.db.shop.ext.example A"), &["10.9.0.1"])?;
        prints(&hq, &status("shop.ext.example A"), &["NOERROR"])?;
        prints(&hq, &status("web.shop.ext.example A"), &["NXDOMAIN"])?;
        let inside = hq.sh(&dig("edge.shop.svc.net.example A"))?;
        expect(inside.starts_with("100."), "no external address inside", &inside)
    });
}
