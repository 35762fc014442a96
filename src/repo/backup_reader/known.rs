//! Which backups there are. A published manifest does not change, so each is read once and remembered with the
//! repository; which of them are there is listed, a request for a thousand of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use jiff::Timestamp;

use super::open_manifest;
use crate::base::clock::is_within;
use crate::error::{Error, Kind, Result};
use crate::format::layout;
use crate::format::summary::ManifestObject;
use crate::model::backup::Backup;
use crate::model::id::{BackupId, IncarnationId};
use crate::repo::local_copy::Remembered;
use crate::repo::repository::Repository;
use crate::store::ObjectInfo;
use crate::store::read::list_all;

/// Manifests whose ends are read at the same time.
const READ_AT_ONCE: usize = 16;

/// A manifest that could not be read is not read again within this time by whoever asks for the newest backup only: that is
/// asked twice a minute. It may have been damaged on its way only.
const UNREADABLE_FOR: Duration = Duration::from_secs(3600);

/// The backups of an incarnation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackupList {
    /// Oldest first.
    pub backups: Vec<Backup>,
    /// Manifests that are there and cannot be read, with the reason.
    pub unreadable: Vec<(BackupId, Error)>,
}

/// What is remembered of the backups of one incarnation.
#[derive(Clone, Default)]
pub(in crate::repo) struct KnownBackups {
    /// Of each manifest that was read its size and what it says.
    facts: BTreeMap<BackupId, (u64, Arc<ManifestObject>)>,
    /// Manifests that could not be read, as they were listed, and when they were read. Not written down.
    unreadable: BTreeMap<BackupId, (ObjectInfo, Timestamp)>,
    /// What was there when it was listed last. Ids sort by the second in which the backup began.
    listed: Vec<(BackupId, ObjectInfo)>,
    listed_at: Option<Timestamp>,
    changes: u64,
}

impl KnownBackups {
    /// Grows when there is something new to be written down.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    pub fn remember(&mut self, id: BackupId, size_bytes: u64, object: Arc<ManifestObject>) {
        self.facts.insert(id, (size_bytes, object));
        self.changes += 1;
    }

    pub fn facts(&self) -> impl Iterator<Item = (&BackupId, u64, &ManifestObject)> {
        self.facts.iter().map(|(id, (size_bytes, object))| (id, *size_bytes, object.as_ref()))
    }

    /// Adds what a file said to what was learnt since.
    pub fn take_over(&mut self, kept: KnownBackups) {
        for (id, facts) in kept.facts {
            self.facts.entry(id).or_insert(facts);
        }
    }

    fn fact(&self, id: &BackupId, info: &ObjectInfo) -> Option<Arc<ManifestObject>> {
        let (size_bytes, object) = self.facts.get(id)?;
        (*size_bytes == info.size_bytes).then(|| object.clone())
    }

    fn note_unreadable(&mut self, id: BackupId, info: ObjectInfo, at: Timestamp) {
        self.unreadable.insert(id, (info, at));
    }

    /// Whether this very object could not be read a short time ago.
    fn was_unreadable(&self, id: &BackupId, info: &ObjectInfo, now: Timestamp) -> bool {
        self.unreadable.get(id).is_some_and(|(known, at)| known == info && is_within(*at, now, UNREADABLE_FOR))
    }

    fn set_listed(&mut self, listed: Vec<(BackupId, ObjectInfo)>, at: Timestamp) {
        let before = self.facts.len();
        let is_listed = |id: &BackupId| listed.binary_search_by(|(other, _)| other.cmp(id)).is_ok();
        self.facts.retain(|id, _| is_listed(id));
        self.unreadable.retain(|id, _| is_listed(id));
        self.changes += (before - self.facts.len()) as u64;
        (self.listed, self.listed_at) = (listed, Some(at));
    }

    fn forget_listing(&mut self) {
        self.listed_at = None;
    }
}

/// What backups there are.
pub struct Backups {
    repo: Arc<Repository>,
}

impl Backups {
    pub fn new(repo: Arc<Repository>) -> Backups {
        Backups { repo }
    }

