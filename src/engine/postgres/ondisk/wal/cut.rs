//! Where to cut the log so that a server that replays all of it stands at the wanted moment, and the cutting.
//!
//! The cut is the `end` of the last record that is kept (see the module `wal`): everything behind it becomes zeros, the
//! server replays up to there, finds no further record, and is promoted. A cut on a page boundary clears the next
//! page's header as well; the server writes it anew.
//!
//! A decision may fall before log that has been read already: a record can span segments, and the record that says
//! "too late" is not kept. So segments are handed to a server only below `WalReader::undecided_from` while the answer
//! is still `Continue`.

use jiff::Timestamp;

use super::format::WalFormat;
use super::reader::Record;
use super::record::Event;
use super::summary::Facts;
use crate::model::position::Lsn;

/// Where the log is to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// With the last valid record there is.
    AtEnd,
    /// Before the first commit or abort (of a prepared transaction too) whose time is later than this: what
    /// `recovery_target_time` with `recovery_target_inclusive` means (`xlogrecovery.c`, recoveryStopsBefore).
    BeforeTime(Timestamp),
    /// With the last record whose end is not beyond this position.
    AtLsn(Lsn),
    /// With the first restore point of this name.
    AtName(String),
    /// With the first record that ends at or beyond this position: the earliest consistent end of a base backup.
    AfterLsn(Lsn),
    /// With the record that ends this transaction, by commit or by abort.
    Xid(u32),
}

/// Where the log is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// The end of the last record that is kept; the bytes from here on are cleared.
    pub keep_until: Lsn,
    /// What `pg_last_wal_replay_lsn()` shows when all of it has been replayed, and where a promotion leaves the
    /// timeline. Differs from `keep_until` only behind a switch of segments.
    pub replayed_to: Lsn,
}

/// What to do after a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Continue,
    CutAt(Cut),
}

/// Finds the cut. Feed it every record of the log from the start of the base backup on.
pub struct Cutter {
    stop: Stop,
    format: WalFormat,
    facts: Facts,
    decided: Option<Cut>,
}

impl Cutter {
    pub fn new(stop: Stop, format: WalFormat) -> Cutter {
        Cutter { stop, format, facts: Facts::default(), decided: None }
    }

    /// Looks at the next record. Once the answer is a cut, it stays that cut.
    pub fn observe(&mut self, record: &Record<'_>, event: &Event) -> Decision {
        if let Some(cut) = self.decided {
            return Decision::CutAt(cut);
        }
        if self.is_too_late(record, event) {
            return self.decide(self.cut_here().unwrap_or(Cut { keep_until: record.start, replayed_to: record.start }));
        }
        self.facts.add(record, event);
        if self.is_last(record, event) {
            return self.decide(Cut { keep_until: record.end, replayed_to: record.next });
        }
        Decision::Continue
    }

    /// Whether the record must not be kept.
    fn is_too_late(&self, record: &Record<'_>, event: &Event) -> bool {
        match (&self.stop, event) {
            (Stop::BeforeTime(limit), Event::Commit(transaction) | Event::Abort(transaction)) => {
                transaction.time > *limit
            }
            (Stop::AtLsn(limit), _) => record.end > *limit,
            _ => false,
        }
    }

    /// Whether nothing after this record is wanted.
    fn is_last(&self, record: &Record<'_>, event: &Event) -> bool {
        match (&self.stop, event) {
            (Stop::AtName(wanted), Event::RestorePoint { name, .. }) => name == wanted,
            (Stop::Xid(wanted), Event::Commit(transaction) | Event::Abort(transaction)) => transaction.xid == *wanted,
            (Stop::AtLsn(limit), _) => record.end == *limit,
            (Stop::AfterLsn(wanted), _) => record.next >= *wanted,
            _ => false,
        }
    }

    fn decide(&mut self, cut: Cut) -> Decision {
        self.decided = Some(cut);
        Decision::CutAt(cut)
    }

    /// The cut behind the last record that was kept; `None` before the first. This is where the log is cut when
    /// there is no more of it.
    pub fn cut_here(&self) -> Option<Cut> {
        let (end, next) = (self.facts.last_end?, self.facts.last_next?);
        Some(self.decided.unwrap_or(Cut { keep_until: end, replayed_to: next }))
    }

    /// Whether the wanted end has been found, or, for a log that has ended, whether it holds what was asked for:
    /// any time can be served by the end of the log, a position only if no record is missing before it, a name or a
    /// transaction only if it was seen. Whether there should have been more log is for the caller to know.
    pub fn is_satisfied(&self) -> bool {
        if self.decided.is_some() {
            return true;
        }
        match &self.stop {
            Stop::AtEnd | Stop::BeforeTime(_) => true,
            // The position may have been taken from where the next record would begin.
            Stop::AtLsn(limit) => self.facts.last_next.is_some_and(|next| *limit <= self.format.start_after(next)),
            Stop::AtName(_) | Stop::AfterLsn(_) | Stop::Xid(_) => false,
        }
    }

