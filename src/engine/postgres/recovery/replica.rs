//! The server that replays, in quarantine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio_util::sync::CancellationToken;

use super::quarantine::{CONF_FILE, HBA_CONTENT, HBA_FILE, IDENT_FILE, QuarantineInput, quarantine_conf};
use crate::base::child::Process;
use crate::base::durable::free_bytes;
use crate::base::ownership::write_owned;
use crate::engine::CloneSite;
use crate::engine::postgres::clone::Grounds;
use crate::engine::postgres::ondisk::control::RecoveryParameters;
use crate::engine::postgres::ondisk::segment::SegmentName;
use crate::engine::postgres::server::{LOG_MARKS, running_postmaster, segment_being_replayed, stop_now};
use crate::engine::postgres::session::{Session, lsn_column};
use crate::engine::server_log::last_log_lines;
use crate::error::{Context, Error, Kind, Result};
use crate::model::position::Lsn;

/// A restart point writes what is dirty in memory; it is asked for only when the disk is nearly full.
const RESTART_POINT_SECONDS_MAX: u64 = 3600;

/// `src/include/access/xlog.h`, PROMOTE_SIGNAL_FILE: with it in place, SIGUSR1 makes a standby the master of its own
/// timeline once it has replayed all log that it can find. It is what `pg_ctl promote` does, and unlike
/// `pg_promote()` it needs no connection, which a server that is not yet consistent refuses.
const PROMOTE_FILE: &str = "promote";
const PROMOTE_FILE_UNFINISHED: &str = "promote.unfinished";

/// See the module.
pub struct Replica<'a> {
    pub grounds: &'a Grounds,
    pub site: &'a CloneSite,
    /// What the server was or will be started with.
    pub parameters: RecoveryParameters,
    pub follow_timeline: Option<u32>,
    process: Option<Process>,
    session: Option<Session>,
}

