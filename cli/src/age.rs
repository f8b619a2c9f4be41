//! Ages as kubectl prints them: two units at most, and fewer the older it is (`45s`, `3h20m`, `12d`).

use muster_common::time::Timestamp;

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
const YEAR: u64 = 365 * DAY;

/// `seconds` in the form that suits its size.
pub fn short(seconds: u64) -> String {
    let two = |large: u64, l: &str, small: u64, s: &str| match seconds % large / small {
        0 => format!("{}{l}", seconds / large),
        rest => format!("{}{l}{rest}{s}", seconds / large),
    };
    match seconds {
        s if s < 2 * MINUTE => format!("{s}s"),
        s if s < 10 * MINUTE => two(MINUTE, "m", 1, "s"),
        s if s < 3 * HOUR => format!("{}m", s / MINUTE),
        s if s < 8 * HOUR => two(HOUR, "h", MINUTE, "m"),
        s if s < 2 * DAY => format!("{}h", s / HOUR),
        s if s < 8 * DAY => two(DAY, "d", HOUR, "h"),
        s if s < 2 * YEAR => format!("{}d", s / DAY),
        s if s < 8 * YEAR => two(YEAR, "y", DAY, "d"),
        s => format!("{}y", s / YEAR),
    }
}

/// The age of what was made at `created`, `<unknown>` if that is not known.
pub fn age(created: Option<Timestamp>, now: Timestamp) -> String {
    created.map_or_else(|| "<unknown>".into(), |t| short(now.saturating_duration_since(t).as_secs()))
}

/// A moment with its distance from now: `2026-11-25T02:00:00Z (5m ago)`, `… (in 29d)`.
pub fn moment(at: Option<Timestamp>, now: Timestamp) -> String {
    let Some(at) = at else { return "<unknown>".into() };
    if at > now {
        format!("{at} (in {})", short(at.saturating_duration_since(now).as_secs()))
    } else {
        format!("{at} ({} ago)", short(now.saturating_duration_since(at).as_secs()))
    }
}

/// A protobuf timestamp in whole seconds; before 1970 counts as 1970.
pub fn timestamp(proto: Option<&pbjson_types::Timestamp>) -> Option<Timestamp> {
    let seconds = u64::try_from(proto?.seconds).unwrap_or(0);
    Some(Timestamp::from_epoch(std::time::Duration::from_secs(seconds)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn ages_read_as_kubectl_prints_them() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (135, "2m15s"),
            (599, "9m59s"),
            (600, "10m"),
            (3 * HOUR - 1, "179m"),
            (3 * HOUR, "3h"),
            (3 * HOUR + 20 * MINUTE, "3h20m"),
            (8 * HOUR - 1, "7h59m"),
            (8 * HOUR + 5, "8h"),
            (47 * HOUR, "47h"),
            (2 * DAY, "2d"),
            (2 * DAY + 5 * HOUR, "2d5h"),
            (12 * DAY, "12d"),
            (729 * DAY, "729d"),
            (730 * DAY, "2y"),
            (740 * DAY, "2y10d"),
            (9 * YEAR, "9y"),
        ] {
            assert_eq!(short(seconds), text);
        }
    }

    #[test]
    fn moments_tell_past_and_future() {
        let at = |s| Timestamp::from_epoch(Duration::from_secs(s));
        assert_eq!(age(Some(at(10)), at(5)), "0s");
        assert_eq!(age(None, at(5)), "<unknown>");
        assert_eq!(moment(Some(at(0)), at(300)), "1970-01-01T00:00:00Z (5m ago)");
        assert_eq!(moment(Some(at(DAY)), at(0)), "1970-01-02T00:00:00Z (in 24h)");
        assert_eq!(timestamp(Some(&pbjson_types::Timestamp { seconds: -1, nanos: 0 })), Some(at(0)));
    }
}
