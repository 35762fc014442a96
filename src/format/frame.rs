//! A frame: up to 1 MiB of content, compressed on its own and sealed to the place where it lies.
//!
//! Layout, all numbers little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..4 | `KFRM` |
//! | 4 | codec: 0 as it is, 1 zstd (RFC 8878) |
//! | 5 | cipher: 0 none; others are reserved |
//! | 6..8 | zero |
//! | 8..12 | length of the content |
//! | 12..16 | length of the payload, which follows the header |
//! | 16..32 | the first 16 bytes of BLAKE3 over the object's seal, the frame's offset in the object, bytes 0..16 and the payload |
//!
//! Because seal and offset are hashed, a frame that a store returns for another object or another offset is as wrong
//! as one with a flipped bit. Content that zstd cannot make at least 1/32 smaller stays as it is, so a payload is
//! never longer than its content, and both limits are known before anything is allocated.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use zstd::bulk::{Compressor, Decompressor};

use crate::error::{Error, Kind, Result};

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 32;
/// Content of a frame, at most.
pub const FRAME_PLAIN_BYTES_MAX: usize = 1 << 20;
/// Bytes of a truncated BLAKE3 hash.
pub const HASH_BYTES: usize = 16;

const MAGIC: &[u8; 4] = b"KFRM";
const CODEC_RAW: u8 = 0;
const CODEC_ZSTD: u8 = 1;
const CIPHER_NONE: u8 = 0;

/// What ties bytes to one object: a hash of its key, which is relative to the repository and so survives copying the
/// whole repository elsewhere. Knows the object's name for messages.
#[derive(Debug, Clone)]
pub struct ObjectSeal {
    key: Arc<str>,
    hash: [u8; 32],
}

impl ObjectSeal {
    pub fn of(key: &str) -> ObjectSeal {
        ObjectSeal { key: key.into(), hash: *blake3::hash(key.as_bytes()).as_bytes() }
    }

    pub fn key(&self) -> &str {
        &self.key
    }

    /// The error for bytes of this object that are not what they should be: `object 'a/b': what`.
    pub fn damaged(&self, what: impl std::fmt::Display) -> Error {
        Error::new(Kind::Damaged, format!("object '{}': {what}", self.key))
    }

    /// The truncated hash of `parts`, bound to this object and to a number (an offset or a size).
    pub(crate) fn hash(&self, number: u64, parts: &[&[u8]]) -> [u8; HASH_BYTES] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.hash).update(&number.to_le_bytes());
        for part in parts {
            hasher.update(part);
        }
        truncated(&hasher.finalize())
    }
}

/// The first 16 bytes of a BLAKE3 hash.
pub(crate) fn truncated(hash: &blake3::Hash) -> [u8; HASH_BYTES] {
    let mut short = [0; HASH_BYTES];
    short.copy_from_slice(&hash.as_bytes()[..HASH_BYTES]);
    short
}

/// Reads a little-endian number at `at`; the caller has checked the length.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

/// Makes frames. Keeps its compression context, so one per writer.
pub struct FrameEncoder {
    compressor: Compressor<'static>,
    scratch: Vec<u8>,
}

impl FrameEncoder {
    /// `zstd_level` as zstd counts: negative is faster, 1 suits logs, 3 suits data that is kept.
    pub fn new(zstd_level: i32) -> Result<FrameEncoder> {
        let compressor = Compressor::new(zstd_level)
            .map_err(|error| Error::io(format!("cannot set up zstd with level '{zstd_level}'"), error))?;
        Ok(FrameEncoder { compressor, scratch: Vec::new() })
    }

    /// The frame (header and payload) that holds `plain` at `offset` of the object.
    pub fn encode(&mut self, object: &ObjectSeal, offset: u64, plain: &[u8]) -> Result<Bytes> {
        if plain.is_empty() || plain.len() > FRAME_PLAIN_BYTES_MAX {
            return Err(Error::new(Kind::Internal, format!("a frame cannot hold {} bytes", plain.len())));
        }
        self.encode_unlimited(object, offset, plain)
    }

