//! Where it matters who asks: completion of search lists, the query log, and devices that were revoked.

use muster_integration_tests::{
    Host, Lab, Result,
    muster::{Agent, Registrar},
    process::wait_for,
    scenario,
};
use serde_json::Value;

use super::{
    DOMAIN, MANIFEST, PATIENCE, elsewhere::other_server, expect, prints, records::reconfigure,
    shop_with_agent, status, status_of, with_certificate,
};

/// A Service in another namespace than [`MANIFEST`]'s.
const TEAM: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: team}\n---\napiVersion: v1\nkind: Service\n\
                    metadata: {name: api, namespace: team}\nspec: {ports: [{name: http, port: 80}]}\n";

/// A registrar whose DNS is open to the lab, and the device `alice` of the namespace `shop`.
struct Site {
    hq: Host,
    registrar: Registrar,
    agent: Agent,
    /// Alice's virtual address, which the registrar's host reaches over the wire.
    own: String,
}

impl Site {
    fn new(lab: &Lab, dns: &str) -> Result<Self> {
        let (hq, alice) = (lab.host("hq")?, lab.host("alice")?);
        let switch = lab.switch("core")?;
        switch.plug(&hq, &["192.0.2.1/24"])?;
        switch.plug(&alice, &["192.0.2.10/24"])?;
        let open = "open_to = [\"192.0.2.0/24\", \"100.64.0.0/10\"]\nresponses_per_second = 0\n";
        let mut registrar = Registrar::init(&hq, DOMAIN, "192.0.2.1", &format!("[dns]\n{open}{dns}"))?;
        registrar.serve()?;
        registrar.apply(MANIFEST)?;
        registrar.apply(TEAM)?;
        let join = registrar.new_join_command(&["-n", "shop"])?;
        let mut agent = Agent::new(&alice, "")?;
        agent.join(&join, "alice")?;
        agent.run()?;
        let own = wait_for("a virtual address", PATIENCE, || {
            let own = alice.sh("dig +short alice.net.example A").map_err(|error| error.to_string())?;
            if own.starts_with("100.") { Ok(own.trim().to_owned()) } else { Err(own) }
        })?;
        hq.route(&format!("{own}/32 via 192.0.2.10"))?;
        Ok(Self { hq, registrar, agent, own })
    }

    /// The ways in which alice asks as herself: from her address, with her certificate, and through her agent.
    fn ways(&self) -> Result<[String; 3]> {
        let from = format!("dig -b {} @192.0.2.1", self.own);
        Ok([from, with_certificate(&self.agent)?, "dig @169.254.20.10".to_owned()])
    }
}

