//! One response as the cache keeps it: in wire format, without OPT, with the places of its TTLs, so that
//! answering from the cache is copying and patching.

use std::net::IpAddr;

use hickory_proto::{
    op::{Message, Metadata, ResponseCode},
    rr::{Name, RData},
};
use muster_dns::{
    message::{Request, Response, Transport, UDP_CEILING, UDP_MINIMUM},
    wire::{OPT, Question},
};

/// The AD flag, in the fourth octet of a message.
const AD: u8 = 0x20;
/// Octets of a message header.
const HEADER: usize = 12;
/// Time to live of everything in a stale answer, in seconds (RFC 8767, 4).
const STALE_TTL: u32 = 30;
/// EDNS option "extended DNS error" saying "stale answer" (RFC 8914, 4.4): code, length, info code.
const STALE_ANSWER: [u8; 6] = [0, 15, 0, 2, 0, 3];

/// Why a response cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the response: {0}")]
pub(super) struct StoredError(String);

/// A response, ready to be sent to whoever asks the same question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Stored {
    wire: Box<[u8]>,
    /// Where in `wire` the TTLs are.
    ttls: Box<[u16]>,
    /// For how long the response holds, in seconds; `None` if it says nothing of that.
    pub(super) ttl: Option<u32>,
    /// Whether the response says that there is no such name, or nothing of the type at it.
    pub(super) negative: bool,
    pub(super) code: ResponseCode,
}

/// How old a stored response is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Age {
    /// It still holds, and has been kept for so many seconds.
    Fresh(u32),
    /// It holds no longer, but there is nothing newer.
    Stale,
    /// The name is known to have changed since, but there is nothing newer.
    Outdated,
}

impl Age {
    /// Whether it holds no longer.
    pub(super) fn is_stale(self) -> bool {
        !matches!(self, Self::Fresh(_))
    }
}

impl Stored {
    /// Keeps `message`; times to live are cut at `ttl_max` seconds.
    pub(super) fn new(message: Message, ttl_max: u32) -> Result<Self, StoredError> {
        let mut response = Response {
            metadata: message.metadata,
            question: message.queries.into_iter().next(),
            answers: message.answers,
            authorities: message.authorities,
            additionals: message.additionals,
            edns: None,
        };
        response.metadata.truncation = false;
        let sections = [&mut response.answers, &mut response.authorities, &mut response.additionals];
        for record in sections.into_iter().flatten() {
            record.ttl = record.ttl.min(ttl_max);
        }
        let error = |e: hickory_proto::ProtoError| StoredError(e.to_string());
        let mut wire = Vec::with_capacity(512);
        response.encode(u16::MAX, &mut wire).map_err(error)?;
        Self::from_wire(wire.into(), &response)
    }

    /// Takes up again what [`Self::wire`] gave.
    pub(super) fn restore(wire: Box<[u8]>) -> Result<Self, StoredError> {
        let message = Message::from_vec(&wire).map_err(|e| StoredError(e.to_string()))?;
        if message.edns.is_some() || message.queries.len() != 1 {
            return Err(StoredError("it is not one of ours".into()));
        }
        Self::new(message, u32::MAX)
    }

    fn from_wire(wire: Box<[u8]>, response: &Response) -> Result<Self, StoredError> {
        let ttls = ttl_places(&wire).ok_or_else(|| StoredError("its records do not add up".into()))?;
        let code = response.metadata.response_code;
        let records = || response.answers.iter().chain(&response.authorities).chain(&response.additionals);
        let soa = response.authorities.iter().find_map(|record| match &record.data {
            RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
            _ => None,
        });
        let ttl = match code {
            // A CNAME whose target has no such record is negative too, and has an SOA.
            ResponseCode::NoError if !response.answers.is_empty() => {
                records().map(|record| record.ttl).chain(soa).min()
            }
            // RFC 2308, 5: without an SOA, nothing is to be kept.
            ResponseCode::NoError | ResponseCode::NXDomain => {
                soa.map(|ttl| records().map(|record| record.ttl).fold(ttl, u32::min))
            }
            _ => None,
        };
        let negative = response.answers.is_empty() || code == ResponseCode::NXDomain;
        Ok(Self { wire, ttls, ttl, negative, code })
    }

    /// Whether it says what there is, or that there is nothing. Any other code says of the server that it cannot tell.
    pub(super) fn is_answer(&self) -> bool {
        matches!(self.code, ResponseCode::NoError | ResponseCode::NXDomain)
    }

    /// The response in wire format.
    pub(super) fn wire(&self) -> &[u8] {
        &self.wire
    }

