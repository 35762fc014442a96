//! The ledger story on real PostgreSQL servers: writers commit while backups, segment switches and checkpoints happen;
//! then clones are made of many moments, and every row must be there exactly if it was committed by then.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use keiki::base::random::random_u64;
use keiki::model::position::Lsn;

use super::support::hosts::{Host, HostOptions, KEIKI, Lab, free_port, instance_section, wait_for};
use super::support::ledger::{Ledger, Moment, Row, compare, connect, ids, lsn_now};
use super::support::postgres::{TestServer, Version};
use super::support::s3::{fresh_prefix, in_process, named};
use super::support::two_hosts::Via;

const WRITERS: u32 = 4;
const RANDOM_TIMES: usize = 8;
const RANDOM_POSITIONS: usize = 3;

/// What one clone is made of and what it is held against.
struct Trial {
    title: String,
    arguments: Vec<String>,
    moment: Moment,
}

#[test]
fn story_postgres_15_every_row_is_there_exactly_if_it_was_committed_by_then() {
    tell(Version::V15, Home::Directory, Via::Peer);
}

#[test]
fn story_postgres_18_every_row_is_there_exactly_if_it_was_committed_by_then() {
    tell(Version::V18, Home::Directory, Via::Peer);
}

/// Where the repository is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Home {
    Directory,
    /// A bucket of a real S3 server.
    Bucket,
    /// A bucket of s3s-fs.
    InProcess,
}

