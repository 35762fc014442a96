//! The matrix: what must hold on every engine is written once, over [`SourceServer`], and each engine is a row.
//!
//! A row is a file in this folder that implements the trait, a `mod` line here, and a line in [`on_every_engine`]: then
//! killing, fencing and cost are tested on it. What a row says is about the server alone and shares no code with what is
//! tested, but for the session that asks.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use keiki::model::id::IncarnationId;
use keiki::repo::log_catalogue::LogCatalogue;
use keiki::repo::log_reader::LogReader;
use keiki::repo::repository::Repository;
use keiki::store::fs::FsStore;

use super::hosts::Lab;

mod mariadb;
mod mysql;
mod postgres;
mod redis;
mod redis_stream;

pub use super::mariadb::MariaServer;
pub use super::mysql::MySqlServer;
pub use super::postgres::TestServer;
pub use mariadb::{ask, endpoint_of, runtime};

pub type RedisServer = redis::Server<redis::Redis7>;
pub type RedisStreamServer = redis::Server<redis::Redis8Streamed>;
pub type ValkeyServer = redis::Server<redis::Valkey9>;

/// Makes a module of tests for each engine out of functions `fn promise<S: SourceServer>()`.
macro_rules! on_every_engine {
    ($($promise:ident),+ $(,)?) => {
        $crate::support::matrix::on_engines! {
            [postgres TestServer] [mariadb MariaServer] [mysql MySqlServer] [redis RedisServer] [valkey ValkeyServer]
            [redis_stream RedisStreamServer] : [$($promise)+]
        }
    };
}
/// The same for some of them.
macro_rules! on_engines {
    ($([$name:ident $server:ident])+ : $promises:tt) => {
        $($crate::support::matrix::on_engines! { @row $name $server $promises })+
    };
    (@row $name:ident $server:ident [$($promise:ident)+]) => {
        mod $name {
            $(#[test]
            fn $promise() {
                super::$promise::<crate::support::matrix::$server>();
            })+
        }
    };
}
pub(crate) use {on_engines, on_every_engine};

/// What a server holds, by table or key: equal exactly if the contents are.
pub type Contents = BTreeMap<String, String>;

/// Writers that go on until this is dropped, whatever becomes of their server.
pub type Writers = Box<dyn Any>;

/// Where a clone is.
#[derive(Debug, Clone)]
pub struct CloneAt {
    pub data_dir: PathBuf,
    pub run_dir: PathBuf,
    pub port: u16,
}

