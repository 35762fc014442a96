//! Runs jobs: takes orders, drives steps, holds, cancels, resumes, and picks up after a crash.
//!
//! Invariants: see `job`. A task of the runtime drives each running job; a panic in it becomes the job's failure. When
//! the agent stops, running jobs are left as the journal has them and go on at the next start.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::base::bulk::run_blocking;
use crate::base::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::job::drive::drive;
use crate::job::journal::{self, History, JobLog};
use crate::job::records::{FORMAT, Instant, OrderRecord, Record, StepRecord};
use crate::job::restart::{Next, decide};
use crate::job::step::Live;
use crate::job::{Restart, UndoCause, Work, Workshop, secrets};
use crate::model::group::member_ids;
use crate::model::id::JobId;
use crate::model::job::{JobReport, JobState, Order, StepState};
use crate::model::password::Passwords;

/// Limits of a runner.
#[derive(Debug, Clone)]
pub struct RunnerOptions {
    /// How many jobs that are over stay on disk and in the list.
    pub keep_jobs: usize,
    /// How many heavy jobs (clones) work at the same time; more wait for their turn.
    pub heavy_at_once: usize,
}

impl Default for RunnerOptions {
    fn default() -> RunnerOptions {
        RunnerOptions { keep_jobs: 200, heavy_at_once: 4 }
    }
}

/// All jobs of an agent. Cheap to clone; all clones are the same runner.
#[derive(Clone)]
pub struct JobRunner {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub directory: PathBuf,
    workshop: Arc<dyn Workshop>,
    pub clock: Arc<dyn Clock>,
    options: RunnerOptions,
    jobs: Mutex<HashMap<JobId, Arc<Job>>>,
    /// Orders are taken one at a time, so that two equal ones cannot both be new.
    desk: tokio::sync::Mutex<()>,
    pub heavy: Semaphore,
    /// The agent stops: whatever happens now is not an outcome.
    pub stopping: CancellationToken,
    tasks: TaskTracker,
    damaged: Vec<Error>,
}

pub(super) struct Job {
    pub id: JobId,
    pub live: Arc<Live>,
    /// Of the current run of the job.
    cancel: Mutex<CancellationToken>,
}

impl Job {
    pub fn cancel_token(&self) -> CancellationToken {
        lock(&self.cancel).clone()
    }
}

