use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use proptest::prelude::*;

use super::*;

const QUARANTINE: Duration = Duration::from_secs(100);

fn at(seconds: u64) -> Timestamp {
    Timestamp::from_epoch(Duration::from_secs(seconds))
}

fn pool(net: &str) -> Pool {
    Pool::new(net.parse().unwrap(), QUARANTINE).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Takes every address of a pool, in the order in which it gives them.
fn drain(pool: &mut Pool) -> Vec<IpAddr> {
    let mut all = Vec::new();
    while let Ok(reservation) = pool.reserve("owner", 0, at(0)) {
        pool.confirm(reservation.address());
        all.push(reservation.address());
    }
    all
}

#[test]
fn the_smallest_pools_give_all_they_have() {
    for (net, expected) in
        [("10.0.0.0/30", vec!["10.0.0.1", "10.0.0.2"]), ("fd00::/126", vec!["fd00::1", "fd00::2", "fd00::3"])]
    {
        let mut pool = pool(net);
        let mut all = drain(&mut pool);
        all.sort_unstable();
        assert_eq!(all, expected.into_iter().map(ip).collect::<Vec<_>>());
    }
    for net in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/127", "fd00::/128"] {
        let error = Pool::new(net.parse().unwrap(), QUARANTINE).unwrap_err();
        assert!(matches!(error, PoolError::TooSmall { .. }), "{net}: {error}");
    }
}

#[test]
fn the_band_is_used_last() {
    // As Kubernetes documents it: /24 keeps .1 to .16.
    for (net, band) in [("10.0.0.0/24", 16), ("10.0.0.0/28", 0), ("10.0.0.0/23", 32), ("10.0.0.0/16", 256)] {
        let mut pool = pool(net);
        let size = usize::try_from(pool.counts(at(0)).size).unwrap();
        let all = drain(&mut pool);
        assert_eq!(all.len(), size);
        let in_band = |address: &IpAddr| number(*address) - pool.base <= band;
        assert!(!all[..size - usize::try_from(band).unwrap()].iter().any(in_band), "{net}");
        assert!(all[size - usize::try_from(band).unwrap()..].iter().all(in_band), "{net}");
    }
}

