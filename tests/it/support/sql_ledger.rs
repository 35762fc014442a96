//! The ledger for servers of the MySQL family: writers commit numbered rows in tables with and without a key and note what
//! they saw around each commit, while backups, log switches, DDL and one large transaction happen; then clones are made
//! of many moments, and every row must be there exactly if it was committed by then. Of some moments the tables' checksums
//! are taken on the source, and those of the clone must be the same. What a backup does to commits, and how much memory
//! the agents take, is printed.

use std::collections::{BTreeMap, BTreeSet};
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

mod pulse;
mod rival;

use pulse::Pulse;
pub use rival::Rival;
use rival::Stretch;

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
    /// To how many times clones are made.
    pub times: usize,
}

const WRITERS: i64 = 3;
/// Rows of the one large transaction, of about a kilobyte each: 50 MB.
pub const BULK_ROWS: u64 = 52_000;
const TABLES: [&str; 4] = ["ledger", "nokey", "bulk", "pulse"];
/// An agent ships and restores in pieces; what is in memory at once does not depend on the size of a transaction.
/// Blocks of log that are fetched ahead are 64 MiB of it; most was seen where the server that replays got little time.
const AGENT_BYTES_MAX: u64 = 320 << 20;

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
    /// What `CHECKSUM TABLE` said of each table on the source at that moment, where it was asked.
    sums: Option<BTreeMap<String, String>>,
    /// Measured with its clone.
    contest: Option<Contest>,
}

/// What a clone is good for beside being compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contest {
    /// It replays nothing, and so others may replay this into it.
    Rival(Stretch),
    /// It replays the same.
    Keiki,
}

/// What a clone was found to be.
struct Looked {
    rows: usize,
    /// How long its replay took, with all that belongs to its step.
    recover: Duration,
    /// How long the rival's replay took.
    rival: Option<Duration>,
}

impl Trial {
    fn new(title: String, arguments: &[&str], moment: Moment) -> Trial {
        let arguments = arguments.iter().map(|argument| argument.to_string()).collect();
        Trial { title, arguments, moment, sums: None, contest: None }
    }
}

/// A moment of the source at which nobody wrote.
struct Noted {
    /// As the server prints it, for `--position`.
    position: String,
    gtid: String,
    sequence: u64,
    sums: BTreeMap<String, String>,
}

