//! The small files in which `mariadb-backup` says what it has copied.
//!
//! Source: `extra/mariabackup/backup_mysql.cc` and `xtrabackup.cc` of MariaDB; up to 11.0 their names begin with
//! `xtrabackup_`, later with `mariadb_backup_`.

use super::gtid::GtidState;
use crate::error::{Error, Kind, Result};

/// Names of the file with the place in the binary log that the copy belongs to.
pub const BINLOG_INFO: [&str; 2] = ["xtrabackup_binlog_info", "mariadb_backup_binlog_info"];
/// Names of the file without which `--prepare` refuses a directory: written last into a restored one.
pub const CHECKPOINTS: [&str; 2] = ["xtrabackup_checkpoints", "mariadb_backup_checkpoints"];
/// Every file begins with one of these.
pub const PREFIXES: [&str; 2] = ["xtrabackup_", "mariadb_backup_"];

/// The first line of the file: name of the log file, offset, and GTID state where there is one, separated by tabs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BinlogInfo {
    pub file: String,
    pub offset: u64,
    pub gtid_state: GtidState,
}

impl BinlogInfo {
    /// Reads the content of the file.
    pub fn parse(bytes: &[u8]) -> Result<BinlogInfo> {
        let text = String::from_utf8_lossy(bytes);
        let line = text.lines().next().unwrap_or_default();
        let mut columns = line.split('\t');
        let file = columns.next().map(str::trim).unwrap_or_default();
        let offset = columns.next().and_then(|column| column.trim().parse::<u64>().ok());
        match offset {
            Some(offset) if !file.is_empty() => Ok(BinlogInfo {
                file: file.to_string(),
                offset,
                gtid_state: GtidState::parse(columns.next().unwrap_or_default())?,
            }),
            _ => Err(Error::new(Kind::Damaged, format!("'{line}' is not a place in the binary log"))
                .hint("is the binary log of the server on? 'SELECT @@log_bin' must print 1")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_offset_and_gtid_state_are_read_and_nothing_else_is_taken_for_them() {
        let info = BinlogInfo::parse(b"binlog.000001\t625977\t0-5-2257,1-2-3\n").unwrap();
        assert_eq!((info.file.as_str(), info.offset), ("binlog.000001", 625_977));
        assert_eq!(info.gtid_state.to_string(), "0-5-2257,1-2-3");
        assert_eq!(BinlogInfo::parse(b"b.000007\t4").unwrap().gtid_state, GtidState::default());
        for bad in [&b""[..], b"\n", b"binlog.000001", b"binlog.000001\tx\t", b"\t4\t0-1-1", b"b.1\t4\tzero"] {
            assert!(BinlogInfo::parse(bad).is_err(), "{bad:?}");
        }
    }
}
