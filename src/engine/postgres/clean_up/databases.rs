//! The part of the clean-up that must be done in each database.

use crate::engine::CleanUpItem;
use crate::engine::postgres::clone::Grounds;
use crate::engine::postgres::session::{Session, column};
use crate::engine::postgres::settings::is_scheduler;
use crate::error::{Context, Result};

/// Looks into every database that lets anybody in.
pub async fn clean_up(grounds: &Grounds, session: &Session) -> Result<Vec<CleanUpItem>> {
    let mut items = Vec::new();
    let databases = session.rows("SELECT datname::text, datallowconn FROM pg_database ORDER BY 1", &[]).await?;
    for row in databases {
        let (name, is_open): (String, bool) = (column(&row, 0)?, column(&row, 1)?);
        if !is_open {
            items.extend(report_closed(session, &name).await?);
            continue;
        }
        let of_database = in_database(grounds, &name).await;
        items.extend(of_database.context(|| format!("cannot clean up database '{name}'"))?);
    }
    items.extend(report_collations(session).await?);
    Ok(items)
}

async fn in_database(grounds: &Grounds, name: &str) -> Result<Vec<CleanUpItem>> {
    let session = grounds.try_connect_to(&[name]).await?;
    session.execute_batch("SET default_transaction_read_only = off").await?;
    let mut items = disable_subscriptions(&session, name).await?;
    items.extend(report_foreign_servers(&session, name).await?);
    items.extend(report_extensions(&session, name).await?);
    items.extend(report_collation_objects(&session, name).await?);
    Ok(items)
}

/// Collations of which columns or indexes make use by name, as against the database's own.
async fn report_collation_objects(session: &Session, database: &str) -> Result<Vec<CleanUpItem>> {
    let sql = "SELECT count(*), coalesce(min(quote_ident(collname)), '') FROM pg_collation \
               WHERE collversion <> pg_collation_actual_version(oid) AND collprovider <> 'd' \
               AND (EXISTS (SELECT FROM pg_attribute a WHERE a.attcollation = pg_collation.oid AND a.attrelid >= 16384))";
    let row = session.row(sql, &[]).await?;
    let (count, first): (i64, String) = (column(&row, 0)?, column(&row, 1)?);
    Ok(match count {
        0 => Vec::new(),
        count => vec![CleanUpItem {
            what: format!("{count} collations in database '{database}', {first} among them"),
            done: String::from(
                "made with another version than this host has: REINDEX the indexes that use them, then ALTER COLLATION \
                 ... REFRESH VERSION",
            ),
        }],
    })
}

/// A closed database cannot be looked into; only a subscription in it would matter, and those are listed globally.
async fn report_closed(session: &Session, name: &str) -> Result<Vec<CleanUpItem>> {
    let sql = "SELECT count(*) FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid WHERE d.datname = $1::text::name";
    let count: i64 = session.value(sql, &[&name]).await?;
    Ok(match count {
        0 => Vec::new(),
        count => vec![CleanUpItem {
            what: format!("{count} subscriptions in database '{name}'"),
            done: String::from(
                "NOT disabled: the database allows no connections; open it and disable them before accept",
            ),
        }],
    })
}

/// A subscription of a copy would take the changes that the source's own is waiting for
/// (neondatabase/neon#8790). It is disabled and cut off from the publisher's slot, so that dropping it later does not
/// drop the slot of the source.
async fn disable_subscriptions(session: &Session, database: &str) -> Result<Vec<CleanUpItem>> {
    let sql = "SELECT quote_ident(s.subname), s.subname::text, s.subenabled, s.subslotname::text, s.subconninfo \
               FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid \
               WHERE d.datname = current_database() AND (s.subenabled OR s.subslotname IS NOT NULL) ORDER BY 2";
    let mut items = Vec::new();
    for row in session.rows(sql, &[]).await? {
        let quoted: String = column(&row, 0)?;
        let name: String = column(&row, 1)?;
        let was_enabled: bool = column(&row, 2)?;
        let slot: Option<String> = column(&row, 3)?;
        let publisher = without_secrets(&column::<String>(&row, 4)?);
        if was_enabled {
            session.execute_batch(&format!("ALTER SUBSCRIPTION {quoted} DISABLE")).await?;
        }
        session.execute_batch(&format!("ALTER SUBSCRIPTION {quoted} SET (slot_name = NONE)")).await?;
        let slot = slot.map_or(String::new(), |slot| format!(" and cut off from slot '{slot}' of the publisher"));
        items.push(CleanUpItem {
            what: format!("subscription '{name}' in database '{database}' to '{publisher}'"),
            done: format!("{}{slot}", if was_enabled { "disabled" } else { "was disabled" }),
        });
    }
    Ok(items)
}

