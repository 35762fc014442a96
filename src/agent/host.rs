//! This host as its agent knows it: the configuration, the repository, the peers, the jobs and the instances.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, RwLock};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::agent::config::{Config, InstanceConfig, RedisLog, ShipMode};
use crate::agent::peers::Peers;
use crate::agent::repository::RepositoryHandle;
use crate::agent::supervisor::{Supervisor, Surroundings};
use crate::agent::{registry, slots};
use crate::base::child;
use crate::base::clock::Clock;
use crate::engine::Engine;
use crate::engine::mysql::product::Product;
use crate::engine::mysql::{self, MySqlEngine, MySqlSource};
use crate::engine::postgres::{self, PostgresEngine, PostgresSource};
use crate::engine::redis::session::{Address, Endpoint};
use crate::engine::redis::{LogKind, RedisEngine, RedisSource};
use crate::error::{Error, Kind, Result};
use crate::job::JobRunner;
use crate::job::archive::remove_binding;
use crate::job::clone::ports_of_jobs;
use crate::job::ports::{InstanceRegistry, NewInstance, TakenPlace};
use crate::model::backup::BackupKind;
use crate::model::engine_kind::EngineKind;
use crate::model::id::{JobId, RunId};
use crate::model::incarnation::LeaseHolder;
use crate::model::job::{Order, Task};

/// See the module. One per agent, shared by all its tasks.
pub struct Host {
    pub config: Config,
    pub clock: Arc<dyn Clock>,
    pub began_at: Timestamp,
    pub peers: Arc<Peers>,
    pub repository: Arc<RepositoryHandle>,
    pub stop: CancellationToken,
    pub holder: LeaseHolder,
    runner: OnceLock<Arc<JobRunner>>,
    supervisors: RwLock<BTreeMap<String, Arc<Supervisor>>>,
}

impl Host {
    /// Puts the parts together; nothing runs before [`Host::start_instances`].
    pub fn new(config: Config, clock: Arc<dyn Clock>, peers: Arc<Peers>) -> Result<Arc<Host>> {
        let repository = Arc::new(RepositoryHandle::new(&config, peers.clone(), clock.clone()));
        let process_id = std::process::id();
        let holder = LeaseHolder {
            host: config.host.name.clone(),
            run: RunId::fresh(),
            machine_id: child::machine_id()?,
            boot_id: child::boot_id()?,
            process_id,
            process_start_ticks: child::process_start_ticks(process_id).unwrap_or(0),
        };
        Ok(Arc::new(Host {
            began_at: clock.now(),
            config,
            clock,
            peers,
            repository,
            stop: CancellationToken::new(),
            holder,
            runner: OnceLock::new(),
            supervisors: RwLock::new(BTreeMap::new()),
        }))
    }

    /// Gives the host its job runner, which needs the host to make work.
    pub fn set_runner(&self, runner: Arc<JobRunner>) {
        // Called once by the agent's start; a second runner would be ignored, and there is none.
        let _ = self.runner.set(runner);
    }

    /// The job runner; none while the agent starts.
    pub fn runner(&self) -> Result<&Arc<JobRunner>> {
        self.runner
            .get()
            .ok_or_else(|| Error::new(Kind::Unreachable, "the agent is still starting").hint("try again in a moment"))
    }

    /// Starts a supervisor for every instance of the configuration and every accepted clone.
    /// Slots of instances that left the configuration while the agent did not run are given back.
    pub fn start_instances(self: &Arc<Self>) -> Result<()> {
        for instance in &self.config.instances {
            slots::remember(&self.config.host.state_dir, instance)?;
            self.start_instance(instance.clone());
        }
        for clone in registry::load(&self.config.host.state_dir)? {
            self.start_instance(clone.config);
        }
        self.give_back_slots(&self.config.instances)
    }

    /// Takes the instances of a configuration that was read again: those that left it are stopped and what the agent
    /// held on their servers is given back, those that differ begin again, new ones begin. Accepted clones stay.
    pub async fn reload_instances(self: &Arc<Self>, instances: &[InstanceConfig]) -> Result<()> {
        let clones = registry::load(&self.config.host.state_dir)?;
        let is_clone = |name: &str| clones.iter().any(|clone| clone.config.name == name);
        for running in self.instances() {
            let name = &running.config.name;
            if is_clone(name) || instances.contains(&running.config) {
                continue;
            }
            running.stop().await;
            self.write_supervisors().remove(name);
            tracing::info!("instance '{name}' left the configuration or was changed in it: it is stopped");
        }
        for instance in instances {
            if self.instance(&instance.name).is_ok() {
                continue;
            }
            slots::remember(&self.config.host.state_dir, instance)?;
            self.start_instance(instance.clone());
            tracing::info!("instance '{}' begins", instance.name);
        }
        self.give_back_slots(instances)
    }

