//! The fast path: answers to ordinary queries, encoded when something changes and copied when asked for. [`Table`]
//! is written to, [`Snapshot`] is asked, without lock, allocation or clock; what it does not know is the engine's.

mod encoded;
mod tree;

use std::{collections::BTreeMap, sync::Arc};

pub use encoded::{DEVICE_TYPES, Encoded, TYPES, encode, encode_types};
use encoded::{Lookup, Stored};
use hickory_proto::{op::ResponseCode, rr::RecordType};
use muster_common::name::{Domain, RESERVED};
use tree::Tree;

use crate::{
    engine::Outcome,
    message::{Transport, UDP_CEILING, UDP_MINIMUM},
    wire::{self, HEADER, NameHasher, OPT, Question},
};

/// What a zone says about names that are not in the table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ZoneAnswers {
    /// The network's domain.
    pub domain: Domain,
    /// Domain of the external zone, whose negative answers are the engine's.
    pub external_domain: Option<Domain>,
    /// Time to live of records, 0 to 3,600 seconds.
    pub ttl: u32,
    /// SOA serial.
    pub serial: u32,
    /// Whether a name that does not exist is denied and nothing else: no fallthrough, no completion.
    pub plain: bool,
    /// Whether every device of the zone is in the table.
    pub devices: bool,
    /// Whether every Service of the zone is in the table, with all names of its endpoints.
    pub services: bool,
}

/// Who asks. Strangers are the engine's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asker {
    /// Somebody who sees every network.
    Open,
    /// A device.
    Member {
        /// Its uid.
        uid: [u8; 16],
    },
}

const DENIES_DEVICES: u8 = 1;
const DENIES_SERVICES: u8 = 2;
const EXTERNAL: u8 = 4;

/// As the engine has them: longest TTL of an SOA; refresh, retry and expire, in seconds.
const SOA_TTL_MAX: u32 = 300;
const SOA_TIMES: [u32; 3] = [7200, 1800, 86_400];

/// The most queries that are warmed up for at a time.
const WARMED: usize = 64;

/// A zone as it is kept: network, TTL, serial, flags.
const ZONE: usize = 13;

/// Response, authoritative: QR and AA.
const QR: u8 = 0x80;
const AA: u8 = 0x04;
const CD: u8 = 0x10;

/// The table as it is written: one writer, any number of snapshots. A write costs as much as the copies of one leaf and
/// two nodes, or of the leaf alone if it follows another one without a snapshot in between.
pub struct Table {
    current: Snapshot,
    domains: BTreeMap<u32, Vec<Vec<u8>>>,
}

/// The table as it was when it was published.
#[derive(Clone)]
pub struct Snapshot {
    names: Tree,
    zones: Tree,
    members: Tree,
    hasher: NameHasher,
    loaded: bool,
}

const _: () = assert!(size_of::<Snapshot>() <= 40);

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

impl Table {
    /// An empty table, not loaded.
    pub fn new() -> Self {
        let (names, zones, members) = (Tree::default(), Tree::default(), Tree::default());
        let current = Snapshot { names, zones, members, hasher: NameHasher::random(), loaded: false };
        Self { current, domains: BTreeMap::new() }
    }

    /// The table as it is now.
    pub fn publish(&self) -> Arc<Snapshot> {
        Arc::new(self.current.clone())
    }

    /// Says whether the table holds everything by now: until then, nothing is denied from it.
    pub fn set_loaded(&mut self, loaded: bool) {
        self.current.loaded = loaded;
    }

    /// Sets what `name` (on the wire, in lower case: [`wire::encode_name`]) of network `network` answers.
    pub fn set(&mut self, name: &[u8], network: u32, answers: &Encoded) {
        let hash = self.current.hasher.hash(name);
        self.current.names.set(hash, name, &[&answers.store(network)]);
    }

    /// Takes out `name`; whether it was there.
    pub fn remove(&mut self, name: &[u8]) -> bool {
        self.current.names.remove(self.current.hasher.hash(name), name)
    }

