//! The ledger for servers of the MySQL family: writers commit numbered rows in tables with and without a key and note what
//! they saw around each commit, while backups, log switches, DDL and one large transaction happen; then clones are made
//! of many moments, and every row must be there exactly if it was committed by then.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use keiki::base::random::random_u64;
use keiki::engine::mysql::clone::{ACCOUNT, PASSWORD_FILE, SOCKET_FILE};
use keiki::engine::mysql::session::{Endpoint, Session};
use keiki::engine::mysql::source::read_password;

use super::hosts::{Host, Lab, free_port};
use super::postgres::server_user;

/// The SQL in which the products differ.
pub struct Product {
    /// What a session's last transaction is called.
    pub last_gtid: &'static str,
    /// Whose columns `File` and `Position` are the end of the log.
    pub log_end: &'static str,
    /// What the last transaction in the log is called, as a whole or at its end.
    pub log_state: &'static str,
    /// Fills table `shop.bulk` in one transaction.
    pub bulk: String,
    /// Times in the log are whole seconds.
    pub has_whole_seconds: bool,
}

const WRITERS: i64 = 3;
const RANDOM_TIMES: usize = 8;
const RANDOM_GTIDS: usize = 3;
/// Rows of the one large transaction, of about a kilobyte each.
pub const BULK_ROWS: u64 = 20_000;

/// A committed transaction, with what its writer saw around the commit.
#[derive(Debug, Clone)]
struct Row {
    id: i64,
    time_before: Timestamp,
    time_after: Timestamp,
    gtid: String,
    /// The number at the end of its GTID, which is its place in the log.
    sequence: u64,
}

#[derive(Debug, Clone, Copy)]
enum Moment {
    Time(Timestamp),
    /// Exactly the transactions up to this number.
    Sequence(u64),
    /// Committed before the first instant: there; begun after the second: not there.
    Between(Timestamp, Timestamp),
}

struct Trial {
    title: String,
    arguments: Vec<String>,
    moment: Moment,
}

/// Writes history into the instance `orders` of host a, makes clones of it on host b, and compares them: how many were
/// exact, and what was wrong with the others.
pub async fn run(lab: &Lab, a: &Host, b: &Host, source: &Endpoint, product: &Product) -> (usize, Vec<String>) {
    let (rows, mut trials) = write_history(a, source, product).await;
    println!("{} transactions committed by {WRITERS} writers; {} clones to be made", rows.len(), trials.len() + 1);
    let now = Timestamp::now();
    trials.push(Trial {
        title: "latest".into(),
        arguments: vec!["--latest".into()],
        moment: Moment::Between(now, now),
    });
    let (mut passed, mut failures) = (0, Vec::new());
    for (number, trial) in trials.iter().enumerate() {
        match clone_and_compare(lab, a, b, number, trial, &rows).await {
            Ok(found) => {
                passed += 1;
                println!("pass  {:44} {found} rows", trial.title);
            }
            Err(complaint) => {
                println!("FAIL  {:44} {complaint}", trial.title);
                failures.push(format!("{}: {complaint}", trial.title));
            }
        }
    }
    (passed, failures)
}

