//! Files that survive a crash at any moment.
//!
//! Invariants: a file written here is, under its final name, either the old one or the new one and whole, never a part;
//! when a function returns, its effect is on the disk together with the directory entries that lead to it. All calls
//! block: use them from a bulk thread or `spawn_blocking`.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::random::random_u64;
use crate::error::{Context, Error, Kind, Result};

/// The directory that holds `path`; `.` for a bare name and `/` for the root.
pub fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// Makes the entries of a directory durable.
pub fn fsync_dir(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .context(|| format!("cannot make directory '{}' durable", path.display()))
}

/// Creates a directory and its missing parents with exactly `mode` (whatever the umask), each durable in its parent.
/// Directories that are there already keep their mode; a file in the way is an error of kind `Conflict`, a directory that
/// somebody removes meanwhile one of kind `NotFound`.
pub fn create_dir_all_durable(path: &Path, mode: u32) -> Result<()> {
    create_missing_directories(path, None, mode)
}

/// The same below `root`, which is never created: that it is missing is an error of kind `NotFound`.
pub fn create_dir_all_below_durable(root: &Path, path: &Path, mode: u32) -> Result<()> {
    create_missing_directories(path, Some(root), mode)
}

fn create_missing_directories(path: &Path, root: Option<&Path>, mode: u32) -> Result<()> {
    let what = || format!("cannot create directory '{}'", path.display());
    if path.is_dir() {
        return Ok(());
    }
    if root == Some(path) {
        return Err(Error::io(what(), ErrorKind::NotFound.into()));
    }
    let parent = parent_of(path);
    if parent != path {
        create_missing_directories(parent, root, mode)?;
    }
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => std::fs::set_permissions(path, Permissions::from_mode(mode)).context(what)?,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => match std::fs::metadata(path) {
            // Somebody else made it meanwhile, but perhaps did not come to the fsync yet.
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(Error::io(what(), error)),
            // Somebody else made it, and somebody has removed it: as if it had gone a moment later.
            Err(_) => return Err(Error::io(what(), ErrorKind::NotFound.into())),
        },
        Err(error) => return Err(Error::io(what(), error)),
    }
    fsync_dir(parent)
}

/// A temporary name beside `path` that no other writer uses. It begins with a dot, as the name of unfinished work.
fn temporary_beside(path: &Path) -> Result<PathBuf> {
    let name = path
        .file_name()
        .ok_or_else(|| Error::new(Kind::BadInput, format!("'{}' does not name a file", path.display())))?;
    // A name may have 255 bytes: a long one is cut, the random part makes it unique.
    let name = String::from_utf8_lossy(name.as_bytes()).chars().take(40).collect::<String>();
    Ok(parent_of(path).join(format!(".{name}.{:016x}.tmp", random_u64())))
}

/// Writes a whole durable file under a name of its own; it is removed again if that fails.
fn write_new_file(path: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    let outcome = (|| {
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()
    })();
    if outcome.is_err() {
        // Best effort: the first error is the one to report, and a left-over temporary file harms nobody.
        let _ = std::fs::remove_file(path);
    }
    outcome
}

/// Replaces or creates a file with exactly `bytes` and `mode`.
pub fn write_file_durable(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let what = || format!("cannot write '{}'", path.display());
    let temporary = temporary_beside(path)?;
    write_new_file(&temporary, bytes, mode).context(what)?;
    if let Err(error) = std::fs::rename(&temporary, path) {
        let _ = std::fs::remove_file(&temporary);
        return Err(Error::io(what(), error));
    }
    fsync_dir(parent_of(path))
}

/// Creates a file that must not exist yet: of any number of racing callers exactly one succeeds, the others get an
/// error of kind `Conflict`, and nobody sees a part of it.
pub fn create_file_exclusive_durable(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let what = || format!("cannot create '{}'", path.display());
    let temporary = temporary_beside(path)?;
    write_new_file(&temporary, bytes, mode).context(what)?;
    if let Err(error) = rename_without_replacing(&temporary, path) {
        let _ = std::fs::remove_file(&temporary);
        return Err(Error::io(what(), error));
    }
    fsync_dir(parent_of(path))
}

