//! The instances of this host: those of the configuration, and the clones that were accepted here.
//!
//! An accepted clone is written to `<state_dir>/instances.d/<name>.json`, so that it is an instance like any other after
//! a restart of the agent, without anybody editing the configuration.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::agent::config::{InstanceConfig, RedisLog, ShipMode};
use crate::base::durable;
use crate::engine::mysql;
use crate::engine::redis::settings as redis;
use crate::error::{Context, Error, Kind, Result};
use crate::job::ports::NewInstance;
use crate::model::engine_kind::EngineKind;

/// What is kept of an accepted clone. Not `InstanceConfig` itself: files at rest have types of their own.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RegisteredInstance {
    version: u32,
    name: String,
    engine: String,
    data_dir: PathBuf,
    bin_dir: Option<PathBuf>,
    socket_dir: PathBuf,
    port: u16,
    user: String,
    run_as: String,
    /// The boot of this machine in which the agent started the server last (`/proc/sys/kernel/random/boot_id`).
    #[serde(default)]
    started_in_boot: Option<String>,
}

/// An accepted clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registered {
    pub config: InstanceConfig,
    /// The boot of this machine in which the agent started the server last.
    pub started_in_boot: Option<String>,
}

const VERSION: u32 = 1;
/// How often the open segment of a clone travels; the default of the configuration.
const SHIP_EVERY: Duration = Duration::from_secs(5);
/// The default of the configuration; clones use `archive_command`, so that no slot of theirs exists.
const SLOT_LIMIT_BYTES: u64 = 16 << 30;

fn registry_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("instances.d")
}

fn registry_file(state_dir: &Path, name: &str) -> PathBuf {
    registry_dir(state_dir).join(format!("{name}.json"))
}

