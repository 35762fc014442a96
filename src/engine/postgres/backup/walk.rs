//! Walks a data directory as a base backup sees it, directory by directory.
//!
//! What is included follows `ondisk::relation_files`. Sizes are those at the moment of the listing: what a file grows
//! by later is in the log. Memory does not grow with the number of files; in a directory of relations the names are
//! read twice, first to learn which relations are unlogged.
//!
//! Links: those in `pg_tblspc` are recorded and followed, with the content under `pg_tblspc/<oid>`. A directory that
//! the server empties (`pg_wal`) is recorded as a directory even if it is a link here. The directory in which a clone
//! of ours keeps its tablespaces is left out: its content comes by way of the links. Other links are recorded and not
//! followed. Sockets, pipes and names that are no UTF-8 are none of the server's: they are left out and named.

use std::fs::{DirEntry, Metadata};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::engine::postgres::clone::TABLESPACES_DIR;
use crate::engine::postgres::ondisk::relation_files::{RelationDirectory, Treatment, UnloggedRelations, treatment};
use crate::engine::postgres::ondisk::versions::Major;
use crate::engine::postgres::source::CONTROL_FILE;
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::{FileKind, FileMeta};

/// What the walk came upon.
#[derive(Debug)]
pub(super) enum Found {
    /// A directory or a link.
    Node(FileMeta),
    /// A regular file, where it is now and how long it is at this moment.
    File { meta: FileMeta, from: PathBuf, bytes: u64 },
    /// Something that cannot be part of a backup, for the report.
    LeftOut(String),
}

/// Visits everything in the order of the directories, parents before their contents. `global/pg_control` is not
/// visited. Blocking.
pub(super) fn walk(data_dir: &Path, major: Major, visit: &mut dyn FnMut(Found) -> Result<()>) -> Result<()> {
    Walk { data_dir, major, visit }.directory(Path::new(""), data_dir)
}

struct Walk<'a> {
    data_dir: &'a Path,
    major: Major,
    visit: &'a mut dyn FnMut(Found) -> Result<()>,
}

impl Walk<'_> {
    /// Visits the contents of a directory: `path` within the backup, `place` on this host.
    fn directory(&mut self, path: &Path, place: &Path) -> Result<()> {
        let unlogged = match RelationDirectory::of(path, self.major) {
            Some(_) => self.unlogged_in(place)?,
            None => UnloggedRelations::default(),
        };
        for_each_entry(place, |entry| {
            let name = entry.file_name();
            let path = path.join(&name);
            let Some(name) = name.to_str() else {
                return (self.visit)(Found::LeftOut(format!("'{}': its name is not UTF-8", path.display())));
            };
            if unlogged.leave_out(name) || path == Path::new(CONTROL_FILE) || path == Path::new(TABLESPACES_DIR) {
                return Ok(());
            }
            match treatment(&path, self.major) {
                Treatment::LeaveOut => Ok(()),
                Treatment::Empty => self.emptied(&path, entry),
                Treatment::Include => self.included(&path, entry),
            }
        })
    }

    fn unlogged_in(&self, place: &Path) -> Result<UnloggedRelations> {
        let mut init_forks: Vec<String> = Vec::new();
        for_each_entry(place, |entry| {
            if let Some(name) = entry.file_name().to_str().filter(|name| name.ends_with("_init")) {
                init_forks.push(name.to_string());
            }
            Ok(())
        })?;
        Ok(UnloggedRelations::among(init_forks.iter().map(String::as_str)))
    }

    fn emptied(&mut self, path: &Path, entry: &DirEntry) -> Result<()> {
        // Follows a link: what counts is that the copy has such a directory.
        match existing(std::fs::metadata(entry.path()), path)? {
            Some(metadata) if metadata.is_dir() => self.node(path, FileKind::Directory, mode_of(&metadata)),
            _ => Ok(()),
        }
    }

    fn included(&mut self, path: &Path, entry: &DirEntry) -> Result<()> {
        let Some(metadata) = existing(entry.metadata(), path)? else { return Ok(()) };
        let place = entry.path();
        if metadata.is_dir() {
            self.node(path, FileKind::Directory, mode_of(&metadata))?;
            self.directory(path, &place)
        } else if metadata.is_symlink() {
            self.link(path, &place)
        } else if metadata.is_file() {
            let meta = FileMeta { path: text_of(path), kind: FileKind::Regular, mode: mode_of(&metadata) };
            (self.visit)(Found::File { meta, from: place, bytes: metadata.len() })
        } else {
            (self.visit)(Found::LeftOut(format!("'{}': neither file, directory nor link", path.display())))
        }
    }

    fn link(&mut self, path: &Path, place: &Path) -> Result<()> {
        let to = match std::fs::read_link(place) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            other => other.context(|| format!("cannot read link '{}'", place.display()))?,
        };
        let Some(target) = to.to_str() else {
            let why = "it points to a name that is not UTF-8";
            return match is_tablespace_link(path) {
                true => Err(Error::new(Kind::Unsupported, format!("tablespace '{}': {why}", path.display()))),
                false => (self.visit)(Found::LeftOut(format!("link '{}': {why}", path.display()))),
            };
        };
        self.node(path, FileKind::Link { to: target.to_string() }, 0o777)?;
        if is_tablespace_link(path) {
            // A relative target is seen from the directory that holds the link.
            let directory = place.parent().unwrap_or(self.data_dir).join(&to);
            self.directory(path, &directory)?;
        }
        Ok(())
    }

    fn node(&mut self, path: &Path, kind: FileKind, mode: u32) -> Result<()> {
        (self.visit)(Found::Node(FileMeta { path: text_of(path), kind, mode }))
    }
}

