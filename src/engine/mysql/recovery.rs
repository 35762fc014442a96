//! Replay: the restored copy is made consistent, then the log is placed as relay logs, cut at the target, and applied by
//! the server's own parallel applier. MariaDB and MySQL alike, but for how the copy is made consistent (`copy`) and the
//! words (`product`).
//!
//! keiki reads the log itself and finds the last transaction of the target. The files of the log are put beside the data
//! as relay logs of a replication whose source does not exist, the last one cut behind that transaction; the server's
//! SQL thread applies all there is, on several workers, committing in the order of the log. No client is between, no
//! `UNTIL` is used. What was reached is then asked of the server: `gtid_slave_pos` or `gtid_executed`, which each
//! transaction changes together with its rows, must be the state that the walker counted. Much log goes in batches, the next one
//! being placed while one is applied, and the server being started anew for each, because the list of relay logs is read
//! when it starts.
//!
//! Serving the log as a replication source would need no list and no batches, but it needs a network in the quarantine
//! and writes every byte once more; placed files were exact and applied at the speed of the applier (tried on
//! MariaDB 10.11 and MySQL 9.7).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::base::child::boot_id;
use crate::engine::mysql::backup::fact;
use crate::engine::mysql::clone::Grounds;
use crate::engine::mysql::ondisk::transaction::LogState;
use crate::engine::mysql::product::Product;
use crate::engine::mysql::server::{pause, running_in, stop_now};
use crate::engine::mysql::session::Session;
use crate::engine::{CloneSite, LogSource, Progress, Recovered};
use crate::error::{Context, Error, Kind, Result};
use crate::model::check::CheckItem;
use crate::model::position::Position;
use crate::model::target::{Target, utc_text};

mod copy;
mod feed;
mod state;

use feed::{Batch, End, Feed};
pub use feed::{find_transaction, remove_relay_logs};
use state::{Phase, RecoveryState};
pub use state::{forget, is_handed_over, mark_durable, mark_handed_over, require_recovered};

/// How long the applier may take to end what it is doing when it is told to stop.
const STOP_LIMIT: Duration = Duration::from_secs(600);
/// For a server that holds what was recovered already: see `outlive_the_server`.
pub const OUTLIVING: &str = "--innodb-flush-log-at-trx-commit=2";
/// The number of the error ER_KEY_NOT_FOUND, of both products.
const ROW_NOT_FOUND: &str = "1032";
/// More workers than this wait for each other.
const WORKERS_MAX: usize = 16;

/// What a recovery works towards.
struct Goal<'a> {
    grounds: &'a Grounds,
    site: &'a CloneSite,
    target: &'a Target,
    logs: Arc<dyn LogSource>,
    progress: Arc<dyn Progress>,
    cancel: &'a CancellationToken,
}

/// Replays exactly to the target and leaves the server running in quarantine.
pub async fn recover(
    grounds: &Grounds,
    site: &CloneSite,
    target: &Target,
    logs: Arc<dyn LogSource>,
    progress: Arc<dyn Progress>,
    cancel: &CancellationToken,
) -> Result<Recovered> {
    let goal = Goal { grounds, site, target, logs, progress, cancel };
    let outcome = goal.recover().await;
    if outcome.is_err() {
        // The first error is the one to report.
        let _ = stop_now(&site.data_dir).await;
    }
    outcome.context(|| format!("cannot recover clone '{}' to '{target}'", site.clone_name))
}

