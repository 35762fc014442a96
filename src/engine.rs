//! One database server on this host, behind a port.
//!
//! Engines never see the repository: they read the server's files and talk to the server, and hand what they find to
//! the small ports below, which jobs implement. A method is here only if a job needs it from every engine.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};
use crate::model::backup::FileMeta;
use crate::model::check::CheckItem;
use crate::model::engine_kind::EngineKind;
use crate::model::log::{LogFile, LogSummary};
use crate::model::password::Passwords;
use crate::model::position::Position;
use crate::model::target::Target;

mod accounts;
pub mod fake;
pub mod geometry;
pub mod mysql;
pub mod plain;
pub mod postgres;
pub mod redis;
mod server_log;

pub use geometry::{LogGeometry, log_counts_in_seconds, log_geometry};

/// What a server says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerIdentity {
    pub engine: EngineKind,
    /// As the server calls itself: `15.18`.
    pub version: String,
    /// PostgreSQL's system identifier in decimal.
    pub system_id: String,
    /// Device and inode of the data directory and its canonical path: a copy elsewhere is another directory.
    pub data_dir: PathBuf,
    pub data_dir_inode: (u64, u64),
}

/// What is durable on the source and when that was observed, by the source's own clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DurableEnd {
    pub position: Position,
    pub observed_at: Timestamp,
}

/// One look at the log of a running server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogListing {
    /// In the order of the log. Includes small companions (timeline histories) as sealed files.
    pub files: Vec<LogFile>,
    pub durable_end: DurableEnd,
}

/// Reads one log file in order, in bounded pieces, and knows afterwards what was in it. Blocking: for a thread.
pub trait LogRead: Send {
    /// The next bytes, at most 1 MiB; empty at the end of the range that was asked for. Bytes that cannot belong to
    /// this file at this place (recycled, overwritten, torn) are an error of kind `Damaged`.
    fn read(&mut self) -> Result<Bytes>;

    /// What the bytes read so far contain. Best effort: a log that cannot be understood has an empty summary.
    fn summary(&self) -> LogSummary;
}

/// Where a base backup goes. Blocking calls, made from the engine's own reader threads.
pub trait BaseSink: Send + Sync {
    /// A new lane; lanes work at the same time, each takes one file after the other.
    fn lane(&self) -> Result<Box<dyn BaseLane>>;
    /// How many lanes the sink can make good use of.
    fn lanes_wanted(&self) -> usize;
    /// Tells the total once it is known, for the progress bar.
    fn expect_bytes(&self, bytes: u64);
    /// Everybody stops soon after this says true.
    fn is_cancelled(&self) -> bool;
}

/// One stream of files into a base backup.
pub trait BaseLane: Send {
    /// Records a directory or a link, or begins a regular file whose bytes follow in `write`.
    fn begin(&mut self, meta: FileMeta) -> Result<()>;
    /// The next bytes of the file that was begun, in any piece sizes; 1 MiB pieces are copied least.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    /// Ends the file.
    fn end(&mut self) -> Result<()>;
    /// Ends the lane: everything given to it is stored when this returns.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// What the engine says about a base that it has given to a sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseSpan {
    pub start: Position,
    /// The log up to here must be in the repository before the backup may be published.
    pub stop: Position,
    pub began_at: Timestamp,
    pub ended_at: Timestamp,
    /// See `Backup::engine_facts`.
    pub facts: BTreeMap<String, String>,
    /// Blocks whose checksum was wrong on the source and stayed wrong when they were read again, for the report.
    pub damaged_blocks: Vec<String>,
}

/// Where replay gets its log from: a repository, read ahead by the job that implements this.
#[async_trait]
pub trait LogSource: Send + Sync {
    /// How many contiguous bytes of this log file there are, or nothing if there is none. Does not change during a
    /// replay.
    async fn available(&self, name: &str) -> Result<Option<u64>>;
    /// Whether the source has finished this log file: what follows it in the log is the file that follows it by name.
    /// Of a file that is not, the end may be missing.
    async fn is_sealed(&self, name: &str) -> Result<bool>;
    /// The bytes of a log file from its start, at most `available`. Verified. Whole in memory for files of up to
    /// 64 MiB; longer ones come in as many calls with growing `from`.
    async fn read(&self, name: &str, from: u64, max_bytes: usize) -> Result<Bytes>;
}

/// How a long engine call says how far it is.
pub trait Progress: Send + Sync {
    /// In bytes of log or data; a total of 0 means not known.
    fn set(&self, done: u64, total: u64);
    fn note(&self, text: String);
}

