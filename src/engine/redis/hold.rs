//! Holds the increments of the append-only file until they are shipped, and numbers them.
//!
//! A rewrite deletes the increments that it replaces, at once when it is done. The agent keeps a second name (a hard link)
//! for each increment in `<appendonlydir>/keiki-held/`, so that its bytes stay until they are released. No setting of the
//! server changes, nothing is copied, and whatever happens to the agent, at most what was linked stays: a server whose
//! agent is gone deletes every later increment as it always did. What the held files take on the disk has a limit;
//! beyond it the oldest are given up, because a hole in the archive is better than a database on a full disk.
//!
//! The name of a link is `<number>-<sequence>.aof`: keiki's own number of the log file, and the server's number of the
//! increment. The numbers begin at the second in which the holding began, so that a directory that lost its links goes on
//! behind all earlier numbers. A file gets the next number if it is **proved** to follow the file before it: either both
//! were increments of one manifest, or the server says that nothing happened since the last look by which commands could
//! have been executed without being logged (see [`crate::engine::redis::source::Fingerprint`]). Otherwise a number is left
//! out, and that is a hole. An empty file gives its number to its successor: nothing of it is ever shipped.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::base::durable::{create_dir_all_durable, write_file_durable};
use crate::engine::redis::ondisk::manifest::{Manifest, ManifestPart};
use crate::error::{Context, Error, Kind, Result};
use crate::model::bytes_text::human_bytes;

/// `appenddirname` if nobody has set it.
pub const APPEND_DIR_DEFAULT: &str = "appendonlydir";
const HELD_DIR: &str = "keiki-held";
/// How often [`Hold::look`] and [`Hold::link`] may be repeated because the server was faster: a rewrite may end between
/// the two, but it does not do so forever.
pub const LINK_ATTEMPTS: usize = 20;

/// An increment that stays until it is released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldFile {
    pub number: u64,
    /// The server's own number of the increment.
    pub sequence: u64,
    pub path: PathBuf,
    pub bytes: u64,
    pub inode: (u64, u64),
    /// The server has deleted its own name of it: the bytes are on the disk only because of us.
    pub only_held: bool,
}

/// What the manifest names, and what of it is not held yet.
#[derive(Debug)]
pub struct Seen {
    pub manifest: Manifest,
    held: Vec<HeldFile>,
    new: Vec<ManifestPart>,
}

impl Seen {
    /// Whether the first new file follows the last held one only if the server says so.
    pub fn needs_proof(&self) -> bool {
        !self.new.is_empty() && self.held.last().is_some_and(|last| !self.is_named(last))
    }

    /// Whether the manifest that was read still names a held file: then what follows it there follows it in the log.
    fn is_named(&self, file: &HeldFile) -> bool {
        self.manifest.increments.iter().any(|part| part.sequence == file.sequence)
            && self.new.first().is_none_or(|first| first.sequence > file.sequence)
    }
}

/// What somebody must do who may not read the server's files or link to them.
const ACCESS_HINT: &str = "run the agent as root, or as the server's own user";

/// The held files of one append-only directory. Blocking, and to be used by one at a time.
#[derive(Debug, Clone)]
pub struct Hold {
    append_dir: PathBuf,
    manifest_name: String,
}

impl Hold {
    /// Takes the directory of the append-only file and `appendfilename`.
    pub fn new(append_dir: PathBuf, append_file_name: &str) -> Hold {
        Hold { append_dir, manifest_name: format!("{append_file_name}.manifest") }
    }

    pub fn append_dir(&self) -> &Path {
        &self.append_dir
    }

    pub fn held_dir(&self) -> PathBuf {
        self.append_dir.join(HELD_DIR)
    }

    /// Reads the manifest as it is now.
    pub fn manifest(&self) -> Result<Manifest> {
        let path = self.append_dir.join(&self.manifest_name);
        let what = || format!("cannot read '{}'", path.display());
        let bytes = std::fs::read(&path).map_err(|error| {
            let is_refused = error.kind() == std::io::ErrorKind::PermissionDenied;
            let error = Error::io(what(), error);
            if is_refused { error.hint(ACCESS_HINT) } else { error }
        })?;
        Manifest::parse(&bytes).context(what)
    }

