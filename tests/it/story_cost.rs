//! What a backup and a clone cost: bytes written, memory, and the memory of an agent with nothing to do. Prints the
//! numbers and holds them against what is promised. `KEIKI_STORY_FULL=1` takes a database of 3 GB instead of 0.16 GB.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::support::hosts::{free_port, wait_for};
use super::support::matrix::{CloneAt, SourceServer, on_every_engine};
use super::support::two_hosts::{SOON, TwoHosts, Via, job, processes_in, step};

const MEMORY_LIMIT_BYTES: u64 = 256 << 20;
const IDLE_LIMIT_BYTES: u64 = 30 << 20;
const WRITES_PER_BYTE_LIMIT: f64 = 1.02;
const MEBIBYTES: u32 = 160;
const MEBIBYTES_FULL: u32 = 2800;

on_every_engine![story_cost_of_a_backup_and_a_clone_is_what_is_promised];

fn story_cost_of_a_backup_and_a_clone_is_what_is_promised<S: SourceServer>() {
    let stage = TwoHosts::<S>::of(Via::Directory);
    println!("--- {}", S::ENGINE);
    let (agent_a, agent_b) = (stage.a.agent_process_id(), stage.b.agent_process_id());
    let idle = idle_bytes(agent_b);
    println!("memory of an idle agent      {:>8.1} MiB resident, {:.1} MiB of it its own", mib(idle.0), mib(idle.1));
    // An unoptimised program is several times larger than the one that is shipped: then only what it has allocated counts.
    let counted = if cfg!(debug_assertions) { idle.1 } else { idle.0 };
    assert!(counted <= IDLE_LIMIT_BYTES, "an idle agent has {:.1} MiB", mib(counted));

    let is_full = std::env::var_os("KEIKI_STORY_FULL").is_some_and(|full| full == "1");
    let mebibytes = if is_full { MEBIBYTES_FULL } else { MEBIBYTES };
    stage.source.fill(mebibytes);
    // A server that keeps its data in its log alone has it as data from here on.
    stage.source.end_log_file();
    stage.source.write(1);
    stage.wait_until_shipped();
    let source_before = stage.source.facts();
    println!("memory of the source's agent {:>8.1} MiB at most while shipping", mib(peak_bytes(agent_a)));
    let began = Instant::now();
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let backup_seconds = began.elapsed().as_secs_f64();
    let backups = stage.a.json(&["backup", "list", "orders"]);
    let backup = &backups.as_array().unwrap()[0];
    let restored = backup["restored_bytes"].as_u64().unwrap();
    let stored = backup["stored_bytes"].as_u64().unwrap();
    let rate = restored as f64 / 1e6 / backup_seconds;
    println!(
        "backup                       {:>8.1} MiB in {backup_seconds:.1} s, {rate:.0} MB/s, {:.1} MiB stored",
        mib(restored),
        mib(stored)
    );
    let peak = peak_bytes(agent_a);
    println!("memory of the source's agent {:>8.1} MiB at most", mib(peak));
    assert!(peak <= MEMORY_LIMIT_BYTES, "the source's agent had {:.1} MiB", mib(peak));

    let written = clone_and_count(&stage, agent_b);
    let dir_bytes = size_of(&stage.clone_dir("copy"));
    let ratio = written.stage as f64 / restored as f64;
    println!("the clone's directory        {:>8.1} MiB", mib(dir_bytes));
    println!(
        "written by stage             {:>8.1} MiB, {ratio:.4} of what was restored, in {:.1} s",
        mib(written.stage),
        written.stage_seconds
    );
    println!(
        "written by the whole clone   {:>8.1} MiB, {:.1} MiB of it to the disk, in {:.1} s",
        mib(written.whole),
        mib(written.disk),
        written.seconds
    );
    let all = (written.whole + written.by_others) as f64 / restored as f64;
    println!(
        "written by server and tools  {:>8.1} MiB in the clone's directories; with the agent's {all:.4} of what was restored",
        mib(written.by_others)
    );
    assert!(restored > u64::from(mebibytes) * 900_000, "the database is smaller than it ought to be");
    // Holes in files are restored without being written.
    assert!(written.stage as f64 >= 0.8 * restored as f64, "the writes were not seen: {}", written.stage);
    assert!(ratio <= WRITES_PER_BYTE_LIMIT, "stage wrote {ratio:.4} times what was restored");
    assert!(all <= S::ALL_WRITES_PER_BYTE_LIMIT, "all together wrote {all:.4} times what was restored");
    let peak = peak_bytes(agent_b);
    println!("memory of the target's agent {:>8.1} MiB at most", mib(peak));
    assert!(peak <= MEMORY_LIMIT_BYTES, "the target's agent had {:.1} MiB", mib(peak));
    stage.b.keiki_ok(&["discard", "copy", "--yes"]);
    assert_eq!(stage.source.facts(), source_before, "the source was restarted or reconfigured");
    assert_eq!(stage.source.complaints(), Vec::<String>::new(), "the source has something to complain about");
}

