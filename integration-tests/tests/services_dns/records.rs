//! What the registrar answers for Services, seen by dig, kdig and delv.

use muster_integration_tests::{Host, LabError, Result, muster::Registrar, scenario};

use super::{expect, prints, shop, status};

/// The ClusterIP of `shop/web`, as dig has it.
fn cluster_ip(host: &Host) -> Result<String> {
    Ok(host.sh("dig +short @192.0.2.1 web.shop.svc.net.example A")?.trim().to_owned())
}

#[test]
fn records_of_services_are_as_the_specification_has_them() {
    scenario("records of Services", |lab| {
        let (hq, _registrar) = shop(lab, "")?;
        let dig = |question: &str| format!("dig +short @192.0.2.1 {question}");
        // 2: a Service with a cluster IP.
        let ip = cluster_ip(&hq)?;
        expect(ip.starts_with("100."), "a ClusterIP from the pool", &ip)?;
        prints(
            &hq,
            &dig("_http._tcp.web.shop.svc.net.example SRV"),
            &["0 100 80 web.shop.svc.net.example."],
        )?;
        prints(
            &hq,
            &dig("web.shop.svc.net.example SRV"),
            &["0 50 80 web.shop.svc.net.example.", "0 50 53 web.shop.svc.net.example."],
        )?;
        prints(&hq, &dig(&format!("-x {ip}")), &["web.shop.svc.net.example."])?;
        prints(&hq, &dig("dns-version.net.example TXT"), &["\"1.1.0\""])?;
        // 3, 4: endpoints of a headless Service, of which one is not ready.
        prints(&hq, &dig("db.shop.svc.net.example A"), &["10.9.0.1", "10.9.0.2"])?;
        prints(&hq, &dig("primary.db.shop.svc.net.example A"), &["10.9.0.1"])?;
        prints(&hq, &dig("10-9-0-2.db.shop.svc.net.example A"), &["10.9.0.2"])?;
        prints(
            &hq,
            &dig("_pg._tcp.db.shop.svc.net.example SRV"),
            &["0 50 15432 primary.db.shop.svc.net.example.", "0 50 15432 10-9-0-2.db.shop.svc.net.example."],
        )?;
        // 5: ExternalName with a target inside the domain.
        prints(&hq, &dig("docs.shop.svc.net.example A"), &["web.shop.svc.net.example.", &ip])?;
        // Nothing is asked elsewhere, unless there is a server to ask.
        prints(&hq, &dig("away.shop.svc.net.example CNAME"), &["www.example.org."])?;
        prints(&hq, &dig("away.shop.svc.net.example A"), &[])?;
        prints(&hq, &status("away.shop.svc.net.example A"), &["NOERROR"])?;
        // 8: what does not exist, and what exists with other types.
        prints(&hq, &status("no.shop.svc.net.example A"), &["NXDOMAIN"])?;
        prints(&hq, &status("web.nowhere.svc.net.example A"), &["NXDOMAIN"])?;
        prints(&hq, &status("web.shop.svc.net.example AAAA"), &["NOERROR"])?;
        prints(&hq, &status("shop.svc.net.example A"), &["NOERROR"])?;
        prints(&hq, &status("web.shop.svc.net.example ANY"), &["NOERROR"])?;
        prints(&hq, &status("'*.shop.svc.net.example' A"), &["NXDOMAIN"])?;
        prints(&hq, &status("10-9-0-3.db.shop.svc.net.example A"), &["NXDOMAIN"])?;
        prints(&hq, &status("10-9-0-1.shop.pod.net.example A"), &["NXDOMAIN"])?;
        // 13: another class, another zone, the spelling of the question.
        prints(&hq, &status("web.shop.svc.net.example CH A"), &["REFUSED"])?;
        prints(&hq, &status("www.example.org A"), &["REFUSED"])?;
        let spelled = hq.sh("dig +noall +answer @192.0.2.1 WEB.Shop.svc.NET.example A")?;
        expect(spelled.starts_with("WEB.Shop.svc.NET.example."), "the owner as asked", &spelled)?;
        // 14: nobody may have a transfer unless the operator says so.
        let refused = hq.try_sh("dig +tcp @192.0.2.1 net.example AXFR")?;
        expect(!refused.stdout.contains("SOA"), "a transfer is refused", &refused.stdout)?;
        // Other clients.
        prints(&hq, "kdig +short +tls @192.0.2.1 web.shop.svc.net.example A", &[&ip])?;
        prints(&hq, "kdig +short +tcp +keepopen @192.0.2.1 web.shop.svc.net.example A", &[&ip])?;
        let delv = hq.sh("delv -i +short @192.0.2.1 web.shop.svc.net.example A 2>/dev/null")?;
        expect(delv.trim() == ip, "delv has the address", &delv)
    });
}

