//! Ordinary queries, read without allocation: [`Question::parse`] takes what nearly every client sends and leaves
//! the rest to [`crate::message`]. Names are handled as on the wire, in lower case, and hashed with [`NameHasher`].

use std::hash::{BuildHasher, RandomState};

/// Octets of a message header.
pub const HEADER: usize = 12;
/// Octets of an OPT record without options.
pub const OPT: usize = 11;
/// Longest name on the wire (RFC 1035, 2.3.4).
pub const NAME_MAX: usize = 255;

const CLASS_IN: u16 = 1;
const TYPE_OPT: u16 = 41;
/// Options whose content hickory-proto checks: queries with them are not ordinary.
const CHECKED_OPTIONS: [u16; 2] = [3, 8];

const FLAG_RD: u8 = 0x01;
const FLAG_CD: u8 = 0x10;
const FLAG_AD: u8 = 0x20;
const FLAG_DO: u16 = 0x8000;

/// What the OPT record of a query says (RFC 6891), version 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OrdinaryEdns {
    /// Largest UDP response that the client takes, in octets, as it says.
    pub size: u16,
    /// The DO flag.
    pub dnssec_ok: bool,
}

/// The question of an ordinary query.
#[derive(Clone, Debug)]
pub struct Question {
    /// The query's id.
    pub id: u16,
    /// The type asked for.
    pub qtype: u16,
    /// Where the question ends in the query: all before is header and question.
    pub end: u16,
    /// EDNS of the query, if it has any.
    pub edns: Option<OrdinaryEdns>,
    /// The RD flag.
    pub recursion_desired: bool,
    /// The CD flag.
    pub checking_disabled: bool,
    /// Whether the query spelled the name with a capital letter.
    pub capitals: bool,
    /// Number of labels, without the root's.
    pub labels: u8,
    length: u8,
    name: [u8; NAME_MAX],
}

const _: () = assert!(size_of::<Question>() <= 272);

impl Question {
    /// Reads `query`, if it is an ordinary one: a standard query for one name in class IN, uncompressed, with RD,
    /// AD and CD as the only flags, nothing else but an OPT record of version 0, and nothing behind.
    pub fn parse(query: &[u8]) -> Option<Self> {
        let (header, rest) = query.split_first_chunk::<HEADER>()?;
        let &[id0, id1, flags, more, 0, 1, 0, 0, 0, 0, 0, additional] = header else { return None };
        if flags & !FLAG_RD != 0 || more & !(FLAG_CD | FLAG_AD) != 0 || additional > 1 {
            return None;
        }
        let mut name = [0; NAME_MAX];
        let (length, labels, capitals) = read_name(rest, &mut name)?;
        let (fixed, rest) = rest.get(length..)?.split_first_chunk::<4>()?;
        let &[t0, t1, c0, c1] = fixed;
        if u16::from_be_bytes([c0, c1]) != CLASS_IN {
            return None;
        }
        let edns = match additional {
            0 if rest.is_empty() => None,
            1 => Some(read_opt(rest)?),
            _ => return None,
        };
        Some(Self {
            id: u16::from_be_bytes([id0, id1]),
            qtype: u16::from_be_bytes([t0, t1]),
            end: u16::try_from(HEADER + length + fixed.len()).ok()?,
            edns,
            recursion_desired: flags & FLAG_RD != 0,
            checking_disabled: more & FLAG_CD != 0,
            capitals,
            labels,
            length: u8::try_from(length).ok()?,
            name,
        })
    }

    /// The name on the wire, with the root's label, in lower case.
    pub fn name(&self) -> &[u8] {
        self.name.get(..usize::from(self.length)).unwrap_or_default()
    }
}

/// Copies the name that `wire` begins with into `name`, in lower case. Returns its length, the number of its labels
/// and whether there were capital letters.
fn read_name(wire: &[u8], name: &mut [u8; NAME_MAX]) -> Option<(usize, u8, bool)> {
    let (mut at, mut labels) = (0, 0);
    loop {
        let length = usize::from(*wire.get(at)?);
        match length {
            0 => break,
            1..=63 => labels += 1,
            _ => return None,
        }
        at += 1 + length;
        if at >= NAME_MAX {
            return None;
        }
    }
    let length = at + 1;
    let (from, to) = (wire.get(..length)?, name.get_mut(..length)?);
    // Lengths are below b'A', so that the whole name can be folded at once.
    let mut capitals = false;
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_ascii_lowercase();
        capitals |= to != from;
    }
    Some((length, labels, capitals))
}

/// Reads an OPT record that ends the message.
fn read_opt(record: &[u8]) -> Option<OrdinaryEdns> {
    let (fixed, mut options) = record.split_first_chunk::<OPT>()?;
    let &[0, t0, t1, s0, s1, 0, 0, f0, f1, l0, l1] = fixed else { return None };
    let (flags, length) = (u16::from_be_bytes([f0, f1]), u16::from_be_bytes([l0, l1]));
    if u16::from_be_bytes([t0, t1]) != TYPE_OPT
        || flags & !FLAG_DO != 0
        || options.len() != usize::from(length)
    {
        return None;
    }
    while !options.is_empty() {
        let (&[c0, c1, l0, l1], rest) = options.split_first_chunk::<4>()?;
        if CHECKED_OPTIONS.contains(&u16::from_be_bytes([c0, c1])) {
            return None;
        }
        options = rest.get(usize::from(u16::from_be_bytes([l0, l1]))..)?;
    }
    Some(OrdinaryEdns { size: u16::from_be_bytes([s0, s1]), dnssec_ok: flags & FLAG_DO != 0 })
}

