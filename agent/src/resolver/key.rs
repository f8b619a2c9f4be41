//! What a cached response answers, in the form in which it is looked up: the name on the wire in lower case, the type,
//! and the flags that change what a resolver answers.

use std::{borrow::Borrow, ops::Deref};

use hickory_proto::{
    rr::{Name, RecordType},
    serialize::binary::{BinDecodable, BinDecoder},
};
use muster_dns::{
    message::Request,
    wire::{NAME_MAX, Question, split_label},
};

/// Octets behind the name: the type and the flags.
const TAIL: usize = 3;
const DNSSEC_OK: u8 = 1;
const CHECKING_DISABLED: u8 = 2;

/// A question as the cache knows it. It borrows as the octets that [`Probe`] has, too.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Key(Box<[u8]>);

impl Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl Deref for Key {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Key {
    pub(super) fn of(request: &Request) -> Self {
        let dnssec_ok = request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok);
        let name = &request.question.name;
        Self::new(name, request.record_type(), dnssec_ok, request.metadata.checking_disabled)
    }

    pub(super) fn new(
        name: &Name,
        record_type: RecordType,
        dnssec_ok: bool,
        checking_disabled: bool,
    ) -> Self {
        let mut octets = wire_name(name);
        octets.extend_from_slice(&tail(record_type.into(), dnssec_ok, checking_disabled));
        Self(octets.into())
    }

    /// The name on the wire, in lower case.
    pub(super) fn wire_name(&self) -> &[u8] {
        self.0.get(..self.0.len().saturating_sub(TAIL)).unwrap_or_default()
    }

    /// The name, in lower case.
    pub(super) fn name(&self) -> Name {
        Name::read(&mut BinDecoder::new(self.wire_name())).unwrap_or_default()
    }

    pub(super) fn record_type(&self) -> RecordType {
        let [high, low, _] = self.tail();
        u16::from_be_bytes([high, low]).into()
    }

    pub(super) fn dnssec_ok(&self) -> bool {
        let [_, _, flags] = self.tail();
        flags & DNSSEC_OK != 0
    }

    pub(super) fn checking_disabled(&self) -> bool {
        let [_, _, flags] = self.tail();
        flags & CHECKING_DISABLED != 0
    }

    fn tail(&self) -> [u8; TAIL] {
        self.0.last_chunk().copied().unwrap_or_default()
    }
}

fn tail(record_type: u16, dnssec_ok: bool, checking_disabled: bool) -> [u8; TAIL] {
    let [high, low] = record_type.to_be_bytes();
    let flag = |set, flag| if set { flag } else { 0 };
    [high, low, flag(dnssec_ok, DNSSEC_OK) | flag(checking_disabled, CHECKING_DISABLED)]
}

/// The octets of a [`Key`] on the stack, to look up an ordinary question with.
pub(super) struct Probe {
    octets: [u8; NAME_MAX + TAIL],
    length: usize,
}

impl Probe {
    pub(super) fn of(question: &Question) -> Self {
        let name = question.name();
        let mut probe = Self { octets: [0; NAME_MAX + TAIL], length: name.len() + TAIL };
        let dnssec_ok = question.edns.is_some_and(|edns| edns.dnssec_ok);
        let tail = tail(question.qtype, dnssec_ok, question.checking_disabled);
        if let Some((to, rest)) = probe.octets.split_at_mut_checked(name.len()) {
            to.copy_from_slice(name);
            if let Some(to) = rest.first_chunk_mut() {
                *to = tail;
            }
        }
        probe
    }

    pub(super) fn octets(&self) -> &[u8] {
        self.octets.get(..self.length).unwrap_or_default()
    }
}

/// `name` on the wire, in lower case.
pub(super) fn wire_name(name: &Name) -> Vec<u8> {
    let mut wire = Vec::with_capacity(name.len() + 2 + TAIL);
    for label in name.iter() {
        wire.push(u8::try_from(label.len()).unwrap_or(0));
        wire.extend(label.iter().map(u8::to_ascii_lowercase));
    }
    wire.push(0);
    wire
}

/// Whether `name` is `zone` or below it, both on the wire and in lower case.
pub(super) fn is_below(mut name: &[u8], zone: &[u8]) -> bool {
    loop {
        if name.len() <= zone.len() {
            return name == zone;
        }
        let Some((_, rest)) = split_label(name) else { return false };
        name = rest;
    }
}

#[cfg(test)]
mod tests {
    use muster_dns::message::{Parsed, parse};

    use super::*;

    #[test]
    fn a_probe_finds_the_key_of_the_same_question() {
        let query =
            b"\0\0\x01\x10\0\x01\0\0\0\0\0\x01\x03wEb\x07eXample\0\0\x21\0\x01\0\0\x29\x04\xd0\0\0\x80\0\0\0";
        let Parsed::Request(request) = parse(query) else { panic!("a request") };
        let key = Key::of(&request);
        assert_eq!(Probe::of(&Question::parse(query).unwrap()).octets(), &*key);
        assert_eq!(key.wire_name(), b"\x03web\x07example\0");
        assert_eq!((key.name().to_ascii().as_str(), key.record_type()), ("web.example.", RecordType::SRV));
        assert!(key.dnssec_ok() && key.checking_disabled());
    }

    #[test]
    fn names_are_below_at_labels_only() {
        let zone = b"\x07example\0";
        assert!(is_below(zone, zone) && is_below(b"\x03web\x07example\0", zone) && is_below(zone, b"\0"));
        assert!(!is_below(b"\x0bweb\x07example\0", zone) && !is_below(b"\0", zone));
    }
}
