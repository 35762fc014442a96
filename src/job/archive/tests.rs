//! Unit tests of `archive`.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::base::clock::{ManualClock, SystemClock};
use crate::engine::fake::geometry::file_name;
use crate::engine::fake::record::{Event, RECORD_BYTES};
use crate::engine::fake::{FakeDatabase, FakeEngine};
use crate::model::id::RunId;
use crate::model::position::Position;
use crate::repo::lease::read_lease;
use crate::repo::log_reader::LogReader;
use crate::store::Store;
use crate::store::faulty::{Fault, Faults, FaultyStore, Operation, When};
use crate::store::memory::MemoryStore;

/// A fake database with an archiver, on a store that fails on order.
struct Site {
    directory: tempfile::TempDir,
    clock: Arc<dyn Clock>,
    store: Arc<dyn Store>,
    faults: Faults,
    repo: Arc<Repository>,
    database: Arc<FakeDatabase>,
}

const SHIP_EVERY: Duration = Duration::from_secs(5);

impl Site {
    async fn new(clock: Arc<dyn Clock>) -> Site {
        let directory = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new("t"));
        let faults = Faults::new();
        let faulty = Arc::new(FaultyStore::new(store.clone(), faults.clone()));
        let repo = Repository::init(faulty, clock.now()).await.unwrap();
        let database = Arc::new(FakeDatabase::create(&directory.path().join("db"), clock.clone()).unwrap());
        Site { directory, clock, store, faults, repo, database }
    }

    async fn claim(&self, holder: LeaseHolder) -> Result<Arc<Archiver>> {
        let engine = Arc::new(FakeEngine::new(self.database.clone()));
        self.claim_for(engine, holder).await
    }

    async fn claim_for(&self, engine: Arc<FakeEngine>, holder: LeaseHolder) -> Result<Arc<Archiver>> {
        let options = ArchiverOptions { ship_every: SHIP_EVERY, parallel_files: 4 };
        let (state, repo, clock) = (self.directory.path(), self.repo.clone(), self.clock.clone());
        Archiver::claim("orders", "a", state, engine, repo, holder, clock, options).await
    }

    /// The values of all events that the repository holds, each at its place.
    async fn archived_values(&self, incarnation: IncarnationId) -> Vec<u64> {
        let catalogue = LogCatalogue::load(self.repo.clone(), incarnation).await.unwrap();
        let reader = LogReader::new(self.repo.clone(), catalogue.clone());
        let mut values = Vec::new();
        for number in 0.. {
            let Some(file) = catalogue.file(&file_name(number)).await.unwrap() else { break };
            let bytes = reader.read(&file.name, 0, 1 << 20).await.unwrap();
            assert_eq!(bytes.len() as u64, file.bytes);
            for record in bytes.chunks(RECORD_BYTES) {
                values.push(Event::decode(record, values.len() as u64 + 1).unwrap().value);
            }
        }
        values
    }

    async fn keys(&self) -> Vec<String> {
        let found = self.store.list("incarnations/", None, 1000).await.unwrap();
        found.iter().map(|object| object.key.to_string()).filter(|key| !key.ends_with("lease.json")).collect()
    }
}

fn holder(process_id: u32) -> LeaseHolder {
    LeaseHolder {
        host: "a".into(),
        run: RunId::fresh(),
        machine_id: "m".into(),
        boot_id: "b".into(),
        process_id,
        // No process began with the machine's very first tick, so this one counts as dead.
        process_start_ticks: 0,
    }
}

fn alive() -> LeaseHolder {
    let pid = std::process::id();
    LeaseHolder { process_start_ticks: crate::base::child::process_start_ticks(pid).unwrap(), ..holder(pid) }
}

fn manual() -> Arc<ManualClock> {
    ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap())
}

