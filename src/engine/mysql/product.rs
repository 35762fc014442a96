//! The two products of this folder, and everything in which they differ only by a word. Where they differ by what is to
//! be done, two functions stand side by side in the part that does it.

use crate::engine::mysql::ondisk::gtid::{Gtid, GtidState};
use crate::engine::mysql::ondisk::gtid_set::{GtidSet, SeriesGtid};
use crate::engine::mysql::ondisk::transaction::{LogState, TransactionId};
use crate::engine::mysql::programs::Version;
use crate::engine::mysql::session::quoted;
use crate::error::{Error, Kind, Result};
use crate::model::engine_kind::EngineKind;

/// A database product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    MariaDb,
    MySql,
}

/// The statements and columns of a server that applies relay logs.
pub struct ApplierWords {
    pub start: &'static str,
    pub stop: &'static str,
    /// Removes the configuration of a replication and its relay logs.
    pub forget: &'static str,
    pub status: &'static str,
    /// A column of the status; `Yes` while it applies.
    pub running: &'static str,
    /// Which transactions the server has.
    pub state: &'static str,
    /// The options that the server is started with for a batch, with `{}` for the number of workers.
    pub workers_option: &'static str,
}

const MARIADB_APPLIER: ApplierWords = ApplierWords {
    start: "START SLAVE SQL_THREAD",
    stop: "STOP SLAVE SQL_THREAD",
    forget: "RESET SLAVE ALL",
    status: "SHOW SLAVE STATUS",
    running: "Slave_SQL_Running",
    state: "SELECT @@GLOBAL.gtid_slave_pos",
    workers_option: "--slave-parallel-threads=",
};

const MYSQL_APPLIER: ApplierWords = ApplierWords {
    start: "START REPLICA SQL_THREAD",
    stop: "STOP REPLICA SQL_THREAD",
    forget: "RESET REPLICA ALL",
    status: "SHOW REPLICA STATUS",
    running: "Replica_SQL_Running",
    state: "SELECT @@GLOBAL.gtid_executed",
    workers_option: "--replica-parallel-workers=",
};

impl Product {
    pub fn kind(self) -> EngineKind {
        match self {
            Product::MariaDb => EngineKind::MariaDb,
            Product::MySql => EngineKind::MySql,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Product::MariaDb => "MariaDB",
            Product::MySql => "MySQL",
        }
    }

    /// Whose server or program calls itself like this.
    pub fn of_text(text: &str) -> Product {
        if text.contains("MariaDB") { Product::MariaDb } else { Product::MySql }
    }

    /// `10.11.19` out of `10.11.19-MariaDB-0+deb12u1-log`, `8.4.3` out of `8.4.3-0ubuntu1`; nothing if it is not this
    /// product.
    pub fn version_in(self, server_text: &str) -> Option<&str> {
        let is_number = |character: char| character.is_ascii_digit() || character == '.';
        let end = server_text.find(|character| !is_number(character)).unwrap_or(server_text.len());
        let is_ours = match self {
            Product::MariaDb => server_text[end..].starts_with("-MariaDB"),
            Product::MySql => Product::of_text(server_text) == Product::MySql,
        };
        Some(&server_text[..end]).filter(|version| is_ours && Version::find(version).is_some())
    }

