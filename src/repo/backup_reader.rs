//! Reads backups: which there are, what files one has, and the frames of packs.
//!
//! A manifest is read a frame at a time, and checked as a whole when its end is reached: no record is missing and every
//! file is complete. Frames come undecoded with everything that is needed to check them, so that the thread that writes
//! them does the decoding, or a peer passes them on as they are.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;

use crate::base::bulk::run_blocking;
use crate::error::{Error, Kind, Result};
use crate::format::container::{ChainCheck, ContainerKind};
use crate::format::frame::{FRAME_HEADER_BYTES, FrameDecoder, FrameHeader, ObjectSeal};
use crate::format::layout;
use crate::format::manifest::{ManifestEntry, PackRef, read_records};
use crate::format::summary::ManifestObject;
use crate::model::backup::Backup;
use crate::model::id::{BackupId, IncarnationId};
use crate::repo::objects::{OpenObject, object_key, open_object};
use crate::repo::repository::Repository;
use crate::store::read::read_range;
use crate::store::{ByteStream, ObjectInfo};

mod known;

/// Stored bytes of a manifest that are fetched in one request.
const MANIFEST_FETCH_BYTES: u64 = 4 << 20;

pub use known::{BackupList, Backups};

pub(super) use known::KnownBackups;

async fn open_manifest(
    repo: &Repository,
    incarnation: IncarnationId,
    id: &BackupId,
    info: &ObjectInfo,
) -> Result<(OpenObject, ManifestObject)> {
    let open = open_object(repo.store().as_ref(), &info.key, info.size_bytes, ContainerKind::Manifest).await?;
    let object = ManifestObject::parse(&open.seal, &open.index.summary)?;
    if object.backup.id != *id || object.backup.incarnation != incarnation {
        return Err(open.seal.damaged("is the manifest of another backup"));
    }
    Ok((open, object))
}

/// A backup that is open for reading.
pub struct BackupReader {
    repo: Arc<Repository>,
    open: OpenObject,
    object: ManifestObject,
}

impl BackupReader {
    /// Opens a backup; `NotFound` if there is none of this name, `Damaged` if its manifest is not what was written.
    pub async fn open(repo: Arc<Repository>, incarnation: IncarnationId, id: &BackupId) -> Result<BackupReader> {
        let key = object_key(layout::manifest_key(incarnation, id))?;
        let Some(info) = repo.store().head(&key).await? else {
            return Err(Error::new(
                Kind::NotFound,
                format!("there is no backup '{id}' of incarnation '{incarnation}'"),
            )
            .hint("'keiki backup list' shows the backups that there are"));
        };
        let (open, object) =
            open_manifest(&repo, incarnation, id, &info).await.map_err(|error| another_one(error, id))?;
        Ok(BackupReader { repo, open, object })
    }

    pub fn backup(&self) -> &Backup {
        &self.object.backup
    }

    /// The records of the manifest from the beginning.
    pub fn entries(&self) -> EntryReader<'_> {
        EntryReader {
            reader: self,
            next_frame: 0,
            stored: Bytes::new(),
            stored_at: 0,
            chain: ChainCheck::default(),
            record_count: 0,
            incomplete: HashMap::new(),
            is_over: false,
        }
    }

    /// Frames of a pack, from the one at `offsets.start` to the one that ends at `offsets.end`, in one request.
    pub async fn read_run(&self, pack: PackRef, offsets: Range<u64>) -> Result<RunReader> {
        let key = object_key(layout::pack_key(pack.incarnation, pack.pack))?;
        let seal = ObjectSeal::of(key.as_str());
        let body = self.repo.store().get(&key, Some(offsets.clone())).await.map_err(|error| {
            let error = match error.kind() {
                Kind::NotFound => seal.damaged("is not in the repository any more"),
                Kind::BadInput => seal.damaged(format!("is shorter than it was: {}", error.message())),
                _ => error,
            };
            another_one(error, &self.object.backup.id)
        })?;
        Ok(RunReader {
            seal,
            backup: self.object.backup.id.clone(),
            body,
            arrived: BytesMut::new(),
            at: offsets.start,
            end: offsets.end,
        })
    }
}

/// A damaged backup: says which one, and what can be done at three in the morning.
fn another_one(error: Error, id: &BackupId) -> Error {
    let is_damage = error.kind() == Kind::Damaged;
    let error = error.while_doing(format!("cannot read backup '{id}'"));
    if is_damage {
        return error.hint(
            "choose another backup: 'keiki backup list' shows them, and replay from an earlier one \
                           reaches the same moments",
        );
    }
    error
}

/// Goes through the records of a manifest.
pub struct EntryReader<'a> {
    reader: &'a BackupReader,
    next_frame: usize,
    /// Frames that were fetched and not decoded yet, and the offset of the first.
    stored: Bytes,
    stored_at: u64,
    chain: ChainCheck,
    record_count: u64,
    /// Files of which parts were seen, but not the last: where the next one begins. At most one per lane.
    incomplete: HashMap<String, u64>,
    is_over: bool,
}

