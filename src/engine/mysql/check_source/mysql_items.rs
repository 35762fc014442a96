//! What is wrong or risky with a MySQL server as a source; the face file has the same for MariaDB.

use super::{KEEP_LOG_SECONDS_MIN, Settings};
use crate::engine::mysql::MySqlEngine;
use crate::engine::mysql::backup::clone_plugin::{INSTALL_PLUGIN, REFUSED, look_at_scratch, tables_left_empty};
use crate::engine::mysql::log_files::LogPlace;
use crate::engine::mysql::session::Session;
use crate::error::Result;
use crate::model::bytes_text::human_bytes;
use crate::model::check::CheckItem;

const TABLES_SHOWN: usize = 5;

/// Items about the log.
pub(super) async fn log_items(session: &Session) -> Result<Vec<CheckItem>> {
    let mut items = Vec::new();
    let mut setting = Settings { session };
    items.push(match setting.get("gtid_mode").await?.as_str() {
        // 'ON' reads as '1' and 'OFF' as '0', as of every switch.
        "1" => CheckItem::pass("gtid_mode", "ON"),
        value => CheckItem::warn(
            "gtid_mode",
            format!(
                "{}: a clone cannot be proved by the names of its transactions, nor made to one of them",
                if value == "0" { "OFF" } else { value }
            ),
            "turn it on step by step, then take a new backup: see 'Enabling GTID Transactions Online' in MySQL's manual",
        ),
    });
    items.push(match setting.get("binlog_encryption").await?.as_str() {
        "0" => CheckItem::pass("binlog_encryption", "off"),
        _ => CheckItem::fail(
            "binlog_encryption",
            "on: keiki cannot read the log",
            "SET PERSIST binlog_encryption = OFF; the repository can be kept encrypted",
        ),
    });
    items.push(match setting.get("binlog_order_commits").await?.as_str() {
        "1" => CheckItem::pass("binlog_order_commits", "on"),
        _ => CheckItem::warn(
            "binlog_order_commits",
            "off: without GTIDs a copy of the server need not be what its log has up to one place",
            "SET PERSIST binlog_order_commits = ON;",
        ),
    });
    let seconds = setting.get("binlog_expire_logs_seconds").await?;
    let expires = setting.get("binlog_expire_logs_auto_purge").await? != "0";
    items.push(match seconds.parse::<u64>() {
        Ok(number) if expires && number > 0 && number < KEEP_LOG_SECONDS_MIN => CheckItem::warn(
            "binlog_expire_logs_seconds",
            format!("{seconds}: log that was not shipped in time is lost"),
            format!("SET PERSIST binlog_expire_logs_seconds = {}; or more", 3 * KEEP_LOG_SECONDS_MIN),
        ),
        _ => CheckItem::pass("binlog_expire_logs_seconds", seconds),
    });
    items.push(match session.query("SHOW REPLICA STATUS").await {
        Ok(rows) if rows.rows.is_empty() => CheckItem::pass("replication", "this server is a primary"),
        Ok(_) => CheckItem::warn(
            "replication",
            "this server is a replica: a transaction's time is when it was committed here",
            "with log_replica_updates = ON its own log is complete; a failover begins another log",
        ),
        Err(error) => CheckItem::warn(
            "replication",
            error.message(),
            "GRANT REPLICATION CLIENT ON *.* TO the account in 'user', so that this can be checked",
        ),
    });
    Ok(items)
}

/// Items about what a backup needs and what it leaves out.
pub(super) async fn backup_items(engine: &MySqlEngine, session: &Session) -> Result<Vec<CheckItem>> {
    let sql = "SELECT PLUGIN_STATUS FROM information_schema.PLUGINS WHERE PLUGIN_NAME = 'clone'";
    let mut items = vec![match session.value(sql).await?.as_deref() {
        Some("ACTIVE") => CheckItem::pass("clone plugin", "active"),
        Some(status) => CheckItem::fail("clone plugin", status, INSTALL_PLUGIN),
        None => CheckItem::fail("clone plugin", "not installed: no backup can be taken", INSTALL_PLUGIN),
    }];
    let rights = session.query("SHOW GRANTS").await?;
    let has_right = rights.rows.iter().flatten().flatten().any(|line| line.contains("BACKUP_ADMIN"));
    items.push(match has_right {
        true => CheckItem::pass("right to copy", "BACKUP_ADMIN"),
        false => CheckItem::fail(
            "right to copy",
            "the account has no BACKUP_ADMIN",
            "GRANT SELECT, PROCESS, REPLICATION CLIENT, BACKUP_ADMIN ON *.* TO the account in 'user'",
        ),
    });
    for (sql, what, hint) in REFUSED {
        let found = match session.value(sql).await {
            Ok(found) => found,
            Err(error) => {
                items.push(CheckItem::warn(
                    "tablespaces",
                    error.message(),
                    "GRANT PROCESS ON *.* TO the account in 'user'",
                ));
                continue;
            }
        };
        items.extend(found.map(|found| CheckItem::fail("tablespaces", format!("{what}: {found}"), *hint)));
    }
    items.push(empty_tables_item(&tables_left_empty(session).await?));
    if let Ok(place) = LogPlace::ask(session).await {
        let scratch = look_at_scratch(&engine.source, &place).await?;
        let (free, needed) = (human_bytes(scratch.free_bytes), human_bytes(scratch.expected_bytes));
        let found = format!("{free} free for '{}', {needed} needed during a backup", scratch.directory.display());
        items.push(match scratch.free_bytes > scratch.expected_bytes {
            true => CheckItem::pass("space for backups", found),
            false => CheckItem::fail(
                "space for backups",
                found,
                "set 'backup_dir' of the instance to a directory with space that belongs to the server's user",
            ),
        });
    }
    Ok(items)
}

/// Which tables a backup has without their rows.
pub(in crate::engine::mysql) fn empty_tables_item(tables: &[String]) -> CheckItem {
    if tables.is_empty() {
        return CheckItem::pass("tables", "all are InnoDB");
    }
    let shown: Vec<&str> = tables.iter().take(TABLES_SHOWN).map(String::as_str).collect();
    let more = match tables.len().saturating_sub(TABLES_SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    CheckItem::warn(
        "tables",
        format!("not InnoDB, so a clone has them without their rows: {}{more}", shown.join(", ")),
        "ALTER TABLE ... ENGINE = InnoDB; on the source, then take a new backup",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::check::Verdict;

    #[test]
    fn tables_that_come_empty_are_named() {
        assert_eq!(empty_tables_item(&[]).verdict, Verdict::Pass);
        let names: Vec<String> = (0..7).map(|number| format!("shop.t{number}")).collect();
        let item = empty_tables_item(&names);
        assert_eq!(item.verdict, Verdict::Warn);
        assert!(item.found.ends_with("shop.t0, shop.t1, shop.t2, shop.t3, shop.t4 and 2 more"), "{}", item.found);
    }
}
