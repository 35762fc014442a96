//! A repository that is reached through another agent.
//!
//! The agent that owns the repository answers the calls of the port one by one, so what carries them (one layer up, over
//! mutual TLS) is a [`Store`] itself: the *carrier*. Connections between agents break and agents restart in the middle
//! of a clone of terabytes; what this store adds to its carrier is that such breaks are not noticed:
//! * Calls that fail with a temporary error are made again, as the policy says.
//! * A body that breaks is resumed at the byte where it broke; no byte comes twice and none is left out. An object read
//!   whole is looked at before and again when it is resumed; if it was replaced meanwhile the error is `Conflict`, so
//!   nobody reads half of the one and half of the other. Reading ranges is for objects that are never replaced.
//! * A put whose answer was lost and that then meets `Conflict` reads the object: if its bytes are those of the put, it
//!   was our own and the put succeeded. So what is put under a condition must name its writer, if writers can race.
//! * A `put_stream` cannot be made again here, as its body is used up: its caller does it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use tokio_util::sync::CancellationToken;

use super::read::get_optional;
use super::{ByteStream, Key, Links, ObjectInfo, PutCondition, Store, Tag};
use crate::base::clock::Clock;
use crate::base::retry::{RetryPolicy, retry};
use crate::error::{Error, Kind, Result};
use crate::model::capabilities::Capabilities;

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct PeerStore {
    carrier: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    policy: RetryPolicy,
}

/// A body that is being read, and how to go on with it when it breaks.
struct Resumable {
    store: PeerStore,
    key: Key,
    /// The next byte that the consumer gets, and the end.
    rest: Range<u64>,
    /// What the object was when the reading began; nothing for ranges, which are of objects that do not change.
    tag: Option<Tag>,
    body: Option<ByteStream>,
    /// The body is the first one of an object read whole: it may be another object than the one that was looked at, and
    /// then has another size; but it is one object up to its own end.
    is_whole: bool,
    /// Breaks since the last piece that arrived.
    breaks: u32,
    is_over: bool,
}

impl PeerStore {
    /// A store over `carrier`, which makes calls again by `policy`. Messages name the carrier.
    pub fn over(carrier: Arc<dyn Store>, clock: Arc<dyn Clock>, policy: RetryPolicy) -> PeerStore {
        PeerStore { carrier, clock, policy }
    }

    /// Makes a call until it is answered. To cancel it, drop the future.
    async fn ask<T, F, Attempt>(&self, what: String, call: F) -> Result<T>
    where
        F: FnMut() -> Attempt,
        Attempt: Future<Output = Result<T>>,
    {
        retry(&*self.clock, &self.policy, &CancellationToken::new(), &what, call).await
    }

