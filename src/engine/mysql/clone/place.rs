//! Where the files of a backup go in a clone.
//!
//! Everything goes into [`STAGED_DIR`] first. A server that is started on the data directory meanwhile finds no system
//! tables and ends. Moved up are the data files first and the directory of the system tables last, each by a rename, so
//! that this holds until the last rename and a move that was interrupted can be gone on with.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::base::durable::{fsync_dir, rename_durable};
use crate::base::ownership::give_to;
use crate::base::users::User;
use crate::engine::mysql::backup::CONFIG_DIRECTORY;
use crate::engine::mysql::ondisk::backup_info::PREFIXES;
use crate::engine::mysql::product::Product;
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::{FileKind, FileMeta};

/// Below the data directory, while it is being filled.
pub const STAGED_DIR: &str = "keiki_staged";

/// What becomes of a file of a backup. See `CloneEngine::place`.
pub fn place(meta: &FileMeta) -> Result<Option<FileMeta>> {
    let top = meta.path.split('/').next().unwrap_or_default();
    if top == CONFIG_DIRECTORY || top == STAGED_DIR {
        return Ok(None);
    }
    if let FileKind::Link { .. } = meta.kind {
        return Err(Error::new(Kind::Unsupported, format!("'{}' of the backup is a link", meta.path))
            .hint("keiki clones servers whose tables all lie in the data directory"));
    }
    Ok(Some(FileMeta { path: format!("{STAGED_DIR}/{}", meta.path), ..meta.clone() }))
}

/// A directory of the server's user that others cannot enter. Blocking.
pub fn own_directory(user: &User, path: &Path) -> Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
        .context(|| format!("cannot set the mode of '{}'", path.display()))?;
    give_to(user, path)
}

/// Moves the staged files up into the data directory. Blocking; may be repeated after a crash at any point.
pub fn move_up(product: Product, data_dir: &Path) -> Result<()> {
    let staged = data_dir.join(STAGED_DIR);
    if !staged.exists() {
        return Ok(());
    }
    let what = || format!("cannot list '{}'", staged.display());
    let mut names: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(&staged).context(what)? {
        names.push(PathBuf::from(entry.context(what)?.file_name()));
    }
    names.sort_by_key(|name| (name.as_os_str() == product.last_entry(), name.clone()));
    for name in names {
        let (from, to) = (staged.join(&name), data_dir.join(&name));
        // The program's own notes have done their work.
        if PREFIXES.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            std::fs::remove_file(&from).context(|| format!("cannot remove '{}'", from.display()))?;
            continue;
        }
        if std::fs::symlink_metadata(&to).is_ok() {
            return Err(Error::new(Kind::Damaged, format!("'{}' is there already", to.display()))
                .hint("was a server started in the directory of the clone? discard the clone and order it again"));
        }
        rename_durable(&from, &to)?;
    }
    std::fs::remove_dir(&staged).context(|| format!("cannot remove '{}'", staged.display()))?;
    fsync_dir(data_dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_staged_below_its_own_directory_and_option_files_are_left_out() {
        let meta = |path: &str, kind| FileMeta { path: path.into(), kind, mode: 0o660 };
        let placed = |path| place(&meta(path, FileKind::Regular)).unwrap().map(|meta| meta.path);
        assert_eq!(placed("mysql/user.frm").as_deref(), Some("keiki_staged/mysql/user.frm"));
        assert_eq!(placed("keiki_config/etc/mysql/my.cnf"), None);
        let link = meta("t", FileKind::Link { to: "/elsewhere".into() });
        assert_eq!(place(&link).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn the_system_tables_move_last_and_an_interrupted_move_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path();
        let staged = data.join(STAGED_DIR);
        for sub in ["mysql", "t"] {
            std::fs::create_dir_all(staged.join(sub)).unwrap();
        }
        for file in ["ibdata1", "xtrabackup_info"] {
            std::fs::write(staged.join(file), "x").unwrap();
        }
        // Somebody started a server meanwhile.
        std::fs::write(data.join("t"), "").unwrap();
        assert_eq!(move_up(Product::MariaDb, data).unwrap_err().kind(), Kind::Damaged);
        assert!(data.join("ibdata1").exists() && !data.join("mysql").exists());
        std::fs::remove_file(data.join("t")).unwrap();
        move_up(Product::MariaDb, data).unwrap();
        assert!(data.join("mysql").is_dir() && data.join("t").is_dir());
        assert!(!staged.exists() && !data.join("xtrabackup_info").exists());
        move_up(Product::MariaDb, data).unwrap();
    }
}
