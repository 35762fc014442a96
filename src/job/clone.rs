//! Growing a clone: claim, check, stage, recover, clean up, accept.
//!
//! Invariants: nothing is touched before the check list has passed; the directory cannot be started before everything
//! in it is durable; until it is accepted the clone is closed and archives nothing; what is deleted carries the marker
//! of the job that made it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;

use crate::base::bulk::{run_blocking, run_on_thread};
use crate::base::clock::Clock;
use crate::base::users::User;
use crate::engine::geometry::log_geometry;
use crate::engine::{CleanUpItem, CloneEngine, CloneSite, Recovered};
use crate::error::{Error, Kind, Result};
use crate::job::ports::{InstanceRegistry, RepositoryDoor, SourceAgents};
use crate::job::window::{confirm_log, require_log};
use crate::job::{JobRunner, Restart, StepContext, StepPlan, UndoCause, Work, journal, secrets};
use crate::model::backup::Backup;
use crate::model::check::{CheckItem, Verdict};
use crate::model::engine_kind::EngineKind;
use crate::model::group::TIE_PREFIX;
use crate::model::id::{BackupId, IncarnationId, JobId, check_name};
use crate::model::incarnation::Incarnation;
use crate::model::job::{CloneOrder, JobReport, JobState, Task};
use crate::model::password::{check_account, hidden_in};
use crate::model::position::Position;
use crate::model::target::utc_text;
use crate::repo::backup_reader::{BackupReader, Backups};
use crate::repo::incarnations::Incarnations;
use crate::repo::log_catalogue::LogCatalogue;
use crate::repo::log_reader::LogReader;
use crate::repo::repository::Repository;

mod accept;
pub(super) mod check;
mod log_source;
mod plan;
mod site;
pub(super) mod space;
mod stage;
mod writers;

use log_source::RepositoryLog;
pub use site::run_dir_of;
use stage::Staging;

const CLAIM: &str = "claim";
const CHECK: &str = "check";
const STAGE: &str = "stage";
const RECOVER: &str = "recover";
const CLEAN_UP: &str = "clean up";
const ACCEPT: &str = "accept";

/// The bus of a Redis Cluster is at a node's port and this (`CLUSTER_PORT_INCR` in `src/cluster.h` of Redis 7.0).
const CLUSTER_BUS_PORT_OFFSET: u16 = 10_000;

/// What steps leave for later ones in the job's journal.
mod facts {
    pub const DATA_DIR: &str = "data_dir";
    pub const PORT: &str = "port";
    pub const SOURCE: &str = "source_incarnation";
    pub const ENGINE: &str = "engine";
    pub const BACKUP: &str = "backup";
    pub const LOG_END: &str = "log_end";
    /// How far the contiguous log of the backup reached when the clone was checked.
    pub const LOG_REACHED: &str = "log_reached";
    pub const DEPARTED_AT: &str = "departed_at";
    pub const INCARNATION: &str = "incarnation";
    pub const BEGAN_AT: &str = "incarnation_began_at";
}

/// What clones on this host get, and whom they need.
pub struct CloneHost {
    pub host_name: String,
    /// Where the agent keeps what binds instances to incarnations.
    pub state_dir: PathBuf,
    pub data_root: PathBuf,
    pub ports: RangeInclusive<u16>,
    /// What a clone leaves free on its disk, beyond what it needs itself.
    pub keep_free_bytes: u64,
    pub listen_addresses: String,
    /// What the accepted clone's server calls to archive.
    pub archive_command: String,
    /// Packs that are read and frames that are written at the same time.
    pub lanes: usize,
    /// The engines that this host can grow.
    pub growers: BTreeMap<EngineKind, Grower>,
    pub repository: Arc<dyn RepositoryDoor>,
    pub sources: Arc<dyn SourceAgents>,
    pub registry: Arc<dyn InstanceRegistry>,
    pub clock: Arc<dyn Clock>,
}

/// What grows the clones of one engine on this host.
#[derive(Clone)]
pub struct Grower {
    pub engine: Arc<dyn CloneEngine>,
    /// Who runs its servers.
    pub run_as: String,
    /// Where its programs are, unless the engine is to look for them.
    pub bin_dir: Option<PathBuf>,
}

