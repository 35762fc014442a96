//! Ten thousand log objects and a thousand backups: what an agent asks the store until it has an answer, and how long
//! that takes when each request takes a while.
//!
//! Of ten thousand log objects only those whose content somebody may want are real; the others are garbage, so that a
//! reader of them would notice.

use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;
use keiki::base::clock::ManualClock;
use keiki::error::Result;
use keiki::job::window::{confirm_log, window_of};
use keiki::model::backup::{Backup, BackupKind};
use keiki::model::cost::{Reading, RequestKind};
use keiki::model::engine_kind::EngineKind;
use keiki::model::id::{BackupId, IncarnationId, JobId, RunId};
use keiki::model::incarnation::{Incarnation, LeaseHolder};
use keiki::model::log::{LogChunk, LogSummary};
use keiki::model::position::{Lsn, Position};
use keiki::model::window::Window;
use keiki::repo::backup_reader::Backups;
use keiki::repo::backup_writer::{BackupOptions, BackupWriter};
use keiki::repo::incarnations::Incarnations;
use keiki::repo::lease::LeaseKeeper;
use keiki::repo::log_catalogue::LogCatalogue;
use keiki::repo::log_writer::{LogBytes, LogWriter};
use keiki::repo::repository::Repository;
use keiki::store::faulty::{Fault, Faults, FaultyStore, Operation, When};
use keiki::store::memory::MemoryStore;
use keiki::store::metered::MeteredStore;
use keiki::store::read::read_all;
use keiki::store::{Key, PutCondition, Store};

use super::support::hosts::{Host, HostOptions, Lab, free_port};
use super::support::postgres::Version;

const LOG_FILES: u64 = 10_000;
const BACKUPS: u64 = 1_000;
const SEGMENT_BYTES: u64 = 1 << 20;
/// How long each request takes: a near object store.
const LATENCY: Duration = Duration::from_millis(4);
/// How long a person is willing to wait.
const PATIENCE: Duration = Duration::from_secs(2);
/// What is asked once only may take longer on a machine that is busy with other tests: it took 3.2 s while compilers ran,
/// and takes 0.2 s alone.
const PATIENCE_WHEN_BUSY: Duration = Duration::from_secs(10);
/// How often the command line may be asked for an answer in time.
const ATTEMPTS: usize = 5;

fn began_at() -> Timestamp {
    "2026-11-21T00:00:00Z".parse().unwrap()
}

fn at(second: u64) -> Timestamp {
    began_at() + Duration::from_secs(second)
}

fn wal(bytes: u64) -> Position {
    Position::Wal { timeline: 1, lsn: Lsn(SEGMENT_BYTES + bytes) }
}

/// The segment that begins at `wal(number * SEGMENT_BYTES)`.
fn segment(number: u64) -> String {
    format!("00000001{:08X}{:08X}", (number + 1) / 4096, (number + 1) % 4096)
}

/// A segment of zeros with one commit in it.
struct Zeros {
    left: usize,
    commit_at: Timestamp,
}

impl LogBytes for Zeros {
    fn read(&mut self) -> Result<Bytes> {
        Ok(Bytes::from(vec![0; std::mem::take(&mut self.left)]))
    }

    fn summary(&self) -> LogSummary {
        LogSummary {
            first_commit_at: Some(self.commit_at),
            last_commit_at: Some(self.commit_at),
            ..LogSummary::default()
        }
    }
}

/// The agent of the source: it fills the repository, and goes on.
struct Source {
    store: Arc<dyn Store>,
    repo: Arc<Repository>,
    incarnation: Incarnation,
    lease: Arc<LeaseKeeper>,
    writer: LogWriter,
    spool: tempfile::TempDir,
}

