//! Where the files of a log lie in it: arithmetic on names, without looking at any file.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::engine::fake::geometry::FakeGeometry;
use crate::engine::mysql::geometry::BinlogGeometry;
use crate::engine::postgres::geometry::WalGeometry;
use crate::engine::redis::backup::{LOG_TIMES_FACT, LOG_TIMES_RECEIVED};
use crate::engine::redis::geometry::AofGeometry;
use crate::error::Result;
use crate::model::engine_kind::EngineKind;
use crate::model::position::Position;

/// Names and positions of the log files of one incarnation. Pure.
pub trait LogGeometry: Send + Sync {
    /// The position of the first byte of a log file, and the position after its first `bytes`. Nothing for a companion
    /// (a timeline history), which carries no log of its own.
    fn span(&self, name: &str, bytes: u64) -> Result<Option<(Position, Position)>>;

    /// The name of the file that follows a log file in the same life.
    fn next_file(&self, name: &str) -> Result<String>;

    /// The name of the file that holds the byte before `position`: where a log that ends there ends.
    fn file_before(&self, position: Position) -> Result<String>;

    /// The position of the first byte of a log file that the server will not write to again, and the position where the
    /// log goes on behind it. Nothing for a companion.
    fn sealed_span(&self, name: &str) -> Result<Option<(Position, Position)>>;

    /// Whether bytes of an open file that were said to be durable are there for ever, also after the death of the server:
    /// so where only whole records are ever said to be.
    fn open_bytes_stay(&self) -> bool {
        true
    }
}

/// The geometry of the log that belongs to a backup, from the engine's facts in it (`Backup::engine_facts`).
pub fn log_geometry(kind: EngineKind, facts: &BTreeMap<String, String>) -> Result<Arc<dyn LogGeometry>> {
    match kind {
        EngineKind::Postgres => Ok(Arc::new(WalGeometry::from_facts(facts)?)),
        EngineKind::Redis | EngineKind::Valkey => Ok(Arc::new(AofGeometry)),
        EngineKind::Fake => Ok(Arc::new(FakeGeometry)),
        EngineKind::MariaDb | EngineKind::MySql => Ok(Arc::new(BinlogGeometry)),
    }
}

/// Whether the log that belongs to a backup with these facts tells times in whole seconds only, so that no clone shows a
/// moment between two.
pub fn log_counts_in_seconds(kind: EngineKind, facts: &BTreeMap<String, String>) -> bool {
    match kind {
        // The header of an event has its time in seconds (`Log_event::when`), and MariaDB writes no finer one.
        EngineKind::MariaDb => true,
        // Unless it is a replication stream, which the agent stamps itself.
        EngineKind::Redis | EngineKind::Valkey => {
            facts.get(LOG_TIMES_FACT).is_none_or(|times| times != LOG_TIMES_RECEIVED)
        }
        EngineKind::Postgres | EngineKind::MySql | EngineKind::Fake => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_log_of_redis_that_the_agent_stamps_itself_is_finer_than_a_second() {
        let times = |value: &str| BTreeMap::from([(LOG_TIMES_FACT.to_string(), value.to_string())]);
        for kind in [EngineKind::Redis, EngineKind::Valkey] {
            assert!(log_counts_in_seconds(kind, &times("yes")) && log_counts_in_seconds(kind, &BTreeMap::new()));
            assert!(!log_counts_in_seconds(kind, &times(LOG_TIMES_RECEIVED)));
        }
        assert!(log_counts_in_seconds(EngineKind::MariaDb, &times(LOG_TIMES_RECEIVED)));
        assert!(!log_counts_in_seconds(EngineKind::Postgres, &BTreeMap::new()));
    }
}