    async fn get_once(&self, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream> {
        let what = format!("cannot read '{key}' in {}", self.describe());
        self.ask(what, || self.carrier.get(key, range.clone())).await
    }

    async fn put_again(&self, key: &Key, body: &Bytes, condition: &PutCondition) -> Result<Tag> {
        let answer_was_lost = AtomicBool::new(false);
        let put = || async {
            let outcome = self.carrier.put(key, body.clone(), condition.clone()).await;
            if outcome.as_ref().is_err_and(Error::is_temporary) {
                answer_was_lost.store(true, Ordering::Relaxed);
            }
            outcome
        };
        let outcome = self.ask(format!("cannot store '{key}' in {}", self.describe()), put).await;
        let is_conflict = outcome.as_ref().is_err_and(|error| error.kind() == Kind::Conflict);
        if !is_conflict || !answer_was_lost.load(Ordering::Relaxed) {
            return outcome;
        }
        // The tag is read before and after the bytes, so that it is the tag of these bytes.
        let before = self.head(key).await?;
        let stored = get_optional(self, key, body.len() as u64).await;
        let after = self.head(key).await?;
        match (stored, before, after) {
            (Ok(Some(stored)), Some(before), Some(after)) if stored == *body && before.tag == after.tag => {
                Ok(after.tag)
            }
            // A larger object is not ours.
            (Err(error), ..) if error.kind() != Kind::Damaged => Err(error),
            _ => outcome,
        }
    }
}

impl Resumable {
    /// The next piece; nothing at the end.
    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if self.body.is_none() {
                if self.rest.start < self.rest.end {
                    self.body = Some(self.store.get_once(&self.key, Some(self.rest.clone())).await?);
                }
                // After the body was opened: the object may be replaced at any moment before that.
                self.check_unchanged().await?;
            }
            let left = self.rest.end.saturating_sub(self.rest.start);
            if left == 0 && !self.is_whole {
                return Ok(None);
            }
            let piece = match &mut self.body {
                Some(body) => body.next().await,
                None => None,
            };
            let error = match piece {
                Some(Ok(piece)) if piece.len() as u64 > left && !self.is_whole => {
                    let reason = format!("cannot read '{}': more bytes came than were asked for", self.key);
                    return Err(Error::new(Kind::Damaged, reason));
                }
                Some(Ok(piece)) if piece.is_empty() => continue,
                Some(Ok(piece)) => {
                    self.rest.start += piece.len() as u64;
                    self.breaks = 0;
                    return Ok(Some(piece));
                }
                Some(Err(error)) => error,
                None if self.is_whole => return Ok(None),
                None => Error::new(Kind::Unreachable, format!("cannot read '{}': its body ended too early", self.key)),
            };
            self.break_off(error).await?;
        }
    }

    /// Waits after a break that may pass; returns the error if it may not, or if there were too many.
    async fn break_off(&mut self, error: Error) -> Result<()> {
        self.body = None;
        self.is_whole = false;
        self.breaks = self.breaks.saturating_add(1);
        let policy = &self.store.policy;
        if !error.is_temporary() || policy.attempts_max.is_some_and(|most| self.breaks >= most) {
            return Err(error);
        }
        tracing::debug!(key = %self.key, at = self.rest.start, "resuming a body that broke: {error}");
        self.store.clock.sleep(policy.wait_after(self.breaks)).await;
        Ok(())
    }

    /// With the same tag before the first body was opened and now, all bodies that were opened are of this object.
    async fn check_unchanged(&mut self) -> Result<()> {
        let Some(tag) = &self.tag else { return Ok(()) };
        let now = self.store.head(&self.key).await?;
        if now.is_some_and(|known| known.tag == *tag) {
            return Ok(());
        }
        let reason = format!("cannot read '{}': it was replaced while it was read", self.key);
        Err(Error::new(Kind::Conflict, reason).hint("read it again"))
    }
}

#[async_trait]
impl Store for PeerStore {
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream> {
        let (rest, tag) = match &range {
            Some(range) => (range.clone(), None),
            None => match self.head(key).await? {
                Some(known) => (0..known.size_bytes, Some(known.tag)),
                None => {
                    let reason = format!("cannot read '{key}' in {}: no such object", self.describe());
                    return Err(Error::new(Kind::NotFound, reason));
                }
            },
        };
        let body = Some(self.get_once(key, range).await?);
        let (store, key, is_whole) = (self.clone(), key.clone(), tag.is_some());
        let state = Resumable { store, key, rest, tag, body, is_whole, breaks: 0, is_over: false };
        Ok(Box::pin(stream::unfold(state, |mut state| async move {
            if state.is_over {
                return None;
            }
            let piece = state.next().await.transpose()?;
            state.is_over = piece.is_err();
            Some((piece, state))
        })))
    }

    async fn put(&self, key: &Key, body: Bytes, condition: PutCondition) -> Result<Tag> {
        self.put_again(key, &body, &condition).await
    }

    async fn put_stream(&self, key: &Key, body: ByteStream, condition: PutCondition) -> Result<Tag> {
        self.carrier.put_stream(key, body, condition).await
    }

    async fn head(&self, key: &Key) -> Result<Option<ObjectInfo>> {
        self.ask(format!("cannot look at '{key}' in {}", self.describe()), || self.carrier.head(key)).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>> {
        let what = format!("cannot list '{prefix}' in {}", self.describe());
        self.ask(what, || self.carrier.list(prefix, after, limit)).await
    }

    async fn delete(&self, keys: &[Key]) -> Result<()> {
        self.ask(format!("cannot delete in {}", self.describe()), || self.carrier.delete(keys)).await
    }

    fn describe(&self) -> String {
        self.carrier.describe()
    }

    async fn probe(&self) -> Result<Option<Capabilities>> {
        self.carrier.probe().await
    }

    fn adopt(&self, found: &Capabilities) {
        self.carrier.adopt(found);
    }

    async fn presign(&self, keys: &[Key], valid_for: Duration) -> Result<Links> {
        let what = format!("cannot make links to objects of {}", self.describe());
        self.ask(what, || self.carrier.presign(keys, valid_for)).await
    }
}
