//! Online base backups of real PostgreSQL servers, taken into memory and proved by starting a server on them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio_util::sync::CancellationToken;

use keiki::engine::postgres::{PostgresEngine, ShipMode};
use keiki::engine::{BaseLane, BaseSink, BaseSpan, Engine};
use keiki::error::{Error, Kind, Result};
use keiki::model::backup::{FileKind, FileMeta};

use crate::support::postgres::{ServerOptions, TestServer, Version, wait_until};

/// A base in memory.
#[derive(Default)]
struct MemorySink {
    files: Mutex<BTreeMap<String, (FileMeta, Vec<u8>)>>,
    expected_bytes: AtomicU64,
    written_bytes: AtomicU64,
    cancelled: AtomicBool,
    /// Called with the number of bytes so far whenever some arrive.
    on_write: Option<Box<dyn Fn(u64) + Send + Sync>>,
    /// Fails when this many bytes have arrived.
    full_at: Option<u64>,
}

struct MemoryLane {
    sink: Arc<MemorySink>,
    open: Option<(FileMeta, Vec<u8>)>,
}

/// What implements the port: lanes need the sink to outlive them.
struct SharedSink(Arc<MemorySink>);

impl BaseSink for SharedSink {
    fn lane(&self) -> Result<Box<dyn BaseLane>> {
        Ok(Box::new(MemoryLane { sink: self.0.clone(), open: None }))
    }

    fn lanes_wanted(&self) -> usize {
        3
    }

    fn expect_bytes(&self, bytes: u64) {
        self.0.expected_bytes.store(bytes, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }
}

impl MemoryLane {
    fn keep(&self, meta: FileMeta, content: Vec<u8>) {
        let path = meta.path.clone();
        let before = self.sink.files.lock().unwrap().insert(path.clone(), (meta, content));
        assert!(before.is_none(), "'{path}' was given twice");
    }
}

impl BaseLane for MemoryLane {
    fn begin(&mut self, meta: FileMeta) -> Result<()> {
        assert!(self.open.is_none(), "'{}' begins within another file", meta.path);
        match meta.kind {
            FileKind::Regular => self.open = Some((meta, Vec::new())),
            _ => self.keep(meta, Vec::new()),
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.open.as_mut().expect("an open file").1.extend_from_slice(bytes);
        let sum = self.sink.written_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        if let Some(on_write) = &self.sink.on_write {
            on_write(sum);
        }
        match self.sink.full_at {
            Some(limit) if sum >= limit => Err(Error::new(Kind::Full, "the sink is full")),
            _ => Ok(()),
        }
    }

    fn end(&mut self) -> Result<()> {
        let (meta, content) = self.open.take().expect("an open file");
        self.keep(meta, content);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        assert!(self.open.is_none());
        Ok(())
    }
}

impl MemorySink {
    fn content(&self, path: &str) -> Option<Vec<u8>> {
        self.files.lock().unwrap().get(path).map(|(_, content)| content.clone())
    }

    fn paths(&self) -> Vec<String> {
        self.files.lock().unwrap().keys().cloned().collect()
    }