/// The directory of a clone and everything it is to become.
#[derive(Debug, Clone)]
pub struct CloneSite {
    pub clone_name: String,
    pub data_dir: PathBuf,
    /// Private directory of the clone outside its data directory, for sockets and server logs in quarantine. Exists.
    pub run_dir: PathBuf,
    pub bin_dir: Option<PathBuf>,
    pub port: u16,
    /// Addresses that the accepted clone listens on.
    pub listen_addresses: String,
    /// Operating system user who owns the directory and runs the server.
    pub run_as: String,
    /// `--set` of the order.
    pub settings: BTreeMap<String, String>,
    /// Accounts that get new passwords with [`CloneEngine::change_passwords`].
    pub passwords_for: BTreeSet<String>,
    /// `--keep-expired` of the order.
    pub keep_expired: bool,
    /// From the backup.
    pub engine_version: String,
    pub facts: BTreeMap<String, String>,
    pub backup_start: Position,
    pub backup_stop: Position,
    /// What PostgreSQL calls to archive, with the control socket: used when the clone is accepted.
    pub archive_command: String,
}

/// An accepted clone at rest: what is needed to start its server again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcceptedClone {
    pub data_dir: PathBuf,
    /// As in [`CloneSite`].
    pub run_dir: PathBuf,
    pub bin_dir: Option<PathBuf>,
    pub port: u16,
    pub run_as: String,
}

/// Facts that a group gives to a member.
pub type Ties = BTreeMap<String, String>;

/// A member of a group before it is grown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TiedMember {
    /// The clone's name, and its source as `host/instance`.
    pub name: String,
    pub source: String,
    /// Of the accepted clone.
    pub port: u16,
    /// Of the backup that it will be made from.
    pub facts: BTreeMap<String, String>,
}

/// What was asked of the server after replay, never guessed from a log line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// The last position of the parent that the clone contains.
    pub departed_at: Position,
    /// The position in the clone's own new life.
    pub now_at: Position,
    /// The time of the last transaction that it contains.
    pub last_commit_at: Option<Timestamp>,
    /// Lines for the report: what was verified, with what was found.
    pub verified: Vec<CheckItem>,
}

/// One thing that clean-up found or did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CleanUpItem {
    pub what: String,
    pub done: String,
}

/// A database server that runs on this host, or its data directory: what agents ship and back up.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Asks the running server who it is. `Unreachable` if it is not running now.
    async fn identify(&self) -> Result<ServerIdentity>;

    /// What is wrong or risky with this server as a source: settings, permissions, slots. For `doctor`.
    async fn check_source(&self) -> Result<Vec<CheckItem>>;

    /// The arithmetic of this server's log files. Works while the server is down.
    async fn log_geometry(&self) -> Result<Arc<dyn LogGeometry>>;

    /// Directories in which something happens when there is new log.
    fn log_directories(&self) -> Vec<PathBuf>;

    /// The log files that come after the file `after`, including the open one, and the durable end. Never names a
    /// file that the server may recycle before `release`. `NotFound` if the server has forgotten log right after
    /// `after`; without `after` the listing then begins behind what is gone.
    async fn list_log(&self, after: Option<&str>) -> Result<LogListing>;

    /// Opens bytes `from..to` of a log file.
    async fn open_log(&self, file: &LogFile, from: u64, to: u64) -> Result<Box<dyn LogRead>>;

    /// The log before `position` and all of `sealed_files` are durable in the repository: the server may forget them.
    async fn release_log(&self, position: Position) -> Result<()>;

    /// Keeps what the agent holds back on the server within its limit, while nothing can be shipped and so nothing is
    /// listed. An error of kind `Full` says what was given up. Nothing to do, and so the default, where the agent holds
    /// nothing.
    async fn guard_log(&self) -> Result<()> {
        Ok(())
    }

    /// Gives up what the agent holds on the server (a slot): the instance leaves the configuration.
    async fn detach(&self) -> Result<()>;

    /// Takes an online base backup. The engine reads files on `sink.lanes_wanted()` threads of its own.
    async fn back_up(&self, label: &str, sink: Arc<dyn BaseSink>, cancel: CancellationToken) -> Result<BaseSpan>;

    /// Takes a base backup that nobody waits for: it may be of a moment some minutes ago, if the server has made a copy of
    /// its data then and another one would cost it more.
    async fn back_up_cheaply(
        &self,
        label: &str,
        sink: Arc<dyn BaseSink>,
        cancel: CancellationToken,
    ) -> Result<BaseSpan> {
        self.back_up(label, sink, cancel).await
    }

    /// Whether a backup that ended with `error` may succeed if it is begun anew at once, because a program of the server's
    /// failed for no reason that anybody could remove. Never, and so the default, where no such program is known.
    fn may_back_up_again(&self, error: &Error) -> bool {
        let _ = error;
        false
    }

    /// Whether the server has made a copy of its data, by itself or because a person told it to, that no backup has taken
    /// yet; what is there when this is first asked does not count. Never, and so the default, where servers do not.
    async fn has_saved(&self) -> Result<bool> {
        Ok(false)
    }
}

/// The engine as a grower of clones on this host. No source is needed: everything comes from the backup.
#[async_trait]
pub trait CloneEngine: Send + Sync {
    /// What this host lacks to run such a clone: programs, versions, extensions, memory, users, collations. And what
    /// the backup lacks for such a target.
    async fn check_target(&self, site: &CloneSite, target: &Target) -> Result<Vec<CheckItem>>;

