//! A store that fails on order: put around another one in tests, steered by a handle that the test keeps.
//!
//! Each rule says which calls it strikes (operation, part of the key, which of them counted from now) and what happens.
//! Without rules it is transparent.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};

use super::{ByteStream, Key, Links, ObjectInfo, PutCondition, Store, Tag};
use crate::error::{Error, Kind, Result};
use crate::model::capabilities::Capabilities;

/// The calls of a store that a rule can strike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Get,
    Put,
    PutStream,
    Head,
    List,
    Delete,
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The call fails with this kind and does nothing.
    Fail(Kind),
    /// The call is carried out, but its answer is an error of kind `Unreachable`, as when a connection breaks.
    AnswerLost,
    /// The body that is read, or sent by `put_stream`, ends after so many bytes in an error of kind `Unreachable`.
    CutBody(u64),
    /// The lowest bit of the byte at this offset of the body (read, or sent) is the other one.
    FlipBit(u64),
    /// The call takes so much longer.
    Delay(Duration),
}

/// Which of the matching calls are struck, counted from the moment of the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// The call with this number, from 1.
    Nth(u64),
    /// The next so many.
    First(u64),
    /// Every call whose number is a multiple of this, so that a second attempt succeeds.
    EveryNth(u64),
    Every,
}

struct Rule {
    operation: Operation,
    key_part: String,
    when: When,
    fault: Fault,
    seen: u64,
}

/// The handle by which a test steers a [`FaultyStore`]. Clones steer the same one.
#[derive(Clone, Default)]
pub struct Faults(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    calls: Vec<(Operation, String)>,
}

impl Faults {
    pub fn new() -> Faults {
        Faults::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Orders a fault for calls of `operation` on any key.
    pub fn inject(&self, operation: Operation, when: When, fault: Fault) {
        self.inject_for_key(operation, "", when, fault);
    }

    /// Orders a fault for calls of `operation` on keys (for lists: prefixes; for deletions: the first key) that hold
    /// `key_part`.
    pub fn inject_for_key(&self, operation: Operation, key_part: &str, when: When, fault: Fault) {
        self.lock().rules.push(Rule { operation, key_part: key_part.to_string(), when, fault, seen: 0 });
    }

    /// Takes back every order.
    pub fn clear(&self) {
        self.lock().rules.clear();
    }

    /// How many calls of `operation` there were so far, failed ones included.
    pub fn calls(&self, operation: Operation) -> usize {
        self.lock().calls.iter().filter(|call| call.0 == operation).count()
    }

    /// Counts a call and returns what strikes it.
    fn strike(&self, operation: Operation, key: &str) -> Vec<Fault> {
        let mut state = self.lock();
        state.calls.push((operation, key.to_string()));
        let mut faults = Vec::new();
        for rule in &mut state.rules {
            if rule.operation != operation || !key.contains(&rule.key_part) {
                continue;
            }
            rule.seen += 1;
            let is_struck = match rule.when {
                When::Nth(number) => rule.seen == number,
                When::First(count) => rule.seen <= count,
                When::EveryNth(number) => rule.seen.is_multiple_of(number),
                When::Every => true,
            };
            if is_struck {
                faults.push(rule.fault.clone());
            }
        }
        faults
    }
}

/// See the module.
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    faults: Faults,
}

impl FaultyStore {
    pub fn new(inner: Arc<dyn Store>, faults: Faults) -> FaultyStore {
        FaultyStore { inner, faults }
    }

    /// What strikes this call, after its delays; an error if it is to fail at once.
    async fn before(&self, operation: Operation, key: &str) -> Result<Vec<Fault>> {
        let faults = self.faults.strike(operation, key);
        for fault in &faults {
            match fault {
                Fault::Delay(time) => tokio::time::sleep(*time).await,
                Fault::Fail(kind) => {
                    let reason = format!("cannot {operation:?} '{key}' in {}: ordered by a test", self.describe());
                    return Err(Error::new(*kind, reason));
                }
                _ => {}
            }
        }
        Ok(faults)
    }
}

