//! The base backup of a server without an append-only file: a snapshot that it sends to a replica.
//!
//! Nothing is written on the server's disk (`repl-diskless-sync yes`, the default since Redis 7): a child process of the
//! server sends the data as they are. That costs what a fork costs: the pages that change meanwhile are there twice, and the
//! fork itself takes about 10 ms for each GiB in memory. The child goes as fast as its bytes are taken; a repository that
//! takes none for a minute makes the server give up. BGSAVE costs the same fork and the disk besides. The server waits a
//! moment for other replicas first (`repl-diskless-sync-delay`, 5 seconds).
//!
//! The link says that it wants the snapshot and nothing behind it, so the server keeps no stream for it. The snapshot is of
//! one offset of the replication stream, and the log that the follower writes goes on exactly there: start and stop of the
//! backup are that place. Its checksum is verified on the way, and in memory there are a few pieces at a time.
//!
//! A backup that nobody waits for takes the snapshot that the server has saved lately instead (`saved`), if there is one.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_on_thread;
use crate::engine::redis::Inner;
use crate::engine::redis::backup::{BASE_FACT, DATABASE_FACT, LOG_TIMES_RECEIVED, RDB_VERSION_FACT, describe};
use crate::engine::redis::ondisk::rdb::{HEADER_BYTES_WANTED, RdbCheck, RdbHeader, RdbVerdict};
use crate::engine::redis::replica::{Answer, Link, LinkUse, SnapshotEnd};
use crate::engine::redis::saved::{self, Saved};
use crate::engine::redis::settings::{APPEND_DIR, APPEND_FILE};
use crate::engine::redis::source::{require_primary, server_time};
use crate::engine::redis::stream_log::place_of;
use crate::engine::{BaseSink, BaseSpan};
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::{FileKind, FileMeta};

const PIECE_BYTES: usize = 1 << 20;
/// Pieces between the server and the sink.
const PIECES_WAITING: usize = 4;

/// Takes the backup: see [`crate::engine::Engine::back_up`].
pub(super) async fn back_up(
    inner: &Inner,
    label: &str,
    sink: Arc<dyn BaseSink>,
    cancel: CancellationToken,
) -> Result<BaseSpan> {
    let what = || format!("cannot back up instance '{}'", inner.source().name);
    tokio::select! {
        outcome = run(inner, label, sink, cancel.clone()) => outcome.context(what),
        // The link goes with it, and the server's child process with that.
        () = cancel.cancelled() => Err(Error::new(Kind::Cancelled, "it was cancelled")).context(what),
    }
}

/// Takes the backup of a snapshot that the server has saved lately, if there is one whose place in the log is known;
/// otherwise as [`back_up`].
pub(super) async fn back_up_cheaply(
    inner: &Inner,
    label: &str,
    sink: Arc<dyn BaseSink>,
    cancel: CancellationToken,
) -> Result<BaseSpan> {
    let what = || format!("cannot back up instance '{}'", inner.source().name);
    inner.follower().wait_until_following().await.context(what)?;
    match saved::find(inner).await.context(what)? {
        Some(found) => run_saved(inner, found, label, sink, cancel).await.context(what),
        None => back_up(inner, label, sink, cancel).await,
    }
}

async fn run_saved(
    inner: &Inner,
    found: Saved,
    label: &str,
    sink: Arc<dyn BaseSink>,
    cancel: CancellationToken,
) -> Result<BaseSpan> {
    let now = inner.with_session(server_time).await?.max(found.shown_from);
    let info = inner.with_session(async |session| session.info(&["memory"]).await).await?;
    let (start, database, path) = (found.start, found.database, found.path.clone());
    sink.expect_bytes(found.bytes);
    let (sender, receiver) = mpsc::channel(PIECES_WAITING);
    let reading = run_on_thread("redis-saved", move || read_saved(found, &sender));
    let writing = run_on_thread("redis-base", move || store(receiver, sink.as_ref(), &cancel));
    let (read, stored) = tokio::join!(reading, writing);
    let stored =
        stored.context(|| format!("cannot take the snapshot '{}', which the server has saved", path.display()));
    let (mut facts, verdict) = stored?;
    read?;
    tracing::info!("instance '{}': the backup is the snapshot that the server has saved", inner.source().name);
    facts.insert(DATABASE_FACT.to_string(), database.to_string());
    describe(inner, &mut facts, label, verdict, (LOG_TIMES_RECEIVED, &info)).await?;
    Ok(BaseSpan { start, stop: start, began_at: now, ended_at: now, facts, damaged_blocks: Vec::new() })
}

