//! Names of the files in `pg_wal` and `pg_wal/archive_status`, and the arithmetic of segments.
//!
//! A segment's name is its timeline and its number in 24 hexadecimal digits; the number is split where a full
//! 4 GiB of log ends, so the same digits mean other positions under another segment size
//! (`src/include/access/xlog_internal.h`: XLogFileName, XLogFromFileName, IsPartialXLogFileName,
//! IsTLHistoryFileName, IsBackupHistoryFileName).

use std::fmt;

use crate::error::{Error, Kind, Result};
use crate::model::position::Lsn;

/// The size of a WAL segment file: a power of two from 1 MiB to 1 GiB (initdb `--wal-segsize`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SegmentSize(u32);

impl SegmentSize {
    /// What initdb uses unless told otherwise.
    pub const DEFAULT: SegmentSize = SegmentSize(16 << 20);

    /// Takes a number of bytes; anything but a power of two from 1 MiB to 1 GiB is refused.
    pub fn new(bytes: u32) -> Result<SegmentSize> {
        if bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes) {
            Ok(SegmentSize(bytes))
        } else {
            Err(Error::new(Kind::Damaged, format!("{bytes} bytes is not a size that a WAL segment can have")))
        }
    }

    pub fn bytes(self) -> u32 {
        self.0
    }

    /// The number of the segment that holds the byte at `lsn`.
    pub fn number_of(self, lsn: Lsn) -> u64 {
        lsn.0 / u64::from(self.0)
    }

    /// The number of the segment that holds the byte before `lsn`: where a log that ends at `lsn` ends.
    /// Position 0 counts as lying in segment 0.
    pub fn number_before(self, lsn: Lsn) -> u64 {
        lsn.0.saturating_sub(1) / u64::from(self.0)
    }

    /// The distance of `lsn` from the start of its segment.
    pub fn offset_of(self, lsn: Lsn) -> u32 {
        // A remainder of a 32-bit divisor fits.
        (lsn.0 % u64::from(self.0)) as u32
    }

    /// The first position of segment `number`; a number that no name can carry saturates.
    pub fn start_of(self, number: u64) -> Lsn {
        Lsn(number.saturating_mul(u64::from(self.0)))
    }

    /// How many segments 4 GiB hold: where the name's middle part counts up.
    fn per_middle_part(self) -> u64 {
        (1 << 32) / u64::from(self.0)
    }
}

/// One segment of one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentName {
    pub timeline: u32,
    pub number: u64,
}

impl SegmentName {
    /// The segment of `timeline` that holds the byte at `lsn`.
    pub fn holding(timeline: u32, lsn: Lsn, size: SegmentSize) -> SegmentName {
        SegmentName { timeline, number: size.number_of(lsn) }
    }

    /// Reads 24 upper-case hexadecimal digits; `None` for anything else, also for digits that cannot occur under
    /// this segment size.
    pub fn parse(text: &str, size: SegmentSize) -> Option<SegmentName> {
        let raw = RawSegmentName::parse(text)?;
        let low = u64::from(raw.low);
        (low < size.per_middle_part()).then(|| SegmentName {
            timeline: raw.timeline,
            number: u64::from(raw.middle) * size.per_middle_part() + low,
        })
    }

    /// The file name under this segment size.
    pub fn render(self, size: SegmentSize) -> String {
        let per_part = size.per_middle_part();
        format!("{:08X}{:08X}{:08X}", self.timeline, self.number / per_part, self.number % per_part)
    }

    /// The position of the segment's first byte.
    pub fn start(self, size: SegmentSize) -> Lsn {
        size.start_of(self.number)
    }

    /// The position after the segment's last byte.
    pub fn end(self, size: SegmentSize) -> Lsn {
        size.start_of(self.number.saturating_add(1))
    }

    /// The following segment of the same timeline.
    pub fn next(self) -> SegmentName {
        SegmentName { number: self.number.saturating_add(1), ..self }
    }
}

