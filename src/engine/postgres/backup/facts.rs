//! What a restore must know again and the files do not say: settings, versions, tablespaces, extensions.
//!
//! Keys and values are part of the repository's contents, so a key once given is never used for anything else:
//!
//! | key | value |
//! |---|---|
//! | `version_num`, `version` | `150018`, `15.18` |
//! | `system_id` | decimal |
//! | `bootstrap_superuser` | the role that initdb made, which is always a superuser: a clone is asked as this role |
//! | `timeline` | of the start, decimal |
//! | `block_size`, `wal_block_size`, `wal_segment_size` | bytes |
//! | `relation_segment_blocks` | blocks in a full file of a large relation |
//! | `data_checksums` | `on` or `off` |
//! | `data_directory`, `config_file`, `hba_file`, `ident_file` | paths on the source |
//! | `setting.NAME` | as `current_setting` shows it: each setting that is not at its default, and always those that recovery insists on |
//! | `setting_file.NAME` | the file it was set in |
//! | `tablespace.OID` | the directory it points to on the source |
//! | `database.NAME` | `oid=5 bytes=7500000 collate=C ctype=C provider=c collation_version=` |
//! | `extensions.NAME` | of a database: `plpgsql 1.0, postgis 3.3.2` |
//! | `extensions_unread.NAME` | why a database could not be asked |
//! | `libraries` | what functions are loaded from, separated by commas |
//! | `collation_version.PROVIDER` | what the operating system's library says now: `c` is libc, `i` is ICU |
//! | `library.glibc`, `library.icu` | what the source sorts text with: `2.36`, and the major version `72` |
//! | `left_out.N` | files that could not be part of the backup |
//! | `config_unread.PATH` | why a configuration file could not be read |

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::engine::postgres::ondisk::control::ControlFile;
use crate::engine::postgres::session::{Session, column};
use crate::engine::postgres::source::SourceSession;
use crate::engine::postgres::{PostgresEngine, collation};
use crate::error::{Context, Result};

pub(super) type FactMap = BTreeMap<String, String>;

/// The prefix of a setting's key.
pub const SETTING_FACT_PREFIX: &str = "setting.";

/// How many databases are asked for their extensions.
const DATABASES_ASKED: usize = 100;
/// How long they may take together: a backup does not wait for a report.
const DATABASES_LIMIT: Duration = Duration::from_secs(20);

/// Settings that recovery or the restored server cannot do without, recorded even at their defaults (manual, "Hot
/// Standby": the first five stop or pause a recovery where they are smaller than they were).
const ALWAYS_RECORDED: [&str; 9] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
    "wal_level",
    "shared_preload_libraries",
    "track_commit_timestamp",
    "shared_buffers",
];

/// Collects the facts of the server.
pub(super) async fn collect(engine: &PostgresEngine, source: &SourceSession, control: &ControlFile) -> Result<FactMap> {
    let mut facts = FactMap::new();
    let mut fact = |key: &str, value: String| {
        facts.insert(key.to_string(), value);
    };
    fact("version_num", source.session.version_number().to_string());
    fact("version", source.session.version_text());
    fact("system_id", control.system_identifier.to_string());
    fact("block_size", control.block_size.to_string());
    fact("wal_block_size", control.wal_block_size.to_string());
    fact("wal_segment_size", control.wal_segment_size.bytes().to_string());
    fact("relation_segment_blocks", control.relation_segment_blocks.to_string());
    fact("data_checksums", String::from(if control.has_data_checksums() { "on" } else { "off" }));
    // BOOTSTRAP_SUPERUSERID, `src/include/catalog/pg_authid.dat`.
    fact("bootstrap_superuser", source.session.value("SELECT rolname::text FROM pg_roles WHERE oid = 10", &[]).await?);
    let what = || "cannot record the settings of the server";
    settings(&source.session, &mut facts).await.context(what)?;
    databases(engine, source, &mut facts).await.context(what)?;
    if let Some(version) = collation::glibc_version().await {
        facts.insert(String::from(collation::GLIBC_FACT), version);
    }
    if let Some(program) = collation::running_program(&engine.source.data_dir)
        && let Some(version) = collation::icu_version_of(&program).await
    {
        facts.insert(String::from(collation::ICU_FACT), version);
    }
    Ok(facts)
}

