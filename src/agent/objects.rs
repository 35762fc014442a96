//! This agent's repository, for hosts that have no access of their own. Reading is free for whom the rules allow it;
//! writing reaches only incarnations that belong to the caller's own host, whatever the rules say. Who an incarnation
//! belongs to is in its identity, which can be created and never replaced: a host cannot give itself what is another's.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::agent::host::Host;
use crate::error::{Error, Kind, Result};
use crate::format::document::parse_identity;
use crate::format::layout::identity_key;
use crate::model::id::IncarnationId;
use crate::peer::access::{self, Caller};
use crate::peer::api::{ObjectFacts, PutWhen, Request, Response};
use crate::repo::incarnations::Incarnations;
use crate::repo::repository::Repository;
use crate::store::read::get_sized;
use crate::store::{ByteStream, Key, Links, ObjectInfo, PutCondition, Store, Tag};

/// Whether a request belongs here.
pub fn is_about_objects(request: &Request) -> bool {
    matches!(
        request,
        Request::GetObject { .. }
            | Request::HeadObject { .. }
            | Request::ListObjects { .. }
            | Request::PutObject { .. }
            | Request::DeleteObjects { .. }
            | Request::LinkObjects { .. }
    )
}

/// Answers a request about objects; bytes come and go as streams.
pub async fn handle(
    host: &Host,
    caller: &Caller,
    request: Request,
    body: Option<ByteStream>,
) -> Result<(Response, Option<ByteStream>)> {
    let repository = host.repository.get().await?;
    let store = repository.store();
    match request {
        Request::GetObject { key, range } => {
            let key = Key::parse(&key)?;
            // The size is promised before the bytes come.
            let (size_bytes, stream) = get_sized(store.as_ref(), &key, range).await?;
            Ok((Response::Body { size_bytes }, Some(stream)))
        }
        Request::HeadObject { key } => {
            let found = store.head(&Key::parse(&key)?).await?;
            Ok((Response::Object(found.map(facts)), None))
        }
        Request::ListObjects { prefix, after, limit } => {
            let limit = usize::try_from(limit).unwrap_or(usize::MAX);
            let found = store.list(&prefix, after.as_deref(), limit).await?;
            Ok((Response::Objects(found.into_iter().map(facts).collect()), None))
        }
        Request::PutObject { key, condition } => {
            let key = Key::parse(&key)?;
            check_owner(&repository, caller, &key).await?;
            let body = body.ok_or_else(|| {
                Error::new(Kind::BadInput, format!("cannot store object '{key}': no bytes came with the request"))
            })?;
            let tag = put(store.as_ref(), caller, &key, body, condition).await?;
            Ok((Response::Stored { tag: tag.0 }, None))
        }
        Request::DeleteObjects { keys } => {
            let keys = keys.iter().map(|key| Key::parse(key)).collect::<Result<Vec<_>>>()?;
            for key in &keys {
                check_owner(&repository, caller, key).await?;
            }
            store.delete(&keys).await?;
            Ok((Response::Done, None))
        }
        Request::LinkObjects { keys, valid_for_seconds } => {
            let keys = keys.iter().map(|key| Key::parse(key)).collect::<Result<Vec<_>>>()?;
            let Links { urls, expires_at, may_end_earlier } =
                store.presign(&keys, Duration::from_secs(valid_for_seconds)).await?;
            Ok((Response::Links { urls, expires_at, may_end_earlier }, None))
        }
        _ => Err(Error::new(Kind::Internal, "a request that is not about objects went the wrong way")),
    }
}

fn facts(info: ObjectInfo) -> ObjectFacts {
    ObjectFacts { key: info.key.to_string(), size_bytes: info.size_bytes, tag: info.tag.0 }
}

/// Small documents are put as a whole, because only that can be conditional on a tag; all else as a stream.
async fn put(store: &dyn Store, caller: &Caller, key: &Key, body: ByteStream, condition: PutWhen) -> Result<Tag> {
    /// Documents (identity, lease) are far smaller.
    const DOCUMENT_BYTES_MAX: u64 = 1 << 20;
    let is_identity = key.as_str().ends_with("/identity.json");
    // Between the look at the owner and the put somebody else may have created it: only `Create` notices that.
    if is_identity && condition != PutWhen::Create {
        let reason = format!("'{caller}' may not replace '{key}': the identity of an incarnation is written once");
        return Err(
            Error::new(Kind::Forbidden, reason).hint("a new life of an instance gets an incarnation of its own")
        );
    }
    let condition = match condition {
        PutWhen::Create => PutCondition::Create,
        PutWhen::Replace => PutCondition::Replace,
        PutWhen::IfMatch(tag) => PutCondition::IfMatch(Tag(tag)),
    };
    if !key.as_str().ends_with(".json") {
        return store.put_stream(key, body, condition).await;
    }
    let bytes: Bytes = crate::store::read::collect_body(body, DOCUMENT_BYTES_MAX, key).await?;
    if is_identity {
        let identity = parse_identity(key.as_str(), &bytes)?;
        access::may_write(caller, key.as_str(), Some(&identity))?;
    }
    store.put(key, bytes, condition).await
}

