//! Who the server is: is it the one that the configuration means, is it running, can it be a source.
//!
//! A connection is trusted only after it was proved that the server behind it runs in the configured data directory:
//! a port and a socket say nothing, since any server may have taken them over.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{MappedMutexGuard, Mutex, MutexGuard};

use crate::base::bulk::run_blocking;
use crate::engine::postgres::geometry::WalGeometry;
use crate::engine::postgres::ondisk::control::ControlFile;
use crate::engine::postgres::ondisk::segment::SegmentSize;
use crate::engine::postgres::ondisk::versions::Major;
use crate::engine::postgres::ondisk::wal::WalFormat;
use crate::engine::postgres::session::{Endpoint, Session, column};
use crate::engine::postgres::{PostgresEngine, PostgresSource};
use crate::engine::{LogGeometry, ServerIdentity};
use crate::error::{Context, Error, Kind, Result};
use crate::model::engine_kind::EngineKind;

/// The database that questions are asked in: it exists in every cluster unless somebody removed it on purpose.
const MAINTENANCE_DATABASE: &str = "postgres";
/// A directory without it cannot be started: backups read it last and restores write it last.
pub(super) const CONTROL_FILE: &str = "global/pg_control";
/// It is one page that is rewritten in place: a torn read is whole again a moment later.
const CONTROL_READS: u32 = 200;
/// How long a connection is kept without being used.
const IDLE_MAX: Duration = Duration::from_secs(1);
const CONTROL_READ_WAIT: Duration = Duration::from_millis(10);

/// A connection to the source, proved to be the configured server and no standby, with what never changes while the
/// server runs.
pub struct SourceSession {
    pub session: Session,
    /// How the server writes its log.
    pub format: WalFormat,
}

/// The connection between two questions.
#[derive(Default)]
pub(super) struct KeptSession {
    session: Option<SourceSession>,
    used_at: Option<Instant>,
    /// A task is there that will close it.
    has_closer: bool,
}

/// Closes the connection when nobody has asked anything for a moment: an open session would hold up a server that is
/// being shut down in "smart" mode, and everybody who copies the database that it is connected to.
async fn close_when_idle(kept: Weak<Mutex<KeptSession>>) {
    loop {
        tokio::time::sleep(IDLE_MAX).await;
        // Without an engine there is no connection any more.
        let Some(kept) = kept.upgrade() else { return };
        let mut kept = kept.lock().await;
        if kept.used_at.is_none_or(|at| at.elapsed() >= IDLE_MAX) {
            kept.session = None;
            kept.has_closer = false;
            return;
        }
    }
}

/// What stands in the data directory without asking the server.
struct DirectoryFacts {
    canonical: PathBuf,
    inode: (u64, u64),
    major: Major,
}

impl PostgresSource {
    /// Where this server listens, for a database.
    pub fn endpoint(&self, database: &str) -> Endpoint {
        Endpoint {
            socket_dir: self.socket_dir.clone(),
            port: self.port,
            database: database.to_string(),
            role: self.user.clone(),
            run_as: self.run_as.clone(),
        }
    }
}

impl PostgresEngine {
    /// A new proved connection, for work that must own one.
    pub(super) async fn open_session(&self) -> Result<SourceSession> {
        let facts = self.directory_facts().await?;
        let session = Session::open(&self.source.endpoint(MAINTENANCE_DATABASE)).await?;
        prove(session, &self.source, &facts).await
    }

    /// The connection for small questions, opened first if there is none or if it broke. One caller at a time.
    pub(super) async fn session(&self) -> Result<MappedMutexGuard<'_, SourceSession>> {
        let mut kept = self.connection.lock().await;
        let usable = kept.session.take().filter(|kept| !kept.session.is_broken());
        let session = match usable {
            Some(session) => session,
            None => self.open_session().await?,
        };
        kept.used_at = Some(Instant::now());
        if !kept.has_closer {
            kept.has_closer = true;
            tokio::spawn(close_when_idle(Arc::downgrade(&self.connection)));
        }
        Ok(MutexGuard::map(kept, |kept| kept.session.insert(session)))
    }

    async fn directory_facts(&self) -> Result<DirectoryFacts> {
        let data_dir = self.source.data_dir.clone();
        run_blocking("data directory", move || look_at_directory(&data_dir)).await
    }
}

/// Asks the running server who it is.
pub(super) async fn identify(engine: &PostgresEngine) -> Result<ServerIdentity> {
    identify_unnamed(engine).await.context(|| format!("cannot identify instance '{}'", engine.source.name))
}

async fn identify_unnamed(engine: &PostgresEngine) -> Result<ServerIdentity> {
    let facts = engine.directory_facts().await?;
    let source = engine.session().await?;
    let system_id = source.format.system_identifier.unwrap_or_default();
    Ok(ServerIdentity {
        engine: EngineKind::Postgres,
        version: source.session.version_text(),
        system_id: system_id.to_string(),
        data_dir: facts.canonical,
        data_dir_inode: facts.inode,
    })
}

/// The arithmetic of the server's log files, from its `pg_control`.
pub(super) async fn geometry(engine: &PostgresEngine) -> Result<Arc<dyn LogGeometry>> {
    let (control, _) = read_control(engine.source.data_dir.clone()).await?;
    Ok(Arc::new(WalGeometry::new(control.wal_segment_size)))
}

