//! What a name answers, encoded: for each type what follows the question in the response to a query spelled in lower
//! case. Pointers in it lead into the question, which has the same length in any spelling. The engine writes it.

use hickory_proto::{op::ResponseCode, rr::RecordType};

use crate::{
    directory::{Directory, Viewer},
    engine::{Engine, Outcome, QueryContext, Step},
    message::Transport,
    wire::{self, HEADER},
};

/// Types that a device's name has.
pub const DEVICE_TYPES: [RecordType; 3] = [RecordType::A, RecordType::AAAA, RecordType::SVCB];
/// Types that names have.
pub const TYPES: [RecordType; 6] =
    [RecordType::A, RecordType::AAAA, RecordType::SRV, RecordType::SVCB, RecordType::CNAME, RecordType::TXT];
/// Longest tail that is kept: what is longer is seldom asked for, and costs each write nearby.
const TAIL_MAX: usize = 4096;
/// A shorter common end of two tails is not worth sharing.
const SHARED_MIN: usize = 12;
/// Octets before the descriptors, and of each descriptor.
const HEAD: usize = 8;
const DESCRIPTOR: usize = 9;

/// Flags of a name.
const MEMBERS: u8 = 1;
const UNUSUAL: u8 = 2;
/// Flags of a descriptor: only the engine can answer; addresses begin at another one with each query; spelling of the
/// query matters; the shared end belongs to it.
const SLOW: u8 = 1;
const ROTATE: u8 = 2;
const SPELLED: u8 = 4;
const SHARED: u8 = 8;

/// The encoded answers of a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Encoded {
    /// Whether every member of the network may see the name; if not, members' queries are the engine's.
    pub members: bool,
    /// Whether all queries are the engine's.
    unusual: bool,
    tails: Vec<Tail>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Tail {
    record_type: u16,
    answers: u16,
    additionals: u16,
    flags: u8,
    octets: Vec<u8>,
}

/// Asks `engine` for everything that `name` (dotted) holds; `None` if it does not exist.
pub fn encode<D: Directory>(engine: &Engine<D>, name: &str) -> Option<Encoded> {
    encode_types(engine, name, &TYPES)
}

