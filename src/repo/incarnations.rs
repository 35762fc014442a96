//! The incarnations of a repository: create one, get one, find the one that a person means.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::base::clock::is_within;
use crate::error::{Error, Kind, Result};
use crate::format::document::{DOCUMENT_BYTES_MAX, identity_to_bytes, parse_identity};
use crate::format::layout;
use crate::model::id::IncarnationId;
use crate::model::incarnation::Incarnation;
use crate::repo::local_copy::{Identities, LIST_ALL_EVERY};
use crate::repo::objects::object_key;
use crate::repo::repository::Repository;
use crate::store::PutCondition;
use crate::store::read::{get_optional, read_all};

/// How far a listing that goes on from the last one looks back: ids sort by the time at which they were made, by the
/// clocks of different hosts, and an identity may be stored long after that.
const LOOK_BACK_MS: u64 = 24 * 3600 * 1000;

/// Identities never change, so each is read once and remembered with the repository.
pub struct Incarnations {
    repo: Arc<Repository>,
}

impl Incarnations {
    pub fn new(repo: Arc<Repository>) -> Incarnations {
        Incarnations { repo }
    }

    /// Records a new incarnation. The same one again is success; another one under the same id is a `Conflict`.
    pub async fn create(&self, incarnation: &Incarnation) -> Result<()> {
        let key = object_key(layout::identity_key(incarnation.id))?;
        let bytes = Bytes::from(identity_to_bytes(incarnation)?);
        match self.repo.store().put(&key, bytes.clone(), PutCondition::Create).await {
            Ok(_) => {}
            Err(error) if error.kind() == Kind::Conflict => {
                if read_all(self.repo.store().as_ref(), &key, DOCUMENT_BYTES_MAX as u64).await? != bytes {
                    return Err(error.hint("another instance was recorded under this id"));
                }
            }
            Err(error) => return Err(error),
        }
        self.remember(incarnation.clone());
        Ok(())
    }

    /// The incarnation with this id; `NotFound` if there is none.
    pub async fn get(&self, id: IncarnationId) -> Result<Incarnation> {
        self.get_if_there(id).await?.ok_or_else(|| {
            Error::new(Kind::NotFound, format!("repository '{}' has no incarnation '{id}'", self.repo.describe()))
        })
    }

    async fn get_if_there(&self, id: IncarnationId) -> Result<Option<Incarnation>> {
        if let Some(found) = self.repo.local_copy().with_identities(|identities| identities.known.get(&id).cloned()) {
            return Ok(Some(found));
        }
        let key = object_key(layout::identity_key(id))?;
        let Some(bytes) = get_optional(self.repo.store().as_ref(), &key, DOCUMENT_BYTES_MAX as u64).await? else {
            return Ok(None);
        };
        let incarnation = parse_identity(key.as_str(), &bytes)?;
        if incarnation.id != id {
            let reason = format!("object '{key}': it is the identity of incarnation '{}'", incarnation.id);
            return Err(Error::new(Kind::Damaged, reason));
        }
        self.remember(incarnation.clone());
        Ok(Some(incarnation))
    }

    fn remember(&self, incarnation: Incarnation) {
        self.repo.local_copy().with_identities(|identities| identities.known.insert(incarnation.id, incarnation));
    }

    /// All incarnations, oldest first. Two requests for each that was not known, one for each of the last day before
    /// the newest, whatever lies below them; once a day all are listed.
    pub async fn all(&self) -> Result<Vec<Incarnation>> {
        let local_copy = self.repo.local_copy();
        let now = local_copy.clock().now();
        let (newest, all_listed_at) = local_copy.with_identities(|identities| {
            (identities.known.last_key_value().map(|(id, _)| *id), identities.all_listed_at)
        });
        let is_recent = all_listed_at.is_some_and(|at| is_within(at, now, LIST_ALL_EVERY));
        let start = newest.filter(|_| is_recent).and_then(look_back_from);
        let found = self.list_after(start.clone()).await?;
        local_copy.with_identities(|identities| {
            let is_before = |id: &IncarnationId| start.as_ref().is_some_and(|start| key_of(*id) < *start);
            identities.known.retain(|id, _| is_before(id) || found.iter().any(|one| one.id == *id));
            if start.is_none() {
                identities.all_listed_at = Some(now);
            }
            let mut all: Vec<Incarnation> = identities.known.values().cloned().collect();
            all.sort_by_key(|incarnation| (incarnation.began_at, incarnation.id));
            Ok(all)
        })
    }

