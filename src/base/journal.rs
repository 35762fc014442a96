//! A journal: a file of lines that are durable one by one.
//!
//! Each line is the CRC-32C of its bytes as eight hexadecimal digits, a space, the bytes, and a line feed; so the bytes
//! are any text without NUL and line feed, usually one JSON value. Invariants:
//! * When `append` returns, the line is on the disk; when it fails, the line is not in the journal.
//! * A last line torn by a crash was never acknowledged. It is recognised by its missing line feed, or by NUL bytes
//!   where the file grew before its data arrived, is left out when reading, and cut off before the next line.
//! * Any other line that does not fit its checksum is damage, and the journal is refused (kind `Damaged`).
//! * One process writes: an open journal holds a lock on its file.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::durable::{fsync_dir, parent_of};
use crate::error::{Context, Error, Kind, Result};

/// No line is longer; a longer one in a file is not ours and would only fill the memory.
pub const LINE_BYTES_MAX: usize = 16 << 20;

/// Eight digits and a space.
const PREFIX_BYTES: usize = 9;

/// How long to wait for a lock that somebody holds, and how often to look.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// A journal that is open for appending.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Where the next line goes: everything before is good and durable.
    end_bytes: u64,
    /// After a failed fsync nobody knows what is on the disk (the kernel forgets the dirty pages), so nothing more is
    /// promised until the file has been read again.
    broken: bool,
}

/// A child process that this process is just starting has all its open files, and so its locks, until it becomes another
/// program (flock(2), execve(2)): a lock that was given up a moment ago may seem to be held for that long.
fn lock_patiently(file: &File) -> std::result::Result<(), TryLockError> {
    let patience_ends = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < patience_ends => std::thread::sleep(LOCK_POLL),
            outcome => return outcome,
        }
    }
}

impl Journal {
    /// Opens the journal at `path`, or creates an empty one with mode 0600, and returns its lines.
    pub fn open(path: &Path) -> Result<(Journal, Vec<Vec<u8>>)> {
        let what = || format!("cannot open journal '{}'", path.display());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .context(what)?;
        match lock_patiently(&file) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(Kind::Conflict, format!("{}: another process writes it", what()))
                    .hint("is a second keiki running with the same state directory?"));
            }
            Err(TryLockError::Error(error)) => return Err(Error::io(what(), error)),
        }
        fsync_dir(parent_of(path))?;
        let (lines, end_bytes) = read_lines(path, &file)?;
        // What was read is given out as true, so it must not vanish in a crash that comes after.
        file.sync_data().context(what)?;
        Ok((Journal { path: path.to_path_buf(), file, end_bytes, broken: false }, lines))
    }

    /// The lines of the journal at `path` without locking it, for showing; no file means no lines.
    pub fn read_all(path: &Path) -> Result<Vec<Vec<u8>>> {
        match File::open(path) {
            Ok(file) => Ok(read_lines(path, &file)?.0),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(Error::io(format!("cannot open journal '{}'", path.display()), error)),
        }
    }

    /// Adds a line and makes it durable.
    pub fn append(&mut self, line: &[u8]) -> Result<()> {
        let what = || format!("cannot append to journal '{}'", self.path.display());
        if line.len() > LINE_BYTES_MAX || line.iter().any(|byte| matches!(byte, b'\n' | 0)) {
            return Err(Error::new(Kind::Internal, format!("{}: the line is too long or not text", what())));
        }
        if self.broken {
            return Err(Error::new(Kind::System, format!("{}: an earlier write did not reach the disk", what()))
                .hint("see the kernel's log for errors of the disk, then restart the agent"));
        }
        let mut bytes = Vec::with_capacity(PREFIX_BYTES + line.len() + 1);
        bytes.extend_from_slice(format!("{:08x} ", crc32c(line)).as_bytes());
        bytes.extend_from_slice(line);
        bytes.push(b'\n');
        let written = self
            .file
            .metadata()
            .and_then(|known| if known.len() > self.end_bytes { self.file.set_len(self.end_bytes) } else { Ok(()) })
            .and_then(|()| self.file.write_all_at(&bytes, self.end_bytes));
        if let Err(error) = written {
            // A full disk leaves a torn line; it is cut now, or else by the next append or open.
            let _ = self.file.set_len(self.end_bytes);
            return Err(Error::io(what(), error));
        }
        if let Err(error) = self.file.sync_data() {
            self.broken = true;
            return Err(Error::io(what(), error));
        }
        self.end_bytes += bytes.len() as u64;
        Ok(())
    }
}

