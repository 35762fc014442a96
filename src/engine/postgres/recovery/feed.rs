//! Gives the log to the server: segments are written beside their place in `pg_wal` and handed over by rename.
//!
//! What the server sees is only ever a whole segment of which every byte will stay: a segment waits under another name
//! until each record that begins in it has been read to its end and was found to be wanted. How far the log is ahead
//! of replay is bounded in bytes and by free disk space.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::path::LogPath;
use super::replica::Replica;
use super::walker::{Finding, Walker};
use crate::base::bulk::run_blocking;
use crate::base::durable::free_bytes;
use crate::base::ownership::give_to;
use crate::base::users::User;
use crate::engine::postgres::ondisk::segment::{SegmentName, SegmentSize};
use crate::engine::postgres::ondisk::wal::Cut;
use crate::engine::postgres::server::pause;
use crate::engine::{LogSource, Progress};
use crate::error::{Context, Error, Kind, Result};
use crate::model::position::Lsn;

/// Log is read in pieces of at most this size; three of them are in memory at a time.
const PIECE_BYTES: usize = 16 << 20;

/// How far the log may be ahead of replay: this many segments, but not more than this many bytes, except that two
/// segments are always allowed, because the server may need the second to finish the first.
const AHEAD_SEGMENTS: u64 = 16;
const AHEAD_BYTES_MAX: u64 = 1 << 30;

/// Free space that is left to the server for its data, in segments and in bytes; the larger counts.
const RESERVED_SEGMENTS: u64 = 4;
const RESERVED_BYTES: u64 = 128 << 20;

/// How long to wait for a server whose position cannot be seen before another segment is risked.
const BLIND_SECONDS: u64 = 10;

/// How long a full disk may stay full without any replay before that is an error.
const FULL_SECONDS: u64 = 60;

/// How many segments behind the end of the log are asked for, to tell an end from a hole.
const HOLE_SEGMENTS: u64 = 16;

/// Prefix of segments that the server must not see yet. The server ignores such names, and a backup leaves them out.
const WAITING_PREFIX: &str = "keiki-waiting.";

/// A part of a segment on its way.
struct Piece {
    segment: SegmentName,
    from: u64,
    bytes: Bytes,
    /// The last piece that there is of this segment, and whether the segment is complete with it.
    is_last: bool,
    is_complete: bool,
}

/// A segment that is on disk, but not handed over.
struct Waiting {
    segment: SegmentName,
    path: PathBuf,
}

/// What a feed works with.
pub struct Feed<'a> {
    pub logs: Arc<dyn LogSource>,
    pub progress: Arc<dyn Progress>,
    pub cancel: &'a CancellationToken,
    pub path: LogPath,
    pub size: SegmentSize,
    /// Where reading begins, and from where on the server needs segments.
    pub read_from: Lsn,
    pub hand_over_from: Lsn,
    pub wal_dir: PathBuf,
    pub user: User,
    /// The end of the log there is, or of what is wanted of it, as far as it is known.
    pub expected_end: Lsn,
}

