//! The database products that keiki knows by name.

use crate::error::{Error, Kind, Result};

/// A database product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EngineKind {
    Postgres,
    MariaDb,
    MySql,
    Redis,
    Valkey,
    /// The counting pretence of a database that keeps the `Engine` trait honest in tests.
    Fake,
}

impl EngineKind {
    const NAMES: &'static [(EngineKind, &'static str)] = &[
        (EngineKind::Postgres, "postgres"),
        (EngineKind::MariaDb, "mariadb"),
        (EngineKind::MySql, "mysql"),
        (EngineKind::Redis, "redis"),
        (EngineKind::Valkey, "valkey"),
        (EngineKind::Fake, "fake"),
    ];

    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|row| row.0 == self).map_or("unknown", |row| row.1)
    }

    /// Whether data may have a time at which they are gone by themselves.
    pub fn expires_keys(self) -> bool {
        matches!(self, EngineKind::Redis | EngineKind::Valkey)
    }

    /// Whether a server may forget log before it is shipped without anybody's fault, because it keeps no more of it than it
    /// needs itself.
    pub fn forgets_log_by_itself(self) -> bool {
        matches!(self, EngineKind::Redis | EngineKind::Valkey)
    }

    /// The engine with this name.
    pub fn parse(name: &str) -> Result<EngineKind> {
        Self::NAMES.iter().find(|row| row.1 == name).map(|row| row.0).ok_or_else(|| {
            Error::new(Kind::Unsupported, format!("engine '{name}' is not known"))
                .hint("this version of keiki knows 'postgres', 'mariadb', 'mysql', 'redis' and 'valkey'")
        })
    }
}
