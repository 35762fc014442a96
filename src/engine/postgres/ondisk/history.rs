//! Timeline history files: through which timelines a log came to be.
//!
//! `NNNNNNNN.history` has one line per ancestor, oldest first: its number, the position where the next timeline
//! left it, and the reason, separated by tabs (`src/backend/access/transam/timeline.c`: readTimeLineHistory,
//! writeTimeLineHistory). Timeline 1 has no file.
//!
//! The position of a switch is an end: the bytes before it belong to the ancestor, the byte at it to the successor.
//! It is the server's EndOfLog, the aligned end of the last record that was replayed before the promotion, and never
//! lies behind a page header that was skipped: where the log ends with a full page, it is the page boundary.

use std::fmt::Write;

use crate::error::{Error, Kind, Result};
use crate::model::position::Lsn;

/// An ancestor of a timeline, and where it was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ancestor {
    pub timeline: u32,
    /// The first position that does not belong to it.
    pub left_at: Lsn,
    /// The server's remark, such as `no recovery target specified`.
    pub reason: String,
}

/// The history of one timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistory {
    timeline: u32,
    ancestors: Vec<Ancestor>,
}

impl TimelineHistory {
    /// The history of a timeline that has no file: it has no ancestors.
    pub fn of_first(timeline: u32) -> TimelineHistory {
        TimelineHistory { timeline, ancestors: Vec::new() }
    }

    /// Reads the content of the history file of `timeline`. As in the server, empty lines and lines that begin with
    /// `#` are skipped and numbers must grow; beyond the server, positions must not go backwards.
    pub fn parse(timeline: u32, content: &[u8]) -> Result<TimelineHistory> {
        let damaged = |why: String| {
            Error::new(Kind::Damaged, format!("the history of timeline {timeline} cannot be read: {why}"))
        };
        // The reason may hold the name of a restore point in any encoding.
        let text = String::from_utf8_lossy(content);
        let mut ancestors: Vec<Ancestor> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            if line.trim_start().is_empty() || line.trim_start().starts_with('#') {
                continue;
            }
            let ancestor = parse_line(line)
                .ok_or_else(|| damaged(format!("line {} is not a timeline and a position", index + 1)))?;
            if let Some(previous) = ancestors.last() {
                if ancestor.timeline <= previous.timeline {
                    return Err(damaged(format!("timeline {} follows {}", ancestor.timeline, previous.timeline)));
                }
                if ancestor.left_at < previous.left_at {
                    return Err(damaged(format!(
                        "timeline {} was left at {}, before it began",
                        ancestor.timeline, ancestor.left_at
                    )));
                }
            }
            ancestors.push(ancestor);
        }
        match ancestors.last() {
            Some(last) if last.timeline >= timeline => {
                Err(damaged(format!("its ancestor {} is not older than it", last.timeline)))
            }
            _ => Ok(TimelineHistory { timeline, ancestors }),
        }
    }

    /// The timeline whose history it is.
    pub fn timeline(&self) -> u32 {
        self.timeline
    }

    /// The ancestors, oldest first: the switch points.
    pub fn ancestors(&self) -> &[Ancestor] {
        &self.ancestors
    }

    /// The timeline that the byte at `lsn` belongs to, on the way to this timeline.
    pub fn timeline_of(&self, lsn: Lsn) -> u32 {
        self.ancestors.iter().find(|ancestor| lsn < ancestor.left_at).map_or(self.timeline, |found| found.timeline)
    }

    /// Where a timeline begins on this path: the first position that belongs to it. `None` if it is not on the path.
    pub fn begin_of(&self, timeline: u32) -> Option<Lsn> {
        let index = self.index_of(timeline)?;
        Some(index.checked_sub(1).map_or(Lsn(0), |before| self.ancestors[before].left_at))
    }

    /// Where a timeline was left on this path; `None` for this timeline itself and for one that is not on the path.
    pub fn end_of(&self, timeline: u32) -> Option<Lsn> {
        self.ancestors.iter().find(|ancestor| ancestor.timeline == timeline).map(|found| found.left_at)
    }

    /// Whether a log that ends at `lsn` of `timeline` can be continued to this timeline. The switch point itself
    /// belongs to both sides: a log that ends exactly there is on the path, whichever of the two it counts itself to.
    pub fn contains(&self, timeline: u32, lsn: Lsn) -> bool {
        match self.begin_of(timeline) {
            Some(begin) => begin <= lsn && self.end_of(timeline).is_none_or(|end| lsn <= end),
            None => false,
        }
    }

    /// The history that a timeline gets which leaves this one at `left_at`.
    pub fn continued(&self, timeline: u32, left_at: Lsn, reason: &str) -> TimelineHistory {
        let mut ancestors = self.ancestors.clone();
        ancestors.push(Ancestor { timeline: self.timeline, left_at, reason: reason.to_owned() });
        TimelineHistory { timeline, ancestors }
    }

    /// The content of the file, as the server writes it. A line end in a reason becomes a space.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for ancestor in &self.ancestors {
            let reason = ancestor.reason.replace(['\n', '\r'], " ");
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}\t{}\t{reason}", ancestor.timeline, ancestor.left_at);
        }
        text
    }

    fn index_of(&self, timeline: u32) -> Option<usize> {
        if timeline == self.timeline {
            return Some(self.ancestors.len());
        }
        self.ancestors.iter().position(|ancestor| ancestor.timeline == timeline)
    }
}