    /// All backups of an incarnation, as they are now. A damaged one does not hide the others.
    pub async fn list(&self, incarnation: IncarnationId) -> Result<BackupList> {
        let remembered = self.repo.local_copy().remembered(incarnation).await;
        let _one = remembered.asking.lock().await;
        let listed = self.listed(incarnation, &remembered, Duration::ZERO).await?;
        let facts = stream::iter(listed)
            .map(|(id, info)| {
                let remembered = &remembered;
                async move {
                    let facts = self.facts(incarnation, remembered, &id, &info).await;
                    (id, facts)
                }
            })
            .buffer_unordered(READ_AT_ONCE);
        let mut facts = std::pin::pin!(facts);
        let mut list = BackupList::default();
        while let Some((id, outcome)) = facts.next().await {
            match outcome {
                Ok(object) => list.backups.push(object.backup.clone()),
                Err(error) if is_unreadable(&error) => list.unreadable.push((id, error)),
                // Deleted between the listing and now.
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        list.backups.sort_by(|one, other| (one.began_at, &one.id).cmp(&(other.began_at, &other.id)));
        list.unreadable.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(list)
    }

    /// The newest backup that `is_meant`, as of a listing that is not older than `max_age`. Reads no more manifests than
    /// it must.
    pub async fn newest(
        &self,
        incarnation: IncarnationId,
        max_age: Duration,
        is_meant: impl Fn(&Backup) -> bool,
    ) -> Result<Option<Backup>> {
        let remembered = self.repo.local_copy().remembered(incarnation).await;
        let _one = remembered.asking.lock().await;
        let mut newest: Option<Backup> = None;
        for (id, info) in self.listed(incarnation, &remembered, max_age).await?.into_iter().rev() {
            if newest.as_ref().is_some_and(|newest| newest.id.second() != id.second()) {
                break;
            }
            let now = self.repo.local_copy().clock().now();
            if remembered.with_backups(|known| known.was_unreadable(&id, &info, now)) {
                continue;
            }
            match self.facts(incarnation, &remembered, &id, &info).await {
                Ok(object) if is_meant(&object.backup) => {
                    let found = &object.backup;
                    if newest.as_ref().is_none_or(|newest| began(newest) < began(found)) {
                        newest = Some(found.clone());
                    }
                }
                Ok(_) => {}
                Err(error) if is_unreadable(&error) || error.kind() == Kind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(newest)
    }

    /// The newest backup that is remembered. Asks nobody: for the time when nobody answers.
    pub async fn newest_remembered(&self, incarnation: IncarnationId) -> Option<Backup> {
        let remembered = self.repo.local_copy().remembered(incarnation).await;
        remembered.with_backups(|known| {
            let backups = known.facts.values().map(|(_, object)| &object.backup);
            backups.max_by_key(|backup| began(backup)).cloned()
        })
    }

    /// The next who asks gets a new listing: this process has published or removed a backup.
    pub(in crate::repo) async fn forget_listing(&self, incarnation: IncarnationId) {
        let remembered = self.repo.local_copy().remembered(incarnation).await;
        remembered.with_backups(KnownBackups::forget_listing);
    }

    async fn listed(
        &self,
        incarnation: IncarnationId,
        remembered: &Remembered,
        max_age: Duration,
    ) -> Result<Vec<(BackupId, ObjectInfo)>> {
        let now = self.repo.local_copy().clock().now();
        let known = remembered.with_backups(|known| {
            known.listed_at.is_some_and(|at| is_within(at, now, max_age)).then(|| known.listed.clone())
        });
        if let Some(listed) = known {
            return Ok(listed);
        }
        let mut listed = Vec::new();
        let prefix = layout::backups_prefix(incarnation);
        let mut pages = list_all(self.repo.store().as_ref(), &prefix, None);
        while let Some(page) = pages.next().await {
            let manifests = page?
                .into_iter()
                .filter_map(|info| layout::parse_manifest_key(incarnation, info.key.as_str()).map(|id| (id, info)));
            listed.extend(manifests);
        }
        remembered.with_backups(|known| known.set_listed(listed.clone(), now));
        Ok(listed)
    }

    async fn facts(
        &self,
        incarnation: IncarnationId,
        remembered: &Remembered,
        id: &BackupId,
        info: &ObjectInfo,
    ) -> Result<Arc<ManifestObject>> {
        if let Some(object) = remembered.with_backups(|known| known.fact(id, info)) {
            return Ok(object);
        }
        let outcome = open_manifest(&self.repo, incarnation, id, info).await;
        if outcome.as_ref().is_err_and(is_unreadable) {
            let now = self.repo.local_copy().clock().now();
            remembered.with_backups(|known| known.note_unreadable(id.clone(), info.clone(), now));
        }
        let object = Arc::new(outcome?.1);
        remembered.with_backups(|known| known.remember(id.clone(), info.size_bytes, object.clone()));
        Ok(object)
    }
}

/// What tells which of two backups is the newer one: ids tell seconds only.
fn began(backup: &Backup) -> (Timestamp, Timestamp) {
    (backup.began_at, backup.ended_at)
}

fn is_unreadable(error: &Error) -> bool {
    matches!(error.kind(), Kind::Damaged | Kind::Unsupported)
}
