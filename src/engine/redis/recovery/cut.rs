//! Where the log of a clone is cut, found out while it passes by: at a command, and never inside MULTI ... EXEC.

use crate::engine::redis::ondisk::aof::{AofDamage, AofWalker, Mark};

/// Where the log of a clone ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All there is.
    Open,
    /// At this place, or at the last command that ends before it.
    At { number: u64, offset: u64 },
    /// Before the first annotation of this time or a later one, in milliseconds since 1970.
    Before(i64),
}

/// The last times, in milliseconds since 1970, that the log of a clone says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times {
    /// At which something was executed or received.
    pub last: Option<i64>,
    /// By which everything that was executed is in it.
    pub executed: Option<i64>,
}

/// Finds out, while a log file passes by, how much of it is kept.
#[derive(Debug)]
pub struct Cut {
    number: u64,
    end: End,
    walker: AofWalker,
    /// Where to cut, as soon as that is certain.
    found: Option<u64>,
    /// The last boundary that is not behind a place that was ordered.
    boundary: u64,
    /// The last annotations: each time with its place. Two are enough, because a cut lies before the last.
    times: [Option<(u64, i64)>; 2],
    executed: [Option<(u64, i64)>; 2],
}

impl Cut {
    /// Begins at byte `from` of a log file, which is a boundary.
    pub fn new(number: u64, from: u64, end: End) -> Cut {
        let walker = AofWalker::new(from);
        Cut { number, end, walker, found: None, boundary: from, times: [None; 2], executed: [None; 2] }
    }

    /// Whether the rest of the file does not matter any more.
    pub fn is_found(&self) -> bool {
        self.found.is_some()
    }

    /// Takes the next bytes, in pieces of any size. An error is damage.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), AofDamage> {
        let (number, end) = (self.number, self.end);
        let (found, boundary) = (&mut self.found, &mut self.boundary);
        let (times, executed) = (&mut self.times, &mut self.executed);
        let mut time = |found: &mut Option<u64>, at: u64, unix_millis: i64| match end {
            End::Before(limit) if unix_millis >= limit => *found = Some(at),
            _ => push(times, at, unix_millis),
        };
        self.walker.feed(bytes, |mark| match (mark, end) {
            _ if found.is_some() => {}
            (Mark::Second { at, unix_seconds }, _) => time(found, at, unix_seconds.saturating_mul(1000)),
            (Mark::Received { at, unix_millis, .. }, _) => time(found, at, unix_millis),
            (Mark::Executed { at, unix_millis, .. }, _) => push(executed, at, unix_millis),
            (Mark::Boundary { at }, End::At { number: last, offset }) if number == last => {
                if at <= offset {
                    *boundary = at;
                }
                if at >= offset {
                    *found = Some(*boundary);
                }
            }
            (Mark::Boundary { at }, _) => *boundary = at,
        })
    }

    /// The highest number of a database that was selected in what has passed.
    pub fn highest_database(&self) -> Option<u32> {
        self.walker.highest_database()
    }

    /// How many of the `read` bytes of the file are kept, once all of it has passed or the cut was found.
    pub fn kept(&self, read: u64) -> Result<u64, AofDamage> {
        if let Some(found) = self.found {
            return Ok(found);
        }
        self.walker.finish()?;
        Ok(read)
    }

    /// The last annotations in what is kept.
    pub fn times_kept(&self, kept: u64) -> Times {
        let last =
            |of: &[Option<(u64, i64)>]| of.iter().rev().flatten().find(|(at, _)| *at < kept).map(|(_, time)| *time);
        Times { last: last(&self.times), executed: last(&self.executed) }
    }
}

