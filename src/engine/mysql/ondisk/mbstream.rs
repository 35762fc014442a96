//! The stream that `mariadb-backup --stream=mbstream` writes: files in chunks, several at the same time.
//!
//! Source: `extra/mariabackup/xbstream.h` and `xbstream_read.c`. A chunk is the magic `XBSTCK01`, a byte of flags, a
//! byte of type, the length of the path (4 bytes) and the path; a chunk of data goes on with its length (8), its offset
//! in the file (8), the CRC-32 of the data (4), and the data. Numbers are little-endian. Data is handed on as it comes,
//! before its checksum is known, so that memory does not grow with a length that the bytes claim.

use super::bytes::{u32_at, u64_at};
use crate::error::{Error, Kind, Result};

const MAGIC: &[u8; 8] = b"XBSTCK01";
const START_BYTES: usize = 14;
const DATA_HEADER_BYTES: usize = 20;
/// The reader of MariaDB refuses longer ones (FN_REFLEN).
const PATH_BYTES_MAX: usize = 512;
/// A chunk of an unknown type may be skipped only if it says so (XB_STREAM_FLAG_IGNORABLE).
const FLAG_IGNORABLE: u8 = 1;

/// What the stream says next.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// The next bytes of a file; the first of a path begins it.
    Data { path: &'a str, bytes: &'a [u8] },
    /// A file is complete. One that had no data is empty.
    End { path: &'a str },
}

/// Takes a stream apart. Paths are relative, without `..`.
pub struct Decoder {
    state: State,
    head: Vec<u8>,
    path: String,
    flags: u8,
    kind: u8,
    crc: crc_fast::Digest,
    wanted_crc: u32,
    offset: u64,
    /// How many bytes each file that has not ended has so far.
    open: std::collections::HashMap<String, u64>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Start,
    Path { bytes: usize },
    DataHeader,
    Data { left: u64 },
}

/// More files than are ever written at the same time.
const OPEN_FILES_MAX: usize = 4096;

impl Decoder {
    pub fn new() -> Decoder {
        Decoder {
            state: State::Start,
            head: Vec::new(),
            path: String::new(),
            flags: 0,
            kind: 0,
            crc: new_crc(),
            wanted_crc: 0,
            offset: 0,
            open: std::collections::HashMap::new(),
        }
    }

