//! An object on its way into a directory: a file that is removed again unless it was published.

use std::fs::{File, FileTimes, Metadata};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::super::Tag;
use crate::base::random::random_u64;

/// While a long object is written the disk is set to work every so many bytes, so that the fsync at its end is short.
const WRITE_BEHIND_BYTES: u64 = 8 << 20;

/// A file in the work directory; it is removed again unless it was published.
pub struct Unfinished {
    path: PathBuf,
    file: File,
    written_bytes: u64,
    behind_bytes: u64,
    is_published: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.is_published {
            // What cannot be removed now is removed as stale later.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Unfinished {
    /// An empty one: `file` was just created at `path`.
    pub fn new(path: PathBuf, file: File) -> Unfinished {
        Unfinished { path, file, written_bytes: 0, behind_bytes: 0, is_published: false }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// When it was last written to, by the clock of its file system.
    pub fn modified(&self) -> std::io::Result<SystemTime> {
        self.file.metadata()?.modified()
    }

    /// It was published: it has another name now and stays.
    pub fn forget(mut self) {
        self.is_published = true;
    }

    /// Adds bytes at its end.
    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        self.written_bytes += bytes.len() as u64;
        if self.written_bytes - self.behind_bytes >= WRITE_BEHIND_BYTES {
            start_writing_out(&self.file, self.behind_bytes, self.written_bytes - self.behind_bytes);
            self.behind_bytes = self.written_bytes;
        }
        Ok(())
    }

    /// Gives the file its tag and makes it durable.
    pub fn finish(&self) -> std::io::Result<Tag> {
        // The second is that of the file system's own clock, which may be another machine's.
        let second = u64::try_from(self.file.metadata()?.mtime()).unwrap_or(0);
        let nanosecond = (random_u64() % 1_000_000_000) as u32;
        let modified = SystemTime::UNIX_EPOCH + Duration::new(second, nanosecond);
        self.file.set_times(FileTimes::new().set_modified(modified))?;
        self.file.sync_all()?;
        if self.behind_bytes > 0 {
            // A large object is not read again soon, and the memory is better used by a database on this host.
            let _ = nix::fcntl::posix_fadvise(&self.file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
        // Read back: a file system with coarse times keeps a part of the number only.
        Ok(tag_of(&self.file.metadata()?))
    }
}

/// Asks the kernel to begin writing a range to the disk. Only a hint: the fsync at the end is what counts.
fn start_writing_out(file: &File, from: u64, length: u64) {
    use std::os::fd::AsRawFd;
    if let (Ok(from), Ok(length)) = (from.try_into(), length.try_into()) {
        // SAFETY: the descriptor is open; the other arguments are numbers.
        unsafe { libc::sync_file_range(file.as_raw_fd(), from, length, libc::SYNC_FILE_RANGE_WRITE) };
    }
}

/// See the parent module.
pub fn tag_of(known: &Metadata) -> Tag {
    Tag(format!("{:x}-{:x}-{:x}.{:x}", known.ino(), known.size(), known.mtime(), known.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_does_not_rest_on_inode_size_and_clock() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        let mut unfinished = Unfinished::new(path.clone(), File::create(&path).unwrap());
        unfinished.write(b"same").unwrap();
        // Nothing is written in between, so the file system itself has no reason to tell them apart.
        let tags: std::collections::BTreeSet<String> = (0..50).map(|_| unfinished.finish().unwrap().0).collect();
        assert_eq!(tags.len(), 50);
    }
}
