//! Binds an instance's data directory to its incarnation.
//!
//! Invariants: the state file `<state_dir>/instances/<name>.json` is written before the incarnation is recorded in the
//! repository, and holds all of the record, so that repeating after a crash records the same again and not a second
//! one. A directory that is not the bound one is `Fenced`: nobody writes into an archive that belongs to another life.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::base::bulk::run_blocking;
use crate::base::durable::{create_dir_all_durable, remove_file_durable, write_file_durable};
use crate::engine::ServerIdentity;
use crate::error::{Context, Error, Kind, Result};
use crate::model::engine_kind::EngineKind;
use crate::model::id::{IncarnationId, check_name};
use crate::model::incarnation::Incarnation;
use crate::model::position::Position;
use crate::repo::incarnations::Incarnations;
use crate::repo::repository::Repository;

const FORMAT: u32 = 1;

/// A data directory and the incarnation that it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    pub incarnation: Incarnation,
    pub data_dir: PathBuf,
    pub data_dir_inode: (u64, u64),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BindingDocument {
    format: u32,
    incarnation: String,
    engine: String,
    engine_version: String,
    instance: String,
    host: String,
    system_id: String,
    began_at: String,
    parent: Option<(String, String)>,
    data_dir: PathBuf,
    device: u64,
    inode: u64,
}

/// Where the binding of an instance is.
pub fn binding_path(state_dir: &Path, instance: &str) -> PathBuf {
    state_dir.join("instances").join(format!("{instance}.json"))
}

/// The binding of an instance, or nothing if it never had one. Blocking.
pub fn read_binding(state_dir: &Path, instance: &str) -> Result<Option<Binding>> {
    check_name("an instance", instance)?;
    let path = binding_path(state_dir, instance);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(format!("cannot read '{}'", path.display()), error)),
    };
    parse(&bytes).map(Some).context(|| format!("cannot use '{}'", path.display()))
}

/// Binds an instance, replacing what it was bound to: for a new incarnation only. Blocking.
pub fn write_binding(state_dir: &Path, instance: &str, binding: &Binding) -> Result<()> {
    check_name("an instance", instance)?;
    let path = binding_path(state_dir, instance);
    create_dir_all_durable(&state_dir.join("instances"), 0o700)?;
    write_file_durable(&path, render(binding)?.as_bytes(), 0o600)
}

/// Forgets what an instance was bound to, because the instance is gone for good. Blocking.
pub fn remove_binding(state_dir: &Path, instance: &str) -> Result<()> {
    check_name("an instance", instance)?;
    remove_file_durable(&binding_path(state_dir, instance))
}

fn render(binding: &Binding) -> Result<String> {
    let incarnation = &binding.incarnation;
    let document = BindingDocument {
        format: FORMAT,
        incarnation: incarnation.id.to_string(),
        engine: incarnation.engine.name().to_string(),
        engine_version: incarnation.engine_version.clone(),
        instance: incarnation.instance.clone(),
        host: incarnation.host.clone(),
        system_id: incarnation.system_id.clone(),
        began_at: incarnation.began_at.to_string(),
        parent: incarnation.parent.map(|(id, position)| (id.to_string(), position.to_string())),
        data_dir: binding.data_dir.clone(),
        device: binding.data_dir_inode.0,
        inode: binding.data_dir_inode.1,
    };
    let text = serde_json::to_string_pretty(&document);
    Ok(text.map_err(|error| Error::new(Kind::Internal, format!("cannot write a binding: {error}")))? + "\n")
}

fn parse(bytes: &[u8]) -> Result<Binding> {
    let document: BindingDocument =
        serde_json::from_slice(bytes).map_err(|error| Error::new(Kind::Damaged, error.to_string()))?;
    if document.format != FORMAT {
        return Err(Error::new(Kind::Unsupported, format!("it has format {}, known is {FORMAT}", document.format)));
    }
    let parent = match &document.parent {
        Some((id, position)) => Some((IncarnationId::parse(id)?, Position::parse(position)?)),
        None => None,
    };
    let began_at = document.began_at.parse();
    let began_at = began_at.map_err(|_| Error::new(Kind::Damaged, format!("'{}' is no time", document.began_at)))?;
    Ok(Binding {
        incarnation: Incarnation {
            id: IncarnationId::parse(&document.incarnation)?,
            engine: EngineKind::parse(&document.engine)?,
            engine_version: document.engine_version,
            instance: document.instance,
            host: document.host,
            system_id: document.system_id,
            began_at,
            parent,
        },
        data_dir: document.data_dir,
        data_dir_inode: (document.device, document.inode),
    })
}

/// Whether a server is the one that a binding is about. Pure.
///
/// The inode tells a copy from the original. The device's number changes with the order in which disks are found at
/// the start of a machine, and the path with a mount point, but not both for one directory.
pub fn check_binding(binding: &Binding, identity: &ServerIdentity, state_file: &Path) -> Result<()> {
    let fenced = |what: String| {
        let hint = format!(
            "a different data directory: was it restored, copied or initialised again? If this is to be a new life of \
             the instance, remove '{}' and a new incarnation begins; the old archive stays as it is",
            state_file.display()
        );
        Err(Error::new(Kind::Fenced, format!("cannot archive '{}': {what}", binding.incarnation.instance)).hint(hint))
    };
    let bound = &binding.incarnation;
    if identity.engine != bound.engine {
        return fenced(format!("it was '{}' and is '{}' now", bound.engine.name(), identity.engine.name()));
    }
    if identity.system_id != bound.system_id {
        return fenced(format!("its system identifier was {} and is {} now", bound.system_id, identity.system_id));
    }
    let (device, inode) = identity.data_dir_inode;
    let is_same_device = device == binding.data_dir_inode.0;
    let is_same_path = identity.data_dir == binding.data_dir;
    if inode != binding.data_dir_inode.1 || !(is_same_device || is_same_path) {
        return fenced(format!(
            "data directory '{}' (inode {inode}) is not the one that incarnation '{}' belongs to: '{}' (inode {})",
            identity.data_dir.display(),
            bound.id,
            binding.data_dir.display(),
            binding.data_dir_inode.1
        ));
    }
    Ok(())
}