fn push(times: &mut [Option<(u64, i64)>; 2], at: u64, unix_millis: i64) {
    times.rotate_left(1);
    times[1] = Some((at, unix_millis));
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "#TS:100\r\n*1\r\n$1\r\nA\r\n#TS:102\r\n*1\r\n$5\r\nMULTI\r\n*1\r\n$1\r\nB\r\n*1\r\n$4\r\nEXEC\r\n*1\r\n$1\r\nC\r\n";

    /// Bytes kept of a log as file 7, and the times that they reach.
    fn cut_of(log: &str, from: u64, end: End) -> (u64, Times, bool) {
        let mut outcomes = Vec::new();
        for piece in [1, 3, 1000] {
            let mut cut = Cut::new(7, from, end);
            log.as_bytes()[from as usize..].chunks(piece).for_each(|part| cut.feed(part).unwrap());
            let kept = cut.kept(log.len() as u64).unwrap();
            outcomes.push((kept, cut.times_kept(kept), cut.is_found()));
        }
        assert!(outcomes.windows(2).all(|pair| pair[0] == pair[1]), "{outcomes:?}");
        outcomes[0]
    }

    fn cut(end: End) -> (u64, Option<i64>, bool) {
        let (kept, times, is_found) = cut_of(LOG, 0, end);
        (kept, times.last, is_found)
    }

    #[test]
    fn a_time_keeps_what_was_executed_before_that_second() {
        let second = LOG.find("#TS:102").unwrap() as u64;
        assert_eq!(cut(End::Before(100_000)), (0, None, true));
        assert_eq!(cut(End::Before(101_000)), (second, Some(100_000), true));
        assert_eq!(cut(End::Before(102_000)), (second, Some(100_000), true));
        assert_eq!(cut(End::Before(103_000)), (LOG.len() as u64, Some(102_000), false));
        assert_eq!(cut(End::Open), (LOG.len() as u64, Some(102_000), false));
    }

    #[test]
    fn after_a_clock_was_set_back_what_was_written_before_counts() {
        let log = "#TS:100\r\n*1\r\n$1\r\nA\r\n#TS:102\r\n*1\r\n$1\r\nB\r\n#TS:101\r\n*1\r\n$1\r\nC\r\n";
        let second = log.find("#TS:102").unwrap() as u64;
        assert_eq!(cut_of(log, 0, End::Before(101_000)).0, second);
        assert_eq!(cut_of(log, 0, End::Before(102_000)).0, second);
        assert_eq!(cut_of(log, 0, End::Before(103_000)).0, log.len() as u64);
    }

    #[test]
    fn a_stream_keeps_what_was_received_before_and_says_what_was_executed() {
        let (one, two) = ("*1\r\n$1\r\nA\r\n", "*1\r\n$1\r\nB\r\n");
        let id = "a".repeat(40);
        let log = format!(
            "#KEIKI-OF:{id}:0\r\n#KEIKI-AT:1005:0\r\n{one}#KEIKI-BY:1007:11\r\n#KEIKI-AT:1009:11\r\n{two}#KEIKI-BY:1010:22\r\n"
        );
        let place = |text: &str| log.find(text).unwrap() as u64;
        let times = |last, executed| Times { last, executed };
        assert_eq!(cut_of(&log, 0, End::Before(1005)), (place("#KEIKI-AT:1005"), times(None, None), true));
        let first = (place("#KEIKI-AT:1009"), times(Some(1005), Some(1007)), true);
        assert_eq!(cut_of(&log, 0, End::Before(1006)), first);
        assert_eq!(cut_of(&log, 0, End::Before(1009)), first);
        let all = (log.len() as u64, times(Some(1009), Some(1010)), false);
        assert_eq!(cut_of(&log, 0, End::Before(1010)), all);
        // A backup that begins inside the file: what is before is not looked at.
        let from = place("#KEIKI-BY:1007");
        assert_eq!(cut_of(&log, from, End::Before(1009)), (place("#KEIKI-AT:1009"), times(None, Some(1007)), true));
        assert_eq!(cut_of(&log, from, End::At { number: 7, offset: from }).0, from);
    }

    #[test]
    fn a_position_inside_a_transaction_keeps_none_of_it() {
        let (multi, exec_end) = (LOG.find("*1\r\n$5").unwrap() as u64, LOG.find("*1\r\n$1\r\nC").unwrap() as u64);
        for offset in multi..exec_end {
            assert_eq!(cut(End::At { number: 7, offset }).0, multi, "{offset}");
        }
        assert_eq!(cut(End::At { number: 7, offset: exec_end }).0, exec_end);
        assert_eq!(cut(End::At { number: 7, offset: 1 << 40 }).0, LOG.len() as u64);
        // The end lies in a later file: all of this one is kept.
        assert_eq!(cut(End::At { number: 8, offset: 1 }), (LOG.len() as u64, Some(102_000), false));
    }

    #[test]
    fn a_log_that_is_torn_is_refused() {
        let mut cut = Cut::new(7, 0, End::Open);
        cut.feed(&LOG.as_bytes()[..LOG.len() - 3]).unwrap();
        assert!(cut.kept(LOG.len() as u64 - 3).is_err());
    }
}