struct Written {
    stage: u64,
    stage_seconds: f64,
    whole: u64,
    disk: u64,
    /// By processes that work in the clone's directories: its server, and tools that come with it.
    by_others: u64,
    seconds: f64,
}

/// Clones to host b and counts what its agent writes. The clone is held: from the moment on that it is accepted its agent
/// writes an archive of its own, too, and begins with a backup.
fn clone_and_count<S: SourceServer>(stage: &TwoHosts<S>, agent: u32) -> Written {
    let port = free_port().to_string();
    let began = Instant::now();
    let (before, disk_before) = (io_counter(agent, "wchar"), io_counter(agent, "write_bytes"));
    let arguments = ["clone", "orders", "--to", "b", "--as", "copy", "--port", &port, "--latest", "--hold", "--detach"];
    let id = stage.a.json(&arguments)["id"].as_str().unwrap().to_string();
    let mut at_stage_end = None;
    let clone = stage.clone_at("copy", 0);
    let mut by_others = BTreeMap::new();
    let mut last = serde_json::Value::Null;
    wait_for("the clone", Duration::from_secs(600), || {
        note_writes(&clone, &mut by_others);
        last = job(&stage.b, &id);
        if at_stage_end.is_none() && step(&last, "stage")["state"] == "done" {
            at_stage_end = Some(io_counter(agent, "wchar") - before);
        }
        last["state"] != "running"
    });
    assert_eq!(last["state"], "held", "{last:#}\n--- agent\n{}", stage.b.log());
    let time = |name: &str| step(&last, "stage")[name].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    Written {
        stage: at_stage_end.unwrap(),
        stage_seconds: time("ended_at").duration_since(time("began_at")).as_secs_f64(),
        whole: io_counter(agent, "wchar") - before,
        disk: io_counter(agent, "write_bytes") - disk_before,
        by_others: by_others.values().sum(),
        seconds: began.elapsed().as_secs_f64(),
    }
}

/// What each process in the directories of a clone has written so far; what it writes in its last moment is not seen.
fn note_writes(clone: &CloneAt, written: &mut BTreeMap<u32, u64>) {
    for pid in [processes_in(&clone.data_dir), processes_in(&clone.run_dir)].concat() {
        // It may have ended. What is written asynchronously counts as bytes to the disk only.
        let text = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        let value = |word: &str| text.lines().find_map(|line| line.strip_prefix(word)?.trim().parse::<u64>().ok());
        let now = value("wchar:").max(value("write_bytes:")).unwrap_or(0);
        let known = written.entry(pid).or_default();
        *known = now.max(*known);
    }
}

/// The number behind a word in a file of `/proc/PID` whose lines are `word: number ...` (proc(5)).
fn proc_number(process: u32, file: &str, word: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/{file}")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(':')).expect("the word");
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn io_counter(process: u32, name: &str) -> u64 {
    proc_number(process, "io", name)
}

/// The most that a process has had in memory.
pub fn peak_bytes(process: u32) -> u64 {
    proc_number(process, "status", "VmHWM") * 1024
}

/// What an agent has in memory once it has come to rest: all, and the part that no file stands behind.
fn idle_bytes(process: u32) -> (u64, u64) {
    let mut before = 0;
    let mut same_for = Instant::now();
    wait_for("the agent to come to rest", SOON, || {
        let now = proc_number(process, "status", "VmRSS");
        if now != before {
            same_for = Instant::now();
        }
        before = now;
        same_for.elapsed() > Duration::from_secs(5)
    });
    (before * 1024, proc_number(process, "status", "RssAnon") * 1024)
}

/// The length of all files below a directory.
fn size_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| {
            let facts = entry.metadata().unwrap();
            if facts.is_dir() { size_of(&entry.path()) } else { facts.len() }
        })
        .sum()
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
