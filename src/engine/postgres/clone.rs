//! PostgreSQL as a grower of clones: the port, put together from its parts, and the way out of quarantine.
//!
//! Where files go and what makes a directory ready is in `prepare`, replay in `recovery`, the list of what a copy must
//! not keep in `clean_up`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_blocking;
use crate::base::child::Process;
use crate::base::durable::{fsync_dir, parent_of, sync_filesystem};
use crate::base::users::User;
use crate::engine::postgres::geometry::WalGeometry;
use crate::engine::postgres::ondisk::control::{CONTROL_FILE_PATH, ClusterState, ControlFile};
use crate::engine::postgres::server::{Programs, Server, is_in_use, pause, running_postmaster, stop_now};
use crate::engine::postgres::session::Session;
use crate::engine::postgres::settings::SourceSettings;
use crate::engine::postgres::{check_target, clean_up, passwords, recovery};
use crate::engine::{
    AcceptedClone, CleanUpItem, CloneEngine, CloneSite, LogGeometry, LogSource, Progress, Recovered, ServerIdentity,
};
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::FileMeta;
use crate::model::check::CheckItem;
use crate::model::engine_kind::EngineKind;
use crate::model::password::Passwords;
use crate::model::position::{Lsn, Position};
use crate::model::target::Target;

mod prepare;

pub use prepare::TABLESPACES_DIR;

/// Fact of a backup: the name of the role that initdb made, which no one can take superuser rights from.
pub const SUPERUSER_FACT: &str = "bootstrap_superuser";

/// Says the major version of a data directory (PostgreSQL manual, "Database File Layout").
const VERSION_FILE: &str = "PG_VERSION";

/// Where a clone's server writes what it does not write elsewhere by its own settings, in the clone's run directory.
const LOG_FILE: &str = "postgresql.log";

/// Databases that are asked in, the first that lets us in: either may have been removed or closed.
const DATABASES: [&str; 2] = ["postgres", "template1"];

/// Grows clones of PostgreSQL servers on this host.
#[derive(Debug, Clone, Default)]
pub struct PostgresCloner {
    /// Where the programs are unless the clone says so itself; the usual places if not set.
    pub default_bin_dir: Option<PathBuf>,
}

/// A site with everything that was looked up for it.
pub struct Grounds {
    pub server: Server,
    pub control: ControlFile,
    pub source: SourceSettings,
    /// Roles to ask as, the first that exists.
    roles: Vec<String>,
}

impl Grounds {
    /// Looks up user, programs and control file.
    pub async fn of(site: &CloneSite, default_bin_dir: Option<&Path>) -> Result<Grounds> {
        let name = site.run_as.clone();
        let user = run_blocking("user", move || User::by_name(&name)).await?;
        let programs =
            Programs::find(major_of(&site.engine_version)?, site.bin_dir.as_deref().or(default_bin_dir)).await?;
        let mut roles: Vec<String> = site.facts.get(SUPERUSER_FACT).into_iter().cloned().collect();
        for fallback in [user.name.as_str(), "postgres"] {
            if !roles.iter().any(|role| role == fallback) {
                roles.push(fallback.to_string());
            }
        }
        let data_dir = site.data_dir.clone();
        let control = run_blocking("pg_control", move || read_control(&data_dir)).await?;
        let server = Server {
            programs,
            data_dir: site.data_dir.clone(),
            user,
            socket_dir: site.run_dir.clone(),
            port: site.port,
            log_file: site.run_dir.join(LOG_FILE),
        };
        Ok(Grounds { server, control, source: SourceSettings::from_facts(&site.facts), roles })
    }

    /// One attempt to connect, as the first role and to the first database that there are.
    pub async fn try_connect(&self) -> Result<Session> {
        self.try_connect_to(&DATABASES).await
    }

    /// One attempt to connect to the first of these databases that lets us in.
    pub async fn try_connect_to(&self, databases: &[&str]) -> Result<Session> {
        let mut refused = None;
        for role in &self.roles {
            for database in databases {
                match Session::open(&self.server.endpoint(database, role)).await {
                    Ok(session) => return Ok(session),
                    Err(error) if error.kind() == Kind::Unreachable => return Err(error),
                    Err(error) => refused = Some(error),
                }
            }
        }
        Err(refused.unwrap_or_else(|| Error::new(Kind::Internal, "there is no role to connect as")))
    }

    /// Waits without limit until the server lets us in; fails if the process dies.
    pub async fn wait_until_ready(&self, process: Process, cancel: &CancellationToken) -> Result<Session> {
        loop {
            match self.try_connect().await {
                Ok(session) => return Ok(session),
                Err(error) if error.kind() != Kind::Unreachable => return Err(error),
                Err(_) => {}
            }
            self.server.require_alive(process)?;
            pause(cancel).await?;
        }
    }
}

