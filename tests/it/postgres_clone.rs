//! Clones of real PostgreSQL servers, without a repository: the base is a copy of the data directory made between
//! `pg_backup_start` and `pg_backup_stop`, the archive a copy of `pg_wal`.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use keiki::engine::postgres::clone::PostgresCloner;
use keiki::engine::postgres::server::stop_now;
use keiki::engine::{CloneEngine, CloneSite, LogSource, Progress, Recovered};
use keiki::error::{Context, Error, Kind, Result};
use keiki::model::backup::{FileKind, FileMeta};
use keiki::model::id::BackupId;
use keiki::model::position::{Lsn, Position};
use keiki::model::target::Target;
use tokio_util::sync::CancellationToken;

use crate::support::postgres::{ServerOptions, TestServer, Version, free_port, server_user, wait_until};

mod accept;
mod replay;

/// A directory of log files.
#[derive(Clone)]
pub struct Archive {
    pub directory: PathBuf,
    /// Cancels a replay when this many segments have been read.
    pub cancel_after: Option<(u64, CancellationToken)>,
    pub reads: Arc<AtomicU64>,
}

#[async_trait]
impl LogSource for Archive {
    async fn available(&self, name: &str) -> Result<Option<u64>> {
        match std::fs::metadata(self.directory.join(name)) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(_) => Ok(None),
        }
    }

    async fn is_sealed(&self, name: &str) -> Result<bool> {
        Ok(self.directory.join(name).exists())
    }

    async fn read(&self, name: &str, from: u64, max_bytes: usize) -> Result<Bytes> {
        let reads = self.reads.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some((limit, token)) = &self.cancel_after
            && reads == *limit
        {
            token.cancel();
        }
        let bytes = std::fs::read(self.directory.join(name)).context(|| format!("cannot read '{name}'"))?;
        let from = usize::try_from(from).unwrap_or(usize::MAX).min(bytes.len());
        let to = from.saturating_add(max_bytes).min(bytes.len());
        Ok(Bytes::copy_from_slice(&bytes[from..to]))
    }
}

/// The last progress that was told.
#[derive(Default)]
pub struct Seen {
    pub done: AtomicU64,
    pub total: AtomicU64,
}

impl Progress for Seen {
    fn set(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    fn note(&self, _text: String) {}
}

/// A source with a ledger, a base and its archive.
pub struct Source {
    pub server: TestServer,
    pub base_dir: PathBuf,
    pub archive: Archive,
    pub start: Lsn,
    pub stop: Lsn,
    pub files: Vec<FileMeta>,
}

impl Source {
    /// A running server with an empty ledger.
    pub fn start(version: Version, settings: &[(&str, &str)]) -> Source {
        let options = ServerOptions::new(version).set("wal_level", "logical").set("wal_keep_size", "1GB");
        let options = options.initdb("--wal-segsize=1");
        let server = settings.iter().fold(options, |options, (name, value)| options.set(name, value)).start();
        server.sql("CREATE TABLE ledger (id int PRIMARY KEY, note text)");
        let archive_dir = server.work_dir.join("archive");
        std::fs::create_dir(&archive_dir).unwrap();
        let base_dir = server.work_dir.join("base");
        let archive = Archive { directory: archive_dir, cancel_after: None, reads: Arc::default() };
        Source { server, base_dir, archive, start: Lsn(0), stop: Lsn(0), files: Vec::new() }
    }

    /// Commits rows `from..=to`, one transaction each.
    pub fn commit_rows(&self, from: u32, to: u32) {
        let rows: String =
            (from..=to).map(|id| format!("INSERT INTO ledger VALUES ({id}, repeat('x', {}));\n", id % 97)).collect();
        self.server.sql(&rows);
    }

    /// Copies the data directory as an online base backup.
    pub fn back_up(&mut self) {
        self.back_up_during(|_| {});
    }