/// Renames a file unless the new name is taken (`AlreadyExists`), atomically. Both names are in one file system. The
/// directories are not made durable.
pub fn rename_without_replacing(from: &Path, to: &Path) -> std::io::Result<()> {
    let from_text = std::ffi::CString::new(from.as_os_str().as_bytes())?;
    let to_text = std::ffi::CString::new(to.as_os_str().as_bytes())?;
    // The system call and not the C function, which only glibc has. SAFETY: both are NUL-terminated and outlive it.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            from_text.as_ptr(),
            libc::AT_FDCWD,
            to_text.as_ptr(),
            libc::RENAME_NOREPLACE,
        )
    };
    if outcome == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        // renameat2(2): EINVAL, "the file system does not support one of the flags" (NFS, old ZFS).
        Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP) => {
            std::fs::hard_link(from, to)?;
            std::fs::remove_file(from)
        }
        _ => Err(error),
    }
}

/// Renames a file or directory, replacing what had the new name, and makes both directories durable.
pub fn rename_durable(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).context(|| format!("cannot rename '{}' to '{}'", from.display(), to.display()))?;
    fsync_dir(parent_of(to))?;
    if parent_of(from) != parent_of(to) {
        fsync_dir(parent_of(from))?;
    }
    Ok(())
}

/// Removes a file durably; one that is not there counts as removed.
pub fn remove_file_durable(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(format!("cannot remove '{}'", path.display()), error)),
        Ok(()) => fsync_dir(parent_of(path)),
    }
}

/// Removes a directory with everything in it durably; one that is not there counts as removed. Symbolic links in it
/// are removed and not followed. A crash in the middle leaves a part: rename it to a name of unfinished work first.
pub fn remove_dir_all_durable(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(format!("cannot remove directory '{}'", path.display()), error)),
        Ok(()) => fsync_dir(parent_of(path)),
    }
}

/// Makes everything durable that was written to the file system of `path`, and reports write errors since the last
/// such call (syncfs(2); errors are reported since Linux 5.8).
pub fn sync_filesystem(path: &Path) -> Result<()> {
    let what = || format!("cannot make the file system of '{}' durable", path.display());
    let directory = File::open(path).context(what)?;
    nix::unistd::syncfs(&directory).context(what)
}

/// The bytes that this process may still write in the file system of `path` (without the blocks reserved for root).
pub fn free_bytes(path: &Path) -> Result<u64> {
    let space = nix::sys::statvfs::statvfs(path)
        .context(|| format!("cannot see how much space is free at '{}'", path.display()))?;
    Ok(space.blocks_available().saturating_mul(space.fragment_size()))
}

/// An exclusive lock on a file; dropping it, or the death of the process, gives it back.
#[derive(Debug)]
pub struct LockGuard {
    file: File,
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        // A child that is being started has the descriptor, too, until it runs its program: closing ours would not be enough.
        // A lock that cannot be given back here is given back when the last descriptor is closed.
        let _ = self.file.unlock();
    }
}

