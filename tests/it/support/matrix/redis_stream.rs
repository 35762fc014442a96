//! Redis 8 without an append-only file: its log is what it sends to replicas, which the agent writes into files of its own.
//!
//! So the row's own log is those files, each of which it opens as soon as it is there and keeps: what the archive has must
//! be what the agent had made durable beside the server. That this is what the server executed is shown by the clones,
//! which are compared by DUMP. A file ends where the stream goes on under another id, as after a failover.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::hosts::wait_for;
use crate::support::redis::TestRedis;

pub(super) const SPOOL_DIR: &str = "keiki-stream";

/// The server saves when it is told to stop, and never else; its backlog holds what is written while no agent follows.
pub(super) const SETTINGS: [(&str, &str); 4] = [
    ("appendonly", "no"),
    ("save", "3600 1000000"),
    ("repl-backlog-size", "1gb"),
    // How long it waits for other replicas before it sends a snapshot says nothing here.
    ("repl-diskless-sync-delay", "0"),
];

/// Gives the stream another id. A server remembers one former id: while nobody follows that is done once.
pub(super) fn end_log_file(server: &TestRedis) {
    keep_log_files(server);
    if !is_written_down(server) {
        mark(server);
        if !wait_until_written_down(server) {
            return;
        }
        keep_log_files(server);
    }
    let mut client = server.client();
    client.run(&["MULTI"]);
    client.run(&["REPLICAOF", "127.0.0.1", "1"]);
    client.run(&["REPLICAOF", "NO", "ONE"]);
    client.run(&["EXEC"]);
    // A file begins with the first bytes of it.
    mark(server);
    wait_until_written_down(server);
    keep_log_files(server);
}

/// Something that goes to replicas and changes nothing.
fn mark(server: &TestRedis) {
    server.run(&["PUBLISH", "nobody", "listens"]);
}

/// Waits until the newest file is of the stream's present id. Whether it is: it never is if nobody follows.
fn wait_until_written_down(server: &TestRedis) -> bool {
    wait_for("the stream to be followed", Duration::from_secs(60), || is_written_down(server) || !is_followed(server));
    is_written_down(server)
}

fn is_written_down(server: &TestRedis) -> bool {
    let id = server.info("master_replid");
    let mut head = String::new();
    // The first line says the id.
    let newest = log_files(server).pop().and_then(|(_, path)| File::open(path).ok());
    newest.is_some_and(|file| BufReader::new(file).read_line(&mut head).is_ok_and(|_| head.contains(&id)))
}

/// Whether an agent has the files: a lock tells, which goes with the agent.
fn is_followed(server: &TestRedis) -> bool {
    let Ok(lock) = std::fs::metadata(server.data_dir.join(SPOOL_DIR).join("lock")) else { return false };
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    locks.contains(&format!(":{} ", lock.ino()))
}

/// The files by their numbers.
fn log_files(server: &TestRedis) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(server.data_dir.join(SPOOL_DIR)).into_iter().flatten().flatten();
    let number = |path: &Path| path.file_name()?.to_str()?.strip_suffix(".aof")?.parse().ok();
    let mut files: Vec<_> = entries.filter_map(|entry| Some((number(&entry.path())?, entry.path()))).collect();
    files.sort();
    files
}

/// Opens each file that there is. One that is gone by now was not the newest, and was opened when it was.
pub(super) fn keep_log_files(server: &TestRedis) {
    let mut kept = server.increments.lock().unwrap();
    for (number, path) in log_files(server) {
        if let Ok(file) = File::open(path) {
            kept.entry(number).or_insert(file);
        }
    }
}

/// The files that are there although another one follows them.
pub(super) fn finished_files(server: &TestRedis) -> Vec<String> {
    let mut files = log_files(server);
    files.pop();
    files.into_iter().map(|(_, path)| path.display().to_string()).collect()
}
