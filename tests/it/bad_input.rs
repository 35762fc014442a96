//! What is typed wrong, lies damaged, comes from strangers or stands in the way: each gives an error with a hint and an
//! exit code that is not 0, and changes nothing.
//!
//! Everything goes through the real program. What it says is kept in `bad_input/snapshots` as a person reads it, with
//! numbers, times and places masked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use super::support::hosts::{Host, Lab, fingerprint, tail};
use super::support::two_hosts::processes_in;

mod binlogs;
mod configuration;
mod damage;
mod mask;
mod messages;
mod mysql;
mod place;
mod redis;
mod strangers;
mod typed;

use mask::Mask;

/// Collects what was said, for one snapshot of a whole group.
struct Said {
    mask: Mask,
    text: String,
    /// What was not refused as it ought to be: all of it is told at the end.
    complaints: Vec<String>,
}

impl Said {
    fn new(mask: Mask) -> Said {
        Said { mask, text: String::new(), complaints: Vec::new() }
    }

    /// Runs `keiki` against the agent of a host, expects a refusal that holds `expected` and a hint, and writes it down.
    fn refuses(&mut self, host: &Host, arguments: &[&str], expected: &str) {
        match refusal(&host.keiki(arguments), expected) {
            Ok(said) => self.note(&format!("keiki {}", shell(arguments)), &said),
            Err(complaint) => self.complain(arguments, &complaint, &host.log()),
        }
    }

    fn complain(&mut self, arguments: &[&str], complaint: &str, agent_log: &str) {
        let log = tail(agent_log, 5);
        self.complaints.push(format!("keiki {}\n{complaint}\n--- agent\n{log}\n", shell(arguments)));
    }

    /// All that was said, if everything was refused as it ought to be.
    fn finish(self) -> String {
        assert!(self.complaints.is_empty(), "{}", self.complaints.join("\n"));
        self.text
    }

    /// Writes down a refusal under a title.
    fn note(&mut self, title: &str, said: &str) {
        let title = self.mask.hide(title);
        let said = self.mask.hide(said);
        self.text.push_str(&format!("$ {title}\n{said}\n\n"));
    }
}

/// What the program said when it refused: from `error:` to the end. The error is what is wrong with the refusal.
fn refusal(output: &Output, expected: &str) -> Result<String, String> {
    let whole = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let code = output.status.code();
    if code.is_none_or(|code| code == 0 || code == 70) {
        return Err(format!("it ended with {}:\n{whole}", output.status));
    }
    let Some(error) = whole.rfind("error: ").map(|at| whole[at..].trim_end().to_string()) else {
        return Err(format!("it says no 'error:':\n{whole}"));
    };
    if !whole.contains(expected) {
        return Err(format!("it does not say '{expected}':\n{whole}"));
    }
    if !error.contains("\nhint: ") {
        return Err(format!("it gives no hint:\n{error}"));
    }
    Ok(error)
}

/// Arguments as somebody would type them.
fn shell(arguments: &[&str]) -> String {
    let quote = |argument: &&str| match argument.is_empty() || argument.contains(' ') {
        true => format!("'{argument}'"),
        false => argument.to_string(),
    };
    arguments.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// What must be as it was after a refusal.
#[derive(Debug, PartialEq, Eq)]
struct Standing {
    /// What lies where clones grow, by path.
    clones: Vec<PathBuf>,
    /// What the agents remember beside their jobs: instances and their bindings, spools.
    state: Vec<PathBuf>,
    /// Objects that do not come and go with the shipping of a living source.
    objects: BTreeMap<PathBuf, blake3::Hash>,
    /// Servers that run where clones grow.
    servers: Vec<u32>,
}

/// Looks at hosts and a repository.
fn standing(lab: &Lab, hosts: &[&Host], repository: &Path) -> Standing {
    let mut standing = Standing { clones: vec![], state: vec![], objects: BTreeMap::new(), servers: vec![] };
    for host in hosts {
        let clones = lab.path(&format!("clones-{}", host.name));
        standing.clones.extend(paths_below(&clones));
        standing.servers.extend(processes_in(&clones));
        let state = paths_below(&host.dir.join("state"));
        let is_journal = |path: &PathBuf| path.components().any(|part| part.as_os_str() == "jobs");
        standing.state.extend(state.into_iter().filter(|path| !is_journal(path)));
    }
    standing.objects = fingerprint(repository).into_iter().filter(|(path, _)| is_lasting(path)).collect();
    standing
}

/// Chunks of the open log file and the lease are rewritten all the time.
fn is_lasting(path: &Path) -> bool {
    let is_log = path.components().any(|part| part.as_os_str() == "log");
    let is_work = path.components().any(|part| part.as_os_str() == ".tmp");
    !path.ends_with("lease.json") && !is_work && (!is_log || path.ends_with("sealed"))
}

fn paths_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(next) = open.pop() {
        let Ok(entries) = fs::read_dir(&next) else { continue };
        for entry in entries.map(|entry| entry.unwrap().path()) {
            if entry.is_dir() && !entry.is_symlink() {
                open.push(entry.clone());
            }
            found.push(entry);
        }
    }
    found.sort();
    found
}

/// Fails if something is there that was not, or is not that was, or if a job of a host is neither over nor failed.
fn assert_unchanged(before: &Standing, lab: &Lab, hosts: &[&Host], repository: &Path, after_what: &str) {
    let after = standing(lab, hosts, repository);
    assert_eq!(after.clones, before.clones, "{after_what}: something was left where clones grow");
    assert_eq!(after.servers, before.servers, "{after_what}: a server was left");
    assert_eq!(after.state, before.state, "{after_what}: an agent remembers something");
    for (path, hash) in &before.objects {
        assert_eq!(after.objects.get(path), Some(hash), "{after_what}: '{}' changed", path.display());
    }
    // A living source seals log of its own; nothing else may come.
    let new: BTreeSet<&PathBuf> = after.objects.keys().filter(|path| !before.objects.contains_key(*path)).collect();
    let foreign: Vec<_> = new.into_iter().filter(|path| !path.ends_with("sealed")).collect();
    assert!(foreign.is_empty(), "{after_what}: new objects {foreign:?}");
    for host in hosts {
        for job in host.json(&["job", "list"]).as_array().unwrap() {
            let state = job["state"].as_str().unwrap();
            assert!(matches!(state, "failed" | "done" | "cancelled"), "{after_what}: a job is left {state}: {job:#}");
        }
    }
}
