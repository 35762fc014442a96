//! Counts what is asked of a store: requests by kind and bytes in both directions, since the beginning and in the last
//! hour. Requests are what object storage is billed by, so they are shown to whoever pays.
//!
//! A store that speaks to a network knows best how many requests a call takes: a streamed put is sent in parts, a body
//! that breaks is asked for again. Such a store counts by itself and gives its [`Meter`] by [`Store::meter`]; around any
//! other, [`MeteredStore`] counts each call as one request, failed ones included.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use jiff::Timestamp;

use super::{ByteStream, Key, Links, ObjectInfo, PutCondition, Store, Tag};
use crate::base::clock::Clock;
use crate::error::Result;
use crate::model::capabilities::Capabilities;
use crate::model::cost::{Reading, RequestKind, Usage};

/// Counts for one store. Counting takes a short lock and no request ever waits for anything else.
pub struct Meter {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

struct State {
    since: Timestamp,
    total: Usage,
    /// One for each minute in which something was asked, by its number since 1970, oldest first; at most sixty-one.
    minutes: VecDeque<(i64, Usage)>,
}

const MINUTES: i64 = 60;

impl Meter {
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Meter> {
        let state = State { since: clock.now(), total: Usage::default(), minutes: VecDeque::new() };
        Arc::new(Meter { clock, state: Mutex::new(state) })
    }

    /// One request was sent.
    pub fn request(&self, kind: RequestKind) {
        self.note(|usage| usage.requests[kind as usize] += 1);
    }

    /// So many bytes of a body have arrived.
    pub fn received(&self, bytes: u64) {
        self.note(|usage| usage.received_bytes += bytes);
    }

    /// So many bytes of a body were sent.
    pub fn sent(&self, bytes: u64) {
        self.note(|usage| usage.sent_bytes += bytes);
    }

    pub fn read(&self) -> Reading {
        let now = self.clock.now();
        let mut state = self.lock();
        state.forget_before(minute_of(now));
        let mut last_hour = Usage::default();
        state.minutes.iter().for_each(|(_, usage)| last_hour.add(usage));
        let age = u64::try_from(now.as_second() - state.since.as_second()).unwrap_or(0);
        Reading { since: state.since, total: state.total, last_hour, last_hour_seconds: age.clamp(1, 3600) }
    }

