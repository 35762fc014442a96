//! MariaDB or MySQL as a grower of clones: the port, put together from its parts, and the way out of quarantine.
//!
//! A backup is restored into `keiki_staged` below the data directory, where no server can be started; `recovery` makes
//! it consistent there and moves it up, system tables last. In quarantine the server has no network, no binary log, no
//! events and no replication but the one that replays; the agent asks it through an account of its own, whose random
//! password lies in the clone's run directory and which stays after the clone is accepted.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_blocking;
use crate::base::child::Process;
use crate::base::durable::{fsync_dir, parent_of, sync_filesystem};
use crate::base::ownership::{give_to, write_owned};
use crate::base::random::random_u64;
use crate::base::users::User;
use crate::engine::mysql::geometry::{BinlogGeometry, log_name};
use crate::engine::mysql::ondisk::backup_info::CHECKPOINTS;
use crate::engine::mysql::product::Product;
use crate::engine::mysql::programs::{self, Version};
use crate::engine::mysql::server::{Server, pause, running_in, stop_now};
use crate::engine::mysql::session::{Endpoint, Session, quoted};
use crate::engine::mysql::source::{directory_uuid, read_password};
use crate::engine::mysql::{check_target, clean_up, passwords, recovery};
use crate::engine::{
    AcceptedClone, CleanUpItem, CloneEngine, CloneSite, LogGeometry, LogSource, Progress, Recovered, ServerIdentity,
};
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::FileMeta;
use crate::model::check::CheckItem;
use crate::model::password::Passwords;
use crate::model::position::Position;
use crate::model::target::Target;

mod option_file;
mod place;

pub use option_file::OPTION_FILE;
pub use place::{STAGED_DIR, move_up};

/// The account that the agent makes in every clone.
pub const ACCOUNT: &str = "keiki_agent";
/// In the run directory of a clone: the account's password, and the server's socket and log.
pub const PASSWORD_FILE: &str = "password";
pub const SOCKET_FILE: &str = "mysqld.sock";
const INIT_FILE: &str = "init.sql";
/// The server listens before it has run the file that makes the account.
const ACCOUNT_PATIENCE: Duration = Duration::from_secs(60);
/// How long a server that was launched is watched.
const LAUNCH_WATCHED: Duration = Duration::from_secs(2);

/// Grows clones of the servers of a product on this host.
#[derive(Debug, Clone)]
pub struct MySqlCloner {
    pub product: Product,
    /// Where the programs are unless the clone says so itself; the usual places if not set.
    pub default_bin_dir: Option<PathBuf>,
}

/// A site with everything that was looked up for it.
pub struct Grounds {
    pub product: Product,
    pub server: Server,
    pub bin_dir: Option<PathBuf>,
    pub version: Version,
    endpoint: Endpoint,
}

impl Grounds {
    /// Looks up user and programs, and makes the password of the agent's account if there is none yet.
    pub async fn of(product: Product, site: &CloneSite, default_bin_dir: Option<&Path>) -> Result<Grounds> {
        let version = version_of(site)?;
        let bin_dir = site.bin_dir.clone().or_else(|| default_bin_dir.map(Path::to_path_buf));
        let program = programs::find(product, product.server_programs(), bin_dir.as_deref(), version).await?;
        let (name, run_dir) = (site.run_as.clone(), site.run_dir.clone());
        let (user, password) = run_blocking("user", move || {
            let user = User::by_name(&name)?;
            give_to(&user, &run_dir)?;
            let password = password_in(&user, &run_dir)?;
            Ok((user, password))
        })
        .await?;
        let socket = site.run_dir.join(SOCKET_FILE);
        let endpoint = Endpoint {
            socket: socket.clone(),
            user: ACCOUNT.to_string(),
            password: Some(password),
            run_as: user.name.clone(),
        };
        let server = Server {
            program,
            data_dir: site.data_dir.clone(),
            user,
            socket,
            log_file: site.run_dir.join(log_file(product)),
        };
        Ok(Grounds { product, server, bin_dir, version, endpoint })
    }

