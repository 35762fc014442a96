//! A container: the one shape of packs, log chunks and manifests.
//!
//! A head of 16 bytes, frames without gaps, the index (JSON in a frame of its own), a footer of 32 bytes. The index can
//! be found from the end, so a reader that knows the size of the object needs one request for it, and a writer needs
//! to know nothing in advance.
//!
//! | head | what |
//! |---|---|
//! | 0..5 | `KEIKI` |
//! | 5 | kind: `P` pack, `L` log, `M` manifest |
//! | 6..8 | format version, little-endian |
//! | 8..16 | the first 8 bytes of BLAKE3 over the object's seal, the number 0 and bytes 0..8 |
//!
//! | footer | what |
//! |---|---|
//! | 0..8 | offset of the index frame, little-endian |
//! | 8..12 | length of the index frame with its header |
//! | 12..16 | `KEND` |
//! | 16..32 | the first 16 bytes of BLAKE3 over the seal, the size of the object and bytes 0..16 |
//!
//! The index: `{"format_version":1,"kind":"pack","frames":[[stored,plain],..],"chain":"..","summary":{..}}`. `stored`
//! counts header and payload. `chain` is BLAKE3 over the hashes of all frames in order: with it a reader of the whole
//! knows that no frame is missing and none was exchanged for an older one.
//!
//! The head and the footer keep their layout in all versions, so that an unknown version can be named.

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::format::frame::{
    FRAME_HEADER_BYTES, FRAME_PLAIN_BYTES_MAX, FrameDecoder, FrameEncoder, FrameHeader, ObjectSeal, u32_at,
};
use crate::format::{FORMAT_VERSION, unsupported_version};

pub const HEAD_BYTES: usize = 16;
pub const FOOTER_BYTES: usize = 32;
/// The text of an index, at most: room for about 400 000 frames.
pub const INDEX_PLAIN_BYTES_MAX: usize = 8 << 20;

const HEAD_MAGIC: &[u8; 5] = b"KEIKI";
const FOOTER_MAGIC: &[u8; 4] = b"KEND";

/// What a container holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerKind {
    Pack,
    Log,
    Manifest,
}

impl ContainerKind {
    fn letter(self) -> u8 {
        match self {
            ContainerKind::Pack => b'P',
            ContainerKind::Log => b'L',
            ContainerKind::Manifest => b'M',
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            ContainerKind::Pack => "pack",
            ContainerKind::Log => "log",
            ContainerKind::Manifest => "manifest",
        }
    }
}

/// The index as it is stored.
#[derive(Serialize, Deserialize)]
struct IndexDocument<S> {
    format_version: u16,
    kind: String,
    frames: Vec<(u32, u32)>,
    chain: String,
    summary: S,
}

/// Where a frame lies in its object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FramePlace {
    pub offset: u64,
    /// Header and payload.
    pub stored_bytes: u32,
    pub plain_bytes: u32,
}

/// Writes a container into pieces of bytes that the caller sends on; holds the frame table only.
pub struct ContainerWriter {
    object: ObjectSeal,
    kind: ContainerKind,
    encoder: FrameEncoder,
    offset: u64,
    frames: Vec<(u32, u32)>,
    chain: blake3::Hasher,
}

impl ContainerWriter {
    /// Begins the container that will be stored under `key`; the bytes are its head.
    pub fn begin(kind: ContainerKind, key: &str, zstd_level: i32) -> Result<(ContainerWriter, Bytes)> {
        let object = ObjectSeal::of(key);
        let mut head = BytesMut::with_capacity(HEAD_BYTES);
        head.extend_from_slice(HEAD_MAGIC);
        head.extend_from_slice(&[kind.letter()]);
        head.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        let hash = object.hash(0, &[&head]);
        head.extend_from_slice(&hash[..8]);
        let writer = ContainerWriter {
            object,
            kind,
            encoder: FrameEncoder::new(zstd_level)?,
            offset: HEAD_BYTES as u64,
            frames: Vec::new(),
            chain: blake3::Hasher::new(),
        };
        Ok((writer, head.freeze()))
    }

