//! Computes what can be reached from backups and ranges of log. Pure.

use jiff::Timestamp;

use crate::model::backup::Backup;
use crate::model::position::Position;
use crate::model::window::{Hole, Reach, Window};

/// A stretch of the log without a gap. Only the engine knows what follows what, so the caller joins the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRange {
    pub from: Position,
    pub to: Position,
    pub first_commit_at: Option<Timestamp>,
    pub last_commit_at: Option<Timestamp>,
    /// All that the source had made durable until then is in the range: for its end only, from the lease.
    pub covered_until: Option<Timestamp>,
}

/// The window of an incarnation: for each range of log the stretch from the first consistent moment of the earliest
/// backup that lies in it to its end, and the holes between the ranges. A backup lies in a range that holds everything
/// from its start to its stop. Ranges may come in any order and do not overlap.
pub fn window(backups: &[Backup], ranges: &[LogRange]) -> Window {
    let mut ranges: Vec<&LogRange> = ranges.iter().collect();
    ranges.sort_by_key(|range| range.from);
    let reaches = ranges.iter().filter_map(|range| {
        let lies_inside = |backup: &&Backup| range.from <= backup.start && backup.stop <= range.to;
        let first = backups.iter().filter(lies_inside).min_by_key(|backup| (backup.stop, backup.ended_at))?;
        Some(Reach {
            backup: first.id.clone(),
            from: first.stop,
            from_time: first.ended_at,
            to: range.to,
            last_commit_at: range.last_commit_at,
            covered_until: range.covered_until.max(range.last_commit_at),
        })
    });
    let holes = ranges.windows(2).filter(|pair| pair[0].to < pair[1].from).map(|pair| Hole {
        from: pair[0].to,
        to: pair[1].from,
        from_time: pair[0].covered_until.max(pair[0].last_commit_at),
        to_time: pair[1].first_commit_at,
    });
    Window { reaches: reaches.collect(), holes: holes.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::backup::BackupKind;
    use crate::model::id::{BackupId, IncarnationId};

    fn at(second: u64) -> Timestamp {
        Timestamp::from_second(second as i64).unwrap()
    }

    fn backup(start: u64, stop: u64) -> Backup {
        Backup {
            id: BackupId::new(at(start), stop),
            incarnation: IncarnationId::parse("01938c5e-0000-7000-8000-000000000001").unwrap(),
            kind: BackupKind::Automatic,
            start: Position::Count(start),
            stop: Position::Count(stop),
            began_at: at(start),
            ended_at: at(stop),
            engine_version: String::from("1"),
            file_count: 0,
            restored_bytes: 0,
            stored_bytes: 0,
            engine_facts: Default::default(),
        }
    }

    fn range(from: u64, to: u64) -> LogRange {
        LogRange {
            from: Position::Count(from),
            to: Position::Count(to),
            first_commit_at: Some(at(from + 1)),
            last_commit_at: Some(at(to - 1)),
            covered_until: None,
        }
    }

    #[test]
    fn each_range_is_reached_from_its_earliest_whole_backup() {
        let backups = [backup(60, 65), backup(20, 25), backup(5, 11), backup(12, 14), backup(38, 42)];
        let window = window(&backups, &[range(50, 90), range(10, 40)]);
        let reached: Vec<_> = window.reaches.iter().map(|reach| (reach.from, reach.to, reach.from_time)).collect();
        // 5..11 began before the log, 38..42 ended after it.
        assert_eq!(
            reached,
            [(Position::Count(14), Position::Count(40), at(14)), (Position::Count(65), Position::Count(90), at(65))]
        );
        let hole =
            Hole { from: Position::Count(40), to: Position::Count(50), from_time: Some(at(39)), to_time: Some(at(51)) };
        assert_eq!(window.holes, [hole]);
    }

    #[test]
    fn a_quiet_end_is_covered_beyond_its_last_commit() {
        let quiet = LogRange { covered_until: Some(at(500)), ..range(10, 40) };
        let reach = window(&[backup(12, 14)], &[quiet]).reaches.remove(0);
        assert_eq!((reach.last_commit_at, reach.covered_until), (Some(at(39)), Some(at(500))));
    }

    #[test]
    fn log_without_a_backup_and_a_backup_without_log_reach_nothing() {
        assert_eq!(window(&[], &[range(10, 40)]), Window::default());
        assert_eq!(window(&[backup(12, 14)], &[]), Window::default());
    }
}
