//! What `doctor` says about a server as a source: settings, rights, slots, room.
//!
//! keiki never changes the settings of a source. Where one is wrong, the hint holds the statements to type.

use std::path::{Path, PathBuf};

use crate::base::bulk::run_blocking;
use crate::base::durable::free_bytes;
use crate::engine::postgres::session::{Session, column};
use crate::engine::postgres::source::SourceSession;
use crate::engine::postgres::{PostgresEngine, PostgresSource, ShipMode, backup, slot};
use crate::error::{Error, Result};
use crate::model::bytes_text::human_bytes;
use crate::model::check::CheckItem;

/// Less room than this for the log deserves a warning.
const WAL_FREE_BYTES_MIN: u64 = 1 << 30;

/// Looks at everything that can be looked at; what cannot be asked is an item of its own and not an error.
pub(super) async fn check_source(engine: &PostgresEngine) -> Result<Vec<CheckItem>> {
    let source = match engine.session().await {
        Ok(source) => source,
        Err(error) => return Ok(vec![failed("server", &error)]),
    };
    let mut items = vec![CheckItem::pass(
        "server",
        format!("PostgreSQL {} runs in '{}'", source.session.version_text(), engine.source.data_dir.display()),
    )];
    let mut add = |what: &str, outcome: Result<Vec<CheckItem>>| match outcome {
        Ok(found) => items.extend(found),
        Err(error) => items.push(failed(what, &error)),
    };
    add("settings", settings(&source.session).await);
    match engine.source.ship {
        ShipMode::ArchiveCommand => add("archiving", archiving(&source.session, &engine.source).await),
        ShipMode::Slot { limit_bytes } => {
            add("replication slot", slots(&source.session, &engine.source, limit_bytes).await);
        }
    }
    add("rights", rights(&source, &engine.source).await);
    let config = engine.source.clone();
    add("files", run_blocking("check files", move || Ok(files(&config))).await);
    Ok(items)
}

fn failed(what: &str, error: &Error) -> CheckItem {
    CheckItem::fail(what, error.message(), error.hint_text().unwrap_or("see the log of the server"))
}

/// The two statements that make the server ask the agent about each segment.
pub fn archive_statements(archive_command: &str) -> [String; 2] {
    let quoted = archive_command.replace('\'', "''");
    [String::from("ALTER SYSTEM SET archive_mode = 'on';"), format!("ALTER SYSTEM SET archive_command = '{quoted}';")]
}

async fn setting(session: &Session, name: &str) -> Result<String> {
    let value: Option<String> = session.value("SELECT current_setting($1, true)", &[&name]).await?;
    Ok(value.unwrap_or_default())
}

async fn settings(session: &Session) -> Result<Vec<CheckItem>> {
    let mut items = Vec::new();
    let wal_level = setting(session, "wal_level").await?;
    items.push(match wal_level.as_str() {
        "minimal" => CheckItem::fail(
            "wal_level",
            "'minimal': the log does not hold enough to make a copy from",
            "ALTER SYSTEM SET wal_level = 'replica'; then restart the server",
        ),
        _ => CheckItem::pass("wal_level", wal_level),
    });
    items.push(match setting(session, "full_page_writes").await?.as_str() {
        "on" => CheckItem::pass("full_page_writes", "on"),
        value => CheckItem::warn(
            "full_page_writes",
            format!("'{value}': a crash may leave torn pages that no log repairs"),
            "ALTER SYSTEM SET full_page_writes = 'on'; SELECT pg_reload_conf();",
        ),
    });
    items.push(match setting(session, "fsync").await?.as_str() {
        "on" => CheckItem::pass("fsync", "on"),
        value => CheckItem::warn(
            "fsync",
            format!("'{value}': a crash of this host may destroy the database"),
            "ALTER SYSTEM SET fsync = 'on'; SELECT pg_reload_conf();",
        ),
    });
    items.push(match setting(session, "data_checksums").await?.as_str() {
        "on" => CheckItem::pass("data checksums", "on"),
        value => CheckItem::warn(
            "data checksums",
            format!("'{value}': damaged pages of the source go into backups unseen"),
            "with the server stopped: pg_checksums --enable -D DATA_DIRECTORY",
        ),
    });
    Ok(items)
}

