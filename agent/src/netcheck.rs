//! What lies between this host and the internet: what a NAT makes of the tunnel's address, whether UDP and IPv6 get
//! through, whether the gateway maps ports, and how far away the directors are.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures_util::future::join_all;
use muster_common::time::Instant;
use muster_proto::agent::{
    DirectorReach, DirectorStatus, NetcheckResponse, PortMapping, PortMappingProtocol,
};
use tokio::{net::TcpStream, time::timeout};

use crate::{
    local_api::{endpoint, proto_duration},
    port_mapping::{Gateway, Outcome, Protocol, View, external_address},
};

/// How long a director may take to accept a connection.
const PATIENCE: Duration = Duration::from_secs(3);
/// Addresses of a director that are tried, of each family.
const ADDRESSES: usize = 4;

/// What the agent knows without asking anybody.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Where the tunnel is on the host's own networks.
    pub private: Vec<SocketAddr>,
    /// Where it is from outside, what the gateway maps first.
    pub reflexive: Vec<SocketAddr>,
    /// Home first.
    pub directors: Vec<Director>,
    /// `None` if the agent is configured not to ask for any.
    pub port_mapping: Option<View>,
}

/// One of the network's directors.
#[derive(Clone, Debug, Default)]
pub struct Director {
    /// As status output has it.
    pub status: DirectorStatus,
    /// Where it accepts connections, best first.
    pub addresses: Vec<SocketAddr>,
    /// Where frames to it go, if they go over UDP.
    pub udp: Option<SocketAddr>,
    /// The tunnel's address as it saw it last.
    pub reflexive: Option<SocketAddr>,
}

/// What a NAT makes of the tunnel's address (RFC 4787, 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mapping {
    /// There is no NAT.
    None,
    EndpointIndependent,
    /// Or address and port-dependent: hole punching may fail.
    AddressDependent,
    Unknown,
}

impl Mapping {
    const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::EndpointIndependent => "endpoint-independent",
            Self::AddressDependent => "address-dependent",
            Self::Unknown => "unknown",
        }
    }
}

impl Surroundings {
    /// Connects to each director and asks the gateway, all at the same time.
    pub async fn examine(self) -> NetcheckResponse {
        let connects = join_all(self.directors.iter().map(Director::connect));
        let (connects, port_mapping) = tokio::join!(connects, examine_gateway(self.port_mapping.as_ref()));
        let is_attached = |director: &Director| director.status.transport != "none";
        let seen: Vec<_> = self.directors.iter().filter_map(Director::seen).collect();
        let has_udp = self.directors.iter().any(|director| director.udp.is_some());
        let family = |is_family: fn(&SocketAddr) -> bool, index: usize| {
            let addresses = self.directors.iter().flat_map(|director| &director.addresses);
            let is_reached = connects.iter().any(|times| times.get(index).is_some_and(Option::is_some));
            let by_udp = seen.iter().any(|(director, _)| is_family(director));
            addresses.into_iter().any(is_family).then_some(is_reached || by_udp)
        };
        let (ipv4, ipv6) = (family(SocketAddr::is_ipv4, 0), family(SocketAddr::is_ipv6, 1));
        let directors = self.directors.iter().zip(&connects).map(|(director, [ipv4, ipv6])| DirectorReach {
            status: Some(director.status.clone()),
            ipv4_connect: ipv4.map(proto_duration),
            ipv6_connect: ipv6.map(proto_duration),
        });
        NetcheckResponse {
            udp: self.directors.iter().any(is_attached).then_some(has_udp),
            ipv4,
            ipv6,
            mapping: mapping(&self.private, &seen).as_str().to_owned(),
            reflexive_endpoints: self.reflexive.iter().copied().map(endpoint).collect(),
            port_mapping: Some(port_mapping),
            directors: directors.collect(),
        }
    }
}

impl Director {
    /// Where it is and what it sees, over UDP.
    fn seen(&self) -> Option<(SocketAddr, SocketAddr)> {
        Some((self.udp?, self.reflexive?))
    }

    /// How long a connection takes over IPv4 and over IPv6.
    async fn connect(&self) -> [Option<Duration>; 2] {
        let quickest = |is_family: fn(&SocketAddr) -> bool| async move {
            let addresses = self.addresses.iter().copied().filter(is_family).take(ADDRESSES);
            let times = join_all(addresses.map(connect)).await;
            times.into_iter().flatten().min()
        };
        let (ipv4, ipv6) = tokio::join!(quickest(SocketAddr::is_ipv4), quickest(SocketAddr::is_ipv6));
        [ipv4, ipv6]
    }
}

async fn connect(address: SocketAddr) -> Option<Duration> {
    let started = Instant::now();
    timeout(PATIENCE, TcpStream::connect(address)).await.ok()?.ok()?;
    Some(Instant::now() - started)
}

/// Decides from what directors see: pairs of a director's address and this device's as that one sees it. Of IPv6 only
/// where there is no IPv4, as hardly anybody translates it.
fn mapping(private: &[SocketAddr], seen: &[(SocketAddr, SocketAddr)]) -> Mapping {
    let by_ipv4: Vec<_> = seen.iter().filter(|(director, _)| director.is_ipv4()).collect();
    let seen = if by_ipv4.is_empty() { seen.iter().collect() } else { by_ipv4 };
    let reflexive: BTreeSet<SocketAddr> = seen.iter().map(|(_, reflexive)| *reflexive).collect();
    let from: BTreeSet<IpAddr> = seen.iter().map(|(director, _)| director.ip()).collect();
    match reflexive.len() {
        0 => Mapping::Unknown,
        _ if reflexive.iter().all(|address| private.contains(address)) => Mapping::None,
        1 if from.len() > 1 => Mapping::EndpointIndependent,
        // With one more address to be sent to, it might be another.
        1 => Mapping::Unknown,
        _ => Mapping::AddressDependent,
    }
}

