//! Reads the bytes of archived log files, verified, from whichever objects hold them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};

use crate::error::{Error, Kind, Result};
use crate::format::container::ContainerKind;
use crate::model::id::IncarnationId;
use crate::repo::log_catalogue::{LogCatalogue, LogPiece, log_object};
use crate::repo::objects::{OpenObject, frames_for, open_object, read_frames};
use crate::repo::repository::Repository;

/// Indexes of the objects that were read last are kept.
const OPEN_OBJECTS_MAX: usize = 16;

/// See the module. Reading ahead is the caller's business: calls may overlap.
pub struct LogReader {
    repo: Arc<Repository>,
    catalogue: Arc<LogCatalogue>,
    open: Mutex<VecDeque<Arc<OpenLog>>>,
}

struct OpenLog {
    object: OpenObject,
    from_bytes: u64,
    to_bytes: u64,
}

impl LogReader {
    pub fn new(repo: Arc<Repository>, catalogue: Arc<LogCatalogue>) -> LogReader {
        LogReader { repo, catalogue, open: Mutex::default() }
    }

    pub fn catalogue(&self) -> &Arc<LogCatalogue> {
        &self.catalogue
    }

    /// The bytes of a log file from byte `from` on: `max_bytes`, or fewer where the archive of the file ends; none at
    /// its end. All of them are in memory at once. Bytes that are not what was written are `Damaged`, a file that is
    /// not there is `NotFound`.
    pub async fn read(&self, name: &str, from: u64, max_bytes: usize) -> Result<Bytes> {
        match self.read_once(name, from, max_bytes).await {
            // Chunks go when their file is finished: then the file is there instead.
            Err(error) if error.kind() == Kind::NotFound => {
                self.catalogue.refresh_file(name).await?;
                self.read_once(name, from, max_bytes).await
            }
            other => other,
        }
        .map_err(|error| error.while_doing(format!("cannot read log file '{name}' from the repository")))
    }

    async fn read_once(&self, name: &str, from: u64, max_bytes: usize) -> Result<Bytes> {
        let mut at = from;
        let mut left = max_bytes;
        let mut parts: Vec<Bytes> = Vec::new();
        for piece in self.catalogue.pieces(name)? {
            if left == 0 {
                break;
            }
            let log = self.open(&piece).await?;
            if at < log.from_bytes || at >= log.to_bytes {
                continue;
            }
            let until = log.to_bytes.min(at.saturating_add(left as u64));
            let wanted = at - log.from_bytes..until - log.from_bytes;
            let (numbers, content_at) = frames_for(&log.object.index.frames, &wanted);
            let content = read_frames(self.repo.store().as_ref(), &log.object, numbers).await?;
            let (start, end) = ((wanted.start - content_at) as usize, (wanted.end - content_at) as usize);
            if end > content.len() {
                return Err(log.object.seal.damaged("its frames end early"));
            }
            parts.push(content.slice(start..end));
            left -= (until - at) as usize;
            at = until;
        }
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        let mut all = BytesMut::with_capacity(max_bytes - left);
        parts.iter().for_each(|part| all.extend_from_slice(part));
        Ok(all.freeze())
    }

    async fn open(&self, piece: &LogPiece) -> Result<Arc<OpenLog>> {
        if let Some(known) = self.lock().iter().find(|log| log.object.key == piece.key) {
            return Ok(known.clone());
        }
        let store = self.repo.store().as_ref();
        let object = open_object(store, &piece.key, piece.size_bytes, ContainerKind::Log).await?;
        let chunk = log_object(self.incarnation(), &object)?.chunk;
        let log = Arc::new(OpenLog { object, from_bytes: chunk.from_bytes, to_bytes: chunk.to_bytes });
        let mut open = self.lock();
        if open.len() == OPEN_OBJECTS_MAX {
            open.pop_front();
        }
        open.push_back(log.clone());
        Ok(log)
    }

    fn incarnation(&self) -> IncarnationId {
        self.catalogue.incarnation()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Arc<OpenLog>>> {
        // Held for look-ups only, which cannot panic.
        self.open.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// All archived bytes of a small file, such as a timeline history; one of more than `max_bytes` is refused.
    pub async fn read_small(&self, name: &str, max_bytes: usize) -> Result<Bytes> {
        let bytes = self.read(name, 0, max_bytes.saturating_add(1)).await?;
        if bytes.len() > max_bytes {
            return Err(Error::new(Kind::Damaged, format!("log file '{name}' is longer than {max_bytes} bytes")));
        }
        Ok(bytes)
    }
}