    /// As `encode`, for the index, which has a limit of its own.
    pub(crate) fn encode_unlimited(&mut self, object: &ObjectSeal, offset: u64, plain: &[u8]) -> Result<Bytes> {
        self.scratch.clear();
        self.scratch.reserve(zstd::zstd_safe::compress_bound(plain.len()));
        self.compressor
            .compress_to_buffer(plain, &mut self.scratch)
            .map_err(|error| Error::io("cannot compress a frame", error))?;
        let is_worth_it = self.scratch.len() < plain.len() - plain.len() / 32;
        let (codec, payload) = if is_worth_it { (CODEC_ZSTD, &self.scratch[..]) } else { (CODEC_RAW, plain) };

        let mut frame = BytesMut::with_capacity(FRAME_HEADER_BYTES + payload.len());
        frame.extend_from_slice(MAGIC);
        frame.extend_from_slice(&[codec, CIPHER_NONE, 0, 0]);
        frame.extend_from_slice(&(plain.len() as u32).to_le_bytes());
        frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        let hash = object.hash(offset, &[&frame[..16], payload]);
        frame.extend_from_slice(&hash);
        frame.extend_from_slice(payload);
        Ok(frame.freeze())
    }
}

/// A frame's header, checked against the limits but not yet against the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    codec: u8,
    /// Bytes of content.
    pub plain_bytes: u32,
    /// Bytes of payload after the header.
    pub payload_bytes: u32,
    pub(crate) hash: [u8; HASH_BYTES],
    hashed: [u8; 16],
}

impl FrameHeader {
    /// Reads the header of the frame at `offset` of the object; `bytes` begins there. Nothing that it says is larger
    /// than the limits of the format.
    pub fn parse(object: &ObjectSeal, offset: u64, bytes: &[u8]) -> Result<FrameHeader> {
        FrameHeader::parse_limited(object, offset, bytes, FRAME_PLAIN_BYTES_MAX)
    }

    pub(crate) fn parse_limited(
        object: &ObjectSeal,
        offset: u64,
        bytes: &[u8],
        plain_max: usize,
    ) -> Result<FrameHeader> {
        let wrong = |what: &str| object.damaged(format!("the frame at byte {offset} {what}"));
        if bytes.len() < FRAME_HEADER_BYTES {
            return Err(wrong("is cut off"));
        }
        if &bytes[..4] != MAGIC {
            return Err(wrong("does not begin like a frame"));
        }
        let header = FrameHeader {
            codec: bytes[4],
            plain_bytes: u32_at(bytes, 8),
            payload_bytes: u32_at(bytes, 12),
            hash: bytes[16..32].try_into().unwrap_or_default(),
            hashed: bytes[..16].try_into().unwrap_or_default(),
        };
        if bytes[5] != CIPHER_NONE {
            return Err(wrong("is encrypted in a way that this version does not know"));
        }
        let lengths_are_good = header.plain_bytes > 0
            && header.plain_bytes as usize <= plain_max
            && match header.codec {
                CODEC_RAW => header.payload_bytes == header.plain_bytes,
                CODEC_ZSTD => header.payload_bytes < header.plain_bytes,
                _ => return Err(wrong("is compressed in a way that this version does not know")),
            };
        if !lengths_are_good {
            return Err(wrong("has lengths that cannot be"));
        }
        Ok(header)
    }

    /// Header and payload together.
    pub fn stored_bytes(&self) -> u32 {
        self.payload_bytes.saturating_add(FRAME_HEADER_BYTES as u32)
    }
}

/// Turns frames back into content. Keeps its decompression context, so one per reader.
pub struct FrameDecoder {
    decompressor: Decompressor<'static>,
}

impl FrameDecoder {
    pub fn new() -> Result<FrameDecoder> {
        let decompressor = Decompressor::new()
            .map_err(|error: io::Error| Error::io("cannot set up the decompression of frames", error))?;
        Ok(FrameDecoder { decompressor })
    }

