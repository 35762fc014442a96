//! What every engine promises, held on the fake one and on real servers by the same functions.
//!
//! An engine is given as a [`Subject`]: a running source whose commits are numbers, and a grower of clones. The base
//! goes into memory and the log is read through the port, so that nothing but the engine is under test.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use keiki::engine::{
    BaseLane, BaseSink, BaseSpan, CloneEngine, CloneSite, Engine, LogListing, LogSource, Progress, Recovered,
};
use keiki::error::{Error, Kind, Result};
use keiki::model::backup::{FileKind, FileMeta};
use keiki::model::log::LogFile;
use keiki::model::target::Target;
use tokio_util::sync::CancellationToken;

use crate::support::postgres::Version;
use crate::support::redis::Product;

mod fake;
mod postgres;
mod promises;
pub mod redis;

/// A source under test and the grower of its clones.
pub trait Subject: Send + Sync {
    fn engine(&self) -> Arc<dyn Engine>;
    fn cloner(&self) -> Arc<dyn CloneEngine>;
    /// Commits one number; it is durable when this returns.
    fn commit(&self, value: u64);
    /// Whether the engine knows named points.
    fn has_named_points(&self) -> bool {
        true
    }
    /// Whether a base is no database before recovery has added what makes it one.
    fn base_alone_is_no_database(&self) -> bool {
        false
    }
    /// Makes a named point.
    fn name_point(&self, name: &str);
    /// The source's clock; no commit before or after has this very time.
    fn now(&self) -> Timestamp;
    /// Makes the server begin another log file.
    fn switch_log(&self);
    /// The site of a clone below `root`. `base` says what it is made from.
    fn site(&self, root: &Path, base: &Base) -> CloneSite;
    /// Gives everything below a path to the user that runs the clone.
    fn own(&self, path: &Path);
    /// The numbers that a running clone holds, in order.
    fn values(&self, site: &CloneSite) -> Vec<u64>;
}

/// A base backup in memory, and the log that was there when it was taken in.
pub struct Base {
    pub span: BaseSpan,
    pub version: String,
    files: Vec<(FileMeta, Vec<u8>)>,
}

/// Takes files from any number of lanes.
#[derive(Default)]
struct MemorySink {
    files: Mutex<Vec<(FileMeta, Vec<u8>)>>,
    is_cancelled: AtomicBool,
}

struct MemoryLane {
    sink: Arc<MemorySink>,
    open: Option<(FileMeta, Vec<u8>)>,
}

struct SharedSink(Arc<MemorySink>);

impl BaseSink for SharedSink {
    fn lane(&self) -> Result<Box<dyn BaseLane>> {
        Ok(Box::new(MemoryLane { sink: self.0.clone(), open: None }))
    }

    fn lanes_wanted(&self) -> usize {
        3
    }

    fn expect_bytes(&self, _bytes: u64) {}

    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled.load(Ordering::Relaxed)
    }
}

