//! Probes of a path: sealed messages whose inner packet has IP version 0, so that other implementations drop them.

/// Octets of the inner packet.
pub(crate) const LEN: usize = 32;

const REQUEST: u8 = 1;
const ANSWER: u8 = 2;

/// What one side asks on a path, and the other answers on the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PathProbe {
    Request(u64),
    Answer(u64),
}

impl PathProbe {
    pub(crate) fn octets(self) -> [u8; LEN] {
        let (kind, nonce) = match self {
            Self::Request(nonce) => (REQUEST, nonce),
            Self::Answer(nonce) => (ANSWER, nonce),
        };
        let mut octets = [0; LEN];
        octets[0] = kind;
        octets[8..16].copy_from_slice(&nonce.to_be_bytes());
        octets
    }

    /// Reads an inner packet. What follows the nonce is left to later versions.
    #[inline]
    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        let [kind @ (REQUEST | ANSWER), 0, 0, 0, 0, 0, 0, 0, rest @ ..] = packet.first_chunk::<LEN>()? else {
            return None;
        };
        let nonce = u64::from_be_bytes(*rest.first_chunk()?);
        Some(if *kind == REQUEST { Self::Request(nonce) } else { Self::Answer(nonce) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn probes_are_read_as_they_were_written(nonce in any::<u64>(), octets in prop::collection::vec(any::<u8>(), 0..48)) {
            for probe in [PathProbe::Request(nonce), PathProbe::Answer(nonce)] {
                prop_assert_eq!(PathProbe::parse(&probe.octets()), Some(probe));
                prop_assert_eq!(PathProbe::parse(&probe.octets()[..31]), None);
            }
            if let Some(probe) = PathProbe::parse(&octets) {
                prop_assert_eq!(&probe.octets()[..16], &octets[..16]);
            }
        }
    }
}
