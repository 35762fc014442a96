//! The whole story of jobs on the fake engine: ship, back up, clone, be killed and go on, in milliseconds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use keiki::base::clock::{Clock, ManualClock};
use keiki::base::users::current_user;
use keiki::engine::fake::database::rows_in;
use keiki::engine::fake::{FakeCloneEngine, FakeDatabase, FakeEngine};
use keiki::engine::{DurableEnd, Engine};
use keiki::error::{Error, Kind, Result};
use keiki::job::archive::{Archiver, ArchiverOptions};
use keiki::job::backup::{BackupSource, BackupWork};
use keiki::job::clone::{CloneHost, CloneWork, Grower};
use keiki::job::group::GroupWork;
use keiki::job::ports::{InstanceRegistry, NewInstance, RepositoryDoor, SourceAgents, TakenPlace};
use keiki::job::{JobRunner, Restart, RunnerOptions, StepContext, StepPlan, UndoCause, Work, Workshop};
use keiki::model::backup::BackupKind;
use keiki::model::engine_kind::EngineKind;
use keiki::model::id::{IncarnationId, JobId, RunId};
use keiki::model::incarnation::{Incarnation, LeaseHolder};
use keiki::model::job::{CloneOrder, JobReport, JobState, Order, StepState, Task};
use keiki::model::target::Target;
use keiki::repo::incarnations::Incarnations;
use keiki::repo::repository::Repository;
use keiki::store::Store;
use keiki::store::faulty::{Faults, FaultyStore};
use keiki::store::memory::MemoryStore;
use tokio::sync::Notify;

mod clones;
mod groups;
mod kills;

/// Two hosts: `a` has the database and archives it, `b` grows clones.
struct World {
    directory: tempfile::TempDir,
    clock: Arc<ManualClock>,
    store: Arc<dyn Store>,
    faults: Faults,
    repo: Arc<Repository>,
    database: Arc<FakeDatabase>,
    engine: Arc<FakeEngine>,
    archiver: Arc<Archiver>,
    registry: Arc<Registry>,
    death: Arc<Death>,
    /// A second source on host `a`, for those who need two.
    cart: Option<Cart>,
}

struct Cart {
    database: Arc<FakeDatabase>,
    engine: Arc<FakeEngine>,
    archiver: Arc<Archiver>,
}

