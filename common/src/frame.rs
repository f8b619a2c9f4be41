//! Frames between agents and directors: 16 octets before each of the tunnel's messages that a director relays, and
//! the hellos that keep an agent's flow to it alive. Whoever reads them here has checked form; MACs are asked for.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    hmac::{self, HMAC_SHA256},
};

/// Octets before the message in a frame of data.
pub const HEADER: usize = 16;
/// Octets of a hello.
pub const HELLO: usize = 64;
/// Octets of a welcome: no more than of the hello that it answers.
pub const WELCOME: usize = 64;
/// Octets of the notices [`unbound`] and [`unreachable`].
pub const NOTICE: usize = 16;
/// Octets of the largest batch of frames on the TCP path.
pub const BATCH: usize = 64 << 10;

// First octets. WireGuard's messages begin with 1 to 4, and RFC 7983 leaves 4 to 15 unassigned where STUN, DTLS and
// the like share a port.
const DATA: u8 = 5;
const HELLO_KIND: u8 = 6;
const WELCOME_KIND: u8 = 7;
const UNBOUND: u8 = 8;
const UNREACHABLE: u8 = 9;
const VERSION: u8 = 1;

const MAC_AT: usize = 48;
const HELLO_LABEL: &[u8] = b"muster hello v1";
const WELCOME_LABEL: &[u8] = b"muster welcome v1";
const PROOF_LABEL: &[u8] = b"muster proof v1";

const IS_BOUND: u16 = 1;
const IS_DRAINING: u16 = 2;

/// Names a device to directors; the same at all of them, and for ever.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Handle(pub u64);

impl Handle {
    /// The first 8 octets of the device's uid: as good as random, since uids are UUIDs of version 4. Never 0.
    pub const fn of_device(uid: &[u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = *uid;
        match u64::from_be_bytes([a, b, c, d, e, f, g, h]) {
            0 => Self(1),
            handle => Self(handle),
        }
    }
}

/// What precedes a message that a director relays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DataHeader {
    /// The agent's attachment to the director that the frame goes to or comes from.
    pub session: u32,
    /// On the way to the director whom the message is for, on the way from it whom it is from.
    pub handle: Handle,
}

impl DataHeader {
    /// As it is sent.
    pub const fn octets(self) -> [u8; HEADER] {
        notice(DATA, self.session, self.handle.0)
    }

    /// The header of `frame`, if it is a frame of data.
    pub const fn parse(frame: &[u8]) -> Option<Self> {
        match frame.first_chunk() {
            Some(&[DATA, 0, 0, 0, a, b, c, d, e, f, g, h, i, j, k, l]) => Some(Self {
                session: u32::from_be_bytes([a, b, c, d]),
                handle: Handle(u64::from_be_bytes([e, f, g, h, i, j, k, l])),
            }),
            _ => None,
        }
    }
}