impl Source {
    async fn new(store: Arc<dyn Store>, log_files: u64, backups: u64) -> Source {
        let repo = Repository::init(store.clone(), began_at()).await.unwrap();
        let incarnation = Incarnation {
            id: IncarnationId::fresh(),
            engine: EngineKind::Postgres,
            engine_version: "15.8".into(),
            instance: "orders".into(),
            host: "a".into(),
            system_id: "7".into(),
            began_at: began_at(),
            parent: None,
        };
        Incarnations::new(repo.clone()).create(&incarnation).await.unwrap();
        let holder = LeaseHolder {
            host: "a".into(),
            run: RunId::fresh(),
            machine_id: "m".into(),
            boot_id: "b".into(),
            process_id: 1,
            process_start_ticks: 1,
        };
        let clock = ManualClock::new(at(log_files));
        let ttl = Duration::from_secs(30);
        let lease = LeaseKeeper::acquire(repo.clone(), incarnation.id, holder, clock, ttl, |_| true).await.unwrap();
        let catalogue = LogCatalogue::load(repo.clone(), incarnation.id).await.unwrap();
        let writer = LogWriter::new(repo.clone(), lease.clone(), catalogue);
        let source = Source { store, repo, incarnation, lease, writer, spool: tempfile::tempdir().unwrap() };
        for number in 0..log_files {
            match log_files < LOG_FILES || number < 2 || number + 2 >= log_files {
                true => source.ship(number).await,
                false => source.put_garbage(number).await,
            }
        }
        source.lease.renew(Some((wal(log_files * SEGMENT_BYTES), at(log_files)))).await.unwrap();
        for number in 0..backups {
            source.back_up(number * log_files / backups).await;
        }
        source
    }

    async fn ship(&self, number: u64) {
        let chunk = LogChunk { file: segment(number), from_bytes: 0, to_bytes: SEGMENT_BYTES, sealed: true };
        let zeros = Zeros { left: SEGMENT_BYTES as usize, commit_at: at(number) };
        self.writer.ship(chunk, Box::new(zeros)).await.unwrap();
    }

    fn log_key(&self, number: u64) -> Key {
        Key::parse(&format!("incarnations/{}/log/{}/sealed", self.incarnation.id, segment(number))).unwrap()
    }

    async fn put_garbage(&self, number: u64) {
        let body = Bytes::from_static(&[7; 300]);
        self.store.put(&self.log_key(number), body, PutCondition::Create).await.unwrap();
    }

    /// A backup that begins in the middle of the segment and ends a little later.
    async fn back_up(&self, segment: u64) {
        let start = segment * SEGMENT_BYTES + SEGMENT_BYTES / 2;
        let id = BackupId::new(at(segment), segment);
        let options = BackupOptions {
            job: JobId::fresh(),
            backup: id.clone(),
            host: "a".into(),
            began_at: at(segment),
            zstd_level: 1,
            spool_dir: self.spool.path().to_path_buf(),
        };
        let writer = BackupWriter::begin(self.repo.clone(), self.lease.clone(), options).await.unwrap();
        let draft = Backup {
            id,
            incarnation: self.incarnation.id,
            kind: BackupKind::Automatic,
            start: wal(start),
            stop: wal(start + 1000),
            began_at: at(segment),
            ended_at: at(segment + 1),
            engine_version: "15.8".into(),
            file_count: 0,
            restored_bytes: 0,
            stored_bytes: 0,
            engine_facts: [("wal_segment_size".to_string(), SEGMENT_BYTES.to_string())].into(),
        };
        writer.publish(draft).await.unwrap();
    }

    async fn delete(&self, key: &Key) {
        self.store.delete(std::slice::from_ref(key)).await.unwrap();
    }
}

/// An agent elsewhere that looks at the repository over a slow line, with a state directory.
struct Agent {
    repo: Arc<Repository>,
    incarnation: Incarnation,
    clock: Arc<ManualClock>,
    report: String,
}

impl Agent {
    async fn start(source: &Source, dir: &Path, latency: Duration) -> Agent {
        let faults = Faults::new();
        for operation in [Operation::Get, Operation::Head, Operation::List, Operation::Put] {
            faults.inject(operation, When::Every, Fault::Delay(latency));
        }
        let clock = ManualClock::new(at(LOG_FILES + 100));
        let slow = Arc::new(FaultyStore::new(source.store.clone(), faults));
        let (store, _) = MeteredStore::around(slow, clock.clone());
        let repo = Repository::open_with_local_copy(store, dir.to_path_buf(), clock.clone()).await.unwrap();
        Agent { repo, incarnation: source.incarnation.clone(), clock, report: String::new() }
    }

    fn reading(&self) -> Reading {
        self.repo.store().meter().unwrap().read()
    }

