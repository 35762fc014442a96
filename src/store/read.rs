//! Reading and writing made easy, beside the port: whole small objects, exact ranges, every page of a listing.

use std::ops::Range;
use std::pin::Pin;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, stream};

use super::{ByteStream, Key, LIST_PAGE_OBJECTS_MAX, ObjectInfo, Store};
use crate::error::{Error, Kind, Result};

/// Pieces of bodies are not larger where this crate makes them.
pub const PIECE_BYTES_MAX: usize = 1 << 20;

/// A body of bytes that are in memory, in pieces that share them.
pub fn body_from_bytes(bytes: Bytes) -> ByteStream {
    Box::pin(stream::unfold(bytes, |mut rest| async move {
        if rest.is_empty() {
            return None;
        }
        let piece = rest.split_to(rest.len().min(PIECE_BYTES_MAX));
        Some((Ok(piece), rest))
    }))
}

/// All bytes of a body that has at most `bytes_max`; a longer one is an error of kind `Damaged`, because whoever asks
/// like this knows how large a good object can be.
pub async fn collect_body(mut body: ByteStream, bytes_max: u64, key: &Key) -> Result<Bytes> {
    let mut first: Option<Bytes> = None;
    let mut all = BytesMut::new();
    let mut total = 0u64;
    while let Some(piece) = body.next().await {
        let piece = piece?;
        total = total.saturating_add(piece.len() as u64);
        if total > bytes_max {
            let reason = format!("cannot read '{key}': it is larger than {bytes_max} bytes, which no such object is");
            return Err(Error::new(Kind::Damaged, reason));
        }
        // A body of one piece, the usual case, is not copied.
        match first.take() {
            None if all.is_empty() => first = Some(piece),
            None => all.extend_from_slice(&piece),
            Some(start) => {
                all.extend_from_slice(&start);
                all.extend_from_slice(&piece);
            }
        }
    }
    Ok(first.unwrap_or_else(|| all.freeze()))
}

/// The whole of an object of at most `bytes_max`.
pub async fn read_all(store: &dyn Store, key: &Key, bytes_max: u64) -> Result<Bytes> {
    collect_body(store.get(key, None).await?, bytes_max, key).await
}

