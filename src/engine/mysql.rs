//! MariaDB 10.6 to 11.
//!
//! `ondisk` knows the files and the log, `session` talks to a server. The rest are the parts of the two engine ports:
//! this file only puts them together.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::engine::{BaseSink, BaseSpan, Engine, LogGeometry, LogListing, LogRead, ServerIdentity};
use crate::error::Result;
use crate::model::check::CheckItem;
use crate::model::log::LogFile;
use crate::model::position::Position;

pub mod backup;
pub mod check_source;
pub mod check_target;
pub mod clean_up;
pub mod clone;
pub mod geometry;
pub mod log_files;
pub mod log_read;
pub mod ondisk;
pub mod passwords;
pub mod programs;
pub mod recovery;
pub mod server;
pub mod session;
pub mod settings;
pub mod source;

pub use clone::MariaDbCloner;

/// A running server as the configuration describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MariaDbSource {
    /// The name of the instance.
    pub name: String,
    pub data_dir: PathBuf,
    pub socket: PathBuf,
    /// Account of the database that the agent connects as.
    pub user: String,
    /// A file with the account's password and nothing else; nothing where it logs in by `unix_socket`.
    pub password_file: Option<PathBuf>,
    /// Operating system user that runs the server.
    pub run_as: String,
    /// Where `mariadb-backup` is; the usual places if not set.
    pub bin_dir: Option<PathBuf>,
}

/// A running MariaDB server on this host.
pub struct MariaDbEngine {
    source: MariaDbSource,
    /// For small questions; opened when it is needed, and again when it broke.
    connection: tokio::sync::Mutex<Option<source::SourceSession>>,
    /// How far the open log file was walked.
    walked: Arc<std::sync::Mutex<Option<log_read::Walked>>>,
}

impl MariaDbEngine {
    /// Takes the server as configured; nothing is opened before it is needed.
    pub fn new(source: MariaDbSource) -> MariaDbEngine {
        MariaDbEngine { source, connection: Default::default(), walked: Arc::default() }
    }

    pub fn source(&self) -> &MariaDbSource {
        &self.source
    }
}

#[async_trait]
impl Engine for MariaDbEngine {
    async fn identify(&self) -> Result<ServerIdentity> {
        source::identify(self).await
    }

    async fn check_source(&self) -> Result<Vec<CheckItem>> {
        check_source::check_source(self).await
    }

    async fn log_geometry(&self) -> Result<Arc<dyn LogGeometry>> {
        Ok(Arc::new(geometry::BinlogGeometry))
    }

    fn log_directories(&self) -> Vec<PathBuf> {
        // Where the log lies unless 'log_bin' says otherwise; elsewhere new log is found by looking.
        vec![self.source.data_dir.clone()]
    }

    async fn list_log(&self, after: Option<&str>) -> Result<LogListing> {
        log_files::list(self, after).await
    }

    async fn open_log(&self, file: &LogFile, from: u64, to: u64) -> Result<Box<dyn LogRead>> {
        log_read::open(self, file, from, to).await
    }

    async fn release_log(&self, _position: Position) -> Result<()> {
        // The server forgets its log by its own settings; 'doctor' warns where these leave little time.
        Ok(())
    }

    async fn detach(&self) -> Result<()> {
        Ok(())
    }

    async fn back_up(&self, label: &str, sink: Arc<dyn BaseSink>, cancel: CancellationToken) -> Result<BaseSpan> {
        backup::back_up(self, label, sink, cancel).await
    }
}