    /// The response, parsed.
    pub(super) fn message(&self) -> Result<Message, StoredError> {
        Message::from_vec(&self.wire).map_err(|e| StoredError(e.to_string()))
    }

    /// Octets that the response takes in memory, not counting what the cache needs to find it.
    pub(super) fn size(&self) -> usize {
        size_of::<Self>() + self.wire.len() + size_of_val(&*self.ttls)
    }

    /// The addresses in the Answer section.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let answers = self.wire.get(6..8).and_then(<[u8]>::first_chunk).map_or(0, |n| u16::from_be_bytes(*n));
        self.ttls.iter().take(answers.into()).filter_map(|place| {
            let place = usize::from(*place);
            // Type and class stand before the TTL, length and data behind it.
            let (fixed, data) = self.wire.get(place.checked_sub(4)?..)?.split_first_chunk::<10>()?;
            match *fixed {
                [0, 1, 0, 1, _, _, _, _, 0, 4] => data.first_chunk::<4>().map(|a| IpAddr::from(*a)),
                [0, 28, 0, 1, _, _, _, _, 0, 16] => data.first_chunk::<16>().map(|a| IpAddr::from(*a)),
                _ => None,
            }
        })
    }

    /// Writes the response, kept for so many `seconds`, to the ordinary query `query` whose `question` is the stored
    /// one. `false`, and nothing of use in `out`, if it does not fit.
    pub(super) fn write_ordinary(
        &self,
        (query, question): (&[u8], &Question),
        transport: Transport,
        seconds: u32,
        out: &mut Vec<u8>,
    ) -> bool {
        let limit = match (transport, question.edns) {
            (Transport::Tcp | Transport::Tls, _) => u16::MAX,
            (Transport::Udp, None) => UDP_MINIMUM,
            (Transport::Udp, Some(edns)) => edns.size.clamp(UDP_MINIMUM, UDP_CEILING),
        };
        let opt_size = if question.edns.is_some() { OPT } else { 0 };
        if self.wire.len() + opt_size > usize::from(limit) {
            return false;
        }
        out.clear();
        out.extend_from_slice(&self.wire);
        for place in self.ttls.iter().map(|place| usize::from(*place)) {
            if let Some(ttl) = out.get_mut(place..).and_then(<[u8]>::first_chunk_mut::<4>) {
                *ttl = u32::from_be_bytes(*ttl).saturating_sub(seconds).to_be_bytes();
            }
        }
        let end = usize::from(question.end);
        let (Some(asked), Some(written)) = (query.get(HEADER..end), out.get_mut(HEADER..end)) else {
            return false;
        };
        if !written.eq_ignore_ascii_case(asked) {
            return false;
        }
        written.copy_from_slice(asked);
        let wants_ad = query.get(3).is_some_and(|flags| flags & AD != 0);
        let wants_ad = wants_ad || question.edns.is_some_and(|edns| edns.dnssec_ok);
        let authentic = if wants_ad { self.wire.get(3).map_or(0, |flags| flags & AD) } else { 0 };
        if let Some(header) = out.first_chunk_mut::<12>() {
            let [id_high, id_low] = question.id.to_be_bytes();
            let cd = if question.checking_disabled { 0x10 } else { 0 };
            let [.., count_high, count_low] = *header;
            let count = u16::from_be_bytes([count_high, count_low]);
            let [count_high, count_low] =
                count.saturating_add(u16::from(question.edns.is_some())).to_be_bytes();
            let [first, second, third, fourth, .., high, low] = header;
            (*first, *second) = (id_high, id_low);
            *third = 0x80 | u8::from(question.recursion_desired);
            *fourth = 0x80 | authentic | cd | self.code.low();
            (*high, *low) = (count_high, count_low);
        }
        if let Some(edns) = question.edns {
            let [high, low] = UDP_CEILING.to_be_bytes();
            let flags = if edns.dnssec_ok { 0x80 } else { 0 };
            out.extend_from_slice(&[0, 0, 41, high, low, 0, 0, flags, 0, 0, 0]);
        }
        true
    }

    /// Writes the response to `request`, which asks the stored question, over `out`.
    pub(super) fn write(&self, request: &Request, transport: Transport, age: Age, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(&self.wire);
        let ttl_of = |stored: u32| match age {
            Age::Fresh(seconds) => stored.saturating_sub(seconds),
            Age::Stale | Age::Outdated => STALE_TTL,
        };
        for place in self.ttls.iter().map(|place| usize::from(*place)) {
            if let Some(ttl) = out.get_mut(place..).and_then(<[u8]>::first_chunk_mut::<4>) {
                *ttl = ttl_of(u32::from_be_bytes(*ttl)).to_be_bytes();
            }
        }
        spell(&request.question.name, out);
        let stale = age.is_stale() && request.edns.is_some();
        let opt = request.edns.as_ref().map(|edns| opt(edns.flags().dnssec_ok, stale));
        let size = out.len() + opt.as_ref().map_or(0, Vec::len);
        if size > usize::from(request.max_size(transport)) {
            return self.write_truncated(request, transport, out);
        }
        if let Some(opt) = opt {
            out.extend_from_slice(&opt);
            if let Some(count) = out.get_mut(10..).and_then(<[u8]>::first_chunk_mut::<2>) {
                *count = (u16::from_be_bytes(*count).saturating_add(1)).to_be_bytes();
            }
        }
        let metadata = self.metadata(request);
        patch_header(&metadata, out);
    }

    /// The rare case: something has to be left out. `out` holds the whole response.
    fn write_truncated(&self, request: &Request, transport: Transport, out: &mut Vec<u8>) {
        let mut response = request.response(self.code);
        if let Ok(message) = Message::from_vec(out) {
            response.answers = message.answers;
            response.authorities = message.authorities;
            response.additionals = message.additionals;
            response.metadata = self.metadata(request);
        } else {
            response.metadata.response_code = ResponseCode::ServFail;
        }
        if response.encode(request.max_size(transport), out).is_err() {
            out.clear();
        }
    }

    fn metadata(&self, request: &Request) -> Metadata {
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.recursion_available = true;
        metadata.response_code = self.code;
        // RFC 6840, 5.7 and 5.8: AD is for those who ask for it.
        let wanted = request.metadata.authentic_data
            || request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok);
        metadata.authentic_data = wanted && self.wire.get(3).is_some_and(|flags| flags & 0x20 != 0);
        metadata
    }
}

