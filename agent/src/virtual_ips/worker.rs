//! The thread that keeps the table in nftables: takes what the registrar tells, writes what has changed in one transaction,
//! and writes everything anew when somebody else has been at it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use muster_common::time::Instant;
use muster_proto::registration::VirtualServicesChanged;
use prost::Message as _;
use tokio::sync::watch;

use super::{
    View, conntrack,
    known::{Key, Known},
    metrics::Metrics,
    ruleset::{self, Ruleset},
    table::{Change, Frontend, Place, Protocol, Table, Target, endpoints},
};
use crate::{
    nftables::{Batch, NftablesError, Socket, message},
    writer::{Write, Writer},
};

/// Before what is new is written to disk; what is newer until then is written with it.
const SAVE_DELAY: Duration = Duration::from_secs(2);
/// Between writes to disk.
const SAVE_INTERVAL: Duration = Duration::from_secs(30);
/// Before a table that could not be written is written again.
const RETRY: Duration = Duration::from_secs(5);
/// Between repairs of a table that others change.
const REPAIR_INTERVAL: Duration = Duration::from_secs(1);
/// How often remembered clients are looked through for an endpoint that is gone, while others come and go.
const ATTEMPTS: usize = 3;

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Input {
    /// By the registrar.
    Changed(Box<VirtualServicesChanged>),
    /// Where this host is; the first time that there is an interface.
    Place(Place),
    /// The socket has something to say: others have changed nftables.
    Readable,
    /// To remove the table, and end.
    Stop,
}

pub(super) struct Worker {
    socket: Socket,
    inputs: Receiver<Input>,
    known: Known,
    table: Table,
    ruleset: Ruleset,
    writer: Arc<Writer>,
    metrics: Metrics,
    view: Arc<Mutex<View>>,
    /// Counts how often everything has to be asked for anew.
    lost: watch::Sender<u64>,
    /// `None` until there is an interface.
    place: Option<Place>,
    /// When to write the whole table, and to disk.
    load_at: Option<Instant>,
    loaded_at: Option<Instant>,
    save_at: Option<Instant>,
    saved_at: Option<Instant>,
}

impl Worker {
    #[expect(clippy::too_many_arguments, reason = "all that it works with")]
    pub(super) fn new(
        socket: Socket,
        inputs: Receiver<Input>,
        known: Known,
        ruleset: Ruleset,
        writer: Arc<Writer>,
        metrics: Metrics,
        view: Arc<Mutex<View>>,
        lost: watch::Sender<u64>,
    ) -> Self {
        Self {
            socket,
            inputs,
            known,
            table: Table::default(),
            ruleset,
            writer,
            metrics,
            view,
            lost,
            place: None,
            load_at: None,
            loaded_at: None,
            save_at: None,
            saved_at: None,
        }
    }

    /// Runs until it is told to stop, or nobody can tell it anything any more.
    pub(super) fn run(mut self) {
        loop {
            let now = Instant::now();
            let next = self.load_at.into_iter().chain(self.save_at).min();
            let input = match next {
                Some(next) => self.inputs.recv_timeout(next.saturating_duration_since(now)),
                None => self.inputs.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            let now = Instant::now();
            match input {
                Ok(Input::Changed(changed)) => self.take(*changed, now),
                Ok(Input::Place(place)) => self.move_to(place, now),
                Ok(Input::Readable) => self.look_for_others(now),
                Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if self.load_at.is_some_and(|at| at <= now) {
                self.load(now);
            }
            if self.save_at.is_some_and(|at| at <= now) {
                self.save(now);
            }
        }
        if self.save_at.is_some() {
            self.save(Instant::now());
        }
        let batch = self.ruleset.remove();
        if let Err(error) = self.socket.commit("remove what there is", batch) {
            tracing::warn!(%error, "cannot remove the table of virtual IPs");
        }
    }

    fn take(&mut self, changed: VirtualServicesChanged, now: Instant) {
        let is_snapshot = changed.is_snapshot;
        let mut services = match self.known.take(changed) {
            Ok(services) => services,
            Err(error) => {
                tracing::error!(%error, "what is known of Services is not what the registrar has; asking for all of it");
                self.known = Known::default();
                self.lost.send_modify(|count| *count += 1);
                return;
            }
        };
        self.save_at.get_or_insert_with(|| {
            let earliest = self.saved_at.map_or(now, |at| at + SAVE_INTERVAL);
            earliest.max(now + SAVE_DELAY)
        });
        if is_snapshot {
            services.extend(self.table.services().cloned());
        }
        self.update(&services, now);
    }

    /// Makes the table agree with what is known of `services`.
    fn update(&mut self, services: &BTreeSet<Key>, now: Instant) {
        let Some(place) = &self.place else { return };
        let changes = self.table.update(&self.known, place, services);
        // What is going to be written whole needs no changes.
        if changes.is_empty() || self.load_at.is_some() {
            return;
        }
        let batch = self.ruleset.change(&changes);
        match self.commit("change virtual IPs", batch) {
            Ok(()) => {
                self.metrics.changes.inc();
                tracing::debug!(frontends = changes.len(), "virtual IPs have changed");
                self.clean_up(&changes);
            }
            Err(error) => {
                tracing::warn!(%error, "cannot change virtual IPs; writing all of them anew");
                self.load(now);
            }
        }
    }

    fn move_to(&mut self, place: Place, now: Instant) {
        if self.place.as_ref() == Some(&place) {
            return;
        }
        self.table.update(&self.known, &place, &self.known.keys().cloned().collect());
        self.place = Some(place);
        self.load_at = Some(now);
    }

    /// Sees whether somebody else has been at the table.
    fn look_for_others(&mut self, now: Instant) {
        let disturbed = self.socket.is_disturbed().unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot hear what others do to nftables");
            false
        });
        if !disturbed || self.loaded_at.is_none() || self.load_at.is_some() {
            return;
        }
        tracing::warn!(
            table = self.ruleset.name(),
            "somebody has changed the nftables table of virtual IPs: writing it anew"
        );
        let earliest = self.loaded_at.map_or(now, |at| at + REPAIR_INTERVAL);
        self.load_at = Some(now.max(earliest));
    }

