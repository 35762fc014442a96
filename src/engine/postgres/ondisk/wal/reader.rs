//! The incremental reader: bytes of contiguous log go in, in pieces of any size, records come out.
//!
//! Each page header is checked (magic of the version, flags, own address, system identifier and sizes on the first
//! page of a segment, timeline never going back), and of each record the length, the resource manager, the link to
//! the record before and the CRC32C. What is not right ends the log, as it does for the server; a reader that has
//! ended stays ended.
//!
//! Sources: `src/backend/access/transam/xlogreader.c`, `src/include/access/xlog_internal.h`,
//! `src/include/access/xlogrecord.h`.
//!
//! Cost: a record that lies within one page of one piece is not copied. Bodies are kept only for the resource managers
//! that `record` decodes; everything else is checksummed and dropped. Memory grows only with bytes that arrived, and
//! never beyond `KEPT_BODY_BYTES`.

use super::super::bytes::{array_at, u32_at, u64_at};
use super::end::{End, EndReason};
use super::format::{LONG_PAGE_HEADER_BYTES, WalFormat};
use super::page_header::PageHeader;
use crate::error::{Error, Kind, Result};
use crate::model::position::Lsn;

/// The header that each record begins with (SizeOfXLogRecord).
pub const RECORD_HEADER_BYTES: usize = 24;

/// The longest record that any supported server can have written: its memory allocator's limit (MaxAllocSize).
/// Since 16 the server itself stops four megabytes earlier (XLogRecordMaxSize).
pub const MAX_RECORD_BYTES: u32 = 0x3fff_ffff;

/// How much of one record's body is kept at most. A commit record of this length drops millions of relations.
pub const KEPT_BODY_BYTES: usize = 64 << 20;

/// A buffer that grew beyond this is given back when the next record begins.
const SPARE_BUFFER_BYTES: usize = 1 << 20;

/// Records begin at multiples of this (MAXIMUM_ALIGNOF).
const ALIGNMENT: u64 = 8;

/// One record whose checksum was right. What its positions mean is said in the module `wal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    pub start: Lsn,
    pub end: Lsn,
    pub next: Lsn,
    /// The start of the record before.
    pub previous: Lsn,
    /// The transaction that wrote it, or 0.
    pub xid: u32,
    /// The resource manager that the record belongs to, and its flags.
    pub resource_manager: u8,
    pub info: u8,
    /// The length without page headers and without the padding behind it.
    pub length: u32,
    /// What follows the record header, for records that `record::decode` looks into; empty for all others. Cut at
    /// `KEPT_BODY_BYTES`.
    pub body: &'a [u8],
}

/// What came of the bytes so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step<'a> {
    Record(Record<'a>),
    /// The piece is used up; more bytes are needed.
    NeedMore,
    /// There is no further valid record.
    End(End),
}

/// What the reader expects next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Reading began at a page: its header decides.
    Fresh,
    /// The rest of a record that began before the first byte is skipped.
    SkipContinuation {
        remaining: u64,
    },
    /// Between records.
    Boundary,
    /// A record's header is being gathered.
    Header {
        have: usize,
    },
    /// A record's body is being read.
    Body {
        remaining: u64,
    },
    /// After a switch, the rest of the segment is skipped unread.
    SkipSegment {
        until: u64,
    },
    Ended(End),
}

/// The fields of a record's header.
#[derive(Debug, Clone, Copy)]
struct RecordHeader {
    length: u32,
    xid: u32,
    previous: Lsn,
    info: u8,
    resource_manager: u8,
    crc: u32,
}

impl RecordHeader {
    fn read(bytes: &[u8; RECORD_HEADER_BYTES]) -> RecordHeader {
        // The offsets lie inside the array, so that the zeros are never taken.
        RecordHeader {
            length: u32_at(bytes, 0).unwrap_or_default(),
            xid: u32_at(bytes, 4).unwrap_or_default(),
            previous: Lsn(u64_at(bytes, 8).unwrap_or_default()),
            info: bytes[16],
            resource_manager: bytes[17],
            crc: u32_at(bytes, 20).unwrap_or_default(),
        }
    }
}

