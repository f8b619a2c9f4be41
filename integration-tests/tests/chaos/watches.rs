//! Watches that go on throughout, one at each registrar and one of the store itself. Whatever breaks in between, each must
//! tell every change once, and in order. A registrar that was started anew may say that it does not know what was before:
//! then one lists again, and watches from there, as every client does.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use muster_common::{
    credential::OperatorCredential,
    identity::Party,
    tls::{ALPN_H2, Credentials},
};
use muster_integration_tests::{Result, device::Error, expect, failed, process::wait_for, run_on};
use muster_proto::admin::{
    EventType, ListDevicesRequest, WatchDevicesRequest, device_service_client::DeviceServiceClient,
};
use muster_registrar::store::{Event, KeyRange, Store};
use tokio::runtime::Runtime;
use tokio_stream::StreamExt as _;
use tonic::{Code, Status, transport::Channel};

use crate::world::{REGISTRARS, World};

const PATIENCE: Duration = Duration::from_secs(60);
/// Between attempts to watch.
const AGAIN: Duration = Duration::from_millis(200);
const NETWORK: &str = "default";

/// A change of a device: its revision, its uid, and whether it was deleted.
type Change = (u64, String, bool);

/// What a watch has told without a break.
#[derive(Debug)]
struct Told {
    /// It tells what comes after this revision.
    from: u64,
    changes: Vec<Change>,
    /// The revision up to which that is all.
    through: u64,
}

impl Told {
    fn from(revision: u64) -> Self {
        Self { from: revision, changes: Vec::new(), through: revision }
    }
}

/// What one watch has told: more than one part if it had to begin again.
type Parts = Arc<Mutex<Vec<Told>>>;

pub(crate) struct Watches {
    /// Runs them.
    _runtime: Runtime,
    stop: Arc<AtomicBool>,
    store: Parts,
    registrars: Vec<Parts>,
}

fn lock(parts: &Parts) -> MutexGuard<'_, Vec<Told>> {
    parts.lock().unwrap_or_else(PoisonError::into_inner)
}

fn note(parts: &Parts, through: u64, changes: impl Iterator<Item = Change>) {
    if let Some(told) = lock(parts).last_mut() {
        told.changes.extend(changes);
        told.through = through;
    }
}

impl Watches {
    pub(crate) fn start(world: &World) -> Result<Self> {
        let runtime = world.clients.runtime()?;
        let stop = Arc::new(AtomicBool::new(false));
        let credential = OperatorCredential::load(&world.registrars[0].credential())
            .map_err(|error| failed("the credential", error))?;
        let first = format!("{}:7500", REGISTRARS[0]);
        let begin = run_on(&runtime, {
            let credential = credential.clone();
            async move { list(connect(&credential, &first).await?).await }
        })?;
        let begun = || Parts::new(Mutex::new(vec![Told::from(begin)]));
        let store = begun();
        runtime.spawn(watch_store(store.clone(), begin));
        let mut registrars = Vec::new();
        for address in REGISTRARS {
            let parts = begun();
            let address = format!("{address}:7500");
            runtime.spawn(watch_registrar(parts.clone(), credential.clone(), address, stop.clone()));
            registrars.push(parts);
        }
        Ok(Self { _runtime: runtime, stop, store, registrars })
    }

    /// Waits until all have told everything up to now, and compares.
    pub(crate) fn end(self, world: &World) -> Result {
        // A last change, after which there is nothing more.
        world.registrars[0].muster(&["label", "device", "alice", "chaos=over", "--network", NETWORK])?;
        let alice = world.registrars[0].muster(&["get", "device", "alice", "-o", "json"])?;
        let alice: serde_json::Value = serde_json::from_str(&alice).unwrap_or_default();
        let last = alice.pointer("/metadata/resourceVersion").and_then(|text| text.as_str()?.parse().ok());
        let last: u64 = last.ok_or_else(|| failed("reading the last revision", &alice))?;
        let everything = |what: &str, parts: &Parts| {
            wait_for(&format!("the watch at {what} to tell everything"), PATIENCE, || {
                let through = lock(parts).last().map_or(0, |told| told.through);
                if through >= last { Ok(()) } else { Err(format!("{through} of {last}")) }
            })
        };
        everything("the store", &self.store)?;
        for (address, parts) in REGISTRARS.into_iter().zip(&self.registrars) {
            everything(address, parts)?;
        }
        self.stop.store(true, Ordering::Relaxed);
        let reference: Vec<Change> = lock(&self.store).iter().flat_map(|told| told.changes.clone()).collect();
        expect(!reference.is_empty(), "changes", "none")?;
        for (address, parts) in REGISTRARS.into_iter().zip(&self.registrars) {
            let parts = std::mem::take(&mut *lock(parts));
            let count: usize = parts.iter().map(|told| told.changes.len()).sum();
            eprintln!(
                "chaos: {count} of {} changes watched at {address}, in {} parts",
                reference.len(),
                parts.len()
            );
            parts.iter().try_for_each(|told| compare(address, told, &reference))?;
        }
        Ok(())
    }
}

