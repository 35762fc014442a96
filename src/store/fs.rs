//! A directory as a store (`file:///srv/keiki`): an object is a file, its key the path below the root.
//!
//! How the contract is kept:
//! * Unfinished objects are files in `<root>/.tmp`, which no key can name and no listing shows. A finished one is
//!   written, fsynced and only then renamed to its place, and the directories are fsynced before a put returns. What a
//!   crash leaves in `.tmp` is removed a day later, when the store is opened.
//! * `Create` is a rename that refuses to replace (renameat2(2), or link(2) where the file system has no such thing).
//! * `Replace`, `IfMatch` and delete hold a lock (flock(2), which also works over NFS) on one of 256 files in `.tmp`
//!   chosen by the hash of the key, so that nothing happens between the look at the tag and the rename.
//! * The tag is inode, size and modification time, which one stat tells. Inode numbers and clocks alone would not do: a
//!   file replaced twice within a clock tick can have all three the same. So the nanoseconds of the modification time
//!   are random bits, set before the object is published; two objects with the same inode, size and second are told
//!   apart by 30 bits.
//! * A root that lost its `.tmp` is not our root (its file system is not mounted, or it was emptied); then nothing is
//!   called missing and nothing is written, but the error is `Unreachable`.

mod unfinished;
mod walk;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};

use self::unfinished::{Unfinished, tag_of};
use super::read::PIECE_BYTES_MAX;
use super::{ByteStream, Key, LIST_PAGE_OBJECTS_MAX, ObjectInfo, PutCondition, Store, Tag};
use crate::base::bulk::{run_blocking, run_on_thread};
use crate::base::durable::{
    create_dir_all_below_durable, create_dir_all_durable, free_bytes, fsync_dir, parent_of, rename_without_replacing,
};
use crate::base::random::random_u64;
use crate::error::{Context, Error, Kind, Result};
use crate::model::capabilities::Capabilities;

/// Where unfinished objects and lock files are, below the root.
const WORK_DIRECTORY: &str = ".tmp";

/// The end of the names of unfinished objects.
const UNFINISHED: &str = ".part";

/// Backups hold what the database holds: nobody else may read them.
const FILE_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;

/// An unfinished object that nobody wrote to for so long belongs to a process that died.
const STALE_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Pieces on the way from a stream to the writing thread.
const PIECES_IN_FLIGHT: usize = 4;

/// A directory that is deleted when empty can vanish under a put that is about to use it; so it tries again.
const PUBLISH_ATTEMPTS: usize = 20;

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct FsStore {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    work: PathBuf,
    /// False if the work directory could not be made: a repository mounted read-only can still be read.
    has_work_directory: bool,
}

impl FsStore {
    /// Opens the store in the existing directory `root` and removes what dead writers left. Blocks for a moment.
    ///
    /// A root that is missing is `NotFound`. One that cannot be written to is opened for reading; a put says why.
    pub fn open(root: &Path) -> Result<FsStore> {
        let what = || format!("cannot open repository directory '{}'", root.display());
        let root = match std::fs::canonicalize(root) {
            Ok(root) => root,
            Err(error) => {
                let hint = "create it for the user that keiki runs as; or is its file system not mounted?";
                return Err(Error::io(what(), error).hint(hint));
            }
        };
        if !root.is_dir() {
            return Err(Error::new(Kind::BadInput, format!("{}: it is not a directory", what())));
        }
        let work = root.join(WORK_DIRECTORY);
        if let Err(error) = create_dir_all_durable(&work, DIRECTORY_MODE) {
            tracing::info!("repository directory '{}' is opened for reading only: {error}", root.display());
        }
        let inner = Inner { has_work_directory: work.is_dir(), root, work };
        if let Err(error) = inner.remove_stale() {
            tracing::debug!("cannot clean up in '{}': {error}", inner.work.display());
        }
        Ok(FsStore { inner: Arc::new(inner) })
    }

    async fn blocking<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Inner) -> Result<T> + Send + 'static,
    {
        let inner = self.inner.clone();
        run_blocking("directory store", move || work(&inner)).await
    }
}

impl Inner {
    fn path(&self, key: &Key) -> PathBuf {
        self.root.join(key.as_str())
    }

    fn full_hint(&self) -> String {
        let free = free_bytes(&self.root).map_or_else(|_| String::from("?"), |bytes| (bytes >> 20).to_string());
        format!("'{}' has {free} MiB free; make room or expire backups", self.root.display())
    }

