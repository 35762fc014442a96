//! Reads a range of a WAL file in order and refuses bytes that cannot belong to it.
//!
//! The server may give a segment file a new name and write over it as soon as it thinks that nobody needs it. So each
//! page is held against the place where it should be (`src/include/access/xlog_internal.h`, XLogPageHeaderData:
//! magic, timeline and address), and at the end of the range the name must still lead to the file that was opened.
//! After a switch to the next segment the rest of a segment is zeros, page headers included
//! (`src/backend/access/transam/xlog.c`, CopyXLogRecordToWAL); once zeros begin, nothing else may follow.
//! Companions (histories, `.backup`, `.partial`) are read as they are: nothing is behind them that could be checked.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use bytes::Bytes;

use crate::base::bulk::run_blocking;
use crate::engine::LogRead;
use crate::engine::postgres::ondisk::segment::{SegmentName, WalFile};
use crate::engine::postgres::ondisk::wal::{Facts, Scanner, WalFormat};
use crate::engine::postgres::{PostgresEngine, log_files};
use crate::error::{Context, Error, Kind, Result};
use crate::model::log::{LogFile, LogSummary};
use crate::model::position::{Lsn, Position};

const PIECE_BYTES_MAX: u64 = 1 << 20;
/// How far before a range the summary begins to read, so that a commit record that lies across the start of the
/// range is not missed. A commit record of this length drops thousands of relations.
const RUN_UP_BYTES: u64 = 64 << 10;

/// Opens bytes `from..to` of a log file: see [`crate::engine::Engine::open_log`].
pub(super) async fn open(engine: &PostgresEngine, file: &LogFile, from: u64, to: u64) -> Result<Box<dyn LogRead>> {
    let what = format!("cannot read log file '{}' of instance '{}'", file.name, engine.source.name);
    if from > to || to > file.readable_bytes {
        let readable = file.readable_bytes;
        return Err(Error::new(Kind::Internal, format!("{what}: {from} to {to} is not within {readable} bytes")));
    }
    let format = engine.session().await.context(|| &what)?.format;
    let class = WalFile::classify(&file.name, format.segment_size)
        .ok_or_else(|| Error::new(Kind::BadInput, format!("{what}: it is not a WAL file")))?;
    let path = log_files::path_of(engine, &file.name);
    let opened = run_blocking("open log file", move || {
        let opened = File::open(&path).context(|| format!("cannot open '{}'", path.display()))?;
        Ok((opened, path))
    });
    let (opened, path) = opened.await.context(|| &what)?;
    let reader = RangeReader { file: opened, path, at: from, to, what };
    Ok(match class {
        WalFile::Segment(segment) => Box::new(SegmentRead::new(reader, segment, format)),
        _ => Box::new(reader),
    })
}

/// Reads a range of a file as it is.
struct RangeReader {
    file: File,
    path: PathBuf,
    at: u64,
    to: u64,
    what: String,
}

impl RangeReader {
    fn damaged(&self, why: impl std::fmt::Display) -> Error {
        Error::new(Kind::Damaged, format!("{}: {why}", self.what))
    }

    /// The next piece; pieces end at multiples of their maximum, so that page borders are seldom cut.
    fn next_piece(&mut self) -> Result<Vec<u8>> {
        let end = self.to.min((self.at / PIECE_BYTES_MAX + 1) * PIECE_BYTES_MAX);
        let mut piece = vec![0; usize::try_from(end - self.at).unwrap_or(0)];
        self.file.read_exact_at(&mut piece, self.at).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => self.damaged("the file is shorter than the server said"),
            _ => Error::io(&self.what, error),
        })?;
        self.at = end;
        if self.at == self.to {
            self.require_same_file()?;
        }
        Ok(piece)
    }

    /// The name must still lead to the open file: otherwise the server has put it to another use.
    fn require_same_file(&self) -> Result<()> {
        let opened = self.file.metadata().context(|| &self.what)?;
        match std::fs::metadata(&self.path) {
            Ok(named) if (named.dev(), named.ino()) == (opened.dev(), opened.ino()) => Ok(()),
            Ok(_) => Err(self.damaged("it was replaced while it was read")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(self.damaged("the server recycled it while it was read"))
            }
            Err(error) => Err(Error::io(&self.what, error)),
        }
    }
}

impl LogRead for RangeReader {
    fn read(&mut self) -> Result<Bytes> {
        if self.at == self.to { Ok(Bytes::new()) } else { self.next_piece().map(Bytes::from) }
    }

    fn summary(&self) -> LogSummary {
        LogSummary::default()
    }
}