impl Goal<'_> {
    async fn recover(&self) -> Result<Recovered> {
        let boot = boot_id()?;
        let target = self.target.to_string();
        let mut state = match RecoveryState::load(&self.site.run_dir)? {
            Some(state) if !state.is_safe_after(&boot) => {
                return Err(stage_again("the host was restarted before what was replayed was made durable"));
            }
            Some(state) if state.target != target => {
                return Err(stage_again(&format!("it was being recovered to '{}'", state.target)));
            }
            Some(state) => state,
            None => RecoveryState { boot_id: boot, target, phase: Phase::Applying, end: None },
        };
        match state.phase {
            Phase::Applying => {}
            // Statements that are not transactional may have been applied in part.
            Phase::Replaying => return Err(stage_again("an earlier replay was interrupted")),
            Phase::Recovered | Phase::HandedOver => return self.adopt(&state).await,
        }
        state.save(&self.site.run_dir)?;
        self.apply_backup().await?;
        state.phase = Phase::Replaying;
        state.save(&self.site.run_dir)?;
        let end = self.replay().await?;
        let recovered = self.verify(&end).await?;
        outlive_the_server(&self.grounds.connect().await?).await?;
        state.phase = Phase::Recovered;
        state.end = Some(end);
        state.save(&self.site.run_dir)?;
        Ok(recovered)
    }

    /// An earlier call died after it had recovered: the server runs, or is started again.
    async fn adopt(&self, state: &RecoveryState) -> Result<Recovered> {
        let end = state.end.clone().ok_or_else(|| stage_again("what it was recovered to was not written down"))?;
        if running_in(&self.site.data_dir).is_none() {
            self.grounds.start_quarantined(self.site, &[OUTLIVING.to_string()], self.cancel).await?;
        }
        self.verify(&end).await
    }

    async fn replay(&self) -> Result<End> {
        let product = self.grounds.product;
        let ((number, offset), first_state) = self.start_of_replay().await?;
        let mut feed = Feed::new(
            self.logs.clone(),
            product,
            self.site,
            &self.replay_target(),
            (number, offset),
            first_state.clone(),
        )
        .await?;
        let total = feed.total_bytes();
        self.progress.note(format!("replaying the log from '{}'", Position::File { number, offset }));
        let mut state = Some(first_state);
        let mut done = 0;
        let user = &self.grounds.server.user;
        let mut next = feed.next_batch(user, self.cancel).await?;
        while let Some(batch) = next {
            // The next one is placed while the server applies this one.
            let apply = async {
                match batch.transactions {
                    0 => Ok(()),
                    _ => self.run_batch(&batch, state.take(), done, total).await,
                }
            };
            ((), next) = tokio::try_join!(apply, feed.next_batch(user, self.cancel))?;
            done += batch.bytes;
            self.progress.set(done, total.max(done));
        }
        let end = feed.into_end()?;
        if running_in(&self.site.data_dir).is_none() {
            let (_, session) = self.grounds.start_quarantined(self.site, &[], self.cancel).await?;
            if let Some(state) = state {
                self.give_state(&session, &state).await?;
            }
        }
        self.progress.set(done, done);
        Ok(end)
    }

    /// Starts the server on the relay logs of a batch and waits until it has applied them. `first_state` is what it
    /// has already, given once.
    async fn run_batch(&self, batch: &Batch, first_state: Option<LogState>, done: u64, total: u64) -> Result<()> {
        // The last batch's server knows nothing of these files.
        self.grounds.server.stop_cleanly(self.cancel).await?;
        let workers = std::thread::available_parallelism().map_or(1, usize::from).clamp(1, WORKERS_MAX);
        let words = self.grounds.product.applier();
        let more = [
            format!("{}{workers}", words.workers_option),
            format!("--relay-log={}", batch.base),
            format!("--relay-log-index={}.index", batch.base),
        ];
        let (process, session) = self.grounds.start_quarantined(self.site, &more, self.cancel).await?;
        if let Some(state) = first_state {
            self.give_state(&session, &state).await?;
        }
        let log_base = self.site.facts.get(fact::LOG_BASE).map_or("binlog", String::as_str);
        let source_file = format!("{log_base}.{:06}", batch.first_number);
        let (first, offset) = (&batch.files[0], batch.first_offset);
        session.execute(&self.grounds.product.apply_from((&source_file, offset), (&first.name, first.start))).await?;
        session.execute(words.start).await?;
        loop {
            self.grounds.server.require_alive(process)?;
            let status = session.query(words.status).await?;
            if status.first(words.running) != Some("Yes") {
                return Err(self.applier_stopped(status.first("Last_SQL_Error"), status.first("Last_SQL_Errno")));
            }
            let applied = status.first("Relay_Log_File").zip(status.first("Relay_Log_Pos"));
            let place = applied.and_then(|(name, offset)| batch.place(name, offset));
            if let Some(place) = place {
                let bytes = done + batch.bytes_before(place);
                self.progress.set(bytes, total.max(bytes));
            }
            // A state that knows no names says nothing about transactions without one: their place does.
            let is_there = batch.nameless == 0 || place.is_some_and(|place| place >= batch.end_at);
            if is_there && self.has_all(&state_of(&session).await?, &batch.end_state) {
                break;
            }
            pause(self.cancel).await?;
        }
        session.query_within(STOP_LIMIT, words.stop).await?;
        session.query_within(STOP_LIMIT, words.forget).await?;
        let reached = state_of(&session).await?;
        if !self.has_all(&reached, &batch.end_state) {
            return Err(wrong(format!("it has applied '{reached}', and the log ends at '{}'", batch.end_state)));
        }
        Ok(())
    }

    /// Whether a server with the state `reached` has applied everything up to `wanted`. A copy of MySQL has transactions
    /// from behind the place that replay begins at, which are passed over: it may have more than a part of the log.
    fn has_all(&self, reached: &LogState, wanted: &LogState) -> bool {
        match (reached, wanted) {
            (LogState::MySql(reached), LogState::MySql(wanted)) => wanted.first_missing_in(reached).is_none(),
            _ => reached == wanted,
        }
    }

    fn applier_stopped(&self, said: Option<&str>, number: Option<&str>) -> Error {
        let log = self.grounds.server.log_file.display();
        let hint = match number == Some(ROW_NOT_FOUND) {
            true => format!(
                "the copy lacks a row that the log changes: {}; clone to the backup itself, or convert the \
                 table to InnoDB on the source and take a new backup; the whole log is '{log}'",
                self.grounds.product.comes_empty()
            ),
            false => format!("the whole log is '{log}'"),
        };
        let said = said.unwrap_or("it says nothing");
        Error::new(Kind::Server, format!("the server stopped applying the log: {said}")).hint(hint)
    }

    /// Asks the server what it has become.
    async fn verify(&self, end: &End) -> Result<Recovered> {
        self.progress.note(String::from("verifying what was reached"));
        let session = self.grounds.connect().await?;
        let reached = state_of(&session).await?;
        if reached != end.state {
            return Err(wrong(format!("it has '{reached}', and the end that was found is '{}'", end.state)));
        }
        let mut verified = vec![CheckItem::pass(
            "transactions",
            format!("applied up to '{reached}', the end that was found for the target"),
        )];
        let answers = session.query("SELECT @@GLOBAL.log_bin AS log, @@GLOBAL.skip_networking AS closed").await?;
        if (answers.first("log"), answers.first("closed")) != (Some("0"), Some("1")) {
            return Err(wrong(String::from("it is not closed")));
        }
        verified.push(CheckItem::pass("quarantine", "no network and no binary log"));
        session
            .execute("CREATE TEMPORARY TABLE IF NOT EXISTS mysql.keiki_probe (probe INT) ENGINE = InnoDB")
            .await
            .context(|| "cannot write to the recovered server")?;
        session.execute("DROP TEMPORARY TABLE mysql.keiki_probe").await?;
        verified.push(CheckItem::pass("writable", "a table was made and dropped"));
        let last = end.last_commit_at.map_or(String::from("none since the backup"), utc_text);
        verified.push(CheckItem::pass("last transaction", last));
        Ok(Recovered {
            departed_at: end.position(),
            now_at: Position::File { number: 1, offset: 0 },
            last_commit_at: end.last_commit_at,
            verified,
        })
    }
}

