//! Takes a base backup: check -> copy -> wait for log -> publish.
//!
//! The commit point is the manifest, written last, when all log of the span is in the repository without a gap. What a
//! backup has uploaded before is garbage until then. It is deleted when the job fails or is cancelled; after a crash of
//! the agent the copy begins again, under another id.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::base::clock::Clock;
use crate::base::random::random_u64;
use crate::base::retry::{RetryPolicy, retry};
use crate::engine::{BaseLane, BaseSink, BaseSpan, Engine, Progress};
use crate::error::{Error, Kind, Result};
use crate::job::archive::{ArchiveState, Archiver};
use crate::job::{Restart, StepContext, StepPlan, UndoCause, Work};
use crate::model::backup::{Backup, BackupKind, FileMeta};
use crate::model::bytes_text::human_bytes;
use crate::model::check::CheckItem;
use crate::model::id::BackupId;
use crate::repo::backup_reader::Backups;
use crate::repo::backup_writer::{BackupOptions, BackupWriter, PackLane, ZSTD_LEVEL_DEFAULT};

const CHECK: &str = "check";
const COPY: &str = "copy";
const WAIT: &str = "wait for log";
const PUBLISH: &str = "publish";

/// The facts in the journal: the id under which this run copies, and that the manifest of that id is there.
const BACKUP_FACT: &str = "backup";
const PUBLISHED_FACT: &str = "published";

/// How often a copy is begun when the engine says that it may succeed if it is begun anew.
const COPIES_MAX: usize = 3;

/// Looks the archiver up when it is needed: it may have come or gone since the order was given.
pub type ArchiverDoor = Arc<dyn Fn() -> Result<Arc<Archiver>> + Send + Sync>;

/// The instance that is backed up.
#[derive(Clone)]
pub struct BackupSource {
    pub instance: String,
    pub host: String,
    pub engine: Arc<dyn Engine>,
    pub archiver: ArchiverDoor,
    /// A directory for the manifest while it is made; created by the caller.
    pub spool_dir: PathBuf,
    pub clock: Arc<dyn Clock>,
}

/// One backup.
pub struct BackupWork {
    source: BackupSource,
    kind: BackupKind,
    lanes: usize,
    /// What steps hand to each other; a run that comes after a crash begins without.
    current: Mutex<Option<Current>>,
}

#[derive(Clone)]
struct Current {
    id: BackupId,
    writer: Arc<BackupWriter>,
    archiver: Arc<Archiver>,
    span: Option<BaseSpan>,
}

