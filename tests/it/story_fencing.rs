//! Fencing: neither a copy that was started by hand, nor a second agent, nor an accepted clone ever changes an object
//! of the source's archive, and each says why it stopped.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::support::hosts::{Host, free_port, tail, wait_for};
use super::support::postgres::{TestServer, Version};
use super::support::two_hosts::{
    SOON, Ship, TwoHosts, Via, contents, copy_data_dir, settled_objects, sql_at, wait_until_shipped, wait_until_state,
};

#[test]
fn a_copy_started_by_hand_with_the_source_s_settings_cannot_archive_and_is_told_why() {
    let mut stage = TwoHosts::start(Ship::ArchiveCommand, Via::Peer);
    stage.source.sql("CREATE TABLE t AS SELECT 1 AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let incarnation = stage.incarnation_dir(&stage.a, "orders");
    stage.source.stop();
    let archive = settled_objects(&incarnation);

    let mut copy = TestServer::prepare(Version::V15);
    copy_data_dir(&stage.source, &copy);
    copy.launch();
    assert!(copy.sql("SHOW archive_command").contains("wal-push"), "the copy does not have the source's settings");
    let archived = copy.sql("SELECT archived_count FROM pg_stat_archiver");
    for i in 0..3 {
        copy.sql(&format!("INSERT INTO t VALUES (100 + {i})"));
        copy.sql("SELECT pg_switch_wal()");
    }
    copy.wait_for_sql("SELECT failed_count > 0 FROM pg_stat_archiver", "t");
    assert_eq!(copy.sql("SELECT archived_count FROM pg_stat_archiver"), archived, "the copy could archive");
    // The reason stands where the administrator of the copy looks: in its own log.
    let said = copy.log_text();
    assert!(
        said.contains(&format!("no instance of this host has data directory '{}'", copy.data_dir.display())),
        "{said}"
    );
    assert!(said.contains("hint:"), "{said}");
    assert_eq!(settled_objects(&incarnation), archive, "the copy changed the archive");

    // The source itself is not disturbed, though the copy runs.
    stage.source.launch();
    stage.source.sql("INSERT INTO t VALUES (2)");
    stage.source.sql("SELECT pg_switch_wal()");
    stage.wait_until_shipped();
    assert_unchanged(&archive, &settled_objects(&incarnation));
    stage.assert_latest_is_exact("check");
}

/// Whole log files, backups and packs stay as they are, whatever comes after them.
fn assert_unchanged(before: &BTreeMap<PathBuf, blake3::Hash>, after: &BTreeMap<PathBuf, blake3::Hash>) {
    let is_chunk = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        path.components().any(|part| part.as_os_str() == "log") && name != "sealed"
    };
    let lasting: Vec<_> = before.iter().filter(|(path, _)| !is_chunk(path)).collect();
    assert!(lasting.len() > 3, "{before:?}");
    for (path, hash) in lasting {
        assert_eq!(after.get(path), Some(hash), "'{}' changed", path.display());
    }
}

