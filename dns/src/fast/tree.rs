//! A persistent map from octet strings to octet strings: a radix of depth two over the hash, with flat leaves. A
//! write copies one path (leaf, mid, root) at most; a clone is one count and never changes afterwards.

use std::{array, hint::black_box, sync::Arc};

/// Bits of the hash that choose a branch at each level.
const BITS: u32 = 7;
const FANOUT: usize = 1 << BITS;
/// Octets before the entries of a leaf: how many there are.
const COUNT: usize = 4;
/// Octets of an index entry: the tag (the hash's low half) and the place of the entry in the leaf.
const SLOT: usize = 8;
/// Octets before an entry's key: lengths of key and value.
const LENGTHS: usize = 6;

/// Octets of a line of the processor's cache, and lines of a device's entry.
const LINE: usize = 64;
const ENTRY_LINES: usize = 4;

type Leaf = Arc<[u8]>;

#[derive(Clone)]
struct Mid([Leaf; FANOUT]);

#[derive(Clone)]
struct Root([Arc<Mid>; FANOUT]);

const _: () = assert!(size_of::<Mid>() == FANOUT * 16 && size_of::<Root>() == FANOUT * 8);

/// The map. Cloning is cheap, and what is written to one clone is not seen through another.
#[derive(Clone)]
pub(super) struct Tree {
    root: Arc<Root>,
}

impl Default for Tree {
    fn default() -> Self {
        let empty: Leaf = Arc::from(0u32.to_ne_bytes());
        let mid = Arc::new(Mid(array::from_fn(|_| Arc::clone(&empty))));
        Self { root: Arc::new(Root(array::from_fn(|_| Arc::clone(&mid)))) }
    }
}

impl Tree {
    /// The value of `key`, whose hash is `hash`.
    pub(super) fn get(&self, hash: u64, key: &[u8]) -> Option<&[u8]> {
        let (first, second) = branches(hash);
        let leaf = self.root.0.get(first)?.0.get(second)?;
        find(leaf, hash as u32, Some(key)).ok().and_then(|slot| entry(leaf, slot)).map(|(_, value)| value)
    }

    /// Reads what looking up keys with these hashes will read, so that it is in the processor's cache by then. The
    /// reads of one key wait for each other; those of different keys do not, which is what this is for.
    pub(super) fn warm(&self, hashes: &[u64]) {
        let leaf = |hash| {
            let (first, second) = branches(hash);
            self.root.0.get(first)?.0.get(second)
        };
        let guess = |hash| {
            let leaf: &Leaf = leaf(hash)?;
            tag(leaf, expected_slot(count(leaf), hash as u32))
        };
        black_box(hashes.iter().filter_map(|hash| guess(*hash)).fold(0, u32::wrapping_add));
        let lines = |hash| {
            let leaf: &Leaf = leaf(hash)?;
            let slot = find(leaf, hash as u32, None).ok()?;
            let place = number(leaf, COUNT + slot * SLOT + 4)? as usize;
            let octet = |line: usize| leaf.get(place + line * LINE).copied().unwrap_or(0);
            Some((0..ENTRY_LINES).map(octet).fold(0, u8::wrapping_add))
        };
        black_box(hashes.iter().filter_map(|hash| lines(*hash)).fold(0, u8::wrapping_add));
    }

    /// Gives `key` the value that `parts` make up. Key and value are at most 65,535 and 2^31 octets.
    pub(super) fn set(&mut self, hash: u64, key: &[u8], parts: &[&[u8]]) {
        if let Some(leaf) = self.leaf_mut(hash) {
            *leaf = rebuilt(leaf, hash as u32, key, Some(parts));
        }
    }

    /// Takes `key` out; whether it was there.
    pub(super) fn remove(&mut self, hash: u64, key: &[u8]) -> bool {
        if self.get(hash, key).is_none() {
            return false;
        }
        if let Some(leaf) = self.leaf_mut(hash) {
            *leaf = rebuilt(leaf, hash as u32, key, None);
        }
        true
    }

    /// Octets that the leaves take, and entries in them.
    pub(super) fn size(&self) -> (usize, usize) {
        let leaves = self.root.0.iter().flat_map(|mid| &mid.0);
        leaves.fold((0, 0), |(octets, entries), leaf| (octets + leaf.len(), entries + count(leaf)))
    }

    fn leaf_mut(&mut self, hash: u64) -> Option<&mut Leaf> {
        let (first, second) = branches(hash);
        let mid = Arc::make_mut(&mut self.root).0.get_mut(first)?;
        Arc::make_mut(mid).0.get_mut(second)
    }
}

/// The branches to take at root and mid.
fn branches(hash: u64) -> (usize, usize) {
    let top = (hash >> (64 - 2 * BITS)) as usize;
    (top >> BITS, top & (FANOUT - 1))
}

fn number(leaf: &[u8], at: usize) -> Option<u32> {
    leaf.get(at..)?.first_chunk().map(|octets| u32::from_ne_bytes(*octets))
}

fn count(leaf: &[u8]) -> usize {
    number(leaf, 0).unwrap_or(0) as usize
}

fn tag(leaf: &[u8], slot: usize) -> Option<u32> {
    number(leaf, COUNT + slot * SLOT)
}