/// Reads a snapshot from the server's disk as `receive` does from a link. Blocking.
fn read_saved(mut found: Saved, sender: &mpsc::Sender<Bytes>) -> Result<()> {
    loop {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        let read = (&mut found.file).take(PIECE_BYTES as u64).read_to_end(&mut piece);
        read.context(|| format!("cannot read '{}'", found.path.display()))?;
        let is_last = piece.is_empty();
        if sender.blocking_send(piece.into()).is_err() {
            return Err(Error::new(Kind::Cancelled, "the sink takes no more"));
        }
        if is_last {
            return Ok(());
        }
    }
}

async fn run(inner: &Inner, label: &str, sink: Arc<dyn BaseSink>, cancel: CancellationToken) -> Result<BaseSpan> {
    inner.follower().wait_until_following().await?;
    let asked = inner.with_session(async |session| {
        let at = server_time(session).await?;
        Ok((at, session.info(&["persistence", "replication", "memory"]).await?))
    });
    let (began_at, info) = asked.await?;
    require_primary(inner.source(), &info)?;
    // The log must be there before the snapshot that it continues.
    let (history, offset) = place_of(&info)?;
    inner.follower().wait_for(&history, offset).await?;
    let mut link = Link::open(&inner.source().endpoint, LinkUse::Snapshot).await?;
    link.ask_snapshot().await?;
    let Answer::Full { history, offset } = link.answer().await? else {
        return Err(Error::new(Kind::Server, "the server sends no snapshot"));
    };
    // Whatever is executed from now on is not in the snapshot.
    let executed_at = inner.with_session(server_time).await?;
    // What goes on behind it may have been received together with what came before it, and later.
    let (start, shown_from) = inner.follower().locate(&history, offset).await?;
    let ended_at = executed_at.max(shown_from);
    let end = link.snapshot_end().await?;
    if let SnapshotEnd::Bytes(bytes) = end {
        sink.expect_bytes(bytes);
    }
    let (sender, receiver) = mpsc::channel(PIECES_WAITING);
    let writing = run_on_thread("redis-base", move || store(receiver, sink.as_ref(), &cancel));
    let (received, stored) = tokio::join!(receive(link, end, sender), writing);
    // A sink that fails ends the receiving too, so its error is the one that says why.
    let (mut facts, verdict) = stored?;
    received?;
    describe(inner, &mut facts, label, verdict, (LOG_TIMES_RECEIVED, &info)).await?;
    Ok(BaseSpan { start, stop: start, began_at, ended_at, facts, damaged_blocks: Vec::new() })
}

/// Takes the snapshot from the link, piece by piece. A last piece that is empty says that it is whole.
async fn receive(mut link: Link, end: SnapshotEnd, sender: mpsc::Sender<Bytes>) -> Result<()> {
    let mut cutter = Cutter::new(end);
    while !cutter.is_whole() {
        let mut buffer = cutter.begin_piece();
        link.read(&mut buffer).await.map_err(|error| match error.kind() {
            Kind::Unreachable => error.while_doing("the snapshot is cut off").hint(
                "the server's log says why: a child process that failed, too little memory, or a slow repository",
            ),
            _ => error,
        })?;
        let piece = cutter.take(buffer);
        if !piece.is_empty() && sender.send(piece).await.is_err() {
            return Err(Error::new(Kind::Cancelled, "the sink takes no more"));
        }
    }
    let _ = sender.send(Bytes::new()).await;
    Ok(())
}

/// Finds the end of a snapshot among the bytes of a link.
#[derive(Debug)]
pub struct Cutter {
    end: SnapshotEnd,
    /// Bytes that may be the mark.
    tail: Vec<u8>,
    passed: u64,
    is_whole: bool,
}

impl Cutter {
    /// Begins before the first byte.
    pub fn new(end: SnapshotEnd) -> Cutter {
        Cutter { end, tail: Vec::new(), passed: 0, is_whole: end == SnapshotEnd::Bytes(0) }
    }

    /// Whether the last piece that was taken was the last of the snapshot.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// A buffer with room for what comes next, behind what was held back.
    pub fn begin_piece(&mut self) -> Vec<u8> {
        let mut buffer = Vec::with_capacity(PIECE_BYTES);
        buffer.append(&mut self.tail);
        buffer
    }

