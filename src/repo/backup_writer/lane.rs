//! One lane of a backup: cuts files into frames, frames into packs, and says where everything went.
//!
//! A file is cut at multiples of 1 MiB. What remains at its end, if it is small, shares a frame with the ends of other
//! files, so that a hundred thousand small files are a few thousand frames. Stretches of 1 MiB that are all zero, and
//! ends that are, become holes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Shared, lock};
use crate::error::{Error, Kind, Result};
use crate::format::container::{ContainerKind, ContainerWriter, FramePlace};
use crate::format::frame::{FRAME_HEADER_BYTES, FRAME_PLAIN_BYTES_MAX};
use crate::format::layout;
use crate::format::manifest::{
    Extent, FilePart, HASHED_BLOCK_BYTES, ManifestEntry, PART_BYTES, PackRef, Run, block_hash, check_path,
};
use crate::format::summary::PackObject;
use crate::model::backup::{FileKind, FileMeta};
use crate::model::id::PackId;
use crate::repo::objects::object_key;
use crate::repo::upload::{Piece, body};
use crate::store::{Key, PutCondition};

/// A pack is finished when another frame might make it larger than this with its index.
const PACK_BYTES_MAX: u64 = 64 << 20;
/// Or when it has so many frames: content that compresses to nothing would make the index large.
const PACK_FRAMES_MAX: usize = 4096;
/// Room for the index and footer of a pack of that many frames.
const PACK_END_BYTES: u64 = 128 << 10;
/// An end of a file that is not longer than this shares a frame.
const SHARED_END_BYTES_MAX: usize = 256 << 10;
/// Files that wait for their shared frame, at most.
const PENDING_FILES_MAX: usize = 4096;
/// Frames on their way from this thread to the store.
const FRAMES_IN_FLIGHT: usize = 2;
/// Finished packs whose last bytes the store is still taking, while the next one is begun.
const UPLOADS_ENDING_MAX: usize = 1;

/// See the module. For a plain thread: all calls may block, and must not be made on the runtime's own threads. A lane
/// that has returned an error can only be dropped; then there will be no backup.
pub struct PackLane {
    shared: Arc<Shared>,
    file: Option<OpenFile>,
    pack: Option<OpenPack>,
    /// Content of the frame that several files share.
    shared_frame: Vec<u8>,
    pending: Vec<Pending>,
    ending: VecDeque<JoinHandle<Result<()>>>,
    is_finished: bool,
}

/// The file that is being written.
struct OpenFile {
    part: FilePart,
    /// Less than a frame of content that is not cut yet.
    rest: Vec<u8>,
}

/// The last part of a file whose end lies in the shared frame.
struct Pending {
    part: FilePart,
    at: usize,
    bytes: usize,
}

struct OpenPack {
    pack: PackRef,
    writer: ContainerWriter,
    sender: mpsc::Sender<Piece>,
    upload: JoinHandle<Result<()>>,
}

impl PackLane {
    pub(super) fn new(shared: Arc<Shared>) -> PackLane {
        shared.lanes_open.fetch_add(1, Ordering::AcqRel);
        PackLane {
            shared,
            file: None,
            pack: None,
            shared_frame: Vec::new(),
            pending: Vec::new(),
            ending: VecDeque::new(),
            is_finished: false,
        }
    }

    /// Records a directory or a link, or begins a regular file.
    pub fn begin(&mut self, meta: FileMeta) -> Result<()> {
        if let Some(open) = &self.file {
            return Err(Error::new(Kind::Internal, format!("file '{}' was not ended", open.part.path)));
        }
        check_path(&meta.path)?;
        let mode = meta.mode & 0o7777;
        match meta.kind {
            FileKind::Directory => self.shared.add(&ManifestEntry::Directory { path: meta.path, mode }),
            FileKind::Link { to } => self.shared.add(&ManifestEntry::Link { path: meta.path, mode, to }),
            FileKind::Regular => {
                self.file = Some(OpenFile { part: empty_part(meta.path, mode, 0), rest: Vec::new() });
                Ok(())
            }
        }
    }

