//! Where the files of a backup go in a clone, and what makes a restored directory ready for replay.
//!
//! Tablespaces come to lie inside the data directory, in `keiki_tablespaces/<oid>`, and the links in `pg_tblspc` point
//! there: a source's absolute path means nothing on another host, and on the source's own host it is the source's.
//! The server only warns about such a place when a tablespace is created, and `pg_basebackup` knows to copy it once.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::base::durable::{fsync_dir, parent_of, remove_file_durable};
use crate::base::ownership::{give_to, write_owned};
use crate::base::users::User;
use crate::engine::CloneSite;
use crate::engine::postgres::ondisk::tablespace_map;
use crate::engine::postgres::recovery;
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::{FileKind, FileMeta};

/// In the data directory: the tablespaces of a clone, by their number.
pub const TABLESPACES_DIR: &str = "keiki_tablespaces";
const LINKS_DIR: &str = "pg_tblspc";

/// Directories that a server expects and that a backup may leave out because they were empty or are not copied
/// (`src/backend/backup/basebackup.c`, excludeDirContents; initdb.c, subdirs).
const EXPECTED_DIRS: [&str; 16] = [
    "pg_wal",
    "pg_wal/archive_status",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_logical/mappings",
    "pg_logical/snapshots",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_twophase",
];

/// Files of the source's running server or of its own recovery that mean something else in a copy.
const LEFT_OUT: [&str; 8] = [
    "postmaster.pid",
    "postmaster.opts",
    "recovery.signal",
    "standby.signal",
    "promote",
    "current_logfiles",
    "postgresql.auto.conf.tmp",
    "logrotate",
];

/// Directories of which nothing is kept: slots hold log back for ever, the rest belongs to running processes.
const EMPTIED_DIRS: [&str; 7] =
    ["pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans"];

/// What becomes of a file of a backup. See `CloneEngine::place`.
pub fn place(meta: &FileMeta) -> Result<Option<FileMeta>> {
    let path = meta.path.as_str();
    let (top, below) = path.split_once('/').unwrap_or((path, ""));
    let is_left_out = LEFT_OUT.contains(&path)
        || (EMPTIED_DIRS.contains(&top) && !below.is_empty())
        // The tablespaces of a source that is a clone itself: their content comes by way of the links.
        || top == TABLESPACES_DIR
        || path.rsplit('/').next().is_some_and(|name| name.starts_with("pg_internal.init"));
    if is_left_out {
        return Ok(None);
    }
    let FileKind::Link { .. } = meta.kind else { return Ok(Some(meta.clone())) };
    let directory = FileMeta { path: meta.path.clone(), kind: FileKind::Directory, mode: 0o700 };
    let is_tablespace = top == LINKS_DIR && is_oid(below);
    if is_tablespace || path == "pg_wal" || EMPTIED_DIRS.contains(&path) {
        // A tablespace is restored in its place in `pg_tblspc` and moved out of it by `prepare`.
        return Ok(Some(directory));
    }
    let holds_data = ["base", "global", "pg_xact", "pg_multixact", LINKS_DIR].contains(&top);
    if holds_data {
        return Err(Error::new(Kind::Unsupported, format!("'{path}' of the backup is a link, and data lie behind it"))
            .hint("keiki copies links of tablespaces and of pg_wal; move the data back into the data directory"));
    }
    // Anything else points out of the data directory, into what belongs to the source or its host.
    Ok(None)
}

fn is_oid(text: &str) -> bool {
    !text.is_empty() && text.len() <= 10 && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Makes a restored directory ready for replay. Blocking; may be repeated after a crash at any point.
pub fn prepare(site: &CloneSite, user: &User) -> Result<()> {
    if recovery::has_begun(&site.data_dir, &site.run_dir) {
        return Ok(());
    }
    let data_dir = site.data_dir.as_path();
    if !data_dir.join(recovery::BACKUP_LABEL).is_file() {
        return Err(Error::new(Kind::Damaged, format!("'{}' has no backup_label", data_dir.display()))
            .hint("the backup is incomplete; use another one"));
    }
    recovery::forget(&site.run_dir)?;
    own_directory(user, data_dir)?;
    own_directory(user, &site.run_dir)?;
    for name in LEFT_OUT {
        remove_file_durable(&data_dir.join(name))?;
    }
    for name in EXPECTED_DIRS {
        make_directory(user, &data_dir.join(name))?;
    }
    for name in EMPTIED_DIRS {
        empty_directory(&data_dir.join(name))?;
    }
    make_tablespaces(user, data_dir)?;
    set_aside_settings(user, data_dir)?;
    write_owned(user, &data_dir.join(recovery::STANDBY_SIGNAL), b"")?;
    fsync_dir(data_dir)
}

/// The server refuses a data directory that is not its user's own or that others can enter
/// (`src/backend/utils/init/miscinit.c`, checkDataDir).
fn own_directory(user: &User, path: &Path) -> Result<()> {
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o700))
        .context(|| format!("cannot close '{}' to others", path.display()))?;
    give_to(user, path)
}

fn make_directory(user: &User, path: &Path) -> Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => return Ok(()),
        Ok(_) => {
            return Err(Error::new(Kind::Damaged, format!("'{}' of the clone is not a directory", path.display())));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io(format!("cannot look at '{}'", path.display()), error)),
    }
    std::fs::create_dir(path).context(|| format!("cannot create '{}'", path.display()))?;
    own_directory(user, path)?;
    fsync_dir(parent_of(path))
}

