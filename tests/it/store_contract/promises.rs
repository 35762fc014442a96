//! The promises of a store, each as a function of a fresh one.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use keiki::error::{Error, Kind};
use keiki::store::read::{body_from_bytes, get_optional, list_all, read_all, read_range};
use keiki::store::{ByteStream, PutCondition, Store, Tag};
use tokio::task::JoinSet;

use super::{key, noise};

const ANY_SIZE: u64 = 1 << 30;

async fn put(store: &dyn Store, name: &str, body: &Bytes, condition: PutCondition) -> Tag {
    store.put(&key(name), body.clone(), condition).await.unwrap()
}

async fn all_keys(store: &dyn Store, prefix: &str, after: Option<&str>) -> Vec<String> {
    let pages: Vec<_> = list_all(store, prefix, after).collect().await;
    pages.into_iter().flat_map(Result::unwrap).map(|object| object.key.to_string()).collect()
}

pub async fn what_is_put_is_read_and_found(store: Arc<dyn Store>) {
    for (name, size) in [("empty", 0), ("a/small", 7), ("a/b/c/large", 2_500_000)] {
        let body = noise(size, 1);
        let tag = put(&*store, name, &body, PutCondition::Create).await;
        assert_eq!(read_all(&*store, &key(name), ANY_SIZE).await.unwrap(), body);
        let known = store.head(&key(name)).await.unwrap().unwrap();
        assert_eq!((known.key, known.size_bytes, known.tag), (key(name), size as u64, tag));
        assert_eq!(store.head(&key(name)).await.unwrap(), store.list(name, None, 1).await.unwrap().pop());
    }
    let mut body = store.get(&key("a/b/c/large"), None).await.unwrap();
    while let Some(piece) = body.next().await {
        assert!(piece.unwrap().len() <= 1 << 20);
    }
    assert!(!store.describe().is_empty());
}

pub async fn a_range_gives_exactly_its_bytes_and_a_wrong_one_is_refused(store: Arc<dyn Store>) {
    let body = noise(5_000_000, 2);
    let name = key("pack/1");
    put(&*store, name.as_str(), &body, PutCondition::Create).await;
    let ranges: [Range<usize>; 8] = [
        0..5_000_000,
        0..0,
        5_000_000..5_000_000,
        17..17,
        0..1,
        4_999_999..5_000_000,
        1_000_000..4_500_000,
        1_048_575..1_048_577,
    ];
    for range in ranges {
        let bytes = read_range(&*store, &name, range.start as u64..range.end as u64).await.unwrap();
        assert_eq!(bytes, body.slice(range.clone()), "{range:?}");
    }
    let backwards = Range { start: 5, end: 4 };
    for wrong in [0..5_000_001, 5_000_000..5_000_001, 6_000_000..6_000_000, 3..u64::MAX, backwards] {
        let outcome = read_range(&*store, &name, wrong.clone()).await;
        assert_eq!(outcome.unwrap_err().kind(), Kind::BadInput, "{wrong:?}");
    }
}

pub async fn a_replaced_object_has_another_tag_each_time(store: Arc<dyn Store>) {
    let mut tags = BTreeSet::new();
    for round in 0..40u64 {
        // The same size, at once after each other: a tag made of size and clock alone would repeat itself.
        let body = noise(100, round);
        let tag = put(&*store, "lease", &body, PutCondition::Replace).await;
        assert_eq!(read_all(&*store, &key("lease"), 100).await.unwrap(), body);
        assert!(tags.insert(tag.0), "round {round}");
    }
}

pub async fn what_is_not_there_is_not_found_and_may_be_deleted(store: Arc<dyn Store>) {
    put(&*store, "a/b", &noise(3, 3), PutCondition::Create).await;
    put(&*store, "a/c/d", &noise(3, 3), PutCondition::Create).await;
    for name in ["none", "a/none", "x/y/z", "a/c"] {
        assert_eq!(store.get(&key(name), None).await.err().unwrap().kind(), Kind::NotFound);
        assert_eq!(store.get(&key(name), Some(0..1)).await.err().unwrap().kind(), Kind::NotFound);
        assert_eq!(store.head(&key(name)).await.unwrap(), None);
        assert_eq!(get_optional(&*store, &key(name), 1).await.unwrap(), None);
    }
    store.delete(&[key("none"), key("a/b"), key("x/y"), key("a/b")]).await.unwrap();
    store.delete(&[]).await.unwrap();
    assert_eq!(all_keys(&*store, "", None).await, ["a/c/d"]);
    store.delete(&[key("a/c/d")]).await.unwrap();
    assert!(all_keys(&*store, "", None).await.is_empty());
    assert!(all_keys(&*store, "a/c/", None).await.is_empty());
    // Where the last object went, a new one can come; and a name that led to others can be an object now, or is still
    // refused as one.
    put(&*store, "a/c/d", &noise(3, 4), PutCondition::Create).await;
    store.delete(&[key("a/c/d")]).await.unwrap();
    match store.put(&key("a/c"), noise(3, 4), PutCondition::Create).await {
        Ok(_) => assert_eq!(read_all(&*store, &key("a/c"), 3).await.unwrap(), noise(3, 4)),
        Err(error) => assert_eq!(error.kind(), Kind::Conflict, "{error}"),
    }
}

