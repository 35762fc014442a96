//! Spans of time as a person reads them.

/// `93` as `1m 33s`; two units at most.
pub fn human_seconds(seconds: u64) -> String {
    let (days, hours, minutes, rest) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest}s"),
        (0, 0, _) => format!("{minutes}m {rest}s"),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::human_seconds;

    #[test]
    fn spans_have_two_units_at_most() {
        assert_eq!([0, 59, 93, 3600, 90061].map(human_seconds), ["0s", "59s", "1m 33s", "1h 0m", "1d 1h"]);
    }
}
