//! Fencing: neither a copy that was started elsewhere, nor a second agent, nor an accepted clone ever changes an object
//! of the source's archive, and each says why it stopped.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use keiki::base::clock::SystemClock;
use keiki::model::id::{IncarnationId, RunId};
use keiki::model::incarnation::LeaseHolder;
use keiki::repo::lease::{LeaseKeeper, read_lease};
use keiki::repo::repository::Repository;
use keiki::store::fs::FsStore;

use super::support::hosts::{Host, free_port, tail};
use super::support::matrix::{SourceServer, copy_tree, on_every_engine};
use super::support::postgres::{TestServer, Version};
use super::support::two_hosts::{
    Ship, TwoHosts, Via, copy_data_dir, difference, lasting_objects, settled_objects, wait_until_shipped,
    wait_until_state,
};

on_every_engine![
    a_data_directory_copied_elsewhere_with_its_agent_s_state_archives_nothing,
    a_second_agent_with_a_copy_of_the_state_archives_nothing_and_names_the_first,
    an_agent_whose_lease_was_taken_stops_and_names_who_has_it,
    an_accepted_clone_beside_its_source_archives_into_its_own_incarnation_only,
    a_data_directory_that_was_replaced_is_not_archived_as_the_old_one,
    a_data_directory_whose_content_was_put_back_cannot_overwrite_what_it_archived_before,
    a_data_directory_that_was_put_back_and_went_on_past_its_archive_is_not_taken_for_its_sequel,
];

/// Ends a few log files, with a change in each.
fn write_log_files<S: SourceServer>(server: &S, first: u32, count: u32) {
    for number in first..first + count {
        server.write(number);
        server.end_log_file();
    }
}

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
    write_log_files(&copy, 100, 3);
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
    write_log_files(&stage.source, 2, 1);
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
    assert!(lasting.len() >= 3, "{before:?}");
    for (path, hash) in lasting {
        assert_eq!(after.get(path), Some(hash), "'{}' changed", path.display());
    }
}

fn a_data_directory_copied_elsewhere_with_its_agent_s_state_archives_nothing<S: SourceServer>() {
    let mut stage = TwoHosts::<S>::of(Via::Directory);
    stage.source.write(1);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    write_log_files(&stage.source, 2, 2);
    stage.wait_until_shipped();
    let incarnation = stage.incarnation_dir(&stage.a, "orders");
    stage.source.stop();
    stage.a.stop_agent();
    let archive = lasting_objects(&incarnation);

    // All of a host is copied to another one, which believes to be the first; nobody holds the lease.
    let mut copy = stage.source.copy();
    copy.launch();
    let (old, new) = (stage.source.instance_section("orders"), copy.instance_section("orders"));
    let moved = |text: String| {
        assert!(text.contains(&old), "{text}");
        text.replace(&old, &new)
    };
    let twin = Host::start_twin_with(&stage.lab, &stage.a, "elsewhere", free_port(), moved);
    wait_until_state(&twin, "orders", "stopped");
    let refused = twin.instance("orders");
    assert_eq!(refused["problem"]["error"], "fenced", "{refused:#}");
    let message = refused["problem"]["message"].as_str().unwrap();
    assert!(message.contains(copy.data_dir().to_str().unwrap()), "it does not say which directory: {message}");
    assert!(refused["problem"]["hint"].as_str().is_some_and(|hint| hint.contains("copied")), "{refused:#}");
    write_log_files(&copy, 100, 3);
    twin.keiki_fails(&["backup", "create", "orders"]);
    assert_eq!(settled_objects(&incarnation), archive, "the copy changed the archive");

    // The first one comes back and goes on, though the copy still runs.
    stage.source.launch();
    stage.a.start_agent();
    stage.wait_until_archiving();
    write_log_files(&stage.source, 200, 2);
    stage.assert_latest_is_exact("check");
    assert_unchanged(&archive, &settled_objects(&incarnation));
    assert_eq!(twin.instance("orders")["state"], "stopped");
}

fn a_second_agent_with_a_copy_of_the_state_archives_nothing_and_names_the_first<S: SourceServer>() {
    let stage = TwoHosts::<S>::of(Via::Peer);
    stage.source.write(1);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.wait_until_shipped();
    let incarnation = stage.incarnation_dir(&stage.a, "orders");
    let archive = settled_objects(&incarnation);
    let facts = stage.source.facts();

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
    write_log_files(&stage.source, 2, 3);
    stage.wait_until_shipped();
    assert_unchanged(&archive, &settled_objects(&incarnation));
    assert_same_server::<S>(&facts, &stage.source.facts());
    stage.assert_latest_is_exact("check");
}