pub async fn of_racing_creates_one_wins_and_its_bytes_stay(store: Arc<dyn Store>) {
    for round in 0..5 {
        let name = key(&format!("race/{round}/claim"));
        let mut tasks = JoinSet::new();
        for writer in 0..16u64 {
            let (store, name) = (store.clone(), name.clone());
            tasks.spawn(async move {
                let body = noise(10_000, writer);
                let outcome = if writer % 2 == 0 {
                    store.put(&name, body, PutCondition::Create).await
                } else {
                    store.put_stream(&name, body_from_bytes(body), PutCondition::Create).await
                };
                (writer, outcome)
            });
        }
        let mut winners = Vec::new();
        while let Some(done) = tasks.join_next().await {
            match done.unwrap() {
                (writer, Ok(tag)) => winners.push((writer, tag)),
                (_, Err(error)) => assert_eq!(error.kind(), Kind::Conflict, "{error}"),
            }
        }
        assert_eq!(winners.len(), 1);
        let (writer, tag) = winners.pop().unwrap();
        assert_eq!(read_all(&*store, &name, ANY_SIZE).await.unwrap(), noise(10_000, writer));
        assert_eq!(store.head(&name).await.unwrap().unwrap().tag, tag);
    }
}

pub async fn of_racing_if_match_puts_one_wins(store: Arc<dyn Store>) {
    let name = key("lease");
    let mut tag = put(&*store, "lease", &noise(50, 99), PutCondition::Create).await;
    // No bytes come twice: a tag may say nothing about a replacement by the same ones.
    for round in 1..=5 {
        let mut tasks = JoinSet::new();
        for writer in 0..16u64 {
            let (store, name, tag) = (store.clone(), name.clone(), tag.clone());
            tasks.spawn(async move {
                (writer, store.put(&name, noise(50, round * 100 + writer), PutCondition::IfMatch(tag)).await)
            });
        }
        let mut winners = Vec::new();
        while let Some(done) = tasks.join_next().await {
            match done.unwrap() {
                (writer, Ok(tag)) => winners.push((writer, tag)),
                (_, Err(error)) => assert_eq!(error.kind(), Kind::Conflict, "{error}"),
            }
        }
        assert_eq!(winners.len(), 1);
        let (writer, new) = winners.pop().unwrap();
        assert_eq!(read_all(&*store, &name, 50).await.unwrap(), noise(50, round * 100 + writer));
        tag = new;
    }
}

pub async fn an_if_match_put_fails_when_the_object_changed_or_went(store: Arc<dyn Store>) {
    let name = key("x/lease");
    let old = put(&*store, "x/lease", &noise(9, 1), PutCondition::Create).await;
    let new = put(&*store, "x/lease", &noise(9, 2), PutCondition::IfMatch(old.clone())).await;
    let refused = store.put(&name, noise(9, 3), PutCondition::IfMatch(old)).await;
    assert_eq!(refused.unwrap_err().kind(), Kind::Conflict);
    assert_eq!(read_all(&*store, &name, 9).await.unwrap(), noise(9, 2));
    store.delete(std::slice::from_ref(&name)).await.unwrap();
    let refused = store.put(&name, noise(9, 4), PutCondition::IfMatch(new)).await;
    assert_eq!(refused.unwrap_err().kind(), Kind::Conflict);
    assert_eq!(store.head(&name).await.unwrap(), None);
}

/// Names whose order in directories is not their order as keys.
fn awkward_keys() -> BTreeSet<String> {
    let directories = ["a", "a-", "a-b", "a.b", "a0", "aa", "A", "a_", "z", "a/b", "a/b-", "a/b/c", "a-b/c.d"];
    let mut keys = BTreeSet::new();
    for directory in directories {
        for number in 0..192 {
            keys.insert(format!("{directory}/{}{number}", ["f", "f-", "f.", "F_"][number % 4]));
        }
    }
    for single in ["a-x", "a.", "a-b.", "a00", "0", "_", "-", "a/b-x", "a/b.", "a/b0", "ZZ", "zz"] {
        keys.insert(single.to_string());
    }
    keys.insert(format!("long/{}", "n".repeat(250)));
    keys
}

