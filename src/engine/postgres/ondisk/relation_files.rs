//! What the files of a data directory are, by their paths: which a base backup leaves out, and which hold pages.
//!
//! The rules are the server's own (`src/backend/backup/basebackup.c`: excludeDirContents, excludeFiles, sendDir;
//! `src/backend/storage/file/reinit.c`: parse_filename_for_nontemp_relation; `src/backend/storage/file/fd.c`:
//! looks_like_temp_rel_name). As there, file names are left out wherever they occur. keiki leaves out a little more:
//! the files by which somebody told this server, and not its copy, to recover or to be promoted.
//!
//! Paths are relative to the data directory, with tablespaces under `pg_tblspc/<oid>`. A name that is not UTF-8 is
//! none of the server's and is included.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::Path;

use super::versions::Major;

/// Directories that are kept but emptied: their contents are removed or made anew when a server starts, or would tie
/// the copy to its source (replication slots).
const EMPTIED_DIRECTORIES: [&str; 7] =
    ["pg_stat_tmp", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_subtrans"];

/// Files that are left out wherever they occur.
const LEFT_OUT_FILES: [&str; 8] = [
    "postgresql.auto.conf.tmp",
    "current_logfiles.tmp",
    "backup_label",
    "tablespace_map",
    "backup_manifest",
    "postmaster.pid",
    "postmaster.opts",
    ".DS_Store",
];

/// Beginnings of names that are left out wherever they occur: temporary files, and caches that are rebuilt.
const LEFT_OUT_BEGINNINGS: [&str; 2] = ["pgsql_tmp", "pg_internal.init"];

/// Files at the top that speak of this server's past or to this server alone.
const LEFT_OUT_AT_TOP: [&str; 5] =
    ["backup_label.old", "tablespace_map.old", "recovery.signal", "standby.signal", "promote"];

/// What a base backup does with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    Include,
    /// The directory is part of the backup, its contents are not.
    Empty,
    LeaveOut,
}

/// What a base backup does with a path, whether file or directory, judged by the path alone. Unlogged relations need
/// `UnloggedRelations` as well. `global/pg_control` is included, and is for the caller to read last.
pub fn treatment(path: &Path, major: Major) -> Treatment {
    let mut parent = Path::new("");
    let mut components = path.components().peekable();
    while let Some(component) = components.next() {
        let found = treatment_in(parent, component.as_os_str(), major);
        if found != Treatment::Include {
            let is_itself = components.peek().is_none();
            return if is_itself { found } else { Treatment::LeaveOut };
        }
        parent = path_up_to(path, parent.components().count() + 1);
    }
    Treatment::Include
}

/// The first `count` components of a path.
fn path_up_to(path: &Path, count: usize) -> &Path {
    let surplus = path.components().count().saturating_sub(count);
    path.ancestors().nth(surplus).unwrap_or(path)
}

fn treatment_in(parent: &Path, name: &OsStr, major: Major) -> Treatment {
    let Some(name) = name.to_str() else { return Treatment::Include };
    let at_top = parent.as_os_str().is_empty();
    let left_out = LEFT_OUT_FILES.contains(&name)
        || LEFT_OUT_BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
        || (at_top && LEFT_OUT_AT_TOP.contains(&name))
        || (is_tablespace_root(parent) && name != major.tablespace_directory())
        || (matches!(RelationDirectory::of(parent, major), Some(RelationDirectory::Database { .. }))
            && is_temporary_relation(name));
    if left_out {
        Treatment::LeaveOut
    } else if EMPTIED_DIRECTORIES.contains(&name) || (at_top && name == "pg_wal") {
        Treatment::Empty
    } else {
        Treatment::Include
    }
}

/// `pg_tblspc/<oid>`: a tablespace, in which other versions may have directories of their own.
fn is_tablespace_root(path: &Path) -> bool {
    let mut components = path.iter().map(|component| component.to_str().unwrap_or_default());
    components.next() == Some("pg_tblspc")
        && components.next().is_some_and(|oid| number(oid).is_some())
        && components.next().is_none()
}

/// A directory that holds relations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelationDirectory {
    /// `global`: the catalogues that all databases share.
    Global,
    /// `base/<database>` or `pg_tblspc/<tablespace>/PG_<version>/<database>`.
    Database { tablespace: Option<u32>, database: u32 },
}

impl RelationDirectory {
    /// What a directory holds, by its path.
    pub fn of(directory: &Path, major: Major) -> Option<RelationDirectory> {
        let names: Vec<&str> = directory.iter().map(OsStr::to_str).collect::<Option<_>>()?;
        match names[..] {
            ["global"] => Some(RelationDirectory::Global),
            ["base", database] => Some(RelationDirectory::Database { tablespace: None, database: number(database)? }),
            ["pg_tblspc", tablespace, version, database] if version == major.tablespace_directory() => {
                Some(RelationDirectory::Database { tablespace: Some(number(tablespace)?), database: number(database)? })
            }
            _ => None,
        }
    }
}

/// A part of a relation's storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fork {
    Main,
    FreeSpaceMap,
    VisibilityMap,
    /// The empty state of an unlogged relation, to which a crash returns it.
    Init,
}

