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
    let (turned_on, left) = enable_replayed_events(session, site).await?;
    if !turned_on.is_empty() {
        done(
            "events from the log",
            format!(
                "turned on: {}; a server does not keep of events that it replays which of them are disabled",
                shortened(&turned_on)
            ),
        );
    }
    if !left.is_empty() {
        done(
            "events left disabled",
            format!("their names cannot be told in their own character set: {}", shortened(&left)),
        );
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

/// Turns on the events that were made while the log was replayed, which are marked as those of a replication source.
/// Whoever alters an event becomes its definer, and his session's modes become the event's (MySQL manual, "ALTER EVENT
/// Statement"; `sql/dd/dd_event.cc`, set_event_attributes), so each is altered as if by its own definer. Returns
/// them, and those that cannot be named there. A replayed event has the same mark whether it was enabled or not
/// (`sql/event_parse_data.cc`, check_originator_id).
async fn enable_replayed_events(session: &Session, site: &CloneSite) -> Result<(Vec<String>, Vec<String>)> {
    let source = site.facts.get(fact::SERVER_ID).and_then(|id| id.parse::<u32>().ok());
    let source = source.map_or(String::new(), |id| format!(", {id}"));
    let events = session
        .query(&format!(
            "SELECT EVENT_SCHEMA, EVENT_NAME, DEFINER, SQL_MODE, TIME_ZONE, CHARACTER_SET_CLIENT, COLLATION_CONNECTION FROM \
             information_schema.EVENTS WHERE STATUS IN ('SLAVESIDE_DISABLED', 'REPLICA_SIDE_DISABLED') AND ORIGINATOR IN \
             (@@GLOBAL.server_id{source}) ORDER BY 1, 2"
        ))
        .await?;
    let (mut turned_on, mut left) = (Vec::new(), Vec::new());
    session
        .execute(
            "SET @keiki_mode = @@SESSION.sql_mode, @keiki_zone = @@SESSION.time_zone, @keiki_characters = \
             @@SESSION.character_set_client, @keiki_collation = @@SESSION.collation_connection",
        )
        .await?;
    for event in events.rows {
        let event: Vec<String> = event.into_iter().map(Option::unwrap_or_default).collect();
        let [schema, name, definer, mode, zone, characters, collation] = event.as_slice() else { continue };
        let (user, host) = definer.rsplit_once('@').unwrap_or((definer, "%"));
        let statement = format!(
            "ALTER DEFINER = {}@{} EVENT {}.{} ENABLE",
            quoted_name(user),
            quoted_name(host),
            quoted_name(schema),
            quoted_name(name)
        );
        if !statement.is_ascii() && !characters.starts_with("utf8") {
            left.push(format!("{schema}.{name}"));
            continue;
        }
        let set = format!(
            "SET SESSION sql_mode = {}, time_zone = {}, character_set_client = {}, collation_connection = {}",
            quoted(mode),
            quoted(zone),
            quoted(characters),
            quoted(collation)
        );
        session.execute(&set).await?;
        session.execute(&statement).await?;
        turned_on.push(format!("{schema}.{name}"));
    }
    session
        .execute(
            "SET SESSION sql_mode = @keiki_mode, time_zone = @keiki_zone, character_set_client = @keiki_characters, \
             collation_connection = @keiki_collation",
        )
        .await?;
    Ok((turned_on, left))
}

/// A name that stands for itself whatever the modes of the session are.
fn quoted_name(name: &str) -> String {
    format!("`{}`", name.replace('`', "``"))
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
