//! A real Redis or Valkey whose log is its replication stream: what a broken link, an agent that dies, a restart of the
//! server or a backlog that is too short does to it, and what its backups and clones hold.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keiki::engine::Engine;
use keiki::engine::redis::{LogKind, RedisEngine};
use keiki::error::Kind;
use keiki::model::check::Verdict;
use keiki::model::id::BackupId;
use keiki::model::log::LogFile;
use keiki::model::target::Target;
use tokio_util::sync::CancellationToken;

use crate::engine_contract::redis::RedisSubject;
use crate::engine_contract::{Grown, MemoryLog, Subject, back_up, read_log};
use crate::support::hosts::wait_for;
use crate::support::redis::{Answer, Client, Product, TestRedis};

const SETTINGS: [(&str, &str); 2] = [("appendonly", "no"), ("repl-diskless-sync-delay", "0")];

fn engine(server: &TestRedis) -> Arc<RedisEngine> {
    let mut source = server.source("orders");
    source.log = LogKind::ReplicationStream;
    Arc::new(RedisEngine::new(source))
}

fn push(server: &TestRedis, value: u32) {
    server.run(&["RPUSH", "numbers", &value.to_string()]);
}

async fn files(engine: &RedisEngine) -> Vec<LogFile> {
    engine.list_log(None).await.unwrap().files
}

fn number(file: &LogFile) -> u64 {
    file.name.trim_end_matches(".aof").parse().unwrap()
}

/// The numbers that were pushed, in the order in which they stand in the log.
async fn pushed(engine: &RedisEngine) -> Vec<u32> {
    let mut found = Vec::new();
    for file in files(engine).await {
        let bytes = read_log(engine, &file, 0, file.readable_bytes).await.unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        found.extend(
            lines.windows(3).filter(|lines| lines[0] == "numbers").map(|lines| lines[2].parse::<u32>().unwrap()),
        );
    }
    found
}

