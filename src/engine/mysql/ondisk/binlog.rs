//! The binary log as bytes: file magic, event headers, and the few event bodies that say where transactions begin, end
//! and what they are called.
//!
//! Sources: `sql/log_event.h` and `sql/log_event.cc` of MariaDB 10.11; MariaDB knowledge base, "Replication protocol";
//! `libs/mysql/binlog/event/binlog_event.h` of MySQL 9. What only MySQL has is in `gtid_event`.
//! All numbers are little-endian.

use super::bytes::{u16_at, u32_at, u64_at};
use super::gtid::{Gtid, GtidState};
use crate::error::{Error, Kind, Result};

/// The first bytes of a log file (BINLOG_MAGIC).
pub const MAGIC: [u8; 4] = [0xfe, b'b', b'i', b'n'];
/// The first bytes of one that MySQL has encrypted (`sql/rpl_log_encryption.h`).
pub const ENCRYPTED_MAGIC: [u8; 4] = [0xfd, b'b', b'i', b'n'];
/// The first event begins behind them.
pub const FIRST_EVENT_AT: u64 = 4;
/// Time, type, server, length, end, flags (LOG_EVENT_HEADER_LEN).
pub const HEADER_BYTES: usize = 19;
/// The byte of a log file that has [`IN_USE_FLAG`]: the low byte of the flags of the first event. It changes when the
/// server closes the file, and is no part of that event's checksum.
pub const IN_USE_AT: u64 = FIRST_EVENT_AT + 17;
/// The server is still writing to the file (LOG_EVENT_BINLOG_IN_USE_F).
pub const IN_USE_FLAG: u8 = 1;
/// CRC-32 behind each event, where they have one (BINLOG_CHECKSUM_LEN).
pub const CHECKSUM_BYTES: usize = 4;

/// Types of events that mean something here (Log_event_type).
pub mod event_type {
    pub const QUERY: u8 = 2;
    pub const STOP: u8 = 3;
    pub const ROTATE: u8 = 4;
    pub const INTVAR: u8 = 5;
    pub const RAND: u8 = 13;
    pub const USER_VAR: u8 = 14;
    pub const FORMAT_DESCRIPTION: u8 = 15;
    pub const XID: u8 = 16;
    pub const TABLE_MAP: u8 = 19;
    pub const MYSQL_GTID: u8 = 33;
    pub const MYSQL_ANONYMOUS_GTID: u8 = 34;
    pub const MYSQL_PREVIOUS_GTIDS: u8 = 35;
    pub const XA_PREPARE: u8 = 38;
    pub const MYSQL_TAGGED_GTID: u8 = 42;
    pub const ANNOTATE_ROWS: u8 = 160;
    pub const GTID: u8 = 162;
    pub const GTID_LIST: u8 = 163;
    pub const START_ENCRYPTION: u8 = 164;
}

/// The fixed start of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventHeader {
    /// Seconds since 1970 of the statement that made the event.
    pub at_seconds: u32,
    pub kind: u8,
    /// The number of the server that made it.
    pub server: u32,
    /// With header and checksum.
    pub bytes: u32,
    /// Where the event ends in the file, modulo 2^32; 0 says nothing.
    pub end: u32,
}

impl EventHeader {
    /// Reads it; nothing if it is cut short or shorter than itself.
    pub fn parse(bytes: &[u8]) -> Option<EventHeader> {
        let header = EventHeader {
            at_seconds: u32_at(bytes, 0)?,
            kind: *bytes.get(4)?,
            server: u32_at(bytes, 5)?,
            bytes: u32_at(bytes, 9)?,
            end: u32_at(bytes, 13)?,
        };
        u16_at(bytes, 17)?;
        (header.bytes as usize >= HEADER_BYTES).then_some(header)
    }
}

/// What the first event of a file says about all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    pub has_checksums: bool,
}

