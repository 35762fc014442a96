//! The records that keiki looks into: the ends of transactions, and what the server notes about the log itself.
//!
//! A record's body is a list of block headers, a header of the main data, the blocks' data, and the main data last
//! (`src/include/access/xlogrecord.h`; `DecodeXLogRecord` in `xlogreader.c`). The main data are the structures of
//! `src/include/access/xact.h`, `src/include/access/xlog_internal.h` and `src/include/catalog/pg_control.h`.
//!
//! The checksum of these records was right. Where one cannot be read all the same, that is an error and not the end
//! of the log: the version is not what was thought, or keiki is wrong.

use jiff::Timestamp;

use super::super::bytes::{array_at, i32_at, i64_at, u16_at, u32_at, u64_at};
use super::super::control::{Checkpoint, RecoveryParameters, WalLevel};
use super::super::versions::Major;
use super::reader::Record;
use crate::error::{Error, Kind, Result};
use crate::model::position::Lsn;

/// Resource managers (`src/include/access/rmgrlist.h`).
pub const RESOURCE_MANAGER_XLOG: u8 = 0;
pub const RESOURCE_MANAGER_XACT: u8 = 1;

/// The operation is in the upper half of `info` (`src/include/catalog/pg_control.h`).
pub const XLOG_SWITCH: u8 = 0x40;
const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
const XLOG_CHECKPOINT_ONLINE: u8 = 0x10;
const XLOG_BACKUP_END: u8 = 0x50;
const XLOG_PARAMETER_CHANGE: u8 = 0x60;
const XLOG_RESTORE_POINT: u8 = 0x70;
const XLOG_END_OF_RECOVERY: u8 = 0x90;
const XLOG_OVERWRITE_CONTRECORD: u8 = 0xd0;

/// The operations of transactions, without the flag that says that more fields follow.
const XACT_OPERATION_MASK: u8 = 0x70;
const XACT_HAS_INFO: u8 = 0x80;
const XACT_COMMIT: u8 = 0x00;
const XACT_ABORT: u8 = 0x20;
const XACT_COMMIT_PREPARED: u8 = 0x30;
const XACT_ABORT_PREPARED: u8 = 0x40;

/// The seconds from 1970 to 2000, where PostgreSQL's clock begins.
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

/// The end of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transaction {
    /// The transaction, also for a prepared one that another session ends.
    pub xid: u32,
    /// When the server ended it, by its own clock, in microseconds. These times can go backwards a little from one
    /// record to the next, as they are taken before the record's place in the log is.
    pub time: Timestamp,
    /// Whether it had been prepared (two-phase commit).
    pub prepared: bool,
    /// How many relations disappeared with it: dropped or rewritten ones at a commit, created ones at an abort.
    pub dropped_relations: u32,
}

/// What a record means, if it means something to keiki.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Commit(Transaction),
    Abort(Transaction),
    /// `pg_create_restore_point`. The name is in the encoding of a database; what is not UTF-8 is replaced.
    RestorePoint {
        name: String,
        time: Timestamp,
    },
    /// The rest of the segment is unused.
    Switch,
    /// The server stops, or starts on a new timeline without recovery having a better way to say so.
    ShutdownCheckpoint(Checkpoint),
    OnlineCheckpoint(Checkpoint),
    /// A new timeline begins with this record.
    EndOfRecovery {
        timeline: u32,
        previous_timeline: u32,
        time: Timestamp,
    },
    /// Written at start-up if one of them changed.
    ParameterChange {
        parameters: RecoveryParameters,
        wal_level: WalLevel,
    },
    /// The end of the base backup that began at `start`.
    BackupEnd {
        start: Lsn,
    },
    /// The record at `overwritten` was never finished.
    Overwrite {
        overwritten: Lsn,
    },
    Other,
}

/// What the record means. `Damaged` if its content is not what the version writes.
pub fn decode(record: &Record<'_>, major: Major) -> Result<Event> {
    let event = match record.resource_manager {
        RESOURCE_MANAGER_XACT => decode_transaction(record, major),
        RESOURCE_MANAGER_XLOG => decode_xlog(record.info, record.body, major),
        _ => return Ok(Event::Other),
    };
    event.ok_or_else(|| {
        Error::new(
            Kind::Damaged,
            format!("the log record at '{}' is not one that PostgreSQL {major} writes", record.start),
        )
    })
}

/// The record that an overwriting record says it replaces; `None` for every other record.
pub(super) fn overwritten_position(info: u8, body: &[u8], major: Major) -> Option<Lsn> {
    match decode_xlog(info, body, major)? {
        Event::Overwrite { overwritten } => Some(overwritten),
        _ => None,
    }
}

