//! Who the server is: is it the one that the configuration means, is it running, can it be a source.
//!
//! A connection is trusted only after it was proved that the server behind it runs in the configured data directory: a
//! socket says nothing, since any server may have taken it over.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use tokio::sync::{MappedMutexGuard, MutexGuard};

use crate::base::bulk::run_blocking;
use crate::engine::ServerIdentity;
use crate::engine::mysql::ondisk::{aria_control, auto_cnf};
use crate::engine::mysql::product::Product;
use crate::engine::mysql::session::{Endpoint, Session};
use crate::engine::mysql::{MySqlEngine, MySqlSource};
use crate::error::{Context, Error, Kind, Result};

/// A password is a line.
const PASSWORD_BYTES_MAX: u64 = 4096;

/// SQL for the server's clock in UTC with microseconds, in a session whose time zone is UTC.
pub(super) const CLOCK_NOW: &str = "DATE_FORMAT(NOW(6), '%Y-%m-%dT%H:%i:%s.%fZ')";

/// A connection to the source, proved to be the configured server.
pub struct SourceSession {
    pub session: Session,
    /// `10.11.19`.
    pub version: String,
}

/// What stands in the data directory without asking the server.
struct DirectoryFacts {
    canonical: PathBuf,
    inode: (u64, u64),
    /// What says which data directory it is.
    uuid: String,
}

impl MySqlSource {
    /// Where this server listens, with the password as it is now.
    pub async fn endpoint(&self) -> Result<Endpoint> {
        let password = match self.password_file.clone() {
            Some(path) => Some(run_blocking("password", move || read_password(&path)).await?),
            None => None,
        };
        Ok(Endpoint { socket: self.socket.clone(), user: self.user.clone(), password, run_as: self.run_as.clone() })
    }
}

/// The first line of a password file. Blocking.
pub fn read_password(path: &Path) -> Result<String> {
    let what = || format!("cannot read the password in '{}'", path.display());
    let metadata = std::fs::metadata(path).context(what)?;
    if metadata.len() > PASSWORD_BYTES_MAX || !metadata.is_file() {
        return Err(Error::new(Kind::BadInput, format!("{}: it is not a file with one line", what())));
    }
    let text = std::fs::read_to_string(path).context(what)?;
    Ok(text.lines().next().unwrap_or_default().to_string())
}

impl MySqlEngine {
    /// A new proved connection, for work that must own one.
    pub(super) async fn open_session(&self) -> Result<SourceSession> {
        let facts = self.directory_facts().await?;
        let session = Session::open(&self.source.endpoint().await?).await?;
        prove(session, &self.source, &facts).await
    }

    /// The connection for small questions, opened first if there is none or if it broke. One caller at a time.
    pub(super) async fn session(&self) -> Result<MappedMutexGuard<'_, SourceSession>> {
        let mut kept = self.connection.lock().await;
        let usable = kept.take().filter(|kept| !kept.session.is_broken());
        let session = match usable {
            // It may be of a server that is gone by now.
            Some(session) if session.session.execute("DO 0").await.is_ok() => session,
            _ => self.open_session().await?,
        };
        Ok(MutexGuard::map(kept, |kept| kept.insert(session)))
    }

    async fn directory_facts(&self) -> Result<DirectoryFacts> {
        let data_dir = self.source.data_dir.clone();
        let product = self.source.product;
        run_blocking("data directory", move || look_at_directory(product, &data_dir)).await
    }
}

/// Asks the running server who it is.
pub(super) async fn identify(engine: &MySqlEngine) -> Result<ServerIdentity> {
    let what = || format!("cannot identify instance '{}'", engine.source.name);
    let facts = engine.directory_facts().await.context(what)?;
    let source = engine.session().await.context(what)?;
    Ok(ServerIdentity {
        engine: engine.source.product.kind(),
        version: source.version.clone(),
        system_id: facts.uuid,
        data_dir: facts.canonical,
        data_dir_inode: facts.inode,
    })
}

