//! A backup as plain files: a real server is started in them without anything else, and has what was committed.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::support::hosts::{Host, HostOptions, Lab, free_port, instance_section, wait_for};
use super::support::postgres::{TestServer, Version};

/// A host; the one called `a` has the instance.
pub fn start_host(lab: &Lab, name: &str, url: &str, source: &TestServer, peers: Vec<(&str, u16)>, port: u16) -> Host {
    let sections = match name {
        "a" => instance_section("orders", source, "ship_every = \"1s\""),
        _ => String::new(),
    };
    let options = HostOptions {
        name,
        repository: url.to_string(),
        peers,
        sections,
        listen_port: port,
        clone_bin_dir: &source.bin_dir,
    };
    Host::start(lab, &options)
}

/// Starts a server in the files of a directory and returns what it says about the table.
pub fn row_counts_in(lab: &Lab, plain: &Path) -> String {
    let mut server = TestServer::prepare(Version::V15);
    fs::remove_dir(&server.data_dir).unwrap();
    let copied = Command::new("cp").arg("-a").arg(plain).arg(&server.data_dir).status().unwrap();
    assert!(copied.success());
    server.own(&server.data_dir);
    // What whoever does this is told to look at.
    server.append_settings(&[("archive_mode".into(), "off".into()), ("fsync".into(), "off".into())]);
    server.launch();
    let said = server.sql("SELECT count(*), sum(i), (SELECT count(*) FROM elsewhere) FROM t");
    assert_eq!(server.sql("SELECT pg_is_in_recovery()"), "f");
    server.stop();
    assert!(lab.path("").exists());
    said
}

#[test]
fn a_server_that_is_started_in_a_downloaded_backup_has_what_was_committed() {
    let lab = Lab::new();
    let repository = lab.path("repository");
    fs::create_dir(&repository).unwrap();
    let source = TestServer::start(Version::V15, &[("wal_level", "replica")]);
    let (port_a, port_b) = (free_port(), free_port());
    let url = format!("file://{}", repository.display());
    let a = start_host(&lab, "a", &url, &source, vec![("b", port_b)], port_a);
    a.keiki_ok(&["repository", "init"]);
    wait_for("archiving to begin", Duration::from_secs(30), || a.instance("orders")["state"] == "archiving");
    let fast = source.work_dir.join("fast");
    fs::create_dir(&fast).unwrap();
    source.own(&fast);
    source.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", fast.display()));
    source.sql("CREATE TABLE elsewhere TABLESPACE fast AS SELECT generate_series(1, 777) AS i");
    source.sql("CREATE TABLE t AS SELECT generate_series(1, 100000) AS i");
    a.keiki_ok(&["backup", "create", "orders"]);
    source.sql("DELETE FROM t");
    let backup = a.json(&["backup", "list", "orders"])[0]["id"].as_str().unwrap().to_string();

    let plain = lab.path("plain");
    let plain_text = plain.to_str().unwrap();
    let said = a.keiki_ok(&["backup", "download", "orders", &backup, "--to", plain_text]);
    assert!(said.contains(" log file") && said.contains("archive_command"), "{said}");
    assert!(plain.join("backup_label").is_file() && !plain.join("tablespace_map").exists());
    assert_eq!(row_counts_in(&lab, &plain), "100000|5000050000|777");
    let again = a.keiki_fails(&["backup", "download", "orders", &backup, "--to", plain_text]);
    assert!(again.contains("is not empty"), "{again}");

    // The same as a stream, from another host that has no access of its own, through both agents.
    let b = start_host(&lab, "b", "peer://a", &source, vec![("a", port_a)], port_b);
    for on in [&[][..], &["--on", "a"][..]] {
        let unpacked = lab.path(&format!("unpacked-{}", on.len()));
        fs::create_dir(&unpacked).unwrap();
        let archive = lab.path(&format!("archive-{}.tar", on.len()));
        let mut arguments = vec!["backup", "download", "a/orders", &backup, "--tar", archive.to_str().unwrap()];
        arguments.extend(on);
        b.keiki_ok(&arguments);
        let outcome = Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&unpacked).output().unwrap();
        assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
        let same = Command::new("diff").arg("-r").arg(&plain).arg(&unpacked).output().unwrap();
        assert!(same.status.success(), "{}", String::from_utf8_lossy(&same.stdout));
    }
    let piped = b.keiki(&["backup", "download", "a/orders", &backup, "--tar", "-"]);
    assert!(piped.status.success(), "{}", String::from_utf8_lossy(&piped.stderr));
    assert_eq!(piped.stdout, fs::read(lab.path("archive-0.tar")).unwrap());
    let missing = b.keiki_fails(&["backup", "download", "a/orders", "20200101T000000Z-aaaa", "--tar", "-"]);
    assert!(missing.contains("has no backup"), "{missing}");

    // A directory has no links, whichever agent is asked.
    for (host, instance) in [(&a, "orders"), (&b, "a/orders")] {
        let place = lab.path("links");
        let arguments = ["backup", "download", instance, &backup, "--link", "1h", "--to", place.to_str().unwrap()];
        let refused = host.keiki_fails(&arguments);
        assert!(refused.contains("only a bucket has such links") && refused.contains("--tar FILE"), "{refused}");
        assert!(!place.exists());
    }
}
