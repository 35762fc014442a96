//! What is typed wrong or lies damaged in the repository: each gives an error with a hint, an exit code that is not 0,
//! and changes nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::support::hosts::{Host, HostOptions, KEIKI, Lab, fingerprint, free_port, instance_section, wait_for};
use super::support::postgres::{TestServer, Version};

/// A source with an archive, a backup and some log, and a second host that clones can grow on.
struct Scene {
    a: Host,
    b: Host,
    source: TestServer,
    repository: PathBuf,
    // Dropped last: everything lies in it.
    lab: Lab,
}

fn scene() -> Scene {
    let lab = Lab::new();
    let repository = lab.path("repository");
    fs::create_dir(&repository).unwrap();
    let archive_command = format!("'{KEIKI}' --socket '{}' wal-push %p", lab.path("host-a/keiki.sock").display());
    let source = TestServer::start(Version::V15, &[("archive_mode", "on"), ("archive_command", &archive_command)]);
    let (port_a, port_b) = (free_port(), free_port());
    let url = format!("file://{}", repository.display());
    let a = Host::start(
        &lab,
        &HostOptions {
            name: "a",
            repository: url.clone(),
            peers: vec![("b", port_b)],
            sections: instance_section("orders", &source, "ship = \"archive_command\"\nship_every = \"1s\""),
            listen_port: port_a,
            clone_bin_dir: &source.bin_dir,
        },
    );
    a.keiki_ok(&["repository", "init"]);
    let b = start_b(&lab, &source, "b", &url, port_a, port_b);
    wait_for("archiving to begin", Duration::from_secs(30), || a.instance("orders")["state"] == "archiving");
    source.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i");
    a.keiki_ok(&["backup", "create", "orders"]);
    source.sql("INSERT INTO t VALUES (0)");
    Scene { a, b, source, repository, lab }
}

fn start_b(lab: &Lab, source: &TestServer, name: &str, url: &str, port_a: u16, port_b: u16) -> Host {
    let options = HostOptions {
        name,
        repository: url.to_string(),
        peers: vec![("a", port_a)],
        sections: String::new(),
        listen_port: port_b,
        clone_bin_dir: &source.bin_dir,
    };
    Host::start(lab, &options)
}

/// What is done to a copy of the repository, and what must be said of it.
type Damage = (&'static str, fn(&Path), &'static str);

/// Runs `keiki` on a host and expects it to fail with a text and a hint.
fn assert_refused(host: &Host, arguments: &[&str], expected: &str) {
    let output = host.keiki(arguments);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_ne!(output.status.code(), Some(0), "{arguments:?} succeeded: {said}");
    assert!(said.contains(expected), "{arguments:?} does not say '{expected}' but:\n{said}\n--- agent\n{}", host.log());
    assert!(said.contains("hint:"), "{arguments:?} gives no hint:\n{said}");
}

#[test]
fn what_is_typed_wrong_is_refused_with_a_hint_and_changes_nothing() {
    let scene = scene();
    let clone = |more: &[&str]| -> Vec<String> {
        let mut all = vec!["clone", "orders", "--to", "b", "--as", "copy"];
        all.extend(more);
        all.into_iter().map(String::from).collect()
    };
    let occupied = scene.lab.directory_of_server_user("occupied");
    fs::write(occupied.join("letter.txt"), "mine").unwrap();
    let occupied_text = occupied.to_str().unwrap().to_string();
    let source_dir = scene.source.data_dir.to_str().unwrap().to_string();
    let source_port = scene.source.port.to_string();
    let cases: Vec<(Vec<String>, &str)> = vec![
        (clone(&["--at", "2026-11-21 09:59:00"]), "has no offset"),
        (clone(&["--at", "2001-01-01 00:00:00Z"]), "cannot clone 'orders'"),
        (clone(&["--at", "2999-01-01 00:00:00Z"]), "cannot clone 'orders'"),
        (clone(&["--position", "0/100"]), "cannot clone 'orders'"),
        (clone(&["--position", "FF/0"]), "cannot clone 'orders'"),
        (clone(&["--position", "nonsense"]), "is not a log position"),
        (clone(&["--name", "never named"]), "never named"),
        (clone(&["--backup", "20010101T000000Z-aaaa"]), "20010101T000000Z-aaaa"),
        (clone(&["--dir", &occupied_text]), "not empty"),
        (clone(&["--dir", &source_dir]), &source_dir),
        (clone(&["--port", &source_port]), &source_port),
        (clone(&["--set", "no_such_parameter=1"]), "no_such_parameter"),
        (vec!["clone".into(), "ordres".into(), "--as".into(), "copy".into()], "ordres"),
        (vec!["clone".into(), "orders".into(), "--to".into(), "c".into(), "--as".into(), "copy".into()], "'c'"),
        (vec!["backup".into(), "create".into(), "ordres".into()], "ordres"),
        (vec!["backup".into(), "list".into(), "ordres".into()], "ordres"),
        (vec!["window".into(), "ordres".into()], "ordres"),
        (vec!["accept".into(), "copy".into()], "copy"),
        (vec!["discard".into(), "copy".into(), "--yes".into()], "copy"),
        (vec!["job".into(), "show".into(), "nonsense".into()], "nonsense"),
    ];
    for (arguments, expected) in &cases {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        assert_refused(&scene.a, &arguments, expected);
    }
    assert_eq!(fs::read_to_string(occupied.join("letter.txt")).unwrap(), "mine");
    assert_eq!(fs::read_dir(scene.lab.path("clones-b")).unwrap().count(), 0, "a refused clone left something behind");
    assert_eq!(scene.source.sql("SELECT count(*) FROM t"), "1001");
    assert!(scene.b.instance("copy").is_null());
}