#[test]
fn search_lists_are_completed_for_devices() {
    scenario("completion of search lists", |lab| {
        let options =
            "complete_search = true\nhost_search = [\"corp.example\"]\nupstream = [\"192.0.2.53\"]\n";
        let site = Site::new(lab, options)?;
        let (hq, alice) = (&site.hq, site.agent.host());
        let wire = lab.switch("up")?;
        wire.plug(hq, &["192.0.2.2/32"])?;
        let _server = other_server(lab, &wire)?;
        hq.route("192.0.2.53/32 dev eth1 src 192.0.2.2")?;
        let address = |name: &str| hq.sh(&format!("dig +short @192.0.2.1 {name} A"));
        let (web, api) = (address("web.shop.svc.net.example")?, address("api.team.svc.net.example")?);
        expect(web.starts_with("100.") && api.starts_with("100.") && web != api, "ClusterIPs", &web)?;
        for way in site.ways()? {
            // 15: each entry of the list that a device of the namespace has, the hosts' list, the bare name.
            for (asked, found, address) in [
                ("api.team", "api.team.svc.net.example.", api.trim()),
                ("web.shop.svc", "web.shop.svc.net.example.", web.trim()),
                ("alice", "alice.net.example.", &site.own),
                ("printer", "printer.corp.example.", "198.51.100.10"),
                ("www.example.org", "www.example.org.", "198.51.100.7"),
            ] {
                let script = format!("{way} +short {asked}.shop.svc.net.example A");
                prints(alice, &script, &[found, address])?;
                // The CNAME stands first.
                let printed = alice.sh(&script)?;
                expect(printed.starts_with(found), "a CNAME before its target", &printed)?;
            }
            prints(
                alice,
                &format!("{way} +short _http._tcp.api.team.shop.svc.net.example SRV"),
                &["_http._tcp.api.team.svc.net.example.", "0 100 80 api.team.svc.net.example."],
            )?;
            // What exists as asked has no CNAME; the other family is not denied.
            prints(alice, &format!("{way} +short web.shop.svc.net.example A"), &[web.trim()])?;
            let other = format!("{way} api.team.shop.svc.net.example AAAA");
            prints(alice, &status_of(&other), &["NOERROR"])?;
            // What no entry completes is denied as asked; and other lists are not this device's.
            for absent in ["nowhere.shop", "api.team.default", "api.team.nowhere"] {
                let asked = format!("{way} {absent}.svc.net.example A");
                prints(alice, &status_of(&asked), &["NXDOMAIN"])?;
            }
        }
        let denied = hq.sh("dig @192.0.2.1 +noall +authority nowhere.shop.svc.net.example A")?;
        expect(denied.starts_with("net.example."), "the SOA of the zone that was asked", &denied)?;
        // Nobody's namespace is known from other addresses, in an open range or not.
        for asking in [hq, alice] {
            prints(asking, &status("api.team.shop.svc.net.example A"), &["NXDOMAIN"])?;
        }
        // A program whose own list knows nothing of corp.example finds the host at the first try.
        let list = "nameserver 169.254.20.10\nsearch shop.svc.net.example\noptions ndots:5\n";
        alice.write_etc("resolv.conf", list)?;
        for (name, address) in [("printer", "198.51.100.10"), ("api.team", api.trim())] {
            prints(alice, &format!("getent ahostsv4 {name} | cut -d' ' -f1 | sort -u"), &[address])?;
        }
        Ok(())
    });
}

/// Lines of the query log so far.
fn queries(registrar: &mut Registrar) -> Vec<Value> {
    let log = registrar.process().map(|process| process.log()).unwrap_or_default();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["fields"]["message"] == "query").collect()
}

/// Waits for the query for `name` (`NAME TYPE`) in the log and checks that it has `fields`, `FIELD=VALUE` each. What is
/// not given is empty.
fn logged(registrar: &mut Registrar, query: &str, transport: &str, client: &str, fields: &str) -> Result {
    wait_for(&format!("{query} in the query log"), PATIENCE, || {
        let found = queries(registrar);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let is = |line: &&Value| {
            let line = &line["fields"];
            let client_is = text(&line["client"]).rsplit_once(':').is_some_and(|(ip, _)| ip == client);
            format!("{} {}", text(&line["name"]), text(&line["type"])) == query
                && line["transport"] == transport
                && client_is
        };
        let line = found.iter().find(is).ok_or_else(|| format!("{found:?}"))?;
        let mut seen = Vec::new();
        for field in [
            "service",
            "namespace",
            "kind",
            "endpoint",
            "port_name",
            "protocol",
            "client_namespace",
            "client_device",
        ] {
            match line["fields"][field].as_str() {
                Some("") => {}
                Some(value) => seen.push(format!("{field}={value}")),
                None => return Err(format!("no {field} in {line}")),
            }
        }
        if line["level"] == "INFO" && seen.join(" ") == fields { Ok(()) } else { Err(line.to_string()) }
    })
}