/// What `told` says must be what the store says of the same revisions.
fn compare(address: &str, told: &Told, reference: &[Change]) -> Result {
    let is_told = |(at, ..): &&Change| told.from < *at && *at <= told.through;
    let expected: Vec<&Change> = reference.iter().filter(is_told).collect();
    let first = expected.iter().zip(&told.changes).find(|(one, other)| **one != *other);
    let seen = format!(
        "{} of {} from {} to {}; first difference: {first:?}",
        told.changes.len(),
        expected.len(),
        told.from,
        told.through
    );
    let what = format!("the watch at {address} tells every change once and in order");
    expect(expected.into_iter().eq(&told.changes), &what, &seen)
}

async fn connect(credential: &OperatorCredential, registrar: &str) -> Result<Channel, Error> {
    let credentials = Credentials::new(&credential.key_pair()?, &credential.trusted()?)?;
    let config = credentials.client_config(|party| matches!(party, Party::Registrar { .. }), ALPN_H2)?;
    Ok(muster_common::grpc::connect(registrar, Arc::new(config)).await?)
}

/// The revision of the list of devices.
async fn list(channel: Channel) -> Result<u64, Error> {
    let list = ListDevicesRequest { network: NETWORK.into(), ..Default::default() };
    Ok(DeviceServiceClient::new(channel).list_devices(list).await?.into_inner().resource_version)
}

async fn watch_registrar(
    parts: Parts,
    credential: OperatorCredential,
    address: String,
    stop: Arc<AtomicBool>,
) {
    while !stop.load(Ordering::Relaxed) {
        let watching = async {
            let channel = connect(&credential, &address).await?;
            let from = lock(&parts).last().map_or(0, |told| told.through);
            let Err(error) = watch_devices(channel.clone(), from, &parts).await else { return Ok(()) };
            let is_forgotten = error
                .downcast_ref::<Status>()
                .is_some_and(|status| status.code() == Code::OutOfRange && status.message().contains("kept"));
            if is_forgotten {
                let from = list(channel).await?;
                lock(&parts).push(Told::from(from));
            }
            Ok::<(), Error>(())
        };
        // A registrar that is away is asked again.
        let _ = watching.await;
        tokio::time::sleep(AGAIN).await;
    }
}

async fn watch_devices(channel: Channel, resource_version: u64, parts: &Parts) -> Result<(), Error> {
    let request = WatchDevicesRequest { network: NETWORK.into(), resource_version, ..Default::default() };
    let mut events = DeviceServiceClient::new(channel).watch_devices(request).await?.into_inner();
    while let Some(event) = events.next().await.transpose()? {
        let (through, kind) = (event.resource_version, event.r#type());
        let uid = event.device.and_then(|device| device.metadata).unwrap_or_default().uid;
        let change = (kind != EventType::Bookmark).then_some((through, uid, kind == EventType::Deleted));
        note(parts, through, change.into_iter());
    }
    Ok(())
}

/// Ends with an error, which shows in that nothing more is told.
async fn watch_store(parts: Parts, begin: u64) -> Result<(), Error> {
    let prefix = format!("devices/{NETWORK}/");
    let store = World::store()?;
    let mut batches = loop {
        match store.watch(KeyRange::prefix(prefix.clone()), begin + 1).await {
            Ok(batches) => break batches,
            Err(error) if error.is_retryable() => tokio::time::sleep(AGAIN).await,
            Err(error) => return Err(error.into()),
        }
    };
    while let Some(batch) = batches.next().await.transpose()? {
        let change = |event: &Event| {
            let key = String::from_utf8_lossy(event.key()).into_owned();
            let uid = key.strip_prefix(&prefix).unwrap_or_default().to_owned();
            (batch.revision, uid, matches!(event, Event::Delete { .. }))
        };
        note(&parts, batch.revision, batch.events.iter().map(change));
    }
    Ok(())
}
