//! The events of MySQL's binary log that begin a transaction, and the one with the state that a file begins with.
//!
//! Sources: `libs/mysql/binlog/event/control_events.{h,cpp}` (Gtid_event), `libs/mysql/serialization/readme.md` for the
//! event with a tag, and `sql/rpl_gtid_set.cc` (encode) of MySQL 9.

use super::bytes::u64_at;
use super::gtid_set::{GtidSet, Series, SeriesGtid, TAG_BYTES_MAX, Tag};

/// A transaction begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MySqlGtidEvent {
    /// Nothing for an anonymous transaction.
    pub gtid: Option<SeriesGtid>,
    /// When this server committed it, in microseconds since 1970: its clock's, taken while the transaction was written to
    /// the log, before anybody was told that it is committed.
    pub at_microseconds: u64,
    /// Of the whole transaction in the log, with this event and all checksums.
    pub transaction_bytes: u64,
}

/// Flags, UUID, number, kind of the logical clock, its two numbers (POST_HEADER_LENGTH).
const UUID_AT: usize = 1;
const NUMBER_AT: usize = 17;
const TIMES_AT: usize = 42;
const TIME_BYTES: usize = 7;
/// Another time follows: that of the server where it was committed first (ENCODED_COMMIT_TIMESTAMP_LENGTH).
const HAS_SECOND_TIME: u64 = 1 << 55;

impl MySqlGtidEvent {
    /// Reads the body of an event without a tag. Nothing if it is cut short, or of a server before 8.0.2, which does not
    /// say how long a transaction is.
    pub fn parse(body: &[u8], is_anonymous: bool) -> Option<MySqlGtidEvent> {
        let time_at = |offset: usize| {
            let bytes = body.get(offset..offset + TIME_BYTES)?;
            Some(bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte)))
        };
        let time = time_at(TIMES_AT)?;
        let mut length_at = TIMES_AT + TIME_BYTES;
        if time & HAS_SECOND_TIME != 0 {
            time_at(length_at)?;
            length_at += TIME_BYTES;
        }
        let gtid = match is_anonymous {
            true => None,
            false => {
                let uuid = body.get(UUID_AT..NUMBER_AT)?.try_into().ok()?;
                Some(gtid(uuid, Tag::NONE, u64_at(body, NUMBER_AT)?)?)
            }
        };
        let transaction_bytes = packed_length(body.get(length_at..)?)?;
        Some(MySqlGtidEvent { gtid, at_microseconds: time & !HAS_SECOND_TIME, transaction_bytes })
    }

    /// Reads the body of an event with a tag: fields, each behind its number, of which those that are not known may be
    /// left out. Nothing if it is cut short or begins with fields that are not known.
    pub fn parse_tagged(body: &[u8]) -> Option<MySqlGtidEvent> {
        let mut fields = Fields(body);
        let (_version, bytes) = (fields.number()?, usize::try_from(fields.number()?).ok()?);
        // The size counts from the start of the body.
        let used = body.len() - fields.0.len();
        fields.0 = fields.0.get(..bytes.checked_sub(used)?)?;
        let last_needed = fields.byte()?;
        if u64::from(last_needed) > field::LAST_KNOWN {
            return None;
        }
        let (mut uuid, mut tag, mut sequence, mut time, mut length) = (None, None, None, None, None);
        while !fields.0.is_empty() {
            match fields.number()? {
                field::FLAGS | field::SECOND_TIME | field::VERSION | field::FIRST_VERSION | field::TICKET => {
                    fields.number()?;
                }
                field::UUID => {
                    let mut bytes = [0u8; 16];
                    for byte in &mut bytes {
                        *byte = u8::try_from(fields.number()?).ok()?;
                    }
                    uuid = Some(bytes);
                }
                field::NUMBER => sequence = Some(fields.signed()?),
                field::TAG => tag = Some(fields.tag()?),
                field::LAST_COMMITTED | field::SEQUENCE => {
                    fields.signed()?;
                }
                field::TIME => time = Some(fields.number()?),
                field::LENGTH => length = Some(fields.number()?),
                // Those behind them are not known either, and none of them is needed.
                _ => break,
            }
        }
        let gtid = gtid(uuid?, tag?, u64::try_from(sequence?).ok()?)?;
        Some(MySqlGtidEvent { gtid: Some(gtid), at_microseconds: time?, transaction_bytes: length? })
    }
}

