//! Listings in the byte order of keys, whatever order the server has.
//!
//! Most servers list in byte order, and begin after any key. Those that keep keys as paths of directories list by
//! directory: `a/x` before `a-b/x`. From them everything below the prefix is fetched and sorted here. The rest of it is
//! kept for the page that is asked for next, so that going through all pages fetches everything once; it is used once,
//! and not when it is older than [`REST_IS_FRESH`], so that nobody who looks for news is shown what was.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use super::S3Store;
use super::bucket::Found;
use crate::error::{Error, Kind, Result};
use crate::store::{Key, LIST_PAGE_OBJECTS_MAX, ObjectInfo, Store, Tag};

const REST_IS_FRESH: Duration = Duration::from_secs(15);
/// Rests of listings that were begun and perhaps will not be gone on with.
const RESTS_MAX: usize = 4;

/// What is kept between two pages of listings.
#[derive(Default)]
pub(super) struct Rests(Mutex<Vec<Rest>>);

struct Rest {
    prefix: String,
    after: String,
    /// In descending order, so that the next ones are at the end.
    objects: Vec<ObjectInfo>,
    fetched_at: Instant,
}

impl Rests {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Rest>> {
        // Held for operations of a vector only, which cannot panic.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn take(&self, prefix: &str, after: &str) -> Option<Rest> {
        let mut rests = self.lock();
        rests.retain(|rest| rest.fetched_at.elapsed() < REST_IS_FRESH);
        let index = rests.iter().position(|rest| rest.prefix == prefix && rest.after == after)?;
        Some(rests.swap_remove(index))
    }

    fn keep(&self, rest: Rest) {
        let mut rests = self.lock();
        if rests.len() >= RESTS_MAX {
            rests.remove(0);
        }
        rests.push(rest);
    }
}

/// See `Store::list`.
pub(super) async fn list(store: &S3Store, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>> {
    let limit = limit.min(LIST_PAGE_OBJECTS_MAX);
    if limit == 0 {
        return Ok(Vec::new());
    }
    if store.capabilities().ordered_listing {
        return list_ordered(store, prefix, after, limit).await;
    }
    let rest = match after.and_then(|after| store.inner.rests.take(prefix, after)) {
        Some(rest) => rest,
        None => fetch(store, prefix, after).await?,
    };
    let Rest { prefix, mut objects, fetched_at, .. } = rest;
    let mut page = objects.split_off(objects.len().saturating_sub(limit));
    page.reverse();
    if limit == LIST_PAGE_OBJECTS_MAX
        && let Some(last) = page.last()
    {
        store.inner.rests.keep(Rest { prefix, after: last.key.to_string(), objects, fetched_at });
    }
    Ok(page)
}

fn object(found: Found, prefix: &str) -> Option<ObjectInfo> {
    // Servers that keep keys as paths make others of odd prefixes: `x//` and `x/..` are not what they begin with.
    if !found.name.starts_with(prefix) {
        return None;
    }
    // Names that are no keys are not ours, or are those of this store itself.
    let key = Key::parse(&found.name).ok()?;
    Some(ObjectInfo { key, size_bytes: found.size_bytes, tag: Tag(found.tag) })
}

async fn list_ordered(store: &S3Store, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>> {
    let what = format!("cannot list '{prefix}'");
    // Garage 2.5 begins at the key that is named and ends at the first one without the prefix: from a key that comes
    // before the prefix it finds nothing.
    let begin = after.filter(|after| *after >= prefix);
    let mut next = None;
    let mut objects: Vec<ObjectInfo> = Vec::new();
    // A page may be short before the end, or hold names that are no keys.
    loop {
        let missing = limit - objects.len();
        let page = store.ask(&what, || store.bucket().list(prefix, begin, next.clone(), missing)).await?;
        objects.extend(page.found.into_iter().filter_map(|found| object(found, prefix)));
        next = page.next;
        let is_ordered = objects.windows(2).all(|pair| pair[0].key < pair[1].key)
            && objects.first().is_none_or(|first| after.is_none_or(|after| first.key.as_str() > after));
        if !is_ordered {
            let message = format!("{what} in {}: the server does not list in the order it once did", store.describe());
            return Err(Error::new(Kind::Unsupported, message)
                .hint("was the repository moved to a server of another kind? copy it into one that is begun there"));
        }
        if objects.len() >= limit || next.is_none() {
            objects.truncate(limit);
            return Ok(objects);
        }
    }
}

/// Everything below the prefix that comes after `after`.
async fn fetch(store: &S3Store, prefix: &str, after: Option<&str>) -> Result<Rest> {
    let what = format!("cannot list '{prefix}'");
    let fetched_at = Instant::now();
    let mut objects: Vec<ObjectInfo> = Vec::new();
    let mut next = None;
    loop {
        let page = store.ask(&what, || store.bucket().list(prefix, None, next.clone(), LIST_PAGE_OBJECTS_MAX)).await?;
        let is_later = |object: &ObjectInfo| after.is_none_or(|after| object.key.as_str() > after);
        objects.extend(page.found.into_iter().filter_map(|found| object(found, prefix)).filter(is_later));
        next = page.next;
        if next.is_none() {
            break;
        }
    }
    objects.sort_unstable_by(|left, right| right.key.cmp(&left.key));
    objects.dedup_by(|left, right| left.key == right.key);
    Ok(Rest { prefix: prefix.to_string(), after: String::new(), objects, fetched_at })
}
