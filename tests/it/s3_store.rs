//! What a bucket's store does beyond the contract: limits, and uploads that nobody finishes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use keiki::base::clock::SystemClock;
use keiki::base::rate::RateLimit;
use keiki::base::retry::RetryPolicy;
use keiki::store::read::{body_from_bytes, read_all};
use keiki::store::s3::{Bandwidth, S3Options, S3Store};
use keiki::store::{ByteStream, Key, PutCondition, Store};

use super::support::s3::{Weed, fresh_prefix, open};
use super::support::s3_proxy::{Proxy, Weather};

fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

/// More than one part, and then nothing for ever.
fn endless() -> ByteStream {
    Box::pin(body_from_bytes(Bytes::from(vec![7; 12 << 20])).chain(stream::pending()))
}

fn small_parts(prefix: &str) -> S3Options {
    S3Options { part_bytes: 5 << 20, ..Weed::shared().options(prefix) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_connections_of_an_agent_share_its_limits() {
    let limit = |bytes_per_second: u64| Some(Arc::new(RateLimit::new(bytes_per_second)));
    let bandwidth = Bandwidth { upload: limit(1 << 20), download: limit(2 << 20) };
    let store = open(S3Options { bandwidth, ..Weed::shared().options(&fresh_prefix()) }).await;
    let began = Instant::now();
    let puts = ["a", "b"].map(|name| {
        let store = store.clone();
        async move { store.put(&key(name), Bytes::from(vec![1; 768 << 10]), PutCondition::Replace).await.unwrap() }
    });
    futures_util::future::join_all(puts).await;
    let sent = began.elapsed();
    // 1.5 MiB at 1 MiB/s and then at 2 MiB/s, less the eighth of a second that may be saved up; more is always possible.
    assert!(sent >= Duration::from_millis(1300), "{sent:?}");
    let began = Instant::now();
    let gets = ["a", "b"].map(|name| {
        let store = store.clone();
        async move { read_all(&*store, &key(name), 1 << 20).await.unwrap() }
    });
    futures_util::future::join_all(gets).await;
    assert!(began.elapsed() >= Duration::from_millis(600), "{:?}", began.elapsed());
}

/// Goal: what a writer that died left of an upload is removed by whoever opens the store later, and not too soon.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_nobody_finishes_is_aborted_when_it_is_old() {
    let prefix = fresh_prefix();
    let proxy = Proxy::start(Weed::shared().port());
    let retry = RetryPolicy { attempts_max: Some(1), ..RetryPolicy::brief() };
    let through = S3Options { endpoint: Some(proxy.endpoint()), retry, ..small_parts(&prefix) };
    let dying = S3Store::open(through, Arc::new(SystemClock)).await.unwrap();
    let name = key("unfinished");
    let mut put = dying.put_stream(&name, endless(), PutCondition::Create);
    // Long enough for the first parts, and at least for the begin.
    assert!(tokio::time::timeout(Duration::from_secs(4), &mut put).await.is_err());
    // A writer that dies cannot say so.
    proxy.set(Weather::Refuse);
    drop(put);

    let store = open(small_parts(&prefix)).await;
    assert_eq!(store.abort_stale_uploads().await.unwrap(), 0, "somebody may still be working on it");
    assert_eq!(store.abort_uploads_older_than(Duration::from_secs(1)).await.unwrap(), 1);
    assert_eq!(store.abort_uploads_older_than(Duration::from_secs(1)).await.unwrap(), 0);
    assert_eq!(store.head(&name).await.unwrap(), None);
}
