//! Killing: whatever is killed, and whenever, a job ends well or has failed cleanly, no server is ever started on half a
//! copy, and the archive has neither a gap nor a duplicate.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use keiki::base::random::random_u64;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

use super::support::hosts::{Host, free_port, wait_for};
use super::support::matrix::{
    CloneAt, MySqlServer, RedisStreamServer, SourceServer, archived_log, ask, on_every_engine,
};
use super::support::two_hosts::{
    SOON, TwoHosts, Via, difference, job, lasting_objects, processes_in, step, wait_until_ended, wait_until_shipped,
};

on_every_engine![
    an_agent_killed_at_any_step_of_a_clone_finishes_it_or_has_failed_cleanly,
    an_agent_killed_in_the_middle_of_copying_or_replaying_finishes_it_or_has_failed_cleanly,
    a_server_killed_while_its_clone_is_made_leaves_a_clone_that_is_exact_or_nothing,
    the_source_s_agent_killed_while_it_ships_leaves_no_gap_and_no_duplicate,
    an_agent_or_a_server_killed_during_a_backup_leaves_nothing_and_the_next_backup_is_good,
    the_server_of_an_accepted_clone_comes_back_with_the_machine_and_stays_stopped_otherwise,
    while_the_repository_is_gone_status_says_so_and_nothing_is_lost,
];

/// Of servers that have everything when they are started again.
mod of_durable_data {
    use super::*;

    super::super::support::matrix::on_engines! {
        [postgres TestServer] [mariadb MariaServer] [mysql MySqlServer] [redis RedisServer] [valkey ValkeyServer]
            : [a_server_killed_and_started_again_goes_on_archiving]
    }
}

/// How a killed job went on.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum End {
    Exact,
    FailedCleanly,
    /// The server was killed when the clone had been handed over.
    KilledAfterwards,
}

fn an_agent_killed_at_any_step_of_a_clone_finishes_it_or_has_failed_cleanly<S: SourceServer>() {
    let mut stage = TwoHosts::<S>::of(Via::Peer);
    stage.source.fill(2);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.fill(2);
    stage.source.end_log_file();
    stage.source.write(1);

    // A first clone says what the steps are.
    let (id, clone) = order_clone(&stage, "whole");
    let whole = wait_until_ended(&stage.b, &id);
    assert_eq!(whole["state"], "done", "{whole:#}");
    stage.assert_clone_is_exact(&clone);
    stage.b.keiki_ok(&["discard", "whole", "--yes"]);
    let names: Vec<String> =
        whole["steps"].as_array().unwrap().iter().map(|step| step["name"].as_str().unwrap().to_string()).collect();
    assert!(names.len() >= 5, "{names:?}");

    for (number, name) in names.iter().enumerate() {
        let (id, clone) = order_clone(&stage, &format!("killed-{number}"));
        wait_for(&format!("step '{name}'"), SOON, || step(&job(&stage.b, &id), name)["state"] != "waiting");
        stage.b.kill_agent();
        let end = look_at_what_becomes_of_it(&mut stage, &id, &clone, false);
        println!("{}: killed at '{name}': {end:?}", S::ENGINE);
    }
}

fn an_agent_killed_in_the_middle_of_copying_or_replaying_finishes_it_or_has_failed_cleanly<S: SourceServer>() {
    let mut stage = TwoHosts::<S>::of(Via::Directory);
    stage.source.fill(80);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.fill(25);
    stage.source.write(1);
    let mut ends = BTreeMap::new();
    for (number, name) in ["stage", "recover", "stage", "recover"].into_iter().enumerate() {
        let (id, clone) = order_clone(&stage, &format!("killed-{number}"));
        let percent = wait_for_a_moment_in(&stage.b, &id, name);
        stage.b.kill_agent();
        let end = look_at_what_becomes_of_it(&mut stage, &id, &clone, false);
        println!("{}: killed after {percent} % of '{name}': {end:?}", S::ENGINE);
        *ends.entry(end == End::Exact).or_insert(0) += 1;
    }
    // Jobs that all fail would be clean and worth nothing.
    assert!(ends.contains_key(&true), "no killed job ever finished");
}