    /// Takes the next bytes of the stream and hands what they say to `found`.
    pub fn feed(&mut self, mut bytes: &[u8], found: &mut dyn FnMut(Part<'_>) -> Result<()>) -> Result<()> {
        while !bytes.is_empty() {
            let wanted = match self.state {
                State::Start => START_BYTES - self.head.len(),
                State::Path { bytes } => bytes - self.head.len(),
                State::DataHeader => DATA_HEADER_BYTES - self.head.len(),
                State::Data { left } => usize::try_from(left).unwrap_or(usize::MAX),
            };
            let (now, later) = bytes.split_at(wanted.min(bytes.len()));
            bytes = later;
            if let State::Data { left } = self.state {
                self.crc.update(now);
                self.state = State::Data { left: left - now.len() as u64 };
                found(Part::Data { path: &self.path, bytes: now })?;
            } else {
                self.head.extend_from_slice(now);
            }
            if now.len() == wanted {
                self.end_part(found)?;
            }
        }
        Ok(())
    }

    /// The stream has ended: an error if it ended in the middle of something.
    pub fn finish(&self) -> Result<()> {
        match (self.state, self.open.keys().next()) {
            (State::Start, None) if self.head.is_empty() => Ok(()),
            (State::Start, Some(path)) if self.head.is_empty() => {
                Err(damaged(&format!("it ended before file '{path}' did")))
            }
            _ => Err(damaged("it ended inside a chunk")),
        }
    }

    fn end_part(&mut self, found: &mut dyn FnMut(Part<'_>) -> Result<()>) -> Result<()> {
        match self.state {
            State::Start => self.end_start(),
            State::Path { .. } => self.end_path(found),
            State::DataHeader => self.end_data_header(found),
            State::Data { .. } => self.end_data(),
        }
    }

    fn end_start(&mut self) -> Result<()> {
        if !self.head.starts_with(MAGIC) {
            return Err(damaged("a chunk does not begin like one"));
        }
        (self.flags, self.kind) = (self.head[8], self.head[9]);
        let bytes = u32_at(&self.head, 10).map_or(0, |bytes| bytes as usize);
        if bytes == 0 || bytes > PATH_BYTES_MAX {
            return Err(damaged("the path of a file is too long or empty"));
        }
        self.head.clear();
        self.state = State::Path { bytes };
        Ok(())
    }

    fn end_path(&mut self, found: &mut dyn FnMut(Part<'_>) -> Result<()>) -> Result<()> {
        let path = std::str::from_utf8(&self.head).map_err(|_| damaged("the path of a file is not text"))?;
        let path = path.strip_prefix("./").unwrap_or(path);
        let is_plain = path.split('/').all(|part| !matches!(part, "" | "." | "..")) && !path.contains('\0');
        if !is_plain {
            return Err(damaged(&format!("'{path}' is not the path of a file of a backup")));
        }
        self.path = path.to_string();
        self.head.clear();
        match self.kind {
            b'P' => self.state = State::DataHeader,
            b'E' => {
                self.state = State::Start;
                self.open.remove(&self.path);
                found(Part::End { path: &self.path })?;
            }
            kind => {
                let ignorable = if self.flags & FLAG_IGNORABLE == 0 { "" } else { ", although ignorable," };
                return Err(damaged(&format!("a chunk of type {kind}{ignorable} is not known")));
            }
        }
        Ok(())
    }

    fn end_data_header(&mut self, found: &mut dyn FnMut(Part<'_>) -> Result<()>) -> Result<()> {
        let header = (u64_at(&self.head, 0), u64_at(&self.head, 8), u32_at(&self.head, 16));
        let (Some(bytes), Some(offset), Some(crc)) = header else { return Err(damaged("a chunk is cut short")) };
        let so_far = self.open.get(&self.path).copied().unwrap_or(0);
        if offset != so_far {
            return Err(damaged(&format!("file '{}' goes on at {offset} after {so_far} bytes", self.path)));
        }
        if self.open.len() >= OPEN_FILES_MAX {
            return Err(damaged("too many files are open at the same time"));
        }
        self.offset = offset.checked_add(bytes).ok_or_else(|| damaged("a file is too long"))?;
        self.open.insert(self.path.clone(), self.offset);
        (self.crc, self.wanted_crc) = (new_crc(), crc);
        self.head.clear();
        self.state = State::Data { left: bytes };
        if bytes == 0 {
            found(Part::Data { path: &self.path, bytes: &[] })?;
            return self.end_data();
        }
        Ok(())
    }

    fn end_data(&mut self) -> Result<()> {
        if self.crc.finalize() != u64::from(self.wanted_crc) {
            return Err(damaged(&format!("the checksum of '{}' before byte {} is wrong", self.path, self.offset)));
        }
        self.state = State::Start;
        Ok(())
    }
}

impl Default for Decoder {
    fn default() -> Decoder {
        Decoder::new()
    }
}

fn new_crc() -> crc_fast::Digest {
    crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32IsoHdlc)
}

fn damaged(why: &str) -> Error {
    Error::new(Kind::Damaged, format!("the stream of mariadb-backup is not as it should be: {why}"))
        .hint("was the program killed, or is it of another version than the server?")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chunk(path: &str, data: Option<(u64, &[u8])>) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend([0, if data.is_some() { b'P' } else { b'E' }]);
        out.extend((path.len() as u32).to_le_bytes());
        out.extend(path.as_bytes());
        if let Some((offset, bytes)) = data {
            out.extend((bytes.len() as u64).to_le_bytes());
            out.extend(offset.to_le_bytes());
            let mut crc = new_crc();
            crc.update(bytes);
            out.extend((crc.finalize() as u32).to_le_bytes());
            out.extend(bytes);
        }
        out
    }

    fn sample() -> Vec<u8> {
        [
            chunk("ibdata1", Some((0, b"first"))),
            chunk("./t/a.frm", Some((0, b"frm"))),
            chunk("ibdata1", Some((5, b"second"))),
            chunk("./t/a.frm", None),
            chunk("empty", None),
            chunk("zero", Some((0, b""))),
            chunk("zero", None),
            chunk("ibdata1", None),
        ]
        .concat()
    }

    fn decode(bytes: &[u8], piece: usize) -> (Result<()>, Vec<(String, Vec<u8>)>) {
        let mut decoder = Decoder::new();
        let mut open: std::collections::BTreeMap<String, Vec<u8>> = Default::default();
        let mut ended = Vec::new();
        for piece in bytes.chunks(piece.max(1)) {
            let fed = decoder.feed(piece, &mut |part| {
                match part {
                    Part::Data { path, bytes } => open.entry(path.to_string()).or_default().extend(bytes),
                    Part::End { path } => ended.push((path.to_string(), open.remove(path).unwrap_or_default())),
                }
                Ok(())
            });
            if fed.is_err() {
                return (fed, ended);
            }
        }
        (decoder.finish(), ended)
    }

    proptest! {
        #[test]
        fn files_that_are_mixed_in_the_stream_come_out_whole(piece in 1usize..300) {
            let (outcome, files) = decode(&sample(), piece);
            outcome.unwrap();
            let files: Vec<(&str, &[u8])> = files.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice())).collect();
            prop_assert_eq!(files, [
                ("t/a.frm", &b"frm"[..]), ("empty", b""), ("zero", b""), ("ibdata1", b"firstsecond"),
            ]);
        }

        #[test]
        fn a_stream_that_is_cut_short_is_refused(cut in 1usize..400, piece in 1usize..64) {
            let bytes = sample();
            prop_assume!(cut < bytes.len());
            prop_assert!(decode(&bytes[..cut], piece).0.is_err());
        }

        #[test]
        fn a_flipped_bit_in_data_is_found_and_none_panics(at in 0usize..400, bit in 0u8..8) {
            let mut bytes = sample();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let (outcome, files) = decode(&bytes, 7);
            if outcome.is_ok() {
                // Only the flags and the text of a path are not covered.
                prop_assert_eq!(files.iter().map(|(_, bytes)| bytes.len()).sum::<usize>(), 14);
            }
        }
    }

    #[test]
    fn a_path_that_leads_out_of_the_directory_is_refused() {
        for path in ["../x", "/etc/passwd", "a//b", "a/../b", ".", ""] {
            assert!(decode(&chunk(path, None), 100).0.is_err(), "{path}");
        }
    }

    #[test]
    fn a_file_that_goes_on_at_the_wrong_place_is_refused() {
        let bytes = [chunk("a", Some((0, b"x"))), chunk("a", Some((2, b"y")))].concat();
        assert!(decode(&bytes, 100).0.is_err());
    }
}
