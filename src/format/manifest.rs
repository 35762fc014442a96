//! The records of a manifest: what files a backup has and where their bytes lie.
//!
//! A manifest is a container of kind `M`. Its frames hold lines of JSON, one record each; a record never crosses a
//! frame. A record is a directory, a link or a *part*: up to 64 MiB of one regular file. Every part names its file and
//! stands for itself, so that a file of any size is written and read in bounded memory and several files can be
//! written at the same time. The parts of one file come in order; the last one, and only that, has `"end":true`.
//!
//! ```text
//! {"dir":"base/5","mode":"0700"}
//! {"link":"pg_tblspc/16400","to":"/srv/ts","mode":"0777"}
//! {"file":"base/5/1259","mode":"0600","at":0,"bytes":114688,"end":true,
//!  "packs":["01938c5e-..."],"extents":[[0,16,0,114688,[40960]]],"hashes":"9f.."}
//! ```
//!
//! An extent is a number (a hole of that many zero bytes) or a run `[pack, offset, skip, bytes, [stored, ..]]`: the
//! frames that begin at `offset` of the pack (an index into `packs`) and lie there one after the other, each `stored`
//! bytes long with its header; of their content `bytes` bytes after the first `skip`. Every frame of a run but the last
//! has exactly 1 MiB of content. A pack of another incarnation, an ancestor, is written `incarnation/pack`.
//!
//! `hashes` has for each 64 KiB of the part the first 16 bytes of its BLAKE3, in hexadecimal: by them the next
//! incremental backup knows what has changed without reading packs.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::format::container::HEAD_BYTES;
use crate::format::frame::{FRAME_HEADER_BYTES, FRAME_PLAIN_BYTES_MAX, HASH_BYTES, truncated};
use crate::model::backup::{FileKind, FileMeta};
use crate::model::id::{IncarnationId, PackId};

/// Bytes of a file that one record covers, at most. Parts of a file begin at multiples of this.
pub const PART_BYTES: u64 = 64 << 20;
/// Bytes that one hash of a part covers.
pub const HASHED_BLOCK_BYTES: u64 = 64 << 10;
/// Linux limits a path to this many bytes (PATH_MAX in limits.h).
pub const PATH_BYTES_MAX: usize = 4096;

/// A pack and the incarnation that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackRef {
    pub incarnation: IncarnationId,
    pub pack: PackId,
}

/// Where a stretch of a file comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extent {
    /// Zero bytes that are stored nowhere.
    Hole {
        bytes: u64,
    },
    Run(Run),
}

/// Consecutive frames of a pack. See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub pack: PackRef,
    /// Offset of the first frame in the pack.
    pub offset: u64,
    /// Bytes of the first frame's content that come before the stretch.
    pub skip_bytes: u32,
    /// Bytes of the stretch.
    pub bytes: u64,
    /// Stored bytes of each frame with its header.
    pub frames: Vec<u32>,
}

impl Run {
    /// The offset after the last frame.
    pub fn end_offset(&self) -> u64 {
        self.offset + self.frames.iter().map(|stored| u64::from(*stored)).sum::<u64>()
    }
}

/// Up to 64 MiB of a regular file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePart {
    pub path: String,
    pub mode: u32,
    /// Where the part begins in the file.
    pub at: u64,
    pub bytes: u64,
    /// The file ends with this part, at `at + bytes`.
    pub is_last: bool,
    pub extents: Vec<Extent>,
    pub hashes: Vec<[u8; HASH_BYTES]>,
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ManifestEntry {
    Directory { path: String, mode: u32 },
    Link { path: String, mode: u32, to: String },
    Part(FilePart),
}

impl ManifestEntry {
    pub fn path(&self) -> &str {
        match self {
            ManifestEntry::Directory { path, .. } | ManifestEntry::Link { path, .. } => path,
            ManifestEntry::Part(part) => &part.path,
        }
    }

    /// The file that this record is about or is a part of.
    pub fn meta(&self) -> FileMeta {
        let (path, mode, kind) = match self {
            ManifestEntry::Directory { path, mode } => (path, *mode, FileKind::Directory),
            ManifestEntry::Link { path, mode, to } => (path, *mode, FileKind::Link { to: to.clone() }),
            ManifestEntry::Part(part) => (&part.path, part.mode, FileKind::Regular),
        };
        FileMeta { path: path.clone(), mode, kind }
    }
}

/// The hash of one block of a part.
pub fn block_hash(block: &[u8]) -> [u8; HASH_BYTES] {
    truncated(&blake3::hash(block))
}

