//! Where and why the valid log ends.

use std::fmt;

use super::super::versions::Major;
use crate::error::{Error, Kind};
use crate::model::position::Lsn;

/// Where and why the valid log ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// The `next` of the last valid record; where reading began, if there was none.
    pub valid_until: Lsn,
    /// The page or record that is not right.
    pub at: Lsn,
    pub reason: EndReason,
}

/// What is not right there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// Zeros follow: nothing was written there.
    Zeros,
    /// A page of an earlier life of the file: the server recycles segments without clearing them.
    Recycled,
    WrongPageMagic(u16),
    WrongPageFlags(u16),
    WrongPageAddress(Lsn),
    WrongSystemIdentifier(u64),
    WrongSegmentSize(u32),
    WrongPageSize(u32),
    /// A page of an older timeline after one of a newer, or of a newer one than is wanted.
    WrongTimeline(u32),
    /// A page continues a record, but no record was unfinished.
    UnexpectedContinuation,
    /// A record is unfinished, but the next page does not continue it, or at another place.
    MissingContinuation,
    /// The mark of a record that was given up names another one.
    WrongOverwrite,
    WrongLength(u32),
    WrongResourceManager(u8),
    WrongPrevious(Lsn),
    WrongChecksum,
}

impl EndReason {
    /// Whether the log of a running or crashed server ends like this as a matter of course. Everything else may be
    /// such an end too (a torn write), or damage: inside a sealed segment it is always damage, and so are zeros.
    pub fn is_ordinary(self) -> bool {
        matches!(self, EndReason::Zeros | EndReason::Recycled)
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EndReason::Zeros => f.write_str("nothing was written there"),
            EndReason::Recycled => f.write_str("an older page lies there"),
            EndReason::WrongPageMagic(magic) => match Major::from_wal_page_magic(*magic) {
                Some(major) => write!(f, "the page was written by PostgreSQL {major}"),
                None => write!(f, "the page begins with {magic:#06x}"),
            },
            EndReason::WrongPageFlags(flags) => write!(f, "the page has the flags {flags:#06x}"),
            EndReason::WrongPageAddress(address) => write!(f, "the page says it is {address}"),
            EndReason::WrongSystemIdentifier(id) => write!(f, "the page belongs to the system {id}"),
            EndReason::WrongSegmentSize(bytes) => write!(f, "the page belongs to segments of {bytes} bytes"),
            EndReason::WrongPageSize(bytes) => write!(f, "the page belongs to pages of {bytes} bytes"),
            EndReason::WrongTimeline(timeline) => write!(f, "the page belongs to timeline {timeline}"),
            EndReason::UnexpectedContinuation => f.write_str("the page continues a record that did not begin"),
            EndReason::MissingContinuation => f.write_str("the record is not continued on the next page"),
            EndReason::WrongOverwrite => f.write_str("the record does not name the one that it replaces"),
            EndReason::WrongLength(bytes) => write!(f, "the record says it has {bytes} bytes"),
            EndReason::WrongResourceManager(id) => write!(f, "the record belongs to resource manager {id}"),
            EndReason::WrongPrevious(lsn) => write!(f, "the record says it follows the one at {lsn}"),
            EndReason::WrongChecksum => f.write_str("the checksum of the record is wrong"),
        }
    }
}

impl End {
    /// The error for a log that should have gone on.
    pub fn into_error(self) -> Error {
        Error::new(
            Kind::Damaged,
            format!("the log ends at '{}': cannot read what lies at '{}': {}", self.valid_until, self.at, self.reason),
        )
    }
}
