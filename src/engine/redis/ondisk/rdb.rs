//! The frame of an RDB snapshot: its header, its auxiliary fields, and the checksum that ends it.
//!
//! The values in between are the server's business. Source: `src/rdb.c` and `src/rdb.h` of Redis 7.0 (rdbSaveRio,
//! rdbSaveInfoAuxFields, rdbSaveLen), and of Valkey 9.0 for its own magic.

use std::collections::BTreeMap;
use std::fmt;

use crc_fast::{CrcAlgorithm, Digest};

use crate::error::{Error, Kind, Result};

/// Files from this version on end in a checksum (`src/rdb.c`, rdbLoadRio: `rdbver >= 5`).
const CHECKSUM_SINCE: u32 = 5;
const CHECKSUM_BYTES: usize = 8;
/// RDB_OPCODE_AUX and RDB_OPCODE_EOF (`src/rdb.h`).
const OPCODE_AUX: u8 = 0xFA;
const OPCODE_EOF: u8 = 0xFF;
/// How much of the beginning of a file is wanted to read its header: the servers' own fields take some hundred bytes.
pub const HEADER_BYTES_WANTED: usize = 16 << 10;
/// The magic and version of either product.
const MAGIC_BYTES: usize = 9;
const AUX_FIELDS_MAX: usize = 64;

/// Whose format a snapshot is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RdbFamily {
    /// `REDIS0010`: Redis, and Valkey up to 8.
    Redis,
    /// `VALKEY080`: Valkey 9 and later (`src/rdb.c` of Valkey 9, rdbSaveRio).
    Valkey,
}

/// The version of a snapshot's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RdbVersion {
    pub family: RdbFamily,
    pub number: u32,
}

impl RdbVersion {
    /// Reads the first bytes of a file: `REDIS` and four digits, or `VALKEY` and three.
    pub fn parse(bytes: &[u8]) -> Option<RdbVersion> {
        let magic = bytes.get(..MAGIC_BYTES)?;
        let (family, digits) = match (magic.strip_prefix(b"REDIS"), magic.strip_prefix(b"VALKEY")) {
            (Some(digits), _) => (RdbFamily::Redis, digits),
            (None, Some(digits)) => (RdbFamily::Valkey, digits),
            (None, None) => return None,
        };
        let is_number = digits.iter().all(u8::is_ascii_digit);
        let number = std::str::from_utf8(digits).ok().filter(|_| is_number)?.parse().ok()?;
        Some(RdbVersion { family, number })
    }

    /// Reads what `Display` prints, as a backup's facts hold it.
    pub fn parse_text(text: &str) -> Option<RdbVersion> {
        RdbVersion::parse(text.as_bytes()).filter(|_| text.len() == MAGIC_BYTES)
    }
}

impl fmt::Display for RdbVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.family {
            RdbFamily::Redis => write!(f, "REDIS{:04}", self.number),
            RdbFamily::Valkey => write!(f, "VALKEY{:03}", self.number),
        }
    }
}

/// The beginning of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdbHeader {
    pub version: RdbVersion,
    /// What the server noted about itself: `redis-ver`, `ctime`, `used-mem`, `aof-base` and others, as text.
    pub aux: BTreeMap<String, String>,
}

impl RdbHeader {
    /// Reads a header from the beginning of a file, of which [`HEADER_BYTES_WANTED`] bytes are enough. Fields that are
    /// compressed, not text or cut off end the list; only a wrong magic is an error.
    pub fn parse(bytes: &[u8]) -> Result<RdbHeader> {
        let version = RdbVersion::parse(bytes)
            .ok_or_else(|| Error::new(Kind::Damaged, "it does not begin like a snapshot of Redis or Valkey (RDB)"))?;
        let mut aux = BTreeMap::new();
        let mut rest = bytes.get(MAGIC_BYTES..).unwrap_or_default();
        while aux.len() < AUX_FIELDS_MAX {
            let Some((OPCODE_AUX, after)) = rest.split_first().map(|(first, after)| (*first, after)) else { break };
            let Some((name, after)) = string(after) else { break };
            let Some((value, after)) = string(after) else { break };
            aux.insert(name, value);
            rest = after;
        }
        Ok(RdbHeader { version, aux })
    }
}

