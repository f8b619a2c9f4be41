//! Reading a range page by page where each page takes as long as the range is (etcd counts all of it each time): of a
//! long range parts are asked for instead, as long as some pages by what the last page spanned, so that the whole does
//! not take the square.

use bytes::Bytes;

use super::types::{KeyRange, KeyValue, RangeResult, Revision, successor};

/// A range that has so many pages left, or fewer, is not read in parts.
const PAGES: usize = 4;
/// So many pages as the last one a part is long, if keys are where they seem to be.
const PART: u32 = 2;

/// How far a range has been read. To be used in turn: what [`Self::next`] says is read, and [`Self::took`] told of it.
#[derive(Clone, Debug)]
pub struct Paging {
    /// What is left of the range; `None` at the end.
    rest: Option<KeyRange>,
    at: Option<Revision>,
    /// How long the next part is, unless it is all that is left.
    step: Option<Step>,
    /// How many keys are left, if that is known.
    left: Option<usize>,
    /// The most keys that a page had.
    full: usize,
}

/// A distance between keys: so many units (1 to 1,020) of the byte at this place.
#[derive(Clone, Copy, Debug)]
struct Step {
    place: usize,
    units: u32,
}

impl Paging {
    /// All of `range` at revision `at`, or else at that which the first page shows.
    pub fn new(range: KeyRange, at: Option<Revision>) -> Self {
        Self { rest: Some(range), at, step: None, left: None, full: 0 }
    }

    /// What to ask for next, and at which revision; `None` at the end.
    pub fn next(&self) -> Option<(KeyRange, Option<Revision>)> {
        let rest = self.rest.clone()?;
        let end = self.part_end().or(rest.end);
        Some((KeyRange { end, ..rest }, self.at))
    }

    /// The page is what that came to.
    pub fn took(&mut self, page: &RangeResult) {
        let part_end = self.part_end();
        let Some(KeyRange { end, .. }) = self.rest.take() else { return };
        self.at = Some(page.revision);
        self.full = self.full.max(page.kvs.len());
        self.left = self.left.or(page.count).map(|left| left.saturating_sub(page.kvs.len()));
        let start = match (&page.kvs[..], part_end) {
            ([first, .., last], _) if page.more => {
                if page.count.is_some_and(|count| count / PAGES > page.kvs.len()) {
                    self.step = Some(Step::between(first, last));
                }
                successor(&last.key)
            }
            ([only], _) if page.more => successor(&only.key),
            (kvs, Some(part_end)) => {
                // Where there are few keys, or none, it goes ever faster.
                let faster = match kvs.len() {
                    0 => 4,
                    few if few < self.full / 2 => 2,
                    _ => 1,
                };
                self.step = self.step.map(|step| step.times(faster));
                part_end
            }
            (_, None) => return,
        };
        if self.left.is_none_or(|left| left / PAGES <= self.full) {
            self.step = None;
        }
        self.rest = Some(KeyRange { start, end });
    }

    /// Where the next part ends; `None` if it is all that is left.
    fn part_end(&self) -> Option<Bytes> {
        let KeyRange { start, end } = self.rest.as_ref()?;
        let part_end = self.step?.after(start)?;
        end.as_ref().is_none_or(|end| part_end < *end).then_some(part_end)
    }
}

impl Step {
    /// As far as some pages like one from `first` to `last` reach.
    fn between(first: &KeyValue, last: &KeyValue) -> Self {
        let place = first.key.iter().zip(&last.key).take_while(|(a, b)| a == b).count();
        let octet = |kv: &KeyValue| kv.key.get(place).map_or(0, |octet| u32::from(*octet));
        let spanned = octet(last).saturating_sub(octet(first)).max(1);
        Self { place, units: spanned * PART }
    }

    /// About so many times as far, or a little more.
    fn times(self, factor: u32) -> Self {
        let mut step = Self { units: self.units * factor, ..self };
        while step.units > 0xff && step.place > 0 {
            step = Self { place: step.place - 1, units: (step.units >> 8) + 1 };
        }
        step
    }

