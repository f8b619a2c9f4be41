//! Asking a gateway for a mapping by each of the protocols, through their libraries.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    time::Duration,
};

use crab_nat::{
    GatewayAddress, InternetProtocol, PortMapping, PortMappingOptions, PortMappingType, TimeoutConfig,
    natpmp,
    pcp::{self, BaseMapRequest},
};
use igd_next::{
    AddPortError, PortMappingProtocol, SearchOptions,
    aio::{self, tokio::Tokio},
};
use muster_common::grpc::chain;

use super::plan::{Gateway, Lease, Protocol};

/// What is asked for (RFC 6886, 3.3 recommends it), in seconds.
const LIFETIME: u32 = 7_200;
/// A gateway is on the same network: what it does not answer within these, 1.75 s in all, it will not.
const PATIENCE: TimeoutConfig = TimeoutConfig {
    initial_timeout: Duration::from_millis(250),
    max_retries: 2,
    max_retry_timeout: Some(Duration::from_secs(1)),
};
/// How long a UPnP gateway may take to be found: asked alone, and by multicast, to which answers may take three seconds.
const SEARCH: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(4));
const SSDP_PORT: u16 = 1_900;
/// What a router's list of mappings shows.
const DESCRIPTION: &str = "Muster";

/// What of a gateway is held, for renewing it and giving it back.
#[derive(Debug)]
pub(super) enum Held {
    /// By PCP or NAT-PMP.
    Mapping(PortMapping),
    /// By UPnP.
    Upnp {
        /// Where it is asked.
        gateway: Box<aio::Gateway<Tokio>>,
        /// The port outside.
        port: u16,
    },
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker {
    /// UDP port of the tunnel.
    pub(super) port: NonZeroU16,
    /// Names this host's mappings in PCP: who does not know it cannot change them.
    pub(super) nonce: pcp::Nonce,
}

impl Asker {
    /// Asks `gateway` for a mapping, or for more time if `held` is one.
    pub(super) async fn map(
        &self,
        protocol: Protocol,
        gateway: Gateway,
        held: Option<&Held>,
    ) -> Result<(Lease, Held), String> {
        match protocol {
            Protocol::Pcp => self.map_pcp(gateway, held).await,
            Protocol::NatPmp => self.map_nat_pmp(gateway, held).await,
            Protocol::Upnp => self.map_upnp(gateway, held).await,
        }
    }

    /// The port outside that is wanted: the one that there is, or the one that is the same inside.
    fn options(&self, held: Option<&Held>) -> PortMappingOptions {
        let external_port = match held {
            Some(Held::Mapping(mapping)) => mapping.external_port(),
            Some(Held::Upnp { .. }) | None => self.port,
        };
        PortMappingOptions {
            external_port: Some(external_port),
            lifetime_seconds: Some(LIFETIME),
            timeout_config: Some(PATIENCE),
        }
    }

    async fn map_pcp(&self, gateway: Gateway, held: Option<&Held>) -> Result<(Lease, Held), String> {
        let address = GatewayAddress::IpV4(gateway.address);
        let request = BaseMapRequest::new(address, gateway.own.into(), InternetProtocol::Udp, self.port);
        let mapping = pcp::port_mapping(request, Some(self.nonce), None, self.options(held))
            .await
            .map_err(|error| chain(&error))?;
        let PortMappingType::Pcp { external_ip, .. } = mapping.mapping_type() else {
            return Err("the answer is not of PCP".into());
        };
        Ok(lease(external_ip.to_canonical(), mapping))
    }

    async fn map_nat_pmp(&self, gateway: Gateway, held: Option<&Held>) -> Result<(Lease, Held), String> {
        let address = GatewayAddress::IpV4(gateway.address);
        let external =
            natpmp::external_address(address, Some(PATIENCE)).await.map_err(|error| chain(&error))?;
        let mapping = natpmp::port_mapping(address, InternetProtocol::Udp, self.port, self.options(held))
            .await
            .map_err(|error| chain(&error))?;
        Ok(lease(external.into(), mapping))
    }

