//! The header of a page of log (`src/include/access/xlog_internal.h`: XLogPageHeaderData, XLogLongPageHeaderData; the
//! checks are those of XLogReaderValidatePageHeader in `xlogreader.c`).

use super::super::bytes::{u16_at, u32_at, u64_at};
use super::end::EndReason;
use super::format::{LONG_PAGE_HEADER_BYTES, WalFormat};
use crate::model::position::Lsn;

mod flag {
    pub const CONTINUES_RECORD: u16 = 0x0001;
    pub const LONG_HEADER: u16 = 0x0002;
    pub const GIVES_RECORD_UP: u16 = 0x0008;
    /// 0x0004 concerns nobody who reads.
    pub const ALL: u16 = 0x000f;
}

/// What a page says about itself, after everything that can be checked without its neighbours has been found right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PageHeader {
    /// The timeline that the page was begun on.
    pub timeline: u32,
    /// Whether the page begins with more of a record of the page before, and how much of it was still to come.
    pub continues_record: bool,
    pub continued_bytes: u64,
    /// Whether the record that the page before left unfinished will never be finished.
    pub gives_record_up: bool,
}

impl PageHeader {
    /// Reads the header of the page at `at`; `header` has the length that the format says a header has there.
    pub fn read(header: &[u8], at: u64, format: &WalFormat) -> Result<PageHeader, EndReason> {
        if header.iter().all(|byte| *byte == 0) {
            return Err(EndReason::Zeros);
        }
        // The header has its full length, so that the zeros in place of missing bytes are never taken.
        let magic = u16_at(header, 0).unwrap_or_default();
        if magic != format.major.wal_page_magic() {
            return Err(EndReason::WrongPageMagic(magic));
        }
        let flags = u16_at(header, 2).unwrap_or_default();
        let (continues_record, gives_record_up) =
            (flags & flag::CONTINUES_RECORD != 0, flags & flag::GIVES_RECORD_UP != 0);
        let is_long = header.len() == LONG_PAGE_HEADER_BYTES;
        let is_impossible = flags & !flag::ALL != 0 || (continues_record && gives_record_up);
        if is_impossible || (flags & flag::LONG_HEADER != 0) != is_long {
            return Err(EndReason::WrongPageFlags(flags));
        }
        if is_long {
            check_long_part(header, format)?;
        }
        match u64_at(header, 8).unwrap_or_default() {
            address if address < at => return Err(EndReason::Recycled),
            address if address > at => return Err(EndReason::WrongPageAddress(Lsn(address))),
            _ => {}
        }
        Ok(PageHeader {
            timeline: u32_at(header, 4).unwrap_or_default(),
            continues_record,
            continued_bytes: u64::from(u32_at(header, 16).unwrap_or_default()),
            gives_record_up,
        })
    }
}

fn check_long_part(header: &[u8], format: &WalFormat) -> Result<(), EndReason> {
    let system_identifier = u64_at(header, 24).unwrap_or_default();
    if format.system_identifier.is_some_and(|expected| expected != system_identifier) {
        return Err(EndReason::WrongSystemIdentifier(system_identifier));
    }
    let segment_size = u32_at(header, 32).unwrap_or_default();
    if segment_size != format.segment_size.bytes() {
        return Err(EndReason::WrongSegmentSize(segment_size));
    }
    match u32_at(header, 36).unwrap_or_default() {
        page_bytes if page_bytes == format.page_bytes => Ok(()),
        page_bytes => Err(EndReason::WrongPageSize(page_bytes)),
    }
}
