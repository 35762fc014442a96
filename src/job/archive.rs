//! Ships one instance: whatever its server writes into its log is brought to the repository, and stays there.
//!
//! One look at a time: list -> plan (pure, `plan`) -> ship -> let the server forget -> say how far it is. Invariants:
//! * The server hears that a file is safe, or may be forgotten, only when it is durable in the repository as a whole
//!   and is the file that the server has.
//! * Nothing is shipped without the incarnation's lease, and only for the data directory that the incarnation is bound
//!   to (`claim`). A conflict or a lost lease ends archiving for good; everything else is tried again.
//! * `covered` in the lease never says more than what a whole look found in the repository afterwards.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::base::child::is_process_alive;
use crate::base::clock::{Clock, is_within};
use crate::base::retry::RetryPolicy;
use crate::base::watch::DirectoryWatch;
use crate::engine::{DurableEnd, Engine, LogGeometry, LogListing, LogRead};
use crate::error::{Error, Kind, Result};
use crate::job::window::{archived_span, contiguous};
use crate::model::bytes_text::human_bytes;
use crate::model::id::IncarnationId;
use crate::model::incarnation::LeaseHolder;
use crate::model::log::{LogChunk, LogSummary};
use crate::model::position::Position;
use crate::model::window::Hole;
use crate::repo::lease::LeaseKeeper;
use crate::repo::log_catalogue::LogCatalogue;
use crate::repo::log_writer::{LogBytes, LogWriter};
use crate::repo::repository::Repository;

pub mod claim;
pub mod plan;
mod state;

pub use claim::{Binding, claim_incarnation, read_binding, remove_binding, write_binding};
pub use state::{ArchiveState, ArchiveStatus};

use plan::{Archived, Limits, Reached, ShipAction, ShipPlan, hole_before, plan_shipping, reached};
use state::Known;

/// How often the lease is renewed while nobody asks: when there is new log to say, and when there is none. Each renewal is
/// a request that somebody pays for.
const RENEW_EVERY: Duration = Duration::from_secs(20);
const RENEW_QUIET_EVERY: Duration = Duration::from_secs(60);
/// How long a run goes on publishing without a renewal that succeeded.
const LEASE_TTL: Duration = Duration::from_secs(180);
/// Whole files in one plan.
const SEALED_FILES_PER_LOOK: usize = 32;
const COMPARE_FILES: usize = 4;

/// How an instance is shipped.
#[derive(Debug, Clone)]
pub struct ArchiverOptions {
    /// How long new bytes of the open file may wait.
    pub ship_every: Duration,
    /// How many whole files travel at the same time.
    pub parallel_files: usize,
}

/// Ships one incarnation. Shared by the task that runs it and by everybody who asks it.
pub struct Archiver {
    /// The instance's name.
    name: String,
    engine: Arc<dyn Engine>,
    engine_version: String,
    repo: Arc<Repository>,
    lease: Arc<LeaseKeeper>,
    writer: LogWriter,
    geometry: Arc<dyn LogGeometry>,
    clock: Arc<dyn Clock>,
    options: ArchiverOptions,
    /// One look at a time.
    looking: tokio::sync::Mutex<()>,
    known: Mutex<Known>,
    wake: Notify,
    /// Counts looks, for those who wait for something to happen.
    looks: watch::Sender<u64>,
}

/// When the new bytes of the open file go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenFile {
    /// When `ship_every` has passed since they went last.
    WhenDue,
    Now,
}

/// What a look left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Looked {
    /// There are more whole files than one look ships.
    pub has_more: bool,
    /// Everything up to here was in the repository when the look ended; nothing if something is missing.
    pub covered: Option<DurableEnd>,
}

