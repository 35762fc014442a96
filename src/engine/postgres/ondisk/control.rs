//! `global/pg_control`: what a data directory says about itself.
//!
//! The layout is that of `src/include/catalog/pg_control.h` on a 64-bit little-endian machine. It is the same from
//! 13 to 18 up to `data_checksum_version`; 17 put `wal_level` into a gap of the checkpoint, 18 one byte before the
//! authentication nonce, which moves the checksum by four. The first 296 bytes count, the rest of the 8192 is zero.
//!
//! A running server rewrites the file in place, so a copy may be torn: a reader that gets `Damaged` from a live
//! directory reads again.

use std::fmt;

use jiff::Timestamp;

use super::bytes::{array_at, i32_at, i64_at, u32_at, u64_at};
use super::versions::Major;
use crate::engine::postgres::ondisk::segment::SegmentSize;
use crate::error::{Error, Kind, Result};
use crate::model::position::Lsn;

/// The size of the file (PG_CONTROL_FILE_SIZE).
pub const CONTROL_FILE_BYTES: usize = 8192;

/// The path of the file in a data directory (XLOG_CONTROL_FILE).
pub const CONTROL_FILE_PATH: &str = "global/pg_control";

/// Offsets in the file; `CHECKPOINT_COPY` is where a CheckPoint struct lies.
mod offset {
    pub const SYSTEM_IDENTIFIER: usize = 0;
    pub const CONTROL_VERSION: usize = 8;
    pub const CATALOG_VERSION: usize = 12;
    pub const STATE: usize = 16;
    pub const TIME: usize = 24;
    pub const CHECKPOINT: usize = 32;
    pub const CHECKPOINT_COPY: usize = 40;
    pub const MIN_RECOVERY_POINT: usize = 136;
    pub const MIN_RECOVERY_POINT_TIMELINE: usize = 144;
    pub const BACKUP_START_POINT: usize = 152;
    pub const BACKUP_END_POINT: usize = 160;
    pub const BACKUP_END_REQUIRED: usize = 168;
    pub const WAL_LEVEL: usize = 172;
    pub const WAL_LOG_HINTS: usize = 176;
    pub const PARAMETERS: usize = 180;
    pub const MAXIMUM_ALIGNMENT: usize = 204;
    pub const FLOAT_FORMAT: usize = 208;
    pub const BLOCK_SIZE: usize = 216;
    pub const RELATION_SEGMENT_BLOCKS: usize = 220;
    pub const WAL_BLOCK_SIZE: usize = 224;
    pub const WAL_SEGMENT_SIZE: usize = 228;
    pub const DATA_CHECKSUM_VERSION: usize = 252;
    /// Where the CRC of everything before it lies, up to 17 and since 18.
    pub const CRC_UNTIL_17: usize = 288;
    pub const CRC_SINCE_18: usize = 292;
}

/// The constant that shows the floating-point format (FLOATFORMAT_VALUE).
const FLOAT_FORMAT: f64 = 1_234_567.0;

/// What the server was doing when it last wrote the file (enum DBState).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    StartingUp,
    ShutDown,
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    InArchiveRecovery,
    InProduction,
}

impl ClusterState {
    const ALL: [(ClusterState, &'static str); 7] = [
        (ClusterState::StartingUp, "starting up"),
        (ClusterState::ShutDown, "shut down"),
        (ClusterState::ShutDownInRecovery, "shut down in recovery"),
        (ClusterState::ShuttingDown, "shutting down"),
        (ClusterState::InCrashRecovery, "in crash recovery"),
        (ClusterState::InArchiveRecovery, "in archive recovery"),
        (ClusterState::InProduction, "in production"),
    ];

    /// Whether the server was stopped cleanly, as a primary or as a standby.
    pub fn is_shut_down(self) -> bool {
        matches!(self, ClusterState::ShutDown | ClusterState::ShutDownInRecovery)
    }
}

impl fmt::Display for ClusterState {
    /// The words of `pg_controldata`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL[*self as usize].1)
    }
}

/// How much the server writes to its log (enum WalLevel; the numbers have stood since 9.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WalLevel {
    Minimal,
    Replica,
    Logical,
}

impl WalLevel {
    /// The level with the server's number.
    pub fn from_number(number: i32) -> Option<WalLevel> {
        [WalLevel::Minimal, WalLevel::Replica, WalLevel::Logical].get(usize::try_from(number).ok()?).copied()
    }
}