/// Where a clone will lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub data_dir: PathBuf,
    pub port: u16,
}

impl CloneHost {
    /// The engine that grows clones of this kind here.
    pub(super) fn engine(&self, kind: EngineKind) -> Result<&dyn CloneEngine> {
        Ok(self.grower(kind)?.engine.as_ref())
    }

    /// What grows clones of an engine here.
    fn grower(&self, kind: EngineKind) -> Result<&Grower> {
        self.growers.get(&kind).ok_or_else(|| {
            let message = format!("host '{}' cannot grow a clone of {}", self.host_name, kind.name());
            Error::new(Kind::Unsupported, message).hint("is its keiki older than that of the source?")
        })
    }

    /// The place that an order asks for; the parts that it leaves open are chosen here.
    fn place(&self, order: &CloneOrder) -> Result<Place> {
        let data_dir = match &order.data_dir {
            Some(dir) => PathBuf::from(dir),
            None => self.data_root.join(&order.clone_name),
        };
        let port = match order.port {
            Some(port) => port,
            None => free_ports(self, &self.registry.ports_of_jobs(), EngineKind::Fake).next().ok_or_else(|| {
                let (from, to) = (self.ports.start(), self.ports.end());
                Error::new(
                    Kind::Conflict,
                    format!("cannot clone '{}': no port from {from} to {to} is free", order.source),
                )
                .hint("widen '[clone] ports' in the configuration of this host, or choose one with --port")
            })?,
        };
        Ok(Place { data_dir, port })
    }

    fn site(&self, grower: &Grower, order: &CloneOrder, place: &Place, backup: &Backup) -> CloneSite {
        CloneSite {
            clone_name: order.clone_name.clone(),
            data_dir: place.data_dir.clone(),
            run_dir: site::run_dir_of(&place.data_dir),
            bin_dir: grower.bin_dir.clone(),
            port: place.port,
            listen_addresses: self.listen_addresses.clone(),
            run_as: grower.run_as.clone(),
            settings: order.settings.clone(),
            passwords_for: order.passwords_for.clone(),
            keep_expired: order.keep_expired,
            engine_version: backup.engine_version.clone(),
            facts: tied_facts(&backup.engine_facts, &order.ties),
            backup_start: backup.start,
            backup_stop: backup.stop,
            archive_command: self.archive_command.clone(),
        }
    }

    pub(super) async fn backups_of(
        &self,
        repository: &Arc<Repository>,
        incarnation: IncarnationId,
    ) -> Result<Vec<Backup>> {
        let list = Backups::new(repository.clone()).list(incarnation).await?;
        match (list.backups.is_empty(), list.unreadable.into_iter().next()) {
            // Nothing but damage: the damage is the reason, not the absence of backups.
            (true, Some((_, error))) => Err(error),
            _ => Ok(list.backups),
        }
    }

    /// The check list alone, for `--check`. Nothing is reserved or touched.
    pub async fn check_only(&self, order: &CloneOrder) -> Result<Vec<CheckItem>> {
        let repository = self.repository.repository().await?;
        let source = Incarnations::new(repository.clone()).find(&order.source).await?;
        let place = self.place(order)?;
        Ok(check::check(self, &repository, &source, order, &place).await?.items)
    }
}

/// One clone order.
pub struct CloneWork {
    host: Arc<CloneHost>,
    order: CloneOrder,
}

impl CloneWork {
    /// Refuses orders that cannot be meant.
    pub fn new(host: Arc<CloneHost>, order: CloneOrder) -> Result<CloneWork> {
        check_name("a clone", &order.clone_name)?;
        if let Some(dir) = order.data_dir.as_ref().filter(|dir| !dir.starts_with('/')) {
            return Err(Error::new(Kind::BadInput, format!("directory '{dir}' is not an absolute path"))
                .hint("write it from the root"));
        }
        order.passwords_for.iter().try_for_each(|account| check_account(account))?;
        Ok(CloneWork { host, order })
    }