impl Archiver {
    /// Claims the incarnation of a running server, takes its lease and learns what the repository has.
    ///
    /// `Fenced` means that this is not the directory that the incarnation belongs to or that somebody else archives it.
    #[allow(clippy::too_many_arguments)]
    pub async fn claim(
        instance: &str,
        host: &str,
        state_dir: &Path,
        engine: Arc<dyn Engine>,
        repo: Arc<Repository>,
        holder: LeaseHolder,
        clock: Arc<dyn Clock>,
        options: ArchiverOptions,
    ) -> Result<Arc<Archiver>> {
        let identity = engine.identify().await?;
        let incarnation = claim_incarnation(&repo, &identity, state_dir, host, instance, clock.now()).await?;
        let is_alive = |holder: &LeaseHolder| is_process_alive(holder.process_id, holder.process_start_ticks);
        let lease =
            LeaseKeeper::acquire(repo.clone(), incarnation.id, holder, clock.clone(), LEASE_TTL, is_alive).await?;
        Archiver::new(instance, engine, identity.version, repo, lease, clock, options).await
    }

    /// An archiver for an incarnation whose lease is held.
    async fn new(
        instance: &str,
        engine: Arc<dyn Engine>,
        engine_version: String,
        repo: Arc<Repository>,
        lease: Arc<LeaseKeeper>,
        clock: Arc<dyn Clock>,
        options: ArchiverOptions,
    ) -> Result<Arc<Archiver>> {
        let geometry = engine.log_geometry().await?;
        let catalogue = LogCatalogue::load(repo.clone(), lease.incarnation()).await?;
        let writer = LogWriter::new(repo.clone(), lease.clone(), catalogue);
        Ok(Arc::new(Archiver {
            name: instance.to_string(),
            engine,
            engine_version,
            repo,
            lease,
            writer,
            geometry,
            options,
            looking: tokio::sync::Mutex::new(()),
            known: Mutex::new(Known::new(clock.now())),
            wake: Notify::new(),
            looks: watch::Sender::new(0),
            clock,
        }))
    }

    pub fn incarnation(&self) -> IncarnationId {
        self.lease.incarnation()
    }

    pub fn lease(&self) -> &Arc<LeaseKeeper> {
        &self.lease
    }

    pub fn repository(&self) -> &Arc<Repository> {
        &self.repo
    }

    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    pub fn engine_version(&self) -> &str {
        &self.engine_version
    }

    /// Whether the repository has all of the log between two positions, by what this run knows. Asks nobody.
    pub async fn has_log(&self, from: Position, to: Position) -> Result<bool> {
        if from == to {
            return Ok(true);
        }
        let stretches = contiguous(self.writer.catalogue(), self.geometry.as_ref())?;
        Ok(stretches.iter().any(|stretch| stretch.from <= from && to <= stretch.to))
    }

    /// The first stretch of log behind a position that is missing, although what comes after it is in the repository: the
    /// server forgot it before it was shipped. Log that is on its way is not missing. Asks nobody.
    pub fn hole_behind(&self, position: Position) -> Result<Option<Hole>> {
        let shipped = self.lock().shipped;
        let stretches = contiguous(self.writer.catalogue(), self.geometry.as_ref())?;
        let gaps = stretches.iter().zip(stretches.iter().skip(1)).map(|(before, after)| (before.to, after.from));
        let hole = gaps.into_iter().find(|(_, to)| *to > position && shipped.is_some_and(|shipped| *to <= shipped));
        Ok(hole.map(|(from, to)| Hole { from, to, from_time: None, to_time: None }))
    }

    /// How archiving goes, as of the last look. Asks nobody.
    pub fn status(&self) -> ArchiveStatus {
        self.lock().status(&self.engine_version, self.clock.now())
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Held for looks and assignments only, which cannot panic.
        self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Ships until `cancel` fires (`Ok`) or until it must not go on (`Fenced`, `Conflict`).
    pub async fn run(&self, cancel: CancellationToken) -> Result<()> {
        let error = tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            error = self.keep_shipping() => error,
            error = self.keep_lease() => error,
        };
        self.stop(&error);
        Err(error)
    }