    /// Returns what of the buffer belongs to the snapshot for sure.
    pub fn take(&mut self, mut buffer: Vec<u8>) -> Bytes {
        match self.end {
            SnapshotEnd::Bytes(bytes) => {
                let left = bytes.saturating_sub(self.passed);
                buffer.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                self.is_whole = buffer.len() as u64 == left;
            }
            SnapshotEnd::Mark(mark) => {
                // Nothing follows the mark: the link wants the snapshot only.
                self.is_whole = buffer.ends_with(&mark);
                let kept = buffer.len().saturating_sub(mark.len());
                self.tail = buffer.split_off(kept);
            }
        }
        self.passed = self.passed.saturating_add(buffer.len() as u64);
        buffer.into()
    }
}

/// Checks the snapshot and gives it to the sink. Blocking.
fn store(
    mut pieces: mpsc::Receiver<Bytes>,
    sink: &dyn BaseSink,
    cancel: &CancellationToken,
) -> Result<(BTreeMap<String, String>, &'static str)> {
    let name = format!("{APPEND_FILE}.1.base.rdb");
    let mut lane = sink.lane()?;
    lane.begin(FileMeta { path: format!("{APPEND_DIR}/{name}"), kind: FileKind::Regular, mode: 0o600 })?;
    let mut check = RdbCheck::default();
    let mut head = Vec::new();
    let mut is_whole = false;
    while let Some(piece) = pieces.blocking_recv() {
        if cancel.is_cancelled() || sink.is_cancelled() {
            return Err(Error::new(Kind::Cancelled, "it was cancelled"));
        }
        is_whole = piece.is_empty();
        head.extend_from_slice(&piece[..piece.len().min(HEADER_BYTES_WANTED.saturating_sub(head.len()))]);
        check.update(&piece);
        lane.write(&piece)?;
    }
    if !is_whole {
        return Err(Error::new(Kind::Unreachable, "the server did not send its snapshot to the end")
            .hint("the server's log says why: a child process that failed, too little memory, or a slow repository"));
    }
    let verdict = check.finish().context(|| "the snapshot is damaged")?;
    lane.end()?;
    lane.finish()?;
    let mut facts = BTreeMap::from([(BASE_FACT.to_string(), name)]);
    facts.insert(RDB_VERSION_FACT.to_string(), RdbHeader::parse(&head)?.version.to_string());
    let verdict = match verdict {
        RdbVerdict::Verified => "verified",
        RdbVerdict::WithoutChecksum => "none",
    };
    Ok((facts, verdict))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::redis::replica::END_MARK_BYTES;

    /// What passes when the bytes come in pieces of this size, and whether it was whole after the last one and not before.
    fn cut(end: SnapshotEnd, bytes: &[u8], piece: usize) -> (Vec<u8>, bool) {
        let mut cutter = Cutter::new(end);
        let mut passed = Vec::new();
        for part in bytes.chunks(piece) {
            assert!(!cutter.is_whole(), "{piece}");
            let mut buffer = cutter.begin_piece();
            buffer.extend_from_slice(part);
            passed.extend_from_slice(&cutter.take(buffer));
        }
        (passed, cutter.is_whole())
    }

    #[test]
    fn a_snapshot_ends_where_its_length_or_its_mark_says_in_whatever_pieces_it_comes() {
        let mark = [b'm'; END_MARK_BYTES];
        for length in [0, 1, 39, 40, 41, 100] {
            // Like the mark, but too short.
            let snapshot: Vec<u8> = (0..length).map(|at| if at % 40 == 39 { b'x' } else { b'm' }).collect();
            let marked = [&snapshot[..], b"x", &mark[..]].concat();
            for piece in 1..150 {
                let (passed, is_whole) = cut(SnapshotEnd::Mark(mark), &marked, piece);
                assert_eq!((&passed[..snapshot.len()], passed.len(), is_whole), (&snapshot[..], length + 1, true));
                let (passed, is_whole) = cut(SnapshotEnd::Bytes(length as u64), &snapshot, piece);
                assert_eq!((passed, is_whole), (snapshot.clone(), true));
                if length > 0 {
                    assert!(!cut(SnapshotEnd::Bytes(length as u64 + 1), &snapshot, piece).1);
                }
            }
        }
    }
}
