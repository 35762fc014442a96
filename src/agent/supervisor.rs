//! One supervisor per instance: it waits until the server and the repository are there, claims the incarnation, and
//! then ships for as long as it may. What happens in between only wakes it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::agent::config::InstanceConfig;
use crate::agent::repository::RepositoryHandle;
use crate::base::clock::Clock;
use crate::base::durable;
use crate::base::retry::RetryPolicy;
use crate::base::users::User;
use crate::engine::Engine;
use crate::error::{Error, Kind, Result};
use crate::job::archive::{ArchiveState, Archiver, ArchiverOptions};
use crate::job::backup::{BackupSource, needs_backup_behind_hole};
use crate::job::ports::RepositoryDoor;
use crate::model::backup::{Backup, BackupKind};
use crate::model::id::{IncarnationId, RunId};
use crate::model::incarnation::LeaseHolder;
use crate::model::window::Hole;
use crate::peer::access::Caller;
use crate::peer::api::{InstanceState, InstanceStatus};
use crate::repo::backup_reader::Backups;
use crate::repo::repository::Repository;

/// How long to wait before a server or a repository that was not there is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// After a refusal that somebody must act on there is no hurry, but acting must be enough: no restart is needed.
const LOOK_AGAIN_AFTER_REFUSAL: Duration = Duration::from_secs(15);
/// The longest wait after failures in a row, each of which cost the repository requests: a claim some, one that ends in a
/// conflict a listing of the log, too.
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(30);

/// How often somebody who waits for the first look asks.
const FIRST_LOOK_POLL: Duration = Duration::from_millis(50);
/// Whoever asks for the status again within this is told what was found out for the one before.
const STATUS_MAX_AGE: Duration = Duration::from_secs(60);
/// A repository that does not answer must not hold up the status, which says so.
const STATUS_PATIENCE: Duration = Duration::from_secs(3);

/// What a supervisor needs of its host.
#[derive(Clone)]
pub struct Surroundings {
    pub host_name: String,
    pub state_dir: PathBuf,
    pub repository: Arc<RepositoryHandle>,
    pub clock: Arc<dyn Clock>,
    pub holder: LeaseHolder,
    pub ship_lanes: usize,
}

/// An instance of this host with the task that archives it.
pub struct Supervisor {
    pub config: InstanceConfig,
    pub engine: Arc<dyn Engine>,
    around: Surroundings,
    state: Mutex<State>,
    stop: CancellationToken,
    task: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

#[derive(Default)]
struct State {
    archiver: Option<Arc<Archiver>>,
    /// Why there is no archiver, while there is none.
    obstacle: Option<Error>,
}

impl Supervisor {
    /// Starts the task; it ends when `stop` is cancelled.
    pub fn start(
        config: InstanceConfig,
        engine: Arc<dyn Engine>,
        around: Surroundings,
        stop: CancellationToken,
    ) -> Arc<Supervisor> {
        let supervisor = Arc::new(Supervisor {
            config,
            engine,
            around,
            state: Mutex::default(),
            stop: stop.clone(),
            task: Mutex::new(None),
        });
        let runner = supervisor.clone();
        let task = tokio::spawn(async move { runner.run().await });
        *supervisor.task.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(task);
        supervisor
    }

    // The lock is held for looks and assignments only, which cannot panic.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Claims and ships until the agent stops.
    async fn run(&self) {
        let mut holder = self.around.holder.clone();
        let mut failures = 0u32;
        while !self.stop.is_cancelled() {
            let began = Instant::now();
            let ready = self.ready().await;
            failures = if ready.is_ok() { failures.saturating_add(1) } else { 0 };
            let claimed = match ready {
                Ok(repository) => self.claim(repository, holder.clone()).await,
                Err(error) => Err(error),
            };
            let error = match claimed {
                Ok(archiver) => {
                    tracing::info!("archiving '{}' as incarnation {}", self.config.name, archiver.incarnation());
                    self.lock().archiver = Some(archiver.clone());
                    let ended = archiver.run(self.stop.clone()).await;
                    self.lock().archiver = None;
                    match ended {
                        Ok(()) => return,
                        Err(error) => {
                            if began.elapsed() > LOOK_AGAIN_MAX {
                                failures = 1;
                            }
                            if archiver.lease().is_lost_to_copy() {
                                holder.run = RunId::fresh();
                            }
                            error
                        }
                    }
                }
                // Who must not archive this server holds nothing on it either.
                Err(error) if is_refusal(&error) => error,
                Err(error) => match self.engine.guard_log().await {
                    Err(given_up) if given_up.kind() == Kind::Full => given_up,
                    _ => error,
                },
            };
            let is_news = self.lock().obstacle.as_ref() != Some(&error);
            if is_news {
                tracing::warn!("not archiving '{}': {error}", self.config.name);
            }
            let pause = pause_after(&error, failures);
            self.lock().obstacle = Some(error);
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = self.around.clock.sleep(pause) => {}
            }
        }
    }