    /// Writes the statements that the server runs as it starts: they make the agent's account, whatever accounts the
    /// source has. Returns the path. Blocking.
    pub fn write_init_file(&self, run_dir: &Path) -> Result<PathBuf> {
        let path = run_dir.join(INIT_FILE);
        let password = quoted(self.endpoint.password.as_deref().unwrap_or_default());
        let account = format!("'{ACCOUNT}'@'localhost'");
        let made = match self.product {
            Product::MariaDb => format!("CREATE OR REPLACE USER {account} IDENTIFIED BY {password};\n"),
            Product::MySql => format!(
                "CREATE USER IF NOT EXISTS {account} IDENTIFIED BY {password};\nALTER USER {account} IDENTIFIED BY \
                 {password} ACCOUNT UNLOCK PASSWORD EXPIRE NEVER;\n"
            ),
        };
        let sql = format!("SET sql_mode = '';\n{made}GRANT ALL PRIVILEGES ON *.* TO {account} WITH GRANT OPTION;\n");
        write_owned(&self.server.user, &path, sql.as_bytes())?;
        Ok(path)
    }

    /// Starts the server in quarantine, with more arguments, and waits until it lets us in.
    pub async fn start_quarantined(
        &self,
        site: &CloneSite,
        more: &[String],
        cancel: &CancellationToken,
    ) -> Result<(Process, Session)> {
        let init_file = self.write_init_file(&site.run_dir)?;
        let options = option_file::render_quarantine(site, &self.server, &init_file);
        let path = site.run_dir.join("quarantine.cnf");
        write_owned(&self.server.user, &path, options.as_bytes())?;
        let mut arguments = vec![format!("--defaults-file={}", path.display())];
        arguments.extend_from_slice(more);
        let process = self.server.start(&arguments)?;
        let session = self.wait_until_ready(process, cancel).await?;
        Ok((process, session))
    }

    pub async fn wait_until_ready(&self, process: Process, cancel: &CancellationToken) -> Result<Session> {
        self.server.wait_until_ready(process, &self.endpoint, ACCOUNT_PATIENCE, cancel).await
    }

    /// One attempt to connect.
    pub async fn connect(&self) -> Result<Session> {
        Session::open(&self.endpoint).await
    }
}

/// In the run directory: where the server's messages go.
fn log_file(product: Product) -> String {
    format!("{}.log", product.kind().name())
}

/// The version of the source.
pub fn version_of(site: &CloneSite) -> Result<Version> {
    Version::find(&site.engine_version)
        .ok_or_else(|| Error::new(Kind::Damaged, format!("'{}' is not a version", site.engine_version)))
}

/// The password of the agent's account, made if there is none. Blocking.
fn password_in(user: &User, run_dir: &Path) -> Result<String> {
    let path = run_dir.join(PASSWORD_FILE);
    if !path.exists() {
        // The signs are for servers that ask for some of every kind.
        let password = format!("Kk1-{:016x}{:016x}", random_u64(), random_u64());
        write_owned(user, &path, format!("{password}\n").as_bytes())?;
    }
    read_password(&path)
}

impl MySqlCloner {
    async fn grounds(&self, site: &CloneSite) -> Result<Grounds> {
        Grounds::of(self.product, site, self.default_bin_dir.as_deref()).await
    }

    /// A session with the recovered server in quarantine, which is started again if it died.
    async fn quarantined(&self, grounds: &Grounds, site: &CloneSite) -> Result<Session> {
        recovery::require_recovered(&site.run_dir)?;
        let cancel = CancellationToken::new();
        match running_in(&site.data_dir) {
            Some(process) => grounds.wait_until_ready(process, &cancel).await,
            None => {
                let more = [recovery::OUTLIVING.to_string()];
                let (_, session) = grounds.start_quarantined(site, &more, &cancel).await?;
                recovery::require_reached(&session, &site.run_dir).await?;
                Ok(session)
            }
        }
    }
}

#[async_trait]
impl CloneEngine for MySqlCloner {
    async fn check_target(&self, site: &CloneSite, target: &Target) -> Result<Vec<CheckItem>> {
        check_target::check_target(self.product, site, target, self.default_bin_dir.as_deref()).await
    }

    fn place(&self, _site: &CloneSite, meta: &FileMeta) -> Result<Option<FileMeta>> {
        place::place(meta)
    }

