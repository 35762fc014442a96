//! MariaDB 10.6 to 11 and MySQL 8.0.26 to 9: one log, one way to clone, and two products (`product`).
//!
//! `ondisk` knows the files and the log, `session` talks to a server. The rest are the parts of the two engine ports:
//! this file only puts them together.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::engine::{BaseSink, BaseSpan, Engine, LogGeometry, LogListing, LogRead, ServerIdentity};
use crate::error::{Error, Result};
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
pub mod product;
pub mod programs;
pub mod recovery;
pub mod release;
pub mod server;
pub mod session;
pub mod settings;
pub mod source;

pub use clone::MySqlCloner;

/// A running server as the configuration describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MySqlSource {
    pub product: product::Product,
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
    /// MySQL: below this directory the server puts the copy that a backup is made of. Beside the data directory if not
    /// set.
    pub backup_dir: Option<PathBuf>,
    /// Whether the server is told to forget log that is shipped.
    pub purge_shipped: bool,
}

/// A running server of MariaDB or MySQL on this host.
pub struct MySqlEngine {
    source: MySqlSource,
    /// For small questions; opened when it is needed, and again when it broke.
    connection: tokio::sync::Mutex<Option<source::SourceSession>>,
    /// How far the open log file was walked.
    walked: Arc<std::sync::Mutex<Option<log_read::Walked>>>,
    /// Held while the server copies itself, or what it has left behind is removed.
    copying: tokio::sync::Mutex<()>,
    /// Whether what an earlier agent has left behind was looked for.
    is_swept: std::sync::atomic::AtomicBool,
}

impl MySqlEngine {
    /// Takes the server as configured; nothing is opened before it is needed.
    pub fn new(source: MySqlSource) -> MySqlEngine {
        MySqlEngine {
            source,
            connection: Default::default(),
            walked: Arc::default(),
            copying: Default::default(),
            is_swept: Default::default(),
        }
    }

    pub fn source(&self) -> &MySqlSource {
        &self.source
    }
}

#[async_trait]
impl Engine for MySqlEngine {
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
        if self.source.product == product::Product::MySql && !self.is_swept.swap(true, Ordering::Relaxed) {
            // It takes space and harms nobody: the next backup tries again.
            if let Err(error) = backup::clone_plugin::sweep(self).await {
                tracing::warn!("cannot look for what an earlier backup left behind: {error}");
            }
        }
        log_files::list(self, after).await
    }

    async fn open_log(&self, file: &LogFile, from: u64, to: u64) -> Result<Box<dyn LogRead>> {
        log_read::open(self, file, from, to).await
    }

    async fn release_log(&self, position: Position) -> Result<()> {
        // Unless it is told to, the server forgets its log by its own settings; 'doctor' warns where these leave little
        // time.
        release::release(self, position).await
    }

    async fn detach(&self) -> Result<()> {
        Ok(())
    }

    async fn back_up(&self, label: &str, sink: Arc<dyn BaseSink>, cancel: CancellationToken) -> Result<BaseSpan> {
        backup::back_up(self, label, sink, cancel).await
    }

    fn may_back_up_again(&self, error: &Error) -> bool {
        backup::may_back_up_again(error)
    }
}
