//! A transaction of a binary log of either product, what it is called, and the state that a log leaves behind.
//!
//! The two products have the same log and other names for what is in it: this is where they meet. A log has
//! transactions of one product; a state of the other is an error and never a guess.

use std::fmt;

use jiff::Timestamp;

use super::gtid::{Gtid, GtidState};
use super::gtid_set::{GtidSet, SeriesGtid};
use crate::error::{Error, Kind, Result};

/// What a transaction is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransactionId {
    MariaDb(Gtid),
    MySql(SeriesGtid),
    /// MySQL without GTIDs.
    Anonymous,
}

impl fmt::Display for TransactionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TransactionId::MariaDb(gtid) => write!(f, "{gtid}"),
            TransactionId::MySql(gtid) => write!(f, "{gtid}"),
            TransactionId::Anonymous => write!(f, "(anonymous)"),
        }
    }
}

/// A complete transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transaction {
    pub id: TransactionId,
    /// Offsets in the file: of the event that begins it, and behind its last event.
    pub start: u64,
    pub end: u64,
    /// MariaDB: when its last statement began, in whole seconds: it was committed then or later. Of DDL, and of what is
    /// not transactional, when the statement had run. MySQL: when it was committed, in microseconds.
    pub at: Timestamp,
}

impl Transaction {
    /// Whether it may have been committed after this moment, so that a log up to the moment ends before it. Of whole
    /// seconds: whatever began in the second of the moment was not committed by it.
    pub fn is_beyond(&self, moment: Timestamp) -> bool {
        match self.id {
            TransactionId::MariaDb(_) => self.at.as_second() >= moment.as_second(),
            TransactionId::MySql(_) | TransactionId::Anonymous => self.at > moment,
        }
    }
}

/// What a server has when it has all of a log up to somewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogState {
    MariaDb(GtidState),
    MySql(GtidSet),
}

impl LogState {
    /// This transaction came next. `Unsupported` for one of the other product.
    pub fn advance(&mut self, id: TransactionId) -> Result<()> {
        match (self, id) {
            (LogState::MariaDb(state), TransactionId::MariaDb(gtid)) => state.advance(gtid),
            (LogState::MySql(set), TransactionId::MySql(gtid)) => set.add(gtid),
            (LogState::MySql(_), TransactionId::Anonymous) => {}
            (LogState::MariaDb(_), _) => {
                return Err(Error::new(Kind::Unsupported, "this is a binary log of MySQL and not of MariaDB"));
            }
            (LogState::MySql(_), _) => {
                return Err(Error::new(Kind::Unsupported, "this is a binary log of MariaDB and not of MySQL"));
            }
        }
        Ok(())
    }

    /// An error if a file that begins with the state `self` cannot follow where the log has come to `counted`, having
    /// begun at `base`.
    pub fn require_follows(&self, counted: &LogState, base: &LogState) -> Result<()> {
        match (self, counted, base) {
            (LogState::MariaDb(found), LogState::MariaDb(counted), _) => {
                found.require_within(counted).map_err(|(found, counted)| {
                    hole(format!("it begins after transaction '{found}', and the file before it ends with '{counted}'"))
                })
            }
            (LogState::MySql(found), LogState::MySql(counted), LogState::MySql(base)) => {
                if let Some(missing) = found.first_missing_in(counted) {
                    return Err(hole(format!("it begins after transaction '{missing}', which no file before it has")));
                }
                // What was there without ever being in the log is not in this list.
                let mut known = found.clone();
                known.add_all(base);
                match counted.first_missing_in(&known) {
                    None => Ok(()),
                    Some(gtid) => {
                        Err(hole(format!("it begins without transaction '{gtid}', which a file before it has")))
                    }
                }
            }
            _ => Err(Error::new(Kind::Unsupported, "it is a binary log of another product than the one before it")),
        }
    }
}

impl fmt::Display for LogState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LogState::MariaDb(state) => write!(f, "{state}"),
            LogState::MySql(set) => write!(f, "{set}"),
        }
    }
}

fn hole(what: String) -> Error {
    Error::new(Kind::Damaged, what)
        .hint("log is missing between the two, or the server was given another state; take a new backup")
}

/// Transactions of one series between a first and a last number, as a summary of a stretch of log: all of them that the
/// stretch has are inside, but it need not have all that are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransactionRange {
    first: TransactionId,
    last_sequence: u64,
}

impl TransactionRange {
    /// Of this transaction alone; nothing if it has no name.
    pub fn of(id: TransactionId) -> Option<TransactionRange> {
        Some(TransactionRange { first: id, last_sequence: sequence(&id)? })
    }

    /// Takes one more in, if it is of the same series.
    pub fn extend(&mut self, id: TransactionId) -> bool {
        let Some(number) = sequence(&id).filter(|_| is_same_series(&self.first, &id)) else { return false };
        match sequence(&self.first) {
            Some(first) if number < first => self.first = id,
            _ => self.last_sequence = self.last_sequence.max(number),
        }
        true
    }