    fn is_marker(&self, path: &str) -> bool {
        match self.product {
            Product::MariaDb => CHECKPOINTS.contains(&path),
            Product::MySql => path == self.product.last_entry(),
        }
    }

    async fn prepare(&self, site: &CloneSite) -> Result<()> {
        let site = site.clone();
        run_blocking("prepare", move || {
            let user = User::by_name(&site.run_as)?;
            recovery::forget(&site.run_dir)?;
            place::own_directory(&user, &site.data_dir)?;
            place::own_directory(&user, &site.run_dir)
        })
        .await
    }

    fn first_log_file(&self, site: &CloneSite) -> Result<String> {
        site.backup_start.file().map(|(number, _)| log_name(number))
    }

    fn next_log_file(&self, _site: &CloneSite, name: &str) -> Result<String> {
        BinlogGeometry.next_file(name)
    }

    async fn find_transaction(
        &self,
        id: &str,
        file: &str,
        held: &[String],
        logs: &dyn LogSource,
    ) -> Result<Option<(Position, Position)>> {
        recovery::find_transaction(self.product.parse_id(id)?, file, held, logs).await
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
        let what = || format!("cannot clean up clone '{}'", site.clone_name);
        let grounds = self.grounds(site).await?;
        let session = self.quarantined(&grounds, site).await.context(what)?;
        clean_up::clean_up(self.product, &session, site).await.context(what)
    }

    async fn change_passwords(&self, site: &CloneSite, new: &Passwords) -> Result<Vec<CleanUpItem>> {
        let grounds = self.grounds(site).await?;
        let session = self.quarantined(&grounds, site).await?;
        passwords::change(&session, new).await
    }

    async fn hand_over(&self, site: &CloneSite, open: bool) -> Result<ServerIdentity> {
        let what = || format!("cannot hand over clone '{}'", site.clone_name);
        let grounds = self.grounds(site).await?;
        let cancel = CancellationToken::new();
        if open {
            self.open(&grounds, site, &cancel).await.context(what)?;
        } else {
            recovery::require_recovered(&site.run_dir)?;
            grounds.server.stop_cleanly(&cancel).await.context(what)?;
            make_durable(site).await.context(what)?;
            recovery::mark_durable(&site.run_dir)?;
        }
        identity_of(self.product, site).await.context(what)
    }

    async fn launch(&self, clone: &AcceptedClone) -> Result<()> {
        if self.is_running(&clone.data_dir) {
            return Ok(());
        }
        let options = clone.data_dir.join(OPTION_FILE);
        let (path, name) = (options.clone(), clone.run_as.clone());
        let (version, user) = run_blocking("option file", move || {
            let what = || format!("cannot read '{}'", path.display());
            let text = std::fs::read_to_string(&path).context(what)?;
            let version = text.lines().next().and_then(Version::find);
            let version = version.ok_or_else(|| Error::new(Kind::Damaged, format!("{}: no version", what())))?;
            Ok((version, User::by_name(&name)?))
        })
        .await?;
        let wanted = clone.bin_dir.as_deref().or(self.default_bin_dir.as_deref());
        let server = Server {
            program: programs::find(self.product, self.product.server_programs(), wanted, version).await?,
            data_dir: clone.data_dir.clone(),
            user,
            socket: clone.run_dir.join(SOCKET_FILE),
            log_file: clone.run_dir.join(log_file(self.product)),
        };
        let process = server.start(&[format!("--defaults-file={}", options.display())])?;
        // A server that cannot use its directory ends at once; one that must recover first listens later.
        let began = std::time::Instant::now();
        while began.elapsed() < LAUNCH_WATCHED && std::os::unix::net::UnixStream::connect(&server.socket).is_err() {
            server.require_alive(process)?;
            pause(&CancellationToken::new()).await?;
        }
        server.require_alive(process)
    }

    async fn stop(&self, site: &CloneSite) -> Result<()> {
        stop_now(&site.data_dir).await
    }

    fn is_running(&self, data_dir: &Path) -> bool {
        running_in(data_dir).is_some()
    }
}