    fn give_back_slots(self: &Arc<Self>, instances: &[InstanceConfig]) -> Result<()> {
        for held in slots::left_over(&self.config.host.state_dir, instances)? {
            // It ends by itself, or when the agent stops.
            tokio::spawn(slots::give_back(self.clone(), held));
        }
        Ok(())
    }

    /// The engine of an instance that is not one of this host any more, only to give back what it holds.
    pub fn engine_to_detach(&self, held: &slots::HeldSlot) -> Arc<dyn Engine> {
        Arc::new(PostgresEngine::new(PostgresSource {
            name: held.name.clone(),
            data_dir: held.data_dir.clone(),
            socket_dir: held.socket_dir.clone(),
            port: held.port,
            user: held.user.clone(),
            run_as: held.run_as.clone(),
            archive_command: self.archive_command(),
            ship: postgres::ShipMode::ArchiveCommand,
        }))
    }

    fn start_instance(&self, config: InstanceConfig) {
        let engine = engine_of(&config, self.archive_command());
        let around = Surroundings {
            host_name: self.config.host.name.clone(),
            state_dir: self.config.host.state_dir.clone(),
            repository: self.repository.clone(),
            clock: self.clock.clone(),
            holder: self.holder.clone(),
            ship_lanes: self.config.limits.ship_lanes,
        };
        let name = config.name.clone();
        let supervisor = Supervisor::start(config, engine, around, self.stop.child_token());
        self.write_supervisors().insert(name, supervisor);
    }

    /// Stops archiving everything, and waits for it.
    pub async fn stop_instances(&self) {
        for instance in self.instances() {
            instance.stop().await;
        }
    }

    /// All instances in the order of their names.
    pub fn instances(&self) -> Vec<Arc<Supervisor>> {
        self.read_supervisors().values().cloned().collect()
    }

    /// The instance with this name, or an error that lists what there is.
    pub fn instance(&self, name: &str) -> Result<Arc<Supervisor>> {
        let supervisors = self.read_supervisors();
        supervisors.get(name).cloned().ok_or_else(|| {
            let known: Vec<String> = supervisors.keys().map(|name| format!("'{name}'")).collect();
            let known = if known.is_empty() { "none".to_string() } else { known.join(", ") };
            Error::new(Kind::NotFound, format!("host '{}' has no instance '{name}'", self.config.host.name))
                .hint(format!("its instances are: {known}; 'keiki instances' shows those of all hosts"))
        })
    }