    /// Names of the server's program, the usual one first.
    pub fn server_programs(self) -> &'static [&'static str] {
        match self {
            Product::MariaDb => &["mariadbd", "mysqld"],
            Product::MySql => &["mysqld"],
        }
    }

    /// The group of an option file that only this product's server reads.
    pub fn option_group(self) -> &'static str {
        match self {
            Product::MariaDb => "mariadbd",
            Product::MySql => "mysqld",
        }
    }

    /// The entry of a data directory without which no server gets up: the system tables (MariaDB: `sql/sql_acl.cc`,
    /// acl_init), the data dictionary (MySQL manual, "Data Dictionary Schema").
    pub fn last_entry(self) -> &'static str {
        match self {
            Product::MariaDb => "mysql",
            Product::MySql => "mysql.ibd",
        }
    }

    /// Reads the name of one transaction as a person types it.
    pub fn parse_id(self, text: &str) -> Result<TransactionId> {
        match self {
            Product::MariaDb => Gtid::parse(text).map(TransactionId::MariaDb),
            Product::MySql => SeriesGtid::parse(text).map(TransactionId::MySql),
        }
    }

    /// Reads a state as the server prints it.
    pub fn parse_state(self, text: &str) -> Result<LogState> {
        match self {
            Product::MariaDb => GtidState::parse(text).map(LogState::MariaDb),
            Product::MySql => GtidSet::parse(text).map(LogState::MySql),
        }
    }

    /// Prints where the log ends, in the columns `File` and `Position`. MySQL 8.2 has a new name for it, and 8.4 forgot the
    /// old one.
    pub fn log_end(self, server_text: &str) -> &'static str {
        let new = Version { major: 8, minor: 2, patch: 0 };
        match self {
            Product::MySql if Version::find(server_text).is_none_or(|version| version >= new) => {
                "SHOW BINARY LOG STATUS"
            }
            Product::MySql | Product::MariaDb => "SHOW MASTER STATUS",
        }
    }

    /// The right that it takes.
    pub fn log_end_right(self) -> &'static str {
        match self {
            Product::MariaDb => "BINLOG MONITOR",
            Product::MySql => "REPLICATION CLIENT",
        }
    }

    pub fn applier(self) -> &'static ApplierWords {
        match self {
            Product::MariaDb => &MARIADB_APPLIER,
            Product::MySql => &MYSQL_APPLIER,
        }
    }

    /// The statement after which the applier begins at a place of a relay log, which is a copy of a place in the source's
    /// log. The name in the source's log must be there
    /// too: MariaDB 10.11 crashes where its workers compare it with an empty one (`sql/rpl_rli.cc`,
    /// inc_group_relay_log_pos). The source has a name that no server can have (RFC 6761).
    pub fn apply_from(self, source: (&str, u64), relay: (&str, u64)) -> String {
        let (source_file, relay_file) = (quoted(source.0), quoted(relay.0));
        let (source_offset, relay_offset) = (source.1, relay.1);
        match self {
            Product::MariaDb => format!(
                "CHANGE MASTER TO MASTER_HOST = 'keiki.invalid', MASTER_USER = 'nobody', MASTER_USE_GTID = no, \
                 MASTER_LOG_FILE = {source_file}, MASTER_LOG_POS = {source_offset}, RELAY_LOG_FILE = {relay_file}, \
                 RELAY_LOG_POS = {relay_offset}"
            ),
            Product::MySql => format!(
                "CHANGE REPLICATION SOURCE TO SOURCE_HOST = 'keiki.invalid', SOURCE_USER = 'nobody', \
                 SOURCE_AUTO_POSITION = 0, SOURCE_LOG_FILE = {source_file}, SOURCE_LOG_POS = {source_offset}, \
                 RELAY_LOG_FILE = {relay_file}, RELAY_LOG_POS = {relay_offset}"
            ),
        }
    }

    /// Which tables a backup has without their rows, for messages.
    pub fn comes_empty(self) -> &'static str {
        match self {
            Product::MariaDb => "tables of the engine MEMORY come without rows",
            Product::MySql => "tables that are not InnoDB come without rows",
        }
    }

    /// The product that an engine of this kind is. `Internal` for other kinds.
    pub fn of_kind(kind: EngineKind) -> Result<Product> {
        match kind {
            EngineKind::MariaDb => Ok(Product::MariaDb),
            EngineKind::MySql => Ok(Product::MySql),
            EngineKind::Postgres | EngineKind::Redis | EngineKind::Valkey | EngineKind::Fake => {
                Err(Error::new(Kind::Internal, format!("'{}' has no binary log", kind.name())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_products_are_told_apart_by_how_their_servers_call_themselves() {
        for (text, maria, mysql) in [
            ("10.11.19-MariaDB-0+deb12u1-log", Some("10.11.19"), None),
            ("11.8.3-MariaDB", Some("11.8.3"), None),
            ("9.7.4-2", None, Some("9.7.4")),
            ("8.0.44-0ubuntu0.22.04.1", None, Some("8.0.44")),
            ("8.4.3-Percona", None, Some("8.4.3")),
            ("9.7.0", None, Some("9.7.0")),
            ("", None, None),
            ("x", None, None),
        ] {
            assert_eq!((Product::MariaDb.version_in(text), Product::MySql.version_in(text)), (maria, mysql), "{text}");
        }
    }

    #[test]
    fn the_end_of_the_log_is_asked_for_in_the_words_of_the_version() {
        assert_eq!(Product::MySql.log_end("8.0.44"), "SHOW MASTER STATUS");
        assert_eq!(Product::MySql.log_end("9.7.4-2"), "SHOW BINARY LOG STATUS");
        assert_eq!(Product::MariaDb.log_end("11.8.3-MariaDB"), "SHOW MASTER STATUS");
    }
}
