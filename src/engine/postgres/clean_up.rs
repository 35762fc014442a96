//! What a copy must not keep, found and removed while it is in quarantine; and the clone's own settings.
//!
//! Removed or turned off: replication slots, subscriptions, the wish to archive the parent's log. Reported, because
//! only its owner can say: foreign servers, prepared transactions, scheduled jobs, collations that sort differently
//! here. Repeating it is harmless: what was done is not found again.

use std::path::Path;

use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_blocking;
use crate::base::child::ChildCommand;
use crate::base::durable::{fsync_dir, rename_durable, write_file_durable};
use crate::base::ownership::{give_to, write_owned};
use crate::base::users::User;
use crate::engine::postgres::backup::CONFIG_DIRECTORY;
use crate::engine::postgres::clone::Grounds;
use crate::engine::postgres::ondisk::segment::{RawSegmentName, WalFile};
use crate::engine::postgres::recovery::ensure_quarantined;
use crate::engine::postgres::session::{Session, column};
use crate::engine::postgres::settings::{ClonePlace, SettingsPlan, plan_settings};
use crate::engine::{CleanUpItem, CloneSite};
use crate::error::{Context, Error, Kind, Result};

mod databases;

/// Lets the agent in over the clone's own socket, whatever the source's rules say: first line wins.
const HBA_FIRST_LINE: &str = "# Lets keiki in over the local socket; the lines of the source follow.\n\
                              local all all peer\n";

/// Does all of it and says what was found and done.
pub async fn clean_up(grounds: &Grounds, site: &CloneSite) -> Result<Vec<CleanUpItem>> {
    let session = ensure_quarantined(grounds, site, &CancellationToken::new()).await?;
    session.execute_batch("SET default_transaction_read_only = off").await?;
    require_promoted(&session).await?;
    let mut items = drop_slots(&session).await?;
    items.extend(databases::clean_up(grounds, &session).await?);
    items.extend(report_prepared(&session).await?);
    let current: String = session.value("SELECT pg_walfile_name(pg_current_wal_lsn())", &[]).await?;
    let (user, data_dir) = (grounds.server.user.clone(), site.data_dir.clone());
    let size = grounds.control.wal_segment_size;
    items.extend(
        run_blocking("archive status", move || {
            let timeline = RawSegmentName::parse(&current)
                .map(|name| name.timeline)
                .ok_or_else(|| Error::new(Kind::Server, format!("the server says its log file is '{current}'")))?;
            settle_archive_status(&user, &data_dir, timeline, |name| WalFile::classify(name, size))
        })
        .await?,
    );
    items.extend(write_settings(grounds, site).await?);
    Ok(items)
}

async fn require_promoted(session: &Session) -> Result<()> {
    match session.value::<bool>("SELECT pg_is_in_recovery()", &[]).await? {
        false => Ok(()),
        true => Err(Error::new(Kind::Server, "the server is still in recovery")),
    }
}

/// Slots of the source came along only if the backup did not leave them out; one that stays holds log back for ever.
async fn drop_slots(session: &Session) -> Result<Vec<CleanUpItem>> {
    let mut items = Vec::new();
    for row in session.rows("SELECT slot_name::text, slot_type FROM pg_replication_slots ORDER BY 1", &[]).await? {
        let (name, kind): (String, String) = (column(&row, 0)?, column(&row, 1)?);
        session.rows("SELECT pg_drop_replication_slot($1::text::name)", &[&name]).await?;
        items.push(CleanUpItem { what: format!("{kind} replication slot '{name}'"), done: String::from("dropped") });
    }
    Ok(items)
}

async fn report_prepared(session: &Session) -> Result<Vec<CleanUpItem>> {
    let sql = "SELECT gid, database::text FROM pg_prepared_xacts ORDER BY prepared";
    let rows = session.rows(sql, &[]).await?;
    rows.iter()
        .map(|row| {
            let (gid, database): (String, String) = (column(row, 0)?, column(row, 1)?);
            Ok(CleanUpItem {
                what: format!("prepared transaction '{gid}' in database '{database}'"),
                done: String::from("kept: it holds its locks until COMMIT PREPARED or ROLLBACK PREPARED"),
            })
        })
        .collect()
}

