//! Objects in memory, for tests and for jobs on the fake engine: the contract without a disk.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::{Mutex, MutexGuard};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;

use super::read::body_from_bytes;
use super::{ByteStream, Key, LIST_PAGE_OBJECTS_MAX, ObjectInfo, PutCondition, Store, Tag};
use crate::error::{Error, Kind, Result};
use crate::model::capabilities::Capabilities;

/// See the module.
#[derive(Default)]
pub struct MemoryStore {
    name: String,
    objects: Mutex<Objects>,
}

#[derive(Default)]
struct Objects {
    by_key: BTreeMap<String, (Bytes, u64)>,
    /// The number of puts so far, which is what tags are made of.
    version: u64,
}

impl MemoryStore {
    /// An empty store; `name` is for messages.
    pub fn new(name: &str) -> MemoryStore {
        MemoryStore { name: name.to_string(), objects: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Objects> {
        // No call can panic half-way through a change.
        self.objects.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn put_now(&self, key: &Key, body: Bytes, condition: &PutCondition) -> Result<Tag> {
        let mut objects = self.lock();
        let old = objects.by_key.get(key.as_str()).map(|(_, version)| tag_of(*version));
        let why_not = match condition {
            PutCondition::Create if old.is_some() => "it exists already",
            PutCondition::IfMatch(tag) if old.as_ref() != Some(tag) => "it was changed by somebody else",
            _ => "",
        };
        if !why_not.is_empty() {
            return Err(Error::new(Kind::Conflict, format!("cannot store '{key}' in {}: {why_not}", self.describe())));
        }
        objects.version += 1;
        let version = objects.version;
        objects.by_key.insert(key.as_str().to_string(), (body, version));
        Ok(tag_of(version))
    }
}

fn tag_of(version: u64) -> Tag {
    Tag(version.to_string())
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream> {
        let found = self.lock().by_key.get(key.as_str()).map(|(body, _)| body.clone());
        let what = || format!("cannot read '{key}' in {}", self.describe());
        let body = found.ok_or_else(|| Error::new(Kind::NotFound, format!("{}: no such object", what())))?;
        let Some(range) = range else { return Ok(body_from_bytes(body)) };
        let size = body.len();
        let bounds = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        match bounds {
            Some((start, end)) if start <= end && end <= size => Ok(body_from_bytes(body.slice(start..end))),
            _ => {
                let reason = format!("{}: it has {size} bytes, not {}..{}", what(), range.start, range.end);
                Err(Error::new(Kind::BadInput, reason))
            }
        }
    }

    async fn put(&self, key: &Key, body: Bytes, condition: PutCondition) -> Result<Tag> {
        self.put_now(key, body, &condition)
    }

    async fn put_stream(&self, key: &Key, mut body: ByteStream, condition: PutCondition) -> Result<Tag> {
        if matches!(condition, PutCondition::IfMatch(_)) {
            return Err(super::if_match_of_a_stream(key));
        }
        let mut all = BytesMut::new();
        while let Some(piece) = body.next().await {
            all.extend_from_slice(&piece?);
        }
        self.put_now(key, all.freeze(), &condition)
    }

    async fn head(&self, key: &Key) -> Result<Option<ObjectInfo>> {
        let objects = self.lock();
        Ok(objects.by_key.get(key.as_str()).map(|(body, version)| ObjectInfo {
            key: key.clone(),
            size_bytes: body.len() as u64,
            tag: tag_of(*version),
        }))
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>> {
        let objects = self.lock();
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        objects
            .by_key
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .take(limit.min(LIST_PAGE_OBJECTS_MAX))
            .map(|(key, (body, version))| {
                Ok(ObjectInfo { key: Key::parse(key)?, size_bytes: body.len() as u64, tag: tag_of(*version) })
            })
            .collect()
    }

    async fn delete(&self, keys: &[Key]) -> Result<()> {
        let mut objects = self.lock();
        for key in keys {
            objects.by_key.remove(key.as_str());
        }
        Ok(())
    }

    fn describe(&self) -> String {
        format!("memory://{}", self.name)
    }

    async fn probe(&self) -> Result<Option<Capabilities>> {
        Ok(None)
    }

    fn adopt(&self, _: &Capabilities) {}
}