#[test]
fn damage_in_the_repository_is_found_before_a_clone_is_handed_over() {
    let scene = scene();
    // A second backup's worth of log, sealed, so that a segment can go missing.
    scene.source.sql("SELECT pg_switch_wal()");
    scene.source.sql("INSERT INTO t VALUES (-1)");
    scene.source.sql("SELECT pg_switch_wal()");
    wait_for("the log to be sealed", Duration::from_secs(30), || sealed_segments(&scene.repository).len() >= 3);
    wait_for("the backlog to be shipped", Duration::from_secs(30), || scene.a.instance("orders")["backlog_bytes"] == 0);

    let damages: [Damage; 6] = [
        ("no repository", |repository| fs::remove_file(repository.join("keiki.json")).unwrap(), "there is none"),
        ("an unknown format", set_unknown_format_version, "format version"),
        ("a damaged manifest", |repository| flip(&find(repository, |key| key.ends_with("/manifest"))), "manifest"),
        ("a flipped bit in a pack", |repository| flip(&find(repository, |key| key.contains("/packs/"))), "pack"),
        (
            "a missing pack",
            |repository| fs::remove_file(find(repository, |key| key.contains("/packs/"))).unwrap(),
            "pack",
        ),
        ("a missing segment", remove_second_sealed_segment, "cannot clone 'orders'"),
    ];
    let url = format!("file://{}", scene.repository.display());
    assert!(url.ends_with("repository"));
    for (number, (title, damage, expected)) in damages.iter().enumerate() {
        let copy = scene.lab.path(&format!("damaged-{number}"));
        let copied = Command::new("cp").arg("-a").arg(&scene.repository).arg(&copy).status().unwrap();
        assert!(copied.success());
        damage(&copy);
        let before = fingerprint(&copy);
        let name = format!("d{number}");
        let host =
            start_b(&scene.lab, &scene.source, &name, &format!("file://{}", copy.display()), free_port(), free_port());
        println!("with {title}");
        assert_refused(&host, &["clone", "orders", "--as", "copy", "--latest"], expected);
        assert_eq!(fingerprint(&copy), before, "{title}: the repository changed");
        let left: Vec<_> = fs::read_dir(scene.lab.path(&format!("clones-{name}"))).unwrap().collect();
        assert!(left.is_empty(), "{title}: left behind {left:?}");
    }
}

fn sealed_segments(repository: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        fingerprint(repository).into_iter().map(|(path, _)| path).filter(|path| path.ends_with("sealed")).collect();
    all.retain(|path| !path.to_str().unwrap().contains(".history"));
    all
}

fn find(repository: &Path, wanted: impl Fn(&str) -> bool) -> PathBuf {
    let all = fingerprint(repository);
    let found = all.into_iter().map(|(path, _)| path).find(|path| wanted(path.to_str().unwrap()));
    found.expect("the repository has such an object")
}

/// Flips one bit in the middle of a file.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

fn set_unknown_format_version(repository: &Path) {
    let path = repository.join("keiki.json");
    let mut header: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    header["format_version"] = serde_json::json!(99);
    fs::write(path, header.to_string()).unwrap();
}

/// Removes a segment in the middle of the log after the backup, so that there is a hole.
fn remove_second_sealed_segment(repository: &Path) {
    let segments = sealed_segments(repository);
    fs::remove_file(&segments[segments.len() - 2]).unwrap();
}