#[test]
fn a_second_agent_with_a_copy_of_the_state_archives_nothing_and_names_the_first() {
    let stage = TwoHosts::start(Ship::ArchiveCommand, Via::Peer);
    stage.source.sql("CREATE TABLE t AS SELECT 1 AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.wait_until_shipped();
    let incarnation = stage.incarnation_dir(&stage.a, "orders");
    let archive = settled_objects(&incarnation);

    let twin = Host::start_twin(&stage.lab, &stage.a, "twin", free_port());
    wait_until_state(&twin, "orders", "stopped");
    let refused = twin.instance("orders");
    let holder = format!("process {}", stage.a.agent_process_id());
    let message = refused["problem"]["message"].as_str().unwrap();
    assert_eq!(refused["problem"]["error"], "fenced", "{refused:#}");
    assert!(message.contains(&holder) && message.contains("host 'a'"), "{message}");
    assert!(refused["problem"]["hint"].as_str().is_some_and(|hint| hint.contains("second agent")), "{refused:#}");
    assert!(twin.log().contains(&holder), "the log of the second agent does not say why: {}", tail(&twin.log(), 20));

    // Orders to the second agent change nothing either.
    twin.keiki_fails(&["backup", "create", "orders"]);
    for i in 0..3 {
        stage.source.sql(&format!("INSERT INTO t VALUES ({i})"));
        stage.source.sql("SELECT pg_switch_wal()");
    }
    stage.wait_until_shipped();
    assert_unchanged(&archive, &settled_objects(&incarnation));
    assert_eq!(stage.source.sql("SELECT failed_count FROM pg_stat_archiver"), "0");
    stage.assert_latest_is_exact("check");
}

#[test]
fn an_accepted_clone_beside_its_source_archives_into_its_own_incarnation_only() {
    let mut stage = TwoHosts::start(Ship::ArchiveCommand, Via::Peer);
    stage.source.sql("CREATE TABLE t AS SELECT i FROM generate_series(1, 1000) AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let port = free_port();
    // What was committed a moment ago is part of latest, on the source's own host, too.
    stage.source.sql("INSERT INTO t VALUES (0)");
    stage.a.keiki_ok(&["clone", "orders", "--to", "a", "--as", "copy", "--port", &port.to_string(), "--latest"]);
    assert_eq!(contents(&stage.source, port), contents(&stage.source, stage.source.port));
    wait_until_state(&stage.a, "copy", "archiving");
    let (of_source, of_clone) = (stage.incarnation_dir(&stage.a, "orders"), stage.incarnation_dir(&stage.a, "copy"));
    assert_ne!(of_source, of_clone, "the clone archives into its source's incarnation");

    // With the source at rest, whatever changes below its incarnation comes from the clone.
    stage.source.kill9();
    let archive = settled_objects(&of_source);
    for i in 0..5 {
        sql_at(&stage.source, port, &format!("INSERT INTO t SELECT i FROM generate_series(1, 5000 + {i}) AS i"));
        sql_at(&stage.source, port, "SELECT pg_switch_wal()");
    }
    let count = "SELECT archived_count >= 5 FROM pg_stat_archiver";
    wait_for("the clone's segments to be archived", SOON, || sql_at(&stage.source, port, count) == "t");
    wait_until_shipped(&stage.a, "copy");
    assert_eq!(sql_at(&stage.source, port, "SELECT failed_count FROM pg_stat_archiver"), "0");
    assert_eq!(settled_objects(&of_source), archive, "the clone changed its source's archive");

    // Both go on, each for itself.
    stage.source.launch();
    stage.source.sql("INSERT INTO t VALUES (-1)");
    stage.source.sql("SELECT pg_switch_wal()");
    stage.wait_until_shipped();
    stage.assert_latest_is_exact("check");
    stage.a.keiki_ok(&["discard", "copy", "--yes"]);
    assert_unchanged(&archive, &settled_objects(&of_source));
}

#[test]
fn a_data_directory_that_was_replaced_is_not_archived_as_the_old_one() {
    put_back_and_assert_stopped(true, "fenced");
}

#[test]
fn a_data_directory_whose_content_was_put_back_cannot_overwrite_what_it_archived_before() {
    put_back_and_assert_stopped(false, "conflict");
}

/// Somebody puts an old copy of the data directory back, beneath everything that knows of it, and the server writes
/// another history into segments of the same names.
fn put_back_and_assert_stopped(is_new_directory: bool, expected: &str) {
    let mut stage = TwoHosts::start(Ship::ArchiveCommand, Via::Peer);
    stage.source.sql("CREATE TABLE t AS SELECT 1 AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.stop();
    let kept = TestServer::prepare(Version::V15);
    copy_data_dir(&stage.source, &kept);
    stage.source.launch();
    write_segments(&stage.source, 10);
    stage.wait_until_shipped();
    let incarnation = stage.incarnation_dir(&stage.a, "orders");
    stage.source.stop();
    stage.a.stop_agent();
    let archive = settled_objects(&incarnation);

    let data_dir = &stage.source.data_dir;
    if is_new_directory {
        std::fs::rename(data_dir, data_dir.with_extension("old")).unwrap();
        std::fs::create_dir(data_dir).unwrap();
        std::fs::set_permissions(data_dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    } else {
        for entry in std::fs::read_dir(data_dir).unwrap() {
            let path = entry.unwrap().path();
            let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            removed.unwrap();
        }
    }
    copy_data_dir(&kept, &stage.source);
    stage.source.launch();
    let archived = stage.source.sql("SELECT archived_count FROM pg_stat_archiver");
    stage.a.start_agent();
    write_segments(&stage.source, 20);
    stage.source.wait_for_sql("SELECT failed_count > 0 FROM pg_stat_archiver", "t");
    wait_until_state(&stage.a, "orders", "stopped");
    let stopped = stage.a.instance("orders");
    assert_eq!(stopped["problem"]["error"], expected, "{stopped:#}");
    assert!(stopped["problem"]["hint"].as_str().is_some(), "{stopped:#}");
    let now = stage.source.sql("SELECT archived_count FROM pg_stat_archiver");
    assert_eq!(now, archived, "other bytes were acknowledged");
    assert_unchanged(&archive, &settled_objects(&incarnation));
}

/// Three segments with a row each.
fn write_segments(server: &TestServer, first: u32) {
    for i in first..first + 3 {
        server.sql(&format!("INSERT INTO t VALUES ({i})"));
        server.sql("SELECT pg_switch_wal()");
    }
}
