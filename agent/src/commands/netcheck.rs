//! `muster-agent netcheck`.

use clap::Args;
use muster_proto::agent::{DirectorReach, NetcheckRequest, NetcheckResponse, PortMapping};

use super::{
    Output, client,
    ping::{milliseconds, show, to_std},
    print, print_json,
};
use crate::config::Config;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  muster-agent netcheck
  muster-agent netcheck -o json

Exit codes: 0 a director can be reached or the network has none, 1 none can be reached or the agent does not answer,
2 wrong usage.")]
pub(super) struct Arguments {}

pub(super) async fn netcheck(config: &Config, _: Arguments, output: Output) -> anyhow::Result<()> {
    let mut agent = client::connect(&config.socket).await?;
    let answer = agent.netcheck(NetcheckRequest {}).await.map_err(|status| client::refused(&status))?;
    let found = answer.into_inner();
    match output {
        Output::Json => print_json(&found)?,
        Output::Text => print(&report(&found))?,
    }
    let is_cut_off = !found.directors.is_empty() && found.udp.is_none();
    anyhow::ensure!(
        !is_cut_off || found.directors.iter().any(has_answered),
        "no director can be reached\nremedy: this host must be let out by UDP or TCP to the directors above, or by HTTPS_PROXY in /etc/muster/environment"
    );
    Ok(())
}

fn has_answered(director: &DirectorReach) -> bool {
    director.ipv4_connect.is_some() || director.ipv6_connect.is_some()
}

fn report(found: &NetcheckResponse) -> String {
    let mut lines = vec![
        ("UDP", udp(found.udp).to_owned()),
        ("IPv4", family(found.ipv4).to_owned()),
        ("IPv6", family(found.ipv6).to_owned()),
        ("NAT", nat(&found.mapping).to_owned()),
    ];
    let outside: Vec<String> = found.reflexive_endpoints.iter().map(show).collect();
    lines.push(("Outside", if outside.is_empty() { "unknown".to_owned() } else { outside.join(", ") }));
    let port_mapping = found.port_mapping.clone().unwrap_or_default();
    lines.push(("Port mapping", mapping(&port_mapping)));
    let mut text: String = lines.iter().map(|(name, value)| format!("{name:<13} {value}\n")).collect();
    for protocol in &port_mapping.protocols {
        let what = match protocol.available {
            true => format!("available, external address {}", protocol.external_address),
            false => protocol.error.clone(),
        };
        text.push_str(&format!("  {:<11} {what}\n", protocol.name));
    }
    if found.directors.is_empty() {
        text.push_str("Directors     none\n");
        return text;
    }
    text.push_str(&format!(
        "\n{:<24} {:<12} {:<7} {:<9} {:<11} {:<11} {}\n",
        "DIRECTOR", "REGION", "ROLE", "TRANSPORT", "ROUND TRIP", "TCP IPv4", "TCP IPv6"
    ));
    for director in &found.directors {
        text.push_str(&row(director));
    }
    text
}

fn row(director: &DirectorReach) -> String {
    let status = director.status.clone().unwrap_or_default();
    let time = |time: &Option<pbjson_types::Duration>| {
        time.as_ref().map_or_else(|| "-".to_owned(), |time| milliseconds(to_std(time)))
    };
    let region = if status.region.is_empty() { "-" } else { &status.region };
    let mut row = format!(
        "{:<24} {region:<12} {:<7} {:<9} {:<11} {:<11} {}\n",
        status.name,
        status.role,
        status.transport,
        time(&status.round_trip),
        time(&director.ipv4_connect),
        time(&director.ipv6_connect)
    );
    if !status.last_error.is_empty() {
        row.push_str(&format!("  {}\n", status.last_error));
    }
    row
}

const fn udp(udp: Option<bool>) -> &'static str {
    match udp {
        Some(true) => "works",
        Some(false) => "blocked: frames go over TCP",
        None => "unknown: this device is attached to no director",
    }
}

const fn family(works: Option<bool>) -> &'static str {
    match works {
        Some(true) => "works",
        Some(false) => "no director can be reached",
        None => "unknown: no director has an address of this family",
    }
}

fn nat(mapping: &str) -> &str {
    match mapping {
        "none" => "none: this host has its address on the internet",
        "endpoint-independent" => {
            "endpoint-independent: the same address for everybody, so that peers can be reached directly"
        }
        "address-dependent" => {
            "address-dependent: another address for everybody; peers behind such a NAT, or one that lets in only answers, are reached through a director"
        }
        "unknown" => "unknown: it takes two directors, reached over UDP, to tell",
        other => other,
    }
}

fn mapping(port_mapping: &PortMapping) -> String {
    let PortMapping { enabled, gateway, protocol, external, .. } = port_mapping;
    match external {
        _ if !enabled => "off (tunnel.port_mapping)".to_owned(),
        Some(external) => format!("{} by {protocol}, of gateway {gateway}", show(external)),
        None if gateway.is_empty() => "none: this host has no gateway for IPv4, or needs none".to_owned(),
        None => format!("none of gateway {gateway}"),
    }
}

#[cfg(test)]
mod tests {
    use muster_proto::{
        admin::Endpoint,
        agent::{DirectorStatus, PortMappingProtocol},
    };

    use super::*;

    #[test]
    fn the_report_says_what_was_found() {
        let time = |nanos| Some(pbjson_types::Duration { seconds: 0, nanos });
        let found = NetcheckResponse {
            udp: Some(true),
            ipv4: Some(true),
            ipv6: None,
            mapping: "endpoint-independent".into(),
            reflexive_endpoints: vec![Endpoint { address: "203.0.113.9".into(), port: 7551 }],
            port_mapping: Some(PortMapping {
                enabled: true,
                gateway: "192.168.1.1".into(),
                protocol: "nat-pmp".into(),
                external: Some(Endpoint { address: "203.0.113.9".into(), port: 7551 }),
                protocols: vec![
                    PortMappingProtocol {
                        name: "pcp".into(),
                        error: "no answer".into(),
                        ..Default::default()
                    },
                    PortMappingProtocol {
                        name: "nat-pmp".into(),
                        available: true,
                        external_address: "203.0.113.9".into(),
                        error: String::new(),
                    },
                ],
            }),
            directors: vec![DirectorReach {
                status: Some(DirectorStatus {
                    name: "relay-1".into(),
                    role: "home".into(),
                    transport: "udp".into(),
                    round_trip: time(1_500_000),
                    ..DirectorStatus::default()
                }),
                ipv4_connect: time(2_250_000),
                ipv6_connect: None,
            }],
        };
        let expected = "\
UDP           works
IPv4          works
IPv6          unknown: no director has an address of this family
NAT           endpoint-independent: the same address for everybody, so that peers can be reached directly
Outside       203.0.113.9:7551
Port mapping  203.0.113.9:7551 by nat-pmp, of gateway 192.168.1.1
  pcp         no answer
  nat-pmp     available, external address 203.0.113.9

DIRECTOR                 REGION       ROLE    TRANSPORT ROUND TRIP  TCP IPv4    TCP IPv6
relay-1                  -            home    udp       1.50 ms     2.25 ms     -
";
        assert_eq!(report(&found), expected);
        let nothing = report(&NetcheckResponse { mapping: "unknown".into(), ..Default::default() });
        assert!(
            nothing.contains("attached to no director") && nothing.ends_with("Directors     none\n"),
            "{nothing}"
        );
    }
}
