//! The Internet checksum (RFC 1071), by vectors of 64-bit words and, where packets are copied, in the same pass.

/// A one's complement sum that has not been folded to 16 bits yet.
///
/// Words are added in the machine's own byte order, which a one's complement sum permits (RFC 1071 §2(B)); what goes
/// in and what comes out is in network order. What is added must start at an even offset of the summed octets, so
/// that only the last part may be of odd length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Sum(u64);

/// Two halves of each of four words: as many sums as two vectors of SSE2 or NEON registers hold, side by side.
type Lanes = [u64; 8];
const BLOCK: usize = 32;

impl Sum {
    /// The sum of nothing.
    pub const ZERO: Self = Self(0);

    /// The sum of `octets`, with a zero behind them if they are of odd length.
    #[inline]
    pub fn of(octets: &[u8]) -> Self {
        Self::ZERO.octets(octets)
    }

    /// Adds octets.
    #[inline]
    pub fn octets(self, octets: &[u8]) -> Self {
        let (blocks, rest) = octets.as_chunks::<BLOCK>();
        let mut lanes = Lanes::default();
        for block in blocks {
            add_block(&mut lanes, block);
        }
        Self(self.0 + lanes.iter().sum::<u64>() + sum_words(rest))
    }

    /// Copies `from` to `to`, which is as long, and adds it.
    ///
    /// # Panics
    /// If the lengths differ.
    #[inline]
    pub fn copy(self, from: &[u8], to: &mut [u8]) -> Self {
        assert_eq!(from.len(), to.len(), "copied to a place of another length");
        let (blocks, rest) = from.as_chunks::<BLOCK>();
        let (to_blocks, to_rest) = to.as_chunks_mut::<BLOCK>();
        let mut lanes = Lanes::default();
        for (block, to) in blocks.iter().zip(to_blocks) {
            *to = *block;
            add_block(&mut lanes, block);
        }
        to_rest.copy_from_slice(rest);
        Self(self.0 + lanes.iter().sum::<u64>() + sum_words(rest))
    }

    /// Adds a field of 16 bits.
    #[inline]
    pub fn u16(self, value: u16) -> Self {
        Self(self.0 + u64::from(value.to_be()))
    }

    /// Adds a field of 32 bits.
    #[inline]
    pub fn u32(self, value: u32) -> Self {
        Self(self.0 + u64::from(value.to_be()))
    }

    /// The sum in 16 bits: what stands in the checksum field while the rest is still to be added.
    #[inline]
    pub fn folded(self) -> [u8; 2] {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        (sum as u16).to_ne_bytes()
    }

    /// The checksum: the complement of the sum.
    #[inline]
    pub fn checksum(self) -> [u8; 2] {
        let [a, b] = self.folded();
        [!a, !b]
    }

    /// The checksum where a zero would say "none" (RFC 768): the other zero of one's complement instead.
    #[inline]
    pub fn nonzero_checksum(self) -> [u8; 2] {
        match self.checksum() {
            [0, 0] => [0xff, 0xff],
            checksum => checksum,
        }
    }

    /// Whether the sum is that of octets with a valid checksum among them.
    #[inline]
    pub fn is_valid(self) -> bool {
        self.folded() == [0xff, 0xff]
    }
}

#[inline(always)]
fn add_block(lanes: &mut Lanes, block: &[u8; BLOCK]) {
    let (low, high) = lanes.split_at_mut(4);
    let (words, _) = block.as_chunks::<8>();
    for ((low, high), word) in low.iter_mut().zip(high).zip(words) {
        let word = u64::from_ne_bytes(*word);
        *low += word & 0xffff_ffff;
        *high += word >> 32;
    }
}

/// Of fewer octets than a block.
#[inline(always)]
fn sum_words(octets: &[u8]) -> u64 {
    let (words, rest) = octets.as_chunks::<4>();
    let sum = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum::<u64>();
    let mut last = [0; 4];
    match *rest {
        [a] => last[0] = a,
        [a, b] => [last[0], last[1]] = [a, b],
        [a, b, c] => [last[0], last[1], last[2]] = [a, b, c],
        _ => {}
    }
    sum + u64::from(u32::from_ne_bytes(last))
}