/// Locks what is held for a moment only and never across a call that could panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl JobRunner {
    /// Reads the jobs below `state_dir`. Nothing runs before [`JobRunner::recover_interrupted`]. Blocking, for the
    /// start of the agent.
    pub fn open(
        state_dir: &Path,
        workshop: Arc<dyn Workshop>,
        clock: Arc<dyn Clock>,
        options: RunnerOptions,
    ) -> Result<JobRunner> {
        let directory = journal::directory_in(state_dir);
        let (histories, damaged) = journal::load_all(&directory)?;
        for error in &damaged {
            tracing::error!("{error}");
        }
        secrets::sweep(&directory, &histories.iter().map(|history| &history.report).collect::<Vec<_>>())?;
        let jobs = histories.into_iter().map(|history| {
            let id = history.report.order.id;
            let live = Arc::new(Live::new(history, None));
            (id, Arc::new(Job { id, live, cancel: Mutex::new(CancellationToken::new()) }))
        });
        let inner = Inner {
            directory,
            workshop,
            clock,
            heavy: Semaphore::new(options.heavy_at_once.max(1)),
            options,
            jobs: Mutex::new(jobs.collect()),
            desk: tokio::sync::Mutex::new(()),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
            damaged,
        };
        Ok(JobRunner { inner: Arc::new(inner) })
    }

    /// Journals that could not be understood at the start, for `doctor`.
    pub fn damaged_journals(&self) -> &[Error] {
        &self.inner.damaged
    }

    /// Goes on with every job that was running when the agent died.
    pub async fn recover_interrupted(&self) {
        let _desk = self.inner.desk.lock().await;
        for job in self.all() {
            if job.live.history().report.state != JobState::Running {
                continue;
            }
            tracing::info!(job = %job.id, "a job was interrupted and is picked up");
            if let Err(error) = self.pick_up(&job).await {
                // Nobody drives it, so it must not look as if it ran: it is over until the agent starts the next time.
                let error = error.while_doing("cannot pick up the interrupted job");
                super::drive::end(&self.inner, &job, super::records::EndRecord::Failed, Some(&error)).await;
            }
        }
    }

    async fn pick_up(&self, job: &Arc<Job>) -> Result<()> {
        self.open_journal(job).await?;
        let order = job.live.history().report.order.clone();
        match self.inner.workshop.work(&order) {
            Ok(work) => {
                let next = decide(&job.live.history(), work.as_ref());
                self.start(job, work, next);
            }
            Err(error) => {
                let error = error.while_doing("cannot go on after the restart of the agent");
                super::drive::end(&self.inner, job, super::records::EndRecord::Failed, Some(&error)).await;
            }
        }
        Ok(())
    }

    /// Takes an order without passwords: see [`JobRunner::submit_with`].
    pub async fn submit(&self, order: Order) -> Result<JobReport> {
        self.submit_with(order, Passwords::new()).await
    }

    /// Takes an order: records it and begins it. The same order again is answered with the job as it stands; another
    /// one under the same id is a `Conflict` that names the first difference. `passwords` are those of the accounts that
    /// the order names; they are kept apart from it, for its job only.
    pub async fn submit_with(&self, order: Order, passwords: Passwords) -> Result<JobReport> {
        secrets::check(&order, &passwords)?;
        let _desk = self.inner.desk.lock().await;
        if let Some(job) = self.find(order.id) {
            let (directory, id) = (self.inner.directory.clone(), order.id);
            run_blocking("compare passwords", move || secrets::require_same(&directory, id, &passwords)).await?;
            return same_order(&job.live.history().report, &order);
        }
        let work = self.inner.workshop.work(&order)?;
        self.refuse_rivals(&order, work.as_ref())?;
        self.forget_old().await;
        let steps = work.steps();
        let first = Record::Ordered {
            format: FORMAT,
            at: Instant(self.inner.clock.now()),
            order: OrderRecord::from(&order),
            steps: steps.iter().map(|s| StepRecord { name: s.name.to_string(), unit: s.unit.into() }).collect(),
        };
        let history = History::begin(&first)?;
        let (directory, id) = (self.inner.directory.clone(), order.id);
        let log = run_blocking("create journal", move || {
            // First, so that no order is ever recorded whose passwords are lost.
            secrets::keep(&directory, id, &passwords)?;
            JobLog::create(&directory, id, &first)
        })
        .await;
        let log = log.map_err(|error| error.while_doing("cannot record the order"))?;
        let live = Arc::new(Live::new(history, Some(log)));
        let job = Arc::new(Job { id, live, cancel: Mutex::new(CancellationToken::new()) });
        lock(&self.inner.jobs).insert(id, job.clone());
        self.start(&job, work, Next::Run { step: 0, repeated: false });
        Ok(job.report())
    }

    /// All jobs, newest first.
    pub fn list(&self) -> Vec<JobReport> {
        let mut reports: Vec<JobReport> = self.all().iter().map(|job| job.report()).collect();
        reports.sort_by_key(|report| std::cmp::Reverse((report.began_at, report.order.id)));
        reports
    }

    pub fn show(&self, id: JobId) -> Result<JobReport> {
        Ok(self.need(id)?.report())
    }

    /// A channel that always holds the newest report of a job.
    pub fn subscribe(&self, id: JobId) -> Result<watch::Receiver<JobReport>> {
        Ok(self.need(id)?.live.subscribe())
    }

    /// The facts that a job has recorded, for those who look after its clone.
    pub fn facts(&self, id: JobId) -> Result<std::collections::BTreeMap<String, String>> {
        Ok(self.need(id)?.live.history().facts.clone())
    }

    /// Waits until the job is over or held.
    pub async fn wait(&self, id: JobId) -> Result<JobReport> {
        let mut watcher = self.subscribe(id)?;
        let report = watcher.wait_for(|report| report.state != JobState::Running).await;
        report.map(|report| report.clone()).map_err(|_| Error::new(Kind::Internal, "the job was dropped"))
    }

    /// Asks for a job to stop and to be undone; it is still running when this returns. A held or failed job is undone
    /// as well: nothing of it stays.
    pub async fn cancel(&self, id: JobId) -> Result<JobReport> {
        let _desk = self.inner.desk.lock().await;
        let job = self.need(id)?;
        let report = job.report();
        match report.state {
            JobState::Done => {
                return Err(Error::new(Kind::Conflict, format!("cannot cancel job '{id}': it is done")));
            }
            JobState::Cancelled => return Ok(report),
            JobState::Running | JobState::Held | JobState::Failed => {}
        }
        let work = self.inner.workshop.work(&report.order)?;
        let running = report.steps.iter().find(|step| step.state == StepState::Running);
        if let (JobState::Running, Some(step)) = (report.state, running)
            && !work.may_cancel(&step.name)
        {
            return Err(Error::new(
                Kind::Conflict,
                format!("cannot cancel job '{id}': step '{}' cannot be taken back", step.name),
            )
            .hint(format!("wait for its end with 'keiki job follow {id}'")));
        }
        self.open_journal(&job).await?;
        job.live.append(Record::CancelAsked { at: self.now() }).await?;
        if report.state == JobState::Running {
            job.cancel_token().cancel();
        } else {
            self.start(&job, work, Next::Undo { cause: UndoCause::Cancelled, error: None });
        }
        Ok(job.report())
    }

    /// Goes on with a failed job. A running or held one is answered as it stands.
    pub async fn resume(&self, id: JobId) -> Result<JobReport> {
        let _desk = self.inner.desk.lock().await;
        let job = self.need(id)?;
        let report = job.report();
        match report.state {
            JobState::Failed => {}
            JobState::Running | JobState::Held => return Ok(report),
            JobState::Done | JobState::Cancelled => {
                let how = if report.state == JobState::Done { "done" } else { "cancelled" };
                return Err(Error::new(Kind::Conflict, format!("cannot resume job '{id}': it is {how}"))
                    .hint("give the order again to begin a new job"));
            }
        }
        let work = self.inner.workshop.work(&report.order)?;
        self.refuse_rivals(&report.order, work.as_ref())?;
        let failed = report.steps.iter().position(|step| step.state != StepState::Done).unwrap_or(0);
        let from = match work.after_interruption(&report.steps[failed].name) {
            Restart::Again => failed,
            Restart::From(name) => report.steps.iter().position(|step| step.name == name).unwrap_or(0),
            Restart::Fail(error) => return Err(error.while_doing(format!("cannot resume job '{id}'"))),
        };
        self.go_on(&job, work, from, false).await
    }

    /// Opens a clone that waits in quarantine.
    pub async fn accept(&self, clone_name: &str) -> Result<JobReport> {
        let _desk = self.inner.desk.lock().await;
        let job = self.clone_job(clone_name, "accept", &[JobState::Held])?;
        let report = job.report();
        let work = self.inner.workshop.work(&report.order)?;
        let next = report.steps.iter().position(|step| step.state != StepState::Done).unwrap_or(0);
        self.go_on(&job, work, next, true).await
    }

    /// Opens a clone of a group, by its job. One that was opened already, or has failed, is answered as it stands.
    pub async fn accept_member(&self, id: JobId) -> Result<JobReport> {
        let _desk = self.inner.desk.lock().await;
        let job = self.need(id)?;
        let report = job.report();
        match report.state {
            JobState::Held => {
                let work = self.inner.workshop.work(&report.order)?;
                let next = report.steps.iter().position(|step| step.state != StepState::Done).unwrap_or(0);
                self.go_on(&job, work, next, true).await
            }
            JobState::Running | JobState::Done | JobState::Failed => Ok(report),
            JobState::Cancelled => {
                Err(Error::new(Kind::Conflict, format!("cannot accept job '{id}': it was discarded"))
                    .hint("give the order of the group again to begin anew"))
            }
        }
    }

    /// The job of the group that gave this order and has not been decided about yet, if there is one.
    pub fn group_of(&self, id: JobId) -> Option<JobReport> {
        let is_live = |report: &JobReport| !matches!(report.state, JobState::Done | JobState::Cancelled);
        self.list().into_iter().find(|report| is_live(report) && member_ids(&report.order).contains(&id))
    }

    /// Deletes a clone that was not accepted, with its directory.
    pub async fn discard(&self, clone_name: &str) -> Result<JobReport> {
        let id = self.clone_job(clone_name, "discard", &[JobState::Held, JobState::Failed])?.id;
        self.cancel(id).await
    }

    /// Stops driving: running jobs stay as their journals have them. Returns when all their tasks have ended.
    pub async fn shut_down(&self) {
        self.inner.stopping.cancel();
        for job in self.all() {
            job.cancel_token().cancel();
        }
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        for job in self.all() {
            job.live.close().await;
        }
    }

    async fn go_on(&self, job: &Arc<Job>, work: Arc<dyn Work>, from: usize, accepted: bool) -> Result<JobReport> {
        self.open_journal(job).await?;
        let from_step = job.live.history().report.steps[from].name.clone();
        job.live.append(Record::Resumed { at: self.now(), from_step, accepted }).await?;
        self.start(job, work, Next::Run { step: from, repeated: !accepted });
        Ok(job.report())
    }

    fn start(&self, job: &Arc<Job>, work: Arc<dyn Work>, next: Next) {
        *lock(&job.cancel) = self.inner.stopping.child_token();
        self.inner.tasks.spawn(drive(self.inner.clone(), job.clone(), work, next));
    }

    async fn open_journal(&self, job: &Job) -> Result<()> {
        let (directory, id) = (self.inner.directory.clone(), job.id);
        job.live.open_with(move || JobLog::reopen(&directory, id)).await
    }

    /// An error if a job that is not over uses something that this one wants for itself. A group and its members want the
    /// same.
    fn refuse_rivals(&self, order: &Order, work: &dyn Work) -> Result<()> {
        let wanted = work.exclusive();
        let own_members = member_ids(order);
        for other in self.all() {
            let report = other.report();
            let is_kin = own_members.contains(&other.id) || member_ids(&report.order).contains(&order.id);
            if other.id == order.id || is_kin || other.live.history().is_over() {
                continue;
            }
            let Ok(rival) = self.inner.workshop.work(&report.order) else { continue };
            if let Some(what) = rival.exclusive().into_iter().find(|used| wanted.contains(used)) {
                return Err(Error::new(Kind::Conflict, format!("job '{}' uses the {what}", other.id))
                    .hint(format!("see 'keiki job show {}', or 'keiki job cancel' it", other.id)));
            }
        }
        Ok(())
    }

    /// Removes the oldest jobs that are over. A failed clone may have left a directory: its job stays.
    async fn forget_old(&self) {
        let mut old: Vec<(jiff::Timestamp, JobId)> = self.all().iter().filter_map(|job| forgettable(job)).collect();
        old.sort();
        let too_many = old.len().saturating_sub(self.inner.options.keep_jobs.saturating_sub(1));
        for (_, id) in old.into_iter().take(too_many) {
            let directory = self.inner.directory.clone();
            match run_blocking("forget job", move || forget(&directory, id)).await {
                Ok(()) => drop(lock(&self.inner.jobs).remove(&id)),
                Err(error) => tracing::warn!(job = %id, "cannot forget an old job: {error}"),
            }
        }
    }

    fn clone_job(&self, clone_name: &str, verb: &str, states: &[JobState]) -> Result<Arc<Job>> {
        let mut jobs: Vec<Arc<Job>> = self.all();
        jobs.retain(|job| job.live.history().report.order.task.clone_name() == Some(clone_name));
        jobs.sort_by_key(|job| std::cmp::Reverse(job.live.history().report.began_at));
        if let Some(job) = jobs.iter().find(|job| states.contains(&job.live.history().report.state)) {
            return Ok(job.clone());
        }
        let cannot = format!("cannot {verb} clone '{clone_name}'");
        Err(match jobs.first().map(|job| (job.id, job.live.history().report.state)) {
            None => Error::new(Kind::NotFound, format!("{cannot}: no job on this host has grown it"))
                .hint("'keiki job list' shows what there is; was it grown on another host?"),
            Some((id, JobState::Running)) => Error::new(Kind::Conflict, format!("{cannot}: its job '{id}' is running"))
                .hint(format!("'keiki job follow {id}' waits for it, 'keiki job cancel {id}' undoes it")),
            Some((_, JobState::Done)) => {
                Error::new(Kind::Conflict, format!("{cannot}: it was accepted and is an instance of its own now"))
            }
            Some((id, JobState::Failed)) => Error::new(Kind::Conflict, format!("{cannot}: its job '{id}' has failed"))
                .hint(format!("'keiki job resume {id}' tries again, 'keiki discard {clone_name}' removes it")),
            Some((_, _)) => Error::new(Kind::NotFound, format!("{cannot}: it was discarded")),
        })
    }

    fn all(&self) -> Vec<Arc<Job>> {
        lock(&self.inner.jobs).values().cloned().collect()
    }

    fn find(&self, id: JobId) -> Option<Arc<Job>> {
        lock(&self.inner.jobs).get(&id).cloned()
    }

    fn need(&self, id: JobId) -> Result<Arc<Job>> {
        self.find(id).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("no job '{id}' on this host"))
                .hint("'keiki job list' shows the jobs; was it ordered on another host?")
        })
    }

    fn now(&self) -> Instant {
        Instant(self.inner.clock.now())
    }
}

impl Job {
    fn report(&self) -> JobReport {
        self.live.history().report.clone()
    }
}

fn forget(directory: &Path, id: JobId) -> Result<()> {
    secrets::forget(directory, id)?;
    journal::forget(directory, id)
}

fn forgettable(job: &Job) -> Option<(jiff::Timestamp, JobId)> {
    let history = job.live.history();
    let report = &history.report;
    let keeps_a_directory = report.state == JobState::Failed && report.order.task.clone_name().is_some();
    (history.is_over() && !keeps_a_directory).then_some((report.began_at, job.id))
}

fn same_order(known: &JobReport, order: &Order) -> Result<JobReport> {
    match OrderRecord::from(&known.order).first_difference(&OrderRecord::from(order)) {
        None => Ok(known.clone()),
        Some((field, ours, theirs)) => Err(Error::new(
            Kind::Conflict,
            format!("order '{}' was given before with {field} '{ours}', now with '{theirs}'", order.id),
        )
        .hint("give a changed order an id of its own")),
    }
}

#[cfg(test)]
mod tests;