/// As [`encode`], where the name is known to have no other types than `types`.
pub fn encode_types<D: Directory>(engine: &Engine<D>, name: &str, types: &[RecordType]) -> Option<Encoded> {
    let name = wire::encode_name(name)?;
    let context = QueryContext { viewer: Viewer::Open, transport: Transport::Tcp, source: None };
    let mut query = Vec::with_capacity(HEADER + name.len() + 4);
    let mut out = Vec::with_capacity(512);
    let mut encoded = Encoded { members: true, unusual: false, tails: Vec::with_capacity(types.len()) };
    let mut missing = 0;
    for record_type in types {
        query.clear();
        query.extend([0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        query.extend(&name);
        query.extend(u16::from(*record_type).to_be_bytes());
        query.extend([0, 1]);
        match engine.begin(&query, &context, &mut out) {
            Step::Ask(upstream) if upstream.whole => missing += 1,
            Step::Ask(_) => encoded.tails.push(Tail::slow(*record_type)),
            Step::Done(Outcome::Response { code: ResponseCode::NXDomain, .. }) => missing += 1,
            Step::Done(Outcome::Response { code: ResponseCode::NoError, .. }) => {
                encoded.tails.extend(Tail::read(*record_type, query.len(), &out)?);
            }
            Step::Done(_) => encoded.unusual = true,
        }
    }
    if missing == types.len() {
        return None;
    }
    // Whether a name exists may depend on the type, or not be known yet: nothing is said about other types then.
    if missing > 0 || encoded.unusual {
        (encoded.unusual, encoded.tails) = (true, Vec::new());
    }
    Some(encoded)
}

impl Encoded {
    /// A name that is there, and whose answers are the engine's.
    pub fn unusual() -> Self {
        Self { members: true, unusual: true, tails: Vec::new() }
    }
}

impl Tail {
    fn slow(record_type: RecordType) -> Self {
        let record_type = u16::from(record_type);
        Self { record_type, answers: 0, additionals: 0, flags: SLOW, octets: Vec::new() }
    }

    /// The tail of `response`, whose question ends at `end`; `Some(None)` if there are no records of the type.
    fn read(record_type: RecordType, end: usize, response: &[u8]) -> Option<Option<Self>> {
        let &[_, _, flags, _, _, _, n0, n1, s0, s1, r0, r1] = response.first_chunk::<HEADER>()?;
        let octets = response.get(end..)?;
        let (answers, additionals) = (u16::from_be_bytes([n0, n1]), u16::from_be_bytes([r0, r1]));
        let plain = flags == 0x84 && octets.len() <= TAIL_MAX;
        if answers == 0 && plain && [s0, s1] == [0, 1] && additionals == 0 {
            return Some(None);
        }
        if !plain || [s0, s1] != [0, 0] || answers == 0 {
            return Some(Some(Self::slow(record_type)));
        }
        let mut flags = SPELLED;
        if let Some(size) = address_size(record_type) {
            // A CNAME before the addresses, or anything else, is not taken apart here.
            let records = octets.get(..size * usize::from(answers)).map(|records| records.chunks_exact(size));
            let kind = u16::from(record_type).to_be_bytes();
            let uniform =
                |record: &[u8]| record.starts_with(&[0xc0, HEADER as u8]) && record.get(2..4) == Some(&kind);
            if !records.is_some_and(|mut records| records.all(uniform)) {
                return Some(Some(Self::slow(record_type)));
            }
            flags = if answers > 1 { ROTATE } else { 0 };
        }
        let record_type = u16::from(record_type);
        Some(Some(Self { record_type, answers, additionals, flags, octets: octets.to_vec() }))
    }
}

/// Octets of an address record whose owner is a pointer.
fn address_size(record_type: RecordType) -> Option<usize> {
    match record_type {
        RecordType::A => Some(16),
        RecordType::AAAA => Some(28),
        _ => None,
    }
}

impl Encoded {
    /// As it is kept in the table: network, flags, descriptors, the shared end of A and AAAA, the tails.
    pub(super) fn store(&self, network: u32) -> Vec<u8> {
        let shared = match self.tails.as_slice() {
            [a, aaaa, ..] if a.record_type == 1 && aaaa.record_type == 28 => {
                let pairs = a.octets.iter().rev().zip(aaaa.octets.iter().rev());
                pairs.take_while(|(a, b)| a == b).count()
            }
            _ => 0,
        };
        let shared = if shared < SHARED_MIN { 0 } else { shared };
        let mut out = Vec::with_capacity(256);
        out.extend(network.to_ne_bytes());
        out.push(if self.members { MEMBERS } else { 0 } | if self.unusual { UNUSUAL } else { 0 });
        out.push(self.tails.len() as u8);
        out.extend((shared as u16).to_ne_bytes());
        let mut heads = Vec::new();
        for (position, tail) in self.tails.iter().enumerate() {
            let shares = shared > 0 && position < 2;
            let head = tail.octets.len() - if shares { shared } else { 0 };
            for number in [tail.record_type, tail.answers, tail.additionals, head as u16] {
                out.extend(number.to_ne_bytes());
            }
            out.push(tail.flags | if shares { SHARED } else { 0 });
            heads.push(tail.octets.get(..head).unwrap_or_default());
        }
        let end = self.tails.first().map_or(&[][..], |tail| tail.octets.as_slice());
        out.extend(end.get(end.len().saturating_sub(shared)..).unwrap_or_default());
        heads.into_iter().for_each(|head| out.extend(head));
        out
    }
}

/// A stored name.
pub(super) struct Stored<'a> {
    pub(super) network: u32,
    pub(super) members: bool,
    unusual: bool,
    rest: &'a [u8],
    types: usize,
    shared: usize,
}

/// What a stored name has for a type.
pub(super) enum Lookup<'a> {
    Slow,
    NoData,
    Tail { answers: u16, additionals: u16, head: &'a [u8], shared: &'a [u8], record: usize },
}

impl<'a> Stored<'a> {
    pub(super) fn read(value: &'a [u8]) -> Option<Self> {
        let (&[n0, n1, n2, n3, flags, types, s0, s1], rest) = value.split_first_chunk::<HEAD>()?;
        Some(Self {
            network: u32::from_ne_bytes([n0, n1, n2, n3]),
            members: flags & MEMBERS != 0,
            unusual: flags & UNUSUAL != 0,
            rest,
            types: usize::from(types),
            shared: usize::from(u16::from_ne_bytes([s0, s1])),
        })
    }

    /// What there is for `wanted`; `capitals`: whether the query is spelled with some. `record` is the size of the
    /// records to rotate, 0 for none.
    pub(super) fn look(&self, wanted: u16, capitals: bool) -> Option<Lookup<'a>> {
        if self.unusual {
            return Some(Lookup::Slow);
        }
        let (descriptors, rest) = self.rest.split_at_checked(self.types * DESCRIPTOR)?;
        let (shared, heads) = rest.split_at_checked(self.shared)?;
        let mut at = 0;
        for &[t0, t1, n0, n1, r0, r1, l0, l1, flags] in descriptors.as_chunks::<DESCRIPTOR>().0 {
            let length = usize::from(u16::from_ne_bytes([l0, l1]));
            if u16::from_ne_bytes([t0, t1]) != wanted {
                at += length;
                continue;
            }
            if flags & SLOW != 0 || (capitals && flags & SPELLED != 0) {
                return Some(Lookup::Slow);
            }
            let record =
                if flags & ROTATE == 0 { 0 } else { address_size(RecordType::from(wanted)).unwrap_or(0) };
            return Some(Lookup::Tail {
                answers: u16::from_ne_bytes([n0, n1]),
                additionals: u16::from_ne_bytes([r0, r1]),
                head: heads.get(at..at + length)?,
                shared: if flags & SHARED != 0 { shared } else { &[] },
                record,
            });
        }
        Some(Lookup::NoData)
    }
}