/// Takes the lock file at `path` (created with mode 0600) without waiting, and writes the process id into it. If
/// another process holds it, the error is of kind `Conflict` and names the holder. The file stays when the lock is
/// given back: removing it would let two processes lock two files of the same name.
pub fn lock_file(path: &Path) -> Result<LockGuard> {
    let what = || format!("cannot lock '{}'", path.display());
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path).context(what)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            // Whoever it is has it; that the file does not say who is no reason for another error.
            let _ = file.take(64).read_to_string(&mut text);
            let holder = match text.trim().parse::<u32>() {
                Ok(pid) => format!("process {pid} holds it"),
                Err(_) => String::from("another process holds it"),
            };
            return Err(Error::new(Kind::Conflict, format!("{}: {holder}", what()))
                .hint("is a second keiki running with the same directory?"));
        }
        Err(TryLockError::Error(error)) => return Err(Error::io(what(), error)),
    }
    file.set_len(0)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .and_then(|_| file.write_all(format!("{}\n", std::process::id()).as_bytes()))
        .context(what)?;
    Ok(LockGuard { file })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_in(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn mode_of(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_lock_is_given_back_although_a_child_that_is_being_started_has_its_descriptor() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let guard = lock_file(&path).unwrap();
        let inherited = guard.file.try_clone().unwrap();
        assert_eq!(lock_file(&path).unwrap_err().kind(), Kind::Conflict);
        drop(guard);
        lock_file(&path).unwrap();
        drop(inherited);
    }

    #[test]
    fn a_replaced_file_has_the_new_bytes_and_mode_and_leaves_no_other_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        write_file_durable(&path, b"old and long", 0o600).unwrap();
        write_file_durable(&path, b"new", 0o666).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(mode_of(&path), 0o666);
        assert_eq!(names_in(directory.path()), ["state"]);
    }

    #[test]
    fn of_sixteen_racing_creators_one_wins_and_its_bytes_stay() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("claim");
        let winners: Vec<u8> = std::thread::scope(|scope| {
            let tasks: Vec<_> = (0..16u8)
                .map(|number| {
                    let path = &path;
                    scope.spawn(move || (number, create_file_exclusive_durable(path, &[number; 100], 0o600)))
                })
                .collect();
            tasks
                .into_iter()
                .filter_map(|task| match task.join().unwrap() {
                    (number, Ok(())) => Some(number),
                    (_, Err(error)) => {
                        assert_eq!(error.kind(), Kind::Conflict, "{error}");
                        None
                    }
                })
                .collect()
        });
        assert_eq!(winners.len(), 1);
        assert_eq!(std::fs::read(&path).unwrap(), vec![winners[0]; 100]);
        assert_eq!(names_in(directory.path()), ["claim"]);
    }

    #[test]
    fn directories_get_their_mode_and_a_file_in_the_way_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("a/b/c");
        create_dir_all_durable(&deep, 0o777).unwrap();
        create_dir_all_durable(&deep, 0o700).unwrap();
        assert_eq!(mode_of(&deep), 0o777);
        std::fs::write(directory.path().join("file"), b"").unwrap();
        let error = create_dir_all_durable(&directory.path().join("file"), 0o700).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
    }

    #[test]
    fn removing_what_is_not_there_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        remove_file_durable(&directory.path().join("none")).unwrap();
        remove_dir_all_durable(&directory.path().join("none")).unwrap();
        create_dir_all_durable(&directory.path().join("tree/leaf"), 0o700).unwrap();
        remove_dir_all_durable(&directory.path().join("tree")).unwrap();
        assert!(names_in(directory.path()).is_empty());
    }

    #[test]
    fn a_held_lock_is_refused_by_name_and_is_free_after_its_guard() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.lock");
        let guard = lock_file(&path).unwrap();
        let error = lock_file(&path).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
        assert!(error.message().ends_with(&format!("process {} holds it", std::process::id())), "{error}");
        drop(guard);
        lock_file(&path).unwrap();
    }

    #[test]
    fn a_rename_across_directories_replaces_and_space_is_told() {
        let directory = tempfile::tempdir().unwrap();
        create_dir_all_durable(&directory.path().join("to"), 0o700).unwrap();
        write_file_durable(&directory.path().join("to/x"), b"old", 0o600).unwrap();
        write_file_durable(&directory.path().join("y"), b"new", 0o600).unwrap();
        rename_durable(&directory.path().join("y"), &directory.path().join("to/x")).unwrap();
        assert_eq!(std::fs::read(directory.path().join("to/x")).unwrap(), b"new");
        assert!(free_bytes(directory.path()).unwrap() > 0);
        sync_filesystem(directory.path()).unwrap();
    }
}
