//! The relay itself: who is attached, where each is reached, and what becomes of every frame.
//! Sans-IO: datagrams, frames of streams, attachments and the time come in; verdicts on the same memory go out.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use muster_common::{
    frame::{Handle, Key},
    time::Instant,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rustc_hash::FxHashMap;
use uuid::Uuid;
use zeroize::Zeroizing;

mod batch;
mod forward;
mod hello;
mod rate;
mod refused;
mod session;
mod verdicts;

use rate::Rate;
use refused::Refused;
use session::{Device, SESSIONS_PER_DEVICE, Session};

pub use verdicts::{Arrival, Dropped, Drops, Forward, Greeting, To, Verdict, Verdicts};

/// How long a session lives on when its stream has ended, or a newer one of its device is in use: frames under way to
/// and from it still arrive.
pub const GRACE: Duration = Duration::from_secs(10);
/// How long an address is sent to after the last hello from it: four hellos are missed by then.
pub const SILENCE: Duration = Duration::from_secs(60);
/// Shortest frame: a header and WireGuard's shortest message. Nothing shorter is passed on, or answered.
pub const SHORTEST: usize = muster_common::frame::HEADER + 32;

/// How often a device may attach: so many times at once, and then once a second.
pub const ATTACHES: u64 = 20;

/// How much one director takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Devices attached at a time.
    pub devices: usize,
    /// Octets a second from one device, headers of frames included; 0: any.
    pub octets_per_second: u64,
    /// Octets that a device may send at once on top of that.
    pub burst: u64,
    /// Notices a second to strangers and unbound addresses, for each thread.
    pub unbound_per_second: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { devices: 100_000, octets_per_second: 125_000_000, burst: 16 << 20, unbound_per_second: 1_000 }
    }
}

/// Why a device cannot attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// The registrar does not want it.
    #[error("the registrar has refused this device: it was revoked or deleted")]
    Refused,
    /// As many devices as the director takes are attached.
    #[error("this director has as many devices as it takes; attach to another")]
    Full,
    /// The director is about to stop.
    #[error("this director is draining; attach to another")]
    Draining,
    /// A device whose uid begins alike is attached.
    #[error("another device with the same handle is attached; attach to another director")]
    HandleTaken,
    /// The device has attached many times in a short while.
    #[error("this device has attached many times in a short while; wait a few seconds")]
    TooOften,
}

/// What an attached device has to know.
pub struct Attached {
    /// In every frame. Never 0.
    pub session: u32,
    /// For hellos.
    pub key: Zeroizing<[u8; 32]>,
    /// What others address the device by.
    pub handle: Handle,
}

impl std::fmt::Debug for Attached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attached").field("handle", &self.handle).finish_non_exhaustive()
    }
}

/// How many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Devices with a session.
    pub devices: usize,
    /// Sessions, of which a device has several for a while when it attaches anew.
    pub sessions: usize,
    /// Sessions with an address that frames go to.
    pub bound: usize,
    /// Sessions with a stream.
    pub streams: usize,
    /// Devices that may not attach.
    pub refused: usize,
    /// Nobody may attach.
    pub is_draining: bool,
}

/// Everything a director knows of the devices attached to it.
#[derive(Debug)]
pub struct Relay {
    sessions: FxHashMap<u32, Session>,
    devices: FxHashMap<Handle, Device>,
    /// When to look at which session again: one entry at most for each.
    due: BTreeSet<(Instant, u32)>,
    refused: Refused,
    /// Sessions that ended otherwise than by [`Self::detach`], for the shell.
    ended: Vec<u32>,
    /// Counts attachments, so that it is known which is newer.
    attachments: u64,
    rng: StdRng,
    /// Of which proofs are made.
    secret: Key,
    rate: Rate,
    limits: Limits,
    is_draining: bool,
}