async fn archiving(session: &Session, config: &PostgresSource) -> Result<Vec<CheckItem>> {
    let mode = setting(session, "archive_mode").await?;
    let command = setting(session, "archive_command").await?;
    let library = setting(session, "archive_library").await?;
    let [set_mode, set_command] = archive_statements(&config.archive_command);
    let mut items = vec![match mode.as_str() {
        "off" => CheckItem::fail(
            "archive_mode",
            "'off': the server forgets log that was not shipped",
            format!(
                "{set_mode} {set_command} then restart the server; or, without a restart, set ship = \"slot\" for this \
                 instance"
            ),
        ),
        _ => CheckItem::pass("archive_mode", mode.clone()),
    }];
    items.push(if !library.is_empty() {
        CheckItem::fail(
            "archive_command",
            format!("'archive_library' is '{library}', so that archive_command is not used"),
            format!(
                "ALTER SYSTEM SET archive_library = ''; {set_command} SELECT pg_reload_conf(); or set ship = \"slot\""
            ),
        )
    } else if command == config.archive_command {
        CheckItem::pass("archive_command", command)
    // With archiving off the server shows the command as '(disabled)'.
    } else if mode == "off" || command.is_empty() {
        CheckItem::fail("archive_command", "not set", format!("{set_command} SELECT pg_reload_conf();"))
    } else {
        CheckItem::fail(
            "archive_command",
            format!("'{command}', wanted '{}'", config.archive_command),
            format!("{set_command} SELECT pg_reload_conf(); or keep it and set ship = \"slot\" for this instance"),
        )
    });
    let program = config.archive_command.split_whitespace().next().map(PathBuf::from).unwrap_or_default();
    if program.is_absolute() && !program.exists() {
        // PostgreSQL counts a shell's "not found" (127) not as a failed command but restarts its archiver.
        items.push(CheckItem::fail(
            "program of archive_command",
            format!("'{}' does not exist", program.display()),
            "install keiki there, or correct the path",
        ));
    }
    if mode != "off" {
        items.push(archiver(session).await?);
    }
    Ok(items)
}

async fn archiver(session: &Session) -> Result<CheckItem> {
    let row = session
        .row(
            "SELECT failed_count, coalesce(last_failed_wal, ''), \
             coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false), \
             coalesce(last_archived_wal, 'nothing') FROM pg_stat_archiver",
            &[],
        )
        .await?;
    let (failures, file): (i64, String) = (column(&row, 0)?, column(&row, 1)?);
    let found =
        format!("{failures} failures since the statistics began, archived last: {}", column::<String>(&row, 3)?);
    Ok(match column::<bool>(&row, 2)? {
        true => CheckItem::warn(
            "archiver",
            format!("{found}; the last attempt, for '{file}', failed"),
            "is the agent running, and can it reach the repository? the server's log holds what archive_command said",
        ),
        false => CheckItem::pass("archiver", found),
    })
}

async fn slots(session: &Session, config: &PostgresSource, limit_bytes: u64) -> Result<Vec<CheckItem>> {
    let name = slot::slot_name(&config.name);
    let state = slot::look(session, &name).await?;
    let mut items = Vec::new();
    items.push(match &state {
        None => slot_room(session, &name).await?,
        Some(state) if state.wal_status == "lost" || state.restart_lsn.is_none() => CheckItem::fail(
            "replication slot",
            format!("the server gave '{name}' up: log is missing"),
            "'keiki backup create' makes what is committed from now on reachable again",
        ),
        Some(state) => {
            let found = format!(
                "'{name}' holds back {} of at most {}",
                human_bytes(state.retained_bytes),
                human_bytes(limit_bytes)
            );
            if state.retained_bytes > limit_bytes / 2 {
                CheckItem::warn("replication slot", found, "is the agent running, and can it reach the repository?")
            } else if state.active {
                CheckItem::warn("replication slot", format!("{found}; somebody else streams from it"), "stop that one")
            } else {
                CheckItem::pass("replication slot", found)
            }
        }
    });
    let server_limit: i64 = session
        .value(
            "SELECT CASE WHEN setting::int8 < 0 THEN -1 ELSE setting::int8 * 1048576 END \
             FROM pg_settings WHERE name = 'max_slot_wal_keep_size'",
            &[],
        )
        .await?;
    if let Ok(server_limit) = u64::try_from(server_limit)
        && server_limit < limit_bytes
    {
        items.push(CheckItem::warn(
            "max_slot_wal_keep_size",
            format!("{}: the server gives the slot up before its limit", human_bytes(server_limit)),
            format!("raise it, or lower the limit of the slot from {}", human_bytes(limit_bytes)),
        ));
    }
    Ok(items)
}

