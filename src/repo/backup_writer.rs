//! Writes a backup: lanes make packs at the same time, the manifest is published last.
//!
//! Invariants: a lane holds at most two frames of content and a few MiB that are on their way; a pack is never in memory
//! as a whole, and neither is the manifest. Before the manifest is stored nothing refers to the packs, so a process that
//! dies leaves garbage and no backup. A work object names the job from before the first pack until after the manifest,
//! so that the garbage collector leaves the packs alone.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use futures_util::stream;
use jiff::Timestamp;
use tokio_util::task::TaskTracker;

use crate::error::{Error, Kind, Result};
use crate::format::document::Work;
use crate::format::layout;
use crate::format::manifest::ManifestEntry;
use crate::model::backup::Backup;
use crate::model::id::{BackupId, IncarnationId, JobId, PackId};
use crate::repo::backup_reader::Backups;
use crate::repo::lease::LeaseKeeper;
use crate::repo::manifest_spool::{FinishedManifest, ManifestSpool};
use crate::repo::objects::object_key;
use crate::repo::repository::Repository;
use crate::store::read::read_range;
use crate::store::{ByteStream, Key, PutCondition};

pub use lane::PackLane;

mod lane;

/// The usual `zstd_level`: 258 MB/s and core on pages of a heap, where level 1 makes 432 and a sixth more bytes.
pub const ZSTD_LEVEL_DEFAULT: i32 = 3;

/// What a backup needs to know about its surroundings.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    pub job: JobId,
    pub backup: BackupId,
    /// The host that takes the backup, for people who look at work in progress.
    pub host: String,
    pub began_at: Timestamp,
    pub zstd_level: i32,
    /// A directory on disk for the manifest while it is made: about 1/5000 of the data, or 60 bytes for a small file.
    pub spool_dir: PathBuf,
}

/// How far a backup is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupProgress {
    /// Content that the lanes were given.
    pub read_bytes: u64,
    /// Bytes of finished packs.
    pub stored_bytes: u64,
}

/// See the module.
pub struct BackupWriter {
    shared: Arc<Shared>,
    work_key: Key,
    manifest_key: Key,
    backup: BackupId,
    finished: Mutex<Option<FinishedManifest>>,
    is_published: AtomicBool,
}

/// What lanes have in common.
struct Shared {
    repo: Arc<Repository>,
    incarnation: IncarnationId,
    lease: Arc<LeaseKeeper>,
    zstd_level: i32,
    runtime: tokio::runtime::Handle,
    uploads: TaskTracker,
    spool: Mutex<ManifestSpool>,
    /// Every pack whose upload has begun.
    packs: Mutex<Vec<PackId>>,
    read_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    lanes_open: AtomicU64,
    /// A lane was dropped before it was finished: there can be no backup.
    is_broken: AtomicBool,
}

/// Locks are held for pushes and for the writing of a record; a panic in there breaks the lane, and with it the backup.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Shared {
    fn add(&self, entry: &ManifestEntry) -> Result<()> {
        lock(&self.spool).add(entry)
    }
}

impl BackupWriter {
    /// Announces the work. The lease of the incarnation is held by the caller and checked whenever an object becomes
    /// complete. To be called on the runtime that is to carry the uploads.
    pub async fn begin(repo: Arc<Repository>, lease: Arc<LeaseKeeper>, options: BackupOptions) -> Result<BackupWriter> {
        lease.check()?;
        let incarnation = lease.incarnation();
        let manifest_key = object_key(layout::manifest_key(incarnation, &options.backup))?;
        let work_key = object_key(layout::work_key(incarnation, options.job))?;
        let spool = ManifestSpool::begin(incarnation, manifest_key.as_str(), &options.spool_dir)?;
        let work = Work { job: options.job, host: options.host, began_at: options.began_at };
        repo.store().put(&work_key, Bytes::from(work.to_bytes()?), PutCondition::Replace).await?;
        let shared = Shared {
            repo,
            incarnation,
            lease,
            zstd_level: options.zstd_level,
            runtime: tokio::runtime::Handle::current(),
            uploads: TaskTracker::new(),
            spool: Mutex::new(spool),
            packs: Mutex::default(),
            read_bytes: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
            lanes_open: AtomicU64::new(0),
            is_broken: AtomicBool::new(false),
        };
        Ok(BackupWriter {
            shared: Arc::new(shared),
            work_key,
            manifest_key,
            backup: options.backup,
            finished: Mutex::default(),
            is_published: AtomicBool::new(false),
        })
    }

    /// A new lane, for a plain thread: its calls block.
    pub fn lane(&self) -> PackLane {
        PackLane::new(self.shared.clone())
    }

    pub fn progress(&self) -> BackupProgress {
        BackupProgress {
            read_bytes: self.shared.read_bytes.load(Ordering::Relaxed),
            stored_bytes: self.shared.stored_bytes.load(Ordering::Relaxed),
        }
    }

