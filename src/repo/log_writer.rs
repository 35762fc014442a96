//! Puts log into the repository: file bytes -> frames -> one object, with a few MiB in memory, nothing on disk.
//!
//! Rules that hold whatever fails in between:
//! * An object is there as a whole or not at all, and only if the lease was held when its last byte was sent.
//! * Same name and same bytes is success, so repeating is harmless. Same name and other bytes is a `Conflict`; nothing
//!   that is there is ever replaced.
//! * The chunks of an open file are contiguous. They go when the whole file is durable, not before.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::base::bulk::run_on_thread;
use crate::error::{Error, Kind, Result};
use crate::format::container::{ContainerKind, ContainerWriter};
use crate::format::frame::FRAME_PLAIN_BYTES_MAX;
use crate::format::layout;
use crate::format::summary::LogObject;
use crate::model::id::IncarnationId;
use crate::model::log::{LogChunk, LogSummary};
use crate::repo::lease::LeaseKeeper;
use crate::repo::log_catalogue::{LogCatalogue, log_object};
use crate::repo::objects::{object_key, open_object};
use crate::repo::repository::Repository;
use crate::repo::upload::{Piece, body};
use crate::store::{Key, PutCondition};

/// Log compresses tenfold at level 1, faster than any network takes it.
const ZSTD_LEVEL: i32 = 1;
/// Frames between the thread that compresses and the store.
const FRAMES_IN_FLIGHT: usize = 2;

/// The bytes of a chunk, in order. Blocking: it is read on a thread of its own.
pub trait LogBytes: Send {
    /// The next bytes; empty at the end.
    fn read(&mut self) -> Result<Bytes>;
    /// What the bytes read so far contain.
    fn summary(&self) -> LogSummary;
}

/// What became of a chunk that is safe now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shipped {
    /// Bytes of the object; 0 if it was there before.
    pub stored_bytes: u64,
    pub was_there: bool,
}

/// See the module.
pub struct LogWriter {
    repo: Arc<Repository>,
    incarnation: IncarnationId,
    lease: Arc<LeaseKeeper>,
    catalogue: Arc<LogCatalogue>,
    /// Finished files whose chunks could not be deleted.
    with_chunks: Mutex<BTreeSet<String>>,
}

/// More such files are not remembered: their chunks harm nobody, and cost a little.
const WITH_CHUNKS_MAX: usize = 1000;

impl LogWriter {
    /// A writer for the incarnation whose lease is held. The catalogue learns of everything that it ships.
    pub fn new(repo: Arc<Repository>, lease: Arc<LeaseKeeper>, catalogue: Arc<LogCatalogue>) -> LogWriter {
        LogWriter { repo, incarnation: lease.incarnation(), lease, catalogue, with_chunks: Mutex::default() }
    }

    pub fn catalogue(&self) -> &Arc<LogCatalogue> {
        &self.catalogue
    }

    /// Makes a chunk durable in the repository; when this returns, the database may forget it. `source` gives exactly
    /// the bytes of the chunk. A sealed chunk is the whole file. A chunk of an open file begins where the archive of
    /// the file ends, or before it.
    pub async fn ship(&self, chunk: LogChunk, source: Box<dyn LogBytes>) -> Result<Shipped> {
        let what = match chunk.sealed {
            true => format!("cannot archive log file '{}'", chunk.file),
            false => {
                format!("cannot archive bytes {} to {} of log file '{}'", chunk.from_bytes, chunk.to_bytes, chunk.file)
            }
        };
        self.ship_chunk(chunk, source).await.map_err(|error| error.while_doing(what))
    }

    async fn ship_chunk(&self, chunk: LogChunk, source: Box<dyn LogBytes>) -> Result<Shipped> {
        self.lease.check()?;
        if self.catalogue.is_uncertain(&chunk.file) {
            self.catalogue.refresh_file(&chunk.file).await?;
        }
        if chunk.sealed {
            let shipped = self.ship_sealed(&chunk, source).await?;
            self.delete_superseded_chunks(&chunk.file).await?;
            return Ok(shipped);
        }
        if self.catalogue.is_sealed(&chunk.file) {
            return Err(Error::new(Kind::Conflict, "the repository has it as a finished file")
                .hint("was this data directory set back to an earlier state? Then it must begin a new incarnation"));
        }
        if chunk.from_bytes > self.catalogue.chunked_bytes(&chunk.file) {
            self.catalogue.refresh_file(&chunk.file).await?;
        }
        let archived = self.catalogue.chunked_bytes(&chunk.file);
        if chunk.from_bytes > archived {
            return Err(Error::new(Kind::Internal, format!("the archive of it ends at {archived}")));
        }
        if chunk.to_bytes <= archived {
            return Ok(Shipped { stored_bytes: 0, was_there: true });
        }
        let key = layout::log_chunk_key(self.incarnation, &chunk.file, chunk.from_bytes, chunk.to_bytes)?;
        self.put(object_key(key)?, chunk, source).await
    }