/// The whole of an object of at most `bytes_max`, or nothing if there is none.
pub async fn get_optional(store: &dyn Store, key: &Key, bytes_max: u64) -> Result<Option<Bytes>> {
    match read_all(store, key, bytes_max).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A body whose size is known before its bytes come: of a range, or of the whole object as it is now. `NotFound` if
/// there is none.
///
/// An object may be replaced between the question for its size and the body. Only if it is still the same afterwards
/// does the body belong to the size; else both are asked for again.
pub async fn get_sized(store: &dyn Store, key: &Key, range: Option<Range<u64>>) -> Result<(u64, ByteStream)> {
    if let Some(range) = range {
        let size_bytes = range.end.saturating_sub(range.start);
        return Ok((size_bytes, store.get(key, Some(range)).await?));
    }
    /// Replaced objects are small documents with one writer: this many replacements in a row do not happen.
    const ATTEMPTS_MAX: usize = 100;
    for _ in 0..ATTEMPTS_MAX {
        let missing = || Error::new(Kind::NotFound, format!("cannot read '{key}': there is none"));
        let before = store.head(key).await?.ok_or_else(missing)?;
        let body = store.get(key, Some(0..before.size_bytes)).await;
        if store.head(key).await?.is_some_and(|after| after.tag == before.tag) {
            return Ok((before.size_bytes, body?));
        }
    }
    Err(Error::new(Kind::Unreachable, format!("cannot read '{key}': it is replaced all the time")))
}

/// Exactly the bytes of `range`. A store that gives another number of bytes breaks its contract, which is an error of
/// kind `Unreachable` if there are too few (a cut connection) and `Damaged` if there are too many.
pub async fn read_range(store: &dyn Store, key: &Key, range: Range<u64>) -> Result<Bytes> {
    let wanted = range.end.saturating_sub(range.start);
    let bytes = collect_body(store.get(key, Some(range)).await?, wanted, key).await?;
    if (bytes.len() as u64) < wanted {
        let reason = format!("cannot read '{key}': {} bytes came instead of {wanted}", bytes.len());
        return Err(Error::new(Kind::Unreachable, reason));
    }
    Ok(bytes)
}

/// The pages of a listing, one after the other as they are asked for: every object whose key begins with `prefix` and
/// is greater than `after`, in ascending byte order. No page is empty.
pub fn list_all<'a>(
    store: &'a dyn Store,
    prefix: &str,
    after: Option<&str>,
) -> Pin<Box<dyn Stream<Item = Result<Vec<ObjectInfo>>> + Send + 'a>> {
    let start = Some((prefix.to_string(), after.map(str::to_string)));
    Box::pin(stream::try_unfold(start, move |state| async move {
        let Some((prefix, after)) = state else { return Ok(None) };
        let page = store.list(&prefix, after.as_deref(), LIST_PAGE_OBJECTS_MAX).await?;
        let Some(last) = page.last() else { return Ok(None) };
        let last = last.key.as_str().to_string();
        if after.is_some_and(|after| last <= after) {
            let reason = format!("cannot list '{prefix}' in {}: the listing goes backwards", store.describe());
            return Err(Error::new(Kind::Damaged, reason));
        }
        let is_last = page.len() < LIST_PAGE_OBJECTS_MAX;
        Ok(Some((page, (!is_last).then_some((prefix, Some(last))))))
    }))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::faulty::{Faults, FaultyStore, Operation};
    use super::super::memory::MemoryStore;
    use super::super::{PutCondition, Store};
    use super::*;

    #[tokio::test]
    async fn a_larger_object_than_expected_is_refused_and_one_of_the_limit_is_not() {
        let store = MemoryStore::new("t");
        let key = Key::parse("a").unwrap();
        let body = Bytes::from(vec![7u8; PIECE_BYTES_MAX * 2 + 5]);
        store.put(&key, body.clone(), PutCondition::Create).await.unwrap();
        assert_eq!(read_all(&store, &key, body.len() as u64).await.unwrap(), body);
        assert_eq!(read_all(&store, &key, body.len() as u64 - 1).await.unwrap_err().kind(), Kind::Damaged);
        assert_eq!(read_range(&store, &key, 3..2_000_000).await.unwrap().len(), 1_999_997);
        let none = Key::parse("b").unwrap();
        assert_eq!(get_optional(&store, &none, 10).await.unwrap(), None);
    }

    #[tokio::test]
    async fn pieces_of_a_body_are_small_and_an_empty_body_has_none() {
        let mut body = body_from_bytes(Bytes::from(vec![1u8; PIECE_BYTES_MAX + 1]));
        assert_eq!(body.next().await.unwrap().unwrap().len(), PIECE_BYTES_MAX);
        assert_eq!(body.next().await.unwrap().unwrap().len(), 1);
        assert!(body.next().await.is_none());
        assert!(body_from_bytes(Bytes::new()).next().await.is_none());
    }

    #[tokio::test]
    async fn a_listing_takes_no_more_requests_than_it_has_pages() {
        for (objects, requests) in [(0, 1), (3, 1), (LIST_PAGE_OBJECTS_MAX, 2), (LIST_PAGE_OBJECTS_MAX + 1, 2)] {
            let faults = Faults::new();
            let store = FaultyStore::new(Arc::new(MemoryStore::new("t")), faults.clone());
            for number in 0..objects {
                let key = Key::parse(&format!("a/{number:06}")).unwrap();
                store.put(&key, Bytes::new(), PutCondition::Create).await.unwrap();
            }
            let pages: Vec<_> = list_all(&store, "a/", None).collect().await;
            assert_eq!(pages.into_iter().map(|page| page.unwrap().len()).sum::<usize>(), objects);
            assert_eq!(faults.calls(Operation::List), requests, "for {objects} objects");
        }
    }
}
