//! Makes the work for an order, out of what this host has.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use crate::agent::config::CloneConfig;
use crate::agent::host::Host;
use crate::agent::sources::Sources;
use crate::engine::CloneEngine;
use crate::engine::mysql::MySqlCloner;
use crate::engine::mysql::product::Product;
use crate::engine::postgres::clone::PostgresCloner;
use crate::engine::redis::clone::RedisCloner;
use crate::error::{Error, Kind, Result};
use crate::job::backup::BackupWork;
use crate::job::clone::{self, CloneHost, CloneWork, Grower};
use crate::job::group::{GroupWork, remove_accepted_group};
use crate::job::{Work, Workshop};
use crate::model::check::CheckItem;
use crate::model::engine_kind::EngineKind;
use crate::model::group::GroupOrder;
use crate::model::id::JobId;
use crate::model::job::{JobReport, JobState, Order, Task};

/// The engine that grows and starts clones of this kind, if there is one.
pub fn clone_engine(kind: EngineKind) -> Option<Arc<dyn CloneEngine>> {
    match kind {
        EngineKind::Postgres => Some(Arc::new(PostgresCloner::default())),
        EngineKind::MariaDb => Some(Arc::new(MySqlCloner { product: Product::MariaDb, default_bin_dir: None })),
        EngineKind::MySql => Some(Arc::new(MySqlCloner { product: Product::MySql, default_bin_dir: None })),
        EngineKind::Redis | EngineKind::Valkey => Some(Arc::new(RedisCloner::of(kind))),
        EngineKind::Fake => None,
    }
}

/// What grows clones on this host.
fn growers(config: &CloneConfig) -> BTreeMap<EngineKind, Grower> {
    let places = [
        (EngineKind::Postgres, &config.run_as, &config.bin_dir),
        (EngineKind::MariaDb, &config.mariadb.run_as, &config.mariadb.bin_dir),
        (EngineKind::MySql, &config.mysql.run_as, &config.mysql.bin_dir),
        (EngineKind::Redis, &config.redis.run_as, &config.redis.bin_dir),
        (EngineKind::Valkey, &config.valkey.run_as, &config.valkey.bin_dir),
    ];
    let growers = places.into_iter().filter_map(|(kind, run_as, bin_dir)| {
        let engine = clone_engine(kind)?;
        Some((kind, Grower { engine, run_as: run_as.clone(), bin_dir: bin_dir.clone() }))
    });
    growers.collect()
}

/// The workshop of an agent. It knows the host only weakly: the host owns the runner, which owns the workshop.
pub struct AgentWorkshop {
    host: Weak<Host>,
}

impl AgentWorkshop {
    pub fn new(host: &Arc<Host>) -> Arc<AgentWorkshop> {
        Arc::new(AgentWorkshop { host: Arc::downgrade(host) })
    }

    fn host(&self) -> Result<Arc<Host>> {
        self.host.upgrade().ok_or_else(|| Error::new(Kind::Cancelled, "the agent is stopping"))
    }

    /// What clones on this host get.
    fn clone_host(&self, host: &Arc<Host>) -> Arc<CloneHost> {
        let config = &host.config.clone;
        Arc::new(CloneHost {
            host_name: host.config.host.name.clone(),
            state_dir: host.config.host.state_dir.clone(),
            data_root: config.data_root.clone(),
            ports: config.ports.clone(),
            keep_free_bytes: config.keep_free_bytes,
            listen_addresses: config.listen_addresses.clone(),
            archive_command: host.archive_command(),
            lanes: host.config.limits.clone_lanes,
            growers: growers(config),
            repository: host.repository.clone(),
            sources: Arc::new(Sources(host.clone())),
            registry: host.clone(),
            clock: host.clock.clone(),
        })
    }

