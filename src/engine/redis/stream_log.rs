//! The replication stream as the log of an instance: what of it may be shipped, and what is risky about the server.

use std::collections::BTreeMap;

use crate::base::bulk::run_blocking;
use crate::base::durable::remove_dir_all_durable;
use crate::engine::redis::check_source::{risk_items, server_items};
use crate::engine::redis::geometry::{file_name, file_number};
use crate::engine::redis::source::{require_primary, server_time};
use crate::engine::redis::spool::{SPOOL_DIR, SpoolFile};
use crate::engine::redis::{Inner, permissions};
use crate::engine::{DurableEnd, LogListing};
use crate::error::{Context, Error, Kind, Result};
use crate::model::bytes_text::human_bytes;
use crate::model::check::CheckItem;
use crate::model::check::Verdict;
use crate::model::log::LogFile;
use crate::model::position::Position;

/// Where a setting has a value that costs something: name, value, what it means, what to do.
const RISKS: [(&str, &str, &str, &str); 2] = [
    (
        "repl-diskless-sync",
        "no",
        "for each backup the server writes a snapshot to its own disk first",
        "redis-cli CONFIG SET repl-diskless-sync yes",
    ),
    (
        "rdbchecksum",
        "no",
        "damage in a snapshot cannot be noticed before it is loaded",
        "remove 'rdbchecksum no' from the server's configuration",
    ),
];

/// The log files after `after` and the durable end: see [`crate::engine::Engine::list_log`].
pub(super) async fn list(inner: &Inner, after: Option<&str>) -> Result<LogListing> {
    let what = || format!("cannot list the log of instance '{}'", inner.source().name);
    let after = after.map(file_number).transpose().context(what)?;
    let (observed_at, files) = look(inner).await.context(what)?;
    let last = files.last().ok_or_else(|| Error::new(Kind::Server, "the replication stream has not begun"));
    let last = last.context(what)?;
    let position = Position::File { number: last.number, offset: last.readable_bytes };
    let files = files.iter().filter(|file| after.is_none_or(|after| file.number > after));
    let files = files.map(|file| LogFile {
        name: file_name(file.number),
        readable_bytes: file.readable_bytes,
        sealed: file.finished,
    });
    Ok(LogListing {
        files: files.filter(|file| file.readable_bytes > 0).collect(),
        durable_end: DurableEnd { position, observed_at },
    })
}

/// The files, which hold everything that was executed before the instant.
async fn look(inner: &Inner) -> Result<(jiff::Timestamp, Vec<SpoolFile>)> {
    inner.follower().wait_until_following().await?;
    // The time is asked first: everything that was executed before lies before the offset.
    let asked = inner.with_session(async |session| {
        let at = server_time(session).await?;
        Ok((at, session.info(&["persistence", "replication"]).await?))
    });
    let (at, info) = asked.await?;
    require_primary(inner.source(), &info)?;
    let (history, offset) = place_of(&info)?;
    let follower = inner.follower();
    follower.wait_for(&history, offset).await?;
    Ok((at, follower.look(at, offset).await?))
}

/// Where a server's replication stream is, in the lines of INFO.
pub(super) fn place_of(info: &BTreeMap<String, String>) -> Result<(String, u64)> {
    let history = info.get("master_replid").cloned();
    let offset = info.get("master_repl_offset").and_then(|text| text.parse().ok());
    history
        .zip(offset)
        .ok_or_else(|| Error::new(Kind::Server, "the server does not say where its replication stream is"))
}

/// Removes what the agent has put into the server's directory.
pub(super) async fn give_up(inner: &Inner) -> Result<()> {
    let dir = inner.source().data_dir.join(SPOOL_DIR);
    run_blocking("detach", move || match dir.is_dir() {
        true => remove_dir_all_durable(&dir),
        false => Ok(()),
    })
    .await
}

/// What is wrong or risky with the server as a source.
pub(super) async fn check_source(inner: &Inner) -> Result<Vec<CheckItem>> {
    let name = &inner.source().name;
    let asked = inner.with_session(async |session| {
        let info = session.info(&["server", "persistence", "replication", "cluster"]).await?;
        let settings = session.settings("r*").await?;
        Ok((info, settings, permissions::check(session, &inner.source().endpoint, inner.source().log).await?))
    });
    let (info, settings, may) = asked.await.context(|| format!("cannot ask instance '{name}'"))?;
    let mut items = server_items(&info);
    items.extend(risk_items(&RISKS, &settings));
    items.push(may);
    if items.iter().any(|item| item.verdict == Verdict::Fail) {
        return Ok(items);
    }
    items.push(match look(inner).await {
        Ok((_, files)) => {
            let backlog = settings.get("repl-backlog-size").and_then(|text| text.parse().ok()).map_or_else(
                || "the server's backlog".to_string(),
                |bytes: u64| format!("the server's backlog of {}", human_bytes(bytes)),
            );
            let waiting: u64 = files.iter().filter(|file| file.finished).map(|file| file.readable_bytes).sum();
            CheckItem::pass(
                "replication stream",
                format!(
                    "followed; {} wait to be shipped; {backlog} bridges an absence of the agent while less than that is \
                     written",
                    human_bytes(waiting)
                ),
            )
        }
        Err(error) => {
            CheckItem::fail("replication stream", error.message(), error.hint_text().unwrap_or("see the agent's log"))
        }
    });
    Ok(items)
}
