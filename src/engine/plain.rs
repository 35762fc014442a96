//! Where the files of a backup go when they are written as plain files, for people and other tools. Pure.
//!
//! Nothing that is written leads out of the directory: what links of the source point to is the source's.

use crate::engine::postgres::clone::TABLESPACES_DIR;
use crate::model::backup::{FileKind, FileMeta};
use crate::model::engine_kind::EngineKind;

const LINKS_DIR: &str = "pg_tblspc";

/// What is to be written for a record of a backup, in this order; nothing leaves it out. A regular file stays one file.
///
/// The tablespaces of PostgreSQL go where the clones of this program have them, below the data directory, with relative
/// links in `pg_tblspc`. `tablespace_map` is left out: with it the server would make links to the places that the
/// tablespaces had on the source (`src/backend/access/transam/xlogrecovery.c`, read_tablespace_map).
pub fn plain_files(engine: EngineKind, meta: &FileMeta) -> Vec<FileMeta> {
    if engine == EngineKind::Postgres {
        return plain_postgres(meta);
    }
    match meta.kind {
        FileKind::Link { .. } => Vec::new(),
        FileKind::Directory | FileKind::Regular => vec![meta.clone()],
    }
}

/// The directory that a server of this engine reads log from when it starts; nothing if it does not do that.
pub fn plain_log_dir(engine: EngineKind) -> Option<&'static str> {
    match engine {
        EngineKind::Postgres => Some("pg_wal"),
        EngineKind::Fake => Some("log"),
        EngineKind::MariaDb | EngineKind::MySql | EngineKind::Redis | EngineKind::Valkey => None,
    }
}

/// What whoever starts a server in the files must know.
pub fn plain_advice(engine: EngineKind) -> &'static str {
    match engine {
        EngineKind::Postgres => {
            "a server that is started there replays the log and is consistent; it has the settings of the source: look at \
             archive_command, port and primary_conninfo before"
        }
        // MariaDB knowledge base, "mariadb-backup Overview", section "Preparing the Backup".
        EngineKind::MariaDb => "run 'mariadb-backup --prepare --target-dir=DIR' before a server is started there",
        // MySQL manual, "Cloning Data Locally": the server recovers when it is started on the directory.
        EngineKind::MySql => {
            "a server of the same series that is started there has what was committed at a moment of the backup, under a new \
             server_uuid"
        }
        // What the backup holds of an append-only file is its base: a whole data set by itself.
        EngineKind::Redis | EngineKind::Valkey => {
            "the base is a data file of the moment of the backup: put it in the place of 'dump.rdb' of a server without an \
             append-only file"
        }
        EngineKind::Fake => "nothing can be started there",
    }
}

fn plain_postgres(meta: &FileMeta) -> Vec<FileMeta> {
    let tablespace = meta.path.strip_prefix(LINKS_DIR).and_then(|rest| rest.strip_prefix('/'));
    let directory = |path: String| FileMeta { path, kind: FileKind::Directory, mode: 0o700 };
    match (&meta.kind, tablespace) {
        (FileKind::Link { .. }, Some(oid)) if !oid.contains('/') => {
            let place = format!("{TABLESPACES_DIR}/{oid}");
            let to = format!("../{place}");
            let link = FileMeta { path: meta.path.clone(), kind: FileKind::Link { to }, mode: 0o777 };
            vec![directory(TABLESPACES_DIR.to_string()), directory(place), link]
        }
        (FileKind::Link { .. }, _) => Vec::new(),
        (_, Some(below)) if below.contains('/') => {
            vec![FileMeta { path: format!("{TABLESPACES_DIR}/{below}"), ..meta.clone() }]
        }
        _ if meta.path == "tablespace_map" => Vec::new(),
        _ => vec![meta.clone()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tablespaces_come_to_lie_inside_and_no_link_leads_out() {
        let placed = |path: &str, kind: FileKind| {
            let placed = plain_files(EngineKind::Postgres, &FileMeta { path: path.into(), kind, mode: 0o600 });
            placed.into_iter().map(|one| (one.path, one.kind)).collect::<Vec<_>>()
        };
        let link = |to: &str| FileKind::Link { to: to.into() };
        assert_eq!(
            placed("pg_tblspc/16400", link("/srv/fast")),
            [
                ("keiki_tablespaces".into(), FileKind::Directory),
                ("keiki_tablespaces/16400".into(), FileKind::Directory),
                ("pg_tblspc/16400".into(), link("../keiki_tablespaces/16400")),
            ]
        );
        assert_eq!(
            placed("pg_tblspc/16400/PG_15_202209061/5/1", FileKind::Regular),
            [("keiki_tablespaces/16400/PG_15_202209061/5/1".into(), FileKind::Regular)]
        );
        assert_eq!(placed("log", link("/var/log/postgresql")), []);
        assert_eq!(placed("tablespace_map", FileKind::Regular), []);
        assert_eq!(placed("pg_tblspc", FileKind::Directory), [("pg_tblspc".into(), FileKind::Directory)]);
        assert_eq!(placed("base/5/1", FileKind::Regular), [("base/5/1".into(), FileKind::Regular)]);
    }
}