    /// The next bytes of the file that was begun. Pieces of 1 MiB at multiples of 1 MiB are not copied.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        let mut file = self.take_file()?;
        self.shared.read_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        while !bytes.is_empty() {
            if file.rest.is_empty() && bytes.len() >= FRAME_PLAIN_BYTES_MAX {
                let (frame, after) = bytes.split_at(FRAME_PLAIN_BYTES_MAX);
                self.cut(&mut file.part, frame)?;
                bytes = after;
                continue;
            }
            let room = FRAME_PLAIN_BYTES_MAX - file.rest.len();
            let (now, after) = bytes.split_at(room.min(bytes.len()));
            file.rest.extend_from_slice(now);
            bytes = after;
            if file.rest.len() == FRAME_PLAIN_BYTES_MAX {
                self.cut(&mut file.part, &file.rest)?;
                file.rest.clear();
            }
        }
        self.file = Some(file);
        Ok(())
    }

    /// Ends the file.
    pub fn end(&mut self) -> Result<()> {
        let OpenFile { mut part, rest } = self.take_file()?;
        let shares = !rest.is_empty() && rest.len() <= SHARED_END_BYTES_MAX && !is_zero(&rest);
        if shares {
            self.make_room(&mut part)?;
            add_hashes(&mut part, &rest);
            if self.shared_frame.len() + rest.len() > FRAME_PLAIN_BYTES_MAX || self.pending.len() == PENDING_FILES_MAX {
                self.flush_shared_frame()?;
            }
            part.is_last = true;
            self.pending.push(Pending { part, at: self.shared_frame.len(), bytes: rest.len() });
            self.shared_frame.extend_from_slice(&rest);
            return Ok(());
        }
        if !rest.is_empty() {
            self.cut(&mut part, &rest)?;
        }
        part.is_last = true;
        self.shared.add(&ManifestEntry::Part(part))
    }

    /// Ends the lane: everything given to it is stored when this returns.
    pub fn finish(mut self) -> Result<()> {
        if let Some(open) = &self.file {
            return Err(Error::new(Kind::Internal, format!("file '{}' was not ended", open.part.path)));
        }
        self.flush_shared_frame()?;
        self.finish_pack()?;
        self.wait_for_uploads(0)?;
        self.is_finished = true;
        Ok(())
    }

    fn take_file(&mut self) -> Result<OpenFile> {
        self.file.take().ok_or_else(|| Error::new(Kind::Internal, "no file was begun"))
    }

    /// If the part is full, records it and begins the next one.
    fn make_room(&mut self, part: &mut FilePart) -> Result<()> {
        if part.bytes < PART_BYTES {
            return Ok(());
        }
        let next = empty_part(part.path.clone(), part.mode, part.at + PART_BYTES);
        self.shared.add(&ManifestEntry::Part(std::mem::replace(part, next)))
    }

    /// Adds the next stretch of a file, up to 1 MiB: a frame or a hole.
    fn cut(&mut self, part: &mut FilePart, content: &[u8]) -> Result<()> {
        self.make_room(part)?;
        add_hashes(part, content);
        let bytes = content.len() as u64;
        part.bytes += bytes;
        if is_zero(content) {
            match part.extents.last_mut() {
                Some(Extent::Hole { bytes: before }) => *before += bytes,
                _ => part.extents.push(Extent::Hole { bytes }),
            }
            return Ok(());
        }
        let (pack, place) = self.store_frame(content)?;
        if let Some(Extent::Run(run)) = part.extents.last_mut()
            && run.pack == pack
            && run.end_offset() == place.offset
            && (u64::from(run.skip_bytes) + run.bytes).is_multiple_of(FRAME_PLAIN_BYTES_MAX as u64)
        {
            run.bytes += bytes;
            run.frames.push(place.stored_bytes);
            return Ok(());
        }
        let frames = vec![place.stored_bytes];
        part.extents.push(Extent::Run(Run { pack, offset: place.offset, skip_bytes: 0, bytes, frames }));
        Ok(())
    }

    fn flush_shared_frame(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let content = std::mem::take(&mut self.shared_frame);
        let (pack, place) = self.store_frame(&content)?;
        for Pending { mut part, at, bytes } in std::mem::take(&mut self.pending) {
            part.bytes += bytes as u64;
            part.extents.push(Extent::Run(Run {
                pack,
                offset: place.offset,
                skip_bytes: at as u32,
                bytes: bytes as u64,
                frames: vec![place.stored_bytes],
            }));
            self.shared.add(&ManifestEntry::Part(part))?;
        }
        self.shared_frame = content;
        self.shared_frame.clear();
        Ok(())
    }

    /// Sends a frame to the open pack, and ends the pack if it is full.
    fn store_frame(&mut self, content: &[u8]) -> Result<(PackRef, FramePlace)> {
        if self.pack.is_none() {
            self.pack = Some(self.begin_pack()?);
        }
        let Some(pack) = self.pack.as_mut() else { return Err(Error::new(Kind::Internal, "no pack was begun")) };
        let reference = pack.pack;
        let (place, bytes) = pack.writer.frame(content)?;
        if pack.sender.blocking_send(Piece::More(bytes)).is_err() {
            return Err(self.why_upload_ended());
        }
        let frame_max = (FRAME_HEADER_BYTES + FRAME_PLAIN_BYTES_MAX) as u64;
        let is_full = pack.writer.stored_bytes() + frame_max + PACK_END_BYTES > PACK_BYTES_MAX
            || pack.writer.frame_count() == PACK_FRAMES_MAX;
        if is_full {
            self.finish_pack()?;
        }
        Ok((reference, place))
    }

    fn begin_pack(&self) -> Result<OpenPack> {
        let pack = PackRef { incarnation: self.shared.incarnation, pack: PackId::fresh() };
        let key = object_key(layout::pack_key(pack.incarnation, pack.pack))?;
        let (writer, head) = ContainerWriter::begin(ContainerKind::Pack, key.as_str(), self.shared.zstd_level)?;
        // Known before it can exist, so that giving up finds it.
        lock(&self.shared.packs).push(pack.pack);
        let (sender, receiver) = mpsc::channel(FRAMES_IN_FLIGHT);
        let upload = self.shared.uploads.spawn_on(self.upload(key, receiver), &self.shared.runtime);
        let pack = OpenPack { pack, writer, sender, upload };
        // If nobody takes it, the next frame says why.
        let _ = pack.sender.blocking_send(Piece::More(head));
        Ok(pack)
    }

    fn upload(&self, key: Key, receiver: mpsc::Receiver<Piece>) -> impl Future<Output = Result<()>> + Send + use<> {
        let shared = self.shared.clone();
        async move {
            let body = body(receiver, shared.lease.clone());
            let stored = shared.repo.store().put_stream(&key, body, PutCondition::Create).await;
            stored.map(|_| ()).map_err(|error| error.while_doing(format!("cannot store pack '{key}'")))
        }
    }

    fn finish_pack(&mut self) -> Result<()> {
        let Some(OpenPack { pack, writer, sender, upload }) = self.pack.take() else { return Ok(()) };
        let frames_end = writer.stored_bytes();
        let object = PackObject { incarnation: pack.incarnation, pack: pack.pack };
        let end = writer.finish(&object.document())?;
        let stored_bytes = frames_end + end.len() as u64;
        self.ending.push_back(upload);
        if sender.blocking_send(Piece::Last(end)).is_err() {
            self.wait_for_uploads(0)?;
            return Err(Error::new(Kind::Internal, "the store took a part of a pack for the whole"));
        }
        self.shared.stored_bytes.fetch_add(stored_bytes, Ordering::AcqRel);
        self.wait_for_uploads(UPLOADS_ENDING_MAX)
    }

    /// Waits until at most `count` finished packs are still on their way.
    fn wait_for_uploads(&mut self, count: usize) -> Result<()> {
        while self.ending.len() > count {
            let Some(upload) = self.ending.pop_front() else { break };
            wait(&self.shared.runtime, upload)?;
        }
        Ok(())
    }

    /// The upload of the open pack ended although it was not complete.
    fn why_upload_ended(&mut self) -> Error {
        let reason = match self.pack.take() {
            Some(OpenPack { upload, sender, .. }) => {
                drop(sender);
                wait(&self.shared.runtime, upload).err()
            }
            None => None,
        };
        reason.unwrap_or_else(|| Error::new(Kind::Internal, "the store took a part of a pack for the whole"))
    }
}