/// Reads a range of a segment, checks its pages, and reads its records for the summary.
struct SegmentRead {
    range: RangeReader,
    segment: SegmentName,
    format: WalFormat,
    pages: PageCheck,
    /// `None` once the log could not be read as records: bytes that the server wrote are shipped whatever they mean.
    scanner: Option<Scanner>,
    facts: Facts,
    started: bool,
}

impl SegmentRead {
    fn new(range: RangeReader, segment: SegmentName, format: WalFormat) -> SegmentRead {
        let pages = PageCheck {
            magic: format.major.wal_page_magic(),
            timeline: segment.timeline,
            start: segment.start(format.segment_size),
            page_bytes: u64::from(format.page_bytes),
            zeros_from: None,
        };
        SegmentRead { range, segment, format, pages, scanner: None, facts: Facts::default(), started: false }
    }

    /// Prepares for the first piece: checks the page that the range begins in, and lets the scanner run up.
    fn start(&mut self) -> Result<()> {
        self.started = true;
        let from = self.range.at;
        let page = from - from % self.pages.page_bytes;
        let mut head = vec![0; usize::try_from(from - page).unwrap_or(0)];
        self.range.file.read_exact_at(&mut head, page).context(|| &self.range.what)?;
        self.pages.check(page, &head).map_err(|why| self.range.damaged(why))?;
        self.scanner = self.run_up(from).or_else(|| self.scanner_at(page, &head));
        Ok(())
    }

    /// A scanner that has read the bytes before the range from some pages back, or from the segment before.
    fn run_up(&self, from: u64) -> Option<Scanner> {
        let begin = from.saturating_sub(RUN_UP_BYTES);
        let begin = begin - begin % self.pages.page_bytes;
        if from > 0 {
            return self.scan_before(&self.range.file, begin, from, self.segment);
        }
        // A segment of the ancestor's timeline would have another name: then the run-up is forgone.
        let previous = SegmentName { number: self.segment.number.checked_sub(1)?, ..self.segment };
        let file = File::open(self.range.path.with_file_name(previous.render(self.format.segment_size))).ok()?;
        let end = u64::from(self.format.segment_size.bytes());
        self.scan_before(&file, end - RUN_UP_BYTES, end, previous)
    }

    fn scan_before(&self, file: &File, begin: u64, end: u64, segment: SegmentName) -> Option<Scanner> {
        let mut bytes = vec![0; usize::try_from(end - begin).ok()?];
        file.read_exact_at(&mut bytes, begin).ok()?;
        let start = Lsn(segment.start(self.format.segment_size).0.checked_add(begin)?);
        self.scanner_fed(start, &bytes)
    }

    fn scanner_at(&self, page: u64, head: &[u8]) -> Option<Scanner> {
        self.scanner_fed(Lsn(self.pages.start.0.checked_add(page)?), head)
    }

    /// A scanner that has read `bytes` and forgotten what was in them; nothing if the log ended in them.
    fn scanner_fed(&self, start: Lsn, bytes: &[u8]) -> Option<Scanner> {
        let mut scanner = Scanner::new(self.format, start).ok()?;
        match scanner.feed(bytes) {
            Ok(None) => {
                scanner.take_facts();
                Some(scanner)
            }
            Ok(Some(_)) | Err(_) => None,
        }
    }

    fn scan(&mut self, piece: &[u8]) {
        let Some(scanner) = &mut self.scanner else { return };
        let outcome = scanner.feed(piece);
        self.facts = scanner.facts().clone();
        match outcome {
            Ok(None) => {}
            Ok(Some(end)) => {
                if !end.reason.is_ordinary() {
                    tracing::warn!("{}: its records end at {}: {}", self.range.what, end.at, end.reason);
                }
                self.scanner = None;
            }
            Err(error) => {
                tracing::warn!("{}: its records cannot be read: {error}", self.range.what);
                self.scanner = None;
            }
        }
    }
}

impl LogRead for SegmentRead {
    fn read(&mut self) -> Result<Bytes> {
        if self.range.at == self.range.to {
            return Ok(Bytes::new());
        }
        if !self.started {
            self.start()?;
        }
        let offset = self.range.at;
        let piece = self.range.next_piece()?;
        self.pages.check(offset, &piece).map_err(|why| self.range.damaged(why))?;
        self.scan(&piece);
        Ok(Bytes::from(piece))
    }

    fn summary(&self) -> LogSummary {
        // The record that ends a transaction lies on the timeline that the segment is named after, or on the one
        // that it was left from: then the position belongs to both.
        let position = |lsn: Lsn| Position::Wal { timeline: self.segment.timeline, lsn };
        LogSummary {
            first_commit_at: self.facts.earliest_commit_time,
            last_commit_at: self.facts.latest_commit_time,
            last_commit: self.facts.last_commit.map(|commit| position(commit.end)),
            named_points: self
                .facts
                .restore_points
                .iter()
                .map(|point| (point.name.clone(), position(point.end)))
                .collect(),
            transactions: Vec::new(),
        }
    }
}

