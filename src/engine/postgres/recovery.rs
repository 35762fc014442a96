//! Replay to exactly one moment: cut, do not aim.
//!
//! keiki reads the log itself, finds the last record of the target, and gives the server a log that ends exactly there.
//! The server replays all there is as a standby without a primary and is then promoted: no recovery target of the
//! server's is used, so none of their traps can spring. Afterwards the server is asked where it left the parent's
//! timeline; the answer must be the cut, to the byte.
//!
//! After a crash: replay does not fsync, so a directory that was being recovered when the machine went down is worth
//! nothing and says so. If only the agent died, the server is stopped, the log is read again from the start of the
//! backup, and what the server still needs is handed over again; if it had been promoted already, it is only verified.

use std::path::Path;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_blocking;
use crate::base::child::boot_id;
use crate::base::ownership::write_owned;
use crate::base::users::User;
use crate::engine::postgres::clone::Grounds;
use crate::engine::postgres::ondisk::wal::{Cut, Stop, WalFormat};
use crate::engine::postgres::server::{pause, stop_now};
use crate::engine::postgres::session::Session;
use crate::engine::{CloneSite, LogSource, Progress, Recovered};
use crate::error::{Context, Error, Kind, Result};
use crate::model::position::Lsn;
use crate::model::target::Target;

mod feed;
mod path;
pub mod quarantine;
pub mod replica;
mod state;
mod verify;
mod walker;

use feed::{Feed, end_of_log};
use path::LogPath;
use replica::Replica;
use state::FoundEnd;
pub use state::RecoveryState;
use walker::Walker;

/// Makes a server start as a standby (manual, "Standby Server Operation").
pub const STANDBY_SIGNAL: &str = "standby.signal";
/// Without it a restored directory would recover from a checkpoint that is too new for its files.
pub const BACKUP_LABEL: &str = "backup_label";

/// Fact of a backup: the system identifier in decimal.
const SYSTEM_ID_FACT: &str = "system_id";

/// What a recovery works towards.
struct Goal<'a> {
    grounds: &'a Grounds,
    site: &'a CloneSite,
    target: &'a Target,
    backup_timeline: u32,
    backup_start: Lsn,
    backup_stop: Lsn,
    logs: Arc<dyn LogSource>,
    progress: Arc<dyn Progress>,
    cancel: &'a CancellationToken,
}

/// Replays exactly to the target and leaves the server promoted and running in quarantine.
pub async fn recover(
    grounds: &Grounds,
    site: &CloneSite,
    target: &Target,
    logs: Arc<dyn LogSource>,
    progress: Arc<dyn Progress>,
    cancel: &CancellationToken,
) -> Result<Recovered> {
    let (backup_timeline, backup_start) = site.backup_start.wal()?;
    let (_, backup_stop) = site.backup_stop.wal()?;
    let goal = Goal { grounds, site, target, backup_timeline, backup_start, backup_stop, logs, progress, cancel };
    let outcome = goal.recover().await;
    if outcome.is_err() {
        // A server without hope of more log would wait for it for ever. The first error is the one to report.
        let _ = stop_now(&site.data_dir).await;
    }
    outcome.context(|| format!("cannot recover clone '{}' to '{target}'", site.clone_name))
}

/// A session with the promoted server in quarantine, which is started again if it died. Refused after a restart of the
/// machine.
pub async fn ensure_quarantined(grounds: &Grounds, site: &CloneSite, cancel: &CancellationToken) -> Result<Session> {
    require_same_boot(&site.run_dir)?;
    match replica::running(site) {
        Some(process) => grounds.wait_until_ready(process, cancel).await,
        None => {
            let mut replica = Replica::new(grounds, site, None);
            replica.start()?;
            replica.connect(cancel).await
        }
    }
}

/// An error if the machine was restarted since the recovery began: what was not yet made durable may be lost, and
/// nothing in the directory would show it. Passes if no recovery is remembered, which is so after a hand-over.
pub fn require_same_boot(run_dir: &Path) -> Result<()> {
    match RecoveryState::load(run_dir)? {
        Some(state) if !state.is_durable && state.boot_id != boot_id()? => Err(restarted()),
        _ => Ok(()),
    }
}

