//! The fake engine as a subject.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keiki::base::clock::{Clock, ManualClock};
use keiki::engine::fake::database::rows_in;
use keiki::engine::fake::geometry::EVENTS_PER_FILE;
use keiki::engine::fake::{FakeCloneEngine, FakeDatabase, FakeEngine};
use keiki::engine::{CloneEngine, CloneSite, Engine};

use super::{Base, Subject};

pub struct FakeSubject {
    database: Arc<FakeDatabase>,
    engine: Arc<FakeEngine>,
    clock: Arc<ManualClock>,
    _root: tempfile::TempDir,
}

impl FakeSubject {
    pub fn start() -> FakeSubject {
        let root = tempfile::tempdir().unwrap();
        let clock = ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap());
        let database = Arc::new(FakeDatabase::create(&root.path().join("db"), clock.clone()).unwrap());
        let engine = Arc::new(FakeEngine::new(database.clone()));
        FakeSubject { database, engine, clock, _root: root }
    }

    fn tick(&self) {
        self.clock.advance(Duration::from_millis(1));
    }
}

impl Subject for FakeSubject {
    fn engine(&self) -> Arc<dyn Engine> {
        self.tick();
        self.engine.clone()
    }

    fn cloner(&self) -> Arc<dyn CloneEngine> {
        Arc::new(FakeCloneEngine)
    }

    fn commit(&self, value: u64) {
        self.tick();
        self.database.write(value).unwrap();
        self.tick();
    }

    fn name_point(&self, name: &str) {
        self.tick();
        self.database.name_point(name).unwrap();
        self.tick();
    }

    fn now(&self) -> Timestamp {
        self.tick();
        let now = self.clock.now();
        self.tick();
        now
    }

    fn switch_log(&self) {
        while !self.database.count().is_multiple_of(EVENTS_PER_FILE) {
            self.database.write(0).unwrap();
        }
    }

    fn site(&self, root: &Path, base: &Base) -> CloneSite {
        CloneSite {
            clone_name: "check".into(),
            data_dir: root.join("data"),
            run_dir: root.join("run"),
            bin_dir: None,
            port: 1,
            listen_addresses: "127.0.0.1".into(),
            run_as: String::new(),
            settings: BTreeMap::new(),
            passwords_for: Default::default(),
            keep_expired: false,
            engine_version: base.version.clone(),
            facts: base.span.facts.clone(),
            backup_start: base.span.start,
            backup_stop: base.span.stop,
            archive_command: String::new(),
        }
    }

    fn own(&self, _path: &Path) {}

    fn values(&self, site: &CloneSite) -> Vec<u64> {
        // Zeros are what `switch_log` and named points wrote.
        rows_in(&site.data_dir).unwrap().into_iter().filter(|value| *value > 0).collect()
    }
}
