//! The passwords of an order, from when it is taken to the end of its job.
//!
//! `<state_dir>/jobs/<id>.passwords`, mode 0600 in a directory of mode 0700: a clone that goes on after a restart of the
//! agent still has to set them. The file is durable before the order is recorded, and gone before the end of a job that
//! is done or cancelled is recorded; that of a failed job stays, because the job may be resumed. Files of which no job
//! needs anything are removed when the agent starts. Nothing of it is ever in a journal, a report or a log.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::durable::{create_dir_all_durable, remove_file_durable, write_file_durable};
use crate::error::{Context, Error, Kind, Result};
use crate::model::id::JobId;
use crate::model::job::{JobReport, JobState, Order, Task};
use crate::model::password::{Password, Passwords};

const SUFFIX: &str = "passwords";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    passwords: BTreeMap<String, String>,
}

fn path_of(directory: &Path, id: JobId) -> PathBuf {
    directory.join(format!("{id}.{SUFFIX}"))
}

/// Whether the passwords are those that the order speaks of.
pub fn check(order: &Order, passwords: &Passwords) -> Result<()> {
    let wanted = match &order.task {
        Task::Clone(clone) => clone.passwords_for.iter().collect(),
        Task::CloneGroup(_) | Task::Backup { .. } => Vec::new(),
    };
    if wanted.iter().copied().eq(passwords.keys()) {
        return Ok(());
    }
    Err(Error::new(Kind::BadInput, format!("order '{}' came with other passwords than it speaks of", order.id))
        .hint("are both hosts running the same version of keiki?"))
}

/// Keeps the passwords of a new order, if there are any. The same again is harmless. Blocking.
pub fn keep(directory: &Path, id: JobId, passwords: &Passwords) -> Result<()> {
    if passwords.is_empty() {
        return Ok(());
    }
    let passwords = passwords.iter().map(|(account, password)| (account.clone(), password.expose().to_string()));
    let document = Document { version: VERSION, passwords: passwords.collect() };
    let bytes = serde_json::to_vec(&document)
        .map_err(|_| Error::new(Kind::Internal, format!("cannot write down the passwords of order '{id}'")))?;
    create_dir_all_durable(directory, 0o700)?;
    write_file_durable(&path_of(directory, id), &bytes, 0o600)
}

/// The passwords of a job that is not over; none if it has none. Blocking.
pub fn read(directory: &Path, id: JobId) -> Result<Passwords> {
    let path = path_of(directory, id);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Passwords::new()),
        Err(error) => return Err(Error::io(format!("cannot read '{}'", path.display()), error)),
    };
    // What the parser says would repeat what it has read.
    let damaged = || Error::new(Kind::Damaged, format!("cannot understand '{}'", path.display()));
    let document: Document = serde_json::from_slice(&bytes).map_err(|_| damaged())?;
    if document.version != VERSION {
        return Err(damaged().hint("was it written by a newer keiki?"));
    }
    document.passwords.into_iter().map(|(account, text)| Ok((account, Password::new(text)?))).collect()
}

/// Whether an order that comes again brings the passwords that are kept. After the end of its job nobody knows. Blocking.
pub fn require_same(directory: &Path, id: JobId, passwords: &Passwords) -> Result<()> {
    let kept = read(directory, id)?;
    let differs =
        |(account, password): &(&String, &Password)| kept.get(*account).is_some_and(|other| other != *password);
    match passwords.iter().find(differs) {
        None => Ok(()),
        Some((account, _)) => Err(Error::new(
            Kind::Conflict,
            format!("order '{id}' was given before with another password for '{account}'"),
        )
        .hint("give a changed order an id of its own")),
    }
}

/// Removes them. Succeeds if there are none. Blocking.
pub fn forget(directory: &Path, id: JobId) -> Result<()> {
    let path = path_of(directory, id);
    if path.exists() { remove_file_durable(&path) } else { Ok(()) }
}

/// Removes all that no job needs: of jobs that are done or cancelled, of orders that were never recorded, and what an
/// agent that died has left half written. Blocking, for the start of the agent.
pub fn sweep(directory: &Path, jobs: &[&JobReport]) -> Result<()> {
    let what = || format!("cannot read directory '{}'", directory.display());
    let is_needed = |id: &str| {
        let job = jobs.iter().find(|job| job.order.id.to_string() == id);
        job.is_some_and(|job| !matches!(job.state, JobState::Done | JobState::Cancelled))
    };
    for entry in std::fs::read_dir(directory).context(what)? {
        let path = entry.context(what)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_needed = match name.strip_suffix(SUFFIX).and_then(|name| name.strip_suffix('.')) {
            Some(id) => is_needed(id),
            // The names of `write_file_durable`, which may cut them.
            None => !(name.starts_with('.') && name.ends_with(".tmp")),
        };
        if !is_needed {
            remove_file_durable(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn passwords_are_kept_for_their_owner_only_and_until_no_job_needs_them() {
        let directory = tempfile::tempdir().unwrap();
        let jobs = directory.path().join("jobs");
        let id = JobId::fresh();
        let passwords: Passwords = [("app".to_string(), Password::new("s3cret \"x\"").unwrap())].into();
        keep(&jobs, id, &Passwords::new()).unwrap();
        assert!(!jobs.exists(), "nothing is written where there is nothing to keep");
        keep(&jobs, id, &passwords).unwrap();
        assert_eq!(read(&jobs, id).unwrap(), passwords);
        require_same(&jobs, id, &passwords).unwrap();
        let other: Passwords = [("app".to_string(), Password::new("another").unwrap())].into();
        let error = require_same(&jobs, id, &other).unwrap_err();
        assert!(error.kind() == Kind::Conflict && !error.to_string().contains("another\""), "{error}");
        let mode = std::fs::metadata(path_of(&jobs, id)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::write(jobs.join(".x.passwords.0123.tmp"), "{").unwrap();
        std::fs::write(jobs.join("y.jsonl"), "").unwrap();
        sweep(&jobs, &[]).unwrap();
        assert_eq!(read(&jobs, id).unwrap(), Passwords::new());
        let left: Vec<_> = std::fs::read_dir(&jobs).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["y.jsonl"]);
        forget(&jobs, id).unwrap();
    }

    #[test]
    fn a_damaged_file_is_refused_without_a_word_of_what_is_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let id = JobId::fresh();
        for bad in [r#"{"version":1,"passwords":{"app":"s3cret"}"#, r#"{"version":9,"passwords":{"app":"s3cret"}}"#] {
            std::fs::write(path_of(directory.path(), id), bad).unwrap();
            let error = read(directory.path(), id).unwrap_err();
            assert!(error.kind() == Kind::Damaged && !error.to_string().contains("s3cret"), "{error}");
        }
    }
}
