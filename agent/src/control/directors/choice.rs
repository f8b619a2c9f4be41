//! Choosing directors: now and then several are attached to, to measure them, and the nearest ones are kept. Home and
//! second change seldom, since all peers hear of it, but at once where one is lost.

use std::{collections::BTreeSet, time::Duration};

use muster_common::time::Instant;
use muster_tunnel::DirectorId;
use rand::{RngExt, rngs::StdRng};

use super::{Director, Directors, LEAVE_AFTER, State, Way};

/// Directors measured in one round at most.
const MEASURED: usize = 6;
/// Directors that stay attached: home, second, and one more.
const KEPT: usize = 3;
/// From one round to the next, give or take a fifth.
const ROUND_INTERVAL: Duration = Duration::from_secs(15 * 60);
/// Between rounds at least, also while there is no second director.
const ROUND_PAUSE: Duration = Duration::from_secs(30);
/// Whoever has not answered by then is as far away as can be.
const ROUND_PATIENCE: Duration = Duration::from_secs(10);
/// The first home is chosen so long after the first director has answered, for a nearer one to answer as well.
const CHOICE_DELAY: Duration = Duration::from_millis(300);
/// Another director must be nearer than the home by so much, and by this part of the home's distance, in so many
/// measurements in a row.
const NEARER_BY: Duration = Duration::from_millis(10);
const NEARER_PART: f64 = 0.3;
const STREAK: u8 = 4;
/// Where a director counts as being that has not been measured.
const FARTHEST: Duration = Duration::from_secs(60);

/// A round of measurements.
#[derive(Debug)]
pub(super) struct Round {
    ids: BTreeSet<DirectorId>,
    deadline: Instant,
}

impl Round {
    pub(super) fn forget(&mut self, id: DirectorId) {
        self.ids.remove(&id);
    }
}

impl Directors {
    pub(super) fn is_wanted(&self, id: DirectorId) -> bool {
        let is_chosen = [self.home, self.second].contains(&Some(id)) || self.kept.contains(&id);
        let is_measured = self.round.as_ref().is_some_and(|round| round.ids.contains(&id));
        // One that must go does go, whoever might want it, as soon as there is another one.
        let must_go = self.known.get(&id).is_some_and(Director::is_leaving) && self.has_steady();
        let lingers = self.known.get(&id).is_some_and(|director| director.leave_at.is_some());
        if must_go { lingers } else { is_chosen || is_measured || self.needed.contains_key(&id) }
    }

    /// Whether there is this director, can be used, and is not to be left.
    fn is_steady(&self, id: Option<DirectorId>) -> bool {
        let director = id.and_then(|id| self.known.get(&id));
        director.is_some_and(|director| director.is_usable() && !director.is_leaving())
    }

    /// Whether a director can be used that is not to be left.
    fn has_steady(&self) -> bool {
        self.known.values().any(|director| director.is_usable() && !director.is_leaving())
    }

    pub(super) fn round_timeout(&self) -> Option<Instant> {
        match &self.round {
            Some(round) => Some(round.deadline),
            None => self.next_round.into_iter().chain(self.early_round()).min(),
        }
    }

    /// When a round is due before its time, because home or second is missing and there are others.
    fn early_round(&self) -> Option<Instant> {
        let is_usable = |id| self.known.get(&id).is_some_and(|director: &Director| director.is_usable());
        let is_missing = !self.home.is_some_and(is_usable) || !self.second.is_some_and(is_usable);
        let others = self.known.keys().any(|id| !self.kept.contains(id));
        self.soonest_round.filter(|_| is_missing && others)
    }

    /// A director that has just been left is no reason to measure at once, it least of all.
    pub(super) fn put_off_round(&mut self, now: Instant) {
        if self.round.is_none() && self.early_round().is_some_and(|due| due <= now) {
            self.soonest_round = Some(now + ROUND_PAUSE);
        }
    }

    pub(super) fn advance_round(&mut self, rng: &mut StdRng, now: Instant) {
        if self.known.is_empty() {
            (self.round, self.next_round, self.soonest_round) = (None, None, None);
            return;
        }
        self.finish_round(now);
        if self.round.is_none() && self.round_timeout().is_some_and(|due| due <= now) {
            self.begin_round(rng, now);
            self.finish_round(now);
        }
    }

    /// Ends the round if there is nothing to wait for any more.
    fn finish_round(&mut self, now: Instant) {
        let is_measured = |id: &DirectorId| {
            self.known.get(id).is_none_or(|director| match director.way {
                Some(Way::Udp) => director.distance.is_measured(),
                Some(Way::Tcp) => true,
                None => matches!(director.state, State::Waiting { until } if until > now),
            })
        };
        let is_over = |round: &Round| round.deadline <= now || round.ids.iter().all(is_measured);
        if self.round.as_ref().is_some_and(is_over) {
            self.round = None;
            self.end_round();
        }
    }