/// The three parts of a segment name, before a segment size gives them a meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RawSegmentName {
    pub timeline: u32,
    pub middle: u32,
    pub low: u32,
}

impl RawSegmentName {
    /// Reads 24 upper-case hexadecimal digits. Timeline 0 does not exist.
    pub fn parse(text: &str) -> Option<RawSegmentName> {
        if text.len() != 24 || !is_upper_hex(text) {
            return None;
        }
        let part = |from: usize| u32::from_str_radix(text.get(from..from + 8)?, 16).ok();
        let name = RawSegmentName { timeline: part(0)?, middle: part(8)?, low: part(16)? };
        (name.timeline > 0).then_some(name)
    }
}

impl fmt::Display for RawSegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline, self.middle, self.low)
    }
}

/// What a file in `pg_wal` (or, with `.ready` or `.done` taken off, in `archive_status`) is, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalFile {
    /// A segment of the log.
    Segment(SegmentName),
    /// The beginning of a segment that its timeline left before it was full: `<segment>.partial`.
    Partial(SegmentName),
    /// The history of a timeline: `00000002.history`.
    History { timeline: u32 },
    /// What the server notes about a base backup: `<segment>.<8 digits of the start's offset>.backup`.
    BackupHistory { start: SegmentName, offset: u32 },
}

impl WalFile {
    /// Classifies a file name; `None` for everything that is not archived (temporary files, directories, `.ready`).
    pub fn classify(name: &str, size: SegmentSize) -> Option<WalFile> {
        if let Some(stem) = name.strip_suffix(".history") {
            return timeline_digits(stem).map(|timeline| WalFile::History { timeline });
        }
        if let Some(stem) = name.strip_suffix(".partial") {
            return SegmentName::parse(stem, size).map(WalFile::Partial);
        }
        if let Some(stem) = name.strip_suffix(".backup") {
            let (segment, offset) = stem.split_once('.')?;
            let start = SegmentName::parse(segment, size)?;
            let offset = timeline_digits_or_zero(offset)?;
            return (offset < size.bytes()).then_some(WalFile::BackupHistory { start, offset });
        }
        SegmentName::parse(name, size).map(WalFile::Segment)
    }
}

/// Whether the server wants a file archived, as its marker in `archive_status` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArchiveStatus {
    Ready,
    Done,
}

impl ArchiveStatus {
    /// Splits the name of a marker into the file it speaks of and what it says: `X.ready`, `X.done`.
    pub fn of_marker(name: &str) -> Option<(&str, ArchiveStatus)> {
        name.strip_suffix(".ready")
            .map(|file| (file, ArchiveStatus::Ready))
            .or_else(|| name.strip_suffix(".done").map(|file| (file, ArchiveStatus::Done)))
    }
}

/// The file name of a timeline's history.
pub fn history_file_name(timeline: u32) -> String {
    format!("{timeline:08X}.history")
}

fn is_upper_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'))
}

fn timeline_digits_or_zero(text: &str) -> Option<u32> {
    if text.len() == 8 && is_upper_hex(text) { u32::from_str_radix(text, 16).ok() } else { None }
}

