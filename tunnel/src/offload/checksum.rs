//! The Internet checksum (RFC 1071), by vectors of 64-bit words and, where packets are copied, in the same pass.

/// A one's complement sum that has not been folded to 16 bits yet.
///
/// Words are added in the machine's own byte order, which a one's complement sum permits (RFC 1071 §2(B)); what goes
/// in and what comes out is in network order. What is added must start at an even offset of the summed octets, so
/// that only the last part may be of odd length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Sum(u64);

/// Octets that are summed at once: two vectors of SSE2 or NEON.
const BLOCK: usize = 32;

/// Sums of the words of a block and of their upper halves, side by side.
///
/// A word is not split: the sum of the lower halves is what remains once the upper ones are taken from the sum of all,
/// even if that has overflowed. That saves a quarter of the work.
#[derive(Clone, Copy, Default)]
struct Lanes {
    words: [u64; 4],
    upper: [u64; 4],
}

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
        // Headers in place, payload by a call: inlined, its loop would not be compiled as well.
        Self(self.0 + if octets.len() < BLOCK { sum_words(octets) } else { sum_blocks(octets) })
    }

    /// Copies `from` to `to`, which is as long, and adds it.
    ///
    /// # Panics
    /// If the lengths differ.
    #[inline]
    pub fn copy(self, from: &[u8], to: &mut [u8]) -> Self {
        assert_eq!(from.len(), to.len(), "copied to a place of another length");
        Self(self.0 + copy_blocks(from, to))
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

impl Lanes {
    #[inline(always)]
    fn add(&mut self, block: &[u8; BLOCK]) {
        let (words, _) = block.as_chunks::<8>();
        for ((sum, upper), word) in self.words.iter_mut().zip(&mut self.upper).zip(words) {
            let word = u64::from_ne_bytes(*word);
            *sum = sum.wrapping_add(word);
            *upper += word >> 32;
        }
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        let of_lane = |(sum, upper): (&u64, &u64)| sum.wrapping_sub(upper << 32) + upper;
        self.words.iter().zip(&self.upper).map(of_lane).sum()
    }
}

#[inline(never)]
fn sum_blocks(octets: &[u8]) -> u64 {
    let mut lanes = Lanes::default();
    // Two at a time: the compiler would not unroll it, and it is twice as fast.
    let (pairs, rest) = octets.as_chunks::<{ 2 * BLOCK }>();
    for pair in pairs {
        let (blocks, _) = pair.as_chunks::<BLOCK>();
        blocks.iter().for_each(|block| lanes.add(block));
    }
    finish(lanes, rest)
}

#[inline(never)]
fn copy_blocks(from: &[u8], to: &mut [u8]) -> u64 {
    let mut lanes = Lanes::default();
    let (fours, rest) = from.as_chunks::<{ 4 * BLOCK }>();
    let (to_fours, to_rest) = to.as_chunks_mut::<{ 4 * BLOCK }>();
    for (four, to_four) in fours.iter().zip(to_fours) {
        let (blocks, _) = four.as_chunks::<BLOCK>();
        let (to_blocks, _) = to_four.as_chunks_mut::<BLOCK>();
        for (block, to) in blocks.iter().zip(to_blocks) {
            *to = *block;
            lanes.add(block);
        }
    }
    to_rest.copy_from_slice(rest);
    finish(lanes, rest)
}

/// The sum of what is in `lanes` and of the few octets behind.
#[inline(always)]
fn finish(mut lanes: Lanes, rest: &[u8]) -> u64 {
    let (blocks, rest) = rest.as_chunks::<BLOCK>();
    blocks.iter().for_each(|block| lanes.add(block));
    lanes.sum() + sum_words(rest)
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