impl Drop for PackLane {
    fn drop(&mut self) {
        // The channel of an open pack closes without its last piece, so that pack does not come into being.
        if !self.is_finished {
            self.shared.is_broken.store(true, Ordering::Release);
        }
        self.shared.lanes_open.fetch_sub(1, Ordering::AcqRel);
    }
}

fn wait(runtime: &tokio::runtime::Handle, upload: JoinHandle<Result<()>>) -> Result<()> {
    match runtime.block_on(upload) {
        Ok(outcome) => outcome,
        Err(error) if error.is_cancelled() => Err(Error::new(Kind::Cancelled, "the process is ending")),
        Err(error) => Err(Error::new(Kind::Internal, format!("storing a pack panicked: {error}"))),
    }
}

fn empty_part(path: String, mode: u32, at: u64) -> FilePart {
    FilePart { path, mode, at, bytes: 0, is_last: false, extents: Vec::new(), hashes: Vec::new() }
}

fn add_hashes(part: &mut FilePart, content: &[u8]) {
    part.hashes.extend(content.chunks(HASHED_BLOCK_BYTES as usize).map(block_hash));
}

/// Whether all bytes are zero; not empty.
fn is_zero(content: &[u8]) -> bool {
    // Each byte is equal to the one before it, and the first is zero: a comparison at the speed of memory.
    content.first() == Some(&0) && content[1..] == content[..content.len() - 1]
}