/// Holds each page of a segment against its place.
struct PageCheck {
    magic: u16,
    timeline: u32,
    start: Lsn,
    page_bytes: u64,
    /// Offset in the segment from which on there are only zeros.
    zeros_from: Option<u64>,
}

impl PageCheck {
    /// Looks at the pages that begin in `bytes`, which lie at `offset` in the segment. The error says what is wrong.
    fn check(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let in_page = at % self.page_bytes;
            let length = usize::try_from(self.page_bytes - in_page).unwrap_or(usize::MAX).min(bytes.len() - done);
            // In bounds: `length` was cut to what is left.
            let part = &bytes[done..done + length];
            if self.zeros_from.is_some() || in_page == 0 {
                self.check_page(at, in_page == 0, part)?;
            }
            done += length;
        }
        Ok(())
    }

    fn check_page(&mut self, at: u64, is_start: bool, part: &[u8]) -> Result<(), String> {
        if let Some(zeros_from) = self.zeros_from {
            return match part.iter().position(|byte| *byte != 0) {
                None => Ok(()),
                Some(index) => Err(format!(
                    "the log has ended with zeros at offset {zeros_from}, but there are other bytes at {}",
                    at + index as u64
                )),
            };
        }
        let (Some(magic), Some(timeline), Some(address)) =
            (part.first_chunk::<2>(), bytes_at::<4>(part, 4), bytes_at::<8>(part, 8))
        else {
            // A header is written at once; a range that ends inside it cannot be judged yet.
            return Ok(());
        };
        let (magic, timeline) = (u16::from_le_bytes(*magic), u32::from_le_bytes(timeline));
        let (found, wanted) = (u64::from_le_bytes(address), self.start.0.saturating_add(at));
        if is_start && magic == 0 && part.iter().all(|byte| *byte == 0) {
            // The first page of a segment is written before anything can end in it.
            if at == 0 {
                return Err(String::from("it begins with zeros"));
            }
            self.zeros_from = Some(at);
            return Ok(());
        }
        if magic != self.magic {
            return Err(format!("the page at offset {at} has magic number {magic:04X} and not {:04X}", self.magic));
        }
        if found != wanted {
            return Err(format!(
                "the page at offset {at} says that it is at {} and not at {}",
                Lsn(found),
                Lsn(wanted)
            ));
        }
        // A segment that begins a timeline holds pages of the one before.
        if timeline == 0 || timeline > self.timeline {
            return Err(format!("the page at offset {at} is of timeline {timeline}"));
        }
        Ok(())
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk::<N>().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 8192;

    fn page(address: u64, timeline: u32) -> Vec<u8> {
        let mut page = vec![0x5A; PAGE];
        page[0..2].copy_from_slice(&0xD110u16.to_le_bytes());
        page[4..8].copy_from_slice(&timeline.to_le_bytes());
        page[8..16].copy_from_slice(&address.to_le_bytes());
        page
    }

    fn check() -> PageCheck {
        PageCheck { magic: 0xD110, timeline: 2, start: Lsn(0x100_0000), page_bytes: PAGE as u64, zeros_from: None }
    }

    fn pages(addresses: &[u64]) -> Vec<u8> {
        addresses.iter().flat_map(|address| page(0x100_0000 + address, 2)).collect()
    }

    #[test]
    fn pages_at_their_place_pass_in_any_pieces() {
        let bytes = pages(&[0, 8192, 16384]);
        for piece in [1000, 8192, 10_000, 24_576] {
            let mut check = check();
            for (index, part) in bytes.chunks(piece).enumerate() {
                check.check((index * piece) as u64, part).unwrap();
            }
        }
        check().check(0, &page(0x100_0000, 1)).unwrap();
    }

    #[test]
    fn a_page_of_another_place_timeline_or_format_is_refused() {
        let recycled = pages(&[0, 8192 + (16 << 20)]);
        assert!(check().check(0, &recycled).unwrap_err().contains("says that it is at 0/2002000"));
        assert!(check().check(0, &page(0x100_0000, 3)).unwrap_err().contains("timeline 3"));
        assert!(check().check(0, &vec![0x5A; PAGE]).unwrap_err().contains("magic"));
    }

    #[test]
    fn zeros_may_end_a_segment_but_nothing_may_follow_them() {
        let mut bytes = pages(&[0]);
        bytes.extend(vec![0; 2 * PAGE]);
        check().check(0, &bytes).unwrap();
        bytes.extend(pages(&[3 * PAGE as u64]));
        assert!(check().check(0, &bytes).unwrap_err().contains("other bytes at 24576"));
        assert!(check().check(0, &vec![0; PAGE]).is_err());
    }
}
