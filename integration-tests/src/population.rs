//! A registrar's store filled with devices, as if they had joined and registered, and with Services: for
//! figures that need a hundred thousand of them or more, which would take long to make one by one.

mod services;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Range,
    path::Path,
    sync::Arc,
};

use muster_common::time::Timestamp;
use muster_proto::storage::{Claim, StoredAddress};
use muster_registrar::{
    allocation::PoolKind,
    registry::{
        Device, Network,
        keys::{self, Owner},
    },
    store::{Store, Txn, TxnOutcome, sqlite::SqliteStore},
};
use prost::Message as _;
pub use services::{ENDPOINTS, is_headless, service_endpoints};
use tokio::task::JoinSet;

use crate::device::Error;

/// Devices in one transaction: five keys each, and a transaction has at most 128.
const GROUP: u32 = 25;
/// Transactions under way at a time.
const UNDER_WAY: usize = 256;
/// The first device's offset in its pools, behind the band for chosen addresses.
const OFFSET: u32 = 1024;

/// Adds the devices `d<first>` to `d<end - 1>` to the network `default` in the store at `path`, which no
/// registrar has open. Each has a key, two virtual addresses and one private endpoint.
///
/// # Errors
/// If the store cannot be opened or written, or is not as `muster-registrar init` makes it.
pub async fn fill(path: &Path, devices: Range<u32>) -> Result<(), Error> {
    fill_store(SqliteStore::open(path)?, devices).await
}

/// As [`fill`], in any store.
///
/// # Errors
/// As [`fill`].
pub async fn fill_store(store: impl Store + 'static, devices: Range<u32>) -> Result<(), Error> {
    write(store, devices, GROUP, add).await
}

/// Adds the Services `s<first>` to `s<end - 1>` to the namespace `default`, as [`fill`] adds devices: each has a port
/// and one EndpointSlice with `endpoints` devices' addresses ([`service_endpoints`]). Most have a ClusterIP, some are
/// headless ([`is_headless`]).
///
/// # Errors
/// As [`fill`].
pub async fn fill_services(path: &Path, services: Range<u32>, endpoints: u32) -> Result<(), Error> {
    let add = |txn: Txn, network: &Network, number, _| services::add(txn, network, number, endpoints);
    write(SqliteStore::open(path)?, services, services::GROUP, add).await
}

/// Adds all of `numbers`, `group` of them in a transaction.
async fn write(
    store: impl Store + 'static,
    numbers: Range<u32>,
    group: u32,
    add: impl Fn(Txn, &Network, u32, Timestamp) -> Result<Txn, Error>,
) -> Result<(), Error> {
    let store = Arc::new(store);
    let found = store.get(keys::network("default")).await?.ok_or("the store has no network \"default\"")?;
    let network = Network::decode(&found.value, found.mod_revision)?;
    let now = Timestamp::now();
    let mut under_way = JoinSet::new();
    let mut next = numbers.start;
    while next < numbers.end {
        let end = numbers.end.min(next + group);
        let txn = (next..end).try_fold(Txn::new(), |txn, number| add(txn, &network, number, now))?;
        next = end;
        let store = Arc::clone(&store);
        under_way.spawn(async move { store.txn(txn).await });
        if under_way.len() >= UNDER_WAY {
            committed(&mut under_way).await?;
        }
    }
    while !under_way.is_empty() {
        committed(&mut under_way).await?;
    }
    Ok(())
}

type Outcome = Result<TxnOutcome, muster_registrar::store::StoreError>;

async fn committed(under_way: &mut JoinSet<Outcome>) -> Result<(), Error> {
    match under_way.join_next().await {
        Some(outcome) => match outcome?? {
            TxnOutcome::Committed(_) => Ok(()),
            TxnOutcome::Conflict => Err("the store has some of them already".into()),
        },
        None => Ok(()),
    }
}

/// The uid of the device with this number. They differ in their first octets, as real ones do: directors look at those.
pub fn device_uid(number: u32) -> uuid::Uuid {
    uuid::Builder::from_random_bytes((u128::from(number) << 96 | 0x5EED).to_be_bytes()).into_uuid()
}

/// Adds to `txn` the device with this number, in the layout of [`keys`].
fn add(txn: Txn, network: &Network, number: u32, now: Timestamp) -> Result<Txn, Error> {
    let pool = |kind| network.pools.get(kind).ok_or("the network lacks a pool for devices");
    let (IpAddr::V4(v4), IpAddr::V6(v6)) =
        (pool(PoolKind::DeviceV4)?.network(), pool(PoolKind::DeviceV6)?.network())
    else {
        return Err("the network's pools are of the wrong family".into());
    };
    let offset = OFFSET + number;
    let mut key = [0xD0; 32];
    key.iter_mut().zip(number.to_be_bytes()).for_each(|(slot, byte)| *slot = byte);
    let device = Device {
        uid: device_uid(number),
        network: network.name.clone(),
        name: format!("d{number}").into(),
        namespace: "default".into(),
        meta: None,
        ipv4: Some(Ipv4Addr::from(u32::from(v4) + offset)),
        ipv6: Some(Ipv6Addr::from(u128::from(v6) + u128::from(offset))),
        chosen_ipv4: false,
        chosen_ipv6: false,
        revoked: false,
        key: Some(key),
        endpoints: [(Ipv4Addr::from(0x0A00_0000 | number), 7551).into()].into(),
        outside: None,
        site: None,
        aes_256_gcm: true,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        created: now,
        certificate_expiry: Some(now + std::time::Duration::from_secs(30 * 24 * 3600)),
        revision: 0,
    };
    let owner_uid = device.uid.to_string();
    let name = Claim { owner_uid: owner_uid.clone(), key_hash: vec![0; 32], token: "bench".into() };
    let claim = Claim { owner_uid: owner_uid.clone(), ..Claim::default() };
    let address = StoredAddress { owner_uid, released_at: None }.encode_to_vec();
    let Device { uid, network, .. } = &device;
    Ok(device
        .addresses()
        .fold(txn, |txn, ip| txn.put(keys::address(network, Owner::Device, ip), address.clone()))
        .put(keys::device(network, *uid), device.encode())
        .put(keys::device_name(network, &device.name), name.encode_to_vec())
        .put(keys::device_key(network, &key), claim.encode_to_vec()))
}
