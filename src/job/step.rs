//! What a step sees of its job: the order, the facts of earlier steps, and where to say how far it is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_blocking;
use crate::engine::Progress;
use crate::error::{Error, Kind, Result};
use crate::job::journal::{History, JobLog};
use crate::job::records::{Record, SaidRecord};
use crate::model::check::CheckItem;
use crate::model::job::{JobReport, Order};

/// Somebody who watches sees progress at most this often; ends of steps are seen at once.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);

/// A job in memory: its history, its journal, and those who watch.
pub(super) struct Live {
    history: Mutex<History>,
    /// Open while the job is not over. Apart from the history, so that nobody waits for a disk to look at a job.
    journal: tokio::sync::Mutex<Option<JobLog>>,
    watchers: watch::Sender<JobReport>,
    published: Mutex<Instant>,
}

impl Live {
    pub fn new(history: History, journal: Option<JobLog>) -> Live {
        let watchers = watch::Sender::new(history.report.clone());
        Live {
            history: Mutex::new(history),
            journal: tokio::sync::Mutex::new(journal),
            watchers,
            published: Mutex::new(Instant::now()),
        }
    }

    /// The history as it stands. The lock is never held across a call that can panic, so a poisoned one is still good.
    pub fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn subscribe(&self) -> watch::Receiver<JobReport> {
        self.watchers.subscribe()
    }

    /// Opens the journal if it is closed.
    pub async fn open_with(&self, open: impl FnOnce() -> Result<JobLog> + Send + 'static) -> Result<()> {
        let mut journal = self.journal.lock().await;
        if journal.is_none() {
            *journal = Some(run_blocking("open journal", open).await?);
        }
        Ok(())
    }

    pub async fn close(&self) {
        *self.journal.lock().await = None;
    }

    /// Makes a record durable, then lets it count.
    pub async fn append(&self, record: Record) -> Result<()> {
        let mut slot = self.journal.lock().await;
        let Some(mut journal) = slot.take() else {
            return Err(Error::new(Kind::Internal, "the journal of the job is closed"));
        };
        let (journal, record) = run_blocking("append to journal", move || {
            let outcome = journal.append(&record);
            Ok((journal, outcome.map(|()| record)))
        })
        .await?;
        // After its end the job needs no journal. It is closed here, before anybody can see the end: whoever then goes on
        // with the job opens it again, and nobody closes it under their hands.
        let has_ended = matches!(record, Ok(Record::Ended { .. }));
        *slot = (!has_ended).then_some(journal);
        let record = record?;
        self.history().apply(&record)?;
        self.publish();
        Ok(())
    }

    /// Ends the job in memory only: the journal cannot be written. After a restart the job goes on from what it says.
    pub fn end_in_memory(&self, record: &Record) {
        // The record is built by the runner for this very history, so it can only fit.
        let _ = self.history().apply(record);
        self.publish();
    }

    pub fn publish(&self) {
        let report = self.history().report.clone();
        *self.published.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Instant::now();
        self.watchers.send_replace(report);
    }

    fn publish_if_due(&self) {
        let due = {
            let published = self.published.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            published.elapsed() >= PUBLISH_EVERY
        };
        if due {
            self.publish();
        }
    }

    /// What the job has said so far, for a record.
    pub fn said(&self) -> SaidRecord {
        let history = self.history();
        SaidRecord {
            results: history.report.results.clone(),
            checks: history.report.checks.iter().map(Into::into).collect(),
        }
    }
}

/// Handed to a step while it runs.
pub struct StepContext {
    pub order: Order,
    /// Fires when the job is cancelled or the agent stops.
    pub cancel: CancellationToken,
    /// The step was begun before and did not end well: what it made may lie about.
    pub is_repeated: bool,
    /// The number of the step, for its progress.
    pub(super) step: usize,
    pub(super) live: Arc<Live>,
}

impl StepContext {
    /// A fact that this or an earlier step recorded.
    pub fn fact(&self, key: &str) -> Option<String> {
        self.live.history().facts.get(key).cloned()
    }

    /// A fact that an earlier step must have recorded.
    pub fn need_fact(&self, key: &str) -> Result<String> {
        self.fact(key).ok_or_else(|| Error::new(Kind::Internal, format!("the journal does not say '{key}'")))
    }

    /// All facts so far.
    pub fn facts(&self) -> BTreeMap<String, String> {
        self.live.history().facts.clone()
    }

    /// Records a fact durably, now, so that it is known even if the agent dies in the next moment.
    pub async fn record(&self, key: &str, value: impl Into<String>) -> Result<()> {
        let value = value.into();
        if self.fact(key).as_ref() == Some(&value) {
            return Ok(());
        }
        self.live.append(Record::Fact { key: key.to_string(), value }).await
    }

    /// Adds or replaces a line of the result; durable with the end of the step.
    pub fn result(&self, what: &str, value: impl Into<String>) {
        let value = value.into();
        let mut history = self.live.history();
        match history.report.results.iter_mut().find(|line| line.0 == what) {
            Some(line) => line.1 = value,
            None => history.report.results.push((what.to_string(), value)),
        }
    }

    /// Replaces the check list; durable with the end of the step.
    pub fn checks(&self, items: Vec<CheckItem>) {
        self.live.history().report.checks = items;
        self.live.publish();
    }

    /// Where the step, or an engine for it, says how far it is.
    pub fn progress(&self) -> Arc<dyn Progress> {
        Arc::new(StepProgress { step: self.step, live: self.live.clone() })
    }

    /// An error if the job is to stop.
    pub fn go_on(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(cancelled()) } else { Ok(()) }
    }
}

/// The error of a step that stopped because it was asked to.
pub fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "the job was cancelled")
}

struct StepProgress {
    step: usize,
    live: Arc<Live>,
}

impl Progress for StepProgress {
    fn set(&self, done: u64, total: u64) {
        if let Some(step) = self.live.history().report.steps.get_mut(self.step) {
            (step.done, step.total) = (done, total);
        }
        self.live.publish_if_due();
    }

    fn note(&self, text: String) {
        if let Some(step) = self.live.history().report.steps.get_mut(self.step) {
            step.note = text;
        }
        self.live.publish_if_due();
    }
}