#[test]
fn queries_are_logged_with_what_they_are_about() {
    scenario("the query log", |lab| {
        let mut site = Site::new(lab, "query_log = true\n[log]\nformat = \"json\"\n")?;
        let [from_device, with_certificate, through_agent] = site.ways()?;
        let alice = site.agent.host().clone();
        let device = "client_namespace=shop client_device=alice";
        // From an open range, by nobody in particular.
        let ports = "_http._tcp.web.shop.svc.net.example SRV";
        let about_ports = "service=web namespace=shop kind=svc port_name=http protocol=tcp";
        let endpoint = "primary.db.shop.svc.net.example A";
        let about_endpoint = "service=db namespace=shop kind=svc endpoint=primary";
        for (asked, query, about) in [
            ("_HTTP._tcp.web.SHOP.svc.net.example SRV", ports, about_ports),
            (endpoint, endpoint, about_endpoint),
            ("team.svc.net.example A", "team.svc.net.example A", "namespace=team kind=svc"),
            (
                "10-1-2-3.shop.pod.net.example AAAA",
                "10-1-2-3.shop.pod.net.example AAAA",
                "namespace=shop kind=pod endpoint=10-1-2-3",
            ),
            ("net.example SOA", "net.example SOA", ""),
            ("www.example.org A", "www.example.org A", ""),
        ] {
            for (option, transport) in [("+notcp", "Udp"), ("+tcp", "Tcp")] {
                site.hq.sh(&format!("dig @192.0.2.1 {option} {asked}"))?;
                logged(&mut site.registrar, query, transport, "192.0.2.1", about)?;
            }
        }
        // By a device: from its address, and by its certificate from any.
        alice.sh(&format!("{from_device} {ports}"))?;
        logged(&mut site.registrar, ports, "Udp", &site.own, &format!("{about_ports} {device}"))?;
        alice.sh(&format!("{with_certificate} {ports}"))?;
        logged(&mut site.registrar, ports, "Tls", "192.0.2.10", &format!("{about_ports} {device}"))?;
        alice.sh(&format!("{through_agent} {endpoint}"))?;
        logged(&mut site.registrar, endpoint, "Tls", "192.0.2.10", &format!("{about_endpoint} {device}"))?;
        // Not unless it is on.
        reconfigure(&mut site.registrar, "query_log = true", "query_log = false")?;
        let before = queries(&mut site.registrar).len();
        prints(&site.hq, &status(endpoint), &["NOERROR"])?;
        let after = queries(&mut site.registrar).len();
        expect(before == after, "no further line", &after.to_string())
    });
}

#[test]
fn revoked_devices_are_strangers_to_the_registrars_dns() {
    scenario("DNS for revoked devices", |lab| {
        let (registrar, mut agent) = shop_with_agent(lab, "[dns]\npods = \"insecure\"\n", "")?;
        agent.run()?;
        let host = agent.host().clone();
        let tls = with_certificate(&agent)?;
        let own = wait_for("a virtual address", PATIENCE, || {
            let own = host.sh("dig +short alice.net.example A").map_err(|error| error.to_string())?;
            if own.starts_with("100.") { Ok(own.trim().to_owned()) } else { Err(own) }
        })?;
        // What may be seen by members alone: Services, namespaces, the pools behind reverse names.
        let inside = [
            "web.shop.svc.net.example A".to_owned(),
            "shop.svc.net.example A".to_owned(),
            "10-1-2-3.shop.pod.net.example A".to_owned(),
            "dns-version.net.example TXT".to_owned(),
            format!("-x {own}"),
        ];
        for question in &inside {
            prints(&host, &status_of(&format!("{tls} {question}")), &["NOERROR"])?;
        }
        registrar.muster(&["revoke", "device", "alice"])?;
        for question in &inside {
            prints(&host, &status_of(&format!("{tls} {question}")), &["REFUSED"])?;
        }
        // What is not there is told from what is by nothing, either.
        for question in ["nowhere.svc.net.example A", "-x 100.95.0.1", "-x 198.51.100.1"] {
            prints(&host, &status_of(&format!("{tls} {question}")), &["REFUSED"])?;
        }
        let names = host.sh(&format!("{tls} -x {own}"))?;
        expect(!names.contains("net.example"), "no zone behind an address", &names)?;
        // The apex is everybody's.
        prints(&host, &format!("{tls} +short net.example A"), &["192.0.2.1"])
    });
}