    /// Writes the base into a directory, tablespaces into directories of their own beside it.
    fn write_to(&self, data_dir: &Path, tablespaces: &Path) {
        for (path, (meta, content)) in self.files.lock().unwrap().iter() {
            let place = data_dir.join(path);
            match &meta.kind {
                FileKind::Directory => std::fs::create_dir_all(&place).unwrap(),
                FileKind::Link { .. } => {
                    let target = tablespaces.join(place.file_name().unwrap());
                    std::fs::create_dir_all(&target).unwrap();
                    std::os::unix::fs::symlink(&target, &place).unwrap();
                }
                FileKind::Regular => {
                    // A database that was made during the backup may have files without having been listed.
                    std::fs::create_dir_all(place.parent().unwrap()).unwrap();
                    std::fs::write(&place, content).unwrap();
                }
            }
        }
    }
}

fn engine(server: &TestServer) -> PostgresEngine {
    PostgresEngine::new(server.source("orders", ShipMode::ArchiveCommand))
}

async fn back_up(server: &TestServer, sink: Arc<MemorySink>, cancel: CancellationToken) -> Result<BaseSpan> {
    engine(server).back_up("keiki 'test'", Arc::new(SharedSink(sink)), cancel).await
}

/// Makes the base a running server: with the log of the source in `pg_wal`, it recovers to the end of that log.
fn start_on(sink: &MemorySink, source: &TestServer) -> TestServer {
    let mut copy = TestServer::prepare(source.version);
    let tablespaces = copy.work_dir.join("tablespaces");
    sink.write_to(&copy.data_dir, &tablespaces);
    for entry in std::fs::read_dir(source.data_dir.join("pg_wal")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), copy.data_dir.join("pg_wal").join(entry.file_name())).unwrap();
        }
    }
    // The links are the copy's own: with a map the server would make those of the source.
    let _ = std::fs::remove_file(copy.data_dir.join("tablespace_map"));
    copy.append_settings(&[(String::from("archive_mode"), String::from("off"))]);
    copy.own(&copy.data_dir);
    copy.own(&copy.work_dir);
    copy.launch();
    copy
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_becomes_a_server_with_every_row_that_was_committed() {
    for version in Version::ALL {
        let server = ServerOptions::new(version)
            .initdb("--wal-segsize=1")
            .set("archive_mode", "on")
            .set("archive_command", "false")
            .set("max_connections", "33")
            .start();
        let space = server.work_dir.join("space");
        std::fs::create_dir(&space).unwrap();
        server.own(&space);
        server.sql(&format!("CREATE TABLESPACE space LOCATION '{}'", space.display()));
        server.sql(
            "CREATE TABLE elsewhere (id int) TABLESPACE space; INSERT INTO elsewhere SELECT generate_series(1, 5000); \
             CREATE UNLOGGED TABLE unlogged (id int); INSERT INTO unlogged SELECT generate_series(1, 5000); \
             CREATE DATABASE other; CHECKPOINT",
        );
        let unlogged = server.sql("SELECT pg_relation_filepath('unlogged')");
        let elsewhere = server.sql("SELECT pg_relation_filepath('elsewhere')");
        server.pgbench_initialise(2);
        let load = server.pgbench_load(2);
        let sink = Arc::new(MemorySink::default());
        let span = back_up(&server, sink.clone(), CancellationToken::new()).await.unwrap();
        server.sql("CREATE TABLE after_backup AS SELECT 'here' AS word");
        drop(load);
        assert_eq!(span.damaged_blocks, Vec::<String>::new());

        // The label is the server's own, and says what the span says.
        let label = String::from_utf8(sink.content("backup_label").unwrap()).unwrap();
        let (start, stop) = (span.start.wal().unwrap(), span.stop.wal().unwrap());
        assert!(label.starts_with(&format!("START WAL LOCATION: {} (file ", start.1)), "{label}");
        assert!(label.ends_with("\n") && label.contains("LABEL: keiki 'test'\nSTART TIMELINE: 1\n"), "{label}");
        assert!(start.1 < stop.1 && span.began_at < span.ended_at);
        let history = server.sql(
            "SELECT pg_read_file('pg_wal/' || name) FROM pg_ls_waldir() WHERE name LIKE '%.backup' ORDER BY name DESC LIMIT 1",
        );
        assert!(history.contains(&format!("STOP WAL LOCATION: {} (file ", stop.1)), "{history} {stop:?}");

        // What is in it and what is not.
        let paths = sink.paths();
        let oid = server.sql("SELECT oid FROM pg_tablespace WHERE spcname = 'space'");
        assert!(paths.contains(&elsewhere), "{elsewhere} {paths:?}");
        assert!(elsewhere.starts_with(&format!("pg_tblspc/{oid}/PG_{}_", version.number())));
        assert!(paths.contains(&format!("{unlogged}_init")) && !paths.contains(&unlogged));
        assert_eq!(
            String::from_utf8(sink.content("tablespace_map").unwrap()).unwrap(),
            format!("{oid} {}\n", space.display())
        );
        assert!(matches!(&sink.files.lock().unwrap()[&format!("pg_tblspc/{oid}")].0.kind,
            FileKind::Link { to } if *to == space.display().to_string()));
        for path in &paths {
            let left_out = ["postmaster.pid", "postmaster.opts", "pg_wal/", "pg_replslot/", "pg_notify/"];
            assert!(!left_out.iter().any(|prefix| path.starts_with(prefix)), "{path}");
        }
        for directory in ["pg_wal", "pg_replslot", "pg_notify", "pg_subtrans", "pg_stat_tmp"] {
            assert!(paths.iter().any(|path| path == directory), "{directory} {paths:?}");
        }
        let (written, expected) =
            (sink.written_bytes.load(Ordering::Relaxed), sink.expected_bytes.load(Ordering::Relaxed));
        assert!(expected > 20 << 20 && written.abs_diff(expected) < expected / 2, "{written} of {expected}");
        check_facts(&span, &server, &oid);

        // And it is a database.
        let rows = "SELECT (SELECT count(*) FROM pgbench_history) || ' ' || (SELECT sum(abalance) FROM pgbench_accounts) \
                    || ' ' || (SELECT sum(delta) FROM pgbench_history) || ' ' || (SELECT count(*) FROM elsewhere) \
                    || ' ' || (SELECT word FROM after_backup)";
        let wanted = server.sql(rows);
        let copy = start_on(&sink, &server);
        assert_eq!(copy.sql(rows), wanted);
        assert_eq!(copy.sql("SELECT count(*) FROM unlogged"), "0");
        assert_eq!(copy.sql_in("other", "SELECT 1"), "1");
        drop(server);
        copy.must_run(
            "pg_amcheck",
            &[
                "-h",
                &copy.socket_dir.display().to_string(),
                "-p",
                &copy.port.to_string(),
                "--install-missing",
                "postgres",
            ],
        );
    }
}