/// 15 for `15.18`.
pub fn major_of(version: &str) -> Result<u32> {
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().map_err(|_| Error::new(Kind::Damaged, format!("'{version}' is not a version of PostgreSQL")))
}

/// Reads `pg_control`; again if a running server was just writing it. Blocking.
pub fn read_control(data_dir: &Path) -> Result<ControlFile> {
    const ATTEMPTS: usize = 20;
    let path = data_dir.join(CONTROL_FILE_PATH);
    let mut attempt = 0;
    loop {
        attempt += 1;
        let bytes = std::fs::read(&path).context(|| format!("cannot read '{}'", path.display()))?;
        match ControlFile::parse(&bytes) {
            Err(error) if error.kind() == Kind::Damaged && attempt < ATTEMPTS => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            outcome => return outcome.context(|| format!("cannot understand '{}'", path.display())),
        }
    }
}

impl PostgresCloner {
    async fn grounds(&self, site: &CloneSite) -> Result<Grounds> {
        Grounds::of(site, self.default_bin_dir.as_deref()).await
    }

    /// Starts the accepted clone with its own settings and waits until it lets us in.
    async fn open(&self, grounds: &Grounds, cancel: &CancellationToken) -> Result<()> {
        let process = grounds.server.start(&[])?;
        loop {
            match grounds.try_connect().await {
                Ok(_) => return Ok(()),
                // Its own pg_hba.conf need not let us in; that it refuses says that it is up.
                Err(error) if error.kind() == Kind::Forbidden => return Ok(()),
                Err(error) if error.kind() != Kind::Unreachable => return Err(error),
                Err(_) => {}
            }
            grounds.server.require_alive(process)?;
            pause(cancel).await?;
        }
    }
}

#[async_trait]
impl CloneEngine for PostgresCloner {
    async fn check_target(&self, site: &CloneSite, _target: &Target) -> Result<Vec<CheckItem>> {
        check_target::check_target(site, self.default_bin_dir.as_deref()).await
    }

    fn place(&self, _site: &CloneSite, meta: &FileMeta) -> Result<Option<FileMeta>> {
        prepare::place(meta)
    }

    fn is_marker(&self, path: &str) -> bool {
        path == CONTROL_FILE_PATH
    }

    async fn prepare(&self, site: &CloneSite) -> Result<()> {
        let site = site.clone();
        run_blocking("prepare", move || prepare::prepare(&site, &User::by_name(&site.run_as)?)).await
    }

    fn first_log_file(&self, site: &CloneSite) -> Result<String> {
        let (timeline, start) = site.backup_start.wal()?;
        // The file of the byte at the start, which is the byte before the position after it.
        let after = Position::Wal { timeline, lsn: Lsn(start.0.saturating_add(1)) };
        WalGeometry::from_facts(&site.facts)?.file_before(after)
    }

    fn next_log_file(&self, site: &CloneSite, name: &str) -> Result<String> {
        WalGeometry::from_facts(&site.facts)?.next_file(name)
    }

    async fn recover(
        &self,
        site: &CloneSite,
        target: &Target,
        logs: Arc<dyn LogSource>,
        progress: Arc<dyn Progress>,
        cancel: CancellationToken,
    ) -> Result<Recovered> {
        let grounds = self.grounds(site).await?;
        recovery::recover(&grounds, site, target, logs, progress, &cancel).await
    }

    async fn clean_up(&self, site: &CloneSite) -> Result<Vec<CleanUpItem>> {
        let grounds = self.grounds(site).await?;
        clean_up::clean_up(&grounds, site).await.context(|| format!("cannot clean up clone '{}'", site.clone_name))
    }

    async fn change_passwords(&self, site: &CloneSite, passwords: &Passwords) -> Result<Vec<CleanUpItem>> {
        let grounds = self.grounds(site).await?;
        passwords::change(&grounds, site, passwords).await
    }

    async fn hand_over(&self, site: &CloneSite, open: bool) -> Result<ServerIdentity> {
        let cancel = CancellationToken::new();
        recovery::require_same_boot(&site.run_dir)?;
        let grounds = self.grounds(site).await?;
        stop_well(&grounds, site, &cancel).await?;
        let data_dir = site.data_dir.clone();
        let run_dir = site.run_dir.clone();
        let control = run_blocking("hand over", move || make_durable(&data_dir, &run_dir)).await?;
        if open {
            self.open(&grounds, &cancel).await.context(|| format!("cannot open clone '{}'", site.clone_name))?;
        }
        let metadata =
            std::fs::metadata(&site.data_dir).context(|| format!("cannot look at '{}'", site.data_dir.display()))?;
        Ok(ServerIdentity {
            engine: EngineKind::Postgres,
            version: grounds.server.programs.version.clone(),
            system_id: control.system_identifier.to_string(),
            data_dir: std::fs::canonicalize(&site.data_dir).unwrap_or_else(|_| site.data_dir.clone()),
            data_dir_inode: (metadata.dev(), metadata.ino()),
        })
    }

