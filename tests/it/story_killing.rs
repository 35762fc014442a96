//! Killing: whatever is killed, and whenever, a job ends well or has failed cleanly, no server is ever started on half a
//! copy, and the archive has neither a gap nor a duplicate.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use keiki::base::random::random_u64;

use super::support::hosts::{Host, free_port, wait_for};
use super::support::two_hosts::{
    SOON, Ship, TwoHosts, Via, job, lasting_objects, processes_in, sql_at, step, try_sql_at, wait_until_ended,
    wait_until_shipped,
};

/// How a killed job went on.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum End {
    Exact,
    FailedCleanly,
}

#[test]
fn an_agent_killed_at_any_step_of_a_clone_finishes_it_or_has_failed_cleanly() {
    let mut stage = TwoHosts::start(Ship::ArchiveCommand, Via::Peer);
    stage.source.sql("CREATE TABLE t AS SELECT i, md5(i::text) FROM generate_series(1, 20000) AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.sql("INSERT INTO t SELECT i, md5(i::text) FROM generate_series(20001, 60000) AS i");
    stage.source.sql("SELECT pg_switch_wal()");
    stage.source.sql("DELETE FROM t WHERE i % 7 = 0");

    // A first clone says what the steps are.
    let (id, port) = order_clone(&stage, "whole");
    let whole = wait_until_ended(&stage.b, &id);
    assert_eq!(whole["state"], "done", "{whole:#}");
    stage.assert_clone_is_exact(port);
    stage.b.keiki_ok(&["discard", "whole", "--yes"]);
    let names: Vec<String> =
        whole["steps"].as_array().unwrap().iter().map(|step| step["name"].as_str().unwrap().to_string()).collect();
    assert!(names.len() >= 5, "{names:?}");

    for (number, name) in names.iter().enumerate() {
        let clone = format!("killed-{number}");
        let (id, port) = order_clone(&stage, &clone);
        wait_for(&format!("step '{name}'"), SOON, || step(&job(&stage.b, &id), name)["state"] != "waiting");
        let end = kill_and_look(&mut stage, &clone, &id, port);
        println!("killed at '{name}': {end:?}");
    }
}

#[test]
fn an_agent_killed_in_the_middle_of_copying_or_replaying_finishes_it_or_has_failed_cleanly() {
    let mut stage = TwoHosts::start(Ship::ArchiveCommand, Via::Directory);
    // About 200 MB in the backup and 60 MB of log behind it.
    stage
        .source
        .sql("CREATE TABLE big AS SELECT i, repeat(md5(i::text), 30) AS filler FROM generate_series(1, 190000) AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage
        .source
        .sql("CREATE TABLE more AS SELECT i, repeat(md5(i::text), 30) AS filler FROM generate_series(1, 55000) AS i");
    stage.source.sql("DELETE FROM big WHERE i % 1000 = 0");
    let mut ends = BTreeMap::new();
    for (number, name) in ["stage", "recover", "stage", "recover"].into_iter().enumerate() {
        let clone = format!("killed-{number}");
        let (id, port) = order_clone(&stage, &clone);
        let percent = random_u64() % 90 + 5;
        wait_for(&format!("{percent} % of '{name}'"), SOON, || {
            let job = job(&stage.b, &id);
            let step = step(&job, name);
            let (done, total) = (step["done"].as_u64().unwrap(), step["total"].as_u64().unwrap());
            let is_over = step["state"] == "done" || job["state"] != "running";
            is_over || (total > 0 && done * 100 >= total * percent)
        });
        let end = kill_and_look(&mut stage, &clone, &id, port);
        println!("killed after {percent} % of '{name}': {end:?}");
        *ends.entry(end == End::Exact).or_insert(0) += 1;
    }
    // Jobs that all fail would be clean and worth nothing.
    assert!(ends.contains_key(&true), "no killed job ever finished");
}

/// Orders a clone of everything on host b and does not wait. Its job and port.
fn order_clone(stage: &TwoHosts, name: &str) -> (String, u16) {
    let port = free_port();
    let arguments = ["clone", "orders", "--to", "b", "--as", name, "--port", &port.to_string(), "--latest", "--detach"];
    let job = stage.a.json(&arguments);
    (job["id"].as_str().unwrap().to_string(), port)
}

/// Kills the agent of host b as it is, starts it again, and looks at what becomes of the job.
fn kill_and_look(stage: &mut TwoHosts, clone: &str, id: &str, port: u16) -> End {
    stage.b.kill_agent();
    assert_not_half_started(stage, clone);
    stage.b.start_agent();
    let ended = wait_until_ended(&stage.b, id);
    let dir = stage.clone_dir(clone);
    match ended["state"].as_str().unwrap() {
        "done" => {
            stage.assert_clone_is_exact(port);
            stage.b.keiki_ok(&["discard", clone, "--yes"]);
            assert_nothing_left(&dir, &ended);
            End::Exact
        }
        "failed" => {
            assert!(ended["error"]["message"].as_str().is_some_and(|text| !text.is_empty()), "{ended:#}");
            assert_nothing_left(&dir, &ended);
            End::FailedCleanly
        }
        other => panic!("the job is '{other}': {ended:#}\n--- agent\n{}", stage.b.log()),
    }
}

/// A server may run only on a directory that was staged as a whole, which `pg_control` says: it goes in last.
fn assert_not_half_started(stage: &TwoHosts, clone: &str) {
    let dir = stage.clone_dir(clone);
    if !dir.join("global/pg_control").exists() {
        assert!(!dir.join("postmaster.pid").exists(), "a server was started on half a copy");
        assert_eq!(processes_in(&dir), [0u32; 0], "a server runs on half a copy");
    }
}

fn assert_nothing_left(dir: &Path, job: &serde_json::Value) {
    wait_for("the clone's processes to be gone", SOON, || processes_in(dir).is_empty());
    let run_dir = dir.with_extension("run");
    for left in [dir, run_dir.as_path()] {
        let names: Vec<_> =
            std::fs::read_dir(left).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect();
        assert!(!left.exists(), "'{}' is left behind with {names:?} by {job:#}", left.display());
    }
}

#[test]
fn the_source_s_agent_killed_while_it_ships_leaves_no_gap_and_no_duplicate() {
    let mut stage = TwoHosts::start(Ship::ArchiveCommand, Via::Peer);
    stage.source.pgbench_initialise(1);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let log = stage.incarnation_dir(&stage.a, "orders").join("log");
    let load = stage.source.pgbench_load(2);
    for round in 0..6 {
        let before = sealed_files(&log).len();
        let more = 1 + random_u64() as usize % 4;
        wait_for("more log to be shipped", SOON, || sealed_files(&log).len() >= before + more);
        stage.a.kill_agent();
        // The log grows and is switched while nobody ships it.
        let file = stage.source.sql("SELECT pg_walfile_name(pg_switch_wal())");
        if round % 2 == 0 {
            wait_for("the server to fill two segments", SOON, || {
                let files = stage.source.sql(&format!(
                    "SELECT count(*) FROM pg_ls_waldir() WHERE name > '{file}' AND name < pg_walfile_name(pg_current_wal_lsn())"
                ));
                files.parse::<u32>().unwrap() >= 2
            });
        }
        stage.a.start_agent();
    }
    drop(load);
    end_and_assert_whole(&stage);
}

#[test]
fn a_server_killed_and_started_again_goes_on_archiving() {
    let mut stage = TwoHosts::start(Ship::ArchiveCommand, Via::Peer);
    stage.source.pgbench_initialise(1);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let log = stage.incarnation_dir(&stage.a, "orders").join("log");
    for _ in 0..3 {
        let load = stage.source.pgbench_load(2);
        let before = sealed_files(&log).len();
        wait_for("log to be shipped", SOON, || sealed_files(&log).len() > before);
        stage.source.kill9();
        drop(load);
        let port = stage.source.port;
        stage.source.launch();
        assert_eq!(stage.source.port, port, "another process took the server's port: run the test again");
    }
    stage.wait_until_archiving();
    end_and_assert_whole(&stage);
}

#[test]
fn the_server_of_an_accepted_clone_comes_back_with_the_machine_and_stays_stopped_otherwise() {
    let mut stage = TwoHosts::start(Ship::ArchiveCommand, Via::Peer);
    stage.source.sql("CREATE TABLE t AS SELECT i FROM generate_series(1, 1000) AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let port = free_port();
    stage.a.keiki_ok(&["clone", "orders", "--to", "b", "--as", "copy", "--port", &port.to_string(), "--latest"]);
    wait_until_shipped(&stage.b, "copy");
    wait_for("the clone's first backup", SOON, || !stage.b.instance("copy")["last_backup"].is_null());
    sql_at(&stage.source, port, "INSERT INTO t VALUES (-1)");

    // The power goes: everything of the host ends at once.
    stage.b.kill_agent();
    for pid in processes_in(&stage.clone_dir("copy")) {
        // Those that ended because the first one did are gone already.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL);
    }
    wait_for("the clone's server to end", SOON, || processes_in(&stage.clone_dir("copy")).is_empty());
    // Perhaps nothing on this machine has reaped the process yet, so that its number is in use. That is not so after a
    // restart, which also empties the directory of sockets.
    std::fs::remove_file(stage.clone_dir("copy").join("postmaster.pid")).unwrap();
    std::fs::remove_file(stage.source.socket_dir.join(format!(".s.PGSQL.{port}.lock"))).unwrap();
    stage.b.start_agent();
    assert!(processes_in(&stage.clone_dir("copy")).is_empty(), "started although the machine was not restarted");

    stage.b.stop_agent();
    let registered = stage.b.dir.join("state/instances.d/copy.json");
    let text = std::fs::read_to_string(&registered).unwrap();
    let this_boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert!(text.contains(this_boot.trim()), "{text}");
    std::fs::write(&registered, text.replace(this_boot.trim(), "another-boot")).unwrap();
    stage.b.start_agent();
    let limit = Instant::now() + SOON;
    while let Err(said) = try_sql_at(&stage.source, port, "SELECT 1") {
        let server_log = std::fs::read_to_string(stage.clone_dir("copy.run").join("postgresql.log")).unwrap();
        assert!(Instant::now() < limit, "the clone does not answer: {said}\n{}\n{server_log}", stage.b.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(sql_at(&stage.source, port, "SELECT count(*) FROM t"), "1001");
    sql_at(&stage.source, port, "SELECT pg_switch_wal()");
    wait_until_shipped(&stage.b, "copy");
}

/// Ships the rest and holds the whole archive against the server: nothing missing, nothing twice, and a clone is exact.
fn end_and_assert_whole(stage: &TwoHosts) {
    stage.source.sql("SELECT pg_switch_wal()");
    stage.source.sql("CREATE TABLE the_end AS SELECT now() AS at");
    stage.wait_until_shipped();
    let window = stage.a.json(&["window", "orders"]);
    assert_eq!(window["reaches"].as_array().unwrap().len(), 1, "{window:#}");
    assert_eq!(window["holes"].as_array().unwrap().len(), 0, "{window:#}");
    assert_log_is_whole(stage);
    stage.assert_latest_is_exact("whole");
}

/// Names of the log files that are in the archive as one object.
fn sealed_files(log: &Path) -> Vec<String> {
    log_objects(log).into_iter().filter(|(_, parts)| parts.contains("sealed")).map(|(file, _)| file).collect()
}

/// The objects of each log file.
fn log_objects(log: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut files: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for entry in std::fs::read_dir(log).into_iter().flatten() {
        let file = entry.unwrap();
        // Backup history files lie beside the segments.
        if file.file_name().len() != 24 {
            continue;
        }
        let parts = std::fs::read_dir(file.path()).into_iter().flatten().flatten();
        let names = parts.map(|part| part.file_name().into_string().unwrap());
        files.entry(file.file_name().into_string().unwrap()).or_default().extend(names);
    }
    files
}

/// Each segment follows the one before; all but the last are one object and nothing beside it, and the chunks of the
/// last one follow each other.
fn assert_log_is_whole(stage: &TwoHosts) {
    let log = stage.incarnation_dir(&stage.a, "orders").join("log");
    let sealed_alone = |parts: &BTreeSet<String>| parts.len() == 1 && parts.contains("sealed");
    let began = Instant::now();
    let files = loop {
        let files = log_objects(&log);
        let last = files.keys().next_back().cloned();
        let doubled: Vec<_> =
            files.iter().filter(|(file, parts)| Some(*file) != last.as_ref() && !sealed_alone(parts)).collect();
        if doubled.is_empty() {
            break files;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "not one object each: {doubled:?}");
        std::thread::sleep(Duration::from_millis(50));
    };
    let numbers: Vec<u64> = files.keys().map(|name| segment_number(name)).collect();
    assert!(numbers.len() > 5, "{files:?}");
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "segments are missing: {:?}", files.keys());
    let (_, parts) = files.iter().next_back().unwrap();
    let mut end = 0;
    for part in parts.iter().filter(|part| *part != "sealed") {
        let (from, to) = part.split_once('-').expect("a chunk's name");
        let offset = |text: &str| u64::from_str_radix(text, 16).unwrap();
        assert_eq!(offset(from), end, "the chunks of the open segment do not follow each other: {parts:?}");
        end = offset(to);
    }
}

/// The number of a segment of 1 MiB on timeline 1.
fn segment_number(name: &str) -> u64 {
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
    assert_eq!((name.len(), number(&name[..8])), (24, 1), "{name}");
    number(&name[8..16]) * 4096 + number(&name[16..])
}

#[test]
fn while_the_repository_is_gone_status_says_so_and_nothing_is_lost() {
    let stage = TwoHosts::start(Ship::ArchiveCommand, Via::Peer);
    stage.source.sql("CREATE TABLE t (i int)");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.wait_until_shipped();
    let before = lasting_objects(&stage.repository);
    let away = stage.lab.path("repository-away");
    std::fs::rename(&stage.repository, &away).unwrap();

    // PostgreSQL goes on and keeps its log.
    for round in 0..5 {
        stage.source.sql(&format!("INSERT INTO t SELECT i FROM generate_series(1, 1000 + {round}) AS i"));
        stage.source.sql("SELECT pg_switch_wal()");
    }
    let mut last = serde_json::Value::Null;
    wait_for("status to say what is wrong", SOON, || {
        last = stage.a.instance("orders");
        last["state"] != "archiving" && !last["problem"].is_null() && last["backlog_bytes"].as_u64().unwrap_or(0) > 0
    });
    assert_eq!(last["state"], "retrying", "{last:#}");
    let problem = &last["problem"];
    assert!(problem["message"].as_str().unwrap().contains("repository"), "{problem:#}");
    assert!(problem["hint"].as_str().is_some(), "{problem:#}");
    wait_for("the age of the backlog", SOON, || stage.a.instance("orders")["backlog_seconds"].as_u64() > Some(0));
    assert!(!stage.repository.exists(), "a repository was made where none is");
    stage.source.wait_for_sql("SELECT failed_count > 0 FROM pg_stat_archiver", "t");

    std::fs::rename(&away, &stage.repository).unwrap();
    stage.wait_until_shipped();
    let after = lasting_objects(&stage.repository);
    for (path, hash) in before.iter().filter(|(path, _)| path.ends_with("sealed") || path.ends_with("manifest")) {
        assert_eq!(after.get(path), Some(hash), "'{}' changed", path.display());
    }
    end_and_assert_whole(&stage);
    assert_no_complaint(&stage.a);
}

/// What was wrong is over, and status no longer speaks of it.
fn assert_no_complaint(host: &Host) {
    wait_until_shipped(host, "orders");
    let now = host.instance("orders");
    assert!(now["problem"].is_null(), "{now:#}");
}
