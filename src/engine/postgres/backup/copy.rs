//! Reads the files of a data directory on several threads and hands them to a sink.
//!
//! One thread walks and records directories and links; the others take files from a bounded queue. A file is read up
//! to the size at which it was listed and no further; one that is gone or shorter by now is normal, since the log
//! repeats what the server did to it. Pages of relations are checked on the way (`pages`).
//!
//! What was not in the page cache before is dropped from it again, so that a backup does not push the database's own
//! pages out; what was there stays.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::engine::postgres::backup::pages::{DamageReport, PageChecker};
use crate::engine::postgres::backup::walk::{Found, walk};
use crate::engine::postgres::ondisk::versions::Major;
use crate::engine::{BaseLane, BaseSink};
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::FileMeta;

const PIECE_BYTES: usize = 1 << 20;
/// How many files may wait for a reader.
const QUEUE_FILES: usize = 1024;
/// How many things that were left out are remembered by name.
const LEFT_OUT_NAMED: usize = 100;

/// What is to be copied, and how.
pub(super) struct Copy {
    pub data_dir: PathBuf,
    pub major: Major,
    /// Nothing if the cluster has no page checksums.
    pub pages: Option<PageChecker>,
    pub sink: Arc<dyn BaseSink>,
    /// Set by whoever wants the copy to end early.
    pub stop: Arc<AtomicBool>,
}

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Copied {
    pub damaged_blocks: Vec<String>,
    pub left_out: Vec<String>,
}

/// A file that waits for a reader.
struct Job {
    meta: FileMeta,
    from: PathBuf,
    bytes: u64,
}

impl Copy {
    /// Copies everything but `global/pg_control`. Blocking.
    pub fn run(&self) -> Result<Copied> {
        self.sink.expect_bytes(self.count_bytes()?);
        let damage = DamageReport::default();
        let (sender, receiver) = sync_channel::<Job>(QUEUE_FILES);
        let receiver = Mutex::new(receiver);
        // Opened here, so that a sink that cannot go on says so before any thread runs.
        let readers = self.sink.lanes_wanted().max(1);
        let lanes = (0..readers).map(|_| self.sink.lane()).collect::<Result<Vec<_>>>()?;
        let nodes = self.sink.lane()?;
        let mut outcomes: Vec<Result<()>> = Vec::new();
        let mut left_out = Vec::new();
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for lane in lanes {
                let reader = || {
                    // A panic would leave the walker waiting for a reader that never comes.
                    let _stop_if_unwinding = StopIfUnwinding(&self.stop);
                    let outcome = self.read_files(lane, &receiver, &damage);
                    self.stop_on_error(outcome)
                };
                match std::thread::Builder::new().name(String::from("base-reader")).spawn_scoped(scope, reader) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        outcomes.push(self.stop_on_error(Err(Error::io("cannot start a reader thread", error))));
                    }
                }
            }
            let walked = self.walk_files(nodes, sender, &mut left_out);
            outcomes.push(self.stop_on_error(walked));
            for thread in threads {
                let panicked = || Error::new(Kind::Internal, "a reader thread panicked");
                outcomes.push(thread.join().unwrap_or_else(|_| Err(panicked())));
            }
        });
        first_cause(outcomes)?;
        Ok(Copied { damaged_blocks: damage.into_lines(), left_out })
    }

    /// The sum of the listed sizes, for the progress bar: by the time of the copy it may be a little more or less.
    fn count_bytes(&self) -> Result<u64> {
        let mut sum: u64 = 0;
        walk(&self.data_dir, self.major, &mut |found| {
            if let Found::File { bytes, .. } = found {
                sum = sum.saturating_add(bytes);
            }
            self.check_stop()
        })?;
        Ok(sum)
    }

    fn walk_files(
        &self,
        mut nodes: Box<dyn BaseLane>,
        sender: SyncSender<Job>,
        left_out: &mut Vec<String>,
    ) -> Result<()> {
        walk(&self.data_dir, self.major, &mut |found| {
            self.check_stop()?;
            match found {
                Found::Node(meta) => nodes.begin(meta),
                Found::File { meta, from, bytes } => self.enqueue(&sender, Job { meta, from, bytes }),
                Found::LeftOut(what) => {
                    if left_out.len() < LEFT_OUT_NAMED {
                        left_out.push(what);
                    }
                    Ok(())
                }
            }
        })?;
        nodes.finish()
    }

    /// Waits for room in the queue, but not for readers that have stopped.
    fn enqueue(&self, sender: &SyncSender<Job>, mut job: Job) -> Result<()> {
        use std::sync::mpsc::TrySendError;
        loop {
            match sender.try_send(job) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(back)) => job = back,
                Err(TrySendError::Disconnected(_)) => return Err(stopped()),
            }
            self.check_stop()?;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    fn read_files(
        &self,
        mut lane: Box<dyn BaseLane>,
        receiver: &Mutex<Receiver<Job>>,
        damage: &DamageReport,
    ) -> Result<()> {
        let mut buffer = vec![0; PIECE_BYTES];
        loop {
            // The lock is held while waiting: one reader waits for the walker and the others for that reader.
            let next = receiver.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).recv();
            let Ok(job) = next else { break };
            self.copy_file(&mut *lane, &job, &mut buffer, damage)
                .context(|| format!("cannot copy '{}'", job.meta.path))?;
        }
        self.check_stop()?;
        lane.finish()
    }

    fn copy_file(&self, lane: &mut dyn BaseLane, job: &Job, buffer: &mut [u8], damage: &DamageReport) -> Result<()> {
        self.check_stop()?;
        let Some(file) = open_if_there(&job.from)? else { return Ok(()) };
        lane.begin(job.meta.clone())?;
        let pages = self.pages.as_ref().and_then(|checker| checker.for_file(Path::new(&job.meta.path)));
        let mut at: u64 = 0;
        while at < job.bytes {
            self.check_stop()?;
            let wanted = usize::try_from(job.bytes - at).unwrap_or(PIECE_BYTES).min(buffer.len());
            // In bounds: cut to the buffer just above.
            let piece = &mut buffer[..wanted];
            let read = read_gently(&file, piece, at).context(|| "cannot read")?;
            let piece = &mut piece[..read];
            if let Some(pages) = &pages {
                pages.check(&file, at, piece, damage)?;
            }
            lane.write(piece)?;
            at += read as u64;
            if read < wanted {
                break;
            }
        }
        lane.end()
    }

    fn check_stop(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) || self.sink.is_cancelled() { Err(stopped()) } else { Ok(()) }
    }

    fn stop_on_error<T>(&self, outcome: Result<T>) -> Result<T> {
        if outcome.is_err() {
            self.stop.store(true, Ordering::Relaxed);
        }
        outcome
    }
}