    /// The content of the frame at `offset`, whose header was parsed and whose payload is given. Checks the hash before
    /// it lets zstd see the bytes.
    pub fn decode(&mut self, object: &ObjectSeal, offset: u64, header: &FrameHeader, payload: &Bytes) -> Result<Bytes> {
        let wrong = |what: &str| object.damaged(format!("the frame at byte {offset} {what}"));
        if payload.len() != header.payload_bytes as usize {
            return Err(wrong("is cut off"));
        }
        if object.hash(offset, &[&header.hashed, payload]) != header.hash {
            return Err(wrong("has a wrong checksum"));
        }
        if header.codec == CODEC_RAW {
            return Ok(payload.clone());
        }
        let mut plain = Vec::with_capacity(header.plain_bytes as usize);
        match self.decompressor.decompress_to_buffer(&payload[..], &mut plain) {
            Ok(length) if length == header.plain_bytes as usize => Ok(Bytes::from(plain)),
            _ => Err(wrong("cannot be decompressed")),
        }
    }

    /// Header and payload in one piece, as `FrameEncoder::encode` returned them.
    pub fn decode_whole(&mut self, object: &ObjectSeal, offset: u64, frame: &Bytes) -> Result<Bytes> {
        let header = FrameHeader::parse(object, offset, frame)?;
        self.decode(object, offset, &header, &frame.slice(FRAME_HEADER_BYTES..))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut out = vec![0; length];
        blake3::Hasher::new().finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn content_that_does_not_shrink_is_kept_as_it_is() {
        let seal = ObjectSeal::of("a");
        let mut encoder = FrameEncoder::new(1).unwrap();
        let plain = noise(FRAME_PLAIN_BYTES_MAX);
        let frame = encoder.encode(&seal, 16, &plain).unwrap();
        assert_eq!(frame.len(), FRAME_HEADER_BYTES + plain.len());
        assert_eq!(FrameDecoder::new().unwrap().decode_whole(&seal, 16, &frame).unwrap(), plain);
        let zeros = encoder.encode(&seal, 16, &vec![0; FRAME_PLAIN_BYTES_MAX]).unwrap();
        assert!(zeros.len() < 200);
    }

    #[test]
    fn a_frame_from_another_object_or_another_offset_is_refused() {
        let (seal, other) = (ObjectSeal::of("a"), ObjectSeal::of("b"));
        let frame = FrameEncoder::new(1).unwrap().encode(&seal, 16, b"content").unwrap();
        let mut decoder = FrameDecoder::new().unwrap();
        decoder.decode_whole(&seal, 16, &frame).unwrap();
        for error in [decoder.decode_whole(&other, 16, &frame), decoder.decode_whole(&seal, 17, &frame)] {
            assert_eq!(error.unwrap_err().kind(), Kind::Damaged);
        }
    }

    #[test]
    fn a_header_that_promises_too_much_is_refused_before_anything_is_allocated() {
        let seal = ObjectSeal::of("a");
        let mut frame = FrameEncoder::new(1).unwrap().encode(&seal, 16, &[7; 5000]).unwrap().to_vec();
        frame[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = FrameHeader::parse(&seal, 16, &frame).unwrap_err();
        assert_eq!(error.message(), "object 'a': the frame at byte 16 has lengths that cannot be");
    }

    proptest! {
        #[test]
        fn any_content_reads_back(plain in proptest::collection::vec(any::<u8>(), 1..5000), offset: u64, level in -2..4i32) {
            let seal = ObjectSeal::of("x/y");
            let frame = FrameEncoder::new(level).unwrap().encode(&seal, offset, &plain).unwrap();
            prop_assert_eq!(FrameDecoder::new().unwrap().decode_whole(&seal, offset, &frame).unwrap(), plain);
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut with_magic = MAGIC.to_vec();
            with_magic.extend_from_slice(&bytes);
            for input in [bytes, with_magic] {
                prop_assert!(FrameDecoder::new().unwrap().decode_whole(&ObjectSeal::of("a"), 0, &input.into()).is_err());
            }
        }
    }
}
