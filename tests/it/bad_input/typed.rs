//! What a person can type wrong: names, moments, ids, settings.

use jiff::Timestamp;

use super::super::support::hosts::free_port;
use super::super::support::two_hosts::{Ship, TwoHosts, Via};
use super::{Mask, Said, assert_unchanged, standing};

#[test]
fn what_is_typed_wrong_is_refused_with_a_hint_and_changes_nothing() {
    let stage = TwoHosts::start(Ship::ArchiveCommand, Via::Directory);
    stage.source.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i");
    let here = std::env::current_dir().unwrap();
    let mut said = Said::new(Mask::default().known(stage.lab.path("").display(), "LAB/").known(here.display(), "HERE"));
    let hosts = [&stage.a, &stage.b];
    let settings = "SELECT md5(string_agg(name || '=' || coalesce(setting, ''), ',' ORDER BY name)) FROM pg_settings";
    let settings_before = stage.source.sql(settings);

    // Nothing was ever backed up.
    let before = standing(&stage.lab, &hosts, &stage.repository);
    let early: [&[&str]; 3] = [&["--latest"], &["--at", "2026-11-21 09:59:00+00"], &["--name", "before the release"]];
    for target in early {
        said.refuses(&stage.a, &clone(target), "there is no backup of it yet");
    }
    assert_unchanged(&before, &stage.lab, &hosts, &stage.repository, "a clone without any backup");

    let before_backup = Timestamp::now();
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.sql("INSERT INTO t VALUES (0)");
    stage.wait_until_shipped();
    let before = standing(&stage.lab, &hosts, &stage.repository);
    let too_early = before_backup.to_string();
    let targets: [(&[&str], &str); 12] = [
        (&["--at", "2026-11-21 09:59:00"], "has no offset"),
        (&["--at", "yesterday"], "yesterday"),
        (&["--at", "2026-13-41 09:59:00Z"], "2026-13-41"),
        (&["--at", &too_early], "before the end of the first backup"),
        (&["--at", "2001-01-01 00:00:00Z"], "before the end of the first backup"),
        (&["--at", "2999-01-01 00:00:00Z"], "its archive ends at"),
        (&["--position", "0/100"], "before the first backup is consistent"),
        (&["--position", "FF/0"], "its archive ends at"),
        (&["--position", "nonsense"], "is not a log position"),
        (&["--name", "never named"], "no restore point of that name"),
        (&["--backup", "nonsense"], "is not the id of a backup"),
        (&["--backup", "20010101T000000Z-aaaa"], "to backup '20010101T000000Z-aaaa': it has no such backup"),
    ];
    for (target, expected) in targets {
        said.refuses(&stage.a, &clone(target), expected);
    }
    let port = free_port().to_string();
    let others: [(&[&str], &str); 22] = [
        (&["clone", "ordres", "--to", "b", "--as", "copy"], "no archive of instance 'ordres'"),
        (&["clone", "c/orders", "--to", "b", "--as", "copy"], "no archive of instance 'c/orders'"),
        (&["clone", "orders", "--to", "c", "--as", "copy"], "host 'c' is not a peer"),
        (&["clone", "orders", "--to", "b", "--as", "../copy"], "cannot be the name of a clone"),
        (&["clone", "orders", "--to", "b", "--as", "copy", "--dir", "copy"], "is not an absolute path"),
        (&["clone", "orders", "--to", "b", "--as", "copy", "--set", "work_mem"], "there is no '='"),
        (&["clone", "orders", "--to", "b", "--as", "copy", "--set", "no_such_parameter=1"], "no_such_parameter"),
        (&["clone", "orders", "--to", "b", "--as", "copy", "--set", "work_mem=much"], "work_mem"),
        (&["clone", "orders", "--to", "b", "--as", "copy", "--set", "data_directory=/x"], "data_directory"),
        (&["clone", "orders", "--to", "a", "--as", "orders", "--port", &port], "an instance 'orders' already"),
        (&["--on", "c", "status"], "host 'c' is not a peer"),
        (&["backup", "create", "ordres"], "no instance 'ordres'"),
        (&["backup", "list", "ordres"], "no archive of instance 'ordres'"),
        (&["backup", "show", "orders", "20010101T000000Z-aaaa"], "20010101T000000Z-aaaa"),
        (&["window", "ordres"], "no archive of instance 'ordres'"),
        (&["accept", "copy"], "copy"),
        (&["discard", "copy", "--yes"], "host 'a' has no clone 'copy'"),
        (&["discard", "copy"], "was not discarded"),
        (&["job", "show", "nonsense"], "nonsense"),
        (&["job", "cancel", "0199e1ac-0000-7000-8000-000000000000"], "0199e1ac-0000-7000-8000-000000000000"),
        (&["repository", "init"], "there is a repository already"),
        (&["wal-push", "pg_wal/000000010000000000000001"], "data directory"),
    ];
    for (arguments, expected) in others {
        said.refuses(&stage.a, arguments, expected);
    }
    assert_unchanged(&before, &stage.lab, &hosts, &stage.repository, "what was typed wrong");
    assert_eq!(stage.source.sql("SELECT count(*) FROM t"), "1001");
    assert_eq!(stage.source.sql(settings), settings_before);
    assert_eq!(stage.a.instance("orders")["state"], "archiving");
    insta::assert_snapshot!(said.finish());
}

fn clone<'a>(target: &[&'a str]) -> Vec<&'a str> {
    [&["clone", "orders", "--to", "b", "--as", "copy"], target].concat()
}