    /// Sets the zone of `network`. Without it, no name of the network is answered.
    pub fn set_zone(&mut self, network: u32, zone: &ZoneAnswers) {
        let deny = |denied: bool, flag: u8| if zone.plain && denied { flag } else { 0 };
        let flags = deny(zone.devices, DENIES_DEVICES) | deny(zone.services, DENIES_SERVICES);
        let domains = [(Some(&zone.domain), flags), (zone.external_domain.as_ref(), EXTERNAL)];
        let domains = domains.into_iter().filter_map(|(domain, flags)| {
            domain.and_then(|domain| wire::encode_name(domain.as_str())).map(|domain| (domain, flags))
        });
        let (mut known, hasher) = (Vec::with_capacity(1), self.current.hasher);
        let old = self.domains.remove(&network).unwrap_or_default();
        for (domain, flags) in domains {
            let mut value = Vec::with_capacity(ZONE);
            for number in [network, zone.ttl, zone.serial] {
                value.extend(number.to_ne_bytes());
            }
            value.push(flags);
            self.current.zones.set(hasher.hash(&domain), &domain, &[&value]);
            known.push(domain);
        }
        for domain in old.into_iter().filter(|domain| !known.contains(domain)) {
            self.current.zones.remove(hasher.hash(&domain), &domain);
        }
        self.domains.insert(network, known);
    }

    /// Takes out the zone of `network`: its names are no longer answered, and should be removed.
    pub fn remove_zone(&mut self, network: u32) {
        for domain in self.domains.remove(&network).unwrap_or_default() {
            self.current.zones.remove(self.current.hasher.hash(&domain), &domain);
        }
    }

    /// Lets the device with this uid see what members of `network` see.
    pub fn set_member(&mut self, uid: [u8; 16], network: u32) {
        let hash = self.current.hasher.hash(&uid);
        self.current.members.set(hash, &uid, &[&network.to_ne_bytes()]);
    }

    /// Takes out a member; whether it was there.
    pub fn remove_member(&mut self, uid: [u8; 16]) -> bool {
        self.current.members.remove(self.current.hasher.hash(&uid), &uid)
    }

    /// Octets and number of the names' entries.
    pub fn names_size(&self) -> (usize, usize) {
        self.current.names.size()
    }
}

/// The zone that a name is in.
struct Zone<'a> {
    network: u32,
    ttl: u32,
    serial: u32,
    flags: u8,
    /// What stands left of the domain in the name, on the wire without an end.
    left: &'a [u8],
}

/// What is put behind the question.
struct Tail<'a> {
    answers: u16,
    authorities: u16,
    additionals: u16,
    parts: [&'a [u8]; 4],
}

impl Tail<'_> {
    const NONE: Self = Tail { answers: 0, authorities: 0, additionals: 0, parts: [&[]; 4] };
}