impl fmt::Display for WalLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WalLevel::Minimal => "minimal",
            WalLevel::Replica => "replica",
            WalLevel::Logical => "logical",
        })
    }
}

/// The five settings that a server in hot standby must have at least as large as the server that wrote the log
/// (manual, "Hot Standby", "Administrator's Overview"); recovery pauses or stops where one is smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RecoveryParameters {
    pub max_connections: u32,
    pub max_worker_processes: u32,
    pub max_wal_senders: u32,
    pub max_prepared_transactions: u32,
    pub max_locks_per_transaction: u32,
}

impl RecoveryParameters {
    /// Reads the five numbers in the order in which `pg_control` and the parameter-change record carry them.
    /// `None` if bytes are missing or a number is negative.
    pub(super) fn read(bytes: &[u8], offset: usize) -> Option<RecoveryParameters> {
        let number = |index: usize| u32::try_from(i32_at(bytes, offset.checked_add(4 * index)?)?).ok();
        Some(RecoveryParameters {
            max_connections: number(0)?,
            max_worker_processes: number(1)?,
            max_wal_senders: number(2)?,
            max_prepared_transactions: number(3)?,
            max_locks_per_transaction: number(4)?,
        })
    }

    /// The larger of each: what suffices for both.
    pub fn at_least(self, other: RecoveryParameters) -> RecoveryParameters {
        RecoveryParameters {
            max_connections: self.max_connections.max(other.max_connections),
            max_worker_processes: self.max_worker_processes.max(other.max_worker_processes),
            max_wal_senders: self.max_wal_senders.max(other.max_wal_senders),
            max_prepared_transactions: self.max_prepared_transactions.max(other.max_prepared_transactions),
            max_locks_per_transaction: self.max_locks_per_transaction.max(other.max_locks_per_transaction),
        }
    }

    /// The settings with the names of `postgresql.conf`.
    pub fn settings(self) -> [(&'static str, u32); 5] {
        [
            ("max_connections", self.max_connections),
            ("max_worker_processes", self.max_worker_processes),
            ("max_wal_senders", self.max_wal_senders),
            ("max_prepared_transactions", self.max_prepared_transactions),
            ("max_locks_per_transaction", self.max_locks_per_transaction),
        ]
    }
}

/// The part of a checkpoint that matters for recovery (struct CheckPoint). It stands in `pg_control` and is the
/// content of a checkpoint record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where replay from this checkpoint begins.
    pub redo: Lsn,
    pub timeline: u32,
    /// The timeline before, if the checkpoint begins a new one; otherwise the same as `timeline`.
    pub previous_timeline: u32,
    /// When the checkpoint began, in whole seconds.
    pub time: Timestamp,
}

impl Checkpoint {
    /// The size of the struct, in all supported versions.
    pub const BYTES: usize = 88;

    /// Reads the struct at the start of `bytes`; `None` if it is cut short or its time is out of range.
    pub fn read(bytes: &[u8]) -> Option<Checkpoint> {
        let bytes = bytes.get(..Self::BYTES)?;
        Some(Checkpoint {
            redo: Lsn(u64_at(bytes, 0)?),
            timeline: u32_at(bytes, 8)?,
            previous_timeline: u32_at(bytes, 12)?,
            time: Timestamp::from_second(i64_at(bytes, 64)?).ok()?,
        })
    }
}

/// The content of `pg_control`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// The version that the control and catalogue numbers belong to.
    pub major: Major,
    /// Tells initdb runs apart; a clone has its parent's.
    pub system_identifier: u64,
    pub control_version: u32,
    pub catalog_version: u32,
    pub state: ClusterState,
    /// When the file was last written, in whole seconds.
    pub time: Timestamp,
    /// Where the last checkpoint record begins.
    pub checkpoint_record: Lsn,
    pub checkpoint: Checkpoint,
    /// In recovery: replay must reach this position before the data are consistent; zero otherwise.
    pub min_recovery_point: Lsn,
    pub min_recovery_point_timeline: u32,
    /// While recovering from a base backup: its start, and its end if it was taken on a standby; zero otherwise.
    pub backup_start_point: Lsn,
    pub backup_end_point: Lsn,
    /// While recovering from a base backup of a primary: a backup-end record has still to come.
    pub backup_end_required: bool,
    pub wal_level: WalLevel,
    pub wal_log_hints: bool,
    pub parameters: RecoveryParameters,
    /// The size of a data block, in bytes.
    pub block_size: u32,
    /// How many blocks a file of a large relation holds before the next file begins.
    pub relation_segment_blocks: u32,
    /// The size of a WAL page, in bytes.
    pub wal_block_size: u32,
    pub wal_segment_size: SegmentSize,
    /// 0 = data pages carry no checksums; 1 = they do.
    pub data_checksum_version: u32,
}