    async fn source(&self, context: &StepContext) -> Result<(Arc<Repository>, Incarnation)> {
        let repository = self.host.repository.repository().await?;
        let id = IncarnationId::parse(&context.need_fact(facts::SOURCE)?)?;
        let source = Incarnations::new(repository.clone()).get(id).await?;
        Ok((repository, source))
    }

    fn place(&self, context: &StepContext) -> Result<Place> {
        let port = context.need_fact(facts::PORT)?;
        let port = port.parse().map_err(|_| Error::new(Kind::Damaged, format!("the journal says port '{port}'")))?;
        Ok(Place { data_dir: PathBuf::from(context.need_fact(facts::DATA_DIR)?), port })
    }

    async fn site(&self, context: &StepContext) -> Result<(CloneSite, BackupReader, Incarnation, Arc<Repository>)> {
        let (repository, source) = self.source(context).await?;
        let backup = BackupId::parse(&context.need_fact(facts::BACKUP)?)?;
        let reader = BackupReader::open(repository.clone(), source.id, &backup).await?;
        let grower = self.host.grower(source.engine)?;
        let site = self.host.site(grower, &self.order, &self.place(context)?, reader.backup());
        Ok((site, reader, source, repository))
    }

    /// Chooses directory and port, so that every later step, also after a restart, speaks of the same.
    async fn claim(&self, context: &StepContext) -> Result<()> {
        let repository = self.host.repository.repository().await?;
        let source = Incarnations::new(repository).find(&self.order.source).await?;
        let place = self.host.place(&self.order)?;
        self.host.grower(source.engine)?;
        context.record(facts::SOURCE, source.id.to_string()).await?;
        context.record(facts::ENGINE, source.engine.name().to_string()).await?;
        context.record(facts::PORT, place.port.to_string()).await?;
        context.record(facts::DATA_DIR, place.data_dir.display().to_string()).await?;
        context.result("source", format!("{}/{}", source.host, source.instance));
        context.result("engine", format!("{} {}", source.engine.name(), source.engine_version));
        context.result("target", self.order.target.to_string());
        context.result("data directory", place.data_dir.display().to_string());
        context.result("port", place.port.to_string());
        Ok(())
    }

    async fn check(&self, context: &StepContext) -> Result<()> {
        let (repository, source) = self.source(context).await?;
        let checked = check::check(&self.host, &repository, &source, &self.order, &self.place(context)?).await?;
        context.checks(checked.items.clone());
        let warnings = checked.items.iter().filter(|item| item.verdict == Verdict::Warn).count();
        let log_end = checked.log_end;
        let choice = checked.into_choice(&self.order)?;
        context.progress().note(match warnings {
            0 => "everything passed".to_string(),
            1 => "1 warning".to_string(),
            many => format!("{many} warnings"),
        });
        context.record(facts::BACKUP, choice.backup.id.to_string()).await?;
        context.record(facts::LOG_REACHED, choice.log_end.to_string()).await?;
        if let Some(end) = log_end {
            context.record(facts::LOG_END, end.to_string()).await?;
        }
        context.result("from backup", choice.backup.id.to_string());
        Ok(())
    }

    async fn stage(&self, context: &StepContext) -> Result<()> {
        let (site, reader, source, _) = self.site(context).await?;
        let engine = &self.host.grower(source.engine)?.engine;
        let (data_dir, job, owner) = (site.data_dir.clone(), context.order.id, User::by_name(&site.run_as)?);
        let made_for = owner.clone();
        engine.stop(&site).await?;
        // What an interrupted attempt left is worthless: its bytes may not have reached the disk.
        run_on_thread("stage-begin", move || {
            site::make(&data_dir, job, &made_for)?;
            site::empty(&data_dir, job)
        })
        .await?;
        let staging = Staging { engine: engine.as_ref(), site: &site, owner: &owner, lanes: self.host.lanes };
        // A store that does not answer must not hold up whoever cancels. The files are made before they are written, so
        // a thread that still has a frame in hand writes into a file of this attempt or into none.
        tokio::select! {
            outcome = stage::stage(&staging, &reader, context) => outcome,
            () = context.cancel.cancelled() => Err(crate::job::step::cancelled()),
        }
    }