    /// Looks whenever something changed or is due. Ends with the error that must not be tried again.
    async fn keep_shipping(&self) -> Error {
        let mut changes = DirectoryWatch::new(self.engine.log_directories())
            .inspect_err(|error| {
                tracing::warn!("changes are found by looking every {:?}: {error}", self.options.ship_every)
            })
            .ok();
        let policy = RetryPolicy::forever();
        loop {
            let pause = match self.look(OpenFile::WhenDue).await {
                Ok(looked) if looked.has_more => continue,
                Ok(_) => self.options.ship_every,
                Err(error) if is_final(&error) => return error,
                Err(_) => {
                    // Somebody who asks, or the next change, must not make the backoff of an outage shorter.
                    let failures = self.lock().failures;
                    self.clock.sleep(policy.wait_after(failures)).await;
                    continue;
                }
            };
            tokio::select! {
                () = self.clock.sleep(pause) => {}
                () = self.wake.notified() => {}
                () = changed(&mut changes) => {}
            }
        }
    }

    /// Renews the lease also while one look takes long.
    async fn keep_lease(&self) -> Error {
        loop {
            self.clock.sleep(RENEW_EVERY / 2).await;
            match self.renew_if_due().await {
                Err(error) if is_final(&error) => return error,
                Err(error) => tracing::warn!(incarnation = %self.incarnation(), "{error}"),
                Ok(()) => {}
            }
        }
    }

    async fn renew_if_due(&self) -> Result<()> {
        let (renewed_at, has_news) = {
            let known = self.lock();
            let position = |end: Option<DurableEnd>| end.map(|end| end.position);
            (known.renewed_at, position(known.covered) != position(known.covered_recorded))
        };
        let every = if has_news { RENEW_EVERY } else { RENEW_QUIET_EVERY };
        if is_within(renewed_at, self.clock.now(), every) {
            return Ok(());
        }
        self.renew().await
    }

    async fn renew(&self) -> Result<()> {
        let (now, covered) = (self.clock.now(), self.lock().covered);
        self.lease.renew(covered.map(|end| (end.position, end.observed_at))).await?;
        let mut known = self.lock();
        (known.renewed_at, known.covered_recorded) = (now, covered);
        Ok(())
    }

    /// Ships everything that is durable on the server now, the open file too, and records how far that is.
    pub async fn ship_now(&self) -> Result<DurableEnd> {
        loop {
            self.not_stopped()?;
            let looked = self.look(OpenFile::Now).await;
            let looked = looked.inspect_err(|error| self.stop_if_final(error))?;
            if let Some(covered) = looked.covered {
                if self.lock().covered_recorded != Some(covered) {
                    self.renew().await.inspect_err(|error| self.stop_if_final(error))?;
                }
                return Ok(covered);
            }
        }
    }

    /// Whether this log file is in the repository as the server has it. Asks nobody: what an earlier run shipped is
    /// compared first, see [`Archiver::wait_durable`].
    pub fn is_durable(&self, file: &str) -> bool {
        self.lock().confirmed.contains(file)
    }

    /// Waits until a log file is in the repository as the server has it: only then may the server forget it. After
    /// `timeout` the error says what is in the way; the server asks again.
    pub async fn wait_durable(&self, file: &str, timeout: Duration) -> Result<()> {
        let mut looks = self.looks.subscribe();
        let deadline = self.clock.sleep(timeout);
        tokio::pin!(deadline);
        loop {
            looks.mark_unchanged();
            if self.is_durable(file) {
                return Ok(());
            }
            self.not_stopped()?;
            if self.lock().asked.insert(file.to_string()) {
                self.wake.notify_one();
            }
            tokio::select! {
                _ = looks.changed() => {}
                () = &mut deadline => return Err(self.not_yet(file)),
            }
        }
    }

    fn not_yet(&self, file: &str) -> Error {
        let what = format!("log file '{file}' is not in the repository yet");
        match self.lock().problem.clone() {
            Some(problem) => problem.with_kind(Kind::Unreachable).while_doing(what),
            None => Error::new(Kind::Unreachable, what).hint("it is tried again; 'keiki status' shows the backlog"),
        }
    }