/// Which protocols the gateway speaks. For PCP, which has no harmless question, that is known from the last time.
async fn examine_gateway(view: Option<&View>) -> PortMapping {
    let Some(view) = view else { return PortMapping::default() };
    let ask = |gateway: Gateway| async move {
        let (nat_pmp, upnp) = tokio::join!(
            external_address(Protocol::NatPmp, gateway),
            external_address(Protocol::Upnp, gateway)
        );
        let pcp = match view.outcomes.get(&Protocol::Pcp) {
            Some(Outcome::Mapped(external)) => Ok(external.ip()),
            Some(Outcome::Failed(reason)) => Err(reason.clone()),
            None => Err("not asked yet".to_owned()),
        };
        vec![answer(Protocol::Pcp, pcp), answer(Protocol::NatPmp, nat_pmp), answer(Protocol::Upnp, upnp)]
    };
    let protocols = match view.gateway {
        Some(gateway) => ask(gateway).await,
        None => Vec::new(),
    };
    PortMapping {
        enabled: true,
        gateway: view.gateway.map(|gateway| gateway.address.to_string()).unwrap_or_default(),
        protocol: view.mapping.map(|(protocol, _)| protocol.as_str().to_owned()).unwrap_or_default(),
        external: view.mapping.map(|(_, external)| endpoint(external)),
        protocols,
    }
}

fn answer(protocol: Protocol, answer: Result<IpAddr, String>) -> PortMappingProtocol {
    let name = protocol.as_str().to_owned();
    match answer {
        Ok(address) => PortMappingProtocol {
            name,
            available: true,
            external_address: address.to_string(),
            error: String::new(),
        },
        Err(error) => PortMappingProtocol { name, error, ..PortMappingProtocol::default() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(pairs: &[(&str, &str)]) -> Vec<(SocketAddr, SocketAddr)> {
        pairs.iter().map(|(director, own)| (director.parse().unwrap(), own.parse().unwrap())).collect()
    }

    #[test]
    fn mapping_is_told_from_what_directors_see() {
        let private = ["192.168.1.5:7551".parse().unwrap(), "[2001:db8::5]:7551".parse().unwrap()];
        let of = |pairs: &[(&str, &str)]| mapping(&private, &seen(pairs));
        let (a, b, c) = ("198.51.100.1:7501", "198.51.100.2:7501", "198.51.100.1:443");
        let six = "[2001:db8:1::1]:7501";
        assert_eq!(of(&[]), Mapping::Unknown);
        assert_eq!(of(&[(a, "203.0.113.9:7551")]), Mapping::Unknown, "one director");
        assert_eq!(of(&[(a, "203.0.113.9:7551"), (c, "203.0.113.9:7551")]), Mapping::Unknown, "one address");
        assert_eq!(of(&[(a, "203.0.113.9:7551"), (b, "203.0.113.9:7551")]), Mapping::EndpointIndependent);
        assert_eq!(of(&[(a, "203.0.113.9:7551"), (b, "203.0.113.9:7552")]), Mapping::AddressDependent);
        assert_eq!(of(&[(a, "203.0.113.9:7551"), (c, "203.0.113.9:7552")]), Mapping::AddressDependent);
        assert_eq!(of(&[(a, "203.0.113.9:1"), (b, "203.0.113.10:1")]), Mapping::AddressDependent);
        assert_eq!(of(&[(a, "192.168.1.5:7551")]), Mapping::None);
        assert_eq!(of(&[(six, "[2001:db8::5]:7551")]), Mapping::None);
        // IPv4 is what is translated, if anything is.
        assert_eq!(of(&[(six, "[2001:db8::5]:7551"), (a, "203.0.113.9:1")]), Mapping::Unknown);
        let both = [(six, "[2001:db8::5]:7551"), (a, "203.0.113.9:1"), (b, "203.0.113.9:1")];
        assert_eq!(of(&both), Mapping::EndpointIndependent);
    }

    #[tokio::test]
    async fn what_cannot_be_known_is_left_open() {
        let nothing = Surroundings::default().examine().await;
        assert_eq!((nothing.udp, nothing.ipv4, nothing.ipv6), (None, None, None));
        assert_eq!(
            (nothing.mapping.as_str(), nothing.port_mapping),
            ("unknown", Some(PortMapping::default()))
        );

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let closed = tokio::net::TcpListener::bind("[::1]:0").await.unwrap().local_addr().unwrap();
        let director = Director {
            status: DirectorStatus { transport: "tcp".into(), ..DirectorStatus::default() },
            addresses: vec![listener.local_addr().unwrap(), closed],
            ..Director::default()
        };
        let view = View::default();
        let around =
            Surroundings { directors: vec![director], port_mapping: Some(view), ..Surroundings::default() };
        let told = around.examine().await;
        assert_eq!((told.udp, told.ipv4, told.ipv6), (Some(false), Some(true), Some(false)));
        let director = told.directors.first().unwrap();
        assert!(director.ipv4_connect.is_some() && director.ipv6_connect.is_none());
        let port_mapping = told.port_mapping.unwrap();
        assert!(port_mapping.enabled && port_mapping.gateway.is_empty() && port_mapping.protocols.is_empty());
    }
}