    async fn recover(&self, context: &StepContext) -> Result<()> {
        let (site, reader, source, repository) = self.site(context).await?;
        if !site::is_of(&site.data_dir, context.order.id)? {
            // The job failed, was undone, and is resumed.
            self.stage(context).await?;
        }
        // Hours may have passed since the check. From here on the log is what it is now.
        confirm_log(&repository, &source, reader.backup()).await?;
        if let Some(reached) = context.fact(facts::LOG_REACHED) {
            require_log(&repository, &source, reader.backup(), Position::parse(&reached)?).await?;
        }
        let catalogue = LogCatalogue::look(&repository, source.id).await?.snapshot();
        let geometry = log_geometry(source.engine, &site.facts)?;
        let end = context.fact(facts::LOG_END).map(|text| Position::parse(&text)).transpose()?;
        let logs = Arc::new(RepositoryLog::new(Arc::new(LogReader::new(repository, catalogue)), geometry, end));
        let recovered = self
            .host
            .grower(source.engine)?
            .engine
            .recover(&site, &self.order.target, logs, context.progress(), context.cancel.clone())
            .await?;
        if let Some(failed) = recovered.verified.iter().find(|item| item.verdict == Verdict::Fail) {
            return Err(Error::new(
                Kind::Server,
                format!("cannot hand over '{}': {}: {}", site.clone_name, failed.what, failed.found),
            )
            .hint(
                failed.hint.clone().unwrap_or_else(|| "the clone is not what was ordered and is removed".to_string()),
            ));
        }
        self.report(context, &recovered).await
    }

    async fn report(&self, context: &StepContext, recovered: &Recovered) -> Result<()> {
        context.record(facts::DEPARTED_AT, recovered.departed_at.to_string()).await?;
        let last = recovered.last_commit_at.map_or("no transaction since the backup".to_string(), |at| {
            format!("last transaction at {}", utc_text(at))
        });
        context.result("reached", format!("{}, {last}", recovered.departed_at));
        for item in &recovered.verified {
            context.result(&item.what, item.found.clone());
        }
        Ok(())
    }

    async fn clean_up(&self, context: &StepContext) -> Result<()> {
        let (site, _, source, _) = self.site(context).await?;
        let engine = &self.host.grower(source.engine)?.engine;
        let mut items = engine.clean_up(&site).await?;
        items.extend(self.change_passwords(engine.as_ref(), &site, context.order.id).await?);
        for item in items {
            context.result(&item.what, item.done);
        }
        if self.order.hold {
            // Somebody will look at it, for hours perhaps, and may write to it.
            self.host.grower(source.engine)?.engine.make_durable(&site).await?;
            context.result("quarantine", "durable, closed until 'keiki accept' or 'keiki discard'");
        }
        Ok(())
    }

    async fn change_passwords(
        &self,
        engine: &dyn CloneEngine,
        site: &CloneSite,
        job: JobId,
    ) -> Result<Vec<CleanUpItem>> {
        if self.order.passwords_for.is_empty() {
            return Ok(Vec::new());
        }
        let directory = journal::directory_in(&self.host.state_dir);
        let passwords = run_blocking("passwords", move || secrets::read(&directory, job)).await?;
        if !self.order.passwords_for.iter().eq(passwords.keys()) {
            return Err(Error::new(Kind::NotFound, "the passwords that came with the order are not there any more")
                .hint("give the order again; they are kept beside the job's journal until it is over"));
        }
        engine.change_passwords(site, &passwords).await.map_err(|error| hidden_in(error, &passwords))
    }

    async fn accept(&self, context: &StepContext) -> Result<()> {
        let (site, _, source, repository) = self.site(context).await?;
        if !site::is_of(&site.data_dir, context.order.id)? {
            // It failed here, was undone, and is resumed: it is made again, to the same moment.
            self.recover(context).await?;
            self.clean_up(context).await?;
        }
        if context.fact(facts::BEGAN_AT).is_none() {
            context.record(facts::BEGAN_AT, self.host.clock.now().to_string()).await?;
        }
        accept::accept(&self.host, &repository, &source, &site, context).await
    }
}

