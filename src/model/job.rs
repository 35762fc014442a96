//! Jobs: running orders and backups, as lists of steps.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::model::backup::BackupKind;
use crate::model::group::GroupOrder;
use crate::model::id::JobId;
use crate::model::target::Target;

/// What was ordered. The id is the caller's: repeating an order is harmless, changing it under the same id is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    pub id: JobId,
    /// Who asked, as authenticated: `operator:ann`, `host:a`, `local:root`, `schedule`.
    pub by: String,
    pub task: Task,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    Backup { instance: String, kind: BackupKind },
    Clone(CloneOrder),
    CloneGroup(GroupOrder),
}

impl Task {
    /// The name that the clone, or the group of clones, gets; none for other work.
    pub fn clone_name(&self) -> Option<&str> {
        match self {
            Task::Backup { .. } => None,
            Task::Clone(order) => Some(&order.clone_name),
            Task::CloneGroup(order) => Some(&order.clone_name),
        }
    }
}

/// A request to grow a clone on the host that receives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneOrder {
    /// `orders`, or `a/orders` where more than one host has an instance of that name.
    pub source: String,
    pub clone_name: String,
    pub target: Target,
    /// Empty means: below `[clone] data_root`, named for the clone.
    pub data_dir: Option<String>,
    /// Empty means: the first free one of `[clone] ports`.
    pub port: Option<u16>,
    /// Settings of the server that the user wants to be different, as `--set name=value`.
    pub settings: BTreeMap<String, String>,
    /// Stop in quarantine and wait for `keiki accept` or `keiki discard`.
    pub hold: bool,
    /// Accounts that get new passwords. The passwords travel beside the order: see `password`.
    pub passwords_for: BTreeSet<String>,
    /// Keys that have expired since the target stay in the clone, of engines that have such keys.
    pub keep_expired: bool,
    /// What the group that it belongs to tells it of the other members, as facts beside those of the backup, each with
    /// `group::TIE_PREFIX`. Made by the agent that grows the group, never taken from another agent or a person.
    pub ties: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobState {
    Running,
    /// A clone that is up in quarantine and waits for accept or discard.
    Held,
    Done,
    Failed,
    Cancelled,
}

/// A job as `keiki job show` prints it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobReport {
    pub order: Order,
    pub state: JobState,
    pub began_at: Timestamp,
    pub ended_at: Option<Timestamp>,
    /// All steps of the plan in order, with what each has done so far.
    pub steps: Vec<StepReport>,
    /// What the job reached and did, in the order to be printed: `reached`, `data directory`, `port` ...
    pub results: Vec<(String, String)>,
    /// The check list, once the check step is over.
    pub checks: Vec<crate::model::check::CheckItem>,
    pub error: Option<crate::error::Error>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepReport {
    pub name: String,
    pub state: StepState,
    /// In the unit of `unit`; a total of 0 means that it is not known yet.
    pub done: u64,
    pub total: u64,
    pub unit: ProgressUnit,
    /// One line about what is going on or was done.
    pub note: String,
    pub began_at: Option<Timestamp>,
    pub ended_at: Option<Timestamp>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepState {
    Waiting,
    Running,
    Done,
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgressUnit {
    Bytes,
    Items,
}
