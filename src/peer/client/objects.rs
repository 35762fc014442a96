//! The repository of another agent, as a store.
//!
//! Each call is one request on a connection of its own from the client's pool, so several bodies can move at the same
//! time. Nothing is repeated here: `store::peer::PeerStore` does that on top.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::Client;
use crate::error::{Error, Kind, Result};
use crate::model::capabilities::Capabilities;
use crate::peer::api::{ObjectFacts, PutWhen, Request, Response};
use crate::store::read::body_from_bytes;
use crate::store::{ByteStream, Key, Links, ObjectInfo, PutCondition, Store, Tag};

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct PeerObjects {
    client: Arc<Client>,
    host: String,
    /// The agent that `client` reaches asks the one of `host`.
    is_forwarded: bool,
}

impl PeerObjects {
    /// The repository behind the agent of `host`, which `client` reaches.
    pub fn new(client: Arc<Client>, host: &str) -> PeerObjects {
        PeerObjects { client, host: host.to_string(), is_forwarded: false }
    }

    /// The repository behind the agent of `host`, which the agent asks that `client` reaches. For reading only.
    pub fn through(client: Arc<Client>, host: &str) -> PeerObjects {
        PeerObjects { client, host: host.to_string(), is_forwarded: true }
    }

    fn request(&self, request: Request) -> Request {
        match self.is_forwarded {
            true => Request::Forward { host: self.host.clone(), request: Box::new(request) },
            false => request,
        }
    }

    fn unexpected(&self, response: &Response) -> Error {
        let answer = format!("{response:?}");
        let answer = answer.split(['(', ' ', '{']).next().unwrap_or("something else");
        Error::new(Kind::Damaged, format!("{} answered with '{answer}'", self.client.describe()))
            .hint("install the same version of keiki on both hosts")
    }

    fn info(&self, facts: ObjectFacts) -> Result<ObjectInfo> {
        let key = Key::parse(&facts.key).map_err(|error| {
            error.while_doing(format!("{} listed a wrong key", self.client.describe())).with_kind(Kind::Damaged)
        })?;
        Ok(ObjectInfo { key, size_bytes: facts.size_bytes, tag: Tag(facts.tag) })
    }

    async fn send(&self, key: &Key, body: ByteStream, bytes: Option<u64>, condition: PutWhen) -> Result<Tag> {
        if self.is_forwarded {
            let reason = format!("cannot store '{key}' through two agents");
            return Err(Error::new(Kind::Unsupported, reason).hint("ask the agent that has the repository"));
        }
        let request = Request::PutObject { key: key.to_string(), condition };
        match self.client.ask_with_body(request, body, bytes).await? {
            Response::Stored { tag } => Ok(Tag(tag)),
            other => Err(self.unexpected(&other)),
        }
    }
}

fn when(condition: PutCondition) -> PutWhen {
    match condition {
        PutCondition::Create => PutWhen::Create,
        PutCondition::Replace => PutWhen::Replace,
        PutCondition::IfMatch(tag) => PutWhen::IfMatch(tag.0),
    }
}

#[async_trait]
impl Store for PeerObjects {
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream> {
        let wanted_bytes = range.as_ref().map(|range| range.end.saturating_sub(range.start));
        let request = Request::GetObject { key: key.to_string(), range };
        let (size_bytes, body) = self.client.ask_for_body(self.request(request)).await?;
        if wanted_bytes.is_some_and(|wanted| wanted != size_bytes) {
            let message = format!("{} gave {size_bytes} bytes of '{key}', which were not asked for", self.describe());
            return Err(Error::new(Kind::Damaged, message));
        }
        Ok(body)
    }

    async fn put(&self, key: &Key, body: Bytes, condition: PutCondition) -> Result<Tag> {
        let bytes = body.len() as u64;
        self.send(key, body_from_bytes(body), Some(bytes), when(condition)).await
    }

    async fn put_stream(&self, key: &Key, body: ByteStream, condition: PutCondition) -> Result<Tag> {
        if let PutCondition::IfMatch(_) = condition {
            let message = format!("cannot store '{key}': a stream cannot depend on what is there");
            return Err(Error::new(Kind::Unsupported, message));
        }
        self.send(key, body, None, when(condition)).await
    }

    async fn head(&self, key: &Key) -> Result<Option<ObjectInfo>> {
        match self.client.ask(self.request(Request::HeadObject { key: key.to_string() })).await? {
            Response::Object(facts) => facts.map(|facts| self.info(facts)).transpose(),
            other => Err(self.unexpected(&other)),
        }
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>> {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let request = Request::ListObjects { prefix: prefix.to_string(), after: after.map(str::to_string), limit };
        match self.client.ask(self.request(request)).await? {
            Response::Objects(facts) => facts.into_iter().map(|facts| self.info(facts)).collect(),
            other => Err(self.unexpected(&other)),
        }
    }

    async fn delete(&self, keys: &[Key]) -> Result<()> {
        // One message holds a thousand keys of any length.
        for keys in keys.chunks(crate::store::LIST_PAGE_OBJECTS_MAX) {
            let keys = keys.iter().map(Key::to_string).collect();
            match self.client.ask(self.request(Request::DeleteObjects { keys })).await? {
                Response::Done => {}
                other => return Err(self.unexpected(&other)),
            }
        }
        Ok(())
    }

    fn describe(&self) -> String {
        format!("peer://{}", self.host)
    }

    async fn probe(&self) -> Result<Option<Capabilities>> {
        // The agent that owns the repository has done so.
        Ok(None)
    }

    fn adopt(&self, _: &Capabilities) {}

    async fn presign(&self, keys: &[Key], valid_for: Duration) -> Result<Links> {
        let keys = keys.iter().map(Key::to_string).collect();
        let request = Request::LinkObjects { keys, valid_for_seconds: valid_for.as_secs() };
        match self.client.ask(self.request(request)).await? {
            Response::Links { urls, expires_at, may_end_earlier } => Ok(Links { urls, expires_at, may_end_earlier }),
            other => Err(self.unexpected(&other)),
        }
    }
}
