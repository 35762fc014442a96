//! Clones of a real MariaDB server, without a repository: the base lies in a directory, the archive in another.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use keiki::engine::mysql::clone::{ACCOUNT, PASSWORD_FILE, SOCKET_FILE};
use keiki::engine::mysql::product::Product;
use keiki::engine::mysql::server::stop_now;
use keiki::engine::mysql::session::{Endpoint, Session};
use keiki::engine::mysql::source::read_password;
use keiki::engine::mysql::{MySqlCloner, MySqlEngine};
use keiki::engine::{
    AcceptedClone, BaseLane, BaseSink, BaseSpan, CloneEngine, CloneSite, Engine, LogSource, Progress, Recovered,
};
use keiki::error::{Context, Error, Kind, Result};
use keiki::model::backup::{FileKind, FileMeta};
use keiki::model::id::BackupId;
use keiki::model::log::LogSummary;
use keiki::model::position::Position;
use keiki::model::target::Target;
use tokio_util::sync::CancellationToken;

use crate::support::mariadb::{MariaServer, own};
use crate::support::postgres::free_port;

mod bench;
mod left_behind;
mod left_behind_mysql;
mod log;
mod purge;
mod replay;

/// A base that is written into a directory.
#[derive(Clone)]
pub struct DirectorySink {
    directory: PathBuf,
    files: Arc<Mutex<Vec<FileMeta>>>,
    pub cancelled: Arc<AtomicBool>,
    /// Fails when a file of this name is written to.
    full_at: Option<String>,
}

struct DirectoryLane {
    sink: DirectorySink,
    open: Option<(FileMeta, File)>,
}

impl DirectorySink {
    pub fn new(directory: &Path) -> DirectorySink {
        std::fs::create_dir_all(directory).unwrap();
        DirectorySink { directory: directory.into(), files: Arc::default(), cancelled: Arc::default(), full_at: None }
    }
}

impl BaseSink for DirectorySink {
    fn lane(&self) -> Result<Box<dyn BaseLane>> {
        Ok(Box::new(DirectoryLane { sink: self.clone(), open: None }))
    }

    fn lanes_wanted(&self) -> usize {
        3
    }

    fn expect_bytes(&self, _bytes: u64) {}

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

impl BaseLane for DirectoryLane {
    fn begin(&mut self, meta: FileMeta) -> Result<()> {
        assert!(self.open.is_none(), "'{}' begins within another file", meta.path);
        let path = self.sink.directory.join(&meta.path);
        if meta.kind == FileKind::Directory {
            std::fs::create_dir_all(&path).unwrap();
            self.sink.files.lock().unwrap().push(meta);
            return Ok(());
        }
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = File::options().write(true).create_new(true).open(&path).context(|| path.display().to_string())?;
        self.open = Some((meta, file));
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let (meta, file) = self.open.as_mut().expect("an open file");
        if self.sink.full_at.as_ref() == Some(&meta.path) {
            return Err(Error::new(Kind::Full, "no space is left"));
        }
        file.write_all(bytes).context(|| "cannot write")
    }

    fn end(&mut self) -> Result<()> {
        let (meta, _) = self.open.take().expect("an open file");
        self.sink.files.lock().unwrap().push(meta);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        assert!(self.open.is_none(), "a file was not ended");
        Ok(())
    }
}

/// A directory of log files under their names in the repository. The second part is the name of the one that is not
/// finished, if there is one.
#[derive(Clone)]
pub struct Archive(PathBuf, Option<String>);

#[async_trait]
impl LogSource for Archive {
    async fn available(&self, name: &str) -> Result<Option<u64>> {
        Ok(std::fs::metadata(self.0.join(name)).ok().map(|metadata| metadata.len()))
    }

    async fn is_sealed(&self, name: &str) -> Result<bool> {
        Ok(self.available(name).await?.is_some() && self.1.as_deref() != Some(name))
    }