fn decode_xlog(info: u8, body: &[u8], major: Major) -> Option<Event> {
    let operation = info & 0xf0;
    if operation == XLOG_SWITCH {
        return Some(Event::Switch);
    }
    let is_known = matches!(
        operation,
        XLOG_CHECKPOINT_SHUTDOWN
            | XLOG_CHECKPOINT_ONLINE
            | XLOG_BACKUP_END
            | XLOG_PARAMETER_CHANGE
            | XLOG_RESTORE_POINT
            | XLOG_END_OF_RECOVERY
            | XLOG_OVERWRITE_CONTRECORD
    );
    if !is_known {
        return Some(Event::Other);
    }
    let data = main_data(body, major)?;
    Some(match operation {
        XLOG_CHECKPOINT_SHUTDOWN => Event::ShutdownCheckpoint(Checkpoint::read(data)?),
        XLOG_CHECKPOINT_ONLINE => Event::OnlineCheckpoint(Checkpoint::read(data)?),
        XLOG_BACKUP_END => Event::BackupEnd { start: Lsn(u64_at(data, 0)?) },
        XLOG_PARAMETER_CHANGE => Event::ParameterChange {
            parameters: RecoveryParameters::read(data, 0)?,
            wal_level: WalLevel::from_number(i32_at(data, 20)?)?,
        },
        XLOG_RESTORE_POINT => {
            let name = data.get(8..)?;
            let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            Event::RestorePoint { name: String::from_utf8_lossy(&name[..length]).into_owned(), time: time_at(data, 0)? }
        }
        XLOG_END_OF_RECOVERY => Event::EndOfRecovery {
            timeline: u32_at(data, 8)?,
            previous_timeline: u32_at(data, 12)?,
            time: time_at(data, 0)?,
        },
        _ => Event::Overwrite { overwritten: Lsn(u64_at(data, 0)?) },
    })
}

fn decode_transaction(record: &Record<'_>, major: Major) -> Option<Event> {
    let operation = record.info & XACT_OPERATION_MASK;
    let prepared = matches!(operation, XACT_COMMIT_PREPARED | XACT_ABORT_PREPARED);
    let is_commit = match operation {
        XACT_COMMIT | XACT_COMMIT_PREPARED => true,
        XACT_ABORT | XACT_ABORT_PREPARED => false,
        _ => return Some(Event::Other),
    };
    let data = main_data(record.body, major)?;
    let time = time_at(data, 0)?;
    let fields = if record.info & XACT_HAS_INFO != 0 {
        TransactionFields::read(data, major)?
    } else {
        TransactionFields::default()
    };
    let xid = if prepared { fields.prepared_xid? } else { record.xid };
    let transaction = Transaction { xid, time, prepared, dropped_relations: fields.dropped_relations };
    Some(if is_commit { Event::Commit(transaction) } else { Event::Abort(transaction) })
}

/// What follows the time in the end of a transaction.
#[derive(Default)]
struct TransactionFields {
    dropped_relations: u32,
    prepared_xid: Option<u32>,
}

impl TransactionFields {
    /// Walks the optional parts, each announced by a bit, in the order of xl_xact_commit and xl_xact_abort; an abort
    /// has no invalidation messages and never sets their bit.
    fn read(data: &[u8], major: Major) -> Option<TransactionFields> {
        const HAS_DATABASE: u32 = 1 << 0;
        const HAS_SUBTRANSACTIONS: u32 = 1 << 1;
        const HAS_RELATIONS: u32 = 1 << 2;
        const HAS_INVALIDATIONS: u32 = 1 << 3;
        const HAS_TWO_PHASE: u32 = 1 << 4;
        const HAS_DROPPED_STATS: u32 = 1 << 8;

        let mut at = 8usize;
        let info = u32_at(data, at)?;
        at += 4;
        if info & HAS_DATABASE != 0 {
            at += 8;
        }
        // A list is its length in 32 bits and that many entries; afterwards `at` stands behind it.
        let skip_list = |at: &mut usize, entry_bytes: usize| {
            let count = u32::try_from(i32_at(data, *at)?).ok()?;
            *at = (count as usize).checked_mul(entry_bytes)?.checked_add(*at)?.checked_add(4)?;
            Some(count)
        };
        if info & HAS_SUBTRANSACTIONS != 0 {
            skip_list(&mut at, 4)?;
        }
        let dropped_relations = if info & HAS_RELATIONS != 0 { skip_list(&mut at, 12)? } else { 0 };
        if let Some(entry_bytes) = major.dropped_stats_entry_bytes()
            && info & HAS_DROPPED_STATS != 0
        {
            skip_list(&mut at, entry_bytes)?;
        }
        if info & HAS_INVALIDATIONS != 0 {
            skip_list(&mut at, 16)?;
        }
        let prepared_xid = if info & HAS_TWO_PHASE != 0 { Some(u32_at(data, at)?) } else { None };
        Some(TransactionFields { dropped_relations, prepared_xid })
    }
}