    /// Makes the backup exist. All lanes are finished, and the log of its span is in the repository. Returns `draft`
    /// with the counts filled in. May be repeated after a temporary error.
    pub async fn publish(&self, draft: Backup) -> Result<Backup> {
        let what = || format!("cannot publish backup '{}'", self.backup);
        let manifest = self.finish_manifest(draft).map_err(|error| error.while_doing(what()))?;
        let store = self.shared.repo.store();
        let body = manifest_body(manifest.clone(), self.shared.lease.clone());
        match store.put_stream(&self.manifest_key, body, PutCondition::Create).await {
            Ok(_) => {}
            Err(error) if error.kind() == Kind::Conflict && self.is_stored(&manifest).await? => {}
            Err(error) => return Err(error.while_doing(what())),
        }
        self.is_published.store(true, Ordering::Release);
        Backups::new(self.shared.repo.clone()).forget_listing(self.shared.incarnation).await;
        self.remove_work_object().await;
        Ok(manifest.backup)
    }

    fn finish_manifest(&self, draft: Backup) -> Result<FinishedManifest> {
        let mut finished = lock(&self.finished);
        if let Some(manifest) = finished.as_ref() {
            return Ok(manifest.clone());
        }
        if draft.id != self.backup || draft.incarnation != self.shared.incarnation {
            return Err(Error::new(Kind::Internal, "it was begun under another name"));
        }
        if self.shared.is_broken.load(Ordering::Acquire) || self.shared.lanes_open.load(Ordering::Acquire) > 0 {
            return Err(Error::new(Kind::Internal, "not everything was stored"));
        }
        let stored_bytes = self.shared.stored_bytes.load(Ordering::Acquire);
        let manifest = lock(&self.shared.spool).finish(draft, stored_bytes)?;
        *finished = Some(manifest.clone());
        Ok(manifest)
    }

    /// Whether the object that is there is this manifest: its end binds all of it.
    async fn is_stored(&self, manifest: &FinishedManifest) -> Result<bool> {
        let store = self.shared.repo.store().as_ref();
        match store.head(&self.manifest_key).await? {
            Some(info) if info.size_bytes == manifest.size_bytes => {
                let from = info.size_bytes - manifest.end.len() as u64;
                Ok(read_range(store, &self.manifest_key, from..info.size_bytes).await? == manifest.end)
            }
            _ => Ok(false),
        }
    }

    /// Gives up a backup that was not published, and deletes its packs. The threads of all lanes have ended. What cannot
    /// be deleted now is garbage that refers to nothing; the error says so.
    pub async fn abort(&self) -> Result<()> {
        if self.is_published.load(Ordering::Acquire) {
            return Err(Error::new(Kind::Internal, format!("backup '{}' is published and not given up", self.backup)));
        }
        self.shared.is_broken.store(true, Ordering::Release);
        // A pack that is still on its way could arrive after it was deleted.
        self.shared.uploads.close();
        self.shared.uploads.wait().await;
        // Without the lease, these may be looked at by somebody else: nothing is deleted any more.
        self.shared.lease.check()?;
        self.remove_manifest().await?;
        let packs = std::mem::take(&mut *lock(&self.shared.packs));
        let keys = packs.iter().map(|pack| object_key(layout::pack_key(self.shared.incarnation, *pack)));
        let keys: Vec<Key> = keys.collect::<Result<_>>()?;
        for some in keys.chunks(1000) {
            let deleted = self.shared.repo.store().delete(some).await;
            deleted.map_err(|error| error.while_doing(format!("cannot remove packs of backup '{}'", self.backup)))?;
        }
        self.remove_work_object().await;
        Ok(())
    }

    /// A publication that failed may have happened all the same: no backup may remain whose packs go.
    async fn remove_manifest(&self) -> Result<()> {
        let Some(manifest) = lock(&self.finished).clone() else { return Ok(()) };
        if self.is_stored(&manifest).await? {
            self.shared.repo.store().delete(std::slice::from_ref(&self.manifest_key)).await?;
        }
        Ok(())
    }

    async fn remove_work_object(&self) {
        if let Err(error) = self.shared.repo.store().delete(std::slice::from_ref(&self.work_key)).await {
            // The backup is as it should be; only garbage lives longer.
            tracing::warn!(key = %self.work_key, %error, "the mark of finished work could not be deleted");
        }
    }
}

fn manifest_body(manifest: FinishedManifest, lease: Arc<LeaseKeeper>) -> ByteStream {
    Box::pin(stream::try_unfold(0u64, move |at| {
        let (manifest, lease) = (manifest.clone(), lease.clone());
        async move {
            if at >= manifest.size_bytes {
                return Ok(None);
            }
            let piece = manifest.read(at).await?;
            let next = at + piece.len() as u64;
            if next >= manifest.size_bytes {
                lease.check()?;
            }
            Ok(Some((piece, next)))
        }
    }))
}

#[cfg(test)]
mod tests;
