//! A point in a log.

use std::fmt;

use crate::error::{Error, Kind, Result};

/// A byte address in PostgreSQL's WAL, printed as `16/B374D848` (PostgreSQL manual, "pg_lsn Type").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Reads `high/low`, both hexadecimal with at most eight digits.
    pub fn parse(text: &str) -> Result<Lsn> {
        let half = |digits: &str| match digits.len() {
            1..=8 => u32::from_str_radix(digits, 16).ok(),
            _ => None,
        };
        text.split_once('/')
            .and_then(|(high, low)| Some(Lsn(u64::from(half(high)?) << 32 | u64::from(half(low)?))))
            .ok_or_else(|| {
                Error::new(Kind::BadInput, format!("'{text}' is not a log position"))
                    .hint("a PostgreSQL position looks like '16/B374D848'; pg_current_wal_lsn() prints the current one")
            })
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

/// A point in the log of an incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Position {
    /// PostgreSQL: the end of the last record that is included.
    Wal { timeline: u32, lsn: Lsn },
    /// The fake engine: how many events are included.
    Count(u64),
    /// Engines whose log is numbered files of any length: byte `offset` of file `number`. A file that is known to be
    /// finished ends where the next one begins, at its byte 0.
    File { number: u64, offset: u64 },
}

impl Position {
    /// The PostgreSQL parts, or an error that says which engine's position this is.
    pub fn wal(self) -> Result<(u32, Lsn)> {
        match self {
            Position::Wal { timeline, lsn } => Ok((timeline, lsn)),
            Position::Count(_) | Position::File { .. } => {
                Err(Error::new(Kind::Internal, format!("position '{self}' is not a WAL position")))
            }
        }
    }

    /// The number of a log file and an offset in it, or an error that says which engine's position this is.
    pub fn file(self) -> Result<(u64, u64)> {
        match self {
            Position::File { number, offset } => Ok((number, offset)),
            Position::Count(_) | Position::Wal { .. } => {
                Err(Error::new(Kind::Internal, format!("position '{self}' is not a place in a numbered log file")))
            }
        }
    }

    /// Reads what `Display` prints: `1@16/B374D848`, `#42` or `file:12:4567`.
    pub fn parse(text: &str) -> Result<Position> {
        if let Some((number, offset)) = text.strip_prefix("file:").and_then(|rest| rest.split_once(':')) {
            let decimal = |digits: &str| match digits.bytes().all(|byte| byte.is_ascii_digit()) {
                true => digits.parse::<u64>().ok(),
                false => None,
            };
            if let (Some(number), Some(offset)) = (decimal(number), decimal(offset)) {
                return Ok(Position::File { number, offset });
            }
        }
        if let Some(count) = text.strip_prefix('#').and_then(|digits| digits.parse().ok()) {
            return Ok(Position::Count(count));
        }
        match text.split_once('@') {
            Some((timeline, lsn)) if timeline.parse::<u32>().is_ok_and(|number| number > 0) => {
                Ok(Position::Wal { timeline: timeline.parse().unwrap_or(1), lsn: Lsn::parse(lsn)? })
            }
            _ => Err(Error::new(Kind::BadInput, format!("'{text}' is not a position"))),
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Position::Wal { timeline, lsn } => write!(f, "{timeline}@{lsn}"),
            Position::Count(count) => write!(f, "#{count}"),
            Position::File { number, offset } => write!(f, "file:{number}:{offset}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_read_back_as_printed() {
        for position in [
            Position::Wal { timeline: 1, lsn: Lsn(0x16_B374_D848) },
            Position::Wal { timeline: 7, lsn: Lsn(0) },
            Position::Wal { timeline: u32::MAX, lsn: Lsn(u64::MAX) },
            Position::Count(42),
            Position::File { number: 12, offset: 4567 },
            Position::File { number: u64::MAX, offset: u64::MAX },
        ] {
            assert_eq!(Position::parse(&position.to_string()).unwrap(), position);
        }
    }

    #[test]
    fn places_in_numbered_files_are_ordered_by_file_and_then_by_offset() {
        let at = |number, offset| Position::File { number, offset };
        assert!(at(9, u64::MAX) < at(10, 0) && at(10, 0) < at(10, 4));
        assert_eq!((at(3, 4).file().unwrap(), at(3, 4).wal().is_err()), ((3, 4), true));
    }

    #[test]
    fn what_is_not_a_position_is_refused() {
        for bad in [
            "",
            "/",
            "1/",
            "g/1",
            "123456789/0",
            "0@1/1",
            "-1@0/0",
            "#",
            "1@",
            "file:1",
            "file:1:",
            "file:+1:2",
            "file:1:2:3",
        ] {
            assert!(Position::parse(bad).is_err() && Lsn::parse(bad).is_err(), "{bad}");
        }
    }
}