#[tokio::test]
async fn a_week_of_shipping_leaves_nothing_out_and_the_server_keeps_only_what_is_not_whole() {
    let clock = manual();
    let site = Site::new(clock.clone()).await;
    let archiver = site.claim(holder(1)).await.unwrap();
    let mut written = Vec::new();
    for minute in 0..7 * 24 * 60u64 {
        for _ in 0..minute % 4 {
            written.push(minute * 31 % 97);
            site.database.write(minute * 31 % 97).unwrap();
        }
        clock.advance(Duration::from_secs(60));
        let looked = archiver.look(OpenFile::WhenDue).await.unwrap();
        assert_eq!(looked.covered.unwrap().position, Position::Count(written.len() as u64));
    }
    assert_eq!(site.archived_values(archiver.incarnation()).await, written);
    assert_eq!(site.database.log_files().unwrap(), [(written.len() as u64 - 1) / 64]);
    let lease = read_lease(&site.repo, archiver.incarnation()).await.unwrap().unwrap();
    assert_eq!(lease.covered.unwrap().0, Position::Count(written.len() as u64));
    assert!(site.faults.calls(Operation::List) < 10, "listings do not grow with time");
}

#[tokio::test]
async fn while_the_repository_is_away_the_server_keeps_its_log_and_the_backlog_is_told() {
    let clock = manual();
    let site = Site::new(clock.clone()).await;
    let archiver = site.claim(holder(1)).await.unwrap();
    archiver.look(OpenFile::Now).await.unwrap();
    site.faults.inject(Operation::PutStream, When::Every, Fault::Fail(Kind::Unreachable));
    for value in 0..200 {
        site.database.write(value).unwrap();
    }
    clock.advance(Duration::from_secs(7));
    assert_eq!(archiver.look(OpenFile::Now).await.unwrap_err().kind(), Kind::Unreachable);
    clock.advance(Duration::from_secs(7));
    let status = archiver.status();
    assert_eq!(status.state, ArchiveState::Retrying);
    assert_eq!((status.shipped, status.durable), (Some(Position::Count(0)), Some(Position::Count(200))));
    assert_eq!((status.backlog_bytes, status.backlog_seconds), (200 * RECORD_BYTES as u64, 7));
    assert_eq!(status.problem.unwrap().kind(), Kind::Unreachable);
    assert_eq!(site.database.log_files().unwrap(), [0, 1, 2, 3]);
    let error = archiver.wait_durable("00000000", Duration::ZERO).await.unwrap_err();
    assert!(error.message().starts_with("log file '00000000' is not in the repository yet: cannot archive"), "{error}");

    site.faults.clear();
    let end = archiver.ship_now().await.unwrap();
    assert_eq!(end.position, Position::Count(200));
    let status = archiver.status();
    assert_eq!((status.state, status.backlog_bytes, status.problem), (ArchiveState::Archiving, 0, None));
    assert_eq!(site.archived_values(archiver.incarnation()).await, (0..200).collect::<Vec<u64>>());
    assert_eq!(site.database.log_files().unwrap(), [3]);
}

#[tokio::test]
async fn the_open_file_goes_when_it_is_due_and_at_once_when_asked() {
    let clock = manual();
    let site = Site::new(clock.clone()).await;
    let archiver = site.claim(holder(1)).await.unwrap();
    site.database.write(1).unwrap();
    archiver.look(OpenFile::WhenDue).await.unwrap();
    site.database.write(2).unwrap();
    clock.advance(SHIP_EVERY - Duration::from_millis(1));
    assert_eq!(archiver.look(OpenFile::WhenDue).await.unwrap().covered, None);
    assert_eq!(site.archived_values(archiver.incarnation()).await, [1]);
    clock.advance(Duration::from_millis(1));
    assert!(archiver.look(OpenFile::WhenDue).await.unwrap().covered.is_some());
    assert_eq!(site.archived_values(archiver.incarnation()).await, [1, 2]);
    site.database.write(3).unwrap();
    let end = archiver.ship_now().await.unwrap();
    assert_eq!(site.archived_values(archiver.incarnation()).await, [1, 2, 3]);
    let lease = read_lease(&site.repo, archiver.incarnation()).await.unwrap().unwrap();
    assert_eq!(lease.covered, Some((end.position, end.observed_at)), "a reader learns of it at once");
}