impl BaseLane for MemoryLane {
    fn begin(&mut self, meta: FileMeta) -> Result<()> {
        assert!(self.open.is_none(), "'{}' begins before the last file has ended", meta.path);
        assert!(!meta.path.starts_with('/') && !meta.path.split('/').any(|part| matches!(part, "" | "." | "..")));
        match meta.kind {
            FileKind::Regular => self.open = Some((meta, Vec::new())),
            _ => self.sink.files.lock().unwrap().push((meta, Vec::new())),
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.open.as_mut().expect("a file was begun").1.extend_from_slice(bytes);
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let file = self.open.take().expect("a file was begun");
        self.sink.files.lock().unwrap().push(file);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        assert!(self.open.is_none());
        Ok(())
    }
}

/// A backup of the subject; the lanes' rules are held on the way.
pub async fn back_up(subject: &dyn Subject, cancel: CancellationToken) -> Result<Base> {
    take_base(subject, async |engine, sink| engine.back_up("contract", sink, cancel).await).await
}

/// The same, of a moment that may be past.
pub async fn back_up_cheaply(subject: &dyn Subject) -> Result<Base> {
    let cancel = CancellationToken::new();
    take_base(subject, async |engine, sink| engine.back_up_cheaply("contract", sink, cancel).await).await
}

async fn take_base(
    subject: &dyn Subject,
    back_up: impl AsyncFnOnce(Arc<dyn Engine>, Arc<dyn BaseSink>) -> Result<BaseSpan>,
) -> Result<Base> {
    let sink = Arc::new(MemorySink::default());
    let span = back_up(subject.engine(), Arc::new(SharedSink(sink.clone()))).await?;
    let version = subject.engine().identify().await?.version;
    let files = std::mem::take(&mut *sink.files.lock().unwrap());
    Ok(Base { span, version, files })
}

/// The whole log of the subject as it was at one moment.
#[derive(Default)]
pub struct MemoryLog {
    pub files: BTreeMap<String, Vec<u8>>,
    /// Cancels a replay at its first read.
    cancels: Option<CancellationToken>,
}

impl MemoryLog {
    pub async fn of(subject: &dyn Subject) -> MemoryLog {
        let engine = subject.engine();
        let mut log = MemoryLog::default();
        for file in engine.list_log(None).await.unwrap().files {
            let bytes = read_log(engine.as_ref(), &file, 0, file.readable_bytes).await.unwrap();
            log.files.insert(file.name, bytes);
        }
        log
    }

    pub fn cancelling(mut self, token: CancellationToken) -> MemoryLog {
        self.cancels = Some(token);
        self
    }

    /// Bytes in all files.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|bytes| bytes.len() as u64).sum()
    }
}

#[async_trait]
impl LogSource for MemoryLog {
    async fn available(&self, name: &str) -> Result<Option<u64>> {
        Ok(self.files.get(name).map(|bytes| bytes.len() as u64))
    }

    async fn is_sealed(&self, name: &str) -> Result<bool> {
        Ok(self.files.contains_key(name))
    }

    async fn read(&self, name: &str, from: u64, max_bytes: usize) -> Result<Bytes> {
        if let Some(token) = &self.cancels {
            token.cancel();
        }
        let missing = || Error::new(Kind::NotFound, format!("log file '{name}' is not there"));
        let bytes = self.files.get(name).ok_or_else(missing)?;
        let from = (from as usize).min(bytes.len());
        Ok(Bytes::copy_from_slice(&bytes[from..bytes.len().min(from + max_bytes)]))
    }
}

/// Reads a range of a log file to its end, and holds the reader to the port.
pub async fn read_log(engine: &dyn Engine, file: &LogFile, from: u64, to: u64) -> Result<Vec<u8>> {
    let mut reader = engine.open_log(file, from, to).await?;
    let mut bytes = Vec::new();
    loop {
        let piece = reader.read()?;
        assert!(piece.len() <= 1 << 20, "a piece of {} bytes", piece.len());
        if piece.is_empty() {
            assert!(reader.read()?.is_empty(), "the end is the end");
            return Ok(bytes);
        }
        bytes.extend_from_slice(&piece);
    }
}

/// Progress that nobody looks at.
pub struct Silent;

impl Progress for Silent {
    fn set(&self, _done: u64, _total: u64) {}
    fn note(&self, _text: String) {}
}

/// A clone of the subject in a temporary directory.
pub struct Grown<'a> {
    pub subject: &'a dyn Subject,
    pub site: CloneSite,
    _root: tempfile::TempDir,
}