/// All accepted clones. A file that cannot be read is an error: an instance that silently is not archived is worse.
pub fn load(state_dir: &Path) -> Result<Vec<Registered>> {
    let dir = registry_dir(state_dir);
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(format!("cannot list '{}'", dir.display()), error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.context(|| format!("cannot list '{}'", dir.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            found.push(read(&path)?);
        }
    }
    found.sort_by(|one, other| one.config.name.cmp(&other.config.name));
    Ok(found)
}

fn read(path: &Path) -> Result<Registered> {
    let what = || format!("cannot read the registered instance '{}'", path.display());
    let bytes = std::fs::read(path).context(what)?;
    let kept: RegisteredInstance =
        serde_json::from_slice(&bytes).map_err(|error| Error::new(Kind::Damaged, format!("{}: {error}", what())))?;
    if kept.version != VERSION {
        return Err(Error::new(Kind::Unsupported, format!("{}: its version is {}", what(), kept.version))
            .hint("it was written by a newer keiki: install that version again"));
    }
    let engine = EngineKind::parse(&kept.engine)?;
    let started_in_boot = kept.started_in_boot.clone();
    Ok(Registered { config: instance_of(kept, engine), started_in_boot })
}

/// An accepted clone in the words of the configuration.
pub fn config_of(clone: &NewInstance) -> InstanceConfig {
    let user = match clone.engine {
        EngineKind::Redis | EngineKind::Valkey => redis::AGENT_USER.to_string(),
        EngineKind::MariaDb | EngineKind::MySql => mysql::clone::ACCOUNT.to_string(),
        EngineKind::Postgres | EngineKind::Fake => clone.run_as.clone(),
    };
    let kept = RegisteredInstance {
        version: VERSION,
        name: clone.name.clone(),
        engine: clone.engine.name().to_string(),
        data_dir: clone.data_dir.clone(),
        bin_dir: clone.bin_dir.clone(),
        socket_dir: clone.run_dir.clone(),
        port: clone.port,
        user,
        run_as: clone.run_as.clone(),
        started_in_boot: None,
    };
    instance_of(kept, clone.engine)
}

fn instance_of(kept: RegisteredInstance, engine: EngineKind) -> InstanceConfig {
    let in_run_dir = |name: &str| Some(kept.socket_dir.join(name));
    let (socket, password_file) = match engine {
        EngineKind::Redis | EngineKind::Valkey => {
            (in_run_dir(redis::SOCKET_FILE), in_run_dir(redis::AGENT_PASSWORD_FILE))
        }
        EngineKind::MariaDb | EngineKind::MySql => {
            (in_run_dir(mysql::clone::SOCKET_FILE), in_run_dir(mysql::clone::PASSWORD_FILE))
        }
        EngineKind::Postgres | EngineKind::Fake => (None, None),
    };
    InstanceConfig {
        engine,
        name: kept.name,
        data_dir: kept.data_dir,
        bin_dir: kept.bin_dir,
        socket,
        password_file,
        socket_dir: kept.socket_dir,
        port: kept.port,
        user: kept.user,
        database: "postgres".to_string(),
        run_as: kept.run_as,
        ship: ShipMode::ArchiveCommand,
        // Clones have an append-only file, whatever their source has.
        log: RedisLog::Aof,
        ship_every: SHIP_EVERY,
        slot_limit_bytes: SLOT_LIMIT_BYTES,
        backup_dir: None,
        purge_shipped: false,
        backup: None,
    }
}

/// Writes an accepted clone durably, with the boot in which its server was started. Writing it again is harmless.
pub fn add(state_dir: &Path, instance: &InstanceConfig, started_in_boot: &str) -> Result<()> {
    durable::create_dir_all_durable(&registry_dir(state_dir), 0o700)?;
    let kept = RegisteredInstance {
        version: VERSION,
        name: instance.name.clone(),
        engine: instance.engine.name().to_string(),
        data_dir: instance.data_dir.clone(),
        bin_dir: instance.bin_dir.clone(),
        socket_dir: instance.socket_dir.clone(),
        port: instance.port,
        user: instance.user.clone(),
        run_as: instance.run_as.clone(),
        started_in_boot: Some(started_in_boot.to_string()),
    };
    let bytes = serde_json::to_vec_pretty(&kept)
        .map_err(|error| Error::new(Kind::Internal, format!("cannot write down instance '{}': {error}", kept.name)))?;
    durable::write_file_durable(&registry_file(state_dir, &instance.name), &bytes, 0o600)
}

/// Forgets a clone; one that is not there is forgotten already.
pub fn remove(state_dir: &Path, name: &str) -> Result<()> {
    match durable::remove_file_durable(&registry_file(state_dir, name)) {
        Err(error) if error.kind() == Kind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accepted_clone_is_an_instance_after_a_restart_until_it_is_removed() {
        let state = tempfile::tempdir().unwrap();
        let instance = InstanceConfig {
            name: "copy".into(),
            engine: EngineKind::Postgres,
            data_dir: "/srv/clones/copy".into(),
            bin_dir: None,
            socket_dir: "/srv/clones/copy.run".into(),
            port: 5500,
            user: "postgres".into(),
            database: "postgres".into(),
            socket: None,
            password_file: None,
            run_as: "postgres".into(),
            ship: ShipMode::ArchiveCommand,
            // Clones have an append-only file, whatever their source has.
            log: RedisLog::Aof,
            ship_every: SHIP_EVERY,
            slot_limit_bytes: SLOT_LIMIT_BYTES,
            backup_dir: None,
            purge_shipped: false,
            backup: None,
        };
        add(state.path(), &instance, "boot").unwrap();
        let registered = Registered { config: instance, started_in_boot: Some("boot".into()) };
        assert_eq!(load(state.path()).unwrap(), [registered]);
        remove(state.path(), "copy").unwrap();
        remove(state.path(), "copy").unwrap();
        assert!(load(state.path()).unwrap().is_empty());
    }

    #[test]
    fn a_damaged_registration_is_an_error_and_not_an_instance_less() {
        let state = tempfile::tempdir().unwrap();
        std::fs::create_dir(state.path().join("instances.d")).unwrap();
        std::fs::write(state.path().join("instances.d/copy.json"), "{").unwrap();
        assert_eq!(load(state.path()).unwrap_err().kind(), Kind::Damaged);
    }
}