async fn slot_room(session: &Session, name: &str) -> Result<CheckItem> {
    let row = session
        .row(
            "SELECT current_setting('max_replication_slots')::int8, (SELECT count(*) FROM pg_replication_slots), \
             (SELECT rolsuper OR rolreplication FROM pg_roles WHERE rolname = current_user), current_user::text",
            &[],
        )
        .await?;
    let (most, used): (i64, i64) = (column(&row, 0)?, column(&row, 1)?);
    Ok(if !column::<bool>(&row, 2)? {
        CheckItem::fail(
            "replication slot",
            format!("the role may not create '{name}'"),
            format!("as a superuser: ALTER ROLE \"{}\" REPLICATION;", column::<String>(&row, 3)?),
        )
    } else if used >= most {
        CheckItem::fail(
            "replication slot",
            format!("there is no room for '{name}': {used} of {most} slots are taken"),
            format!("ALTER SYSTEM SET max_replication_slots = {}; then restart the server", most + 5),
        )
    } else {
        CheckItem::pass("replication slot", format!("'{name}' will be created; {used} of {most} slots are taken"))
    })
}

async fn rights(source: &SourceSession, config: &PostgresSource) -> Result<Vec<CheckItem>> {
    let mut missing = Vec::new();
    for function in backup::function_names(source) {
        let name = format!("pg_catalog.{function}");
        if !source.session.value::<bool>("SELECT has_function_privilege($1, 'EXECUTE')", &[&name]).await? {
            missing.push(format!("GRANT EXECUTE ON FUNCTION {name} TO \"{}\";", config.user));
        }
    }
    // Settings, statistics of the archiver and sizes of databases all come with pg_monitor.
    let monitors: bool = source.session.value("SELECT pg_has_role('pg_monitor', 'USAGE')", &[]).await?;
    if !monitors {
        missing.push(format!("GRANT pg_monitor TO \"{}\";", config.user));
    }
    Ok(vec![match missing.is_empty() {
        true => CheckItem::pass("rights", format!("role '{}' may take backups", config.user)),
        false => CheckItem::fail(
            "rights",
            format!("role '{}' may not do all that a backup needs", config.user),
            format!("as a superuser: {}", missing.join(" ")),
        ),
    }])
}

/// What the agent itself must be able to do with the files. Blocking.
fn files(config: &PostgresSource) -> Vec<CheckItem> {
    let mut items = Vec::new();
    let readable = [PathBuf::from("global/pg_control"), PathBuf::from("base/1/PG_VERSION"), PathBuf::from("pg_tblspc")];
    let problem = readable.iter().map(|path| config.data_dir.join(path)).find_map(|path| can_read(&path).err());
    items.push(match problem {
        None => CheckItem::pass("data directory", format!("'{}' can be read", config.data_dir.display())),
        Some(error) => CheckItem::fail(
            "data directory",
            error.message(),
            format!("run the agent as root or as user '{}'", config.run_as),
        ),
    });
    items.push(match free_bytes(&config.wal_dir()) {
        Ok(free) if free < WAL_FREE_BYTES_MIN => CheckItem::warn(
            "room for log",
            format!("{} free", human_bytes(free)),
            "while the repository cannot be reached the server keeps its log: give pg_wal more room",
        ),
        Ok(free) => CheckItem::pass("room for log", format!("{} free", human_bytes(free))),
        Err(error) => failed("room for log", &error),
    });
    items
}

fn can_read(path: &Path) -> Result<()> {
    use crate::error::Context;
    let what = || format!("cannot read '{}'", path.display());
    if path.is_dir() {
        std::fs::read_dir(path).context(what).map(|_| ())
    } else {
        std::fs::File::open(path).context(what).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_statements_quote_what_they_must() {
        let [mode, command] = archive_statements("/opt/it's/keiki wal-push %p");
        assert_eq!(mode, "ALTER SYSTEM SET archive_mode = 'on';");
        assert_eq!(command, "ALTER SYSTEM SET archive_command = '/opt/it''s/keiki wal-push %p';");
    }
}