    /// The name of an increment that the manifest names and that is not there.
    pub fn missing(&self) -> Result<Option<String>> {
        let manifest = self.manifest()?;
        let is_missing = |part: &&ManifestPart| !self.append_dir.join(&part.name).exists();
        let missing = manifest.increments.iter().find(is_missing).map(|part| part.name.clone());
        // A rewrite that ended just now has taken it from the manifest as well.
        Ok(if self.manifest()? == manifest { missing } else { None })
    }

    /// Reads the manifest and finds out what of it is not held yet.
    pub fn look(&self) -> Result<Seen> {
        let manifest = self.manifest()?;
        let held = self.held()?;
        let is_held = |part: &&ManifestPart| held.iter().any(|file| self.is_same(file, part));
        // What stands before the newest held file was released.
        let newest = held.last().filter(|newest| manifest.increments.iter().any(|part| self.is_same(newest, part)));
        let after = newest.map(|newest| newest.sequence);
        let is_new = |part: &&ManifestPart| !is_held(part) && after.is_none_or(|after| part.sequence > after);
        let new = manifest.increments.iter().filter(is_new).cloned().collect();
        Ok(Seen { manifest, held, new })
    }

    fn is_same(&self, file: &HeldFile, part: &ManifestPart) -> bool {
        file.sequence == part.sequence
            && std::fs::metadata(self.append_dir.join(&part.name)).is_ok_and(|metadata| inode(&metadata) == file.inode)
    }

    /// Up to which second the times in a log file say when its commands were executed, if they do not say it to its end:
    /// the server was seen to write none.
    pub fn untimed(&self, number: u64) -> Option<i64> {
        let text = std::fs::read_to_string(self.held_dir().join(untimed_name(number))).ok()?;
        text.trim().parse().ok()
    }

    /// Remembers that a log file has no times from here on; the first such second counts.
    pub fn mark_untimed(&self, number: u64, last_second: i64) -> Result<()> {
        match self.untimed(number) {
            Some(_) => Ok(()),
            None => {
                let text = format!("{last_second}\n");
                write_file_durable(&self.held_dir().join(untimed_name(number)), text.as_bytes(), 0o600)
            }
        }
    }

    /// Links the new files. `proved` says that the server logged everything since the last look, `timed` that it writes
    /// times now: behind a file that has lost its times, a hole keeps those apart that can be reached from those that
    /// cannot. Returns all held files
    /// in the order of the log; nothing if the server has replaced a new file meanwhile, and it is to be looked again.
    pub fn link(&self, seen: &Seen, proved: bool, timed: bool, unix_seconds: u64) -> Result<Option<Vec<HeldFile>>> {
        create_dir_all_durable(&self.held_dir(), 0o700)?;
        let mut last = seen.held.last().cloned();
        for part in &seen.new {
            let follows = last.as_ref().is_some_and(|last| {
                part.sequence == last.sequence.saturating_add(1)
                    && (proved || seen.is_named(last) || is_new(seen, last))
                    && !(timed && self.untimed(last.number).is_some())
            });
            let number = match &last {
                None => unix_seconds,
                Some(last) if follows && last.bytes == 0 => last.number,
                Some(last) if follows => last.number.saturating_add(1),
                Some(last) => last.number.saturating_add(2).max(unix_seconds),
            };
            let Some(linked) = self.link_one(part, number)? else { return Ok(None) };
            if let Some(last) = last.filter(|last| last.number == number && last.path != linked.path) {
                remove(&last.path)?;
            }
            last = Some(linked);
        }
        self.held().map(Some)
    }

