//! The online base backup: `pg_backup_start`, copy while the server writes, `pg_backup_stop`.
//!
//! What makes such a copy good is the log from its start to its stop, replayed under the `backup_label` that the server
//! wrote for it. So the label goes into the sink byte for byte, `global/pg_control` is read after all other files, and
//! the session stays open from start to stop: when it is lost, the server has given the backup up, and so does this.
//!
//! Sources: manual, "Making a Base Backup Using the Low Level API"; `src/backend/backup/basebackup.c`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_on_thread;
use crate::engine::postgres::PostgresEngine;
use crate::engine::postgres::ondisk::backup_label::BackupLabel;
use crate::engine::postgres::session::{CLOCK_NOW, Session, column, lsn_column, timestamp_column};
use crate::engine::postgres::source::{CONTROL_FILE, SourceSession, read_control};
use crate::engine::{BaseLane, BaseSink, BaseSpan};
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::{FileKind, FileMeta};
use crate::model::position::{Lsn, Position};

mod config_files;
mod copy;
mod facts;
mod pages;
mod walk;

pub use config_files::CONFIG_DIRECTORY;
pub use facts::SETTING_FACT_PREFIX;

use copy::{Copied, Copy};

/// The checkpoint at the start is asked to be fast, but on a slow disk with much to write it is not.
const START_LIMIT: Duration = Duration::from_secs(3600);
/// Stopping writes one record and two small files.
const STOP_LIMIT: Duration = Duration::from_secs(300);
/// How often the session is asked whether it is still there.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Takes the backup: see [`crate::engine::Engine::back_up`].
pub(super) async fn back_up(
    engine: &PostgresEngine,
    label: &str,
    sink: Arc<dyn BaseSink>,
    cancel: CancellationToken,
) -> Result<BaseSpan> {
    let what = || format!("cannot back up instance '{}'", engine.source.name);
    let source = engine.open_session().await.context(what)?;
    let outcome = run(engine, &source, label, sink, &cancel).await;
    if outcome.is_err() && !source.session.is_broken() {
        // The server gives the backup up as well when the session ends with this function; saying so spares it a
        // warning in its log. There may be none to stop.
        let _ = stop(&source, Duration::from_secs(10)).await;
    }
    outcome.context(what)
}

async fn run(
    engine: &PostgresEngine,
    source: &SourceSession,
    label: &str,
    sink: Arc<dyn BaseSink>,
    cancel: &CancellationToken,
) -> Result<BaseSpan> {
    let data_dir = engine.source.data_dir.clone();
    let (control, _) = read_control(data_dir.clone()).await?;
    let mut facts = facts::collect(engine, source, &control).await?;
    let config_files = config_files::outside_files(&source.session, &data_dir).await?;
    let (began_at, started_at) = tokio::select! {
        started = start(source, label) => started?,
        () = cancel.cancelled() => return Err(cancelled()),
    };
    let copy = Copy {
        data_dir: data_dir.clone(),
        major: source.format.major,
        pages: control.has_data_checksums().then_some(pages::PageChecker {
            major: source.format.major,
            block_bytes: control.block_size,
            segment_blocks: control.relation_segment_blocks,
            backup_start: started_at,
        }),
        sink: sink.clone(),
        stop: Arc::new(AtomicBool::new(false)),
    };
    let copied = copy_with_heartbeat(&source.session, copy, cancel).await?;
    // After all other files and before the end: its checkpoint then lies within what the log of the backup covers.
    let (_, control_bytes) = read_control(data_dir).await?;
    let stopped = stop(source, STOP_LIMIT).await?;

    let label = BackupLabel::parse(stopped.backup_label.as_bytes())?;
    let position = |lsn: Lsn| Position::Wal { timeline: label.start_timeline, lsn };
    let (start, stop) = (position(label.start), position(stopped.position));
    facts.insert(String::from("timeline"), label.start_timeline.to_string());
    for (index, left_out) in copied.left_out.iter().enumerate() {
        facts.insert(format!("left_out.{index}"), left_out.clone());
    }
    let ended_at = stopped.ended_at;
    let facts = run_on_thread("base-tail", move || {
        let mut lane = sink.lane()?;
        config_files::store(&config_files, &mut *lane, &mut facts)?;
        put_last_files(lane, &stopped, &control_bytes)?;
        Ok(facts)
    })
    .await?;
    Ok(BaseSpan { start, stop, began_at, ended_at, facts, damaged_blocks: copied.damaged_blocks })
}