/// Refuses a write that is not below an incarnation of the caller's own host. The identity document itself may be
/// created; what it says is checked when its bytes are there.
async fn check_owner(repository: &Arc<Repository>, caller: &Caller, key: &Key) -> Result<()> {
    let refused = || access::may_write(caller, key.as_str(), None);
    let mut parts = key.as_str().split('/');
    let (Some("incarnations"), Some(id)) = (parts.next(), parts.next()) else {
        return refused();
    };
    let id = IncarnationId::parse(id)?;
    match Incarnations::new(repository.clone()).get(id).await {
        Ok(identity) => access::may_write(caller, key.as_str(), Some(&identity)),
        Err(error) if error.kind() == Kind::NotFound && key.as_str() == identity_key(id) => Ok(()),
        Err(error) if error.kind() == Kind::NotFound => refused(),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::format::document::identity_to_bytes;
    use crate::model::engine_kind::EngineKind;
    use crate::model::incarnation::Incarnation;
    use crate::store::memory::MemoryStore;
    use crate::store::read::body_from_bytes;

    fn identity_of(host: &str) -> Incarnation {
        Incarnation {
            id: IncarnationId::fresh(),
            engine: EngineKind::Fake,
            engine_version: String::from("1"),
            instance: String::from("orders"),
            host: host.to_string(),
            system_id: String::from("7"),
            began_at: Timestamp::UNIX_EPOCH,
            parent: None,
        }
    }

    async fn store_identity(
        store: &dyn Store,
        at: IncarnationId,
        identity: &Incarnation,
        condition: PutWhen,
    ) -> Result<Tag> {
        let key = Key::parse(&identity_key(at)).unwrap();
        let body = body_from_bytes(Bytes::from(identity_to_bytes(identity).unwrap()));
        put(store, &Caller::Host(String::from("b")), &key, body, condition).await
    }

    #[tokio::test]
    async fn a_host_creates_the_identities_of_its_own_instances_and_replaces_none() {
        let store = MemoryStore::new("t");
        let (own, others) = (identity_of("b"), identity_of("a"));
        let tag = store_identity(&store, own.id, &own, PutWhen::Create).await.unwrap();
        let again = store_identity(&store, own.id, &own, PutWhen::Create).await;
        assert_eq!(again.unwrap_err().kind(), Kind::Conflict);
        for condition in [PutWhen::Replace, PutWhen::IfMatch(tag.0.clone())] {
            let refusal = store_identity(&store, own.id, &own, condition).await.unwrap_err();
            assert_eq!(refusal.kind(), Kind::Forbidden);
        }
        let foreign = store_identity(&store, others.id, &others, PutWhen::Create).await;
        assert_eq!(foreign.unwrap_err().kind(), Kind::Forbidden);
        let elsewhere = store_identity(&store, others.id, &own, PutWhen::Create).await;
        assert_eq!(elsewhere.unwrap_err().kind(), Kind::Forbidden);
    }

    #[tokio::test]
    async fn before_its_identity_is_there_nothing_else_is_written_below_an_incarnation() {
        let repository = Repository::init(Arc::new(MemoryStore::new("t")), Timestamp::UNIX_EPOCH).await.unwrap();
        let (caller, id) = (Caller::Host(String::from("b")), IncarnationId::fresh());
        let check = async |key: String| check_owner(&repository, &caller, &Key::parse(&key).unwrap()).await;
        check(identity_key(id)).await.unwrap();
        for key in [format!("incarnations/{id}/log/identity.json"), format!("incarnations/{id}/lease.json")] {
            assert_eq!(check(key.clone()).await.unwrap_err().kind(), Kind::Forbidden, "{key}");
        }
        assert_eq!(check(String::from("keiki.json")).await.unwrap_err().kind(), Kind::Forbidden);
    }
}