impl Feed<'_> {
    /// Reads the log until the walker has found the end, handing over what is safe. Returns what has still to be
    /// handed over, in order; its last segment may hold more than is wanted.
    pub async fn walk(&self, mut walker: Walker, replica: &mut Replica<'_>) -> Result<(Walker, Rest)> {
        remove_waiting(&self.wal_dir)?;
        let (_reader, mut pieces) = self.read_ahead();
        let mut waiting = VecDeque::new();
        let mut open: Option<(Waiting, File)> = None;
        while let Some(piece) = pieces.recv().await.transpose()? {
            if self.cancel.is_cancelled() {
                return Err(Error::new(Kind::Cancelled, "cancelled while the log was replayed"));
            }
            let (segment, is_last, is_complete) = (piece.segment, piece.is_last, piece.is_complete);
            let current = match open.take() {
                Some(current) => current,
                None => self.create(segment)?,
            };
            let context = (segment.render(self.size), segment.start(self.size));
            let (back, file) = run_blocking("wal", move || take_piece(walker, current.1, &piece, context)).await?;
            walker = back;
            let current = (current.0, file);
            if !is_last && walker.finding().is_none() {
                open = Some(current);
                continue;
            }
            current.1.set_len(u64::from(self.size.bytes())).context(|| "cannot extend a log segment")?;
            waiting.push_back(current.0);
            if let Some(finding) = walker.finding() {
                self.check_end(finding, segment).await?;
                break;
            }
            if !is_complete {
                self.check_last(segment, &walker).await?;
                break;
            }
            self.hand_over_decided(&walker, &mut waiting, replica).await?;
        }
        if walker.finding().is_none() && !walker.cutter().has_reached_position() {
            self.check_hole(self.size.number_of(walker.position())).await?;
        }
        Ok((walker, Rest { waiting }))
    }

    /// Reads pieces on a task of its own, one ahead, so that reading and replaying overlap.
    fn read_ahead(&self) -> (AbortOnDropHandle<()>, mpsc::Receiver<Result<Piece>>) {
        let (sender, receiver) = mpsc::channel(1);
        let (logs, path, size) = (self.logs.clone(), self.path.clone(), self.size);
        let first = size.number_of(self.read_from);
        let task = tokio::spawn(async move {
            if let Err(error) = read_pieces(logs.as_ref(), &path, size, first, &sender).await {
                // Nobody to tell means nobody waits.
                let _ = sender.send(Err(error)).await;
            }
        });
        (AbortOnDropHandle::new(task), receiver)
    }

    fn create(&self, segment: SegmentName) -> Result<(Waiting, File)> {
        let path = self.wal_dir.join(format!("{WAITING_PREFIX}{}", segment.render(self.size)));
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .context(|| format!("cannot create '{}'", path.display()))?;
        give_to(&self.user, &path)?;
        Ok((Waiting { segment, path }, file))
    }

    /// The log ends behind the complete segment before `next`. Log a little further on shows that it is a hole.
    pub async fn check_hole(&self, next: u64) -> Result<()> {
        for number in next.saturating_add(1)..=next.saturating_add(HOLE_SEGMENTS) {
            let name = self.path.segment(number, self.size).render(self.size);
            if self.logs.available(&name).await?.is_some() {
                let missing = self.path.segment(next, self.size).render(self.size);
                let reason = format!("log file '{missing}' is not in the archive, although '{name}' is");
                return Err(Error::new(Kind::NotFound, reason)
                    .hint("'keiki window' shows the holes; choose a target before it, or a later backup"));
            }
        }
        Ok(())
    }

    /// Whether a log that ends inside `segment` really ends there. Log behind an end is damage, never the end.
    async fn check_end(&self, finding: Finding, segment: SegmentName) -> Result<()> {
        let Finding::End(end) = finding else { return Ok(()) };
        let next = self.path.segment(segment.number.saturating_add(1), self.size).render(self.size);
        let has_more = self.logs.available(&next).await?.is_some();
        if end.reason.is_ordinary() && !has_more {
            return Ok(());
        }
        let name = segment.render(self.size);
        let reason = format!(
            "cannot replay log file '{name}': the log ends at '{}': cannot read what lies at '{}': {}",
            end.valid_until, end.at, end.reason
        );
        Err(Error::new(Kind::Damaged, reason).hint(
            "the archived log is damaged there: a target before that position, or a later backup, can still be cloned",
        ))
    }

    /// A segment of which only the beginning is archived must be the last one.
    async fn check_last(&self, segment: SegmentName, walker: &Walker) -> Result<()> {
        let next = self.path.segment(segment.number.saturating_add(1), self.size).render(self.size);
        if self.logs.available(&next).await?.is_none() {
            return Ok(());
        }
        let (name, end) = (segment.render(self.size), walker.position());
        Err(Error::new(
            Kind::Damaged,
            format!("cannot replay log file '{name}': the archive has it only up to '{end}', although it has '{next}'"),
        )
        .hint("'keiki window' shows what can be reached"))
    }

    /// Hands over the segments at the front that nothing can be cut from any more.
    async fn hand_over_decided(
        &self,
        walker: &Walker,
        waiting: &mut VecDeque<Waiting>,
        replica: &mut Replica<'_>,
    ) -> Result<()> {
        while let Some(first) = waiting.front() {
            if first.segment.end(self.size) > walker.decided_until() {
                return Ok(());
            }
            if let Some(first) = waiting.pop_front() {
                self.hand_over(walker, first, replica).await?;
            }
        }
        Ok(())
    }

    async fn hand_over(&self, walker: &Walker, waiting: Waiting, replica: &mut Replica<'_>) -> Result<()> {
        if waiting.segment.end(self.size) <= self.hand_over_from {
            // The server has replayed it in an earlier life and will not ask for it again.
            return std::fs::remove_file(&waiting.path)
                .context(|| format!("cannot remove '{}'", waiting.path.display()));
        }
        if let Some(parameters) = walker.parameters() {
            replica.require_parameters(parameters).await?;
        }
        self.wait_for_room(waiting.segment.start(self.size), replica).await?;
        let place = self.wal_dir.join(waiting.segment.render(self.size));
        std::fs::rename(&waiting.path, &place).context(|| format!("cannot put '{}' in its place", place.display()))?;
        if !replica.is_started() {
            replica.start()?;
        }
        Ok(())
    }

    /// Waits until the server has come near enough to `start` and the disk has room.
    async fn wait_for_room(&self, start: Lsn, replica: &mut Replica<'_>) -> Result<()> {
        if !replica.is_started() {
            return Ok(());
        }
        let segment_bytes = u64::from(self.size.bytes());
        let ahead_max = (AHEAD_SEGMENTS * segment_bytes).min(AHEAD_BYTES_MAX).max(2 * segment_bytes);
        let reserve = (RESERVED_SEGMENTS * segment_bytes).max(RESERVED_BYTES);
        let began = Instant::now();
        let mut was_full_since: Option<Instant> = None;
        loop {
            let position = replica.position().await?;
            if let Some(position) = position {
                self.show(position);
            }
            let is_near = match position {
                Some(position) => start.0.saturating_sub(position.0) < ahead_max,
                None => began.elapsed() > Duration::from_secs(BLIND_SECONDS),
            };
            let is_full = free_bytes(&self.wal_dir)? < reserve;
            if is_near && !is_full {
                return Ok(());
            }
            if is_full {
                if was_full_since.get_or_insert_with(Instant::now).elapsed() > Duration::from_secs(FULL_SECONDS) {
                    return Err(Error::new(
                        Kind::Full,
                        format!("cannot go on replaying: the file system of '{}' is full", self.wal_dir.display()),
                    )
                    .hint("free some space on it, then 'keiki job resume'"));
                }
                replica.request_restart_point().await?;
            }
            pause(self.cancel).await?;
        }
    }

    /// Says how far replay is.
    pub fn show(&self, position: Lsn) {
        let done = position.0.saturating_sub(self.read_from.0);
        self.progress.set(done, self.expected_end.0.saturating_sub(self.read_from.0).max(done));
    }

    /// Cuts what was not handed over yet and hands it over: the last act, after which the server has the whole log.
    pub async fn hand_over_rest(&self, walker: &Walker, rest: Rest, cut: Cut, replica: &mut Replica<'_>) -> Result<()> {
        for waiting in rest.waiting {
            let start = waiting.segment.start(self.size);
            if start >= cut.keep_until {
                std::fs::remove_file(&waiting.path)
                    .context(|| format!("cannot remove '{}'", waiting.path.display()))?;
                continue;
            }
            let keep = cut.keep_until.0.saturating_sub(start.0).min(u64::from(self.size.bytes()));
            // Cutting and extending leaves a hole behind the last record: zeros, of which none is written.
            let file = std::fs::OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&waiting.path);
            file.and_then(|file| file.set_len(keep).and_then(|()| file.set_len(u64::from(self.size.bytes()))))
                .context(|| format!("cannot cut '{}'", waiting.path.display()))?;
            self.hand_over(walker, waiting, replica).await?;
        }
        if !replica.is_started() {
            replica.start()?;
        }
        Ok(())
    }
}

