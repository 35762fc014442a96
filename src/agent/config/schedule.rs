//! When backups begin: daily windows in the form `02:00-08:00 daily`, and the pure question "when is the next one?".
//!
//! A window opens once on each of its days; one backup belongs to each opening. A backup that was missed because the
//! agent was down begins as soon as the agent is up, as long as the window is still open.

use jiff::civil::{Date, DateTime, Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

use crate::error::{Error, Kind, Result};

/// One line of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupWindow {
    opens: Time,
    /// At or before `opens` means: on the day after.
    closes: Time,
    /// Monday first.
    days: [bool; 7],
    /// What the times of day mean; the time zone of the host where the line names none.
    zone: Option<TimeZone>,
}

const DAY_NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// Two weeks hold every weekday at least twice, so a window that opens at all opens within them, even if a change
/// of the clocks swallows one opening.
const DAYS_AHEAD: i64 = 14;

impl BackupWindow {
    /// Reads `HH:MM-HH:MM DAYS [ZONE]`: days are `daily` or a list such as `mon-fri` or `sat,sun`, the zone is an
    /// IANA name such as `Europe/Berlin` or `UTC`.
    pub fn parse(text: &str) -> Result<BackupWindow> {
        let bad = |why: String| {
            Error::new(Kind::BadInput, format!("'{text}' is not a backup window: {why}"))
                .hint("write it like '02:00-08:00 daily', '22:00-04:00 mon-fri' or '01:00-05:00 sat,sun Europe/Berlin'")
        };
        let words: Vec<&str> = text.split_whitespace().collect();
        let (times, days, zone) = match words[..] {
            [times, days] => (times, days, None),
            [times, days, zone] => (times, days, Some(zone)),
            _ => return Err(bad("it needs times and days".into())),
        };
        let (opens, closes) = times.split_once('-').ok_or_else(|| bad(format!("'{times}' has no '-'")))?;
        let opens = parse_time_of_day(opens).ok_or_else(|| bad(format!("'{opens}' is not a time of day")))?;
        let closes = parse_time_of_day(closes).ok_or_else(|| bad(format!("'{closes}' is not a time of day")))?;
        if opens == closes {
            return Err(bad("it closes when it opens".into()));
        }
        let days = parse_days(days).ok_or_else(|| bad(format!("'{days}' does not name days of the week")))?;
        let zone = match zone {
            None => None,
            Some(name) => Some(TimeZone::get(name).map_err(|_| bad(format!("time zone '{name}' is not known")))?),
        };
        Ok(BackupWindow { opens, closes, days, zone })
    }

    /// The instants at which the window opens and closes, if it opens on this day of its zone.
    fn opening_on(&self, day: Date, local: &TimeZone) -> Option<(Timestamp, Timestamp)> {
        if !self.days[usize::try_from(day.weekday().to_monday_zero_offset()).ok()?] {
            return None;
        }
        let zone = self.zone.as_ref().unwrap_or(local);
        let last_day = if self.closes > self.opens { day } else { day.tomorrow().ok()? };
        let instant = |civil: DateTime| zone.to_ambiguous_timestamp(civil).compatible().ok();
        let opens = instant(day.to_datetime(self.opens))?;
        let closes = instant(last_day.to_datetime(self.closes))?;
        // A change of the clocks can leave nothing of a short window.
        (closes > opens).then_some((opens, closes))
    }

    fn next_start(&self, now: Timestamp, last_began_at: Option<Timestamp>, local: &TimeZone) -> Option<Timestamp> {
        let zone = self.zone.as_ref().unwrap_or(local);
        // Yesterday's window may still be open.
        let mut day = zone.to_datetime(now).date().yesterday().ok()?;
        for _ in 0..=DAYS_AHEAD {
            if let Some((opens, closes)) = self.opening_on(day, local)
                && closes > now
                && last_began_at.is_none_or(|began| began < opens)
            {
                return Some(opens.max(now));
            }
            day = day.checked_add(1.day()).ok()?;
        }
        None
    }
}

/// When the next backup is to begin: `now` if a window is open in which none has begun yet, otherwise the next
/// opening. `last_began_at` is the start of the newest automatic backup that succeeded or still runs, `local` the time
/// zone of the host. `None` only without windows.
pub fn next_start(
    windows: &[BackupWindow],
    now: Timestamp,
    last_began_at: Option<Timestamp>,
    local: &TimeZone,
) -> Option<Timestamp> {
    windows.iter().filter_map(|window| window.next_start(now, last_began_at, local)).min()
}

fn parse_time_of_day(text: &str) -> Option<Time> {
    let (hour, minute) = text.split_once(':')?;
    let number = |digits: &str| match digits.len() {
        1 | 2 if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse::<i8>().ok(),
        _ => None,
    };
    if minute.len() != 2 {
        return None;
    }
    // Midnight at the end of a day is the same instant as midnight at the start of the next.
    let hour = if (hour, minute) == ("24", "00") { 0 } else { number(hour)? };
    Time::new(hour, number(minute)?, 0, 0).ok()
}