    /// The next frame, of 1 byte to 1 MiB of content: where it lies and its bytes.
    pub fn frame(&mut self, plain: &[u8]) -> Result<(FramePlace, Bytes)> {
        let bytes = self.encoder.encode(&self.object, self.offset, plain)?;
        let place =
            FramePlace { offset: self.offset, stored_bytes: bytes.len() as u32, plain_bytes: plain.len() as u32 };
        self.chain.update(&bytes[16..32]);
        self.frames.push((place.stored_bytes, place.plain_bytes));
        self.offset += bytes.len() as u64;
        Ok((place, bytes))
    }

    /// Bytes so far, without index and footer.
    pub fn stored_bytes(&self) -> u64 {
        self.offset
    }

    pub fn frame_count(&self) -> usize {
        self.frames.len()
    }

    /// Ends the container: index and footer. `summary` is what the kind of container says about itself.
    pub fn finish(mut self, summary: &impl Serialize) -> Result<Bytes> {
        let document = IndexDocument {
            format_version: FORMAT_VERSION,
            kind: self.kind.name().to_string(),
            frames: std::mem::take(&mut self.frames),
            chain: self.chain.finalize().to_hex().to_string(),
            summary,
        };
        let text = serde_json::to_vec(&document).map_err(|error| {
            Error::new(Kind::Internal, format!("cannot write the index of object '{}': {error}", self.object.key()))
        })?;
        if text.len() > INDEX_PLAIN_BYTES_MAX {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "object '{}': an index of {} bytes is larger than the format allows",
                    self.object.key(),
                    text.len()
                ),
            ));
        }
        let index = self.encoder.encode_unlimited(&self.object, self.offset, &text)?;
        let mut end = BytesMut::with_capacity(index.len() + FOOTER_BYTES);
        end.extend_from_slice(&index);
        let footer_at = end.len();
        end.extend_from_slice(&self.offset.to_le_bytes());
        end.extend_from_slice(&(index.len() as u32).to_le_bytes());
        end.extend_from_slice(FOOTER_MAGIC);
        let size = self.offset + (index.len() + FOOTER_BYTES) as u64;
        let hash = self.object.hash(size, &[&end[footer_at..]]);
        end.extend_from_slice(&hash);
        Ok(end.freeze())
    }
}

/// Checks the 16 bytes at the start of a container.
pub fn check_head(object: &ObjectSeal, kind: ContainerKind, bytes: &[u8]) -> Result<()> {
    if bytes.len() < HEAD_BYTES || &bytes[..5] != HEAD_MAGIC {
        return Err(object.damaged("does not begin like an object of keiki"));
    }
    if object.hash(0, &[&bytes[..8]])[..8] != bytes[8..HEAD_BYTES] {
        return Err(object.damaged("its head has a wrong checksum"));
    }
    check_version(object, u16::from_le_bytes([bytes[6], bytes[7]]))?;
    if bytes[5] != kind.letter() {
        return Err(object.damaged(format!("is not a {}", kind.name())));
    }
    Ok(())
}

fn check_version(object: &ObjectSeal, version: u16) -> Result<()> {
    if version == FORMAT_VERSION {
        return Ok(());
    }
    Err(unsupported_version(&format!("object '{}'", object.key()), u64::from(version)))
}

/// Where the index lies in an object of `size` bytes, read from its last 32 bytes.
pub fn parse_footer(object: &ObjectSeal, size: u64, footer: &[u8]) -> Result<std::ops::Range<u64>> {
    if footer.len() != FOOTER_BYTES || size < (HEAD_BYTES + FRAME_HEADER_BYTES + FOOTER_BYTES) as u64 {
        return Err(object.damaged("is too short"));
    }
    if &footer[12..16] != FOOTER_MAGIC {
        return Err(object.damaged("is cut off: it has no footer"));
    }
    if object.hash(size, &[&footer[..16]]) != footer[16..32] {
        return Err(object.damaged("its footer has a wrong checksum"));
    }
    let mut eight = [0; 8];
    eight.copy_from_slice(&footer[..8]);
    let from = u64::from_le_bytes(eight);
    let to = from.checked_add(u64::from(u32_at(footer, 8)));
    match to {
        Some(to) if from >= HEAD_BYTES as u64 && to.checked_add(FOOTER_BYTES as u64) == Some(size) => Ok(from..to),
        _ => Err(object.damaged("its footer points outside")),
    }
}

