//! What can be reached: ranges of the log that begin at a base backup, and the holes between them.

use jiff::Timestamp;

use crate::model::id::BackupId;
use crate::model::position::Position;

/// An uninterrupted stretch of targets: from the consistency of a backup to the end of contiguous log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    pub backup: BackupId,
    pub from: Position,
    /// When the backup ended: earlier instants cannot be shown by it.
    pub from_time: Timestamp,
    pub to: Position,
    /// The last committed transaction in the log of this stretch, if there is any.
    pub last_commit_at: Option<Timestamp>,
    /// Targets up to this instant are covered: later than `last_commit_at` when the database was quiet.
    pub covered_until: Option<Timestamp>,
}

/// Log that is missing: nothing between the two positions can be replayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hole {
    pub from: Position,
    pub to: Position,
    pub from_time: Option<Timestamp>,
    pub to_time: Option<Timestamp>,
}

/// The window of an incarnation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Window {
    /// Oldest first.
    pub reaches: Vec<Reach>,
    pub holes: Vec<Hole>,
}