fn parse_days(text: &str) -> Option<[bool; 7]> {
    if text == "daily" {
        return Some([true; 7]);
    }
    let day = |name: &str| DAY_NAMES.iter().position(|known| name.eq_ignore_ascii_case(known));
    let mut days = [false; 7];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        let mut index = first;
        days[index] = true;
        while index != last {
            index = (index + 1) % 7;
            days[index] = true;
        }
    }
    debug_assert_eq!(Weekday::Monday.to_monday_zero_offset(), 0);
    Some(days)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn next(window: &str, now: &str, last: Option<&str>, zone: &str) -> Option<String> {
        let windows = [BackupWindow::parse(window).unwrap()];
        next_start(&windows, at(now), last.map(at), &TimeZone::get(zone).unwrap()).map(|instant| instant.to_string())
    }

    #[test]
    fn a_backup_begins_when_the_window_opens() {
        let found = next("02:00-08:00 daily", "2026-11-21T09:00:00Z", Some("2026-11-21T02:00:00Z"), "UTC");
        assert_eq!(found.as_deref(), Some("2026-11-22T02:00:00Z"));
        let found = next("02:00-08:00 daily", "2026-11-21T01:00:00Z", Some("2026-11-20T02:00:00Z"), "UTC");
        assert_eq!(found.as_deref(), Some("2026-11-21T02:00:00Z"));
    }

    #[test]
    fn a_missed_backup_begins_at_once_while_the_window_is_open_and_not_after() {
        let last = Some("2026-11-20T02:00:01Z");
        let found = next("02:00-08:00 daily", "2026-11-21T07:59:59Z", last, "UTC");
        assert_eq!(found.as_deref(), Some("2026-11-21T07:59:59Z"));
        let found = next("02:00-08:00 daily", "2026-11-21T08:00:00Z", last, "UTC");
        assert_eq!(found.as_deref(), Some("2026-11-22T02:00:00Z"));
    }

    #[test]
    fn one_backup_belongs_to_each_opening() {
        let found = next("02:00-08:00 daily", "2026-11-21T03:00:00Z", Some("2026-11-21T02:00:00Z"), "UTC");
        assert_eq!(found.as_deref(), Some("2026-11-22T02:00:00Z"));
    }

    #[test]
    fn a_window_over_midnight_belongs_to_the_day_on_which_it_opens() {
        // 2026-11-20 is a Friday.
        let found = next("22:00-04:00 fri", "2026-11-21T03:00:00Z", None, "UTC");
        assert_eq!(found.as_deref(), Some("2026-11-21T03:00:00Z"));
        let found = next("22:00-04:00 fri", "2026-11-21T04:00:00Z", None, "UTC");
        assert_eq!(found.as_deref(), Some("2026-11-27T22:00:00Z"));
    }

    #[test]
    fn days_wrap_around_the_end_of_the_week() {
        // 2026-11-18 is a Wednesday.
        let found = next("01:00-02:00 sat-mon", "2026-11-18T00:00:00Z", None, "UTC");
        assert_eq!(found.as_deref(), Some("2026-11-21T01:00:00Z"));
        assert_eq!(parse_days("sat-mon"), Some([true, false, false, false, false, true, true]));
    }

    #[test]
    fn times_are_those_of_the_named_zone_or_else_of_the_host() {
        let found = next("02:00-08:00 daily", "2026-11-21T00:00:00Z", None, "Europe/Berlin");
        assert_eq!(found.as_deref(), Some("2026-11-21T01:00:00Z"));
        let found = next("02:00-08:00 daily Asia/Tokyo", "2026-11-21T00:00:00Z", None, "Europe/Berlin");
        assert_eq!(found.as_deref(), Some("2026-11-21T17:00:00Z"));
    }

    #[test]
    fn the_day_on_which_clocks_change_has_its_backup() {
        // Clocks in Berlin jump from 02:00 to 03:00 on 2026-03-29: 02:30 does not exist, half of the window does.
        let found = next("02:30-03:45 daily", "2026-03-29T00:00:00Z", Some("2026-03-28T01:30:00Z"), "Europe/Berlin");
        assert_eq!(found.as_deref(), Some("2026-03-29T01:30:00Z"));
        // And nothing at all is left of 02:00-02:30 but the minute it maps to: the next day has the next backup.
        let found = next("02:00-02:30 daily", "2026-03-29T02:00:00Z", Some("2026-03-29T01:00:00Z"), "Europe/Berlin");
        assert_eq!(found.as_deref(), Some("2026-03-30T00:00:00Z"));
    }

    #[test]
    fn the_earliest_of_several_windows_wins() {
        let windows = ["05:00-06:00 daily", "03:00-04:00 daily"].map(|text| BackupWindow::parse(text).unwrap());
        let found = next_start(&windows, at("2026-11-21T00:00:00Z"), None, &TimeZone::UTC);
        assert_eq!(found, Some(at("2026-11-21T03:00:00Z")));
        assert_eq!(next_start(&[], at("2026-11-21T00:00:00Z"), None, &TimeZone::UTC), None);
    }

    #[test]
    fn what_is_no_window_is_refused_with_the_reason() {
        for bad in ["", "daily", "02:00 daily", "2-8 daily", "02:00-25:00 daily", "02:00-02:00 daily", "02:00-08:00"] {
            assert_eq!(BackupWindow::parse(bad).unwrap_err().kind(), Kind::BadInput, "{bad}");
        }
        for bad in ["02:00-08:00 never", "02:00-08:00 mon-", "02:00-08:00 daily Mars/Olympus", "02:0-08:00 daily"] {
            assert_eq!(BackupWindow::parse(bad).unwrap_err().kind(), Kind::BadInput, "{bad}");
        }
    }
}