/// The index of a container: its frames and what it says about itself.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerIndex {
    pub frames: Vec<FramePlace>,
    /// The document of the kind, for the `*_document` modules to read.
    pub summary: serde_json::Value,
    chain: String,
}

impl ContainerIndex {
    /// Reads the index frame that lies at `range` (from `parse_footer`) of the object.
    pub fn parse(
        object: &ObjectSeal,
        kind: ContainerKind,
        range: &std::ops::Range<u64>,
        bytes: &Bytes,
    ) -> Result<ContainerIndex> {
        let header = FrameHeader::parse_limited(object, range.start, bytes, INDEX_PLAIN_BYTES_MAX)?;
        let payload = bytes.slice(FRAME_HEADER_BYTES..);
        let text = FrameDecoder::new()?.decode(object, range.start, &header, &payload)?;
        #[derive(Deserialize)]
        struct VersionOnly {
            format_version: u16,
        }
        let bad = |error: serde_json::Error| object.damaged(format!("its index cannot be read: {error}"));
        let version: VersionOnly = serde_json::from_slice(&text).map_err(bad)?;
        check_version(object, version.format_version)?;
        let document: IndexDocument<serde_json::Value> = serde_json::from_slice(&text).map_err(bad)?;
        if document.kind != kind.name() {
            return Err(object.damaged(format!(
                "is a '{}' and not a '{}'",
                document.kind.escape_default(),
                kind.name()
            )));
        }
        let mut offset = HEAD_BYTES as u64;
        let mut frames = Vec::with_capacity(document.frames.len());
        for (stored_bytes, plain_bytes) in document.frames {
            let is_good = plain_bytes > 0
                && plain_bytes as usize <= FRAME_PLAIN_BYTES_MAX
                && stored_bytes as usize > FRAME_HEADER_BYTES
                && stored_bytes as usize <= FRAME_HEADER_BYTES + plain_bytes as usize;
            if !is_good {
                return Err(object.damaged("its index has frames with lengths that cannot be"));
            }
            frames.push(FramePlace { offset, stored_bytes, plain_bytes });
            offset += u64::from(stored_bytes);
        }
        if offset != range.start {
            return Err(object.damaged("its index does not cover its frames"));
        }
        Ok(ContainerIndex { frames, summary: document.summary, chain: document.chain })
    }

    /// Bytes of content in all frames.
    pub fn plain_bytes(&self) -> u64 {
        self.frames.iter().map(|frame| u64::from(frame.plain_bytes)).sum()
    }
}

/// Follows the frames of a container from the first to the last and says at the end whether all were the right ones.
#[derive(Default)]
pub struct ChainCheck(blake3::Hasher);

impl ChainCheck {
    pub fn add(&mut self, header: &FrameHeader) {
        self.0.update(&header.hash);
    }

    pub fn finish(&self, object: &ObjectSeal, index: &ContainerIndex) -> Result<()> {
        if self.0.finalize().to_hex().as_str() == index.chain {
            return Ok(());
        }
        Err(object.damaged("its frames are not the ones that were written"))
    }
}