/// Key and value of the entry in index slot `slot`.
fn entry(leaf: &[u8], slot: usize) -> Option<(&[u8], &[u8])> {
    let place = number(leaf, COUNT + slot * SLOT + 4)? as usize;
    let (&[k0, k1, v0, v1, v2, v3], rest) = leaf.get(place..)?.split_first_chunk::<LENGTHS>()?;
    let (key, rest) = rest.split_at_checked(usize::from(u16::from_ne_bytes([k0, k1])))?;
    Some((key, rest.get(..u32::from_ne_bytes([v0, v1, v2, v3]) as usize)?))
}

/// About where `wanted` is in an index: it is sorted by tag, and tags are evenly spread.
fn expected_slot(count: usize, wanted: u32) -> usize {
    ((u64::from(wanted) * count as u64) >> 32) as usize
}

/// The index slot of `key`, or the one it would be put in; without a key, the first slot with the tag.
fn find(leaf: &[u8], wanted: u32, key: Option<&[u8]>) -> Result<usize, usize> {
    let count = count(leaf);
    let mut slot = expected_slot(count, wanted);
    while slot > 0 && tag(leaf, slot - 1).is_some_and(|tag| tag >= wanted) {
        slot -= 1;
    }
    while slot < count {
        match tag(leaf, slot) {
            Some(tag) if tag < wanted => {}
            Some(tag) if tag == wanted => {
                if key.is_none_or(|key| entry(leaf, slot).is_some_and(|(found, _)| found == key)) {
                    return Ok(slot);
                }
            }
            _ => break,
        }
        slot += 1;
    }
    Err(slot)
}

/// `leaf` with `key` set to `value`, or without it.
fn rebuilt(leaf: &[u8], wanted: u32, key: &[u8], value: Option<&[&[u8]]>) -> Leaf {
    let (slot, replaced) = match find(leaf, wanted, Some(key)) {
        Ok(slot) => (slot, 1),
        Err(slot) => (slot, 0),
    };
    let old = |slots: std::ops::Range<usize>| {
        slots.filter_map(|slot| {
            let (key, value) = entry(leaf, slot)?;
            Some((tag(leaf, slot)?, key, value))
        })
    };
    let old_count = count(leaf);
    let count = old_count + usize::from(value.is_some()) - replaced;
    let new =
        value.map_or(0, |parts| LENGTHS + key.len() + parts.iter().map(|part| part.len()).sum::<usize>());
    let mut index = Vec::with_capacity(leaf.len() + SLOT + new);
    index.extend((count as u32).to_ne_bytes());
    let mut place = COUNT + count * SLOT;
    let mut point = |index: &mut Vec<u8>, tag: u32, length: usize| {
        index.extend(tag.to_ne_bytes());
        index.extend((place as u32).to_ne_bytes());
        place += length;
    };
    for (tag, key, value) in old(0..slot) {
        point(&mut index, tag, LENGTHS + key.len() + value.len());
    }
    if value.is_some() {
        point(&mut index, wanted, new);
    }
    for (tag, key, value) in old(slot + replaced..old_count) {
        point(&mut index, tag, LENGTHS + key.len() + value.len());
    }
    let mut out = index;
    for (_, key, value) in old(0..slot) {
        push(&mut out, key, &[value]);
    }
    if let Some(parts) = value {
        push(&mut out, key, parts);
    }
    for (_, key, value) in old(slot + replaced..old_count) {
        push(&mut out, key, &[value]);
    }
    Arc::from(out)
}

fn push(out: &mut Vec<u8>, key: &[u8], parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.extend((key.len() as u16).to_ne_bytes());
    out.extend((length as u32).to_ne_bytes());
    out.extend(key);
    parts.iter().for_each(|part| out.extend(*part));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Set(u16, Vec<u8>),
        Remove(u16),
        Snapshot,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..200u16, proptest::collection::vec(any::<u8>(), 0..40)).prop_map(|(k, v)| Step::Set(k, v)),
            2 => (0..200u16).prop_map(Step::Remove),
            1 => Just(Step::Snapshot),
        ]
    }

    fn check(tree: &Tree, model: &BTreeMap<u16, Vec<u8>>, hash: impl Fn(u16) -> u64) {
        for key in 0..200u16 {
            let found = tree.get(hash(key), &key.to_be_bytes());
            assert_eq!(found, model.get(&key).map(Vec::as_slice), "{key}");
        }
        assert_eq!(tree.size().1, model.len());
    }

    proptest! {
        /// Few hashes, so that leaves fill up and tags collide.
        #[test]
        fn it_behaves_like_a_map(steps in proptest::collection::vec(step(), 1..300), hashes in 1..40u64) {
            let hash = |key: u16| (u64::from(key) % hashes).wrapping_mul(0x1234_5678_9abc_def1) & !0xffff;
            let (mut tree, mut model, mut snapshots) = (Tree::default(), BTreeMap::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Set(key, value) => {
                        tree.set(hash(key), &key.to_be_bytes(), &[&value]);
                        model.insert(key, value);
                    }
                    Step::Remove(key) => {
                        let removed = tree.remove(hash(key), &key.to_be_bytes());
                        prop_assert_eq!(removed, model.remove(&key).is_some());
                    }
                    Step::Snapshot => snapshots.push((tree.clone(), model.clone())),
                }
            }
            check(&tree, &model, hash);
            snapshots.iter().for_each(|(tree, model)| check(tree, model, hash));
        }
    }
}