    /// The check list of a clone order, for `--check`.
    pub async fn check_clone(&self, order: &Order) -> Result<Vec<CheckItem>> {
        let host = self.host()?;
        match &order.task {
            Task::Clone(clone) => self.clone_host(&host).check_only(clone).await,
            Task::CloneGroup(group) => self.group_work(&host, group)?.check_only().await,
            Task::Backup { .. } => {
                let error = Error::new(Kind::Unsupported, "a backup has no check list");
                Err(error.hint("'keiki doctor' checks the instance"))
            }
        }
    }

    fn group_work(&self, host: &Arc<Host>, group: &GroupOrder) -> Result<GroupWork> {
        GroupWork::new(self.clone_host(host), host.runner()?.as_ref().clone(), group.clone())
    }

    /// An error if this job belongs to a group that has not been decided about: it is decided about as one. `verb` is
    /// what somebody wants to do with the job.
    pub fn refuse_member(&self, id: JobId, verb: &str) -> Result<()> {
        let host = self.host()?;
        let Some(group) = host.runner()?.group_of(id) else { return Ok(()) };
        let name = group.order.task.clone_name().unwrap_or_default();
        let id_of_group = group.order.id;
        Err(Error::new(
            Kind::Conflict,
            format!("cannot {verb} it alone: it belongs to group '{name}', job {id_of_group}"),
        )
        .hint(format!(
            "'keiki accept {name}' and 'keiki discard {name}' decide about all of it; 'keiki job show {id_of_group}' \
                 says how it stands"
        )))
    }

    /// The same for the clone of this name.
    pub fn refuse_member_named(&self, name: &str, verb: &str) -> Result<()> {
        let host = self.host()?;
        let newest = host.runner()?.list().into_iter().find(|report| report.order.task.clone_name() == Some(name));
        newest.map_or(Ok(()), |report| self.refuse_member(report.order.id, verb))
    }

    /// Whether something of an accepted group is an instance of this host.
    fn has_members(&self, host: &Host, order: &Order) -> bool {
        match &order.task {
            Task::CloneGroup(group) => group.member_names().iter().any(|name| host.instance(name).is_ok()),
            Task::Clone(_) | Task::Backup { .. } => false,
        }
    }

    /// Deletes a clone: one that waits in quarantine through its job, an accepted one by what its job recorded.
    pub async fn discard(&self, name: &str) -> Result<JobReport> {
        let host = self.host()?;
        let runner = host.runner()?;
        self.refuse_member_named(name, "discard")?;
        let of_this_name = |report: &JobReport| report.order.task.clone_name() == Some(name);
        // The newest first: an older job of the same name is over and gone.
        let newest = runner.list().into_iter().find(of_this_name);
        match newest {
            Some(report) if report.state == JobState::Done && host.instance(name).is_ok() => {
                let facts = runner.facts(report.order.id)?;
                clone::remove_accepted(&self.clone_host(&host), &report, &facts).await?;
                Ok(report)
            }
            Some(report) if report.state == JobState::Done && self.has_members(&host, &report.order) => {
                remove_accepted_group(&self.clone_host(&host), runner, &report.order).await?;
                Ok(report)
            }
            Some(report) if report.state == JobState::Failed && matches!(report.order.task, Task::CloneGroup(_)) => {
                runner.discard(name).await
            }
            Some(report) if matches!(report.state, JobState::Held | JobState::Running) => runner.discard(name).await,
            _ => Err(Error::new(Kind::NotFound, format!("host '{}' has no clone '{name}'", host.config.host.name))
                .hint("'keiki instances' and 'keiki job list' show what there is; --on HOST asks another host")),
        }
    }
}

impl Workshop for AgentWorkshop {
    fn work(&self, order: &Order) -> Result<Arc<dyn Work>> {
        let host = self.host()?;
        match &order.task {
            Task::Clone(clone) => Ok(Arc::new(CloneWork::new(self.clone_host(&host), clone.clone())?)),
            Task::CloneGroup(group) => Ok(Arc::new(self.group_work(&host, group)?)),
            Task::Backup { instance, kind } => {
                let supervisor = host.instance(instance)?;
                Ok(Arc::new(BackupWork::new(supervisor.backup_source()?, *kind, host.config.limits.backup_lanes)))
            }
        }
    }
}