impl ControlFile {
    /// Reads the file. `Damaged` for a short file, a wrong checksum or impossible values; `Unsupported` for another
    /// version, byte order or alignment.
    pub fn parse(bytes: &[u8]) -> Result<ControlFile> {
        let control_version = u32_at(bytes, offset::CONTROL_VERSION).ok_or_else(|| damaged("it is too short"))?;
        let catalog_version = u32_at(bytes, offset::CATALOG_VERSION).ok_or_else(|| damaged("it is too short"))?;
        let crc_offset = checked_crc_offset(bytes, control_version)?;
        let major = Major::from_control(control_version, catalog_version)?;
        let body = &bytes[..crc_offset];
        if u32_at(body, offset::MAXIMUM_ALIGNMENT) != Some(8)
            || array_at(body, offset::FLOAT_FORMAT).map(f64::from_le_bytes) != Some(FLOAT_FORMAT)
        {
            return Err(Error::new(Kind::Unsupported, "pg_control was written on another machine architecture"));
        }
        // The checksum was right, so what cannot be read now is a value that no server writes.
        read_body(body, major).ok_or_else(|| damaged("a value is out of range"))
    }

    /// Whether the data pages carry checksums.
    pub fn has_data_checksums(&self) -> bool {
        self.data_checksum_version != 0
    }
}

fn read_body(body: &[u8], major: Major) -> Option<ControlFile> {
    let lsn = |at: usize| u64_at(body, at).map(Lsn);
    let power_of_two = |at: usize| u32_at(body, at).filter(|bytes| bytes.is_power_of_two());
    Some(ControlFile {
        major,
        system_identifier: u64_at(body, offset::SYSTEM_IDENTIFIER)?,
        control_version: u32_at(body, offset::CONTROL_VERSION)?,
        catalog_version: u32_at(body, offset::CATALOG_VERSION)?,
        state: ClusterState::ALL.get(usize::try_from(u32_at(body, offset::STATE)?).ok()?)?.0,
        time: Timestamp::from_second(i64_at(body, offset::TIME)?).ok()?,
        checkpoint_record: lsn(offset::CHECKPOINT)?,
        checkpoint: Checkpoint::read(body.get(offset::CHECKPOINT_COPY..)?)?,
        min_recovery_point: lsn(offset::MIN_RECOVERY_POINT)?,
        min_recovery_point_timeline: u32_at(body, offset::MIN_RECOVERY_POINT_TIMELINE)?,
        backup_start_point: lsn(offset::BACKUP_START_POINT)?,
        backup_end_point: lsn(offset::BACKUP_END_POINT)?,
        backup_end_required: *body.get(offset::BACKUP_END_REQUIRED)? != 0,
        wal_level: WalLevel::from_number(i32_at(body, offset::WAL_LEVEL)?)?,
        wal_log_hints: *body.get(offset::WAL_LOG_HINTS)? != 0,
        parameters: RecoveryParameters::read(body, offset::PARAMETERS)?,
        block_size: power_of_two(offset::BLOCK_SIZE).filter(|bytes| (1 << 10..=1 << 15).contains(bytes))?,
        relation_segment_blocks: u32_at(body, offset::RELATION_SEGMENT_BLOCKS).filter(|blocks| *blocks > 0)?,
        wal_block_size: power_of_two(offset::WAL_BLOCK_SIZE).filter(|bytes| (1 << 10..=1 << 16).contains(bytes))?,
        wal_segment_size: SegmentSize::new(u32_at(body, offset::WAL_SEGMENT_SIZE)?).ok()?,
        data_checksum_version: u32_at(body, offset::DATA_CHECKSUM_VERSION)?,
    })
}

/// A place where no checkpoint can lie: the first record of segment 0, which no server has (initdb begins with
/// segment 1). It must look like the place of a record, or the server refuses the file even with a `backup_label`
/// (`src/backend/access/transam/xlog.c`, StartupXLOG: "control file contains invalid checkpoint location").
pub const NOWHERE: Lsn = Lsn(0x28);

