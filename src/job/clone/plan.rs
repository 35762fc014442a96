//! Which backup a clone begins with, and whether its target can be reached at all. Pure.

use jiff::Timestamp;

use crate::error::{Error, Kind, Result};
use crate::model::backup::Backup;
use crate::model::position::{Lsn, Position};
use crate::model::target::{Target, utc_text};
use crate::model::window::{Reach, Window};

/// What a clone is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    pub backup: Backup,
    /// Where the contiguous log of the backup ends: replay reads no further.
    pub log_end: Position,
}

/// Chooses the newest backup from which the target can be reached without a hole.
///
/// Takes the source as the user named it, for messages; all backups of the incarnation; its window; and, for a named
/// point, the position that the name was found at. An error says `cannot clone ...` and names the nearest moment that
/// can be reached.
pub fn choose(
    source: &str,
    host: &str,
    target: &Target,
    named_at: Option<Position>,
    backups: &[Backup],
    window: &Window,
) -> Result<Choice> {
    let ask = Question { source, host, target, backups, window };
    if backups.is_empty() {
        return Err(ask
            .refuse("there is no backup of it yet")
            .hint(format!("take one: 'keiki backup create {source}'")));
    }
    let (Some(oldest), Some(newest)) = (window.reaches.first(), window.reaches.last()) else {
        return Err(ask
            .refuse("the log that its backups need is not complete in the repository")
            .hint(format!("take a new backup: 'keiki backup create {source}'")));
    };
    match target {
        Target::Latest => ask.at_the_end(newest),
        Target::Backup(id) => {
            let backup = backups.iter().find(|backup| backup.id == *id).ok_or_else(|| {
                ask.refuse("it has no such backup").hint(format!("'keiki backup list {source}' shows what there is"))
            })?;
            let reach = window.reaches.iter().find(|reach| contains(reach, backup.stop));
            let reach = reach.ok_or_else(|| {
                ask.refuse(format!("the log from {} to {} is not complete", backup.start, backup.stop))
                    .hint("choose another backup; 'keiki window' shows what can be reached")
            })?;
            Ok(Choice { backup: backup.clone(), log_end: reach.to })
        }
        Target::Time(time) => ask.at_time(*time, oldest, newest),
        Target::Lsn(lsn) => ask.at_lsn(*lsn, oldest, newest),
        Target::Position(position) => ask.at_position(*position, oldest, newest),
        Target::Transaction { .. } => match named_at {
            Some(position) => ask.at_position(position, oldest, newest),
            None => Err(ask.refuse("no transaction with that id is in its log").hint(
                "ids are as in '0-5-2257' (MariaDB) or 'UUID:2257' (MySQL with 'gtid_mode = ON'); 'keiki window' \
                     shows how far back the log goes",
            )),
        },
        Target::Name(_) => match named_at {
            Some(Position::Wal { lsn, .. }) => ask.at_lsn(lsn, oldest, newest),
            Some(position) => ask.at_position(position, oldest, newest),
            None if !matches!(newest.to, Position::Wal { .. } | Position::Count(_)) => Err(ask
                .refuse("the log of its engine has no restore points")
                .hint("choose a time, a position or a backup; 'keiki window' shows what can be reached")),
            None => Err(ask
                .refuse("no restore point of that name is in its log")
                .hint("names are made with pg_create_restore_point('NAME') on the source, and are case sensitive")),
        },
    }
}

struct Question<'a> {
    source: &'a str,
    host: &'a str,
    target: &'a Target,
    backups: &'a [Backup],
    window: &'a Window,
}

