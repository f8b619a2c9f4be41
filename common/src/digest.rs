//! A digest of a set of messages that two sides keep up as messages come and go, to find out whether they hold the same:
//! the sum, modulo 2^64, of the digests of all messages. It is against mistakes, not against an adversary.

use aws_lc_rs::digest::{self, SHA256};

/// The digest of one encoded message: the first 8 octets of its SHA-256, in network order.
pub fn of_message(encoded: &[u8]) -> u64 {
    let hash = digest::digest(&SHA256, encoded);
    hash.as_ref().iter().take(8).fold(0, |sum, octet| sum << 8 | u64::from(*octet))
}

/// The digest of a set of encoded messages.
pub fn of_all(encoded: impl Iterator<Item = Vec<u8>>) -> u64 {
    encoded.fold(0, |sum, message| sum.wrapping_add(of_message(&message)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_the_beginning_of_the_hash() {
        assert_eq!(of_message(b"abc"), 0xba78_16bf_8f01_cfea);
        let twice = of_all([b"abc".to_vec(), b"abc".to_vec()].into_iter());
        assert_eq!(twice, 0xba78_16bf_8f01_cfea_u64.wrapping_mul(2));
    }
}