/// The incarnation of a running server: the one that its directory is bound to, or a new one if the instance was never
/// archived on this host. Recorded in the repository when this returns.
pub async fn claim_incarnation(
    repo: &Arc<Repository>,
    identity: &ServerIdentity,
    state_dir: &Path,
    host: &str,
    instance: &str,
    now: jiff::Timestamp,
) -> Result<Incarnation> {
    let (identity, state_dir) = (identity.clone(), state_dir.to_path_buf());
    let (host, instance) = (host.to_string(), instance.to_string());
    let binding = run_blocking("claim incarnation", move || bind(&identity, &state_dir, &host, &instance, now)).await?;
    Incarnations::new(repo.clone()).create(&binding.incarnation).await.context(|| {
        let Incarnation { id, instance, .. } = &binding.incarnation;
        format!("cannot record incarnation '{id}' of '{instance}'")
    })?;
    Ok(binding.incarnation)
}

fn bind(
    identity: &ServerIdentity,
    state_dir: &Path,
    host: &str,
    instance: &str,
    now: jiff::Timestamp,
) -> Result<Binding> {
    if let Some(mut binding) = read_binding(state_dir, instance)? {
        check_binding(&binding, identity, &binding_path(state_dir, instance))?;
        let place = (identity.data_dir.clone(), identity.data_dir_inode);
        if place != (binding.data_dir.clone(), binding.data_dir_inode) {
            (binding.data_dir, binding.data_dir_inode) = place;
            write_binding(state_dir, instance, &binding)?;
        }
        return Ok(binding);
    }
    let incarnation = Incarnation {
        id: IncarnationId::fresh(),
        engine: identity.engine,
        engine_version: identity.version.clone(),
        instance: instance.to_string(),
        host: host.to_string(),
        system_id: identity.system_id.clone(),
        began_at: now,
        parent: None,
    };
    let binding = Binding { incarnation, data_dir: identity.data_dir.clone(), data_dir_inode: identity.data_dir_inode };
    write_binding(state_dir, instance, &binding)?;
    tracing::info!(instance, incarnation = %binding.incarnation.id, "a new incarnation begins");
    Ok(binding)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    fn identity() -> ServerIdentity {
        ServerIdentity {
            engine: EngineKind::Fake,
            version: "1".into(),
            system_id: "77".into(),
            data_dir: "/srv/db".into(),
            data_dir_inode: (5, 1000),
        }
    }

    fn now() -> jiff::Timestamp {
        "2026-11-21T10:00:00.123456789Z".parse().unwrap()
    }

    #[tokio::test]
    async fn the_same_directory_is_the_same_incarnation_at_every_start() {
        let repo = Repository::init(Arc::new(MemoryStore::new("t")), now()).await.unwrap();
        let state = tempfile::tempdir().unwrap();
        let claim = async |identity: ServerIdentity, name: &str| {
            claim_incarnation(&repo, &identity, state.path(), "a", name, now()).await
        };
        let first = claim(identity(), "orders").await.unwrap();
        assert_eq!(claim(identity(), "orders").await.unwrap(), first);
        assert_ne!(claim(identity(), "other").await.unwrap().id, first.id);
        assert_eq!(Incarnations::new(repo.clone()).all().await.unwrap().len(), 2);
        // After a start of the machine the disk has another number; a mount point may have another name.
        let renumbered = ServerIdentity { data_dir_inode: (9, 1000), ..identity() };
        assert_eq!(claim(renumbered.clone(), "orders").await.unwrap(), first);
        let moved = ServerIdentity { data_dir: "/mnt/db".into(), ..renumbered };
        assert_eq!(claim(moved, "orders").await.unwrap(), first);
    }

    #[tokio::test]
    async fn another_directory_under_the_same_name_is_fenced_and_says_what_to_do() {
        let repo = Repository::init(Arc::new(MemoryStore::new("t")), now()).await.unwrap();
        let state = tempfile::tempdir().unwrap();
        claim_incarnation(&repo, &identity(), state.path(), "a", "orders", now()).await.unwrap();
        let before = std::fs::read(binding_path(state.path(), "orders")).unwrap();
        let others = [
            ServerIdentity { system_id: "78".into(), ..identity() },
            ServerIdentity { data_dir_inode: (5, 1001), ..identity() },
            // A copy in another file system may have the same inode number.
            ServerIdentity { data_dir: "/srv/copy".into(), data_dir_inode: (6, 1000), ..identity() },
        ];
        for other in others {
            let error = claim_incarnation(&repo, &other, state.path(), "a", "orders", now()).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Fenced, "{other:?}");
            assert!(error.hint_text().unwrap().contains("instances/orders.json"));
        }
        assert_eq!(std::fs::read(binding_path(state.path(), "orders")).unwrap(), before);
        assert_eq!(Incarnations::new(repo.clone()).all().await.unwrap().len(), 1);
    }
}