    /// Runs `work`, writes down what it cost, and holds it to the limits.
    async fn measure<T>(&mut self, what: &str, requests_max: u64, work: impl AsyncFnOnce(&Agent) -> T) -> T {
        let (before, began) = (self.reading().total, Instant::now());
        let result = work(self).await;
        let (after, took) = (self.reading().total, began.elapsed());
        let requests = after.all_requests() - before.all_requests();
        let by_kind: Vec<String> = RequestKind::ALL
            .iter()
            .map(|kind| (kind.name(), after.requests(*kind) - before.requests(*kind)))
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{count} {name}"))
            .collect();
        let line = format!("{what:40} {requests:5} requests ({}), {took:?}", by_kind.join(", "));
        println!("{line}");
        self.report.push_str(&line);
        assert!(requests <= requests_max, "more than {requests_max}: {line}");
        assert!(took < PATIENCE_WHEN_BUSY, "{line}");
        result
    }

    /// What `keiki status` asks for each instance.
    async fn newest(&self) -> Option<BackupId> {
        let backups = Backups::new(self.repo.clone());
        let newest = backups.newest(self.incarnation.id, Duration::from_secs(60), |_| true).await.unwrap();
        newest.map(|backup| backup.id)
    }

    /// What `keiki window` asks.
    async fn window(&self) -> Window {
        let incarnation = Incarnations::new(self.repo.clone()).find("orders").await.unwrap();
        window_of(&self.repo, &incarnation, None).await.unwrap()
    }

    /// What a clone asks before it begins: as its check list does.
    async fn start_of_a_clone(&self) -> Window {
        let incarnation = Incarnations::new(self.repo.clone()).find("a/orders").await.unwrap();
        let window = window_of(&self.repo, &incarnation, None).await.unwrap();
        let backups = Backups::new(self.repo.clone()).list(incarnation.id).await.unwrap().backups;
        let is_as_remembered = !confirm_log(&self.repo, &incarnation, backups.last().unwrap()).await.unwrap();
        assert!(is_as_remembered);
        window
    }
}

fn assert_whole(window: &Window, log_files: u64) {
    assert_eq!(window.holes, []);
    let reach = &window.reaches[0];
    assert_eq!((window.reaches.len(), reach.to), (1, wal(log_files * SEGMENT_BYTES)));
    assert_eq!(reach.from, wal(SEGMENT_BYTES / 2 + 1000));
    assert_eq!(reach.covered_until, Some(at(LOG_FILES)));
}

#[tokio::test]
async fn ten_thousand_log_objects_and_a_thousand_backups_are_answered_for_in_two_seconds() {
    let source = Source::new(Arc::new(MemoryStore::new("t")), LOG_FILES, BACKUPS).await;
    let dir = tempfile::tempdir().unwrap();

    let mut agent = Agent::start(&source, dir.path(), LATENCY).await;
    agent.measure("status, nothing known yet", 5, async |agent| agent.newest().await).await.unwrap();
    agent.measure("status again", 0, async |agent| agent.newest().await).await.unwrap();
    let window = agent.measure("window, nothing known yet", BACKUPS + 60, async |agent| agent.window().await).await;
    assert_whole(&window, LOG_FILES);
    let again = agent.measure("window again", 15, async |agent| agent.window().await).await;
    assert_eq!(again, window);
    let again = agent.measure("start of a clone", 30, async |agent| agent.start_of_a_clone().await).await;
    assert_eq!(again, window);
    agent.repo.local_copy().save(true).await;
    drop(agent);

    // The next run of the agent goes on from where this one left off.
    let mut agent = Agent::start(&source, dir.path(), LATENCY).await;
    agent.measure("status after a restart", 5, async |agent| agent.newest().await).await.unwrap();
    let again = agent.measure("window after a restart", 30, async |agent| agent.window().await).await;
    assert_eq!(again, window);
    let again =
        agent.measure("start of a clone after a restart", 30, async |agent| agent.start_of_a_clone().await).await;
    assert_eq!(again, window);
}

/// The file in which an agent keeps what it knows of an incarnation.
fn kept_file(dir: &Path, repo: &Repository, incarnation: IncarnationId) -> std::path::PathBuf {
    dir.join(repo.id().to_string()).join(incarnation.to_string())
}