    /// Where a file of the backup goes in the clone, relative to the data directory; `None` leaves it out. Pure.
    fn place(&self, site: &CloneSite, meta: &FileMeta) -> Result<Option<FileMeta>>;

    /// Whether this file makes the directory startable and must go in last (`global/pg_control`). Pure.
    fn is_marker(&self, path: &str) -> bool;

    /// Makes a restored directory ready for replay. Called when all files but the markers are durable.
    async fn prepare(&self, site: &CloneSite) -> Result<()>;

    /// The name of the log file that replay begins with. Pure.
    fn first_log_file(&self, site: &CloneSite) -> Result<String>;

    /// The name that follows a log file on the same timeline, and the start position of a file. Pure.
    fn next_log_file(&self, site: &CloneSite, name: &str) -> Result<String>;

    /// How many bytes of log lie beside the data at the same time, at most, while it is replayed: for the check of free
    /// space. The default is for engines that recycle what is replayed.
    fn log_bytes_at_once_max(&self) -> u64 {
        2 << 30
    }

    /// Where a transaction with this id begins and ends in the log, if it is in this file. `held` is what the summary of
    /// the file says (`LogSummary::transactions`). An id that cannot be one is `BadInput`, also of an engine whose
    /// transactions have none.
    async fn find_transaction(
        &self,
        id: &str,
        _file: &str,
        _held: &[String],
        _logs: &dyn LogSource,
    ) -> Result<Option<(Position, Position)>> {
        Err(Error::new(Kind::BadInput, format!("the log of the source has no transaction ids like '{id}'"))
            .hint("choose a time, a position, a name or a backup"))
    }

    /// Replays exactly to the target in quarantine, leaves the server promoted and running, and says what it asked it.
    /// May be called again on a directory where an earlier call died: it then starts over or goes on.
    async fn recover(
        &self,
        site: &CloneSite,
        target: &Target,
        logs: Arc<dyn LogSource>,
        progress: Arc<dyn Progress>,
        cancel: CancellationToken,
    ) -> Result<Recovered>;

    /// What clones of a group that are all of this engine must know of each other, where servers form one thing together
    /// (the nodes of a Redis Cluster): for each member facts that its site gets beside those of its backup, each key with
    /// `model::group::TIE_PREFIX`, and lines for the check list. Takes the addresses on which the clones will listen. An
    /// error if they cannot be grown together. Nothing, and so the default, for servers that know nothing of each other.
    fn tie(&self, members: &[TiedMember], _listen_addresses: &str) -> Result<(Vec<CheckItem>, Vec<Ties>)> {
        Ok((Vec::new(), vec![Ties::new(); members.len()]))
    }

    /// Waits until a clone with ties, which was handed over as all others of its group were, serves together with them. Of
    /// the site only places and facts of ties are there.
    async fn confirm_ties(&self, _site: &CloneSite, _cancel: CancellationToken) -> Result<Vec<CleanUpItem>> {
        Ok(Vec::new())
    }

    /// Removes what a copy must not keep and writes the clone's own settings. The server runs in quarantine, before
    /// and after. Repeating it is harmless.
    async fn clean_up(&self, site: &CloneSite) -> Result<Vec<CleanUpItem>>;

    /// Gives accounts of the clone new passwords, after `clean_up` and in the same state of the server. All of them, or
    /// an error that names the accounts that are not there and the nearest that are. Repeating it is harmless. No
    /// password may be in what is returned, in a log or in the name of a process. The default is that of an engine
    /// without accounts.
    async fn change_passwords(&self, site: &CloneSite, passwords: &Passwords) -> Result<Vec<CleanUpItem>> {
        match passwords.keys().next() {
            None => Ok(Vec::new()),
            Some(account) => Err(Error::new(
                Kind::Unsupported,
                format!("cannot change the password of '{account}' in '{}': it has no accounts", site.clone_name),
            )
            .hint("leave out --password")),
        }
    }

    /// Makes a clone that is cleaned up durable and leaves it running in quarantine, where it may stay for long: from
    /// now on a restart of the machine loses nothing of it. Repeating it is harmless. Nothing to do, and so the default,
    /// for engines whose server is durable in quarantine anyway.
    async fn make_durable(&self, _site: &CloneSite) -> Result<()> {
        Ok(())
    }

    /// Stops the quarantined server cleanly and makes the whole directory durable; then, unless `open` is false,
    /// starts it as the instance that it is from now on.
    async fn hand_over(&self, site: &CloneSite, open: bool) -> Result<ServerIdentity>;

    /// Starts the server of an accepted clone with its own settings. Returns when the server has taken its directory; that
    /// it recovers from a crash first may take its time. Succeeds if it runs already.
    async fn launch(&self, clone: &AcceptedClone) -> Result<()>;

    /// Stops whatever server of this site is running. Succeeds if none is.
    async fn stop(&self, site: &CloneSite) -> Result<()>;

    /// Is a server running in this directory now?
    fn is_running(&self, data_dir: &Path) -> bool;
}
