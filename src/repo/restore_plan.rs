//! Turns records of a manifest into reads of packs, such that every frame is fetched and decoded once and every byte has
//! one place to be written to. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::format::frame::FRAME_PLAIN_BYTES_MAX;
use crate::format::manifest::{Extent, ManifestEntry, PackRef, Run};

/// Unwanted bytes between two frames that are read along rather than asked around: a request costs about as much.
const READ_OVER_BYTES: u64 = 512 << 10;

/// Consecutive frames of a pack, and where their content goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackRead {
    pub pack: PackRef,
    /// For `BackupReader::read_run`. Frames in it that no copy names are passed over.
    pub offsets: Range<u64>,
    /// In the order of their frames.
    pub copies: Vec<Copy>,
}

/// Content of one frame that belongs into one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// Where the frame lies in its pack, as `StoredFrame::offset`.
    pub frame_offset: u64,
    /// From here in the frame's content ...
    pub skip_bytes: u32,
    /// ... so many bytes ...
    pub bytes: u32,
    /// ... go into the file of this record (its number among those that were given) ...
    pub entry: usize,
    /// ... at this offset of the file.
    pub file_at: u64,
}

/// The reads for some records. Holes need none: whoever makes the files gives them their length.
pub fn plan_reads(entries: &[ManifestEntry]) -> Vec<PackRead> {
    // By pack, then by frame: the end of each frame and its copies.
    let mut frames: BTreeMap<(PackRef, u64), (u64, Vec<Copy>)> = BTreeMap::new();
    for (entry, record) in entries.iter().enumerate() {
        let ManifestEntry::Part(part) = record else { continue };
        let mut file_at = part.at;
        for extent in &part.extents {
            match extent {
                Extent::Hole { bytes } => file_at += bytes,
                Extent::Run(run) => {
                    add_run(&mut frames, run, entry, file_at);
                    file_at += run.bytes;
                }
            }
        }
    }
    let mut reads: Vec<PackRead> = Vec::new();
    for ((pack, offset), (end, copies)) in frames {
        match reads.last_mut() {
            Some(read) if read.pack == pack && offset.saturating_sub(read.offsets.end) <= READ_OVER_BYTES => {
                read.offsets.end = read.offsets.end.max(end);
                read.copies.extend(copies);
            }
            _ => reads.push(PackRead { pack, offsets: offset..end, copies }),
        }
    }
    reads
}

fn add_run(frames: &mut BTreeMap<(PackRef, u64), (u64, Vec<Copy>)>, run: &Run, entry: usize, mut file_at: u64) {
    let mut offset = run.offset;
    let mut skip = u64::from(run.skip_bytes);
    let mut left = run.bytes;
    for stored in &run.frames {
        let bytes = left.min(FRAME_PLAIN_BYTES_MAX as u64 - skip);
        let end = offset + u64::from(*stored);
        // Both fit: a frame has at most 1 MiB of content.
        let copy = Copy { frame_offset: offset, skip_bytes: skip as u32, bytes: bytes as u32, entry, file_at };
        frames.entry((run.pack, offset)).or_insert_with(|| (end, Vec::new())).1.push(copy);
        (offset, skip, left) = (end, 0, left - bytes);
        file_at += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::manifest::FilePart;
    use crate::model::id::{IncarnationId, PackId};

    fn part(path: &str, at: u64, extents: Vec<Extent>) -> ManifestEntry {
        let path = path.to_string();
        ManifestEntry::Part(FilePart { path, mode: 0o600, at, bytes: 0, is_last: true, extents, hashes: vec![] })
    }

    #[test]
    fn frames_that_files_share_are_read_once_and_gaps_are_asked_around_only_if_they_are_large() {
        let pack = PackRef { incarnation: IncarnationId::fresh(), pack: PackId::fresh() };
        let other = PackRef { pack: PackId::fresh(), ..pack };
        let run = |pack, offset, skip_bytes, bytes, frames: &[u32]| {
            Extent::Run(Run { pack, offset, skip_bytes, bytes, frames: frames.to_vec() })
        };
        let mib = 1u64 << 20;
        let entries = [
            part(
                "big",
                64 * mib,
                vec![run(pack, 16, 0, 2 * mib, &[100, 200]), Extent::Hole { bytes: mib }, run(pack, 316, 10, 5, &[50])],
            ),
            ManifestEntry::Directory { path: String::from("d"), mode: 0o700 },
            part("small", 0, vec![run(pack, 316, 0, 10, &[50])]),
            part("far", 0, vec![run(pack, 366 + READ_OVER_BYTES + 1, 0, 10, &[50]), run(other, 16, 0, 1, &[33])]),
        ];
        let copy =
            |frame_offset, skip_bytes, bytes, entry, file_at| Copy { frame_offset, skip_bytes, bytes, entry, file_at };
        let reads = plan_reads(&entries);
        let far = 366 + READ_OVER_BYTES + 1;
        assert_eq!(reads.len(), 3);
        assert_eq!(reads[0].offsets, 16..366);
        assert_eq!(
            reads[0].copies,
            [
                copy(16, 0, mib as u32, 0, 64 * mib),
                copy(116, 0, mib as u32, 0, 65 * mib),
                copy(316, 10, 5, 0, 67 * mib),
                copy(316, 0, 10, 2, 0),
            ]
        );
        assert_eq!((reads[1].offsets.clone(), reads[1].copies[0].entry), (far..far + 50, 3));
        assert_eq!((reads[2].pack, reads[2].copies[0].file_at), (other, 10));
    }
}