/// What was read but not handed over.
pub struct Rest {
    waiting: VecDeque<Waiting>,
}

/// Reads a piece, then writes it. On a thread for blocking work.
fn take_piece(mut walker: Walker, mut file: File, piece: &Piece, context: (String, Lsn)) -> Result<(Walker, File)> {
    let (name, segment_start) = context;
    let piece_start = segment_start.0 + piece.from;
    // Reading begins somewhere inside the first segment; all others are read from their first byte.
    let skip = walker.position().0.saturating_sub(piece_start);
    if let Some(bytes) = usize::try_from(skip).ok().and_then(|skip| piece.bytes.get(skip..)) {
        walker.feed(bytes).context(|| format!("cannot replay log file '{name}'"))?;
    }
    file.write_all(&piece.bytes).context(|| format!("cannot write log file '{name}'"))?;
    Ok((walker, file))
}

async fn read_pieces(
    logs: &dyn LogSource,
    path: &LogPath,
    size: SegmentSize,
    first: u64,
    sender: &mpsc::Sender<Result<Piece>>,
) -> Result<()> {
    for number in first.. {
        let segment = path.segment(number, size);
        let name = segment.render(size);
        let Some(available) = logs.available(&name).await? else { return Ok(()) };
        if available > u64::from(size.bytes()) {
            let reason =
                format!("log file '{name}' has {available} bytes in the archive, more than a segment can have");
            return Err(Error::new(Kind::Damaged, reason).hint("does the archive belong to another server?"));
        }
        let mut from = 0;
        while from < available {
            let wanted = usize::try_from(available - from).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            let bytes = logs.read(&name, from, wanted).await?;
            if bytes.is_empty() || bytes.len() > wanted {
                let reason = format!("reading {wanted} bytes of log file '{name}' gave {}", bytes.len());
                return Err(Error::new(Kind::Internal, reason));
            }
            let to = from + bytes.len() as u64;
            let (is_last, is_complete) = (to == available, to == u64::from(size.bytes()));
            if sender.send(Ok(Piece { segment, from, bytes, is_last, is_complete })).await.is_err() {
                return Ok(());
            }
            from = to;
        }
        if available < u64::from(size.bytes()) {
            return Ok(());
        }
    }
    Ok(())
}

