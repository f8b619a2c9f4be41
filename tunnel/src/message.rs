//! Wire formats of the four messages (the paper, §5.4.2–5.4.7). Parsing checks type and length and borrows the
//! datagram; nothing here panics on any input.

/// Length of an initiation.
pub(crate) const INITIATION_LEN: usize = 148;
/// Length of a response.
pub(crate) const RESPONSE_LEN: usize = 92;
/// Length of a cookie reply.
pub(crate) const COOKIE_REPLY_LEN: usize = 64;
/// Length of the header before sealed data.
pub(crate) const DATA_HEADER_LEN: usize = 16;
/// Length of an authentication tag.
pub(crate) const TAG_LEN: usize = 16;
/// Length of `mac1`, `mac2` and of a cookie.
pub(crate) const MAC_LEN: usize = 16;
/// Length of the Noise part of an initiation: ephemeral, static, timestamp.
pub(crate) const NOISE_INITIATION_LEN: usize = 32 + (32 + TAG_LEN) + (12 + TAG_LEN);
/// Length of the Noise part of a response: ephemeral, nothing.
pub(crate) const NOISE_RESPONSE_LEN: usize = 32 + TAG_LEN;

const INITIATION: [u8; 4] = [1, 0, 0, 0];
const RESPONSE: [u8; 4] = [2, 0, 0, 0];
const COOKIE_REPLY: [u8; 4] = [3, 0, 0, 0];
const DATA: [u8; 4] = [4, 0, 0, 0];

/// A datagram by its type.
#[derive(Debug)]
pub(crate) enum Message<'a> {
    Initiation(Initiation<'a>),
    Response(Response<'a>),
    CookieReply(CookieReply<'a>),
    Data(DataHeader),
}

/// Type 1: the first message of a handshake.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Initiation<'a>(pub(crate) &'a [u8; INITIATION_LEN]);

/// Type 2: the answer to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Response<'a>(pub(crate) &'a [u8; RESPONSE_LEN]);

/// Type 3: a cookie, under load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CookieReply<'a>(pub(crate) &'a [u8; COOKIE_REPLY_LEN]);

/// Type 4: sealed data; the octets after the header are opened in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DataHeader {
    pub(crate) receiver: u32,
    pub(crate) counter: u64,
}

/// The little-endian number at `at`; 0 beyond the end, which no caller asks for.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

impl<'a> Message<'a> {
    /// Reads type and length; `None` if either is not WireGuard's.
    pub(crate) fn parse(datagram: &'a [u8]) -> Option<Self> {
        match *datagram.first_chunk::<4>()? {
            INITIATION => datagram.try_into().ok().map(Initiation).map(Self::Initiation),
            RESPONSE => datagram.try_into().ok().map(Response).map(Self::Response),
            COOKIE_REPLY => datagram.try_into().ok().map(CookieReply).map(Self::CookieReply),
            DATA if datagram.len() >= DATA_HEADER_LEN + TAG_LEN => {
                let counter = u64::from_le_bytes(*datagram.get(8..)?.first_chunk()?);
                Some(Self::Data(DataHeader { receiver: u32_at(datagram, 4), counter }))
            }
            _ => None,
        }
    }
}

impl<'a> Initiation<'a> {
    pub(crate) fn sender(self) -> u32 {
        u32_at(self.0, 4)
    }

    pub(crate) fn noise(self) -> &'a [u8] {
        &self.0[8..8 + NOISE_INITIATION_LEN]
    }

    /// The message with empty macs.
    pub(crate) fn build(sender: u32, noise: &[u8; NOISE_INITIATION_LEN]) -> [u8; INITIATION_LEN] {
        let mut message = [0; INITIATION_LEN];
        message[..4].copy_from_slice(&INITIATION);
        message[4..8].copy_from_slice(&sender.to_le_bytes());
        message[8..8 + NOISE_INITIATION_LEN].copy_from_slice(noise);
        message
    }
}

impl<'a> Response<'a> {
    pub(crate) fn sender(self) -> u32 {
        u32_at(self.0, 4)
    }

    pub(crate) fn receiver(self) -> u32 {
        u32_at(self.0, 8)
    }

