//! One life of an instance's data directory, and who may write its archive.

use jiff::Timestamp;

use crate::model::engine_kind::EngineKind;
use crate::model::id::{IncarnationId, RunId};
use crate::model::position::Position;

/// What never changes in the life of an incarnation. Written once, create-only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incarnation {
    pub id: IncarnationId,
    pub engine: EngineKind,
    /// The server's version as it calls itself: `15.18`.
    pub engine_version: String,
    /// The name of the instance and of the host at the time when this life began.
    pub instance: String,
    pub host: String,
    /// What the server calls itself: PostgreSQL's system identifier in decimal. Clones share it with their parents.
    pub system_id: String,
    pub began_at: Timestamp,
    /// The incarnation that this one was cloned or restored from, and the position where it left it.
    pub parent: Option<(IncarnationId, Position)>,
}

/// Who archives an incarnation now. Replaced only by compare-and-swap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Grows by one each time the lease changes hands.
    pub epoch: u64,
    pub holder: LeaseHolder,
    pub renewed_at: Timestamp,
    /// Everything that the server had made durable at this instant is in the repository up to this position.
    /// It lets a target after the last commit of a quiet database be told from a target in the future.
    pub covered: Option<(Position, Timestamp)>,
}

/// One run of one agent, described so that its death can be proved on the machine where it ran.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseHolder {
    pub host: String,
    pub run: RunId,
    /// `/etc/machine-id` and `/proc/sys/kernel/random/boot_id`.
    pub machine_id: String,
    pub boot_id: String,
    pub process_id: u32,
    /// Field 22 of `/proc/PID/stat` (proc(5)): tells a reused process id from the original.
    pub process_start_ticks: u64,
}