    /// Whether a position was asked for and all log before it has been seen: what follows it does not matter, not even
    /// that it is missing.
    pub fn has_reached_position(&self) -> bool {
        matches!(self.stop, Stop::AtLsn(_)) && self.is_satisfied()
    }

    /// What the kept log holds.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    pub fn stop(&self) -> &Stop {
        &self.stop
    }
}

/// Clears everything from `keep_until` on in the bytes of a segment (or of a part of one) that begin at `start`.
/// Bytes that lie before it stay; a position that is not a multiple of 8 is rounded up, as no record begins between.
pub fn zero_after(bytes: &mut [u8], start: Lsn, keep_until: Lsn) {
    let keep = keep_until.0.checked_next_multiple_of(8).unwrap_or(u64::MAX).saturating_sub(start.0);
    let keep = usize::try_from(keep).unwrap_or(usize::MAX).min(bytes.len());
    bytes[keep..].fill(0);
}

#[cfg(test)]
mod tests {
    use super::super::super::fixtures::{self, Fixture};
    use super::super::end::EndReason;
    use super::super::reader::{Step, WalReader};
    use super::super::record::decode;
    use super::*;

    /// Runs a cutter over timeline 1 of a fixture.
    fn run(fixture: &Fixture, stop: Stop) -> (Cutter, Decision) {
        let (start, bytes) = fixture.timeline_1();
        let mut reader = WalReader::new(fixture.format(), start).unwrap();
        let mut cutter = Cutter::new(stop, fixture.format());
        let mut rest = &bytes[..];
        let mut decision = Decision::Continue;
        while let Step::Record(record) = reader.next(&mut rest) {
            decision = cutter.observe(&record, &decode(&record, fixture.major).unwrap());
            if decision != Decision::Continue {
                break;
            }
        }
        (cutter, decision)
    }

    fn cut(fixture: &Fixture, stop: Stop) -> (Facts, Cut) {
        let (cutter, decision) = run(fixture, stop);
        assert!(cutter.is_satisfied());
        match decision {
            Decision::CutAt(cut) => (cutter.facts().clone(), cut),
            Decision::Continue => panic!("no cut was found"),
        }
    }

    /// The records of the log after cutting, as (start, end).
    fn read_again(fixture: &Fixture, cut: Cut) -> (Vec<(Lsn, Lsn)>, super::super::End) {
        let (start, mut bytes) = fixture.timeline_1();
        zero_after(&mut bytes, start, cut.keep_until);
        let mut reader = WalReader::new(fixture.format(), start).unwrap();
        let (mut rest, mut records) = (&bytes[..], Vec::new());
        loop {
            match reader.next(&mut rest) {
                Step::Record(record) => records.push((record.start, record.end)),
                Step::End(end) => return (records, end),
                Step::NeedMore => panic!("a cut log has an end"),
            }
        }
    }

    #[test]
    fn a_time_keeps_every_commit_up_to_it_and_none_after() {
        for fixture in fixtures::all() {
            let commits: Vec<_> = fixture.dump(1).into_iter().filter(|line| line.is_transaction_end()).collect();
            for (index, line) in commits.iter().enumerate().take(commits.len() - 1) {
                let (facts, cut) = cut(&fixture, Stop::BeforeTime(line.time()));
                assert_eq!(facts.commits + facts.aborts, index as u64 + 1, "{line:?}");
                assert!(line.start < cut.keep_until && cut.keep_until <= commits[index + 1].start);
                let (records, end) = read_again(&fixture, cut);
                assert_eq!(records.len() as u64, facts.records);
                assert_eq!((end.valid_until, end.reason), (cut.replayed_to, EndReason::Zeros));
            }
            let just_before = commits[3].time() - jiff::SignedDuration::from_micros(1);
            assert_eq!(cut(&fixture, Stop::BeforeTime(just_before)).0.commits, 3);
        }
    }

    #[test]
    fn a_time_after_the_last_commit_is_served_by_the_end_of_the_log() {
        for fixture in fixtures::all() {
            let mut commits = fixture.dump(1).into_iter().filter(|line| line.is_transaction_end());
            let last = commits.next_back().unwrap();
            for stop in [Stop::BeforeTime(last.time()), Stop::AtEnd] {
                let (cutter, decision) = run(&fixture, stop);
                assert_eq!(decision, Decision::Continue);
                assert!(cutter.is_satisfied());
                assert_eq!(cutter.cut_here().unwrap().keep_until, cutter.facts().last_end.unwrap());
                assert_eq!(cutter.facts().last_commit.unwrap().time, last.time());
            }
        }
    }

