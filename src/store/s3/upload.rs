//! Objects whose size is not known: one PUT if they turn out small, else an upload in parts.
//!
//! Parts are of one size (some servers insist) and are in memory only: one that is being filled and those on the way.
//! The object comes to be when the upload is completed, after the last byte of its body has come. An upload that fails
//! or is given up is aborted.

use aws_sdk_s3::types::CompletedPart;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::task::JoinSet;

use super::bucket::Condition;
use super::{S3Store, claims};
use crate::base::random::random_u64;
use crate::error::{Error, Kind, Result};
use crate::store::{ByteStream, Key, PutCondition, Store, Tag};

/// Parts of one upload that are on the way.
const PARTS_IN_FLIGHT: usize = 2;

/// Amazon S3 user guide, "Multipart upload limits".
const PARTS_MAX: i32 = 10_000;

/// See `Store::put_stream`.
pub(super) async fn put_stream(
    store: &S3Store,
    key: &Key,
    mut body: ByteStream,
    condition: PutCondition,
) -> Result<Tag> {
    let mut filler = Filler { body: &mut body, carry: Bytes::new(), is_over: false };
    let first = filler.next_part(store.inner.part_bytes).await?;
    if filler.is_over {
        return store.put(key, first, condition).await;
    }
    let mark = format!("{:016x}{:016x}", random_u64(), random_u64());
    let what = format!("cannot store '{key}'");
    let id = store.ask(&what, || store.bucket().begin_upload(key.as_str(), &mark)).await?;
    let upload = Upload { store: store.clone(), key: key.clone(), id, mark, is_done: false };
    upload.run(first, filler, condition).await
}

/// Cuts a body into parts.
struct Filler<'a> {
    body: &'a mut ByteStream,
    /// What came beyond the part before.
    carry: Bytes,
    is_over: bool,
}

impl Filler<'_> {
    /// The next part: of exactly this size, or the last one, which is smaller and may be empty.
    async fn next_part(&mut self, part_bytes: usize) -> Result<Bytes> {
        let mut first = self.carry.split_to(self.carry.len().min(part_bytes));
        let mut part = BytesMut::new();
        while first.len() + part.len() < part_bytes {
            let Some(piece) = self.body.next().await else {
                self.is_over = true;
                break;
            };
            let mut piece = piece?;
            if first.is_empty() && part.is_empty() && piece.len() <= part_bytes {
                // A body of one piece is not copied.
                first = piece;
                continue;
            }
            if part.is_empty() {
                part.reserve(part_bytes);
                part.extend_from_slice(&first);
                first = Bytes::new();
            }
            let fits = piece.len().min(part_bytes - part.len());
            part.extend_from_slice(&piece.split_to(fits));
            self.carry = piece;
        }
        Ok(if part.is_empty() { first } else { part.freeze() })
    }
}

/// An upload in parts; aborted when it is dropped before it is done.
struct Upload {
    store: S3Store,
    key: Key,
    id: String,
    mark: String,
    is_done: bool,
}

impl Upload {
    async fn run(mut self, first: Bytes, mut filler: Filler<'_>, condition: PutCondition) -> Result<Tag> {
        let parts = self.send_parts(first, &mut filler).await?;
        let known = self.store.capabilities();
        let tag = match condition {
            PutCondition::Create if !known.conditional_complete => {
                let (store, key) = (self.store.clone(), self.key.clone());
                let write = || self.complete(parts.clone(), &Condition::None);
                claims::alone(&store, &key, &condition, write).await
            }
            PutCondition::Create => self.complete(parts, &Condition::Absent).await,
            _ => self.complete(parts, &Condition::None).await,
        }?;
        self.is_done = true;
        Ok(tag)
    }

    /// Sends the whole body; returns the parts in the order of their numbers.
    async fn send_parts(&self, first: Bytes, filler: &mut Filler<'_>) -> Result<Vec<CompletedPart>> {
        let mut sending: JoinSet<Result<CompletedPart>> = JoinSet::new();
        let mut parts: Vec<CompletedPart> = Vec::new();
        let mut part = first;
        for number in 1..=PARTS_MAX {
            let (store, key, id) = (self.store.clone(), self.key.clone(), self.id.clone());
            sending.spawn(async move {
                let what = format!("cannot store part {number} of '{key}'");
                store.ask(&what, || store.bucket().upload_part(key.as_str(), &id, number, part.clone())).await
            });
            if filler.is_over {
                while let Some(done) = sending.join_next().await {
                    parts.push(part_of(done)?);
                }
                parts.sort_by_key(CompletedPart::part_number);
                return Ok(parts);
            }
            while sending.len() >= PARTS_IN_FLIGHT {
                if let Some(done) = sending.join_next().await {
                    parts.push(part_of(done)?);
                }
            }
            part = filler.next_part(self.store.inner.part_bytes).await?;
            if filler.is_over && part.is_empty() {
                while let Some(done) = sending.join_next().await {
                    parts.push(part_of(done)?);
                }
                parts.sort_by_key(CompletedPart::part_number);
                return Ok(parts);
            }
        }
        let most = PARTS_MAX as u64 * self.store.inner.part_bytes as u64;
        let message =
            format!("cannot store '{}' in {}: it is larger than {most} bytes", self.key, self.store.describe());
        Err(Error::new(Kind::Unsupported, message).hint("raise 'part_size' in [repository]"))
    }

    /// Completes the upload. If an answer was lost, the second attempt finds no upload, or the object in its way: then
    /// the mark says whether it is ours, as it does where the answer says too little.
    async fn complete(&self, parts: Vec<CompletedPart>, condition: &Condition) -> Result<Tag> {
        let store = &self.store;
        let what = format!("cannot store '{}'", self.key);
        let outcome = store
            .ask(&what, || store.bucket().complete_upload(self.key.as_str(), &self.id, parts.clone(), condition))
            .await;
        let error = match outcome {
            // Ceph 16 does not say which tag the object has.
            Ok(tag) if tag.is_empty() => {
                Error::new(Kind::Conflict, format!("{what}: it was replaced or deleted at once"))
            }
            Ok(tag) => return Ok(Tag(tag)),
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Conflict) => error,
            Err(error) => return Err(error),
        };
        let found = store.ask(&what, || store.bucket().head(self.key.as_str())).await?;
        match found {
            Some(found) if found.upload_mark.as_deref() == Some(&self.mark) => Ok(Tag(found.tag)),
            // Somebody threw our parts away: everything must be sent again, which the caller can do.
            _ if error.kind() == Kind::NotFound => Err(error.with_kind(Kind::Unreachable)),
            _ => Err(error),
        }
    }
}

fn part_of(done: std::result::Result<Result<CompletedPart>, tokio::task::JoinError>) -> Result<CompletedPart> {
    done.unwrap_or_else(|error| Err(Error::new(Kind::Internal, format!("sending a part failed: {error}"))))
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.is_done {
            return;
        }
        let (store, key, id) = (self.store.clone(), self.key.clone(), self.id.clone());
        runtime.spawn(async move {
            let what = format!("cannot abort the upload of '{key}'");
            if let Err(error) = store.ask(&what, || store.bucket().abort_upload(key.as_str(), &id)).await {
                tracing::info!("{error}; it is aborted after a day");
            }
        });
    }
}
