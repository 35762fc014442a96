//! MariaDB's global transaction ids: `domain-server-sequence`, and the state that a list of them is.
//!
//! Source: MariaDB knowledge base, "Global Transaction ID"; `sql/rpl_gtid.cc`.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::{Error, Kind, Result};

/// One transaction: `0-5-2257`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gtid {
    pub domain: u32,
    pub server: u32,
    pub sequence: u64,
}

impl Gtid {
    /// Reads `domain-server-sequence`, all decimal.
    pub fn parse(text: &str) -> Result<Gtid> {
        let wrong = || {
            Error::new(Kind::BadInput, format!("'{text}' is not a GTID of MariaDB"))
                .hint("one transaction is meant, as in '0-5-2257'; 'SELECT @@last_gtid' prints that of a session")
        };
        let parts: Vec<&str> = text.split('-').collect();
        let [domain, server, sequence] = parts.as_slice() else { return Err(wrong()) };
        let is_decimal = |digits: &&str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        if parts.iter().filter(|part| is_decimal(part)).count() != 3 {
            return Err(wrong());
        }
        Ok(Gtid {
            domain: domain.parse().map_err(|_| wrong())?,
            server: server.parse().map_err(|_| wrong())?,
            sequence: sequence.parse().map_err(|_| wrong())?,
        })
    }
}

impl fmt::Display for Gtid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.domain, self.server, self.sequence)
    }
}

/// The last transaction of each domain, as `gtid_slave_pos` has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GtidState(BTreeMap<u32, Gtid>);

impl GtidState {
    /// Reads a list separated by commas; an empty text is the empty state.
    pub fn parse(text: &str) -> Result<GtidState> {
        let mut state = GtidState::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            state.advance(Gtid::parse(part)?);
        }
        Ok(state)
    }

    /// An error with one transaction of `self` and what `other` has instead, unless everything in `self` is in `other`.
    pub fn require_within(&self, other: &GtidState) -> Result<(), (Gtid, String)> {
        let missing = self.0.iter().find(|(domain, gtid)| other.0.get(domain) != Some(gtid));
        match missing {
            None => Ok(()),
            Some((domain, gtid)) => Err((*gtid, other.0.get(domain).map_or(String::from("nothing"), Gtid::to_string))),
        }
    }

    /// This transaction is now the last one of its domain.
    pub fn advance(&mut self, gtid: Gtid) {
        self.0.insert(gtid.domain, gtid);
    }
}

impl fmt::Display for GtidState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, gtid) in self.0.values().enumerate() {
            write!(f, "{}{gtid}", if place == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_read_back_as_printed_and_keep_the_last_of_each_domain() {
        let mut state = GtidState::parse("1-7-9,0-5-2257").unwrap();
        assert_eq!(state.to_string(), "0-5-2257,1-7-9");
        state.advance(Gtid { domain: 0, server: 6, sequence: 2258 });
        assert_eq!(state.to_string(), "0-6-2258,1-7-9");
        assert_eq!(GtidState::parse("").unwrap(), GtidState::default());
    }

    #[test]
    fn what_is_no_gtid_is_refused() {
        for bad in ["", "1-2", "1-2-3-4", "a-1-1", "+1-2-3", "1--3", "4294967296-1-1", "0-1-18446744073709551616"] {
            assert_eq!(Gtid::parse(bad).unwrap_err().kind(), Kind::BadInput, "{bad}");
        }
        assert!(GtidState::parse("0-1-2,x").is_err());
    }
}
