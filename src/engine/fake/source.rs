//! The fake database as a source: its log is listed and read, its files are backed up.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_on_thread;
use crate::engine::fake::database::{FakeDatabase, VERSION};
use crate::engine::fake::geometry::{EVENTS_PER_FILE, FILE_BYTES, FakeGeometry, count_of, file_name, file_number};
use crate::engine::fake::record::{Event, RECORD_BYTES};
use crate::engine::{
    BaseLane, BaseSink, BaseSpan, DurableEnd, Engine, LogGeometry, LogListing, LogRead, ServerIdentity,
};
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::{FileKind, FileMeta};
use crate::model::check::CheckItem;
use crate::model::log::{LogFile, LogSummary};
use crate::model::position::Position;

/// [`FakeDatabase`] behind the port.
pub struct FakeEngine {
    database: Arc<FakeDatabase>,
    /// Forget log files when they are released, as a real server does.
    recycles: AtomicBool,
    during_backup: Mutex<Option<Hook>>,
    /// How many of the next backups fail when everything is copied.
    failing_backups: AtomicUsize,
}

/// Why the fake's backups fail.
const FAILED_COPY: &str = "the fake's backup program failed";

type Hook = Box<dyn FnOnce(&FakeDatabase) + Send>;

impl FakeEngine {
    pub fn new(database: Arc<FakeDatabase>) -> FakeEngine {
        FakeEngine {
            database,
            recycles: AtomicBool::new(true),
            during_backup: Mutex::new(None),
            failing_backups: AtomicUsize::new(0),
        }
    }

    /// Whether released log files are deleted (they are unless told otherwise).
    pub fn set_recycles(&self, recycles: bool) {
        self.recycles.store(recycles, Ordering::Relaxed);
    }

    /// Calls `hook` once, in the middle of the next backup: what happens on a real server meanwhile.
    pub fn during_next_backup(&self, hook: impl FnOnce(&FakeDatabase) + Send + 'static) {
        *self.during_backup.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Box::new(hook));
    }

    /// Lets the next `count` backups fail when everything is copied, in a way in which the next one may succeed.
    pub fn fail_next_backups(&self, count: usize) {
        self.failing_backups.store(count, Ordering::Relaxed);
    }

    fn durable_end(&self) -> DurableEnd {
        // The time first: what is counted afterwards includes everything up to it.
        let observed_at = self.database.now();
        DurableEnd { position: Position::Count(self.database.count()), observed_at }
    }
}

#[async_trait]
impl Engine for FakeEngine {
    async fn identify(&self) -> Result<ServerIdentity> {
        self.database.identity()
    }

    async fn check_source(&self) -> Result<Vec<CheckItem>> {
        self.database.identity()?;
        Ok(vec![CheckItem::pass("server", "the fake server is running")])
    }

    async fn log_geometry(&self) -> Result<Arc<dyn LogGeometry>> {
        Ok(Arc::new(FakeGeometry))
    }

    fn log_directories(&self) -> Vec<PathBuf> {
        vec![self.database.data_dir.join("log")]
    }

    async fn list_log(&self, after: Option<&str>) -> Result<LogListing> {
        self.database.identity()?;
        let durable_end = self.durable_end();
        let count = count_of(durable_end.position)?;
        let after = after.and_then(file_number);
        let mut files = Vec::new();
        let present = self.database.log_files()?;
        if let (Some(after), Some(first)) = (after, present.first())
            && *first > after + 1
        {
            let reason = format!("log files {} to {} are gone", after + 1, first - 1);
            return Err(Error::new(Kind::NotFound, reason).hint("take a new backup"));
        }
        for number in present {
            let readable = count.saturating_sub(number * EVENTS_PER_FILE).min(EVENTS_PER_FILE);
            if after.is_none_or(|after| number > after) && readable > 0 {
                files.push(LogFile {
                    name: file_name(number),
                    readable_bytes: readable * RECORD_BYTES as u64,
                    sealed: readable == EVENTS_PER_FILE,
                });
            }
        }
        Ok(LogListing { files, durable_end })
    }

    async fn open_log(&self, file: &LogFile, from: u64, to: u64) -> Result<Box<dyn LogRead>> {
        let path = self.database.data_dir.join("log").join(&file.name);
        let number = file_number(&file.name)
            .ok_or_else(|| Error::new(Kind::BadInput, format!("'{}' is not a log file", file.name)))?;
        if from > to || to > file.readable_bytes {
            return Err(Error::new(Kind::Internal, format!("bytes {from} to {to} of '{}' cannot be read", file.name)));
        }
        let opened = File::open(&path).context(|| format!("cannot open '{}'", path.display()))?;
        Ok(Box::new(FakeLogRead { file: opened, number, at: from, to, summary: LogSummary::default() }))
    }

    async fn release_log(&self, position: Position) -> Result<()> {
        let released = count_of(position)?;
        if !self.recycles.load(Ordering::Relaxed) {
            return Ok(());
        }
        for number in self.database.log_files()? {
            if (number + 1) * EVENTS_PER_FILE <= released && (number + 1) * EVENTS_PER_FILE < self.database.count() {
                let path = self.database.data_dir.join("log").join(file_name(number));
                std::fs::remove_file(&path).context(|| format!("cannot remove '{}'", path.display()))?;
            }
        }
        Ok(())
    }

    async fn detach(&self) -> Result<()> {
        Ok(())
    }