    // The locks are held for a map operation only, which cannot panic, so a poisoned one is still good.
    fn read_supervisors(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Arc<Supervisor>>> {
        self.supervisors.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn write_supervisors(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Arc<Supervisor>>> {
        self.supervisors.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The command that PostgreSQL calls to ask about a segment. The control socket stands in it only where it is not
    /// the usual one.
    pub fn archive_command(&self) -> String {
        let socket = &self.config.host.control_socket;
        let program = std::env::current_exe().map_or_else(|_| "keiki".to_string(), |path| path.display().to_string());
        // Linux says this of a program that was replaced while it runs, as by an upgrade (proc(5), "/proc/pid/exe").
        let program = shell_word(program.trim_end_matches(" (deleted)"));
        if socket.as_os_str() == crate::agent::config::CONTROL_SOCKET_DEFAULT {
            format!("{program} wal-push %p")
        } else {
            format!("{program} --socket {} wal-push %p", shell_word(&socket.display().to_string()))
        }
    }
}

/// A path as a word of an `archive_command`: a shell reads it, after PostgreSQL has replaced what begins with `%`
/// (PostgreSQL manual, "archive_command").
fn shell_word(path: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'_' | b'-' | b'+');
    if path.bytes().all(is_plain) {
        return path.to_string();
    }
    format!("'{}'", path.replace('%', "%%").replace('\'', "'\\''"))
}

fn engine_of(config: &InstanceConfig, archive_command: String) -> Arc<dyn Engine> {
    match config.engine {
        EngineKind::Redis | EngineKind::Valkey => return Arc::new(RedisEngine::new(redis_source(config))),
        EngineKind::MariaDb => return Arc::new(MySqlEngine::new(mysql_source(Product::MariaDb, config))),
        EngineKind::MySql => return Arc::new(MySqlEngine::new(mysql_source(Product::MySql, config))),
        EngineKind::Postgres | EngineKind::Fake => {}
    }
    Arc::new(PostgresEngine::new(PostgresSource {
        name: config.name.clone(),
        data_dir: config.data_dir.clone(),
        socket_dir: config.socket_dir.clone(),
        port: config.port,
        user: config.user.clone(),
        run_as: config.run_as.clone(),
        archive_command,
        ship: match config.ship {
            ShipMode::ArchiveCommand => postgres::ShipMode::ArchiveCommand,
            ShipMode::Slot => postgres::ShipMode::Slot { limit_bytes: config.slot_limit_bytes },
        },
    }))
}

fn mysql_source(product: Product, config: &InstanceConfig) -> MySqlSource {
    MySqlSource {
        product,
        name: config.name.clone(),
        data_dir: config.data_dir.clone(),
        // The configuration and the registry always name one.
        socket: config.socket.clone().unwrap_or_else(|| config.socket_dir.join(mysql::clone::SOCKET_FILE)),
        user: config.user.clone(),
        password_file: config.password_file.clone(),
        run_as: config.run_as.clone(),
        bin_dir: config.bin_dir.clone(),
        backup_dir: config.backup_dir.clone(),
        purge_shipped: config.purge_shipped,
    }
}

fn redis_source(config: &InstanceConfig) -> RedisSource {
    let endpoint = match &config.socket {
        Some(socket) => Endpoint {
            address: Address::Socket(socket.clone()),
            user: None,
            password_file: None,
            run_as: config.run_as.clone(),
        },
        None => Endpoint::loopback(config.port, &config.run_as),
    };
    RedisSource {
        name: config.name.clone(),
        engine: config.engine,
        data_dir: config.data_dir.clone(),
        endpoint: Endpoint {
            user: (!config.user.is_empty()).then(|| config.user.clone()),
            password_file: config.password_file.clone(),
            ..endpoint
        },
        log: match config.log {
            RedisLog::Aof => LogKind::AppendOnlyFile,
            RedisLog::Replication => LogKind::ReplicationStream,
        },
        hold_limit_bytes: config.slot_limit_bytes,
    }
}

#[async_trait]
impl InstanceRegistry for Host {
    fn places(&self) -> Vec<TakenPlace> {
        self.instances()
            .iter()
            .map(|instance| TakenPlace {
                name: instance.config.name.clone(),
                data_dir: instance.config.data_dir.clone(),
                port: instance.config.port,
            })
            .collect()
    }

    fn ports_of_jobs(&self) -> Vec<u16> {
        self.runner().map(|runner| ports_of_jobs(runner)).unwrap_or_default()
    }

    async fn register(&self, instance: NewInstance) -> Result<()> {
        let config = registry::config_of(&instance);
        if let Ok(present) = self.instance(&config.name) {
            if present.config.data_dir == config.data_dir {
                return Ok(());
            }
            return Err(Error::new(
                Kind::Conflict,
                format!("host '{}' has an instance '{}' already", self.config.host.name, config.name),
            )
            .hint("give the clone another name"));
        }
        registry::add(&self.config.host.state_dir, &config, &self.holder.boot_id)?;
        self.start_instance(config);
        Ok(())
    }

    async fn unregister(&self, name: &str) -> Result<()> {
        registry::remove(&self.config.host.state_dir, name)?;
        let removed = self.write_supervisors().remove(name);
        if let Some(supervisor) = removed {
            supervisor.stop().await;
            remove_binding(&self.config.host.state_dir, name)?;
        }
        Ok(())
    }

    async fn order_first_backup(&self, name: &str) -> Result<()> {
        // An order that comes before the instance is archived would fail.
        self.instance(name)?.wait_for_first_look().await;
        let task = Task::Backup { instance: name.to_string(), kind: BackupKind::Automatic };
        let order = Order { id: JobId::fresh(), by: "accept".to_string(), task };
        match self.runner()?.submit(order).await {
            // Another backup of the clone is running: that one is the first.
            Err(error) if error.kind() == Kind::Conflict => Ok(()),
            other => other.map(|_| ()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_an_archive_command_reads_back_as_itself() {
        assert_eq!(shell_word("/usr/bin/keiki"), "/usr/bin/keiki");
        assert_eq!(shell_word("/opt/my keiki"), "'/opt/my keiki'");
        assert_eq!(shell_word("/o'p%t"), r"'/o'\''p%%t'");
    }
}
