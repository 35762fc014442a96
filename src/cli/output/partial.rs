//! A file that gets its name when it is complete, and is gone if it never is.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::base::durable::{fsync_dir, parent_of, rename_without_replacing};
use crate::error::{Context, Error, Kind, Result};

/// See the module. Only its owner can read it: it holds what a database holds, or opens the way to that.
pub struct PartialFile {
    partial: PathBuf,
    place: PathBuf,
    file: File,
    is_complete: bool,
}

impl PartialFile {
    /// Begins a file that will be at `place`, where nothing is yet.
    pub fn begin(place: &Path) -> Result<PartialFile> {
        if place.symlink_metadata().is_ok() {
            return Err(is_taken(place));
        }
        let what = || format!("cannot write '{}'", place.display());
        let place = std::path::absolute(place).context(what)?;
        let mut partial = place.as_os_str().to_os_string();
        partial.push(".keiki-partial");
        let partial = PathBuf::from(partial);
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&partial).context(what)?;
        Ok(PartialFile { partial, place, file, is_complete: false })
    }

    /// What is written goes here.
    pub fn writer(&self) -> Result<File> {
        self.file.try_clone().context(|| format!("cannot write '{}'", self.partial.display()))
    }

    /// Makes it durable and gives it its name.
    pub fn finish(mut self) -> Result<()> {
        self.file.sync_all().context(|| format!("cannot write '{}'", self.partial.display()))?;
        rename_without_replacing(&self.partial, &self.place).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => is_taken(&self.place),
            _ => Error::io(format!("cannot give '{}' its name", self.place.display()), error),
        })?;
        self.is_complete = true;
        fsync_dir(parent_of(&self.place))
    }
}

fn is_taken(place: &Path) -> Error {
    Error::new(Kind::Conflict, format!("'{}' is there already", place.display()))
        .hint("name a file that does not exist yet")
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.is_complete {
            // What stays is named as what it is, and is written anew by the next attempt.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_has_its_name_only_when_it_is_complete_and_never_takes_that_of_another() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("links");
        let begun = PartialFile::begin(&place).unwrap();
        begun.writer().unwrap().write_all(b"half").unwrap();
        assert!(!place.exists());
        drop(begun);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);

        let begun = PartialFile::begin(&place).unwrap();
        begun.writer().unwrap().write_all(b"whole").unwrap();
        begun.finish().unwrap();
        assert_eq!(std::fs::read(&place).unwrap(), b"whole");
        assert_eq!(std::fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(PartialFile::begin(&place).err().unwrap().kind(), Kind::Conflict);

        std::fs::remove_file(&place).unwrap();
        let begun = PartialFile::begin(&place).unwrap();
        std::fs::write(&place, b"of somebody else").unwrap();
        assert_eq!(begun.finish().unwrap_err().kind(), Kind::Conflict);
        assert_eq!(std::fs::read(&place).unwrap(), b"of somebody else");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
