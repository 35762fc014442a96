//! The repository as the agent sees it: opened when it is first reachable, and asked for by everybody who needs it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::OnceCell;

use crate::agent::config::{Config, RepositoryUrl, S3Config};
use crate::agent::peers::Peers;
use crate::base::clock::{Clock, is_within};
use crate::base::rate::RateLimit;
use crate::error::{Error, Kind, Result};
use crate::job::ports::RepositoryDoor;
use crate::repo::repository::Repository;
use crate::store::Store;
use crate::store::fs::FsStore;
use crate::store::metered::MeteredStore;
use crate::store::s3::{Bandwidth, S3Options, S3Store, Timeouts};

/// Somebody waits who wants to know whether the repository answers: so long and no longer. Long enough for the attempts
/// of a store that is refused, whose error says more than that there was no answer.
const LOOK_MAX: Duration = Duration::from_secs(8);

const ABORT_STALE_UPLOADS_EVERY: Duration = Duration::from_secs(24 * 3600);

/// The configured place and, once it could be opened, the repository there.
pub struct RepositoryHandle {
    url: RepositoryUrl,
    peers: Arc<Peers>,
    clock: Arc<dyn Clock>,
    /// Where what is known of the repository is kept between runs.
    local_copy_dir: PathBuf,
    bandwidth: Bandwidth,
    /// One for the whole agent, with its connections and its limits.
    s3: OnceCell<S3Store>,
    opened: ArcSwapOption<Repository>,
    stale_uploads_aborted_at: Mutex<Option<Timestamp>>,
}

impl RepositoryHandle {
    pub fn new(config: &Config, peers: Arc<Peers>, clock: Arc<dyn Clock>) -> RepositoryHandle {
        let limit = |bytes_per_second: u64| Arc::new(RateLimit::new(bytes_per_second));
        RepositoryHandle {
            url: config.repository.url.clone(),
            peers,
            clock,
            local_copy_dir: config.host.state_dir.join("catalogue"),
            bandwidth: Bandwidth {
                upload: config.limits.upload_bytes_per_second.map(limit),
                download: config.limits.download_bytes_per_second.map(limit),
            },
            s3: OnceCell::new(),
            opened: ArcSwapOption::empty(),
            stale_uploads_aborted_at: Mutex::default(),
        }
    }

    /// `file:///srv/keiki`, `s3://backups/keiki` or `peer://a`.
    pub fn describe(&self) -> String {
        match &self.url {
            RepositoryUrl::File(path) => format!("file://{}", path.display()),
            RepositoryUrl::S3(place) => format!("s3://{}/{}", place.bucket, place.prefix),
            RepositoryUrl::Peer(host) => format!("peer://{host}"),
        }
    }

    /// The repository; opened at the first call that succeeds and kept from then on.
    pub async fn get(&self) -> Result<Arc<Repository>> {
        if let Some(repository) = self.opened.load_full() {
            return Ok(repository);
        }
        let (store, _) = MeteredStore::around(self.store().await?, self.clock.clone());
        let (dir, clock) = (self.local_copy_dir.clone(), self.clock.clone());
        let repository = Repository::open_with_local_copy(store, dir, clock).await?;
        self.opened.store(Some(repository.clone()));
        self.abort_stale_uploads_once_a_day();
        Ok(repository)
    }

    /// Throws away what dead writers have left in a bucket, if that was not done within the last day.
    pub fn abort_stale_uploads_once_a_day(&self) {
        let (Some(_), Some(s3)) = (self.opened.load_full(), self.s3.get().cloned()) else { return };
        let now = self.clock.now();
        {
            // Held for a look and an assignment only, which cannot panic.
            let mut at = self.stale_uploads_aborted_at.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if at.is_some_and(|at| is_within(at, now, ABORT_STALE_UPLOADS_EVERY)) {
                return;
            }
            *at = Some(now);
        }
        // Nobody waits for it, and next time will do as well.
        tokio::spawn(async move {
            if let Err(error) = s3.abort_stale_uploads().await {
                tracing::info!("{error}");
            }
        });
    }

    /// Makes the configured place a repository; one that is there already is an error that says so.
    pub async fn init(&self) -> Result<()> {
        Repository::init(self.store().await?, self.clock.now()).await?;
        Ok(())
    }

    /// What is wrong with the repository now, if anything. Answers within seconds, also if the repository does not.
    pub async fn problem(&self) -> Option<Error> {
        let look = async {
            match self.get().await {
                // Opened once is not reachable now: the header is read again, which is one small request.
                Ok(repository) => repository.check().await.err(),
                Err(error) => Some(error),
            }
        };
        tokio::time::timeout(LOOK_MAX, look).await.unwrap_or_else(|_| {
            let message =
                format!("repository '{}' did not answer within {} seconds", self.describe(), LOOK_MAX.as_secs());
            Some(Error::new(Kind::Unreachable, message).hint("is its server running, and the network there?"))
        })
    }

    /// Keeps what is known of the repository for the next run, at most every ten minutes unless `now`.
    pub async fn save_local_copy(&self, now: bool) {
        if let Some(repository) = self.opened.load_full() {
            repository.local_copy().save(now).await;
        }
    }

    async fn store(&self) -> Result<Arc<dyn Store>> {
        match &self.url {
            RepositoryUrl::File(path) => Ok(Arc::new(FsStore::open(path)?)),
            RepositoryUrl::Peer(host) => self.peers.store(host),
            RepositoryUrl::S3(place) => {
                let open = || S3Store::open(s3_options(place, self.bandwidth.clone()), self.clock.clone());
                Ok(Arc::new(self.s3.get_or_try_init(open).await?.clone()))
            }
        }
    }
}

/// What the configuration says about a bucket, for the store.
fn s3_options(place: &S3Config, bandwidth: Bandwidth) -> S3Options {
    S3Options {
        endpoint: place.endpoint.clone(),
        public_endpoint: place.public_endpoint.clone(),
        region: place.region.clone(),
        path_style: place.path_style,
        ca: place.ca.clone(),
        credentials: place.credentials.clone(),
        put: place.put.clone(),
        part_bytes: place.part_bytes,
        connections: place.connections,
        timeouts: Timeouts { silence: place.timeout, ..Timeouts::default() },
        bandwidth,
        ..S3Options::new(&place.bucket, &place.prefix)
    }
}

#[async_trait]
impl RepositoryDoor for RepositoryHandle {
    async fn repository(&self) -> Result<Arc<Repository>> {
        self.get().await
    }
}