    async fn back_up(&self, label: &str, sink: Arc<dyn BaseSink>, cancel: CancellationToken) -> Result<BaseSpan> {
        let identity = self.database.identity()?;
        let began_at = self.database.now();
        let start = Position::Count(self.database.count());
        let data_dir = self.database.data_dir.clone();
        let hook = self.during_backup.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if let Some(hook) = hook {
            hook(&self.database);
        }
        run_on_thread("fake-backup", move || copy_directory(&data_dir, sink.as_ref(), &cancel)).await?;
        let fewer = |count: usize| count.checked_sub(1);
        if self.failing_backups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer).is_ok() {
            return Err(Error::new(Kind::Server, FAILED_COPY));
        }
        Ok(BaseSpan {
            start,
            stop: Position::Count(self.database.count()),
            began_at,
            ended_at: self.database.now(),
            facts: [
                ("version".to_string(), VERSION.to_string()),
                ("system_id".to_string(), identity.system_id),
                ("label".to_string(), label.to_string()),
            ]
            .into(),
            damaged_blocks: Vec::new(),
        })
    }

    fn may_back_up_again(&self, error: &Error) -> bool {
        error.message().contains(FAILED_COPY)
    }
}

struct FakeLogRead {
    file: File,
    number: u64,
    at: u64,
    to: u64,
    summary: LogSummary,
}

impl LogRead for FakeLogRead {
    fn read(&mut self) -> Result<Bytes> {
        // Some records at a time, so that callers meet more than one piece.
        let length = (self.to - self.at).min(16 * RECORD_BYTES as u64) as usize;
        let mut bytes = vec![0u8; length];
        self.file.read_exact_at(&mut bytes, self.at).context(|| "cannot read a log file")?;
        for (record, chunk) in bytes.chunks(RECORD_BYTES).enumerate() {
            let index = self.number * EVENTS_PER_FILE + self.at / RECORD_BYTES as u64 + record as u64 + 1;
            let event = Event::decode(chunk, index)?;
            self.summary.first_commit_at.get_or_insert(event.at);
            self.summary.last_commit_at = self.summary.last_commit_at.max(Some(event.at));
            self.summary.last_commit = Some(Position::Count(index));
            if let Some(name) = event.name {
                self.summary.named_points.push((name, Position::Count(index)));
            }
        }
        self.at += length as u64;
        Ok(bytes.into())
    }

    fn summary(&self) -> LogSummary {
        self.summary.clone()
    }
}

/// Gives every file but the log and the traces of a running server to as many lanes as the sink wants.
fn copy_directory(data_dir: &Path, sink: &dyn BaseSink, cancel: &CancellationToken) -> Result<()> {
    let mut files = Vec::new();
    collect(data_dir, "", &mut files)?;
    let sizes = files.iter().filter_map(|meta| std::fs::metadata(data_dir.join(&meta.path)).ok());
    sink.expect_bytes(sizes.filter(|metadata| metadata.is_file()).map(|metadata| metadata.len()).sum());
    let lanes = sink.lanes_wanted().max(1);
    let queue = Mutex::new(files.into_iter());
    let next = || queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..lanes)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let mut lane = sink.lane()?;
                    while let Some(meta) = next() {
                        if cancel.is_cancelled() || sink.is_cancelled() {
                            return Err(Error::new(Kind::Cancelled, "the backup was cancelled"));
                        }
                        copy_file(data_dir, meta, lane.as_mut())?;
                    }
                    lane.finish()
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::new(Kind::Internal, "a lane of the fake backup panicked")),
        })
    })
}

fn copy_file(data_dir: &Path, meta: FileMeta, lane: &mut dyn BaseLane) -> Result<()> {
    let path = data_dir.join(&meta.path);
    let is_regular = meta.kind == FileKind::Regular;
    lane.begin(meta)?;
    if is_regular {
        let what = || format!("cannot read '{}'", path.display());
        let mut file = File::open(&path).context(what)?;
        let mut piece = vec![0u8; 1 << 20];
        loop {
            let length = file.read(&mut piece).context(what)?;
            if length == 0 {
                break;
            }
            lane.write(&piece[..length])?;
        }
        lane.end()?;
    }
    Ok(())
}

/// Everything below `relative`, directories before what is in them.
fn collect(data_dir: &Path, relative: &str, files: &mut Vec<FileMeta>) -> Result<()> {
    let directory = data_dir.join(relative);
    let what = || format!("cannot read '{}'", directory.display());
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&directory).context(what)? {
        names.push(entry.context(what)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    for name in names {
        let path = if relative.is_empty() { name } else { format!("{relative}/{name}") };
        if matches!(path.as_str(), "running" | "quarantine") || path.starts_with("log/") {
            continue;
        }
        let metadata = std::fs::symlink_metadata(data_dir.join(&path)).context(what)?;
        let mode = metadata.permissions().mode() & 0o7777;
        if metadata.is_symlink() {
            let to = std::fs::read_link(data_dir.join(&path)).context(what)?.to_string_lossy().into_owned();
            files.push(FileMeta { path, kind: FileKind::Link { to }, mode });
        } else if metadata.is_dir() {
            files.push(FileMeta { path: path.clone(), kind: FileKind::Directory, mode });
            collect(data_dir, &path, files)?;
        } else {
            files.push(FileMeta { path, kind: FileKind::Regular, mode });
        }
    }
    Ok(())
}

/// The size of a sealed log file, for tests that look at bytes.
pub const SEALED_FILE_BYTES: u64 = FILE_BYTES;
