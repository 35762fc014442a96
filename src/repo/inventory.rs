//! Everything that a repository holds, by incarnation and by kind, from a listing of all of it: a request for a thousand
//! objects. For a person who asks, never for a task that runs by itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::StreamExt;

use crate::error::Result;
use crate::format::layout;
use crate::model::id::IncarnationId;
use crate::model::inventory::{Holdings, Inventory, Total};
use crate::repo::incarnations::Incarnations;
use crate::repo::repository::Repository;
use crate::store::ObjectInfo;
use crate::store::read::list_all;

/// Lists the whole repository. What is below something that has no identity is counted among the rest.
pub async fn take_inventory(repo: &Arc<Repository>) -> Result<Inventory> {
    let mut by_incarnation: BTreeMap<IncarnationId, Holdings> = BTreeMap::new();
    let mut rest = Total::default();
    let mut pages = list_all(repo.store().as_ref(), "", None);
    while let Some(page) = pages.next().await {
        for ObjectInfo { key, size_bytes, .. } in page? {
            match below_incarnation(key.as_str()) {
                Some((incarnation, kind)) => {
                    let holdings = by_incarnation.entry(incarnation).or_default();
                    let total = match kind {
                        "log" => &mut holdings.log,
                        "packs" => &mut holdings.packs,
                        "backups" => &mut holdings.manifests,
                        _ => &mut holdings.rest,
                    };
                    total.add(size_bytes);
                }
                None => rest.add(size_bytes),
            }
        }
    }
    let mut incarnations = Vec::new();
    for incarnation in Incarnations::new(repo.clone()).all().await? {
        let holdings = by_incarnation.remove(&incarnation.id).unwrap_or_default();
        incarnations.push((incarnation, holdings));
    }
    for holdings in by_incarnation.values() {
        rest.join(holdings.all());
    }
    Ok(Inventory { incarnations, rest })
}

/// The incarnation of a key and the word that follows it.
fn below_incarnation(key: &str) -> Option<(IncarnationId, &str)> {
    let mut parts = key.strip_prefix(layout::INCARNATIONS_PREFIX)?.split('/');
    let incarnation = IncarnationId::parse(parts.next()?).ok()?;
    Some((incarnation, parts.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::test_site::{noise, ship, site};

    #[tokio::test]
    async fn every_object_is_counted_once_where_it_belongs() {
        let site = site().await;
        ship(&site.writer().await, "f1", 0, &noise(1, 100), true).await.unwrap();
        ship(&site.writer().await, "f2", 0, &noise(1, 100), true).await.unwrap();
        let everything = site.store.list("", None, 1000).await.unwrap();
        let bytes: u64 = everything.iter().map(|object| object.size_bytes).sum();
        // The site's incarnation has a lease and log, and no identity.
        let inventory = take_inventory(&site.repo).await.unwrap();
        assert!(inventory.incarnations.is_empty());
        assert_eq!(inventory.rest, Total { objects: everything.len() as u64, bytes });
        let id = site.incarnation;
        let key = |rest: &str| format!("incarnations/{id}/{rest}");
        assert_eq!(below_incarnation(&key("log/f1/sealed")), Some((id, "log")));
        assert_eq!(below_incarnation(&key("backups/x/manifest")), Some((id, "backups")));
        assert_eq!(below_incarnation("keiki.json"), None);
    }
}