fn empty_directory(path: &Path) -> Result<()> {
    let what = || format!("cannot empty '{}'", path.display());
    for entry in std::fs::read_dir(path).context(what)? {
        let entry = entry.context(what)?;
        match entry.file_type().context(what)?.is_dir() {
            true => std::fs::remove_dir_all(entry.path()).context(what)?,
            false => std::fs::remove_file(entry.path()).context(what)?,
        }
    }
    fsync_dir(path)
}

/// Moves each restored tablespace out of `pg_tblspc` and leaves a link. Each step may have been done before.
fn make_tablespaces(user: &User, data_dir: &Path) -> Result<()> {
    let links = data_dir.join(LINKS_DIR);
    let places = data_dir.join(TABLESPACES_DIR);
    let mut oids = Vec::new();
    let what = || format!("cannot make the tablespaces of '{}'", data_dir.display());
    for directory in [&links, &places] {
        let entries = match std::fs::read_dir(directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.context(what)?,
        };
        for entry in entries {
            oids.push(entry.context(what)?.file_name().to_string_lossy().into_owned());
        }
    }
    // The server would make the links of the source anew if it found the file.
    let map = data_dir.join("tablespace_map");
    if let Ok(content) = std::fs::read(&map) {
        oids.extend(tablespace_map::parse(&content).context(what)?.iter().map(|tablespace| tablespace.oid.to_string()));
    }
    oids.retain(|oid| is_oid(oid));
    oids.sort();
    oids.dedup();
    if !oids.is_empty() {
        make_directory(user, &places)?;
    }
    for oid in oids {
        let (link, place) = (links.join(&oid), places.join(&oid));
        let is_link = std::fs::symlink_metadata(&link).is_ok_and(|metadata| metadata.is_symlink());
        if is_link {
            std::fs::remove_file(&link).context(what)?;
        } else if link.exists() {
            std::fs::rename(&link, &place).context(what)?;
        }
        make_directory(user, &place)?;
        std::os::unix::fs::symlink(&place, &link).context(what)?;
        give_to(user, &link)?;
    }
    if places.exists() {
        fsync_dir(&places)?;
    }
    fsync_dir(&links)?;
    remove_file_durable(&map)
}

/// Keeps the source's settings beside, where no server reads them. `postgresql.auto.conf` is read whatever the
/// configuration file is, so it must be empty.
fn set_aside_settings(user: &User, data_dir: &Path) -> Result<()> {
    for name in ["postgresql.conf", "postgresql.auto.conf"] {
        let (path, aside) = (data_dir.join(name), data_dir.join(format!("{name}.source")));
        if path.exists() && !aside.exists() {
            std::fs::rename(&path, &aside).context(|| format!("cannot set '{}' aside", path.display()))?;
        }
    }
    write_owned(user, &data_dir.join("postgresql.auto.conf"), b"# Emptied by keiki; see postgresql.auto.conf.source.\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> FileMeta {
        FileMeta { path: path.to_string(), kind: FileKind::Regular, mode: 0o600 }
    }

    fn link(path: &str) -> FileMeta {
        FileMeta { path: path.to_string(), kind: FileKind::Link { to: String::from("/elsewhere") }, mode: 0o777 }
    }

    #[test]
    fn no_link_of_the_source_survives_in_the_clone() {
        for path in ["pg_tblspc/16400", "pg_wal", "pg_stat_tmp"] {
            let placed = place(&link(path)).unwrap().unwrap();
            assert_eq!((placed.path.as_str(), placed.kind), (path, FileKind::Directory));
        }
        for path in ["server.crt", "log", "postgresql.conf"] {
            assert_eq!(place(&link(path)).unwrap(), None, "{path}");
        }
        for path in ["base/5", "pg_tblspc/x", "base/5/1259"] {
            assert_eq!(place(&link(path)).unwrap_err().kind(), Kind::Unsupported, "{path}");
        }
    }

    #[test]
    fn what_belongs_to_the_running_source_is_left_out() {
        for path in [
            "postmaster.pid",
            "standby.signal",
            "pg_replslot/s/state",
            "base/5/pg_internal.init",
            "promote",
            "keiki_tablespaces/1/x",
        ] {
            assert_eq!(place(&file(path)).unwrap(), None, "{path}");
        }
        for path in
            ["base/5/1259", "backup_label", "pg_replslot", "keiki_source_config/pg_hba.conf", "base/5/standby.signal"]
        {
            assert_eq!(place(&file(path)).unwrap(), Some(file(path)), "{path}");
        }
    }

    #[test]
    fn tablespaces_move_into_the_clone_however_often_it_is_prepared() {
        let directory = tempfile::tempdir().unwrap();
        let user = crate::base::users::current_user().unwrap();
        let data_dir = directory.path();
        std::fs::create_dir_all(data_dir.join("pg_tblspc/16400/PG_15_202209061/5")).unwrap();
        std::fs::write(data_dir.join("pg_tblspc/16400/PG_15_202209061/5/16401"), b"rows").unwrap();
        std::fs::write(data_dir.join("tablespace_map"), "16400 /source/a\n16500 /source/empty\n").unwrap();
        for _ in 0..2 {
            make_tablespaces(&user, data_dir).unwrap();
            let link = std::fs::read_link(data_dir.join("pg_tblspc/16400")).unwrap();
            assert_eq!(link, data_dir.join("keiki_tablespaces/16400"));
            assert_eq!(std::fs::read(data_dir.join("pg_tblspc/16400/PG_15_202209061/5/16401")).unwrap(), b"rows");
            assert!(data_dir.join("pg_tblspc/16500").is_dir());
            assert!(!data_dir.join("tablespace_map").exists());
        }
    }
}
