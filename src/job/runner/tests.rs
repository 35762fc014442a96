//! Unit tests of `runner`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::Semaphore;

use super::*;
use crate::base::clock::ManualClock;
use crate::job::{StepContext, StepPlan};
use crate::model::backup::BackupKind;
use crate::model::job::{CloneOrder, Task};
use crate::model::password::Password;
use crate::model::target::Target;

/// What the steps of the toy job do. Each step waits for a permit of its own.
struct Script {
    gates: BTreeMap<&'static str, Semaphore>,
    runs: Mutex<Vec<String>>,
    undone: AtomicUsize,
    /// The step that panics, or fails as long as there are failures left.
    panics_in: Mutex<Option<&'static str>>,
    fails_in: Mutex<Option<&'static str>>,
}

const STEPS: [&str; 3] = ["one", "two", "three"];

impl Script {
    fn new(open: &[&'static str]) -> Arc<Script> {
        let gates = STEPS.map(|step| (step, Semaphore::new(if open.contains(&step) { 1000 } else { 0 })));
        Arc::new(Script {
            gates: gates.into(),
            runs: Mutex::default(),
            undone: AtomicUsize::new(0),
            panics_in: Mutex::default(),
            fails_in: Mutex::default(),
        })
    }

    fn runs(&self) -> Vec<String> {
        self.runs.lock().unwrap().clone()
    }
}

struct Toy {
    script: Arc<Script>,
    instance: String,
    hold: bool,
}

#[async_trait]
impl Work for Toy {
    fn steps(&self) -> Vec<StepPlan> {
        STEPS.map(StepPlan::items).into()
    }

    fn exclusive(&self) -> Vec<String> {
        vec![format!("backup of '{}'", self.instance)]
    }

    fn is_heavy(&self) -> bool {
        self.hold
    }

    fn holds_before(&self) -> Option<&'static str> {
        self.hold.then_some("three")
    }

    fn may_cancel(&self, step: &str) -> bool {
        step != "three"
    }

    fn after_interruption(&self, step: &str) -> Restart {
        if step == "two" { Restart::From("one") } else { Restart::Again }
    }

    async fn run(&self, step: &str, context: &StepContext) -> Result<()> {
        let name = if context.is_repeated { format!("{step} again") } else { step.to_string() };
        self.script.runs.lock().unwrap().push(name);
        context.record("last", step).await?;
        tokio::select! {
            permit = self.script.gates[step].acquire() => permit.unwrap().forget(),
            () = context.cancel.cancelled() => return Err(crate::job::step::cancelled()),
        }
        assert_ne!(*self.script.panics_in.lock().unwrap(), Some(step), "as ordered");
        if *self.script.fails_in.lock().unwrap() == Some(step) {
            return Err(Error::new(Kind::Full, "the disk is full"));
        }
        context.progress().set(7, 7);
        context.result("done", step);
        Ok(())
    }

