//! What moment a clone is to show.

use std::fmt;

use jiff::Timestamp;

use crate::error::{Error, Kind, Result};
use crate::model::id::BackupId;
use crate::model::position::{Lsn, Position};

/// The moment that was ordered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Everything that the source had made durable when the order was carried out.
    Latest,
    /// All that was committed at or before this instant.
    Time(Timestamp),
    /// All that ends at or before this position of the incarnation's own timeline.
    Lsn(Lsn),
    /// All that ends at or before this position, which says by itself where in the log it is.
    Position(Position),
    /// All up to a transaction that the source gave an id: with it, or without it.
    Transaction { id: String, included: bool },
    /// The named restore point that the user made on the source.
    Name(String),
    /// The first consistent moment of this backup set.
    Backup(BackupId),
}

impl Target {
    /// Reads a time as a person types it: `2026-11-21 09:59:00+00`, `2026-11-21T09:59:00.25Z`.
    ///
    /// A time without an offset is refused: it would mean one thing on the source, another on the target and a third
    /// on the person's own machine.
    pub fn parse_time(text: &str) -> Result<Target> {
        let with_t = text.trim().replacen(' ', "T", 1);
        if let Ok(instant) = with_t.parse::<Timestamp>() {
            return Ok(Target::Time(instant));
        }
        if with_t.parse::<jiff::civil::DateTime>().is_ok() {
            return Err(Error::new(Kind::BadInput, format!("time '{text}' has no offset from UTC")).hint(format!(
                "write '{}+00' if it is UTC, or give the offset that you mean, as in '+02'",
                text.trim()
            )));
        }
        Err(Error::new(Kind::BadInput, format!("'{text}' is not a time"))
            .hint("write it with date, time and offset, as in '2026-11-21 09:59:00+00'"))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Latest => write!(f, "latest"),
            Target::Time(instant) => write!(f, "{}", utc_text(*instant)),
            Target::Lsn(lsn) => write!(f, "{lsn}"),
            Target::Position(position) => write!(f, "{position}"),
            Target::Transaction { id, included: true } => write!(f, "transaction {id}"),
            Target::Transaction { id, included: false } => write!(f, "the moment before transaction {id}"),
            Target::Name(name) => write!(f, "{name}"),
            Target::Backup(id) => write!(f, "{id}"),
        }
    }
}

/// An instant as keiki prints it everywhere: `2026-11-21 09:59:00Z`, with fractions only if there are any.
pub fn utc_text(instant: Timestamp) -> String {
    instant.to_string().replacen('T', " ", 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_with_any_usual_offset_is_read() {
        for text in
            ["2026-11-21 09:59:00+00", "2026-11-21T09:59:00Z", "2026-11-21 11:59:00+02:00", "2026-11-21 04:29:00-0530"]
        {
            assert_eq!(Target::parse_time(text).unwrap().to_string(), "2026-11-21 09:59:00Z", "{text}");
        }
    }

    #[test]
    fn a_time_without_offset_is_refused_with_the_text_to_type() {
        let error = Target::parse_time("2026-11-21 09:59:00").unwrap_err();
        assert_eq!(error.message(), "time '2026-11-21 09:59:00' has no offset from UTC");
        assert!(error.hint_text().unwrap().contains("'2026-11-21 09:59:00+00'"));
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for bad in ["", "yesterday", "2026-13-01 00:00:00+00", "09:59"] {
            assert_eq!(Target::parse_time(bad).unwrap_err().kind(), Kind::BadInput, "{bad}");
        }
    }
}