/// `pg_tblspc/<oid>`
fn is_tablespace_link(path: &Path) -> bool {
    path.parent() == Some(Path::new("pg_tblspc"))
}

/// Every component was checked to be UTF-8 when it was met.
fn text_of(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn mode_of(metadata: &Metadata) -> u32 {
    metadata.permissions().mode() & 0o7777
}

/// What vanishes while one looks at it was dropped by the server: the log knows.
fn existing(outcome: std::io::Result<Metadata>, path: &Path) -> Result<Option<Metadata>> {
    match outcome {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("cannot look at '{}'", path.display()), error)),
    }
}

fn for_each_entry(place: &Path, mut visit: impl FnMut(&DirEntry) -> Result<()>) -> Result<()> {
    let what = || format!("cannot list directory '{}'", place.display());
    let entries = match std::fs::read_dir(place) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => {
            other.context(what).map_err(|error| error.hint("does the agent run as root or as the server's user?"))?
        }
    };
    for entry in entries {
        visit(&entry.context(what)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(root: &Path, path: &str, content: &str) {
        let place = root.join(path);
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        std::fs::write(place, content).unwrap();
    }

    #[test]
    fn the_tablespaces_of_a_clone_are_found_once_by_way_of_their_links() {
        let root = tempfile::tempdir().unwrap();
        let data = root.path();
        make(data, "keiki_tablespaces/16400/PG_15_202209061/5/16386", "x");
        std::fs::create_dir(data.join("pg_tblspc")).unwrap();
        std::os::unix::fs::symlink(data.join("keiki_tablespaces/16400"), data.join("pg_tblspc/16400")).unwrap();
        let mut files = Vec::new();
        walk(data, Major::V15, &mut |found| {
            if let Found::File { meta, .. } = found {
                files.push(meta.path);
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(files, ["pg_tblspc/16400/PG_15_202209061/5/16386"]);
    }

    #[test]
    fn a_walk_finds_what_a_copy_needs_and_follows_tablespaces_only() {
        let root = tempfile::tempdir().unwrap();
        let (data, elsewhere) = (root.path().join("data"), root.path().join("elsewhere"));
        for path in [
            "PG_VERSION",
            "global/pg_control",
            "base/5/16384",
            "base/5/16384_init",
            "base/5/16384_fsm",
            "base/5/16385",
            "pg_replslot/a/state",
            "postmaster.pid",
        ] {
            make(&data, path, "12345");
        }
        make(&elsewhere, "PG_15_202209061/5/16386", "x");
        make(&elsewhere, "PG_14_202107181/5/16386", "x");
        make(&elsewhere, "wal/000000010000000000000001", "x");
        std::fs::create_dir(data.join("pg_tblspc")).unwrap();
        std::os::unix::fs::symlink(&elsewhere, data.join("pg_tblspc/16400")).unwrap();
        std::os::unix::fs::symlink(elsewhere.join("wal"), data.join("pg_wal")).unwrap();
        std::os::unix::fs::symlink(&elsewhere, data.join("log")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(data.join("socket")).unwrap();

        let (mut nodes, mut files, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
        walk(&data, Major::V15, &mut |found| {
            match found {
                Found::Node(meta) => nodes.push((meta.path, matches!(meta.kind, FileKind::Directory))),
                Found::File { meta, from, bytes } => {
                    assert_eq!(std::fs::metadata(from).unwrap().len(), bytes);
                    files.push(meta.path);
                }
                Found::LeftOut(what) => left_out.push(what),
            }
            Ok(())
        })
        .unwrap();
        nodes.sort();
        files.sort();
        assert_eq!(
            files,
            ["PG_VERSION", "base/5/16384_init", "base/5/16385", "pg_tblspc/16400/PG_15_202209061/5/16386"]
        );
        let directories: Vec<&str> = nodes.iter().filter(|node| node.1).map(|node| node.0.as_str()).collect();
        assert_eq!(
            directories,
            [
                "base",
                "base/5",
                "global",
                "pg_replslot",
                "pg_tblspc",
                "pg_tblspc/16400/PG_15_202209061",
                "pg_tblspc/16400/PG_15_202209061/5",
                "pg_wal",
            ]
        );
        let links: Vec<&str> = nodes.iter().filter(|node| !node.1).map(|node| node.0.as_str()).collect();
        assert_eq!(links, ["log", "pg_tblspc/16400"]);
        assert_eq!(left_out, ["'socket': neither file, directory nor link"]);
    }
}