/// Waits until a random part of a step is done, or it is over. The part in percent.
fn wait_for_a_moment_in(host: &Host, id: &str, name: &str) -> u64 {
    let percent = random_u64() % 90 + 5;
    wait_for(&format!("{percent} % of '{name}'"), SOON, || {
        let job = job(host, id);
        let step = step(&job, name);
        let (done, total) = (step["done"].as_u64().unwrap(), step["total"].as_u64().unwrap());
        let is_over = step["state"] == "done" || job["state"] != "running";
        is_over || (total > 0 && done * 100 >= total * percent)
    });
    percent
}

fn a_server_killed_while_its_clone_is_made_leaves_a_clone_that_is_exact_or_nothing<S: SourceServer>() {
    let mut stage = TwoHosts::<S>::of(Via::Directory);
    stage.source.fill(2);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.fill(25);
    stage.source.write(1);
    for (number, name) in ["recover", "recover", "clean up", "accept"].into_iter().enumerate() {
        let (id, clone) = order_clone(&stage, &format!("killed-{number}"));
        wait_for(&format!("step '{name}'"), SOON, || step(&job(&stage.b, &id), name)["state"] != "waiting");
        if name == "recover" {
            wait_for_a_moment_in(&stage.b, &id, name);
        }
        let killed = kill_all_in(&clone);
        let end = look_at_what_becomes_of_it(&mut stage, &id, &clone, true);
        println!("{}: {killed} processes of the clone killed in '{name}': {end:?}", S::ENGINE);
    }
    // And it did no harm to what comes after it.
    stage.assert_latest_is_exact("after-all");
}

/// SIGKILL to whatever works in the directories of a clone. How many there were.
fn kill_all_in(clone: &CloneAt) -> usize {
    let found = processes_of(clone);
    for pid in &found {
        // Those that ended because the first one did are gone already.
        let _ = nix::sys::signal::kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
    }
    found.len()
}

fn processes_of(clone: &CloneAt) -> Vec<u32> {
    [processes_in(&clone.data_dir), processes_in(&clone.run_dir)].concat()
}

/// Orders a clone of everything on host b and does not wait. Its job and place.
fn order_clone<S: SourceServer>(stage: &TwoHosts<S>, name: &str) -> (String, CloneAt) {
    let port = free_port();
    let arguments = ["clone", "orders", "--to", "b", "--as", name, "--port", &port.to_string(), "--latest", "--detach"];
    let job = stage.a.json(&arguments);
    (job["id"].as_str().unwrap().to_string(), stage.clone_at(name, port))
}

/// Starts the agent of host b again if it was killed, and looks at what becomes of the job.
///
/// `was_killed` says whether the clone's server was.
fn look_at_what_becomes_of_it<S: SourceServer>(
    stage: &mut TwoHosts<S>,
    id: &str,
    clone: &CloneAt,
    was_killed: bool,
) -> End {
    if !stage.b.is_running() {
        assert_not_half_started::<S>(clone);
        stage.b.start_agent();
    }
    let ended = wait_until_ended(&stage.b, id);
    match ended["state"].as_str().unwrap() {
        "done" => {
            // Only a killed server may be down, and only if it was killed when it had been handed over.
            let is_running = !was_killed || !processes_in(&clone.data_dir).is_empty();
            if is_running {
                stage.assert_clone_is_exact(clone);
            }
            stage.b.keiki_ok(&["discard", &clone_name(clone), "--yes"]);
            assert_nothing_left(clone, &ended);
            if is_running { End::Exact } else { End::KilledAfterwards }
        }
        "failed" => {
            assert!(ended["error"]["message"].as_str().is_some_and(|text| !text.is_empty()), "{ended:#}");
            assert_nothing_left(clone, &ended);
            End::FailedCleanly
        }
        other => panic!("the job is '{other}': {ended:#}\n--- agent\n{}", stage.b.log()),
    }
}

fn clone_name(clone: &CloneAt) -> String {
    clone.data_dir.file_name().unwrap().to_str().unwrap().to_string()
}

