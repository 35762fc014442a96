//! What this process remembers of a repository, so that it need not ask again: identities, the facts of backups, and
//! which log files there are. In memory, and in one file for each incarnation, so that an agent that starts again goes
//! on from where it left off.
//!
//! Invariants:
//! * The repository is the truth. What is remembered is compared with a listing that begins where the last one ended,
//!   and about once a day with a listing of everything, because others write and delete, too.
//! * Nothing that lets a server forget log is decided from here: an archiver begins with a listing of its own.
//! * A file that is missing, damaged, of another version, repository or incarnation means that nothing is remembered.
//! * At most [`INCARNATIONS_MAX`] incarnations are remembered, those that were asked for last.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use jiff::Timestamp;

use crate::base::bulk::run_blocking;
use crate::base::clock::{Clock, SystemClock, is_within};
use crate::model::id::{IncarnationId, RepositoryId};
use crate::model::incarnation::Incarnation;
use crate::repo::backup_reader::KnownBackups;
use crate::repo::log_catalogue::LogCatalogue;

mod file;

pub(super) use file::KeptLog;

use file::CopyOfIncarnation;

/// More are forgotten, the least recently used first. Their files stay.
pub const INCARNATIONS_MAX: usize = 32;
/// After so long everything is listed anew, in case something was removed where nobody looked.
pub(super) const LIST_ALL_EVERY: Duration = Duration::from_secs(24 * 3600);
/// A file is not written more often, but for the first time.
const SAVE_EVERY: Duration = Duration::from_secs(600);

/// See the module. One per open repository.
pub struct LocalCopy {
    repository: RepositoryId,
    /// Where files are; nothing means that all is forgotten with the process.
    dir: Option<PathBuf>,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    incarnations: HashMap<IncarnationId, (u64, Arc<Remembered>)>,
    /// Counts uses.
    uses: u64,
    identities: Identities,
}

/// The identities that were read, and when all of them were listed last.
#[derive(Default)]
pub(super) struct Identities {
    pub known: BTreeMap<IncarnationId, Incarnation>,
    pub all_listed_at: Option<Timestamp>,
}

/// What is remembered of one incarnation.
#[derive(Default)]
pub(super) struct Remembered {
    backups: Mutex<KnownBackups>,
    log: Mutex<KnownLog>,
    /// Who lists or reads holds it, so that two who ask at the same time do not do it twice.
    pub asking: tokio::sync::Mutex<()>,
    saved: Mutex<Saved>,
}

/// What is known of the log of an incarnation.
#[derive(Default)]
enum KnownLog {
    #[default]
    Nothing,
    /// From the file, not compared with the repository yet.
    Kept(KeptLog),
    Live(Arc<LogCatalogue>),
}

#[derive(Default)]
struct Saved {
    /// Whether the file was looked at.
    is_loaded: bool,
    at: Option<Timestamp>,
    /// `changes` of the backups and of the log when the file was written.
    changes: (u64, u64),
}

