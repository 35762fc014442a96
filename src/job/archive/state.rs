//! What an archiver knows and tells.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;

use crate::base::clock::is_within;
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
    /// When that was so: of when the backlog is, too.
    pub durable_at: Option<Timestamp>,
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
    pub told: Told,
}

/// When the log was told of a failure that lasts, so that it is told soon and not all the time.
#[derive(Debug, Default)]
pub(super) struct Told {
    at: Option<Timestamp>,
    /// Nobody has said since that it is over.
    lasts: bool,
}

impl Told {
    /// Whether to say now that something is wrong: if it was not said yet, and again every minute. What comes and goes is
    /// not said every time it comes.
    pub fn is_due(&mut self, now: Timestamp) -> bool {
        let pause = Duration::from_secs(if self.lasts { 60 } else { 10 });
        if self.at.is_some_and(|at| is_within(at, now, pause)) {
            return false;
        }
        (self.at, self.lasts) = (Some(now), true);
        true
    }

    /// Whether to say that what was said to be wrong is not so any more.
    pub fn is_over(&mut self) -> bool {
        std::mem::take(&mut self.lasts)
    }
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
            told: Told::default(),
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
            durable_at: self.durable.map(|end| end.observed_at),
            backlog_bytes: self.backlog_bytes,
            backlog_seconds: u64::try_from(behind).unwrap_or(0),
            problem: self.problem.clone(),
            hole: self.hole.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_at_once_then_every_minute_and_its_end_once() {
        let mut told = Told::default();
        let at = |second| Timestamp::from_second(1_000_000 + second).unwrap();
        let said: Vec<i64> = (0..200).filter(|second| told.is_due(at(*second))).collect();
        assert_eq!(said, [0, 60, 120, 180]);
        assert_eq!([told.is_over(), told.is_over()], [true, false]);
        // What fails and works by turns is told now and then.
        let said = (200..300).filter(|second| told.is_due(at(*second)) && told.is_over()).count();
        assert_eq!(said, 10);
        // A clock that was set back does not keep the next failure from being told.
        assert!(told.is_due(at(-5000)));
    }
}