    async fn ship_sealed(&self, chunk: &LogChunk, source: Box<dyn LogBytes>) -> Result<Shipped> {
        if chunk.from_bytes != 0 {
            return Err(Error::new(Kind::Internal, "a finished file is archived as a whole"));
        }
        let key = object_key(layout::sealed_log_key(self.incarnation, &chunk.file)?)?;
        if !self.catalogue.is_sealed(&chunk.file) {
            return self.put(key, chunk.clone(), source).await;
        }
        let length = chunk.to_bytes;
        let hash = run_on_thread("keiki-compare", move || hash_source(source, length, None, None)).await?;
        self.compare(&key, chunk, &hash.0).await
    }

    /// Streams the chunk into a new object. If there is one already, its content decides.
    async fn put(&self, key: Key, chunk: LogChunk, source: Box<dyn LogBytes>) -> Result<Shipped> {
        let (sender, receiver) = mpsc::channel(FRAMES_IN_FLIGHT);
        let is_unwanted = Arc::new(AtomicBool::new(false));
        // Stops the thread when this future is dropped.
        let _stop = SetOnDrop(is_unwanted.clone());
        let encoder = Encoder {
            key: key.clone(),
            chunk: chunk.clone(),
            sender,
            is_unwanted: is_unwanted.clone(),
            stored_bytes: 0,
        };
        let body = body(receiver, self.lease.clone());
        let store = self.repo.store().clone();
        let put = async {
            let outcome = store.put_stream(&key, body, PutCondition::Create).await;
            // Only a conflict needs the hash of the rest.
            let is_conflict = outcome.as_ref().is_err_and(|error| error.kind() == Kind::Conflict);
            is_unwanted.store(outcome.is_err() && !is_conflict, Ordering::Relaxed);
            outcome
        };
        let (encoded, stored) = tokio::join!(run_on_thread("keiki-ship", move || encoder.run(source)), put);
        match stored {
            Ok(_) => {
                let (object, stored_bytes) = encoded?;
                self.catalogue.note_shipped(object, key, stored_bytes);
                Ok(Shipped { stored_bytes, was_there: false })
            }
            Err(error) if error.kind() == Kind::Conflict => {
                self.catalogue.note_uncertain(&chunk.file);
                self.compare(&key, &chunk, &encoded?.0.content_hash).await
            }
            Err(error) => {
                self.catalogue.note_uncertain(&chunk.file);
                Err(error)
            }
        }
    }

    /// The object is there: is it this chunk?
    async fn compare(&self, key: &Key, chunk: &LogChunk, content_hash: &str) -> Result<Shipped> {
        let store = self.repo.store().as_ref();
        let Some(info) = store.head(key).await? else {
            return Err(Error::new(Kind::Unreachable, format!("object '{key}' is there and then it is not")));
        };
        let open = open_object(store, key, info.size_bytes, ContainerKind::Log).await?;
        let object = log_object(self.incarnation, &open)?;
        if object.chunk == *chunk && object.content_hash == content_hash {
            self.catalogue.note_shipped(object, key.clone(), info.size_bytes);
            return Ok(Shipped { stored_bytes: 0, was_there: true });
        }
        let here = chunk.to_bytes - chunk.from_bytes;
        Err(other_content(&object.chunk, here, &format!("; object '{key}' was left as it is")))
    }

    /// Compares a chunk that is archived with the bytes that the server has there: `Conflict` if they are others. `source`
    /// gives the server's bytes of the chunk; nothing if it has fewer.
    pub async fn compare_chunk(&self, archived: &LogObject, source: Option<Box<dyn LogBytes>>) -> Result<()> {
        let chunk = &archived.chunk;
        let what = || format!("cannot go on with log file '{}'", chunk.file);
        let Some(source) = source else { return Err(other_content(chunk, 0, "").while_doing(what())) };
        let length = chunk.to_bytes - chunk.from_bytes;
        match run_on_thread("keiki-compare", move || hash_source(source, length, None, None)).await {
            Ok((hash, _)) if hash == archived.content_hash => Ok(()),
            // What was archived made sense up to its end. If the same bytes here do not, they are others.
            Err(error) if error.kind() != Kind::Damaged => Err(error),
            _ => Err(other_content(chunk, length, "").while_doing(what())),
        }
    }

    /// Deletes the chunks of a finished file; and if that works, those of earlier ones of which it did not.
    async fn delete_superseded_chunks(&self, file: &str) -> Result<()> {
        let mut files = vec![file.to_string()];
        while let Some(file) = files.pop() {
            if !self.delete_chunks_of(&file).await? {
                files.push(file);
                break;
            }
            files.extend(std::mem::take(&mut *self.lock_with_chunks()));
        }
        let mut with_chunks = self.lock_with_chunks();
        let room = WITH_CHUNKS_MAX.saturating_sub(with_chunks.len());
        with_chunks.extend(files.into_iter().take(room));
        Ok(())
    }