    #[test]
    fn a_name_and_a_transaction_end_with_their_record() {
        for fixture in fixtures::all() {
            let dump = fixture.dump(1);
            let point = dump.iter().find(|line| line.description.starts_with("RESTORE_POINT before")).unwrap();
            let (facts, at_name) = cut(&fixture, Stop::AtName("before the drop".into()));
            assert_eq!(facts.restore_points[0].end, at_name.keep_until);
            assert_eq!(at_name.keep_until, Lsn(point.start.0 + 104), "98 bytes, aligned");
            let commit = dump.iter().find(|line| line.description.starts_with("COMMIT_PREPARED")).unwrap();
            let xid = commit.description.split([' ', ':']).nth(1).unwrap().parse().unwrap();
            let (facts, _) = cut(&fixture, Stop::Xid(xid));
            assert_eq!(facts.last_commit.unwrap().xid, xid);
            assert_eq!(facts.last_commit.unwrap().end, Lsn(commit.start.0 + 56));
            for stop in [Stop::AtName("never".into()), Stop::Xid(3), Stop::AfterLsn(Lsn(1 << 40))] {
                let (cutter, decision) = run(&fixture, stop);
                assert_eq!((decision, cutter.is_satisfied()), (Decision::Continue, false));
            }
        }
    }

    #[test]
    fn a_position_keeps_the_records_that_end_by_it() {
        for fixture in fixtures::all() {
            let commit = fixture.dump(1).into_iter().find(|line| line.description.starts_with("COMMIT ")).unwrap();
            let end = Lsn((commit.start.0 + u64::from(commit.length)).next_multiple_of(8));
            // The commit's record lies within one page in these fixtures.
            assert_eq!(cut(&fixture, Stop::AtLsn(end)).1.keep_until, end);
            assert_eq!(cut(&fixture, Stop::AtLsn(Lsn(end.0 + 1))).1.keep_until, end);
            assert_eq!(cut(&fixture, Stop::AtLsn(Lsn(end.0 - 1))).1.keep_until, commit.start);
            assert_eq!(cut(&fixture, Stop::AfterLsn(Lsn(end.0 - 1))).1.keep_until, end);
            assert_eq!(cut(&fixture, Stop::AfterLsn(end)).1.keep_until, end);
        }
    }

    #[test]
    fn a_position_at_the_end_of_the_log_is_reached_and_one_beyond_is_not() {
        for fixture in fixtures::all() {
            let end = run(&fixture, Stop::AtEnd).0.cut_here().unwrap().replayed_to;
            assert!(run(&fixture, Stop::AtLsn(end)).0.is_satisfied());
            assert!(!run(&fixture, Stop::AtLsn(Lsn(end.0 + 8))).0.is_satisfied());
        }
    }

    #[test]
    fn a_cut_behind_a_switch_is_replayed_to_the_next_segment() {
        for fixture in fixtures::all() {
            let switch = fixture.dump(1).into_iter().find(|line| line.description == "SWITCH").unwrap();
            let (_, cut) = cut(&fixture, Stop::AfterLsn(Lsn(switch.start.0 + 1)));
            assert_eq!(cut.keep_until, Lsn(switch.start.0 + 24));
            assert_eq!(cut.replayed_to, Lsn(0x00a0_0000));
            let (cutter, _) = run(&fixture, Stop::AtLsn(cut.replayed_to));
            assert!(cutter.is_satisfied());
            assert_eq!(cutter.cut_here(), Some(cut));
        }
    }

    #[test]
    fn a_target_before_the_first_record_keeps_nothing() {
        let fixture = fixtures::v15();
        let (facts, cut) = cut(&fixture, Stop::AtLsn(Lsn(1)));
        assert_eq!(facts.records, 0);
        assert_eq!(cut.keep_until, Lsn(0x0090_0028));
    }

    #[test]
    fn clearing_keeps_what_lies_before_and_touches_nothing_outside() {
        let mut bytes = vec![1u8; 64];
        zero_after(&mut bytes, Lsn(1000), Lsn(1000 + 13));
        assert_eq!(bytes.iter().filter(|byte| **byte == 1).count(), 16);
        zero_after(&mut bytes, Lsn(1000), Lsn(5000));
        assert_eq!(bytes.iter().filter(|byte| **byte == 1).count(), 16);
        zero_after(&mut bytes, Lsn(1000), Lsn(8));
        assert!(bytes.iter().all(|byte| *byte == 0));
        zero_after(&mut bytes, Lsn(0), Lsn(u64::MAX));
    }
}