/// PostgreSQL's microseconds since 2000-01-01 UTC at `offset`.
fn time_at(data: &[u8], offset: usize) -> Option<Timestamp> {
    let microseconds = i64_at(data, offset)?.checked_add(POSTGRES_EPOCH_SECONDS * 1_000_000)?;
    Timestamp::from_microsecond(microseconds).ok()
}

/// The main data of a record, which lie behind all block headers and block data; empty if it has none. `None` if the
/// headers do not add up to the body. If the body was cut short because of its length, what is left of the main data.
pub fn main_data(body: &[u8], major: Major) -> Option<&[u8]> {
    const LAST_BLOCK_ID: u8 = 32;
    const TOP_LEVEL_XID: u8 = 252;
    const ORIGIN: u8 = 253;
    const LONG_DATA: u8 = 254;
    const SHORT_DATA: u8 = 255;

    let mut at = 0usize;
    let mut block_bytes = 0usize;
    // The headers end where the data that they have announced begin.
    while body.len().checked_sub(at)? > block_bytes {
        let id = body[at];
        match id {
            SHORT_DATA => return main_data_at(body, at + 2, block_bytes, usize::from(*body.get(at + 1)?)),
            LONG_DATA => {
                let length = usize::try_from(u32_at(body, at + 1)?).ok()?;
                return main_data_at(body, at + 5, block_bytes, length);
            }
            ORIGIN => at += 1 + 2,
            TOP_LEVEL_XID => at += 1 + 4,
            0..=LAST_BLOCK_ID => {
                let (header_bytes, data_bytes) = block_header(body, at, major)?;
                at += header_bytes;
                block_bytes += data_bytes;
            }
            _ => return None,
        }
    }
    (body.len() == at + block_bytes).then_some(&[])
}

fn main_data_at(body: &[u8], headers_end: usize, block_bytes: usize, length: usize) -> Option<&[u8]> {
    let from = headers_end.checked_add(block_bytes)?;
    let to = from.checked_add(length)?;
    let is_cut_short = body.len() == super::reader::KEPT_BODY_BYTES && to > body.len();
    if is_cut_short { body.get(from..) } else { body.get(from..to).filter(|_| to == body.len()) }
}

/// The length of the block header at `at`, and of the data that it announces.
fn block_header(body: &[u8], at: usize, major: Major) -> Option<(usize, usize)> {
    const HAS_IMAGE: u8 = 0x10;
    const SAME_RELATION: u8 = 0x80;
    const IMAGE_HAS_HOLE: u8 = 0x01;

    let [_, flags, low, high] = array_at::<4>(body, at)?;
    let mut header_bytes = 4;
    let mut data_bytes = usize::from(u16::from_le_bytes([low, high]));
    if flags & HAS_IMAGE != 0 {
        let image = at + header_bytes;
        data_bytes += usize::from(u16_at(body, image)?);
        let image_flags = *body.get(image + 4)?;
        header_bytes += 5;
        if image_flags & IMAGE_HAS_HOLE != 0 && major.image_is_compressed(image_flags) {
            header_bytes += 2;
        }
    }
    if flags & SAME_RELATION == 0 {
        header_bytes += 12;
    }
    Some((header_bytes + 4, data_bytes))
}

#[cfg(test)]
mod tests {
    use super::super::super::fixtures;
    use super::super::forge::plain_body;
    use super::*;
    use proptest::prelude::*;