#[tokio::test]
async fn a_local_copy_that_is_lost_or_damaged_or_of_another_repository_does_no_harm() {
    let source = Source::new(Arc::new(MemoryStore::new("t")), 300, 5).await;
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(&source, dir.path(), Duration::ZERO).await;
    let window = agent.window().await;
    agent.repo.local_copy().save(true).await;
    let file = kept_file(dir.path(), &agent.repo, source.incarnation.id);
    let good = std::fs::read(&file).unwrap();

    let other = Source::new(Arc::new(MemoryStore::new("u")), 10, 1).await;
    let other_dir = tempfile::tempdir().unwrap();
    let other_agent = Agent::start(&other, other_dir.path(), Duration::ZERO).await;
    other_agent.window().await;
    other_agent.repo.local_copy().save(true).await;
    let of_another = std::fs::read(kept_file(other_dir.path(), &other.repo, other.incarnation.id)).unwrap();

    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for bytes in [&good[..], &[], b"\n", &good[..good.len() / 2], &flipped, &of_another] {
        std::fs::write(&file, bytes).unwrap();
        let agent = Agent::start(&source, dir.path(), Duration::ZERO).await;
        assert_eq!(agent.window().await, window);
        let gets = agent.reading().total.requests(RequestKind::Get);
        let is_used = gets < 10;
        assert_eq!(is_used, bytes == good, "{gets} gets");
        // What was no good is made anew.
        agent.repo.local_copy().save(true).await;
        assert!(std::fs::read(&file).unwrap().len() > good.len() / 2);
    }
    std::fs::remove_dir_all(dir.path()).unwrap();
    assert_eq!(Agent::start(&source, dir.path(), Duration::ZERO).await.window().await, window);
}

#[tokio::test]
async fn what_another_agent_adds_and_removes_is_seen_by_the_next_look() {
    let source = Source::new(Arc::new(MemoryStore::new("t")), 300, 5).await;
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(&source, dir.path(), Duration::ZERO).await;
    agent.window().await;

    // Log and a backup are added.
    source.ship(300).await;
    source.back_up(299).await;
    let window = agent.measure("window after additions", 20, async |agent| agent.window().await).await;
    assert_eq!((window.reaches[0].to, window.holes.len()), (wal(301 * SEGMENT_BYTES), 0));

    // The oldest backup expires, and the log before the next one with it.
    let oldest = BackupId::new(at(0), 0);
    let manifest = format!("incarnations/{}/backups/{oldest}/manifest", source.incarnation.id);
    source.delete(&Key::parse(&manifest).unwrap()).await;
    for number in 0..60 {
        source.delete(&source.log_key(number)).await;
    }
    let window = agent.measure("window after an expiry", 20, async |agent| agent.window().await).await;
    assert_eq!((window.reaches[0].from, window.holes.len()), (wal(60 * SEGMENT_BYTES + SEGMENT_BYTES / 2 + 1000), 0));

    // Somebody removes log in the middle, by hand: a clone that needs it finds out before it begins ...
    let removed = read_all(source.store.as_ref(), &source.log_key(150), SEGMENT_BYTES).await.unwrap();
    source.delete(&source.log_key(150)).await;
    let incarnation = source.incarnation.clone();
    let backups = Backups::new(agent.repo.clone()).list(incarnation.id).await.unwrap().backups;
    let (before, after) = (&backups[1], backups.last().unwrap());
    assert!(!confirm_log(&agent.repo, &incarnation, after).await.unwrap());
    assert!(confirm_log(&agent.repo, &incarnation, before).await.unwrap());
    assert_eq!(agent.window().await.holes.len(), 1);
    // ... and everybody else a day later.
    source.store.put(&source.log_key(150), removed, PutCondition::Create).await.unwrap();
    agent.clock.advance(Duration::from_secs(25 * 3600));
    assert_eq!(agent.window().await.holes, []);
}

#[tokio::test]
async fn a_new_life_of_an_instance_is_found_and_one_that_was_removed_is_not() {
    let source = Source::new(Arc::new(MemoryStore::new("t")), 3, 1).await;
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(&source, dir.path(), Duration::ZERO).await;
    let incarnations = Incarnations::new(agent.repo.clone());
    assert_eq!(incarnations.find("orders").await.unwrap(), source.incarnation);
    let newer = Incarnation { id: IncarnationId::fresh(), began_at: at(5), ..source.incarnation.clone() };
    Incarnations::new(source.repo.clone()).create(&newer).await.unwrap();
    assert_eq!(incarnations.find("orders").await.unwrap(), newer);
    source.delete(&Key::parse(&format!("incarnations/{}/identity.json", newer.id)).unwrap()).await;
    assert_eq!(incarnations.find("orders").await.unwrap(), source.incarnation);
}

