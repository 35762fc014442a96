//! Copies of its data that a Redis or Valkey server makes by itself: noticed, and backed up without another fork.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use keiki::engine::Engine;
use keiki::engine::redis::LogKind;
use keiki::error::Kind;
use keiki::model::id::BackupId;
use keiki::model::target::Target;
use tokio_util::sync::CancellationToken;

use crate::engine_contract::redis::RedisSubject;
use crate::engine_contract::{Grown, MemoryLog, Subject, back_up, back_up_cheaply};
use crate::support::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use crate::support::postgres::server_user;
use crate::support::redis::{Answer, Client, Product, TestRedis};

const STREAMED: [(&str, &str); 2] = [("appendonly", "no"), ("repl-diskless-sync-delay", "0")];

fn save(server: &TestRedis) {
    // A child process that has sent a snapshot may still be ending.
    wait_for("the server to begin a snapshot", Duration::from_secs(60), || {
        !matches!(server.client().ask(&[b"BGSAVE"]), Answer::Error(_))
    });
    wait_for("the snapshot to be saved", Duration::from_secs(60), || {
        server.info("rdb_bgsave_in_progress") == "0" && server.info("rdb_last_bgsave_status") == "ok"
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_was_saved_becomes_a_backup_from_which_the_stream_goes_on() {
    for product in [Product::Redis7, Product::Valkey9] {
        let server = TestRedis::start_of(product, &STREAMED);
        let mut source = server.source("orders");
        source.log = LogKind::ReplicationStream;
        let engine = std::sync::Arc::new(keiki::engine::redis::RedisEngine::new(source));
        let subject = RedisSubject { server, engine: engine.clone() };
        let server = &subject.server;
        engine.list_log(None).await.unwrap();
        assert!(!engine.has_saved().await.unwrap());
        server.run(&["RPUSH", "numbers", "1"]);
        // The stream is in another database when the snapshot is made, and does not say so behind it.
        let mut client = server.client();
        client.run(&["SELECT", "3"]);
        client.run(&["SET", "elsewhere", "before"]);
        save(server);
        assert!(engine.has_saved().await.unwrap(), "a person has saved a snapshot");
        client.run(&["SET", "elsewhere", "behind"]);
        server.run(&["RPUSH", "numbers", "2"]);
        let base = back_up_cheaply(&subject).await.unwrap();
        assert!(!engine.has_saved().await.unwrap(), "a backup has taken it");
        assert_eq!((base.span.start, base.span.facts["checksum"].as_str()), (base.span.stop, "verified"));
        assert_eq!(server.info("rdb_saves"), "1", "{product:?}: nothing was saved for it");
        assert_eq!(server.info("sync_full"), "1", "{product:?}: nothing was sent for it but to make a backlog");
        let backup = Target::Backup(BackupId::new(base.span.began_at, 1));
        for (target, values, elsewhere) in [(backup, vec![1], "before"), (Target::Latest, vec![1, 2], "behind")] {
            let grown = Grown::stage(&subject, &base).await;
            grown.recover(&target, MemoryLog::of(&subject).await).await.unwrap();
            assert_eq!(grown.values(), values, "{product:?} {target}");
            let mut clone = Client::open(&grown.site.run_dir.join("redis.sock"));
            assert_eq!(clone.run(&["GET", "elsewhere"]), Answer::Nothing, "{product:?} {target}");
            clone.run(&["SELECT", "3"]);
            assert_eq!(clone.run(&["GET", "elsewhere"]), Answer::text(elsewhere), "{product:?} {target}");
            grown.stop().await;
        }
        // One that is damaged is refused, and the next backup is made in the other way.
        save(server);
        let path = server.data_dir.join("dump.rdb");
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let (mut byte, middle) = ([0], file.metadata().unwrap().len() - 20);
        file.read_exact_at(&mut byte, middle).unwrap();
        file.write_all_at(&[byte[0] ^ 1], middle).unwrap();
        let error = back_up_cheaply(&subject).await.err().expect("a bit is flipped");
        assert_eq!(error.kind(), Kind::Damaged, "{error:?}");
        assert!(error.to_string().contains("dump.rdb"), "{error}");
        back_up_cheaply(&subject).await.unwrap();
        assert_eq!(server.info("sync_full"), "2");
        // A backup that somebody waits for is of now, whatever was saved.
        save(server);
        server.run(&["RPUSH", "numbers", "3"]);
        let base = back_up(&subject, CancellationToken::new()).await.unwrap();
        let grown = Grown::stage(&subject, &base).await;
        let backup = Target::Backup(BackupId::new(base.span.began_at, 1));
        grown.recover(&backup, MemoryLog::of(&subject).await).await.unwrap();
        assert_eq!(grown.values(), [1, 2, 3]);
        grown.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_follows_a_saved_snapshot_stays_in_its_database_over_many_files() {
    let server = TestRedis::start(&STREAMED);
    let streamed = || {
        let mut source = server.source("orders");
        source.log = LogKind::ReplicationStream;
        std::sync::Arc::new(keiki::engine::redis::RedisEngine::new(source))
    };
    // Somebody has followed the stream when it was last in another database, and nobody has its files any more.
    let first = streamed();
    first.list_log(None).await.unwrap();
    let mut client = server.client();
    client.run(&["SELECT", "3"]);
    client.run(&["SET", "elsewhere", "before"]);
    first.detach().await.unwrap();
    drop(first);
    let engine = streamed();
    let subject = RedisSubject { engine: engine.clone(), server };
    engine.list_log(None).await.unwrap();
    assert!(!engine.has_saved().await.unwrap());
    client.run(&["SET", "elsewhere", "in the snapshot"]);
    save(&subject.server);
    // More than one file takes.
    for _ in 0..9 {
        client.run(&["SET", "filler", &"x".repeat(8 << 20)]);
        engine.list_log(None).await.unwrap();
    }
    client.run(&["SET", "elsewhere", "behind"]);
    let log = MemoryLog::of(&subject).await;
    assert!(log.files.len() > 1, "{} files", log.files.len());
    let says_select = |bytes: &Vec<u8>| bytes.windows(6).any(|word| word == b"SELECT");
    assert!(!log.files.values().any(says_select), "otherwise this proves nothing");
    let base = back_up_cheaply(&subject).await.unwrap();
    let grown = Grown::stage(&subject, &base).await;
    grown.recover(&Target::Latest, log).await.unwrap();
    let mut clone = Client::open(&grown.site.run_dir.join("redis.sock"));
    assert_eq!(clone.run(&["DBSIZE"]).number(), 0);
    clone.run(&["SELECT", "3"]);
    assert_eq!(clone.run(&["GET", "elsewhere"]), Answer::text("behind"));
    grown.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewrite_of_the_append_only_file_is_noticed_until_a_backup_has_taken_its_base() {
    let server = TestRedis::start(&[]);
    let engine = std::sync::Arc::new(keiki::engine::redis::RedisEngine::new(server.source("orders")));
    let subject = RedisSubject { server, engine: engine.clone() };
    assert!(!engine.has_saved().await.unwrap());
    subject.commit(1);
    subject.server.rewrite();
    assert!(engine.has_saved().await.unwrap() && engine.has_saved().await.unwrap());
    back_up(&subject, CancellationToken::new()).await.unwrap();
    assert!(!engine.has_saved().await.unwrap());
}

#[test]
fn what_the_server_has_saved_is_listed_as_an_automatic_backup() {
    let lab = Lab::new();
    let repository = lab.path("repository");
    std::fs::create_dir(&repository).unwrap();
    let server = TestRedis::start(&STREAMED);
    // A window that does not open while this runs.
    let day = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).weekday().wrapping_add(3);
    let day = format!("{day:?}").to_lowercase()[..3].to_string();
    let bin_dir = Product::Redis7.bin_dir();
    let sections = format!(
        "[[instance]]\nname = \"cart\"\nengine = \"redis\"\ndata_dir = \"{}\"\nsocket = \"{}\"\nrun_as = \"{}\"\n\
         ship_every = \"1s\"\nlog = \"replication\"\n[instance.backup]\nschedule = \"00:00-00:01 {day} UTC\"\n\
         also_when_saved = true\n",
        server.data_dir.display(),
        server.socket.display(),
        server_user().name
    );
    let host = Host::start(
        &lab,
        &HostOptions {
            name: "a",
            repository: format!("file://{}", repository.display()),
            peers: vec![],
            sections,
            listen_port: free_port(),
            clone_bin_dir: &bin_dir,
        },
    );
    host.keiki_ok(&["repository", "init"]);
    wait_for("archiving to begin", Duration::from_secs(60), || host.instance("cart")["state"] == "archiving");
    let backups = || host.json(&["backup", "list", "cart"]).as_array().unwrap().clone();
    // Saved again and again, because what was there when the agent first looked is not new.
    wait_for("the snapshot to be a backup", Duration::from_secs(240), || {
        server.run(&["INCR", "n"]);
        save(&server);
        std::thread::sleep(Duration::from_secs(3));
        !backups().is_empty()
    });
    assert_eq!(backups()[0]["kind"], "automatic");
    assert_eq!(server.info("sync_full"), "1", "no snapshot was asked for");
}