/// Nothing about the server changed but what the test itself did to it.
fn assert_same_server<S: SourceServer>(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) {
    for (name, value) in before.iter().filter(|(name, _)| !S::is_counter(name)) {
        assert_eq!(after.get(name), Some(value), "'{name}' of the source changed");
    }
}

fn an_agent_whose_lease_was_taken_stops_and_names_who_has_it<S: SourceServer>() {
    let stage = TwoHosts::<S>::of(Via::Peer);
    stage.source.write(1);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.wait_until_shipped();
    let dir = stage.incarnation_dir(&stage.a, "orders");
    take_lease(&stage.repository, dir.file_name().unwrap().to_str().unwrap());

    // It finds out when it next says how far it is.
    write_log_files(&stage.source, 2, 1);
    wait_until_state_within(&stage.a, "orders", "stopped", Duration::from_secs(180));
    let stopped = stage.a.instance("orders");
    assert_eq!(stopped["problem"]["error"], "fenced", "{stopped:#}");
    let message = stopped["problem"]["message"].as_str().unwrap();
    assert!(message.contains("host 'elsewhere'"), "{message}");
    let archive = settled_objects(&dir);
    write_log_files(&stage.source, 10, 3);
    stage.a.keiki_fails(&["backup", "create", "orders"]);
    assert_eq!(settled_objects(&dir), archive, "it went on without the lease");
}

fn wait_until_state_within(host: &Host, instance: &str, state: &str, limit: Duration) {
    super::support::hosts::wait_for(&format!("'{instance}' to be '{state}'"), limit, || {
        host.instance(instance)["state"] == state
    });
}

/// Takes the lease of an incarnation as an agent does that takes the first one for dead.
fn take_lease(repository: &std::path::Path, incarnation: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (clock, ttl) = (Arc::new(SystemClock), Duration::from_secs(180));
    runtime.block_on(async {
        let repo = Repository::open(Arc::new(FsStore::open(repository).unwrap())).await.unwrap();
        let incarnation = IncarnationId::parse(incarnation).unwrap();
        let holder = read_lease(&repo, incarnation).await.unwrap().unwrap().holder;
        // As if it were known that the first one is dead, which it is not.
        let me = LeaseHolder { host: "elsewhere".into(), run: RunId::fresh(), process_id: 1, ..holder };
        LeaseKeeper::acquire(repo, incarnation, me, clock, ttl, |_| false).await.unwrap();
    });
}

fn an_accepted_clone_beside_its_source_archives_into_its_own_incarnation_only<S: SourceServer>() {
    let mut stage = TwoHosts::<S>::of(Via::Peer);
    stage.source.fill(1);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let port = free_port();
    // What was committed a moment ago is part of latest, on the source's own host, too.
    stage.source.write(1);
    stage.a.keiki_ok(&["clone", "orders", "--to", "a", "--as", "copy", "--port", &port.to_string(), "--latest"]);
    let mut clone = stage.clone_at("copy", port);
    (clone.data_dir, clone.run_dir) = (stage.lab.path("clones-a/copy"), stage.lab.path("clones-a/copy.run"));
    assert_eq!(difference(&stage.source.contents_of(&clone), &stage.source.contents()), Vec::<String>::new());
    wait_until_state(&stage.a, "copy", "archiving");
    let (of_source, of_clone) = (stage.incarnation_dir(&stage.a, "orders"), stage.incarnation_dir(&stage.a, "copy"));
    assert_ne!(of_source, of_clone, "the clone archives into its source's incarnation");

    // With the source at rest, whatever changes below its incarnation comes from the clone.
    match S::KEEPS_DATA_WHEN_KILLED {
        true => stage.source.kill9(),
        false => stage.source.stop(),
    }
    let of_clone_before = settled_objects(&of_clone);
    let archive = lasting_objects(&of_source);
    stage.source.write_to(&clone);
    for _ in 0..5 {
        stage.source.end_log_file_of(&clone);
    }
    wait_until_shipped(&stage.a, "copy");
    let of_clone_after = settled_objects(&of_clone);
    assert_ne!(of_clone_after, of_clone_before, "the clone archives nothing");
    assert_eq!(lasting_objects(&of_source), archive, "the clone changed its source's archive");

    // Both go on, each for itself.
    stage.source.launch();
    write_log_files(&stage.source, 2, 1);
    stage.assert_latest_is_exact("check");
    stage.a.keiki_ok(&["discard", "copy", "--yes"]);
    assert_unchanged(&archive, &settled_objects(&of_source));
}