/// A subject with such a server.
fn subject(product: Product, settings: &[(&str, &str)]) -> RedisSubject {
    let server = TestRedis::start_of(product, &[&SETTINGS[..], settings].concat());
    let engine = engine(&server);
    RedisSubject { server, engine }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_goes_on_without_a_gap_after_broken_links_and_dead_agents() {
    let server = TestRedis::start(&SETTINGS);
    let first = engine(&server);
    push(&server, 1);
    files(&first).await;
    push(&server, 2);
    for value in 3..6 {
        server.run(&["CLIENT", "KILL", "TYPE", "replica"]);
        push(&server, value);
        files(&first).await;
    }
    drop(first);
    push(&server, 6);
    let second = engine(&server);
    push(&server, 7);
    // The first number was pushed before anybody followed.
    assert_eq!(pushed(&second).await, [2, 3, 4, 5, 6, 7]);
    assert_eq!(files(&second).await.len(), 1);
    assert_eq!(server.info("sync_full"), "1", "one request made the server keep a backlog, and no other was full");
    assert_eq!(server.info("rdb_saves"), "0");
    assert!(!server.data_dir.join("dump.rdb").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_backlog_does_not_hold_any_more_is_a_hole() {
    let server = TestRedis::start(&[&SETTINGS[..], &[("repl-backlog-size", "16kb")]].concat());
    let first = engine(&server);
    files(&first).await;
    push(&server, 1);
    assert_eq!(files(&first).await.len(), 1);
    drop(first);
    for _ in 0..4 {
        server.run(&["SET", "filler", &"x".repeat(64 << 10)]);
    }
    let second = engine(&server);
    files(&second).await;
    push(&server, 2);
    let listed = files(&second).await;
    assert_eq!(listed.len(), 2, "{listed:?}");
    assert!(listed[0].sealed && number(&listed[1]) - number(&listed[0]) > 1, "{listed:?}");
    assert_eq!(pushed(&second).await, [1, 2]);
    second.detach().await.unwrap();
    assert!(!server.data_dir.join("keiki-stream").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_stopped_cleanly_waits_for_the_agent_and_goes_on_in_a_file_that_follows() {
    // Otherwise a server that is told to stop saves nothing.
    let mut server = TestRedis::start(&[&SETTINGS[..], &[("save", "3600 1000000")]].concat());
    let engine = engine(&server);
    files(&engine).await;
    for value in 0..200 {
        push(&server, value);
    }
    // It keeps the id and the offset of its stream in the snapshot that it saves.
    server.stop();
    server.start_again();
    push(&server, 200);
    let listed = files(&engine).await;
    assert_eq!(pushed(&engine).await, (0..201).collect::<Vec<_>>());
    assert_eq!(number(&listed[listed.len() - 1]) - number(&listed[0]), listed.len() as u64 - 1, "{listed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_server_ships_nothing() {
    let server = TestRedis::start(&[&SETTINGS[..], &[("repl-ping-replica-period", "1")]].concat());
    let engine = engine(&server);
    files(&engine).await;
    push(&server, 1);
    let mut before = engine.list_log(None).await.unwrap();
    // What was executed by when may be noted twice behind the last change, and that is all.
    for _ in 0..5 {
        let offset = server.info("master_repl_offset");
        let pinged = || server.info("master_repl_offset") != offset;
        wait_for("the server to ping its replica", Duration::from_secs(60), pinged);
        let after = engine.list_log(None).await.unwrap();
        assert!(after.durable_end.observed_at > before.durable_end.observed_at);
        if (&after.files, after.durable_end.position) == (&before.files, before.durable_end.position) {
            return;
        }
        before = after;
    }
    panic!("there is something to ship after each ping: {before:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_holds_exactly_its_target_in_every_database() {
    for product in [Product::Redis7, Product::Valkey9] {
        let subject = subject(product, &[]);
        // The stream is in another database when the backup begins, and stays there.
        let mut client = subject.server.client();
        client.run(&["SELECT", "3"]);
        client.run(&["SET", "elsewhere", "before"]);
        push(&subject.server, 1);
        client.run(&["SET", "elsewhere", "also before"]);
        let base = back_up(&subject, CancellationToken::new()).await.unwrap();
        assert_eq!(base.span.start, base.span.stop);
        assert_eq!(base.span.facts["checksum"], "verified");
        client.run(&["SET", "elsewhere", "behind"]);
        push(&subject.server, 2);
        client.run(&["MULTI"]);
        client.run(&["SET", "elsewhere", "in a transaction"]);
        client.run(&["INCR", "counted"]);
        client.run(&["EXEC"]);
        let quiet = settle(&subject).await;
        client.run(&["SET", "elsewhere", "too late"]);
        push(&subject.server, 3);
        subject.server.run(&["CLIENT", "KILL", "TYPE", "replica"]);
        client.run(&["SET", "elsewhere", "last"]);
        let backup = Target::Backup(BackupId::new(base.span.began_at, 1));
        let targets = [
            (Target::Latest, vec![1, 2, 3], "last"),
            (Target::Time(quiet), vec![1, 2], "in a transaction"),
            (backup, vec![1], "also before"),
        ];
        for (target, values, elsewhere) in targets {
            let grown = Grown::stage(&subject, &base).await;
            let recovered = grown.recover(&target, MemoryLog::of(&subject).await).await.unwrap();
            assert!(recovered.verified.iter().all(|item| item.verdict == Verdict::Pass), "{recovered:?}");
            assert_eq!(grown.values(), values, "{product:?} {target}");
            let mut clone = Client::open(&grown.site.run_dir.join("redis.sock"));
            clone.run(&["SELECT", "3"]);
            assert_eq!(clone.run(&["GET", "elsewhere"]), Answer::text(elsewhere), "{product:?} {target}");
            grown.stop().await;
        }
        assert_eq!(subject.server.info("rdb_saves"), "0", "nothing was written on the source's disk");
    }
}

/// A moment that everything before it is received by, and nothing after it.
async fn settle(subject: &RedisSubject) -> Timestamp {
    subject.engine().list_log(None).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let quiet = Timestamp::now();
    tokio::time::sleep(Duration::from_millis(20)).await;
    quiet
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_cancelled_ends_the_servers_child_process() {
    let subject = subject(Product::Redis7, &[("rdb-key-save-delay", "200000")]);
    for value in 0..500 {
        subject.server.run(&["SET", &format!("key{value}"), "x"]);
    }
    let cancel = CancellationToken::new();
    let ended = cancel.clone();
    let cancelling = async {
        while subject.server.info("rdb_bgsave_in_progress") != "1" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        ended.cancel();
    };
    let (outcome, ()) = tokio::join!(back_up(&subject, cancel), cancelling);
    assert_eq!(outcome.err().expect("it was cancelled").kind(), Kind::Cancelled);
    wait_for("the child process to end", Duration::from_secs(60), || {
        subject.server.info("rdb_bgsave_in_progress") == "0"
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_source_lacks_is_said_before_anything_begins() {
    let server = TestRedis::start(&SETTINGS);
    let engine = engine(&server);
    let items = engine.check_source().await.unwrap();
    assert!(items.iter().all(|item| item.verdict == Verdict::Pass), "{items:?}");
    assert!(items.iter().any(|item| item.what == "replication stream"), "{items:?}");
    server.run(&["CONFIG", "SET", "repl-diskless-sync", "no"]);
    let items = engine.check_source().await.unwrap();
    assert!(items.iter().any(|item| item.verdict == Verdict::Warn && item.what == "repl-diskless-sync"), "{items:?}");
    // A user who may not replicate is told what is missing.
    server.run(&["ACL", "SETUSER", "weak", "on", ">open", "-@all", "+info", "+ping", "+time", "+config|get"]);
    let password = server.data_dir.with_file_name("password");
    std::fs::write(&password, "open\n").unwrap();
    let mut source = server.source("orders");
    source.log = LogKind::ReplicationStream;
    source.endpoint.user = Some("weak".into());
    source.endpoint.password_file = Some(password);
    drop(engine);
    let error = RedisEngine::new(source).list_log(None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Forbidden, "{error:?}");
    assert!(error.hint_text().unwrap().contains("+psync"), "{error:?}");
}