    async fn launch(&self, clone: &AcceptedClone) -> Result<()> {
        if self.is_running(&clone.data_dir) {
            return Ok(());
        }
        let path = clone.data_dir.join(VERSION_FILE);
        let version = std::fs::read_to_string(&path).context(|| format!("cannot read '{}'", path.display()))?;
        let wanted = clone.bin_dir.as_deref().or(self.default_bin_dir.as_deref());
        let name = clone.run_as.clone();
        let server = Server {
            programs: Programs::find(major_of(version.trim())?, wanted).await?,
            data_dir: clone.data_dir.clone(),
            user: run_blocking("user", move || User::by_name(&name)).await?,
            socket_dir: clone.run_dir.clone(),
            port: clone.port,
            log_file: clone.run_dir.join(LOG_FILE),
        };
        let process = server.start(&[])?;
        while !says_it_starts(&clone.data_dir) {
            server.require_alive(process)?;
            pause(&CancellationToken::new()).await?;
        }
        Ok(())
    }

    async fn make_durable(&self, site: &CloneSite) -> Result<()> {
        let cancel = CancellationToken::new();
        if !recovery::is_durable(&site.run_dir)? {
            recovery::require_same_boot(&site.run_dir)?;
            let grounds = self.grounds(site).await?;
            stop_well(&grounds, site, &cancel).await?;
            let (data_dir, run_dir) = (site.data_dir.clone(), site.run_dir.clone());
            run_blocking("make durable", move || {
                sync_stopped(&data_dir)?;
                recovery::remember_durable(&run_dir)
            })
            .await?;
        }
        recovery::ensure_quarantined(&self.grounds(site).await?, site, &cancel).await?;
        Ok(())
    }

    async fn stop(&self, site: &CloneSite) -> Result<()> {
        stop_now(&site.data_dir).await
    }

    fn is_running(&self, data_dir: &Path) -> bool {
        running_postmaster(data_dir).is_some() || is_in_use(data_dir)
    }
}

/// Whether the running server has taken its ports and sockets: then it writes a status into line 8 of `postmaster.pid`
/// (`src/include/utils/pidfile.h`, LOCK_FILE_LINE_PM_STATUS).
fn says_it_starts(data_dir: &Path) -> bool {
    let text = std::fs::read_to_string(data_dir.join("postmaster.pid")).unwrap_or_default();
    running_postmaster(data_dir).is_some() && text.lines().nth(7).is_some_and(|status| !status.trim().is_empty())
}

/// Stops the quarantined server cleanly. One that died, with the machine or without it, is started first: only a server
/// that has recovered can end well.
async fn stop_well(grounds: &Grounds, site: &CloneSite, cancel: &CancellationToken) -> Result<()> {
    let data_dir = site.data_dir.clone();
    let state = run_blocking("pg_control", move || Ok(read_control(&data_dir)?.state)).await?;
    if running_postmaster(&site.data_dir).is_none() && state != ClusterState::ShutDown {
        recovery::ensure_quarantined(grounds, site, cancel).await?;
    }
    grounds.server.stop_cleanly(cancel).await
}

/// Recovery did not fsync: everything is made durable here, once, and only if the server says that it ended well.
fn make_durable(data_dir: &Path, run_dir: &Path) -> Result<ControlFile> {
    let control = sync_stopped(data_dir)?;
    recovery::forget(run_dir)?;
    Ok(control)
}

fn sync_stopped(data_dir: &Path) -> Result<ControlFile> {
    let control = read_control(data_dir)?;
    if control.state != ClusterState::ShutDown {
        return Err(Error::new(
            Kind::Server,
            format!("the server in '{}' was not shut down cleanly: it is '{}'", data_dir.display(), control.state),
        )
        .hint("its log is in the clone's run directory"));
    }
    sync_filesystem(data_dir)?;
    fsync_dir(parent_of(data_dir))?;
    Ok(control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_off_the_front() {
        assert_eq!(major_of("15.18").unwrap(), 15);
        assert_eq!(major_of("19devel").unwrap(), 19);
        assert!(major_of("x").is_err());
    }
}