    fn error(&self, what: impl std::fmt::Display, error: std::io::Error) -> Error {
        let root = self.root.display();
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Error::io(what, error).hint(self.full_hint()),
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                let uid = nix::unistd::geteuid();
                Error::io(what, error)
                    .with_kind(Kind::Forbidden)
                    .hint(format!("'{root}' must be writable for the user that keiki runs as (uid {uid})"))
            }
            ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::DirectoryNotEmpty => {
                let reason = format!("{what}: one of its parts is an object and another one a directory");
                Error::new(Kind::Conflict, reason)
            }
            ErrorKind::InvalidFilename => Error::io(what, error).with_kind(Kind::BadInput),
            _ => Error::io(what, error),
        }
    }

    /// Before anything is called missing: is this still the directory that was opened?
    fn check_present(&self) -> Result<()> {
        if !self.has_work_directory || self.work.is_dir() {
            return Ok(());
        }
        let reason = format!("repository directory '{}' is not what it was: it has no '.tmp'", self.root.display());
        Err(Error::new(Kind::Unreachable, reason).hint("is its file system not mounted?"))
    }

    fn remove_stale(&self) -> Result<()> {
        let what = || format!("cannot remove unfinished objects in '{}'", self.work.display());
        // The age is taken by the clock of the file system, against a file that was written just now.
        let now = self.begin()?.modified().context(what)?;
        for entry in std::fs::read_dir(&self.work).context(what)? {
            let entry = entry.context(what)?;
            let is_ours = entry.file_name().to_str().is_some_and(|name| name.ends_with(UNFINISHED));
            let modified = entry.metadata().and_then(|known| known.modified());
            let is_stale = modified.is_ok_and(|at| now.duration_since(at).is_ok_and(|age| age > STALE_AFTER));
            if is_ours && is_stale {
                tracing::info!("removing '{}', which a dead writer left", entry.path().display());
                // Another process may do the same at this moment.
                let _ = std::fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    fn begin(&self) -> Result<Unfinished> {
        let path = self.work.join(format!("{:016x}-{}{UNFINISHED}", random_u64(), std::process::id()));
        let what = || format!("cannot write to repository directory '{}'", self.root.display());
        let open = || OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(&path);
        let opened = open().or_else(|error| {
            // It could not be made when the store was opened; perhaps it can now, and else this says why not.
            if error.kind() == ErrorKind::NotFound && !self.has_work_directory {
                std::fs::create_dir(&self.work)?;
                return open();
            }
            Err(error)
        });
        match opened {
            Ok(file) => Ok(Unfinished::new(path, file)),
            Err(error) => {
                self.check_present()?;
                Err(self.error(what(), error))
            }
        }
    }

    /// Holds off every other change of this key that is not a `Create`; until it is dropped.
    fn lock(&self, key: &Key) -> std::io::Result<File> {
        let stripe = blake3::hash(key.as_str().as_bytes()).as_bytes()[0];
        let path = self.work.join(format!("lock-{stripe:02x}"));
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(FILE_MODE).open(path)?;
        file.lock()?;
        Ok(file)
    }

    /// Makes an unfinished object durable and gives it its name, if the condition holds.
    fn publish(&self, unfinished: Unfinished, key: &Key, condition: &PutCondition) -> Result<Tag> {
        let what = || format!("cannot store '{key}' in '{}'", self.root.display());
        let tag = unfinished.finish().map_err(|error| self.error(what(), error))?;
        let path = self.path(key);
        for attempt in 1.. {
            self.create_parents(&path).map_err(|error| error.while_doing(what()))?;
            match self.give_name(unfinished.path(), &path, key, condition) {
                Ok(Ok(())) => break,
                Ok(Err(why_not)) => return Err(Error::new(Kind::Conflict, format!("{}: {why_not}", what()))),
                Err(error) if error.kind() == ErrorKind::NotFound && attempt < PUBLISH_ATTEMPTS => {
                    self.check_present()?;
                }
                Err(error) => return Err(self.error(what(), error)),
            }
        }
        unfinished.forget();
        fsync_dir(parent_of(&path)).map_err(|error| error.while_doing(what()))?;
        Ok(tag)
    }

    /// Nothing is made where the root was: the file system below it may have gone while the object was written.
    fn create_parents(&self, path: &Path) -> Result<()> {
        self.check_present()?;
        match create_dir_all_below_durable(&self.root, parent_of(path), DIRECTORY_MODE) {
            // Another delete took a parent of the new directory away meanwhile.
            Err(error) if error.kind() == Kind::NotFound => self.check_present(),
            Err(error) if error.kind() == Kind::Full => Err(error.hint(self.full_hint())),
            other => other,
        }
    }

    /// Renames an unfinished object to its place; the inner error says which condition did not hold.
    fn give_name(
        &self,
        from: &Path,
        to: &Path,
        key: &Key,
        condition: &PutCondition,
    ) -> std::io::Result<std::result::Result<(), &'static str>> {
        if *condition == PutCondition::Create {
            return match rename_without_replacing(from, to) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(Err("it exists already")),
                other => other.map(Ok),
            };
        }
        let _lock = self.lock(key)?;
        if let PutCondition::IfMatch(wanted) = condition {
            match std::fs::symlink_metadata(to) {
                Ok(known) if known.is_file() && tag_of(&known) == *wanted => {}
                Ok(_) => return Ok(Err("it was changed by somebody else")),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Err("it does not exist any more")),
                Err(error) => return Err(error),
            }
        }
        std::fs::rename(from, to).map(Ok)
    }

    fn head(&self, key: &Key) -> Result<Option<ObjectInfo>> {
        match std::fs::symlink_metadata(self.path(key)) {
            Ok(known) if known.is_file() => {
                Ok(Some(ObjectInfo { key: key.clone(), size_bytes: known.len(), tag: tag_of(&known) }))
            }
            Ok(_) => Ok(None),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                self.check_present().map(|()| None)
            }
            Err(error) => Err(self.error(format!("cannot look at '{key}' in '{}'", self.root.display()), error)),
        }
    }

    /// The open file of an object and the range to read of it.
    fn open_object(&self, key: &Key, range: Option<Range<u64>>) -> Result<(File, Range<u64>)> {
        let what = || format!("cannot read '{key}' in '{}'", self.root.display());
        let missing = || Error::new(Kind::NotFound, format!("{}: no such object", what()));
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(self.path(key));
        let file = match opened {
            Ok(file) => file,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                self.check_present()?;
                return Err(missing());
            }
            Err(error) => return Err(self.error(what(), error)),
        };
        let known = file.metadata().context(what)?;
        if !known.is_file() {
            return Err(missing());
        }
        let size = known.len();
        let range = range.unwrap_or(0..size);
        if range.start > range.end || range.end > size {
            let reason = format!("{}: it has {size} bytes, not {}..{}", what(), range.start, range.end);
            return Err(Error::new(Kind::BadInput, reason));
        }
        Ok((file, range))
    }

    fn delete(&self, keys: &[Key]) -> Result<()> {
        let mut changed = BTreeSet::new();
        for key in keys {
            let what = || format!("cannot delete '{key}' in '{}'", self.root.display());
            let path = self.path(key);
            // Looked at first: deleting what is not there needs no lock and no right to write.
            if self.head(key)?.is_none() {
                continue;
            }
            let _lock = self.lock(key).map_err(|error| self.error(what(), error))?;
            match std::fs::remove_file(&path) {
                Ok(()) => {
                    changed.insert(parent_of(&path).to_path_buf());
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(self.error(what(), error)),
            }
        }
        for directory in changed {
            self.settle(&directory)?;
        }
        Ok(())
    }

    /// Makes the deletions in a directory durable, and removes it and its parents as far as they are empty.
    fn settle(&self, directory: &Path) -> Result<()> {
        let mut directory = directory;
        while directory != self.root && std::fs::remove_dir(directory).is_ok() {
            directory = parent_of(directory);
        }
        match fsync_dir(directory) {
            // Another delete removed it, and made that durable.
            Err(error) if error.kind() == Kind::NotFound => self.check_present(),
            other => other,
        }
    }
}

