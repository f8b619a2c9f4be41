//! Durations on the command line: `90s`, `1h30m`, `7d`.

use std::time::Duration;

use jiff::{Span, SpanRelativeTo};

/// Reads a duration such as `90s`, `1h30m` or `7d`: more than zero and at most ten years.
pub fn parse(text: &str) -> Result<Duration, String> {
    const MAX: u64 = 3650 * 24 * 3600;
    let bad = || format!("{text:?} is not a duration; write for example 90s, 1h30m or 7d");
    let span: Span = text.trim().parse().map_err(|_| bad())?;
    let duration = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| bad())?;
    let duration = Duration::try_from(duration).map_err(|_| format!("{text:?} is negative"))?;
    match duration.as_secs() {
        _ if duration.is_zero() => Err("must be more than zero".into()),
        seconds if seconds > MAX => Err("must be at most ten years (3650d)".into()),
        _ => Ok(duration),
    }
}

/// As [`parse`], and zero as well.
pub fn parse_or_zero(text: &str) -> Result<Duration, String> {
    if matches!(text.trim(), "0" | "0s") { Ok(Duration::ZERO) } else { parse(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read() {
        for (text, seconds) in
            [("90s", 90), ("1h", 3600), ("1h30m", 5400), ("7d", 604_800), ("2w", 1_209_600)]
        {
            assert_eq!(parse(text).unwrap().as_secs(), seconds, "{text}");
        }
        assert_eq!(parse_or_zero("0").unwrap(), Duration::ZERO);
    }

    #[test]
    fn what_is_not_a_duration_is_refused() {
        for text in ["", "1", "h", "-1h", "0s", "1 fortnight", "4000d", "99999999999999999999h"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
