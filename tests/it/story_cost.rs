//! What a backup and a clone cost: bytes written, memory, and the memory of an agent with nothing to do. Prints the
//! numbers and holds them against what is promised. `KEIKI_STORY_FULL=1` takes a database of 3 GB instead of 0.3 GB.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::story_schedule::complaints;
use super::support::hosts::{free_port, wait_for};
use super::support::two_hosts::{SOON, Ship, TwoHosts, Via, job, step};

const MEMORY_LIMIT_BYTES: u64 = 256 << 20;
const IDLE_LIMIT_BYTES: u64 = 30 << 20;
const WRITES_PER_BYTE_LIMIT: f64 = 1.02;
/// Rows of about a kilobyte: 0.3 GB and 3 GB.
const ROWS: u64 = 270_000;
const ROWS_FULL: u64 = 2_700_000;

#[test]
fn story_cost_of_a_backup_and_a_clone_is_what_is_promised() {
    let stage = TwoHosts::start(Ship::ArchiveCommand, Via::Directory);
    let (agent_a, agent_b) = (stage.a.agent_process_id(), stage.b.agent_process_id());
    let idle = idle_bytes(agent_b);
    println!("memory of an idle agent      {:>8.1} MiB resident, {:.1} MiB of it its own", mib(idle.0), mib(idle.1));
    // An unoptimised program is several times larger than the one that is shipped: then only what it has allocated counts.
    let counted = if cfg!(debug_assertions) { idle.1 } else { idle.0 };
    assert!(counted <= IDLE_LIMIT_BYTES, "an idle agent has {:.1} MiB", mib(counted));

    let source_before = source_facts(&stage);
    let rows = if std::env::var_os("KEIKI_STORY_FULL").is_some_and(|full| full == "1") { ROWS_FULL } else { ROWS };
    stage.source.sql(&format!(
        "CREATE TABLE big AS SELECT i, md5(i::text) || repeat(md5(i::text), 30) AS filler FROM generate_series(1, {rows}) AS i"
    ));
    stage.source.sql("CHECKPOINT");
    stage.wait_until_shipped();
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
    assert!(restored > rows * 900, "the database is smaller than it ought to be");
    assert!(written.stage as f64 >= 0.9 * restored as f64, "the writes were not seen: {}", written.stage);
    assert!(ratio <= WRITES_PER_BYTE_LIMIT, "stage wrote {ratio:.4} times what was restored");
    let peak = peak_bytes(agent_b);
    println!("memory of the target's agent {:>8.1} MiB at most", mib(peak));
    assert!(peak <= MEMORY_LIMIT_BYTES, "the target's agent had {:.1} MiB", mib(peak));
    stage.b.keiki_ok(&["discard", "copy", "--yes"]);
    let source_after = source_facts(&stage);
    println!("the source                   {source_after:?}");
    assert_eq!(source_after, source_before, "the source was restarted, reconfigured, or an archive_command failed");
    let log = stage.source.log_text();
    assert_eq!(complaints(&log), Vec::<&str>::new(), "the source has something to complain about");
}

/// What must be the same before and after: since when the source runs, its settings, how often its archive_command
/// failed.
fn source_facts(stage: &TwoHosts) -> BTreeMap<&'static str, String> {
    let settings = "SELECT md5(string_agg(name || '=' || coalesce(setting, ''), ',' ORDER BY name)) FROM pg_settings";
    BTreeMap::from([
        ("runs since", stage.source.sql("SELECT pg_postmaster_start_time()")),
        ("settings", stage.source.sql(settings)),
        ("failed archive_command", stage.source.sql("SELECT failed_count FROM pg_stat_archiver")),
    ])
}

struct Written {
    stage: u64,
    stage_seconds: f64,
    whole: u64,
    disk: u64,
    seconds: f64,
}

/// Clones to host b and counts what its agent writes.
fn clone_and_count(stage: &TwoHosts, agent: u32) -> Written {
    let port = free_port().to_string();
    let began = Instant::now();
    let (before, disk_before) = (io_counter(agent, "wchar"), io_counter(agent, "write_bytes"));
    let arguments = ["clone", "orders", "--to", "b", "--as", "copy", "--port", &port, "--latest", "--detach"];
    let id = stage.a.json(&arguments)["id"].as_str().unwrap().to_string();
    let mut at_stage_end = None;
    let mut last = serde_json::Value::Null;
    wait_for("the clone", Duration::from_secs(600), || {
        last = job(&stage.b, &id);
        if at_stage_end.is_none() && step(&last, "stage")["state"] == "done" {
            at_stage_end = Some(io_counter(agent, "wchar") - before);
        }
        last["state"] != "running"
    });
    assert_eq!(last["state"], "done", "{last:#}\n--- agent\n{}", stage.b.log());
    let time = |name: &str| step(&last, "stage")[name].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    Written {
        stage: at_stage_end.unwrap(),
        stage_seconds: time("ended_at").duration_since(time("began_at")).as_secs_f64(),
        whole: io_counter(agent, "wchar") - before,
        disk: io_counter(agent, "write_bytes") - disk_before,
        seconds: began.elapsed().as_secs_f64(),
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

fn peak_bytes(process: u32) -> u64 {
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