/// CRC-32C (Castagnoli), as in iSCSI (RFC 3720, appendix B.4).
fn crc32c(bytes: &[u8]) -> u32 {
    // The function returns 64 bits for every algorithm; a 32-bit checksum fills the lower half.
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// The good lines and the offset after them.
fn read_lines(path: &Path, file: &File) -> Result<(Vec<Vec<u8>>, u64)> {
    let what = || format!("cannot read journal '{}'", path.display());
    let mut reader = BufReader::new(file);
    let mut lines = Vec::new();
    let mut end_bytes = 0u64;
    loop {
        let mut line = Vec::new();
        let limit = (PREFIX_BYTES + LINE_BYTES_MAX + 2) as u64;
        let read = std::io::Read::take(&mut reader, limit).read_until(b'\n', &mut line).context(what)?;
        if read == 0 {
            return Ok((lines, end_bytes));
        }
        let at_the_end = reader.fill_buf().context(what)?.is_empty();
        let ended = line.last() == Some(&b'\n');
        if ended {
            line.pop();
        }
        if at_the_end && (!ended || line.contains(&0)) {
            tracing::info!(path = %path.display(), bytes = read, "the last line of a journal was torn by a crash");
            return Ok((lines, end_bytes));
        }
        let good = ended
            && line.get(8) == Some(&b' ')
            && line[..8] == *format!("{:08x}", crc32c(&line[PREFIX_BYTES..])).as_bytes();
        if !good {
            let number = lines.len() + 1;
            return Err(Error::new(Kind::Damaged, format!("{}: line {number} is damaged", what()))
                .hint("was the file edited, or does the disk report errors?"));
        }
        end_bytes += read as u64;
        lines.push(line.split_off(PREFIX_BYTES));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal_of(lines: &[&str]) -> (tempfile::TempDir, PathBuf, Vec<u8>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("jobs");
        let (mut journal, old) = Journal::open(&path).unwrap();
        assert!(old.is_empty());
        for line in lines {
            journal.append(line.as_bytes()).unwrap();
        }
        let bytes = std::fs::read(&path).unwrap();
        (directory, path, bytes)
    }

    #[test]
    fn cut_at_any_byte_the_journal_keeps_every_whole_line_and_takes_new_ones() {
        let (_directory, path, bytes) = journal_of(&["{\"step\":1}", "", "{\"step\":3}"]);
        for cut in 0..=bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let whole = bytes[..cut].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(Journal::read_all(&path).unwrap().len(), whole, "cut at {cut}");
            let (mut journal, lines) = Journal::open(&path).unwrap();
            assert_eq!(lines.len(), whole);
            journal.append(b"x").unwrap();
            drop(journal);
            let lines = Journal::read_all(&path).unwrap();
            assert_eq!((lines.len(), lines[whole].as_slice()), (whole + 1, b"x".as_slice()), "cut at {cut}");
        }
    }

    #[test]
    fn a_file_that_grew_before_its_last_bytes_arrived_ends_before_that_line() {
        let (_directory, path, mut bytes) = journal_of(&["one", "two and more"]);
        let end = bytes.len();
        bytes[end - 8..end - 1].fill(0);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(Journal::read_all(&path).unwrap(), [b"one".to_vec()]);
    }

    #[test]
    fn a_flipped_bit_in_any_acknowledged_line_is_refused() {
        let (_directory, path, bytes) = journal_of(&["one", "two"]);
        for index in 0..bytes.len() - 1 {
            let mut damaged = bytes.clone();
            damaged[index] ^= 0x10;
            std::fs::write(&path, &damaged).unwrap();
            let error = Journal::read_all(&path).unwrap_err();
            assert_eq!(error.kind(), Kind::Damaged, "byte {index}");
            assert_eq!(Journal::open(&path).unwrap_err().kind(), Kind::Damaged);
        }
    }

    #[test]
    fn a_second_writer_is_refused_and_a_reader_is_not() {
        let (_directory, path, _) = journal_of(&["one"]);
        let (_journal, _) = Journal::open(&path).unwrap();
        assert_eq!(Journal::open(&path).unwrap_err().kind(), Kind::Conflict);
        assert_eq!(Journal::read_all(&path).unwrap().len(), 1);
    }

    #[test]
    fn a_lock_that_is_given_up_in_a_moment_is_waited_for() {
        let (_directory, path, _) = journal_of(&["one"]);
        let (held, _) = Journal::open(&path).unwrap();
        let holder = std::thread::spawn(move || {
            std::thread::sleep(LOCK_PATIENCE / 10);
            drop(held);
        });
        assert_eq!(Journal::open(&path).unwrap().1.len(), 1);
        holder.join().unwrap();
    }

    #[test]
    fn a_line_that_would_break_the_form_is_refused_and_leaves_no_trace() {
        let (_directory, path, bytes) = journal_of(&["one"]);
        let (mut journal, _) = Journal::open(&path).unwrap();
        for line in [b"a\nb".as_slice(), b"a\0b"] {
            assert_eq!(journal.append(line).unwrap_err().kind(), Kind::Internal);
        }
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
}