/// A large archive in a directory, as if an agent had written it there, without waiting for the disk at each object.
async fn write_to_directory(root: &Path) -> Incarnation {
    let store = Arc::new(MemoryStore::new("t"));
    let source = Source::new(store.clone(), LOG_FILES, BACKUPS).await;
    let mut after: Option<String> = None;
    loop {
        let page = store.list("", after.as_deref(), 1000).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.key.to_string());
        for object in page {
            let path = root.join(object.key.as_str());
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, read_all(store.as_ref(), &object.key, object.size_bytes).await.unwrap()).unwrap();
        }
    }
    // The mark of a directory that is a store.
    std::fs::create_dir(root.join(".tmp")).unwrap();
    source.incarnation
}

const PRICES: &str = "[repository.prices]\ncurrency = \"EUR\"\nlist_per_1000 = 0.005\nget_per_1000 = 0.0004\n";

#[test]
fn the_command_line_answers_for_a_large_archive_in_two_seconds() {
    let lab = Lab::new();
    let root = lab.path("repository");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let incarnation = runtime.block_on(write_to_directory(&root));
    let options = HostOptions {
        name: "b",
        repository: format!("file://{}", root.display()),
        peers: Vec::new(),
        sections: PRICES.to_string(),
        listen_port: free_port(),
        clone_bin_dir: &Version::V15.bin_dir(),
    };
    let mut host = Host::start(&lab, &options);
    let ask = |host: &Host, arguments: &[&str]| -> Output {
        for _ in 0..ATTEMPTS {
            let began = Instant::now();
            let output = host.keiki(arguments);
            let took = began.elapsed();
            println!("keiki {:50} {took:?}", arguments.join(" "));
            if took < PATIENCE {
                return output;
            }
        }
        panic!("{arguments:?} took more than {PATIENCE:?} each of {ATTEMPTS} times");
    };
    for _ in 0..2 {
        assert!(ask(&host, &["status"]).status.success());
        let window = ask(&host, &["window", "a/orders", "--json"]);
        let window: serde_json::Value = serde_json::from_slice(&window.stdout).unwrap();
        assert_eq!(window["reaches"].as_array().unwrap().len(), 1, "{window}");
        // The check list of a clone is what it begins with; what this host lacks for it does not matter here.
        let check = ask(&host, &["--json", "clone", "a/orders", "--as", "copy", "--check"]);
        let check = String::from_utf8(check.stdout).unwrap();
        let items: Vec<serde_json::Value> = serde_json::from_str(&check).unwrap();
        let target = items.iter().find(|item| item["what"] == "target");
        assert!(target.is_some_and(|item| item["verdict"] == "pass"), "{check}");
        let backups = ask(&host, &["--json", "backup", "list", "a/orders"]);
        assert_eq!(serde_json::from_slice::<Vec<serde_json::Value>>(&backups.stdout).unwrap().len(), BACKUPS as usize);
        host.stop_agent();
        host.start_agent();
    }
    // The second run of the agent knew what the first one had learnt: of a thousand manifests it read none.
    let before = host.json(&["repository", "cost"]);
    let window = ask(&host, &["window", "a/orders"]);
    assert!(window.status.success());
    let cost = host.json(&["repository", "cost"]);
    let gets = |cost: &serde_json::Value| cost["total"]["requests"]["get"].as_u64().unwrap();
    println!("{cost}");
    assert!(gets(&cost) < 20 && gets(&cost) > gets(&before), "{cost}");
    assert_eq!(cost["currency"], "EUR");
    let month = cost["month"].as_array().unwrap();
    let line = |what: &str| month.iter().find(|line| line["what"] == what).unwrap();
    assert!(line("list")["amount"].as_f64().unwrap() > 0.0 && line("put")["amount"].is_null(), "{cost}");

    let facts = host.json(&["repository", "show"]);
    let one = &facts["incarnations"][0];
    assert_eq!((&one["incarnation"], &one["instance"]), (&incarnation.id.to_string().into(), &"orders".into()));
    assert_eq!((one["log"]["objects"].as_u64(), one["backups"].as_u64()), (Some(LOG_FILES), Some(BACKUPS)));
    assert_eq!((facts["format_version"].as_u64(), facts["rest"]["objects"].as_u64()), (Some(1), Some(1)));
    let text = host.keiki_ok(&["repository", "show"]);
    assert!(text.contains("a/orders") && text.contains("all  "), "{text}");
    let text = host.keiki_ok(&["repository", "cost"]);
    assert!(text.contains("a month like this costs") && text.contains("EUR"), "{text}");
}