/// `name` (dotted, with or without the last dot) on the wire, in lower case; `None` if it has an empty or overlong
/// label or is too long.
pub fn encode_name(name: &str) -> Option<Vec<u8>> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let mut wire = Vec::with_capacity(name.len() + 2);
    if !name.is_empty() {
        for label in name.split('.') {
            if !(1..=63).contains(&label.len()) {
                return None;
            }
            wire.push(u8::try_from(label.len()).ok()?);
            wire.extend(label.bytes().map(|octet| octet.to_ascii_lowercase()));
        }
    }
    wire.push(0);
    (wire.len() <= NAME_MAX).then_some(wire)
}

/// Splits the first label off a name on the wire; `None` at the root.
pub fn split_label(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&length, rest) = name.split_first()?;
    if length == 0 { None } else { rest.split_at_checked(usize::from(length)) }
}

/// A hash over short octet strings by multiplying and folding, with a seed that differs between processes. It is
/// fast, not cryptographic: whoever uses it bounds what a collision costs.
#[derive(Clone, Copy, Debug)]
pub struct NameHasher {
    seed: u64,
}

impl NameHasher {
    /// A hasher with a random seed.
    pub fn random() -> Self {
        Self { seed: RandomState::new().hash_one(0u64) }
    }

    /// The hash of `octets`, all of whose bits are usable.
    pub fn hash(self, octets: &[u8]) -> u64 {
        let mut hash = self.seed ^ (octets.len() as u64);
        let (pairs, rest) = octets.as_chunks::<16>();
        for pair in pairs {
            let (low, high) = halves(*pair);
            hash = fold(low ^ hash, high ^ MULTIPLIERS.0);
        }
        let mut last = [0; 16];
        if let Some(last) = last.get_mut(..rest.len()) {
            last.copy_from_slice(rest);
        }
        let (low, high) = halves(last);
        fold(fold(low ^ hash, high ^ MULTIPLIERS.0) ^ self.seed, MULTIPLIERS.1)
    }
}

/// Odd numbers without a pattern: digits of π.
const MULTIPLIERS: (u64, u64) = (0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7345);

fn halves(pair: [u8; 16]) -> (u64, u64) {
    let pair = u128::from_le_bytes(pair);
    (pair as u64, (pair >> 64) as u64)
}

fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &[u8] =
        b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x01\x03WeB\x03net\x07example\x00\x00\x01\x00\x01\
          \x00\x00\x29\x10\x00\x00\x00\x80\x00\x00\x0c\x00\x0a\x00\x08abcdefgh";

    #[test]
    fn an_ordinary_query_is_read() {
        let question = Question::parse(QUERY).unwrap();
        assert_eq!(question.name(), b"\x03web\x03net\x07example\x00");
        assert_eq!((question.id, question.qtype, question.labels, question.end), (0x1234, 1, 3, 33));
        assert!(question.recursion_desired && !question.checking_disabled && question.capitals);
        assert_eq!(question.edns, Some(OrdinaryEdns { size: 4096, dnssec_ok: true }));
    }

    #[test]
    fn anything_else_is_not() {
        for cut in 0..QUERY.len() {
            assert!(Question::parse(QUERY.get(..cut).unwrap()).is_none(), "{cut}");
        }
        assert!(Question::parse(&[QUERY, b"x"].concat()).is_none());
        // Response, opcode, TC, counts, a pointer, class, owner and version of OPT, client subnet.
        for (at, value) in [
            (2, 0x81),
            (2, 0x11),
            (2, 3),
            (3, 1),
            (5, 2),
            (7, 1),
            (9, 1),
            (11, 2),
            (12, 0xc0),
            (32, 3),
            (33, 1),
        ]
        .into_iter()
        .chain([(39, 1), (38, 1), (41, 1), (45, 8), (47, 9)])
        {
            let mut query = QUERY.to_vec();
            *query.get_mut(at).unwrap() = value;
            assert!(Question::parse(&query).is_none(), "{at}");
        }
        let long =
            [&QUERY[..12], &[b"\x3f".as_slice(), &[b'a'; 63]].concat().repeat(4), b"\0\0\x01\0\x01"].concat();
        assert!(Question::parse(&long).is_none());
    }

    #[test]
    fn names_are_encoded_and_split() {
        let wire = encode_name("Web.net.example.").unwrap();
        assert_eq!(wire, b"\x03web\x03net\x07example\x00");
        assert_eq!(split_label(&wire), Some((b"web".as_slice(), b"\x03net\x07example\x00".as_slice())));
        assert_eq!((encode_name(""), split_label(b"\0")), (Some(vec![0]), None));
        assert!(encode_name("a..b").is_none() && encode_name(&"a.".repeat(128)).is_none());
    }

    #[test]
    fn hashes_spread_over_all_bits() {
        let hasher = NameHasher::random();
        let mut buckets = [[0u32; 256]; 8];
        for number in 0..65_536 {
            let name = encode_name(&format!("dev-{number}.net.example")).unwrap();
            for (buckets, byte) in buckets.iter_mut().zip(hasher.hash(&name).to_le_bytes()) {
                buckets[usize::from(byte)] += 1;
            }
        }
        assert!(buckets.as_flattened().iter().all(|&n| (128..400).contains(&n)));
    }
}