    /// Writes the whole table.
    fn load(&mut self, now: Instant) {
        let Some(place) = &self.place else {
            self.load_at = None;
            return;
        };
        let batch = self.ruleset.load(&self.table, place);
        match self.commit("write all virtual IPs", batch) {
            Ok(()) => {
                (self.load_at, self.loaded_at) = (None, Some(now));
                self.metrics.loads.inc();
                let (frontends, table) = (self.table.len(), self.ruleset.name());
                tracing::info!(frontends, table, "virtual IPs are in place");
            }
            Err(error) => {
                tracing::error!(%error, "virtual IPs are not in place; trying again");
                self.load_at = Some(now + RETRY);
            }
        }
    }

    fn commit(&mut self, what: &'static str, batch: Batch) -> Result<(), NftablesError> {
        let result = self.socket.commit(what, batch);
        if result.is_err() {
            self.metrics.failures.inc();
        }
        self.metrics.frontends.set(i64::try_from(self.table.len()).unwrap_or(i64::MAX));
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = View {
            frontends: self.table.len(),
            endpoints: self.table.endpoints(),
            error: result.as_ref().err().map(ToString::to_string).unwrap_or_default(),
        };
        result
    }

    /// Has the kernel forget what leads to endpoints that are gone.
    fn clean_up(&mut self, changes: &[Change]) {
        let of = |is_concerned: fn(&Change) -> bool, is_ipv4: bool| -> BTreeMap<Frontend, Option<Target>> {
            let concerned = changes.iter().filter(|change| is_concerned(change));
            let concerned = concerned.filter(|change| change.frontend.address.is_ipv4() == is_ipv4);
            concerned.map(|change| (change.frontend, change.new.clone())).collect()
        };
        for is_ipv4 in [true, false] {
            let udp = of(|change| change.frontend.protocol == Protocol::Udp, is_ipv4);
            if !udp.is_empty()
                && let Err(error) = self.forget_connections(is_ipv4, &udp)
            {
                tracing::warn!(%error, "cannot have the kernel forget UDP connections to endpoints that are gone");
            }
            let remembered = of(|change| remembers(change.old.as_ref()), is_ipv4);
            if !remembered.is_empty()
                && let Err(error) = self.forget_clients(is_ipv4, &remembered)
            {
                tracing::warn!(%error, "cannot forget which clients had an endpoint that is gone");
            }
        }
    }

    fn forget_connections(
        &mut self,
        is_ipv4: bool,
        frontends: &BTreeMap<Frontend, Option<Target>>,
    ) -> std::io::Result<()> {
        let mut gone = Vec::new();
        self.socket.list(&conntrack::list(is_ipv4), |connection| {
            gone.extend(conntrack::forget(connection, frontends));
        })?;
        for request in gone {
            // It may have ended meanwhile.
            let _ = self.socket.request(&request);
        }
        Ok(())
    }

    /// Forgets the clients of an endpoint that their Service does not have any more.
    fn forget_clients(
        &mut self,
        is_ipv4: bool,
        frontends: &BTreeMap<Frontend, Option<Target>>,
    ) -> Result<(), NftablesError> {
        let frontends: BTreeMap<Vec<u8>, BTreeSet<Vec<u8>>> = frontends
            .iter()
            .map(|(frontend, target)| {
                let values = endpoints(target.as_ref()).iter().map(ruleset::value);
                (ruleset::frontend_key(frontend), values.collect())
            })
            .collect();
        let map = ruleset::clients(is_ipv4);
        let mut result = Ok(());
        for _ in 0..ATTEMPTS {
            let mut batch = Batch::new(self.ruleset.name());
            let listed = self.socket.list(&message::list_elements(self.ruleset.name(), map), |answer| {
                for (key, value) in message::elements(answer) {
                    let frontend = ruleset::frontend_of(is_ipv4, key);
                    let endpoints = frontend.and_then(|frontend| frontends.get(frontend));
                    if endpoints.is_some_and(|endpoints| !endpoints.contains(value)) {
                        batch.delete_element(map, key);
                    }
                }
            });
            listed.map_err(NftablesError::Socket)?;
            if batch.is_empty() {
                return Ok(());
            }
            // One of them may have been forgotten meanwhile: then none is.
            result = self.socket.commit("forget clients", batch);
            if result.is_ok() {
                break;
            }
        }
        result
    }

    fn save(&mut self, now: Instant) {
        (self.save_at, self.saved_at) = (None, Some(now));
        self.writer.write(Write::VirtualServices(self.known.snapshot().encode_to_vec()));
    }
}

fn remembers(target: Option<&Target>) -> bool {
    matches!(target, Some(Target::Endpoints { affinity: Some(_), .. }))
}
