//! Redis and Valkey as a grower of clones: the port, put together from its parts, and the way out of quarantine.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_blocking;
use crate::base::durable::{create_dir_all_durable, sync_filesystem};
use crate::base::ownership::give_to;
use crate::base::users::User;
use crate::engine::redis::geometry::{AofGeometry, file_name};
use crate::engine::redis::server::{Programs, Server, processes_in, stop_now};
use crate::engine::redis::session::{Address, Endpoint};
use crate::engine::redis::settings::{AGENT_PASSWORD_FILE, AGENT_USER, APPEND_DIR, CONF_FILE, ConfInput, SOCKET_FILE};
use crate::engine::redis::source::NO_SYSTEM_ID;
use crate::engine::redis::{check_target, clean_up, cluster, passwords, recovery};
use crate::engine::{
    AcceptedClone, CleanUpItem, CloneEngine, CloneSite, LogGeometry, LogSource, Progress, Recovered, ServerIdentity,
    TiedMember, Ties,
};
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::{FileKind, FileMeta};
use crate::model::check::CheckItem;
use crate::model::engine_kind::EngineKind;
use crate::model::password::Passwords;
use crate::model::target::Target;

/// Grows clones of Redis servers on this host.
#[derive(Debug, Clone)]
pub struct RedisCloner {
    /// Redis or Valkey.
    pub engine: EngineKind,
    /// Where the programs are unless the clone says so itself; the usual places if not set.
    pub default_bin_dir: Option<PathBuf>,
}

/// A site with everything that was looked up for it.
pub struct Grounds {
    pub server: Server,
}

impl Grounds {
    async fn of(site: &CloneSite, cloner: &RedisCloner) -> Result<Grounds> {
        let name = site.run_as.clone();
        let user = run_blocking("user", move || User::by_name(&name)).await?;
        let programs = cloner.programs(site.bin_dir.as_deref()).await?;
        let (data_dir, run_dir) = (site.data_dir.clone(), site.run_dir.clone());
        Ok(Grounds { server: Server { programs, data_dir, run_dir, user } })
    }

    /// The words of the configuration files of a clone whose data use so many databases at least.
    pub fn conf_input<'a>(&self, site: &'a CloneSite, databases_used: u32) -> ConfInput<'a> {
        ConfInput {
            databases_used,
            data_dir: &site.data_dir,
            run_dir: &site.run_dir,
            port: site.port,
            listen_addresses: &site.listen_addresses,
            facts: &site.facts,
            ordered: &site.settings,
        }
    }
}

/// Where the agent reaches an accepted clone: by its socket, as the agent's own user.
pub fn endpoint_of_clone(run_dir: &Path, run_as: &str) -> Endpoint {
    Endpoint {
        address: Address::Socket(run_dir.join(SOCKET_FILE)),
        user: Some(AGENT_USER.to_string()),
        password_file: Some(run_dir.join(AGENT_PASSWORD_FILE)),
        run_as: run_as.to_string(),
    }
}

impl RedisCloner {
    /// Grows clones of this product.
    pub fn of(engine: EngineKind) -> RedisCloner {
        RedisCloner { engine, default_bin_dir: None }
    }

    async fn grounds(&self, site: &CloneSite) -> Result<Grounds> {
        Grounds::of(site, self).await
    }

    /// The server's programs in the directory that a clone names, or in the default one.
    pub(super) async fn programs(&self, bin_dir: Option<&Path>) -> Result<Programs> {
        Programs::find(self.engine, bin_dir.or(self.default_bin_dir.as_deref())).await
    }
}

#[async_trait]
impl CloneEngine for RedisCloner {
    async fn check_target(&self, site: &CloneSite, target: &Target) -> Result<Vec<CheckItem>> {
        check_target::check_target(site, target, self).await
    }

    fn place(&self, _site: &CloneSite, meta: &FileMeta) -> Result<Option<FileMeta>> {
        // A backup holds one file; anything else is not ours to put anywhere.
        let is_base = meta.kind == FileKind::Regular && meta.path.starts_with(&format!("{APPEND_DIR}/"));
        Ok(is_base.then(|| meta.clone()))
    }

    fn is_marker(&self, _path: &str) -> bool {
        // What makes the directory loadable is the manifest, which is in no backup: recovery writes it, last.
        false
    }

