//! Replay by keiki, by the server's own replica with as many workers and by the client, all on copies of one base with the
//! same settings: they end with the same rows.
//!
//! `make bench-replay` takes the time of it with much log, prints times and factors, and fails if keiki is not faster than a
//! replica as the server has it by default and than the client. Otherwise there is no limit: times of so little log, on a
//! busy machine, prove nothing.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::support::mariadb::{Release, as_user};

const WRITERS: u32 = 4;
/// Without `KEIKI_BENCH_FULL` only so many that each way is gone once.
const TRANSACTIONS_EACH_FULL: u32 = 10_000;
const TRANSACTIONS_EACH: u32 = 50;
/// As many as `engine::mysql::recovery` takes.
const WORKERS_MAX: usize = 16;
/// A replica that does not sync what it applies, as keiki's does not until it has ended.
const SAME_SETTINGS: &str = "replica, same settings";
const LIMIT: Duration = Duration::from_secs(600);

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn bench_replay_by_keiki_by_a_replica_and_by_the_client_ends_with_the_same_rows() {
    let port = free_port();
    let is_full = std::env::var_os("KEIKI_BENCH_FULL").is_some();
    let each = if is_full { TRANSACTIONS_EACH_FULL } else { TRANSACTIONS_EACH };
    let source = written_source(port, each).await;
    let end = source.session.value("SELECT @@gtid_binlog_pos").await.unwrap().unwrap();
    let bytes: u64 =
        std::fs::read_dir(&source.archive.0).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    println!("{} transactions, {} MiB of log, {} workers", WRITERS * each, bytes >> 20, workers());

    let clone = Clone::stage(&source).await;
    let (logs, stopwatch) = (Arc::new(source.archive.clone()), Arc::new(Stopwatch::default()));
    let none = CancellationToken::new();
    clone.cloner.recover(&clone.site, &Target::Latest, logs, stopwatch.clone(), none).await.unwrap();
    let keiki = stopwatch.replay();
    assert_eq!(clone.session().await.value("SELECT @@gtid_slave_pos").await.unwrap().unwrap(), end);
    let wanted = counts(&clone.session().await).await;
    drop(clone);

    let mut measured = vec![("keiki, with the server's start", keiki)];
    for (name, is_durable) in [(SAME_SETTINGS, false), ("replica, durable", true)] {
        let clone = Clone::stage(&source).await;
        clone.recover(&source, Target::Backup(a_backup_id())).await.unwrap();
        let session = clone.session().await;
        measured.push((name, replicate(&session, port, &end, is_durable).await));
        assert_eq!(counts(&session).await, wanted, "{name}");
    }
    let clone = Clone::stage(&source).await;
    clone.recover(&source, Target::Backup(a_backup_id())).await.unwrap();
    measured.push(("mariadb-binlog | mariadb", pipe(&source, &clone)));
    assert_eq!(counts(&clone.session().await).await, wanted, "the client");
    println!("{:30} {:>8} {:>8}", "replayed by", "seconds", "times");
    for (name, took) in &measured {
        println!("{name:30} {:>8.2} {:>8.2}", took.as_secs_f64(), took.as_secs_f64() / keiki.as_secs_f64());
    }
    for (name, took) in measured.iter().filter(|(name, _)| is_full && *name != SAME_SETTINGS) {
        assert!(*took >= keiki, "{name} was faster than keiki");
    }
}

fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).clamp(1, WORKERS_MAX)
}

/// Takes the time of what a recovery says that it does.
#[derive(Default)]
struct Stopwatch(Mutex<Vec<(Instant, String)>>);

impl Progress for Stopwatch {
    fn set(&self, _done: u64, _total: u64) {}
    fn note(&self, text: String) {
        self.0.lock().unwrap().push((Instant::now(), text));
    }
}

impl Stopwatch {
    /// From when replay began, with the server not yet started, until it was at its end.
    fn replay(&self) -> Duration {
        let notes = self.0.lock().unwrap();
        let when = |start: &str| notes.iter().find(|(_, text)| text.starts_with(start)).unwrap().0;
        when("verifying") - when("replaying")
    }
}

