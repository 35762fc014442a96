//! A clone that is held in quarantine for somebody to look at: it is durable, closed, and survives a restart of the
//! machine.

use std::fs;

use super::support::hosts::{Host, free_port, wait_for};
use super::support::two_hosts::{SOON, Ship, TwoHosts, Via, processes_in, try_sql_at};

/// What the held server says over its private socket.
fn ask_held(stage: &TwoHosts, port: u16, sql: &str) -> String {
    let run_dir = stage.clone_dir("copy").with_file_name("copy.run");
    let (port, run_dir) = (port.to_string(), run_dir.to_str().unwrap().to_string());
    let arguments = ["-h", &run_dir, "-p", &port, "-U", &stage.source.role, "-d", "postgres", "-XAtqc", sql];
    stage.source.must_run("psql", &arguments).trim().to_string()
}

fn hold(stage: &TwoHosts, port: u16) {
    stage.source.sql("CREATE TABLE t AS SELECT i, md5(i::text) AS filler FROM generate_series(1, 20000) AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.sql("INSERT INTO t VALUES (0, 'after the backup')");
    stage.wait_until_shipped();
    let port = port.to_string();
    let arguments = ["clone", "orders", "--to", "b", "--as", "copy", "--port", &port, "--latest", "--hold"];
    stage.a.keiki_ok(&arguments);
}

fn kill_servers_of_clone(stage: &TwoHosts) {
    wait_for("the held server to be gone", SOON, || {
        let left = processes_in(&stage.clone_dir("copy"));
        for process in &left {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*process as i32), nix::sys::signal::SIGKILL);
        }
        left.is_empty()
    });
}

#[test]
fn story_held_clone_is_durable_and_closed_and_survives_a_restart_of_the_machine() {
    let mut stage = TwoHosts::start(Ship::ArchiveCommand, Via::Directory);
    let port = free_port();
    hold(&stage, port);
    assert_eq!(ask_held(&stage, port, "SHOW fsync"), "on");
    assert_eq!(ask_held(&stage, port, "SHOW archive_mode"), "off");
    assert_eq!(ask_held(&stage, port, "SELECT pg_is_in_recovery()"), "f");
    assert!(try_sql_at(&stage.source, port, "SELECT 1").is_err(), "a clone in quarantine listens");
    // What somebody writes while looking is part of the clone.
    ask_held(&stage, port, "CREATE TABLE noted AS SELECT 1 AS i");

    // The power goes: agent and server are gone at once, and the machine has another boot id afterwards.
    stage.b.kill_agent();
    kill_servers_of_clone(&stage);
    let state = stage.clone_dir("copy").with_file_name("copy.run").join("keiki_recovery.state");
    let text = fs::read_to_string(&state).unwrap();
    assert!(text.contains("durable=yes"), "{text}");
    let other_boot: String = text
        .lines()
        .map(|line| match line.strip_prefix("boot_id=") {
            Some(_) => "boot_id=another\n".to_string(),
            None => format!("{line}\n"),
        })
        .collect();
    fs::write(&state, other_boot).unwrap();
    stage.b.start_agent();
    stage.b.keiki_ok(&["accept", "copy"]);
    assert_eq!(super::support::two_hosts::sql_at(&stage.source, port, "SELECT i FROM noted"), "1");
    super::support::two_hosts::sql_at(&stage.source, port, "DROP TABLE noted");
    stage.assert_clone_is_exact(&stage.clone_at("copy", port));
    stage.b.keiki_ok(&["discard", "copy", "--yes"]);
}

#[test]
fn story_held_clone_whose_server_died_is_discarded_without_a_trace() {
    let stage = TwoHosts::start(Ship::ArchiveCommand, Via::Directory);
    hold(&stage, free_port());
    kill_servers_of_clone(&stage);
    let host: &Host = &stage.b;
    host.keiki_ok(&["discard", "copy", "--yes"]);
    wait_for("the clone to be gone", SOON, || fs::read_dir(stage.lab.path("clones-b")).unwrap().count() == 0);
}