impl Question<'_> {
    fn refuse(&self, why: impl std::fmt::Display) -> Error {
        let target = match self.target {
            Target::Latest => String::from("its latest state"),
            Target::Name(name) => format!("restore point '{name}'"),
            Target::Backup(id) => format!("backup '{id}'"),
            Target::Time(_) | Target::Lsn(_) | Target::Position(_) | Target::Transaction { .. } => {
                self.target.to_string()
            }
        };
        Error::new(Kind::BadInput, format!("cannot clone '{}' to {target}: {why}", self.source))
    }

    /// The newest backup of a stretch that satisfies a condition.
    fn newest_backup(&self, reach: &Reach, fits: impl Fn(&Backup) -> bool) -> Result<Choice> {
        let inside = self.backups.iter().filter(|backup| contains(reach, backup.stop) && fits(backup));
        let newest = inside.max_by_key(|backup| (backup.stop, backup.ended_at));
        let backup = newest.ok_or_else(|| {
            self.refuse("no backup is consistent by then")
                .hint(format!("the oldest reachable point is {}", utc_text(reach.from_time)))
        })?;
        Ok(Choice { backup: backup.clone(), log_end: reach.to })
    }

    /// The end of the log, which must follow without a hole from a backup: what lies behind a hole is not shown by
    /// anything before it.
    fn at_the_end(&self, newest: &Reach) -> Result<Choice> {
        if let Some(hole) = self.window.holes.iter().find(|hole| hole.from >= newest.to) {
            let end = end_time(newest).unwrap_or(newest.from_time);
            return Err(self
                .refuse(format!("no archived log covers {} to {}, and no backup was taken since", hole.from, hole.to))
                .hint(format!(
                    "the newest reachable point is {}; take a new backup: 'keiki backup create {}'",
                    utc_text(end),
                    self.source
                )));
        }
        self.newest_backup(newest, |_| true)
    }

    fn at_time(&self, time: Timestamp, oldest: &Reach, newest: &Reach) -> Result<Choice> {
        if time < oldest.from_time {
            return Err(self
                .refuse("it lies before the end of the first backup")
                .hint(format!("the oldest reachable point is {}", utc_text(oldest.from_time))));
        }
        let covered = |reach: &&Reach| reach.from_time <= time && end_time(reach).is_some_and(|end| time <= end);
        if let Some(reach) = self.window.reaches.iter().find(covered) {
            return self.newest_backup(reach, |backup| backup.ended_at <= time);
        }
        if let Some(next) = self.window.reaches.iter().find(|reach| time < reach.from_time) {
            let before = self.window.reaches.iter().rev().find(|reach| reach.from_time <= time);
            let from = before.and_then(end_time).unwrap_or(oldest.from_time);
            return Err(self
                .refuse(format!("no archived log covers {} to {}", utc_text(from), utc_text(next.from_time)))
                .hint(format!(
                    "the nearest reachable points are {} and {}; was archiving stopped on host '{}'?",
                    utc_text(from),
                    utc_text(next.from_time),
                    self.host
                )));
        }
        let end = end_time(newest).unwrap_or(newest.from_time);
        Err(self.refuse(format!("its archive ends at {}", utc_text(end))).hint(format!(
            "the newest reachable point is {}; is the time in the future, or was archiving stopped on host '{}'?",
            utc_text(end),
            self.host
        )))
    }

    /// A position without a timeline is meant on the one that the archive is on.
    fn at_lsn(&self, lsn: Lsn, oldest: &Reach, newest: &Reach) -> Result<Choice> {
        let timeline_at = |reach: &Reach| match reach.to {
            Position::Wal { timeline, .. } => timeline,
            Position::Count(_) | Position::File { .. } => 0,
        };
        let fitting = self
            .window
            .reaches
            .iter()
            .rev()
            .find(|reach| contains(reach, Position::Wal { timeline: timeline_at(reach), lsn }));
        let timeline = timeline_at(fitting.unwrap_or(newest));
        self.at_position(Position::Wal { timeline, lsn }, oldest, newest)
    }

    fn at_position(&self, position: Position, oldest: &Reach, newest: &Reach) -> Result<Choice> {
        if std::mem::discriminant(&position) != std::mem::discriminant(&newest.to) {
            return Err(self
                .refuse("that is no position in the log of its engine")
                .hint(format!("a position of its log looks like '{}'", newest.to)));
        }
        if position < oldest.from {
            return Err(self
                .refuse("it lies before the first backup is consistent")
                .hint(format!("the oldest reachable position is {}", oldest.from)));
        }
        if position > newest.to {
            return Err(self.refuse(format!("its archive ends at {}", newest.to)).hint(format!(
                "the newest reachable position is {}; was archiving stopped on host '{}'?",
                newest.to, self.host
            )));
        }
        match self.window.reaches.iter().find(|reach| contains(reach, position)) {
            Some(reach) => self.newest_backup(reach, |backup| backup.stop <= position),
            None => Err(self.refuse("its log has a hole there").hint("'keiki window' shows what can be reached")),
        }
    }
}

fn contains(reach: &Reach, position: Position) -> bool {
    reach.from <= position && position <= reach.to
}