/// A server may run only on a directory that was staged as a whole, which what goes in last says.
fn assert_not_half_started<S: SourceServer>(clone: &CloneAt) {
    if !S::is_startable(&clone.data_dir) {
        assert_eq!(processes_in(&clone.data_dir), [0u32; 0], "a server runs on half a copy");
    }
}

fn assert_nothing_left(clone: &CloneAt, job: &Value) {
    wait_for("the clone's processes to be gone", SOON, || processes_of(clone).is_empty());
    for left in [&clone.data_dir, &clone.run_dir] {
        let names: Vec<_> =
            std::fs::read_dir(left).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect();
        assert!(!left.exists(), "'{}' is left behind with {names:?} by {job:#}", left.display());
    }
}

fn the_source_s_agent_killed_while_it_ships_leaves_no_gap_and_no_duplicate<S: SourceServer>() {
    let mut stage = TwoHosts::<S>::of(Via::Peer);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let log = stage.incarnation_dir(&stage.a, "orders").join("log");
    for round in 0..6 {
        let load = stage.source.load();
        let before = sealed_files(&log).len();
        let more = 1 + random_u64() as usize % 3;
        for _ in 0..more {
            stage.source.end_log_file();
        }
        wait_for("more log to be shipped", SOON, || sealed_files(&log).len() >= before + more);
        stage.a.kill_agent();
        // The log grows and is switched while nobody ships it.
        for more in 0..1 + round % S::ENDS_UNSEEN {
            stage.source.write(round * 10 + more);
            stage.source.end_log_file();
        }
        drop(load);
        stage.a.start_agent();
        stage.wait_until_archiving();
    }
    end_and_assert_whole(&stage);
    assert_nothing_held(&stage);
}

/// What the agent holds back on the source's disk is let go once it is shipped.
fn assert_nothing_held<S: SourceServer>(stage: &TwoHosts<S>) {
    wait_for("what was held back to be let go", SOON, || stage.source.held().is_empty());
}

fn a_server_killed_and_started_again_goes_on_archiving<S: SourceServer>() {
    let mut stage = TwoHosts::<S>::of(Via::Peer);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let log = stage.incarnation_dir(&stage.a, "orders").join("log");
    for round in 0..3 {
        let load = stage.source.load();
        let before = sealed_files(&log).len();
        stage.source.end_log_file();
        wait_for("log to be shipped", SOON, || sealed_files(&log).len() > before);
        stage.source.kill9();
        drop(load);
        stage.source.launch();
        stage.source.write(round);
    }
    stage.wait_until_archiving();
    end_and_assert_whole(&stage);
}

/// What it had acknowledged and not saved is in the archive all the same; what follows is another history, of which nothing
/// is put behind the first one.
#[test]
fn a_server_that_lost_data_when_it_was_killed_goes_on_behind_a_hole_and_the_archive_has_what_it_lost() {
    let mut stage = TwoHosts::<RedisStreamServer>::of(Via::Peer);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.fill(1);
    stage.source.end_log_file();
    // It saves what it has by now.
    stage.source.stop();
    stage.source.launch();
    let saved = stage.source.contents();
    stage.source.write(1);
    stage.source.end_log_file();
    stage.source.write(2);
    let wanted = stage.source.contents();
    wait_for("a note of what was executed", SOON, || {
        let log = stage.source.own_log().pop().unwrap();
        String::from_utf8_lossy(&log).lines().last().is_some_and(|line| line.starts_with("#KEIKI-BY:"))
    });
    stage.wait_until_shipped();
    let window = stage.a.json(&["window", "orders"]);
    assert_eq!(window["holes"].as_array().unwrap().len(), 0, "{window:#}");

    stage.source.kill9();
    stage.source.launch();
    assert_eq!(stage.source.contents(), saved, "the server lost nothing");
    stage.source.write(3);
    stage.source.end_log_file();
    stage.source.write(4);
    let mut last = Value::Null;
    wait_for("status to speak of the hole", SOON, || {
        last = stage.a.instance("orders");
        last["state"] == "archiving" && !last["problem"].is_null()
    });
    assert!(last["problem"]["hint"].as_str().is_some_and(|hint| hint.contains("keiki backup create")), "{last:#}");
    let arguments = ["clone", "orders", "--to", "b", "--as", "latest", "--port", &free_port().to_string(), "--latest"];
    let said = stage.a.keiki_fails(&arguments);
    assert!(said.contains("keiki backup create orders"), "{said}");
    let window = stage.a.json(&["window", "orders"]);
    let moment = window["reaches"][0]["covered_until"].as_str().expect("a moment");
    let clone = stage.clone_at("lost", free_port());
    let port = clone.port.to_string();
    stage.a.keiki_ok(&["clone", "orders", "--to", "b", "--as", "lost", "--port", &port, "--at", moment]);
    assert_eq!(difference(&stage.source.contents_of(&clone), &wanted), Vec::<String>::new());
    stage.b.keiki_ok(&["discard", "lost", "--yes"]);

    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.end_log_file();
    stage.source.write(5);
    stage.wait_until_shipped();
    let window = stage.a.json(&["window", "orders"]);
    let count = |what: &str| window[what].as_array().unwrap().len();
    assert_eq!((count("reaches"), count("holes")), (2, 1), "{window:#}");
    stage.assert_latest_is_exact("whole");
    assert_log_is_whole(&stage);
    assert_nothing_held(&stage);
}