#[async_trait]
impl Work for CloneWork {
    fn steps(&self) -> Vec<StepPlan> {
        vec![
            StepPlan::items(CLAIM),
            StepPlan::items(CHECK),
            StepPlan::bytes(STAGE),
            StepPlan::bytes(RECOVER),
            StepPlan::items(CLEAN_UP),
            StepPlan::items(ACCEPT),
        ]
    }

    fn exclusive(&self) -> Vec<String> {
        let mut all = vec![format!("clone name '{}'", self.order.clone_name)];
        all.extend(self.order.data_dir.iter().map(|dir| format!("directory '{dir}'")));
        all.extend(self.order.port.iter().map(|port| format!("port {port}")));
        all
    }

    fn is_heavy(&self) -> bool {
        true
    }

    fn holds_before(&self) -> Option<&'static str> {
        self.order.hold.then_some(ACCEPT)
    }

    fn may_cancel(&self, step: &str) -> bool {
        step != ACCEPT
    }

    fn after_interruption(&self, step: &str) -> Restart {
        match step {
            // The server may have gone with the machine: replay finds out how far it was, and goes on or begins again.
            CLEAN_UP => Restart::From(RECOVER),
            _ => Restart::Again,
        }
    }

    async fn run(&self, step: &str, context: &StepContext) -> Result<()> {
        let result = match step {
            CLAIM => self.claim(context).await,
            CHECK => self.check(context).await,
            STAGE => self.stage(context).await,
            RECOVER => self.recover(context).await,
            CLEAN_UP => self.clean_up(context).await,
            ACCEPT => self.accept(context).await,
            other => Err(Error::new(Kind::Internal, format!("a clone has no step '{other}'"))),
        };
        result.map_err(|error| named(error, &self.order))
    }

    async fn undo(&self, context: &StepContext, _cause: UndoCause) -> Result<()> {
        let Some(data_dir) = context.fact(facts::DATA_DIR) else { return Ok(()) };
        let (data_dir, job) = (PathBuf::from(data_dir), context.order.id);
        if !site::is_of(&data_dir, job)? {
            return Ok(());
        }
        if context.fact(facts::INCARNATION).is_some() {
            self.host.registry.unregister(&self.order.clone_name).await?;
        }
        let grower = self.host.grower(kind_of(context.fact(facts::ENGINE).as_deref())?)?;
        grower.engine.stop(&bare_site(&self.host, grower, &self.order, &data_dir)).await?;
        run_on_thread("discard", move || site::remove(&data_dir, job)).await
    }
}

/// The engine that a job recorded. Journals of the first version name none, and knew only one.
fn kind_of(recorded: Option<&str>) -> Result<EngineKind> {
    recorded.map_or(Ok(EngineKind::Postgres), EngineKind::parse)
}

/// Enough of a site to stop its server, where the repository cannot be asked any more.
fn bare_site(host: &CloneHost, grower: &Grower, order: &CloneOrder, data_dir: &std::path::Path) -> CloneSite {
    let nowhere = Position::Count(0);
    CloneSite {
        clone_name: order.clone_name.clone(),
        data_dir: data_dir.to_path_buf(),
        run_dir: site::run_dir_of(data_dir),
        bin_dir: grower.bin_dir.clone(),
        port: order.port.unwrap_or(0),
        listen_addresses: host.listen_addresses.clone(),
        run_as: grower.run_as.clone(),
        settings: BTreeMap::new(),
        passwords_for: BTreeSet::new(),
        keep_expired: false,
        engine_version: String::new(),
        facts: BTreeMap::new(),
        backup_start: nowhere,
        backup_stop: nowhere,
        archive_command: String::new(),
    }
}