    /// The incarnations whose keys come after `start`.
    async fn list_after(&self, start: Option<String>) -> Result<Vec<Incarnation>> {
        let mut found = Vec::new();
        let mut after = start;
        loop {
            let page = self.repo.store().list(layout::INCARNATIONS_PREFIX, after.as_deref(), 1).await?;
            let Some(object) = page.first() else { break };
            let rest = object.key.as_str().strip_prefix(layout::INCARNATIONS_PREFIX).unwrap_or_default();
            let name = rest.split('/').next().unwrap_or_default();
            // '0' is the byte after '/': everything below this name comes before it, every other name after.
            after = Some(format!("{}{name}0", layout::INCARNATIONS_PREFIX));
            let Ok(id) = IncarnationId::parse(name) else { continue };
            // Without its identity it is not there yet, or not any more.
            found.extend(self.get_if_there(id).await?);
        }
        Ok(found)
    }

    /// The incarnation that a person means by `orders` or `db1/orders`: the newest life of that instance. An id in full
    /// means that one. `NotFound` and ambiguous names say what there is.
    pub async fn find(&self, text: &str) -> Result<Incarnation> {
        if let Ok(id) = IncarnationId::parse(text) {
            return self.get(id).await;
        }
        let chosen = choose(text, self.all().await?);
        let is_there = match &chosen {
            // Somebody may have removed it where nobody has looked since.
            Ok(incarnation) => {
                let key = object_key(layout::identity_key(incarnation.id))?;
                self.repo.store().head(&key).await?.is_some()
            }
            Err(error) => error.kind() != Kind::NotFound,
        };
        if is_there {
            return chosen;
        }
        self.repo.local_copy().with_identities(|identities| *identities = Identities::default());
        choose(text, self.all().await?)
    }
}

/// What all keys of an incarnation begin with, without the last slash.
fn key_of(id: IncarnationId) -> String {
    format!("{}{id}", layout::INCARNATIONS_PREFIX)
}

/// After which key to list for everything that may have been added since `newest` was the newest; nothing if its id does
/// not tell the time. The first twelve hexadecimal digits of an id are milliseconds since 1970 (RFC 9562, version 7).
fn look_back_from(newest: IncarnationId) -> Option<String> {
    let text = newest.to_string();
    let digits = text.get(..13)?.replace('-', "");
    let milliseconds = u64::from_str_radix(&digits, 16).ok()?.checked_sub(LOOK_BACK_MS)?;
    let digits = format!("{milliseconds:012x}");
    Some(format!("{}{}-{}", layout::INCARNATIONS_PREFIX, &digits[..8], &digits[8..]))
}

