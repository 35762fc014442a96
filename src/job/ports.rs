//! What jobs need from the agent above them.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;

use crate::engine::DurableEnd;
use crate::error::Result;
use crate::model::engine_kind::EngineKind;
use crate::model::id::IncarnationId;
use crate::model::position::Position;
use crate::repo::repository::Repository;

/// The agents of the hosts whose instances are cloned.
#[async_trait]
pub trait SourceAgents: Send + Sync {
    /// Asks the agent of `host` to ship everything of this incarnation that is durable, the open file too, and returns
    /// how far that is. `Unreachable` if nobody answers: a clone is possible without it, up to what was shipped.
    async fn ship_now(&self, host: &str, incarnation: IncarnationId) -> Result<DurableEnd>;
}

/// A clone that was accepted, as the instance that it is from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewInstance {
    pub name: String,
    pub engine: EngineKind,
    pub incarnation: IncarnationId,
    /// The incarnation that it was cloned from, and the position where it left it.
    pub parent: (IncarnationId, Position),
    pub data_dir: PathBuf,
    /// Where its sockets and logs are: `CloneSite::run_dir`.
    pub run_dir: PathBuf,
    pub bin_dir: Option<PathBuf>,
    pub port: u16,
    pub listen_addresses: String,
    pub run_as: String,
}

/// A place on this host that an instance uses, running or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenPlace {
    pub name: String,
    pub data_dir: PathBuf,
    pub port: u16,
}

/// The instances that the agent of this host looks after.
#[async_trait]
pub trait InstanceRegistry: Send + Sync {
    /// All instances, configured ones and accepted clones.
    fn places(&self) -> Vec<TakenPlace>;

    /// The ports of clones that are being made: nobody listens there yet. None, and so the default, where nobody counts.
    fn ports_of_jobs(&self) -> Vec<u16> {
        Vec::new()
    }

    /// Adds a clone, durably, and begins to archive it under its own incarnation. Repeating it with the same value is
    /// harmless; another instance of the same name is a `Conflict`.
    async fn register(&self, instance: NewInstance) -> Result<()>;

    /// Takes a clone out again, durably, and stops to archive it. Succeeds if there is none of that name.
    async fn unregister(&self, name: &str) -> Result<()>;

    /// Orders the first backup of a registered clone, unless it has one or one is ordered.
    async fn order_first_backup(&self, name: &str) -> Result<()>;
}

/// The way to the repository, which may not be reachable now.
#[async_trait]
pub trait RepositoryDoor: Send + Sync {
    /// The open repository. An error is temporary where a later call may succeed.
    async fn repository(&self) -> Result<Arc<Repository>>;
}