/// Whether a clone in quarantine has been made durable: its server then runs with fsync.
pub fn is_durable(run_dir: &Path) -> Result<bool> {
    Ok(RecoveryState::load(run_dir)?.is_some_and(|state| state.is_durable))
}

/// Remembers that everything in the directory is durable now. Call it when it is.
pub fn remember_durable(run_dir: &Path) -> Result<()> {
    match RecoveryState::load(run_dir)? {
        Some(state) => RecoveryState { is_durable: true, ..state }.save(run_dir),
        None => Ok(()),
    }
}

impl Goal<'_> {
    async fn recover(&self) -> Result<Recovered> {
        self.check_target()?;
        let boot = boot_id()?;
        let target = self.target.to_string();
        let state = match RecoveryState::load(&self.site.run_dir)? {
            Some(state) => self.check_resumable(state, &boot, &target)?,
            None if self.site.data_dir.join(BACKUP_LABEL).exists() => {
                let state = RecoveryState { boot_id: boot, target, end: None, is_durable: false };
                state.save(&self.site.run_dir)?;
                state
            }
            None => return Err(stage_again("it has no backup_label, although no recovery began in it")),
        };
        let is_standby = self.site.data_dir.join(STANDBY_SIGNAL).exists();
        match state.end {
            Some(end) if !is_standby => self.adopt_promoted(end).await,
            _ if !is_standby => Err(stage_again("its server was promoted before the end of the log was found")),
            _ => self.replay(state).await,
        }
    }

    /// Refuses what needs no log to be refused.
    fn check_target(&self) -> Result<()> {
        let found = self.grounds.control.system_identifier.to_string();
        if let Some(wanted) = self.site.facts.get(SYSTEM_ID_FACT).filter(|wanted| **wanted != found) {
            let reason = format!("the directory has system identifier '{found}', the backup says '{wanted}'");
            return Err(Error::new(Kind::Damaged, reason).hint("is it the directory of another clone?"));
        }
        match self.target {
            Target::Lsn(lsn) if *lsn < self.backup_stop => {
                Err(before_backup(&format!("position '{lsn}'"), self.backup_stop))
            }
            Target::Transaction { id, .. } => {
                Err(Error::new(Kind::BadInput, format!("'{id}' is no target in the log of PostgreSQL"))
                    .hint("choose a time, a position, a named restore point or a backup"))
            }
            Target::Position(position) => match position.wal() {
                Ok((_, lsn)) if lsn < self.backup_stop => {
                    Err(before_backup(&format!("position '{position}'"), self.backup_stop))
                }
                Ok(_) => Ok(()),
                Err(error) => Err(error.with_kind(Kind::BadInput)),
            },
            _ => Ok(()),
        }
    }

    fn check_resumable(&self, state: RecoveryState, boot: &str, target: &str) -> Result<RecoveryState> {
        if state.boot_id != boot && !state.is_durable {
            return Err(restarted());
        }
        if state.target != target.replace('\n', " ") {
            return Err(stage_again(&format!("it was being recovered to '{}'", state.target)));
        }
        Ok(state)
    }

    fn stop_at(&self) -> Stop {
        match self.target {
            // A transaction's id was refused before.
            Target::Latest | Target::Transaction { .. } => Stop::AtEnd,
            Target::Time(instant) => Stop::BeforeTime(*instant),
            Target::Lsn(lsn) => Stop::AtLsn(*lsn),
            // A position of another engine was refused before.
            Target::Position(position) => position.wal().map_or(Stop::AtEnd, |(_, lsn)| Stop::AtLsn(lsn)),
            Target::Name(name) => Stop::AtName(name.clone()),
            Target::Backup(_) => Stop::AfterLsn(self.backup_stop),
        }
    }

    /// An earlier call died after the promotion: the server runs, or is started again as what it is now.
    async fn adopt_promoted(&self, end: FoundEnd) -> Result<Recovered> {
        let replica = match replica::running(self.site) {
            Some(process) => Replica::adopt(self.grounds, self.site, process),
            None => {
                let mut replica = Replica::new(self.grounds, self.site, None);
                replica.start()?;
                replica
            }
        };
        self.wait_for_promotion(replica, end).await
    }

    async fn replay(&self, state: RecoveryState) -> Result<Recovered> {
        // A server of an earlier attempt may be anywhere; it begins again at its last restart point.
        stop_now(&self.site.data_dir).await?;
        replica::forget_promotion(&self.site.data_dir)?;
        let control = &self.grounds.control;
        let size = control.wal_segment_size;
        let path = LogPath::find(self.logs.as_ref(), self.backup_timeline, self.backup_stop).await?;
        let newest = path.newest_timeline();
        self.put_history_files(&path)?;
        let has_label = self.site.data_dir.join(BACKUP_LABEL).exists();
        let hand_over_from = if has_label { self.backup_start } else { control.checkpoint.redo };
        let log_end = end_of_log(self.logs.as_ref(), &path, size, self.backup_start).await?;
        let expected_end = match self.target {
            Target::Lsn(lsn) => log_end.min(*lsn),
            Target::Backup(_) => self.backup_stop,
            _ => log_end,
        };
        let feed = Feed {
            logs: self.logs.clone(),
            progress: self.progress.clone(),
            cancel: self.cancel,
            path,
            size,
            read_from: self.backup_start,
            hand_over_from,
            wal_dir: self.site.data_dir.join("pg_wal"),
            user: self.grounds.server.user.clone(),
            expected_end,
        };
        let mut replica = Replica::new(self.grounds, self.site, (newest != self.backup_timeline).then_some(newest));
        let walker = Walker::new(WalFormat::of(control), self.backup_start, newest, self.stop_at())?;
        self.progress.note(format!("replaying the log from '{}'", self.backup_start));
        let (walker, rest) = feed.walk(walker, &mut replica).await?;
        let cut = self.decide(&walker)?;
        let end = FoundEnd {
            timeline: feed.path.timeline_at(cut.keep_until),
            left_at: cut.replayed_to,
            keep_until: cut.keep_until,
            last_commit_at: walker.cutter().facts().latest_commit_time,
        };
        // Before the promotion can happen, so that whoever finds a promoted server knows what it must have become.
        RecoveryState { end: Some(end), ..state }.save(&self.site.run_dir)?;
        self.progress.note(format!("replaying the log to '{}', where it ends for this target", cut.keep_until));
        let feed = Feed { expected_end: cut.replayed_to, ..feed };
        feed.hand_over_rest(&walker, rest, cut, &mut replica).await?;
        self.wait_for_replay(&feed, &mut replica, cut).await?;
        self.progress.note(String::from("promoting"));
        replica.promote()?;
        self.wait_for_promotion(replica, end).await
    }

    fn put_history_files(&self, path: &LogPath) -> Result<()> {
        let wal_dir = self.site.data_dir.join("pg_wal");
        for (name, content) in &path.history_files {
            write_owned(&self.grounds.server.user, &wal_dir.join(name), content)?;
        }
        Ok(())
    }

    /// Where the log is cut, or why this target cannot be served.
    fn decide(&self, walker: &Walker) -> Result<Cut> {
        let cutter = walker.cutter();
        let cut = cutter.cut_here().ok_or_else(|| {
            Error::new(Kind::Damaged, format!("there is no log at the start of the backup, '{}'", self.backup_start))
                .hint("is the log of the backup in the archive? 'keiki window' shows what is there")
        })?;
        if cut.replayed_to < self.backup_stop {
            return Err(match (self.target, walker.finding()) {
                (Target::Time(instant), Some(walker::Finding::Cut(_))) => {
                    before_backup(&format!("time '{}'", Target::Time(*instant)), self.backup_stop)
                }
                (Target::Name(name), Some(walker::Finding::Cut(_))) => {
                    before_backup(&format!("restore point '{name}'"), self.backup_stop)
                }
                _ => Error::new(
                    Kind::NotFound,
                    format!("the log ends at '{}', before the backup does at '{}'", cut.replayed_to, self.backup_stop),
                )
                .hint("the archive has lost log of the backup; use another backup"),
            });
        }
        if cutter.is_satisfied() {
            return Ok(cut);
        }
        Err(match self.target {
            Target::Name(name) => Error::new(
                Kind::NotFound,
                format!(
                    "no restore point '{name}' is in the log from '{}' to '{}'",
                    self.backup_start, cut.replayed_to
                ),
            )
            .hint("'keiki window' lists the names; one from before this backup needs an earlier backup"),
            _ => Error::new(Kind::NotFound, format!("the log ends at '{}', before the target", cut.replayed_to))
                .hint("'keiki window' shows the newest position that can be reached"),
        })
    }

    /// Waits until the server has replayed the last record, as long as that can be seen. Promotion would wait for it as
    /// well; this is for the progress bar, and for a server that cannot go on.
    async fn wait_for_replay(&self, feed: &Feed<'_>, replica: &mut Replica<'_>, cut: Cut) -> Result<()> {
        // Seen once below the last segment's start without a session, replay cannot be seen to the end.
        let last_segment =
            Lsn(cut.keep_until.0.saturating_sub(1) / u64::from(feed.size.bytes()) * u64::from(feed.size.bytes()));
        loop {
            match replica.position().await? {
                Some(position) if position >= cut.replayed_to || position == last_segment => {
                    feed.show(position);
                    return Ok(());
                }
                Some(position) => feed.show(position),
                None => {}
            }
            pause(self.cancel).await?;
        }
    }

    async fn wait_for_promotion(&self, replica: Replica<'_>, end: FoundEnd) -> Result<Recovered> {
        let mut session = replica.connect(self.cancel).await?;
        loop {
            match session.value::<bool>("SELECT pg_is_in_recovery()", &[]).await {
                Ok(false) => break,
                Ok(true) => pause(self.cancel).await?,
                Err(error) if error.kind() == Kind::Unreachable || session.is_broken() => {
                    replica.require_alive()?;
                    session = replica.connect(self.cancel).await?;
                }
                Err(error) => return Err(error),
            }
            replica.require_alive()?;
        }
        self.progress.note(String::from("verifying what was reached"));
        let recovered = verify::verify(&session, self.grounds, self.site, end).await?;
        let done = end.left_at.0.saturating_sub(self.backup_start.0);
        self.progress.set(done, done);
        Ok(recovered)
    }
}