/// Where a connection string leads, without who goes there.
fn without_secrets(conninfo: &str) -> String {
    let wanted = ["host=", "hostaddr=", "port=", "dbname="];
    let words: Vec<&str> =
        conninfo.split_whitespace().filter(|word| wanted.iter().any(|prefix| word.starts_with(prefix))).collect();
    if words.is_empty() { String::from("...") } else { words.join(" ") }
}

async fn report_foreign_servers(session: &Session, database: &str) -> Result<Vec<CleanUpItem>> {
    let sql = "SELECT s.srvname::text, w.fdwname::text, \
               coalesce((SELECT string_agg(option, ' ') FROM unnest(s.srvoptions) option \
                         WHERE option ~ '^(host|hostaddr|port|dbname|dbserver|servername|address)='), ''), \
               (SELECT count(*) FROM pg_user_mapping m WHERE m.umserver = s.oid) \
               FROM pg_foreign_server s JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw ORDER BY 1";
    let rows = session.rows(sql, &[]).await?;
    rows.iter()
        .map(|row| {
            let (name, wrapper): (String, String) = (column(row, 0)?, column(row, 1)?);
            let (leads_to, users): (String, i64) = (column(row, 2)?, column(row, 3)?);
            Ok(CleanUpItem {
                what: format!("foreign server '{name}' ({wrapper}) in database '{database}'"),
                done: format!(
                    "kept: it leads to '{leads_to}' with {users} user mappings; ALTER SERVER it if the clone must not go there"
                ),
            })
        })
        .collect()
}

/// Extensions that act by themselves or reach out.
async fn report_extensions(session: &Session, database: &str) -> Result<Vec<CleanUpItem>> {
    let mut items = Vec::new();
    for row in session.rows("SELECT extname::text FROM pg_extension ORDER BY 1", &[]).await? {
        let name: String = column(&row, 0)?;
        let what = format!("extension '{name}' in database '{database}'");
        if is_scheduler(&name) || name == "pgagent" || name == "pg_timetable" {
            let jobs = if name == "pg_cron" { count_of(session, "cron.job").await } else { None };
            let jobs = jobs.map_or(String::from("its jobs"), |count| format!("its {count} jobs"));
            items.push(CleanUpItem {
                what,
                done: format!("does not run in quarantine; {jobs} run again when the clone is accepted"),
            });
        } else if name == "dblink" {
            items.push(CleanUpItem {
                what,
                done: String::from("kept: functions that use it reach the same servers as on the source"),
            });
        }
    }
    Ok(items)
}

/// The rows of a table of an extension; nothing if it is not what it usually is.
async fn count_of(session: &Session, table: &str) -> Option<i64> {
    session.value(&format!("SELECT count(*) FROM {table}"), &[]).await.ok()
}

/// Another version of the C library or of ICU sorts differently: indexes on text then miss rows that are there. The
/// order matters: REFRESH before REINDEX hides the warning and leaves the indexes wrong.
async fn report_collations(session: &Session) -> Result<Vec<CleanUpItem>> {
    if session.major_number() < 15 {
        return Ok(Vec::new());
    }
    let sql = "SELECT datname::text, quote_ident(datname), datcollversion, pg_database_collation_actual_version(oid) \
               FROM pg_database WHERE datallowconn \
               AND datcollversion IS DISTINCT FROM pg_database_collation_actual_version(oid) \
               AND datcollversion IS NOT NULL ORDER BY 1";
    let mut items = Vec::new();
    for row in session.rows(sql, &[]).await? {
        let (name, quoted): (String, String) = (column(&row, 0)?, column(&row, 1)?);
        let (recorded, actual): (Option<String>, Option<String>) = (column(&row, 2)?, column(&row, 3)?);
        let versions = (recorded.unwrap_or_default(), actual.unwrap_or_default());
        items.push(CleanUpItem {
            what: format!("collation of database '{name}'"),
            done: format!(
                "made with version {}, this host has {}: in it REINDEX DATABASE {quoted}, then ALTER DATABASE {quoted} \
                 REFRESH COLLATION VERSION",
                versions.0, versions.1
            ),
        });
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publisher_is_named_without_its_password() {
        let text = "host=db1 port=5432 dbname=shop user=repl password='a b'";
        assert_eq!(without_secrets(text), "host=db1 port=5432 dbname=shop");
        assert_eq!(without_secrets("postgresql://repl:secret@db1/shop"), "...");
    }
}
