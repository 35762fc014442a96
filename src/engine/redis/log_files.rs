//! Which files of the log are to be shipped, and how far they may be read.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};

use crate::base::watch::DirectoryWatch;
use crate::engine::redis::Inner;
use crate::engine::redis::geometry::{file_name, file_number};
use crate::engine::{DurableEnd, LogListing};
use crate::error::{Context, Error, Kind, Result};
use crate::model::log::LogFile;
use crate::model::position::Position;

/// How often is looked for new increments while nothing tells of them.
const LOOK_SECONDS: u64 = 5;

/// The log files after `after` and the durable end: see [`crate::engine::Engine::list_log`].
pub(super) async fn list(inner: &Inner, after: Option<&str>) -> Result<LogListing> {
    let what = || format!("cannot list the log of instance '{}'", inner.source().name);
    let seen = inner.observe().await.context(what)?;
    let after = after.map(file_number).transpose().context(what)?;
    let last = seen.files.last();
    let last = last.ok_or_else(|| Error::new(Kind::Server, "the manifest names no increments")).context(what)?;
    // Later instants cannot be told from each other, so they are not promised.
    let observed_at = seen.timed_until.map_or(seen.observed_at, |until| seen.observed_at.min(until));
    let position = Position::File { number: last.held.number, offset: last.readable_bytes };
    let files = seen.files.iter().filter(|file| after.is_none_or(|after| file.held.number > after));
    let files = files.map(|file| LogFile {
        name: file_name(file.held.number),
        readable_bytes: file.readable_bytes,
        sealed: file.finished,
    });
    Ok(LogListing {
        files: files.filter(|file| file.readable_bytes > 0).collect(),
        durable_end: DurableEnd { position, observed_at },
    })
}

/// Looks whenever something changes in the directory of the append-only file, so that new increments are linked before
/// the server can delete them, also while a slow repository makes the rounds of shipping long. Ends with the guard.
pub(super) fn watch(inner: &Arc<Inner>) -> DropGuard {
    let cancel = CancellationToken::new();
    let (weak, ended) = (Arc::downgrade(inner), cancel.clone());
    tokio::spawn(async move {
        tokio::select! {
            () = ended.cancelled() => {}
            () = keep_looking(weak) => {}
        }
    });
    cancel.drop_guard()
}

async fn keep_looking(inner: Weak<Inner>) {
    let mut watched: Option<(std::path::PathBuf, DirectoryWatch)> = None;
    loop {
        let Some(strong) = inner.upgrade() else { return };
        if let Some(hold) = strong.hold().await {
            let dir = hold.append_dir().to_path_buf();
            if watched.as_ref().is_none_or(|(path, _)| *path != dir) {
                watched = DirectoryWatch::new([dir.clone()]).ok().map(|watch| (dir, watch));
            }
            // Whoever lists the log says what is wrong.
            if let Err(error) = strong.observe().await {
                tracing::debug!("cannot look at the log of instance '{}' now: {error}", strong.source().name);
            }
        }
        drop(strong);
        let pause = tokio::time::sleep(Duration::from_secs(LOOK_SECONDS));
        match &mut watched {
            Some((_, watch)) => tokio::select! {
                () = watch.changed() => {}
                () = pause => {}
            },
            None => pause.await,
        }
    }
}
