//! Services as environment variables, by the conventions that Kubernetes has for pods: `MY_CS_SERVICE_HOST` and
//! `MY_CS_SERVICE_PORT`, and those of Docker's links, such as `MY_CS_PORT_80_TCP_ADDR`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use muster_common::name::Label;
use muster_proto::{admin::ServicePort, registration::VisibleService};

/// The variables of all `services` that have a ClusterIP, in order. Where two Services give the same variable
/// (`WEB_SERVICE_PORT` is of `web` and of `web-service`), the one whose name sorts first does.
///
/// The text is made to be read by shells: names are of letters, digits and underscores, and values of addresses,
/// numbers and URLs, none of which needs quotes. What would be anything else is left out, as are Services
/// whose name begins with a digit, since no variable's may.
pub fn variables(services: &[VisibleService]) -> BTreeMap<String, String> {
    let mut services: Vec<&VisibleService> = services.iter().collect();
    services.sort_by(|a, b| a.name.cmp(&b.name));
    let mut variables = BTreeMap::new();
    for service in services {
        let address = service.cluster_ips.first().and_then(|address| address.parse::<IpAddr>().ok());
        let name = variable(&service.name).filter(|name| !name.starts_with(|c: char| c.is_ascii_digit()));
        if let (Some(address), Some(name)) = (address, name) {
            for (name, value) in variables_of(&name, address, &service.ports) {
                variables.entry(name).or_insert(value);
            }
        }
    }
    variables
}

/// As lines of `NAME=value`.
pub fn lines(variables: &BTreeMap<String, String>) -> String {
    variables.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
}

fn variables_of(name: &str, address: IpAddr, ports: &[ServicePort]) -> Vec<(String, String)> {
    let mut variables = vec![(format!("{name}_SERVICE_HOST"), address.to_string())];
    let ports = ports.iter().filter_map(|port| {
        let number = u16::try_from(port.port).ok().filter(|number| *number > 0)?;
        let protocol = match &*port.protocol {
            "" | "TCP" => "tcp",
            "UDP" => "udp",
            "SCTP" => "sctp",
            _ => return None,
        };
        Some((number, protocol, variable(&port.name)))
    });
    for (index, (number, protocol, port_name)) in ports.enumerate() {
        // An IPv6 address is in brackets here.
        let url = format!("{protocol}://{}", SocketAddr::new(address, number));
        if index == 0 {
            variables.push((format!("{name}_SERVICE_PORT"), number.to_string()));
            variables.push((format!("{name}_PORT"), url.clone()));
        }
        if let Some(port_name) = port_name {
            variables.push((format!("{name}_SERVICE_PORT_{port_name}"), number.to_string()));
        }
        let link = format!("{name}_PORT_{number}_{}", protocol.to_ascii_uppercase());
        variables.push((format!("{link}_PROTO"), protocol.to_owned()));
        variables.push((format!("{link}_PORT"), number.to_string()));
        variables.push((format!("{link}_ADDR"), address.to_string()));
        variables.push((link, url));
    }
    variables
}