impl BackupWork {
    /// A backup of `source` that reads and compresses `lanes` files at the same time.
    pub fn new(source: BackupSource, kind: BackupKind, lanes: usize) -> BackupWork {
        BackupWork { source, kind, lanes: lanes.max(1), current: Mutex::new(None) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Current>> {
        // Held for looks and assignments only, which cannot panic.
        self.current.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn current(&self) -> Result<Current> {
        self.lock().clone().ok_or_else(|| Error::new(Kind::Internal, "the backup has not begun"))
    }

    async fn check(&self, context: &StepContext) -> Result<()> {
        let name = &self.source.instance;
        let archiver =
            (self.source.archiver)().map_err(|error| error.while_doing(format!("cannot back up '{name}'")))?;
        let mut items = self.source.engine.check_source().await?;
        if let Some(earlier) = context.fact(BACKUP_FACT) {
            // The agent died: before the manifest was written, or only before it could record that it was.
            let backups = Backups::new(archiver.repository().clone()).list(archiver.incarnation()).await?.backups;
            if let Some(backup) = backups.iter().find(|backup| backup.id.to_string() == earlier) {
                context.record(PUBLISHED_FACT, earlier).await?;
                say_results(context, backup);
                return Ok(());
            }
        }
        // A backup without the log of its span is worth nothing: better to know before everything is copied.
        let archived = archiver.ship_now().await;
        let end = archived.map_err(|error| error.while_doing(format!("cannot back up '{name}'")))?;
        items.push(CheckItem::pass("archive", format!("the log is in the repository up to {}", end.position)));
        context.checks(items);
        Ok(())
    }

    async fn copy(&self, context: &StepContext) -> Result<()> {
        for _ in 1..COPIES_MAX {
            match self.copy_once(context).await {
                Err(error) if self.source.engine.may_back_up_again(&error) && !context.cancel.is_cancelled() => {
                    tracing::warn!(instance = %self.source.instance, "the copy is begun anew: {error}");
                    context.progress().note(format!("copying anew: {error}"));
                    self.drop_copy().await;
                }
                outcome => return outcome,
            }
        }
        self.copy_once(context).await
    }

    async fn copy_once(&self, context: &StepContext) -> Result<()> {
        let archiver = (self.source.archiver)()?;
        let began_at = self.source.clock.now();
        let id = BackupId::new(began_at, random_u64());
        context.record(BACKUP_FACT, id.to_string()).await?;
        let options = BackupOptions {
            job: context.order.id,
            backup: id.clone(),
            host: self.source.host.clone(),
            began_at,
            zstd_level: ZSTD_LEVEL_DEFAULT,
            spool_dir: self.source.spool_dir.clone(),
        };
        let repo = archiver.repository().clone();
        let writer = Arc::new(BackupWriter::begin(repo, archiver.lease().clone(), options).await?);
        *self.lock() = Some(Current { id: id.clone(), writer: writer.clone(), archiver, span: None });
        let sink = Arc::new(RepoSink {
            writer: writer.clone(),
            lanes: self.lanes,
            expected_bytes: Arc::new(AtomicU64::new(0)),
            progress: context.progress(),
            cancel: context.cancel.clone(),
        });
        let (engine, label) = (&self.source.engine, format!("keiki {id}"));
        let span = match self.kind {
            BackupKind::Automatic => engine.back_up_cheaply(&label, sink, context.cancel.clone()).await?,
            BackupKind::Manual => engine.back_up(&label, sink, context.cancel.clone()).await?,
        };
        let done = writer.progress();
        context.progress().set(done.read_bytes, done.read_bytes);
        context.progress().note(format!("{} stored", human_bytes(done.stored_bytes)));
        if !span.damaged_blocks.is_empty() {
            let count = span.damaged_blocks.len();
            let shown = span.damaged_blocks.iter().take(10).cloned().collect::<Vec<_>>().join(", ");
            context.result("damaged blocks", format!("{count}: {shown}"));
        }
        if let Some(current) = self.lock().as_mut() {
            current.span = Some(span);
        }
        Ok(())
    }

    /// Deletes what was uploaded of a copy that will not be published.
    async fn drop_copy(&self) {
        let Some(current) = self.lock().take() else { return };
        // What cannot be deleted refers to nothing and is swept as garbage; the failure itself is what counts.
        if let Err(error) = current.writer.abort().await {
            tracing::warn!(backup = %current.id, "what a backup left cannot be deleted now: {error}");
        }
    }

    async fn wait_for_log(&self, context: &StepContext) -> Result<()> {
        let current = self.current()?;
        let span = current.span.ok_or_else(|| Error::new(Kind::Internal, "nothing was copied"))?;
        let name = &self.source.instance;
        let (archiver, progress) = (&current.archiver, &context.progress());
        let ship = || async move {
            let outcome = archiver.ship_now().await;
            match &outcome {
                Ok(end) => progress.note(format!("log is in the repository up to {}", end.position)),
                Err(error) => progress.note(format!("trying again: {error}")),
            }
            outcome
        };
        let what = format!("cannot archive the log of the backup of '{name}'");
        let end = retry(self.source.clock.as_ref(), &RetryPolicy::forever(), &context.cancel, &what, ship).await?;
        if end.position < span.stop {
            return Err(Error::new(
                Kind::Server,
                format!("the log of '{name}' ends at {}, before the backup's end at {}", end.position, span.stop),
            )
            .hint("was the server set back while it was backed up?"));
        }
        if !current.archiver.has_log(span.start, span.stop).await? {
            return Err(Error::new(
                Kind::Damaged,
                format!("log between {} and {} is missing in the repository", span.start, span.stop),
            )
            .hint(format!("'keiki window {name}' shows the holes; take the backup again")));
        }
        Ok(())
    }

    async fn publish(&self, context: &StepContext) -> Result<()> {
        let current = self.current()?;
        let span = current.span.ok_or_else(|| Error::new(Kind::Internal, "nothing was copied"))?;
        let draft = Backup {
            id: current.id.clone(),
            incarnation: current.archiver.incarnation(),
            kind: self.kind,
            start: span.start,
            stop: span.stop,
            began_at: span.began_at,
            ended_at: span.ended_at,
            engine_version: current.archiver.engine_version().to_string(),
            file_count: 0,
            restored_bytes: 0,
            stored_bytes: 0,
            engine_facts: span.facts,
        };
        let publish = || current.writer.publish(draft.clone());
        let what = format!("cannot publish backup '{}'", current.id);
        // Past this point the job is not cancelled any more: the manifest may be there already.
        let no_cancel = CancellationToken::new();
        let backup = retry(self.source.clock.as_ref(), &RetryPolicy::brief(), &no_cancel, &what, publish).await?;
        say_results(context, &backup);
        *self.lock() = None;
        Ok(())
    }
}

/// Whether log is missing between the newest backup and what is shipped now, so that nothing new can be cloned before there
/// is another backup. Goes by what is known of the backups for `max_age`: in that time it asks nobody.
pub async fn needs_backup_behind_hole(archiver: &Archiver, max_age: Duration) -> Result<bool> {
    let status = archiver.status();
    let is_all_shipped = status.state == ArchiveState::Archiving && status.backlog_bytes == 0;
    let Some(shipped) = status.shipped.filter(|_| is_all_shipped) else { return Ok(false) };
    let backups = Backups::new(archiver.repository().clone());
    match backups.newest(archiver.incarnation(), max_age, |_| true).await? {
        Some(backup) => Ok(!archiver.has_log(backup.start, shipped).await?),
        None => Ok(false),
    }
}

fn say_results(context: &StepContext, backup: &Backup) {
    context.result("backup", backup.id.to_string());
    context.result("size", format!("{} in {} files", human_bytes(backup.restored_bytes), backup.file_count));
    context.result("stored", human_bytes(backup.stored_bytes));
    context.result("log", format!("{} to {}", backup.start, backup.stop));
}

#[async_trait]
impl Work for BackupWork {
    fn steps(&self) -> Vec<StepPlan> {
        vec![StepPlan::items(CHECK), StepPlan::bytes(COPY), StepPlan::items(WAIT), StepPlan::items(PUBLISH)]
    }

    fn exclusive(&self) -> Vec<String> {
        vec![format!("backup of '{}'", self.source.instance)]
    }

    fn is_heavy(&self) -> bool {
        false
    }

    fn may_cancel(&self, step: &str) -> bool {
        step != PUBLISH
    }

    fn after_interruption(&self, _step: &str) -> Restart {
        // The server's end of the backup went with the connection, and with it the copy.
        Restart::From(CHECK)
    }

    async fn run(&self, step: &str, context: &StepContext) -> Result<()> {
        if context.fact(PUBLISHED_FACT).is_some() {
            return Ok(());
        }
        match step {
            CHECK => self.check(context).await,
            COPY => self.copy(context).await,
            WAIT => self.wait_for_log(context).await,
            PUBLISH => self.publish(context).await,
            other => Err(Error::new(Kind::Internal, format!("a backup has no step '{other}'"))),
        }
    }

    async fn undo(&self, _context: &StepContext, _cause: UndoCause) -> Result<()> {
        self.drop_copy().await;
        Ok(())
    }
}

/// The repository as the engine's sink.
struct RepoSink {
    writer: Arc<BackupWriter>,
    lanes: usize,
    expected_bytes: Arc<AtomicU64>,
    progress: Arc<dyn Progress>,
    cancel: CancellationToken,
}

impl RepoSink {
    fn show(writer: &BackupWriter, expected_bytes: u64, progress: &dyn Progress) {
        let done = writer.progress().read_bytes;
        // Files grow while they are copied; a bar beyond its end would look like a mistake.
        progress.set(done, if expected_bytes == 0 { 0 } else { expected_bytes.max(done) });
    }
}

impl BaseSink for RepoSink {
    fn lane(&self) -> Result<Box<dyn BaseLane>> {
        Ok(Box::new(RepoLane {
            lane: self.writer.lane(),
            writer: self.writer.clone(),
            expected_bytes: self.expected_bytes.clone(),
            progress: self.progress.clone(),
            cancel: self.cancel.clone(),
        }))
    }

    fn lanes_wanted(&self) -> usize {
        self.lanes
    }

    fn expect_bytes(&self, bytes: u64) {
        self.expected_bytes.store(bytes, Ordering::Relaxed);
        RepoSink::show(&self.writer, bytes, self.progress.as_ref());
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }
}

struct RepoLane {
    lane: PackLane,
    writer: Arc<BackupWriter>,
    expected_bytes: Arc<AtomicU64>,
    progress: Arc<dyn Progress>,
    cancel: CancellationToken,
}

impl BaseLane for RepoLane {
    fn begin(&mut self, meta: FileMeta) -> Result<()> {
        self.lane.begin(meta)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.cancel.is_cancelled() {
            return Err(Error::new(Kind::Cancelled, "the backup was cancelled"));
        }
        self.lane.write(bytes)?;
        RepoSink::show(&self.writer, self.expected_bytes.load(Ordering::Relaxed), self.progress.as_ref());
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        self.lane.end()
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.lane.finish()
    }
}

#[cfg(test)]
mod tests;