async fn settings(session: &Session, facts: &mut FactMap) -> Result<()> {
    // What our own session has set hides the server's value, which is then the one that RESET returns to. Settings
    // of roles and databases lie in the catalogue and so in the backup itself.
    let sql = "SELECT name, CASE source WHEN 'session' THEN reset_val ELSE current_setting(name, true) END, sourcefile \
         FROM pg_settings WHERE name = ANY($1) OR (context <> 'internal' AND CASE \
           WHEN source = 'session' THEN reset_val IS DISTINCT FROM boot_val \
           ELSE source IN ('configuration file', 'command line', 'environment variable', 'global') END)";
    let always: Vec<String> = ALWAYS_RECORDED.iter().map(|name| name.to_string()).collect();
    for row in session.rows(sql, &[&always]).await? {
        let name: String = column(&row, 0)?;
        if let Some(file) = column::<Option<String>>(&row, 2)? {
            facts.insert(format!("setting_file.{name}"), file);
        }
        let value = column::<Option<String>>(&row, 1)?.unwrap_or_default();
        facts.insert(format!("{SETTING_FACT_PREFIX}{name}"), value);
    }
    for name in ["data_directory", "config_file", "hba_file", "ident_file"] {
        let value: Option<String> = session.value("SELECT current_setting($1, true)", &[&name]).await?;
        facts.insert(name.to_string(), value.unwrap_or_default());
    }
    Ok(())
}

async fn databases(engine: &PostgresEngine, source: &SourceSession, facts: &mut FactMap) -> Result<()> {
    let session = &source.session;
    for row in session.rows("SELECT oid::text, pg_tablespace_location(oid) FROM pg_tablespace", &[]).await? {
        let path: String = column(&row, 1)?;
        if !path.is_empty() {
            facts.insert(format!("tablespace.{}", column::<String>(&row, 0)?), path);
        }
    }
    // The columns came in 15; asking the row as JSON works on all versions.
    let sql = "SELECT datname::text, datallowconn, concat_ws(' ', 'oid=' || oid, 'bytes=' || pg_database_size(oid), \
             'collate=' || datcollate, 'ctype=' || datctype, \
             'provider=' || coalesce(to_jsonb(d) ->> 'datlocprovider', 'c'), \
             'collation_version=' || coalesce(to_jsonb(d) ->> 'datcollversion', '')) \
         FROM pg_database AS d ORDER BY oid";
    let mut names = Vec::new();
    for row in session.rows_within(Duration::from_secs(300), sql, &[]).await? {
        let name: String = column(&row, 0)?;
        facts.insert(format!("database.{name}"), column(&row, 2)?);
        if column(&row, 1)? {
            names.push(name);
        }
    }
    let sql = "SELECT DISTINCT ON (collprovider) collprovider::text, \
         coalesce(pg_collation_actual_version(oid), '') FROM pg_collation \
         WHERE collprovider IN ('c', 'i') AND pg_collation_actual_version(oid) IS NOT NULL ORDER BY collprovider, oid";
    for row in session.rows(sql, &[]).await? {
        facts.insert(format!("collation_version.{}", column::<String>(&row, 0)?), column(&row, 1)?);
    }
    extensions(engine, &names, facts).await;
    Ok(())
}

/// Asks each database for its extensions. A database that does not let us in is noted: a backup does not fail for it.
async fn extensions(engine: &PostgresEngine, names: &[String], facts: &mut FactMap) {
    let start = std::time::Instant::now();
    let mut libraries = BTreeSet::new();
    for (index, name) in names.iter().enumerate() {
        let outcome = if index >= DATABASES_ASKED || start.elapsed() > DATABASES_LIMIT {
            Err(String::from("there are too many databases to ask them all"))
        } else {
            extensions_of(engine, name, &mut libraries).await.map_err(|error| error.to_string())
        };
        match outcome {
            Ok(list) => facts.insert(format!("extensions.{name}"), list),
            Err(why) => facts.insert(format!("extensions_unread.{name}"), why),
        };
    }
    facts.insert(String::from("libraries"), libraries.into_iter().collect::<Vec<_>>().join(","));
}

async fn extensions_of(engine: &PostgresEngine, database: &str, libraries: &mut BTreeSet<String>) -> Result<String> {
    let session = Session::open(&engine.source.endpoint(database)).await?;
    // What initdb made beside extensions, such as conversions of encodings, comes with every server.
    let sql = "SELECT DISTINCT probin FROM pg_proc AS p WHERE probin IS NOT NULL AND (oid >= 16384 OR EXISTS \
         (SELECT FROM pg_depend WHERE classid = 'pg_proc'::regclass AND objid = p.oid AND deptype = 'e'))";
    for row in session.rows(sql, &[]).await? {
        // In the catalogue these are bytes of no encoding (`src/include/catalog/pg_proc.h`), shown as text.
        libraries.insert(column::<String>(&row, 0)?);
    }
    session
        .value(
            "SELECT coalesce(string_agg(extname || ' ' || extversion, ', ' ORDER BY extname), '') FROM pg_extension",
            &[],
        )
        .await
}