#[test]
fn exhaustion_names_pool_numbers_and_remedy() {
    let mut pool = pool("10.0.0.0/29");
    drain(&mut pool);
    pool.release(ip("10.0.0.3"), at(5));
    let error = pool.reserve("x", 0, at(104)).unwrap_err();
    let text = error.to_string();
    for part in
        ["10.0.0.0/29", "of its 6 addresses", "5 are in use", "1 in quarantine", "muster delete device"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(pool.reserve("x", 0, at(105)).unwrap().address(), ip("10.0.0.3"));
}

#[test]
fn owners_get_their_address_back_and_spread() {
    let mut first = pool("100.64.0.0/11");
    let mut second = first.clone();
    let mut same = 0;
    for owner in 0..200 {
        let a = first.reserve(&format!("device-{owner}"), 0, at(0)).unwrap();
        assert_eq!(
            first.clone().choose(a.address(), at(0)),
            Err(AllocationError::InUse { address: a.address() })
        );
        first.cancel(a);
        assert_eq!(first.reserve(&format!("device-{owner}"), 0, at(0)).unwrap().address(), a.address());
        // Another registrar, another device, the same moment.
        let b = second.reserve(&format!("other-{owner}"), 0, at(0)).unwrap();
        same += u32::from(a.address() == b.address());
    }
    assert_eq!(same, 0);
    let again = first.reserve("device-0", 1, at(0)).unwrap();
    assert_ne!(again.address(), second.reserve("device-0", 0, at(0)).unwrap().address());
}

#[test]
fn chosen_addresses_are_checked() {
    let mut pool = pool("10.0.0.0/24");
    for (address, error) in
        [("10.0.1.1", "is not in the address pool"), ("fd00::1", "is not in the address pool")]
    {
        assert!(pool.choose(ip(address), at(0)).unwrap_err().to_string().contains(error));
    }
    for address in ["10.0.0.0", "10.0.0.255"] {
        let error = pool.choose(ip(address), at(0)).unwrap_err();
        assert!(matches!(error, AllocationError::NotAssignable { .. }), "{error}");
    }
    let chosen = pool.choose(ip("10.0.0.77"), at(0)).unwrap();
    pool.confirm(chosen.address());
    assert!(pool.choose(ip("10.0.0.77"), at(0)).is_err());
    pool.release(ip("10.0.0.77"), at(10));
    assert_eq!(
        pool.choose(ip("10.0.0.77"), at(109)),
        Err(AllocationError::Quarantined { address: ip("10.0.0.77"), until: at(110) })
    );
    assert!(pool.choose(ip("10.0.0.77"), at(110)).is_ok());
    assert!(matches!(
        super::super::Pool::new("fd00::/64".parse().unwrap(), QUARANTINE)
            .unwrap()
            .choose(ip("fd00::"), at(0)),
        Err(AllocationError::NotAssignable { .. })
    ));
}

#[test]
fn a_late_cancel_does_not_free_what_others_hold() {
    let mut pool = pool("10.0.0.0/30");
    let mine = pool.choose(ip("10.0.0.1"), at(0)).unwrap();
    // Another registrar was faster.
    pool.confirm(ip("10.0.0.1"));
    pool.cancel(mine);
    assert_eq!(pool.status(ip("10.0.0.1"), at(0)), Status::InUse);
    pool.release(ip("10.0.0.1"), at(0));
    let theirs = pool.choose(ip("10.0.0.1"), at(100)).unwrap();
    pool.cancel(mine);
    assert_eq!(pool.status(ip("10.0.0.1"), at(100)), Status::Reserved);
    pool.cancel(theirs);
    assert_eq!(pool.status(ip("10.0.0.1"), at(100)), Status::Free);
}

#[test]
fn a_million_addresses_are_compact_and_fast_to_search() {
    let mut pool = pool("100.64.0.0/11");
    let first = u32::from(Ipv4Addr::new(100, 64, 0, 1));
    (first..first + 2_097_150).for_each(|address| pool.confirm(Ipv4Addr::from(address).into()));
    assert!(pool.reserve("x", 0, at(0)).is_err());
    pool.forget(ip("100.80.1.2"));
    assert_eq!(pool.reserve("x", 0, at(0)).unwrap().address(), ip("100.80.1.2"));
}

#[derive(Clone, Debug)]
enum Action {
    Reserve {
        owner: u8,
        attempt: u32,
    },
    Choose {
        offset: u8,
    },
    /// Of the reservation with this index, modulo their number.
    Confirm(usize),
    Cancel(usize),
    /// Another registrar gives this address away.
    Foreign {
        offset: u8,
    },
    /// Of the owned address with this index.
    Release(usize),
    Forget {
        offset: u8,
    },
    Pass {
        seconds: u64,
    },
    Restart,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (any::<u8>(), 0_u32..3).prop_map(|(owner, attempt)| Action::Reserve { owner, attempt }),
        1 => (0_u8..40).prop_map(|offset| Action::Choose { offset }),
        3 => any::<usize>().prop_map(Action::Confirm),
        1 => any::<usize>().prop_map(Action::Cancel),
        1 => (0_u8..40).prop_map(|offset| Action::Foreign { offset }),
        3 => any::<usize>().prop_map(Action::Release),
        1 => (0_u8..40).prop_map(|offset| Action::Forget { offset }),
        2 => (0_u64..80).prop_map(|seconds| Action::Pass { seconds }),
        1 => Just(Action::Restart),
    ]
}

/// What the store has of an address.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Record {
    Owned,
    Released(u64),
}

fn pick<T: Copy>(items: &[T], index: usize) -> Option<T> {
    items.get(index.checked_rem(items.len())?).copied()
}