/// Numbers of the fields, in the order in which `Gtid_event::define_fields` names them.
mod field {
    pub const FLAGS: u64 = 0;
    pub const UUID: u64 = 1;
    pub const NUMBER: u64 = 2;
    pub const TAG: u64 = 3;
    pub const LAST_COMMITTED: u64 = 4;
    pub const SEQUENCE: u64 = 5;
    pub const TIME: u64 = 6;
    pub const SECOND_TIME: u64 = 7;
    pub const LENGTH: u64 = 8;
    pub const VERSION: u64 = 9;
    pub const FIRST_VERSION: u64 = 10;
    pub const TICKET: u64 = 11;
    pub const LAST_KNOWN: u64 = TICKET;
}

fn gtid(uuid: [u8; 16], tag: Tag, sequence: u64) -> Option<SeriesGtid> {
    let is_number = (1..i64::MAX as u64).contains(&sequence);
    is_number.then_some(SeriesGtid { series: Series { uuid, tag }, sequence })
}

/// A length in one byte, or in the 2, 3 or 8 behind one that says so (`net_field_length_ll`).
fn packed_length(bytes: &[u8]) -> Option<u64> {
    let (first, rest) = bytes.split_first()?;
    let count = match first {
        0..=250 => return Some(u64::from(*first)),
        252 => 2,
        253 => 3,
        254 => 8,
        251 | 255 => return None,
    };
    Some(rest.get(..count)?.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// Takes fields from the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (now, later) = self.0.split_at_checked(count)?;
        self.0 = later;
        Some(now)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    /// As many bytes as the first has ones at its low end, and one; the bits above those are the number.
    fn number(&mut self) -> Option<u64> {
        let first = self.byte()?;
        let more = first.trailing_ones();
        let rest = self.take(more as usize)?.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        Some(match more {
            8 => rest,
            7 => rest,
            _ => u64::from(first >> (more + 1)) | rest << (7 - more),
        })
    }

    /// The lowest bit is the sign.
    fn signed(&mut self) -> Option<i64> {
        let bits = self.number()?;
        let value = (bits >> 1) as i64;
        Some(if bits & 1 == 0 { value } else { !value })
    }

    fn tag(&mut self) -> Option<Tag> {
        let count = usize::try_from(self.number()?).ok().filter(|count| *count <= TAG_BYTES_MAX)?;
        Tag::of(self.take(count)?)
    }
}

/// The kind of the list, in the first and the last of the eight bytes that the number of series stands in
/// (`mysql::gtid::Gtid_format`).
const TAGGED: u8 = 1;

/// The state at the start of a file, out of the body of an event with the previous GTIDs. Nothing if it cannot be read.
pub fn previous_gtids(body: &[u8]) -> Option<GtidSet> {
    let head = u64_at(body, 0)?;
    let is_tagged = match body.get(7)? {
        0 => false,
        &TAGGED => true,
        _ => return None,
    };
    // In the list with tags the first and the last of the eight bytes say what it is.
    let count = if is_tagged { (head >> 8) & ((1 << 48) - 1) } else { head };
    let mut rest = Fields(body.get(8..)?);
    let mut set = GtidSet::default();
    // Each takes bytes: a count that lies ends where they do.
    for _ in 0..count {
        let uuid = rest.take(16)?.try_into().ok()?;
        let tag = if is_tagged { rest.tag()? } else { Tag::NONE };
        let runs = u64_at(rest.take(8)?, 0)?;
        for _ in 0..runs {
            let run = rest.take(16)?;
            let (first, end) = (u64_at(run, 0)?, u64_at(run, 8)?);
            if first == 0 || first >= end || end > i64::MAX as u64 {
                return None;
            }
            set.add_run(Series { uuid, tag }, first, end - 1);
        }
    }
    Some(set)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Out of a log of MySQL 9.7.4, whose `mysqlbinlog` prints what is expected here.
    const TAGGED_BODY: &str = "027a00000002a502bd038902049503790222c503a102d004f103000000020404060e6162635f7461670804\
                               0a080c7fe7f89bc7c76006103d041283120b";
    const PREVIOUS: &str = "0103000000000001a9efa202e59e11f1a86802fc00000001000100000000000000010000000000000015000000\
                            00000000a9efa202e59e11f1a86802fc000000010e6162635f74616701000000000000000100000000000000\
                            0200000000000000a9efa202e59e11f1a86802fc00000001047a7a010000000000000001000000000000000200\
                            000000000000";
    const UUID: &str = "a9efa202-e59e-11f1-a868-02fc00000001";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(byte).collect()
    }

    fn untagged(times: &[u64], length: &[u8]) -> Vec<u8> {
        let mut body = vec![0];
        body.extend(&bytes(UUID));
        body.extend(23u64.to_le_bytes());
        body.push(2);
        body.extend([0; 16]);
        times.iter().for_each(|time| body.extend(&time.to_le_bytes()[..7]));
        body.extend(length);
        body.extend(90704u32.to_le_bytes());
        body
    }

    #[test]
    fn an_event_with_a_tag_reads_as_the_server_wrote_it() {
        let event = MySqlGtidEvent::parse_tagged(&bytes(TAGGED_BODY)).unwrap();
        assert_eq!(event.gtid.unwrap().to_string(), format!("{UUID}:abc_tag:1"));
        assert_eq!((event.at_microseconds, event.transaction_bytes), (1_795_261_023_910_119, 271));
    }

    #[test]
    fn an_event_without_a_tag_has_one_time_or_two_and_a_length_of_any_size() {
        for (times, length, wanted) in [
            (vec![7], vec![250], 250),
            (vec![7], vec![252, 1, 2], 0x201),
            (vec![7 | 1 << 55, 5], vec![253, 1, 2, 3], 0x3_0201),
            (vec![7 | 1 << 55, 5], vec![254, 1, 0, 0, 0, 1, 0, 0, 0], 0x1_0000_0001),
        ] {
            let event = MySqlGtidEvent::parse(&untagged(&times, &length), false).unwrap();
            assert_eq!((event.at_microseconds, event.transaction_bytes), (7, wanted));
            assert_eq!(event.gtid.unwrap().to_string(), format!("{UUID}:23"));
        }
        let anonymous = MySqlGtidEvent::parse(&untagged(&[7], &[200]), true).unwrap();
        assert_eq!((anonymous.gtid, anonymous.transaction_bytes), (None, 200));
        // Of MySQL 5.7: no times, no length.
        assert_eq!(MySqlGtidEvent::parse(&untagged(&[], &[])[..42], false), None);
    }

    #[test]
    fn the_state_of_a_file_is_read_with_tags_and_without() {
        assert_eq!(previous_gtids(&bytes(PREVIOUS)).unwrap().to_string(), format!("{UUID}:1-20:abc_tag:1:zz:1"));
        let mut plain = 1u64.to_le_bytes().to_vec();
        plain.extend(bytes(UUID));
        plain.extend(2u64.to_le_bytes());
        for number in [1u64, 4, 7, 8] {
            plain.extend(number.to_le_bytes());
        }
        assert_eq!(previous_gtids(&plain).unwrap().to_string(), format!("{UUID}:1-3:7"));
        assert_eq!(previous_gtids(&[0; 8]).unwrap(), GtidSet::default());
        assert_eq!(previous_gtids(&plain[..plain.len() - 1]), None);
    }

    #[test]
    fn numbers_of_every_length_are_read() {
        for (hex, wanted) in [
            ("00", 0),
            ("fe", 127),
            ("fbff07", 65535),
            ("7fffffffffffffff", (1 << 56) - 1),
            ("ffffffffffffffffff", u64::MAX),
        ] {
            let hex = bytes(hex);
            assert_eq!(Fields(&hex).number(), Some(wanted));
            assert_eq!(Fields(&hex[..hex.len() - 1]).number(), None);
        }
        // The examples of the library's own description.
        for (hex, wanted) in [("f3ff0f", 65535), ("ebff0f", -65535), ("fbff0f", -65536)] {
            assert_eq!(Fields(&bytes(hex)).signed(), Some(wanted));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_value_or_nothing(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = MySqlGtidEvent::parse(&body, false);
            let _ = MySqlGtidEvent::parse_tagged(&body);
            let _ = previous_gtids(&body);
        }

        #[test]
        fn a_changed_byte_of_an_event_is_a_value_or_nothing(at in 0usize..56, byte in any::<u8>()) {
            let mut body = bytes(TAGGED_BODY);
            let at = at % body.len();
            body[at] = byte;
            let _ = MySqlGtidEvent::parse_tagged(&body);
        }
    }
}