/// The parent's log in the clone's `pg_wal` counts as archived (it is, in the parent's archive); the history of the
/// clone's own timeline does not, because the clone's archive must begin with it. The server would otherwise find the
/// former at its next checkpoint and hand it to the clone's `archive_command`
/// (`src/backend/access/transam/xlogarchive.c`, XLogArchiveCheckDone).
fn settle_archive_status(
    user: &User,
    data_dir: &Path,
    timeline: u32,
    classify: impl Fn(&str) -> Option<WalFile>,
) -> Result<Vec<CleanUpItem>> {
    let wal_dir = data_dir.join("pg_wal");
    let status_dir = wal_dir.join("archive_status");
    let what = || format!("cannot settle '{}'", status_dir.display());
    let mut settled = 0;
    for entry in std::fs::read_dir(&wal_dir).context(what)? {
        let name = entry.context(what)?.file_name().to_string_lossy().into_owned();
        let Some(file) = classify(&name) else { continue };
        let is_own = match file {
            WalFile::Segment(segment) => segment.timeline >= timeline,
            WalFile::History { timeline: of } => of >= timeline,
            WalFile::Partial(_) | WalFile::BackupHistory { .. } => false,
        };
        let (ready, done) = (status_dir.join(format!("{name}.ready")), status_dir.join(format!("{name}.done")));
        if is_own {
            if matches!(file, WalFile::History { .. }) && !done.exists() && !ready.exists() {
                std::fs::write(&ready, b"").context(what)?;
                give_to(user, &ready)?;
            }
            continue;
        }
        if !done.exists() {
            std::fs::write(&done, b"").context(what)?;
            give_to(user, &done)?;
            settled += 1;
        }
        if ready.exists() {
            std::fs::remove_file(&ready).context(what)?;
        }
    }
    fsync_dir(&status_dir)?;
    Ok(match settled {
        0 => Vec::new(),
        count => vec![CleanUpItem {
            what: String::from("log of the parent"),
            done: format!("{count} files marked as archived: the clone's archive begins with its own timeline"),
        }],
    })
}

/// Writes `postgresql.conf`, `pg_hba.conf` and `pg_ident.conf` of the clone, after the server itself has read them.
async fn write_settings(grounds: &Grounds, site: &CloneSite) -> Result<Vec<CleanUpItem>> {
    let user = grounds.server.user.clone();
    let (data_dir, owner) = (site.data_dir.clone(), user.clone());
    let exists = move |path: &Path| is_usable(&owner, &data_dir.join(path));
    let mut plan = plan_settings(
        &grounds.source,
        &ClonePlace {
            clone_name: &site.clone_name,
            major: grounds.control.major.number(),
            data_dir: &site.data_dir,
            run_dir: &site.run_dir,
            port: site.port,
            listen_addresses: &site.listen_addresses,
            archive_command: &site.archive_command,
            overrides: &site.settings,
            exists: &exists,
        },
    )?;
    copy_access_rules(&user, site, &mut plan.report).await?;
    let draft = site.run_dir.join("postgresql.conf.draft");
    let text = loop {
        let text = plan.render(&site.clone_name, &site.engine_version);
        write_owned(&user, &draft, text.as_bytes())?;
        match refused_line(grounds, &draft).await? {
            None => break text,
            Some(line) => drop_refused(&mut plan, site, &line)?,
        }
    };
    // Written anew: the run directory may be on another file system.
    write_owned(&user, &site.data_dir.join("postgresql.conf"), text.as_bytes())?;
    std::fs::remove_file(&draft).context(|| format!("cannot remove '{}'", draft.display()))?;
    Ok(plan.report)
}

/// Whether a file of a setting is there and its user may read it: a rough look at the mode, as access rules beyond it
/// are rare for keys.
fn is_usable(user: &User, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = std::fs::metadata(path) else { return false };
    let bits = match (metadata.uid() == user.uid, user.groups.contains(&metadata.gid())) {
        (true, _) => metadata.mode() >> 6,
        (false, true) => metadata.mode() >> 3,
        (false, false) => metadata.mode(),
    };
    user.uid == 0 || bits & 0o4 != 0
}

/// Lets the server's own parser look at the whole file: it prints one value and does not start. The line in which it
/// says what it refuses, or nothing.
async fn refused_line(grounds: &Grounds, conf: &Path) -> Result<Option<String>> {
    let finished = ChildCommand::new(grounds.server.programs.postgres())
        .arg("-D")
        .arg(&grounds.server.data_dir)
        .args(["-C", "port", "-c"])
        .arg(format!("config_file={}", conf.display()))
        .as_user(&grounds.server.user)
        .run(&CancellationToken::new())
        .await?;
    if finished.status.success() {
        return Ok(None);
    }
    let said = String::from_utf8_lossy(&finished.stderr);
    let line = said.lines().map(str::trim).find(|line| line.contains("LOG:") || line.contains("FATAL:"));
    Ok(Some(line.map_or_else(|| finished.ending(), |line| line.to_string())))
}

/// A setting of the source that this host's server does not take (a locale that is missing, a setting that an extension
/// brought) is left out and reported; one that was ordered is an error.
fn drop_refused(plan: &mut SettingsPlan, site: &CloneSite, line: &str) -> Result<()> {
    let name = line.split_once("parameter \"").and_then(|(_, rest)| rest.split_once('"')).map(|(name, _)| name);
    let is_ordered = |name: &str| site.settings.keys().any(|ordered| ordered.eq_ignore_ascii_case(name));
    let known = name.filter(|name| !is_ordered(name) && plan.settings.iter().any(|(other, _)| other == name));
    let Some(name) = known else {
        return Err(Error::new(Kind::BadInput, format!("PostgreSQL refuses the clone's settings: '{line}'"))
            .hint("is a '--set' of the order misspelt?"));
    };
    plan.settings.retain(|(other, _)| other != name);
    let done = format!("left out: PostgreSQL on this host refuses it: '{line}'");
    plan.report.push(CleanUpItem { what: format!("setting '{name}'"), done });
    Ok(())
}