    fn record(resource_manager: u8, info: u8, xid: u32, body: &[u8]) -> Record<'_> {
        let (start, end) = (Lsn(0x100), Lsn(0x200));
        Record {
            start,
            end,
            next: end,
            previous: Lsn(0),
            xid,
            resource_manager,
            info,
            length: 24 + body.len() as u32,
            body,
        }
    }

    #[test]
    fn main_data_lie_behind_blocks_of_every_form() {
        // Block 0 with a compressed image with a hole and 3 bytes of data, block 1 of the same relation with an
        // uncompressed image, an origin, a top-level transaction, then the main data.
        let image_flags = |major: Major| if major < Major::V15 { 0x03 } else { 0x01 | 0x08 };
        for major in Major::all() {
            let mut body = vec![0, 0x10, 3, 0, 10, 0, 99, 0, image_flags(major), 7, 0];
            body.extend_from_slice(&[1; 12 + 4]);
            body.extend_from_slice(&[1, 0x90, 0, 0, 20, 0, 0, 0, 0x01, 5, 5, 5, 5]);
            body.extend_from_slice(&[253, 1, 0, 252, 1, 2, 3, 4, 255, 4]);
            body.extend_from_slice(&[0xbb; 10 + 3 + 20]);
            body.extend_from_slice(b"main");
            assert_eq!(main_data(&body, major), Some(&b"main"[..]), "{major}");
            assert_eq!(main_data(&body[..body.len() - 1], major), None, "{major}: one byte is missing");
        }
        assert_eq!(main_data(&[], Major::V15), Some(&[][..]));
        assert_eq!(main_data(&[33], Major::V15), None);
        assert_eq!(main_data(&plain_body(&[7; 300]), Major::V15), Some(&[7; 300][..]));
    }

    #[test]
    fn a_commit_of_a_prepared_transaction_carries_its_number_behind_everything_else() {
        for major in Major::all() {
            let mut data = 0i64.to_le_bytes().to_vec();
            let with_stats = major.dropped_stats_entry_bytes();
            let info: u32 = 0x1f | if with_stats.is_some() { 1 << 8 } else { 0 };
            data.extend_from_slice(&info.to_le_bytes());
            data.extend_from_slice(&[9; 8]);
            for (count, entry_bytes) in [(3u32, 4), (2, 12)] {
                data.extend_from_slice(&count.to_le_bytes());
                data.extend(vec![9; count as usize * entry_bytes]);
            }
            if let Some(entry_bytes) = with_stats {
                data.extend_from_slice(&1u32.to_le_bytes());
                data.extend(vec![9; entry_bytes]);
            }
            data.extend_from_slice(&1u32.to_le_bytes());
            data.extend_from_slice(&[9; 16]);
            data.extend_from_slice(&777u32.to_le_bytes());
            let body = plain_body(&data);
            let decoded = decode(&record(1, XACT_COMMIT_PREPARED | XACT_HAS_INFO, 0, &body), major).unwrap();
            let expected = Transaction {
                xid: 777,
                time: "2000-01-01T00:00:00Z".parse().unwrap(),
                prepared: true,
                dropped_relations: 2,
            };
            assert_eq!(decoded, Event::Commit(expected), "{major}");
        }
    }

    #[test]
    fn a_record_that_is_too_short_for_its_kind_is_an_error() {
        for info in [0x00, 0x10, 0x50, 0x60, 0x70, 0x90, 0xd0] {
            assert!(decode(&record(0, info, 0, &plain_body(&[1, 2, 3])), Major::V18).is_err(), "{info:#x}");
        }
        for info in [0x00, 0x20, 0x80, 0x30] {
            assert!(decode(&record(1, info, 5, &plain_body(&[1, 2, 3])), Major::V18).is_err(), "{info:#x}");
        }
        // A list that claims more entries than there are bytes, and the number of the prepared transaction behind it.
        let mut data = vec![0; 8];
        data.extend_from_slice(&(0x12u32).to_le_bytes());
        data.extend_from_slice(&i32::MAX.to_le_bytes());
        assert!(decode(&record(1, 0xb0, 0, &plain_body(&data)), Major::V18).is_err());
    }

    #[test]
    fn other_records_mean_nothing() {
        assert_eq!(decode(&record(10, 0, 5, &[]), Major::V18).unwrap(), Event::Other);
        assert_eq!(decode(&record(0, 0xb0, 5, &[]), Major::V18).unwrap(), Event::Other);
        assert_eq!(decode(&record(1, 0x10, 5, &[1]), Major::V18).unwrap(), Event::Other);
    }

    #[test]
    fn the_fixtures_cover_every_event_that_a_server_writes_in_peace() {
        let mut seen = std::collections::BTreeSet::new();
        for fixture in fixtures::all() {
            for timeline in [1, 2] {
                for line in fixture.dump(timeline) {
                    seen.insert(line.description.split(' ').next().unwrap_or_default().to_owned());
                }
            }
        }
        for wanted in [
            "COMMIT",
            "ABORT",
            "COMMIT_PREPARED",
            "ABORT_PREPARED",
            "RESTORE_POINT",
            "SWITCH",
            "CHECKPOINT_SHUTDOWN",
            "CHECKPOINT_ONLINE",
            "END_OF_RECOVERY",
            "PARAMETER_CHANGE",
            "BACKUP_END",
        ] {
            assert!(seen.contains(wanted), "{wanted} is not in {seen:?}");
        }
    }

    proptest! {
        #[test]
        fn no_body_makes_the_decoder_panic(
            body in prop::collection::vec(any::<u8>(), 0..200),
            data in prop::collection::vec(any::<u8>(), 0..200),
            resource_manager in 0u8..2,
            info in any::<u8>(),
            version in 13u32..19,
        ) {
            let major = Major::from_number(version).unwrap();
            let _ = decode(&record(resource_manager, info, 1, &body), major);
            let _ = decode(&record(resource_manager, info, 1, &plain_body(&data)), major);
        }
    }
}
