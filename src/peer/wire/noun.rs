//! Twins of the nouns of `model` that requests and answers are made of.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Twin;
use crate::error::{Error, Kind, Result};
use crate::model::backup::{Backup, BackupKind};
use crate::model::check::{CheckItem, Verdict};
use crate::model::group::GroupOrder;
use crate::model::id::{BackupId, IncarnationId, JobId};
use crate::model::job::{CloneOrder, JobReport, JobState, Order, ProgressUnit, StepReport, StepState, Task};
use crate::model::position::{Lsn, Position};
use crate::model::target::Target;
use crate::model::window::{Hole, Reach, Window};

/// An enum without data and its twin with the same variants.
macro_rules! plain_twin {
    ($model:ident, $wire:ident { $($variant:ident),+ }) => {
        #[derive(Serialize, Deserialize)]
        pub enum $wire { $($variant),+ }

        impl Twin for $model {
            type Wire = $wire;

            fn to_wire(&self) -> $wire {
                match self { $($model::$variant => $wire::$variant),+ }
            }

            fn from_wire(wire: $wire) -> Result<$model> {
                Ok(match wire { $($wire::$variant => $model::$variant),+ })
            }
        }
    };
}
pub(super) use plain_twin;

plain_twin!(BackupKind, WireBackupKind { Automatic, Manual });
plain_twin!(Verdict, WireVerdict { Pass, Warn, Fail });
plain_twin!(JobState, WireJobState { Running, Held, Done, Failed, Cancelled });
plain_twin!(StepState, WireStepState { Waiting, Running, Done, Failed });
plain_twin!(ProgressUnit, WireProgressUnit { Bytes, Items });

/// Ids travel as they are printed.
macro_rules! text_twin {
    ($($model:ident),+) => { $(
        impl Twin for $model {
            type Wire = String;

            fn to_wire(&self) -> String {
                self.to_string()
            }

            fn from_wire(wire: String) -> Result<$model> {
                $model::parse(&wire)
            }
        }
    )+ };
}

text_twin!(IncarnationId, JobId, BackupId);

/// Seconds since 1970 and nanoseconds, which are negative before 1970 (as jiff has them).
#[derive(Serialize, Deserialize)]
pub struct WireInstant(i64, i32);

impl Twin for Timestamp {
    type Wire = WireInstant;

    fn to_wire(&self) -> WireInstant {
        WireInstant(self.as_second(), self.subsec_nanosecond())
    }

    fn from_wire(wire: WireInstant) -> Result<Timestamp> {
        Timestamp::new(wire.0, wire.1)
            .map_err(|_| Error::new(Kind::Damaged, format!("an instant {} s {} ns does not exist", wire.0, wire.1)))
    }
}

/// Kind by its stable name, so that a kind which only one side knows still arrives as an error.
#[derive(Serialize, Deserialize)]
pub struct WireError {
    kind: String,
    message: String,
    hint: Option<String>,
}

impl Twin for Error {
    type Wire = WireError;

    fn to_wire(&self) -> WireError {
        WireError {
            kind: self.kind().name().to_string(),
            message: self.message().to_string(),
            hint: self.hint_text().map(str::to_string),
        }
    }

    fn from_wire(wire: WireError) -> Result<Error> {
        let error = Error::new(Kind::from_name(&wire.kind), wire.message);
        Ok(match wire.hint {
            Some(hint) => error.hint(hint),
            None => error,
        })
    }
}

#[derive(Serialize, Deserialize)]
pub enum WirePosition {
    Wal { timeline: u32, lsn: u64 },
    Count(u64),
    File { number: u64, offset: u64 },
}

impl Twin for Position {
    type Wire = WirePosition;

    fn to_wire(&self) -> WirePosition {
        match *self {
            Position::Wal { timeline, lsn } => WirePosition::Wal { timeline, lsn: lsn.0 },
            Position::Count(count) => WirePosition::Count(count),
            Position::File { number, offset } => WirePosition::File { number, offset },
        }
    }

