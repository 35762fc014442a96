//! PostgreSQL's WAL segments as [`LogGeometry`]: names, numbers and positions of one segment size.

use std::collections::BTreeMap;

use crate::engine::LogGeometry;
use crate::engine::postgres::ondisk::segment::{RawSegmentName, SegmentName, SegmentSize};
use crate::error::{Error, Kind, Result};
use crate::model::position::{Lsn, Position};

/// The key in the engine's facts of a backup: the size of a segment in bytes, in decimal.
pub const SEGMENT_SIZE_FACT: &str = "wal_segment_size";

/// The arithmetic of one segment size.
#[derive(Debug, Clone, Copy)]
pub struct WalGeometry {
    size: SegmentSize,
}

impl WalGeometry {
    pub fn new(size: SegmentSize) -> WalGeometry {
        WalGeometry { size }
    }

    /// The geometry that a backup's facts tell.
    pub fn from_facts(facts: &BTreeMap<String, String>) -> Result<WalGeometry> {
        let text = facts.get(SEGMENT_SIZE_FACT).map_or("nothing", String::as_str);
        let bytes = text.parse::<u32>().map_err(|_| {
            Error::new(Kind::Damaged, format!("the backup says '{text}' where the size of a WAL segment belongs"))
        })?;
        Ok(WalGeometry { size: SegmentSize::new(bytes)? })
    }

    fn segment(&self, name: &str) -> Result<SegmentName> {
        SegmentName::parse(name, self.size).ok_or_else(|| {
            let size = self.size.bytes();
            Error::new(Kind::Damaged, format!("'{name}' is not the name of a WAL segment of {size} bytes"))
        })
    }
}

impl LogGeometry for WalGeometry {
    fn open_bytes_stay(&self) -> bool {
        // Whole pages are flushed, and half a record at the end is written over when the server comes back
        // (`xlogrecovery.c`, EndOfLog).
        false
    }

    fn span(&self, name: &str, bytes: u64) -> Result<Option<(Position, Position)>> {
        if RawSegmentName::parse(name).is_none() {
            return Ok(None);
        }
        let segment = self.segment(name)?;
        let start = segment.start(self.size);
        let bytes = bytes.min(u64::from(self.size.bytes()));
        let position = |lsn| Position::Wal { timeline: segment.timeline, lsn };
        Ok(Some((position(start), position(Lsn(start.0.saturating_add(bytes))))))
    }

    fn next_file(&self, name: &str) -> Result<String> {
        Ok(self.segment(name)?.next().render(self.size))
    }

    fn file_before(&self, position: Position) -> Result<String> {
        let (timeline, lsn) = position.wal()?;
        Ok(SegmentName { timeline, number: self.size.number_before(lsn) }.render(self.size))
    }

    fn sealed_span(&self, name: &str) -> Result<Option<(Position, Position)>> {
        self.span(name, u64::from(self.size.bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(lsn: u64) -> Position {
        Position::Wal { timeline: 2, lsn: Lsn(lsn) }
    }

    #[test]
    fn the_name_follows_across_a_full_middle_part_and_spans_meet() {
        let geometry = WalGeometry::new(SegmentSize::DEFAULT);
        let last = "0000000200000001000000FF";
        let next = geometry.next_file(last).unwrap();
        assert_eq!(next, "000000020000000200000000");
        let (start, end) = geometry.span(last, 16 << 20).unwrap().unwrap();
        assert_eq!((start, end), (at(0x1_FF00_0000), at(0x2_0000_0000)));
        assert_eq!(geometry.span(&next, 5).unwrap().unwrap(), (end, at(0x2_0000_0005)));
        assert_eq!(geometry.file_before(end).unwrap(), last);
        assert_eq!(geometry.file_before(at(0x2_0000_0001)).unwrap(), next);
    }

    #[test]
    fn a_companion_has_no_span_and_a_name_of_another_segment_size_is_refused() {
        let geometry = WalGeometry::from_facts(&[(SEGMENT_SIZE_FACT.into(), "1073741824".into())].into()).unwrap();
        assert_eq!(geometry.span("00000002.history", 42).unwrap(), None);
        assert!(geometry.span("0000000200000001000000FF", 1).is_err());
        assert!(WalGeometry::from_facts(&BTreeMap::new()).is_err());
    }
}