impl Relay {
    /// Nobody is attached. `seed` decides on sessions and keys: it must be unguessable.
    pub fn new(seed: [u8; 32], limits: Limits) -> Self {
        let mut rng = StdRng::from_seed(seed);
        let mut secret = Zeroizing::new([0; 32]);
        rng.fill_bytes(&mut *secret);
        Self {
            sessions: FxHashMap::default(),
            devices: FxHashMap::default(),
            due: BTreeSet::new(),
            refused: Refused::default(),
            ended: Vec::new(),
            attachments: 0,
            rng,
            secret: Key::new(&secret),
            rate: Rate::new(limits.octets_per_second, limits.burst),
            limits,
            is_draining: false,
        }
    }

    /// A session for `device`, which calls from `from`. Frames go on to its older session, if it has one, until the
    /// new one is reached: then the older lives for [`GRACE`] still.
    ///
    /// # Errors
    /// Whoever is refused keeps what it has.
    pub fn attach(&mut self, device: Uuid, from: IpAddr, now: Instant) -> Result<Attached, AttachError> {
        if self.refused.contains(&device, now) {
            return Err(AttachError::Refused);
        }
        if self.is_draining {
            return Err(AttachError::Draining);
        }
        let handle = Handle::of_device(device.as_bytes());
        let of_device = match self.devices.get(&handle) {
            Some(known) if known.uid != device => return Err(AttachError::HandleTaken),
            Some(known) if !Rate::new(1, ATTACHES).admits(1, &known.attaches, now) => {
                return Err(AttachError::TooOften);
            }
            Some(known) => known.sessions,
            None if self.devices.len() >= self.limits.devices => return Err(AttachError::Full),
            None => [0; SESSIONS_PER_DEVICE],
        };
        // It does not get another burst for coming anew.
        let known = || of_device.iter().filter_map(|session| self.sessions.get(session));
        let spent = known().map(Session::spent).max().unwrap_or(0);
        if !of_device.contains(&0) {
            // Of those that are not in use, the oldest.
            let current = self.devices.get(&handle).map_or(0, |device| device.current);
            let oldest = known().min_by_key(|session| (session.id == current, session.attachment));
            if let Some(oldest) = oldest.map(|session| session.id) {
                self.end(oldest);
                self.ended.push(oldest);
            }
        }
        let id = loop {
            let id = self.rng.next_u32();
            if id != 0 && !self.sessions.contains_key(&id) {
                break id;
            }
        };
        let mut key = Zeroizing::new([0; 32]);
        self.rng.fill_bytes(&mut *key);
        self.attachments += 1;
        let session = Session::new(id, device, handle, &key, from.to_canonical(), self.attachments, spent);
        self.sessions.insert(id, session);
        let known = self.devices.entry(handle).or_insert_with(|| Device::new(device));
        known.add(id);
        Ok(Attached { session: id, key, handle })
    }

    /// The stream that `session` was attached by has ended: it lives for [`GRACE`] still.
    pub fn detach(&mut self, session: u32, now: Instant) {
        self.expire(session, now);
    }

    /// `device` must not attach any more, and its sessions end at once.
    pub fn refuse(&mut self, device: Uuid, now: Instant) {
        self.refused.insert(device, now);
        let handle = Handle::of_device(device.as_bytes());
        let Some(known) = self.devices.get(&handle).filter(|known| known.uid == device) else { return };
        for session in known.sessions.into_iter().filter(|session| *session != 0) {
            self.end(session);
            self.ended.push(session);
        }
    }

    /// Whoever was refused may attach again, until that is said anew.
    pub fn forgive(&mut self) {
        self.refused.clear();
    }

