//! Devices that come and go: each worker joins under a name that others want too, registers, looks others up, and mostly
//! leaves again, at whichever registrar answers. All of it is written down.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use muster_common::time::Instant;
use muster_integration_tests::{
    Result,
    device::{Device, Error, register_request},
    failed,
    muster::JoinCommand,
};
use muster_proto::registration::{DeregisterRequest, LookupRequest, lookup_request::By};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{runtime::Runtime, task::JoinHandle};
use tonic::{Code, Status};

use crate::{
    history::{Found, History, Life},
    world::{REGISTRARS, World},
};

/// Devices at a time, and the names that they want.
const WORKERS: u64 = 8;
const NAMES: u64 = 12;
/// How long one call may take.
const CALL: Duration = Duration::from_secs(12);
/// How long the last ones may take to come to an end.
const END: Duration = Duration::from_secs(90);

type Shared = Arc<Mutex<History>>;

pub(crate) struct Clients {
    runtime: Runtime,
    stop: Arc<AtomicBool>,
    history: Shared,
    workers: Vec<JoinHandle<()>>,
}

impl Clients {
    pub(crate) fn start(world: &World, seed: u64) -> Result<Self> {
        let runtime = world.clients.runtime()?;
        let (stop, history) = (Arc::new(AtomicBool::new(false)), Shared::default());
        let workers = (0..WORKERS).map(|number| {
            let worker = Worker {
                rng: StdRng::seed_from_u64(seed.wrapping_add(number)),
                number,
                lives: 0,
                join: world.join.clone(),
                stop: stop.clone(),
                history: history.clone(),
            };
            runtime.spawn(worker.run())
        });
        let workers = workers.collect();
        Ok(Self { runtime, stop, history, workers })
    }

    pub(crate) fn end(self) -> Result<History> {
        self.stop.store(true, Ordering::Relaxed);
        let ending = async {
            for worker in self.workers {
                worker.await.map_err(|error| failed("a client", error))?;
            }
            Ok(())
        };
        let ended = self.runtime.block_on(async { tokio::time::timeout(END, ending).await });
        ended.map_err(|_| failed("the clients", "they do not come to an end"))??;
        Ok(std::mem::take(&mut *lock(&self.history)))
    }
}

fn lock(history: &Shared) -> std::sync::MutexGuard<'_, History> {
    history.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Worker {
    rng: StdRng,
    number: u64,
    lives: u64,
    join: JoinCommand,
    stop: Arc<AtomicBool>,
    history: Shared,
}