impl<'a> Grown<'a> {
    /// Puts the base at its place as a job does: markers last, after `prepare`.
    pub async fn stage(subject: &'a dyn Subject, base: &Base) -> Grown<'a> {
        let root = tempfile::Builder::new().prefix("keiki-contract").tempdir().unwrap();
        std::fs::set_permissions(root.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let site = subject.site(root.path(), base);
        std::fs::create_dir(&site.data_dir).unwrap();
        std::fs::create_dir(&site.run_dir).unwrap();
        subject.own(root.path());
        let grown = Grown { subject, site, _root: root };
        grown.fill(base, false);
        subject.own(&grown.site.data_dir);
        subject.cloner().prepare(&grown.site).await.unwrap();
        grown.fill(base, true);
        subject.own(&grown.site.data_dir);
        grown
    }

    fn fill(&self, base: &Base, markers: bool) {
        use std::os::unix::fs::PermissionsExt;
        let cloner = self.subject.cloner();
        let mut files: Vec<&(FileMeta, Vec<u8>)> =
            base.files.iter().filter(|(meta, _)| cloner.is_marker(&meta.path) == markers).collect();
        // Lanes interleave; a directory comes before what is in it when paths are sorted.
        files.sort_by(|one, other| one.0.path.cmp(&other.0.path));
        let can_start = !self.subject.base_alone_is_no_database();
        assert!(!markers || !files.is_empty() || !can_start, "a base without a marker can be started half done");
        for (meta, content) in files {
            let Some(placed) = cloner.place(&self.site, meta).unwrap() else { continue };
            let to = self.site.data_dir.join(&placed.path);
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            match placed.kind {
                FileKind::Directory => std::fs::create_dir_all(&to).unwrap(),
                FileKind::Link { to: target } => {
                    std::os::unix::fs::symlink(target, &to).unwrap();
                    continue;
                }
                FileKind::Regular => std::fs::write(&to, content).unwrap(),
            }
            std::fs::set_permissions(&to, std::fs::Permissions::from_mode(placed.mode)).unwrap();
        }
        std::fs::set_permissions(&self.site.data_dir, std::fs::Permissions::from_mode(0o700)).unwrap();
    }

    pub async fn recover(&self, target: &Target, log: MemoryLog) -> Result<Recovered> {
        self.recover_until(target, log, CancellationToken::new()).await
    }

    pub async fn recover_until(&self, target: &Target, log: MemoryLog, cancel: CancellationToken) -> Result<Recovered> {
        self.subject.cloner().recover(&self.site, target, Arc::new(log), Arc::new(Silent), cancel).await
    }

    pub fn values(&self) -> Vec<u64> {
        self.subject.values(&self.site)
    }

    /// Stops its server, twice.
    pub async fn stop(self) {
        self.subject.cloner().stop(&self.site).await.unwrap();
        assert!(!self.subject.cloner().is_running(&self.site.data_dir));
        self.subject.cloner().stop(&self.site).await.unwrap();
    }
}

impl Drop for Grown<'_> {
    /// A test that fails leaves no server behind.
    fn drop(&mut self) {
        let (cloner, site) = (self.subject.cloner(), self.site.clone());
        // A runtime of its own: the test's may not be blocked on from inside.
        let stopping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let _ = runtime.block_on(cloner.stop(&site));
        });
        let _ = stopping.join();
    }
}

pub fn names(listing: &LogListing) -> Vec<String> {
    listing.files.iter().map(|file| file.name.clone()).collect()
}

async fn hold_all(subject: &dyn Subject) {
    promises::the_identity_is_that_of_the_directory(subject).await;
    promises::what_was_committed_is_in_the_durable_log(subject).await;
    promises::any_range_of_a_log_file_reads_the_same_bytes(subject).await;
    promises::names_and_positions_agree_with_the_files(subject).await;
    promises::a_cancelled_backup_says_so(subject).await;
    promises::a_clone_holds_exactly_its_target(subject).await;
    promises::a_replay_that_was_cancelled_can_be_repeated(subject).await;
    promises::a_clone_that_was_handed_over_is_another_directory(subject).await;
    promises::what_was_released_is_not_listed_any_more(subject).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fake_engine_keeps_the_contract() {
    hold_all(&fake::FakeSubject::start()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_15_keeps_the_contract() {
    hold_all(&postgres::PostgresSubject::start(Version::V15)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_18_keeps_the_contract() {
    hold_all(&postgres::PostgresSubject::start(Version::V18)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_7_keeps_the_contract() {
    hold_all(&redis::RedisSubject::start()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_8_keeps_the_contract() {
    hold_all(&redis::RedisSubject::start_of(Product::Redis8)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn valkey_9_keeps_the_contract() {
    hold_all(&redis::RedisSubject::start_of(Product::Valkey9)).await;
}
