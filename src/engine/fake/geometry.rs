//! Names and positions of the fake engine's log files.

use crate::engine::LogGeometry;
use crate::engine::fake::record::RECORD_BYTES;
use crate::error::{Error, Kind, Result};
use crate::model::position::Position;

pub const EVENTS_PER_FILE: u64 = 64;
pub const FILE_BYTES: u64 = EVENTS_PER_FILE * RECORD_BYTES as u64;

#[derive(Debug, Clone, Copy)]
pub struct FakeGeometry;

/// The name of log file number `number`.
pub fn file_name(number: u64) -> String {
    format!("{number:08}")
}

/// The number of a log file, or nothing for a companion.
pub fn file_number(name: &str) -> Option<u64> {
    (name.len() == 8).then(|| name.parse().ok()).flatten()
}

/// The count in a position of this engine.
pub fn count_of(position: Position) -> Result<u64> {
    match position {
        Position::Count(count) => Ok(count),
        Position::Wal { .. } | Position::File { .. } => {
            Err(Error::new(Kind::Internal, format!("position '{position}' is not one of the fake engine")))
        }
    }
}

impl LogGeometry for FakeGeometry {
    fn span(&self, name: &str, bytes: u64) -> Result<Option<(Position, Position)>> {
        let Some(number) = file_number(name) else { return Ok(None) };
        let first = number * EVENTS_PER_FILE;
        let events = bytes.min(FILE_BYTES) / RECORD_BYTES as u64;
        Ok(Some((Position::Count(first), Position::Count(first + events))))
    }

    fn next_file(&self, name: &str) -> Result<String> {
        let number = file_number(name);
        number.map(|number| file_name(number + 1)).ok_or_else(|| not_a_file(name))
    }

    fn file_before(&self, position: Position) -> Result<String> {
        Ok(file_name(count_of(position)?.saturating_sub(1) / EVENTS_PER_FILE))
    }

    fn sealed_span(&self, name: &str) -> Result<Option<(Position, Position)>> {
        self.span(name, FILE_BYTES)
    }
}

fn not_a_file(name: &str) -> Error {
    Error::new(Kind::Damaged, format!("'{name}' is not a log file of the fake engine"))
}