impl Snapshot {
    /// Gets what the answers to `queries` are copied from into the processor's cache, for all of them at a time: most
    /// of what a query costs is waiting for memory, one line after another.
    pub fn warm<'a>(&self, queries: impl Iterator<Item = &'a [u8]>) {
        let (mut hashes, mut count) = ([0; WARMED], 0);
        let questions = queries.filter_map(Question::parse);
        for (place, question) in hashes.iter_mut().zip(questions) {
            *place = self.hasher.hash(question.name());
            count += 1;
        }
        self.names.warm(hashes.get(..count).unwrap_or_default());
    }

    /// Answers `query`, writing the response over `out`. `None`: ask the engine, which writes the same octets wherever
    /// this answers.
    pub fn answer(
        &self,
        query: &[u8],
        asker: Asker,
        transport: Transport,
        out: &mut Vec<u8>,
    ) -> Option<Outcome> {
        let question = Question::parse(query)?;
        if !is_plain_type(question.qtype) || question.name().ends_with(b"\x04arpa\0") {
            return None;
        }
        let hash = self.hasher.hash(question.name());
        let zone = self.zone(question.name(), hash)?;
        let top = top_label(zone.left);
        // What is told to everybody.
        if zone.left.is_empty() || top == b"dns" {
            return None;
        }
        let reply = Reply { question: &question, query, transport };
        if let Asker::Member { uid } = asker {
            let network = self.members.get(self.hasher.hash(&uid), &uid)?;
            if network != zone.network.to_ne_bytes() {
                return reply.write(ResponseCode::Refused, &Tail::NONE, out);
            }
        }
        let name = question.name();
        let Some(value) = self.names.get(hash, name) else {
            return if self.denies(&zone, top) {
                reply.negative(ResponseCode::NXDomain, &zone, out)
            } else {
                None
            };
        };
        let stored = Stored::read(value)?;
        if stored.network != zone.network || (asker != Asker::Open && !stored.members) {
            return None;
        }
        match stored.look(question.qtype, question.capitals)? {
            Lookup::NoData if zone.flags & EXTERNAL == 0 && top != b"hostmaster" => {
                reply.negative(ResponseCode::NoError, &zone, out)
            }
            Lookup::NoData | Lookup::Slow => None,
            Lookup::Tail { answers, additionals, head, shared, record } => {
                let by = usize::from(question.id).checked_rem(usize::from(answers)).unwrap_or(0) * record;
                let (records, rest) = head.split_at_checked(record * usize::from(answers))?;
                let (last, first) = records.split_at_checked(by)?;
                let parts = [first, last, rest, shared];
                let tail = Tail { answers, authorities: 0, additionals, parts };
                reply.write(ResponseCode::NoError, &tail, out)
            }
        }
    }

    /// The zone with the longest domain at or above `name`, whose hash is `hash`.
    fn zone<'a>(&self, name: &'a [u8], mut hash: u64) -> Option<Zone<'a>> {
        let mut below = name;
        loop {
            if let Some(value) = self.zones.get(hash, below) {
                let &[n0, n1, n2, n3, t0, t1, t2, t3, s0, s1, s2, s3, flags] = value.first_chunk::<ZONE>()?;
                return Some(Zone {
                    network: u32::from_ne_bytes([n0, n1, n2, n3]),
                    ttl: u32::from_ne_bytes([t0, t1, t2, t3]),
                    serial: u32::from_ne_bytes([s0, s1, s2, s3]),
                    flags,
                    left: name.get(..name.len().checked_sub(below.len())?)?,
                });
            }
            (_, below) = wire::split_label(below)?;
            hash = self.hasher.hash(below);
        }
    }

    /// Whether a name that is not in the table certainly does not exist: a device's, a Service's or an endpoint's.
    fn denies(&self, zone: &Zone<'_>, top: &[u8]) -> bool {
        let ordinary = |octet: &u8| *octet < 64 || matches!(octet, b'a'..=b'z' | b'_');
        if !self.loaded || top == b"hostmaster" || !zone.left.iter().all(ordinary) {
            return false;
        }
        match labels(zone.left) {
            1 => {
                zone.flags & DENIES_DEVICES != 0
                    && !RESERVED.iter().any(|reserved| reserved.as_bytes() == top)
            }
            3 | 4 => zone.flags & DENIES_SERVICES != 0 && top == b"svc",
            _ => false,
        }
    }
}

/// Whether the type is one that names can have, and not a question of another kind (RFC 6895, 3.1).
fn is_plain_type(qtype: u16) -> bool {
    !matches!(qtype, 0 | 41 | 128..=255)
}

fn labels(mut left: &[u8]) -> usize {
    let mut count = 0;
    while let Some((_, rest)) = wire::split_label(left) {
        (count, left) = (count + 1, rest);
    }
    count
}