impl Worker {
    async fn run(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            self.live().await;
        }
    }

    fn registrar(&mut self) -> String {
        format!("{}:7500", REGISTRARS[self.rng.random_range(0..REGISTRARS.len())])
    }

    fn note(&self, at: usize, change: impl FnOnce(&mut Life)) {
        if let Some(life) = lock(&self.history).lives.get_mut(at) {
            change(life);
        }
    }

    fn failed(&self, what: &str, error: &Error) {
        let reason = match code(error) {
            Some(code) => format!("{what}: {code:?}"),
            None => format!("{what}: no connection"),
        };
        *lock(&self.history).failures.entry(reason).or_default() += 1;
    }

    /// One device, from its joining to its end.
    async fn live(&mut self) {
        self.lives += 1;
        let name = format!("c{}", self.rng.random_range(0..NAMES));
        let Some(device) = self.join(&name).await else { return };
        let uid = device.enrolled.device_uid.clone();
        let at = {
            let mut history = lock(&self.history);
            history.lives.push(Life {
                name: name.clone(),
                uid,
                joined: Instant::now(),
                address: None,
                told: None,
                unsure: Vec::new(),
                leaving: None,
                left: false,
            });
            history.lives.len() - 1
        };
        // Unlike any other worker's, and any other life's.
        let key = ((self.number + 1) << 32) | self.lives;
        for step in 0..self.rng.random_range(2..8) {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            match step % 2 {
                0 => self.register(&device, at, key).await,
                _ => self.look_up(&device).await,
            }
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(20..300))).await;
        }
        if self.rng.random_range(0..5) > 0 {
            self.leave(&device, at).await;
        }
    }

    /// Joins, with the same key until it is known what has become of it; `None` if somebody else has the name.
    async fn join(&mut self, name: &str) -> Option<Device> {
        let key = rcgen::KeyPair::generate().ok()?;
        let request = rcgen::CertificateParams::default().serialize_request(&key).ok()?.der().to_vec();
        let mut tried = false;
        loop {
            let registrar = self.registrar();
            let join = self.join.with("registrar", &registrar);
            let joining = Device::join_with(&join, name, &key, request.clone());
            let error = match within(joining).await {
                Ok(device) => return Some(device),
                Err(error) => error,
            };
            // Somebody else's, unless an answer was lost and the device has been deleted meanwhile, which nobody does.
            if code(&error) == Some(Code::AlreadyExists) {
                return None;
            }
            self.failed("join", &error);
            tried |= code(&error).is_some();
            if self.stop.load(Ordering::Relaxed) {
                if tried {
                    lock(&self.history).unknown.push(name.to_owned());
                }
                return None;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn register(&mut self, device: &Device, at: usize, key: u64) {
        let registrar = self.registrar();
        let request = register_request(key, self.rng.random_range(1..0x00ff_ffff));
        let told =
            request.private_endpoints.first().map(|endpoint| endpoint.address.clone()).unwrap_or_default();
        self.note(at, |life| life.unsure.push(told.clone()));
        let call = async {
            let mut client = device.connect_to(&registrar).await?;
            Ok(client.register(request).await?.into_inner())
        };
        match within(call).await {
            // Known, and not kept.
            Ok(answer) if answer.unsaved => self.failed("register", &"unsaved".into()),
            Ok(answer) => {
                let address = answer.config.unwrap_or_default().virtual_ipv4;
                self.note(at, |life| {
                    life.unsure.retain(|unsure| *unsure != told);
                    life.told = Some(told);
                    life.address = Some(address);
                });
            }
            Err(error) => self.failed("register", &error),
        }
    }

    async fn look_up(&mut self, device: &Device) {
        let (registrar, name) = (self.registrar(), format!("c{}", self.rng.random_range(0..NAMES)));
        let call = async {
            let mut client = device.connect_to(&registrar).await?;
            Ok(client.lookup(LookupRequest { by: Some(By::Name(name.clone())) }).await?.into_inner())
        };
        match within(call).await {
            Ok(answer) => {
                let peer = answer.peer.unwrap_or_default();
                let address = peer.virtual_addresses.first().cloned().unwrap_or_default();
                let found = Found { name, uid: peer.device_uid, address };
                lock(&self.history).found.push(found);
            }
            Err(error) if code(&error) == Some(Code::NotFound) => {}
            Err(error) => self.failed("lookup", &error),
        }
    }

    async fn leave(&mut self, device: &Device, at: usize) {
        self.note(at, |life| life.leaving = Some(Instant::now()));
        let mut tried = false;
        loop {
            let registrar = self.registrar();
            let call = async {
                let mut client = device.connect_to(&registrar).await?;
                Ok(client.deregister(DeregisterRequest {}).await?)
            };
            match within(call).await {
                Ok(_) => return self.note(at, |life| life.left = true),
                // An answer was lost: it has left already.
                Err(error) if tried && code(&error) == Some(Code::PermissionDenied) => {
                    return self.note(at, |life| life.left = true);
                }
                Err(error) => self.failed("leave", &error),
            }
            tried = true;
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

fn code(error: &Error) -> Option<Code> {
    error.downcast_ref::<Status>().map(Status::code)
}

async fn within<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(CALL, call).await.unwrap_or_else(|_| Err("no answer".into()))
}