    fn link_one(&self, part: &ManifestPart, number: u64) -> Result<Option<HeldFile>> {
        let from = self.append_dir.join(&part.name);
        let to = self.held_dir().join(link_name(number, part.sequence));
        let what = || format!("cannot hold '{}' by a hard link '{}'", from.display(), to.display());
        match std::fs::hard_link(&from, &to) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(Error::new(Kind::Conflict, format!("{}: that name is in use", what()))
                    .hint("was the directory copied from another server? Remove 'keiki-held' from it"));
            }
            Err(error) => {
                return Err(
                    Error::io(what(), error).hint(format!("{ACCESS_HINT}, on a file system that has hard links"))
                );
            }
        }
        let metadata = std::fs::metadata(&to).context(what)?;
        Ok(Some(held_file(number, part.sequence, to, &metadata)))
    }

    /// The held files in the order of the log.
    pub fn held(&self) -> Result<Vec<HeldFile>> {
        let dir = self.held_dir();
        let what = || format!("cannot read directory '{}'", dir.display());
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).context(what),
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry.context(what)?;
            let Some((number, sequence)) = entry.file_name().to_str().and_then(parse_link_name) else { continue };
            let metadata = entry.metadata().context(what)?;
            files.push(held_file(number, sequence, entry.path(), &metadata));
        }
        files.sort_by_key(|file| (file.number, file.sequence));
        // A number that two files have was handed on by an empty one, and the agent died before it could remove that.
        files.dedup_by(|later, earlier| {
            let is_handed_on = later.number == earlier.number && earlier.bytes == 0;
            if is_handed_on {
                std::mem::swap(later, earlier);
            }
            is_handed_on
        });
        Ok(files)
    }

    /// Lets the server's disk have everything before file `number`. The newest file stays: it says where the next one
    /// belongs. So does what the server itself still has: our name of it takes no room, and a backup of a base that has
    /// several increments behind it, as every clone may have, must know the number of the first.
    pub fn release_before(&self, number: u64) -> Result<()> {
        let held = self.held()?;
        let count = held.len().saturating_sub(1);
        for file in held.iter().take(count).filter(|file| file.number < number && file.only_held) {
            remove(&file.path)?;
            remove(&self.held_dir().join(untimed_name(file.number)))?;
        }
        Ok(())
    }

    /// Gives up the oldest files while those that only we hold take more than `limit_bytes`. Returns what was given up.
    pub fn enforce_limit(&self, limit_bytes: u64) -> Result<u64> {
        let held = self.held()?;
        let mut total: u64 = held.iter().filter(|file| file.only_held).map(|file| file.bytes).sum();
        let mut given_up = 0;
        for file in held.iter().take(held.len().saturating_sub(1)) {
            if total <= limit_bytes {
                break;
            }
            remove(&file.path)?;
            if file.only_held {
                total -= file.bytes.min(total);
                given_up += file.bytes;
            }
        }
        if given_up > 0 {
            tracing::warn!(
                "gave up {} of log that was not shipped yet, because more than {} would have been held back in '{}'",
                human_bytes(given_up),
                human_bytes(limit_bytes),
                self.held_dir().display()
            );
        }
        Ok(given_up)
    }

    /// Removes everything that the agent has put into the directory.
    pub fn give_up(&self) -> Result<()> {
        match std::fs::remove_dir_all(self.held_dir()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context(|| format!("cannot remove '{}'", self.held_dir().display()))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a file was linked because of this very look, and so was named by its manifest.
fn is_new(seen: &Seen, file: &HeldFile) -> bool {
    seen.new.iter().any(|part| part.sequence == file.sequence)
}

fn inode(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn held_file(number: u64, sequence: u64, path: PathBuf, metadata: &Metadata) -> HeldFile {
    HeldFile { number, sequence, path, bytes: metadata.len(), inode: inode(metadata), only_held: metadata.nlink() == 1 }
}

fn link_name(number: u64, sequence: u64) -> String {
    format!("{number:010}-{sequence}.aof")
}

fn untimed_name(number: u64) -> String {
    format!("untimed-{number}")
}

fn parse_link_name(name: &str) -> Option<(u64, u64)> {
    let (number, sequence) = name.strip_suffix(".aof")?.split_once('-')?;
    let pair = (number.parse().ok()?, sequence.parse().ok()?);
    (link_name(pair.0, pair.1) == name).then_some(pair)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context(|| format!("cannot remove '{}'", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use nix::unistd::{Uid, setfsuid};

    use super::*;

    /// A directory as a server makes it: a manifest, and files that are there.
    struct Scene {
        dir: tempfile::TempDir,
        hold: Hold,
    }

    impl Scene {
        fn new() -> Scene {
            let dir = tempfile::tempdir().unwrap();
            let hold = Hold::new(dir.path().to_path_buf(), "a.aof");
            Scene { dir, hold }
        }

        /// The server's directory after a rewrite: base `base` and these increments; all others are deleted.
        fn server(&self, base: u64, increments: &[(u64, &str)]) {
            let mut manifest = format!("file a.aof.{base}.base.rdb seq {base} type b\n");
            for (sequence, _) in increments {
                manifest += &format!("file a.aof.{sequence}.incr.aof seq {sequence} type i\n");
            }
            for entry in std::fs::read_dir(self.dir.path()).unwrap().flatten() {
                let name = entry.file_name().into_string().unwrap();
                if name.ends_with(".incr.aof") && !manifest.contains(&name) {
                    std::fs::remove_file(entry.path()).unwrap();
                }
            }
            for (sequence, content) in increments {
                std::fs::write(self.dir.path().join(format!("a.aof.{sequence}.incr.aof")), content).unwrap();
            }
            std::fs::write(self.dir.path().join("a.aof.manifest"), manifest).unwrap();
        }

        /// Number, content and whether only we hold it.
        fn sync(&self, proved: bool) -> Vec<(u64, String, bool)> {
            let seen = self.hold.look().unwrap();
            let files = self.hold.link(&seen, proved, true, 1000).unwrap().unwrap();
            let content = |file: &HeldFile| std::fs::read_to_string(&file.path).unwrap();
            files.iter().map(|file| (file.number, content(file), file.only_held)).collect()
        }
    }

    fn row(number: u64, content: &str, only_held: bool) -> (u64, String, bool) {
        (number, content.to_string(), only_held)
    }

    #[test]
    fn what_a_rewrite_deletes_stays_until_it_is_released() {
        let scene = Scene::new();
        scene.server(1, &[(1, "one")]);
        assert_eq!(scene.sync(false), [row(1000, "one", false)]);
        // While the rewrite runs both are increments of one manifest: that is the proof.
        scene.server(1, &[(1, "one and more"), (2, "two")]);
        assert_eq!(scene.sync(false), [row(1000, "one and more", false), row(1001, "two", false)]);
        scene.server(2, &[(2, "two")]);
        assert_eq!(scene.sync(false), [row(1000, "one and more", true), row(1001, "two", false)]);
        scene.hold.release_before(1001).unwrap();
        assert_eq!(scene.sync(false), [row(1001, "two", false)]);
        scene.hold.release_before(2000).unwrap();
        assert_eq!(scene.sync(false), [row(1001, "two", false)]);
    }

    #[test]
    fn a_rewrite_that_nobody_saw_is_a_hole_unless_the_server_proves_otherwise() {
        for (proved, number) in [(true, 1001), (false, 1002)] {
            let scene = Scene::new();
            scene.server(1, &[(1, "one")]);
            scene.sync(false);
            scene.server(2, &[(2, "two")]);
            assert!(scene.hold.look().unwrap().needs_proof());
            assert_eq!(scene.sync(proved), [row(1000, "one", true), row(number, "two", false)]);
        }
    }

    #[test]
    fn an_increment_that_came_and_went_unseen_is_a_hole_whatever_the_server_says() {
        let scene = Scene::new();
        scene.server(1, &[(1, "one")]);
        scene.sync(true);
        scene.server(3, &[(3, "three")]);
        assert_eq!(scene.sync(true), [row(1000, "one", true), row(1002, "three", false)]);
    }

    #[test]
    fn an_empty_increment_hands_its_number_on() {
        let scene = Scene::new();
        scene.server(1, &[(1, "one"), (2, "")]);
        assert_eq!(scene.sync(false), [row(1000, "one", false), row(1001, "", false)]);
        scene.server(1, &[(1, "one"), (2, ""), (3, "three")]);
        assert_eq!(scene.sync(false), [row(1000, "one", false), row(1001, "three", false)]);
    }

    #[test]
    fn times_that_begin_again_begin_behind_a_hole() {
        let scene = Scene::new();
        scene.server(1, &[(1, "one")]);
        scene.sync(true);
        scene.hold.mark_untimed(1000, 77).unwrap();
        scene.hold.mark_untimed(1000, 99).unwrap();
        assert_eq!(scene.hold.untimed(1000), Some(77));
        scene.server(1, &[(1, "one"), (2, "two")]);
        // As long as there are none, nothing is gained by a hole.
        let seen = scene.hold.look().unwrap();
        assert_eq!(scene.hold.link(&seen, true, false, 1000).unwrap().unwrap()[1].number, 1001);
        scene.hold.mark_untimed(1001, 77).unwrap();
        scene.server(1, &[(1, "one"), (2, "two"), (3, "three")]);
        let numbers: Vec<u64> = scene.sync(true).iter().map(|row| row.0).collect();
        assert_eq!(numbers, [1000, 1001, 1003]);
        assert_eq!(scene.hold.untimed(1003), None);
        scene.hold.release_before(1003).unwrap();
        assert_eq!(scene.sync(true).len(), 3, "what the server has itself stays");
        scene.server(3, &[(3, "three")]);
        scene.hold.release_before(1003).unwrap();
        assert_eq!((scene.hold.untimed(1000), scene.hold.untimed(1001)), (None, None));
    }

    #[test]
    fn the_disk_of_the_server_has_a_limit() {
        let scene = Scene::new();
        scene.server(1, &[(1, "0123456789"), (2, "0123456789"), (3, "x")]);
        scene.sync(false);
        assert_eq!(scene.hold.enforce_limit(5).unwrap(), 0);
        scene.server(3, &[(3, "x")]);
        assert_eq!(scene.hold.enforce_limit(20).unwrap(), 0);
        assert_eq!(scene.hold.enforce_limit(15).unwrap(), 10);
        assert_eq!(scene.sync(false), [row(1001, "0123456789", true), row(1002, "x", false)]);
        scene.hold.give_up().unwrap();
        assert!(!scene.hold.held_dir().exists());
    }

    #[test]
    fn a_directory_that_begins_again_goes_on_behind_a_hole() {
        let scene = Scene::new();
        scene.server(5, &[(5, "five")]);
        scene.sync(false);
        std::fs::remove_file(scene.dir.path().join("a.aof.5.incr.aof")).unwrap();
        scene.server(1, &[(1, "one")]);
        assert_eq!(scene.sync(true), [row(1000, "five", true), row(1002, "one", false)]);
    }

    #[test]
    fn a_directory_that_the_agent_may_not_read_is_refused_with_who_may() {
        let scene = Scene::new();
        scene.server(1, &[(1, "x")]);
        scene.sync(true);
        // Root may read everything: this thread becomes somebody who is nobody to the directory.
        std::fs::set_permissions(scene.dir.path(), std::fs::Permissions::from_mode(0o000)).unwrap();
        let looked = std::thread::scope(|scope| {
            let looks = || {
                setfsuid(Uid::from_raw(65534));
                scene.hold.look().map(|_| ()).unwrap_err()
            };
            scope.spawn(looks).join().unwrap()
        });
        std::fs::set_permissions(scene.dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        assert!(looked.message().ends_with("a.aof.manifest': permission denied"), "{looked}");
        assert_eq!(looked.hint_text(), Some(ACCESS_HINT));
    }
}
