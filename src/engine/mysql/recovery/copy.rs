//! A restored copy becomes a data directory that a server can be started in, and that says where in the log it is.
//!
//! MariaDB's backup program makes the copied files consistent, and its notes say to which place of the log they belong.
//! MySQL's clone is consistent when its server has started: it knows its transactions, and where the log was then.

use super::{Goal, stage_again, state_of, wrong};
use crate::base::bulk::run_blocking;
use crate::base::child::ChildCommand;
use crate::engine::mysql::backup::fact;
use crate::engine::mysql::clean_up::reset_channels;
use crate::engine::mysql::clone::{STAGED_DIR, move_up};
use crate::engine::mysql::geometry::server_log_number;
use crate::engine::mysql::ondisk::backup_info::{BINLOG_INFO, BinlogInfo, CHECKPOINTS};
use crate::engine::mysql::ondisk::transaction::LogState;
use crate::engine::mysql::product::Product;
use crate::engine::mysql::programs;
use crate::engine::mysql::server::stop_now;
use crate::engine::mysql::session::{Session, quoted};
use crate::error::{Context, Error, Kind, Result};
use crate::model::target::Target;

impl Goal<'_> {
    /// Makes the staged files consistent where that is the work of a program, and moves them to where the server looks
    /// for them.
    pub(super) async fn apply_backup(&self) -> Result<()> {
        stop_now(&self.site.data_dir).await?;
        let product = self.grounds.product;
        match product {
            Product::MariaDb => self.prepare_copy().await?,
            Product::MySql => {}
        }
        let data_dir = self.site.data_dir.clone();
        run_blocking("move up", move || move_up(product, &data_dir)).await?;
        if !self.site.data_dir.join(product.last_entry()).exists() {
            return Err(stage_again("it has no system tables"));
        }
        match product {
            Product::MariaDb => Ok(()),
            Product::MySql => self.forget_channels().await,
        }
    }

    /// MySQL keeps in tables what it replicates, so a copy of a replica has that, too. Its relay logs are not there: until the
    /// channels are forgotten the server refuses any other ("replica failed to initialize applier metadata", error 1872).
    /// Forgetting them removes relay logs, so it comes before any are placed.
    async fn forget_channels(&self) -> Result<()> {
        if self.site.facts.get(fact::CHANNELS).is_some_and(|count| count == "0") {
            return Ok(());
        }
        let (_, session) = self.grounds.start_quarantined(self.site, &[], self.cancel).await?;
        reset_channels(&session).await?;
        drop(session);
        self.grounds.server.stop_cleanly(self.cancel).await
    }

    async fn prepare_copy(&self) -> Result<()> {
        let staged = self.site.data_dir.join(STAGED_DIR);
        let notes = staged.clone();
        let read = |name: &str| std::fs::read(notes.join(name)).ok();
        let checkpoints = CHECKPOINTS.iter().find_map(|name| read(name));
        if let Some(info) = BINLOG_INFO.iter().find_map(|name| read(name)) {
            self.check_notes(&BinlogInfo::parse(&info)?)?;
        }
        let is_applied = |text: &[u8]| {
            let text = String::from_utf8_lossy(text);
            ["log-applied", "full-prepared"].iter().any(|word| text.contains(word))
        };
        if checkpoints.is_some_and(|text| !is_applied(&text)) {
            self.progress.note(String::from("making the copied files consistent"));
            let tool = programs::find(
                Product::MariaDb,
                &programs::BACKUP,
                self.grounds.bin_dir.as_deref(),
                self.grounds.version,
            )
            .await?;
            ChildCommand::new(&tool.path)
                .args(["--no-defaults", "--prepare", "--use-memory=256M"])
                .arg(format!("--target-dir={}", staged.display()))
                // Where it is found if it outlives the agent.
                .current_dir(&staged)
                .as_user(&self.grounds.server.user)
                .run_checked(self.cancel)
                .await
                .context(|| "cannot make the copied files consistent")?;
        }
        Ok(())
    }

    /// The program's own note must say what the backup's manifest says.
    fn check_notes(&self, info: &BinlogInfo) -> Result<()> {
        let (number, offset) = self.site.backup_start.file()?;
        let noted = (server_log_number(&info.file), info.offset);
        if noted == (Some(number), offset) {
            return Ok(());
        }
        let reason = format!("the copied files belong to '{}' offset {}", info.file, info.offset);
        Err(Error::new(Kind::Damaged, format!("{reason}, the backup says '{}'", self.site.backup_start)))
    }

    /// Where replay begins, and what a server has there. MySQL without GTIDs: where the copy says that it is, because
    /// nothing else says which transactions it has.
    pub(super) async fn start_of_replay(&self) -> Result<((u64, u64), LogState)> {
        let start = self.site.backup_start.file()?;
        let product = self.grounds.product;
        if product == Product::MariaDb || self.has_gtids() {
            let state = self.site.facts.get(fact::GTID_STATE).map_or("", String::as_str);
            return Ok((start, product.parse_state(state)?));
        }
        let more = [String::from("--performance-schema=ON")];
        let (_, session) = self.grounds.start_quarantined(self.site, &more, self.cancel).await?;
        let rows = session.query("SELECT BINLOG_FILE, BINLOG_POSITION FROM performance_schema.clone_status").await?;
        let state = state_of(&session).await?;
        drop(session);
        self.grounds.server.stop_cleanly(self.cancel).await?;
        let number = rows.first("BINLOG_FILE").and_then(server_log_number);
        let place = number.zip(rows.first("BINLOG_POSITION").and_then(|offset| offset.parse().ok()));
        let place = place.ok_or_else(|| wrong(String::from("it does not say where in the log it is")))?;
        if place < start || place > self.site.backup_stop.file()? {
            return Err(wrong(format!("it says that it is at offset {} of log file {}", place.1, place.0)));
        }
        Ok((place, state))
    }

    /// Whether every transaction of the source has a name.
    fn has_gtids(&self) -> bool {
        self.site.facts.get(fact::GTID_MODE).is_none_or(|mode| mode == "ON")
    }

    /// What the log is cut for. A backup of MariaDB is one place in the log, and nothing is replayed for it; the copy that
    /// MySQL makes belongs to a place that it tells only when it is started, and becomes exact at the backup's stop.
    pub(super) fn replay_target(&self) -> Target {
        match (self.grounds.product, self.target) {
            (Product::MySql, Target::Backup(_)) => Target::Position(self.site.backup_stop),
            _ => self.target.clone(),
        }
    }

    /// Lets the server know which transactions it has (MariaDB), or holds what it knows against it (MySQL).
    pub(super) async fn give_state(&self, session: &Session, state: &LogState) -> Result<()> {
        if self.grounds.product == Product::MariaDb {
            return session.execute(&format!("SET GLOBAL gtid_slave_pos = {}", quoted(&state.to_string()))).await;
        }
        let found = state_of(session).await?;
        match self.has_all(&found, state) {
            true => Ok(()),
            false => Err(wrong(format!("the copy has '{found}', and the backup began with '{state}'"))),
        }
    }
}