/// What a backup says, and what its group tells the clone. What begins like the group's words is the group's alone.
fn tied_facts(backup: &BTreeMap<String, String>, ties: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let is_tie = |key: &str| key.starts_with(TIE_PREFIX);
    let own = backup.iter().filter(|(key, _)| !is_tie(key));
    let told = ties.iter().filter(|(key, _)| is_tie(key));
    own.chain(told).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Enough of the site of an accepted clone, made by an order that chose its port, to ask its server something.
pub(super) fn serving_site(host: &CloneHost, engine: EngineKind, order: &CloneOrder) -> Result<CloneSite> {
    let place = host.place(order)?;
    let site = bare_site(host, host.grower(engine)?, order, &place.data_dir);
    Ok(CloneSite { facts: tied_facts(&BTreeMap::new(), &order.ties), ..site })
}

/// The ports of this host that a clone may get, without those of instances, those in use, and those in `taken`. A server of
/// Redis may be a node of a cluster, which has a second port: the first are those where both are free.
pub(super) fn free_ports<'a>(
    host: &'a CloneHost,
    taken: &[u16],
    engine: EngineKind,
) -> impl Iterator<Item = u16> + use<'a> {
    let of_instances = host.registry.places().into_iter().map(|place| place.port);
    let taken: Vec<u16> = taken.iter().copied().chain(of_instances).collect();
    let is_free = move |port: &u16| !taken.contains(port) && check::port_is_free(*port);
    let is_redis = matches!(engine, EngineKind::Redis | EngineKind::Valkey);
    let has_bus =
        move |port: &u16| !is_redis || port.checked_add(CLUSTER_BUS_PORT_OFFSET).is_some_and(check::port_is_free);
    let both = host.ports.clone().filter(is_free.clone()).filter(has_bus);
    both.chain(host.ports.clone().filter(is_free))
}

/// The ports that clones have whose jobs are not over: nobody listens there yet.
pub fn ports_of_jobs(runner: &JobRunner) -> Vec<u16> {
    let live = runner.list().into_iter().filter(|job| matches!(job.state, JobState::Running | JobState::Held));
    live.filter_map(|job| runner.facts(job.order.id).ok()?.get(facts::PORT)?.parse().ok()).collect()
}

/// Every error of a clone begins with what could not be done, and ends with what can be.
fn named(error: Error, order: &CloneOrder) -> Error {
    if error.kind() == Kind::Cancelled {
        return error;
    }
    let error = match error.message().starts_with("cannot clone") {
        true => error,
        false => error.while_doing(format!("cannot clone '{}'", order.source)),
    };
    // An earlier hint is closer to the cause and stays.
    match error.kind() {
        Kind::Damaged | Kind::NotFound => error.hint(
            "the repository is damaged or incomplete there: 'keiki backup list' and 'keiki window' show what else can \
             be cloned",
        ),
        Kind::Unreachable => {
            error.hint("it may answer later: 'keiki job list' shows the job, 'keiki job resume' goes on")
        }
        Kind::Full => error.hint("free some space, then 'keiki job resume'; or choose another directory with --dir"),
        _ => error.hint("the log of the agent on the target host says more: 'journalctl -u keiki'"),
    }
}

/// Deletes a clone that was accepted: takes it out of the registry, stops its server and removes its directories. Its
/// archive stays. Takes the report and the facts of the job that made it.
pub async fn remove_accepted(host: &CloneHost, report: &JobReport, job_facts: &BTreeMap<String, String>) -> Result<()> {
    let Task::Clone(order) = &report.order.task else {
        return Err(Error::new(Kind::Internal, format!("job {} is not a clone", report.order.id)));
    };
    let data_dir = job_facts
        .get(facts::DATA_DIR)
        .map(PathBuf::from)
        .ok_or_else(|| Error::new(Kind::NotFound, format!("job {} has no directory", report.order.id)))?;
    host.registry.unregister(&order.clone_name).await?;
    if !site::is_of(&data_dir, report.order.id)? {
        return Ok(());
    }
    let grower = host.grower(kind_of(job_facts.get(facts::ENGINE).map(String::as_str))?)?;
    grower.engine.stop(&bare_site(host, grower, order, &data_dir)).await?;
    let job = report.order.id;
    run_on_thread("discard", move || site::remove(&data_dir, job)).await
}