    /// The key that is so far after `key`; `None` if there is none.
    fn after(self, key: &[u8]) -> Option<Bytes> {
        let mut after: Vec<u8> =
            key.iter().copied().chain(std::iter::repeat(0)).take(self.place + 1).collect();
        let mut carried = self.units;
        for octet in after.iter_mut().rev() {
            let sum = u32::from(*octet) + carried;
            *octet = (sum & 0xff) as u8;
            carried = sum >> 8;
        }
        (carried == 0).then(|| after.into())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::store::{KeyValue, memory::MemoryStore};
    use crate::store::{Store as _, Txn};

    /// Reads `keys`, and returns how many were counted for that.
    fn read(keys: &BTreeSet<Bytes>, range: &KeyRange, limit: usize) -> (Vec<Bytes>, usize) {
        let (mut paging, mut read) = (Paging::new(range.clone(), None), Vec::new());
        let (mut counted, mut requests) = (0, 0);
        while let Some((asked, at)) = paging.next() {
            assert!(at.is_none_or(|at| at == 7));
            requests += 1;
            assert!(requests < 64 * (keys.len() + 1), "it goes too slowly through what is empty");
            let found: Vec<_> = keys.iter().filter(|key| asked.contains(key)).cloned().collect();
            let kv = |key: &Bytes| KeyValue {
                key: key.clone(),
                value: Bytes::new(),
                create_revision: 1,
                mod_revision: 1,
            };
            let kvs: Vec<_> = found.iter().take(limit).map(kv).collect();
            read.extend(kvs.iter().map(|kv| kv.key.clone()));
            counted += found.len();
            paging.took(&RangeResult {
                more: found.len() > limit,
                kvs,
                revision: 7,
                count: Some(found.len()),
            });
        }
        (read, counted)
    }

    proptest! {
        #[test]
        fn everything_is_read_once_and_in_order(
            keys in proptest::collection::btree_set("[\\x00-\\x02a-c\u{7f}]{1,12}", 0..200),
            start in "[a-c]{0,2}",
            end in proptest::option::of("[a-c]{0,3}"),
            limit in 1_usize..9,
        ) {
            let keys: BTreeSet<Bytes> = keys.into_iter().map(Bytes::from).collect();
            let range = KeyRange { start: start.into(), end: end.map(Bytes::from) };
            let expected: Vec<_> = keys.iter().filter(|key| range.contains(key)).cloned().collect();
            prop_assert_eq!(read(&keys, &range, limit).0, expected);
        }
    }

    #[test]
    fn the_time_does_not_grow_with_the_square() {
        let mut rng = StdRng::seed_from_u64(7);
        let uids = (0..8000).map(|_| {
            let uid = uuid::Builder::from_random_bytes(rng.random()).into_uuid();
            format!("devices/{}/{uid}", ["default", "other"][usize::from(rng.random_bool(0.1))])
        });
        let dense = |n: u32| {
            [
                format!("addresses/n/device/4{:08x}", 0x6440_0000 + n),
                format!("addresses/n/device/6fd07125{n:024x}"),
            ]
        };
        let keys: BTreeSet<Bytes> = uids.chain((0..4000).flat_map(dense)).map(Bytes::from).collect();
        for range in [KeyRange::prefix("devices/"), KeyRange::prefix("addresses/"), KeyRange::all()] {
            let (read, counted) = read(&keys, &range, 20);
            // All at once, and then part by part. Each page of all that is left would be hundreds of times as many.
            assert!(counted < 6 * read.len(), "{counted} counted for {}", read.len());
        }
    }

    #[tokio::test]
    async fn a_store_shows_one_revision_to_the_end() {
        let store = MemoryStore::new();
        for n in 0..50 {
            store.txn(Txn::new().put(format!("key/{n:02}"), "before")).await.unwrap();
        }
        let (mut paging, mut read) = (Paging::new(KeyRange::prefix("key/"), None), 0);
        while let Some((range, at)) = paging.next() {
            let page = store.range(range, at, 3).await.unwrap();
            assert!(page.kvs.iter().all(|kv| kv.value == "before"));
            read += page.kvs.len();
            paging.took(&page);
            store
                .txn(Txn::new().put("key/49", "after").put(format!("key/new/{read}"), "after"))
                .await
                .unwrap();
        }
        assert_eq!(read, 50);
    }
}
