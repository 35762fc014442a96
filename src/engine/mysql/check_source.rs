//! What is wrong or risky with a server as a source.

use crate::engine::mysql::MySqlEngine;
use crate::engine::mysql::backup::find_tool;
use crate::engine::mysql::product::Product;
use crate::engine::mysql::session::Session;
use crate::engine::mysql::source::SourceSession;
use crate::error::Result;
use crate::model::check::CheckItem;

pub(super) mod mysql_items;

/// Log must outlive an agent that is down for a night.
const KEEP_LOG_SECONDS_MIN: u64 = 24 * 3600;

/// Schemas whose tables belong to the server.
const OWN_SCHEMAS: &str = "('mysql', 'information_schema', 'performance_schema', 'sys')";

/// See [`crate::engine::Engine::check_source`].
pub(super) async fn check_source(engine: &MySqlEngine) -> Result<Vec<CheckItem>> {
    let source = engine.open_session().await?;
    let product = engine.source.product;
    let mut items = vec![CheckItem::pass("server", format!("{} {}", product.name(), source.version))];
    items.extend(log_items(&source.session).await?);
    match product {
        Product::MariaDb => {
            items.extend(mariadb_log_items(&source.session).await?);
            items.extend(table_items(&source.session).await?);
            items.push(tool_item(engine, &source).await);
        }
        Product::MySql => {
            items.extend(mysql_items::log_items(&source.session).await?);
            items.extend(mysql_items::backup_items(engine, &source.session).await?);
        }
    }
    Ok(items)
}

/// What both products have.
async fn log_items(session: &Session) -> Result<Vec<CheckItem>> {
    let mut items = Vec::new();
    let mut setting = Settings { session };
    items.push(match setting.get("log_bin").await?.as_str() {
        "1" => CheckItem::pass("log_bin", "on"),
        _ => CheckItem::fail(
            "log_bin",
            "off: there is no log to ship",
            "set 'log_bin' in the server's configuration and restart it",
        ),
    });
    items.push(match setting.get("binlog_format").await?.as_str() {
        "ROW" => CheckItem::pass("binlog_format", "ROW"),
        "MIXED" => CheckItem::warn(
            "binlog_format",
            "MIXED: statements that the server takes for safe are replayed as statements",
            "SET GLOBAL binlog_format = 'ROW'; and in the configuration",
        ),
        value => CheckItem::warn(
            "binlog_format",
            format!("{value}: a replayed statement may do something else than it did on the source"),
            "SET GLOBAL binlog_format = 'ROW'; and in the configuration, then take a new backup",
        ),
    });
    items.push(match setting.get("sync_binlog").await?.as_str() {
        "1" => CheckItem::pass("sync_binlog", "1"),
        value => CheckItem::warn(
            "sync_binlog",
            format!("{value}: a crash of this host may lose log that was shipped already"),
            "SET GLOBAL sync_binlog = 1; and in the configuration",
        ),
    });
    Ok(items)
}

async fn mariadb_log_items(session: &Session) -> Result<Vec<CheckItem>> {
    let mut items = Vec::new();
    let mut setting = Settings { session };
    items.push(match setting.get("encrypt_binlog").await?.as_str() {
        "0" => CheckItem::pass("encrypt_binlog", "off"),
        _ => CheckItem::fail(
            "encrypt_binlog",
            "on: keiki cannot read the log",
            "set 'encrypt_binlog = OFF' and restart the server; the repository can be kept encrypted",
        ),
    });
    items.push(match setting.get("binlog_alter_two_phase").await?.as_str() {
        "1" => CheckItem::warn(
            "binlog_alter_two_phase",
            "on: a clone to a moment inside a long ALTER TABLE cannot be made",
            "SET GLOBAL binlog_alter_two_phase = OFF;",
        ),
        _ => CheckItem::pass("binlog_alter_two_phase", "off"),
    });
    let seconds = setting.get("binlog_expire_logs_seconds").await?;
    items.push(match seconds.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds < KEEP_LOG_SECONDS_MIN as f64 => CheckItem::warn(
            "binlog_expire_logs_seconds",
            format!("{seconds}: log that was not shipped in time is lost"),
            format!("SET GLOBAL binlog_expire_logs_seconds = {}; or more", 3 * KEEP_LOG_SECONDS_MIN),
        ),
        _ => CheckItem::pass("binlog_expire_logs_seconds", seconds),
    });
    let slaves = session.query("SHOW ALL SLAVES STATUS").await;
    items.push(match slaves {
        Ok(rows) if rows.rows.is_empty() => CheckItem::pass("replication", "this server is a primary"),
        Ok(_) => CheckItem::warn(
            "replication",
            "this server is a replica: its log has the times of its source's clock",
            "with log_slave_updates = ON its own log is complete; a failover begins another log",
        ),
        Err(error) => CheckItem::warn(
            "replication",
            error.message(),
            "GRANT SLAVE MONITOR ON *.* TO the account in 'user', so that this can be checked",
        ),
    });
    Ok(items)
}

struct Settings<'a> {
    session: &'a Session,
}

impl Settings<'_> {
    /// The global value; empty where this version has no such variable.
    async fn get(&mut self, name: &str) -> Result<String> {
        let sql = format!("SHOW GLOBAL VARIABLES LIKE '{name}'");
        let value = self.session.query(&sql).await?.first("Value").unwrap_or_default().to_string();
        Ok(match value.as_str() {
            "ON" => "1".to_string(),
            "OFF" => "0".to_string(),
            _ => value,
        })
    }
}

async fn table_items(session: &Session) -> Result<Vec<CheckItem>> {
    let others = session
        .query(&format!(
            "SELECT ENGINE, COUNT(*) FROM information_schema.TABLES WHERE TABLE_TYPE = 'BASE TABLE' AND ENGINE <> \
             'InnoDB' AND TABLE_SCHEMA NOT IN {OWN_SCHEMAS} GROUP BY ENGINE ORDER BY ENGINE"
        ))
        .await?;
    let found: Vec<String> =
        others.rows.iter().map(|row| row.iter().flatten().cloned().collect::<Vec<_>>().join(" ")).collect();
    Ok(vec![match found.is_empty() {
        true => CheckItem::pass("tables", "all are InnoDB"),
        false => CheckItem::warn(
            "tables",
            format!("not only InnoDB: {}", found.join(", ")),
            "they are copied while a lock is held, and are exact only at the end of a statement: \
             ALTER TABLE ... ENGINE = InnoDB where that matters",
        ),
    }])
}

async fn tool_item(engine: &MySqlEngine, source: &SourceSession) -> CheckItem {
    match find_tool(&engine.source, &source.version).await {
        Ok(tool) if tool.version.to_string() == source.version => {
            CheckItem::pass("mariadb-backup", format!("{} at '{}'", tool.version, tool.path.display()))
        }
        Ok(tool) => CheckItem::warn(
            "mariadb-backup",
            format!("{} for a server {}", tool.version, source.version),
            "install the program of the server's own version, or restart the server after an upgrade",
        ),
        Err(error) => {
            CheckItem::fail("mariadb-backup", error.message(), error.hint_text().unwrap_or("install mariadb-backup"))
        }
    }
}