    fn log_bytes_at_once_max(&self) -> u64 {
        // The increments are what the clone is loaded from, all of them.
        u64::MAX
    }

    async fn prepare(&self, site: &CloneSite) -> Result<()> {
        let (data_dir, run_as) = (site.data_dir.clone(), site.run_as.clone());
        run_blocking("prepare", move || {
            let dir = data_dir.join(APPEND_DIR);
            create_dir_all_durable(&dir, 0o700)?;
            give_to(&User::by_name(&run_as)?, &dir)
        })
        .await
    }

    fn first_log_file(&self, site: &CloneSite) -> Result<String> {
        Ok(file_name(site.backup_start.file()?.0))
    }

    fn next_log_file(&self, _site: &CloneSite, name: &str) -> Result<String> {
        AofGeometry.next_file(name)
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

    fn tie(&self, members: &[TiedMember], listen_addresses: &str) -> Result<(Vec<CheckItem>, Vec<Ties>)> {
        cluster::tie(members, listen_addresses)
    }

    async fn confirm_ties(&self, site: &CloneSite, cancel: CancellationToken) -> Result<Vec<CleanUpItem>> {
        cluster::confirm(site, &cancel).await
    }

    async fn clean_up(&self, site: &CloneSite) -> Result<Vec<CleanUpItem>> {
        let grounds = self.grounds(site).await?;
        clean_up::clean_up(&grounds, site).await.context(|| format!("cannot clean up clone '{}'", site.clone_name))
    }

    async fn change_passwords(&self, site: &CloneSite, new: &Passwords) -> Result<Vec<CleanUpItem>> {
        let grounds = self.grounds(site).await?;
        passwords::change(&grounds.server.user, site, new).await
    }

    async fn hand_over(&self, site: &CloneSite, open: bool) -> Result<ServerIdentity> {
        let cancel = CancellationToken::new();
        let grounds = self.grounds(site).await?;
        let server = &grounds.server;
        server.stop_cleanly(&cancel).await?;
        let conf = site.data_dir.join(CONF_FILE);
        let (data_dir, wanted) = (site.data_dir.clone(), conf.clone());
        run_blocking("hand over", move || {
            if !wanted.is_file() {
                return Err(Error::new(Kind::Internal, format!("'{}' was not written", wanted.display())));
            }
            sync_filesystem(&data_dir)
        })
        .await?;
        if open {
            let what = || format!("cannot open clone '{}'", site.clone_name);
            let log_began = server.log_bytes();
            let process = server.start(&conf).context(what)?;
            let endpoint = endpoint_of_clone(&site.run_dir, &site.run_as);
            let session = server.wait_until_loaded(process, &endpoint, &cancel, |_, _| {}).await;
            if let Err(error) = server.require_all_taken(&mut session.context(what)?, log_began).await {
                stop_now(&site.data_dir).await?;
                return Err(error).context(what);
            }
        }
        let metadata =
            std::fs::metadata(&site.data_dir).context(|| format!("cannot look at '{}'", site.data_dir.display()))?;
        Ok(ServerIdentity {
            engine: self.engine,
            version: server.programs.version.clone(),
            system_id: NO_SYSTEM_ID.to_string(),
            data_dir: std::fs::canonicalize(&site.data_dir).unwrap_or_else(|_| site.data_dir.clone()),
            data_dir_inode: (metadata.dev(), metadata.ino()),
        })
    }

    async fn launch(&self, clone: &AcceptedClone) -> Result<()> {
        if self.is_running(&clone.data_dir) {
            return Ok(());
        }
        let (data_dir, run_dir, name) = (clone.data_dir.clone(), clone.run_dir.clone(), clone.run_as.clone());
        let user = run_blocking("user", move || User::by_name(&name)).await?;
        let programs = self.programs(clone.bin_dir.as_deref()).await?;
        let conf = data_dir.join(CONF_FILE);
        Server { programs, data_dir, run_dir, user }.start(&conf).map(|_| ())
    }

    async fn stop(&self, site: &CloneSite) -> Result<()> {
        stop_now(&site.data_dir).await
    }

    fn is_running(&self, data_dir: &Path) -> bool {
        !processes_in(data_dir).is_empty()
    }
}