    /// The repository, if it could be opened and the server is there: only then is it asked about the instance.
    async fn ready(&self) -> Result<Arc<Repository>> {
        let repository = self.around.repository.repository().await?;
        self.engine.identify().await?;
        Ok(repository)
    }

    async fn claim(&self, repository: Arc<Repository>, holder: LeaseHolder) -> Result<Arc<Archiver>> {
        let options = ArchiverOptions { ship_every: self.config.ship_every, parallel_files: self.around.ship_lanes };
        Archiver::claim(
            &self.config.name,
            &self.around.host_name,
            &self.around.state_dir,
            self.engine.clone(),
            repository,
            holder,
            self.around.clock.clone(),
            options,
        )
        .await
    }

    /// The archiver, or why there is none now.
    pub fn archiver(&self) -> Result<Arc<Archiver>> {
        let state = self.lock();
        if let Some(archiver) = &state.archiver {
            return Ok(archiver.clone());
        }
        Err(state.obstacle.clone().unwrap_or_else(|| {
            let name = &self.config.name;
            Error::new(Kind::Unreachable, format!("instance '{name}' is being looked at for the first time"))
                .hint("try again in a moment")
        }))
    }

    /// Waits until the instance was looked at for the first time, whatever was found.
    pub async fn wait_for_first_look(&self) {
        let is_over = || {
            let state = self.lock();
            state.archiver.is_some() || state.obstacle.is_some()
        };
        while !is_over() && !self.stop.is_cancelled() {
            self.around.clock.sleep(FIRST_LOOK_POLL).await;
        }
    }

    /// The incarnation that is being archived, if one is.
    pub fn incarnation(&self) -> Option<IncarnationId> {
        self.lock().archiver.as_ref().map(|archiver| archiver.incarnation())
    }

    /// Refuses a local caller who neither owns the data directory nor runs the server nor is an administrator.
    pub fn check_asker(&self, caller: &Caller) -> Result<()> {
        let Caller::Local { uid, is_admin, .. } = caller else {
            return Err(Error::new(Kind::Forbidden, "only processes of this host may ask whether a segment is safe"));
        };
        let runs_it = User::by_name(&self.config.run_as).is_ok_and(|user| user.uid == *uid);
        if *is_admin || runs_it {
            return Ok(());
        }
        Err(Error::new(Kind::Forbidden, format!("{caller} may not ask about the log of '{}'", self.config.name))
            .hint(format!("its server runs as '{}': is [[instance]] run_as right?", self.config.run_as)))
    }

    /// What a backup job needs of this instance.
    pub fn backup_source(self: &Arc<Self>) -> Result<BackupSource> {
        let spool_dir = self.around.state_dir.join("spool");
        durable::create_dir_all_durable(&spool_dir, 0o700)?;
        let supervisor = self.clone();
        Ok(BackupSource {
            instance: self.config.name.clone(),
            host: self.around.host_name.clone(),
            engine: self.engine.clone(),
            archiver: Arc::new(move || supervisor.archiver()),
            spool_dir,
            clock: self.around.clock.clone(),
        })
    }

    /// When the newest automatic backup began, as of a look at the repository that is not older than `max_age`.
    pub async fn last_automatic_backup_began_at(&self, max_age: Duration) -> Result<Option<Timestamp>> {
        let incarnation = self.archiver()?.incarnation();
        let backups = Backups::new(self.around.repository.repository().await?);
        let newest = backups.newest(incarnation, max_age, |backup| backup.kind == BackupKind::Automatic).await?;
        Ok(newest.map(|backup| backup.began_at))
    }

    /// The newest backup of the current incarnation; what is remembered of it while the repository does not answer.
    async fn last_backup(&self) -> Option<Backup> {
        let incarnation = self.archiver().ok()?.incarnation();
        let backups = Backups::new(self.around.repository.repository().await.ok()?);
        match tokio::time::timeout(STATUS_PATIENCE, backups.newest(incarnation, STATUS_MAX_AGE, |_| true)).await {
            Ok(Ok(newest)) => newest,
            Ok(Err(_)) | Err(_) => backups.newest_remembered(incarnation).await,
        }
    }

    /// See [`Engine::has_saved`].
    pub async fn has_saved(&self) -> Result<bool> {
        self.engine.has_saved().await
    }

    /// See [`needs_backup_behind_hole`]. Never for a server that keeps its log until it is shipped.
    pub async fn needs_backup_behind_hole(&self, max_age: Duration) -> Result<bool> {
        match self.config.engine.forgets_log_by_itself() {
            true => needs_backup_behind_hole(self.archiver()?.as_ref(), max_age).await,
            false => Ok(false),
        }
    }