/// A string as rdbSaveRawString writes it, except for compressed ones.
fn string(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (first, rest) = bytes.split_first()?;
    let low = u64::from(first & 0x3F);
    let (length, rest) = match (first >> 6, first & 0x3F) {
        (0, _) => (low, rest),
        (1, _) => {
            let (second, rest) = rest.split_first()?;
            (low << 8 | u64::from(*second), rest)
        }
        (2, 0) => take::<4>(rest).map(|(word, rest)| (u64::from(u32::from_be_bytes(word)), rest))?,
        (2, 1) => take::<8>(rest).map(|(word, rest)| (u64::from_be_bytes(word), rest))?,
        (3, 0) => return take::<1>(rest).map(|(word, rest)| (i8::from_le_bytes(word).to_string(), rest)),
        (3, 1) => return take::<2>(rest).map(|(word, rest)| (i16::from_le_bytes(word).to_string(), rest)),
        (3, 2) => return take::<4>(rest).map(|(word, rest)| (i32::from_le_bytes(word).to_string(), rest)),
        _ => return None,
    };
    let length = usize::try_from(length).ok()?;
    let text = std::str::from_utf8(rest.get(..length)?).ok()?;
    Some((text.to_string(), rest.get(length..)?))
}

fn take<const N: usize>(bytes: &[u8]) -> Option<([u8; N], &[u8])> {
    bytes.split_first_chunk::<N>().map(|(head, rest)| (*head, rest))
}

/// What the end of a snapshot says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RdbVerdict {
    /// The checksum was there and right.
    Verified,
    /// The server writes none (`rdbchecksum no`, or a very old version): only the end marker was looked at.
    WithoutChecksum,
}

/// Checks a snapshot while it passes by, in pieces of any size. Takes a few bytes of memory.
pub struct RdbCheck {
    crc: Digest,
    /// The first bytes, for the version.
    head: Vec<u8>,
    /// The last bytes so far, which may be the checksum and are not in `crc` yet; one more than it for the end marker.
    tail: Vec<u8>,
    bytes: u64,
}

impl Default for RdbCheck {
    fn default() -> RdbCheck {
        RdbCheck { crc: Digest::new(CrcAlgorithm::Crc64Redis), head: Vec::new(), tail: Vec::new(), bytes: 0 }
    }
}

impl RdbCheck {
    /// Takes the next bytes of the file.
    pub fn update(&mut self, bytes: &[u8]) {
        let wanted = MAGIC_BYTES.saturating_sub(self.head.len()).min(bytes.len());
        self.head.extend_from_slice(&bytes[..wanted]);
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
        const KEPT: usize = CHECKSUM_BYTES + 1;
        if bytes.len() >= KEPT {
            let (body, tail) = bytes.split_at(bytes.len() - KEPT);
            self.crc.update(&self.tail);
            self.crc.update(body);
            self.tail.clear();
            self.tail.extend_from_slice(tail);
        } else {
            self.tail.extend_from_slice(bytes);
            let surplus = self.tail.len().saturating_sub(KEPT);
            self.crc.update(&self.tail[..surplus]);
            self.tail.drain(..surplus);
        }
    }

