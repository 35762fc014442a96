//! The way of an object's bytes from the thread that makes them to the store.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use tokio::sync::mpsc;

use crate::error::{Error, Kind};
use crate::repo::lease::LeaseKeeper;
use crate::store::ByteStream;

/// What the thread sends. A channel that ends without `Last` is a body that is not complete.
pub(super) enum Piece {
    More(Bytes),
    Last(Bytes),
    Failed(Error),
}

/// The body of an object for `put_stream`. It only becomes complete while the lease is held: the last piece is the
/// moment of publication.
pub(super) fn body(receiver: mpsc::Receiver<Piece>, lease: Arc<LeaseKeeper>) -> ByteStream {
    Box::pin(stream::unfold(Some((receiver, lease)), |state| async move {
        let (mut receiver, lease) = state?;
        match receiver.recv().await {
            Some(Piece::More(bytes)) => Some((Ok(bytes), Some((receiver, lease)))),
            Some(Piece::Last(bytes)) => Some((lease.check().map(|()| bytes), None)),
            Some(Piece::Failed(error)) => Some((Err(error), None)),
            None => Some((Err(Error::new(Kind::Cancelled, "the work was stopped")), None)),
        }
    }))
}
