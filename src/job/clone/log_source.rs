//! The log of a replay: the repository's log files in blocks, the next ones being fetched while the server replays the
//! earlier ones.
//!
//! In memory are at most the block that is read and [`BLOCKS_AHEAD`] more, however long the files are.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

use crate::engine::LogSource;
use crate::engine::geometry::LogGeometry;
use crate::error::{Error, Kind, Result};
use crate::job::window::is_gap;
use crate::model::position::Position;
use crate::repo::log_reader::LogReader;

/// A usual segment of PostgreSQL is one block, which then is handed out as it was decoded.
const BLOCK_BYTES: u64 = 16 << 20;
/// Blocks that are on their way while one is read.
const BLOCKS_AHEAD: usize = 3;

/// A block of a log file by the file's name and the block's number in it; in the order of the log.
type BlockId = (String, u64);

/// See the module. What the repository holds is looked up once: the log does not grow under a replay.
pub struct RepositoryLog {
    reader: Arc<LogReader>,
    geometry: Arc<dyn LogGeometry>,
    /// Files that begin here or later are left alone: log before them may be on its way still.
    end: Option<Position>,
    block_bytes: u64,
    blocks: Mutex<Blocks>,
}

#[derive(Default)]
struct Blocks {
    /// The block that was read last, for whoever reads it in pieces.
    current: Option<(BlockId, Bytes)>,
    ahead: BTreeMap<BlockId, AbortOnDropHandle<Result<Bytes>>>,
}

impl RepositoryLog {
    /// `end` is where the log ends of which nothing is on its way any more.
    pub fn new(reader: Arc<LogReader>, geometry: Arc<dyn LogGeometry>, end: Option<Position>) -> RepositoryLog {
        RepositoryLog { reader, geometry, end, block_bytes: BLOCK_BYTES, blocks: Mutex::default() }
    }

    fn is_beyond_the_end(&self, name: &str) -> Result<bool> {
        let (Some(end), Some((start, _))) = (self.end, self.geometry.span(name, 0)?) else { return Ok(false) };
        Ok(start == end || is_gap(end, start))
    }

    /// A block of a file that is available.
    async fn block(&self, name: &str, number: u64) -> Result<Bytes> {
        let id = (name.to_string(), number);
        let begun = {
            let mut blocks = self.blocks.lock().await;
            match &blocks.current {
                Some((current, bytes)) if *current == id => return Ok(bytes.clone()),
                _ => blocks.current = None,
            }
            blocks.ahead.remove(&id)
        };
        let begun = begun.unwrap_or_else(|| self.fetch(&id));
        self.fetch_ahead(&id).await?;
        let bytes = begun.await.map_err(|error| {
            Error::new(Kind::Internal, format!("cannot read log file '{name}' ahead: the task ended: {error}"))
        })??;
        self.blocks.lock().await.current = Some((id, bytes.clone()));
        Ok(bytes)
    }

    fn fetch(&self, id: &BlockId) -> AbortOnDropHandle<Result<Bytes>> {
        let (reader, (name, number), block_bytes) = (self.reader.clone(), id.clone(), self.block_bytes);
        let most = usize::try_from(block_bytes).unwrap_or(usize::MAX);
        AbortOnDropHandle::new(tokio::spawn(async move { reader.read(&name, number * block_bytes, most).await }))
    }

    /// Begins to fetch the blocks that follow, unless they are on their way. Others are given up: what lies before the
    /// block that is wanted now was skipped.
    async fn fetch_ahead(&self, id: &BlockId) -> Result<()> {
        let mut following: Vec<BlockId> = Vec::new();
        let mut next = Some(id.clone());
        while following.len() < BLOCKS_AHEAD
            && let Some(last) = next.take()
        {
            next = self.block_after(&last).await?;
            following.extend(next.clone());
        }
        let mut blocks = self.blocks.lock().await;
        blocks.ahead.retain(|id, _| following.contains(id));
        for id in following {
            let task = || self.fetch(&id);
            blocks.ahead.entry(id.clone()).or_insert_with(task);
        }
        Ok(())
    }