    fn from_wire(wire: WirePosition) -> Result<Position> {
        Ok(match wire {
            WirePosition::Wal { timeline, lsn } => Position::Wal { timeline, lsn: Lsn(lsn) },
            WirePosition::Count(count) => Position::Count(count),
            WirePosition::File { number, offset } => Position::File { number, offset },
        })
    }
}

#[derive(Serialize, Deserialize)]
pub enum WireTarget {
    Latest,
    Time(WireInstant),
    Lsn(u64),
    Name(String),
    Backup(String),
    Position(WirePosition),
    Transaction { id: String, included: bool },
}

impl Twin for Target {
    type Wire = WireTarget;

    fn to_wire(&self) -> WireTarget {
        match self {
            Target::Latest => WireTarget::Latest,
            Target::Time(instant) => WireTarget::Time(instant.to_wire()),
            Target::Lsn(lsn) => WireTarget::Lsn(lsn.0),
            Target::Position(position) => WireTarget::Position(position.to_wire()),
            Target::Transaction { id, included } => WireTarget::Transaction { id: id.clone(), included: *included },
            Target::Name(name) => WireTarget::Name(name.clone()),
            Target::Backup(id) => WireTarget::Backup(id.to_wire()),
        }
    }

    fn from_wire(wire: WireTarget) -> Result<Target> {
        Ok(match wire {
            WireTarget::Latest => Target::Latest,
            WireTarget::Time(instant) => Target::Time(Twin::from_wire(instant)?),
            WireTarget::Lsn(lsn) => Target::Lsn(Lsn(lsn)),
            WireTarget::Position(position) => Target::Position(Twin::from_wire(position)?),
            WireTarget::Transaction { id, included } => Target::Transaction { id, included },
            WireTarget::Name(name) => Target::Name(name),
            WireTarget::Backup(id) => Target::Backup(Twin::from_wire(id)?),
        })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireCheckItem {
    what: String,
    verdict: WireVerdict,
    found: String,
    hint: Option<String>,
}

impl Twin for CheckItem {
    type Wire = WireCheckItem;

    fn to_wire(&self) -> WireCheckItem {
        let CheckItem { what, verdict, found, hint } = self.clone();
        WireCheckItem { what, verdict: verdict.to_wire(), found, hint }
    }

    fn from_wire(wire: WireCheckItem) -> Result<CheckItem> {
        let WireCheckItem { what, verdict, found, hint } = wire;
        Ok(CheckItem { what, verdict: Twin::from_wire(verdict)?, found, hint })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireOrder {
    id: String,
    by: String,
    task: WireTask,
}

#[derive(Serialize, Deserialize)]
pub enum WireTask {
    Backup { instance: String, kind: WireBackupKind },
    Clone(WireCloneOrder),
    CloneGroup { group: String, clone_name: String, sources: Vec<String>, target: WireTarget, hold: bool },
}

#[derive(Serialize, Deserialize)]
pub struct WireCloneOrder {
    source: String,
    clone_name: String,
    target: WireTarget,
    data_dir: Option<String>,
    port: Option<u16>,
    settings: Vec<(String, String)>,
    hold: bool,
    passwords_for: Vec<String>,
    keep_expired: bool,
}

fn pairs(map: &BTreeMap<String, String>) -> Vec<(String, String)> {
    map.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}

impl Twin for Order {
    type Wire = WireOrder;

    fn to_wire(&self) -> WireOrder {
        let task = match &self.task {
            Task::Backup { instance, kind } => WireTask::Backup { instance: instance.clone(), kind: kind.to_wire() },
            Task::Clone(clone) => {
                // What ties a clone to its group is between the agent and its own journal: it does not travel.
                let CloneOrder {
                    source,
                    clone_name,
                    target,
                    data_dir,
                    port,
                    settings,
                    hold,
                    passwords_for,
                    keep_expired,
                    ties: _,
                } = clone.clone();
                WireTask::Clone(WireCloneOrder {
                    source,
                    clone_name,
                    target: target.to_wire(),
                    data_dir,
                    port,
                    settings: pairs(&settings),
                    hold,
                    passwords_for: passwords_for.into_iter().collect(),
                    keep_expired,
                })
            }
            Task::CloneGroup(order) => {
                let GroupOrder { group, clone_name, sources, target, hold } = order.clone();
                WireTask::CloneGroup { group, clone_name, sources, target: target.to_wire(), hold }
            }
        };
        WireOrder { id: self.id.to_wire(), by: self.by.clone(), task }
    }

    fn from_wire(wire: WireOrder) -> Result<Order> {
        let task = match wire.task {
            WireTask::Backup { instance, kind } => Task::Backup { instance, kind: Twin::from_wire(kind)? },
            WireTask::Clone(clone) => {
                let WireCloneOrder {
                    source,
                    clone_name,
                    target,
                    data_dir,
                    port,
                    settings,
                    hold,
                    passwords_for,
                    keep_expired,
                } = clone;
                Task::Clone(CloneOrder {
                    source,
                    clone_name,
                    target: Twin::from_wire(target)?,
                    data_dir,
                    port,
                    settings: settings.into_iter().collect(),
                    hold,
                    passwords_for: passwords_for.into_iter().collect(),
                    keep_expired,
                    ties: BTreeMap::new(),
                })
            }
            WireTask::CloneGroup { group, clone_name, sources, target, hold } => {
                Task::CloneGroup(GroupOrder { group, clone_name, sources, target: Twin::from_wire(target)?, hold })
            }
        };
        Ok(Order { id: Twin::from_wire(wire.id)?, by: wire.by, task })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireStepReport {
    name: String,
    state: WireStepState,
    done: u64,
    total: u64,
    unit: WireProgressUnit,
    note: String,
    began_at: Option<WireInstant>,
    ended_at: Option<WireInstant>,
}

impl Twin for StepReport {
    type Wire = WireStepReport;

    fn to_wire(&self) -> WireStepReport {
        let StepReport { name, state, done, total, unit, note, began_at, ended_at } = self.clone();
        WireStepReport {
            name,
            state: state.to_wire(),
            done,
            total,
            unit: unit.to_wire(),
            note,
            began_at: began_at.to_wire(),
            ended_at: ended_at.to_wire(),
        }
    }

    fn from_wire(wire: WireStepReport) -> Result<StepReport> {
        let WireStepReport { name, state, done, total, unit, note, began_at, ended_at } = wire;
        Ok(StepReport {
            name,
            state: Twin::from_wire(state)?,
            done,
            total,
            unit: Twin::from_wire(unit)?,
            note,
            began_at: Twin::from_wire(began_at)?,
            ended_at: Twin::from_wire(ended_at)?,
        })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireJobReport {
    order: WireOrder,
    state: WireJobState,
    began_at: WireInstant,
    ended_at: Option<WireInstant>,
    steps: Vec<WireStepReport>,
    results: Vec<(String, String)>,
    checks: Vec<WireCheckItem>,
    error: Option<WireError>,
}

impl Twin for JobReport {
    type Wire = WireJobReport;

    fn to_wire(&self) -> WireJobReport {
        let JobReport { order, state, began_at, ended_at, steps, results, checks, error } = self;
        WireJobReport {
            order: order.to_wire(),
            state: state.to_wire(),
            began_at: began_at.to_wire(),
            ended_at: ended_at.to_wire(),
            steps: steps.to_wire(),
            results: results.clone(),
            checks: checks.to_wire(),
            error: error.to_wire(),
        }
    }

    fn from_wire(wire: WireJobReport) -> Result<JobReport> {
        let WireJobReport { order, state, began_at, ended_at, steps, results, checks, error } = wire;
        Ok(JobReport {
            order: Twin::from_wire(order)?,
            state: Twin::from_wire(state)?,
            began_at: Twin::from_wire(began_at)?,
            ended_at: Twin::from_wire(ended_at)?,
            steps: Twin::from_wire(steps)?,
            results,
            checks: Twin::from_wire(checks)?,
            error: Twin::from_wire(error)?,
        })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireBackup {
    id: String,
    incarnation: String,
    kind: WireBackupKind,
    start: WirePosition,
    stop: WirePosition,
    began_at: WireInstant,
    ended_at: WireInstant,
    engine_version: String,
    file_count: u64,
    restored_bytes: u64,
    stored_bytes: u64,
    engine_facts: Vec<(String, String)>,
}

impl Twin for Backup {
    type Wire = WireBackup;

    fn to_wire(&self) -> WireBackup {
        WireBackup {
            id: self.id.to_wire(),
            incarnation: self.incarnation.to_wire(),
            kind: self.kind.to_wire(),
            start: self.start.to_wire(),
            stop: self.stop.to_wire(),
            began_at: self.began_at.to_wire(),
            ended_at: self.ended_at.to_wire(),
            engine_version: self.engine_version.clone(),
            file_count: self.file_count,
            restored_bytes: self.restored_bytes,
            stored_bytes: self.stored_bytes,
            engine_facts: pairs(&self.engine_facts),
        }
    }

    fn from_wire(wire: WireBackup) -> Result<Backup> {
        Ok(Backup {
            id: Twin::from_wire(wire.id)?,
            incarnation: Twin::from_wire(wire.incarnation)?,
            kind: Twin::from_wire(wire.kind)?,
            start: Twin::from_wire(wire.start)?,
            stop: Twin::from_wire(wire.stop)?,
            began_at: Twin::from_wire(wire.began_at)?,
            ended_at: Twin::from_wire(wire.ended_at)?,
            engine_version: wire.engine_version,
            file_count: wire.file_count,
            restored_bytes: wire.restored_bytes,
            stored_bytes: wire.stored_bytes,
            engine_facts: wire.engine_facts.into_iter().collect(),
        })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireReach {
    backup: String,
    from: WirePosition,
    from_time: WireInstant,
    to: WirePosition,
    last_commit_at: Option<WireInstant>,
    covered_until: Option<WireInstant>,
}

impl Twin for Reach {
    type Wire = WireReach;

    fn to_wire(&self) -> WireReach {
        WireReach {
            backup: self.backup.to_wire(),
            from: self.from.to_wire(),
            from_time: self.from_time.to_wire(),
            to: self.to.to_wire(),
            last_commit_at: self.last_commit_at.to_wire(),
            covered_until: self.covered_until.to_wire(),
        }
    }

    fn from_wire(wire: WireReach) -> Result<Reach> {
        Ok(Reach {
            backup: Twin::from_wire(wire.backup)?,
            from: Twin::from_wire(wire.from)?,
            from_time: Twin::from_wire(wire.from_time)?,
            to: Twin::from_wire(wire.to)?,
            last_commit_at: Twin::from_wire(wire.last_commit_at)?,
            covered_until: Twin::from_wire(wire.covered_until)?,
        })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireHole {
    from: WirePosition,
    to: WirePosition,
    from_time: Option<WireInstant>,
    to_time: Option<WireInstant>,
}

impl Twin for Hole {
    type Wire = WireHole;

    fn to_wire(&self) -> WireHole {
        WireHole {
            from: self.from.to_wire(),
            to: self.to.to_wire(),
            from_time: self.from_time.to_wire(),
            to_time: self.to_time.to_wire(),
        }
    }

    fn from_wire(wire: WireHole) -> Result<Hole> {
        Ok(Hole {
            from: Twin::from_wire(wire.from)?,
            to: Twin::from_wire(wire.to)?,
            from_time: Twin::from_wire(wire.from_time)?,
            to_time: Twin::from_wire(wire.to_time)?,
        })
    }
}

#[derive(Serialize, Deserialize)]
pub struct WireWindow {
    reaches: Vec<WireReach>,
    holes: Vec<WireHole>,
}

impl Twin for Window {
    type Wire = WireWindow;

    fn to_wire(&self) -> WireWindow {
        WireWindow { reaches: self.reaches.to_wire(), holes: self.holes.to_wire() }
    }

    fn from_wire(wire: WireWindow) -> Result<Window> {
        Ok(Window { reaches: Twin::from_wire(wire.reaches)?, holes: Twin::from_wire(wire.holes)? })
    }
}