/// The outcome of a call as its caller sees it.
fn after<T>(faults: &[Fault], outcome: Result<T>) -> Result<T> {
    if faults.contains(&Fault::AnswerLost) {
        return Err(Error::new(Kind::Unreachable, "the answer was lost: ordered by a test"));
    }
    outcome
}

/// A body with the cuts and flipped bits that were ordered.
fn spoil(body: ByteStream, faults: &[Fault]) -> ByteStream {
    faults.iter().fold(body, |body, fault| match fault {
        Fault::FlipBit(at) => flip_bit(body, *at),
        Fault::CutBody(at) => cut(body, *at),
        _ => body,
    })
}

fn flip_bit(body: ByteStream, at: u64) -> ByteStream {
    let mut start = 0u64;
    Box::pin(body.map(move |piece| {
        let piece = piece?;
        let offset = at.checked_sub(start).and_then(|offset| usize::try_from(offset).ok());
        start += piece.len() as u64;
        match offset {
            Some(offset) if offset < piece.len() => {
                let mut changed = BytesMut::from(&piece[..]);
                changed[offset] ^= 1;
                Ok(changed.freeze())
            }
            _ => Ok(piece),
        }
    }))
}

fn cut(body: ByteStream, at: u64) -> ByteStream {
    Box::pin(stream::unfold(Some((body, at)), |state| async move {
        let (mut body, left) = state?;
        if left == 0 {
            return Some((Err(Error::new(Kind::Unreachable, "the body was cut: ordered by a test")), None));
        }
        match body.next().await? {
            Ok(mut piece) => {
                piece.truncate(usize::try_from(left).unwrap_or(usize::MAX).min(piece.len()));
                let left = left - piece.len() as u64;
                Some((Ok(piece), Some((body, left))))
            }
            Err(error) => Some((Err(error), None)),
        }
    }))
}

#[async_trait]
impl Store for FaultyStore {
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream> {
        let faults = self.before(Operation::Get, key.as_str()).await?;
        let body = after(&faults, self.inner.get(key, range).await)?;
        Ok(spoil(body, &faults))
    }

    async fn put(&self, key: &Key, body: Bytes, condition: PutCondition) -> Result<Tag> {
        let faults = self.before(Operation::Put, key.as_str()).await?;
        let mut bytes = BytesMut::from(&body[..]);
        for fault in &faults {
            if let Fault::FlipBit(at) = fault
                && let Some(byte) = usize::try_from(*at).ok().and_then(|at| bytes.get_mut(at))
            {
                *byte ^= 1;
            }
        }
        after(&faults, self.inner.put(key, bytes.freeze(), condition).await)
    }

    async fn put_stream(&self, key: &Key, body: ByteStream, condition: PutCondition) -> Result<Tag> {
        let faults = self.before(Operation::PutStream, key.as_str()).await?;
        after(&faults, self.inner.put_stream(key, spoil(body, &faults), condition).await)
    }

    async fn head(&self, key: &Key) -> Result<Option<ObjectInfo>> {
        let faults = self.before(Operation::Head, key.as_str()).await?;
        after(&faults, self.inner.head(key).await)
    }

    async fn list(&self, prefix: &str, after_key: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>> {
        let faults = self.before(Operation::List, prefix).await?;
        after(&faults, self.inner.list(prefix, after_key, limit).await)
    }

    async fn delete(&self, keys: &[Key]) -> Result<()> {
        let faults = self.before(Operation::Delete, keys.first().map_or("", Key::as_str)).await?;
        after(&faults, self.inner.delete(keys).await)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn probe(&self) -> Result<Option<Capabilities>> {
        self.inner.probe().await
    }

    fn adopt(&self, found: &Capabilities) {
        self.inner.adopt(found);
    }

    async fn presign(&self, keys: &[Key], valid_for: Duration) -> Result<Links> {
        self.inner.presign(keys, valid_for).await
    }
}