fn put_last_files(mut lane: Box<dyn BaseLane>, stopped: &Stopped, control: &[u8]) -> Result<()> {
    put(&mut *lane, "backup_label", stopped.backup_label.as_bytes())?;
    if !stopped.tablespace_map.is_empty() {
        put(&mut *lane, "tablespace_map", stopped.tablespace_map.as_bytes())?;
    }
    put(&mut *lane, CONTROL_FILE, control)?;
    lane.finish()
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "it was cancelled")
}

/// Tells the threads of the copy to stop when the backup is given up, whichever way that happens.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs the copy and gives it up when the session is lost, because the server has then forgotten the backup, or when
/// it is cancelled. Its threads are waited for, so that nobody writes for a backup that was given up.
async fn copy_with_heartbeat(session: &Session, copy: Copy, cancel: &CancellationToken) -> Result<Copied> {
    let stop = StopOnDrop(copy.stop.clone());
    let copying = run_on_thread("base-walk", move || copy.run());
    tokio::pin!(copying);
    let mut beat = tokio::time::interval(HEARTBEAT);
    let given_up = loop {
        tokio::select! {
            outcome = &mut copying => return outcome,
            () = cancel.cancelled() => break cancelled(),
            _ = beat.tick() => {
                if let Err(error) = session.value::<i32>("SELECT 1", &[]).await {
                    break error.while_doing("the session of the backup was lost");
                }
            }
        }
    };
    drop(stop);
    // What it says now is only that it was stopped.
    let _ = copying.await;
    Err(given_up)
}

/// Begins the backup; returns when, and the position that its log begins at.
async fn start(source: &SourceSession, label: &str) -> Result<(Timestamp, Lsn)> {
    // A line end could forge lines of backup_label; the server's limit is 1024 bytes (MAXPGPATH).
    let label: String = label.chars().filter(|c| !c.is_control()).take(200).collect();
    let call = match source.session.major_number() {
        // The third argument: not exclusive.
        ..15 => "pg_start_backup($1, true, false)",
        _ => "pg_backup_start($1, true)",
    };
    let sql = format!("SELECT {CLOCK_NOW}, {call}::text");
    let row = source.session.row_within(START_LIMIT, &sql, &[&label]).await.map_err(|error| match error.kind() {
        Kind::Forbidden => error.hint(format!(
            "as a superuser: GRANT EXECUTE ON FUNCTION {} TO <role of the agent>; 'keiki doctor' prints all of them",
            function_names(source)[0]
        )),
        _ => error,
    });
    let row = row.context(|| "cannot begin the backup")?;
    Ok((timestamp_column(&row, 0)?, lsn_column(&row, 1)?))
}

/// The two functions with their argument types, for GRANT.
pub(super) fn function_names(source: &SourceSession) -> [&'static str; 2] {
    match source.session.major_number() {
        ..15 => ["pg_start_backup(text, boolean, boolean)", "pg_stop_backup(boolean, boolean)"],
        _ => ["pg_backup_start(text, boolean)", "pg_backup_stop(boolean)"],
    }
}

/// What the server says at the end of a backup.
struct Stopped {
    position: Lsn,
    backup_label: String,
    tablespace_map: String,
    ended_at: Timestamp,
}

async fn stop(source: &SourceSession, limit: Duration) -> Result<Stopped> {
    // Not waiting for the archive: whoever publishes the backup waits until the log is in the repository.
    let call = match source.session.major_number() {
        ..15 => "pg_stop_backup(false, false)",
        _ => "pg_backup_stop(false)",
    };
    let sql = format!("SELECT lsn::text, labelfile, spcmapfile, {CLOCK_NOW} FROM {call}");
    let row = source.session.row_within(limit, &sql, &[]).await.context(|| "cannot end the backup")?;
    Ok(Stopped {
        position: lsn_column(&row, 0)?,
        backup_label: column(&row, 1)?,
        tablespace_map: column::<Option<String>>(&row, 2)?.unwrap_or_default(),
        ended_at: timestamp_column(&row, 3)?,
    })
}

fn put(lane: &mut dyn BaseLane, path: &str, content: &[u8]) -> Result<()> {
    lane.begin(FileMeta { path: path.to_string(), kind: FileKind::Regular, mode: 0o600 })?;
    lane.write(content)?;
    lane.end()
}
