//! The bodies of HTTP messages: frames of a message, then perhaps a bulk body.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use crate::error::{Error, Kind, Result};
use crate::store::ByteStream;

/// What this side sends. Where the size is known it is kept exactly: a bulk body that turns out shorter or longer ends
/// in an error, which breaks the connection, so that the other side never takes a part for the whole.
pub struct Outgoing {
    head: Option<Bytes>,
    bulk: Option<ByteStream>,
    /// Of head and bulk together; nothing if only the bulk body itself knows.
    left_bytes: Option<u64>,
    failure: Failure,
}

/// Where the error of a bulk body is kept for whoever sent it: the HTTP library does not give it back.
#[derive(Clone, Default)]
pub struct Failure(Arc<Mutex<Option<Error>>>);

impl Failure {
    pub fn take(&self) -> Option<Error> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take()
    }

    fn set(&self, error: Error) {
        *self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(error);
    }
}

impl Outgoing {
    /// Frames only.
    pub fn message(head: Bytes) -> Outgoing {
        Outgoing { left_bytes: Some(head.len() as u64), head: Some(head), bulk: None, failure: Failure::default() }
    }

    /// Frames, then a bulk body of exactly `bulk_bytes`, or of a size that its end tells.
    pub fn with_bulk(head: Bytes, bulk: ByteStream, bulk_bytes: Option<u64>) -> Outgoing {
        let left_bytes = bulk_bytes.and_then(|bytes| bytes.checked_add(head.len() as u64));
        Outgoing { head: Some(head), bulk: Some(bulk), left_bytes, failure: Failure::default() }
    }

    /// Where an error of the bulk body will be found.
    pub fn failure(&self) -> Failure {
        self.failure.clone()
    }

    fn give(&mut self, bytes: Bytes) -> Poll<Option<Result<Frame<Bytes>>>> {
        if let Some(left) = &mut self.left_bytes {
            match left.checked_sub(bytes.len() as u64) {
                Some(rest) => *left = rest,
                None => return self.fail(Error::new(Kind::Damaged, "the body is longer than was said")),
            }
        }
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }

    fn fail(&mut self, error: Error) -> Poll<Option<Result<Frame<Bytes>>>> {
        self.bulk = None;
        self.failure.set(error.clone());
        Poll::Ready(Some(Err(error)))
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>>>> {
        if let Some(head) = self.head.take() {
            return self.give(head);
        }
        loop {
            let Some(bulk) = &mut self.bulk else { return Poll::Ready(None) };
            match bulk.as_mut().poll_next(context) {
                Poll::Pending => return Poll::Pending,
                // An empty piece would end a chunked body.
                Poll::Ready(Some(Ok(piece))) if piece.is_empty() => {}
                Poll::Ready(Some(Ok(piece))) => return self.give(piece),
                Poll::Ready(Some(Err(error))) => return self.fail(error),
                Poll::Ready(None) => {
                    self.bulk = None;
                    if self.left_bytes.is_some_and(|left| left > 0) {
                        return self.fail(Error::new(Kind::Damaged, "the body is shorter than was said"));
                    }
                    return Poll::Ready(None);
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.head.is_none() && self.bulk.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.left_bytes.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// What the other side sends, piece by piece; a pause of more than `patience` between two pieces is an error.
pub fn incoming(body: Incoming, patience: Duration) -> ByteStream {
    Box::pin(stream::unfold(Some(body), move |body| async move {
        let mut body = body?;
        loop {
            let piece = match tokio::time::timeout(patience, body.frame()).await {
                Ok(None) => return None,
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(piece) => Ok(piece),
                    // Trailers mean nothing here.
                    Err(_) => continue,
                },
                Ok(Some(Err(error))) => Err(broken(&error)),
                Err(_) => Err(Error::new(
                    Kind::Unreachable,
                    format!("the other side sent nothing for {} seconds", patience.as_secs()),
                )),
            };
            let rest = piece.is_ok().then_some(body);
            return Some((piece, rest));
        }
    }))
}

/// The bytes that were read with the head, then the rest.
pub fn with_start(start: Bytes, rest: ByteStream) -> ByteStream {
    if start.is_empty() {
        return rest;
    }
    Box::pin(stream::once(async move { Ok(start) }).chain(rest))
}

/// Exactly `size_bytes` of a body: less or more is an error of kind `Unreachable` or `Damaged`.
pub fn exactly(size_bytes: u64, body: ByteStream) -> impl Stream<Item = Result<Bytes>> + Send {
    stream::unfold(Some((body, size_bytes)), |state| async move {
        let (mut body, left) = state?;
        match body.next().await {
            Some(Ok(piece)) => match left.checked_sub(piece.len() as u64) {
                Some(left) => Some((Ok(piece), Some((body, left)))),
                None => Some((Err(Error::new(Kind::Damaged, "more bytes came than the answer said")), None)),
            },
            Some(Err(error)) => Some((Err(error), None)),
            None if left == 0 => None,
            None => {
                Some((Err(Error::new(Kind::Unreachable, format!("the connection ended {left} bytes early"))), None))
            }
        }
    })
}

/// An error of the HTTP library about a connection that was good before. Timeouts and breaks are temporary.
pub fn broken(error: &hyper::Error) -> Error {
    let mut reason = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(inner) = next {
        reason = inner.to_string();
        next = inner.source();
    }
    let why = if error.is_incomplete_message() {
        String::from("the connection was closed in the middle")
    } else {
        format!("the connection broke: {}", reason.split(" (os error").next().unwrap_or(&reason).to_lowercase())
    };
    Error::new(Kind::Unreachable, why).hint("did the other side stop or restart just now? its log says more")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::read::body_from_bytes;

    async fn sent(outgoing: Outgoing) -> Result<Bytes> {
        outgoing.collect().await.map(|collected| collected.to_bytes())
    }

    #[tokio::test]
    async fn a_body_of_another_size_than_was_said_ends_in_an_error() {
        let body = |said| Outgoing::with_bulk("head".into(), body_from_bytes("bulk".into()), said);
        assert_eq!(sent(body(Some(4))).await.unwrap(), "headbulk");
        assert_eq!(sent(body(None)).await.unwrap(), "headbulk");
        assert_eq!(sent(body(Some(3))).await.unwrap_err().kind(), Kind::Damaged);
        let short = body(Some(5));
        let failure = short.failure();
        assert_eq!(sent(short).await.unwrap_err().kind(), Kind::Damaged);
        assert_eq!(failure.take().unwrap().kind(), Kind::Damaged);
    }

    #[tokio::test]
    async fn a_body_that_ends_early_is_not_taken_for_the_whole() {
        let collect = |size| async move {
            let pieces: Vec<_> = exactly(size, body_from_bytes("bulk".into())).collect().await;
            pieces.into_iter().collect::<Result<Vec<_>>>()
        };
        assert_eq!(collect(4).await.unwrap(), ["bulk"]);
        assert_eq!(collect(5).await.unwrap_err().kind(), Kind::Unreachable);
        assert_eq!(collect(3).await.unwrap_err().kind(), Kind::Damaged);
    }
}