    /// Those that are used, and others at random.
    fn begin_round(&mut self, rng: &mut StdRng, now: Instant) {
        let mut others: Vec<DirectorId> = self.known.keys().copied().collect();
        for n in (1..others.len()).rev() {
            others.swap(n, rng.random_range(0..=n));
        }
        let is_used =
            |id: &DirectorId| self.kept.contains(id) || [self.home, self.second].contains(&Some(*id));
        others.sort_by_key(|id| !is_used(id));
        let is_candidate = |id: &DirectorId| {
            is_used(id) || !self.has_steady() || self.known.get(id).is_some_and(|d| !d.is_leaving())
        };
        others.retain(is_candidate);
        others.truncate(MEASURED);
        for id in &others {
            if let Some(director) = self.known.get_mut(id).filter(|director| director.state == State::Idle) {
                director.distance.forget();
            }
        }
        self.round = Some(Round { ids: others.into_iter().collect(), deadline: now + ROUND_PATIENCE });
        self.next_round = Some(now + ROUND_INTERVAL.mul_f64(rng.random_range(0.8..=1.2)));
        self.soonest_round = Some(now + ROUND_PAUSE);
    }

    /// Keeps the nearest. Of those that cannot be used, some are tried again and again.
    fn end_round(&mut self) {
        let mut ranked: Vec<DirectorId> = self.known.keys().copied().collect();
        ranked.sort_by_key(|id| self.rank(*id));
        self.kept = ranked.into_iter().take(KEPT).collect();
        // The second is seldom used, so a nearer one may take its place at once.
        if let (Some(second), Some(best)) = (self.second, self.best(self.home))
            && let (Some(second), Some(nearer)) = (self.known.get(&second), self.known.get(&best))
            && is_nearer(nearer, second)
        {
            self.second = Some(best);
        }
        // Whatever has answered by now, the nearest of it is the home.
        self.choice_at = None;
        if self.home.is_none() {
            self.home = self.best(None);
        }
    }

    /// Better ones come first.
    fn rank(&self, id: DirectorId) -> impl Ord + use<> {
        let director = self.known.get(&id);
        let is_usable = director.is_some_and(Director::is_usable);
        let is_leaving = director.is_some_and(Director::is_leaving);
        let is_failing = director.is_none_or(|director| matches!(director.state, State::Waiting { .. }));
        (is_leaving, !is_usable, is_failing, director.map(Director::distance), id)
    }

    /// The best one that can be used, other than `not`; one to be left only if there is no other.
    fn best(&self, not: Option<DirectorId>) -> Option<DirectorId> {
        let usable = self.known.iter().filter(|(_, director)| director.is_usable());
        usable.map(|(id, _)| *id).filter(|id| Some(*id) != not).min_by_key(|id| self.rank(*id))
    }

    /// Home and second as they must be by now. One that is lost stays what it is while no other can take its place:
    /// it may well come back.
    pub(super) fn choose(&mut self, now: Instant) {
        if !self.is_steady(self.home) {
            let next = if self.is_steady(self.second) { self.second } else { self.best(None) };
            let is_better = |next: DirectorId| match self.home.and_then(|home| self.known.get(&home)) {
                Some(home) if home.is_usable() => self.is_steady(Some(next)),
                Some(_) => true,
                // The very first: perhaps a nearer one is about to answer.
                None => self.round.is_none() || self.choice_at.is_some_and(|at| at <= now),
            };
            match next {
                Some(next) if is_better(next) => {
                    if self.second == Some(next) {
                        self.second = None;
                    }
                    self.home = Some(next);
                    self.known.values_mut().for_each(|director| director.streak = 0);
                }
                Some(_) if self.home.is_none() => {
                    self.choice_at.get_or_insert(now + CHOICE_DELAY);
                }
                _ => self.choice_at = None,
            }
        }
        if self.home.is_some() {
            self.choice_at = None;
        }
        // While the first round goes on, there is no hurry.
        if !self.is_steady(self.second) && (self.round.is_none() || self.second.is_some()) {
            let next = self.best(self.home).filter(|next| self.is_steady(Some(*next)));
            self.second = next.or(self.second);
        }
        if self.second == self.home {
            self.second = None;
        }
    }

    /// A measurement of `id` has come: whether it should be the home.
    pub(super) fn compare(&mut self, id: DirectorId) {
        let Some(home) = self.home.filter(|home| *home != id) else { return };
        let (Some(old), Some(new)) = (self.known.get(&home), self.known.get(&id)) else { return };
        let is_nearer = new.is_usable() && !new.is_leaving() && is_nearer(new, old);
        let Some(director) = self.known.get_mut(&id) else { return };
        director.streak = if is_nearer { director.streak + 1 } else { 0 };
        if director.streak >= STREAK {
            (self.home, self.second) = (Some(id), Some(home));
            self.known.values_mut().for_each(|director| director.streak = 0);
        }
    }

    /// A director that is shutting down is left a moment after others have taken its place.
    pub(super) fn leave_draining(&mut self, now: Instant) {
        let has_steady = self.has_steady();
        for director in self.known.values_mut() {
            director.leave_at = if director.is_leaving() && has_steady && director.is_usable() {
                let at = director.leave_at.unwrap_or(now + LEAVE_AFTER);
                // It has been left: until it is measured again, it is as any other.
                (at > now).then_some(at)
            } else {
                None
            };
        }
        let left = |id: &DirectorId| {
            self.known.get(id).is_some_and(|director| director.is_leaving() && director.leave_at.is_none())
        };
        if has_steady {
            let left: Vec<DirectorId> = self.known.keys().copied().filter(left).collect();
            self.kept.retain(|id| !left.contains(id));
            self.second = self.second.filter(|id| !left.contains(id));
        }
    }
}

fn is_nearer(nearer: &Director, than: &Director) -> bool {
    let [near, far] = [nearer, than].map(|director| director.distance().min(FARTHEST));
    near + NEARER_BY.max(far.mul_f64(NEARER_PART)) < far
}