impl MySqlCloner {
    /// Ends the quarantine. The new life's binary log is begun by a server that is still closed; only when it says where the
    /// life begins is it started as what it is from now on.
    async fn open(&self, grounds: &Grounds, site: &CloneSite, cancel: &CancellationToken) -> Result<()> {
        if !recovery::is_handed_over(&site.run_dir)? {
            let session = self.quarantined(grounds, site).await?;
            let state = session.value(self.product.applier().state).await?.unwrap_or_default();
            drop(session);
            grounds.server.stop_cleanly(cancel).await?;
            recovery::remove_relay_logs(&site.data_dir)?;
            let options = option_file::render_instance(site, &grounds.server);
            write_owned(&grounds.server.user, &site.data_dir.join(OPTION_FILE), options.as_bytes())?;
            self.begin_new_log(grounds, site, &state, cancel).await?;
            make_durable(site).await?;
            recovery::mark_handed_over(&site.run_dir)?;
        }
        if running_in(&site.data_dir).is_none() {
            let options = site.data_dir.join(OPTION_FILE);
            let process = grounds.server.start(&[format!("--defaults-file={}", options.display())])?;
            grounds.wait_until_ready(process, cancel).await?;
        }
        Ok(())
    }

    /// Starts the server with its own options but without a network, makes sure that its empty binary log begins with the
    /// state that replay ended with, and stops it. May be repeated.
    async fn begin_new_log(
        &self,
        grounds: &Grounds,
        site: &CloneSite,
        state: &str,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let options = site.data_dir.join(OPTION_FILE);
        let arguments = [
            format!("--defaults-file={}", options.display()),
            "--skip-networking".to_string(),
            "--event-scheduler=OFF".to_string(),
        ];
        let process = grounds.server.start(&arguments)?;
        let session = grounds.wait_until_ready(process, cancel).await?;
        match self.product {
            Product::MariaDb => give_log_state(&session, state).await?,
            Product::MySql => require_log_state(&session, state).await?,
        }
        drop(session);
        grounds.server.stop_cleanly(cancel).await
    }
}

async fn give_log_state(session: &Session, state: &str) -> Result<()> {
    session.execute("RESET MASTER").await?;
    if !state.is_empty() {
        session.execute(&format!("SET GLOBAL gtid_binlog_state = {}", quoted(state))).await?;
    }
    // The state is written into the first event of the next file only.
    session.execute("FLUSH BINARY LOGS").await
}

/// MySQL keeps what was replayed in a table of its own (`mysql.gtid_executed`), and counts it as purged from a log that
/// has just begun.
async fn require_log_state(session: &Session, state: &str) -> Result<()> {
    let wanted = Product::MySql.parse_state(state)?;
    for variable in ["gtid_executed", "gtid_purged"] {
        let found = session.value(&format!("SELECT @@GLOBAL.{variable}")).await?.unwrap_or_default();
        if Product::MySql.parse_state(&found)? != wanted {
            let reason = format!("the new life begins with {variable} '{found}', and replay ended with '{state}'");
            return Err(Error::new(Kind::Damaged, reason).hint("discard the clone and order it again"));
        }
    }
    Ok(())
}

async fn make_durable(site: &CloneSite) -> Result<()> {
    let (data_dir, run_dir) = (site.data_dir.clone(), site.run_dir.clone());
    run_blocking("hand over", move || {
        sync_filesystem(&data_dir)?;
        fsync_dir(&data_dir)?;
        fsync_dir(&run_dir)?;
        fsync_dir(parent_of(&data_dir))
    })
    .await
}

async fn identity_of(product: Product, site: &CloneSite) -> Result<ServerIdentity> {
    let data_dir = site.data_dir.clone();
    let version = version_of(site)?;
    run_blocking("identity", move || {
        let what = || format!("cannot look at '{}'", data_dir.display());
        let canonical = std::fs::canonicalize(&data_dir).context(what)?;
        let metadata = std::fs::metadata(&canonical).context(what)?;
        Ok(ServerIdentity {
            engine: product.kind(),
            version: version.to_string(),
            system_id: directory_uuid(product, &canonical)?,
            data_dir: canonical,
            data_dir_inode: (metadata.dev(), metadata.ino()),
        })
    })
    .await
}