    async fn map_upnp(&self, gateway: Gateway, held: Option<&Held>) -> Result<(Lease, Held), String> {
        // Also to renew: a gateway that has restarted may listen elsewhere.
        let found = search(gateway).await?;
        let wanted = match held {
            Some(Held::Upnp { port, .. }) => *port,
            Some(Held::Mapping(_)) | None => self.port.get(),
        };
        let external = found.get_external_ip().await.map_err(|error| chain(&error))?;
        let own = SocketAddr::new(gateway.own.into(), self.port.get());
        let add = |lifetime| found.add_port(PortMappingProtocol::UDP, wanted, own, lifetime, DESCRIPTION);
        let port = match add(LIFETIME).await {
            Ok(()) => wanted,
            // For ever, as far as the gateway knows; it is given back all the same.
            Err(AddPortError::OnlyPermanentLeasesSupported) => {
                add(0).await.map_err(|error| chain(&error))?;
                wanted
            }
            Err(AddPortError::PortInUse) => found
                .add_any_port(PortMappingProtocol::UDP, own, LIFETIME, DESCRIPTION)
                .await
                .map_err(|error| chain(&error))?,
            Err(error) => return Err(chain(&error)),
        };
        let lease = Lease {
            external: SocketAddr::new(external, port),
            lifetime: Duration::from_secs(LIFETIME.into()),
        };
        Ok((lease, Held::Upnp { gateway: Box::new(found), port }))
    }
}

impl Held {
    /// Gives it back.
    pub(super) async fn give_back(self) -> Result<(), String> {
        match self {
            Self::Mapping(mapping) => mapping.try_drop().await.map_err(|(error, _)| chain(&error)),
            Self::Upnp { gateway, port } => {
                gateway.remove_port(PortMappingProtocol::UDP, port).await.map_err(|error| chain(&error))
            }
        }
    }
}

/// The address outside that `gateway` tells by `protocol`, without a mapping. PCP has no such question.
pub async fn external_address(protocol: Protocol, gateway: Gateway) -> Result<IpAddr, String> {
    match protocol {
        Protocol::Pcp => Err("it tells an address with a mapping only".into()),
        Protocol::NatPmp => natpmp::external_address(GatewayAddress::IpV4(gateway.address), Some(PATIENCE))
            .await
            .map(IpAddr::V4)
            .map_err(|error| chain(&error)),
        Protocol::Upnp => search(gateway).await?.get_external_ip().await.map_err(|error| chain(&error)),
    }
}

fn lease(external: IpAddr, mapping: PortMapping) -> (Lease, Held) {
    let external = SocketAddr::new(external, mapping.external_port().get());
    let lifetime = Duration::from_secs(mapping.lifetime().into());
    (Lease { external, lifetime }, Held::Mapping(mapping))
}

/// Finds the UPnP device that the gateway is. Others on the network are not asked: whoever answers first is no better
/// than a stranger.
async fn search(gateway: Gateway) -> Result<aio::Gateway<Tokio>, String> {
    let options = |patience| {
        let mut options = SearchOptions::default();
        options.bind_addr = SocketAddr::new(gateway.own.into(), 0);
        (options.timeout, options.single_search_timeout) = (Some(patience), Some(patience));
        options
    };
    let mut alone = options(SEARCH.0);
    alone.broadcast_address = SocketAddr::new(gateway.address.into(), SSDP_PORT);
    let found = match aio::tokio::search_gateway(alone).await {
        Ok(found) => found,
        // Not all answer what is sent to them alone.
        Err(_) => aio::tokio::search_gateway(options(SEARCH.1)).await.map_err(|error| chain(&error))?,
    };
    if found.addr.ip() != gateway.address {
        return Err(format!("{} answers, and not the gateway {}", found.addr.ip(), gateway.address));
    }
    Ok(found)
}