    fn not_stopped(&self) -> Result<()> {
        let known = self.lock();
        match (known.state, &known.problem) {
            (ArchiveState::Stopped, Some(problem)) => Err(problem.clone()),
            _ => Ok(()),
        }
    }

    /// One look: ships what is there and due. The state and the problem of the status follow from its outcome, and the log
    /// is told of it.
    pub async fn look(&self, open_file: OpenFile) -> Result<Looked> {
        let _one = self.looking.lock().await;
        let outcome = self.look_once(open_file).await;
        {
            let mut known = self.lock();
            match &outcome {
                Ok(_) if known.state == ArchiveState::Stopped => {}
                Ok(_) => (known.state, known.problem, known.failures) = (ArchiveState::Archiving, None, 0),
                Err(Failure { error, is_server_down }) => {
                    known.failures = known.failures.saturating_add(1);
                    if known.state != ArchiveState::Stopped {
                        known.state = if *is_server_down { ArchiveState::Down } else { ArchiveState::Retrying };
                        known.problem = Some(error.clone());
                    }
                }
            }
        }
        self.tell_log();
        self.looks.send_modify(|count| *count += 1);
        outcome.map_err(|failure| failure.error)
    }

    /// Says in the log that shipping is held up, why and how much waits, now and then while it lasts; and that it goes on.
    fn tell_log(&self) {
        let (name, now) = (&self.name, self.clock.now());
        let status = self.status();
        let waiting = format!("{}, the oldest for {} s", human_bytes(status.backlog_bytes), status.backlog_seconds);
        let told = &mut self.lock().told;
        match (status.state, status.problem) {
            (ArchiveState::Retrying | ArchiveState::Down, Some(problem)) if told.is_due(now) => {
                tracing::warn!("shipping of '{name}' is held up; waiting: {waiting}: {problem}");
            }
            (ArchiveState::Archiving, None) if told.is_over() => {
                tracing::info!("shipping of '{name}' goes on; waiting: {waiting}");
            }
            _ => {}
        }
    }

    async fn look_once(&self, open_file: OpenFile) -> Result<Looked, Failure> {
        if self.lease.check().is_err() {
            // The machine slept, or the store was away: nothing can be shipped before the lease is renewed.
            if let Err(error) = self.renew().await {
                // However long the store is away, what is held back on the server must not fill its disk.
                self.engine.guard_log().await.map_err(Failure::of_server)?;
                // Whoever asks how much waits is told what waits by now. That nothing can be shipped is the error.
                let _ = self.survey(open_file).await;
                return Err(error.into());
            }
        }
        let (listing, plan) = self.survey(open_file).await?;
        self.look_for_hole(&listing)?;
        self.compare_chunks(&listing).await?;
        let has_more = plan.has_more;
        let shipped = self.carry_out(plan).await;
        // Also after a failure: the others have arrived.
        let archived = self.archived(&listing).await?;
        let reached = reached(&listing, self.geometry.as_ref(), |name| archived.get(name).copied())?;
        let covered = self.note(&listing, &reached);
        shipped?;
        self.release(&reached).await.map_err(Failure::of_server)?;
        self.renew_if_due().await?;
        Ok(Looked { has_more, covered })
    }

    /// What the server has and what of it is to be shipped now; how much waits is known from then on.
    async fn survey(&self, open_file: OpenFile) -> Result<(LogListing, ShipPlan), Failure> {
        let after = {
            let known = self.lock();
            // The server may ask about a file that sorts before what is settled: a companion of an old file.
            if known.asked.is_empty() { known.settled_file.clone() } else { None }
        };
        let listing = match self.engine.list_log(after.as_deref()).await {
            // Log that is gone does not come back: what there is behind it is shipped, and the hole is told.
            Err(error) if error.kind() == Kind::NotFound && after.is_some() => {
                tracing::warn!(incarnation = %self.incarnation(), "{error}");
                self.lock().begin_anew();
                self.engine.list_log(None).await
            }
            outcome => outcome,
        };
        let listing = listing.map_err(Failure::of_server)?;
        let ship_open = open_file == OpenFile::Now || self.is_open_file_due();
        let limits = Limits { sealed_files_max: SEALED_FILES_PER_LOOK, compare_files_max: COMPARE_FILES, ship_open };
        let archived = self.archived(&listing).await?;
        let plan = plan_shipping(&listing, self.geometry.as_ref(), |name| archived.get(name).copied(), limits)?;
        let mut known = self.lock();
        known.durable = Some(listing.durable_end);
        known.backlog_bytes = plan.backlog_bytes;
        if plan.backlog_bytes > 0 {
            let now = listing.durable_end.observed_at;
            // After the clock was set back the age is counted anew: none at all would look as if nothing waited.
            known.behind_since = Some(known.behind_since.map_or(now, |since| since.min(now)));
        }
        drop(known);
        Ok((listing, plan))
    }