/// From now on what is committed is in the hands of the operating system, and so is all that was committed before:
/// replay leaves its end in the memory of the server, where the death of the server would undo it.
async fn outlive_the_server(session: &Session) -> Result<()> {
    // The order counts: with 0 the server ignores the second statement (`innobase_flush_logs` in ha_innodb.cc).
    for sql in ["SET GLOBAL innodb_flush_log_at_trx_commit = 2", "FLUSH LOCAL ENGINE LOGS", "FLUSH LOCAL TABLES"] {
        session.query_within(STOP_LIMIT, sql).await?;
    }
    Ok(())
}

/// An error unless a server that was started again still has all that was recovered.
pub async fn require_reached(session: &Session, run_dir: &Path) -> Result<()> {
    let Some(end) = RecoveryState::load(run_dir)?.and_then(|state| state.end) else { return Ok(()) };
    let found = state_of(session).await?;
    match found == end.state {
        true => Ok(()),
        false => Err(wrong(format!("it was killed, and then had '{found}' instead of '{}'", end.state))),
    }
}

/// Which transactions a server has.
async fn state_of(session: &Session) -> Result<LogState> {
    let product = Product::of_text(session.server_text());
    product.parse_state(&session.value(product.applier().state).await?.unwrap_or_default())
}

fn wrong(what: String) -> Error {
    Error::new(Kind::Damaged, format!("the recovered server is not what was ordered: {what}"))
        .hint("discard the clone; if it happens again, this is a defect of keiki: keep the server's log")
}

/// The error that asks for the whole directory anew.
fn stage_again(why: &str) -> Error {
    Error::new(Kind::Damaged, format!("the directory must be staged again: {why}"))
        .hint("discard the clone and order it again")
}