/// What agents and directors send one another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Frame<'a> {
    /// A message of the tunnel, to be relayed or relayed.
    Data(DataHeader, &'a [u8]),
    /// To a director: the agent is here.
    Hello(Hello<'a>),
    /// A director's answer to a hello.
    Welcome(Welcome<'a>),
    /// From a director: it does not know the session, or not from this address. A hello mends it, or shows that the
    /// session is dead. Not authenticated: it must cause no more than that.
    Unbound {
        /// As in the frame that it answers.
        session: u32,
    },
    /// From a director: no device of this handle is attached. Not authenticated.
    Unreachable(DataHeader),
}

/// What `datagram` is; `None` if it is none of ours, such as a message of WireGuard (1 to 4), or of a version that is
/// not known.
pub fn parse(datagram: &[u8]) -> Option<Frame<'_>> {
    match *datagram.first()? {
        DATA => Some(Frame::Data(DataHeader::parse(datagram)?, datagram.get(HEADER..)?)),
        HELLO_KIND => authenticated(datagram).map(|octets| Frame::Hello(Hello(octets))),
        WELCOME_KIND => authenticated(datagram).map(|octets| Frame::Welcome(Welcome(octets))),
        kind @ (UNBOUND | UNREACHABLE) => {
            let octets: [u8; NOTICE] = datagram.try_into().ok()?;
            let [_, rest @ ..] = octets;
            let mut as_data = [DATA; NOTICE];
            as_data[1..].copy_from_slice(&rest);
            let header = DataHeader::parse(&as_data)?;
            Some(match kind {
                UNBOUND => Frame::Unbound { session: header.session },
                _ => Frame::Unreachable(header),
            })
        }
        _ => None,
    }
}

/// The notice that a hello is due: to the sender of a frame or hello whose session is not known from where it came.
pub const fn unbound(session: u32) -> [u8; NOTICE] {
    notice(UNBOUND, session, 0)
}

/// The notice that no device with `header`'s handle is attached, for the agent of its session.
pub const fn unreachable(header: DataHeader) -> [u8; NOTICE] {
    notice(UNREACHABLE, header.session, header.handle.0)
}

const fn notice(kind: u8, session: u32, handle: u64) -> [u8; NOTICE] {
    let [a, b, c, d] = session.to_be_bytes();
    let [e, f, g, h, i, j, k, l] = handle.to_be_bytes();
    [kind, 0, 0, 0, a, b, c, d, e, f, g, h, i, j, k, l]
}

fn authenticated(datagram: &[u8]) -> Option<&[u8; HELLO]> {
    datagram.try_into().ok().filter(|octets: &&[u8; HELLO]| octets[1] == VERSION)
}

/// What authenticates hellos and welcomes of an attachment; also a director's own secret, for [`proof`].
#[derive(Clone)]
pub struct Key(hmac::Key);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// From 32 random octets.
    pub fn new(secret: &[u8; 32]) -> Self {
        Self(hmac::Key::new(HMAC_SHA256, secret))
    }

    /// HMAC-SHA-256 over all of `parts`, cut.
    fn mac<const N: usize>(&self, parts: &[&[u8]]) -> [u8; N] {
        let mut context = hmac::Context::with_key(&self.0);
        for part in parts {
            context.update(part);
        }
        let tag = context.sign();
        let mut cut = [0; N];
        cut.iter_mut().zip(tag.as_ref()).for_each(|(to, from)| *to = *from);
        cut
    }

    fn seal(&self, label: &[u8], octets: &mut [u8; HELLO]) {
        let (signed, mac) = octets.split_at_mut(MAC_AT);
        mac.copy_from_slice(&self.mac::<16>(&[label, signed]));
    }

    fn has_sealed(&self, label: &[u8], octets: &[u8; HELLO]) -> bool {
        let (signed, mac) = octets.split_at(MAC_AT);
        verify_slices_are_equal(&self.mac::<16>(&[label, signed]), mac).is_ok()
    }
}

/// A hello of the right form.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hello<'a>(&'a [u8; HELLO]);

impl Hello<'_> {
    /// Which attachment it speaks for.
    pub fn session(&self) -> u32 {
        u32_at(self.0, 4)
    }

    /// Rises from one hello of a session to the next: one that does not is a replay.
    pub fn counter(&self) -> u64 {
        u64_at(self.0, 8)
    }

    /// What the welcome asked to be sent back; 0 for none.
    pub fn proof(&self) -> u64 {
        u64_at(self.0, 16)
    }

    /// Whether it is from the one that has `key`. Nothing in it may be relied on otherwise.
    pub fn is_authentic(&self, key: &Key) -> bool {
        key.has_sealed(HELLO_LABEL, self.0)
    }
}

/// A welcome of the right form.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Welcome<'a>(&'a [u8; WELCOME]);

