//! Where a clone grows: its directories, its port, and the marker that says whose they are.
//!
//! A clone has a data directory and beside it a private directory `<data directory>.run` for sockets, server logs and
//! the marker `keiki_clone.json`. The marker is written before anything else and removed last, so that whatever is
//! found with it was made by the job that it names, and only that is ever deleted.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::durable;
use crate::base::ownership::give_to;
use crate::base::users::User;
use crate::error::{Context, Error, Kind, Result};
use crate::model::id::JobId;

const MARKER: &str = "keiki_clone.json";
const MARKER_VERSION: u32 = 1;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Marker {
    version: u32,
    job: String,
    data_dir: PathBuf,
    /// The data directory was there, empty, before the job: it is emptied again and not removed.
    data_dir_was_there: bool,
}

/// The private directory that belongs to a data directory.
pub fn run_dir_of(data_dir: &Path) -> PathBuf {
    let mut name = data_dir.as_os_str().to_os_string();
    name.push(".run");
    PathBuf::from(name)
}

/// What stands in the way of a new data directory here, if anything.
pub fn objection_to(data_dir: &Path) -> Result<Option<String>> {
    for path in [data_dir, &run_dir_of(data_dir)] {
        match std::fs::read_dir(path) {
            Ok(entries) => {
                // The unfinished marker of an agent that died just then is nobody's work.
                let is_foreign = |entry: std::io::Result<std::fs::DirEntry>| {
                    entry.map_or(true, |entry| !is_unfinished_marker(&entry.path()))
                };
                if entries.into_iter().any(is_foreign) {
                    return Ok(Some(format!("directory '{}' is not empty", path.display())));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
                return Ok(Some(format!("'{}' is not a directory", path.display())));
            }
            Err(error) => return Err(Error::io(format!("cannot look into '{}'", path.display()), error)),
        }
    }
    Ok(None)
}

/// Whether this is a marker that was being written: `create_file_exclusive_durable` writes it under a name of its own
/// first, and an agent that is killed in between leaves that behind.
fn is_unfinished_marker(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.strip_prefix('.').and_then(|name| name.strip_prefix(MARKER)).is_some_and(|rest| rest.ends_with(".tmp"))
}

/// Makes both directories for a job, or finds those that it made before. Anything else there is refused and stays as it
/// is. They belong to `owner`; nobody else can look into them.
pub fn make(data_dir: &Path, job: JobId, owner: &User) -> Result<()> {
    let run_dir = run_dir_of(data_dir);
    if !is_of(data_dir, job)? {
        if let Some(objection) = objection_to(data_dir)? {
            return Err(Error::new(Kind::Conflict, objection).hint("choose another directory with --dir"));
        }
        let parent = durable::parent_of(data_dir);
        if !parent.exists() {
            durable::create_dir_all_durable(parent, 0o755)?;
        }
        durable::create_dir_all_durable(&run_dir, 0o700)?;
        for unfinished in list(&run_dir)?.iter().filter(|path| is_unfinished_marker(path)) {
            remove_any(unfinished)?;
        }
        let marker = Marker {
            version: MARKER_VERSION,
            job: job.to_string(),
            data_dir: data_dir.to_path_buf(),
            data_dir_was_there: data_dir.exists(),
        };
        let bytes = serde_json::to_vec_pretty(&marker)
            .map_err(|error| Error::new(Kind::Internal, format!("cannot write down whose the clone is: {error}")))?;
        durable::create_file_exclusive_durable(&run_dir.join(MARKER), &bytes, 0o600)?;
    }
    durable::create_dir_all_durable(data_dir, 0o700)?;
    for path in [data_dir, run_dir.as_path()] {
        give_to(owner, path)?;
    }
    Ok(())
}

/// Whether the directories carry the marker of this job.
pub fn is_of(data_dir: &Path, job: JobId) -> Result<bool> {
    Ok(read_marker(data_dir)?.is_some_and(|marker| marker.job == job.to_string() && marker.data_dir == data_dir))
}

fn read_marker(data_dir: &Path) -> Result<Option<Marker>> {
    let path = run_dir_of(data_dir).join(MARKER);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(format!("cannot read '{}'", path.display()), error)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| {
        Error::new(Kind::Damaged, format!("cannot read '{}': {error}", path.display()))
            .hint("keiki deletes only what it made: remove the directory by hand if it is not wanted")
    })
}