/// The name of a relation's file: `<number>[_<fork>][.<segment>]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelationFile {
    /// The file number of the relation, which is not always its oid.
    pub relation: u32,
    pub fork: Fork,
    /// Which of the files of a large relation it is, from 0.
    pub segment: u32,
}

impl RelationFile {
    /// Reads a name; `None` for temporary relations and everything else.
    pub fn parse(name: &str) -> Option<RelationFile> {
        let (stem, segment) = match name.split_once('.') {
            Some((stem, segment)) => (stem, number(segment)?),
            None => (name, 0),
        };
        let (relation, fork) = match stem.split_once('_') {
            Some((relation, fork)) => (relation, fork_named(fork)?),
            None => (stem, Fork::Main),
        };
        Some(RelationFile { relation: number(relation)?, fork, segment })
    }

    /// The number, within the fork, of the file's first block; `None` if it is more than a relation can have.
    /// `segment_blocks` is pg_control's count of blocks in a full file.
    pub fn first_block(&self, segment_blocks: u32) -> Option<u32> {
        self.segment.checked_mul(segment_blocks)
    }
}

/// The relation file at a path, if the file consists of pages, and so has page checksums where the cluster has them.
/// `global/pg_control`, `pg_filenode.map`, `PG_VERSION`, `pg_internal.init` and everything outside the relation
/// directories do not.
pub fn page_file(path: &Path, major: Major) -> Option<RelationFile> {
    RelationDirectory::of(path.parent()?, major)?;
    RelationFile::parse(path.file_name()?.to_str()?)
}

/// The unlogged relations of one directory. Of these a backup holds only the init fork, from which the server makes
/// the rest anew.
#[derive(Debug, Clone, Default)]
pub struct UnloggedRelations(HashSet<u32>);

impl UnloggedRelations {
    /// Finds them among the names of the files in a relation directory, by their init forks.
    pub fn among<'a>(names: impl IntoIterator<Item = &'a str>) -> UnloggedRelations {
        let files = names.into_iter().filter_map(RelationFile::parse);
        UnloggedRelations(files.filter(|file| file.fork == Fork::Init).map(|file| file.relation).collect())
    }

    /// Whether a file of the same directory is left out of a backup because its relation is unlogged.
    pub fn leave_out(&self, name: &str) -> bool {
        RelationFile::parse(name).is_some_and(|file| file.fork != Fork::Init && self.0.contains(&file.relation))
    }
}

/// `t<backend>_<number>[_<fork>][.<segment>]`: a session's temporary relation, which nobody can use after it.
fn is_temporary_relation(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let Some((backend, rest)) = name.strip_prefix('t').and_then(|rest| rest.split_once('_')) else { return false };
    let (stem, segment) = rest.split_once('.').unwrap_or((rest, "0"));
    let (relation, fork) = stem.split_once('_').unwrap_or((stem, "fsm"));
    digits(backend) && digits(segment) && digits(relation) && fork_named(fork).is_some()
}

fn fork_named(name: &str) -> Option<Fork> {
    match name {
        "fsm" => Some(Fork::FreeSpaceMap),
        "vm" => Some(Fork::VisibilityMap),
        "init" => Some(Fork::Init),
        _ => None,
    }
}

