//! A hint that something changed in directories, by inotify(7).
//!
//! It is a hint only: events can be lost (the kernel's queue is bounded, remote file systems send none, the number of
//! watches is limited), so every caller also looks by itself from time to time and works, more slowly, without it.
//! Watched are files that are complete: closed after writing, moved in, or created (hard links make no other event).

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;

use crate::error::{Context, Result};

/// Events that come within this time of the first are one change: a server that switches a log file makes several.
const COALESCE_MILLIS: u64 = 20;

/// How often a directory that is not there is looked for.
const MISSING_SECONDS: u64 = 2;

/// Watches directories, not what lies in directories below them.
pub struct DirectoryWatch {
    inotify: AsyncFd<Descriptor>,
    paths: Vec<PathBuf>,
    watched: HashMap<WatchDescriptor, PathBuf>,
}

/// Gives `AsyncFd` the descriptor it wants, in both shapes.
struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl DirectoryWatch {
    /// Starts to watch `paths`; those that are not there (now or later) are watched as soon as they are. Must be called
    /// within a runtime. Fails if the machine allows no more inotify instances (fs.inotify.max_user_instances).
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> Result<DirectoryWatch> {
        let what = || "cannot watch directories";
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).context(what)?;
        // SAFETY: the descriptor is owned by the value, open as long as the value lives, and always the same.
        let registered = unsafe { AsyncFd::register(Descriptor(inotify)) };
        let inotify = registered.map_err(std::io::Error::from).context(what)?;
        let mut watch = DirectoryWatch { inotify, paths: paths.into_iter().collect(), watched: HashMap::new() };
        watch.watch_missing();
        Ok(watch)
    }

    /// Returns soon after something changed since the last call (or since `new`), once for any number of changes. Safe
    /// to cancel: at worst a change that was just seen is not told.
    pub async fn changed(&mut self) {
        loop {
            if self.watched.len() < self.paths.len() && self.watch_missing() {
                return;
            }
            let look_again = tokio::time::sleep(Duration::from_secs(MISSING_SECONDS));
            tokio::select! {
                ready = self.inotify.readable() => {
                    if let Ok(mut guard) = ready {
                        guard.clear_ready();
                    }
                    tokio::time::sleep(Duration::from_millis(COALESCE_MILLIS)).await;
                    if self.drain() {
                        return;
                    }
                }
                () = look_again, if self.watched.len() < self.paths.len() => {}
            }
        }
    }

    /// Adds watches for directories that have none; whether there was one to add.
    fn watch_missing(&mut self) -> bool {
        let flags = AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let mut added = false;
        for path in &self.paths {
            if self.watched.values().any(|known| known == path) {
                continue;
            }
            match self.inotify.get_ref().0.add_watch(path, flags) {
                // Two names of one directory share a watch: the second is then looked for again and again, harmlessly.
                Ok(descriptor) => added |= self.watched.insert(descriptor, path.clone()).is_none(),
                Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                // ENOSPC means fs.inotify.max_user_watches. The caller's own looking does the work then.
                Err(errno) => tracing::debug!(path = %path.display(), %errno, "cannot watch a directory"),
            }
        }
        added
    }

    /// Takes all waiting events; whether any of them is of interest.
    fn drain(&mut self) -> bool {
        let mut any = false;
        loop {
            match self.inotify.get_ref().0.read_events() {
                Ok(events) => {
                    for event in events {
                        let gone = AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_MOVE_SELF;
                        if event.mask.intersects(gone) && self.watched.remove(&event.wd).is_some() {
                            // A directory that was moved is still watched under its new name; that is not ours.
                            let _ = self.inotify.get_ref().0.rm_watch(event.wd);
                        }
                        // The end of our own watch is no change; a full queue is.
                        any |= !event.mask.contains(AddWatchFlags::IN_IGNORED);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(_) => return any,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;

    async fn told(watch: &mut DirectoryWatch, seconds: u64) -> bool {
        tokio::time::timeout(Duration::from_secs(seconds), watch.changed()).await.is_ok()
    }

    fn watch_of(path: &Path) -> DirectoryWatch {
        DirectoryWatch::new([path.to_path_buf()]).unwrap()
    }

    #[tokio::test]
    async fn a_file_that_is_moved_in_written_or_linked_is_told_once() {
        let directory = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        std::fs::write(other.path().join("a"), b"x").unwrap();
        let mut watch = watch_of(directory.path());
        std::fs::hard_link(other.path().join("a"), directory.path().join("linked")).unwrap();
        assert!(told(&mut watch, 10).await);
        std::fs::hard_link(other.path().join("a"), directory.path().join("again")).unwrap();
        std::fs::rename(other.path().join("a"), directory.path().join("a")).unwrap();
        assert!(told(&mut watch, 10).await);
        assert!(tokio::time::timeout(Duration::from_millis(100), watch.changed()).await.is_err(), "told twice");
        // Not counted: a child that another test starts at this moment may hold the file open a little longer.
        std::fs::write(directory.path().join("b"), b"x").unwrap();
        assert!(told(&mut watch, 10).await);
    }

    #[tokio::test]
    async fn a_directory_that_comes_goes_and_comes_again_is_watched() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("later");
        let mut watch = watch_of(&path);
        for _ in 0..2 {
            std::fs::create_dir(&path).unwrap();
            assert!(told(&mut watch, 10).await, "its appearance is a change");
            std::fs::write(path.join("file"), b"x").unwrap();
            assert!(told(&mut watch, 10).await);
            std::fs::remove_dir_all(&path).unwrap();
            assert!(told(&mut watch, 10).await, "its end is a change");
        }
    }
}