    /// Sessions that have ended since this was last asked, otherwise than by [`Self::detach`]: their streams are to
    /// be closed.
    pub fn take_ended(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.ended)
    }

    /// `device` has opened a stream for the frames of `session`, or that stream has ended. `false`: it has no such
    /// session.
    ///
    /// Whoever opens one does so because UDP fails it: frames leave by the stream until a hello has shown that both
    /// ways are open.
    pub fn set_stream(&mut self, session: u32, device: Uuid, is_open: bool, now: Instant) -> bool {
        let Some(known) = self.sessions.get_mut(&session).filter(|known| known.device == device) else {
            return false;
        };
        known.has_stream = is_open;
        if is_open {
            known.endpoint = None;
        }
        self.settle(session, now);
        true
    }

    /// Nobody may attach from now on, and who is attached is told with every hello to go elsewhere.
    pub fn drain(&mut self) {
        self.is_draining = true;
    }

    /// When [`Self::handle_timeout`] is to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Ends what is to end by `now`: addresses without a hello for [`SILENCE`] and sessions whose [`GRACE`] is over.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some((at, id)) = self.due.first().copied()
            && at <= now
        {
            self.due.pop_first();
            let Some(session) = self.sessions.get_mut(&id) else { continue };
            session.due = None;
            if session.expires.is_some_and(|at| at <= now) {
                self.end(id);
                self.ended.push(id);
                continue;
            }
            if session.endpoint.is_some() && now - session.heard >= SILENCE {
                session.endpoint = None;
            }
            let (next, handle) = (session.deadline(), session.handle);
            if let Some(next) = next {
                self.look_again(id, next);
            }
            self.choose(handle);
        }
    }

    /// How many devices are attached.
    pub fn device_count(&self) -> usize {
        self.devices.len()
    }

    /// The devices attached, in order.
    pub fn devices(&self) -> Vec<Uuid> {
        let mut devices: Vec<_> = self.devices.values().map(|device| device.uid).collect();
        devices.sort_unstable();
        devices
    }

    /// The device of a session.
    pub fn device_of(&self, session: u32) -> Option<Uuid> {
        self.sessions.get(&session).map(|session| session.device)
    }

    /// How many there are.
    pub fn snapshot(&self) -> Snapshot {
        let count = |is: fn(&Session) -> bool| self.sessions.values().filter(|session| is(session)).count();
        Snapshot {
            devices: self.devices.len(),
            sessions: self.sessions.len(),
            bound: count(|session| session.endpoint.is_some()),
            streams: count(|session| session.has_stream),
            refused: self.refused.len(),
            is_draining: self.is_draining,
        }
    }

    /// Frames to the device of `handle` go to the newest of its sessions that is reached.
    fn choose(&mut self, handle: Handle) -> u32 {
        let Some(device) = self.devices.get_mut(&handle) else { return 0 };
        let reached =
            device.sessions.iter().filter_map(|id| self.sessions.get(id)).filter(|s| s.to().is_some());
        device.current = reached.max_by_key(|session| session.attachment).map_or(0, |session| session.id);
        device.current
    }

    /// `id` is reached, or in another way than before: its device's older sessions are not needed any more if frames go
    /// to it.
    fn settle(&mut self, id: u32, now: Instant) {
        let Some(session) = self.sessions.get(&id) else { return };
        let (handle, attachment) = (session.handle, session.attachment);
        if self.choose(handle) != id {
            return;
        }
        let others = self.devices.get(&handle).map_or([0; SESSIONS_PER_DEVICE], |device| device.sessions);
        for other in others {
            if self.sessions.get(&other).is_some_and(|other| other.attachment < attachment) {
                self.expire(other, now);
            }
        }
    }

    fn expire(&mut self, id: u32, now: Instant) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let at = session.expires.map_or(now + GRACE, |at| at.min(now + GRACE));
        session.expires = Some(at);
        self.look_again(id, at);
    }

    /// Looks at session `id` at `at`, if not sooner.
    fn look_again(&mut self, id: u32, at: Instant) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        match session.due {
            Some(due) if due <= at => return,
            Some(due) => drop(self.due.remove(&(due, id))),
            None => {}
        }
        session.due = Some(at);
        self.due.insert((at, id));
    }

    fn end(&mut self, id: u32) {
        let Some(session) = self.sessions.remove(&id) else { return };
        if let Some(due) = session.due {
            self.due.remove(&(due, id));
        }
        let Some(device) = self.devices.get_mut(&session.handle) else { return };
        device.remove(id);
        if device.is_empty() {
            self.devices.remove(&session.handle);
        } else {
            self.choose(session.handle);
        }
    }
}

#[cfg(test)]
mod tests;
