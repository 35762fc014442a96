//! The repository as the agent sees it: opened when it is first reachable, and asked for by everybody who needs it.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use async_trait::async_trait;

use crate::agent::config::RepositoryUrl;
use crate::agent::peers::Peers;
use crate::base::clock::Clock;
use crate::error::{Error, Result};
use crate::job::ports::RepositoryDoor;
use crate::repo::repository::Repository;
use crate::store::Store;
use crate::store::fs::FsStore;

/// The configured place and, once it could be opened, the repository there.
pub struct RepositoryHandle {
    url: RepositoryUrl,
    peers: Arc<Peers>,
    opened: ArcSwapOption<Repository>,
}

impl RepositoryHandle {
    pub fn new(url: RepositoryUrl, peers: Arc<Peers>) -> RepositoryHandle {
        RepositoryHandle { url, peers, opened: ArcSwapOption::empty() }
    }

    /// `file:///srv/keiki` or `peer://a`.
    pub fn describe(&self) -> String {
        match &self.url {
            RepositoryUrl::File(path) => format!("file://{}", path.display()),
            RepositoryUrl::Peer(host) => format!("peer://{host}"),
        }
    }

    /// The repository; opened at the first call that succeeds and kept from then on.
    pub async fn get(&self) -> Result<Arc<Repository>> {
        if let Some(repository) = self.opened.load_full() {
            return Ok(repository);
        }
        let repository = Repository::open(self.store()?).await?;
        self.opened.store(Some(repository.clone()));
        Ok(repository)
    }

    /// Makes the configured place a repository; one that is there already is an error that says so.
    pub async fn init(&self, clock: &dyn Clock) -> Result<()> {
        Repository::init(self.store()?, clock.now()).await?;
        Ok(())
    }

    /// What is wrong with the repository now, if anything.
    pub async fn problem(&self) -> Option<Error> {
        match self.get().await {
            // Opened once is not reachable now: the header is read again, which is one small request.
            Ok(repository) => Repository::open(repository.store().clone()).await.err(),
            Err(error) => Some(error),
        }
    }

    fn store(&self) -> Result<Arc<dyn Store>> {
        match &self.url {
            RepositoryUrl::File(path) => Ok(Arc::new(FsStore::open(path)?)),
            RepositoryUrl::Peer(host) => self.peers.store(host),
        }
    }
}

#[async_trait]
impl RepositoryDoor for RepositoryHandle {
    async fn repository(&self) -> Result<Arc<Repository>> {
        self.get().await
    }
}