/// Id and flags of a response.
fn patch_header(metadata: &Metadata, out: &mut [u8]) {
    let Some(header) = out.first_chunk_mut::<4>() else { return };
    let [id_high, id_low] = metadata.id.to_be_bytes();
    let flag = |set: bool, bit: u8| if set { 1_u8 << bit } else { 0 };
    let first = 0x80 | flag(metadata.authoritative, 2) | flag(metadata.recursion_desired, 0);
    let second = flag(metadata.recursion_available, 7)
        | flag(metadata.authentic_data, 5)
        | flag(metadata.checking_disabled, 4)
        | metadata.response_code.low();
    *header = [id_high, id_low, first, second];
}

/// An OPT record (RFC 6891, 6.1.2).
fn opt(dnssec_ok: bool, stale: bool) -> Vec<u8> {
    let [high, low] = UDP_CEILING.to_be_bytes();
    let flags = if dnssec_ok { 0x80 } else { 0 };
    let options: &[u8] = if stale { &STALE_ANSWER } else { &[] };
    let length = if stale { 6 } else { 0 };
    let mut opt = vec![0, 0, 41, high, low, 0, 0, flags, 0, 0, length];
    opt.extend_from_slice(options);
    opt
}

/// Spells the question, and thereby every name that points at it, as `name` is spelled. Names are equal but for
/// case, so that nothing moves.
fn spell(name: &Name, out: &mut [u8]) {
    let mut place = HEADER;
    for label in name.iter() {
        let Some(written) = out.get_mut(place + 1..).and_then(|rest| rest.get_mut(..label.len())) else {
            return;
        };
        if !written.eq_ignore_ascii_case(label) {
            return;
        }
        written.copy_from_slice(label);
        place += 1 + label.len();
    }
}

/// The places of all TTLs in `wire`; `None` if it is not a message that ends where it should.
fn ttl_places(wire: &[u8]) -> Option<Box<[u16]>> {
    let count = |at: usize| wire.get(at..)?.first_chunk().map(|c| usize::from(u16::from_be_bytes(*c)));
    let (questions, records) = (count(4)?, count(6)? + count(8)? + count(10)?);
    let mut at = HEADER;
    for _ in 0..questions {
        at = skip_name(wire, at)? + 4;
    }
    let mut places = Vec::with_capacity(records.min(wire.len() / 11));
    for _ in 0..records {
        at = skip_name(wire, at)?;
        places.push(u16::try_from(at + 4).ok()?);
        at += 10 + count(at + 8)?;
    }
    (at == wire.len()).then(|| places.into())
}

/// The place behind the name at `at`.
fn skip_name(wire: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *wire.get(at)? {
            0 => return Some(at + 1),
            length if length & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}