    async fn read(&self, name: &str, from: u64, max_bytes: usize) -> Result<Bytes> {
        let mut file = File::open(self.0.join(name)).context(|| format!("cannot read '{name}'"))?;
        file.seek(SeekFrom::Start(from)).unwrap();
        let mut bytes = Vec::new();
        file.take(max_bytes as u64).read_to_end(&mut bytes).unwrap();
        Ok(Bytes::from(bytes))
    }
}

pub struct Quiet;

impl Progress for Quiet {
    fn set(&self, _done: u64, _total: u64) {}
    fn note(&self, _text: String) {}
}

/// A source with a ledger, a base and its archive.
pub struct Source {
    pub server: MariaServer,
    pub engine: MySqlEngine,
    pub archive: Archive,
    pub base: DirectorySink,
    pub span: Option<BaseSpan>,
    pub session: Session,
}

impl Source {
    pub async fn start(arguments: &[&str]) -> Source {
        let server = MariaServer::start(arguments);
        let engine = MySqlEngine::new(server.source("orders"));
        let session = server.connect().await;
        for sql in [
            "CREATE DATABASE shop",
            "CREATE TABLE shop.ledger (id INT PRIMARY KEY, note TEXT)",
            "CREATE TABLE shop.nokey (id INT, note TEXT)",
            "CREATE TABLE shop.old (id INT) ENGINE = MyISAM",
        ] {
            session.execute(sql).await.unwrap();
        }
        let archive = Archive(server.work_dir.join("archive"), None);
        std::fs::create_dir(&archive.0).unwrap();
        let base = DirectorySink::new(&server.work_dir.join("base"));
        Source { server, engine, archive, base, span: None, session }
    }

    /// Commits rows `from..=to`, one transaction each.
    pub async fn commit_rows(&self, from: u32, to: u32) {
        for id in from..=to {
            for sql in [
                "BEGIN".to_string(),
                format!("INSERT INTO shop.nokey VALUES ({id}, repeat('y', {}))", id % 31),
                format!("INSERT INTO shop.ledger VALUES ({id}, repeat('x', {}))", id % 97),
                "COMMIT".to_string(),
            ] {
                self.session.execute(&sql).await.unwrap();
            }
        }
    }

    pub async fn back_up(&mut self) {
        let span = self.engine.back_up("test", Arc::new(self.base.clone()), CancellationToken::new()).await;
        self.span = Some(span.unwrap());
        self.archive_log().await;
    }

    /// Archives everything as the agent does: through the engine's reader. Returns what the files were said to hold.
    pub async fn archive_log(&self) -> BTreeMap<String, LogSummary> {
        let listing = self.engine.list_log(None).await.unwrap();
        let mut summaries = BTreeMap::new();
        for file in listing.files {
            let mut reader = self.engine.open_log(&file, 0, file.readable_bytes).await.unwrap();
            let mut content = Vec::new();
            loop {
                let piece = reader.read().unwrap();
                if piece.is_empty() {
                    break;
                }
                content.extend_from_slice(&piece);
            }
            std::fs::write(self.archive.0.join(&file.name), content).unwrap();
            summaries.insert(file.name, reader.summary());
        }
        summaries
    }

    /// The end of the log now.
    pub async fn position(&self) -> Position {
        self.engine.list_log(None).await.unwrap().durable_end.position
    }

