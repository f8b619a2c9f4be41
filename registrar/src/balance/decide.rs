//! How many sessions are too many, and when a number of sessions is worth a write. Pure.

/// Sessions more than the fair share that are left alone: moving costs more than they do.
const SLACK: u64 = 16;

/// Sessions that should be elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Excess {
    /// How many.
    pub(super) count: u64,
    /// What each registrar should have.
    pub(super) fair: u64,
}

/// Whether a registrar with `own` sessions beside registrars with `others` has too many: more than a fifth, and more than
/// a few, above the mean.
pub(super) fn too_many(own: u64, others: &[u64]) -> Option<Excess> {
    let all = others.len() as u64 + 1;
    let total: u64 = others.iter().fold(own, |sum, other| sum.saturating_add(*other));
    let fair = total.div_ceil(all);
    let allowed = fair + (fair / 5).max(SLACK);
    (own > allowed).then(|| Excess { count: own - fair, fair })
}

/// Whether others should know that it is `now` where it was `told`.
pub(super) fn is_news(told: u64, now: u64) -> bool {
    told.abs_diff(now) > (told / 20).max(SLACK / 2) || (told == 0) != (now == 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_clear_differences_move_agents() {
        assert_eq!(too_many(0, &[]), None);
        assert_eq!(too_many(1_000_000, &[]), None);
        assert_eq!(too_many(17, &[0]), None);
        assert_eq!(too_many(600, &[400]), None);
        assert_eq!(too_many(601, &[399]), Some(Excess { count: 101, fair: 500 }));
        // One of three has just come back.
        assert_eq!(too_many(5000, &[5000, 0]), Some(Excess { count: 1666, fair: 3334 }));
        assert_eq!(too_many(0, &[5000, 5000]), None);
    }

    #[test]
    fn small_changes_are_not_told() {
        assert!(is_news(0, 1) && is_news(1, 0));
        assert!(!is_news(1, 9) && is_news(1, 10));
        assert!(!is_news(10_000, 10_500) && is_news(10_000, 9_499));
    }

    proptest! {
        /// Whatever they have, all doing so at once end up within what is left alone, and then nobody moves.
        #[test]
        fn registrars_come_to_rest(mut sessions in proptest::collection::vec(0_u64..100_000, 1..8)) {
            for _ in 0..20 {
                let moves: Vec<_> = (0..sessions.len()).map(|own| {
                    let mut others = sessions.clone();
                    let own = others.remove(own);
                    too_many(own, &others)
                }).collect();
                if moves.iter().all(Option::is_none) {
                    return Ok(());
                }
                let before = sessions.clone();
                for (from, excess) in moves.iter().enumerate() {
                    let Some(excess) = excess else { continue };
                    let room: Vec<usize> = (0..before.len()).filter(|to| before[*to] < excess.fair).collect();
                    prop_assert!(!room.is_empty());
                    sessions[from] -= excess.count;
                    for n in 0..excess.count {
                        sessions[room[n as usize % room.len()]] += 1;
                    }
                }
            }
            prop_assert!(false, "still moving: {sessions:?}");
        }
    }
}