impl EntryReader<'_> {
    /// The next records, some thousands at most; nothing after the last. Only when this has returned nothing is it
    /// certain that all were the right ones.
    pub async fn next_batch(&mut self) -> Result<Option<Vec<ManifestEntry>>> {
        let id = &self.reader.object.backup.id;
        let batch = self.next_unnamed().await;
        batch.map_err(|error| another_one(error, id))
    }

    async fn next_unnamed(&mut self) -> Result<Option<Vec<ManifestEntry>>> {
        let open = &self.reader.open;
        let Some(place) = open.index.frames.get(self.next_frame).copied() else {
            return self.finish().map(|()| None);
        };
        if place.offset + u64::from(place.stored_bytes) > self.stored_at + self.stored.len() as u64 {
            self.fetch().await?;
        }
        let from = (place.offset - self.stored_at) as usize;
        let frame = self.stored.slice(from..from + place.stored_bytes as usize);
        let header = FrameHeader::parse(&open.seal, place.offset, &frame)?;
        self.chain.add(&header);
        let seal = open.seal.clone();
        let incarnation = self.reader.object.backup.incarnation;
        let entries = run_blocking("manifest", move || {
            let payload = frame.slice(FRAME_HEADER_BYTES..);
            let plain = FrameDecoder::new()?.decode(&seal, place.offset, &header, &payload)?;
            read_records(incarnation, &plain).map_err(|error| seal.damaged(error.message()))
        })
        .await?;
        for entry in &entries {
            self.check_order(entry)?;
        }
        self.record_count += entries.len() as u64;
        self.next_frame += 1;
        Ok(Some(entries))
    }

    async fn fetch(&mut self) -> Result<()> {
        let open = &self.reader.open;
        let mut range = 0..0;
        for frame in &open.index.frames[self.next_frame..] {
            let end = frame.offset + u64::from(frame.stored_bytes);
            match range.end {
                0 => range = frame.offset..end,
                _ if end - range.start <= MANIFEST_FETCH_BYTES => range.end = end,
                _ => break,
            }
        }
        self.stored_at = range.start;
        self.stored = read_range(self.reader.repo.store().as_ref(), &open.key, range).await?;
        Ok(())
    }

    fn check_order(&mut self, entry: &ManifestEntry) -> Result<()> {
        let ManifestEntry::Part(part) = entry else { return Ok(()) };
        let expected = self.incomplete.remove(&part.path).unwrap_or(0);
        if part.at != expected {
            let what = format!("the parts of file '{}' do not follow each other", part.path);
            return Err(self.reader.open.seal.damaged(what));
        }
        if !part.is_last {
            self.incomplete.insert(part.path.clone(), part.at + part.bytes);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let open = &self.reader.open;
        if self.is_over {
            return Ok(());
        }
        self.chain.finish(&open.seal, &open.index)?;
        if let Some(path) = self.incomplete.keys().next() {
            return Err(open.seal.damaged(format!("file '{path}' has no end")));
        }
        if self.record_count != self.reader.object.record_count {
            return Err(open.seal.damaged("it has another number of records than were written"));
        }
        self.is_over = true;
        Ok(())
    }
}

/// Frames of a pack as they arrive.
pub struct RunReader {
    seal: ObjectSeal,
    backup: BackupId,
    body: ByteStream,
    arrived: BytesMut,
    at: u64,
    end: u64,
}

/// A frame as it is stored.
#[derive(Debug, Clone)]
pub struct StoredFrame {
    seal: ObjectSeal,
    backup: BackupId,
    /// Where it lies in its pack.
    pub offset: u64,
    header: FrameHeader,
    payload: Bytes,
}

impl RunReader {
    /// The next frame, or nothing after the last.
    pub async fn next(&mut self) -> Result<Option<StoredFrame>> {
        let frame = self.next_unnamed().await;
        frame.map_err(|error| another_one(error, &self.backup))
    }

    async fn next_unnamed(&mut self) -> Result<Option<StoredFrame>> {
        if self.at == self.end {
            return Ok(None);
        }
        self.fill(FRAME_HEADER_BYTES).await?;
        let header = FrameHeader::parse(&self.seal, self.at, &self.arrived)?;
        if self.at + u64::from(header.stored_bytes()) > self.end {
            return Err(self.seal.damaged(format!("the frame at byte {} is longer than it was", self.at)));
        }
        self.fill(header.stored_bytes() as usize).await?;
        self.arrived.advance(FRAME_HEADER_BYTES);
        let payload = self.arrived.split_to(header.payload_bytes as usize).freeze();
        let (seal, backup) = (self.seal.clone(), self.backup.clone());
        let frame = StoredFrame { seal, backup, offset: self.at, header, payload };
        self.at += u64::from(header.stored_bytes());
        Ok(Some(frame))
    }

    async fn fill(&mut self, bytes: usize) -> Result<()> {
        while self.arrived.len() < bytes {
            match self.body.next().await {
                Some(piece) => self.arrived.extend_from_slice(&piece?),
                None => {
                    let reason = format!("object '{}': its bytes stopped coming at {}", self.seal.key(), self.at);
                    return Err(Error::new(Kind::Unreachable, reason));
                }
            }
        }
        Ok(())
    }
}

impl StoredFrame {
    /// The checked content. `decoder` is the thread's own.
    pub fn decode(&self, decoder: &mut FrameDecoder) -> Result<Bytes> {
        let plain = decoder.decode(&self.seal, self.offset, &self.header, &self.payload);
        plain.map_err(|error| another_one(error, &self.backup))
    }

    /// Bytes of the content.
    pub fn plain_bytes(&self) -> u32 {
        self.header.plain_bytes
    }
}
