//! What goes into the data path and what comes out of it. A batch's verdicts are collected in memory that is made once.

use std::{
    net::SocketAddr,
    ops::{Index, Range},
    sync::atomic::AtomicU64,
};

use muster_common::{datagram::Ecn, frame::NOTICE, time::Instant};

use super::rate::Rate;

/// Verdicts that there is room for at first: more than a batch of 64 runs of 64 datagrams can have.
const ROOM: usize = 4_096;

/// One received message: datagrams from one source, back to back, all but the last of equal length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Who sent it.
    pub from: SocketAddr,
    /// What its IP header says of congestion.
    pub ecn: Ecn,
    /// Octets of each datagram but the last, which is not longer.
    pub datagram_len: usize,
    /// Where it is in the buffer.
    pub range: Range<usize>,
}

/// Where frames leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// As datagrams, to this address.
    Udp(SocketAddr),
    /// By the stream of this session.
    Stream(u32),
}

/// Frames to pass on: a run of datagrams with one header, which has been rewritten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Where they leave.
    pub to: To,
    /// As it came.
    pub ecn: Ecn,
    /// Octets of each but the last.
    pub datagram_len: usize,
    /// Where they are in the buffer.
    pub range: Range<usize>,
}

/// A hello that is authentic and new, to be given to [`Relay::handle_hello`](super::Relay::handle_hello).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Who sent it.
    pub from: SocketAddr,
    /// Where it is in the buffer.
    pub range: Range<usize>,
}

/// Why a frame is not passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dropped {
    /// Not a frame, or none that agents send.
    Malformed,
    /// Of no session: a stranger's, or from before a restart.
    UnknownSession,
    /// Of a session whose address is another.
    NotBound,
    /// A hello that is forged, or that has come before.
    NotAuthentic,
    /// More than its device may send.
    RateLimited,
    /// The device that it is for is not attached, or not reached.
    Unreachable,
    /// To its own sender.
    ToItself,
    /// The stream or socket that it was to leave by is full.
    Full,
}

impl Dropped {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Malformed,
        Self::UnknownSession,
        Self::NotBound,
        Self::NotAuthentic,
        Self::RateLimited,
        Self::Unreachable,
        Self::ToItself,
        Self::Full,
    ];

    /// As metrics name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::UnknownSession => "unknown_session",
            Self::NotBound => "not_bound",
            Self::NotAuthentic => "not_authentic",
            Self::RateLimited => "rate_limited",
            Self::Unreachable => "unreachable",
            Self::ToItself => "to_itself",
            Self::Full => "full",
        }
    }
}

/// Frames that were dropped, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops([u64; Dropped::ALL.len()]);

impl Drops {
    /// Counts `frames`.
    pub fn add(&mut self, reason: Dropped, frames: u64) {
        if let Some(count) = self.0.get_mut(reason as usize) {
            *count += frames;
        }
    }

    /// Those that there are, with their reasons.
    pub fn iter(&self) -> impl Iterator<Item = (Dropped, u64)> {
        Dropped::ALL.into_iter().map(|reason| (reason, self[reason])).filter(|(_, count)| *count > 0)
    }
}

impl Index<Dropped> for Drops {
    type Output = u64;

    fn index(&self, reason: Dropped) -> &u64 {
        self.0.get(reason as usize).unwrap_or(&0)
    }
}

/// What becomes of a frame of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves; its header has been rewritten.
    Forward(To),
    /// It is dropped, and the sender may be told.
    Drop(Dropped, Option<[u8; NOTICE]>),
}

/// What becomes of a batch. Made once for each thread and reused: clearing keeps the memory.
#[derive(Debug)]
pub struct Verdicts {
    /// To be sent, in order.
    pub forwards: Vec<Forward>,
    /// To be answered with the relay at hand for writing.
    pub hellos: Vec<Greeting>,
    /// To be sent as they are.
    pub notices: Vec<(SocketAddr, [u8; NOTICE])>,
    /// To be sent back by the stream that the frames came from.
    pub told: Vec<[u8; NOTICE]>,
    /// What came to nothing.
    pub drops: Drops,
    pub(super) unbound: (Rate, AtomicU64),
}

impl Verdicts {
    /// None yet, but room for all of a batch of received messages. Strangers and unbound addresses are told so
    /// `unbound_per_second` times.
    pub fn new(unbound_per_second: u32) -> Self {
        Self {
            forwards: Vec::with_capacity(ROOM),
            hellos: Vec::with_capacity(ROOM),
            notices: Vec::with_capacity(ROOM),
            ..Self::of_stream(unbound_per_second)
        }
    }

    /// None yet, and no room, for what comes by streams.
    pub fn of_stream(unbound_per_second: u32) -> Self {
        let per_second = u64::from(unbound_per_second).max(1);
        Self {
            forwards: Vec::new(),
            hellos: Vec::new(),
            notices: Vec::new(),
            told: Vec::new(),
            drops: Drops::default(),
            unbound: (Rate::new(per_second, per_second), AtomicU64::new(0)),
        }
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.forwards.clear();
        self.hellos.clear();
        self.notices.clear();
        self.told.clear();
        self.drops = Drops::default();
    }

    /// Whether one more may be told that it is not bound.
    pub(super) fn admits_unbound(&self, now: Instant) -> bool {
        let (rate, spent) = &self.unbound;
        rate.admits(1, spent, now)
    }
}
