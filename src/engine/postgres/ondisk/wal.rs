//! The write-ahead log: a reader of its pages and records, the records that keiki needs, and where to cut it.
//!
//! # Which number is which
//!
//! * A record **starts** at its first byte, after the header of a page that begins there; the server calls it
//!   ReadRecPtr, `pg_waldump` prints it as `lsn`.
//! * A record **ends** at the position after its last byte, rounded up to 8. If it fills its page, that is the page
//!   boundary and not the place behind the next page's header. This is what `pg_create_restore_point()`,
//!   `pg_backup_stop()` and commit positions mean, and where a log is cut.
//! * The record's **next** is the same, except for a switch: there it is the end of the segment. The server calls it
//!   EndRecPtr, `pg_last_wal_replay_lsn()` shows it after replay, and a promotion writes it to the timeline history
//!   as the point of the switch.
//! * `pg_current_wal_insert_lsn()` instead names the start of the next record: on a page boundary it has already
//!   stepped over the header, 24 bytes or, at the start of a segment, 40. No record lies between the two numbers.

pub mod cut;
pub mod end;
pub mod format;
mod page_header;
pub mod reader;
pub mod record;
pub mod summary;

#[cfg(test)]
mod forge;

pub use cut::{Cut, Cutter, Decision, Stop, zero_after};
pub use end::{End, EndReason};
pub use format::WalFormat;
pub use reader::{Record, Step, WalReader};
pub use record::{Event, Transaction, decode};
pub use summary::{Facts, Scanner};
