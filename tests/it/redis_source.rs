//! A real Redis as a source: what a rewrite, a restart, a changed setting or damage does to its log and its backups.

use std::path::PathBuf;
use std::sync::Arc;

use keiki::engine::redis::RedisEngine;
use keiki::engine::redis::hold::Hold;
use keiki::engine::{AcceptedClone, Engine};
use keiki::error::Kind;
use keiki::model::check::Verdict;
use keiki::model::log::LogFile;
use keiki::model::target::Target;
use tokio_util::sync::CancellationToken;

use crate::engine_contract::redis::RedisSubject;
use crate::engine_contract::{Grown, MemoryLog, Subject, back_up, read_log};
use crate::support::redis::{Answer, Client, TestRedis, open_when_ready};

fn engine(server: &TestRedis) -> RedisEngine {
    RedisEngine::new(server.source("orders"))
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

fn append_dir(server: &TestRedis) -> PathBuf {
    server.data_dir.join("appendonlydir")
}

/// Lists once, forgets everything as an agent that is killed, lets `meanwhile` happen, and lists again.
async fn looked_away(server: &mut TestRedis, meanwhile: impl FnOnce(&mut TestRedis)) -> Vec<LogFile> {
    push(server, 1);
    assert_eq!(files(&engine(server)).await.len(), 1);
    meanwhile(server);
    push(server, 2);
    let later = engine(server);
    let listed = files(&later).await;
    let whole: Vec<Vec<u8>> = {
        let mut all = Vec::new();
        for file in &listed {
            all.push(read_log(&later, file, 0, file.readable_bytes).await.unwrap());
        }
        all
    };
    let text = String::from_utf8_lossy(&whole.concat()).into_owned();
    assert!(text.contains("\r\n1\r\n") && text.contains("\r\n2\r\n"), "what was held is not lost: {text}");
    listed
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewrite_while_no_agent_looks_is_no_hole_if_the_server_vouches_for_it() {
    let mut server = TestRedis::start(&[]);
    let listed = looked_away(&mut server, |server| server.rewrite()).await;
    assert_eq!((listed.len(), number(&listed[1]) - number(&listed[0])), (2, 1));
    assert!(listed[0].sealed && !listed[1].sealed);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_that_were_never_logged_are_a_hole() {
    let mut server = TestRedis::start(&[]);
    let listed = looked_away(&mut server, |server| {
        server.run(&["CONFIG", "SET", "appendonly", "no"]);
        server.run(&["SET", "unseen", "1"]);
        server.run(&["CONFIG", "SET", "appendonly", "yes"]);
        server.rewrite();
    })
    .await;
    assert!(number(&listed[1]) - number(&listed[0]) > 1, "{listed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_killed_goes_on_in_the_same_log_file() {
    let mut server = TestRedis::start(&[("appendfsync", "always")]);
    let listed = looked_away(&mut server, |server| {
        server.kill();
        server.start_again();
    })
    .await;
    assert_eq!(listed.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_an_append_only_file_is_refused_with_the_command_to_type() {
    let server = TestRedis::start(&[]);
    let engine = engine(&server);
    files(&engine).await;
    server.run(&["CONFIG", "SET", "appendonly", "no"]);
    let error = engine.list_log(None).await.unwrap_err();
    assert!(error.hint_text().unwrap().contains("CONFIG SET appendonly yes"), "{error:?}");
    let items = engine.check_source().await.unwrap();
    assert!(items.iter().any(|item| item.verdict == Verdict::Fail && item.what == "append-only file"), "{items:?}");
    // The agent leaves nothing behind when the instance goes.
    assert!(append_dir(&server).join("keiki-held").is_dir());
    engine.detach().await.unwrap();
    assert!(!append_dir(&server).join("keiki-held").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn instants_without_times_in_the_log_are_not_promised() {
    let subject = RedisSubject::start();
    let engine = subject.engine();
    subject.commit(1);
    let with_times = subject.now();
    assert!(engine.list_log(None).await.unwrap().durable_end.observed_at >= with_times);
    subject.server.run(&["CONFIG", "SET", "aof-timestamp-enabled", "no"]);
    let off_at = subject.now();
    subject.commit(2);
    let listing = engine.list_log(None).await.unwrap();
    assert!(listing.durable_end.observed_at < off_at, "{listing:?}");
    let base = back_up(&subject, CancellationToken::new()).await.unwrap();
    assert_eq!(base.span.facts["log_times"], "no");
    let site = subject.site(std::path::Path::new("/nowhere"), &base);
    let items = subject.cloner().check_target(&site, &Target::Time(off_at)).await.unwrap();
    assert!(items.iter().any(|item| item.verdict == Verdict::Fail && item.what == "moment"), "{items:?}");
    // Turned on again, times mean something from the next file on; a backup begins one.
    subject.server.run(&["CONFIG", "SET", "aof-timestamp-enabled", "yes"]);
    subject.commit(3);
    assert!(engine.list_log(None).await.unwrap().durable_end.observed_at < off_at);
    let base = back_up(&subject, CancellationToken::new()).await.unwrap();
    let files = engine.list_log(None).await.unwrap().files;
    assert!(base.span.start > base_end(&files[0]), "{files:?}");
    assert_eq!(base.span.facts["log_times"], "yes");
    let on_at = subject.now();
    assert!(engine.list_log(None).await.unwrap().durable_end.observed_at > on_at);
}

/// Where the file after this one would begin.
fn base_end(file: &LogFile) -> keiki::model::position::Position {
    keiki::model::position::Position::File { number: number(file) + 1, offset: 0 }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_missing_base_is_refused_and_named() {
    let subject = RedisSubject::start();
    subject.commit(1);
    subject.server.rewrite();
    let manifest = Hold::new(append_dir(&subject.server), "appendonly.aof").manifest().unwrap();
    let path = append_dir(&subject.server).join(&manifest.base.unwrap().name);
    let good = std::fs::read(&path).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 0x10;
    std::fs::write(&path, &bad).unwrap();
    let error = back_up(&subject, CancellationToken::new()).await.err().expect("a bit was flipped");
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
    assert!(error.message().contains("checksum") && error.hint_text().unwrap().contains("BGREWRITEAOF"), "{error:?}");
    std::fs::remove_file(&path).unwrap();
    let error = back_up(&subject, CancellationToken::new()).await.err().expect("the file is gone");
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
    assert!(error.message().contains(path.file_name().unwrap().to_str().unwrap()), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_asks_for_the_same_passwords_as_its_source() {
    let subject = RedisSubject::start();
    subject.commit(7);
    subject.server.run(&["ACL", "SETUSER", "reader", "on", ">open", "~*", "+@read"]);
    subject.server.run(&["CONFIG", "SET", "requirepass", "sesame"]);
    let password = subject.server.data_dir.with_file_name("password");
    std::fs::write(&password, "sesame\n").unwrap();
    let mut source = subject.server.source("orders");
    assert_eq!(RedisEngine::new(source.clone()).identify().await.unwrap_err().kind(), Kind::Forbidden);
    source.endpoint.password_file = Some(password);
    let subject = subject.with_engine(Arc::new(RedisEngine::new(source)));
    let base = back_up(&subject, CancellationToken::new()).await.unwrap();
    assert!(!base.span.facts.values().any(|value| value.contains("sesame")), "no password leaves its host");
    let grown = Grown::stage(&subject, &base).await;
    grown.recover(&Target::Latest, MemoryLog::of(&subject).await).await.unwrap();
    subject.cloner().clean_up(&grown.site).await.unwrap();
    subject.cloner().hand_over(&grown.site, true).await.unwrap();
    let mut clone = Client::open(&grown.site.run_dir.join("redis.sock"));
    assert!(matches!(clone.ask(&[b"GET", b"numbers"]), Answer::Error(said) if said.starts_with("NOAUTH")));
    assert!(matches!(clone.ask(&[b"AUTH", b"wrong"]), Answer::Error(_)));
    clone.run(&["AUTH", "sesame"]);
    assert_eq!(clone.run(&["LRANGE", "numbers", "0", "-1"]), Answer::List(vec![Answer::text("7")]));
    clone.run(&["AUTH", "reader", "open"]);
    // After a restart of the machine the agent starts it again, as it was.
    let accepted = AcceptedClone {
        data_dir: grown.site.data_dir.clone(),
        run_dir: grown.site.run_dir.clone(),
        bin_dir: grown.site.bin_dir.clone(),
        port: grown.site.port,
        run_as: grown.site.run_as.clone(),
    };
    subject.cloner().stop(&grown.site).await.unwrap();
    for _ in 0..2 {
        subject.cloner().launch(&accepted).await.unwrap();
    }
    let mut clone = open_when_ready(&grown.site.run_dir.join("redis.sock"));
    assert!(matches!(clone.ask(&[b"GET", b"numbers"]), Answer::Error(said) if said.starts_with("NOAUTH")));
    // What the agent may do shows it nothing of the data.
    let agent = std::fs::read_to_string(grown.site.run_dir.join("keiki.password")).unwrap();
    clone.run(&["AUTH", "keiki", &agent]);
    assert!(
        matches!(clone.ask(&[b"LRANGE", b"numbers", b"0", b"-1"]), Answer::Error(said) if said.starts_with("NOPERM"))
    );
    grown.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_the_source_has_only_since_the_backup_is_in_the_clone_or_there_is_none() {
    let mut subject = RedisSubject::start();
    subject.commit(1);
    let base = back_up(&subject, CancellationToken::new()).await.unwrap();
    assert_eq!(base.span.facts["setting.databases"], "16");
    subject.server.stop();
    subject.server.set("databases", "32");
    subject.server.start_again();
    let mut client = subject.server.client();
    client.run(&["SET", "moved", "1"]);
    client.run(&["MOVE", "moved", "20"]);
    let log = MemoryLog::of(&subject).await;
    // Nothing selects that database: a clone that goes on without it would have the key in another one.
    let grown = Grown::stage(&subject, &base).await;
    let error = grown.recover(&Target::Latest, log).await.unwrap_err();
    assert!(error.to_string().contains("refused 1 commands of the log"), "{error:?}");
    assert!(error.hint_text().unwrap().contains("--set databases="), "{error:?}");
    grown.stop().await;
    // Once the log selects it, the clone has it by itself; and what was ordered helps in the other case.
    client.run(&["SELECT", "20"]);
    client.run(&["SET", "elsewhere", "2"]);
    let grown = Grown::stage(&subject, &base).await;
    let recovered = grown.recover(&Target::Latest, MemoryLog::of(&subject).await).await.unwrap();
    let found = recovered.verified.iter().find(|item| item.what == "databases").unwrap();
    assert!(found.found.starts_with("21:"), "{found:?}");
    subject.cloner().clean_up(&grown.site).await.unwrap();
    subject.cloner().hand_over(&grown.site, true).await.unwrap();
    let mut clone = Client::open(&grown.site.run_dir.join("redis.sock"));
    clone.run(&["SELECT", "20"]);
    assert_eq!(clone.run(&["MGET", "moved", "elsewhere"]), Answer::List(vec![Answer::text("1"), Answer::text("2")]));
    // Whatever its owner makes of it: what the last load refuses is no clone either.
    subject.cloner().stop(&grown.site).await.unwrap();
    let conf = grown.site.data_dir.join("redis.conf");
    let text = std::fs::read_to_string(&conf).unwrap();
    std::fs::write(&conf, format!("{text}databases 16\n")).unwrap();
    let error = subject.cloner().hand_over(&grown.site, true).await.unwrap_err();
    assert!(error.to_string().contains("refused"), "{error:?}");
    assert!(!subject.cloner().is_running(&grown.site.data_dir), "it is not left open");
    grown.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_shown_from_the_second_after_all_that_its_log_says() {
    let mut subject = RedisSubject::start();
    subject.commit(1);
    let held = files(&subject.engine).await;
    // As if the clock had been half a minute ahead: behind that the server writes no times before it has caught up.
    subject.server.stop();
    let manifest = Hold::new(append_dir(&subject.server), "appendonly.aof").manifest().unwrap();
    let path = append_dir(&subject.server).join(&manifest.increments[0].name);
    let ahead = jiff::Timestamp::now().as_second() + 30;
    let text = format!("#TS:{ahead}\r\n*3\r\n$5\r\nRPUSH\r\n$7\r\nnumbers\r\n$1\r\n2\r\n");
    let mut file = std::fs::File::options().append(true).open(&path).unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    subject.server.start_again();
    assert_eq!(files(&subject.engine).await.len(), held.len());
    subject.server.rewrite();
    let base = back_up(&subject, CancellationToken::new()).await.unwrap();
    assert_eq!(base.span.start, base_end(&held[0]));
    assert!(base.span.ended_at.as_second() > ahead, "{:?}", base.span);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_second_of_a_backup_can_be_cloned_while_the_server_is_written_to() {
    let subject = RedisSubject::start();
    let ended = CancellationToken::new();
    let (mut client, writing) = (subject.server.client(), ended.clone());
    let writer = std::thread::spawn(move || {
        while !writing.is_cancelled() {
            client.run(&["RPUSH", "numbers", "1"]);
            // Fast enough for many a second, and a log that is soon read.
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    });
    for round in 0..3 {
        // So that the second ends while the log is looked at.
        let wanted = 920 + 20 * round;
        while jiff::Timestamp::now().subsec_millisecond() < wanted {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        let base = back_up(&subject, CancellationToken::new()).await.unwrap();
        let grown = Grown::stage(&subject, &base).await;
        let first = Target::Time(base.span.ended_at);
        let recovered = grown.recover(&first, MemoryLog::of(&subject).await).await;
        recovered.unwrap_or_else(|error| panic!("round {round}: {error:?}"));
        grown.stop().await;
    }
    ended.cancel();
    writer.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_key_of_a_shard_is_looked_at_in_every_database_however_long_its_name_is() {
    let subject = RedisSubject::start();
    let mut client = subject.server.client();
    // Ten megabytes in an answer of the usual size. The tag has slot 3300.
    for number in 0..1100 {
        client.run(&["SET", &format!("{{b}}{number}{}", "x".repeat(9 << 10)), ""]);
    }
    client.run(&["SELECT", "1"]);
    client.run(&["SET", "{a}", "in slot 15495"]);
    let base = back_up(&subject, CancellationToken::new()).await.unwrap();
    for (slots, outcome) in [("0-8000", Err("slot 15495")), ("0-16383", Ok("1101 keys"))] {
        let mut grown = Grown::stage(&subject, &base).await;
        let table = format!("{:040} 127.0.0.1:20100@30100 myself,master - 0 0 1 connected {slots}\n", 7);
        grown.site.facts.insert("tie.cluster".to_string(), table + "vars currentEpoch 1 lastVoteEpoch 0\n");
        grown.recover(&Target::Latest, MemoryLog::of(&subject).await).await.unwrap();
        match (subject.cloner().clean_up(&grown.site).await, outcome) {
            (Ok(items), Ok(wanted)) => {
                assert!(items.iter().any(|item| item.what == "cluster" && item.done.contains(wanted)), "{items:?}");
            }
            (Err(error), Err(wanted)) => assert!(error.to_string().contains(wanted), "{error:?}"),
            (found, wanted) => panic!("{found:?} instead of {wanted:?}"),
        }
        grown.stop().await;
    }
}