/// Reads records out of contiguous log. See the module.
pub struct WalReader {
    format: WalFormat,
    phase: Phase,
    /// The position of the first byte that has not been used; gathered page header bytes do not count as used.
    at: u64,
    /// Whether the header of the page that `at` lies in has been read.
    page_is_open: bool,
    page_header: Vec<u8>,
    page_timeline: Option<u32>,
    newest_timeline: u32,
    valid_until: Lsn,
    /// The start of the last record.
    previous: Option<Lsn>,
    /// A record that was given up, until the record that says so has been seen.
    overwritten: Option<Lsn>,
    /// The record being read.
    start: Lsn,
    header: [u8; RECORD_HEADER_BYTES],
    crc: crc_fast::Digest,
    body: Vec<u8>,
}

impl WalReader {
    /// A reader of the log from `start` on. `start` is the start of a page or of a record: if a page begins there with
    /// the rest of an earlier record, that rest is skipped.
    pub fn new(format: WalFormat, start: Lsn) -> Result<WalReader> {
        if !format.page_bytes.is_power_of_two() || !(1 << 10..=1 << 16).contains(&format.page_bytes) {
            return Err(Error::new(
                Kind::Damaged,
                format!("{} bytes is not the size of a WAL page", format.page_bytes),
            ));
        }
        let in_page = format.page_offset(start.0);
        let header = format.page_header_bytes(start.0 - in_page) as u64;
        // No log is that long, and so no sum of positions can overflow.
        let is_beyond_all_logs = start.0 > 1 << 62;
        if is_beyond_all_logs || !start.0.is_multiple_of(ALIGNMENT) || (in_page > 0 && in_page < header) {
            return Err(Error::new(Kind::BadInput, format!("no record begins at log position '{start}'")));
        }
        Ok(WalReader {
            format,
            phase: if in_page == 0 { Phase::Fresh } else { Phase::Boundary },
            at: start.0,
            page_is_open: in_page > 0,
            page_header: Vec::with_capacity(LONG_PAGE_HEADER_BYTES),
            page_timeline: None,
            newest_timeline: u32::MAX,
            valid_until: start,
            previous: None,
            overwritten: None,
            start,
            header: [0; RECORD_HEADER_BYTES],
            crc: crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi),
            body: Vec::new(),
        })
    }

    /// The same reader, which ends the log at a page of a newer timeline than this.
    pub fn with_newest_timeline(mut self, timeline: u32) -> WalReader {
        self.newest_timeline = timeline;
        self
    }

    /// The same reader, which knows where the record before the first one starts and so can check the link.
    pub fn with_previous(mut self, previous: Lsn) -> WalReader {
        self.previous = Some(previous);
        self
    }

    /// The position of the next byte to feed.
    pub fn position(&self) -> Lsn {
        Lsn(self.at + self.page_header.len() as u64)
    }

    /// The `next` of the last valid record, or the first position that one can start at.
    pub fn valid_until(&self) -> Lsn {
        self.valid_until
    }

    /// Everything before this position has been handed out as records. An unfinished record begins here, which may be
    /// segments before `position`: who passes segments on as they are read must not pass on what lies behind it.
    pub fn undecided_from(&self) -> Lsn {
        match self.phase {
            Phase::Header { .. } | Phase::Body { .. } => self.start,
            Phase::Ended(end) => end.valid_until,
            _ => Lsn(self.at),
        }
    }

    /// The timeline that the newest page was begun on. Records further down the page may belong to the next one: a
    /// promotion goes on in the middle of a page.
    pub fn page_timeline(&self) -> Option<u32> {
        self.page_timeline
    }

    /// Takes bytes from the front of `input` until something came of them. `input` continues at `position`; call
    /// again with what is left of it until the answer is `NeedMore`.
    pub fn next<'reader, 'input: 'reader>(&'reader mut self, input: &mut &'input [u8]) -> Step<'reader> {
        loop {
            if let Phase::Ended(end) = self.phase {
                return Step::End(end);
            }
            if let Phase::SkipSegment { until } = self.phase {
                self.take(input, until - self.at);
                if self.at < until {
                    return Step::NeedMore;
                }
                self.page_is_open = false;
                self.phase = Phase::Boundary;
            }
            if input.is_empty() {
                return Step::NeedMore;
            }
            if !self.page_is_open {
                match self.open_page(input) {
                    Ok(true) => {}
                    Ok(false) => return Step::NeedMore,
                    Err(reason) => return self.end(reason, Lsn(self.at)),
                }
            }
            match self.in_page(input) {
                Ok(InPage::GoOn) => {}
                Ok(InPage::Whole(record)) => return Step::Record(record),
                Ok(InPage::Assembled) => {
                    return match self.finish_assembled() {
                        Ok(record) => Step::Record(Record { body: &self.body, ..record }),
                        Err(reason) => self.end(reason, self.start),
                    };
                }
                Err(reason) => return self.end(reason, self.start),
            }
        }
    }

    fn end(&mut self, reason: EndReason, at: Lsn) -> Step<'static> {
        let end = End { valid_until: self.valid_until, at, reason };
        self.phase = Phase::Ended(end);
        self.body = Vec::new();
        Step::End(end)
    }

    /// Uses up to `most` bytes of the input.
    fn take<'input>(&mut self, input: &mut &'input [u8], most: u64) -> &'input [u8] {
        let length = usize::try_from(most).unwrap_or(usize::MAX).min(input.len());
        let (taken, rest) = input.split_at(length);
        *input = rest;
        self.at += length as u64;
        if length > 0 && self.format.page_offset(self.at) == 0 {
            self.page_is_open = false;
        }
        taken
    }

    /// How many bytes of the current page are left.
    fn room(&self) -> u64 {
        u64::from(self.format.page_bytes) - self.format.page_offset(self.at)
    }

    /// Reads the header of the page at `at`. `Ok(false)` if the input ends inside it.
    fn open_page(&mut self, input: &mut &[u8]) -> Result<bool, EndReason> {
        let wanted = self.format.page_header_bytes(self.at);
        let length = (wanted - self.page_header.len()).min(input.len());
        let (taken, rest) = input.split_at(length);
        self.page_header.extend_from_slice(taken);
        *input = rest;
        if self.page_header.len() < wanted {
            return Ok(false);
        }
        let header = std::mem::take(&mut self.page_header);
        let outcome = self.check_page(&header);
        self.page_header = header;
        self.page_header.clear();
        outcome?;
        self.at += wanted as u64;
        self.page_is_open = true;
        Ok(true)
    }

    fn check_page(&mut self, header: &[u8]) -> Result<(), EndReason> {
        let page =
            PageHeader::read(header, self.at, &self.format).map_err(|reason| self.at_unfinished_record(reason))?;
        let goes_back = self.page_timeline.is_some_and(|last| page.timeline < last);
        if page.timeline == 0 || page.timeline > self.newest_timeline || goes_back {
            return Err(EndReason::WrongTimeline(page.timeline));
        }
        self.page_timeline = Some(page.timeline);
        self.continue_into_page(&page)
    }

    /// A log that stops between records ends as a matter of course; inside a record its rest is missing.
    fn at_unfinished_record(&self, reason: EndReason) -> EndReason {
        match self.phase {
            Phase::Header { .. } | Phase::Body { .. } if reason.is_ordinary() => EndReason::MissingContinuation,
            _ => reason,
        }
    }

    /// Matches what the page header says about its first bytes with what was read before.
    fn continue_into_page(&mut self, page: &PageHeader) -> Result<(), EndReason> {
        if page.gives_record_up {
            // The server crashed inside a record and gave it up when it started again.
            if matches!(self.phase, Phase::Header { .. } | Phase::Body { .. }) {
                self.overwritten = Some(self.start);
            }
            self.phase = Phase::Boundary;
            return Ok(());
        }
        let expected = match self.phase {
            Phase::Fresh if page.continues_record => {
                self.phase = Phase::SkipContinuation { remaining: page.continued_bytes };
                return if page.continued_bytes == 0 { Err(EndReason::MissingContinuation) } else { Ok(()) };
            }
            Phase::Fresh => {
                self.phase = Phase::Boundary;
                return Ok(());
            }
            Phase::Boundary if page.continues_record => return Err(EndReason::UnexpectedContinuation),
            Phase::Boundary => return Ok(()),
            Phase::SkipContinuation { remaining } | Phase::Body { remaining } => remaining,
            Phase::Header { have } => {
                let length = u64::from(u32_at(&self.header, 0).unwrap_or_default());
                length.saturating_sub(have as u64)
            }
            Phase::SkipSegment { .. } | Phase::Ended(_) => return Ok(()),
        };
        match page.continues_record && page.continued_bytes == expected {
            true => Ok(()),
            false => Err(EndReason::MissingContinuation),
        }
    }

    /// Goes on inside an open page.
    fn in_page<'input>(&mut self, input: &mut &'input [u8]) -> Result<InPage<'input>, EndReason> {
        match self.phase {
            Phase::SkipContinuation { remaining } => {
                let taken = self.take(input, remaining.min(self.room())).len() as u64;
                self.phase = match remaining - taken {
                    0 => {
                        self.valid_until = Lsn(aligned(self.at));
                        Phase::Boundary
                    }
                    remaining => Phase::SkipContinuation { remaining },
                };
                Ok(InPage::GoOn)
            }
            Phase::Boundary => self.begin_record(input),
            Phase::Header { have } => self.gather_header(input, have),
            Phase::Body { remaining } => {
                let taken = self.take(input, remaining.min(self.room()));
                self.crc.update(taken);
                if is_decoded(self.header[17], self.header[16]) {
                    let kept = taken.len().min(KEPT_BODY_BYTES.saturating_sub(self.body.len()));
                    self.body.extend_from_slice(&taken[..kept]);
                }
                let remaining = remaining - taken.len() as u64;
                self.phase = Phase::Body { remaining };
                Ok(if remaining == 0 { InPage::Assembled } else { InPage::GoOn })
            }
            // These never come here: an opened page has left `Fresh`, and the others are handled before.
            Phase::Fresh | Phase::SkipSegment { .. } | Phase::Ended(_) => Ok(InPage::GoOn),
        }
    }

    /// Begins the record at `at`, after the padding of the one before. A record that lies in the page and in the
    /// input as a whole is handed out at once.
    fn begin_record<'input>(&mut self, input: &mut &'input [u8]) -> Result<InPage<'input>, EndReason> {
        let padding = aligned(self.at) - self.at;
        if padding > 0 {
            self.take(input, padding);
            return Ok(InPage::GoOn);
        }
        self.start = Lsn(self.at);
        let room = usize::try_from(self.room()).unwrap_or(usize::MAX);
        let visible = &input[..input.len().min(room)];
        if let Some(header) = array_at::<RECORD_HEADER_BYTES>(visible, 0) {
            let fields = RecordHeader::read(&header);
            self.check_length(fields.length)?;
            if let Some(body) = visible.get(RECORD_HEADER_BYTES..fields.length as usize) {
                self.check_header(&fields)?;
                self.crc.reset();
                self.crc.update(body);
                self.take(input, u64::from(fields.length));
                let body = if is_decoded(fields.resource_manager, fields.info) { body } else { &[] };
                return self.finish(fields, &header, body).map(InPage::Whole);
            }
        }
        self.phase = Phase::Header { have: 0 };
        if self.body.capacity() > SPARE_BUFFER_BYTES {
            self.body = Vec::new();
        }
        self.body.clear();
        Ok(InPage::GoOn)
    }

    fn gather_header<'input>(&mut self, input: &mut &'input [u8], have: usize) -> Result<InPage<'input>, EndReason> {
        let room = self.room();
        let taken = self.take(input, ((RECORD_HEADER_BYTES - have) as u64).min(room));
        let now = have + taken.len();
        self.header[have..now].copy_from_slice(taken);
        self.phase = Phase::Header { have: now };
        if now >= 4 {
            // Before the next page is asked for: there may be none after a length of zero.
            self.check_length(u32_at(&self.header, 0).unwrap_or_default())?;
        }
        if now < RECORD_HEADER_BYTES {
            return Ok(InPage::GoOn);
        }
        let fields = RecordHeader::read(&self.header);
        self.check_header(&fields)?;
        self.crc.reset();
        let remaining = u64::from(fields.length) - RECORD_HEADER_BYTES as u64;
        self.phase = Phase::Body { remaining };
        Ok(if remaining == 0 { InPage::Assembled } else { InPage::GoOn })
    }

    fn check_length(&self, length: u32) -> Result<(), EndReason> {
        match length {
            0 => Err(EndReason::Zeros),
            length if (RECORD_HEADER_BYTES as u32..=MAX_RECORD_BYTES).contains(&length) => Ok(()),
            length => Err(EndReason::WrongLength(length)),
        }
    }

    fn check_header(&self, fields: &RecordHeader) -> Result<(), EndReason> {
        // The last built-in resource manager has been logical messages in all supported versions; extensions have
        // the upper half (src/include/access/rmgrlist.h, rmgr.h).
        let known = fields.resource_manager <= 21
            || (fields.resource_manager >= 128 && self.format.major.has_custom_resource_managers());
        if !known {
            return Err(EndReason::WrongResourceManager(fields.resource_manager));
        }
        let linked = match self.previous {
            Some(previous) => fields.previous == previous,
            None => fields.previous < self.start,
        };
        if linked { Ok(()) } else { Err(EndReason::WrongPrevious(fields.previous)) }
    }

    fn finish_assembled(&mut self) -> Result<Record<'static>, EndReason> {
        let header = self.header;
        // The body is borrowed by the caller, after this.
        let body = std::mem::take(&mut self.body);
        let outcome =
            self.finish(RecordHeader::read(&header), &header, &body).map(|record| Record { body: &[], ..record });
        self.body = body;
        outcome
    }

    /// Checks the checksum of the record that ends at `at` and prepares for what follows. Only now is the record
    /// believed.
    fn finish<'body>(
        &mut self,
        fields: RecordHeader,
        header: &[u8; RECORD_HEADER_BYTES],
        body: &'body [u8],
    ) -> Result<Record<'body>, EndReason> {
        self.crc.update(&header[..20]);
        if self.crc.finalize() as u32 != fields.crc {
            return Err(EndReason::WrongChecksum);
        }
        let end = aligned(self.at);
        let is_xlog = fields.resource_manager == super::record::RESOURCE_MANAGER_XLOG;
        let next = if is_xlog && fields.info & 0xf0 == super::record::XLOG_SWITCH {
            end.next_multiple_of(u64::from(self.format.segment_size.bytes()))
        } else {
            end
        };
        if let Some(given_up) = self.overwritten.take() {
            let named = super::record::overwritten_position(fields.info, body, self.format.major);
            if !is_xlog || named != Some(given_up) {
                return Err(EndReason::WrongOverwrite);
            }
        }
        self.phase = if next > end { Phase::SkipSegment { until: next } } else { Phase::Boundary };
        self.previous = Some(self.start);
        self.valid_until = Lsn(next);
        Ok(Record {
            start: self.start,
            end: Lsn(end),
            next: Lsn(next),
            previous: fields.previous,
            xid: fields.xid,
            resource_manager: fields.resource_manager,
            info: fields.info,
            length: fields.length,
            body,
        })
    }
}

/// What came of some bytes inside a page.
enum InPage<'input> {
    GoOn,
    /// A record that lies in the input.
    Whole(Record<'input>),
    /// A record whose last byte has been read, piece by piece.
    Assembled,
}

/// Whether `record::decode` looks into the bodies of such records.
fn is_decoded(resource_manager: u8, info: u8) -> bool {
    match resource_manager {
        super::record::RESOURCE_MANAGER_XACT => true,
        super::record::RESOURCE_MANAGER_XLOG => !matches!(info & 0xf0, 0xa0 | 0xb0),
        _ => false,
    }
}

fn aligned(position: u64) -> u64 {
    position.next_multiple_of(ALIGNMENT)
}

#[cfg(test)]
mod tests;