/// Puts the source's access rules into the data directory, from wherever the source had them.
async fn copy_access_rules(user: &User, site: &CloneSite, report: &mut Vec<CleanUpItem>) -> Result<()> {
    for (name, fact) in [("pg_hba.conf", "hba_file"), ("pg_ident.conf", "ident_file")] {
        let (user, data_dir) = (user.clone(), site.data_dir.clone());
        let named = site.facts.get(fact).cloned().unwrap_or_default();
        let copy = move || copy_rules_file(&user, &data_dir, name, &named);
        report.extend(run_blocking("access rules", copy).await?);
    }
    Ok(())
}

/// `named` is the path of the file on the source, or empty.
fn copy_rules_file(user: &User, data_dir: &Path, name: &str, named: &str) -> Result<Vec<CleanUpItem>> {
    let (place, aside) = (data_dir.join(name), data_dir.join(format!("{name}.source")));
    if !aside.exists() && place.exists() {
        rename_durable(&place, &aside)?;
    }
    // Where the source had its configuration elsewhere, a file of that name in the data directory is a left-over.
    let outside = Some(data_dir.join(CONFIG_DIRECTORY).join(named.trim_start_matches('/')));
    let outside = outside.filter(|path| !named.split('/').any(|part| part == "..") && path.is_file());
    let source = outside.or_else(|| aside.exists().then_some(aside));
    let found = match &source {
        Some(path) => std::fs::read(path).context(|| format!("cannot read '{}'", path.display()))?,
        None => Vec::new(),
    };
    let mut items = Vec::new();
    let text = String::from_utf8_lossy(&found);
    let (kept, includes) = without_includes(&text);
    for include in includes {
        items.push(CleanUpItem {
            what: name.to_string(),
            done: format!("left out the line '{include}': the file that it names is not part of the clone"),
        });
    }
    let first = if name == "pg_hba.conf" { HBA_FIRST_LINE } else { "" };
    if source.is_none() && name == "pg_hba.conf" {
        items.push(CleanUpItem {
            what: name.to_string(),
            done: String::from("the backup has none: only the local user of the server may connect"),
        });
    }
    write_file_durable(&place, format!("{first}{kept}").as_bytes(), 0o600)?;
    give_to(user, &place)?;
    Ok(items)
}

/// The text without the lines that include other files (16 and later), and those lines.
fn without_includes(text: &str) -> (String, Vec<String>) {
    let is_include = |line: &&str| {
        let word = line.split_whitespace().next().unwrap_or("");
        ["include", "include_if_exists", "include_dir"].contains(&word)
    };
    let includes = text.lines().filter(is_include).map(|line| line.trim().to_string()).collect();
    let kept: String = text.lines().filter(|line| !is_include(line)).flat_map(|line| [line, "\n"]).collect();
    (kept, includes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::postgres::ondisk::segment::SegmentSize;

    #[test]
    fn only_the_clones_own_log_is_left_to_be_archived() {
        let directory = tempfile::tempdir().unwrap();
        let user = crate::base::users::current_user().unwrap();
        let status = directory.path().join("pg_wal/archive_status");
        std::fs::create_dir_all(&status).unwrap();
        for name in ["000000010000000000000005", "000000020000000000000005", "00000002.history", "xlogtemp.5"] {
            std::fs::write(directory.path().join("pg_wal").join(name), b"").unwrap();
        }
        std::fs::write(status.join("000000010000000000000005.ready"), b"").unwrap();
        let classify = |name: &str| WalFile::classify(name, SegmentSize::DEFAULT);
        for expected_items in [1, 0] {
            let items = settle_archive_status(&user, directory.path(), 2, classify).unwrap();
            assert_eq!(items.len(), expected_items);
            let mut left: Vec<_> = std::fs::read_dir(&status)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            left.sort();
            assert_eq!(left, ["000000010000000000000005.done", "00000002.history.ready"]);
        }
    }

    #[test]
    fn access_rules_come_from_where_the_source_had_them_and_name_no_foreign_files() {
        let directory = tempfile::tempdir().unwrap();
        let user = crate::base::users::current_user().unwrap();
        let outside = directory.path().join("keiki_source_config/etc/postgresql/15/main");
        std::fs::create_dir_all(&outside).unwrap();
        std::fs::write(outside.join("pg_hba.conf"), "host all all 10.0.0.0/8 scram-sha-256\ninclude_dir hba.d\n")
            .unwrap();
        std::fs::write(directory.path().join("pg_hba.conf"), "local all all trust\n").unwrap();
        for _ in 0..2 {
            let named = "/etc/postgresql/15/main/pg_hba.conf";
            let items = copy_rules_file(&user, directory.path(), "pg_hba.conf", named).unwrap();
            assert!(items[0].done.contains("include_dir hba.d"), "{items:?}");
            let text = std::fs::read_to_string(directory.path().join("pg_hba.conf")).unwrap();
            assert!(text.ends_with("local all all peer\nhost all all 10.0.0.0/8 scram-sha-256\n"), "{text}");
        }
    }
}
