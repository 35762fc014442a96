//! Threads that decode frames and write their content at its final places.
//!
//! Plain threads, because bulk work through the asynchronous runtime is several times slower. The queues are short, so
//! that memory is bounded and a slow disk slows the reading.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::error::{Context, Error, Kind, Result};
use crate::format::frame::FrameDecoder;
use crate::repo::backup_reader::StoredFrame;

/// Frames of up to 1 MiB that wait for one thread.
const QUEUE_FRAMES: usize = 4;

/// A file that is being restored: made already, with its length and owner, and not held open. A batch of records is
/// about more files than a process may have open; each thread holds the one that it writes.
pub struct MadeFile {
    pub path: PathBuf,
}

/// Where a stretch of a frame's content goes.
pub struct Landing {
    pub file: Arc<MadeFile>,
    pub at: u64,
    pub skip_bytes: usize,
    pub bytes: usize,
}

struct Piece {
    frame: StoredFrame,
    landings: Vec<Landing>,
}

/// A fixed number of writing threads.
pub struct Writers {
    queues: Vec<mpsc::Sender<Piece>>,
    threads: Vec<JoinHandle<()>>,
    failure: Arc<Mutex<Option<Error>>>,
    written_bytes: Arc<AtomicU64>,
    next: AtomicU64,
}

impl Writers {
    pub fn start(threads: usize) -> Result<Writers> {
        let mut writers = Writers {
            queues: Vec::new(),
            threads: Vec::new(),
            failure: Arc::new(Mutex::new(None)),
            written_bytes: Arc::new(AtomicU64::new(0)),
            next: AtomicU64::new(0),
        };
        for number in 0..threads.max(1) {
            let (queue, pieces) = mpsc::channel(QUEUE_FRAMES);
            let (failure, written_bytes) = (writers.failure.clone(), writers.written_bytes.clone());
            let decoder = FrameDecoder::new()?;
            let thread = std::thread::Builder::new()
                .name(format!("restore-{number}"))
                .spawn(move || write_pieces(pieces, decoder, &failure, &written_bytes))
                .context(|| "cannot start a thread that writes the clone")?;
            writers.queues.push(queue);
            writers.threads.push(thread);
        }
        Ok(writers)
    }

    /// Queues a frame with the places that its content goes to. An error is the first failure of any thread.
    pub async fn write(&self, frame: StoredFrame, landings: Vec<Landing>) -> Result<()> {
        self.check()?;
        let number = self.next.fetch_add(1, Ordering::Relaxed) % self.queues.len() as u64;
        if self.queues[number as usize].send(Piece { frame, landings }).await.is_err() {
            self.check()?;
            return Err(Error::new(Kind::Internal, "a thread that writes the clone has ended"));
        }
        Ok(())
    }

    /// Bytes that were given to the operating system so far.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }

    /// The counter behind `written_bytes`, which outlives the threads.
    pub fn written_counter(&self) -> Arc<AtomicU64> {
        self.written_bytes.clone()
    }

    fn check(&self) -> Result<()> {
        // The lock is held for a clone of the error only.
        match &*self.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Waits until everything is written. Blocking, for a thread. Nothing is durable yet: that is bought once, for the
    /// whole file system.
    pub fn finish(mut self) -> Result<()> {
        self.queues.clear();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                return Err(Error::new(Kind::Internal, "a thread that writes the clone panicked"));
            }
        }
        self.check()
    }
}

fn write_pieces(
    mut pieces: mpsc::Receiver<Piece>,
    mut decoder: FrameDecoder,
    failure: &Mutex<Option<Error>>,
    written_bytes: &AtomicU64,
) {
    let mut open = None;
    while let Some(piece) = pieces.blocking_recv() {
        match write_piece(&mut decoder, &mut open, &piece) {
            Ok(bytes) => {
                written_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            Err(error) => {
                failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
                // Dropping the queue tells whoever wants to write more.
                return;
            }
        }
    }
}

/// The file that a thread wrote last, still open: the next piece is often of the same one.
type LastFile = Option<(PathBuf, File)>;

fn open_file<'a>(open: &'a mut LastFile, path: &Path) -> Result<&'a File> {
    let (_, file) = match open.take() {
        Some(last) if last.0 == path => open.insert(last),
        _ => {
            let mut options = OpenOptions::new();
            let file = options.write(true).custom_flags(libc::O_NOFOLLOW).open(path);
            let file = file.context(|| format!("cannot open '{}'", path.display()))?;
            open.insert((path.to_path_buf(), file))
        }
    };
    Ok(file)
}

fn write_piece(decoder: &mut FrameDecoder, open: &mut LastFile, piece: &Piece) -> Result<u64> {
    let plain: Bytes = piece.frame.decode(decoder)?;
    let mut written = 0;
    for landing in &piece.landings {
        let end = landing.skip_bytes.saturating_add(landing.bytes);
        let stretch = plain.get(landing.skip_bytes..end).ok_or_else(|| {
            Error::new(
                Kind::Damaged,
                format!("cannot restore '{}': its frame is shorter than its record says", landing.file.path.display()),
            )
            .hint("choose another backup: 'keiki backup list' shows them")
        })?;
        let path = &landing.file.path;
        let file = open_file(open, path)?;
        file.write_all_at(stretch, landing.at).context(|| format!("cannot write '{}'", path.display()))?;
        begin_write_back(file, landing.at, stretch.len() as u64);
        written += stretch.len() as u64;
    }
    Ok(written)
}

/// Tells the kernel to begin writing back what was just written, so that the sync at the end is short
/// (sync_file_range(2), SYNC_FILE_RANGE_WRITE). A hint: its failure changes nothing but speed. Small pieces are not
/// worth a call.
fn begin_write_back(file: &File, offset: u64, bytes: u64) {
    const WORTH_A_CALL_BYTES: u64 = 1 << 20;
    let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(bytes)) else { return };
    if bytes >= WORTH_A_CALL_BYTES {
        // SAFETY: the descriptor is open for as long as `file` is borrowed, and the call touches no memory of ours.
        unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE) };
    }
}
