//! Names and positions of the log files of Redis.
//!
//! A log file is one increment of the append-only file. The servers' own names do not sort and their numbers begin again
//! in a new directory, so keiki numbers the files itself (see `hold`): `0000000012.aof`. A file that is followed by the
//! next number without anything between them ends where that one begins; where something may be missing, a number is
//! left out.

use crate::engine::LogGeometry;
use crate::error::{Error, Kind, Result};
use crate::model::position::Position;

const DIGITS: usize = 10;
const SUFFIX: &str = ".aof";

/// The arithmetic of numbered files of any length.
#[derive(Debug, Clone, Copy)]
pub struct AofGeometry;

/// The name of log file number `number`.
pub fn file_name(number: u64) -> String {
    format!("{number:0DIGITS$}{SUFFIX}")
}

/// The number of a log file.
pub fn file_number(name: &str) -> Result<u64> {
    let digits = name.strip_suffix(SUFFIX).filter(|digits| digits.len() >= DIGITS);
    let number = digits.and_then(|digits| digits.parse().ok()).filter(|number| file_name(*number) == name);
    number.ok_or_else(|| Error::new(Kind::Damaged, format!("'{name}' is not the name of a log file of Redis")))
}

impl LogGeometry for AofGeometry {
    fn span(&self, name: &str, bytes: u64) -> Result<Option<(Position, Position)>> {
        let number = file_number(name)?;
        Ok(Some((Position::File { number, offset: 0 }, Position::File { number, offset: bytes })))
    }

    fn next_file(&self, name: &str) -> Result<String> {
        Ok(file_name(file_number(name)?.saturating_add(1)))
    }

    fn file_before(&self, position: Position) -> Result<String> {
        let (number, offset) = position.file()?;
        Ok(file_name(if offset == 0 { number.saturating_sub(1) } else { number }))
    }

    fn sealed_span(&self, name: &str) -> Result<Option<(Position, Position)>> {
        let number = file_number(name)?;
        let next = Position::File { number: number.saturating_add(1), offset: 0 };
        Ok(Some((Position::File { number, offset: 0 }, next)))
    }
}