#[tokio::test]
async fn an_agent_that_dies_in_the_middle_leaves_neither_gap_nor_duplicate() {
    let clock = manual();
    let site = Site::new(clock.clone()).await;
    let mut written = Vec::new();
    for run in 1..=8u64 {
        let archiver = site.claim(holder(run as u32)).await.unwrap();
        for value in 0..150 {
            written.push(value);
            site.database.write(value).unwrap();
        }
        // The answer to one put is lost, then the agent is gone.
        site.faults.inject(Operation::PutStream, When::Nth(run % 4 + 1), Fault::AnswerLost);
        let _ = archiver.look(OpenFile::Now).await;
        site.faults.clear();
    }
    let archiver = site.claim(holder(100)).await.unwrap();
    archiver.ship_now().await.unwrap();
    assert_eq!(site.archived_values(archiver.incarnation()).await, written);
    assert_eq!(archiver.status().hole, None);
    assert_eq!(archiver.lease().epoch().await, 9);
}

#[tokio::test]
async fn log_that_the_server_forgets_during_a_run_is_a_hole_and_what_follows_is_shipped() {
    let clock = manual();
    let site = Site::new(clock.clone()).await;
    let archiver = site.claim(holder(1)).await.unwrap();
    let write = |values: std::ops::Range<u64>| {
        for value in values {
            site.database.write(value).unwrap();
        }
    };
    write(0..128);
    archiver.ship_now().await.unwrap();
    write(128..129);
    archiver.ship_now().await.unwrap();
    // The repository is away for longer than the server keeps what was not shipped.
    site.faults.inject(Operation::PutStream, When::Every, Fault::Fail(Kind::Unreachable));
    write(129..400);
    assert_eq!(archiver.look(OpenFile::Now).await.unwrap_err().kind(), Kind::Unreachable);
    for number in site.database.log_files().unwrap().into_iter().filter(|number| *number <= 3) {
        std::fs::remove_file(site.directory.path().join("db/log").join(file_name(number))).unwrap();
    }
    site.faults.clear();
    let end = archiver.ship_now().await.unwrap();
    assert_eq!(end.position, Position::Count(400));
    let status = archiver.status();
    assert_eq!(status.state, ArchiveState::Archiving);
    let hole = status.hole.unwrap();
    assert_eq!((hole.from, hole.to), (Position::Count(129), Position::Count(4 * 64)));
    // The next ones go on from there.
    write(400..500);
    assert_eq!(archiver.ship_now().await.unwrap().position, Position::Count(500));
    let catalogue = LogCatalogue::load(site.repo.clone(), archiver.incarnation()).await.unwrap();
    for (number, bytes) in [(4, 64), (5, 64), (6, 64), (7, 52)] {
        let file = catalogue.file(&file_name(number)).await.unwrap().unwrap();
        assert_eq!(file.bytes, bytes * RECORD_BYTES as u64, "file {number}");
    }
}

#[tokio::test]
async fn a_second_agent_with_a_copy_of_the_state_changes_nothing_and_says_who_has_the_archive() {
    let site = Site::new(manual()).await;
    let first = site.claim(alive()).await.unwrap();
    site.database.write(1).unwrap();
    first.ship_now().await.unwrap();
    let before = site.keys().await;
    for other in [LeaseHolder { machine_id: "other".into(), ..holder(7) }, holder(8)] {
        let error = site.claim(other).await.err().expect("two agents for one archive");
        assert_eq!(error.kind(), Kind::Fenced);
        assert!(error.message().contains(&format!("host 'a' holds it (process {}", std::process::id())), "{error}");
    }
    site.database.write(2).unwrap();
    first.ship_now().await.unwrap();
    assert_eq!(site.keys().await.len(), before.len() + 1);
}

#[tokio::test]
async fn a_copy_of_the_directory_is_fenced_before_anything_is_shipped() {
    let site = Site::new(manual()).await;
    let first = site.claim(holder(1)).await.unwrap();
    site.database.write(1).unwrap();
    first.ship_now().await.unwrap();
    let before = site.keys().await;
    let (from, to) = (site.directory.path().join("db"), site.directory.path().join("copy"));
    assert!(std::process::Command::new("cp").arg("-a").args([from, to.clone()]).status().unwrap().success());
    let copy = Arc::new(FakeDatabase::start(&to, site.clock.clone()).unwrap());
    copy.write(7).unwrap();
    let error = site.claim_for(Arc::new(FakeEngine::new(copy)), holder(2)).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Fenced);
    assert_eq!(site.keys().await, before);
}

