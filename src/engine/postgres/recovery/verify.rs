//! Asks a promoted server what it has become. Nothing is believed because a log line or an exit code says so.

use std::time::Duration;

use super::state::FoundEnd;
use crate::engine::postgres::clone::Grounds;
use crate::engine::postgres::ondisk::history::TimelineHistory;
use crate::engine::postgres::ondisk::segment::{RawSegmentName, history_file_name};
use crate::engine::postgres::session::{Session, column};
use crate::engine::{CloneSite, Recovered};
use crate::error::{Context, Error, Kind, Result};
use crate::model::check::CheckItem;
use crate::model::position::{Lsn, Position};
use crate::model::target::utc_text;

/// A server that has just been promoted may be busy with its first checkpoint.
const WRITE_SECONDS_MAX: u64 = 600;

/// Verifies that the server left its parent exactly at the end that was found, is the right one and can be written to.
pub async fn verify(session: &Session, grounds: &Grounds, site: &CloneSite, end: FoundEnd) -> Result<Recovered> {
    let row = session
        .row(
            "SELECT pg_is_in_recovery(), pg_walfile_name(pg_current_wal_lsn()), pg_current_wal_flush_lsn()::text, \
             (SELECT system_identifier FROM pg_control_system()), \
             to_char(pg_last_xact_replay_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US\"Z\"')",
            &[],
        )
        .await?;
    let mut verified = Vec::new();
    let segment: String = column(&row, 1)?;
    let timeline = RawSegmentName::parse(&segment)
        .map(|name| name.timeline)
        .ok_or_else(|| Error::new(Kind::Server, format!("the server says its log file is '{segment}'")))?;
    let now = Lsn::parse(&column::<String>(&row, 2)?)?;
    let left_at = switch_point(site, timeline, end)?;
    verified.push(CheckItem::pass(
        "position",
        format!(
            "left timeline {} at '{left_at}', the end that was found for the target; now on timeline {timeline}",
            end.timeline
        ),
    ));

    let system_id: i64 = column(&row, 3)?;
    if system_id.cast_unsigned() != grounds.control.system_identifier {
        return Err(wrong(format!("the server has system identifier {}", system_id.cast_unsigned())));
    }
    verified.push(CheckItem::pass("system identifier", system_id.cast_unsigned().to_string()));

    let replayed_at: Option<String> = column(&row, 4)?;
    let last_commit = end.last_commit_at.map_or(String::from("none since the backup"), utc_text);
    let asked = replayed_at.map_or(String::from("it was restarted since"), |time| format!("the server says {time}"));
    verified.push(CheckItem::pass("last transaction", format!("{last_commit} ({asked})")));

    prove_writable(session).await?;
    verified.push(CheckItem::pass("writable", "a table was made and rolled back"));
    Ok(Recovered {
        departed_at: Position::Wal { timeline: end.timeline, lsn: left_at },
        now_at: Position::Wal { timeline, lsn: now },
        last_commit_at: end.last_commit_at,
        verified,
    })
}

/// Where the server's own history says that it left its parent; an error if that is not the end that was found.
fn switch_point(site: &CloneSite, timeline: u32, end: FoundEnd) -> Result<Lsn> {
    if timeline <= end.timeline {
        return Err(wrong(format!("the server is on timeline {timeline}, its parent's own")));
    }
    let path = site.data_dir.join("pg_wal").join(history_file_name(timeline));
    let content = std::fs::read(&path).context(|| format!("cannot read '{}'", path.display()))?;
    let history = TimelineHistory::parse(timeline, &content)?;
    let left = history.ancestors().last().map(|ancestor| (ancestor.timeline, ancestor.left_at));
    match left {
        Some((from, left_at)) if from == end.timeline && left_at == end.left_at => Ok(left_at),
        Some((from, left_at)) => Err(wrong(format!(
            "the server left timeline {from} at '{left_at}', but the end that was found for the target is '{}' of \
             timeline {}",
            end.left_at, end.timeline
        ))),
        None => Err(wrong(format!("the history of timeline {timeline} is empty"))),
    }
}

async fn prove_writable(session: &Session) -> Result<()> {
    // Settings of the role or the database may make transactions read-only; that is not what is asked here.
    let sql = "BEGIN READ WRITE; CREATE TEMPORARY TABLE keiki_probe (probe int) ON COMMIT DROP; \
               INSERT INTO keiki_probe VALUES (1); ROLLBACK";
    let done = tokio::time::timeout(Duration::from_secs(WRITE_SECONDS_MAX), session.execute_batch(sql)).await;
    match done {
        Ok(outcome) => outcome.context(|| "cannot write to the recovered server"),
        Err(_) => Err(Error::new(Kind::Server, "cannot write to the recovered server: it does not answer")),
    }
}

fn wrong(what: String) -> Error {
    Error::new(Kind::Damaged, format!("the recovered server is not what was ordered: {what}"))
        .hint("discard the clone; if it happens again, this is a defect of keiki: keep the server's log")
}
