//! The shape of a server's log: what its pages and segments look like.

use super::super::control::ControlFile;
use super::super::segment::SegmentSize;
use super::super::versions::Major;
use crate::model::position::Lsn;

/// The header of a page, and that of the first page of a segment (SizeOfXLogShortPHD, SizeOfXLogLongPHD).
pub const SHORT_PAGE_HEADER_BYTES: usize = 24;
pub const LONG_PAGE_HEADER_BYTES: usize = 40;

/// What has to be known about a server to read its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalFormat {
    pub major: Major,
    pub segment_size: SegmentSize,
    /// The size of a WAL page, in bytes; 8192 unless the server was built otherwise.
    pub page_bytes: u32,
    /// Checked on the first page of each segment, if it is known.
    pub system_identifier: Option<u64>,
}

impl WalFormat {
    /// The format of the log that belongs to a data directory.
    pub fn of(control: &ControlFile) -> WalFormat {
        WalFormat {
            major: control.major,
            segment_size: control.wal_segment_size,
            page_bytes: control.wal_block_size,
            system_identifier: Some(control.system_identifier),
        }
    }

    /// The distance of a position from the start of its page.
    pub(super) fn page_offset(&self, position: u64) -> u64 {
        position % u64::from(self.page_bytes)
    }

    /// The length of the header of the page that begins at `page`.
    pub(super) fn page_header_bytes(&self, page: u64) -> usize {
        if self.segment_size.offset_of(Lsn(page)) == 0 { LONG_PAGE_HEADER_BYTES } else { SHORT_PAGE_HEADER_BYTES }
    }

    /// Where a record begins that follows a record with this `next`: behind the page header, if a page begins there.
    pub fn start_after(&self, next: Lsn) -> Lsn {
        match self.page_offset(next.0) {
            0 => Lsn(next.0.saturating_add(self.page_header_bytes(next.0) as u64)),
            _ => next,
        }
    }
}