/// What comes from the stream to the thread that writes. A channel that closes without `End` means: throw it away.
enum Piece {
    Bytes(Bytes),
    End,
}

/// Reads `range` of a file piece by piece, one piece ahead of the consumer.
fn body_of_file(file: File, range: Range<u64>, what: String) -> ByteStream {
    let file = Arc::new(file);
    let read_piece = move |at: u64| {
        let (file, what) = (file.clone(), what.clone());
        let length = range.end.saturating_sub(at).min(PIECE_BYTES_MAX as u64);
        (length > 0).then(|| {
            let read = move || {
                // The length is at most a MiB.
                let mut buffer = BytesMut::zeroed(length as usize);
                match file.read_exact_at(&mut buffer, at) {
                    Ok(()) => Ok(buffer.freeze()),
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                        let reason = format!("{what}: the file became shorter while it was read");
                        Err(Error::new(Kind::Damaged, reason))
                    }
                    Err(error) => Err(Error::io(&what, error)),
                }
            };
            (tokio::task::spawn_blocking(read), at + length)
        })
    };
    let first = read_piece(range.start);
    Box::pin(stream::unfold((first, read_piece), |(ahead, read_piece)| async move {
        let (reading, next_at) = ahead?;
        let piece = match reading.await {
            Ok(piece) => piece,
            Err(error) => Err(Error::new(Kind::Internal, format!("a reading thread failed: {error}"))),
        };
        // After an error there is nothing more.
        let next = if piece.is_ok() { read_piece(next_at) } else { None };
        Some((piece, (next, read_piece)))
    }))
}