/// A DNS label as part of a variable's name.
fn variable(label: &str) -> Option<String> {
    let label: Label = label.parse().ok()?;
    Some(label.as_str().to_ascii_uppercase().replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(name: &str, protocol: &str, port: u32) -> ServicePort {
        ServicePort { name: name.into(), protocol: protocol.into(), port, ..ServicePort::default() }
    }

    fn service(name: &str, addresses: &[&str], ports: &[ServicePort]) -> VisibleService {
        let cluster_ips = addresses.iter().map(|&address| address.to_owned()).collect();
        VisibleService { name: name.into(), cluster_ips, ports: ports.to_vec() }
    }

    fn printed(services: &[VisibleService]) -> String {
        lines(&variables(services))
    }

    #[test]
    fn services_give_the_variables_that_kubernetes_gives() {
        let cases: &[(&str, VisibleService, &[&str])] = &[
            (
                "one port without a name",
                service("my-cs", &["10.0.0.11"], &[port("", "TCP", 6379)]),
                &[
                    "MY_CS_PORT=tcp://10.0.0.11:6379",
                    "MY_CS_PORT_6379_TCP=tcp://10.0.0.11:6379",
                    "MY_CS_PORT_6379_TCP_ADDR=10.0.0.11",
                    "MY_CS_PORT_6379_TCP_PORT=6379",
                    "MY_CS_PORT_6379_TCP_PROTO=tcp",
                    "MY_CS_SERVICE_HOST=10.0.0.11",
                    "MY_CS_SERVICE_PORT=6379",
                ],
            ),
            (
                "several ports: the first is the Service's",
                service("dns", &["10.0.0.10"], &[port("dns-udp", "UDP", 53), port("dns-tcp", "", 53)]),
                &[
                    "DNS_PORT=udp://10.0.0.10:53",
                    "DNS_PORT_53_TCP=tcp://10.0.0.10:53",
                    "DNS_PORT_53_TCP_ADDR=10.0.0.10",
                    "DNS_PORT_53_TCP_PORT=53",
                    "DNS_PORT_53_TCP_PROTO=tcp",
                    "DNS_PORT_53_UDP=udp://10.0.0.10:53",
                    "DNS_PORT_53_UDP_ADDR=10.0.0.10",
                    "DNS_PORT_53_UDP_PORT=53",
                    "DNS_PORT_53_UDP_PROTO=udp",
                    "DNS_SERVICE_HOST=10.0.0.10",
                    "DNS_SERVICE_PORT=53",
                    "DNS_SERVICE_PORT_DNS_TCP=53",
                    "DNS_SERVICE_PORT_DNS_UDP=53",
                ],
            ),
            (
                "IPv6, of which the first address counts",
                service("v6", &["fd00:0::7", "10.0.0.7"], &[port("http", "TCP", 80)]),
                &[
                    "V6_PORT=tcp://[fd00::7]:80",
                    "V6_PORT_80_TCP=tcp://[fd00::7]:80",
                    "V6_PORT_80_TCP_ADDR=fd00::7",
                    "V6_PORT_80_TCP_PORT=80",
                    "V6_PORT_80_TCP_PROTO=tcp",
                    "V6_SERVICE_HOST=fd00::7",
                    "V6_SERVICE_PORT=80",
                    "V6_SERVICE_PORT_HTTP=80",
                ],
            ),
            (
                "SCTP",
                service("sig", &["10.0.0.3"], &[port("", "SCTP", 3868)]),
                &[
                    "SIG_PORT=sctp://10.0.0.3:3868",
                    "SIG_PORT_3868_SCTP=sctp://10.0.0.3:3868",
                    "SIG_PORT_3868_SCTP_ADDR=10.0.0.3",
                    "SIG_PORT_3868_SCTP_PORT=3868",
                    "SIG_PORT_3868_SCTP_PROTO=sctp",
                    "SIG_SERVICE_HOST=10.0.0.3",
                    "SIG_SERVICE_PORT=3868",
                ],
            ),
            ("headless, or an external name", service("db", &[], &[port("", "TCP", 5432)]), &[]),
            ("no variable begins with a digit", service("7up", &["10.0.0.1"], &[port("", "TCP", 1)]), &[]),
        ];
        for (what, service, expected) in cases {
            let text = printed(std::slice::from_ref(service));
            assert_eq!(text.lines().collect::<Vec<_>>(), *expected, "{what}");
        }
    }

    #[test]
    fn of_two_services_that_give_the_same_variable_the_first_by_name_does() {
        let web = service("web", &["10.0.0.1"], &[port("http", "TCP", 80)]);
        let other = service("web-service", &["10.0.0.2"], &[port("", "TCP", 81)]);
        let text = printed(&[other.clone(), web.clone()]);
        assert!(text.contains("\nWEB_SERVICE_PORT=80\n"), "{text}");
        assert!(text.contains("\nWEB_SERVICE_SERVICE_PORT=81\n"), "{text}");
        assert_eq!(text, printed(&[web, other]), "whatever the order");
    }

    #[test]
    fn nothing_that_a_shell_would_run_is_ever_printed() {
        let good = || port("", "TCP", 80);
        let odd = [
            service("a;reboot", &["10.0.0.1"], &[good()]),
            service("$(reboot)", &["10.0.0.1"], &[good()]),
            service("a", &["10.0.0.1\nPATH=/tmp"], &[good()]),
            service("b", &["`reboot`"], &[good()]),
            service(
                "c",
                &["10.0.0.1"],
                &[port("x y", "TCP\n", 1), port("", "DCCP", 2), port("", "TCP", 70_000)],
            ),
            service("d", &["10.0.0.1"], &[port("`x`", "TCP", 0), port("`x`", "TCP", 9)]),
            service("", &["10.0.0.1"], &[good()]),
        ];
        let text = printed(&odd);
        let expected = "C_SERVICE_HOST=10.0.0.1\nD_PORT=tcp://10.0.0.1:9\nD_PORT_9_TCP=tcp://10.0.0.1:9\n\
            D_PORT_9_TCP_ADDR=10.0.0.1\nD_PORT_9_TCP_PORT=9\nD_PORT_9_TCP_PROTO=tcp\nD_SERVICE_HOST=10.0.0.1\n\
            D_SERVICE_PORT=9\n";
        assert_eq!(text, expected);
    }
}