/// Writes history into the instance `orders` of host a, makes clones of it on host b, and compares them: how many were
/// exact, and what was wrong with the others. Says how much faster keiki's replay was than the rival's.
pub async fn run(
    lab: &Lab,
    a: &Host,
    b: &Host,
    source: &Endpoint,
    product: &Product,
    rival: &Rival,
) -> (usize, Vec<String>) {
    let (rows, trials) = write_history(a, source, product).await;
    println!("{} transactions committed by {WRITERS} writers; {} clones to be made", rows.len(), trials.len());
    let (mut passed, mut failures) = (0, Vec::new());
    // How long the step took at least, which is what it takes without replay, the one that replays the stretch, and the rival.
    let (mut idle, mut keiki, mut other) = (Duration::MAX, None, None);
    for (number, trial) in trials.iter().enumerate() {
        let began = Instant::now();
        match clone_and_compare(lab, a, b, number, trial, &rows, rival).await {
            Ok(found) => {
                passed += 1;
                let sums = if trial.sums.is_some() { ", checksums equal" } else { "" };
                let took = began.elapsed().as_secs_f64();
                println!("pass  {:44} {} rows{sums}, {took:.1} s", trial.title, found.rows);
                idle = idle.min(found.recover);
                other = other.or(found.rival);
                keiki = keiki.or((trial.contest == Some(Contest::Keiki)).then_some(found.recover));
            }
            Err(complaint) => {
                println!("FAIL  {:44} {complaint}", trial.title);
                failures.push(format!("{}: {complaint}", trial.title));
            }
        }
    }
    match (keiki, other) {
        (Some(keiki), Some(other)) if keiki > idle => failures.extend(rival.verdict(keiki - idle, other).err()),
        _ => failures.push("replay was not measured".to_string()),
    }
    for host in [a, b] {
        let peak = host.peak_memory_bytes();
        println!("memory of the agent of host {} at most {} MiB", host.name, peak >> 20);
        if peak > AGENT_BYTES_MAX {
            failures.push(format!("the agent of host {} had {} MiB", host.name, peak >> 20));
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
        "CREATE TABLE shop.pulse (id BIGINT PRIMARY KEY AUTO_INCREMENT, at TIMESTAMP(6))",
    ] {
        control.execute(sql).await.unwrap();
    }
    let ledger = Ledger::start(source, product.last_gtid).await;
    let pulse = Pulse::start(source).await;
    ledger.grow(100).await;
    let (mut first_backup, backup_start) = backup_trial(a, &pulse, "first backup set").await;
    let began = Timestamp::now();
    ledger.grow(100).await;
    let early = note(&ledger, &control, product).await;
    control.execute("FLUSH BINARY LOGS").await.unwrap();
    ledger.grow_for_seconds(product.times / 2).await;
    control
        .execute("ALTER TABLE shop.ledger ADD COLUMN extra INT NOT NULL DEFAULT 7, ADD INDEX (writer)")
        .await
        .unwrap();
    control.query_within(Duration::from_secs(120), &product.bulk).await.unwrap();
    let middle = note(&ledger, &control, product).await;
    backup_trial(a, &pulse, "second backup").await;
    control.execute("FLUSH BINARY LOGS").await.unwrap();
    control.execute("CREATE USER joe@localhost IDENTIFIED BY 'x'").await.unwrap();
    ledger.grow_for_seconds(product.times - product.times / 2).await;
    let late = note(&ledger, &control, product).await;
    ledger.grow(100).await;
    let ended = Timestamp::now();
    let rows = ledger.stop().await;
    println!("{}", pulse.stop().await);

    // Of the log between them the large transaction is the most.
    first_backup.contest = Some(Contest::Rival(Stretch::parse(&backup_start, &middle.position)));
    let mut trials = vec![first_backup];
    for time in random_times(began, ended, product) {
        trials.push(Trial::new(format!("time {time}"), &["--at", &time.to_string()], Moment::Time(time)));
    }
    let position = middle.position.clone();
    trials.push(Trial { contest: Some(Contest::Keiki), ..middle.trial("--position", &position) });
    let (first, gtid) = (early.sequence, early.gtid.clone());
    trials.push(early.trial("--gtid", &gtid));
    // What comes right after the moment is the first that is not to be there.
    let next = with_sequence(&late.gtid, late.sequence + 1);
    trials.push(late.trial("--before-gtid", &next));
    let last = rows.iter().map(|row| row.sequence).max().unwrap();
    let sequence = first + 1 + random_u64() % (last - first);
    let gtid = with_sequence(&gtid, sequence);
    trials.push(Trial::new(format!("--gtid {gtid}"), &["--gtid", &gtid], Moment::Sequence(sequence)));
    let now = Timestamp::now();
    let mut latest = Trial::new("latest".into(), &["--latest"], Moment::Between(now, now));
    latest.sums = Some(checksums(&control).await.unwrap());
    trials.push(latest);
    (rows, trials)
}

/// Different times between the two, of the precision that the log has.
fn random_times(began: Timestamp, ended: Timestamp, product: &Product) -> Vec<Timestamp> {
    let unit_microseconds = if product.has_whole_seconds { 1_000_000 } else { 1 };
    let units = |time: Timestamp| time.as_microsecond() / unit_microseconds;
    let (first, last) = (units(began) + 1, units(ended));
    let mut chosen = BTreeSet::new();
    while chosen.len() < product.times.min((last - first) as usize) {
        chosen.insert(first + 1 + (random_u64() % (last - first) as u64) as i64);
    }
    chosen.into_iter().map(|unit| Timestamp::from_microsecond(unit * unit_microseconds).unwrap()).collect()
}

/// The end of the log now, and what the tables hold there.
async fn note(ledger: &Ledger, control: &Session, product: &Product) -> Noted {
    ledger.grow(20).await;
    // Commits wait meanwhile, so that everything that is asked belongs together.
    control.execute("FLUSH TABLES WITH READ LOCK").await.unwrap();
    let rows = control.query(product.log_end).await.unwrap();
    let state = control.value(product.log_state).await.unwrap().unwrap();
    let sums = checksums(control).await.unwrap();
    control.execute("UNLOCK TABLES").await.unwrap();
    ledger.grow(20).await;
    let position = format!("{}:{}", rows.first("File").unwrap(), rows.first("Position").unwrap());
    let sequence = sequence_of(&state);
    let gtid = with_sequence(&ledger.rows.lock().unwrap()[0].gtid, sequence);
    Noted { position, gtid, sequence, sums }
}

impl Noted {
    /// A clone to this moment, by this option.
    fn trial(self, option: &str, value: &str) -> Trial {
        let title = format!("{option} {value}");
        Trial { sums: Some(self.sums), ..Trial::new(title, &[option, value], Moment::Sequence(self.sequence)) }
    }
}

/// What `CHECKSUM TABLE` says of each table.
async fn checksums(session: &Session) -> Result<BTreeMap<String, String>, String> {
    let mut sums = BTreeMap::new();
    for table in TABLES {
        let sql = format!("CHECKSUM TABLE shop.{table}");
        let rows = session.query_within(Duration::from_secs(120), &sql).await.map_err(|error| error.to_string())?;
        let sum = rows.first("Checksum").ok_or_else(|| format!("{sql} says nothing"))?;
        sums.insert(table.to_string(), sum.to_string());
    }
    Ok(sums)
}

/// Takes a backup; its clone must hold what was committed before it began and nothing that began after it ended. Also
/// where in the log it begins.
async fn backup_trial(a: &Host, pulse: &Pulse, title: &str) -> (Trial, String) {
    let from = Timestamp::now();
    let lock = pulse.during(|| blocking(|| a.keiki_ok(&["backup", "create", "orders"])));
    let to = Timestamp::now();
    let list = a.json(&["backup", "list", "orders"]);
    let text = |key: &str| list.as_array().unwrap().last().unwrap()[key].as_str().unwrap().to_string();
    let id = text("id");
    let said = blocking(|| a.keiki_ok(&["backup", "show", "orders", &id]));
    let said = said.lines().find_map(|line| line.strip_prefix("lock_seconds ")).map(str::trim);
    let said = said.map_or(String::new(), |seconds| format!("; its program says that it locked for {seconds} s"));
    println!("{title}: {lock}{said}");
    (Trial::new(title.to_string(), &["--backup", &id], Moment::Between(from, to)), text("start"))
}

/// The same GTID with another number at its end.
fn with_sequence(gtid: &str, sequence: u64) -> String {
    format!("{}{sequence}", gtid.trim_end_matches(|digit: char| digit.is_ascii_digit()))
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

    /// Waits until this many more are committed.
    async fn grow(&self, more: usize) {
        let wanted = self.len() + more;
        let began = Instant::now();
        while self.len() < wanted {
            assert!(began.elapsed() < Duration::from_secs(120), "the writers are stuck");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until so many whole seconds have passed and something was committed in each.
    async fn grow_for_seconds(&self, seconds: usize) {
        let began = Timestamp::now().as_second();
        while Timestamp::now().as_second() < began + seconds as i64 {
            self.grow(20).await;
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
    rival: &Rival,
) -> Result<Looked, String> {
    let (name, port) = (format!("clone-{number}"), free_port().to_string());
    let mut arguments = vec!["--json", "clone", "orders", "--to", "b", "--as", &name, "--port", &port];
    arguments.extend(trial.arguments.iter().map(String::as_str));
    let output = blocking(|| a.keiki(&arguments));
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}{said}", String::from_utf8_lossy(&output.stdout)));
    }
    let run_dir = lab.path("clones-b").join(format!("{name}.run"));
    let looked = look(&run_dir, trial.sums.as_ref()).await;
    let rival = match trial.contest {
        Some(Contest::Rival(stretch)) => Some(blocking(|| rival.replay(stretch, &run_dir))),
        _ => None,
    };
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
        None => Ok(Looked { rows: found.len(), recover: recover_time(&output.stdout)?, rival: rival.transpose()? }),
    }
}

/// How long the step took that replays, as the report of a job says.
fn recover_time(report: &[u8]) -> Result<Duration, String> {
    let report: serde_json::Value = serde_json::from_slice(report).map_err(|error| error.to_string())?;
    let steps = report["steps"].as_array().ok_or_else(|| format!("no steps in {report}"))?;
    let step =
        steps.iter().find(|step| step["name"] == "recover").ok_or_else(|| format!("no such step in {report}"))?;
    let time = |key: &str| step[key].as_str().and_then(|text| text.parse::<Timestamp>().ok());
    let (began, ended) = time("began_at").zip(time("ended_at")).ok_or_else(|| format!("no times in {step}"))?;
    Duration::try_from(ended.duration_since(began)).map_err(|error| error.to_string())
}

/// What a clone holds, after its tables were checked against each other, by the server and by the source's checksums; and
/// it must be writable.
async fn look(run_dir: &std::path::Path, sums: Option<&BTreeMap<String, String>>) -> Result<BTreeSet<i64>, String> {
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
    for table in TABLES {
        checked.extend(ask(&format!("CHECK TABLE shop.{table} EXTENDED")).await?.rows);
    }
    if let Some(bad) = checked.iter().find(|row| row.last() != Some(&Some("OK".to_string()))) {
        return Err(format!("CHECK TABLE says {bad:?}"));
    }
    if let Some(wanted) = sums {
        let found = checksums(&session).await?;
        if found != *wanted {
            return Err(format!("the checksums are {found:?}, on the source they were {wanted:?}"));
        }
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