impl Welcome<'_> {
    /// Which attachment it speaks of.
    pub fn session(&self) -> u32 {
        u32_at(self.0, 4)
    }

    /// Of the hello that it answers.
    pub fn counter(&self) -> u64 {
        u64_at(self.0, 8)
    }

    /// Where the hello came from, as the director sees it.
    pub fn from(&self) -> SocketAddr {
        let address = u128::from(u64_at(self.0, 16)) << 64 | u128::from(u64_at(self.0, 24));
        SocketAddr::new(Ipv6Addr::from_bits(address).to_canonical(), u16_at(self.0, 32))
    }

    /// To be sent back in the next hello, unless the flow is bound.
    pub fn proof(&self) -> u64 {
        u64_at(self.0, 40)
    }

    /// What the director says of the flow, and of itself.
    pub fn flags(&self) -> Flags {
        let flags = u16_at(self.0, 2);
        Flags { is_bound: flags & IS_BOUND != 0, is_draining: flags & IS_DRAINING != 0 }
    }

    /// Whether it is from the one that has `key`. Nothing in it may be relied on otherwise.
    pub fn is_authentic(&self, key: &Key) -> bool {
        key.has_sealed(WELCOME_LABEL, self.0)
    }
}

/// Flags of a welcome.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flags {
    /// Frames of the session are taken from, and sent to, the address that the hello came from.
    pub is_bound: bool,
    /// The director is shutting down: use another one.
    pub is_draining: bool,
}

/// A hello; `counter` is above that of every earlier one of the session, `proof` as the last welcome had it, or 0.
pub fn hello(key: &Key, session: u32, counter: u64, proof: u64) -> [u8; HELLO] {
    let mut octets = begin(HELLO_KIND, session, counter);
    octets[16..24].copy_from_slice(&proof.to_be_bytes());
    key.seal(HELLO_LABEL, &mut octets);
    octets
}

/// The answer to `hello`, which came from `from`; `proof` is that of [`proof`], or 0 if none is asked for.
pub fn welcome(key: &Key, hello: &Hello<'_>, from: SocketAddr, proof: u64, flags: Flags) -> [u8; WELCOME] {
    let mut octets = begin(WELCOME_KIND, hello.session(), hello.counter());
    let bits = if flags.is_bound { IS_BOUND } else { 0 } | if flags.is_draining { IS_DRAINING } else { 0 };
    octets[2..4].copy_from_slice(&bits.to_be_bytes());
    octets[16..32].copy_from_slice(&mapped(from.ip()));
    octets[32..34].copy_from_slice(&from.port().to_be_bytes());
    octets[40..48].copy_from_slice(&proof.to_be_bytes());
    key.seal(WELCOME_LABEL, &mut octets);
    octets
}

/// What shows that an agent receives at `from`: known to the director alone, and to whoever receives there. Never 0.
/// The director keeps nothing meanwhile.
pub fn proof(secret: &Key, session: u32, from: SocketAddr) -> u64 {
    let parts: [&[u8]; 4] =
        [PROOF_LABEL, &session.to_be_bytes(), &mapped(from.ip()), &from.port().to_be_bytes()];
    u64::from_be_bytes(secret.mac::<8>(&parts)).max(1)
}

fn begin(kind: u8, session: u32, counter: u64) -> [u8; HELLO] {
    let mut octets = [0; HELLO];
    octets[0] = kind;
    octets[1] = VERSION;
    octets[4..8].copy_from_slice(&session.to_be_bytes());
    octets[8..16].copy_from_slice(&counter.to_be_bytes());
    octets
}