fn before_backup(what: &str, backup_stop: Lsn) -> Error {
    Error::new(Kind::BadInput, format!("{what} lies before the end of the base backup at '{backup_stop}'"))
        .hint("choose a later target, or an earlier backup; 'keiki backup list' shows them")
}

fn restarted() -> Error {
    stage_again("the host was restarted before what was replayed without fsync was made durable")
}

/// The error that asks for the whole directory anew.
fn stage_again(why: &str) -> Error {
    Error::new(Kind::Damaged, format!("the directory must be staged again: {why}"))
        .hint("discard the clone and order it again")
}

/// Whether a recovery has changed this directory already, so that it must not be prepared again.
pub fn has_begun(data_dir: &Path, run_dir: &Path) -> bool {
    !data_dir.join(BACKUP_LABEL).exists() && run_dir.join(state::FILE).exists()
}

/// Forgets what an earlier recovery remembered: the directory was staged anew, or the clone is handed over.
pub fn forget(run_dir: &Path) -> Result<()> {
    crate::base::durable::remove_file_durable(&run_dir.join(state::FILE))
}

/// Writes `standby.signal`. Blocking.
pub async fn mark_as_standby(user: &User, data_dir: &Path) -> Result<()> {
    let (user, path) = (user.clone(), data_dir.join(STANDBY_SIGNAL));
    run_blocking("standby signal", move || write_owned(&user, &path, b"")).await
}