/// A positive number as the server writes it: digits only, none of them a leading zero.
fn number(text: &str) -> Option<u32> {
    match text.as_bytes() {
        [b'1'..=b'9', rest @ ..] if rest.iter().all(u8::is_ascii_digit) => text.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(path: &str) -> Treatment {
        treatment(Path::new(path), Major::V15)
    }

    #[test]
    fn what_a_server_needs_is_included() {
        for path in [
            "PG_VERSION",
            "global",
            "global/pg_control",
            "global/pg_filenode.map",
            "global/1262",
            "base/5/1259",
            "base/5/1259_fsm",
            "base/5/16384.1",
            "base/5/PG_VERSION",
            "base/5/pg_filenode.map",
            "pg_xact/0000",
            "pg_multixact/members/0000",
            "pg_twophase/00000300",
            "pg_commit_ts/0000",
            "pg_logical/mappings",
            "pg_logical/replorigin_checkpoint",
            "pg_stat/pgstat.stat",
            "pg_tblspc",
            "pg_tblspc/16385",
            "pg_tblspc/16385/PG_15_202209061/5/16386",
            "postgresql.conf",
            "postgresql.auto.conf",
            "pg_hba.conf",
            "current_logfiles",
            "log/postgresql.log",
            "base/5/t3_x",
            "global/t3_16384",
            "conf.d/standby.signal",
            "server.crt",
            "base/5/tx_16384",
            "my_pg_wal/x",
            "pg_wal_old",
        ] {
            assert_eq!(of(path), Treatment::Include, "{path}");
        }
    }

    #[test]
    fn what_belongs_to_the_running_server_is_left_out() {
        for path in [
            "postmaster.pid",
            "postmaster.opts",
            "backup_label",
            "backup_label.old",
            "tablespace_map",
            "tablespace_map.old",
            "backup_manifest",
            "recovery.signal",
            "standby.signal",
            "promote",
            "postgresql.auto.conf.tmp",
            "current_logfiles.tmp",
            "global/pg_internal.init",
            "base/5/pg_internal.init.1234",
            "base/pgsql_tmp",
            "base/pgsql_tmp/pgsql_tmp1234.0",
            "base/5/t3_16384",
            "base/5/t12_16384_vm",
            "base/5/t3_16384_fsm.2",
            "pg_wal/000000010000000000000001",
            "pg_wal/archive_status",
            "pg_wal/archive_status/x.ready",
            "pg_replslot/slot/state",
            "pg_notify/0000",
            "pg_subtrans/0000",
            "pg_stat_tmp/global.stat",
            "pg_dynshmem/mmap.1",
            "pg_snapshots/1",
            "pg_serial/0000",
            "pg_tblspc/16385/pgsql_tmp/x",
            "pg_tblspc/16385/PG_15_202209061/pgsql_tmp",
            "pg_tblspc/16385/PG_14_202107181",
            "pg_tblspc/16385/PG_14_202107181/5/1",
            "pg_tblspc/16385/PG_15_202209061/5/t3_16386",
            ".DS_Store",
        ] {
            assert_eq!(of(path), Treatment::LeaveOut, "{path}");
        }
    }

    #[test]
    fn emptied_directories_stay_as_directories() {
        for path in [
            "pg_wal",
            "pg_replslot",
            "pg_stat_tmp",
            "pg_dynshmem",
            "pg_notify",
            "pg_serial",
            "pg_snapshots",
            "pg_subtrans",
        ] {
            assert_eq!(of(path), Treatment::Empty, "{path}");
        }
    }

    #[test]
    fn a_name_that_is_no_text_is_included() {
        use std::os::unix::ffi::OsStrExt;
        assert_eq!(treatment(Path::new(OsStr::from_bytes(b"base/5/\xff")), Major::V15), Treatment::Include);
    }

    #[test]
    fn of_unlogged_relations_only_the_init_fork_is_kept() {
        let names = ["16384", "16384_init", "16384_fsm", "16384.1", "16385", "163840", "PG_VERSION", "16384_vm.1"];
        let unlogged = UnloggedRelations::among(names);
        let left_out: Vec<&str> = names.into_iter().filter(|name| unlogged.leave_out(name)).collect();
        assert_eq!(left_out, ["16384", "16384_fsm", "16384.1", "16384_vm.1"]);
    }

    #[test]
    fn relation_files_are_known_by_their_names() {
        let file = |relation, fork, segment| Some(RelationFile { relation, fork, segment });
        assert_eq!(RelationFile::parse("1259"), file(1259, Fork::Main, 0));
        assert_eq!(RelationFile::parse("1259.3"), file(1259, Fork::Main, 3));
        assert_eq!(RelationFile::parse("1259_fsm"), file(1259, Fork::FreeSpaceMap, 0));
        assert_eq!(RelationFile::parse("1259_vm.12"), file(1259, Fork::VisibilityMap, 12));
        assert_eq!(RelationFile::parse("4294967295_init"), file(u32::MAX, Fork::Init, 0));
        for other in [
            "",
            "0",
            "01259",
            "1259.",
            "1259.0",
            "1259.01",
            "1259_",
            "1259_main",
            "1259_fsm_vm",
            "t3_1259",
            "4294967296",
            "1259 ",
            "+1",
            "pg_filenode.map",
        ] {
            assert_eq!(RelationFile::parse(other), None, "{other}");
        }
    }

    #[test]
    fn block_numbers_go_on_across_the_files_of_a_relation() {
        assert_eq!(RelationFile::parse("1.2").unwrap().first_block(131_072), Some(262_144));
        assert_eq!(RelationFile::parse("1.4294967295").unwrap().first_block(131_072), None);
    }

    #[test]
    fn only_relation_files_have_page_checksums() {
        let has = |path: &str| page_file(Path::new(path), Major::V18).is_some();
        for path in [
            "base/5/1259",
            "base/5/1259_fsm.1",
            "global/1262",
            "pg_tblspc/9/PG_18_202506291/5/16384",
            "base/5/16384_init",
        ] {
            assert!(has(path), "{path}");
        }
        for path in [
            "global/pg_control",
            "global/pg_filenode.map",
            "base/5/PG_VERSION",
            "base/5/pg_internal.init",
            "1259",
            "base/1259",
            "pg_xact/0000",
            "pg_tblspc/9/PG_15_202209061/5/16384",
            "base/5/sub/1",
            "base/5/t3_16384",
        ] {
            assert!(!has(path), "{path}");
        }
    }

    proptest! {
        #[test]
        fn what_lies_in_a_left_out_directory_is_left_out(path in "(base|pg_wal|global|pg_replslot|5|pgsql_tmp|x|t3_1|pg_tblspc|/){1,8}") {
            let path = Path::new(path.trim_start_matches('/'));
            if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty())
                && treatment(parent, Major::V15) != Treatment::Include
            {
                prop_assert_eq!(treatment(path, Major::V15), Treatment::LeaveOut);
            }
        }
    }
}
