//! Reading a range page by page where each page takes as long as the range is (etcd counts all of it each time): of a
//! long range a shorter beginning is asked for instead, found by bisection, so that the whole does not take the square.

use bytes::{BufMut, Bytes, BytesMut};

use super::types::{KeyRange, RangeResult, Revision, successor};

/// A range that has so many pages left, or fewer, is not cut.
const PAGES: usize = 4;

/// How far a range has been read. To be used in turn: what [`Self::next`] says is read, and [`Self::took`] told of it.
#[derive(Clone, Debug)]
pub struct Paging {
    start: Bytes,
    /// Where to stop: that of the whole, and then of ever shorter beginnings.
    ends: Vec<Option<Bytes>>,
    at: Option<Revision>,
}

impl Paging {
    /// All of `range` at revision `at`, or else at that which the first page shows.
    pub fn new(range: KeyRange, at: Option<Revision>) -> Self {
        Self { start: range.start, ends: vec![range.end], at }
    }

    /// What to ask for next, and at which revision; `None` at the end.
    pub fn next(&self) -> Option<(KeyRange, Option<Revision>)> {
        let end = self.ends.last()?.clone();
        Some((KeyRange { start: self.start.clone(), end }, self.at))
    }

    /// The page is what that came to.
    pub fn took(&mut self, page: &RangeResult) {
        self.at = Some(page.revision);
        match page.kvs.last() {
            Some(last) if page.more => {
                self.start = successor(&last.key);
                let is_long = page.count.is_some_and(|count| count / PAGES > page.kvs.len());
                let end = self.ends.last().and_then(Option::as_ref);
                if let Some(middle) = is_long.then(|| middle(&self.start, end)).flatten() {
                    self.ends.push(Some(middle));
                }
            }
            _ => {
                if let Some(Some(end)) = self.ends.pop() {
                    self.start = end;
                }
            }
        }
    }
}

/// A key about half-way between two; `None` if they are too close.
fn middle(start: &Bytes, end: Option<&Bytes>) -> Option<Bytes> {
    let shared = end.map_or(0, |end| start.iter().zip(end).take_while(|(a, b)| a == b).count());
    let (low, high) = (number(start, shared), end.map_or(u64::MAX, |end| number(end, shared)));
    let half = high.checked_sub(low)? / 2;
    if half == 0 {
        return None;
    }
    let mut middle = BytesMut::with_capacity(shared + size_of::<u64>());
    middle.extend_from_slice(start.get(..shared)?);
    middle.put_u64(low + half);
    Some(middle.freeze())
}

/// The eight bytes of a key from `at`, as a number that is in the same order.
fn number(key: &[u8], at: usize) -> u64 {
    let rest = key.get(at..).unwrap_or_default();
    (0..size_of::<u64>()).fold(0, |number, n| number << 8 | u64::from(rest.get(n).copied().unwrap_or(0)))
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
        let (mut paging, mut read, mut counted) = (Paging::new(range.clone(), None), Vec::new(), 0);
        while let Some((asked, at)) = paging.next() {
            assert!(at.is_none_or(|at| at == 7));
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
        let mut key = || {
            let uid = uuid::Builder::from_random_bytes(rng.random()).into_uuid();
            Bytes::from(format!("devices/{uid}"))
        };
        let mut count = |devices: usize| {
            let keys = std::iter::repeat_with(&mut key).take(devices).collect();
            read(&keys, &KeyRange::prefix("devices/"), 20).1
        };
        let (few, many) = (count(1000), count(8000));
        // Eight times as many, each counted three times more.
        assert!(many < 16 * few, "{few} counted at 1,000 devices, {many} at 8,000");
        assert!(many < 8000 * 16, "{many}");
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
