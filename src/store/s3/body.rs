//! Bodies that go on where they broke.

use std::ops::Range;

use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use futures_util::stream;
use http_body_util::BodyExt;

use super::S3Store;
use super::bucket::Opened;
use super::explain::own_error;
use crate::error::{Error, Kind, Result};
use crate::store::read::PIECE_BYTES_MAX;
use crate::store::{ByteStream, Key, Store};

/// A body that is being read, and how to go on with it when it breaks.
pub(super) struct Resumable {
    store: S3Store,
    key: Key,
    /// The version that is read; another one is never mixed in.
    tag: String,
    body: Option<SdkBody>,
    /// What came in one piece and is handed on in several.
    rest_of_piece: Bytes,
    at: u64,
    end: u64,
    /// Breaks since the last piece that came.
    breaks: u32,
    is_over: bool,
}

impl Resumable {
    /// Opens an object, or a range of it.
    pub(super) async fn open(store: &S3Store, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream> {
        let what = format!("cannot read '{key}'");
        let opened = match &range {
            None => store.ask(&what, || store.bucket().get(key.as_str(), None, None)).await?,
            Some(range) if range.start < range.end => {
                let asked = Some((range.start, Some(range.end)));
                match store.ask(&what, || store.bucket().get(key.as_str(), asked, None)).await {
                    Ok(opened) => opened,
                    // 416: behind the end; or an object that is empty.
                    Err(error) if error.kind() == Kind::BadInput => {
                        return Err(outside(store, key, range).await?.unwrap_or(error));
                    }
                    Err(error) => return Err(error),
                }
            }
            // Nothing is asked for, which the API cannot express; but the range must be one.
            Some(range) => {
                return match outside(store, key, range).await? {
                    Some(error) => Err(error),
                    None => Ok(Box::pin(stream::empty())),
                };
            }
        };
        let Opened { body, tag, from, to, size_bytes } = opened;
        let wanted = range.unwrap_or(0..size_bytes);
        if wanted.end > size_bytes {
            return Err(no_such_range(store, key, &wanted, size_bytes));
        }
        if from != wanted.start || to < wanted.end {
            let reason = format!("{what} in {}: bytes {from}..{to} came, not {wanted:?}", store.describe());
            return Err(Error::new(Kind::Unreachable, reason));
        }
        let state = Resumable {
            store: store.clone(),
            key: key.clone(),
            tag,
            body: Some(body),
            rest_of_piece: Bytes::new(),
            at: wanted.start,
            end: wanted.end,
            breaks: 0,
            is_over: false,
        };
        Ok(Box::pin(stream::unfold(state, |mut state| async move {
            if state.is_over {
                return None;
            }
            let piece = state.next().await.transpose()?;
            state.is_over = piece.is_err();
            Some((piece, state))
        })))
    }

    /// The next piece; nothing at the end.
    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if !self.rest_of_piece.is_empty() {
                let piece = self.rest_of_piece.split_to(self.rest_of_piece.len().min(PIECE_BYTES_MAX));
                self.at += piece.len() as u64;
                self.breaks = 0;
                return Ok(Some(piece));
            }
            if self.at == self.end {
                return Ok(None);
            }
            let Some(body) = &mut self.body else {
                self.resume().await?;
                continue;
            };
            let error = match body.frame().await {
                Some(Ok(frame)) => {
                    let mut piece = frame.into_data().unwrap_or_default();
                    // A server that ignores the end of a range sends more than was asked for.
                    piece.truncate(usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(piece.len()));
                    self.rest_of_piece = piece;
                    continue;
                }
                Some(Err(error)) => own_error(error.as_ref())
                    .unwrap_or_else(|| Error::new(Kind::Unreachable, format!("the body broke: {error}"))),
                None => Error::new(Kind::Unreachable, "the body ended too early"),
            };
            self.break_off(error).await?;
        }
    }

    fn what(&self) -> String {
        format!("cannot read '{}' in {}", self.key, self.store.describe())
    }

    /// Waits after a break that may pass; returns the error if there were too many.
    async fn break_off(&mut self, error: Error) -> Result<()> {
        self.body = None;
        self.breaks = self.breaks.saturating_add(1);
        let policy = &self.store.inner.retry;
        if !error.is_temporary() || policy.attempts_max.is_some_and(|most| self.breaks >= most) {
            let what = format!("{} from byte {} on (it broke {} times)", self.what(), self.at, self.breaks);
            return Err(error.while_doing(what));
        }
        tracing::debug!(key = %self.key, at = self.at, "resuming a body that broke: {error}");
        self.store.inner.clock.sleep(policy.wait_after(self.breaks)).await;
        Ok(())
    }

    /// Asks for the rest, of the same version only.
    async fn resume(&mut self) -> Result<()> {
        let range = Some((self.at, Some(self.end)));
        let what = format!("cannot read '{}'", self.key);
        let (store, key, tag) = (&self.store, &self.key, &self.tag);
        let opened = store.ask(&what, || store.bucket().get(key.as_str(), range, Some(tag))).await;
        let replaced = || {
            let reason = format!("{}: it was replaced while it was read", self.what());
            Error::new(Kind::Conflict, reason).hint("read it again")
        };
        match opened {
            // A server that ignores the condition still says which version it sends.
            Ok(opened) if opened.tag == self.tag && opened.from == self.at && opened.to >= self.end => {
                self.body = Some(opened.body);
                Ok(())
            }
            Ok(_) => Err(replaced()),
            Err(error) if matches!(error.kind(), Kind::Conflict | Kind::NotFound | Kind::BadInput) => Err(replaced()),
            Err(error) => Err(error),
        }
    }
}

fn no_such_range(store: &S3Store, key: &Key, range: &Range<u64>, size_bytes: u64) -> Error {
    let reason = format!(
        "cannot read '{key}' in {}: it has {size_bytes} bytes, not {}..{}",
        store.describe(),
        range.start,
        range.end
    );
    Error::new(Kind::BadInput, reason)
}

/// Why a range is not one of this object, or nothing if it is.
async fn outside(store: &S3Store, key: &Key, range: &Range<u64>) -> Result<Option<Error>> {
    let Some(known) = store.head(key).await? else {
        let reason = format!("cannot read '{key}' in {}: no such object", store.describe());
        return Ok(Some(Error::new(Kind::NotFound, reason)));
    };
    let is_within = range.start <= range.end && range.end <= known.size_bytes;
    Ok((!is_within).then(|| no_such_range(store, key, range, known.size_bytes)))
}
