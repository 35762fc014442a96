//! Files that belong to the user who runs a server, made by an agent that may be another.

use std::path::Path;

use crate::base::durable::write_file_durable;
use crate::base::users::User;
use crate::error::{Context, Result};

/// Makes `path` the user's own, if we act as somebody else. Of a link, the link itself.
pub fn give_to(user: &User, path: &Path) -> Result<()> {
    if user.is_current() {
        return Ok(());
    }
    std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid))
        .context(|| format!("cannot give '{}' to user '{}'", path.display(), user.name))
}

/// Replaces or creates a file of the user's, readable by nobody else.
pub fn write_owned(user: &User, path: &Path, content: &[u8]) -> Result<()> {
    write_file_durable(path, content, 0o600)?;
    give_to(user, path)
}