/// Reads a whole container that lies in memory: its index, then the content of each frame in order.
pub fn read_whole(object: &ObjectSeal, kind: ContainerKind, bytes: &Bytes) -> Result<(ContainerIndex, Vec<Bytes>)> {
    let size = bytes.len() as u64;
    let footer_at = bytes.len().checked_sub(FOOTER_BYTES).ok_or_else(|| object.damaged("is too short"))?;
    check_head(object, kind, bytes)?;
    let range = parse_footer(object, size, &bytes[footer_at..])?;
    let index_bytes = bytes.slice(range.start as usize..range.end as usize);
    let index = ContainerIndex::parse(object, kind, &range, &index_bytes)?;
    let mut decoder = FrameDecoder::new()?;
    let mut chain = ChainCheck::default();
    let mut contents = Vec::with_capacity(index.frames.len());
    for place in &index.frames {
        let at = place.offset as usize;
        let frame = bytes.slice(at..at + place.stored_bytes as usize);
        let header = FrameHeader::parse(object, place.offset, &frame)?;
        chain.add(&header);
        contents.push(decoder.decode(object, place.offset, &header, &frame.slice(FRAME_HEADER_BYTES..))?);
    }
    chain.finish(object, &index)?;
    Ok((index, contents))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn written(key: &str, contents: &[Vec<u8>]) -> Bytes {
        let (mut writer, head) = ContainerWriter::begin(ContainerKind::Log, key, 1).unwrap();
        let mut all = BytesMut::from(&head[..]);
        for content in contents {
            all.extend_from_slice(&writer.frame(content).unwrap().1);
        }
        all.extend_from_slice(&writer.finish(&json!({"about": "a test"})).unwrap());
        all.freeze()
    }

    fn read(key: &str, bytes: Bytes) -> Result<(ContainerIndex, Vec<Bytes>)> {
        read_whole(&ObjectSeal::of(key), ContainerKind::Log, &bytes)
    }

    fn two_frames() -> Bytes {
        written("k", &[vec![b'a'; 500], (0..=255).collect()])
    }

    #[test]
    fn every_flipped_bit_of_a_container_is_found() {
        let good = two_frames();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.to_vec();
                bad[at] ^= 1 << bit;
                let error = read("k", bad.into()).expect_err("a flipped bit was not noticed");
                assert_eq!(error.kind(), Kind::Damaged, "byte {at} bit {bit}: {error}");
                assert!(error.message().starts_with("object 'k': "), "{error}");
            }
        }
    }

    #[test]
    fn every_truncation_and_every_lengthening_of_a_container_is_found() {
        let good = two_frames();
        for length in 0..good.len() {
            assert_eq!(read("k", good.slice(..length)).unwrap_err().kind(), Kind::Damaged, "{length}");
        }
        let mut longer = good.to_vec();
        longer.push(0);
        assert_eq!(read("k", longer.into()).unwrap_err().kind(), Kind::Damaged);
    }

    #[test]
    fn a_container_under_another_name_or_of_another_kind_is_refused() {
        assert_eq!(read("other", two_frames()).unwrap_err().kind(), Kind::Damaged);
        let error = read_whole(&ObjectSeal::of("k"), ContainerKind::Pack, &two_frames()).unwrap_err();
        assert_eq!(error.message(), "object 'k': is not a pack");
    }

    #[test]
    fn a_container_of_a_later_version_is_refused_by_name() {
        let seal = ObjectSeal::of("k");
        let mut head = two_frames()[..8].to_vec();
        head[6] = 9;
        let hash = seal.hash(0, &[&head]);
        head.extend_from_slice(&hash[..8]);
        let error = check_head(&seal, ContainerKind::Log, &head).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.message().contains("version 9") && error.message().contains("version 1"), "{error}");
    }

    #[test]
    fn an_exchanged_frame_is_found_although_it_is_sound_in_itself() {
        // The same place in the same object, written at another time: only the chain can tell.
        let (old, new) = (written("k", &[vec![1; 10]]), written("k", &[vec![2; 10]]));
        let mut mixed = new.to_vec();
        mixed[HEAD_BYTES..HEAD_BYTES + 42].copy_from_slice(&old[HEAD_BYTES..HEAD_BYTES + 42]);
        let error = read("k", mixed.into()).unwrap_err();
        assert_eq!(error.message(), "object 'k': its frames are not the ones that were written");
    }

    proptest! {
        #[test]
        fn any_frames_read_back(contents in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..300), 0..8)) {
            let (index, read_back) = read("k", written("k", &contents)).unwrap();
            prop_assert_eq!(index.summary, json!({"about": "a test"}));
            prop_assert_eq!(read_back, contents);
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(read("k", bytes.into()).is_err());
        }
    }
}
