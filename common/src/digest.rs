//! A digest of a set of messages that two sides keep up as messages come and go, to find out whether they hold the same:
//! the sum, modulo 2^64, of the digests of all messages. It is against mistakes, not against an adversary.

use aws_lc_rs::digest::{self, SHA256};

/// The digest of one encoded message: the first 8 octets of its SHA-256, in network order.
pub fn of_message(encoded: &[u8]) -> u64 {
    let hash = digest::digest(&SHA256, encoded);
    hash.as_ref().iter().take(8).fold(0, |sum, octet| sum << 8 | u64::from(*octet))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_the_beginning_of_the_hash() {
        assert_eq!(of_message(b"abc"), 0xba78_16bf_8f01_cfea);
    }
}
