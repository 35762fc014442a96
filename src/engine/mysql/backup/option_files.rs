//! The server's option files, which are no part of the data directory and go into the backup all the same.
//!
//! A clone does not use them as they are (`settings` says what it takes over): they are there to be looked at and
//! downloaded. Found as the server finds them (MariaDB knowledge base, "Configuring MariaDB with Option Files"):
//! `--defaults-file` of the running process, or else the usual places, and what they include.

use std::path::{Path, PathBuf};

use crate::base::bulk::run_blocking;
use crate::engine::BaseLane;
use crate::engine::mysql::MySqlSource;
use crate::engine::mysql::server::running_in;
use crate::error::Result;
use crate::model::backup::{FileKind, FileMeta};

/// Where they lie in a backup, with their whole path below it.
pub const CONFIG_DIRECTORY: &str = "keiki_config";

const USUAL: [&str; 3] = ["/etc/my.cnf", "/etc/mysql/my.cnf", "/etc/mysql/mariadb.cnf"];
const FILE_BYTES_MAX: u64 = 1 << 20;
const FILES_MAX: usize = 200;

/// Path and content of each option file that can be read.
pub async fn collect(source: &MySqlSource) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let data_dir = source.data_dir.clone();
    run_blocking("option files", move || {
        let mut found = Vec::new();
        for root in roots(&data_dir) {
            read_with_includes(&root, &mut found);
        }
        // What SET PERSIST wrote (MySQL manual, "Persisted System Variables").
        read_with_includes(&data_dir.join("mysqld-auto.cnf"), &mut found);
        Ok(found)
    })
    .await
}

/// Stores them. Blocking.
pub fn store(files: &[(PathBuf, Vec<u8>)], mut lane: Box<dyn BaseLane>) -> Result<()> {
    for (path, content) in files {
        let path = format!("{CONFIG_DIRECTORY}{}", path.display());
        lane.begin(FileMeta { path, kind: FileKind::Regular, mode: 0o600 })?;
        lane.write(content)?;
        lane.end()?;
    }
    lane.finish()
}

fn roots(data_dir: &Path) -> Vec<PathBuf> {
    let arguments = running_in(data_dir)
        .and_then(|process| std::fs::read(format!("/proc/{}/cmdline", process.pid)).ok())
        .unwrap_or_default();
    let arguments = String::from_utf8_lossy(&arguments);
    let mut extra = Vec::new();
    for argument in arguments.split('\0') {
        if argument == "--no-defaults" {
            return Vec::new();
        }
        if let Some(file) = argument.strip_prefix("--defaults-file=") {
            return vec![PathBuf::from(file)];
        }
        extra.extend(argument.strip_prefix("--defaults-extra-file=").map(PathBuf::from));
    }
    USUAL.iter().map(PathBuf::from).chain(extra).collect()
}

/// Reads a file and what it includes, each once. What cannot be read is left out: it is no part of the data.
fn read_with_includes(path: &Path, found: &mut Vec<(PathBuf, Vec<u8>)>) {
    let is_plain = path.is_absolute() && path.components().all(|part| part != std::path::Component::ParentDir);
    let is_small = std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() <= FILE_BYTES_MAX);
    if !is_plain || !is_small || found.len() >= FILES_MAX || found.iter().any(|(known, _)| known == path) {
        return;
    }
    let Ok(content) = std::fs::read(path) else { return };
    let text = String::from_utf8_lossy(&content).into_owned();
    found.push((path.to_path_buf(), content));
    for line in text.lines().map(str::trim) {
        if let Some(directory) = line.strip_prefix("!includedir") {
            let entries = std::fs::read_dir(directory.trim()).into_iter().flatten().flatten();
            let mut names: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
            names.retain(|name| name.extension().is_some_and(|extension| extension == "cnf"));
            names.sort();
            names.iter().for_each(|name| read_with_includes(name, found));
        } else if let Some(file) = line.strip_prefix("!include") {
            read_with_includes(Path::new(file.trim()), found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn includes_are_followed_once_and_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir(at("d")).unwrap();
        std::fs::write(
            at("my.cnf"),
            format!("[mysqld]\n!includedir {}\n!include {}\n", at("d").display(), at("x").display()),
        )
        .unwrap();
        std::fs::write(at("d/b.cnf"), format!("!include {}", at("my.cnf").display())).unwrap();
        std::fs::write(at("d/a.cnf"), "a").unwrap();
        std::fs::write(at("d/c.txt"), "c").unwrap();
        std::fs::write(at("x"), "x").unwrap();
        let mut found = Vec::new();
        read_with_includes(&at("my.cnf"), &mut found);
        let names: Vec<PathBuf> = found.into_iter().map(|(path, _)| path).collect();
        assert_eq!(names, [at("my.cnf"), at("d/a.cnf"), at("d/b.cnf"), at("x")]);
    }
}