    /// The same, and `work` happens while the backup is under way.
    pub fn back_up_during(&mut self, work: impl FnOnce(&Source)) {
        let server = &self.server;
        let (start_function, stop_function) =
            if server.version.number() >= 15 { ("pg_backup_start", "pg_backup_stop") } else { ("", "") };
        // The session that starts a backup must end it, so psql waits for a file in between.
        let (started, copied) = (server.work_dir.join("started"), server.work_dir.join("copied"));
        let script = format!(
            "SELECT {start_function}('test', true) AS start_at \\gset\n\\o {started}\nSELECT :'start_at';\n\\o\n\
             \\! while ! test -e {copied}; do sleep 0.02; done\n\
             SELECT lsn || '~' || labelfile || '~' || coalesce(spcmapfile, '') FROM {stop_function}(false);\n",
            started = started.display(),
            copied = copied.display(),
        );
        let source: &Source = self;
        let (answer, start, files) = std::thread::scope(|scope| {
            let session = scope.spawn(|| server.sql(&script));
            let text = wait_until("the backup has started", || {
                std::fs::read_to_string(&started).ok().filter(|text| text.contains('/'))
            });
            let _ = std::fs::remove_dir_all(&source.base_dir);
            let files = copy_tree(&server.data_dir, &source.base_dir);
            work(source);
            std::fs::write(&copied, b"").unwrap();
            (session.join().unwrap(), Lsn::parse(text.trim()).unwrap(), files)
        });
        let _ = std::fs::remove_file(&started);
        let _ = std::fs::remove_file(&copied);
        (self.start, self.files) = (start, files);
        let mut parts = answer.splitn(3, '~');
        self.stop = Lsn::parse(parts.next().unwrap()).unwrap();
        let label = parts.next().unwrap().to_string();
        std::fs::write(self.base_dir.join("backup_label"), label).unwrap();
        self.files.push(FileMeta { path: String::from("backup_label"), kind: FileKind::Regular, mode: 0o600 });
        self.archive_log();
    }

    /// Archives what is in `pg_wal` and flushed: whole segments, and of the open one what is there.
    pub fn archive_log(&self) {
        let end = Lsn::parse(&self.server.sql("SELECT pg_current_wal_flush_lsn()")).unwrap();
        self.archive_until(end);
    }

    fn archive_until(&self, end: Lsn) {
        let mut names: Vec<String> = names_in(&self.server.data_dir.join("pg_wal")).into_iter().collect();
        names.retain(|name| name.len() == 24 || name.ends_with(".history"));
        for name in names {
            let bytes = std::fs::read(self.server.data_dir.join("pg_wal").join(&name)).unwrap();
            let keep = match name.strip_suffix(".history") {
                Some(_) => bytes.len(),
                None => {
                    let high = u64::from_str_radix(&name[8..16], 16).unwrap();
                    let low = u64::from_str_radix(&name[16..], 16).unwrap();
                    let start = (high << 32) + (low << 20);
                    usize::try_from(end.0.saturating_sub(start)).unwrap().min(bytes.len())
                }
            };
            if keep > 0 {
                std::fs::write(self.archive.directory.join(name), &bytes[..keep]).unwrap();
            }
        }
    }

    /// The position behind everything that was committed so far.
    pub fn position(&self) -> Lsn {
        Lsn::parse(&self.server.sql("SELECT pg_current_wal_insert_lsn()")).unwrap()
    }

