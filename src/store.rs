//! Objects by key: the port behind which a directory, a bucket, memory or another agent lies.
//!
//! The contract, held by one suite on every implementation (`tests/it/store_contract.rs`):
//! * A put is atomic and durable: when it returns, a reader on any machine sees the whole object; before that, or
//!   after a crash, it sees the old state. No reader ever sees a part.
//! * `Create` puts succeed for exactly one of any number of racing writers, `IfMatch` puts likewise.
//! * `list` returns keys in ascending byte order, starting after a given key, a page at a time; only the last page is
//!   not full.
//! * Deleting what is not there succeeds.
//! * A put or delete that fails with a temporary error may have happened all the same (its answer was lost); one that
//!   fails otherwise has not. Who repeats a `Create` and meets `Conflict` compares the object with what it wanted.
//! * A directory cannot hold an object `a` beside an object `a/b`; so no layout may use both. Such a store answers with
//!   `Conflict`; some go on doing so for `a` after `a/b` has gone.

pub mod faulty;
pub mod fs;
pub mod links;
pub mod memory;
pub mod metered;
pub mod peer;
pub mod read;
pub mod s3;

use std::fmt;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;
use jiff::Timestamp;

use crate::error::{Error, Kind, Result};
use crate::model::capabilities::Capabilities;

/// A body in pieces. An error ends it.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes>> + Send>>;

/// The name of an object: parts of letters, digits, `.`, `-` and `_`, joined by `/`. No part begins with `.`: such names
/// have a meaning in a directory (`..`, `.nfs0001`) and belong to the store itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(String);

/// S3 allows 1024 bytes (Amazon S3 user guide, "Naming Amazon S3 objects"); a prefix must fit as well.
const KEY_BYTES_MAX: usize = 800;

impl Key {
    /// Checks the form of a key, which may come from a peer.
    pub fn parse(text: &str) -> Result<Key> {
        let part_is_good = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
        };
        if text.len() <= KEY_BYTES_MAX && text.split('/').all(part_is_good) {
            Ok(Key(text.to_string()))
        } else {
            Err(Error::new(Kind::BadInput, format!("'{}' is not the key of an object", text.escape_default())))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Keys sort and compare as their text.
impl std::borrow::Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Changes whenever the bytes of the object change, and may stay when it is replaced by the same bytes (S3 hashes them);
/// means something to the store that gave it only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(pub String);

/// Under which condition a put may happen. A condition that does not hold is an error of kind `Conflict`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutCondition {
    /// Only if there is no object under this key.
    Create,
    /// Whatever is there.
    Replace,
    /// Only if the object is still the one with this tag.
    IfMatch(Tag),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    pub key: Key,
    pub size_bytes: u64,
    pub tag: Tag,
}

/// Addresses at which objects can be read without credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Links {
    /// One for each key that was named, in that order. Whoever knows one can read the object.
    pub urls: Vec<String>,
    /// When all of them stop working, as far as it is known.
    pub expires_at: Timestamp,
    /// They were made with temporary credentials and stop working when those end.
    pub may_end_earlier: bool,
}

/// Links are made for at most so many objects in one call: an answer to a peer holds them.
pub const LINKS_MAX: usize = 100;

/// At most this many objects come back from one `list`, as with S3's ListObjectsV2.
pub const LIST_PAGE_OBJECTS_MAX: usize = 1000;

/// Where objects are kept. See the module for the contract.
#[async_trait]
pub trait Store: Send + Sync {
    /// The bytes of an object, or of a range of it; a missing object is `NotFound`, a range that is not within the
    /// object is `BadInput`. The size of the body is exactly that of the range.
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream>;

    /// Stores a small object (up to a few MiB) and returns its tag.
    async fn put(&self, key: &Key, body: Bytes, condition: PutCondition) -> Result<Tag>;

    /// Stores an object whose size is not known in advance. If the stream ends in an error, nothing is stored and
    /// that error is returned. `IfMatch` is not supported here.
    async fn put_stream(&self, key: &Key, body: ByteStream, condition: PutCondition) -> Result<Tag>;

    /// Size and tag of an object, or nothing if there is none.
    async fn head(&self, key: &Key) -> Result<Option<ObjectInfo>>;

    /// The objects whose key begins with `prefix` (any text, also in the middle of a part) and is greater than
    /// `after`, at most `limit` and at most [`LIST_PAGE_OBJECTS_MAX`]. Fewer than that come only if there are no more.
    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>>;

    /// Removes objects; those that are not there count as removed.
    async fn delete(&self, keys: &[Key]) -> Result<()>;

    /// Where this store is, for messages: `file:///srv/keiki`, `s3://backups/keiki`, `peer://a`.
    fn describe(&self) -> String;

    /// Tries what this store can do beyond the least, once, when a repository is begun in it; nothing if there is
    /// nothing to try, because the store does by itself whatever the contract asks.
    async fn probe(&self) -> Result<Option<Capabilities>>;

    /// Tells the store what was found out when the repository in it was begun. Who wraps a store hands this on.
    fn adopt(&self, found: &Capabilities);

    /// Links to at most [`LINKS_MAX`] objects, which need not be there, that work for so long. Asks the server nothing.
    /// `Unsupported` where whoever has no credentials cannot reach the objects at all, `BadInput` for a time that no
    /// link can last.
    async fn presign(&self, _keys: &[Key], _valid_for: Duration) -> Result<Links> {
        Err(no_links(&self.describe()))
    }

    /// What counts this store's requests, if it counts them by itself; see [`metered`].
    fn meter(&self) -> Option<Arc<metered::Meter>> {
        None
    }
}

/// What `presign` answers where there are no links.
fn no_links(place: &str) -> Error {
    Error::new(Kind::Unsupported, format!("cannot make links to objects of '{place}': only a bucket has such links"))
        .hint("'keiki backup download INSTANCE BACKUP --tar FILE' writes the backup itself, to be copied")
}

/// What `put_stream` answers to a condition that it does not support.
fn if_match_of_a_stream(key: &Key) -> Error {
    Error::new(Kind::Internal, format!("cannot store '{key}': a stream cannot be stored under an if-match condition"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_text_that_is_safe_as_a_path_and_as_a_url_is_a_key() {
        for good in ["a", "a/b", "0-A_z.tar/x..y", &"k".repeat(800)] {
            assert_eq!(Key::parse(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "/",
            "/a",
            "a/",
            "a//b",
            ".",
            "..",
            "a/../b",
            ".tmp/x",
            "a b",
            "a\\b",
            "a%2e",
            "ä",
            "a\0",
            &"k".repeat(801),
        ] {
            assert_eq!(Key::parse(bad).unwrap_err().kind(), Kind::BadInput, "{bad:?}");
        }
    }
}
