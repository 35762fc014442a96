//! Redis 7 and later, and Valkey.
//!
//! The log is the append-only file: its increments, numbered by keiki (`hold`), shipped byte by byte up to the last
//! command that is whole and durable. A base backup is the base of that file, which the server has on its disk anyway, so
//! that a backup costs the server nothing but reads. A clone is the two put together again under a new manifest, cut at a
//! command. `ondisk` knows the files, `session` talks to a server. The rest are the parts of the two engine ports: this
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
pub mod check_source;
pub mod check_target;
pub mod clean_up;
pub mod clone;
pub mod cluster;
pub mod geometry;
pub mod hold;
pub mod keep_expired;
pub mod log_files;
pub mod log_read;
pub mod ondisk;
pub mod passwords;
pub mod recovery;
pub mod server;
pub mod session;
pub mod settings;
pub mod source;

/// A running server as the configuration describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisSource {
    /// The name of the instance.
    pub name: String,
    pub engine: EngineKind,
    /// The server's working directory, `dir` of its configuration.
    pub data_dir: PathBuf,
    pub endpoint: session::Endpoint,
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
}

impl Inner {
    fn source(&self) -> &RedisSource {
        &self.source
    }
}

impl RedisEngine {
    /// Takes the server as configured; nothing is opened before it is needed.
    pub fn new(source: RedisSource) -> RedisEngine {
        RedisEngine { inner: Arc::new(Inner { source, kept: Default::default() }), watcher: OnceLock::new() }
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
        check_source::check_source(&self.inner).await
    }

    async fn log_geometry(&self) -> Result<Arc<dyn LogGeometry>> {
        Ok(Arc::new(geometry::AofGeometry))
    }

    fn log_directories(&self) -> Vec<PathBuf> {
        vec![self.inner.source.data_dir.join(hold::APPEND_DIR_DEFAULT)]
    }

    async fn list_log(&self, after: Option<&str>) -> Result<LogListing> {
        self.watcher.get_or_init(|| log_files::watch(&self.inner));
        log_files::list(&self.inner, after).await
    }

    async fn open_log(&self, file: &LogFile, from: u64, to: u64) -> Result<Box<dyn LogRead>> {
        log_read::open(&self.inner, file, from, to).await
    }

    async fn release_log(&self, position: Position) -> Result<()> {
        let (number, _) = position.file()?;
        match self.inner.hold().await {
            Some(hold) => crate::base::bulk::run_blocking("release log", move || hold.release_before(number)).await,
            None => Ok(()),
        }
    }

    async fn detach(&self) -> Result<()> {
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
        backup::back_up(&self.inner, label, sink, cancel).await
    }
}
