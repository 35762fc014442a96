//! A running PostgreSQL as the source of log and backups, on real servers.

use std::collections::BTreeMap;

use keiki::engine::postgres::check_source::archive_statements;
use keiki::engine::postgres::{PostgresEngine, PostgresSource, ShipMode};
use keiki::engine::{Engine, LogListing};
use keiki::error::Kind;
use keiki::model::check::{CheckItem, Verdict};
use keiki::model::log::LogFile;
use keiki::model::position::Position;

use crate::support::postgres::{ServerOptions, TestServer, Version, wait_until};

/// Small segments: a test need not write much to fill some.
const SEGMENT_BYTES: u64 = 1 << 20;

fn small_segments(version: Version) -> ServerOptions {
    ServerOptions::new(version).initdb("--wal-segsize=1")
}

/// A server that archives: `command` decides what becomes of a segment.
fn archiving(version: Version, command: &str) -> TestServer {
    small_segments(version).set("archive_mode", "on").set("archive_command", command).start()
}

fn engine(server: &TestServer, ship: ShipMode) -> PostgresEngine {
    PostgresEngine::new(server.source("orders", ship))
}

fn lsn_of(position: Position) -> u64 {
    position.wal().unwrap().1.0
}

/// All bytes of a range, and the check that reading ends.
async fn read_all(engine: &PostgresEngine, file: &LogFile, from: u64, to: u64) -> keiki::Result<Vec<u8>> {
    let mut reader = engine.open_log(file, from, to).await?;
    let mut bytes = Vec::new();
    loop {
        let piece = reader.read()?;
        assert!(piece.len() <= 1 << 20);
        if piece.is_empty() {
            return Ok(bytes);
        }
        bytes.extend_from_slice(&piece);
    }
}