    /// Whether no chunk of the file is there any more.
    async fn delete_chunks_of(&self, file: &str) -> Result<bool> {
        let chunks = self.catalogue.superseded_chunks(file)?;
        if chunks.is_empty() {
            return Ok(true);
        }
        self.lease.check()?;
        let keys: Vec<Key> = chunks.iter().map(|chunk| chunk.key.clone()).collect();
        let outcome = self.repo.store().delete(&keys).await;
        match &outcome {
            Ok(()) => self.catalogue.forget_chunks(file, &chunks),
            // The file is safe, which is what was asked; readers ignore these chunks, and they stay in the catalogue.
            Err(error) => tracing::warn!(file, %error, "chunks of a finished log file could not be deleted"),
        }
        Ok(outcome.is_ok())
    }

    fn lock_with_chunks(&self) -> MutexGuard<'_, BTreeSet<String>> {
        // Held for operations of a set only, which cannot panic.
        self.with_chunks.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn other_content(archived: &LogChunk, here_bytes: u64, more: &str) -> Error {
    let there_bytes = archived.to_bytes - archived.from_bytes;
    let bytes = format!("{there_bytes} bytes there, {here_bytes} bytes here");
    let what = format!("the repository has it with other content ({bytes}){more}");
    Error::new(Kind::Conflict, what).hint(
        "did another server write under this incarnation, or was this data directory restored or set back? Then it must \
         begin a new incarnation; archiving has stopped so that nothing is lost",
    )
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The thread between the source and the store.
struct Encoder {
    key: Key,
    chunk: LogChunk,
    sender: mpsc::Sender<Piece>,
    is_unwanted: Arc<AtomicBool>,
    stored_bytes: u64,
}

impl Encoder {
    /// Reads and sends everything. Goes on reading, for the hash, if the store does not want the rest.
    fn run(mut self, source: Box<dyn LogBytes>) -> Result<(LogObject, u64)> {
        let outcome = self.encode(source);
        if let Err(error) = &outcome {
            // If nobody listens any more, the error is in the outcome anyway.
            let _ = self.sender.blocking_send(Piece::Failed(error.clone()));
        }
        Ok((outcome?, self.stored_bytes))
    }

    fn encode(&mut self, source: Box<dyn LogBytes>) -> Result<LogObject> {
        let (mut writer, head) = ContainerWriter::begin(ContainerKind::Log, self.key.as_str(), ZSTD_LEVEL)?;
        self.send(Piece::More(head));
        let length = self.chunk.to_bytes - self.chunk.from_bytes;
        let is_unwanted = self.is_unwanted.clone();
        let mut frame = |plain: &[u8]| {
            if !self.sender.is_closed() {
                let (_, bytes) = writer.frame(plain)?;
                self.send(Piece::More(bytes));
            }
            Ok(())
        };
        let (content_hash, summary) = hash_source(source, length, Some(&mut frame), Some(&is_unwanted))?;
        let object = LogObject { chunk: self.chunk.clone(), content_hash, summary };
        let end = writer.finish(&object.document())?;
        self.send(Piece::Last(end));
        Ok(object)
    }

    fn send(&mut self, piece: Piece) {
        let bytes = match &piece {
            Piece::More(bytes) | Piece::Last(bytes) => bytes.len() as u64,
            Piece::Failed(_) => 0,
        };
        // A closed channel means that the store has given up; its reason is the one that counts.
        if self.sender.blocking_send(piece).is_ok() {
            self.stored_bytes += bytes;
        }
    }
}

type FrameSink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// Reads exactly `length` bytes, gives them on in frames of 1 MiB, and returns the hash of all and what they contain.
fn hash_source(
    mut source: Box<dyn LogBytes>,
    length: u64,
    mut frame: Option<FrameSink<'_>>,
    is_unwanted: Option<&AtomicBool>,
) -> Result<(String, LogSummary)> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer: Vec<u8> = Vec::new();
    let mut total = 0u64;
    loop {
        if is_unwanted.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            return Err(Error::new(Kind::Cancelled, "archiving was stopped"));
        }
        let mut piece = source.read()?;
        if piece.is_empty() {
            break;
        }
        total = total.saturating_add(piece.len() as u64);
        if total > length {
            return Err(Error::new(
                Kind::Internal,
                format!("the source gave more than the {length} bytes of the chunk"),
            ));
        }
        hasher.update(&piece);
        let Some(frame) = frame.as_mut() else { continue };
        while !piece.is_empty() {
            if buffer.is_empty() && piece.len() >= FRAME_PLAIN_BYTES_MAX {
                frame(&piece.split_to(FRAME_PLAIN_BYTES_MAX))?;
                continue;
            }
            let room = FRAME_PLAIN_BYTES_MAX - buffer.len();
            buffer.extend_from_slice(&piece.split_to(room.min(piece.len())));
            if buffer.len() == FRAME_PLAIN_BYTES_MAX {
                frame(&buffer)?;
                buffer.clear();
            }
        }
    }
    if total != length {
        let reason = format!("the source ended after {total} of {length} bytes");
        return Err(Error::new(Kind::Damaged, reason).hint("was the file removed or shortened while it was read?"));
    }
    if let Some(frame) = frame
        && !buffer.is_empty()
    {
        frame(&buffer)?;
    }
    Ok((hasher.finalize().to_hex().to_string(), source.summary()))
}

#[cfg(test)]
mod tests;