/// IPv4 as ::ffff:a.b.c.d.
fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn array_at<const N: usize>(octets: &[u8; HELLO], at: usize) -> [u8; N] {
    octets.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u16_at(octets: &[u8; HELLO], at: usize) -> u16 {
    u16::from_be_bytes(array_at(octets, at))
}

fn u32_at(octets: &[u8; HELLO], at: usize) -> u32 {
    u32::from_be_bytes(array_at(octets, at))
}

fn u64_at(octets: &[u8; HELLO], at: usize) -> u64 {
    u64::from_be_bytes(array_at(octets, at))
}

/// Appends `frame` to a batch of the TCP path, (length, frame)*; `false`, and nothing done, if it does not fit.
pub fn push_frame(batch: &mut Vec<u8>, frame: &[u8]) -> bool {
    let Ok(length) = u16::try_from(frame.len()) else { return false };
    if batch.len() + 2 + frame.len() > BATCH {
        return false;
    }
    batch.extend_from_slice(&length.to_be_bytes());
    batch.extend_from_slice(frame);
    true
}

/// The frames of a batch of the TCP path; ends at the first length that is more than what follows.
pub fn frames(batch: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = batch;
    std::iter::from_fn(move || {
        let (length, after) = rest.split_first_chunk()?;
        let (frame, after) = after.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
        rest = after;
        Some(frame)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> impl Strategy<Value = Key> {
        any::<[u8; 32]>().prop_map(|secret| Key::new(&secret))
    }

    fn address() -> impl Strategy<Value = SocketAddr> {
        let v6 = any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).to_canonical());
        let v4 = any::<[u8; 4]>().prop_map(IpAddr::from);
        (prop_oneof![v4, v6], any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(ip, port))
    }

    #[test]
    fn octets_are_as_documented() {
        let header = DataHeader { session: 0x0102_0304, handle: Handle(0x1112_1314_1516_1718) };
        let octets = [5, 0, 0, 0, 1, 2, 3, 4, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18];
        assert_eq!(header.octets(), octets);
        assert_eq!(unbound(header.session), [8, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((unreachable(header)[0], &unreachable(header)[1..]), (9, &octets[1..]));

        let key = Key::new(&[7; 32]);
        let sent = hello(&key, 0x0102_0304, 5, 6);
        assert_eq!(sent[..16], [6, 1, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 5]);
        assert_eq!(sent[16..48], [[0; 7].as_slice(), &[6], &[0; 24]].concat());
        let whole = hmac::sign(&hmac::Key::new(HMAC_SHA256, &[7; 32]), &[HELLO_LABEL, &sent[..48]].concat());
        assert_eq!(sent[48..], whole.as_ref()[..16]);

        let flags = Flags { is_bound: true, is_draining: true };
        let answer = welcome(&key, &Hello(&sent), "192.0.2.1:258".parse().unwrap(), 9, flags);
        assert_eq!(answer[..16], [7, 1, 0, 3, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 5]);
        assert_eq!(answer[16..34], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1, 1, 2]);
        assert_eq!(answer[34..48], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
    }

    #[test]
    fn handles_are_never_0() {
        assert_eq!(Handle::of_device(&[0; 16]), Handle(1));
        let uid = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
        assert_eq!(Handle::of_device(&uid), Handle(0x0102_0304_0506_0708));
    }

    #[test]
    fn other_versions_and_lengths_are_not_ours() {
        let header = DataHeader { session: 1, handle: Handle(2) };
        assert_eq!(parse(&header.octets()[..15]), None);
        let key = Key::new(&[7; 32]);
        for good in [unbound(1).to_vec(), unreachable(header).to_vec(), hello(&key, 1, 2, 3).to_vec()] {
            assert!(parse(&good).is_some());
            assert_eq!(parse(&good[..good.len() - 1]), None);
            assert_eq!(parse(&[good.as_slice(), &[0]].concat()), None);
            let mut version = good;
            version[1] ^= 2;
            assert_eq!(parse(&version), None);
        }
        for kind in (0..=4).chain(10..=255) {
            assert_eq!(parse(&[[kind].as_slice(), &[0; 63]].concat()), None);
        }
    }

    #[test]
    fn batches_hold_what_fits() {
        let mut batch = Vec::new();
        assert!(!push_frame(&mut batch, &[0; 65_536]) && batch.is_empty());
        assert!(push_frame(&mut batch, &[1; 65_000]));
        assert!(!push_frame(&mut batch, &[2; 533]) && batch.len() == 65_002);
        assert!(push_frame(&mut batch, &[2; 532]) && batch.len() == BATCH);
        assert!(!push_frame(&mut batch, &[]));
        assert_eq!(frames(&batch).map(<[u8]>::len).collect::<Vec<_>>(), [65_000, 532]);
    }

    proptest! {
        #[test]
        fn any_octets(mut octets in prop::collection::vec(any::<u8>(), 0..80), kind in 5u8..10, is_ours: bool) {
            if is_ours && let [first, version, ..] = octets.as_mut_slice() {
                (*first, *version) = (kind, u8::from(matches!(kind, 6 | 7)));
            }
            let key = Key::new(&[1; 32]);
            match parse(&octets) {
                Some(Frame::Data(header, message)) => {
                    prop_assert_eq!([header.octets().as_slice(), message].concat(), octets.as_slice());
                }
                Some(Frame::Hello(hello)) => prop_assert!(!hello.is_authentic(&key)),
                Some(Frame::Welcome(welcome)) => {
                    welcome.from();
                    prop_assert!(!welcome.is_authentic(&key));
                }
                Some(Frame::Unbound { .. } | Frame::Unreachable(_)) | None => {}
            }
            prop_assert!(frames(&octets).map(|frame| frame.len() + 2).sum::<usize>() <= octets.len());
        }

        #[test]
        fn notices_and_data_come_back(session: u32, handle: u64, message: Vec<u8>) {
            let header = DataHeader { session, handle: Handle(handle) };
            let frame = [header.octets().as_slice(), &message].concat();
            prop_assert_eq!(parse(&frame), Some(Frame::Data(header, &message)));
            let (of_session, of_handle) = (unbound(session), unreachable(header));
            prop_assert_eq!(parse(&of_session), Some(Frame::Unbound { session }));
            prop_assert_eq!(parse(&of_handle), Some(Frame::Unreachable(header)));
        }

        #[test]
        fn hellos_and_welcomes_come_back(
            key in key(), session: u32, counter: u64, token: u64, from in address(), is_bound: bool, is_draining: bool,
        ) {
            let sent = hello(&key, session, counter, token);
            let Some(Frame::Hello(hello)) = parse(&sent) else { panic!("{sent:?}") };
            prop_assert!(hello.is_authentic(&key));
            prop_assert_eq!((hello.session(), hello.counter(), hello.proof()), (session, counter, token));
            let flags = Flags { is_bound, is_draining };
            let sent = welcome(&key, &hello, from, token, flags);
            let Some(Frame::Welcome(welcome)) = parse(&sent) else { panic!("{sent:?}") };
            prop_assert!(welcome.is_authentic(&key));
            prop_assert_eq!((welcome.session(), welcome.counter(), welcome.proof()), (session, counter, token));
            prop_assert_eq!((welcome.from(), welcome.flags()), (from, flags));
        }

        #[test]
        fn macs_cover_every_bit(key in key(), other in key(), bit in 16usize..HELLO * 8, from in address()) {
            let flip = |mut octets: [u8; HELLO]| {
                octets[bit / 8] ^= 1 << (bit % 8);
                octets
            };
            let sent = hello(&key, 1, 2, 3);
            prop_assert!(!Hello(&flip(sent)).is_authentic(&key));
            prop_assert!(!Hello(&sent).is_authentic(&other));
            let answer = welcome(&key, &Hello(&sent), from, 3, Flags::default());
            prop_assert!(!Welcome(&flip(answer)).is_authentic(&key));
            // Neither can be taken for the other.
            prop_assert!(!Welcome(&sent).is_authentic(&key) && !Hello(&answer).is_authentic(&key));
        }

        #[test]
        fn proofs_are_of_one_session_and_address(secret in key(), session: u32, from in address(), port: u16) {
            let given = proof(&secret, session, from);
            prop_assert!(given != 0 && given == proof(&secret, session, from));
            prop_assert_ne!(given, proof(&secret, session ^ 1, from));
            prop_assume!(port != from.port());
            prop_assert_ne!(given, proof(&secret, session, SocketAddr::new(from.ip(), port)));
        }

        #[test]
        fn batches_come_back(sent in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..16)) {
            let mut batch = Vec::new();
            for frame in &sent {
                prop_assert!(push_frame(&mut batch, frame));
            }
            prop_assert_eq!(frames(&batch).collect::<Vec<_>>(), sent.iter().collect::<Vec<_>>());
            if batch.pop().is_some() {
                prop_assert_eq!(frames(&batch).count(), sent.len() - 1);
            }
        }
    }
}