/// Checks a path of a backup: relative, with `/`, no part empty, `.` or `..`. A restore joins it to a directory.
pub fn check_path(path: &str) -> Result<()> {
    let is_good = path.len() <= PATH_BYTES_MAX
        && !path.contains('\0')
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    if is_good {
        return Ok(());
    }
    Err(Error::new(Kind::BadInput, format!("'{}' cannot be the path of a file in a backup", path.escape_default())))
}

#[derive(Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dir: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    link: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    mode: String,
    #[serde(default, skip_serializing_if = "is_zero")]
    at: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    bytes: u64,
    #[serde(default, skip_serializing_if = "is_false")]
    end: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    packs: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    extents: Vec<ExtentText>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    hashes: String,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum ExtentText {
    Hole(u64),
    Run(usize, u64, u32, u64, Vec<u32>),
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Appends the line of a record, with its line feed, to `out`. `incarnation` is the one of the backup.
pub fn write_record(incarnation: IncarnationId, entry: &ManifestEntry, out: &mut Vec<u8>) -> Result<()> {
    let octal = |mode: &u32| format!("{mode:04o}");
    let line = match entry {
        ManifestEntry::Directory { path, mode } => {
            Line { dir: Some(path.clone()), mode: octal(mode), ..Line::default() }
        }
        ManifestEntry::Link { path, mode, to } => {
            Line { link: Some(path.clone()), to: Some(to.clone()), mode: octal(mode), ..Line::default() }
        }
        ManifestEntry::Part(part) => part_line(incarnation, part),
    };
    let before = out.len();
    serde_json::to_writer(&mut *out, &line)
        .map_err(|error| Error::new(Kind::Internal, format!("cannot write a record of a manifest: {error}")))?;
    out.push(b'\n');
    if out.len() - before > FRAME_PLAIN_BYTES_MAX {
        return Err(Error::new(Kind::Unsupported, format!("the record of file '{}' is too long", entry.path())));
    }
    Ok(())
}

fn part_line(incarnation: IncarnationId, part: &FilePart) -> Line {
    let mut packs: Vec<String> = Vec::new();
    let mut number_of = |pack: &PackRef| {
        let text = match pack.incarnation == incarnation {
            true => pack.pack.to_string(),
            false => format!("{}/{}", pack.incarnation, pack.pack),
        };
        packs.iter().position(|known| *known == text).unwrap_or_else(|| {
            packs.push(text);
            packs.len() - 1
        })
    };
    let extents = part.extents.iter().map(|extent| match extent {
        Extent::Hole { bytes } => ExtentText::Hole(*bytes),
        Extent::Run(run) => {
            ExtentText::Run(number_of(&run.pack), run.offset, run.skip_bytes, run.bytes, run.frames.clone())
        }
    });
    let extents = extents.collect();
    let mut hashes = String::with_capacity(part.hashes.len() * HASH_BYTES * 2);
    for hash in &part.hashes {
        hashes.extend(hash.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| HEX[usize::from(digit)] as char));
    }
    Line {
        file: Some(part.path.clone()),
        mode: format!("{:04o}", part.mode),
        at: part.at,
        bytes: part.bytes,
        end: part.is_last,
        packs,
        extents,
        hashes,
        ..Line::default()
    }
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// Reads the records of one frame's content. Everything in them is checked, so that a restore may trust paths, and that
/// the extents of a part are as long as the part. The errors say what is wrong and not where: the caller names the
/// object.
pub fn read_records(incarnation: IncarnationId, plain: &[u8]) -> Result<Vec<ManifestEntry>> {
    let bad = |what: String| Error::new(Kind::Damaged, what);
    let text = plain.strip_suffix(b"\n").ok_or_else(|| bad(String::from("a frame of records does not end a line")))?;
    let mut entries = Vec::new();
    for line in text.split(|byte| *byte == b'\n') {
        let line: Line =
            serde_json::from_slice(line).map_err(|error| bad(format!("a record cannot be read: {error}")))?;
        entries.push(read_line(incarnation, line).map_err(|error| error.with_kind(Kind::Damaged))?);
    }
    Ok(entries)
}

fn read_line(incarnation: IncarnationId, line: Line) -> Result<ManifestEntry> {
    let bad = |what: &str| Error::new(Kind::Damaged, what);
    let mode = match u32::from_str_radix(&line.mode, 8) {
        Ok(mode) if mode <= 0o7777 => mode,
        _ => return Err(bad("a record has a mode that cannot be")),
    };
    match (&line.dir, &line.link, &line.to, &line.file) {
        (Some(path), None, None, None) => {
            check_path(path)?;
            Ok(ManifestEntry::Directory { path: path.clone(), mode })
        }
        (None, Some(path), Some(to), None) => {
            check_path(path)?;
            if to.contains('\0') || to.len() > PATH_BYTES_MAX {
                return Err(bad("a link leads to what cannot be a path"));
            }
            Ok(ManifestEntry::Link { path: path.clone(), mode, to: to.clone() })
        }
        (None, None, None, Some(path)) => {
            check_path(path)?;
            let wrong = |what: &str| bad(&format!("the record of file '{}' {what}", path.escape_default()));
            read_part(incarnation, &line, path, mode, &wrong).map(ManifestEntry::Part)
        }
        _ => Err(bad("a record is neither a directory nor a link nor a file")),
    }
}

fn read_part(
    incarnation: IncarnationId,
    line: &Line,
    path: &str,
    mode: u32,
    wrong: &dyn Fn(&str) -> Error,
) -> Result<FilePart> {
    let is_in_place = line.at.is_multiple_of(PART_BYTES)
        && line.bytes <= PART_BYTES
        && (line.end || line.bytes == PART_BYTES)
        && line.at.checked_add(PART_BYTES).is_some();
    if !is_in_place {
        return Err(wrong("covers a range that cannot be"));
    }
    let packs: Vec<PackRef> = line.packs.iter().map(|text| parse_pack_ref(incarnation, text)).collect::<Result<_>>()?;
    let mut extents = Vec::with_capacity(line.extents.len());
    let mut covered = 0u64;
    for extent in &line.extents {
        let (extent, bytes) = match extent {
            ExtentText::Hole(bytes) => (Extent::Hole { bytes: *bytes }, *bytes),
            ExtentText::Run(pack, offset, skip_bytes, bytes, frames) => {
                let pack = *packs.get(*pack).ok_or_else(|| wrong("names a pack that is not there"))?;
                let run = Run { pack, offset: *offset, skip_bytes: *skip_bytes, bytes: *bytes, frames: frames.clone() };
                if !run_is_good(&run) {
                    return Err(wrong("has frames that cannot be"));
                }
                (Extent::Run(run), *bytes)
            }
        };
        covered = covered.checked_add(bytes).ok_or_else(|| wrong("has extents that cannot be"))?;
        extents.push(extent);
    }
    if covered != line.bytes {
        return Err(wrong("has extents for another length than its own"));
    }
    let hashes = parse_hashes(&line.hashes).ok_or_else(|| wrong("has hashes that cannot be read"))?;
    if hashes.len() as u64 != line.bytes.div_ceil(HASHED_BLOCK_BYTES) {
        return Err(wrong("has hashes for another length than its own"));
    }
    Ok(FilePart { path: path.to_string(), mode, at: line.at, bytes: line.bytes, is_last: line.end, extents, hashes })
}

/// Whether the frames can hold the stretch, with the first and the last of them being needed.
fn run_is_good(run: &Run) -> bool {
    let frame_max = FRAME_PLAIN_BYTES_MAX as u64;
    let frame_is_good = |stored: &u32| {
        *stored as usize > FRAME_HEADER_BYTES && *stored as usize <= FRAME_HEADER_BYTES + FRAME_PLAIN_BYTES_MAX
    };
    let Some(end) = u64::from(run.skip_bytes).checked_add(run.bytes) else { return false };
    run.bytes > 0
        && u64::from(run.skip_bytes) < frame_max
        && run.offset >= HEAD_BYTES as u64
        && run.offset <= 1 << 40
        && run.frames.iter().all(frame_is_good)
        && end.div_ceil(frame_max) == run.frames.len() as u64
}

fn parse_pack_ref(incarnation: IncarnationId, text: &str) -> Result<PackRef> {
    match text.split_once('/') {
        None => Ok(PackRef { incarnation, pack: PackId::parse(text)? }),
        Some((other, pack)) => Ok(PackRef { incarnation: IncarnationId::parse(other)?, pack: PackId::parse(pack)? }),
    }
}

fn parse_hashes(text: &str) -> Option<Vec<[u8; HASH_BYTES]>> {
    let digit = |byte: u8| HEX.iter().position(|known| *known == byte).map(|value| value as u8);
    let (blocks, rest) = text.as_bytes().as_chunks::<{ HASH_BYTES * 2 }>();
    if !rest.is_empty() {
        return None;
    }
    let block_to_hash = |block: &[u8; HASH_BYTES * 2]| {
        let mut hash = [0; HASH_BYTES];
        for (at, pair) in block.as_chunks::<2>().0.iter().enumerate() {
            hash[at] = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(hash)
    };
    blocks.iter().map(block_to_hash).collect()
}

#[cfg(test)]
mod tests;
