//! The facts of a contiguous stretch of log: what a chunk in the archive says about itself, and what a cut log holds.

use jiff::Timestamp;

use super::super::control::{RecoveryParameters, WalLevel};
use super::end::End;
use super::format::WalFormat;
use super::reader::{Record, Step, WalReader};
use super::record::{Event, decode};
use crate::error::Result;
use crate::model::position::Lsn;

/// How many restore points and timeline switches are remembered each; the rest is counted.
pub const REMEMBERED: usize = 10_000;

/// A commit in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commit {
    pub xid: u32,
    pub time: Timestamp,
    /// The end of its record.
    pub end: Lsn,
}

/// A named point in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestorePoint {
    pub name: String,
    pub time: Timestamp,
    /// The end of its record, which is what `pg_create_restore_point()` returned.
    pub end: Lsn,
}

/// A record that begins a timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimelineSwitch {
    pub from: u32,
    pub to: u32,
    /// The start of the record; the switch point of the history file lies at or, across a page header, just before it.
    pub start: Lsn,
}

/// What was seen in a stretch of log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    pub records: u64,
    pub commits: u64,
    pub aborts: u64,
    /// The start of the first record.
    pub first_start: Option<Lsn>,
    /// The end and the `next` of the last record (see the module `wal`).
    pub last_end: Option<Lsn>,
    pub last_next: Option<Lsn>,
    /// The first and last commits in the order of the log.
    pub first_commit: Option<Commit>,
    pub last_commit: Option<Commit>,
    /// The earliest and latest commit times, which need not be those of the first and the last commit.
    pub earliest_commit_time: Option<Timestamp>,
    pub latest_commit_time: Option<Timestamp>,
    pub restore_points: Vec<RestorePoint>,
    pub timeline_switches: Vec<TimelineSwitch>,
    /// How many restore points and switches were too many to be remembered.
    pub forgotten: u64,
    /// The largest values of the parameters that recovery insists on, if the log mentions any.
    pub parameters: Option<RecoveryParameters>,
    /// The lowest level that the log was written with, if it mentions any.
    pub lowest_wal_level: Option<WalLevel>,
    /// The last backup end: where the base backup began, and the end of the record.
    pub last_backup_end: Option<(Lsn, Lsn)>,
}

impl Facts {
    /// Takes the next record of the log into account.
    pub fn add(&mut self, record: &Record<'_>, event: &Event) {
        self.records += 1;
        self.first_start.get_or_insert(record.start);
        self.last_end = Some(record.end);
        self.last_next = Some(record.next);
        match event {
            Event::Commit(transaction) => {
                self.add_commit(Commit { xid: transaction.xid, time: transaction.time, end: record.end });
            }
            Event::Abort(_) => self.aborts += 1,
            Event::RestorePoint { name, time } => {
                let point = RestorePoint { name: name.clone(), time: *time, end: record.end };
                self.forgotten += remember(&mut self.restore_points, point);
            }
            Event::EndOfRecovery { timeline, previous_timeline, .. } => {
                self.add_switch(*previous_timeline, *timeline, record.start);
            }
            Event::ShutdownCheckpoint(checkpoint) if checkpoint.timeline != checkpoint.previous_timeline => {
                self.add_switch(checkpoint.previous_timeline, checkpoint.timeline, record.start);
            }
            Event::ParameterChange { parameters, wal_level } => {
                self.parameters = Some(self.parameters.map_or(*parameters, |known| known.at_least(*parameters)));
                self.lowest_wal_level = Some(self.lowest_wal_level.map_or(*wal_level, |known| known.min(*wal_level)));
            }
            Event::BackupEnd { start } => self.last_backup_end = Some((*start, record.end)),
            _ => {}
        }
    }

    fn add_commit(&mut self, commit: Commit) {
        self.commits += 1;
        self.first_commit.get_or_insert(commit);
        self.last_commit = Some(commit);
        self.earliest_commit_time = Some(self.earliest_commit_time.map_or(commit.time, |time| time.min(commit.time)));
        self.latest_commit_time = Some(self.latest_commit_time.map_or(commit.time, |time| time.max(commit.time)));
    }

    fn add_switch(&mut self, from: u32, to: u32, start: Lsn) {
        if from != to {
            self.forgotten += remember(&mut self.timeline_switches, TimelineSwitch { from, to, start });
        }
    }
}

