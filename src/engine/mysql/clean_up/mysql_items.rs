//! What a copy of a MySQL server must not keep; the face file has the same for MariaDB.

use super::{ACCOUNT_LEFT, shortened};
use crate::engine::mysql::backup::fact;
use crate::engine::mysql::clone::OPTION_FILE;
use crate::engine::mysql::session::{Session, quoted};
use crate::engine::{CleanUpItem, CloneSite};
use crate::error::Result;

/// Cleans up, with the server in quarantine. Repeating it is harmless.
pub(super) async fn clean_up(session: &Session, site: &CloneSite) -> Result<Vec<CleanUpItem>> {
    let mut items = Vec::new();
    let mut done = |what: &str, done: String| items.push(CleanUpItem { what: what.to_string(), done });
    reset_channels(session).await?;
    done(
        "replication",
        match site.facts.get(fact::CHANNELS).map(String::as_str) {
            Some("0") => "none was configured".to_string(),
            Some(count) => format!("{count} channel(s) to sources removed, with their relay logs"),
            None => "none is configured".to_string(),
        },
    );
    // Events that were made while the log was replayed are marked as those of a replication source.
    let replayed = names(
        session,
        "SELECT CONCAT('`', REPLACE(EVENT_SCHEMA, '`', '``'), '`.`', REPLACE(EVENT_NAME, '`', '``'), '`') FROM \
         information_schema.EVENTS WHERE STATUS IN ('SLAVESIDE_DISABLED', 'REPLICA_SIDE_DISABLED') AND ORIGINATOR = \
         (SELECT @@GLOBAL.server_id) ORDER BY 1",
    )
    .await?;
    let mut made = replayed;
    if let Some(source) = site.facts.get(fact::SERVER_ID).and_then(|id| id.parse::<u32>().ok()) {
        made.extend(
            names(
                session,
                &format!(
                    "SELECT CONCAT('`', REPLACE(EVENT_SCHEMA, '`', '``'), '`.`', REPLACE(EVENT_NAME, '`', '``'), '`') \
                     FROM information_schema.EVENTS WHERE STATUS IN ('SLAVESIDE_DISABLED', 'REPLICA_SIDE_DISABLED') AND \
                     ORIGINATOR = {source} ORDER BY 1"
                ),
            )
            .await?,
        );
    }
    for event in &made {
        session.execute(&format!("ALTER EVENT {event} ENABLE")).await?;
    }
    let enabled = names(
        session,
        "SELECT CONCAT(EVENT_SCHEMA, '.', EVENT_NAME) FROM information_schema.EVENTS WHERE STATUS = 'ENABLED' ORDER BY 1",
    )
    .await?;
    done(
        "events",
        match enabled.len() {
            0 => "none is enabled".to_string(),
            count => format!(
                "{count} enabled ({}) and the scheduler off: turn it on with 'SET GLOBAL event_scheduler = ON' when the \
                 clone may do their work",
                shortened(&enabled)
            ),
        },
    );
    let uuid = session.value("SELECT @@GLOBAL.server_uuid").await?.unwrap_or_default();
    let source = site.facts.get(fact::SYSTEM_ID).map_or("", String::as_str);
    done("server uuid", format!("'{uuid}', and not the source's '{source}'"));
    done("server id", format!("a new one in '{}'", site.data_dir.join(OPTION_FILE).display()));
    done("GTID", "what was replayed counts as executed and purged; the binary log of the new life begins".to_string());
    done("account of the agent", ACCOUNT_LEFT.replace("{}", &site.run_dir.display().to_string()));
    if let Some(tables) = site.facts.get(fact::EMPTY_TABLES).filter(|tables| !tables.is_empty()) {
        let tables: Vec<String> = tables.split(',').map(str::to_string).collect();
        done("tables without rows", format!("not InnoDB, so the backup has them empty: {}", shortened(&tables)));
    }
    for name in super::SHOWN {
        if let Some(value) = site.facts.get(&format!("setting.{name}")).filter(|value| !value.is_empty()) {
            done(&format!("setting '{name}'"), format!("not taken over; it was '{value}'"));
        }
    }
    let servers = names(session, "SELECT Server_name FROM mysql.servers ORDER BY 1").await?;
    if !servers.is_empty() {
        done(
            "foreign servers",
            format!("found and left: {}; tables that use them reach the source's peers", shortened(&servers)),
        );
    }
    Ok(items)
}

/// Forgets all that is replicated, and removes the relay logs.
pub(in crate::engine::mysql) async fn reset_channels(session: &Session) -> Result<()> {
    for channel in names(session, "SELECT CHANNEL_NAME FROM mysql.slave_master_info").await? {
        session.execute(&format!("STOP REPLICA FOR CHANNEL {}", quoted(&channel))).await?;
        session.execute(&format!("RESET REPLICA ALL FOR CHANNEL {}", quoted(&channel))).await?;
    }
    session.execute("STOP REPLICA").await?;
    session.execute("RESET REPLICA ALL").await
}

/// The first column of an answer.
async fn names(session: &Session, sql: &str) -> Result<Vec<String>> {
    Ok(session.query(sql).await?.rows.into_iter().filter_map(|row| row.into_iter().next().flatten()).collect())
}