    async fn undo(&self, _context: &StepContext, _cause: UndoCause) -> Result<()> {
        self.script.undone.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

struct Shop(Arc<Script>);

impl Workshop for Shop {
    fn work(&self, order: &Order) -> Result<Arc<dyn Work>> {
        let (instance, hold) = match &order.task {
            Task::Backup { instance, .. } if instance == "unknown" => {
                return Err(Error::new(Kind::NotFound, "no such instance"));
            }
            Task::Backup { instance, .. } => (instance.clone(), false),
            Task::Clone(clone) => (clone.clone_name.clone(), true),
            Task::CloneGroup(group) => (group.clone_name.clone(), true),
        };
        Ok(Arc::new(Toy { script: self.0.clone(), instance, hold }))
    }
}

fn backup(instance: &str) -> Order {
    let task = Task::Backup { instance: instance.into(), kind: BackupKind::Manual };
    Order { id: JobId::fresh(), by: "local:root".into(), task }
}

fn clone(name: &str) -> Order {
    let task = Task::Clone(CloneOrder {
        source: "orders".into(),
        clone_name: name.into(),
        target: Target::Latest,
        data_dir: None,
        port: None,
        settings: BTreeMap::new(),
        hold: true,
        passwords_for: Default::default(),
        keep_expired: false,
        ties: BTreeMap::new(),
    });
    Order { id: JobId::fresh(), by: "local:root".into(), task }
}

fn runner(directory: &Path, script: &Arc<Script>) -> JobRunner {
    let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
    JobRunner::open(directory, Arc::new(Shop(script.clone())), clock, RunnerOptions { keep_jobs: 3, heavy_at_once: 1 })
        .unwrap()
}

async fn until_running(runner: &JobRunner, id: JobId, step: &str) {
    let mut watcher = runner.subscribe(id).unwrap();
    watcher
        .wait_for(|report| report.steps.iter().any(|found| found.name == step && found.state == StepState::Running))
        .await
        .unwrap();
}

#[tokio::test]
async fn the_same_order_again_is_the_same_job_and_a_changed_one_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let script = Script::new(&STEPS);
    let runner = runner(directory.path(), &script);
    let order = backup("orders");
    let (first, second) = tokio::join!(runner.submit(order.clone()), runner.submit(order.clone()));
    assert_eq!(first.unwrap().order, second.unwrap().order);
    let report = runner.wait(order.id).await.unwrap();
    assert_eq!((report.state, report.results), (JobState::Done, vec![("done".into(), "three".into())]));
    assert_eq!(script.runs(), STEPS);
    assert_eq!(runner.submit(order.clone()).await.unwrap().state, JobState::Done);
    let changed = Order { task: Task::Backup { instance: "other".into(), kind: BackupKind::Manual }, ..order };
    let error = runner.submit(changed).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.message().contains("instance 'orders', now with 'other'"), "{error}");
}

#[tokio::test]
async fn an_order_that_cannot_be_meant_leaves_no_trace() {
    let directory = tempfile::tempdir().unwrap();
    let runner = runner(directory.path(), &Script::new(&STEPS));
    assert_eq!(runner.submit(backup("unknown")).await.unwrap_err().kind(), Kind::NotFound);
    assert!(runner.list().is_empty());
    assert_eq!(std::fs::read_dir(directory.path().join("jobs")).unwrap().count(), 0);
}

#[tokio::test]
async fn two_jobs_that_want_the_same_thing_do_not_run_together() {
    let directory = tempfile::tempdir().unwrap();
    let runner = runner(directory.path(), &Script::new(&["one"]));
    let first = backup("orders");
    runner.submit(first.clone()).await.unwrap();
    let error = runner.submit(backup("orders")).await.unwrap_err();
    assert!(error.message().contains("uses the backup of 'orders'"), "{error}");
    assert!(error.message().contains(&first.id.to_string()));
    runner.submit(backup("other")).await.unwrap();
    runner.shut_down().await;
}

#[tokio::test]
async fn a_job_that_cannot_be_picked_up_does_not_look_as_if_it_ran() {
    let directory = tempfile::tempdir().unwrap();
    let order = backup("orders");
    let dead = runner(directory.path(), &Script::new(&["one"]));
    dead.submit(order.clone()).await.unwrap();
    until_running(&dead, order.id, "two").await;
    dead.shut_down().await;
    let journal = std::fs::read_dir(directory.path().join("jobs")).unwrap().next().unwrap().unwrap().path();
    let somebody = crate::base::journal::Journal::open(&journal).unwrap();
    let next = runner(directory.path(), &Script::new(&STEPS));
    next.recover_interrupted().await;
    let report = next.wait(order.id).await.unwrap();
    assert_eq!(report.state, JobState::Failed);
    assert!(report.error.unwrap().message().contains("another process writes it"));
    next.shut_down().await;
    drop(somebody);
    // What its journal says has not changed: the agent that starts next goes on.
    let last = runner(directory.path(), &Script::new(&STEPS));
    last.recover_interrupted().await;
    assert_eq!(last.wait(order.id).await.unwrap().state, JobState::Done);
    last.shut_down().await;
}