impl World {
    async fn new() -> World {
        let directory = tempfile::tempdir().unwrap();
        let clock = ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap());
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new("world"));
        let faults = Faults::new();
        let faulty = Arc::new(FaultyStore::new(store.clone(), faults.clone()));
        let repo = Repository::init(faulty, clock.now()).await.unwrap();
        for name in ["a", "b", "clones", "spool"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        let database = Arc::new(FakeDatabase::create(&directory.path().join("db"), clock.clone()).unwrap());
        let engine = Arc::new(FakeEngine::new(database.clone()));
        let archiver = claim("orders", "a", directory.path(), engine.clone(), &repo, &clock).await.unwrap();
        World {
            directory,
            clock,
            store,
            faults,
            repo,
            database,
            engine,
            archiver,
            registry: Arc::default(),
            death: Arc::default(),
            cart: None,
        }
    }

    async fn add_cart(&mut self) {
        let path = self.directory.path().join("cart");
        let database = Arc::new(FakeDatabase::create(&path, self.clock.clone()).unwrap());
        let engine = Arc::new(FakeEngine::new(database.clone()));
        let archiver =
            claim("cart", "a", self.directory.path(), engine.clone(), &self.repo, &self.clock).await.unwrap();
        self.cart = Some(Cart { database, engine, archiver });
    }

    fn archivers(&self) -> Vec<Arc<Archiver>> {
        std::iter::once(self.archiver.clone()).chain(self.cart.iter().map(|cart| cart.archiver.clone())).collect()
    }

    fn backup_source(&self, instance: &str, engine: &Arc<FakeEngine>, archiver: &Arc<Archiver>) -> BackupSource {
        BackupSource {
            instance: instance.into(),
            host: "a".into(),
            engine: engine.clone(),
            archiver: {
                let archiver = archiver.clone();
                Arc::new(move || Ok(archiver.clone()))
            },
            spool_dir: self.directory.path().join("spool"),
            clock: self.clock.clone(),
        }
    }

    /// Commits events, one per second; their values are their numbers.
    fn write(&self, count: u64) {
        for _ in 0..count {
            self.clock.advance(Duration::from_secs(1));
            self.database.write(self.database.count() + 1).unwrap();
        }
    }

    /// The agent of host `b`, as it starts: it picks up what was interrupted.
    async fn agent(&self) -> JobRunner {
        let shop = Arc::new(Shop {
            backup: self.backup_source("orders", &self.engine, &self.archiver),
            backup_of_cart: self.cart.as_ref().map(|cart| self.backup_source("cart", &cart.engine, &cart.archiver)),
            runner: OnceLock::new(),
            host: self.clone_host(),
            death: self.death.clone(),
        });
        let state = self.directory.path().join("b");
        let runner = JobRunner::open(&state, shop.clone(), self.clock.clone(), RunnerOptions::default()).unwrap();
        assert!(shop.runner.set(runner.clone()).is_ok());
        runner.recover_interrupted().await;
        runner
    }

    fn clone_host(&self) -> Arc<CloneHost> {
        Arc::new(CloneHost {
            host_name: "b".into(),
            state_dir: self.directory.path().join("b"),
            data_root: self.directory.path().join("clones"),
            keep_free_bytes: 0,
            ports: 41_000..=41_999,
            listen_addresses: "127.0.0.1".into(),
            archive_command: String::new(),
            lanes: 2,
            growers: BTreeMap::from([(
                EngineKind::Fake,
                Grower { engine: Arc::new(FakeCloneEngine), run_as: current_user().unwrap().name, bin_dir: None },
            )]),
            repository: Arc::new(Door(self.repo.clone())),
            sources: Arc::new(Sources(self.archivers())),
            registry: self.registry.clone(),
            clock: self.clock.clone(),
        })
    }

    fn clone_dir(&self, name: &str) -> PathBuf {
        self.directory.path().join("clones").join(name)
    }

    async fn back_up(&self) {
        self.back_up_instance("orders").await;
    }

    async fn back_up_instance(&self, instance: &str) {
        let agent = self.agent().await;
        let task = Task::Backup { instance: instance.into(), kind: BackupKind::Manual };
        let report = run(&agent, Order { id: JobId::fresh(), by: "local:root".into(), task }).await;
        assert_eq!(report.state, JobState::Done, "{:?}", report.error);
        agent.shut_down().await;
    }

    async fn incarnations(&self) -> Vec<Incarnation> {
        Incarnations::new(self.repo.clone()).all().await.unwrap()
    }

    /// Every object of an incarnation but its lease, with its tag: equal lists mean that nothing was changed.
    async fn archive_of(&self, incarnation: IncarnationId) -> Vec<(String, String)> {
        let objects = self.store.list(&format!("incarnations/{incarnation}/"), None, 1000).await.unwrap();
        let objects = objects.into_iter().filter(|object| !object.key.as_str().ends_with("lease.json"));
        objects.map(|object| (object.key.to_string(), object.tag.0)).collect()
    }

    /// What lies where clones are made.
    fn traces(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path().join("clones")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// An archiver of a run of an agent that nobody holds for alive when the next one comes.
async fn claim(
    instance: &str,
    host: &str,
    root: &Path,
    engine: Arc<dyn Engine>,
    repo: &Arc<Repository>,
    clock: &Arc<ManualClock>,
) -> Result<Arc<Archiver>> {
    let holder = LeaseHolder {
        host: host.into(),
        run: RunId::fresh(),
        machine_id: host.into(),
        boot_id: "boot".into(),
        process_id: 1,
        process_start_ticks: 0,
    };
    let options = ArchiverOptions { ship_every: Duration::from_secs(5), parallel_files: 4 };
    Archiver::claim(instance, host, &root.join(host), engine, repo.clone(), holder, clock.clone(), options).await
}

fn clone_order(name: &str, target: Target) -> Order {
    let task = Task::Clone(CloneOrder {
        source: "orders".into(),
        clone_name: name.into(),
        target,
        data_dir: None,
        port: None,
        settings: BTreeMap::new(),
        hold: false,
        passwords_for: Default::default(),
        keep_expired: false,
        ties: BTreeMap::new(),
    });
    Order { id: JobId::fresh(), by: "operator:ann".into(), task }
}

/// The same order with something changed.
fn changed(mut order: Order, change: impl FnOnce(&mut CloneOrder)) -> Order {
    if let Task::Clone(clone) = &mut order.task {
        change(clone);
    }
    order
}

async fn run(agent: &JobRunner, order: Order) -> JobReport {
    let id = order.id;
    agent.submit(order).await.unwrap();
    agent.wait(id).await.unwrap()
}

fn numbers(to: u64) -> Vec<u64> {
    (1..=to).collect()
}

struct Door(Arc<Repository>);

#[async_trait]
impl RepositoryDoor for Door {
    async fn repository(&self) -> Result<Arc<Repository>> {
        Ok(self.0.clone())
    }
}

struct Sources(Vec<Arc<Archiver>>);

#[async_trait]
impl SourceAgents for Sources {
    async fn ship_now(&self, host: &str, incarnation: IncarnationId) -> Result<DurableEnd> {
        match self.0.iter().find(|archiver| (host, incarnation) == ("a", archiver.incarnation())) {
            Some(archiver) => archiver.ship_now().await,
            None => Err(Error::new(Kind::NotFound, format!("host '{host}' does not archive '{incarnation}'"))),
        }
    }
}

#[derive(Default)]
struct Registry {
    instances: Mutex<BTreeMap<String, NewInstance>>,
    first_backups: Mutex<Vec<String>>,
}

#[async_trait]
impl InstanceRegistry for Registry {
    fn places(&self) -> Vec<TakenPlace> {
        let instances = self.instances.lock().unwrap();
        let place =
            |one: &NewInstance| TakenPlace { name: one.name.clone(), data_dir: one.data_dir.clone(), port: one.port };
        instances.values().map(place).collect()
    }

    async fn register(&self, instance: NewInstance) -> Result<()> {
        let mut instances = self.instances.lock().unwrap();
        match instances.get(&instance.name) {
            Some(known) if *known != instance => Err(Error::new(Kind::Conflict, "another instance has this name")),
            _ => {
                instances.insert(instance.name.clone(), instance);
                Ok(())
            }
        }
    }

    async fn unregister(&self, name: &str) -> Result<()> {
        self.instances.lock().unwrap().remove(name);
        Ok(())
    }

    async fn order_first_backup(&self, name: &str) -> Result<()> {
        let mut ordered = self.first_backups.lock().unwrap();
        if !ordered.iter().any(|known| known == name) {
            ordered.push(name.to_string());
        }
        Ok(())
    }
}

/// Where the agent is to die.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// The step is begun and has done nothing.
    Before(&'static str),
    /// The step has done everything, and its end is not recorded.
    After(&'static str),
}

#[derive(Default)]
struct Death {
    at: Mutex<Option<Moment>>,
    has_come: Notify,
}

impl Death {
    /// If this is the moment: nothing more happens until the agent is gone.
    async fn comes(&self, now: Moment, context: &StepContext) {
        if *self.at.lock().unwrap() == Some(now) {
            self.has_come.notify_one();
            context.cancel.cancelled().await;
        }
    }
}

struct Shop {
    backup: BackupSource,
    backup_of_cart: Option<BackupSource>,
    runner: OnceLock<JobRunner>,
    host: Arc<CloneHost>,
    death: Arc<Death>,
}

impl Workshop for Shop {
    fn work(&self, order: &Order) -> Result<Arc<dyn Work>> {
        let inner: Arc<dyn Work> = match &order.task {
            Task::Backup { instance, kind } => {
                let source = self.backup_of_cart.as_ref().filter(|_| instance == "cart").unwrap_or(&self.backup);
                Arc::new(BackupWork::new(source.clone(), *kind, 2))
            }
            Task::Clone(clone) => Arc::new(CloneWork::new(self.host.clone(), clone.clone())?),
            Task::CloneGroup(group) => {
                let runner = self.runner.get().expect("the agent has begun").clone();
                Arc::new(GroupWork::new(self.host.clone(), runner, group.clone())?)
            }
        };
        Ok(Arc::new(Mortal { inner, death: self.death.clone() }))
    }
}

/// Work that can be interrupted at the boundaries of its steps.
struct Mortal {
    inner: Arc<dyn Work>,
    death: Arc<Death>,
}

#[async_trait]
impl Work for Mortal {
    fn steps(&self) -> Vec<StepPlan> {
        self.inner.steps()
    }

    fn exclusive(&self) -> Vec<String> {
        self.inner.exclusive()
    }

    fn is_heavy(&self) -> bool {
        self.inner.is_heavy()
    }

    fn holds_before(&self) -> Option<&'static str> {
        self.inner.holds_before()
    }

    fn may_cancel(&self, step: &str) -> bool {
        self.inner.may_cancel(step)
    }

    fn after_interruption(&self, step: &str) -> Restart {
        self.inner.after_interruption(step)
    }

    async fn run(&self, step: &str, context: &StepContext) -> Result<()> {
        let name = self.inner.steps().iter().find(|plan| plan.name == step).map_or("", |plan| plan.name);
        self.death.comes(Moment::Before(name), context).await;
        context.go_on()?;
        let outcome = self.inner.run(step, context).await;
        self.death.comes(Moment::After(name), context).await;
        outcome
    }

    async fn undo(&self, context: &StepContext, cause: UndoCause) -> Result<()> {
        self.inner.undo(context, cause).await
    }
}