#[async_trait]
impl Store for FsStore {
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream> {
        let what = format!("cannot read '{key}' in '{}'", self.inner.root.display());
        let key = key.clone();
        let (file, range) = self.blocking(move |inner| inner.open_object(&key, range)).await?;
        Ok(body_of_file(file, range, what))
    }

    async fn put(&self, key: &Key, body: Bytes, condition: PutCondition) -> Result<Tag> {
        let key = key.clone();
        self.blocking(move |inner| {
            let mut unfinished = inner.begin()?;
            unfinished
                .write(&body)
                .map_err(|error| inner.error(format!("cannot store '{key}' in '{}'", inner.root.display()), error))?;
            inner.publish(unfinished, &key, &condition)
        })
        .await
    }

    async fn put_stream(&self, key: &Key, mut body: ByteStream, condition: PutCondition) -> Result<Tag> {
        if matches!(condition, PutCondition::IfMatch(_)) {
            return Err(super::if_match_of_a_stream(key));
        }
        let (sender, mut receiver) = tokio::sync::mpsc::channel(PIECES_IN_FLIGHT);
        let (inner, key) = (self.inner.clone(), key.clone());
        let writing = run_on_thread("store-put", move || {
            let mut unfinished = inner.begin()?;
            while let Some(piece) = receiver.blocking_recv() {
                match piece {
                    Piece::Bytes(bytes) => unfinished.write(&bytes).map_err(|error| {
                        inner.error(format!("cannot store '{key}' in '{}'", inner.root.display()), error)
                    })?,
                    Piece::End => return inner.publish(unfinished, &key, &condition),
                }
            }
            Err(Error::new(Kind::Cancelled, format!("cannot store '{key}': the sender stopped")))
        });
        let feeding = async move {
            while let Some(piece) = body.next().await {
                // A writer that is gone says itself why.
                if sender.send(Piece::Bytes(piece?)).await.is_err() {
                    return Ok(());
                }
            }
            let _ = sender.send(Piece::End).await;
            Ok(())
        };
        let (written, fed): (Result<Tag>, Result<()>) = tokio::join!(writing, feeding);
        fed?;
        written
    }

    async fn head(&self, key: &Key) -> Result<Option<ObjectInfo>> {
        let key = key.clone();
        self.blocking(move |inner| inner.head(&key)).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>> {
        let (prefix, after) = (prefix.to_string(), after.map(str::to_string));
        self.blocking(move |inner| {
            let limit = limit.min(LIST_PAGE_OBJECTS_MAX);
            let page = match walk::list_page(&inner.root, &prefix, after.as_deref(), limit, tag_of) {
                Err(error) if error.kind() == Kind::NotFound => Vec::new(),
                other => other?,
            };
            if page.is_empty() {
                inner.check_present()?;
            }
            Ok(page)
        })
        .await
    }

    async fn delete(&self, keys: &[Key]) -> Result<()> {
        let keys = keys.to_vec();
        self.blocking(move |inner| inner.delete(&keys)).await
    }

    fn describe(&self) -> String {
        format!("file://{}", self.inner.root.display())
    }

    async fn probe(&self) -> Result<Option<Capabilities>> {
        Ok(None)
    }

    fn adopt(&self, _: &Capabilities) {}
}
