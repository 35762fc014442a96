//! The lines of a job's journal, as JSON.
//!
//! These types are the bytes at rest of `model::job`: changing a noun there never changes a journal by accident.
//! Only states that survive a restart are written: what was ordered, which step was begun, which is complete and with
//! which facts, and how it ended. Progress is not.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::model::backup::BackupKind;
use crate::model::check::{CheckItem, Verdict};
use crate::model::group::GroupOrder;
use crate::model::id::{BackupId, JobId};
use crate::model::job::{CloneOrder, Order, ProgressUnit, Task};
use crate::model::position::{Lsn, Position};
use crate::model::target::Target;

/// The version of the journal's lines that this keiki writes and reads.
pub const FORMAT: u32 = 1;

/// One line of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Record {
    /// Always the first line.
    Ordered {
        format: u32,
        at: Instant,
        order: OrderRecord,
        steps: Vec<StepRecord>,
    },
    StepBegun {
        at: Instant,
        step: String,
    },
    /// Something that a later step, or this one after a crash, must know.
    Fact {
        key: String,
        value: String,
    },
    StepDone {
        at: Instant,
        step: String,
        done: u64,
        total: u64,
        note: String,
        said: SaidRecord,
    },
    StepFailed {
        at: Instant,
        step: String,
        note: String,
        said: SaidRecord,
        error: ErrorRecord,
    },
    /// The job waits for accept or discard.
    Held {
        at: Instant,
    },
    /// Somebody asked for the job to be undone; what it made is being removed.
    CancelAsked {
        at: Instant,
    },
    /// A failed, held or interrupted job goes on from this step.
    Resumed {
        at: Instant,
        from_step: String,
        accepted: bool,
    },
    Ended {
        at: Instant,
        state: EndRecord,
        error: Option<ErrorRecord>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndRecord {
    Done,
    Failed,
    Cancelled,
}

/// A time as RFC 3339 text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Instant(pub Timestamp);

impl From<Instant> for String {
    fn from(instant: Instant) -> String {
        instant.0.to_string()
    }
}

impl TryFrom<String> for Instant {
    type Error = String;

    fn try_from(text: String) -> Result<Instant, String> {
        text.parse().map(Instant).map_err(|_| format!("'{text}' is not a time"))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    pub name: String,
    pub unit: UnitRecord,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnitRecord {
    Bytes,
    Items,
}

impl From<ProgressUnit> for UnitRecord {
    fn from(unit: ProgressUnit) -> UnitRecord {
        match unit {
            ProgressUnit::Bytes => UnitRecord::Bytes,
            ProgressUnit::Items => UnitRecord::Items,
        }
    }
}

impl From<UnitRecord> for ProgressUnit {
    fn from(unit: UnitRecord) -> ProgressUnit {
        match unit {
            UnitRecord::Bytes => ProgressUnit::Bytes,
            UnitRecord::Items => ProgressUnit::Items,
        }
    }
}

/// What the job has said so far, whole: result lines and the check list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaidRecord {
    pub results: Vec<(String, String)>,
    pub checks: Vec<CheckRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckRecord {
    pub what: String,
    pub verdict: VerdictRecord,
    pub found: String,
    pub hint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerdictRecord {
    Pass,
    Warn,
    Fail,
}

impl From<&CheckItem> for CheckRecord {
    fn from(item: &CheckItem) -> CheckRecord {
        let verdict = match item.verdict {
            Verdict::Pass => VerdictRecord::Pass,
            Verdict::Warn => VerdictRecord::Warn,
            Verdict::Fail => VerdictRecord::Fail,
        };
        CheckRecord { what: item.what.clone(), verdict, found: item.found.clone(), hint: item.hint.clone() }
    }
}

impl From<CheckRecord> for CheckItem {
    fn from(record: CheckRecord) -> CheckItem {
        let verdict = match record.verdict {
            VerdictRecord::Pass => Verdict::Pass,
            VerdictRecord::Warn => Verdict::Warn,
            VerdictRecord::Fail => Verdict::Fail,
        };
        CheckItem { what: record.what, verdict, found: record.found, hint: record.hint }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorRecord {
    pub kind: String,
    pub message: String,
    pub hint: Option<String>,
}

impl From<&Error> for ErrorRecord {
    fn from(error: &Error) -> ErrorRecord {
        ErrorRecord {
            kind: error.kind().name().to_string(),
            message: error.message().to_string(),
            hint: error.hint_text().map(str::to_string),
        }
    }
}

impl ErrorRecord {
    /// The error that was recorded. Not a `From`: a second one into `Error` would make every `?` ambiguous.
    pub fn to_error(&self) -> Error {
        let error = Error::new(Kind::from_name(&self.kind), self.message.clone());
        match &self.hint {
            Some(hint) => error.hint(hint.clone()),
            None => error,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OrderRecord {
    pub id: String,
    pub by: String,
    pub task: TaskRecord,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum TaskRecord {
    Backup {
        instance: String,
        automatic: bool,
    },
    Clone {
        source: String,
        clone_name: String,
        target: TargetRecord,
        data_dir: Option<String>,
        port: Option<u16>,
        settings: BTreeMap<String, String>,
        hold: bool,
        // Absent where it is nothing, so that older journals are read and older agents read the others.
        #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
        passwords_for: BTreeSet<String>,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        keep_expired: bool,
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        ties: BTreeMap<String, String>,
    },
    CloneGroup {
        group: String,
        clone_name: String,
        sources: Vec<String>,
        target: TargetRecord,
        hold: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "to", content = "value", rename_all = "kebab-case", deny_unknown_fields)]
pub enum TargetRecord {
    Latest,
    Time(Instant),
    Lsn(String),
    Name(String),
    Backup(String),
    Position(String),
    UpToTransaction(String),
    BeforeTransaction(String),
}

impl From<&Target> for TargetRecord {
    fn from(target: &Target) -> TargetRecord {
        match target {
            Target::Latest => TargetRecord::Latest,
            Target::Time(instant) => TargetRecord::Time(Instant(*instant)),
            Target::Lsn(lsn) => TargetRecord::Lsn(lsn.to_string()),
            Target::Position(position) => TargetRecord::Position(position.to_string()),
            Target::Transaction { id, included: true } => TargetRecord::UpToTransaction(id.clone()),
            Target::Transaction { id, included: false } => TargetRecord::BeforeTransaction(id.clone()),
            Target::Name(name) => TargetRecord::Name(name.clone()),
            Target::Backup(id) => TargetRecord::Backup(id.to_string()),
        }
    }
}

impl TargetRecord {
    /// The target as a value; text that is no position or backup is an error.
    fn to_target(&self) -> Result<Target> {
        Ok(match self {
            TargetRecord::Latest => Target::Latest,
            TargetRecord::Time(instant) => Target::Time(instant.0),
            TargetRecord::Lsn(text) => Target::Lsn(Lsn::parse(text)?),
            TargetRecord::Position(text) => Target::Position(Position::parse(text)?),
            TargetRecord::UpToTransaction(id) => Target::Transaction { id: id.clone(), included: true },
            TargetRecord::BeforeTransaction(id) => Target::Transaction { id: id.clone(), included: false },
            TargetRecord::Name(name) => Target::Name(name.clone()),
            TargetRecord::Backup(text) => Target::Backup(BackupId::parse(text)?),
        })
    }
}

impl From<&Order> for OrderRecord {
    fn from(order: &Order) -> OrderRecord {
        let task = match &order.task {
            Task::Backup { instance, kind } => {
                TaskRecord::Backup { instance: instance.clone(), automatic: *kind == BackupKind::Automatic }
            }
            Task::Clone(clone) => TaskRecord::Clone {
                source: clone.source.clone(),
                clone_name: clone.clone_name.clone(),
                target: TargetRecord::from(&clone.target),
                data_dir: clone.data_dir.clone(),
                port: clone.port,
                settings: clone.settings.clone(),
                hold: clone.hold,
                passwords_for: clone.passwords_for.clone(),
                keep_expired: clone.keep_expired,
                ties: clone.ties.clone(),
            },
            Task::CloneGroup(group) => TaskRecord::CloneGroup {
                group: group.group.clone(),
                clone_name: group.clone_name.clone(),
                sources: group.sources.clone(),
                target: TargetRecord::from(&group.target),
                hold: group.hold,
            },
        };
        OrderRecord { id: order.id.to_string(), by: order.by.clone(), task }
    }
}

impl OrderRecord {
    /// The order as a value; text that is no id, position or backup is an error.
    pub fn to_order(&self) -> Result<Order> {
        let task = match &self.task {
            TaskRecord::Backup { instance, automatic } => Task::Backup {
                instance: instance.clone(),
                kind: if *automatic { BackupKind::Automatic } else { BackupKind::Manual },
            },
            TaskRecord::Clone {
                source,
                clone_name,
                target,
                data_dir,
                port,
                settings,
                hold,
                passwords_for,
                keep_expired,
                ties,
            } => Task::Clone(CloneOrder {
                source: source.clone(),
                clone_name: clone_name.clone(),
                target: target.to_target()?,
                data_dir: data_dir.clone(),
                port: *port,
                settings: settings.clone(),
                hold: *hold,
                passwords_for: passwords_for.clone(),
                keep_expired: *keep_expired,
                ties: ties.clone(),
            }),
            TaskRecord::CloneGroup { group, clone_name, sources, target, hold } => Task::CloneGroup(GroupOrder {
                group: group.clone(),
                clone_name: clone_name.clone(),
                sources: sources.clone(),
                target: target.to_target()?,
                hold: *hold,
            }),
        };
        Ok(Order { id: JobId::parse(&self.id)?, by: self.by.clone(), task })
    }

    /// The first field in which two orders differ, with both values; nothing if they are the same. Who asked does not
    /// count: the same order may come again by another way.
    pub fn first_difference(&self, other: &OrderRecord) -> Option<(String, String, String)> {
        // Field by field through JSON, so that a field that is added later cannot be forgotten here.
        let fields = |order: &OrderRecord| match serde_json::to_value(&order.task) {
            Ok(serde_json::Value::Object(map)) => map,
            _ => serde_json::Map::new(),
        };
        let (ours, theirs) = (fields(self), fields(other));
        let names: std::collections::BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
        let show = |value: Option<&serde_json::Value>| match value {
            None | Some(serde_json::Value::Null) => String::from("nothing"),
            Some(serde_json::Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        // 'kind' first: two orders of another kind differ in everything else as well.
        let kind = String::from("kind");
        std::iter::once(&kind).chain(names).find_map(|name| {
            let (ours, theirs) = (ours.get(name), theirs.get(name));
            (ours != theirs).then(|| (name.replace('_', " "), show(ours), show(theirs)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders() -> Vec<Order> {
        let targets = [
            Target::Latest,
            Target::Time("2026-11-21T09:59:00.123456Z".parse().unwrap()),
            Target::Lsn(Lsn(0x16_B374_D848)),
            Target::Name("before the migration".into()),
            Target::Backup(BackupId::parse("20261121T095900Z-k3xq").unwrap()),
            Target::Position(Position::File { number: 12, offset: 4567 }),
            Target::Transaction { id: "0-5-7".into(), included: true },
            Target::Transaction { id: "0-5-7".into(), included: false },
        ];
        let clone = |target| {
            Task::Clone(CloneOrder {
                source: "a/orders".into(),
                clone_name: "check".into(),
                target,
                data_dir: Some("/srv/x".into()),
                port: Some(5501),
                settings: [("work_mem".into(), "4MB".into())].into(),
                hold: true,
                passwords_for: ["app".into()].into(),
                keep_expired: true,
                ties: [("tie.table".into(), "a\nb".into())].into(),
            })
        };
        let group = Task::CloneGroup(GroupOrder {
            group: "shop".into(),
            clone_name: "check".into(),
            sources: vec!["orders".into(), "b/cart".into()],
            target: Target::Time("2026-11-21T09:59:00Z".parse().unwrap()),
            hold: true,
        });
        let backup = Task::Backup { instance: "orders".into(), kind: BackupKind::Manual };
        let tasks = targets.map(clone).into_iter().chain([backup, group]);
        tasks.map(|task| Order { id: JobId::fresh(), by: "operator:ann".into(), task }).collect()
    }

    #[test]
    fn every_order_reads_back_as_it_was_written() {
        for order in orders() {
            let line = serde_json::to_string(&OrderRecord::from(&order)).unwrap();
            let read: OrderRecord = serde_json::from_str(&line).unwrap();
            assert_eq!(read.to_order().unwrap(), order, "{line}");
        }
    }

    #[test]
    fn the_first_difference_of_two_orders_is_named_with_both_values() {
        let orders = orders();
        let records: Vec<OrderRecord> = orders.iter().map(OrderRecord::from).collect();
        assert_eq!(records[0].first_difference(&records[0]), None);
        let (field, ..) = records[0].first_difference(&records[1]).unwrap();
        assert_eq!(field, "target");
        let difference = records[0].first_difference(&records[8]).unwrap();
        assert_eq!(difference, ("kind".into(), "clone".into(), "backup".into()));
        let mut other = records[0].clone();
        let TaskRecord::Clone { port, .. } = &mut other.task else { panic!() };
        *port = None;
        assert_eq!(records[0].first_difference(&other).unwrap(), ("port".into(), "5501".into(), "nothing".into()));
    }

    #[test]
    fn an_unknown_field_in_a_record_is_refused() {
        let line = r#"{"record":"held","at":"2026-11-21T09:59:00Z","more":1}"#;
        assert!(serde_json::from_str::<Record>(line).is_err());
        assert!(serde_json::from_str::<Record>(&line.replace(",\"more\":1", "")).is_ok());
    }
}