/// The last label of `left`, without its length.
fn top_label(mut left: &[u8]) -> &[u8] {
    let mut top: &[u8] = &[];
    while let Some((label, rest)) = wire::split_label(left) {
        (top, left) = (label, rest);
    }
    top
}

/// Writes responses to one query.
struct Reply<'a> {
    question: &'a Question,
    query: &'a [u8],
    transport: Transport,
}

impl Reply<'_> {
    /// Denies name or type, with the zone's SOA.
    fn negative(&self, code: ResponseCode, zone: &Zone<'_>, out: &mut Vec<u8>) -> Option<Outcome> {
        let place = u16::try_from(HEADER + zone.left.len()).ok().filter(|place| *place < 0x4000)?;
        let soa = soa(0xc000 | place, zone.ttl, zone.serial);
        let tail = Tail { authorities: 1, parts: [&soa, &[], &[], &[]], ..Tail::NONE };
        self.write(code, &tail, out)
    }

    /// Writes header, question, `tail` and, if the query has it, OPT. `None` if that is more than the client takes.
    fn write(&self, code: ResponseCode, tail: &Tail<'_>, out: &mut Vec<u8>) -> Option<Outcome> {
        let question = self.question;
        let opt = if question.edns.is_some() { OPT } else { 0 };
        let limit = match (self.transport, question.edns) {
            (Transport::Tcp | Transport::Tls, _) => u16::MAX,
            (Transport::Udp, None) => UDP_MINIMUM,
            (Transport::Udp, Some(edns)) => edns.size.clamp(UDP_MINIMUM, UDP_CEILING),
        };
        let start = self.query.get(HEADER..usize::from(question.end))?;
        let length = tail.parts.iter().map(|part| part.len()).sum::<usize>();
        if usize::from(question.end) + length + opt > usize::from(limit) {
            return None;
        }
        let authoritative = if code == ResponseCode::Refused { 0 } else { AA };
        let [id0, id1] = question.id.to_be_bytes();
        let [n0, n1] = tail.answers.to_be_bytes();
        let [s0, s1] = tail.authorities.to_be_bytes();
        let [r0, r1] = (tail.additionals + u16::from(question.edns.is_some())).to_be_bytes();
        let flags = QR | authoritative | u8::from(question.recursion_desired);
        let more = if question.checking_disabled { CD } else { 0 } | code.low();
        out.clear();
        out.extend_from_slice(&[id0, id1, flags, more, 0, 1, n0, n1, s0, s1, r0, r1]);
        out.extend_from_slice(start);
        tail.parts.iter().for_each(|part| out.extend_from_slice(part));
        if let Some(edns) = question.edns {
            let [u0, u1] = UDP_CEILING.to_be_bytes();
            let dnssec_ok = if edns.dnssec_ok { 0x80 } else { 0 };
            out.extend_from_slice(&[0, 0, 41, u0, u1, 0, 0, dnssec_ok, 0, 0, 0]);
        }
        Some(Outcome::Response { code, record_type: Some(RecordType::from(question.qtype)) })
    }
}

/// The SOA of a zone whose domain `pointer` leads to.
fn soa(pointer: u16, ttl: u32, serial: u32) -> [u8; 54] {
    let mut soa = *b"\xc0\0\0\x06\0\x01\0\0\0\0\0\x2a\x02ns\x03dns\xc0\0\x0ahostmaster\xc0\0\
                     \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let mut put = |at: usize, octets: &[u8]| {
        if let Some(place) = soa.get_mut(at..at + octets.len()) {
            place.copy_from_slice(octets);
        }
    };
    let pointer = pointer.to_be_bytes();
    put(0, &pointer);
    put(6, &ttl.min(SOA_TTL_MAX).to_be_bytes());
    put(19, &pointer);
    put(32, &pointer);
    for (at, number) in [(34, serial), (38, SOA_TIMES[0]), (42, SOA_TIMES[1]), (46, SOA_TIMES[2]), (50, ttl)]
    {
        put(at, &number.to_be_bytes());
    }
    soa
}
