//! Configuration that lies outside the data directory, as on Debian: it is part of the backup.
//!
//! Each file goes in under `keiki_source_config/` and its path on the source. A clone is not configured by these
//! files; they are there for the person who needs to know how the source was.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::engine::BaseLane;
use crate::engine::postgres::backup::facts::FactMap;
use crate::engine::postgres::session::{Session, column};
use crate::error::{Context, Result};
use crate::model::backup::{FileKind, FileMeta};

/// The directory in the backup.
pub const CONFIG_DIRECTORY: &str = "keiki_source_config";

/// Rules could be included from other files, and name theirs, since PostgreSQL 16 (release notes of 16, E.*.3.1.8).
const RULES_NAME_FILES_SINCE: u32 = 16;

/// A file of settings or rules has never been longer; what is longer is something else.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// The configuration files that the server names and that lie outside its data directory.
pub(super) async fn outside_files(session: &Session, data_dir: &Path) -> Result<Vec<PathBuf>> {
    let mut names: BTreeSet<String> = BTreeSet::new();
    let sql = "SELECT sourcefile FROM pg_settings WHERE sourcefile IS NOT NULL UNION \
         SELECT setting FROM pg_settings WHERE name IN ('config_file', 'hba_file', 'ident_file') AND setting <> ''";
    for row in session.rows(sql, &[]).await.context(|| "cannot list the configuration files of the server")? {
        names.insert(column(&row, 0)?);
    }
    // Files whose settings are all overridden elsewhere, and included rules, for those who may ask. Nothing is tried
    // that the server would refuse: an error in its log makes somebody look for what is wrong with it.
    let mut views = vec![("pg_file_settings", "pg_show_all_file_settings()", "sourcefile")];
    if session.major_number() >= RULES_NAME_FILES_SINCE {
        views.push(("pg_hba_file_rules", "pg_hba_file_rules()", "file_name"));
    }
    for (view, function, file_column) in views {
        let may_ask = "SELECT has_table_privilege($1, 'SELECT') AND has_function_privilege($2, 'EXECUTE')";
        if !session.value::<bool>(may_ask, &[&view, &function]).await? {
            continue;
        }
        let sql = format!("SELECT DISTINCT {file_column} FROM {view} WHERE {file_column} IS NOT NULL");
        for row in session.rows(&sql, &[]).await? {
            names.insert(column(&row, 0)?);
        }
    }
    let inside = std::fs::canonicalize(data_dir).context(|| format!("cannot find '{}'", data_dir.display()))?;
    let is_outside = |path: &PathBuf| {
        // A link in the data directory that leads out of it counts as outside; a missing file is judged by its name.
        let place = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        path.is_absolute() && !place.starts_with(&inside) && !place.starts_with(data_dir)
    };
    Ok(names.into_iter().map(PathBuf::from).filter(is_outside).collect())
}

/// Puts the files into the backup. One that cannot be read is noted among the facts: the data matter more. Blocking.
pub(super) fn store(files: &[PathBuf], lane: &mut dyn BaseLane, facts: &mut FactMap) -> Result<()> {
    let mut directories = BTreeSet::new();
    for file in files {
        let read = std::fs::metadata(file).and_then(|metadata| match metadata.len() <= FILE_BYTES_MAX {
            true => std::fs::read(file),
            false => Err(std::io::Error::other("it is too large for a configuration file")),
        });
        let (content, path) = match (read, path_in_backup(file)) {
            (Ok(content), Some(path)) => (content, path),
            (read, _) => {
                let why = read.err().map_or_else(|| String::from("its name is not UTF-8"), |error| error.to_string());
                facts.insert(format!("config_unread.{}", file.display()), why);
                continue;
            }
        };
        for directory in parents_of(&path) {
            if directories.insert(directory.to_string()) {
                let path = directory.to_string();
                lane.begin(FileMeta { path, kind: FileKind::Directory, mode: 0o700 })?;
            }
        }
        // Whatever the modes were: the directory of a clone is its user's alone.
        lane.begin(FileMeta { path, kind: FileKind::Regular, mode: 0o600 })?;
        lane.write(&content)?;
        lane.end()?;
    }
    Ok(())
}

/// `/etc/x/y.conf` goes to `keiki_source_config/etc/x/y.conf`; `.` and `..` are taken out.
fn path_in_backup(file: &Path) -> Option<String> {
    let mut path = PathBuf::from(CONFIG_DIRECTORY);
    for component in file.components() {
        if let std::path::Component::Normal(name) = component {
            path.push(name);
        }
    }
    path.to_str().map(str::to_string)
}

/// The directories above a path, outermost first.
fn parents_of(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_keeps_its_place_and_cannot_leave_the_directory() {
        assert_eq!(path_in_backup(Path::new("/etc/p/../../x.conf")).unwrap(), "keiki_source_config/etc/p/x.conf");
        let parents: Vec<&str> = parents_of("keiki_source_config/etc/p/x.conf").collect();
        assert_eq!(parents, ["keiki_source_config", "keiki_source_config/etc", "keiki_source_config/etc/p"]);
    }
}
