//! Log files of an engine and what the repository holds of them.

use jiff::Timestamp;

use crate::model::position::Position;

/// A log file on the source, as the engine sees it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFile {
    /// The engine's own name of the file; names of one incarnation sort in the order of the log.
    pub name: String,
    /// Bytes from the start of the file that are durable on the source and will not change.
    pub readable_bytes: u64,
    /// The engine will not write to the file again.
    pub sealed: bool,
}

/// What an engine's log reader found in a range of bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogSummary {
    /// The smallest and largest commit time in the range. A hint: transactions that cross into the range may be
    /// attributed to either side.
    pub first_commit_at: Option<Timestamp>,
    pub last_commit_at: Option<Timestamp>,
    /// Where the last complete transaction of the range ends.
    pub last_commit: Option<Position>,
    /// Restore points that users named, with their positions.
    pub named_points: Vec<(String, Position)>,
    /// Which transactions the range has, where the engine gives them ids: ranges in the engine's own words. Empty says
    /// nothing.
    pub transactions: Vec<String>,
}

/// A contiguous byte range of a log file in the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogChunk {
    pub file: String,
    pub from_bytes: u64,
    pub to_bytes: u64,
    /// The chunk is the whole file and the engine will not write to it again.
    pub sealed: bool,
}

/// One log file as the repository can serve it: its contiguous chunks from byte 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedLogFile {
    pub name: String,
    /// Contiguous bytes from the start of the file.
    pub bytes: u64,
    pub sealed: bool,
}
