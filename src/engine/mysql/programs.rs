//! The programs of MariaDB and MySQL on this host, and whether they go together with a server.

use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

use crate::base::child::ChildCommand;
use crate::engine::mysql::product::Product;
use crate::error::{Error, Kind, Result};

/// A version: `10.11.19`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl Version {
    /// The first three numbers with points in a text.
    pub fn find(text: &str) -> Option<Version> {
        text.split(|character: char| !(character.is_ascii_digit() || character == '.')).find_map(|word| {
            let mut numbers = word.split('.').map(|number| number.parse::<u32>().ok());
            match (numbers.next()??, numbers.next()??, numbers.next()??, numbers.next()) {
                (major, minor, patch, None) => Some(Version { major, minor, patch }),
                _ => None,
            }
        })
    }

    /// Versions of one series have the same files.
    pub fn is_same_series(self, other: Version) -> bool {
        (self.major, self.minor) == (other.major, other.minor)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// A program that was asked for its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    pub product: Product,
    pub path: PathBuf,
    pub version: Version,
}

/// Names of servers of either product.
pub const SERVERS: [&str; 2] = ["mariadbd", "mysqld"];
/// Names of MariaDB's backup program.
pub const BACKUP: [&str; 2] = ["mariadb-backup", "mariabackup"];

/// Finds a program by one of its names: in `wanted` and its neighbour if that is given, otherwise where distributions
/// put it. `Unsupported` if what is found is not of the series that is needed; `needed` is a version of it.
pub async fn find(product: Product, names: &[&str], wanted: Option<&Path>, needed: Version) -> Result<Program> {
    let directories = match wanted {
        Some(directory) => with_neighbour(directory),
        None => ["/usr/sbin", "/usr/bin", "/usr/local/mariadb/bin", "/usr/local/mysql/bin", "/usr/local/bin"]
            .map(PathBuf::from)
            .to_vec(),
    };
    let mut others = Vec::new();
    let paths: Vec<PathBuf> =
        directories.iter().flat_map(|directory| names.iter().map(move |name| directory.join(name))).collect();
    let mut looked_at = Vec::new();
    for path in paths {
        // An older name of a program is a link to the newer one.
        let real = std::fs::canonicalize(&path).unwrap_or_default();
        if !path.is_file() || looked_at.contains(&real) {
            continue;
        }
        looked_at.push(real);
        let asked = ChildCommand::new(&path).arg("--no-defaults").arg("--version");
        let finished = asked.run(&CancellationToken::new()).await?;
        let text = [finished.stdout, finished.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        // In front of the word stands the path, which may have a number of its own.
        let said = text.split_once(" Ver ").map_or(text.as_ref(), |(_, said)| said);
        let version = Version::find(said).filter(|_| Product::of_text(&text) == product);
        match version {
            Some(version) if version.is_same_series(needed) => return Ok(Program { product, path, version }),
            Some(version) => others.push(format!("'{}' of {} {version}", path.display(), product.name())),
            None => others.push(format!("'{}', which is not of {}", path.display(), product.name())),
        }
    }
    let series = format!("{}.{}", needed.major, needed.minor);
    let (kind, found) = match (others.is_empty(), wanted) {
        (true, Some(directory)) => (Kind::NotFound, format!("it is not in '{}'", directory.display())),
        (true, None) => (Kind::NotFound, "it is not installed in a usual place".to_string()),
        (false, _) => (Kind::Unsupported, format!("found only {}", others.join(", "))),
    };
    Err(Error::new(kind, format!("cannot find '{}' of {} {series}: {found}", names[0], product.name())).hint(format!(
        "install '{}' of series {series} on this host, or set 'bin_dir' to the directory of its programs",
        names[0]
    )))
}

/// Packages put the server into `sbin` and the backup program into `bin` beside it: whoever names one means both.
fn with_neighbour(directory: &Path) -> Vec<PathBuf> {
    let neighbour = match directory.file_name().and_then(|name| name.to_str()) {
        Some("bin") => Some("sbin"),
        Some("sbin") => Some("bin"),
        _ => None,
    };
    let neighbour = neighbour.map(|name| directory.with_file_name(name));
    [directory.to_path_buf()].into_iter().chain(neighbour).collect()
}

/// The directory that an installation lies in, as `--basedir` means it: below it are messages, character sets and
/// plugins of the program's own version. Nothing if it does not look like one. Blocking.
pub fn base_directory(program: &Path) -> Option<PathBuf> {
    let program = std::fs::canonicalize(program).ok()?;
    let base = program.parent()?.parent()?;
    let has_messages = ["share/mysql", "share/mariadb", "share/english"].iter().any(|name| base.join(name).is_dir());
    has_messages.then(|| base.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_as_the_programs_print_them() {
        let version = Version { major: 10, minor: 11, patch: 19 };
        for text in [
            "mariadbd  Ver 10.11.19-MariaDB-0+deb12u1 for debian-linux-gnu on x86_64 (Debian 12)",
            "mariadb-backup based on MariaDB server 10.11.19-MariaDB debian-linux-gnu (x86_64)",
            "10.11.19",
        ] {
            assert_eq!(Version::find(text), Some(version), "{text}");
        }
        assert_eq!(Version::find("no version 1.2 here"), None);
        assert!(version.is_same_series(Version { patch: 3, ..version }));
        assert!(!version.is_same_series(Version { minor: 6, ..version }));
    }

    #[test]
    fn a_program_is_looked_for_beside_the_directory_that_was_named() {
        let paths = |text: &str| with_neighbour(Path::new(text));
        assert_eq!(paths("/usr/sbin"), [Path::new("/usr/sbin"), Path::new("/usr/bin")]);
        assert_eq!(paths("/opt/db/bin"), [Path::new("/opt/db/bin"), Path::new("/opt/db/sbin")]);
        assert_eq!(paths("/opt/tools"), [Path::new("/opt/tools")]);
    }

    #[test]
    fn an_installation_is_known_by_its_messages() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().canonicalize().unwrap();
        for name in ["sbin", "share/mariadb"] {
            std::fs::create_dir_all(base.join(name)).unwrap();
        }
        std::fs::write(base.join("sbin/mariadbd"), "").unwrap();
        std::fs::write(base.join("mariadbd"), "").unwrap();
        assert_eq!(base_directory(&base.join("sbin/mariadbd")), Some(base.clone()));
        assert_eq!(base_directory(&base.join("mariadbd")), None);
        assert_eq!(base_directory(&base.join("sbin/none")), None);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_not_found_with_what_to_install() {
        let directory = tempfile::tempdir().unwrap();
        let needed = Version { major: 10, minor: 11, patch: 0 };
        let error = find(Product::MariaDb, &BACKUP, Some(directory.path()), needed).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.hint_text().unwrap().contains("mariadb-backup"), "{error:?}");
    }
}
