//! A directory. It is written under another name beside its place, and gets its own when everything is durable.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::Output;
use crate::base::durable::{fsync_dir, parent_of, sync_filesystem};
use crate::error::{Context, Error, Kind, Result};

/// What is behind the name of a directory that is not complete.
const PARTIAL: &str = ".keiki-partial";

/// See the module. What is not finished is removed when this is dropped.
pub struct DirectoryOutput {
    place: PathBuf,
    partial: PathBuf,
    file: Option<OpenFile>,
    is_finished: bool,
}

struct OpenFile {
    file: File,
    path: PathBuf,
    mode: u32,
    bytes: u64,
    at: u64,
}

impl DirectoryOutput {
    /// Begins a directory that will be at `place`, where nothing is yet, or an empty directory.
    pub fn begin(place: &Path) -> Result<DirectoryOutput> {
        let place = &std::path::absolute(place).context(|| format!("cannot use '{}'", place.display()))?;
        let name = place.file_name().ok_or_else(|| {
            Error::new(Kind::BadInput, format!("'{}' cannot be the name of a new directory", place.display()))
        })?;
        let is_free = match std::fs::read_dir(place) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
            Err(error) => return Err(Error::io(format!("cannot use '{}'", place.display()), error)),
        };
        if !is_free {
            return Err(Error::new(Kind::Conflict, format!("'{}' is not empty", place.display()))
                .hint("name a directory that does not exist yet"));
        }
        let mut partial = name.to_os_string();
        partial.push(PARTIAL);
        let partial = place.with_file_name(partial);
        std::fs::DirBuilder::new().mode(0o700).create(&partial).map_err(|error| {
            let is_there = error.kind() == std::io::ErrorKind::AlreadyExists;
            let error = Error::io(format!("cannot create '{}'", partial.display()), error);
            match is_there {
                true => error.hint("a download that was interrupted left it: remove it, if none is running now"),
                false => error,
            }
        })?;
        Ok(DirectoryOutput { place: place.to_path_buf(), partial, file: None, is_finished: false })
    }

    fn open_file(&mut self) -> Result<&mut OpenFile> {
        self.file.as_mut().ok_or_else(|| Error::new(Kind::Internal, "bytes came for no file"))
    }
}

impl Output for DirectoryOutput {
    fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        let path = self.partial.join(path);
        // Whoever writes it must be able to write into it.
        let made = std::fs::DirBuilder::new().mode(mode | 0o700).create(&path);
        made.context(|| format!("cannot create '{}'", path.display()))
    }

    fn link(&mut self, path: &str, to: &str) -> Result<()> {
        let path = self.partial.join(path);
        std::os::unix::fs::symlink(to, &path).context(|| format!("cannot create link '{}'", path.display()))
    }

    fn begin_file(&mut self, path: &str, mode: u32, bytes: u64) -> Result<()> {
        let path = self.partial.join(path);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.context(|| format!("cannot create '{}'", path.display()))?;
        self.file = Some(OpenFile { file, path, mode, bytes, at: 0 });
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let open = self.open_file()?;
        open.at += bytes.len() as u64;
        open.file.write_all(bytes).context(|| format!("cannot write '{}'", open.path.display()))
    }

    fn hole(&mut self, bytes: u64) -> Result<()> {
        let open = self.open_file()?;
        open.at += bytes;
        let sought = open.file.seek(SeekFrom::Start(open.at));
        sought.map(|_| ()).context(|| format!("cannot write '{}'", open.path.display()))
    }

    fn end_file(&mut self) -> Result<()> {
        let Some(open) = self.file.take() else { return Ok(()) };
        let what = || format!("cannot write '{}'", open.path.display());
        if open.at != open.bytes {
            return Err(Error::new(Kind::Internal, format!("{}: it has another length than was said", what())));
        }
        open.file.set_len(open.bytes).context(what)?;
        open.file.set_permissions(PermissionsExt::from_mode(open.mode)).context(what)
    }

    fn finish(&mut self) -> Result<()> {
        sync_filesystem(&self.partial)?;
        std::fs::rename(&self.partial, &self.place)
            .context(|| format!("cannot give '{}' its name", self.place.display()))?;
        self.is_finished = true;
        fsync_dir(parent_of(&self.place))
    }
}

impl Drop for DirectoryOutput {
    fn drop(&mut self) {
        if !self.is_finished {
            // What stays is named as what it is, and the next attempt says so.
            let _ = std::fs::remove_dir_all(&self.partial);
        }
    }
}