    async fn block_after(&self, (name, number): &BlockId) -> Result<Option<BlockId>> {
        let next_at = (number + 1).saturating_mul(self.block_bytes);
        if self.available(name).await?.is_some_and(|bytes| next_at < bytes) {
            return Ok(Some((name.clone(), number + 1)));
        }
        let next = self.geometry.next_file(name)?;
        Ok(self.available(&next).await?.map(|_| (next, 0)))
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
        if self.geometry.span(name, 0)?.is_none() {
            return self.reader.read(name, from, max_bytes).await;
        }
        let mut parts: Vec<Bytes> = Vec::new();
        let (mut at, mut left) = (from, max_bytes);
        while left > 0 {
            let block = self.block(name, at / self.block_bytes).await?;
            let start = usize::try_from(at % self.block_bytes).unwrap_or(usize::MAX).min(block.len());
            let part = block.slice(start..start.saturating_add(left).min(block.len()));
            at += part.len() as u64;
            left -= part.len();
            let is_last = part.is_empty() || (block.len() as u64) < self.block_bytes;
            parts.push(part);
            if is_last {
                break;
            }
        }
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        let mut all = BytesMut::with_capacity(max_bytes - left);
        parts.iter().for_each(|part| all.extend_from_slice(part));
        Ok(all.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake::geometry::{FILE_BYTES, FakeGeometry, file_name};
    use crate::job::testing::Site;
    use crate::repo::log_catalogue::LogCatalogue;

    async fn log_of(site: &Site, events: u64, block_bytes: u64) -> RepositoryLog {
        let archiver = site.archiver().await;
        site.write(events);
        archiver.ship_now().await.unwrap();
        let catalogue = LogCatalogue::load(site.repo.clone(), archiver.incarnation()).await.unwrap();
        let reader = Arc::new(LogReader::new(site.repo.clone(), catalogue));
        let blocks = Mutex::default();
        RepositoryLog { reader, geometry: Arc::new(FakeGeometry), end: None, block_bytes, blocks }
    }

    #[tokio::test]
    async fn whatever_the_pieces_the_bytes_are_those_of_the_file() {
        let site = Site::new().await;
        let log = log_of(&site, 64 * 3 + 10, 300).await;
        for number in 0..4 {
            let name = file_name(number);
            let bytes = log.available(&name).await.unwrap().unwrap();
            let wanted = log.reader.read(&name, 0, FILE_BYTES as usize).await.unwrap();
            assert_eq!(wanted.len() as u64, bytes);
            for piece in [1, 7, 299, 300, 301, 900, FILE_BYTES as usize * 2] {
                let mut found = Vec::new();
                while (found.len() as u64) < bytes {
                    let part = log.read(&name, found.len() as u64, piece).await.unwrap();
                    assert!(!part.is_empty() && part.len() <= piece);
                    found.extend_from_slice(&part);
                }
                assert!(wanted == found, "'{name}' in pieces of {piece}");
                assert!(log.read(&name, bytes, piece).await.unwrap().is_empty());
            }
        }
    }

    #[tokio::test]
    async fn only_a_few_blocks_are_in_memory_and_each_is_fetched_once() {
        let site = Site::new().await;
        let log = log_of(&site, 64 * 4, FILE_BYTES / 2).await;
        let ahead = async || -> Vec<BlockId> { log.blocks.lock().await.ahead.keys().cloned().collect() };
        log.read(&file_name(0), 0, 10).await.unwrap();
        let id = |file, block| (file_name(file), block);
        assert_eq!(ahead().await, [id(0, 1), id(1, 0), id(1, 1)]);
        log.read(&file_name(0), 10, 10).await.unwrap();
        log.read(&file_name(0), FILE_BYTES / 2 + 10, 10).await.unwrap();
        assert_eq!(ahead().await, [id(1, 0), id(1, 1), id(2, 0)]);
        // Whoever skips what comes next does not pay for it any longer; at the end there is no more.
        log.read(&file_name(3), 0, 10).await.unwrap();
        assert_eq!(ahead().await, [id(3, 1)]);
    }
}