fn an_agent_or_a_server_killed_during_a_backup_leaves_nothing_and_the_next_backup_is_good<S: SourceServer>() {
    let mut stage = TwoHosts::<S>::of(Via::Directory);
    stage.source.fill(60);
    let files_before = stage.source.files();
    for round in 0..4 {
        let kills_server = round % 2 == 1;
        let backups_before = stage.a.json(&["backup", "list", "orders"]).as_array().unwrap().len();
        let order = stage.a.json(&["backup", "create", "orders", "--detach"]);
        let id = order["id"].as_str().unwrap().to_string();
        wait_for("the backup to begin", SOON, || {
            let job = job(&stage.a, &id);
            let steps = job["steps"].as_array().unwrap();
            job["state"] != "running" || steps.iter().any(|step| step["done"].as_u64() > Some(1 << 20))
        });
        match kills_server {
            true => {
                stage.source.kill9();
                stage.source.launch();
                if !S::KEEPS_DATA_WHEN_KILLED {
                    stage.source.fill(60);
                }
            }
            false => {
                stage.a.kill_agent();
                stage.a.start_agent();
            }
        }
        let ended = wait_until_ended(&stage.a, &id);
        let backups_after = stage.a.json(&["backup", "list", "orders"]).as_array().unwrap().len();
        println!(
            "{}: backup with {} killed: {}",
            S::ENGINE,
            if kills_server { "the server" } else { "the agent" },
            ended["state"]
        );
        // A backup of which everything was read already may end well.
        let is_done = ended["state"] == "done";
        assert!(is_done || !ended["error"]["message"].is_null(), "{ended:#}");
        assert_eq!(backups_after - backups_before, usize::from(is_done), "{ended:#}");
        wait_for("the programs of the backup to be gone", SOON, || stage.source.helpers().is_empty());
        assert_eq!(stage.source.files(), files_before, "something was left on the source's disk");
        stage.wait_until_archiving();
    }
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    assert_eq!(stage.source.files(), files_before, "a backup left something on the source's disk");
    stage.source.write(1);
    stage.assert_latest_is_exact("whole");
}

/// The server makes the copy, and goes on with it when nobody waits for it any more.
#[test]
fn an_agent_killed_while_mysql_copies_itself_ends_the_copy_when_it_is_back() {
    let mut stage = TwoHosts::<MySqlServer>::of(Via::Directory);
    stage.source.fill(150);
    let in_progress = |source: &MySqlServer| {
        let sql = "SELECT COUNT(*) AS n FROM performance_schema.clone_status WHERE STATE = 'In Progress'";
        ask(&source.endpoint(), sql).first("n") == Some("1")
    };
    let mut caught = 0;
    for round in 0..8 {
        let order = stage.a.json(&["backup", "create", "orders", "--detach"]);
        let id = order["id"].as_str().unwrap().to_string();
        let began = Instant::now();
        while stage.source.copies().is_empty() {
            assert!(began.elapsed() < SOON, "the server makes no copy: {:#}", job(&stage.a, &id));
            std::thread::sleep(Duration::from_millis(1));
        }
        stage.a.kill_agent();
        // The copy may have been whole when the agent died.
        caught += u32::from(in_progress(&stage.source));
        stage.a.start_agent();
        let ended = wait_until_ended(&stage.a, &id);
        assert_eq!(ended["state"], "failed", "{ended:#}");
        wait_for("the copy to be gone", SOON, || stage.source.copies().is_empty());
        wait_for("the server to have given up", SOON, || !in_progress(&stage.source));
        stage.wait_until_archiving();
        println!("mysql: killed {caught} times while the server copied itself, of {}", round + 1);
        if caught == 2 {
            break;
        }
    }
    assert!(caught > 0, "the agent was never killed while the server copied itself");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    assert!(stage.source.copies().is_empty());
    stage.source.write(1);
    stage.assert_latest_is_exact("whole");
}

