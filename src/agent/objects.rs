//! This agent's repository, for hosts that have no access of their own. Reading is free for whom the rules allow it;
//! writing reaches only incarnations that belong to the caller's own host, whatever the rules say.

use bytes::Bytes;

use crate::agent::host::Host;
use crate::error::{Error, Kind, Result};
use crate::format::document::parse_identity;
use crate::model::id::IncarnationId;
use crate::peer::access::{self, Caller};
use crate::peer::api::{ObjectFacts, PutWhen, Request, Response};
use crate::repo::incarnations::Incarnations;
use crate::store::read::get_sized;
use crate::store::{ByteStream, Key, ObjectInfo, PutCondition, Store, Tag};

/// Whether a request belongs here.
pub fn is_about_objects(request: &Request) -> bool {
    matches!(
        request,
        Request::GetObject { .. }
            | Request::HeadObject { .. }
            | Request::ListObjects { .. }
            | Request::PutObject { .. }
            | Request::DeleteObjects { .. }
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
            check_owner(host, caller, &key).await?;
            let body = body.ok_or_else(|| {
                Error::new(Kind::BadInput, format!("cannot store object '{key}': no bytes came with the request"))
            })?;
            let tag = put(store.as_ref(), caller, &key, body, condition).await?;
            Ok((Response::Stored { tag: tag.0 }, None))
        }
        Request::DeleteObjects { keys } => {
            let keys = keys.iter().map(|key| Key::parse(key)).collect::<Result<Vec<_>>>()?;
            for key in &keys {
                check_owner(host, caller, key).await?;
            }
            store.delete(&keys).await?;
            Ok((Response::Done, None))
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
    let condition = match condition {
        PutWhen::Create => PutCondition::Create,
        PutWhen::Replace => PutCondition::Replace,
        PutWhen::IfMatch(tag) => PutCondition::IfMatch(Tag(tag)),
    };
    if !key.as_str().ends_with(".json") {
        return store.put_stream(key, body, condition).await;
    }
    let bytes: Bytes = crate::store::read::collect_body(body, DOCUMENT_BYTES_MAX, key).await?;
    if key.as_str().ends_with("/identity.json") {
        let identity = parse_identity(key.as_str(), &bytes)?;
        access::may_write(caller, key.as_str(), Some(&identity))?;
    }
    store.put(key, bytes, condition).await
}

/// Refuses a write that is not below an incarnation of the caller's own host. The identity document itself may be
/// created; what it says is checked when its bytes are there.
async fn check_owner(host: &Host, caller: &Caller, key: &Key) -> Result<()> {
    let refused = || access::may_write(caller, key.as_str(), None);
    let mut parts = key.as_str().split('/');
    let (Some("incarnations"), Some(id)) = (parts.next(), parts.next()) else {
        return refused();
    };
    let id = IncarnationId::parse(id)?;
    match Incarnations::new(host.repository.get().await?).get(id).await {
        Ok(identity) => access::may_write(caller, key.as_str(), Some(&identity)),
        Err(error) if error.kind() == Kind::NotFound && key.as_str().ends_with("/identity.json") => Ok(()),
        Err(error) if error.kind() == Kind::NotFound => refused(),
        Err(error) => Err(error),
    }
}