    /// Ends the file. An error says what is wrong with it and is of kind `Damaged`.
    pub fn finish(mut self) -> Result<RdbVerdict> {
        let damaged = |why: String| Err(Error::new(Kind::Damaged, why));
        let Some(version) = RdbVersion::parse(&self.head) else {
            return damaged("it does not begin like a snapshot of Redis or Valkey (RDB)".to_string());
        };
        let has_checksum = version.family == RdbFamily::Valkey || version.number >= CHECKSUM_SINCE;
        if !has_checksum {
            return match self.tail.last() {
                Some(&OPCODE_EOF) => Ok(RdbVerdict::WithoutChecksum),
                _ => damaged("it has no end marker: it is cut off".to_string()),
            };
        }
        let Some((&OPCODE_EOF, checksum)) = self.tail.split_first() else {
            return damaged(format!("it has no end marker after {} bytes: it is cut off", self.bytes));
        };
        self.crc.update(&[OPCODE_EOF]);
        let wanted = checksum.try_into().map(u64::from_le_bytes).unwrap_or(0);
        let found = self.crc.finalize();
        match wanted {
            0 => Ok(RdbVerdict::WithoutChecksum),
            wanted if wanted == found => Ok(RdbVerdict::Verified),
            wanted => damaged(format!("its checksum is {found:016x} and should be {wanted:016x}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `redis-server` 7.0.15 wrote for an empty data set, to the byte.
    const EMPTY_7_0: &[u8] =
        b"REDIS0010\xfa\x09redis-ver\x067.0.15\xfa\x0aredis-bits\xc0\x40\xfa\x05ctime\xc2\xe1\x4e\x01\x6b\
        \xfa\x08used-mem\xc2\x08\x61\x0d\x00\xfa\x08aof-base\xc0\x01\xff\xce\x05\xdf\xf5\x98\x32\x32\xab";

    fn check(bytes: &[u8], piece: usize) -> Result<RdbVerdict> {
        let mut check = RdbCheck::default();
        bytes.chunks(piece).for_each(|piece| check.update(piece));
        check.finish()
    }

    #[test]
    fn the_header_says_who_wrote_it_and_when() {
        let header = RdbHeader::parse(EMPTY_7_0).unwrap();
        assert_eq!(header.version.to_string(), "REDIS0010");
        assert_eq!(header.aux["redis-ver"], "7.0.15");
        assert_eq!(header.aux["ctime"], "1795247841");
        assert_eq!(header.aux["aof-base"], "1");
        assert_eq!(RdbVersion::parse_text("VALKEY080"), RdbVersion::parse(b"VALKEY080\xfa"));
        assert_eq!(RdbVersion::parse_text("VALKEY080").unwrap().to_string(), "VALKEY080");
    }

    #[test]
    fn a_whole_snapshot_is_verified_in_any_pieces() {
        for piece in [1, 2, 7, 8, 9, 10, 50, 1000] {
            assert_eq!(check(EMPTY_7_0, piece).unwrap(), RdbVerdict::Verified, "{piece}");
        }
    }

    #[test]
    fn a_snapshot_with_any_flipped_bit_or_any_missing_tail_is_refused() {
        for at in 9..EMPTY_7_0.len() {
            for bit in 0..8 {
                let mut bytes = EMPTY_7_0.to_vec();
                bytes[at] ^= 1 << bit;
                assert_eq!(check(&bytes, 16).unwrap_err().kind(), Kind::Damaged, "byte {at} bit {bit}");
            }
        }
        for length in 0..EMPTY_7_0.len() {
            assert_eq!(check(&EMPTY_7_0[..length], 16).unwrap_err().kind(), Kind::Damaged, "{length} bytes");
        }
    }

    #[test]
    fn a_snapshot_without_a_checksum_is_told_apart_from_a_verified_one() {
        let mut bytes = EMPTY_7_0.to_vec();
        let end = bytes.len();
        bytes[end - 8..].fill(0);
        assert_eq!(check(&bytes, 16).unwrap(), RdbVerdict::WithoutChecksum);
    }

    proptest::proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes: Vec<u8>, piece in 1usize..40) {
            let mut with_magic = b"REDIS0010\xfa".to_vec();
            with_magic.extend(&bytes);
            for bytes in [&bytes, &with_magic] {
                let _ = RdbHeader::parse(bytes);
                let _ = check(bytes, piece);
            }
        }
    }
}