fn parse_line(line: &str) -> Option<Ancestor> {
    let line = line.trim_start();
    let (timeline, rest) = line.split_once(char::is_whitespace)?;
    let rest = rest.trim_start();
    let (position, reason) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let timeline = timeline.parse().ok().filter(|timeline| *timeline > 0)?;
    Some(Ancestor { timeline, left_at: Lsn::parse(position).ok()?, reason: reason.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::super::fixtures;
    use super::*;
    use proptest::prelude::*;

    fn history() -> TimelineHistory {
        TimelineHistory::parse(5, b"1\t0/A000000\tbefore\n\n# note\n3\t0/C0000D8\tno recovery target specified\n")
            .unwrap()
    }

    #[test]
    fn a_server_s_history_reads_back_as_it_was_written() {
        for fixture in fixtures::all() {
            let content = fixture.plain("00000002.history");
            let history = TimelineHistory::parse(2, &content).unwrap();
            assert_eq!(history.ancestors().len(), 1);
            assert_eq!(history.ancestors()[0].timeline, 1);
            assert_eq!(history.ancestors()[0].reason, "no recovery target specified");
            assert_eq!(history.render().as_bytes(), content);
        }
    }

    #[test]
    fn a_position_belongs_to_the_timeline_that_was_current_there() {
        let history = history();
        assert_eq!(history.timeline_of(Lsn(0)), 1);
        assert_eq!(history.timeline_of(Lsn(0x09ff_ffff)), 1);
        assert_eq!(history.timeline_of(Lsn(0x0a00_0000)), 3);
        assert_eq!(history.timeline_of(Lsn(0x0c00_00d8)), 5);
        assert_eq!(history.begin_of(3), Some(Lsn(0x0a00_0000)));
        assert_eq!(history.end_of(3), Some(Lsn(0x0c00_00d8)));
        assert_eq!((history.begin_of(1), history.end_of(5)), (Some(Lsn(0)), None));
        assert_eq!((history.begin_of(2), history.end_of(2)), (None, None));
    }

    #[test]
    fn only_what_was_not_left_behind_is_on_the_path() {
        let history = history();
        assert!(history.contains(1, Lsn(0x0a00_0000)), "the switch point itself");
        assert!(!history.contains(1, Lsn(0x0a00_0008)), "log that was left behind");
        assert!(history.contains(3, Lsn(0x0a00_0000)));
        assert!(!history.contains(3, Lsn(0x09ff_fff8)), "before the timeline began");
        assert!(!history.contains(2, Lsn(0x0a00_0000)), "a sibling");
        assert!(history.contains(5, Lsn(u64::MAX)));
        assert!(!history.contains(6, Lsn(0)));
        assert!(TimelineHistory::of_first(1).contains(1, Lsn(1)));
    }

    #[test]
    fn a_continued_history_has_one_ancestor_more() {
        let next = history().continued(6, Lsn(0x0d00_0000), "two\nlines");
        assert_eq!(next.end_of(5), Some(Lsn(0x0d00_0000)));
        let read = TimelineHistory::parse(6, next.render().as_bytes()).unwrap();
        assert_eq!(read.ancestors()[2].reason, "two lines");
    }

    #[test]
    fn impossible_histories_are_refused() {
        for bad in [
            "x\t0/1\n",
            "1\n",
            "1\t0\n",
            "0\t0/1\n",
            "1\t0/1\n1\t0/2\n",
            "2\t0/1\n1\t0/2\n",
            "1\t0/2\n2\t0/1\n",
            "5\t0/1\n",
        ] {
            assert_eq!(TimelineHistory::parse(5, bad.as_bytes()).unwrap_err().kind(), Kind::Damaged, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = TimelineHistory::parse(9, &bytes);
        }

        #[test]
        fn rendered_histories_read_back(steps in prop::collection::vec((1u32..5, 0u64..1 << 40, "[ -~]{0,20}"), 0..6)) {
            let mut history = TimelineHistory::of_first(1);
            let mut position = 0;
            for (more, distance, reason) in steps {
                position += distance;
                history = history.continued(history.timeline() + more, Lsn(position), reason.trim());
            }
            let read = TimelineHistory::parse(history.timeline(), history.render().as_bytes()).unwrap();
            prop_assert_eq!(read, history);
        }
    }
}