fn a_data_directory_that_was_replaced_is_not_archived_as_the_old_one<S: SourceServer>() {
    put_back_and_assert_stopped::<S>(true, 1, &["fenced"]);
}

fn a_data_directory_whose_content_was_put_back_cannot_overwrite_what_it_archived_before<S: SourceServer>() {
    put_back_and_assert_stopped::<S>(false, 1, &["conflict"]);
}

fn a_data_directory_that_was_put_back_and_went_on_past_its_archive_is_not_taken_for_its_sequel<S: SourceServer>() {
    put_back_and_assert_stopped::<S>(false, 6, &["conflict"]);
}

/// Of PostgreSQL the end of an open file may be half a record, which it writes over after a crash: there a finished file
/// tells.
mod of_whole_records {
    use super::*;

    super::super::support::matrix::on_engines! {
        [mariadb MariaServer] [mysql MySqlServer] [redis RedisServer] [valkey ValkeyServer]
        [redis_stream RedisStreamServer] : [a_data_directory_that_was_put_back_cannot_go_on_with_the_open_file_that_it_archived_before]
    }
}

/// The other history has records of the same lengths in a file of the same name, and no file was finished since.
fn a_data_directory_that_was_put_back_cannot_go_on_with_the_open_file_that_it_archived_before<S: SourceServer>() {
    let mut stage = TwoHosts::<S>::of(Via::Peer);
    stage.source.write(10);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.stop();
    let kept = stage.source.copy();
    stage.source.launch();
    stage.source.write(11);
    stage.a.keiki_ok(&["clone", "orders", "--to", "b", "--as", "copy", "--latest", "--port", &free_port().to_string()]);
    stage.b.keiki_ok(&["discard", "copy", "--yes"]);
    let incarnation = stage.incarnation_dir(&stage.a, "orders");
    stage.source.stop();
    stage.a.stop_agent();
    let archive = lasting_objects(&incarnation);

    put_back(&kept, &stage.source);
    stage.source.launch();
    stage.source.write(12);
    stage.source.write(13);
    stage.a.start_agent();
    wait_until_state(&stage.a, "orders", "stopped");
    let stopped = stage.a.instance("orders");
    assert_eq!(stopped["problem"]["error"], "conflict", "{stopped:#}");
    println!("{}: {}", S::ENGINE, stopped["problem"]["message"]);
    assert_eq!(settled_objects(&incarnation), archive, "another history was archived");
}

/// Gives a data directory the content of another one.
fn put_back<S: SourceServer>(kept: &S, server: &S) {
    for entry in std::fs::read_dir(server.data_dir()).unwrap() {
        let path = entry.unwrap().path();
        let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.unwrap();
    }
    copy_tree(kept.data_dir(), server.data_dir());
}

/// Somebody puts an old copy of the data directory back, beneath everything that knows of it, and the server writes
/// another history into so many log files of the same names, before the agent looks.
fn put_back_and_assert_stopped<S: SourceServer>(is_new_directory: bool, log_files: u32, expected: &[&str]) {
    let mut stage = TwoHosts::<S>::of(Via::Peer);
    stage.source.write(1);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.stop();
    let kept = stage.source.copy();
    stage.source.launch();
    write_log_files(&stage.source, 10, 3);
    stage.wait_until_shipped();
    let incarnation = stage.incarnation_dir(&stage.a, "orders");
    stage.source.stop();
    stage.a.stop_agent();
    let archive = lasting_objects(&incarnation);

    let data_dir = stage.source.data_dir();
    if is_new_directory {
        std::fs::rename(data_dir, data_dir.with_extension("old")).unwrap();
        std::fs::create_dir(data_dir).unwrap();
    }
    put_back(&kept, &stage.source);
    stage.source.launch();
    write_log_files(&stage.source, 20, log_files);
    stage.a.start_agent();
    write_log_files(&stage.source, 30, 2);
    wait_until_state(&stage.a, "orders", "stopped");
    let stopped = stage.a.instance("orders");
    let error = stopped["problem"]["error"].as_str().unwrap();
    assert!(expected.contains(&error), "{stopped:#}");
    assert!(stopped["problem"]["hint"].as_str().is_some(), "{stopped:#}");
    println!("{}: {}", S::ENGINE, stopped["problem"]["message"]);
    assert_eq!(settled_objects(&incarnation), archive, "another history was archived");
}