#[test]
fn a_change_is_answered_at_once_and_what_is_deleted_is_gone() {
    scenario("changes of Services", |lab| {
        let (hq, registrar) = shop(lab, "")?;
        let address = "dig +short @192.0.2.1 db.shop.svc.net.example A";
        prints(&hq, address, &["10.9.0.1", "10.9.0.2"])?;
        let serial = || hq.sh("dig +short @192.0.2.1 net.example SOA | cut -d' ' -f3");
        let before = serial()?;
        let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: db-2, namespace: shop, \
                     labels: {kubernetes.io/service-name: db}}\naddressType: IPv4\nports: []\nendpoints:\n- \
                     {addresses: [10.9.0.4]}\n";
        registrar.apply(slice)?;
        prints(&hq, address, &["10.9.0.1", "10.9.0.2", "10.9.0.4"])?;
        let after = serial()?;
        expect(
            after.trim().parse::<u32>().ok() >= before.trim().parse().ok(),
            "the serial goes on",
            &format!("{before}{after}"),
        )?;
        registrar.muster(&["delete", "endpointslice", "db-2", "-n", "shop"])?;
        prints(&hq, address, &["10.9.0.1", "10.9.0.2"])?;
        // 9: a namespace takes its names with it.
        registrar.muster(&["delete", "namespace", "shop"])?;
        prints(&hq, address, &[])?;
        let gone = "dig @192.0.2.1 shop.svc.net.example A | sed -n 's/.*status: \\([A-Z]*\\),.*/\\1/p'";
        prints(&hq, gone, &["NXDOMAIN"])
    });
}

/// Has `registrar` serve with `new` in the place of `old` in its configuration.
pub(super) fn reconfigure(registrar: &mut Registrar, old: &str, new: &str) -> Result {
    let path = registrar.config();
    let file = |source| LabError::File { path: path.display().to_string(), source };
    let text = std::fs::read_to_string(&path).map_err(file)?;
    expect(text.contains(old), "a configuration to change", &text)?;
    std::fs::write(&path, text.replace(old, new)).map_err(file)?;
    registrar.kill();
    registrar.serve()
}

#[test]
fn options_of_the_specification_are_the_operators() {
    scenario("options of DNS", |lab| {
        let (hq, mut registrar) = shop(lab, "pods = \"insecure\"\n")?;
        // 6: names of devices by address, not checked.
        prints(&hq, "dig +short @192.0.2.1 10-1-2-3.shop.pod.net.example A", &["10.1.2.3"])?;
        prints(&hq, &status("10-1-2-3.shop.pod.net.example AAAA"), &["NOERROR"])?;
        prints(&hq, &status("10-1-2-3.nowhere.pod.net.example A"), &["NXDOMAIN"])?;
        prints(&hq, &status("shop.pod.net.example A"), &["NOERROR"])?;
        // 4: a Service without endpoints, and no endpoints at all.
        prints(&hq, &status("web.shop.svc.net.example A"), &["NOERROR"])?;
        reconfigure(&mut registrar, "pods = \"insecure\"", "ignore_empty_services = true")?;
        prints(&hq, &status("10-1-2-3.shop.pod.net.example A"), &["NXDOMAIN"])?;
        prints(&hq, &status("web.shop.svc.net.example A"), &["NXDOMAIN"])?;
        prints(&hq, &status("db.shop.svc.net.example A"), &["NOERROR"])?;
        reconfigure(&mut registrar, "ignore_empty_services = true", "endpoints = false")?;
        prints(&hq, &status("web.shop.svc.net.example A"), &["NOERROR"])?;
        prints(&hq, &status("db.shop.svc.net.example A"), &["NXDOMAIN"])?;
        // 9: namespaces that are not exposed.
        reconfigure(&mut registrar, "endpoints = false", "namespaces = [\"default\"]")?;
        prints(&hq, &status("web.shop.svc.net.example A"), &["NXDOMAIN"])?;
        prints(&hq, &status("shop.svc.net.example A"), &["NXDOMAIN"])?;
        prints(&hq, &status("default.svc.net.example A"), &["NOERROR"])
    });
}