struct StopIfUnwinding<'a>(&'a AtomicBool);

impl Drop for StopIfUnwinding<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

fn stopped() -> Error {
    Error::new(Kind::Cancelled, "the backup was stopped")
}

/// The error that made the others stop, if there is one.
fn first_cause(outcomes: Vec<Result<()>>) -> Result<()> {
    let mut errors: Vec<Error> = outcomes.into_iter().filter_map(Result::err).collect();
    let cause = errors.iter().position(|error| error.kind() != Kind::Cancelled).unwrap_or(0);
    if errors.is_empty() { Ok(()) } else { Err(errors.swap_remove(cause)) }
}

fn open_if_there(path: &Path) -> Result<Option<File>> {
    let opened = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
    match opened {
        Ok(file) => {
            // Large reads are asked for as such; reading ahead would make pages look cached that only we wanted.
            // Advice only: a file system that does not take it serves the reads all the same.
            let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
            Ok(Some(file))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("cannot open", error)),
    }
}

/// Fills `piece` from `offset` on, less only at the end of the file, and leaves the page cache as it was.
fn read_gently(file: &File, piece: &mut [u8], offset: u64) -> std::io::Result<usize> {
    use std::os::unix::fs::FileExt;
    let cached = read_cached(file, piece, offset);
    let mut done = cached.unwrap_or(0);
    while done < piece.len() {
        match file.read_at(&mut piece[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    // What could not be served from the cache was brought there by us. Where the file system cannot tell the two
    // apart nothing is dropped: it might be the server's.
    if let Some(cached) = cached.filter(|cached| *cached < done) {
        let (from, length) = (offset + cached as u64, done - cached);
        if let (Ok(from), Ok(length)) = (i64::try_from(from), i64::try_from(length)) {
            // Advice only.
            let _ = posix_fadvise(file, from, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
    }
    Ok(done)
}

/// How many bytes from `offset` on the page cache served at once; `None` where that cannot be asked (preadv2(2),
/// RWF_NOWAIT).
fn read_cached(file: &File, piece: &mut [u8], offset: u64) -> Option<usize> {
    let vector = libc::iovec { iov_base: piece.as_mut_ptr().cast(), iov_len: piece.len() };
    // SAFETY: the vector describes `piece`, which outlives the call; the descriptor is open.
    let count = unsafe { libc::preadv2(file.as_raw_fd(), &vector, 1, i64::try_from(offset).ok()?, libc::RWF_NOWAIT) };
    match usize::try_from(count) {
        Ok(count) => Some(count),
        Err(_) if std::io::Error::last_os_error().kind() == std::io::ErrorKind::WouldBlock => Some(0),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gentle_read_fills_the_piece_or_ends_with_the_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..3_000_000u32).map(|index| (index % 251) as u8).collect();
        std::io::Write::write_all(&mut file, &content).unwrap();
        let opened = open_if_there(file.path()).unwrap().unwrap();
        let mut piece = vec![0; PIECE_BYTES];
        assert_eq!(read_gently(&opened, &mut piece, 1_000_000).unwrap(), PIECE_BYTES);
        assert_eq!(piece, content[1_000_000..1_000_000 + PIECE_BYTES]);
        let rest = content.len() - 2_500_000;
        assert_eq!(read_gently(&opened, &mut piece, 2_500_000).unwrap(), rest);
        assert_eq!(piece[..rest], content[2_500_000..]);
        assert_eq!(read_gently(&opened, &mut piece, 3_000_000).unwrap(), 0);
        assert!(open_if_there(Path::new("/nowhere/at/all")).unwrap().is_none());
    }

    #[test]
    fn the_cause_is_reported_and_not_that_others_stopped() {
        let outcomes = vec![Err(stopped()), Ok(()), Err(Error::new(Kind::Full, "disk full")), Err(stopped())];
        assert_eq!(first_cause(outcomes).unwrap_err().kind(), Kind::Full);
        assert_eq!(first_cause(vec![Err(stopped())]).unwrap_err().kind(), Kind::Cancelled);
        first_cause(vec![Ok(())]).unwrap();
    }
}