fn names(listing: &LogListing) -> Vec<&str> {
    listing.files.iter().map(|file| file.name.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_says_who_it_is_and_a_wrong_configuration_is_explained() {
    for version in Version::ALL {
        let mut server = TestServer::start(version, &[]);
        let source = server.source("orders", ShipMode::ArchiveCommand);
        let identity = PostgresEngine::new(source.clone()).identify().await.unwrap();
        assert_eq!(identity.version.split('.').next().unwrap(), version.number().to_string());
        assert_eq!(identity.system_id, server.sql("SELECT system_identifier FROM pg_control_system()"));
        assert_eq!(identity.data_dir, server.data_dir.canonicalize().unwrap());

        // Another cluster's directory, in which a server seems to run.
        let other = TestServer::prepare(version);
        std::fs::write(other.data_dir.join("PG_VERSION"), format!("{}\n", version.number())).unwrap();
        std::fs::write(other.data_dir.join("postmaster.pid"), "1\n").unwrap();
        let wrong = PostgresSource { data_dir: other.data_dir.clone(), ..source.clone() };
        let error = PostgresEngine::new(wrong).identify().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict, "{error:?}");
        assert!(error.message().contains(&server.data_dir.display().to_string()), "{error:?}");

        // A role that the server does not let in.
        let wrong = PostgresSource { user: String::from("stranger"), ..source.clone() };
        let error = PostgresEngine::new(wrong).identify().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Forbidden, "{error:?}");
        assert!(error.hint_text().unwrap().contains("pg_hba.conf"), "{error:?}");

        // A connection that was good and broke comes back by itself.
        let engine = PostgresEngine::new(source.clone());
        engine.identify().await.unwrap();
        // Nothing of ours stays on a server while there is nothing to ask.
        server.wait_for_sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'keiki'", "0");
        engine.identify().await.unwrap();
        server.kill9();
        assert_eq!(engine.identify().await.unwrap_err().kind(), Kind::Unreachable);
        server.launch();
        assert_eq!(engine.identify().await.unwrap(), identity);

        server.stop();
        let error = engine.identify().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unreachable, "{error:?}");
        assert!(error.message().contains("no PostgreSQL server is running"), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_refused_as_a_source() {
    let mut server = TestServer::start(Version::V15, &[]);
    server.stop();
    std::fs::write(server.data_dir.join("standby.signal"), "").unwrap();
    server.own(&server.data_dir);
    server.launch();
    let error = engine(&server, ShipMode::ArchiveCommand).identify().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn under_load_the_log_is_listed_in_order_and_never_beyond_what_is_flushed() {
    for version in Version::ALL {
        // Nothing is acknowledged, so nothing is recycled.
        let server = archiving(version, "false");
        server.pgbench_initialise(1);
        let engine = engine(&server, ShipMode::ArchiveCommand);
        let load = server.pgbench_load(2);
        let mut shipped: Vec<u8> = Vec::new();
        let mut first_name = None;
        let mut after: Option<String> = None;
        let mut open_bytes_done = 0;
        let mut saw_open_file = false;
        let end = wait_until_async("ten segments were filled", async || {
            let listing = engine.list_log(after.as_deref()).await.unwrap();
            let mut sorted = names(&listing);
            sorted.sort();
            assert_eq!(sorted, names(&listing));
            let end = lsn_of(listing.durable_end.position);
            let flushed_now: u64 = server.sql("SELECT (pg_current_wal_flush_lsn() - '0/0')::int8").parse().unwrap();
            assert!(end <= flushed_now);
            for file in &listing.files {
                if first_name.is_none() {
                    first_name = Some(file.name.clone());
                }
                saw_open_file |= !file.sealed;
                let bytes = read_all(&engine, file, open_bytes_done, file.readable_bytes).await.unwrap();
                assert_eq!(bytes.len() as u64, file.readable_bytes - open_bytes_done);
                shipped.extend(bytes);
                if file.sealed {
                    assert_eq!(file.readable_bytes, SEGMENT_BYTES);
                    after = Some(file.name.clone());
                    open_bytes_done = 0;
                } else {
                    open_bytes_done = file.readable_bytes;
                }
            }
            (shipped.len() as u64 > 10 * SEGMENT_BYTES && saw_open_file).then_some(end)
        })
        .await;
        drop(load);
        // What was read in pieces while it was written is what stands in the files now.
        let first = first_name.unwrap();
        let mut files: Vec<_> = std::fs::read_dir(server.data_dir.join("pg_wal"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.len() == 24 && *name >= first)
            .collect();
        files.sort();
        let on_disk: Vec<u8> =
            files.iter().flat_map(|name| std::fs::read(server.data_dir.join("pg_wal").join(name)).unwrap()).collect();
        assert!(on_disk[..shipped.len()] == shipped[..], "the shipped bytes differ from the log");
        assert!(end > 10 * SEGMENT_BYTES);
    }
}

/// [`wait_until`] for work that waits itself.
async fn wait_until_async<T>(what: &str, mut work: impl AsyncFnMut() -> Option<T>) -> T {
    let start = std::time::Instant::now();
    loop {
        if let Some(value) = work().await {
            return value;
        }
        assert!(start.elapsed().as_secs() < 90, "waited in vain until {what}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switched_segment_is_sealed_and_its_summary_tells_commits_and_restore_points() {
    for version in Version::ALL {
        let server = archiving(version, "false");
        let engine = engine(&server, ShipMode::ArchiveCommand);
        let before: String = server.sql("CREATE TABLE t (id int); SELECT pg_walfile_name(pg_switch_wal())");
        let listing = engine.list_log(None).await.unwrap();
        assert!(listing.files.iter().any(|file| file.name == before && file.sealed), "{listing:?} {before}");
        server.sql("INSERT INTO t VALUES (1)");
        let after_commit = server.sql("SELECT pg_current_wal_lsn()");
        let point = server.sql("SELECT pg_create_restore_point('before the drop')");
        let open = server.sql("SELECT pg_walfile_name(pg_switch_wal())");
        let listing = engine.list_log(Some(&before)).await.unwrap();
        let file = listing.files.iter().find(|file| file.name == open).unwrap();
        let mut reader = engine.open_log(file, 0, file.readable_bytes).await.unwrap();
        while !reader.read().unwrap().is_empty() {}
        let summary = reader.summary();
        assert_eq!(summary.named_points.len(), 1, "{summary:?}");
        assert_eq!(summary.named_points[0].0, "before the drop");
        assert_eq!(summary.named_points[0].1.to_string(), format!("1@{point}"));
        // The commit record ends where the log ended when its client was answered.
        assert_eq!(summary.last_commit.unwrap().to_string(), format!("1@{after_commit}"));
        let now = listing.durable_end.observed_at;
        let committed = summary.last_commit_at.unwrap();
        assert!(committed <= now && now.duration_since(committed).as_secs() < 60, "{committed} {now}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_segment_with_the_bytes_of_another_is_refused() {
    let server = archiving(Version::V15, "false");
    let engine = engine(&server, ShipMode::ArchiveCommand);
    let first = server.sql("CREATE TABLE t (id int); SELECT pg_walfile_name(pg_switch_wal())");
    let second = server.sql("INSERT INTO t VALUES (1); SELECT pg_walfile_name(pg_switch_wal())");
    let listing = engine.list_log(None).await.unwrap();
    let file = listing.files.iter().find(|file| file.name == second).unwrap().clone();
    read_all(&engine, &file, 0, file.readable_bytes).await.unwrap();
    // What a recycled file looks like: the bytes of an old segment under a new name.
    let wal = server.data_dir.join("pg_wal");
    std::fs::copy(wal.join(&first), wal.join(&second)).unwrap();
    let outcome = read_all(&engine, &file, 0, file.readable_bytes).await;
    let error = outcome.map(|bytes| bytes.len()).unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged, "{error:?}");
    assert!(error.message().contains(&second), "{error:?}");
    // Replaced while a reader has it open.
    let listing = engine.list_log(None).await.unwrap();
    let file = listing.files.iter().find(|file| file.name == first).unwrap().clone();
    let mut reader = engine.open_log(&file, 0, file.readable_bytes).await.unwrap();
    std::fs::rename(wal.join(&first), wal.join("000000010000000000000FFF")).unwrap();
    assert_eq!(reader.read().unwrap_err().kind(), Kind::Damaged);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_archived_before_is_not_listed_and_a_hole_is_named() {
    let server = archiving(Version::V15, "true");
    let engine = engine(&server, ShipMode::ArchiveCommand);
    let mut segments = Vec::new();
    for id in 0..4 {
        segments.push(server.sql(&format!("CREATE TABLE t{id} (id int); SELECT pg_walfile_name(pg_switch_wal())")));
    }
    server.wait_for_sql("SELECT last_archived_wal FROM pg_stat_archiver", &segments[3]);
    server.sql("CREATE TABLE u (id int)");
    let listing = engine.list_log(None).await.unwrap();
    assert!(!names(&listing).iter().any(|name| segments.iter().any(|done| done == name)), "{listing:?}");
    assert!(!listing.files.is_empty());
    for gone in &segments[1..=2] {
        std::fs::remove_file(server.data_dir.join("pg_wal").join(gone)).unwrap();
    }
    let error = engine.list_log(Some(&segments[0])).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    for gone in &segments[1..=2] {
        assert!(error.message().contains(gone.as_str()), "{error:?}");
    }
    assert_eq!(names(&engine.list_log(Some(&segments[2])).await.unwrap())[0], segments[3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_keeps_the_log_until_it_is_released_and_goes_when_the_instance_goes() {
    for version in Version::ALL {
        let server = small_segments(version)
            .set("max_wal_size", "2MB")
            .set("min_wal_size", "2MB")
            .set("wal_keep_size", "0")
            .start();
        let engine = engine(&server, ShipMode::Slot { limit_bytes: 1 << 30 });
        let first = engine.list_log(None).await.unwrap();
        let begin = first.files[0].name.clone();
        let slots = "SELECT string_agg(slot_name || ' ' || (restart_lsn IS NOT NULL), ',') FROM pg_replication_slots";
        assert_eq!(server.sql(slots), "keiki_orders true");
        for id in 0..6 {
            server.sql(&format!("CREATE TABLE t{id} (id int); SELECT pg_switch_wal()"));
        }
        server.sql("CHECKPOINT");
        let held = engine.list_log(None).await.unwrap();
        assert_eq!(held.files[0].name, begin);
        assert!(held.files.len() >= 7, "{held:?}");
        for file in &held.files {
            read_all(&engine, file, 0, file.readable_bytes).await.unwrap();
        }
        engine.release_log(held.durable_end.position).await.unwrap();
        // Backwards changes nothing.
        engine.release_log(first.durable_end.position).await.unwrap();
        let released = engine.list_log(None).await.unwrap();
        assert!(released.files[0].name > begin, "{released:?}");
        let state = engine.slot_state().await.unwrap().unwrap();
        assert_eq!(state.restart_lsn.unwrap().0, lsn_of(held.durable_end.position));
        // One checkpoint lets the server forget; two, as it may keep the segments since the last one.
        server.sql("CREATE TABLE last (id int); SELECT pg_switch_wal(); CHECKPOINT; CHECKPOINT");
        assert!(!server.data_dir.join("pg_wal").join(&begin).exists());
        engine.detach().await.unwrap();
        engine.detach().await.unwrap();
        assert_eq!(server.sql("SELECT count(*) FROM pg_replication_slots"), "0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_over_its_limit_is_given_up_and_what_is_lost_is_named() {
    let server = small_segments(Version::V15).set("max_wal_size", "2MB").set("min_wal_size", "2MB").start();
    let engine = engine(&server, ShipMode::Slot { limit_bytes: 3 * SEGMENT_BYTES });
    let begin = engine.list_log(None).await.unwrap().files[0].name.clone();
    for id in 0..6 {
        server.sql(&format!("CREATE TABLE t{id} (id int); SELECT pg_switch_wal()"));
    }
    let error = engine.list_log(Some(&begin)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Full, "{error:?}");
    assert_eq!(server.sql("SELECT count(*) FROM pg_replication_slots"), "0");
    server.sql("CHECKPOINT; CHECKPOINT");
    wait_until("the server has forgotten the log", || {
        server.sql("SELECT pg_switch_wal(); CREATE TABLE IF NOT EXISTS x (id int); CHECKPOINT");
        (!server.data_dir.join("pg_wal").join(&begin).exists()).then_some(())
    });
    let error = engine.list_log(Some(&begin)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
    assert!(error.hint_text().unwrap().contains("backup"), "{error:?}");
    // Beginning anew works, with a new slot.
    assert!(!engine.list_log(None).await.unwrap().files.is_empty());
    assert_eq!(server.sql("SELECT slot_name FROM pg_replication_slots"), "keiki_orders");
}

fn verdicts(items: &[CheckItem]) -> BTreeMap<String, Verdict> {
    items.iter().map(|item| (item.what.clone(), item.verdict)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_says_what_to_type_and_is_content_when_it_was_typed() {
    let mut server = TestServer::start(Version::V18, &[("fsync", "on")]);
    let source = PostgresSource {
        archive_command: String::from("/bin/false %p"),
        ..server.source("orders", ShipMode::ArchiveCommand)
    };
    let engine = PostgresEngine::new(source);
    let items = engine.check_source().await.unwrap();
    let found = verdicts(&items);
    assert_eq!((found["archive_mode"], found["archive_command"]), (Verdict::Fail, Verdict::Fail), "{items:?}");
    for what in ["server", "wal_level", "fsync", "full_page_writes", "data checksums", "rights", "data directory"] {
        assert_eq!(found[what], Verdict::Pass, "{what}: {items:?}");
    }
    let hint = items.iter().find(|item| item.what == "archive_mode").unwrap().hint.clone().unwrap();
    assert!(hint.contains("ship = \"slot\""), "{hint}");
    for statement in archive_statements(&engine.source().archive_command) {
        assert!(hint.contains(&statement), "{hint}");
        server.sql(&statement);
    }
    server.restart();
    let items = engine.check_source().await.unwrap();
    assert!(items.iter().all(|item| item.verdict == Verdict::Pass || item.what == "room for log"), "{items:?}");

    // The command of this test always fails, and that is seen.
    server.sql("CREATE TABLE t (id int); SELECT pg_switch_wal()");
    server.wait_for_sql("SELECT failed_count > 0 FROM pg_stat_archiver", "t");
    assert_eq!(verdicts(&engine.check_source().await.unwrap())["archiver"], Verdict::Warn);

    server.sql("ALTER SYSTEM SET archive_command = 'cp %p /somewhere/%f'; SELECT pg_reload_conf()");
    server.wait_for_sql("SHOW archive_command", "cp %p /somewhere/%f");
    let items = engine.check_source().await.unwrap();
    let item = items.iter().find(|item| item.what == "archive_command").unwrap();
    assert_eq!(item.verdict, Verdict::Fail);
    assert!(item.found.contains("'cp %p /somewhere/%f'"), "{item:?}");

    server.stop();
    let items = engine.check_source().await.unwrap();
    assert_eq!(verdicts(&items)["server"], Verdict::Fail, "{items:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_without_rights_is_told_what_to_grant_and_then_it_suffices() {
    let server = TestServer::start(Version::V15, &[("fsync", "off"), ("full_page_writes", "off")]);
    // The role comes in under the name of the operating system's user, through a map.
    server.sql("CREATE ROLE agent LOGIN");
    std::fs::write(server.data_dir.join("pg_ident.conf"), format!("m {} agent\nm {0} {0}\n", server.run_as)).unwrap();
    std::fs::write(server.data_dir.join("pg_hba.conf"), "local all all peer map=m\n").unwrap();
    server.own(&server.data_dir);
    server.sql("SELECT pg_reload_conf()");
    wait_until("the role can log in", || server.try_sql_as("agent", "SELECT 1").is_ok().then_some(()));
    let source = PostgresSource {
        user: String::from("agent"),
        ..server.source("orders", ShipMode::Slot { limit_bytes: 1 << 30 })
    };
    let engine = PostgresEngine::new(source);
    let error = engine.identify().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Forbidden, "{error:?}");
    assert!(error.hint_text().unwrap().contains("pg_read_all_settings"), "{error:?}");
    server.sql("GRANT pg_read_all_settings TO agent");

    let items = engine.check_source().await.unwrap();
    let found = verdicts(&items);
    assert_eq!((found["fsync"], found["full_page_writes"]), (Verdict::Warn, Verdict::Warn));
    assert_eq!((found["rights"], found["replication slot"]), (Verdict::Fail, Verdict::Fail), "{items:?}");
    for item in items.iter().filter(|item| item.verdict == Verdict::Fail) {
        let hint = item.hint.clone().unwrap();
        server.sql(hint.strip_prefix("as a superuser: ").unwrap());
    }
    let items = engine.check_source().await.unwrap();
    assert!(items.iter().all(|item| item.verdict != Verdict::Fail), "{items:?}");
    // And it really suffices.
    assert!(!engine.list_log(None).await.unwrap().files.is_empty());
    assert_eq!(verdicts(&engine.check_source().await.unwrap())["replication slot"], Verdict::Pass);
    engine.detach().await.unwrap();
}