// Nothing that can panic is done while one of these locks is held, so a poisoned one is still good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl LocalCopy {
    /// A copy that lives as long as the process.
    pub fn in_memory(repository: RepositoryId) -> LocalCopy {
        LocalCopy { repository, dir: None, clock: Arc::new(SystemClock), state: Mutex::default() }
    }

    /// A copy with files below `dir`, which is made when something is written.
    pub fn in_dir(repository: RepositoryId, dir: PathBuf, clock: Arc<dyn Clock>) -> LocalCopy {
        LocalCopy { repository, dir: Some(dir), clock, state: Mutex::default() }
    }

    pub(super) fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Looks at or changes the identities.
    pub(super) fn with_identities<T>(&self, look: impl FnOnce(&mut Identities) -> T) -> T {
        look(&mut lock(&self.state).identities)
    }

    /// What is remembered of an incarnation; from its file if it was not asked for yet.
    pub(super) async fn remembered(&self, incarnation: IncarnationId) -> Arc<Remembered> {
        let remembered = self.entry(incarnation);
        if let Some(dir) = &self.dir
            && !lock(&remembered.saved).is_loaded
        {
            let (dir, repository) = (dir.clone(), self.repository);
            let copy = run_blocking("local copy", move || Ok(file::read(&dir, repository, incarnation))).await;
            let mut saved = lock(&remembered.saved);
            if !std::mem::replace(&mut saved.is_loaded, true)
                && let Ok(Some(copy)) = copy
            {
                lock(&remembered.backups).take_over(copy.backups);
                let mut log = lock(&remembered.log);
                if let (KnownLog::Nothing, Some(kept)) = (&*log, copy.log) {
                    *log = KnownLog::Kept(kept);
                }
            }
        }
        remembered
    }

    fn entry(&self, incarnation: IncarnationId) -> Arc<Remembered> {
        let mut state = lock(&self.state);
        state.uses += 1;
        let uses = state.uses;
        if !state.incarnations.contains_key(&incarnation) && state.incarnations.len() >= INCARNATIONS_MAX {
            let oldest = state.incarnations.iter().min_by_key(|(_, (used, _))| *used).map(|(id, _)| *id);
            oldest.and_then(|oldest| state.incarnations.remove(&oldest));
        }
        let (used, remembered) = state.incarnations.entry(incarnation).or_default();
        *used = uses;
        remembered.clone()
    }

    /// Writes what has changed, for each incarnation at most every ten minutes unless `now`. What cannot be written is
    /// asked for again after the next start.
    pub async fn save(&self, now: bool) {
        let Some(dir) = &self.dir else { return };
        let all: Vec<_> = lock(&self.state).incarnations.iter().map(|(id, (_, one))| (*id, one.clone())).collect();
        for (incarnation, remembered) in all {
            let Some(copy) = remembered.to_be_saved(self.clock.now(), now) else { continue };
            let (dir, repository) = (dir.clone(), self.repository);
            let write = move || file::write(&dir, repository, incarnation, &copy);
            if let Err(error) = run_blocking("local copy", write).await {
                tracing::warn!("what is known of incarnation '{incarnation}' is not kept: {error}");
            }
        }
    }
}

impl Remembered {
    pub fn with_backups<T>(&self, look: impl FnOnce(&mut KnownBackups) -> T) -> T {
        look(&mut lock(&self.backups))
    }

    pub fn log(&self) -> Option<Arc<LogCatalogue>> {
        match &*lock(&self.log) {
            KnownLog::Live(catalogue) => Some(catalogue.clone()),
            KnownLog::Nothing | KnownLog::Kept(_) => None,
        }
    }

    /// What the file said, once.
    pub fn take_kept_log(&self) -> Option<KeptLog> {
        let mut log = lock(&self.log);
        match std::mem::take(&mut *log) {
            KnownLog::Kept(kept) => Some(kept),
            other => {
                *log = other;
                None
            }
        }
    }

    /// From now on this is the one that everybody looks at.
    pub fn set_log(&self, catalogue: Arc<LogCatalogue>) {
        *lock(&self.log) = KnownLog::Live(catalogue);
    }

    fn to_be_saved(&self, now: Timestamp, at_once: bool) -> Option<CopyOfIncarnation> {
        let log = self.log();
        let backups = self.with_backups(|backups| backups.clone());
        let changes = (backups.changes(), log.as_ref().map_or(0, |log| log.changes()));
        let mut saved = lock(&self.saved);
        let is_due = saved.at.is_none_or(|at| !is_within(at, now, SAVE_EVERY));
        if changes == saved.changes || !(is_due || at_once) {
            return None;
        }
        (saved.at, saved.changes) = (Some(now), changes);
        Some(CopyOfIncarnation { backups, log: log.and_then(|log| log.to_keep()) })
    }
}
