//! What the agent holds on servers: replication slots, which keep log back for as long as they are there. Each is
//! written down before it is made, so that it is given back when its instance leaves the configuration, also while the
//! agent is not running.
//!
//! Invariant: a slot is forgotten here only after the server does not have it any more, or there is no such server.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::agent::config::{InstanceConfig, ShipMode};
use crate::agent::host::Host;
use crate::base::durable;
use crate::error::{Context, Error, Kind, Result};
use crate::model::engine_kind::EngineKind;

/// A server that is down when its instance is taken out of the configuration is asked again this often.
const ASK_AGAIN: Duration = Duration::from_secs(15);
const VERSION: u32 = 1;

/// What is needed to reach the server again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldSlot {
    version: u32,
    pub name: String,
    pub data_dir: PathBuf,
    pub socket_dir: PathBuf,
    pub port: u16,
    pub user: String,
    pub run_as: String,
}

impl HeldSlot {
    fn of(instance: &InstanceConfig) -> HeldSlot {
        HeldSlot {
            version: VERSION,
            name: instance.name.clone(),
            data_dir: instance.data_dir.clone(),
            socket_dir: instance.socket_dir.clone(),
            port: instance.port,
            user: instance.user.clone(),
            run_as: instance.run_as.clone(),
        }
    }

    /// Whether this is the slot of that instance.
    fn like(&self, other: &InstanceConfig) -> bool {
        other.ship == ShipMode::Slot && other.name == self.name && other.data_dir == self.data_dir
    }

    fn file(&self, state_dir: &Path) -> PathBuf {
        // The same name may have meant another server before.
        let digest = blake3::hash(self.data_dir.as_os_str().as_encoded_bytes()).to_hex();
        directory(state_dir).join(format!("{}-{}.json", self.name, &digest.as_str()[..8]))
    }
}

fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("slots")
}

/// Writes down that this instance has a slot, or will have one. Blocking.
pub fn remember(state_dir: &Path, instance: &InstanceConfig) -> Result<()> {
    // Only PostgreSQL has slots, whatever the configuration says.
    if instance.ship != ShipMode::Slot || instance.engine != EngineKind::Postgres {
        return Ok(());
    }
    durable::create_dir_all_durable(&directory(state_dir), 0o700)?;
    let held = HeldSlot::of(instance);
    let bytes = serde_json::to_vec_pretty(&held)
        .map_err(|error| Error::new(Kind::Internal, format!("cannot write down a slot: {error}")))?;
    durable::write_file_durable(&held.file(state_dir), &bytes, 0o600)
}

/// All slots that were written down and belong to none of these instances. Blocking.
pub fn left_over(state_dir: &Path, instances: &[InstanceConfig]) -> Result<Vec<HeldSlot>> {
    let dir = directory(state_dir);
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(format!("cannot list '{}'", dir.display()), error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.context(|| format!("cannot list '{}'", dir.display()))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let what = || format!("cannot read '{}'", path.display());
        let bytes = std::fs::read(&path).context(what)?;
        let held: HeldSlot = serde_json::from_slice(&bytes)
            .map_err(|error| Error::new(Kind::Damaged, format!("{}: {error}", what())))?;
        if !instances.iter().any(|instance| held.like(instance)) {
            found.push(held);
        }
    }
    Ok(found)
}

fn forget(state_dir: &Path, held: &HeldSlot) -> Result<()> {
    durable::remove_file_durable(&held.file(state_dir))
}

/// Drops a slot on its server, as often as it takes: the server may be down now.
pub async fn give_back(host: Arc<Host>, held: HeldSlot) {
    let engine = host.engine_to_detach(&held);
    let mut has_warned = false;
    loop {
        if host.instances().iter().any(|instance| held.like(&instance.config)) {
            // It came back meanwhile, and needs its slot.
            return;
        }
        let outcome = match held.data_dir.exists() {
            true => engine.detach().await,
            // The server is gone with all that it held.
            false => Ok(()),
        };
        let outcome = outcome.and_then(|()| forget(&host.config.host.state_dir, &held));
        match outcome {
            Ok(()) => {
                tracing::info!("instance '{}' left the configuration: its slot is given back", held.name);
                return;
            }
            Err(error) if !has_warned => {
                tracing::warn!("cannot give back the slot of '{}', which left the configuration: {error}", held.name);
                has_warned = true;
            }
            Err(_) => {}
        }
        tokio::select! {
            () = host.stop.cancelled() => return,
            () = host.clock.sleep(ASK_AGAIN) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::config::RedisLog;

    fn instance(name: &str, data_dir: &str, ship: ShipMode) -> InstanceConfig {
        InstanceConfig {
            name: name.into(),
            engine: EngineKind::Postgres,
            data_dir: data_dir.into(),
            bin_dir: None,
            socket_dir: "/run/postgresql".into(),
            port: 5432,
            user: "postgres".into(),
            database: "postgres".into(),
            socket: None,
            password_file: None,
            run_as: "postgres".into(),
            ship,
            log: RedisLog::Aof,
            ship_every: Duration::from_secs(5),
            slot_limit_bytes: 1 << 30,
            backup_dir: None,
            purge_shipped: false,
            backup: None,
        }
    }

    #[test]
    fn a_slot_is_left_over_once_no_instance_of_its_name_and_directory_has_one() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(left_over(state.path(), &[]).unwrap(), []);
        let (slot, command) = (ShipMode::Slot, ShipMode::ArchiveCommand);
        let orders = instance("orders", "/srv/orders", slot);
        remember(state.path(), &orders).unwrap();
        remember(state.path(), &instance("stock", "/srv/stock", command)).unwrap();
        let cache = InstanceConfig { engine: EngineKind::Redis, ..instance("cache", "/srv/cache", slot) };
        remember(state.path(), &cache).unwrap();
        assert_eq!(left_over(state.path(), std::slice::from_ref(&orders)).unwrap(), []);
        let others = [
            vec![],
            vec![instance("orders", "/srv/orders", command)],
            vec![instance("orders", "/srv/moved", slot)],
            vec![instance("renamed", "/srv/orders", slot)],
        ];
        for other in others {
            let left = left_over(state.path(), &other).unwrap();
            assert_eq!(left, [HeldSlot::of(&orders)], "{other:?}");
        }
        // The same name on another server is another slot; both are known.
        remember(state.path(), &instance("orders", "/srv/moved", slot)).unwrap();
        assert_eq!(left_over(state.path(), &[]).unwrap().len(), 2);
        forget(state.path(), &HeldSlot::of(&orders)).unwrap();
        assert_eq!(left_over(state.path(), &[]).unwrap().len(), 1);
    }
}