    /// What `keiki status` shows.
    pub async fn status(&self) -> InstanceStatus {
        let last_backup = self.last_backup().await;
        let backup_stop = last_backup.as_ref().map(|backup| backup.stop);
        let mut status = InstanceStatus {
            name: self.config.name.clone(),
            engine: self.config.engine.name().to_string(),
            engine_version: None,
            data_dir: self.config.data_dir.display().to_string(),
            port: self.config.port,
            state: InstanceState::Starting,
            incarnation: None,
            shipped: None,
            durable: None,
            durable_at: None,
            backlog_bytes: 0,
            backlog_seconds: 0,
            last_backup: last_backup.map(|backup| (backup.id.to_string(), backup.ended_at)),
            problem: None,
        };
        match self.archiver() {
            Ok(archiver) => {
                fill_from_archiver(&mut status, &archiver);
                let hole = backup_stop.and_then(|stop| archiver.hole_behind(stop).ok().flatten());
                status.problem =
                    status.problem.or_else(|| hole.map(|hole| hole_since_backup(&self.config.name, &hole)));
            }
            Err(_) => {
                status.problem = self.lock().obstacle.clone();
                status.state = match &status.problem {
                    None => InstanceState::Starting,
                    Some(error) if is_refusal(error) => InstanceState::Stopped,
                    Some(_) if !self.server_is_there().await => InstanceState::Down,
                    Some(_) => InstanceState::Retrying,
                };
            }
        }
        status
    }

    async fn server_is_there(&self) -> bool {
        self.engine.identify().await.is_ok()
    }

    /// Stops archiving and waits until it has ended.
    pub async fn stop(&self) {
        self.stop.cancel();
        let task = self.task.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if let Some(task) = task {
            // A task that panicked has ended, too; the panic was reported when it happened.
            let _ = task.await;
        }
    }
}

/// What the archiver says, in the words of the status.
fn state_of(state: ArchiveState) -> InstanceState {
    match state {
        ArchiveState::Starting => InstanceState::Starting,
        ArchiveState::Archiving => InstanceState::Archiving,
        ArchiveState::Retrying => InstanceState::Retrying,
        ArchiveState::Down => InstanceState::Down,
        ArchiveState::Stopped => InstanceState::Stopped,
    }
}

/// How long to wait after a failure; `failures` counts those in a row for which the repository was asked, and is 0 if it was
/// not. Another agent that has the lease costs little, and may stop at any moment.
fn pause_after(error: &Error, failures: u32) -> Duration {
    let first_wait = if is_refusal(error) { LOOK_AGAIN_AFTER_REFUSAL } else { LOOK_AGAIN };
    if failures <= 1 || error.kind() == Kind::Fenced {
        return first_wait;
    }
    let policy = RetryPolicy { first_wait, longest_wait: LOOK_AGAIN_MAX, ..RetryPolicy::forever() };
    policy.wait_after(failures).max(first_wait)
}

/// Whether somebody must act before it is worth trying again.
fn is_refusal(error: &Error) -> bool {
    matches!(error.kind(), Kind::Fenced | Kind::Conflict)
}

/// What is archived behind a hole is worth nothing without a backup behind it.
fn hole_since_backup(name: &str, hole: &Hole) -> Error {
    let (from, to) = (hole.from, hole.to);
    Error::new(Kind::NotFound, format!("its log from {from} to {to} was gone from the server before it was shipped"))
        .hint(format!("no later moment can be cloned before a new backup is taken: 'keiki backup create {name}'"))
}

fn fill_from_archiver(status: &mut InstanceStatus, archiver: &Archiver) {
    let now = archiver.status();
    status.engine_version = Some(now.engine_version);
    status.incarnation = Some(archiver.incarnation());
    status.state = state_of(now.state);
    status.shipped = now.shipped;
    (status.durable, status.durable_at) = (now.durable, now.durable_at);
    status.backlog_bytes = now.backlog_bytes;
    status.backlog_seconds = now.backlog_seconds;
    status.problem = now.problem;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_that_goes_on_failing_is_tried_less_and_less_often_if_it_costs_requests() {
        let pauses = |kind, asked: bool| -> Vec<u64> {
            let error = Error::new(kind, "no");
            (1..=8).map(|count| pause_after(&error, if asked { count } else { 0 }).as_secs()).collect()
        };
        // A server or a repository that is not there, and an agent that holds the lease.
        assert_eq!(pauses(Kind::Unreachable, false), [2; 8]);
        assert_eq!(pauses(Kind::Fenced, true), [15; 8]);
        for (kind, first) in [(Kind::Forbidden, 2), (Kind::Unreachable, 2), (Kind::Conflict, 15)] {
            let pauses = pauses(kind, true);
            assert_eq!(pauses[0], first);
            assert!(pauses.iter().all(|pause| (first..=30).contains(pause)), "{pauses:?}");
            assert!(pauses[5..].iter().all(|pause| *pause >= 15), "{pauses:?}");
        }
    }
}
