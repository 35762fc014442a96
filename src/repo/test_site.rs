//! What tests of this floor begin with: a repository in a store that fails on order, an incarnation and its lease.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::base::clock::ManualClock;
use crate::error::Result;
use crate::model::id::{IncarnationId, RunId};
use crate::model::incarnation::LeaseHolder;
use crate::model::log::{LogChunk, LogSummary};
use crate::repo::lease::LeaseKeeper;
use crate::repo::log_catalogue::LogCatalogue;
use crate::repo::log_reader::LogReader;
use crate::repo::log_writer::{LogBytes, LogWriter, Shipped};
use crate::repo::repository::Repository;
use crate::store::faulty::{Faults, FaultyStore};
use crate::store::memory::MemoryStore;
use crate::store::read::read_all;
use crate::store::{Key, PutCondition, Store};

pub(super) struct Site {
    /// Without faults.
    pub store: Arc<dyn Store>,
    pub faults: Faults,
    pub repo: Arc<Repository>,
    pub clock: Arc<ManualClock>,
    pub incarnation: IncarnationId,
    pub lease: Arc<LeaseKeeper>,
}

pub(super) fn holder(process_id: u32) -> LeaseHolder {
    LeaseHolder {
        host: String::from("a"),
        run: RunId::fresh(),
        machine_id: String::from("m"),
        boot_id: String::from("b"),
        process_id,
        process_start_ticks: 1,
    }
}

pub(super) async fn site() -> Site {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new("t"));
    let faults = Faults::new();
    let clock = ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap());
    let faulty = Arc::new(FaultyStore::new(store.clone(), faults.clone()));
    let repo = Repository::init(faulty, "2026-11-21T09:00:00Z".parse().unwrap()).await.unwrap();
    let incarnation = IncarnationId::fresh();
    let ttl = Duration::from_secs(30);
    let lease = LeaseKeeper::acquire(repo.clone(), incarnation, holder(1), clock.clone(), ttl, |_| true).await.unwrap();
    Site { store, faults, repo, clock, incarnation, lease }
}

/// A source of log in pieces of an odd size.
pub(super) struct Pieces {
    rest: Bytes,
    summary: LogSummary,
}

impl LogBytes for Pieces {
    fn read(&mut self) -> Result<Bytes> {
        Ok(self.rest.split_to(self.rest.len().min(300_001)))
    }

    fn summary(&self) -> LogSummary {
        self.summary.clone()
    }
}

impl Site {
    pub async fn catalogue(&self) -> Arc<LogCatalogue> {
        LogCatalogue::load(self.repo.clone(), self.incarnation).await.unwrap()
    }

    pub async fn writer(&self) -> LogWriter {
        LogWriter::new(self.repo.clone(), self.lease.clone(), self.catalogue().await)
    }

    pub async fn reader(&self) -> LogReader {
        LogReader::new(self.repo.clone(), self.catalogue().await)
    }

    /// Keys of the log, without what they all begin with.
    pub async fn log_keys(&self) -> Vec<String> {
        let prefix = format!("incarnations/{}/log/", self.incarnation);
        let found = self.store.list(&prefix, None, 1000).await.unwrap();
        found.iter().map(|object| object.key.as_str()[prefix.len()..].to_string()).collect()
    }

    pub async fn read_object(&self, key: &str) -> Bytes {
        read_all(self.store.as_ref(), &Key::parse(key).unwrap(), 1 << 30).await.unwrap()
    }

    pub async fn replace_object(&self, key: &str, bytes: Vec<u8>) {
        self.store.put(&Key::parse(key).unwrap(), Bytes::from(bytes), PutCondition::Replace).await.unwrap();
    }
}

pub(super) async fn ship(writer: &LogWriter, file: &str, from: usize, content: &[u8], sealed: bool) -> Result<Shipped> {
    ship_with(writer, file, from, content, sealed, LogSummary::default()).await
}

pub(super) async fn ship_with(
    writer: &LogWriter,
    file: &str,
    from: usize,
    content: &[u8],
    sealed: bool,
    summary: LogSummary,
) -> Result<Shipped> {
    let chunk =
        LogChunk { file: file.to_string(), from_bytes: from as u64, to_bytes: (from + content.len()) as u64, sealed };
    writer.ship(chunk, Box::new(Pieces { rest: Bytes::copy_from_slice(content), summary })).await
}

/// Bytes that do not compress and differ by seed.
pub(super) fn noise(seed: u8, length: usize) -> Vec<u8> {
    let mut out = vec![0; length];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}
