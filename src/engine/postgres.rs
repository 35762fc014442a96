//! PostgreSQL 13 to 18.
//!
//! `ondisk` knows the files and the log, `session` talks to a server. The rest are the parts of the two engine
//! ports: this file only puts them together.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::engine::{BaseSink, BaseSpan, Engine, LogGeometry, LogListing, LogRead, ServerIdentity};
use crate::error::Result;
use crate::model::check::CheckItem;
use crate::model::log::LogFile;
use crate::model::position::Position;

pub mod geometry;
pub mod ondisk;
pub mod session;
pub mod source;
pub mod log_files;
pub mod log_read;
pub mod slot;
pub mod backup;
pub mod check_source;
pub mod check_target;
pub mod clean_up;
pub mod clone;
pub mod collation;
pub mod passwords;
pub mod recovery;
pub mod server;
pub mod settings;

/// How the log of a server is kept until it is shipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShipMode {
    /// PostgreSQL asks the agent about each segment through `archive_command` and keeps what is not acknowledged.
    ArchiveCommand,
    /// A physical replication slot of the agent's holds the log back, on a server without any changed setting.
    Slot {
        /// What the slot may hold back in bytes before the agent gives it up, so that the server's disk cannot fill.
        limit_bytes: u64,
    },
}

/// A running server as the configuration describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostgresSource {
    /// The name of the instance.
    pub name: String,
    pub data_dir: PathBuf,
    pub socket_dir: PathBuf,
    pub port: u16,
    /// Database role that the agent connects as.
    pub user: String,
    /// Operating system user that runs the server.
    pub run_as: String,
    pub ship: ShipMode,
    /// What `archive_command` must be, word for word: `/usr/bin/keiki wal-push %p`. Only compared and printed.
    pub archive_command: String,
}

impl PostgresSource {
    /// `pg_wal` of the data directory; a link to elsewhere is followed by whoever opens it.
    pub fn wal_dir(&self) -> PathBuf {
        self.data_dir.join("pg_wal")
    }

    /// Where the server says which files it wants archived.
    pub fn archive_status_dir(&self) -> PathBuf {
        self.wal_dir().join("archive_status")
    }
}

/// A running PostgreSQL server on this host.
pub struct PostgresEngine {
    source: PostgresSource,
    /// For small questions; opened when it is needed and closed soon after.
    connection: Arc<tokio::sync::Mutex<source::KeptSession>>,
}

impl PostgresEngine {
    /// Takes the server as configured; nothing is opened before it is needed.
    pub fn new(source: PostgresSource) -> PostgresEngine {
        PostgresEngine { source, connection: Arc::default() }
    }

    pub fn source(&self) -> &PostgresSource {
        &self.source
    }
}

#[async_trait]
impl Engine for PostgresEngine {
    async fn identify(&self) -> Result<ServerIdentity> {
        source::identify(self).await
    }

    async fn check_source(&self) -> Result<Vec<CheckItem>> {
        check_source::check_source(self).await
    }

    async fn log_geometry(&self) -> Result<Arc<dyn LogGeometry>> {
        source::geometry(self).await
    }

    fn log_directories(&self) -> Vec<PathBuf> {
        // Both: the directory of markers is quiet enough for every event to mean something, and the other one also
        // works where nothing is archived.
        vec![self.source.archive_status_dir(), self.source.wal_dir()]
    }

    async fn list_log(&self, after: Option<&str>) -> Result<LogListing> {
        log_files::list(self, after).await
    }

    async fn open_log(&self, file: &LogFile, from: u64, to: u64) -> Result<Box<dyn LogRead>> {
        log_read::open(self, file, from, to).await
    }

    async fn release_log(&self, position: Position) -> Result<()> {
        match self.source.ship {
            // The server forgets a segment when its archive_command says that it is safe.
            ShipMode::ArchiveCommand => Ok(()),
            ShipMode::Slot { .. } => slot::advance(self, position).await,
        }
    }

    async fn guard_log(&self) -> Result<()> {
        match self.source.ship {
            ShipMode::ArchiveCommand => Ok(()),
            ShipMode::Slot { limit_bytes } => slot::guard(self, limit_bytes).await,
        }
    }

    async fn detach(&self) -> Result<()> {
        slot::drop_if_there(self).await
    }

    async fn back_up(&self, label: &str, sink: Arc<dyn BaseSink>, cancel: CancellationToken) -> Result<BaseSpan> {
        backup::back_up(self, label, sink, cancel).await
    }
}