/// Removes everything in the data directory, for staging again.
pub fn empty(data_dir: &Path, job: JobId) -> Result<()> {
    if !is_of(data_dir, job)? {
        return Err(not_ours(data_dir));
    }
    remove_content(data_dir)
}

/// Deletes both directories, if they are this job's. Repeating it is harmless; what is not the job's stays.
pub fn remove(data_dir: &Path, job: JobId) -> Result<()> {
    let run_dir = run_dir_of(data_dir);
    let Some(marker) = read_marker(data_dir)? else { return Ok(()) };
    if marker.job != job.to_string() || marker.data_dir != data_dir {
        return Err(not_ours(data_dir));
    }
    remove_content(data_dir)?;
    if !marker.data_dir_was_there && data_dir.exists() {
        durable::remove_dir_all_durable(data_dir)?;
    }
    // The marker goes last: until then a repetition knows what is left.
    for entry in list(&run_dir)? {
        if entry.file_name().is_some_and(|name| name != MARKER) {
            remove_any(&entry)?;
        }
    }
    durable::remove_dir_all_durable(&run_dir)
}

fn not_ours(data_dir: &Path) -> Error {
    Error::new(Kind::Conflict, format!("directory '{}' was not made by this job and is left alone", data_dir.display()))
        .hint("remove it by hand if it is not wanted")
}

fn remove_content(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    for entry in list(dir)? {
        remove_any(&entry)?;
    }
    durable::fsync_dir(dir)
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let what = || format!("cannot list '{}'", dir.display());
    let entries = std::fs::read_dir(dir).context(what)?;
    entries.map(|entry| entry.map(|entry| entry.path()).context(what)).collect()
}

fn remove_any(path: &Path) -> Result<()> {
    let what = || format!("cannot remove '{}'", path.display());
    let is_directory = path.symlink_metadata().context(what)?.is_dir();
    let removed = if is_directory { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.context(what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::users::current_user;

    #[test]
    fn only_what_the_job_made_is_deleted() {
        let root = tempfile::tempdir().unwrap();
        let (mine, other) = (root.path().join("mine"), root.path().join("other"));
        let (job, stranger) = (JobId::fresh(), JobId::fresh());
        let user = current_user().unwrap();
        make(&mine, job, &user).unwrap();
        std::fs::write(mine.join("x"), "x").unwrap();
        make(&mine, job, &user).unwrap();
        assert_eq!(remove(&mine, stranger).unwrap_err().kind(), Kind::Conflict);
        assert_eq!(empty(&mine, stranger).unwrap_err().kind(), Kind::Conflict);
        assert!(mine.join("x").exists());
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join("letter"), "x").unwrap();
        assert_eq!(make(&other, job, &user).unwrap_err().kind(), Kind::Conflict);
        remove(&other, job).unwrap();
        assert!(other.join("letter").exists());
        remove(&mine, job).unwrap();
        remove(&mine, job).unwrap();
        assert!(!mine.exists() && !run_dir_of(&mine).exists());
    }

    #[test]
    fn a_marker_that_was_never_finished_is_in_nobody_s_way() {
        let root = tempfile::tempdir().unwrap();
        let (dir, job) = (root.path().join("clone"), JobId::fresh());
        let user = current_user().unwrap();
        std::fs::create_dir(run_dir_of(&dir)).unwrap();
        std::fs::write(run_dir_of(&dir).join(".keiki_clone.json.81e28f577bcbc659.tmp"), "{").unwrap();
        assert_eq!(objection_to(&dir).unwrap(), None);
        make(&dir, job, &user).unwrap();
        remove(&dir, job).unwrap();
        assert!(!dir.exists() && !run_dir_of(&dir).exists());
    }

    #[test]
    fn a_directory_that_was_there_empty_is_emptied_and_kept() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("mount");
        std::fs::create_dir(&dir).unwrap();
        let job = JobId::fresh();
        make(&dir, job, &current_user().unwrap()).unwrap();
        std::fs::create_dir(dir.join("base")).unwrap();
        remove(&dir, job).unwrap();
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
        assert!(!run_dir_of(&dir).exists());
    }
}