#[tokio::test]
async fn the_same_file_with_other_bytes_stops_archiving_and_overwrites_nothing() {
    let site = Site::new(manual()).await;
    let first = site.claim(holder(1)).await.unwrap();
    for value in 0..150 {
        site.database.write(value).unwrap();
    }
    first.ship_now().await.unwrap();
    let values = site.archived_values(first.incarnation()).await;
    // Another life that was started in the same directory: it has other files of the same names.
    let other = FakeDatabase::create(&site.directory.path().join("other"), site.clock.clone()).unwrap();
    for value in 1000..1150 {
        other.write(value).unwrap();
    }
    let (new, old) = (other.data_dir.join("log"), site.database.data_dir.join("log"));
    assert!(std::process::Command::new("cp").arg("-rT").args([new, old]).status().unwrap().success());
    let second = site.claim(holder(2)).await.unwrap();
    let error = second.run(CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert_eq!(second.status().state, ArchiveState::Stopped);
    assert_eq!(second.wait_durable("00000000", Duration::from_secs(9)).await.unwrap_err(), error);
    assert_eq!(site.archived_values(first.incarnation()).await, values);
}

#[tokio::test]
async fn log_that_the_server_forgot_is_shown_as_a_hole_and_archiving_goes_on_behind_it() {
    let site = Site::new(manual()).await;
    let first = site.claim(holder(1)).await.unwrap();
    for value in 0..100 {
        site.database.write(value).unwrap();
    }
    first.ship_now().await.unwrap();
    for value in 100..300 {
        site.database.write(value).unwrap();
    }
    for number in [1, 2] {
        std::fs::remove_file(site.database.data_dir.join("log").join(file_name(number))).unwrap();
    }
    let second = site.claim(holder(2)).await.unwrap();
    assert_eq!(second.ship_now().await.unwrap().position, Position::Count(300));
    let hole = second.status().hole.unwrap();
    assert_eq!((hole.from, hole.to), (Position::Count(100), Position::Count(192)));
    // A later run still knows of it, for as long as no backup lies behind it.
    let third = site.claim(holder(3)).await.unwrap();
    assert_eq!(third.hole_behind(Position::Count(10)).unwrap(), None);
    third.ship_now().await.unwrap();
    assert_eq!(third.hole_behind(Position::Count(10)).unwrap(), Some(hole.clone()));
    assert_eq!(third.hole_behind(hole.to).unwrap(), None);
}

#[tokio::test]
async fn the_server_hears_that_a_file_is_safe_only_when_it_is_in_the_repository() {
    let site = Site::new(Arc::new(SystemClock)).await;
    for value in 0..100 {
        site.database.write(value).unwrap();
    }
    let archiver = site.claim(holder(1)).await.unwrap();
    let cancel = CancellationToken::new();
    let running = tokio::spawn({
        let (archiver, cancel) = (archiver.clone(), cancel.clone());
        async move { archiver.run(cancel).await }
    });
    archiver.wait_durable("00000000", Duration::from_secs(20)).await.unwrap();
    assert!(LogCatalogue::load(site.repo.clone(), archiver.incarnation()).await.unwrap().is_sealed("00000000"));
    // A file that is still open is not safe, however often the server asks.
    let error = archiver.wait_durable("00000001", Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unreachable);
    cancel.cancel();
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_server_that_is_down_is_told_from_a_repository_that_is_away() {
    let site = Site::new(manual()).await;
    let archiver = site.claim(holder(1)).await.unwrap();
    site.database.stop().unwrap();
    assert!(archiver.look(OpenFile::Now).await.is_err());
    assert_eq!(archiver.status().state, ArchiveState::Down);
}

#[tokio::test]
async fn a_quiet_instance_asks_for_next_to_nothing_and_keeps_its_lease() {
    let clock = ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap());
    let site = Site::new(clock.clone()).await;
    site.database.write(1).unwrap();
    let archiver = site.claim(holder(1)).await.unwrap();
    archiver.ship_now().await.unwrap();
    let cancel = CancellationToken::new();
    let task = tokio::spawn({
        let (archiver, cancel) = (archiver.clone(), cancel.clone());
        async move { archiver.run(cancel).await }
    });
    let operations =
        [Operation::Get, Operation::Head, Operation::List, Operation::Put, Operation::PutStream, Operation::Delete];
    let count = || operations.map(|operation| site.faults.calls(operation));
    let before = count();
    // An hour in steps of five seconds, each with a moment for whoever wakes.
    for _ in 0..720 {
        clock.advance(Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(1)).await;
        archiver.lease().check().unwrap();
    }
    let [gets, heads, lists, puts, streams, deletes] = std::array::from_fn(|at| count()[at] - before[at]);
    println!(
        "in an hour: {gets} gets, {heads} heads, {lists} lists, {puts} puts, {streams} streams, {deletes} deletes"
    );
    assert_eq!((gets, heads, lists, streams, deletes), (0, 0, 0, 0, 0));
    assert!((20..=65).contains(&puts), "{puts} renewals");
    cancel.cancel();
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_clock_that_is_set_back_holds_up_neither_the_open_file_nor_the_lease() {
    let clock = manual();
    let site = Site::new(clock.clone()).await;
    let archiver = site.claim(holder(1)).await.unwrap();
    site.database.write(1).unwrap();
    archiver.ship_now().await.unwrap();
    clock.set_back(Duration::from_secs(3600));
    let cancel = CancellationToken::new();
    let task = tokio::spawn({
        let (archiver, cancel) = (archiver.clone(), cancel.clone());
        async move { archiver.run(cancel).await }
    });
    site.database.write(2).unwrap();
    // Less than the hour after which the clock shows again what it has shown.
    for _ in 0..60 {
        clock.advance(Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    cancel.cancel();
    task.await.unwrap().unwrap();
    assert_eq!(site.archived_values(archiver.incarnation()).await, [1, 2]);
    let lease = read_lease(&site.repo, archiver.incarnation()).await.unwrap().unwrap();
    assert!(lease.renewed_at <= clock.now(), "renewed at {}, {} now", lease.renewed_at, clock.now());
    assert_eq!(lease.covered.unwrap().0, Position::Count(2));
}

#[tokio::test]
async fn what_waits_goes_on_growing_older_after_the_clock_was_set_back() {
    let clock = manual();
    let site = Site::new(clock.clone()).await;
    let archiver = site.claim(holder(1)).await.unwrap();
    site.faults.inject(Operation::PutStream, When::Every, Fault::Fail(Kind::Unreachable));
    site.database.write(1).unwrap();
    archiver.look(OpenFile::Now).await.unwrap_err();
    clock.set_back(Duration::from_secs(3600));
    archiver.look(OpenFile::Now).await.unwrap_err();
    clock.advance(Duration::from_secs(30));
    archiver.look(OpenFile::Now).await.unwrap_err();
    assert_eq!(archiver.status().backlog_seconds, 30);
}

#[tokio::test]
async fn what_is_written_while_the_lease_cannot_be_renewed_counts_as_waiting() {
    let clock = manual();
    let site = Site::new(clock.clone()).await;
    let archiver = site.claim(holder(1)).await.unwrap();
    archiver.ship_now().await.unwrap();
    for operation in [Operation::Put, Operation::PutStream] {
        site.faults.inject(operation, When::Every, Fault::Fail(Kind::Unreachable));
    }
    site.database.write(1).unwrap();
    archiver.look(OpenFile::Now).await.unwrap_err();
    clock.advance(LEASE_TTL + Duration::from_secs(1));
    site.database.write(2).unwrap();
    archiver.look(OpenFile::Now).await.unwrap_err();
    let status = archiver.status();
    assert_eq!((status.backlog_bytes, status.backlog_seconds), (2 * RECORD_BYTES as u64, LEASE_TTL.as_secs() + 1));
    assert_eq!(status.durable, Some(Position::Count(2)));
}
