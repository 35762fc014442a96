//! Starts the servers of accepted clones after a restart of the machine.
//!
//! The server of a clone is the agent's to start, as a service manager's unit starts those that a person installed. Once
//! per boot: a server that somebody stopped stays stopped, also when the agent is restarted.

use std::path::Path;
use std::sync::Arc;

use crate::agent::config::InstanceConfig;
use crate::agent::registry::{self, Registered};
use crate::engine::{AcceptedClone, CloneEngine};
use crate::error::{Error, Kind, Result};
use crate::model::engine_kind::EngineKind;

/// The engine that can start clones of a kind on this host, if there is one.
pub type EngineOf = dyn Fn(EngineKind) -> Option<Arc<dyn CloneEngine>> + Send + Sync;

/// Starts every accepted clone that was not started in this boot yet. One that cannot be started is reported and tried
/// again when the agent starts the next time.
pub async fn launch_after_boot(engine_of: &EngineOf, state_dir: &Path, boot_id: &str) -> Result<()> {
    for clone in registry::load(state_dir)?.into_iter().filter(|clone| is_due(clone, boot_id)) {
        let name = &clone.config.name;
        match launch(engine_of, &clone.config).await {
            Ok(()) => {
                tracing::info!("started the server of clone '{name}', because this machine was restarted");
                registry::add(state_dir, &clone.config, boot_id)?;
            }
            Err(error) => tracing::error!("cannot start the server of clone '{name}': {error}"),
        }
    }
    Ok(())
}

async fn launch(engine_of: &EngineOf, config: &InstanceConfig) -> Result<()> {
    let engine = engine_of(config.engine).ok_or_else(|| {
        Error::new(Kind::Unsupported, format!("this keiki makes no clones of {}", config.engine.name()))
    })?;
    engine.launch(&at_rest(config)).await
}

fn is_due(clone: &Registered, boot_id: &str) -> bool {
    clone.started_in_boot.as_deref() != Some(boot_id)
}

fn at_rest(config: &InstanceConfig) -> AcceptedClone {
    AcceptedClone {
        data_dir: config.data_dir.clone(),
        run_dir: config.socket_dir.clone(),
        bin_dir: config.bin_dir.clone(),
        port: config.port,
        run_as: config.run_as.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::config::{RedisLog, ShipMode};
    use crate::engine::fake::FakeCloneEngine;
    use std::time::Duration;

    fn registered_clone(state_dir: &Path, data_dir: &Path) -> InstanceConfig {
        let config = InstanceConfig {
            name: "copy".into(),
            engine: EngineKind::Fake,
            data_dir: data_dir.to_path_buf(),
            bin_dir: None,
            socket_dir: data_dir.with_extension("run"),
            port: 5500,
            user: "nobody".into(),
            database: "postgres".into(),
            socket: None,
            password_file: None,
            run_as: "nobody".into(),
            ship: ShipMode::ArchiveCommand,
            log: RedisLog::Aof,
            ship_every: Duration::from_secs(5),
            slot_limit_bytes: 1 << 30,
            backup_dir: None,
            purge_shipped: false,
            backup: None,
        };
        registry::add(state_dir, &config, "boot 1").unwrap();
        config
    }

    #[tokio::test]
    async fn a_clone_is_started_once_in_each_boot_and_stays_stopped_within_one() {
        let lab = tempfile::tempdir().unwrap();
        let data_dir = lab.path().join("data");
        std::fs::create_dir(&data_dir).unwrap();
        registered_clone(lab.path(), &data_dir);
        let engine_of = |_: EngineKind| -> Option<Arc<dyn CloneEngine>> { Some(Arc::new(FakeCloneEngine)) };
        let engine = FakeCloneEngine;
        launch_after_boot(&engine_of, lab.path(), "boot 1").await.unwrap();
        assert!(!engine.is_running(&data_dir), "somebody had stopped it in this boot");
        launch_after_boot(&engine_of, lab.path(), "boot 2").await.unwrap();
        assert!(engine.is_running(&data_dir));
        std::fs::remove_file(data_dir.join("running")).unwrap();
        launch_after_boot(&engine_of, lab.path(), "boot 2").await.unwrap();
        assert!(!engine.is_running(&data_dir), "it was started a second time in one boot");
    }

    #[tokio::test]
    async fn a_clone_that_cannot_be_started_is_tried_again_by_the_next_agent() {
        let lab = tempfile::tempdir().unwrap();
        registered_clone(lab.path(), &lab.path().join("gone"));
        let engine_of = |_: EngineKind| -> Option<Arc<dyn CloneEngine>> { Some(Arc::new(FakeCloneEngine)) };
        launch_after_boot(&engine_of, lab.path(), "boot 2").await.unwrap();
        assert_eq!(registry::load(lab.path()).unwrap()[0].started_in_boot.as_deref(), Some("boot 1"));
    }
}
