//! One attachment of a device, and the device with its attachments.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU64, Ordering},
};

use muster_common::{
    frame::{Handle, Key},
    time::Instant,
};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{SILENCE, To};

/// Most sessions of one device: the oldest goes when it attaches once more.
pub(super) const SESSIONS_PER_DEVICE: usize = 4;

/// What was agreed on when a device attached, and where it is reached by it.
pub(super) struct Session {
    pub(super) id: u32,
    pub(super) device: Uuid,
    pub(super) handle: Handle,
    /// Kept as octets: a keyed hash is twenty times as large, and hellos are rare.
    key: Zeroizing<[u8; 32]>,
    /// Number of the attachment; the higher, the newer.
    pub(super) attachment: u64,
    /// Where the device called from.
    pub(super) attached_from: IpAddr,
    /// Of the last hello that was taken.
    pub(super) counter: u64,
    /// Where its frames come from and go to.
    pub(super) endpoint: Option<SocketAddr>,
    /// When the last hello came from there.
    pub(super) heard: Instant,
    /// Its frames may come and go by a stream, too.
    pub(super) has_stream: bool,
    /// When it ends.
    pub(super) expires: Option<Instant>,
    /// Its entry among what is due.
    pub(super) due: Option<Instant>,
    /// Of octets, from the device.
    pub(super) octets: AtomicU64,
    /// Of notices, to the device.
    pub(super) notices: AtomicU64,
    /// Of hellos, from the device.
    pub(super) hellos: AtomicU64,
}

impl Session {
    pub(super) fn new(
        id: u32,
        device: Uuid,
        handle: Handle,
        key: &Zeroizing<[u8; 32]>,
        attached_from: IpAddr,
        attachment: u64,
        spent: u64,
    ) -> Self {
        Self {
            id,
            device,
            handle,
            key: key.clone(),
            attachment,
            attached_from,
            counter: 0,
            endpoint: None,
            heard: Instant::default(),
            has_stream: false,
            expires: None,
            due: None,
            octets: AtomicU64::new(spent),
            notices: AtomicU64::new(0),
            hellos: AtomicU64::new(0),
        }
    }

    pub(super) fn key(&self) -> Key {
        Key::new(&self.key)
    }

    /// What it has used of its rate.
    pub(super) fn spent(&self) -> u64 {
        self.octets.load(Ordering::Relaxed)
    }

    /// Where frames to it leave.
    pub(super) fn to(&self) -> Option<To> {
        self.endpoint.map(To::Udp).or_else(|| self.has_stream.then_some(To::Stream(self.id)))
    }

    /// When something ends by itself.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let silent = self.endpoint.map(|_| self.heard + SILENCE);
        self.expires.into_iter().chain(silent).min()
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("device", &self.device)
            .field("endpoint", &self.endpoint)
            .field("has_stream", &self.has_stream)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

/// A device and its sessions; 0 is none.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) uid: Uuid,
    /// Where frames to it go.
    pub(super) current: u32,
    pub(super) sessions: [u32; SESSIONS_PER_DEVICE],
    /// Of attachments.
    pub(super) attaches: AtomicU64,
}

impl Device {
    pub(super) fn new(uid: Uuid) -> Self {
        Self { uid, current: 0, sessions: [0; SESSIONS_PER_DEVICE], attaches: AtomicU64::new(0) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sessions == [0; SESSIONS_PER_DEVICE]
    }

    /// There must be room.
    pub(super) fn add(&mut self, session: u32) {
        if let Some(place) = self.sessions.iter_mut().find(|place| **place == 0) {
            *place = session;
        }
    }

    pub(super) fn remove(&mut self, session: u32) {
        for place in self.sessions.iter_mut().chain([&mut self.current]).filter(|place| **place == session) {
            *place = 0;
        }
    }
}
