//! Backups by schedule, and what a source hears of keiki: nothing.

use std::fs;
use std::time::Duration;

use super::support::hosts::wait_for;
use super::support::two_hosts::{Ship, TwoHosts, Via};

/// The lines in which the server complains, but for what is known to have nothing to do with keiki.
pub fn complaints(log: &str) -> Vec<&str> {
    let is_complaint = |line: &&str| ["ERROR:", "FATAL:", "PANIC:", "WARNING:"].iter().any(|word| line.contains(word));
    log.lines().filter(is_complaint).collect()
}

#[test]
fn a_backup_begins_by_itself_when_its_window_is_open_and_the_source_hears_no_complaint() {
    let mut stage = TwoHosts::start(Ship::ArchiveCommand, Via::Directory);
    stage.source.sql("CREATE TABLE t AS SELECT i FROM generate_series(1, 1000) AS i");
    stage.a.stop_agent();
    // One of the two is open now, and opened at a moment before the test began; the other one opens within 12 hours.
    let schedule = "[instance.backup]\nschedule = [\"00:00-12:00 daily UTC\", \"12:00-00:00 daily UTC\"]\n";
    let text = fs::read_to_string(&stage.a.config).unwrap();
    fs::write(&stage.a.config, format!("{text}{schedule}")).unwrap();
    stage.a.start_agent();
    let backups = || stage.a.json(&["backup", "list", "orders"]).as_array().unwrap().clone();
    // The agent looks at the clock every half minute.
    wait_for("the scheduled backup", Duration::from_secs(120), || !backups().is_empty());
    assert_eq!(backups()[0]["kind"], "automatic");
    let jobs = stage.a.json(&["job", "list"]);
    assert_eq!(jobs[0]["by"], "schedule", "{jobs:#}");
    wait_for("the job to be over", Duration::from_secs(60), || stage.a.json(&["job", "list"])[0]["state"] == "done");
    stage.wait_until_shipped();
    stage.assert_latest_is_exact("copy");
    let log = stage.source.log_text();
    assert!(log.contains("database system is ready to accept connections"), "this is not the log: {log}");
    assert_eq!(complaints(&log), Vec::<&str>::new(), "the source has something to complain about");
}
