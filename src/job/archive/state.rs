//! What an archiver knows and tells.

use std::collections::BTreeSet;

use jiff::Timestamp;

use crate::engine::DurableEnd;
use crate::error::Error;
use crate::model::position::Position;
use crate::model::window::Hole;

/// How archiving goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArchiveState {
    /// The first look has not ended yet.
    Starting,
    Archiving,
    /// Trying again after a failure; the problem says which.
    Retrying,
    /// The server is not running.
    Down,
    /// Stopped for good until somebody acts: fenced, conflict.
    Stopped,
}

/// A look at an archiver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveStatus {
    pub state: ArchiveState,
    pub engine_version: String,
    /// Everything before is in the repository.
    pub shipped: Option<Position>,
    /// Everything before is durable on the server.
    pub durable: Option<Position>,
    pub backlog_bytes: u64,
    /// Age of the oldest change that is not in the repository, 0 if there is none.
    pub backlog_seconds: u64,
    /// What is wrong now.
    pub problem: Option<Error>,
    /// Log that the server had forgotten before it was shipped, found at the start of this run.
    pub hole: Option<Hole>,
}

/// What an archiver has learned, behind one short lock.
#[derive(Debug)]
pub(super) struct Known {
    pub state: ArchiveState,
    pub shipped: Option<Position>,
    pub durable: Option<DurableEnd>,
    pub backlog_bytes: u64,
    /// Since when something has been missing in the repository.
    pub behind_since: Option<Timestamp>,
    pub problem: Option<Error>,
    pub hole: Option<Hole>,
    pub looked_for_hole: bool,
    /// Files of which the end of what an earlier run has archived was held against the server's, and whether that is done
    /// for all that were there when this run began.
    pub compared: BTreeSet<String>,
    pub compared_all: bool,
    /// Files that this run has shipped or compared as a whole.
    pub confirmed: BTreeSet<String>,
    /// Files that the server asked for and that are not confirmed yet.
    pub asked: BTreeSet<String>,
    /// Listings begin after this file.
    pub settled_file: Option<String>,
    pub open_shipped_at: Option<Timestamp>,
    pub renewed_at: Timestamp,
    /// The newest moment up to which everything is in the repository.
    pub covered: Option<DurableEnd>,
    pub covered_recorded: Option<DurableEnd>,
    pub released: Option<Position>,
    /// How often something failed since the last success.
    pub failures: u32,
}

/// So many names of confirmed files are remembered: the server asks about files that it has just finished.
const CONFIRMED_MAX: usize = 10_000;

impl Known {
    pub fn new(now: Timestamp) -> Known {
        Known {
            state: ArchiveState::Starting,
            shipped: None,
            durable: None,
            backlog_bytes: 0,
            behind_since: None,
            problem: None,
            hole: None,
            looked_for_hole: false,
            compared: BTreeSet::new(),
            compared_all: false,
            confirmed: BTreeSet::new(),
            asked: BTreeSet::new(),
            settled_file: None,
            open_shipped_at: None,
            renewed_at: now,
            covered: None,
            covered_recorded: None,
            released: None,
            failures: 0,
        }
    }

    /// The file is in the repository as the server has it.
    pub fn confirm(&mut self, name: &str) {
        self.asked.remove(name);
        self.confirmed.insert(name.to_string());
        if self.confirmed.len() > CONFIRMED_MAX {
            self.confirmed.pop_first();
        }
    }

    /// The next listing begins wherever the server's log begins now, and what is missing before it is looked for.
    pub fn begin_anew(&mut self) {
        self.settled_file = None;
        self.looked_for_hole = false;
    }

    pub fn status(&self, engine_version: &str, now: Timestamp) -> ArchiveStatus {
        let behind = self.behind_since.map_or(0, |since| now.duration_since(since).as_secs());
        ArchiveStatus {
            state: self.state,
            engine_version: engine_version.to_string(),
            shipped: self.shipped,
            durable: self.durable.map(|end| end.position),
            backlog_bytes: self.backlog_bytes,
            backlog_seconds: u64::try_from(behind).unwrap_or(0),
            problem: self.problem.clone(),
            hole: self.hole.clone(),
        }
    }
}