fn the_server_of_an_accepted_clone_comes_back_with_the_machine_and_stays_stopped_otherwise<S: SourceServer>() {
    let mut stage = TwoHosts::<S>::of(Via::Peer);
    stage.source.fill(1);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let port = free_port();
    stage.a.keiki_ok(&["clone", "orders", "--to", "b", "--as", "copy", "--port", &port.to_string(), "--latest"]);
    wait_until_shipped(&stage.b, "copy");
    wait_for("the clone's first backup", SOON, || !stage.b.instance("copy")["last_backup"].is_null());
    let clone = stage.clone_at("copy", port);
    stage.source.write_to(&clone);
    let wanted = stage.source.contents_of(&clone);
    wait_until_shipped(&stage.b, "copy");

    // The power goes: everything of the host ends at once.
    stage.b.kill_agent();
    assert!(kill_all_in(&clone) > 0);
    wait_for("the clone's server to end", SOON, || processes_of(&clone).is_empty());
    stage.source.after_power_cut(&clone);
    stage.b.start_agent();
    assert_eq!(processes_of(&clone), [0u32; 0], "started although the machine was not restarted");

    stage.b.stop_agent();
    let registered = stage.b.dir.join("state/instances.d/copy.json");
    let text = std::fs::read_to_string(&registered).unwrap();
    let this_boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert!(text.contains(this_boot.trim()), "{text}");
    std::fs::write(&registered, text.replace(this_boot.trim(), "another-boot")).unwrap();
    stage.b.start_agent();
    // It is archived only if it answers.
    wait_until_shipped(&stage.b, "copy");
    assert_eq!(difference(&stage.source.contents_of(&clone), &wanted), Vec::<String>::new());
    stage.source.end_log_file_of(&clone);
    wait_until_shipped(&stage.b, "copy");
}

/// Ships the rest and holds the whole archive against the server: nothing missing, nothing twice, and a clone is exact.
fn end_and_assert_whole<S: SourceServer>(stage: &TwoHosts<S>) {
    stage.source.end_log_file();
    stage.source.write(1_000_000);
    stage.wait_until_shipped();
    let window = stage.a.json(&["window", "orders"]);
    assert_eq!(window["reaches"].as_array().unwrap().len(), 1, "{window:#}");
    assert_eq!(window["holes"].as_array().unwrap().len(), 0, "{window:#}");
    // Whatever was written a moment ago is shipped for it.
    stage.assert_latest_is_exact("whole");
    assert_log_is_whole(stage);
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
        let parts = std::fs::read_dir(file.path()).into_iter().flatten().flatten();
        let names = parts.map(|part| part.file_name().into_string().unwrap());
        files.entry(file.file_name().into_string().unwrap()).or_default().extend(names);
    }
    files
}