/// A real server that is the source of clones. It is killed when it is dropped.
pub trait SourceServer: Sized + 'static {
    /// As the configuration calls it, and as tests print it.
    const ENGINE: &'static str;

    /// How many log files the server may end while no agent looks without losing log.
    const ENDS_UNSEEN: u32;

    /// Whether a server that was killed has everything that it ever acknowledged when it is started again.
    const KEEPS_DATA_WHEN_KILLED: bool = true;

    /// Bytes written for each byte that is restored, by the agent, the clone's server and its tools together, until a
    /// clone that has nothing to replay can be accepted. The agent alone writes 1.02 at most.
    const ALL_WRITES_PER_BYTE_LIMIT: f64;

    /// A running server that holds a little and writes many log files rather than long ones. What ships its log finds
    /// the control socket of host a below the lab.
    fn start(lab: &Lab) -> Self;

    /// A server that does not run, with a copy of the data directory of this one, which does not run either.
    fn copy(&self) -> Self;

    fn data_dir(&self) -> &Path;

    /// Process id of the running server.
    fn pid(&self) -> u32;

    /// The section `[[instance]]` of the host that ships it.
    fn instance_section(&self, name: &str) -> String;

    /// Sections of hosts that clones are made on.
    fn clone_sections(&self) -> String {
        String::new()
    }

    /// The programs of clones.
    fn bin_dir(&self) -> PathBuf;

    /// Commits one small change that `contents` shows; each number once.
    fn write(&self, number: u32);

    /// Commits so many MiB, in transactions of about one.
    fn fill(&self, mebibytes: u32);

    /// Begins to write all the time.
    fn load(&self) -> Writers;

    /// Lets the server begin the next log file.
    fn end_log_file(&self);

    fn contents(&self) -> Contents;

    /// What an open clone holds.
    fn contents_of(&self, clone: &CloneAt) -> Contents;

    /// Writes something to an open clone, so that its contents differ.
    fn write_to(&self, clone: &CloneAt);

    /// Lets an open clone begin the next log file.
    fn end_log_file_of(&self, clone: &CloneAt);

    /// The server's own log from its first file on, each file as it must be archived. Only the last one may be longer
    /// than what is durable of it.
    fn own_log(&self) -> Vec<Vec<u8>>;

    /// Whether a log file of this name is one of those that `own_log` shows.
    fn is_log_file(_name: &str) -> bool {
        true
    }

    /// A clean end, which returns when the server is gone.
    fn stop(&mut self);

    /// SIGKILL.
    fn kill9(&mut self);

    /// Starts what was stopped or killed, and waits until it answers.
    fn launch(&mut self);

    /// What nobody may change who clones this server: since when it runs, its settings.
    fn facts(&self) -> BTreeMap<String, String>;

    /// Whether a fact counts what was done to the server by its users.
    fn is_counter(_fact: &str) -> bool {
        false
    }

    /// What the server has complained about in its log.
    fn complaints(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether a file of the data directory comes and goes with the life of the server itself.
    fn is_own_business(path: &str) -> bool;

    /// What there is of its log only because the agent holds it back until it is shipped.
    fn held(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether a server could be started on this directory, however incomplete it is.
    fn is_startable(data_dir: &Path) -> bool;

    /// Removes what a restart of the machine would have removed, or what it would have made meaningless.
    fn after_power_cut(&self, clone: &CloneAt);

    /// The files below the data directory that are not the server's own business.
    fn files(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut open = vec![self.data_dir().to_path_buf()];
        while let Some(next) = open.pop() {
            for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
                let path = entry.path();
                let name = path.strip_prefix(self.data_dir()).unwrap().to_str().unwrap().to_string();
                if path.is_dir() {
                    open.push(path);
                } else if !Self::is_own_business(&name) {
                    found.insert(name);
                }
            }
        }
        found
    }

    /// Processes that were started with the data directory in their arguments, without the server itself.
    fn helpers(&self) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            if pid != self.pid() && command.contains(self.data_dir().to_str().unwrap()) {
                found.push(format!("{pid}: {command}"));
            }
        }
        found
    }
}

/// A copy of everything in a directory, in another one that is there.
pub fn copy_tree(from: &Path, to: &Path) {
    let done = std::process::Command::new("cp").arg("-a").arg(from.join(".")).arg(to).status().unwrap();
    assert!(done.success());
}

/// Name and bytes of each log file in the archive of an incarnation, in order.
pub fn archived_log(repository: &Path, incarnation: &str) -> Vec<(String, Vec<u8>)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let repo = Repository::open(Arc::new(FsStore::open(repository).unwrap())).await.unwrap();
        let incarnation = IncarnationId::parse(incarnation).unwrap();
        let catalogue = LogCatalogue::load(repo.clone(), incarnation).await.unwrap();
        let reader = LogReader::new(repo, catalogue.clone());
        let mut files = Vec::new();
        for listed in catalogue.files() {
            let length = catalogue.file(&listed.name).await.unwrap().unwrap().bytes;
            let mut bytes = Vec::new();
            while (bytes.len() as u64) < length {
                let more = reader.read(&listed.name, bytes.len() as u64, 16 << 20).await.unwrap();
                assert!(!more.is_empty(), "'{}' ends at {} of {length}", listed.name, bytes.len());
                bytes.extend_from_slice(&more);
            }
            files.push((listed.name, bytes));
        }
        files
    })
}
