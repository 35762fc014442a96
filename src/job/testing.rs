//! What tests of this floor begin with: a fake database, a repository in memory and a clock that is moved by hand.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::base::clock::{Clock, ManualClock};
use crate::engine::fake::geometry::file_name;
use crate::engine::fake::{FakeDatabase, FakeEngine};
use crate::error::Result;
use crate::job::archive::{Archiver, ArchiverOptions};
use crate::job::backup::{BackupSource, BackupWork};
use crate::job::{JobRunner, RunnerOptions, Work, Workshop};
use crate::model::backup::{Backup, BackupKind};
use crate::model::id::{JobId, RunId};
use crate::model::incarnation::{Incarnation, LeaseHolder};
use crate::model::job::{JobReport, JobState, Order, Task};
use crate::repo::backup_reader::Backups;
use crate::repo::incarnations::Incarnations;
use crate::repo::repository::Repository;
use crate::store::Store;
use crate::store::faulty::{Faults, FaultyStore};
use crate::store::memory::MemoryStore;

pub struct Site {
    pub directory: tempfile::TempDir,
    pub clock: Arc<ManualClock>,
    pub store: Arc<dyn Store>,
    pub faults: Faults,
    pub repo: Arc<Repository>,
    pub database: Arc<FakeDatabase>,
    pub engine: Arc<FakeEngine>,
}

impl Site {
    pub async fn new() -> Site {
        let directory = tempfile::tempdir().unwrap();
        let clock = ManualClock::new("2026-11-21T10:00:00Z".parse::<Timestamp>().unwrap());
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new("t"));
        let faults = Faults::new();
        let faulty = Arc::new(FaultyStore::new(store.clone(), faults.clone()));
        let repo = Repository::init(faulty, clock.now()).await.unwrap();
        let database = Arc::new(FakeDatabase::create(&directory.path().join("db"), clock.clone()).unwrap());
        let engine = Arc::new(FakeEngine::new(database.clone()));
        std::fs::create_dir(directory.path().join("spool")).unwrap();
        Site { directory, clock, store, faults, repo, database, engine }
    }

    /// A new run of the agent archives the database; earlier ones count as dead.
    pub async fn archiver(&self) -> Arc<Archiver> {
        let holder = LeaseHolder {
            host: "a".into(),
            run: RunId::fresh(),
            machine_id: "m".into(),
            boot_id: "b".into(),
            process_id: 1,
            process_start_ticks: 0,
        };
        let options = ArchiverOptions { ship_every: Duration::from_secs(5), parallel_files: 4 };
        let (state, repo, clock) = (self.directory.path(), self.repo.clone(), self.clock.clone());
        Archiver::claim("orders", "a", state, self.engine.clone(), repo, holder, clock, options).await.unwrap()
    }

    pub async fn incarnation(&self, archiver: &Archiver) -> Incarnation {
        Incarnations::new(self.repo.clone()).get(archiver.incarnation()).await.unwrap()
    }

    /// Commits so many events, one per second.
    pub fn write(&self, count: u64) {
        for _ in 0..count {
            self.clock.advance(Duration::from_secs(1));
            self.database.write(self.database.count() + 1).unwrap();
        }
    }

    pub fn lose_log_files(&self, numbers: &[u64]) {
        for number in numbers {
            std::fs::remove_file(self.database.data_dir.join("log").join(file_name(*number))).unwrap();
        }
    }

    pub fn source(&self, archiver: &Arc<Archiver>) -> BackupSource {
        let archiver = archiver.clone();
        BackupSource {
            instance: "orders".into(),
            host: "a".into(),
            engine: self.engine.clone(),
            archiver: Arc::new(move || Ok(archiver.clone())),
            spool_dir: self.directory.path().join("spool"),
            clock: self.clock.clone(),
        }
    }

    pub fn runner(&self, source: BackupSource) -> JobRunner {
        let workshop = Arc::new(BackupShop(source));
        JobRunner::open(self.directory.path(), workshop, self.clock.clone(), RunnerOptions::default()).unwrap()
    }

    /// Takes a backup as a job and returns what it published.
    pub async fn back_up(&self, archiver: &Arc<Archiver>) -> Backup {
        let runner = self.runner(self.source(archiver));
        let report = run_to_end(&runner, backup_order()).await;
        assert_eq!(report.state, JobState::Done, "{:?}", report.error);
        runner.shut_down().await;
        let backups = Backups::new(self.repo.clone()).list(archiver.incarnation()).await.unwrap().backups;
        backups.into_iter().find(|backup| report.results[0].1 == backup.id.to_string()).unwrap()
    }

    pub async fn keys(&self, part: &str) -> Vec<String> {
        let found = self.store.list("incarnations/", None, 1000).await.unwrap();
        found.iter().map(|object| object.key.to_string()).filter(|key| key.contains(part)).collect()
    }
}

pub fn backup_order() -> Order {
    let task = Task::Backup { instance: "orders".into(), kind: BackupKind::Manual };
    Order { id: JobId::fresh(), by: "local:root".into(), task }
}

pub async fn run_to_end(runner: &JobRunner, order: Order) -> JobReport {
    let id = order.id;
    runner.submit(order).await.unwrap();
    runner.wait(id).await.unwrap()
}

struct BackupShop(BackupSource);

impl Workshop for BackupShop {
    fn work(&self, _order: &Order) -> Result<Arc<dyn Work>> {
        Ok(Arc::new(BackupWork::new(self.0.clone(), BackupKind::Manual, 2)))
    }
}
