//! A base backup, as the catalogue shows it.

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::model::id::{BackupId, IncarnationId};
use crate::model::position::Position;

/// Who asked for the backup. Automatic ones expire by schedule, manual ones only by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupKind {
    Automatic,
    Manual,
}

/// The facts of a published backup: the tail of its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    pub id: BackupId,
    pub incarnation: IncarnationId,
    pub kind: BackupKind,
    /// Replay must begin here ...
    pub start: Position,
    /// ... and must at least reach this before the copy is consistent.
    pub stop: Position,
    pub began_at: Timestamp,
    pub ended_at: Timestamp,
    pub engine_version: String,
    /// Files and bytes of the restored data directory, and bytes that this backup added to the repository.
    pub file_count: u64,
    pub restored_bytes: u64,
    pub stored_bytes: u64,
    /// What the engine must know again at the time of a restore and no other floor looks into: for PostgreSQL
    /// settings, versions, tablespaces, recovery parameters. Keys are the engine's.
    pub engine_facts: BTreeMap<String, String>,
}

/// What a file in a backup is. Paths are relative to the data directory, with `/`, without `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMeta {
    pub path: String,
    pub kind: FileKind,
    /// Permission bits as of chmod(2); ownership is that of the user who runs the clone.
    pub mode: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileKind {
    Directory,
    Regular,
    /// A symbolic link: its target as found on the source. The engine decides what becomes of it in a copy.
    Link {
        to: String,
    },
}