/// Writes for a while with backups, log switches, DDL and a large transaction in between; returns what was committed and
/// the moments to be cloned.
async fn write_history(a: &Host, source: &Endpoint, product: &Product) -> (Vec<Row>, Vec<Trial>) {
    let control = Session::open(source).await.unwrap();
    for sql in [
        "CREATE DATABASE shop",
        "CREATE TABLE shop.ledger (id BIGINT PRIMARY KEY, writer INT NOT NULL, filler TEXT NOT NULL)",
        "CREATE TABLE shop.nokey (id BIGINT NOT NULL, part INT NOT NULL)",
        "CREATE TABLE shop.bulk (id BIGINT PRIMARY KEY, filler TEXT NOT NULL)",
    ] {
        control.execute(sql).await.unwrap();
    }
    let ledger = Ledger::start(source, product.last_gtid).await;
    let mut trials = Vec::new();
    ledger.grow(100).await;
    trials.push(backup_trial(a, "first backup set").await);
    let began = Timestamp::now();
    let first = ledger.last_sequence();
    ledger.grow(150).await;
    control.execute("FLUSH BINARY LOGS").await.unwrap();
    // As many whole seconds as there are times to be chosen.
    let half = Timestamp::now();
    while Timestamp::now().as_second() < half.as_second() + RANDOM_TIMES as i64 / 2 {
        ledger.grow(20).await;
    }
    control
        .execute("ALTER TABLE shop.ledger ADD COLUMN extra INT NOT NULL DEFAULT 7, ADD INDEX (writer)")
        .await
        .unwrap();
    control.query_within(Duration::from_secs(120), &product.bulk).await.unwrap();
    trials.push(position_trial(&ledger, &control, product).await);
    blocking(|| a.keiki_ok(&["backup", "create", "orders"]));
    control.execute("FLUSH BINARY LOGS").await.unwrap();
    control.execute("CREATE USER joe@localhost IDENTIFIED BY 'x'").await.unwrap();
    let half = Timestamp::now();
    while Timestamp::now().as_second() < half.as_second() + RANDOM_TIMES as i64 / 2 {
        ledger.grow(20).await;
    }
    ledger.grow(100).await;
    let (ended, last) = (Timestamp::now(), ledger.last_sequence());
    let rows = ledger.stop().await;
    for time in random_times(began, ended, product.has_whole_seconds) {
        let arguments = vec!["--at".into(), time.to_string()];
        trials.push(Trial { title: format!("time {time}"), arguments, moment: Moment::Time(time) });
    }
    let prefix = rows[0].gtid.trim_end_matches(|digit: char| digit.is_ascii_digit());
    for number in 0..RANDOM_GTIDS {
        let sequence = first + 1 + random_u64() % (last - first);
        let (option, moment) = match number {
            0 => ("--before-gtid", Moment::Sequence(sequence - 1)),
            _ => ("--gtid", Moment::Sequence(sequence)),
        };
        let gtid = format!("{prefix}{sequence}");
        trials.push(Trial { title: format!("{option} {gtid}"), arguments: vec![option.into(), gtid], moment });
    }
    (rows, trials)
}

/// Different times between the two, of the precision that the log has.
fn random_times(began: Timestamp, ended: Timestamp, has_whole_seconds: bool) -> Vec<Timestamp> {
    let unit_microseconds = if has_whole_seconds { 1_000_000 } else { 1 };
    let units = |time: Timestamp| time.as_microsecond() / unit_microseconds;
    let (first, last) = (units(began) + 1, units(ended));
    let mut chosen = BTreeSet::new();
    while chosen.len() < RANDOM_TIMES.min((last - first) as usize) {
        chosen.insert(first + 1 + (random_u64() % (last - first) as u64) as i64);
    }
    chosen.into_iter().map(|unit| Timestamp::from_microsecond(unit * unit_microseconds).unwrap()).collect()
}