fn timeline_digits(text: &str) -> Option<u32> {
    timeline_digits_or_zero(text).filter(|timeline| *timeline > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sizes() -> impl Strategy<Value = SegmentSize> {
        (20u32..=30).prop_map(|power| SegmentSize::new(1 << power).unwrap())
    }

    #[test]
    fn names_follow_the_server_at_the_turn_of_four_gigabytes() {
        // pg_walfile_name() of PostgreSQL with 16 MiB, 1 MiB and 1 GiB segments.
        let small = SegmentSize::new(1 << 20).unwrap();
        let large = SegmentSize::new(1 << 30).unwrap();
        let at = Lsn(0x1_FFFF_FFFF);
        assert_eq!(
            SegmentName::holding(1, at, SegmentSize::DEFAULT).render(SegmentSize::DEFAULT),
            "0000000100000001000000FF"
        );
        assert_eq!(SegmentName::holding(1, at, small).render(small), "000000010000000100000FFF");
        assert_eq!(SegmentName::holding(1, at, large).render(large), "000000010000000100000003");
        let next = SegmentName::holding(1, at, SegmentSize::DEFAULT).next();
        assert_eq!(next.render(SegmentSize::DEFAULT), "000000010000000200000000");
        assert_eq!(next.start(SegmentSize::DEFAULT), Lsn(0x2_0000_0000));
    }

    #[test]
    fn a_log_that_ends_on_a_boundary_ends_in_the_segment_before() {
        let size = SegmentSize::DEFAULT;
        assert_eq!(size.number_of(Lsn(0x0200_0000)), 2);
        assert_eq!(size.number_before(Lsn(0x0200_0000)), 1);
        assert_eq!(size.number_before(Lsn(0)), 0);
        assert_eq!(size.offset_of(Lsn(0x0200_0028)), 0x28);
    }

    #[test]
    fn digits_that_cannot_occur_under_the_segment_size_are_refused() {
        assert!(SegmentName::parse("000000010000000000000100", SegmentSize::DEFAULT).is_none());
        assert!(SegmentName::parse("000000010000000000000100", SegmentSize::new(1 << 20).unwrap()).is_some());
    }

    #[test]
    fn files_of_pg_wal_are_told_apart() {
        let size = SegmentSize::DEFAULT;
        let segment = SegmentName { timeline: 1, number: 2 };
        let classify = |name: &str| WalFile::classify(name, size);
        assert_eq!(classify("000000010000000000000002"), Some(WalFile::Segment(segment)));
        assert_eq!(classify("000000010000000000000002.partial"), Some(WalFile::Partial(segment)));
        assert_eq!(classify("0000000A.history"), Some(WalFile::History { timeline: 10 }));
        assert_eq!(
            classify("000000010000000000000002.00000028.backup"),
            Some(WalFile::BackupHistory { start: segment, offset: 0x28 })
        );
        for other in [
            "",
            "archive_status",
            "summaries",
            "xlogtemp.123",
            "000000010000000000000002.ready",
            "00000001000000000000000g",
            "00000001000000000000000a",
            "000000000000000000000002",
            "00000000.history",
            "1.history",
            "000000010000000000000002.28.backup",
            "000000010000000000000002.FFFFFFFF.backup",
            "000000010000000000000002.tmp",
            "00000001000000000000000\u{e9}",
        ] {
            assert_eq!(classify(other), None, "{other}");
        }
        assert_eq!(history_file_name(10), "0000000A.history");
    }

    #[test]
    fn archive_markers_name_their_file() {
        assert_eq!(
            ArchiveStatus::of_marker("0000000A.history.ready"),
            Some(("0000000A.history", ArchiveStatus::Ready))
        );
        assert_eq!(ArchiveStatus::of_marker("x.done"), Some(("x", ArchiveStatus::Done)));
        assert_eq!(ArchiveStatus::of_marker("x"), None);
    }

    #[test]
    fn only_powers_of_two_from_a_megabyte_to_a_gigabyte_are_segment_sizes() {
        for bad in [0, 1, 1 << 19, (1 << 20) + 1, 3 << 20, 1 << 31] {
            assert!(SegmentSize::new(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn names_read_back_as_rendered(timeline in 1u32.., lsn in any::<u64>(), size in sizes()) {
            let name = SegmentName::holding(timeline, Lsn(lsn), size);
            prop_assert_eq!(SegmentName::parse(&name.render(size), size), Some(name));
            prop_assert!(name.start(size).0 <= lsn && lsn <= name.end(size).0);
        }

        #[test]
        fn no_name_makes_the_classifier_panic(name in ".{0,60}", size in sizes()) {
            let _ = WalFile::classify(&name, size);
        }
    }
}