/// Version, server's name, time of creation, length of headers (START_V3_HEADER_LEN and what follows).
const SERVER_VERSION_AT: usize = 2;
const SERVER_VERSION_BYTES: usize = 50;
const HEADER_LENGTH_AT: usize = SERVER_VERSION_AT + SERVER_VERSION_BYTES + 4;

impl Format {
    /// Reads the body of a format description event, which ends in the algorithm of checksums and a checksum. Logs of
    /// servers before MariaDB 5.3 have neither and are refused.
    pub fn parse(body: &[u8]) -> Result<Format> {
        let wrong = |why: &str| Err(Error::new(Kind::Damaged, format!("the format of the log is not known: {why}")));
        if u16_at(body, 0) != Some(4) || body.get(HEADER_LENGTH_AT).copied() != Some(HEADER_BYTES as u8) {
            return wrong("it is not binary log version 4");
        }
        let Some(algorithm_at) = body.len().checked_sub(CHECKSUM_BYTES + 1).filter(|at| *at > HEADER_LENGTH_AT) else {
            return wrong("its description is cut short");
        };
        match body.get(algorithm_at) {
            Some(0) => Ok(Format { has_checksums: false }),
            Some(1) => Ok(Format { has_checksums: true }),
            _ => wrong("its checksums are of an unknown kind"),
        }
    }
}

/// A MariaDB GTID event: a transaction begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GtidEvent {
    pub gtid: Gtid,
    /// No COMMIT follows: the group is one statement (FL_STANDALONE).
    pub is_standalone: bool,
}

const FL_STANDALONE: u8 = 1;

impl GtidEvent {
    /// Reads the body; the server's number stands in the event's header.
    pub fn parse(body: &[u8], server: u32) -> Option<GtidEvent> {
        let gtid = Gtid { domain: u32_at(body, 8)?, server, sequence: u64_at(body, 0)? };
        Some(GtidEvent { gtid, is_standalone: body.get(12)? & FL_STANDALONE != 0 })
    }
}

/// The low 28 bits of the count are the count (`Gtid_list_log_event`).
const GTID_LIST_COUNT_MASK: u32 = (1 << 28) - 1;
const GTID_LIST_ENTRY_BYTES: usize = 16;

/// The state at the start of a file, out of the body of a GTID list event. Nothing if the body is cut short.
pub fn gtid_list(body: &[u8]) -> Option<GtidState> {
    let count = (u32_at(body, 0)? & GTID_LIST_COUNT_MASK) as usize;
    let entries = body.get(4..4usize.checked_add(count.checked_mul(GTID_LIST_ENTRY_BYTES)?)?)?;
    let mut state = GtidState::default();
    for entry in entries.chunks_exact(GTID_LIST_ENTRY_BYTES) {
        state.advance(Gtid { domain: u32_at(entry, 0)?, server: u32_at(entry, 4)?, sequence: u64_at(entry, 8)? });
    }
    Some(state)
}

/// Whether the last bytes of a query event without its checksum end a transaction (`Query_log_event`,
/// peek_is_commit_rollback: the query stands behind the NUL of the database's name).
pub fn ends_transaction(tail: &[u8]) -> bool {
    let ends_with = |word: &[u8]| {
        let Some(start) = tail.len().checked_sub(word.len() + 1) else { return false };
        tail.get(start) == Some(&0) && tail.get(start + 1..).is_some_and(|found| found.eq_ignore_ascii_case(word))
    };
    ends_with(b"COMMIT") || ends_with(b"ROLLBACK")
}

/// Whether an event can stand inside a group without COMMIT and does not end it (`Log_event::is_part_of_group`).
pub fn goes_before_statement(kind: u8) -> bool {
    use event_type::{ANNOTATE_ROWS, GTID, INTVAR, RAND, TABLE_MAP, USER_VAR};
    [GTID, INTVAR, RAND, USER_VAR, TABLE_MAP, ANNOTATE_ROWS].contains(&kind)
}
