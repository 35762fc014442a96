//! Finds processes by the directory that they work in, which no other process takes over as it may a number.
//!
//! All of this is seen only for processes of our own user, or as root.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::base::child::{Process, process_start_ticks};

/// A directory by device and inode: one that was removed and made again is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectoryId(u64, u64);

impl DirectoryId {
    pub fn of(path: &Path) -> Option<DirectoryId> {
        std::fs::metadata(path).ok().map(|metadata| DirectoryId(metadata.dev(), metadata.ino()))
    }

    /// Whether the process works in this directory now (proc(5), `/proc/pid/cwd`).
    pub fn is_working_directory_of(self, pid: u32) -> bool {
        DirectoryId::of(&PathBuf::from(format!("/proc/{pid}/cwd"))) == Some(self)
    }

    /// The living processes that work in this directory and whose program file has a name that `is_meant`, the oldest
    /// first. A shell in the directory of a server is no server, so the name counts.
    pub fn processes(self, is_meant: impl Fn(&str) -> bool) -> Vec<Process> {
        let mut found: Vec<Process> = all_pids()
            .filter(|pid| self.is_working_directory_of(*pid))
            .filter(|pid| program_name(*pid).is_some_and(|name| is_meant(&name)))
            .filter_map(|pid| Some(Process { pid, start_ticks: process_start_ticks(pid)? }))
            .filter(Process::is_alive)
            .collect();
        found.sort_by_key(|process| (process.start_ticks, process.pid));
        found
    }
}

/// The numbers of all processes there are.
pub fn all_pids() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
}

/// The name of the file that a process runs. One that was replaced meanwhile is shown with ` (deleted)`, which is left out.
fn program_name(pid: u32) -> Option<String> {
    let path = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let name = path.file_name()?.to_string_lossy();
    Some(name.strip_suffix(" (deleted)").unwrap_or(&name).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_directory_and_its_program_together() {
        let here = DirectoryId::of(&std::env::current_dir().unwrap()).unwrap();
        let own = std::process::id();
        let name = program_name(own).unwrap();
        assert!(here.processes(|found| found == name).iter().any(|process| process.pid == own));
        assert!(here.processes(|found| found == "no such program").is_empty());
        let elsewhere = tempfile::tempdir().unwrap();
        assert!(DirectoryId::of(elsewhere.path()).unwrap().processes(|_| true).is_empty());
        assert_eq!(DirectoryId::of(Path::new("/no/such/directory")), None);
    }
}