/// A copy of the file in which the checkpoint lies nowhere, with a right checksum. A server that is started on it
/// without a `backup_label` stops with "could not locate a valid checkpoint record" instead of recovering from a
/// checkpoint that is too new for the files around it; with a `backup_label` it takes the checkpoint from there
/// (`src/backend/access/transam/xlogrecovery.c`, InitWalRecovery).
pub fn without_checkpoint(bytes: &[u8]) -> Result<Vec<u8>> {
    let control = ControlFile::parse(bytes)?;
    let mut copy = bytes.to_vec();
    let crc_offset = checked_crc_offset(bytes, control.control_version)?;
    copy[offset::CHECKPOINT..offset::CHECKPOINT + 8].copy_from_slice(&NOWHERE.0.to_le_bytes());
    let crc = crc_fast::crc32_iscsi(&copy[..crc_offset]);
    copy[crc_offset..crc_offset + 4].copy_from_slice(&crc.to_le_bytes());
    Ok(copy)
}

/// Refuses a data directory whose `PG_VERSION` file and `pg_control` speak of different versions.
pub fn require_same_major(control: &ControlFile, pg_version_file: &[u8]) -> Result<Major> {
    let major = Major::from_pg_version_file(pg_version_file)?;
    if major == control.major {
        return Ok(major);
    }
    Err(Error::new(
        Kind::Damaged,
        format!("PG_VERSION says PostgreSQL {major}, but pg_control was written by PostgreSQL {}", control.major),
    )
    .hint("was the directory put together from two servers, or is an upgrade unfinished?"))
}

/// Where the checksum lies, after it has been found right.
fn checked_crc_offset(bytes: &[u8], control_version: u32) -> Result<usize> {
    let crc_offset = match control_version {
        1300 | 1700 => offset::CRC_UNTIL_17,
        1800 => offset::CRC_SINCE_18,
        // Another format has its checksum elsewhere: say so instead of calling it damaged. The versions before 13
        // carry other small numbers; anything larger is not a control file or comes from another byte order.
        other if other < 100_000 => {
            return Err(Error::new(Kind::Unsupported, format!("pg_control has format version {other}"))
                .hint("keiki works with PostgreSQL 13 to 18"));
        }
        _ => return Err(damaged("it has no format version")),
    };
    let stored = u32_at(bytes, crc_offset).ok_or_else(|| damaged("it is too short"))?;
    if crc_fast::crc32_iscsi(&bytes[..crc_offset]) != stored {
        return Err(damaged("its checksum is wrong"));
    }
    Ok(crc_offset)
}