/// Reads what identifies a data directory, and whether a server may be running in it. Blocking.
fn look_at_directory(data_dir: &Path) -> Result<DirectoryFacts> {
    let what = || format!("cannot use '{}' as a PostgreSQL data directory", data_dir.display());
    let version_file =
        std::fs::read(data_dir.join("PG_VERSION")).context(what).map_err(|error| match error.kind() {
            Kind::NotFound => error.with_kind(Kind::BadInput).hint(
                "'data_dir' of the instance is the directory that holds PG_VERSION; 'SHOW data_directory' prints it",
            ),
            _ => error.hint("does the agent run as root or as the user of the server?"),
        })?;
    let major = Major::from_pg_version_file(&version_file).context(what)?;
    let canonical = std::fs::canonicalize(data_dir).context(what)?;
    let metadata = std::fs::metadata(&canonical).context(what)?;
    if !data_dir.join("postmaster.pid").exists() {
        return Err(Error::new(
            Kind::Unreachable,
            format!("no PostgreSQL server is running in '{}'", data_dir.display()),
        )
        .hint("start the server, or correct 'data_dir' of the instance"));
    }
    Ok(DirectoryFacts { canonical, inode: (metadata.dev(), metadata.ino()), major })
}

async fn prove(session: Session, source: &PostgresSource, facts: &DirectoryFacts) -> Result<SourceSession> {
    let row = session
        .row(
            "SELECT current_setting('data_directory'), pg_is_in_recovery(), \
             (SELECT setting::int8 FROM pg_settings WHERE name = 'wal_segment_size'), \
             current_setting('wal_block_size')::int8, (SELECT system_identifier FROM pg_control_system())",
            &[],
        )
        .await
        .map_err(|error| match error.kind() {
            Kind::Forbidden => error.hint(format!("as a superuser: GRANT pg_read_all_settings TO \"{}\"", source.user)),
            _ => error,
        })
        .context(|| format!("cannot check which server listens on port {}", source.port))?;
    let found: String = column(&row, 0)?;
    if !is_same_directory(PathBuf::from(&found), facts.inode).await? {
        return Err(Error::new(
            Kind::Conflict,
            format!(
                "the server at '{}' port {} runs in '{found}' and not in '{}'",
                source.socket_dir.display(),
                source.port,
                source.data_dir.display()
            ),
        )
        .hint("correct 'data_dir', 'socket_dir' or 'port' of the instance so that they name one server"));
    }
    if session.major_number() != facts.major.number() {
        return Err(Error::new(
            Kind::Conflict,
            format!("the server is PostgreSQL {} but its data directory is of {}", session.major_number(), facts.major),
        ));
    }
    if column::<bool>(&row, 1)? {
        return Err(Error::new(Kind::Unsupported, format!("instance '{}' is a standby or in recovery", source.name))
            .hint("configure keiki on the primary; a standby becomes a source after it was promoted"));
    }
    let size = |index: usize| -> Result<u32> {
        let bytes: i64 = column(&row, index)?;
        u32::try_from(bytes).map_err(|_| Error::new(Kind::Server, format!("a log page or file of {bytes} bytes")))
    };
    let format = WalFormat {
        major: facts.major,
        segment_size: SegmentSize::new(size(2)?)?,
        page_bytes: size(3)?,
        // The column is signed, the identifier is not (`src/include/catalog/pg_control.h`).
        system_identifier: Some(column::<i64>(&row, 4)?.cast_unsigned()),
    };
    Ok(SourceSession { session, format })
}

async fn is_same_directory(found: PathBuf, inode: (u64, u64)) -> Result<bool> {
    run_blocking("data directory", move || {
        // A directory that is not visible from here is not ours either.
        Ok(std::fs::metadata(&found).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == inode))
    })
    .await
}

/// A whole `pg_control`, parsed and as it is.
pub(super) async fn read_control(data_dir: PathBuf) -> Result<(ControlFile, Vec<u8>)> {
    run_blocking("read pg_control", move || read_control_blocking(&data_dir.join(CONTROL_FILE))).await
}

fn read_control_blocking(path: &Path) -> Result<(ControlFile, Vec<u8>)> {
    let what = || format!("cannot read '{}'", path.display());
    let mut reads = 0;
    loop {
        let bytes = std::fs::read(path).context(what)?;
        reads += 1;
        match ControlFile::parse(&bytes) {
            Ok(control) => return Ok((control, bytes)),
            Err(error) if error.kind() == Kind::Damaged && reads < CONTROL_READS => {
                std::thread::sleep(CONTROL_READ_WAIT);
            }
            Err(error) => return Err(error).context(what),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_no_cluster_or_has_no_server_is_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let error = look_at_directory(directory.path()).err().unwrap();
        assert_eq!(error.kind(), Kind::BadInput);
        assert!(error.hint_text().unwrap().contains("PG_VERSION"));
        std::fs::write(directory.path().join("PG_VERSION"), "12\n").unwrap();
        assert_eq!(look_at_directory(directory.path()).err().unwrap().kind(), Kind::Unsupported);
        std::fs::write(directory.path().join("PG_VERSION"), "15\n").unwrap();
        assert_eq!(look_at_directory(directory.path()).err().unwrap().kind(), Kind::Unreachable);
        std::fs::write(directory.path().join("postmaster.pid"), "1\n").unwrap();
        assert_eq!(look_at_directory(directory.path()).unwrap().major, Major::V15);
    }

    #[test]
    fn a_control_file_that_is_being_written_is_read_until_it_is_whole() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/postgres/15/pg_control.zst");
        let whole = zstd::decode_all(std::fs::File::open(fixture).unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pg_control");
        let mut torn = whole.clone();
        torn[40] ^= 0xff;
        std::fs::write(&path, &torn).unwrap();
        let writer = std::thread::spawn({
            let (path, whole) = (path.clone(), whole.clone());
            move || {
                std::thread::sleep(Duration::from_millis(30));
                std::fs::write(path, whole).unwrap();
            }
        });
        let (_, bytes) = read_control_blocking(&path).unwrap();
        writer.join().unwrap();
        assert!(bytes == whole);
    }
}