/// A source with a base, and much log behind it that several writers have written at the same time.
async fn written_source(port: u16, transactions_each: u32) -> Source {
    let port = format!("--port={port}");
    let lax = ["--sync-binlog=0", "--innodb-flush-log-at-trx-commit=0", "--max-binlog-size=64M"];
    let open = ["--skip-networking=0", "--bind-address=127.0.0.1", port.as_str()];
    let mut source = Source::start(&[&lax[..], &open].concat()).await;
    for sql in [
        "CREATE USER repl@'127.0.0.1' IDENTIFIED BY 'x'",
        "GRANT REPLICATION SLAVE ON *.* TO repl@'127.0.0.1'",
        "CREATE TABLE shop.big (id BIGINT PRIMARY KEY, filler VARCHAR(250) NOT NULL, KEY (filler(20)))",
    ] {
        source.session.execute(sql).await.unwrap();
    }
    source.back_up().await;
    let writers = (0..WRITERS).map(|writer| {
        let endpoint = source.server.endpoint();
        tokio::spawn(async move {
            let session = Session::open(&endpoint).await.unwrap();
            for number in 0..transactions_each {
                let id = u64::from(writer * transactions_each + number) * 4;
                let values: Vec<String> = (id..id + 4).map(|id| format!("({id}, REPEAT(MD5({id}), 6))")).collect();
                session.execute(&format!("INSERT INTO shop.big VALUES {}", values.join(", "))).await.unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    source.archive_log().await;
    source
}

async fn counts(session: &Session) -> String {
    session.value("SELECT CONCAT(COUNT(*), ' ', SUM(CRC32(filler))) FROM shop.big").await.unwrap().unwrap()
}

/// The server fetches the log from the source itself and applies it.
async fn replicate(session: &Session, port: u16, end: &str, is_durable: bool) -> Duration {
    let flush = u8::from(is_durable);
    for sql in [
        format!("SET GLOBAL innodb_flush_log_at_trx_commit = {flush}"),
        format!("SET GLOBAL slave_parallel_threads = {}", workers()),
        format!(
            "CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = {port}, MASTER_USER = 'repl', \
             MASTER_PASSWORD = 'x', MASTER_USE_GTID = slave_pos"
        ),
    ] {
        session.execute(&sql).await.unwrap();
    }
    let began = Instant::now();
    session.execute("START SLAVE").await.unwrap();
    while session.value("SELECT @@gtid_slave_pos").await.unwrap().unwrap() != end {
        let status = session.query("SHOW SLAVE STATUS").await.unwrap();
        assert_ne!(status.first("Slave_SQL_Running"), Some("No"), "{:?}", status.first("Last_SQL_Error"));
        assert!(began.elapsed() < LIMIT, "{:?}", status.first("Last_IO_Error"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    began.elapsed()
}

/// The way of the manuals.
fn pipe(source: &Source, clone: &Clone) -> Duration {
    let (number, offset) = clone.site.backup_start.file().unwrap();
    // Of the other release, because these programs are there wherever tests run.
    let release = Release::V11_8;
    let mut reader = Command::new(release.program("mariadb-binlog"));
    reader.args(["--no-defaults", &format!("--start-position={offset}")]);
    let mut files: Vec<_> =
        std::fs::read_dir(&source.server.data_dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    let number_of = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("binlog.")?.parse::<u64>().ok();
    files.retain(|path| number_of(path).is_some_and(|found| found >= number));
    files.sort();
    reader.args(&files).stdout(Stdio::piped()).stderr(Stdio::null());
    as_user(&mut reader, &source.server.user);
    let mut client = Command::new(release.program("mariadb"));
    let password = read_password(&clone.site.run_dir.join(PASSWORD_FILE)).unwrap();
    client
        .arg("--no-defaults")
        .args(["--skip-ssl", "--binary-mode", "-u", ACCOUNT, "-S"])
        .arg(clone.site.run_dir.join(SOCKET_FILE))
        .env("MYSQL_PWD", password);
    let began = Instant::now();
    let mut reading = reader.spawn().unwrap();
    let output = client.stdin(reading.stdout.take().unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}", said.lines().last());
    assert!(reading.wait().unwrap().success());
    began.elapsed()
}