    pub(crate) fn noise(self) -> &'a [u8] {
        &self.0[12..12 + NOISE_RESPONSE_LEN]
    }

    /// The message with empty macs.
    pub(crate) fn build(sender: u32, receiver: u32, noise: &[u8; NOISE_RESPONSE_LEN]) -> [u8; RESPONSE_LEN] {
        let mut message = [0; RESPONSE_LEN];
        message[..4].copy_from_slice(&RESPONSE);
        message[4..8].copy_from_slice(&sender.to_le_bytes());
        message[8..12].copy_from_slice(&receiver.to_le_bytes());
        message[12..12 + NOISE_RESPONSE_LEN].copy_from_slice(noise);
        message
    }
}

impl<'a> CookieReply<'a> {
    pub(crate) fn receiver(self) -> u32 {
        u32_at(self.0, 4)
    }

    pub(crate) fn nonce(self) -> &'a [u8] {
        &self.0[8..32]
    }

    /// The sealed cookie and its tag.
    pub(crate) fn sealed(self) -> (&'a [u8], &'a [u8]) {
        self.0[32..].split_at(MAC_LEN)
    }

    pub(crate) fn build(
        receiver: u32,
        nonce: &[u8; 24],
        sealed: &[u8; MAC_LEN],
        tag: &[u8],
    ) -> [u8; COOKIE_REPLY_LEN] {
        let mut message = [0; COOKIE_REPLY_LEN];
        message[..4].copy_from_slice(&COOKIE_REPLY);
        message[4..8].copy_from_slice(&receiver.to_le_bytes());
        message[8..32].copy_from_slice(nonce);
        message[32..48].copy_from_slice(sealed);
        for (to, from) in message[48..].iter_mut().zip(tag) {
            *to = *from;
        }
        message
    }
}

impl DataHeader {
    pub(crate) fn build(self) -> [u8; DATA_HEADER_LEN] {
        let mut header = [0; DATA_HEADER_LEN];
        header[..4].copy_from_slice(&DATA);
        header[4..8].copy_from_slice(&self.receiver.to_le_bytes());
        header[8..].copy_from_slice(&self.counter.to_le_bytes());
        header
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_built_parses() {
        let initiation = Initiation::build(0x0403_0201, &[9; NOISE_INITIATION_LEN]);
        match Message::parse(&initiation) {
            Some(Message::Initiation(m)) => {
                assert_eq!((m.sender(), m.noise()), (0x0403_0201, &[9; NOISE_INITIATION_LEN][..]));
            }
            other => panic!("{other:?}"),
        }
        let response = Response::build(7, 8, &[9; NOISE_RESPONSE_LEN]);
        match Message::parse(&response) {
            Some(Message::Response(m)) => {
                assert_eq!((m.sender(), m.receiver(), m.noise()), (7, 8, &[9; NOISE_RESPONSE_LEN][..]));
            }
            other => panic!("{other:?}"),
        }
        let reply = CookieReply::build(5, &[1; 24], &[2; 16], &[3; 16]);
        match Message::parse(&reply) {
            Some(Message::CookieReply(m)) => {
                assert_eq!(
                    (m.receiver(), m.nonce(), m.sealed()),
                    (5, &[1; 24][..], (&[2; 16][..], &[3; 16][..]))
                );
            }
            other => panic!("{other:?}"),
        }
        let header = DataHeader { receiver: 0xffff_fffe, counter: u64::MAX - 5 };
        let mut data = header.build().to_vec();
        assert!(Message::parse(&data).is_none(), "no room for a tag");
        data.extend([0; TAG_LEN]);
        assert!(matches!(Message::parse(&data), Some(Message::Data(h)) if h == header));
        data[1] = 1;
        assert!(Message::parse(&data).is_none(), "reserved octets must be zero");
    }

    proptest! {
        #[test]
        fn any_octets_parse_or_not(kind in 0u8..6, mut octets in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Message::parse(&octets);
            for (to, from) in octets.iter_mut().zip([kind, 0, 0, 0]) {
                *to = from;
            }
            let parsed = Message::parse(&octets);
            prop_assert_eq!(parsed.is_some(), match (kind, octets.len()) {
                (1, INITIATION_LEN) | (2, RESPONSE_LEN) | (3, COOKIE_REPLY_LEN) => true,
                (4, n) => n >= 32,
                _ => false,
            });
        }
    }
}