fn end_time(reach: &Reach) -> Option<Timestamp> {
    reach.covered_until.max(reach.last_commit_at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::backup::BackupKind;
    use crate::model::id::{BackupId, IncarnationId};
    use crate::model::window::Hole;

    fn second(number: u64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + number as i64).unwrap()
    }

    fn lsn(number: u64) -> Position {
        Position::Wal { timeline: 1, lsn: Lsn(number) }
    }

    /// A backup that runs from `start` to `stop`, both as position and as second.
    fn backup(start: u64, stop: u64) -> Backup {
        Backup {
            id: BackupId::new(second(start), start),
            incarnation: IncarnationId::fresh(),
            kind: BackupKind::Manual,
            start: lsn(start),
            stop: lsn(stop),
            began_at: second(start),
            ended_at: second(stop),
            engine_version: "15.18".into(),
            file_count: 1,
            restored_bytes: 1,
            stored_bytes: 1,
            engine_facts: Default::default(),
        }
    }

    fn reach(backup: &Backup, to: u64) -> Reach {
        Reach {
            backup: backup.id.clone(),
            from: backup.stop,
            from_time: backup.ended_at,
            to: lsn(to),
            last_commit_at: Some(second(to - 5)),
            covered_until: Some(second(to)),
        }
    }

    /// Backups 10-20 and 40-50 in one stretch that ends at 100, a hole, and backup 210-220 in one that ends at 300.
    fn scene() -> (Vec<Backup>, Window) {
        let backups = vec![backup(10, 20), backup(40, 50), backup(210, 220)];
        let window = Window {
            reaches: vec![reach(&backups[0], 100), reach(&backups[2], 300)],
            holes: vec![Hole { from: lsn(100), to: lsn(205), from_time: None, to_time: None }],
        };
        (backups, window)
    }

    fn ask(target: Target) -> Result<u64> {
        let (backups, window) = scene();
        choose("orders", "db3", &target, None, &backups, &window).map(|choice| choice.backup.stop.wal().unwrap().1.0)
    }

    #[test]
    fn the_newest_backup_that_is_consistent_by_the_target_is_chosen() {
        assert_eq!(ask(Target::Time(second(20))).unwrap(), 20);
        assert_eq!(ask(Target::Time(second(49))).unwrap(), 20);
        assert_eq!(ask(Target::Time(second(50))).unwrap(), 50);
        assert_eq!(ask(Target::Time(second(100))).unwrap(), 50);
        assert_eq!(ask(Target::Time(second(300))).unwrap(), 220);
        assert_eq!(ask(Target::Lsn(Lsn(49))).unwrap(), 20);
        assert_eq!(ask(Target::Lsn(Lsn(100))).unwrap(), 50);
        assert_eq!(ask(Target::Position(lsn(100))).unwrap(), 50);
        assert_eq!(ask(Target::Latest).unwrap(), 220);
        let (backups, _) = scene();
        assert_eq!(ask(Target::Backup(backups[1].id.clone())).unwrap(), 50);
    }

    #[test]
    fn a_time_after_the_last_commit_of_a_quiet_database_is_reachable_while_it_is_covered() {
        assert_eq!(ask(Target::Time(second(299))).unwrap(), 220);
    }

    #[test]
    fn what_cannot_be_reached_is_refused_with_the_nearest_moment() {
        let cases = [
            (
                Target::Time(second(19)),
                "cannot clone 'orders' to 2023-11-14 22:13:39Z: it lies before the end of the first backup",
                "22:13:40Z",
            ),
            (
                Target::Time(second(150)),
                "cannot clone 'orders' to 2023-11-14 22:15:50Z: no archived log covers 2023-11-14 22:15:00Z to 2023-11-14 22:17:00Z",
                "host 'db3'",
            ),
            (
                Target::Time(second(301)),
                "cannot clone 'orders' to 2023-11-14 22:18:21Z: its archive ends at 2023-11-14 22:18:20Z",
                "in the future",
            ),
            (
                Target::Lsn(Lsn(19)),
                "cannot clone 'orders' to 0/13: it lies before the first backup is consistent",
                "1@0/14",
            ),
            (Target::Lsn(Lsn(150)), "cannot clone 'orders' to 0/96: its log has a hole there", "keiki window"),
            (
                Target::Lsn(Lsn(301)),
                "cannot clone 'orders' to 0/12D: its archive ends at 1@0/12C",
                "newest reachable position",
            ),
            (
                Target::Position(Position::File { number: 1, offset: 2 }),
                "cannot clone 'orders' to file:1:2: that is no position in the log of its engine",
                "1@0/12C",
            ),
            (
                Target::Name("x".into()),
                "cannot clone 'orders' to restore point 'x': no restore point of that name is in its log",
                "case sensitive",
            ),
        ];
        for (target, message, hint) in cases {
            let error = ask(target).unwrap_err();
            assert_eq!(error.message(), message);
            assert!(error.hint_text().unwrap().contains(hint), "{error:?}");
        }
    }

    #[test]
    fn a_named_point_is_reached_where_its_record_lies() {
        let (backups, window) = scene();
        let choice = choose("orders", "db3", &Target::Name("x".into()), Some(lsn(60)), &backups, &window).unwrap();
        assert_eq!(choice.backup.stop, lsn(50));
    }
}