#[tokio::test]
async fn a_job_whose_agent_dies_goes_on_from_the_step_that_the_plan_names() {
    for (dies_in, then) in [("one", "one again"), ("two", "one again"), ("three", "three again")] {
        let directory = tempfile::tempdir().unwrap();
        let order = backup("orders");
        let before: Vec<&str> = STEPS.into_iter().take_while(|step| *step != dies_in).collect();
        let script = Script::new(&before);
        let dead = runner(directory.path(), &script);
        dead.submit(order.clone()).await.unwrap();
        until_running(&dead, order.id, dies_in).await;
        dead.shut_down().await;
        assert_eq!(script.undone.load(Ordering::Relaxed), 0, "the end of the agent is no failure");

        let script = Script::new(&STEPS);
        let alive = runner(directory.path(), &script);
        assert_eq!(alive.show(order.id).unwrap().state, JobState::Running);
        alive.recover_interrupted().await;
        let report = alive.wait(order.id).await.unwrap();
        assert_eq!((report.state, script.runs()[0].as_str()), (JobState::Done, then), "died in {dies_in}");
        assert_eq!(alive.facts(order.id).unwrap()["last"], "three");
    }
}

#[tokio::test]
async fn a_failed_step_is_undone_and_resumed_where_it_failed() {
    let directory = tempfile::tempdir().unwrap();
    let script = Script::new(&STEPS);
    *script.fails_in.lock().unwrap() = Some("three");
    let order = backup("orders");
    let first = runner(directory.path(), &script);
    first.submit(order.clone()).await.unwrap();
    let report = first.wait(order.id).await.unwrap();
    assert_eq!(report.state, JobState::Failed);
    assert_eq!(report.error.unwrap().kind(), Kind::Full);
    assert_eq!(script.undone.load(Ordering::Relaxed), 1);
    first.shut_down().await;

    *script.fails_in.lock().unwrap() = None;
    let second = runner(directory.path(), &script);
    second.recover_interrupted().await;
    assert_eq!(second.show(order.id).unwrap().state, JobState::Failed);
    second.resume(order.id).await.unwrap();
    assert_eq!(second.wait(order.id).await.unwrap().state, JobState::Done);
    assert_eq!(script.runs(), ["one", "two", "three", "three again"]);
    assert_eq!(second.resume(order.id).await.unwrap_err().kind(), Kind::Conflict);
}