    /// A whole second between what was committed and what will be: waits for it.
    pub async fn quiet_second(&self) -> Timestamp {
        let next = Timestamp::now().as_second() + 1;
        let moment = Timestamp::from_second(next).unwrap();
        while Timestamp::now() < moment {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        moment
    }
}

/// A clone being grown from a source.
pub struct Clone {
    pub site: CloneSite,
    pub cloner: MySqlCloner,
    _root: tempfile::TempDir,
}

impl Clone {
    /// Stages the base of a source, as a job would: markers last.
    pub async fn stage(source: &Source) -> Clone {
        let root = tempfile::Builder::new().prefix("keiki-mc").tempdir().unwrap();
        std::fs::set_permissions(root.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let (data_dir, run_dir) = (root.path().join("data"), root.path().join("run"));
        for directory in [&data_dir, &run_dir] {
            std::fs::create_dir(directory).unwrap();
            own(directory, &source.server.user);
        }
        let span = source.span.as_ref().unwrap();
        let site = CloneSite {
            clone_name: String::from("orders-check"),
            data_dir,
            run_dir,
            bin_dir: None,
            port: free_port(),
            listen_addresses: String::from("127.0.0.1"),
            run_as: source.server.user.name.clone(),
            settings: BTreeMap::new(),
            passwords_for: Default::default(),
            keep_expired: false,
            engine_version: source.engine.identify().await.unwrap().version,
            facts: span.facts.clone(),
            backup_start: span.start,
            backup_stop: span.stop,
            archive_command: String::new(),
        };
        let clone =
            Clone { site, cloner: MySqlCloner { product: Product::MariaDb, default_bin_dir: None }, _root: root };
        let files = source.base.files.lock().unwrap().clone();
        for markers in [false, true] {
            for meta in files.iter().filter(|meta| clone.cloner.is_marker(&meta.path) == markers) {
                clone.put(source, meta);
            }
            if !markers {
                clone.cloner.prepare(&clone.site).await.unwrap();
            }
        }
        clone
    }

    fn put(&self, source: &Source, meta: &FileMeta) {
        let Some(placed) = self.cloner.place(&self.site, meta).unwrap() else { return };
        let to = self.site.data_dir.join(&placed.path);
        let user = &source.server.user;
        for directory in to.ancestors().skip(1).take_while(|path| path.starts_with(&self.site.data_dir)) {
            std::fs::create_dir_all(directory).unwrap();
            own(directory, user);
        }
        match placed.kind {
            FileKind::Directory => std::fs::create_dir_all(&to).unwrap(),
            _ => drop(std::fs::copy(source.base.directory.join(&meta.path), &to).unwrap()),
        }
        own(&to, user);
    }

    pub async fn recover(&self, source: &Source, target: Target) -> Result<Recovered> {
        let logs = Arc::new(source.archive.clone());
        self.cloner.recover(&self.site, &target, logs, Arc::new(Quiet), CancellationToken::new()).await
    }

    pub async fn session(&self) -> Session {
        let password = read_password(&self.site.run_dir.join(PASSWORD_FILE)).unwrap();
        let endpoint = Endpoint {
            socket: self.site.run_dir.join(SOCKET_FILE),
            user: ACCOUNT.to_string(),
            password: Some(password),
            run_as: self.site.run_as.clone(),
        };
        Session::open(&endpoint).await.unwrap()
    }

    /// The rows of the ledger; the table without a key must have the same.
    pub async fn rows(&self) -> BTreeSet<u32> {
        let session = self.session().await;
        let ids = async |sql: &str| -> Vec<u32> {
            let rows = session.query(sql).await.unwrap().rows;
            rows.into_iter().map(|row| row[0].clone().unwrap().parse().unwrap()).collect()
        };
        let keyed = ids("SELECT id FROM shop.ledger WHERE note = repeat('x', id % 97) ORDER BY id").await;
        let unkeyed = ids("SELECT id FROM shop.nokey WHERE note = repeat('y', id % 31) ORDER BY id").await;
        assert_eq!(keyed, unkeyed);
        keyed.into_iter().collect()
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.site.run_dir.join("mariadb.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("log of the clone:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
        let data_dir = self.site.data_dir.clone();
        // A test of one thread has no other to wait on.
        let stopped = std::thread::spawn(move || {
            tokio::runtime::Runtime::new().unwrap().block_on(stop_now(&data_dir)).unwrap();
        });
        stopped.join().unwrap();
    }
}

pub fn rows(to: u32) -> BTreeSet<u32> {
    (1..=to).collect()
}

pub fn a_backup_id() -> BackupId {
    BackupId::new(Timestamp::UNIX_EPOCH, 1)
}