/// Reads what identifies a data directory. Blocking.
fn look_at_directory(product: Product, data_dir: &Path) -> Result<DirectoryFacts> {
    let what = || format!("cannot use '{}' as a data directory of {}", data_dir.display(), product.name());
    let uuid = directory_uuid(product, data_dir).context(what)?;
    let canonical = std::fs::canonicalize(data_dir).context(what)?;
    let metadata = std::fs::metadata(&canonical).context(what)?;
    Ok(DirectoryFacts { inode: (metadata.dev(), metadata.ino()), canonical, uuid })
}

/// What the product's own file says which data directory it is. A physical copy of MariaDB has its parent's; one of MySQL
/// gets its own when it is started. Blocking.
pub(super) fn directory_uuid(product: Product, data_dir: &Path) -> Result<String> {
    let name = match product {
        Product::MariaDb => aria_control::FILE,
        Product::MySql => auto_cnf::FILE,
    };
    let path = data_dir.join(name);
    let bytes = std::fs::read(&path).context(|| format!("cannot read '{}'", path.display())).map_err(|error| {
        match error.kind() {
            Kind::NotFound => error.with_kind(Kind::BadInput).hint(format!(
                "'data_dir' of the instance is the directory that holds '{name}'; 'SELECT @@datadir' prints it"
            )),
            _ => error.hint("does the agent run as root or as the user of the server?"),
        }
    })?;
    match product {
        Product::MariaDb => aria_control::uuid(&bytes),
        Product::MySql => auto_cnf::uuid(&bytes),
    }
}

async fn prove(session: Session, source: &MySqlSource, facts: &DirectoryFacts) -> Result<SourceSession> {
    let Some(version) = source.product.version_in(session.server_text()).map(str::to_string) else {
        let reason = format!("the server at '{}' is '{}'", source.socket.display(), session.server_text());
        let other = Product::of_text(session.server_text()).kind().name();
        return Err(Error::new(Kind::Unsupported, format!("{reason} and not {}", source.product.name()))
            .hint(format!("correct 'engine' of the instance to '{other}', or 'socket'")));
    };
    let found = session.value("SELECT @@GLOBAL.datadir").await?.unwrap_or_default();
    let inode = facts.inode;
    let path = PathBuf::from(&found);
    let is_same = run_blocking("data directory", move || {
        // A directory that is not visible from here is not ours either.
        Ok(std::fs::metadata(&path).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == inode))
    });
    if !is_same.await? {
        return Err(Error::new(
            Kind::Conflict,
            format!(
                "the server at '{}' runs in '{found}' and not in '{}'",
                source.socket.display(),
                source.data_dir.display()
            ),
        )
        // A wrong address is put right without anything to be made good in the archive.
        .with_kind(Kind::BadInput)
        .hint("correct 'data_dir' or 'socket' of the instance so that they name one server"));
    }
    if source.product == Product::MySql {
        require_uuid(&session, source, &facts.uuid).await?;
    }
    Ok(SourceSession { session, version })
}

/// The server's own name for itself is the one in its data directory, or somebody has exchanged one of the two.
async fn require_uuid(session: &Session, source: &MySqlSource, uuid: &str) -> Result<()> {
    let found = session.value("SELECT @@GLOBAL.server_uuid").await?.unwrap_or_default();
    if found.eq_ignore_ascii_case(uuid) {
        return Ok(());
    }
    let reason = format!("the server at '{}' calls itself '{found}'", source.socket.display());
    Err(Error::new(Kind::Conflict, format!("{reason}, and '{}' says '{uuid}'", auto_cnf::FILE))
        .hint("was the file changed while the server ran? restart the server"))
}

/// The server's clock now.
pub(super) async fn server_time(session: &Session) -> Result<Timestamp> {
    let text = session.value(&format!("SELECT {CLOCK_NOW}")).await?.unwrap_or_default();
    text.parse().map_err(|_| Error::new(Kind::Server, format!("the server's clock shows an impossible time: '{text}'")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_the_first_line_of_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p");
        std::fs::write(&path, "s3cret word\nmore\n").unwrap();
        assert_eq!(read_password(&path).unwrap(), "s3cret word");
        assert!(read_password(directory.path()).is_err());
    }
}