fn damaged(why: &str) -> Error {
    Error::new(Kind::Damaged, format!("pg_control cannot be read: {why}"))
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{self, Fixture};
    use super::*;
    use proptest::prelude::*;

    fn lsn(text: &str) -> Lsn {
        Lsn::parse(text).unwrap()
    }

    /// Every value that `pg_controldata` printed for the same file.
    fn assert_matches_pg_controldata(fixture: &Fixture) {
        let control = ControlFile::parse(&fixture.control()).unwrap();
        let printed = |label: &str| fixture.control_line(label);
        assert_eq!(control.control_version.to_string(), printed("pg_control version number"));
        assert_eq!(control.catalog_version.to_string(), printed("Catalog version number"));
        assert_eq!(control.system_identifier.to_string(), printed("Database system identifier"));
        assert_eq!(control.state.to_string(), printed("Database cluster state"));
        assert_eq!(fixtures::c_time(control.time), printed("pg_control last modified"));
        assert_eq!(control.checkpoint_record, lsn(&printed("Latest checkpoint location")));
        assert_eq!(control.checkpoint.redo, lsn(&printed("Latest checkpoint's REDO location")));
        assert_eq!(control.checkpoint.timeline.to_string(), printed("Latest checkpoint's TimeLineID"));
        assert_eq!(control.checkpoint.previous_timeline.to_string(), printed("Latest checkpoint's PrevTimeLineID"));
        assert_eq!(fixtures::c_time(control.checkpoint.time), printed("Time of latest checkpoint"));
        assert_eq!(control.min_recovery_point, lsn(&printed("Minimum recovery ending location")));
        assert_eq!(control.min_recovery_point_timeline.to_string(), printed("Min recovery ending loc's timeline"));
        assert_eq!(control.backup_start_point, lsn(&printed("Backup start location")));
        assert_eq!(control.backup_end_point, lsn(&printed("Backup end location")));
        assert_eq!(if control.backup_end_required { "yes" } else { "no" }, printed("End-of-backup record required"));
        assert_eq!(control.wal_level.to_string(), printed("wal_level setting"));
        assert_eq!(if control.wal_log_hints { "on" } else { "off" }, printed("wal_log_hints setting"));
        assert_eq!(control.parameters.max_connections.to_string(), printed("max_connections setting"));
        assert_eq!(control.parameters.max_worker_processes.to_string(), printed("max_worker_processes setting"));
        assert_eq!(control.parameters.max_wal_senders.to_string(), printed("max_wal_senders setting"));
        assert_eq!(control.parameters.max_prepared_transactions.to_string(), printed("max_prepared_xacts setting"));
        assert_eq!(control.parameters.max_locks_per_transaction.to_string(), printed("max_locks_per_xact setting"));
        assert_eq!(control.block_size.to_string(), printed("Database block size"));
        assert_eq!(control.relation_segment_blocks.to_string(), printed("Blocks per segment of large relation"));
        assert_eq!(control.wal_block_size.to_string(), printed("WAL block size"));
        assert_eq!(control.wal_segment_size.bytes().to_string(), printed("Bytes per WAL segment"));
        assert_eq!(control.data_checksum_version.to_string(), printed("Data page checksum version"));
        assert_eq!(control.major, fixture.major);
    }

    #[test]
    fn a_control_file_says_what_pg_controldata_says() {
        for fixture in fixtures::all() {
            assert_matches_pg_controldata(&fixture);
        }
    }

    #[test]
    fn a_control_file_with_a_flipped_bit_is_refused() {
        for fixture in fixtures::all() {
            let intact = fixture.control();
            for byte in 0..292 {
                let mut bytes = intact.clone();
                bytes[byte] ^= 0x10;
                // Padding and the checksum itself are covered too, so that no byte may go unnoticed.
                assert!(ControlFile::parse(&bytes).is_err(), "byte {byte} of PostgreSQL {}", fixture.major);
            }
        }
    }

    #[test]
    fn a_short_control_file_is_refused() {
        let bytes = fixtures::v18().control();
        for length in [0, 1, 11, 12, 100, 291, 295] {
            assert!(ControlFile::parse(&bytes[..length]).is_err(), "{length}");
        }
        assert!(ControlFile::parse(&bytes[..296]).is_ok());
    }

    #[test]
    fn without_its_checkpoint_only_the_location_and_the_checksum_differ() {
        for fixture in fixtures::all() {
            let bytes = fixture.control();
            let copy = without_checkpoint(&bytes).unwrap();
            let (before, after) = (ControlFile::parse(&bytes).unwrap(), ControlFile::parse(&copy).unwrap());
            assert_eq!(after.checkpoint_record, NOWHERE);
            assert_eq!(ControlFile { checkpoint_record: before.checkpoint_record, ..after }, before);
            assert_eq!(copy.len(), CONTROL_FILE_BYTES);
        }
    }

    #[test]
    fn another_version_is_called_unsupported_and_not_damaged() {
        let mut bytes = fixtures::v15().control();
        bytes[8..12].copy_from_slice(&1201u32.to_le_bytes());
        assert_eq!(ControlFile::parse(&bytes).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn a_directory_of_two_majors_is_refused() {
        let control = ControlFile::parse(&fixtures::v15().control()).unwrap();
        assert_eq!(require_same_major(&control, b"15\n").unwrap(), Major::V15);
        let error = require_same_major(&control, b"16\n").unwrap_err();
        assert!(error.message().contains("16") && error.message().contains("15"), "{error}");
    }

    #[test]
    fn the_larger_of_each_parameter_is_kept() {
        let one = RecoveryParameters { max_connections: 100, max_wal_senders: 3, ..RecoveryParameters::default() };
        let two = RecoveryParameters { max_connections: 50, max_wal_senders: 10, ..RecoveryParameters::default() };
        let both = one.at_least(two);
        assert_eq!((both.max_connections, both.max_wal_senders), (100, 10));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), version in prop::sample::select(vec![1300u32, 1700, 1800])) {
            let mut bytes = bytes;
            if bytes.len() >= 12 {
                bytes[8..12].copy_from_slice(&version.to_le_bytes());
            }
            let _ = ControlFile::parse(&bytes);
            let _ = without_checkpoint(&bytes);
        }
    }
}