    /// Reads what `Display` prints; nothing if it is something else.
    pub fn parse(text: &str) -> Option<TransactionRange> {
        let (first, last) = text.split_once("..")?;
        let first = match first.contains(':') {
            true => TransactionId::MySql(SeriesGtid::parse(first).ok()?),
            false => TransactionId::MariaDb(Gtid::parse(first).ok()?),
        };
        Some(TransactionRange { first, last_sequence: last.parse().ok()? })
    }

    /// Whether the transaction may be in the stretch.
    pub fn may_hold(&self, id: TransactionId) -> bool {
        let inside = |number| sequence(&self.first).is_some_and(|first| (first..=self.last_sequence).contains(&number));
        is_same_series(&self.first, &id) && sequence(&id).is_some_and(inside)
    }
}

impl fmt::Display for TransactionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.first, self.last_sequence)
    }
}

fn sequence(id: &TransactionId) -> Option<u64> {
    match id {
        TransactionId::MariaDb(gtid) => Some(gtid.sequence),
        TransactionId::MySql(gtid) => Some(gtid.sequence),
        TransactionId::Anonymous => None,
    }
}

fn is_same_series(one: &TransactionId, other: &TransactionId) -> bool {
    match (one, other) {
        (TransactionId::MariaDb(one), TransactionId::MariaDb(other)) => {
            (one.domain, one.server) == (other.domain, other.server)
        }
        (TransactionId::MySql(one), TransactionId::MySql(other)) => one.series == other.series,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "3e11fa47-71ca-11e1-9e33-c80aa9429562";

    fn maria(text: &str) -> TransactionId {
        TransactionId::MariaDb(Gtid::parse(text).unwrap())
    }

    fn mysql(number: u64) -> TransactionId {
        TransactionId::MySql(SeriesGtid::parse(&format!("{UUID}:{number}")).unwrap())
    }

    #[test]
    fn a_range_holds_its_ends_and_nothing_of_another_series() {
        let range = TransactionRange::parse("0-5-10..20").unwrap();
        assert_eq!(range.to_string(), "0-5-10..20");
        assert!(range.may_hold(maria("0-5-10")) && range.may_hold(maria("0-5-20")));
        for other in ["0-5-9", "0-5-21", "0-6-15", "1-5-15"] {
            assert!(!range.may_hold(maria(other)), "{other}");
        }
        let mut range = TransactionRange::of(mysql(7)).unwrap();
        assert!(range.extend(mysql(9)) && range.extend(mysql(5)) && !range.extend(maria("0-5-6")));
        assert_eq!(range.to_string(), format!("{UUID}:5..9"));
        assert_eq!(TransactionRange::parse(&range.to_string()), Some(range));
        assert!(range.may_hold(mysql(8)) && !range.may_hold(mysql(10)) && !range.may_hold(maria("0-5-8")));
        assert_eq!(TransactionRange::of(TransactionId::Anonymous), None);
    }

    #[test]
    fn a_transaction_at_the_moment_itself_is_in_the_log_up_to_it_only_if_its_time_is_exact() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let beyond =
            |id, time: &str, moment: &str| Transaction { id, start: 0, end: 1, at: at(time) }.is_beyond(at(moment));
        let second = "2026-11-21T09:59:00Z";
        assert!(beyond(maria("0-1-1"), second, second));
        assert!(!beyond(maria("0-1-1"), "2026-11-21T09:58:59Z", second));
        assert!(!beyond(mysql(1), second, second));
        assert!(beyond(mysql(1), "2026-11-21T09:59:00.000001Z", second));
        assert!(!beyond(TransactionId::Anonymous, "2026-11-21T09:59:00.000001Z", "2026-11-21T09:59:00.000001999Z"));
    }

    #[test]
    fn a_file_follows_only_where_all_before_it_was_counted() {
        let set = |text: &str| LogState::MySql(GtidSet::parse(&text.replace('U', UUID)).unwrap());
        // 100 was never in the log: a copy began with it.
        let base = set("U:1-10:100");
        assert!(set("U:1-20").require_follows(&set("U:1-20:100"), &base).is_ok());
        for (found, counted, word) in [("U:1-21", "U:1-20:100", ":21'"), ("U:1-19", "U:1-20:100", ":20'")] {
            let error = set(found).require_follows(&set(counted), &base).unwrap_err();
            assert!(error.message().contains(word) && error.kind() == Kind::Damaged, "{error}");
        }
        let maria = LogState::MariaDb(GtidState::default());
        assert_eq!(set("U:1").require_follows(&maria, &base).unwrap_err().kind(), Kind::Unsupported);
        assert_eq!(maria.clone().advance(mysql(1)).unwrap_err().kind(), Kind::Unsupported);
        assert_eq!(set("").advance(self::maria("0-1-1")).unwrap_err().kind(), Kind::Unsupported);
    }
}