fn check_facts(span: &BaseSpan, server: &TestServer, tablespace: &str) {
    let fact = |key: &str| span.facts.get(key).cloned().unwrap_or_else(|| panic!("no fact '{key}': {:?}", span.facts));
    assert_eq!(fact("version_num"), server.sql("SHOW server_version_num"));
    assert_eq!(fact("system_id"), server.sql("SELECT system_identifier FROM pg_control_system()"));
    assert_eq!(fact("wal_segment_size"), "1048576");
    assert_eq!(
        (fact("block_size"), fact("data_checksums"), fact("timeline")),
        ("8192".into(), "on".into(), "1".into())
    );
    assert_eq!(fact("setting.max_connections"), "33");
    assert_eq!(fact("setting.max_prepared_transactions"), "0");
    assert_eq!(fact("setting.archive_command"), "false");
    assert_eq!(fact("setting_file.archive_command"), server.data_dir.join("postgresql.conf").display().to_string());
    assert_eq!(fact("setting.port"), server.port.to_string());
    // Our session's own settings are not the server's.
    for key in ["setting.search_path", "setting.application_name", "setting.statement_timeout"] {
        assert!(!span.facts.contains_key(key), "{key}");
    }
    assert_eq!(fact(&format!("tablespace.{tablespace}")), server.work_dir.join("space").display().to_string());
    assert!(fact("extensions.other").contains("plpgsql 1.0"));
    assert!(fact("database.postgres").contains("collate=C"));
    assert!(fact("libraries").contains("$libdir/plpgsql"));
    assert_eq!(fact("hba_file"), server.data_dir.join("pg_hba.conf").display().to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn configuration_outside_the_data_directory_is_part_of_the_backup() {
    let mut server = TestServer::start(Version::V15, &[]);
    server.stop();
    let (outside, hba) = (server.work_dir.join("conf.d"), server.work_dir.join("pg_hba.conf"));
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("memory.conf"), "work_mem = '7MB'\n").unwrap();
    std::fs::copy(server.data_dir.join("pg_hba.conf"), &hba).unwrap();
    server.own(&server.work_dir);
    server.append_settings(&[
        (String::from("include_dir"), outside.display().to_string()),
        (String::from("hba_file"), hba.display().to_string()),
        (String::from("search_path"), String::from("orders, public")),
    ]);
    server.launch();
    let sink = Arc::new(MemorySink::default());
    let span = back_up(&server, sink.clone(), CancellationToken::new()).await.unwrap();
    let stored = |path: &Path| sink.content(&format!("keiki_source_config{}", path.display()));
    assert_eq!(stored(&outside.join("memory.conf")).unwrap(), b"work_mem = '7MB'\n");
    assert_eq!(stored(&hba).unwrap(), std::fs::read(&hba).unwrap());
    assert!(stored(&server.data_dir.join("postgresql.conf")).is_none());
    assert_eq!(span.facts["setting.work_mem"], "7MB");
    assert_eq!(span.facts["setting.search_path"], "orders, public");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_with_wrong_bytes_on_disk_is_reported_and_the_backup_goes_on() {
    for version in Version::ALL {
        let mut server = TestServer::start(version, &[]);
        server.sql("CREATE TABLE t AS SELECT generate_series(1, 5000) AS id");
        let path = server.sql("SELECT pg_relation_filepath('t')");
        server.stop();
        let place = server.data_dir.join(&path);
        let mut content = std::fs::read(&place).unwrap();
        for byte in &mut content[2 * 8192 + 4000..2 * 8192 + 4010] {
            *byte ^= 0x55;
        }
        std::fs::write(&place, &content).unwrap();
        server.launch();
        let sink = Arc::new(MemorySink::default());
        let span = back_up(&server, sink.clone(), CancellationToken::new()).await.unwrap();
        assert_eq!(span.damaged_blocks.len(), 1, "{:?}", span.damaged_blocks);
        assert!(
            span.damaged_blocks[0].starts_with(&format!("{path} block 2: checksum is ")),
            "{:?}",
            span.damaged_blocks
        );
        assert_eq!(sink.content(&path).unwrap(), content);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_cancelled_or_cannot_be_stored_leaves_the_server_without_one() {
    let server = TestServer::start(Version::V15, &[]);
    server.pgbench_initialise(2);
    let in_backup = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'keiki'";

    let cancel = CancellationToken::new();
    let token = cancel.clone();
    let on_write: Box<dyn Fn(u64) + Send + Sync> = Box::new(move |bytes| {
        if bytes > 1 << 20 {
            token.cancel();
            // The readers wait until the cancellation has reached them.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    });
    let sink = Arc::new(MemorySink { on_write: Some(on_write), ..MemorySink::default() });
    let error = back_up(&server, sink.clone(), cancel).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Cancelled, "{error:?}");
    assert!(sink.content("backup_label").is_none() && sink.content("global/pg_control").is_none());
    server.wait_for_sql(in_backup, "0");

    let sink = Arc::new(MemorySink { full_at: Some(2 << 20), ..MemorySink::default() });
    let error = back_up(&server, sink, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Full, "{error:?}");
    server.wait_for_sql(in_backup, "0");
    // Both were ended and not broken off.
    assert!(!server.log_text().contains("aborting backup"), "{}", server.log_text());
    back_up(&server, Arc::new(MemorySink::default()), CancellationToken::new()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_session_is_lost_fails() {
    let server = Arc::new(TestServer::start(Version::V15, &[]));
    server.pgbench_initialise(1);
    // Not before the copy runs: the backup has begun, and its session waits.
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'keiki' \
               AND state = 'idle' AND query LIKE 'SELECT 1%'";
    let (sender, killed) = std::sync::mpsc::channel::<()>();
    let killed = Mutex::new(Some(killed));
    let on_write: Box<dyn Fn(u64) + Send + Sync> = Box::new(move |bytes| {
        if bytes > 1 << 20
            && let Some(killed) = killed.lock().unwrap().take()
        {
            // Holds the copy up until the session is gone.
            killed.recv().unwrap();
        }
    });
    let sink = Arc::new(MemorySink { on_write: Some(on_write), ..MemorySink::default() });
    let killer = std::thread::spawn({
        let server = server.clone();
        move || {
            wait_until("the session of the backup is gone", || (server.sql(sql) == "t").then_some(()));
            sender.send(()).unwrap();
        }
    });
    let outcome = back_up(&server, sink.clone(), CancellationToken::new()).await;
    killer.join().unwrap();
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), Kind::Unreachable, "{error:?}");
    assert!(sink.content("backup_label").is_none());
}