/// The end of the log now, as the server prints it, and which transaction it lies behind.
async fn position_trial(ledger: &Ledger, control: &Session, product: &Product) -> Trial {
    ledger.grow(20).await;
    // Commits wait meanwhile, so that the position and the state belong together.
    control.execute("FLUSH TABLES WITH READ LOCK").await.unwrap();
    let rows = control.query(product.log_end).await.unwrap();
    let gtid = control.value(product.log_state).await.unwrap().unwrap();
    control.execute("UNLOCK TABLES").await.unwrap();
    let position = format!("{}:{}", rows.first("File").unwrap(), rows.first("Position").unwrap());
    let sequence = sequence_of(&gtid);
    let arguments = vec!["--position".into(), position.clone()];
    Trial { title: format!("position {position}"), arguments, moment: Moment::Sequence(sequence) }
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

/// The number at the end.
fn sequence_of(gtid: &str) -> u64 {
    gtid.rsplit(|character: char| !character.is_ascii_digit()).next().unwrap().parse().unwrap()
}

/// Lets the writers go on while this thread waits for a child.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

/// Running writers: each transaction has a row with a key and three without.
struct Ledger {
    rows: Arc<Mutex<Vec<Row>>>,
    stop: Arc<AtomicBool>,
    writers: Vec<tokio::task::JoinHandle<()>>,
}

impl Ledger {
    async fn start(source: &Endpoint, last_gtid: &'static str) -> Ledger {
        let (rows, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let mut writers = Vec::new();
        for writer in 0..WRITERS {
            let (rows, stop, session) = (rows.clone(), stop.clone(), Session::open(source).await.unwrap());
            writers.push(tokio::spawn(async move {
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let row = commit(&session, last_gtid, writer, writer * 1_000_000 + number).await;
                    rows.lock().unwrap().push(row);
                    // The disk of a test machine is slow, and the log need not be long.
                    tokio::time::sleep(Duration::from_millis(3)).await;
                }
            }));
        }
        Ledger { rows, stop, writers }
    }

    fn len(&self) -> usize {
        self.rows.lock().unwrap().len()
    }

    fn last_sequence(&self) -> u64 {
        self.rows.lock().unwrap().iter().map(|row| row.sequence).max().unwrap()
    }

    /// Waits until this many more are committed.
    async fn grow(&self, more: usize) {
        let wanted = self.len() + more;
        let began = Instant::now();
        while self.len() < wanted {
            assert!(began.elapsed() < Duration::from_secs(120), "the writers are stuck");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn stop(self) -> Vec<Row> {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.unwrap();
        }
        self.rows.lock().unwrap().clone()
    }
}

async fn commit(session: &Session, last_gtid: &str, writer: i64, id: i64) -> Row {
    let time_before = Timestamp::now();
    let limit = Duration::from_secs(120);
    for sql in [
        "BEGIN".to_string(),
        format!("INSERT INTO shop.nokey VALUES ({id}, 1), ({id}, 2), ({id}, 3)"),
        format!("INSERT INTO shop.ledger (id, writer, filler) VALUES ({id}, {writer}, REPEAT('x', 200))"),
        "COMMIT".to_string(),
    ] {
        session.query_within(limit, &sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    let time_after = Timestamp::now();
    let gtid = session.value(last_gtid).await.unwrap().unwrap();
    Row { id, time_before, time_after, sequence: sequence_of(&gtid), gtid }
}

fn compare(rows: &[Row], found: &BTreeSet<i64>, moment: Moment) -> Vec<String> {
    let mut complaints = Vec::new();
    for row in rows {
        let (must, must_not) = match moment {
            Moment::Time(time) => (row.time_after <= time, row.time_before > time),
            Moment::Sequence(last) => (row.sequence <= last, row.sequence > last),
            Moment::Between(from, to) => (row.time_after <= from, row.time_before > to),
        };
        if must && !found.contains(&row.id) {
            complaints.push(format!("a transaction of before {moment:?} is missing: {row:?}"));
        }
        if must_not && found.contains(&row.id) {
            complaints.push(format!("a transaction of after {moment:?} is there: {row:?}"));
        }
    }
    let known: BTreeSet<i64> = rows.iter().map(|row| row.id).collect();
    complaints.extend(found.difference(&known).map(|id| format!("row {id} was never written")));
    complaints
}

async fn clone_and_compare(
    lab: &Lab,
    a: &Host,
    b: &Host,
    number: usize,
    trial: &Trial,
    rows: &[Row],
) -> Result<usize, String> {
    let (name, port) = (format!("clone-{number}"), free_port().to_string());
    let mut arguments = vec!["--json", "clone", "orders", "--to", "b", "--as", &name, "--port", &port];
    arguments.extend(trial.arguments.iter().map(String::as_str));
    let output = blocking(|| a.keiki(&arguments));
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}{said}", String::from_utf8_lossy(&output.stdout)));
    }
    let looked = look(&lab.path("clones-b").join(format!("{name}.run"))).await;
    let archived = b.instance(&name)["state"].clone();
    let removed = blocking(|| b.keiki(&["discard", &name, "--yes"]));
    if !removed.status.success() {
        return Err(format!("cannot discard: {}", String::from_utf8_lossy(&removed.stderr)));
    }
    let found = looked?;
    if archived.is_null() {
        return Err("the clone is not an instance of host b".to_string());
    }
    let complaints = compare(rows, &found, trial.moment);
    match complaints.first() {
        Some(first) => Err(format!("{} complaints, the first: {first}", complaints.len())),
        None => Ok(found.len()),
    }
}

/// What a clone holds, after its tables were checked against each other and by the server; and it must be writable.
async fn look(run_dir: &std::path::Path) -> Result<BTreeSet<i64>, String> {
    let password = read_password(&run_dir.join(PASSWORD_FILE)).map_err(|error| error.to_string())?;
    let endpoint = Endpoint {
        socket: run_dir.join(SOCKET_FILE),
        user: ACCOUNT.to_string(),
        password: Some(password),
        run_as: server_user().name,
    };
    let session = Session::open(&endpoint).await.map_err(|error| format!("the clone does not answer: {error}"))?;
    let ask = async |sql: &str| session.query_within(Duration::from_secs(60), sql).await.map_err(|e| e.to_string());
    let mut checked = Vec::new();
    for table in ["ledger", "nokey", "bulk"] {
        checked.extend(ask(&format!("CHECK TABLE shop.{table} EXTENDED")).await?.rows);
    }
    if let Some(bad) = checked.iter().find(|row| row.last() != Some(&Some("OK".to_string()))) {
        return Err(format!("CHECK TABLE says {bad:?}"));
    }
    let bulk = ask("SELECT COUNT(*) AS n FROM shop.bulk").await?;
    if ![Some("0"), Some(BULK_ROWS.to_string().as_str())].contains(&bulk.first("n")) {
        return Err(format!("a part of the large transaction is there: {:?} rows", bulk.first("n")));
    }
    let ids = |rows: Vec<Vec<Option<String>>>| -> Vec<i64> {
        rows.into_iter().map(|row| row[0].as_deref().unwrap_or_default().parse().unwrap_or(-1)).collect()
    };
    let keyed = ids(ask("SELECT id FROM shop.ledger WHERE filler = REPEAT('x', 200) ORDER BY id").await?.rows);
    let unkeyed = "SELECT id FROM shop.nokey GROUP BY id HAVING COUNT(*) = 3 AND SUM(part) = 6 ORDER BY id";
    let total = ask("SELECT COUNT(*) AS n FROM shop.nokey").await?;
    if keyed != ids(ask(unkeyed).await?.rows) || total.first("n") != Some((keyed.len() * 3).to_string().as_str()) {
        return Err("the tables with and without a key differ".to_string());
    }
    ask("INSERT INTO shop.ledger (id, writer, filler) VALUES (-1, -1, 'written by the clone')").await?;
    Ok(keyed.into_iter().collect())
}

/// The comparison itself is tested: a missing and an extra row are both found.
#[test]
fn a_missing_and_an_extra_transaction_are_both_found() {
    let at = |second: i64| Timestamp::from_second(second).unwrap();
    let row = |id: i64, before, after| Row {
        id,
        time_before: at(before),
        time_after: at(after),
        sequence: u64::try_from(id).unwrap(),
        gtid: id.to_string(),
    };
    let rows = [row(1, 10, 11), row(2, 19, 20), row(3, 30, 31)];
    let found = |ids: &[i64]| ids.iter().copied().collect::<BTreeSet<i64>>();
    for moment in [Moment::Time(at(20)), Moment::Sequence(2), Moment::Between(at(20), at(20))] {
        assert!(compare(&rows, &found(&[1, 2]), moment).is_empty());
        assert_eq!(compare(&rows, &found(&[1]), moment).len(), 1);
        assert_eq!(compare(&rows, &found(&[1, 2, 3]), moment).len(), 1);
        assert_eq!(compare(&rows, &found(&[1, 2, 9]), moment).len(), 1);
    }
}