#[test]
fn endpoints_are_called_like_their_devices_if_the_operator_says_so() {
    scenario("names of endpoints", |lab| {
        let on = "endpoint_device_names = true\n";
        let more = "reverse_zones = [\"10.0.0.0/8\"]\ntransfer_to = [\"192.0.2.1/32\"]\n";
        let (hq, mut registrar) = shop(lab, &format!("{on}{more}"))?;
        let long = "x".repeat(64);
        registrar.apply(&format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: db-1, namespace: shop, labels: \
             {{kubernetes.io/service-name: db}}}}\naddressType: IPv4\nports: [{{name: pg, port: 5432}}]\nendpoints:\n\
             - {{addresses: [10.9.0.4], targetRef: {{kind: Device, name: alpha}}}}\n\
             - {{addresses: [10.9.0.5], targetRef: {{kind: Pod, name: beta}}, hostname: second}}\n\
             - {{addresses: [10.9.0.6], targetRef: {{kind: Node, name: gamma}}}}\n\
             - {{addresses: [10.9.0.7], targetRef: {{kind: Pod, name: {long}}}}}\n"
        ))?;
        // 3: hostname, then the device's name if it is a label, then the address; everywhere.
        let (by_device, by_address) = ("alpha", "10-9-0-4");
        for (first, other) in [(by_device, by_address), (by_address, by_device)] {
            let names = [(first, 4), ("second", 5), ("10-9-0-6", 6), ("10-9-0-7", 7)];
            let mut targets = Vec::new();
            for (label, last) in names {
                let (name, address) = (format!("{label}.db.shop.svc.net.example"), format!("10.9.0.{last}"));
                prints(&hq, &format!("dig +short @192.0.2.1 {name} A"), &[&address])?;
                prints(&hq, &format!("dig +short @192.0.2.1 -x {address}"), &[&format!("{name}.")])?;
                targets.push(format!("0 25 5432 {name}."));
            }
            let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
            prints(&hq, "dig +short @192.0.2.1 _pg._tcp.db.shop.svc.net.example SRV", &targets)?;
            for label in [other, "beta", "gamma", "10-9-0-5"] {
                prints(&hq, &status(&format!("{label}.db.shop.svc.net.example A")), &["NXDOMAIN"])?;
            }
            let zone = hq.sh("dig +tcp +noall +answer @192.0.2.1 net.example AXFR")?;
            let has = |label: &str| zone.contains(&format!("\n{label}.db.shop.svc.net.example."));
            expect(has(first) && has("second") && !has(other), "the names in a transfer", &zone)?;
            if first == by_device {
                reconfigure(&mut registrar, on, "")?;
            }
        }
        Ok(())
    });
}

#[test]
fn zones_are_transferred_to_those_who_may_have_them() {
    scenario("zone transfers", |lab| {
        let (hq, _registrar) = shop(lab, "transfer_to = [\"192.0.2.1/32\"]\n")?;
        // 14: SOA first and last, the Services in between.
        let ip = cluster_ip(&hq)?;
        let zone = hq.sh("dig +tcp +noall +answer @192.0.2.1 net.example AXFR | tr -s '\\t ' ' '")?;
        let lines: Vec<&str> = zone.lines().collect();
        let is_soa = |line: Option<&&str>| line.is_some_and(|line| line.contains(" IN SOA "));
        expect(is_soa(lines.first()) && is_soa(lines.last()), "SOA first and last", &zone)?;
        for record in [
            &format!("web.shop.svc.net.example. 5 IN A {ip}"),
            "web.shop.svc.net.example. 5 IN SRV 0 100 53 web.shop.svc.net.example.",
            "_http._tcp.web.shop.svc.net.example. 5 IN SRV 0 100 80 web.shop.svc.net.example.",
            "db.shop.svc.net.example. 5 IN A 10.9.0.1",
            "primary.db.shop.svc.net.example. 5 IN A 10.9.0.1",
            "docs.shop.svc.net.example. 5 IN CNAME web.shop.svc.net.example.",
        ] {
            expect(lines.contains(&record), record, &zone)?;
        }
        for absent in ["10.9.0.3", "dns-version", " PTR ", ".pod.net.example"] {
            expect(!zone.contains(absent), &format!("no {absent}"), &zone)?;
        }
        // With the serial that is current, one SOA.
        let serial = hq.sh("dig +short @192.0.2.1 net.example SOA | cut -d' ' -f3")?;
        let current = format!("dig +tcp +noall +answer @192.0.2.1 net.example IXFR={}", serial.trim());
        let answer = hq.sh(&current)?;
        expect(answer.lines().count() == 1 && answer.contains("SOA"), "one SOA", &answer)?;
        // Nor over UDP, below the apex, or for somebody else.
        let beside = "ip addr add 192.0.2.9/24 dev eth0";
        hq.sh(beside)?;
        for refused in [
            "+tcp shop.svc.net.example AXFR",
            "-b 192.0.2.9 +tcp net.example AXFR",
            "-b 192.0.2.9 +tcp net.example IXFR=1",
        ] {
            let answer = hq.try_sh(&format!("dig @192.0.2.1 {refused}"))?.stdout;
            let failed = answer.contains("Transfer failed") && !answer.contains("SOA");
            expect(failed, &format!("{refused} is refused"), &answer)?;
        }
        // dig says nothing of a transfer that is refused over UDP.
        let udp = hq.try_sh("kdig @192.0.2.1 +notcp net.example IXFR=1 2>&1")?.stdout;
        expect(udp.contains("error 'REFUSED'"), "no transfer over UDP", &udp)
    });
}
