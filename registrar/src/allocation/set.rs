//! Sets of offsets into a block: a bitmap for blocks that fit into memory whole, a hash set for the others.

use std::ops::Range;

use rustc_hash::FxHashSet;

/// The largest block that gets a bitmap: 2 MiB of it, for an IPv4 /8.
const DENSE: u128 = 1 << 24;

/// Offsets from 0 up to the size given at creation.
#[derive(Clone, Debug)]
pub(super) enum OffsetSet {
    /// One bit an offset.
    Dense(Bitmap),
    /// For blocks so large that what is in them is always sparse.
    Sparse(FxHashSet<u128>),
}

impl OffsetSet {
    pub(super) fn new(size: u128) -> Self {
        match usize::try_from(size) {
            Ok(bits) if size <= DENSE => Self::Dense(Bitmap::new(bits)),
            _ => Self::Sparse(FxHashSet::default()),
        }
    }

    pub(super) fn contains(&self, offset: u128) -> bool {
        match self {
            Self::Dense(bitmap) => bitmap.contains(index(offset)),
            Self::Sparse(set) => set.contains(&offset),
        }
    }

    pub(super) fn insert(&mut self, offset: u128) {
        match self {
            Self::Dense(bitmap) => bitmap.insert(index(offset)),
            Self::Sparse(set) => drop(set.insert(offset)),
        }
    }

    pub(super) fn remove(&mut self, offset: u128) {
        match self {
            Self::Dense(bitmap) => bitmap.remove(index(offset)),
            Self::Sparse(set) => drop(set.remove(&offset)),
        }
    }

    /// The smallest offset in `range` that is not in the set.
    pub(super) fn first_absent(&self, range: Range<u128>) -> Option<u128> {
        match self {
            Self::Dense(bitmap) => {
                bitmap.first_absent(index(range.start)..index(range.end)).map(|offset| offset as u128)
            }
            Self::Sparse(set) => {
                let mut offset = range.start;
                while offset < range.end {
                    if !set.contains(&offset) {
                        return Some(offset);
                    }
                    offset += 1;
                }
                None
            }
        }
    }
}

fn index(offset: u128) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// Bits, and above them a summary that has a bit for each word which is full, so that a search in a nearly full
/// block of two million addresses looks at some hundred words and not at thirty thousand.
#[derive(Clone, Debug)]
pub(super) struct Bitmap {
    words: Box<[u64]>,
    full: Box<[u64]>,
}

impl Bitmap {
    fn new(bits: usize) -> Self {
        let words = bits.div_ceil(64);
        Self { words: vec![0; words].into(), full: vec![0; words.div_ceil(64)].into() }
    }

    fn contains(&self, bit: usize) -> bool {
        self.words.get(bit / 64).is_some_and(|word| word & 1 << (bit % 64) != 0)
    }

    fn insert(&mut self, bit: usize) {
        let position = bit / 64;
        let Some(word) = self.words.get_mut(position) else { return };
        *word |= 1 << (bit % 64);
        if *word == u64::MAX
            && let Some(full) = self.full.get_mut(position / 64)
        {
            *full |= 1 << (position % 64);
        }
    }

    fn remove(&mut self, bit: usize) {
        let position = bit / 64;
        let Some(word) = self.words.get_mut(position) else { return };
        *word &= !(1 << (bit % 64));
        if let Some(full) = self.full.get_mut(position / 64) {
            *full &= !(1 << (position % 64));
        }
    }

    fn first_absent(&self, range: Range<usize>) -> Option<usize> {
        let mut bit = range.start;
        while bit < range.end {
            let position = bit / 64;
            // A whole group of 64 full words, from its beginning on.
            if bit.is_multiple_of(64 * 64) && *self.full.get(position / 64)? == u64::MAX {
                bit += 64 * 64;
                continue;
            }
            let absent = !self.words.get(position)? & (u64::MAX << (bit % 64));
            if absent != 0 {
                let found = position * 64 + absent.trailing_zeros() as usize;
                return (found < range.end).then_some(found);
            }
            bit = (position + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sets_behave_as_plain_ones(
            fill in 0_u128..9000,
            changes in proptest::collection::vec((any::<bool>(), 0_u128..9000), 0..200),
            ranges in proptest::collection::vec((0_u128..9000, 0_u128..9000), 1..20),
        ) {
            let mut model = BTreeSet::new();
            let mut sets = [OffsetSet::new(9000), OffsetSet::Sparse(FxHashSet::default())];
            for offset in 0..fill {
                model.insert(offset);
                sets.iter_mut().for_each(|set| set.insert(offset));
            }
            for (insert, offset) in changes {
                if insert {
                    model.insert(offset);
                    sets.iter_mut().for_each(|set| set.insert(offset));
                } else {
                    model.remove(&offset);
                    sets.iter_mut().for_each(|set| set.remove(offset));
                }
            }
            for (start, end) in ranges {
                let expected = (start..end).find(|offset| !model.contains(offset));
                for set in &sets {
                    prop_assert_eq!(set.first_absent(start..end), expected);
                    prop_assert_eq!(set.contains(start), model.contains(&start));
                }
            }
        }
    }
}