fn run(net: &str, actions: Vec<Action>) -> Result<(), TestCaseError> {
    let mut pool = pool(net);
    let base: IpAddr = pool.net().network();
    let last = pool.net().broadcast();
    let nth = |offset: u8| -> IpAddr {
        match base {
            IpAddr::V4(a) => Ipv4Addr::from(u32::from(a) + u32::from(offset)).into(),
            IpAddr::V6(a) => Ipv6Addr::from(u128::from(a) + u128::from(offset)).into(),
        }
    };
    let assignable = |a: IpAddr| pool_contains(net, a) && a != base && (a.is_ipv6() || a != last);
    // The model: what the store holds, and which reservations are out.
    let mut store: BTreeMap<IpAddr, Record> = BTreeMap::new();
    let mut reservations: Vec<Reservation> = Vec::new();
    let mut now = 1000;

    for action in actions {
        let free = |a: IpAddr, store: &BTreeMap<IpAddr, Record>, reservations: &[Reservation]| {
            assignable(a)
                && !reservations.iter().any(|r| r.address() == a)
                && match store.get(&a) {
                    None => true,
                    Some(Record::Owned) => false,
                    Some(Record::Released(t)) => t + 100 <= now,
                }
        };
        match action {
            Action::Reserve { owner, attempt } => {
                match pool.reserve(&format!("d{owner}"), attempt, at(now)) {
                    Ok(r) => {
                        prop_assert!(free(r.address(), &store, &reservations), "{} is not free", r.address());
                        reservations.push(r);
                    }
                    Err(error) => {
                        let exhausted = matches!(error, AllocationError::Exhausted { .. });
                        prop_assert!(exhausted);
                        prop_assert!((0..=255).map(nth).all(|a| !free(a, &store, &reservations)));
                    }
                }
            }
            Action::Choose { offset } => {
                let chosen = pool.choose(nth(offset), at(now));
                prop_assert_eq!(chosen.is_ok(), free(nth(offset), &store, &reservations));
                reservations.extend(chosen);
            }
            Action::Confirm(index) => {
                if let Some(r) = pick(&reservations, index) {
                    reservations.retain(|other| *other != r);
                    prop_assert_ne!(store.insert(r.address(), Record::Owned), Some(Record::Owned));
                    pool.confirm(r.address());
                }
            }
            Action::Cancel(index) => {
                if let Some(r) = pick(&reservations, index) {
                    reservations.retain(|other| *other != r);
                    pool.cancel(r);
                }
            }
            Action::Foreign { offset } => {
                let address = nth(offset);
                if assignable(address) && store.get(&address) != Some(&Record::Owned) {
                    store.insert(address, Record::Owned);
                    pool.confirm(address);
                    // Whoever had reserved it loses at the store, and cancels in vain.
                    for r in reservations.extract_if(.., |r| r.address() == address) {
                        pool.cancel(r);
                    }
                }
            }
            Action::Release(index) => {
                let owned: Vec<IpAddr> =
                    store.iter().filter(|(_, r)| **r == Record::Owned).map(|(a, _)| *a).collect();
                if let Some(address) = pick(&owned, index) {
                    store.insert(address, Record::Released(now));
                    pool.release(address, at(now));
                }
            }
            Action::Forget { offset } => {
                store.remove(&nth(offset));
                pool.forget(nth(offset));
            }
            Action::Pass { seconds } => now += seconds,
            Action::Restart => {
                pool = super::super::Pool::new(net.parse().unwrap(), QUARANTINE).unwrap();
                reservations.clear();
                for (address, record) in &store {
                    match record {
                        Record::Owned => pool.confirm(*address),
                        Record::Released(t) => pool.release(*address, at(*t)),
                    }
                }
            }
        }
        let counts = pool.counts(at(now));
        let owned = store.values().filter(|r| **r == Record::Owned).count() as u64;
        let waiting = store
            .iter()
            .filter(|(a, r)| {
                matches!(r, Record::Released(t) if t + 100 > now)
                    && !reservations.iter().any(|r| r.address() == **a)
            })
            .count() as u64;
        prop_assert_eq!(counts.used, owned);
        prop_assert_eq!(counts.reserved, reservations.len() as u64);
        prop_assert_eq!(counts.quarantined, waiting);
        prop_assert_eq!(counts.free, counts.size - u128::from(owned + counts.reserved + waiting));
        for offset in 0..40 {
            let free = pool.status(nth(offset), at(now)) == Status::Free;
            let expected = assignable(nth(offset))
                && !reservations.iter().any(|r| r.address() == nth(offset))
                && match store.get(&nth(offset)) {
                    None => true,
                    Some(Record::Owned) => false,
                    Some(Record::Released(t)) => t + 100 <= now,
                };
            prop_assert_eq!(free, expected, "{}", nth(offset));
        }
    }
    Ok(())
}

fn pool_contains(net: &str, address: IpAddr) -> bool {
    net.parse::<IpNet>().unwrap().contains(&address)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn no_address_ever_has_two_owners(
        net in prop::sample::select(vec![
            "10.0.0.0/30", "10.0.0.0/28", "10.0.0.0/27", "fd00::/126", "fd00::/124", "fd00::/123", "fd00::/64",
        ]),
        actions in prop::collection::vec(action(), 0..150),
    ) {
        run(net, actions)?;
    }
}
