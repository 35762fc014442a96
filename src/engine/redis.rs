//! Redis 7 and later, and Valkey.
//!
//! The log is the append-only file: its increments, numbered by keiki (`hold`), shipped byte by byte up to the last
//! command that is whole and durable. A base backup is the base of that file, which the server has on its disk anyway, so
//! that a backup costs the server nothing but reads. A clone is the two put together again under a new manifest, cut at a
//! command.
//!
//! Where there is no append-only file, the agent follows the server as a replica instead (`follow`) and writes what it
//! receives into log files of the same kind (`spool`); a base backup is then a snapshot that the server sends to a replica
//! (`base_stream`). Clones are made in the same way from both.
//!
//! `ondisk` knows the files, `session` talks to a server. The rest are the parts of the two engine ports: this
//! file only puts them together.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::engine::{BaseSink, BaseSpan, Engine, LogGeometry, LogListing, LogRead, ServerIdentity};
use crate::error::{Kind, Result};
use crate::model::check::CheckItem;
use crate::model::engine_kind::EngineKind;
use crate::model::log::LogFile;
use crate::model::position::Position;

pub mod backup;
pub mod base_stream;
pub mod check_source;
pub mod check_target;
pub mod clean_up;
pub mod clone;
pub mod cluster;
mod follow;
pub mod geometry;
pub mod hold;
pub mod keep_expired;
pub mod left_behind;
pub mod log_files;
pub mod log_read;
pub mod ondisk;
pub mod passwords;
pub mod permissions;
pub mod recovery;
pub mod replica;
mod saved;
pub mod server;
pub mod session;
pub mod settings;
pub mod source;
pub mod spool;
mod stream_log;

/// Where the log of a server comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogKind {
    /// Its append-only file.
    AppendOnlyFile,
    /// What it sends to its replicas.
    ReplicationStream,
}

/// A running server as the configuration describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisSource {
    /// The name of the instance.
    pub name: String,
    pub engine: EngineKind,
    /// The server's working directory, `dir` of its configuration.
    pub data_dir: PathBuf,
    pub endpoint: session::Endpoint,
    pub log: LogKind,
    /// What increments that the server has deleted may take on its disk until they are shipped.
    pub hold_limit_bytes: u64,
}

/// A running Redis server on this host.
pub struct RedisEngine {
    inner: Arc<Inner>,
    /// Ends the watcher with the engine.
    watcher: OnceLock<DropGuard>,
}

pub(crate) struct Inner {
    source: RedisSource,
    kept: tokio::sync::Mutex<source::Kept>,
    follower: OnceLock<follow::Follower>,
    /// What tells the newest copy of its data that the server has made, and that is known: see `saved`.
    saved: std::sync::Mutex<Option<String>>,
}

impl Inner {
    fn source(&self) -> &RedisSource {
        &self.source
    }

    /// Who follows the replication stream; begins to, when called first.
    fn follower(&self) -> &follow::Follower {
        self.follower.get_or_init(|| follow::Follower::start(&self.source))
    }

    fn is_streamed(&self) -> bool {
        self.source.log == LogKind::ReplicationStream
    }
}

impl RedisEngine {
    /// Takes the server as configured; nothing is opened before it is needed.
    pub fn new(source: RedisSource) -> RedisEngine {
        RedisEngine {
            inner: Arc::new(Inner {
                source,
                kept: Default::default(),
                follower: OnceLock::new(),
                saved: Default::default(),
            }),
            watcher: OnceLock::new(),
        }
    }

    pub fn source(&self) -> &RedisSource {
        &self.inner.source
    }
}

#[async_trait]
impl Engine for RedisEngine {
    async fn identify(&self) -> Result<ServerIdentity> {
        self.inner.ask_identity().await
    }

    async fn check_source(&self) -> Result<Vec<CheckItem>> {
        match self.inner.is_streamed() {
            true => stream_log::check_source(&self.inner).await,
            false => check_source::check_source(&self.inner).await,
        }
    }

    async fn log_geometry(&self) -> Result<Arc<dyn LogGeometry>> {
        Ok(Arc::new(geometry::AofGeometry))
    }

    fn log_directories(&self) -> Vec<PathBuf> {
        let directory = if self.inner.is_streamed() { spool::SPOOL_DIR } else { hold::APPEND_DIR_DEFAULT };
        vec![self.inner.source.data_dir.join(directory)]
    }

    async fn list_log(&self, after: Option<&str>) -> Result<LogListing> {
        if self.inner.is_streamed() {
            return stream_log::list(&self.inner, after).await;
        }
        self.watcher.get_or_init(|| log_files::watch(&self.inner));
        log_files::list(&self.inner, after).await
    }

    async fn open_log(&self, file: &LogFile, from: u64, to: u64) -> Result<Box<dyn LogRead>> {
        log_read::open(&self.inner, file, from, to).await
    }

    async fn release_log(&self, position: Position) -> Result<()> {
        let (number, _) = position.file()?;
        if self.inner.is_streamed() {
            return self.inner.follower().release_before(number).await;
        }
        self.inner.release_before(number).await
    }

    async fn guard_log(&self) -> Result<()> {
        match self.inner.follower.get() {
            Some(follower) => follower.guard().await,
            None => Ok(()),
        }
    }

    async fn detach(&self) -> Result<()> {
        if self.inner.is_streamed() {
            return stream_log::give_up(&self.inner).await;
        }
        let hold = match self.inner.hold().await {
            Some(hold) => hold,
            None => match self.inner.find_hold().await {
                Ok(hold) => hold,
                // Without its server nothing says where the directory is, and then nothing grows in it either.
                Err(error) if error.kind() == Kind::Unreachable => return Ok(()),
                Err(error) => return Err(error),
            },
        };
        crate::base::bulk::run_blocking("detach", move || hold.give_up()).await
    }

    async fn back_up(&self, label: &str, sink: Arc<dyn BaseSink>, cancel: CancellationToken) -> Result<BaseSpan> {
        match self.inner.is_streamed() {
            true => base_stream::back_up(&self.inner, label, sink, cancel).await,
            false => backup::back_up(&self.inner, label, sink, cancel).await,
        }
    }

    async fn back_up_cheaply(
        &self,
        label: &str,
        sink: Arc<dyn BaseSink>,
        cancel: CancellationToken,
    ) -> Result<BaseSpan> {
        match self.inner.is_streamed() {
            true => base_stream::back_up_cheaply(&self.inner, label, sink, cancel).await,
            false => self.back_up(label, sink, cancel).await,
        }
    }

    async fn has_saved(&self) -> Result<bool> {
        saved::is_new(&self.inner).await
    }
}