impl<'a> Replica<'a> {
    /// A replica that does not run yet.
    pub fn new(grounds: &'a Grounds, site: &'a CloneSite, follow_timeline: Option<u32>) -> Replica<'a> {
        let parameters = grounds.control.parameters;
        Replica { grounds, site, parameters, follow_timeline, process: None, session: None }
    }

    /// The replica of a server that runs already.
    pub fn adopt(grounds: &'a Grounds, site: &'a CloneSite, process: Process) -> Replica<'a> {
        Replica { process: Some(process), ..Replica::new(grounds, site, None) }
    }

    pub fn is_started(&self) -> bool {
        self.process.is_some()
    }

    /// Writes the settings of the quarantine and starts the server.
    pub fn start(&mut self) -> Result<()> {
        let conf = self.write_files()?;
        let arguments = [String::from("-c"), format!("config_file={}", conf.display())];
        self.process = Some(self.grounds.server.start(&arguments)?);
        Ok(())
    }

    fn write_files(&self) -> Result<PathBuf> {
        let run_dir = &self.site.run_dir;
        let input = QuarantineInput {
            clone_name: &self.site.clone_name,
            data_dir: &self.site.data_dir,
            run_dir,
            port: self.site.port,
            control: &self.grounds.control,
            parameters: self.parameters,
            source: &self.grounds.source,
            preload_override: self.site.settings.get("shared_preload_libraries").map(String::as_str),
            follow_timeline: self.follow_timeline,
            memory_bytes: memory_bytes(),
            free_bytes: free_bytes(&self.site.data_dir)?,
            is_durable: super::is_durable(run_dir)?,
        };
        let conf = run_dir.join(CONF_FILE);
        let user = &self.grounds.server.user;
        write_owned(user, &run_dir.join(HBA_FILE), HBA_CONTENT.as_bytes())?;
        write_owned(user, &run_dir.join(IDENT_FILE), b"")?;
        write_owned(user, &conf, quarantine_conf(&input).as_bytes())?;
        Ok(conf)
    }

    /// Starts the server anew if the log insists on larger parameters than it has: it would pause or stop at the record
    /// that says so.
    pub async fn require_parameters(&mut self, wanted: RecoveryParameters) -> Result<()> {
        let larger = self.parameters.at_least(wanted);
        if larger == self.parameters {
            return Ok(());
        }
        self.parameters = larger;
        if self.is_started() {
            self.session = None;
            stop_now(&self.site.data_dir).await?;
            self.start()?;
        }
        Ok(())
    }

    /// An error with the end of its log if the server is not there any more.
    pub fn require_alive(&self) -> Result<()> {
        match self.process {
            Some(process) => self.grounds.server.require_alive(process),
            None => Ok(()),
        }
    }

    /// How far replay is: exact if the server lets us in, the start of the segment otherwise, `None` if neither can be
    /// seen. Fails if the server died or has paused.
    pub async fn position(&mut self) -> Result<Option<Lsn>> {
        self.require_alive()?;
        if let Some(session) = self.try_session().await {
            let sql = "SELECT pg_last_wal_replay_lsn()::text, pg_is_in_recovery() AND pg_is_wal_replay_paused()";
            match session.rows(sql, &[]).await {
                Ok(rows) => {
                    self.session = Some(session);
                    return match rows.first() {
                        Some(row) if row.try_get::<_, bool>(1).unwrap_or(false) => Err(self.paused()),
                        Some(row) => Ok(lsn_column(row, 0).ok()),
                        None => Ok(None),
                    };
                }
                // Replay may end any session that is in its way; the next one will do.
                Err(error) => tracing::debug!("the recovering server did not answer: {error}"),
            }
        }
        let Some(process) = self.process else { return Ok(None) };
        let size = self.grounds.control.wal_segment_size;
        let name = segment_being_replayed(process).and_then(|name| SegmentName::parse(&name, size));
        Ok(name.map(|segment| segment.start(size)))
    }

    fn paused(&self) -> Error {
        let log = last_log_lines(&self.grounds.server.log_file, LOG_MARKS);
        Error::new(Kind::Server, format!("PostgreSQL paused its recovery in '{}': {log}", self.site.data_dir.display()))
            .hint("a parameter is smaller than on the source; give it with '--set'")
    }

    async fn try_session(&mut self) -> Option<Session> {
        if let Some(session) = self.session.take().filter(|session| !session.is_broken()) {
            return Some(session);
        }
        self.grounds.try_connect().await.ok()
    }

    /// Waits until the server lets us in.
    pub async fn connect(&self, cancel: &CancellationToken) -> Result<Session> {
        let process =
            self.process.ok_or_else(|| Error::new(Kind::Internal, "the recovering server was not started"))?;
        self.grounds.wait_until_ready(process, cancel).await
    }

    /// Asks for a restart point, so that the server removes log that it does not need any more.
    pub async fn request_restart_point(&mut self) -> Result<()> {
        if let Some(session) = self.try_session().await {
            session.rows_within(Duration::from_secs(RESTART_POINT_SECONDS_MAX), "CHECKPOINT", &[]).await?;
            self.session = Some(session);
        }
        Ok(())
    }

    /// Tells the server to end recovery when it has replayed all there is.
    pub fn promote(&self) -> Result<()> {
        let process =
            self.process.ok_or_else(|| Error::new(Kind::Internal, "the recovering server was not started"))?;
        // The server looks for the file at every SIGUSR1, of its own processes too, and removes it: so it must get its
        // name when it is the server's already.
        let file = self.site.data_dir.join(PROMOTE_FILE);
        let unfinished = self.site.data_dir.join(PROMOTE_FILE_UNFINISHED);
        write_owned(&self.grounds.server.user, &unfinished, b"")?;
        std::fs::rename(&unfinished, &file).context(|| format!("cannot ask for '{}'", file.display()))?;
        process.signal(Signal::SIGUSR1)?;
        Ok(())
    }
}

/// A promotion that was asked for before a crash must not end the recovery that begins again.
pub fn forget_promotion(data_dir: &Path) -> Result<()> {
    crate::base::durable::remove_file_durable(&data_dir.join(PROMOTE_FILE))
}

/// The memory that the server can have, in bytes; 1 GiB if that cannot be seen.
pub fn memory_bytes() -> u64 {
    crate::base::memory::memory().map_or(1 << 30, |memory| memory.total_bytes)
}

/// The server of this site, if it runs.
pub fn running(site: &CloneSite) -> Option<Process> {
    running_postmaster(&site.data_dir)
}