    /// What the repository has of each listed file, without asking it about more than open files.
    async fn archived(&self, listing: &LogListing) -> Result<HashMap<String, Archived>> {
        let catalogue = self.writer.catalogue();
        let mut found = HashMap::with_capacity(listing.files.len());
        for file in &listing.files {
            let sealed = catalogue.is_sealed(&file.name);
            let bytes = match sealed {
                true => file.readable_bytes,
                false => catalogue.file(&file.name).await?.map_or(0, |file| file.bytes),
            };
            let known = self.lock();
            let (confirmed, asked) = (known.confirmed.contains(&file.name), known.asked.contains(&file.name));
            if sealed || bytes > 0 || asked {
                found.insert(file.name.clone(), Archived { sealed, bytes, confirmed, asked });
            }
        }
        Ok(found)
    }

    fn is_open_file_due(&self) -> bool {
        let shipped_at = self.lock().open_shipped_at;
        shipped_at.is_none_or(|at| !is_within(at, self.clock.now(), self.options.ship_every))
    }

    /// What was archived before is compared, then companions one by one, whole files side by side, then the open file.
    async fn carry_out(&self, plan: ShipPlan) -> Result<()> {
        let compared = self.ship_side_by_side(plan.compared).await;
        if compared.as_ref().is_err_and(is_final) {
            return compared;
        }
        for action in plan.companions {
            self.ship(action).await?;
        }
        self.ship_side_by_side(plan.sealed).await?;
        if let Some(action) = plan.open {
            self.ship(action).await?;
            self.lock().open_shipped_at = Some(self.clock.now());
        }
        // What could not be read was archived before: new log need not wait for it.
        compared
    }

    /// Everything is tried; the first failure is returned, one that must not be tried again before all others.
    async fn ship_side_by_side(&self, actions: Vec<ShipAction>) -> Result<()> {
        let mut outcomes = futures_util::stream::iter(actions)
            .map(|action| self.ship(action))
            .buffer_unordered(self.options.parallel_files.max(1));
        let mut first = Ok(());
        while let Some(outcome) = outcomes.next().await {
            match (&first, &outcome) {
                (_, Err(error)) if is_final(error) => return outcome,
                (Ok(()), _) => first = outcome,
                (Err(_), _) => {}
            }
        }
        first
    }

    async fn ship(&self, action: ShipAction) -> Result<()> {
        let ShipAction { file, from_bytes, to_bytes, sealed } = action;
        let source = self.engine.open_log(&file, from_bytes, to_bytes).await?;
        let chunk = LogChunk { file: file.name.clone(), from_bytes, to_bytes, sealed };
        self.writer.ship(chunk, Box::new(EngineBytes(source))).await?;
        if sealed {
            self.lock().confirm(&file.name);
            self.looks.send_modify(|count| *count += 1);
        }
        Ok(())
    }

    /// Remembers what a look has reached. Returns the durable end if nothing is missing.
    fn note(&self, listing: &LogListing, reached: &Reached) -> Option<DurableEnd> {
        let covered = reached.is_all.then_some(listing.durable_end);
        let mut known = self.lock();
        known.shipped = reached.shipped.max(known.shipped);
        if reached.settled_file > known.settled_file {
            known.settled_file = reached.settled_file.clone();
        }
        if covered.is_some() {
            (known.backlog_bytes, known.behind_since) = (0, None);
            known.covered = covered;
        }
        covered
    }