/// The archive has exactly the bytes of the server's own files, from some file on without one missing; all but the last
/// are one object and nothing beside it, and the chunks of the last one follow each other.
fn assert_log_is_whole<S: SourceServer>(stage: &TwoHosts<S>) {
    // A server writes by itself, too, and begins log files for it (PostgreSQL when it prunes what is read for a
    // comparison): that is in the archive a moment later.
    let began = Instant::now();
    loop {
        match compare_log(stage) {
            Ok(files) => {
                println!("{}: {files} log files have the bytes of the server's own", S::ENGINE);
                return;
            }
            Err(why) if began.elapsed() < SOON => println!("{}: compared again, because {why}", S::ENGINE),
            Err(why) => panic!("{why}"),
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// How many log files are in the archive as the server has them, or what is not.
fn compare_log<S: SourceServer>(stage: &TwoHosts<S>) -> Result<usize, String> {
    let dir = stage.incarnation_dir(&stage.a, "orders");
    let mut files = log_objects(&dir.join("log"));
    files.retain(|name, _| S::is_log_file(name));
    assert!(files.len() > 5 || S::ENDS_UNSEEN == 1 && files.len() > 3, "{files:?}");
    let (_, open) = files.pop_last().unwrap();
    let sealed_alone = |parts: &BTreeSet<String>| parts.len() == 1 && parts.contains("sealed");
    if let Some(doubled) = files.iter().find(|(_, parts)| !sealed_alone(parts)) {
        return Err(format!("not one object: {doubled:?}"));
    }
    let mut end = 0;
    for part in open.iter().filter(|part| *part != "sealed") {
        let (from, to) = part.split_once('-').expect("a chunk's name");
        let offset = |text: &str| u64::from_str_radix(text, 16).unwrap();
        if offset(from) != end {
            return Err(format!("the chunks of the open file do not follow each other: {open:?}"));
        }
        end = offset(to);
    }
    compare_bytes(&archived_log(&stage.repository, dir.file_name().unwrap().to_str().unwrap()), stage)
}

fn compare_bytes<S: SourceServer>(archived: &[(String, Vec<u8>)], stage: &TwoHosts<S>) -> Result<usize, String> {
    // Of an empty file nothing is ever shipped.
    let archived: Vec<_> = archived.iter().filter(|(name, bytes)| S::is_log_file(name) && !bytes.is_empty()).collect();
    let own: Vec<_> = stage.source.own_log().into_iter().filter(|bytes| !bytes.is_empty()).collect();
    let names: Vec<_> = archived.iter().map(|(name, bytes)| format!("{name}: {}", bytes.len())).collect();
    let lengths: Vec<_> = own.iter().map(Vec::len).collect();
    if archived.len() > own.len() {
        return Err(format!("{names:?} are more than {lengths:?}"));
    }
    let first = own.len() - archived.len();
    for (index, ((name, bytes), own)) in archived.iter().zip(&own[first..]).enumerate() {
        let is_last = index + 1 == archived.len();
        let length = if is_last { bytes.len().min(own.len()) } else { own.len() };
        if bytes.as_slice() != &own[..length] {
            let at = bytes.iter().zip(own).position(|(one, other)| one != other);
            return Err(format!("'{name}' differs from the server's file at {at:?}; {names:?} are not {lengths:?}"));
        }
    }
    Ok(archived.len())
}

fn while_the_repository_is_gone_status_says_so_and_nothing_is_lost<S: SourceServer>() {
    let stage = TwoHosts::<S>::of(Via::Peer);
    stage.source.write(1);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.end_log_file();
    stage.source.write(2);
    stage.wait_until_shipped();
    let before = lasting_objects(&stage.repository);
    let away = stage.lab.path("repository-away");
    std::fs::rename(&stage.repository, &away).unwrap();

    // The server goes on and keeps its log, or the agent does.
    for round in 0..5 {
        stage.source.fill(1);
        stage.source.end_log_file();
        stage.source.write(100 + round);
        // An agent that is alive sees each file.
        std::thread::sleep(Duration::from_millis(200));
    }
    let mut last = Value::Null;
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

    std::fs::rename(&away, &stage.repository).unwrap();
    stage.wait_until_shipped();
    let after = lasting_objects(&stage.repository);
    for (path, hash) in before.iter().filter(|(path, _)| path.ends_with("sealed") || path.ends_with("manifest")) {
        assert_eq!(after.get(path), Some(hash), "'{}' changed", path.display());
    }
    end_and_assert_whole(&stage);
    // What was wrong is over, and status no longer speaks of it.
    wait_until_shipped(&stage.a, "orders");
    let now = stage.a.instance("orders");
    assert!(now["problem"].is_null(), "{now:#}");
}
