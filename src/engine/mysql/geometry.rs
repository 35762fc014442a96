//! Binary log files as [`LogGeometry`].
//!
//! In the repository a file is called `binlog.` and its number in ten digits, whatever base name the server uses: so
//! names sort in the order of the log for ever (the server's own do not beyond 999999), and no base name is needed to
//! tell one from a position. A position in a file counts its bytes; a finished file ends where the next one begins.

use crate::engine::LogGeometry;
use crate::error::{Error, Kind, Result};
use crate::model::position::Position;

const PREFIX: &str = "binlog.";
const DIGITS: usize = 10;

/// The arithmetic of numbered log files.
#[derive(Debug, Clone, Copy)]
pub struct BinlogGeometry;

/// The name in the repository of the log file with this number.
pub fn log_name(number: u64) -> String {
    format!("{PREFIX}{number:010}")
}

/// The number of a log file by its name in the repository.
pub fn log_number(name: &str) -> Result<u64> {
    let digits = name.strip_prefix(PREFIX).filter(|digits| digits.len() == DIGITS);
    let is_decimal = |digits: &&str| digits.bytes().all(|byte| byte.is_ascii_digit());
    digits
        .filter(is_decimal)
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| Error::new(Kind::Damaged, format!("'{name}' is not the name of a binary log in the repository")))
}

/// The number in the server's own name of a log file: the digits behind its last point. Nothing if there are none.
pub fn server_log_number(name: &str) -> Option<u64> {
    let (_, digits) = name.rsplit_once('.')?;
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| is_number)
}

impl LogGeometry for BinlogGeometry {
    fn span(&self, name: &str, bytes: u64) -> Result<Option<(Position, Position)>> {
        let number = log_number(name)?;
        Ok(Some((Position::File { number, offset: 0 }, Position::File { number, offset: bytes })))
    }

    fn next_file(&self, name: &str) -> Result<String> {
        Ok(log_name(log_number(name)?.saturating_add(1)))
    }

    fn file_before(&self, position: Position) -> Result<String> {
        let (number, offset) = position.file()?;
        Ok(log_name(if offset == 0 { number.saturating_sub(1) } else { number }))
    }

    fn sealed_span(&self, name: &str) -> Result<Option<(Position, Position)>> {
        let number = log_number(name)?;
        let next = Position::File { number: number.saturating_add(1), offset: 0 };
        Ok(Some((Position::File { number, offset: 0 }, next)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_in_the_order_of_the_log_and_finished_files_meet() {
        assert!(log_name(999_999) < log_name(1_000_000));
        let name = log_name(12);
        assert_eq!((name.as_str(), log_number(&name).unwrap()), ("binlog.0000000012", 12));
        let geometry = BinlogGeometry;
        let next = geometry.next_file(&name).unwrap();
        let (_, end) = geometry.sealed_span(&name).unwrap().unwrap();
        assert_eq!(end, geometry.span(&next, 7).unwrap().unwrap().0);
        assert!(geometry.span(&name, u64::MAX).unwrap().unwrap().1 < end);
        assert_eq!(geometry.file_before(end).unwrap(), name);
        assert_eq!(geometry.file_before(Position::File { number: 13, offset: 4 }).unwrap(), next);
    }

    #[test]
    fn other_names_are_refused() {
        for bad in ["binlog.000012", "binlog.00000000012", "mysql-bin.0000000012", "binlog.00000000x2", "", "binlog."] {
            assert!(log_number(bad).is_err(), "{bad}");
        }
        assert_eq!(server_log_number("my.host-bin.000012"), Some(12));
        assert_eq!(server_log_number("binlog.index"), None);
        assert_eq!(server_log_number("binlog.+12"), None);
    }
}