pub async fn a_listing_has_every_key_once_in_byte_order_from_any_start(store: Arc<dyn Store>) {
    let keys = awkward_keys();
    assert!(keys.len() > 2500);
    let puts = stream::iter(&keys).map(|name| {
        let store = store.clone();
        async move { store.put(&key(name), Bytes::from_static(b"x"), PutCondition::Create).await.unwrap() }
    });
    puts.buffer_unordered(32).collect::<Vec<_>>().await;
    let wanted = |prefix: &str, after: Option<&str>| -> Vec<String> {
        let is_later = |key: &String| after.is_none_or(|after| key.as_str() > after);
        keys.iter().filter(|key| key.starts_with(prefix) && is_later(key)).cloned().collect()
    };
    for prefix in
        ["", "a", "a-", "a/", "a/b", "a/b-", "a/b/c/f", "A/", "zz", "long/nn", "none", "a-b/c.d/F_1", "/", "..", "a/.."]
    {
        assert_eq!(all_keys(&*store, prefix, None).await, wanted(prefix, None), "prefix '{prefix}'");
        for after in ["", "a", "a-b", "a/", "a/b/c/f-101", "a/b0", "a-b/c.d/zz", "~", "A/F_9", prefix] {
            let listed = all_keys(&*store, prefix, Some(after)).await;
            assert_eq!(listed, wanted(prefix, Some(after)), "prefix '{prefix}' after '{after}'");
        }
    }
    assert_eq!(store.list("", None, usize::MAX).await.unwrap().len(), 1000);
    assert!(store.list("", None, 0).await.unwrap().is_empty());
    let mut after = String::new();
    let mut small_pages = Vec::new();
    loop {
        let page = store.list("a-", Some(&after), 97).await.unwrap();
        assert!(page.len() <= 97);
        let is_last = page.len() < 97;
        after = page.last().map_or(after, |last| last.key.to_string());
        small_pages.extend(page.into_iter().map(|object| object.key.to_string()));
        if is_last {
            break;
        }
    }
    // A page that is not full is the last one.
    assert_eq!(small_pages, wanted("a-", None));
}

/// `pieces` pieces of 256 KiB, and then an error, or the end.
fn long_body(pieces: u64, error: Option<Error>) -> ByteStream {
    let pieces = stream::iter(0..pieces).map(|number| Ok(noise(256 << 10, number)));
    Box::pin(pieces.chain(stream::iter(error.map(Err))))
}

pub async fn a_streamed_object_is_whole(store: Arc<dyn Store>) {
    let name = key("packs/large");
    let tag = store.put_stream(&name, long_body(80, None), PutCondition::Create).await.unwrap();
    let known = store.head(&name).await.unwrap().unwrap();
    assert_eq!((known.size_bytes, known.tag), (20 << 20, tag));
    let bytes = read_all(&*store, &name, ANY_SIZE).await.unwrap();
    for (number, piece) in bytes.chunks(256 << 10).enumerate() {
        assert!(piece == noise(256 << 10, number as u64), "piece {number}");
    }
    let again = store.put_stream(&name, body_from_bytes(noise(5, 5)), PutCondition::Create).await;
    assert_eq!(again.unwrap_err().kind(), Kind::Conflict);
    store.put_stream(&name, body_from_bytes(Bytes::new()), PutCondition::Replace).await.unwrap();
    assert_eq!(read_all(&*store, &name, ANY_SIZE).await.unwrap(), Bytes::new());
}

pub async fn a_stream_that_fails_stores_nothing(store: Arc<dyn Store>) {
    let broken = || Error::new(Kind::Damaged, "the database file cannot be read");
    let outcome = store.put_stream(&key("p/new"), long_body(80, Some(broken())), PutCondition::Create).await;
    assert_eq!(outcome.unwrap_err(), broken());
    let old = noise(10, 6);
    put(&*store, "old", &old, PutCondition::Create).await;
    let outcome = store.put_stream(&key("old"), long_body(1, Some(broken())), PutCondition::Replace).await;
    assert_eq!(outcome.unwrap_err(), broken());
    assert_eq!(read_all(&*store, &key("old"), 10).await.unwrap(), old);
    assert_eq!(all_keys(&*store, "", None).await, ["old"]);
}

pub async fn a_stream_that_is_given_up_stores_nothing(store: Arc<dyn Store>) {
    let endless = Box::pin(long_body(4, None).chain(stream::pending()));
    let name = key("p/given-up");
    let put = store.put_stream(&name, endless, PutCondition::Create);
    assert!(tokio::time::timeout(Duration::from_millis(100), put).await.is_err());
    assert!(all_keys(&*store, "", None).await.is_empty());
}

pub async fn a_reader_sees_the_old_or_the_new_object_and_never_a_mixture(store: Arc<dyn Store>) {
    let body = |round: usize| Bytes::from(vec![round as u8; 600_000 + round * 100_000]);
    put(&*store, "state", &body(0), PutCondition::Replace).await;
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for round in 1..30 {
                put(&*store, "state", &body(round), PutCondition::Replace).await;
            }
        }
    });
    while !writer.is_finished() {
        match read_all(&*store, &key("state"), ANY_SIZE).await {
            Ok(bytes) => assert!(bytes == body(usize::from(bytes[0])), "{} bytes of {}", bytes.len(), bytes[0]),
            // A connection that breaks while the object is replaced: refused is right, mixed would be wrong.
            Err(error) => assert_eq!(error.kind(), Kind::Conflict, "{error}"),
        }
    }
    writer.await.unwrap();
    assert!(read_all(&*store, &key("state"), ANY_SIZE).await.unwrap() == body(29));
}
