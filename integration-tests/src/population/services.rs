//! Services with their EndpointSlices, as an operator would have created them.

use std::net::{IpAddr, Ipv4Addr};

use muster_proto::{
    admin::{self, EndpointSlice, ObjectMeta, ServicePort, ServiceSpec, SliceEndpoint},
    storage::StoredAddress,
};
use muster_registrar::{
    allocation::PoolKind,
    registry::{
        Network, Service, Slice,
        keys::{self, Owner},
        slice::SERVICE_LABEL,
    },
    store::Txn,
};
use prost::Message as _;

use super::OFFSET;
use crate::device::Error;

/// Services in one transaction: three keys each, and a transaction has at most 128.
pub(super) const GROUP: u32 = 40;
/// Endpoints of a Service, where nothing else is said.
pub const ENDPOINTS: u32 = 3;
/// One in so many is headless.
const HEADLESS: u32 = 4;

/// Whether the Service with this number is headless: each fourth.
pub fn is_headless(number: u32) -> bool {
    number.is_multiple_of(HEADLESS)
}

/// The endpoints in the EndpointSlice of a Service, at `addresses`.
pub fn service_endpoints(addresses: impl Iterator<Item = Ipv4Addr>) -> Vec<SliceEndpoint> {
    addresses
        .map(|address| SliceEndpoint { addresses: vec![address.to_string()], ..SliceEndpoint::default() })
        .collect()
}

/// Adds to `txn` the Service with this number, its ClusterIP and its EndpointSlice, which has the same name.
pub(super) fn add(txn: Txn, network: &Network, number: u32, endpoints: u32) -> Result<Txn, Error> {
    let pool = |kind| match network.pools.get(kind).map(|net| net.network()) {
        Some(IpAddr::V4(first)) => Ok(u32::from(first)),
        _ => Err("the network lacks a pool of IPv4 addresses"),
    };
    let (devices, cluster_ips) = (pool(PoolKind::DeviceV4)?, pool(PoolKind::ServiceV4)?);
    let uid = uuid::Builder::from_random_bytes((0x5E_u128 << 64 | u128::from(number)).to_be_bytes())
        .into_uuid()
        .to_string();
    let cluster_ip = Ipv4Addr::from(cluster_ips + OFFSET + number);
    let chosen = if is_headless(number) { "None".to_owned() } else { cluster_ip.to_string() };
    let name = format!("s{number}");
    let meta = ObjectMeta {
        name: name.clone(),
        namespace: "default".into(),
        uid: uid.clone(),
        network: network.name.to_string(),
        ..ObjectMeta::default()
    };
    let service = admin::Service {
        metadata: Some(meta.clone()),
        spec: Some(ServiceSpec {
            ports: vec![ServicePort { name: "http".into(), port: 80, ..ServicePort::default() }],
            cluster_ip: chosen.clone(),
            cluster_ips: vec![chosen],
            ip_families: vec!["IPv4".into()],
            ip_family_policy: "SingleStack".into(),
            ..ServiceSpec::default()
        }),
        status: None,
    };
    let endpoints =
        (0..endpoints).map(|endpoint| Ipv4Addr::from(devices + OFFSET + number * endpoints + endpoint));
    let slice = EndpointSlice {
        metadata: Some(ObjectMeta { labels: [(SERVICE_LABEL.to_owned(), name.clone())].into(), ..meta }),
        address_type: "IPv4".into(),
        endpoints: service_endpoints(endpoints),
        ports: vec![admin::EndpointPort { name: "http".into(), port: 8080, ..Default::default() }],
    };
    let service = Service::check(service, &network.name, 0)?;
    let slice = Slice::check(slice, &network.name, 0)?;
    let address = StoredAddress { owner_uid: uid, released_at: None }.encode_to_vec();
    Ok(service
        .cluster_ips()
        .iter()
        .fold(txn, |txn, ip| txn.put(keys::address(&network.name, Owner::Service, *ip), address.clone()))
        .put(keys::service(&network.name, "default", &name), service.encode())
        .put(keys::endpoint_slice(&network.name, "default", &name), slice.encode()))
}