    async fn release(&self, reached: &Reached) -> Result<()> {
        let Some(position) = reached.releasable else { return Ok(()) };
        if self.lock().released >= Some(position) {
            return Ok(());
        }
        self.engine.release_log(position).await?;
        self.lock().released = Some(position);
        Ok(())
    }

    /// Once in a run: did the server forget log before it was shipped? Archiving goes on behind the hole.
    fn look_for_hole(&self, listing: &LogListing) -> Result<()> {
        if self.lock().looked_for_hole {
            return Ok(());
        }
        let catalogue = self.writer.catalogue();
        let mut last = None;
        for file in catalogue.files().into_iter().rev() {
            if let Some((_, end)) = archived_span(&file, self.geometry.as_ref())? {
                last = Some(end);
                break;
            }
        }
        let hole = hole_before(listing, self.geometry.as_ref(), last)?;
        if let Some(hole) = &hole {
            tracing::warn!(
                incarnation = %self.incarnation(),
                "the server has forgotten log before it was shipped: {} to {} is missing in the archive",
                hole.from,
                hole.to
            );
        }
        let mut known = self.lock();
        (known.hole, known.looked_for_hole) = (hole, true);
        Ok(())
    }

    /// Once in a run for each unfinished file: is the end of what was archived of it what the server has there? A history
    /// that left this one earlier differs in it, and would go on behind it unseen where its records have the same lengths.
    async fn compare_chunks(&self, listing: &LogListing) -> Result<()> {
        if self.lock().compared_all || !self.geometry.open_bytes_stay() {
            return Ok(());
        }
        let mut is_all = true;
        for file in &listing.files {
            if self.lock().compared.contains(&file.name) {
                continue;
            }
            if let Some(archived) = self.writer.catalogue().last_chunk(&file.name).await? {
                let (from, to) = (archived.chunk.from_bytes, archived.chunk.to_bytes);
                let is_there = file.readable_bytes >= to;
                if !is_there && !file.sealed {
                    // Nothing is archived behind it before it is there.
                    is_all = false;
                    continue;
                }
                let source: Option<Box<dyn LogBytes>> = match is_there {
                    true => Some(Box::new(EngineBytes(self.engine.open_log(file, from, to).await?))),
                    false => None,
                };
                self.writer.compare_chunk(&archived, source).await?;
            }
            self.lock().compared.insert(file.name.clone());
        }
        self.lock().compared_all = is_all;
        Ok(())
    }

    fn stop_if_final(&self, error: &Error) {
        if is_final(error) {
            self.stop(error);
            self.wake.notify_one();
        }
    }

    fn stop(&self, error: &Error) {
        tracing::error!(incarnation = %self.incarnation(), "archiving has stopped: {error}");
        let mut known = self.lock();
        (known.state, known.problem) = (ArchiveState::Stopped, Some(error.clone()));
        drop(known);
        self.looks.send_modify(|count| *count += 1);
    }
}

/// An error of a look, and whether it is the server that does not answer.
struct Failure {
    error: Error,
    is_server_down: bool,
}

impl Failure {
    fn of_server(error: Error) -> Failure {
        Failure { is_server_down: error.kind() == Kind::Unreachable, error }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, is_server_down: false }
    }
}

/// Trying again would change nothing, or do harm: somebody must act first.
fn is_final(error: &Error) -> bool {
    matches!(error.kind(), Kind::Conflict | Kind::Fenced)
}

async fn changed(watch: &mut Option<DirectoryWatch>) {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

/// The engine's reader as the repository wants it.
struct EngineBytes(Box<dyn LogRead>);

impl LogBytes for EngineBytes {
    fn read(&mut self) -> Result<Bytes> {
        self.0.read()
    }

    fn summary(&self) -> LogSummary {
        self.0.summary()
    }
}

#[cfg(test)]
mod tests;
