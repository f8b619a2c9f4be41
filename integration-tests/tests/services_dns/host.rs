//! Services by the resolvers that programs have, through the agent: glibc's and musl's, with search lists; without a
//! registrar; and with a device's certificate from the registrar itself.

use std::time::Duration;

use muster_integration_tests::{Host, LabError, Result, process::wait_for, scenario};

use super::{PATIENCE, expect, prints, shop_with_agent, with_certificate};

/// Prints the IPv4 addresses of its argument, as the C library finds them.
const PROGRAM: &str = r#"
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
int main(int argc, char **argv) {
    char text[INET_ADDRSTRLEN];
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM}, *found, *next;
    int error = getaddrinfo(argv[1], NULL, &hints, &found);
    if (error) return fprintf(stderr, "%s\n", gai_strerror(error)), 1;
    for (next = found; next; next = next->ai_next)
        puts(inet_ntop(AF_INET, &((struct sockaddr_in *)next->ai_addr)->sin_addr, text, sizeof text));
}
"#;

/// The ClusterIP of `shop/web`, once the agent has it.
fn cluster_ip(host: &Host) -> Result<String> {
    wait_for("a ClusterIP", PATIENCE, || {
        let ip = host.sh("dig +short web.shop.svc.net.example A").map_err(|e| e.to_string())?;
        if ip.starts_with("100.") { Ok(ip.trim().to_owned()) } else { Err(ip) }
    })
}

#[test]
fn programs_find_services_by_name() {
    scenario("programs find Services", |lab| {
        let completed = "[resolver]\nsearch = [\"default.svc\", \"svc\", \"\"]\nndots = 2\n";
        let (registrar, mut agent) = shop_with_agent(lab, "", completed)?;
        agent.run()?;
        let host = agent.host().clone();
        let ip = cluster_ip(&host)?;
        let source = host.directory().join("find.c");
        std::fs::write(&source, PROGRAM)
            .map_err(|error| LabError::File { path: source.display().to_string(), source: error })?;
        let directory = host.directory().display().to_string();
        host.sh(&format!("cd {directory} && musl-gcc -static -o find find.c"))?;
        let find = |name: &str| {
            [
                format!("getent ahostsv4 {name} | cut -d' ' -f1 | sort -u"),
                format!("{directory}/find {name} | sort -u"),
            ]
        };
        // Short names are completed by the agent.
        for name in ["web.shop.svc.net.example", "web.shop"] {
            for command in find(name) {
                prints(&host, &command, &[&ip])?;
            }
        }
        // 15: a search list as pods have it, which clients go through themselves.
        let pods = "nameserver 169.254.20.10\nsearch shop.svc.net.example svc.net.example net.example\noptions ndots:5\n";
        host.write_etc("resolv.conf", pods)?;
        for name in ["web", "docs", "web.shop", "web.shop.svc", "web.shop.svc.net.example", "WEB.shop"] {
            for command in find(name) {
                prints(&host, &command, &[&ip])?;
            }
        }
        for command in find("db") {
            prints(&host, &command, &["10.9.0.1", "10.9.0.2"])?;
        }
        // A change of what is held is answered at once, by the libraries too.
        let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: db-1, namespace: shop, \
                     labels: {kubernetes.io/service-name: db}}\naddressType: IPv4\nports: []\nendpoints:\n- \
                     {addresses: [10.9.0.9]}\n";
        registrar.apply(slice)?;
        for command in find("db") {
            wait_for("the change", Duration::from_secs(3), || match host.sh(&command) {
                Ok(found) if found.trim() == "10.9.0.9" => Ok(()),
                other => Err(format!("{other:?}")),
            })?;
        }
        Ok(())
    });
}

#[test]
fn names_used_before_resolve_without_a_registrar() {
    scenario("registrar away", |lab| {
        let (mut registrar, mut agent) = shop_with_agent(lab, "", "")?;
        agent.run()?;
        let host = agent.host().clone();
        let ip = cluster_ip(&host)?;
        registrar.kill();
        // Longer than the answer holds.
        std::thread::sleep(Duration::from_secs(6));
        prints(&host, "dig +short web.shop.svc.net.example A", &[&ip])?;
        prints(&host, "getent ahostsv4 web.shop.svc.net.example | cut -d' ' -f1 | sort -u", &[&ip])
    });
}

#[test]
fn a_certificate_opens_the_registrars_own_dns() {
    scenario("DNS over TLS with a certificate", |lab| {
        let (_registrar, mut agent) = shop_with_agent(lab, "[dns]\npods = \"verified\"\n", "")?;
        agent.run()?;
        let host = agent.host().clone();
        let ip = cluster_ip(&host)?;
        let tls = with_certificate(&agent)?;
        prints(&host, &format!("{tls} +short web.shop.svc.net.example A"), &[&ip])?;
        prints(&host, &format!("{tls} +short db.shop.svc.net.example A"), &["10.9.0.1", "10.9.0.2"])?;
        // 6: a device's name by its address, if it has that.
        let own = host.sh("dig +short alice.net.example A")?;
        let dashed = own.trim().replace('.', "-");
        let pod = |dashed: &str| format!("{tls} +short {dashed}.default.pod.net.example A");
        prints(&host, &pod(&dashed), &[own.trim()])?;
        prints(&host, &pod("100-64-77-77"), &[])?;
        prints(&host, &format!("{tls} +short {dashed}.shop.pod.net.example A"), &[])?;
        // Without it, the registrar shows the host nothing.
        for transport in ["+tls", "+tcp", "+notcp"] {
            let answer = host.sh(&format!("kdig @192.0.2.1 {transport} web.shop.svc.net.example A"))?;
            expect(!answer.contains(&ip), "nothing for strangers", &answer)?;
        }
        Ok(())
    });
}
