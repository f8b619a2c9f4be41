//! What clients have done and been answered, and what must hold of it. Pure.

use std::{collections::BTreeMap, time::Duration};

use muster_common::time::Instant;

use crate::world::Shown;

/// One life of a device: from its joining to its leaving.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    pub(crate) name: String,
    pub(crate) uid: String,
    /// When it was told that it has joined.
    pub(crate) joined: Instant,
    /// Its virtual address, once it was told.
    pub(crate) address: Option<String>,
    /// The private address that it told last and was acknowledged.
    pub(crate) told: Option<String>,
    /// Those of which it does not know what became of them: one may have arrived late.
    pub(crate) unsure: Vec<String>,
    /// When it first tried to leave.
    pub(crate) leaving: Option<Instant>,
    /// Whether it was told that it has left.
    pub(crate) left: bool,
}

/// What a lookup was answered.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) address: String,
}

#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) lives: Vec<Life>,
    pub(crate) found: Vec<Found>,
    /// Calls that came to nothing, by reason.
    pub(crate) failures: BTreeMap<String, usize>,
    /// Joins of which it is not known what became of them.
    pub(crate) unknown: Vec<String>,
}

impl History {
    pub(crate) fn summary(&self) -> String {
        let left = self.lives.iter().filter(|life| life.left).count();
        format!(
            "{} joined, {left} left, {} lookups answered, {} joins unknown, failures: {:?}",
            self.lives.len(),
            self.found.len(),
            self.unknown.len(),
            self.failures
        )
    }

    /// Two owners of a name or an address at the same time, and answers about what never was.
    pub(crate) fn check(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (number, one) in self.lives.iter().enumerate() {
            for other in &self.lives[number + 1..] {
                let same_address = one.address.is_some() && one.address == other.address;
                if (one.name == other.name || same_address) && one.overlaps(other) {
                    problems.push(format!("both at the same time:\n  {one:?}\n  {other:?}"));
                }
            }
        }
        let by_uid: BTreeMap<&str, &Life> = self.lives.iter().map(|life| (&*life.uid, life)).collect();
        for found in &self.found {
            let Some(life) = by_uid.get(&*found.uid) else { continue };
            let known = life.address.as_ref().is_none_or(|address| *address == found.address);
            if life.name != found.name || !known {
                problems.push(format!("a lookup was answered {found:?}, and it is {life:?}"));
            }
        }
        problems
    }

    /// What a registrar shows in the end that cannot be, or does not show although it was acknowledged.
    pub(crate) fn check_final(&self, shown: &BTreeMap<String, Shown>) -> Vec<String> {
        let mut problems = Vec::new();
        for life in &self.lives {
            match (shown.get(&life.uid), life.leaving) {
                (Some(shown), _) if life.left => {
                    problems.push(format!("{life:?} has left, and is {shown:?}"))
                }
                (None, None) => problems.push(format!("{life:?} is gone")),
                (Some(shown), None) => {
                    let address = life.address.as_ref().is_none_or(|address| *address == shown.address);
                    let mut told = life.told.iter().chain(&life.unsure);
                    let endpoint = life.told.is_none() || told.any(|told| *told == shown.endpoint);
                    if shown.name != life.name || !address || !endpoint {
                        problems.push(format!("{life:?} is {shown:?}"));
                    }
                }
                _ => {}
            }
        }
        for path in [|shown: &Shown| shown.name.clone(), |shown: &Shown| shown.address.clone()] {
            let mut all: Vec<String> = shown.values().map(path).filter(|text| !text.is_empty()).collect();
            let count = all.len();
            all.sort();
            all.dedup();
            if all.len() != count {
                problems.push(format!("something has two owners: {shown:?}"));
            }
        }
        problems
    }
}

impl Life {
    /// Whether both were there for certain at some moment.
    fn overlaps(&self, other: &Self) -> bool {
        let end = |life: &Self| life.leaving.unwrap_or(life.joined + Duration::from_secs(1_000_000));
        self.joined < end(other) && other.joined < end(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(name: &str, uid: &str, address: &str, joined: u64, leaving: Option<u64>) -> Life {
        let at = |seconds| Instant::from_boot(Duration::from_secs(seconds));
        Life {
            name: name.into(),
            uid: uid.into(),
            joined: at(joined),
            address: Some(address.into()),
            told: Some("10.0.0.1".into()),
            unsure: Vec::new(),
            leaving: leaving.map(at),
            left: leaving.is_some(),
        }
    }

    fn shown(name: &str, address: &str, endpoint: &str) -> Shown {
        Shown { name: name.into(), address: address.into(), endpoint: endpoint.into() }
    }

    fn history(lives: Vec<Life>) -> History {
        History { lives, ..History::default() }
    }

    #[test]
    fn two_owners_are_found() {
        let first = || life("a", "1", "x", 0, Some(10));
        assert!(history(vec![first(), life("a", "2", "y", 10, None)]).check().is_empty());
        assert_eq!(history(vec![first(), life("a", "2", "y", 9, None)]).check().len(), 1);
        assert_eq!(history(vec![first(), life("b", "2", "x", 9, None)]).check().len(), 1);
        assert!(history(vec![first(), life("b", "2", "y", 9, None)]).check().is_empty());
    }

    #[test]
    fn what_is_lost_is_found() {
        let alive = history(vec![life("a", "1", "x", 0, None)]);
        let show = |shown: Shown| BTreeMap::from([("1".to_owned(), shown)]);
        assert!(alive.check_final(&show(shown("a", "x", "10.0.0.1"))).is_empty());
        assert_eq!(alive.check_final(&BTreeMap::new()).len(), 1);
        for wrong in [shown("b", "x", "10.0.0.1"), shown("a", "y", "10.0.0.1"), shown("a", "x", "10.0.0.2")] {
            assert_eq!(alive.check_final(&show(wrong)).len(), 1);
        }
        let left = history(vec![life("a", "1", "x", 0, Some(1))]);
        assert!(left.check_final(&BTreeMap::new()).is_empty());
        assert_eq!(left.check_final(&show(shown("a", "x", "10.0.0.1"))).len(), 1);
        let twice = BTreeMap::from(["8", "9"].map(|uid| (uid.to_owned(), shown("n", "z", ""))));
        assert_eq!(history(vec![]).check_final(&twice).len(), 2);
    }
}