/// Pure part of `find`; `all` is sorted by age.
fn choose(text: &str, all: Vec<Incarnation>) -> Result<Incarnation> {
    let (host, instance) = match text.split_once('/') {
        Some((host, instance)) => (Some(host), instance),
        None => (None, text),
    };
    let is_meant = |incarnation: &&Incarnation| {
        incarnation.instance == instance && host.is_none_or(|host| incarnation.host == host)
    };
    // Later ones of the same host replace earlier ones.
    let by_host: BTreeMap<&str, &Incarnation> =
        all.iter().filter(is_meant).map(|incarnation| (incarnation.host.as_str(), incarnation)).collect();
    let names = |incarnations: &mut dyn Iterator<Item = &Incarnation>| {
        let names: std::collections::BTreeSet<String> =
            incarnations.map(|one| format!("'{}/{}'", one.host, one.instance)).collect();
        names.into_iter().take(10).collect::<Vec<_>>().join(", ")
    };
    match (by_host.len(), by_host.values().next()) {
        (1, Some(only)) => Ok((*only).clone()),
        (0, _) | (_, None) => {
            let error = Error::new(Kind::NotFound, format!("the repository has no archive of instance '{text}'"));
            Err(match all.is_empty() {
                true => error.hint("nothing was archived yet; is the agent of the source running?"),
                false => error.hint(format!("there is {}", names(&mut all.iter()))),
            })
        }
        _ => Err(Error::new(Kind::BadInput, format!("instance '{text}' is on more than one host"))
            .hint(format!("say which: {}", names(&mut by_host.into_values())))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::engine_kind::EngineKind;
    use crate::store::memory::MemoryStore;
    use crate::store::{Key, Store};
    use jiff::Timestamp;

    fn incarnation(host: &str, instance: &str, second: i64) -> Incarnation {
        Incarnation {
            id: IncarnationId::fresh(),
            engine: EngineKind::Fake,
            engine_version: String::from("1"),
            instance: instance.to_string(),
            host: host.to_string(),
            system_id: String::from("7"),
            began_at: Timestamp::from_second(second).unwrap(),
            parent: None,
        }
    }

    async fn empty() -> (Arc<dyn Store>, Incarnations) {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new("t"));
        let repo = Repository::init(store.clone(), Timestamp::UNIX_EPOCH).await.unwrap();
        (store, Incarnations::new(repo))
    }

    #[tokio::test]
    async fn the_newest_life_of_an_instance_is_meant() {
        let (_, incarnations) = empty().await;
        let (old, new) = (incarnation("a", "orders", 5), incarnation("a", "orders", 9));
        for one in [&new, &old, &incarnation("a", "other", 10)] {
            incarnations.create(one).await.unwrap();
        }
        assert_eq!(incarnations.find("orders").await.unwrap(), new);
        assert_eq!(incarnations.find("a/orders").await.unwrap(), new);
        assert_eq!(incarnations.find(&old.id.to_string()).await.unwrap(), old);
    }

    #[tokio::test]
    async fn an_ambiguous_or_unknown_name_is_answered_with_what_there_is() {
        let (_, incarnations) = empty().await;
        assert_eq!(incarnations.find("orders").await.unwrap_err().kind(), Kind::NotFound);
        for host in ["b", "a", "a"] {
            incarnations.create(&incarnation(host, "orders", 5)).await.unwrap();
        }
        let error = incarnations.find("orders").await.unwrap_err();
        assert_eq!(error.kind(), Kind::BadInput);
        assert_eq!(error.hint_text().unwrap(), "say which: 'a/orders', 'b/orders'");
        let error = incarnations.find("c/orders").await.unwrap_err();
        assert_eq!((error.kind(), error.hint_text()), (Kind::NotFound, Some("there is 'a/orders', 'b/orders'")));
    }

    #[tokio::test]
    async fn listing_skips_what_lies_below_an_incarnation_and_what_has_no_identity() {
        let (store, incarnations) = empty().await;
        let mut made = Vec::new();
        for second in 0..3 {
            let one = incarnation("a", &format!("i{second}"), second);
            incarnations.create(&one).await.unwrap();
            for number in 0..5 {
                let key = Key::parse(&format!("incarnations/{}/log/f{number}/sealed", one.id)).unwrap();
                store.put(&key, Bytes::new(), PutCondition::Create).await.unwrap();
            }
            made.push(one);
        }
        let orphan = Key::parse(&format!("incarnations/{}/log/f/sealed", IncarnationId::fresh())).unwrap();
        store.put(&orphan, Bytes::new(), PutCondition::Create).await.unwrap();
        assert_eq!(Incarnations::new(incarnations.repo.clone()).all().await.unwrap(), made);
    }

    #[tokio::test]
    async fn an_identity_is_written_once() {
        let (_, incarnations) = empty().await;
        let one = incarnation("a", "orders", 5);
        incarnations.create(&one).await.unwrap();
        incarnations.create(&one).await.unwrap();
        let other = Incarnation { instance: String::from("else"), ..one };
        assert_eq!(incarnations.create(&other).await.unwrap_err().kind(), Kind::Conflict);
    }
}
