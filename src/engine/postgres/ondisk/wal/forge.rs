//! Writes log as a server does, for tests: any version, any page size, records of any length, crashes included.

use super::super::versions::Major;
use super::format::{LONG_PAGE_HEADER_BYTES, SHORT_PAGE_HEADER_BYTES, WalFormat};
use crate::engine::postgres::ondisk::segment::SegmentSize;
use crate::model::position::Lsn;

pub const SYSTEM_IDENTIFIER: u64 = 0x1234_5678_9abc_def0;

pub fn format(major: Major) -> WalFormat {
    WalFormat {
        major,
        segment_size: SegmentSize::new(1 << 20).unwrap(),
        page_bytes: 8192,
        system_identifier: Some(SYSTEM_IDENTIFIER),
    }
}

/// A body of main data only.
pub fn plain_body(data: &[u8]) -> Vec<u8> {
    let mut body = match u8::try_from(data.len()) {
        Ok(length) => vec![255, length],
        Err(_) => [&[254][..], &(data.len() as u32).to_le_bytes()].concat(),
    };
    body.extend_from_slice(data);
    body
}

/// A log that grows record by record.
pub struct Forge {
    format: WalFormat,
    pub start: Lsn,
    pub bytes: Vec<u8>,
    pub timeline: u32,
    pub previous: Lsn,
}

/// Where a written record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    pub start: Lsn,
    pub end: Lsn,
}

impl Forge {
    /// A log that begins with the first page of segment `number`.
    pub fn new(format: WalFormat, number: u64) -> Forge {
        let start = format.segment_size.start_of(number);
        Forge { format, start, bytes: Vec::new(), timeline: 1, previous: Lsn(0x28) }
    }

    pub fn position(&self) -> Lsn {
        Lsn(self.start.0 + self.bytes.len() as u64)
    }

    fn at_page(&self) -> bool {
        self.position().0.is_multiple_of(u64::from(self.format.page_bytes))
    }

    /// Writes a page header at the current position, which is a page boundary.
    fn page_header(&mut self, flags: u16, remaining: u32) {
        let address = self.position();
        let long = self.format.segment_size.offset_of(address) == 0;
        let flags = flags | if long { 2 } else { 0 };
        let from = self.bytes.len();
        self.bytes.extend_from_slice(&self.format.major.wal_page_magic().to_le_bytes());
        self.bytes.extend_from_slice(&flags.to_le_bytes());
        self.bytes.extend_from_slice(&self.timeline.to_le_bytes());
        self.bytes.extend_from_slice(&address.0.to_le_bytes());
        self.bytes.extend_from_slice(&remaining.to_le_bytes());
        self.bytes.resize(from + SHORT_PAGE_HEADER_BYTES, 0);
        if long {
            self.bytes.extend_from_slice(&SYSTEM_IDENTIFIER.to_le_bytes());
            self.bytes.extend_from_slice(&self.format.segment_size.bytes().to_le_bytes());
            self.bytes.extend_from_slice(&self.format.page_bytes.to_le_bytes());
            assert_eq!(self.bytes.len(), from + LONG_PAGE_HEADER_BYTES);
        }
    }

    /// The bytes of a record that would be written next, without page headers.
    fn record(&mut self, resource_manager: u8, info: u8, xid: u32, body: &[u8]) -> Vec<u8> {
        let mut record = ((24 + body.len()) as u32).to_le_bytes().to_vec();
        record.extend_from_slice(&xid.to_le_bytes());
        record.extend_from_slice(&self.previous.0.to_le_bytes());
        record.extend_from_slice(&[info, resource_manager, 0, 0]);
        let crc = crc_fast::crc32_iscsi(&[body, &record].concat());
        record.extend_from_slice(&crc.to_le_bytes());
        record.extend_from_slice(body);
        record
    }

    /// Writes the first `most` bytes of a record and the page headers between them.
    fn lay(&mut self, record: &[u8], most: usize) -> Lsn {
        if self.at_page() {
            self.page_header(0, 0);
        }
        let start = self.position();
        for (index, byte) in record.iter().enumerate().take(most) {
            if index > 0 && self.at_page() {
                self.page_header(1, (record.len() - index) as u32);
            }
            self.bytes.push(*byte);
        }
        start
    }

    /// Writes a record and the padding behind it.
    pub fn write(&mut self, resource_manager: u8, info: u8, xid: u32, body: &[u8]) -> Written {
        let record = self.record(resource_manager, info, xid, body);
        let start = self.lay(&record, usize::MAX);
        while !self.position().0.is_multiple_of(8) {
            self.bytes.push(0);
        }
        self.previous = start;
        Written { start, end: self.position() }
    }

    /// Writes only the beginning of a record, up to the next page boundary but `pages` more, and then, as a server
    /// that has started again does, the record that gives it up.
    pub fn write_torn(&mut self, body_bytes: usize, pages: usize) -> (Lsn, Written) {
        let record = self.record(10, 0, 9, &vec![7; body_bytes]);
        if self.at_page() {
            self.page_header(0, 0);
        }
        let page = self.format.page_bytes as usize;
        let mut most = page - self.position().0 as usize % page;
        most += pages * (page - SHORT_PAGE_HEADER_BYTES);
        assert!(most < record.len(), "the record must not fit");
        let start = self.lay(&record, most);
        assert!(self.at_page());
        self.page_header(8, 0);
        let mut data = start.0.to_le_bytes().to_vec();
        data.extend_from_slice(&[0; 8]);
        (start, self.write(0, 0xd0, 0, &plain_body(&data)))
    }

    /// Writes a switch and the rest of its segment.
    pub fn switch(&mut self) -> Written {
        let written = self.write(0, 0x40, 0, &[]);
        while self.format.segment_size.offset_of(self.position()) != 0 {
            self.bytes.push(0);
        }
        written
    }

    /// Fills the current page with a record up to `left` bytes before its end.
    pub fn fill_page(&mut self, left: usize) -> Written {
        let page = self.format.page_bytes as usize;
        if self.at_page() {
            self.page_header(0, 0);
        }
        let room = page - self.position().0 as usize % page;
        self.write(10, 0, 1, &vec![3; room - left - 24])
    }

    /// Zeros to the end of the segment, or a whole page if it is full.
    pub fn zeros(&mut self) {
        self.bytes.extend(vec![0; self.format.page_bytes as usize]);
        while self.format.segment_size.offset_of(self.position()) != 0 {
            self.bytes.push(0);
        }
    }
}
