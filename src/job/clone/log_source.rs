//! The log of a replay: the repository's log files, read ahead while the server replays the earlier ones.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::engine::LogSource;
use crate::engine::geometry::LogGeometry;
use crate::error::{Error, Kind, Result};
use crate::job::window::is_gap;
use crate::model::position::Position;
use crate::repo::log_reader::LogReader;

/// Files up to this size are read as a whole and ahead; longer ones in the pieces that are asked for.
const WHOLE_FILE_BYTES_MAX: u64 = 64 << 20;
/// Files that are on their way while one is replayed. With PostgreSQL's usual segments this holds 64 MiB.
const FILES_AHEAD: usize = 3;

/// See the module. What the repository holds is looked up once: the log does not grow under a replay.
pub struct RepositoryLog {
    reader: Arc<LogReader>,
    geometry: Arc<dyn LogGeometry>,
    /// Files that begin here or later are left alone: log before them may be on its way still.
    end: Option<Position>,
    ahead: Mutex<BTreeMap<String, JoinHandle<Result<Bytes>>>>,
}

impl RepositoryLog {
    /// `end` is where the log ends of which nothing is on its way any more.
    pub fn new(reader: Arc<LogReader>, geometry: Arc<dyn LogGeometry>, end: Option<Position>) -> RepositoryLog {
        RepositoryLog { reader, geometry, end, ahead: Mutex::default() }
    }

    fn is_beyond_the_end(&self, name: &str) -> Result<bool> {
        let (Some(end), Some((start, _))) = (self.end, self.geometry.span(name, 0)?) else { return Ok(false) };
        Ok(start == end || is_gap(end, start))
    }

    /// Begins to read the files that follow `name`, unless they are on their way.
    async fn read_ahead(&self, name: &str) -> Result<()> {
        let mut ahead = self.ahead.lock().await;
        // What lies before the file that is wanted now was skipped and will not be asked for.
        let passed: Vec<String> = ahead.keys().filter(|known| known.as_str() < name).cloned().collect();
        for name in passed {
            if let Some(task) = ahead.remove(&name) {
                task.abort();
            }
        }
        let mut next = name.to_string();
        for _ in 0..FILES_AHEAD {
            next = self.geometry.next_file(&next)?;
            if ahead.contains_key(&next) {
                continue;
            }
            let Some(bytes) = self.available(&next).await? else { break };
            if bytes > WHOLE_FILE_BYTES_MAX {
                break;
            }
            let (reader, file) = (self.reader.clone(), next.clone());
            let task = tokio::spawn(async move { reader.read(&file, 0, bytes as usize).await });
            ahead.insert(next.clone(), task);
        }
        Ok(())
    }
}

#[async_trait]
impl LogSource for RepositoryLog {
    async fn available(&self, name: &str) -> Result<Option<u64>> {
        if self.is_beyond_the_end(name)? {
            return Ok(None);
        }
        Ok(self.reader.catalogue().file(name).await?.map(|file| file.bytes).filter(|bytes| *bytes > 0))
    }

    async fn is_sealed(&self, name: &str) -> Result<bool> {
        Ok(self.reader.catalogue().file(name).await?.is_some_and(|file| file.sealed))
    }

    async fn read(&self, name: &str, from: u64, max_bytes: usize) -> Result<Bytes> {
        if from > 0 || self.geometry.span(name, 0)?.is_none() {
            return self.reader.read(name, from, max_bytes).await;
        }
        let begun = self.ahead.lock().await.remove(name);
        self.read_ahead(name).await?;
        let Some(task) = begun else { return self.reader.read(name, from, max_bytes).await };
        let bytes = task.await.map_err(|error| {
            Error::new(Kind::Internal, format!("cannot read log file '{name}' ahead: the task ended: {error}"))
        })??;
        Ok(bytes.slice(..bytes.len().min(max_bytes)))
    }
}