#[tokio::test]
async fn a_panic_in_a_step_is_the_failure_of_its_job_only() {
    let directory = tempfile::tempdir().unwrap();
    let script = Script::new(&STEPS);
    *script.panics_in.lock().unwrap() = Some("two");
    let runner = runner(directory.path(), &script);
    let order = backup("orders");
    runner.submit(order.clone()).await.unwrap();
    let report = runner.wait(order.id).await.unwrap();
    assert_eq!(report.state, JobState::Failed);
    assert_eq!(report.error.unwrap().kind(), Kind::Internal);
    assert_eq!(script.undone.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_running_job_is_cancelled_and_undone_but_not_past_its_commit_point() {
    let directory = tempfile::tempdir().unwrap();
    let script = Script::new(&["one", "two"]);
    let runner = runner(directory.path(), &script);
    let order = backup("orders");
    runner.submit(order.clone()).await.unwrap();
    until_running(&runner, order.id, "three").await;
    assert_eq!(runner.cancel(order.id).await.unwrap_err().kind(), Kind::Conflict);

    let other = Script::new(&["one"]);
    let directory = tempfile::tempdir().unwrap();
    let runner = self::runner(directory.path(), &other);
    runner.submit(order.clone()).await.unwrap();
    until_running(&runner, order.id, "two").await;
    runner.cancel(order.id).await.unwrap();
    let report = runner.wait(order.id).await.unwrap();
    assert_eq!((report.state, report.error), (JobState::Cancelled, None));
    assert_eq!(other.undone.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_held_clone_waits_over_a_restart_until_it_is_accepted_or_discarded() {
    for accept in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let script = Script::new(&STEPS);
        let order = clone("check");
        let first = runner(directory.path(), &script);
        first.submit(order.clone()).await.unwrap();
        assert_eq!(first.wait(order.id).await.unwrap().state, JobState::Held);
        first.shut_down().await;

        let second = runner(directory.path(), &script);
        second.recover_interrupted().await;
        assert_eq!(second.show(order.id).unwrap().state, JobState::Held);
        assert_eq!(second.accept("other").await.unwrap_err().kind(), Kind::NotFound);
        let end = if accept {
            second.accept("check").await.unwrap();
            JobState::Done
        } else {
            second.discard("check").await.unwrap();
            JobState::Cancelled
        };
        assert_eq!(second.wait(order.id).await.unwrap().state, end);
        assert_eq!(script.runs().len(), if accept { 3 } else { 2 });
        assert_eq!(script.undone.load(Ordering::Relaxed), usize::from(!accept));
        assert!(second.discard("check").await.is_err());
    }
}

#[tokio::test]
async fn heavy_jobs_wait_for_their_turn_and_old_jobs_are_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let script = Script::new(&["two", "three"]);
    let runner = runner(directory.path(), &script);
    let (first, second) = (clone("a"), clone("b"));
    runner.submit(first.clone()).await.unwrap();
    until_running(&runner, first.id, "one").await;
    runner.submit(second.clone()).await.unwrap();
    let mut watcher = runner.subscribe(second.id).unwrap();
    watcher.wait_for(|report| report.steps[0].note.contains("waits for other clones")).await.unwrap();
    script.gates["one"].add_permits(1000);
    assert_eq!(runner.wait(first.id).await.unwrap().state, JobState::Held);
    assert_eq!(runner.wait(second.id).await.unwrap().state, JobState::Held);
    for number in 0..5 {
        let order = backup(&format!("db{number}"));
        runner.submit(order.clone()).await.unwrap();
        runner.wait(order.id).await.unwrap();
    }
    assert_eq!(runner.list().len(), 2 + 3);
    assert_eq!(std::fs::read_dir(directory.path().join("jobs")).unwrap().count(), 2 + 3);
}

#[tokio::test]
async fn passwords_are_kept_while_a_job_may_need_them_and_are_in_nothing_that_it_says() {
    let directory = tempfile::tempdir().unwrap();
    let script = Script::new(&STEPS);
    let jobs = journal::directory_in(directory.path());
    let passwords: Passwords = [("app".to_string(), Password::new("s3cret").unwrap())].into();
    let mut order = clone("copy");
    let runner = runner(directory.path(), &script);
    // An order and the passwords beside it speak of the same accounts.
    assert_eq!(runner.submit_with(order.clone(), passwords.clone()).await.unwrap_err().kind(), Kind::BadInput);
    let Task::Clone(task) = &mut order.task else { panic!() };
    task.passwords_for = ["app".to_string()].into();
    assert_eq!(runner.submit(order.clone()).await.unwrap_err().kind(), Kind::BadInput);
    runner.submit_with(order.clone(), passwords.clone()).await.unwrap();
    runner.submit_with(order.clone(), passwords.clone()).await.unwrap();
    assert_eq!(runner.wait(order.id).await.unwrap().state, JobState::Held);
    assert_eq!(secrets::read(&jobs, order.id).unwrap(), passwords);
    let report = format!("{:?}", runner.show(order.id).unwrap());
    assert!(report.contains("app") && !report.contains("s3cret"), "{report}");
    // An agent that starts anew finds them, and keeps those of no other job.
    runner.shut_down().await;
    secrets::keep(&jobs, JobId::fresh(), &passwords).unwrap();
    let runner = self::runner(directory.path(), &script);
    assert_eq!(secrets::read(&jobs, order.id).unwrap(), passwords);
    runner.accept("copy").await.unwrap();
    assert_eq!(runner.wait(order.id).await.unwrap().state, JobState::Done);
    for file in std::fs::read_dir(&jobs).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("s3cret"), "'{}' has it", path.display());
    }
}