/// Tells the whole story; `via` is how the target reaches the repository.
pub fn tell(version: Version, home: Home, via: Via) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (passed, failures) = runtime.block_on(story(version, home, via));
    println!("{passed} passed, {} failed", failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

async fn story(version: Version, home: Home, via: Via) -> (usize, Vec<String>) {
    let lab = Lab::new();
    let repository = match home {
        Home::Directory => {
            let directory = lab.path("repository");
            std::fs::create_dir(&directory).unwrap();
            format!("file://{}", directory.display())
        }
        Home::Bucket => named::repository_lines(&fresh_prefix()),
        Home::InProcess => in_process::repository_lines(&lab.path("s3")).await,
    };
    let socket = lab.path("host-a").join("keiki.sock");
    let archive_command = format!("'{KEIKI}' --socket '{}' wal-push %p", socket.display());
    let settings = [("archive_mode", "on"), ("archive_command", archive_command.as_str()), ("log_checkpoints", "off")];
    let source = TestServer::start(version, &settings);
    let (port_a, port_b) = (free_port(), free_port());
    let a = Host::start(
        &lab,
        &HostOptions {
            name: "a",
            repository: repository.clone(),
            peers: vec![("b", port_b)],
            sections: instance_section("orders", &source, "ship = \"archive_command\"\nship_every = \"1s\""),
            listen_port: port_a,
            clone_bin_dir: &source.bin_dir,
        },
    );
    a.keiki_ok(&["repository", "init"]);
    // A target that has no access of its own reads and writes the repository through host a.
    let b = Host::start(
        &lab,
        &HostOptions {
            name: "b",
            repository: if via == Via::Peer { "peer://a".to_string() } else { repository },
            peers: vec![("a", port_a)],
            sections: String::new(),
            listen_port: port_b,
            clone_bin_dir: &source.bin_dir,
        },
    );
    wait_for("archiving to begin", Duration::from_secs(30), || a.instance("orders")["state"] == "archiving");

    let control = connect(&source.socket_dir, source.port).await.unwrap();
    let (rows, mut trials) = write_history(&a, &source, &control).await;
    let settings_before = settings_of(&control).await;
    println!("{} rows committed by {WRITERS} writers; {} clones to be made", rows.len(), trials.len());

    let mut failures = Vec::new();
    let mut passed = 0;
    trials.push(Trial {
        title: "latest".to_string(),
        arguments: vec!["--latest".to_string()],
        moment: Moment::Between(Timestamp::now(), Timestamp::now()),
    });
    for (number, trial) in trials.iter().enumerate() {
        match clone_and_compare(&lab, &a, &b, number, trial, &rows).await {
            Ok(found) => {
                passed += 1;
                println!("pass  {:40} {found} rows", trial.title);
            }
            Err(complaint) => {
                println!("FAIL  {:40} {complaint}", trial.title);
                failures.push(format!("{}: {complaint}", trial.title));
            }
        }
    }
    match source_noticed_nothing(&control, &settings_before).await {
        Ok(()) => passed += 1,
        Err(complaint) => failures.push(complaint),
    }
    (passed, failures)
}

/// Writes for a while with backups, switches, a checkpoint and a named point in between; returns the rows and the
/// moments to be cloned.
async fn write_history(a: &Host, source: &TestServer, control: &tokio_postgres::Client) -> (Vec<Row>, Vec<Trial>) {
    let ledger = Ledger::start(source.socket_dir.clone(), source.port, WRITERS).await;
    let mut trials = Vec::new();
    grow(&ledger, 300).await;
    trials.push(backup_trial(a, "first backup set").await);
    let first_backup_ended = Timestamp::now();
    let first_backup_lsn = lsn_now(control, "pg_current_wal_insert_lsn").await;
    grow(&ledger, 500).await;
    control.batch_execute("SELECT pg_switch_wal()").await.unwrap();
    grow(&ledger, 500).await;
    let named = control.query_one("SELECT pg_create_restore_point('before the release')::text", &[]).await.unwrap();
    trials.push(Trial {
        title: "named point".to_string(),
        arguments: vec!["--name".into(), "before the release".into()],
        moment: Moment::Lsn(Lsn::parse(named.get(0)).unwrap()),
    });
    control.batch_execute("CHECKPOINT").await.unwrap();
    grow(&ledger, 500).await;
    trials.push(backup_trial(a, "second backup set").await);
    control.batch_execute("SELECT pg_switch_wal()").await.unwrap();
    grow(&ledger, 800).await;
    let (last_time, last_lsn) = (Timestamp::now(), lsn_now(control, "pg_current_wal_insert_lsn").await);
    let rows = ledger.stop().await;

    for _ in 0..RANDOM_TIMES {
        let span = (last_time.as_microsecond() - first_backup_ended.as_microsecond()) as u64;
        let time =
            Timestamp::from_microsecond(first_backup_ended.as_microsecond() + (random_u64() % span) as i64).unwrap();
        trials.push(Trial {
            title: format!("time {time}"),
            arguments: vec!["--at".into(), time.to_string()],
            moment: Moment::Time(time),
        });
    }
    for _ in 0..RANDOM_POSITIONS {
        let lsn = Lsn(first_backup_lsn.0 + random_u64() % (last_lsn.0 - first_backup_lsn.0));
        trials.push(Trial {
            title: format!("position {lsn}"),
            arguments: vec!["--position".into(), lsn.to_string()],
            moment: Moment::Lsn(lsn),
        });
    }
    (rows, trials)
}

/// Waits until this many more rows are committed.
async fn grow(ledger: &Ledger, more: usize) {
    let wanted = ledger.len() + more;
    let began = Instant::now();
    while ledger.len() < wanted {
        assert!(began.elapsed() < Duration::from_secs(60), "the writers are stuck");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Takes a backup; its clone must hold what was committed before it began and nothing that began after it ended.
async fn backup_trial(a: &Host, title: &str) -> Trial {
    let from = Timestamp::now();
    blocking(|| a.keiki_ok(&["backup", "create", "orders"]));
    let to = Timestamp::now();
    let list = a.json(&["backup", "list", "orders"]);
    let id = list.as_array().unwrap().last().unwrap()["id"].as_str().unwrap().to_string();
    Trial { title: title.to_string(), arguments: vec!["--backup".into(), id], moment: Moment::Between(from, to) }
}

/// Lets the writers go on while this thread waits for a child.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

async fn clone_and_compare(
    lab: &Lab,
    a: &Host,
    b: &Host,
    number: usize,
    trial: &Trial,
    rows: &[Row],
) -> Result<usize, String> {
    let (name, port) = (format!("clone-{number}"), free_port());
    let port_text = port.to_string();
    let mut arguments = vec!["--json", "clone", "orders", "--to", "b", "--as", &name, "--port", &port_text];
    arguments.extend(trial.arguments.iter().map(String::as_str));
    let output = blocking(|| a.keiki(&arguments));
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}{said}", String::from_utf8_lossy(&output.stdout)));
    }
    let socket_dir = lab.path("clones-b").join(format!("{name}.run"));
    let client = connect(&socket_dir, port).await.map_err(|error| format!("the clone does not answer: {error}"))?;
    let found = ids(&client).await;
    let complaints = compare(rows, &found, trial.moment);
    let in_recovery: bool = client.query_one("SELECT pg_is_in_recovery()", &[]).await.unwrap().get(0);
    client
        .batch_execute("INSERT INTO ledger VALUES (-1, -1, 'written by the clone')")
        .await
        .map_err(|e| e.to_string())?;
    let archived = b.instance(&name)["state"].clone();
    let removed = blocking(|| b.keiki(&["discard", &name, "--yes"]));
    if !removed.status.success() {
        return Err(format!("cannot discard: {}", String::from_utf8_lossy(&removed.stderr)));
    }
    match complaints.first() {
        Some(first) => Err(format!("{} complaints, the first: {first}", complaints.len())),
        None if in_recovery => Err("the clone is still in recovery".to_string()),
        None if archived.is_null() => Err("the clone is not an instance of host b".to_string()),
        None => Ok(found.len()),
    }
}

async fn settings_of(control: &tokio_postgres::Client) -> Vec<String> {
    let rows = control.query("SELECT name || '=' || setting FROM pg_settings ORDER BY 1", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// The source was not restarted (this very connection still works), its settings are the same, and no
/// `archive_command` failed.
async fn source_noticed_nothing(control: &tokio_postgres::Client, before: &[String]) -> Result<(), String> {
    let failed: i64 = control.query_one("SELECT failed_count FROM pg_stat_archiver", &[]).await.unwrap().get(0);
    if failed > 0 {
        return Err(format!("{failed} archive commands failed on the source"));
    }
    if settings_of(control).await != before {
        return Err("settings of the source changed".to_string());
    }
    Ok(())
}