/// Adds to a list that may be full; returns how many were forgotten.
fn remember<T>(list: &mut Vec<T>, item: T) -> u64 {
    if list.len() < REMEMBERED {
        list.push(item);
        0
    } else {
        1
    }
}

/// A reader that keeps the facts of what it reads.
pub struct Scanner {
    format: WalFormat,
    reader: WalReader,
    facts: Facts,
}

impl Scanner {
    /// Scans the log from `start`, the start of a page or of a record.
    pub fn new(format: WalFormat, start: Lsn) -> Result<Scanner> {
        Ok(Scanner { format, reader: WalReader::new(format, start)?, facts: Facts::default() })
    }

    /// Reads the next piece, which begins at `reader().position()`. `Some` when the valid log has ended.
    pub fn feed(&mut self, mut piece: &[u8]) -> Result<Option<End>> {
        loop {
            match self.reader.next(&mut piece) {
                Step::Record(record) => {
                    let event = decode(&record, self.format.major)?;
                    self.facts.add(&record, &event);
                }
                Step::NeedMore => return Ok(None),
                Step::End(end) => return Ok(Some(end)),
            }
        }
    }

    pub fn reader(&self) -> &WalReader {
        &self.reader
    }

    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The facts so far, and an empty slate for the next stretch of the same log.
    pub fn take_facts(&mut self) -> Facts {
        std::mem::take(&mut self.facts)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::fixtures;
    use super::*;

    #[test]
    fn the_facts_of_a_real_log_are_those_of_pg_waldump() {
        for fixture in fixtures::all() {
            let (start, bytes) = fixture.timeline_1();
            let mut scanner = Scanner::new(fixture.format(), start).unwrap();
            let end = scanner.feed(&bytes).unwrap().unwrap();
            assert!(end.reason.is_ordinary(), "{end:?}");
            let facts = scanner.facts();
            let dump = fixture.dump(1);
            let count = |word: &str| dump.iter().filter(|line| line.description.starts_with(word)).count() as u64;
            assert_eq!(facts.records as usize, fixture.record_count());
            assert_eq!(facts.commits, count("COMMIT"));
            assert_eq!(facts.aborts, count("ABORT"));
            let names: Vec<&str> = facts.restore_points.iter().map(|point| point.name.as_str()).collect();
            assert_eq!(names, ["before the drop", "zweiter Punkt: $\"\u{fc}\""]);
            assert_eq!(facts.parameters.unwrap().max_connections, 150);
            assert_eq!(facts.parameters.unwrap().max_prepared_transactions, 7);
            assert_eq!(facts.lowest_wal_level, Some(WalLevel::Logical));
            assert_eq!(facts.last_backup_end.unwrap().0, Lsn(0x00b0_0028));
            assert!(facts.timeline_switches.is_empty());
            assert_eq!(facts.last_next, Some(end.valid_until));
        }
    }

    #[test]
    fn a_promotion_is_seen_where_the_history_says() {
        for fixture in fixtures::all() {
            let (start, bytes) = fixture.timeline_2();
            let mut scanner = Scanner::new(fixture.format(), start).unwrap();
            scanner.feed(&bytes).unwrap();
            let history = super::super::super::history::TimelineHistory::parse(2, &fixture.plain("00000002.history"));
            let left_at = history.unwrap().end_of(1).unwrap();
            let [switch] = scanner.facts().timeline_switches[..] else { panic!("{:?}", scanner.facts()) };
            assert_eq!((switch.from, switch.to), (1, 2));
            assert_eq!(switch.start, fixture.format().start_after(left_at));
        }
    }

    #[test]
    fn the_latest_time_is_not_always_that_of_the_last_commit() {
        let mut facts = Facts::default();
        for (second, end) in [(5, 0x100), (9, 0x200), (7, 0x300)] {
            facts.add_commit(Commit { xid: 1, time: Timestamp::from_second(second).unwrap(), end: Lsn(end) });
        }
        assert_eq!(facts.latest_commit_time, Some(Timestamp::from_second(9).unwrap()));
        assert_eq!(facts.earliest_commit_time, Some(Timestamp::from_second(5).unwrap()));
        assert_eq!(facts.last_commit.unwrap().end, Lsn(0x300));
    }
}