    /// The server's clock.
    pub fn now(&self) -> Timestamp {
        self.server
            .sql("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
            .parse()
            .unwrap()
    }

    /// The facts that a backup would carry.
    fn facts(&self) -> BTreeMap<String, String> {
        let settings = self.server.sql(
            "SELECT name || '=' || current_setting(name) FROM pg_settings \
             WHERE source NOT IN ('default', 'override', 'client', 'session') AND context <> 'internal'",
        );
        let mut facts: BTreeMap<String, String> = settings
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (format!("setting.{name}"), value.to_string()))
            .collect();
        facts.insert(String::from("wal_segment_size"), String::from("1048576"));
        facts.insert(String::from("bootstrap_superuser"), self.server.role.clone());
        facts
    }
}

/// A clone being grown from a source.
pub struct Clone {
    pub site: CloneSite,
    pub cloner: PostgresCloner,
    pub seen: Arc<Seen>,
    _root: tempfile::TempDir,
}

impl Clone {
    /// Stages the base of a source, as a job would: markers last.
    pub async fn stage(source: &Source) -> Clone {
        let root = tempfile::Builder::new().prefix("keiki-clone").tempdir().unwrap();
        std::fs::set_permissions(root.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let (data_dir, run_dir) = (root.path().join("data"), root.path().join("run"));
        std::fs::create_dir(&run_dir).unwrap();
        let version = source.server.version;
        let position = |lsn| Position::Wal { timeline: 1, lsn };
        let site = CloneSite {
            clone_name: String::from("orders-check"),
            data_dir,
            run_dir,
            bin_dir: Some(version.bin_dir()),
            port: free_port(),
            listen_addresses: String::from("127.0.0.1"),
            run_as: server_user().name,
            settings: BTreeMap::new(),
            passwords_for: Default::default(),
            keep_expired: false,
            engine_version: source.server.sql("SHOW server_version").split(' ').next().unwrap().to_string(),
            facts: source.facts(),
            backup_start: position(source.start),
            backup_stop: position(source.stop),
            archive_command: String::from("true"),
        };
        let clone = Clone { site, cloner: PostgresCloner::default(), seen: Arc::default(), _root: root };
        clone.restage(source).await;
        clone
    }

    /// Puts the base into the data directory again.
    pub async fn restage(&self, source: &Source) {
        let _ = std::fs::remove_dir_all(&self.site.data_dir);
        std::fs::create_dir(&self.site.data_dir).unwrap();
        source.server.own(&self.site.data_dir);
        for markers in [false, true] {
            for meta in source.files.iter().filter(|meta| self.cloner.is_marker(&meta.path) == markers) {
                let Some(placed) = self.cloner.place(&self.site, meta).unwrap() else { continue };
                let to = self.site.data_dir.join(&placed.path);
                match placed.kind {
                    FileKind::Directory => std::fs::create_dir_all(&to).unwrap(),
                    FileKind::Regular => {
                        std::fs::copy(source.base_dir.join(&meta.path), &to).unwrap();
                    }
                    FileKind::Link { to: target } => std::os::unix::fs::symlink(target, &to).unwrap(),
                }
                if !to.is_symlink() {
                    std::fs::set_permissions(&to, PermissionsExt::from_mode(placed.mode)).unwrap();
                }
            }
            source.server.own(&self.site.data_dir);
            if !markers {
                self.cloner.prepare(&self.site).await.unwrap();
            }
        }
    }

    pub async fn recover(&self, source: &Source, target: Target) -> Result<Recovered> {
        self.recover_from(source.archive.clone(), target, CancellationToken::new()).await
    }

    pub async fn recover_from(&self, archive: Archive, target: Target, cancel: CancellationToken) -> Result<Recovered> {
        self.cloner.recover(&self.site, &target, Arc::new(archive), self.seen.clone(), cancel).await
    }

    /// The answer of the clone, in quarantine or opened.
    pub async fn sql(&self, source: &Source, sql: &str) -> String {
        self.sql_in(source, "postgres", sql).await
    }

    pub async fn sql_in(&self, source: &Source, database: &str, sql: &str) -> String {
        let mut command = source.server.command("psql");
        let port = self.site.port.to_string();
        command.args(["-h", &self.site.run_dir.display().to_string(), "-p", &port, "-U", &source.server.role]);
        command.args(["-d", database, "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", sql]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_string()
    }

    /// The rows of the ledger.
    pub async fn ledger(&self, source: &Source) -> BTreeSet<u32> {
        let text = self.sql(source, "SELECT id FROM ledger WHERE note = repeat('x', id % 97)").await;
        text.lines().map(|line| line.parse().unwrap()).collect()
    }

    /// The log of the quarantined server.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.site.run_dir.join("postgresql.log")).unwrap_or_default()
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of the clone:\n{}", self.log());
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

pub fn names_in(directory: &Path) -> BTreeSet<String> {
    std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Copies regular files, directories and links, without what a base backup leaves out, and lists them. Files that
/// disappear meanwhile are left out.
fn copy_tree(from: &Path, to: &Path) -> Vec<FileMeta> {
    let mut files = Vec::new();
    copy_below(from, to, "", &mut files);
    files
}

fn copy_below(from: &Path, to: &Path, below: &str, files: &mut Vec<FileMeta>) {
    std::fs::create_dir_all(to).unwrap();
    for name in names_in(from) {
        let path = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
        let (source, copy) = (from.join(&name), to.join(&name));
        let Ok(metadata) = std::fs::symlink_metadata(&source) else { continue };
        let kind = if metadata.is_symlink() {
            FileKind::Link { to: std::fs::read_link(&source).unwrap().display().to_string() }
        } else if metadata.is_dir() {
            FileKind::Directory
        } else {
            FileKind::Regular
        };
        let mode = metadata.permissions().mode() & 0o777;
        files.push(FileMeta { path: path.clone(), kind: kind.clone(), mode });
        let is_emptied = path == "pg_wal" || path == "pg_tblspc_content";
        match kind {
            FileKind::Regular => {
                if std::fs::copy(&source, &copy).is_err() {
                    files.pop();
                }
            }
            _ if is_emptied => std::fs::create_dir_all(&copy).unwrap(),
            // The content of a tablespace follows its link.
            FileKind::Link { .. } | FileKind::Directory => copy_below(&source, &copy, &path, files),
        }
    }
}

/// The error of something that must fail.
pub fn refused<T>(outcome: Result<T>, kind: Kind) -> Error {
    let error = outcome.err().expect("an error");
    assert_eq!(error.kind(), kind, "{error:?}");
    assert!(error.hint_text().is_some(), "{error:?}");
    error
}

pub fn a_backup_id() -> BackupId {
    BackupId::new(Timestamp::UNIX_EPOCH, 1)
}
