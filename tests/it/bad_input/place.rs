//! What stands in the way where a clone is to grow: directories, ports, programs, space.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::super::support::hosts::{Host, HostOptions};
use super::super::support::postgres::{Version, server_user};
use super::super::support::two_hosts::{Ship, TwoHosts, Via};
use super::{Mask, Said, assert_unchanged, standing};

/// A host that differs from the others in one line of its configuration.
fn peculiar(stage: &TwoHosts, name: &str, line: &str, replacement: &str) -> Host {
    let options = HostOptions {
        name,
        repository: format!("file://{}", stage.repository.display()),
        peers: Vec::new(),
        sections: String::new(),
        listen_port: super::super::support::hosts::free_port(),
        clone_bin_dir: &stage.source.bin_dir,
    };
    let mut host = Host::prepare(&stage.lab, &options);
    let text = fs::read_to_string(&host.config).unwrap();
    let changed: Vec<&str> = text.lines().map(|old| if old.starts_with(line) { replacement } else { old }).collect();
    assert_ne!(changed.join("\n"), text.trim_end(), "there is no line that begins with '{line}'");
    fs::write(&host.config, changed.join("\n")).unwrap();
    host.start_agent();
    host
}

#[test]
fn a_clone_that_has_no_place_is_refused_before_anything_is_touched() {
    let stage = TwoHosts::start(Ship::ArchiveCommand, Via::Directory);
    stage.source.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let source_dir = stage.source.data_dir.to_str().unwrap().to_string();
    let source_port = stage.source.port.to_string();
    let occupied = stage.lab.directory_of_server_user("occupied");
    fs::write(occupied.join("letter.txt"), "mine").unwrap();
    let closed = stage.lab.directory_of_server_user("closed");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
    let file = stage.lab.path("file");
    fs::write(&file, "mine").unwrap();
    let (occupied, file) = (occupied.to_str().unwrap().to_string(), file.to_str().unwrap().to_string());
    let inside_closed = format!("{}/copy", closed.display());
    let inside_source = format!("{source_dir}/copy");

    let old = Version::V18.bin_dir();
    let other_major = peculiar(&stage, "c", "bin_dir", &format!("bin_dir = \"{}\"", old.display()));
    let no_programs = peculiar(&stage, "d", "bin_dir", "bin_dir = \"/nonexistent\"");
    let full = peculiar(&stage, "e", "[clone]", "[clone]\nkeep_free = \"4000000TiB\"");
    let no_port = peculiar(&stage, "f", "ports", &format!("ports = \"{source_port}-{source_port}\""));
    let as_root = peculiar(&stage, "g", "run_as", "run_as = \"root\"");
    let as_nobody_known = peculiar(&stage, "h", "run_as", "run_as = \"no-such-user\"");

    let mask = Mask::default()
        .known(stage.lab.path("").display(), "LAB/")
        .known(&source_dir, "SOURCE")
        .known(format!("user '{}'", server_user().name), "user 'USER'")
        .known(format!("'{}'", old.display()), "'BIN'")
        .known(&source_port, "PORT");
    let mut said = Said::new(mask);
    let hosts = [&stage.a, &stage.b, &other_major, &no_programs, &full, &no_port, &as_root, &as_nobody_known];
    let before = standing(&stage.lab, &hosts, &stage.repository);
    let cases: [(&Host, &[&str], &str); 13] = [
        (&stage.b, &["--dir", &occupied], "is not empty"),
        (&stage.b, &["--dir", &file], "is not a directory"),
        (&stage.b, &["--dir", &source_dir], "a server is running in"),
        (&stage.a, &["--dir", &source_dir], "belongs to instance 'orders'"),
        (&stage.a, &["--dir", &inside_source], "belongs to instance 'orders'"),
        (&stage.b, &["--dir", &inside_closed], "closed"),
        (&stage.b, &["--port", &source_port], "is in use on host 'b'"),
        (&stage.a, &["--port", &source_port], "belongs to instance 'orders'"),
        (&other_major, &[], "cannot find the programs of PostgreSQL 15: found only PostgreSQL 18"),
        (&no_programs, &[], "there is no 'postgres' in '/nonexistent'"),
        (&full, &[], "free disk space"),
        (&no_port, &[], "is free"),
        (&as_root, &[], "'root'"),
    ];
    for (host, more, expected) in cases {
        let arguments = [&["clone", "orders", "--as", "copy"], more].concat();
        said.refuses(host, &arguments, expected);
        // The check list says the same and does as little.
        let output = host.keiki(&[&arguments[..], &["--check"]].concat());
        let list = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert_ne!(output.status.code(), Some(0), "{arguments:?} --check:\n{list}");
        assert!(list.contains(expected), "{arguments:?} --check does not say '{expected}':\n{list}");
    }
    said.refuses(&as_nobody_known, &["clone", "orders", "--as", "copy"], "no-such-user");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
    assert_unchanged(&before, &stage.lab, &hosts, &stage.repository, "a clone without a place");
    assert_eq!(fs::read_to_string(format!("{occupied}/letter.txt")).unwrap(), "mine");
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    assert_eq!(fs::read_dir(&closed).unwrap().count(), 0);
    assert_eq!(stage.source.sql("SELECT count(*) FROM t"), "1000");
    insta::assert_snapshot!(said.finish());
}