    fn note(&self, count: impl FnOnce(&mut Usage)) {
        let minute = minute_of(self.clock.now());
        let mut more = Usage::default();
        count(&mut more);
        let mut state = self.lock();
        state.total.add(&more);
        state.forget_before(minute);
        match state.minutes.back_mut() {
            // Also if the clock was set back: the newest minute goes on until it is reached again.
            Some((newest, usage)) if *newest >= minute => usage.add(&more),
            _ => state.minutes.push_back((minute, more)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Held for additions only, which cannot panic.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl State {
    fn forget_before(&mut self, minute: i64) {
        while self.minutes.front().is_some_and(|(oldest, _)| *oldest <= minute.saturating_sub(MINUTES)) {
            self.minutes.pop_front();
        }
    }
}

fn minute_of(now: Timestamp) -> i64 {
    now.as_second().div_euclid(60)
}

/// A store whose calls are counted. See the module.
pub struct MeteredStore {
    inner: Arc<dyn Store>,
    meter: Arc<Meter>,
}

impl MeteredStore {
    /// `store` with a meter: its own if it has one, otherwise one around it.
    pub fn around(store: Arc<dyn Store>, clock: Arc<dyn Clock>) -> (Arc<dyn Store>, Arc<Meter>) {
        if let Some(meter) = store.meter() {
            return (store, meter);
        }
        let meter = Meter::new(clock);
        (Arc::new(MeteredStore { inner: store, meter: meter.clone() }), meter)
    }
}

#[async_trait]
impl Store for MeteredStore {
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream> {
        self.meter.request(RequestKind::Get);
        let body = self.inner.get(key, range).await?;
        let meter = self.meter.clone();
        Ok(Box::pin(body.inspect(move |piece| {
            if let Ok(piece) = piece {
                meter.received(piece.len() as u64);
            }
        })))
    }

    async fn put(&self, key: &Key, body: Bytes, condition: PutCondition) -> Result<Tag> {
        self.meter.request(RequestKind::Put);
        self.meter.sent(body.len() as u64);
        self.inner.put(key, body, condition).await
    }

    async fn put_stream(&self, key: &Key, body: ByteStream, condition: PutCondition) -> Result<Tag> {
        self.meter.request(RequestKind::Put);
        let meter = self.meter.clone();
        let body = body.inspect(move |piece| {
            if let Ok(piece) = piece {
                meter.sent(piece.len() as u64);
            }
        });
        self.inner.put_stream(key, Box::pin(body), condition).await
    }

    async fn head(&self, key: &Key) -> Result<Option<ObjectInfo>> {
        self.meter.request(RequestKind::Head);
        self.inner.head(key).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>> {
        self.meter.request(RequestKind::List);
        self.inner.list(prefix, after, limit).await
    }

    async fn delete(&self, keys: &[Key]) -> Result<()> {
        self.meter.request(RequestKind::Delete);
        self.inner.delete(keys).await
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

    fn meter(&self) -> Option<Arc<Meter>> {
        Some(self.meter.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::clock::ManualClock;
    use crate::store::memory::MemoryStore;
    use crate::store::read::{body_from_bytes, read_all};

    fn site() -> (Arc<dyn Store>, Arc<Meter>, Arc<ManualClock>) {
        let clock = ManualClock::new("2026-11-21T10:00:30Z".parse().unwrap());
        let (store, meter) = MeteredStore::around(Arc::new(MemoryStore::new("t")), clock.clone());
        (store, meter, clock)
    }

    #[tokio::test]
    async fn every_call_and_every_byte_of_a_body_is_counted_once() {
        let (store, meter, clock) = site();
        let (one, two) = (Key::parse("one").unwrap(), Key::parse("two").unwrap());
        store.put(&one, Bytes::from_static(b"12345"), PutCondition::Create).await.unwrap();
        store.put(&one, Bytes::from_static(b"12345"), PutCondition::Create).await.unwrap_err();
        store.put_stream(&two, body_from_bytes(Bytes::from_static(b"1234567")), PutCondition::Create).await.unwrap();
        read_all(store.as_ref(), &two, 100).await.unwrap();
        store.head(&one).await.unwrap();
        store.list("", None, 10).await.unwrap();
        store.delete(&[one, two]).await.unwrap();
        let reading = meter.read();
        let counts = RequestKind::ALL.map(|kind| reading.total.requests(kind));
        assert_eq!(counts, [1, 1, 1, 3, 0, 1]);
        assert_eq!((reading.total.sent_bytes, reading.total.received_bytes), (17, 7));
        assert_eq!(reading.last_hour, reading.total);
        // A meter around a meter would count twice.
        let (_, same) = MeteredStore::around(store, clock);
        assert!(Arc::ptr_eq(&same, &meter));
    }

    #[tokio::test]
    async fn the_last_hour_forgets_and_the_total_does_not() {
        let (store, meter, clock) = site();
        for _ in 0..90 {
            store.list("", None, 1).await.unwrap();
            clock.advance(Duration::from_secs(60));
        }
        let reading = meter.read();
        assert_eq!(reading.total.requests(RequestKind::List), 90);
        let last = reading.last_hour.requests(RequestKind::List);
        assert!((59..=60).contains(&last), "{last}");
        assert_eq!(reading.last_hour_seconds, 3600);
        clock.advance(Duration::from_secs(3601));
        assert_eq!(meter.read().last_hour, Usage::default());
        assert_eq!(meter.read().total.all_requests(), 90);
    }

    #[tokio::test]
    async fn a_young_meter_says_how_short_its_hour_is() {
        let (_, meter, clock) = site();
        assert_eq!(meter.read().last_hour_seconds, 1);
        clock.advance(Duration::from_secs(90));
        assert_eq!(meter.read().last_hour_seconds, 90);
    }
}