/// Removes segments that an earlier attempt left waiting.
pub fn remove_waiting(wal_dir: &Path) -> Result<()> {
    let what = || format!("cannot clean up '{}'", wal_dir.display());
    for entry in std::fs::read_dir(wal_dir).context(what)? {
        let entry = entry.context(what)?;
        if entry.file_name().to_string_lossy().starts_with(WAITING_PREFIX) {
            std::fs::remove_file(entry.path()).context(what)?;
        }
    }
    Ok(())
}

/// The end of the log there is, found with few questions: the archive has no holes on the way. At least `from`.
pub async fn end_of_log(logs: &dyn LogSource, path: &LogPath, size: SegmentSize, from: Lsn) -> Result<Lsn> {
    let first = size.number_of(from);
    let exists =
        async |number: u64| -> Result<Option<u64>> { logs.available(&path.segment(number, size).render(size)).await };
    if exists(first).await?.is_none() {
        return Ok(from);
    }
    let (mut known, mut step) = (first, 1u64);
    while exists(known.saturating_add(step)).await?.is_some() {
        known = known.saturating_add(step);
        step = step.saturating_mul(2);
    }
    // `known` exists and `known + step` does not.
    while step > 1 {
        step /= 2;
        if exists(known.saturating_add(step)).await?.is_some() {
            known = known.saturating_add(step);
        }
    }
    let bytes = exists(known).await?.unwrap_or(0);
    Ok(Lsn(size.start_of(known).0.saturating_add(bytes)).max(from))
}
