//! What is wrong with a MySQL server as a source, and what a clone is without GTIDs. What happens to its binary logs
//! before they are shipped is in `binlogs`, with MariaDB.

use std::fs;
use std::path::Path;
use std::time::Duration;

use keiki::engine::mysql::session::Session;

use super::super::support::hosts::{Host, Lab, free_port};
use super::super::support::matrix::{CloneAt, SourceServer, ask, endpoint_of, runtime};
use super::super::support::mysql::{AGENT, MySqlServer, bin_dir};
use super::super::support::postgres::server_user;
use super::super::support::two_hosts::{difference, wait_until_shipped, wait_until_state};
use super::binlogs::{host_with, new_lab, note_doctor, problem_with};
use super::{Mask, Said, refusal};

fn mask(lab: &Lab, source: &MySqlServer) -> Mask {
    Mask::default()
        .known(lab.path("").display(), "LAB/")
        .known(source.work_dir.display(), "SOURCE")
        .known(bin_dir().display(), "BIN")
        .known(format!("'{}'", server_user().name), "'USER'")
}

/// Writes down the lines of a check list that begin with these names, each with the one below it.
fn note_check(said: &mut Said, host: &Host, more: &[&str], names: &[&str]) {
    let arguments = [&["clone", "orders", "--as", "copy"], more, &["--check"]].concat();
    let list = host.keiki(&arguments);
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    let mut lines = Vec::new();
    for name in names {
        let found: Vec<&str> = list.lines().skip_while(|line| !line.contains(&format!("  {name} "))).take(2).collect();
        assert!(!found.is_empty(), "no '{name}' in {list}");
        lines.extend(found);
    }
    said.note(&format!("keiki {}", arguments.join(" ")), &lines.join("\n"));
}

fn end_of_log(source: &MySqlServer) -> String {
    let end = ask(&source.endpoint(), "SHOW BINARY LOG STATUS");
    format!("{}:{}", end.first("File").unwrap(), end.first("Position").unwrap())
}

/// A moment after everything that was committed and before everything that will be, in the server's microseconds.
fn moment(source: &MySqlServer) -> String {
    std::thread::sleep(Duration::from_millis(5));
    let sql = "SELECT CONCAT(DATE_FORMAT(UTC_TIMESTAMP(6), '%Y-%m-%d %H:%i:%s.%f'), '+00') AS now";
    let now = ask(&source.endpoint(), sql).first("now").unwrap().to_string();
    std::thread::sleep(Duration::from_millis(5));
    now
}

/// What a server leaves behind that dies while it writes: the start of a transaction, here of the last one once more.
fn tear(source: &MySqlServer) {
    let logs = fs::read_dir(&source.data_dir).unwrap().map(|entry| entry.unwrap().path());
    let is_log =
        |path: &std::path::PathBuf| path.extension().is_some_and(|end| end.to_string_lossy().parse::<u32>().is_ok());
    let last = logs.filter(is_log).max().unwrap();
    let mut bytes = fs::read(&last).unwrap();
    let end = bytes.len();
    bytes.extend_from_within(end - 200..end - 50);
    fs::write(&last, bytes).unwrap();
}

#[test]
fn a_source_of_mysql_without_gtids_is_archived_with_a_warning_and_its_clones_are_exact() {
    let lab = new_lab();
    let mut source = runtime().block_on(MySqlServer::start(&["--gtid-mode=OFF", "--enforce-gtid-consistency=OFF"]));
    for sql in [
        "CREATE DATABASE shop",
        "CREATE TABLE shop.t (i INT PRIMARY KEY)",
        "CREATE TABLE shop.written (id BIGINT PRIMARY KEY, filler TEXT NOT NULL)",
    ] {
        ask(&source.endpoint(), sql);
    }
    let sections = MySqlServer::clone_section() + &source.instance_section("orders");
    let a = host_with(&lab, "a", sections);
    a.keiki_ok(&["repository", "init"]);
    wait_until_state(&a, "orders", "archiving");
    let mut said = Said::new(mask(&lab, &source));
    note_doctor(&mut said, &a);

    // Nothing says which transactions the copy has but the copy itself.
    let load = source.load();
    a.keiki_ok(&["backup", "create", "orders"]);
    for number in 0..5 {
        source.write(number);
        source.end_log_file();
    }
    drop(load);
    let (position, at_position) = (end_of_log(&source), source.contents());
    // More than replay takes at a time, and files behind it.
    source.fill(34);
    for number in 10..14 {
        source.end_log_file();
        source.write(number);
    }
    let (time, at_time) = (moment(&source), source.contents());
    source.write(20);
    a.keiki_ok(&["backup", "create", "orders"]);
    source.write(30);
    wait_until_shipped(&a, "orders");
    source.kill9();
    tear(&source);
    source.launch();
    source.write(31);
    wait_until_shipped(&a, "orders");

    said.refuses(
        &a,
        &["clone", "orders", "--as", "copy", "--gtid", "3e11fa47-71ca-11e1-9e33-c80aa9429562:5"],
        "no transaction with that id is in its log",
    );
    note_check(&mut said, &a, &["--latest"], &["gtid_mode"]);
    let targets: [(&[&str], _); 3] =
        [(&["--position", &position], at_position), (&["--at", &time], at_time), (&["--latest"], source.contents())];
    for (target, wanted) in targets {
        let port = free_port();
        let port_text = port.to_string();
        let arguments = [&["clone", "orders", "--as", "copy", "--port", &port_text], target];
        // One is opened: the life after it has no GTIDs either.
        let is_opened = target == ["--latest"];
        let hold: &[&str] = if is_opened { &[] } else { &["--hold"] };
        a.keiki_ok(&[&arguments.concat(), hold].concat());
        let data_dir = lab.path("clones-a/copy");
        let clone = CloneAt { run_dir: data_dir.with_extension("run"), data_dir, port };
        assert!(!wanted.is_empty());
        assert_eq!(difference(&source.contents_of(&clone), &wanted), Vec::<String>::new(), "{target:?}");
        if is_opened {
            let found = ask(&endpoint_of(&clone), "SELECT @@GLOBAL.gtid_mode AS mode, @@GLOBAL.gtid_executed AS gtids");
            assert_eq!((found.first("mode"), found.first("gtids")), (Some("OFF"), Some("")));
            wait_until_state(&a, "copy", "archiving");
        }
        a.keiki_ok(&["discard", "copy", "--yes"]);
    }
    insta::assert_snapshot!(said.finish());
}

/// A file in the data directory that takes no room and seems larger than any disk.
fn seem_large(data_dir: &Path) -> Vec<std::path::PathBuf> {
    let name = |number| data_dir.join(format!("keiki_sparse_{number}"));
    (0..4)
        .map(|number| {
            let path = name(number);
            fs::File::create(&path).unwrap().set_len(15 << 40).unwrap();
            path
        })
        .collect()
}

#[test]
fn what_a_source_of_mysql_lacks_is_named_before_it_is_backed_up() {
    let lab = new_lab();
    let arguments = ["--binlog-format=STATEMENT", "--binlog-expire-logs-seconds=600", "--binlog-order-commits=OFF"];
    let mut source = runtime().block_on(MySqlServer::start_with_keyring(&arguments));
    let run = |source: &MySqlServer, statements: &[&str]| {
        let endpoint = source.endpoint();
        runtime().block_on(async {
            let session = Session::open(&endpoint).await.unwrap();
            for sql in statements {
                session.execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
            }
        });
    };
    let revoke = format!("REVOKE BACKUP_ADMIN ON *.* FROM {AGENT}@localhost");
    run(
        &source,
        &[
            "CREATE DATABASE shop",
            "CREATE TABLE shop.t (i INT PRIMARY KEY)",
            "CREATE TABLE shop.m (i INT PRIMARY KEY) ENGINE = MyISAM",
            "CREATE TABLE shop.c (i INT NOT NULL) ENGINE = CSV",
            "INSERT INTO shop.m VALUES (1)",
            "UNINSTALL PLUGIN clone",
            &revoke,
        ],
    );
    let sections = MySqlServer::clone_section() + &source.instance_section("orders");
    let mut a = host_with(&lab, "a", sections);
    a.keiki_ok(&["repository", "init"]);
    wait_until_state(&a, "orders", "archiving");
    let mut said = Said::new(mask(&lab, &source));
    note_doctor(&mut said, &a);
    let back_up = ["backup", "create", "orders"];
    said.refuses(&a, &back_up, "you need (at least one of) the BACKUP_ADMIN privilege");
    let grant = format!("GRANT BACKUP_ADMIN ON *.* TO {AGENT}@localhost");
    run(&source, &[&grant]);
    said.refuses(&a, &back_up, "Plugin 'clone' is not loaded");
    run(&source, &["INSTALL PLUGIN clone SONAME 'mysql_clone.so'"]);
    let large = seem_large(&source.data_dir);
    said.refuses(&a, &back_up, "the server's copy of itself needs");
    said.text.push_str("# too little room\n");
    note_doctor(&mut said, &a);
    large.iter().for_each(|path| fs::remove_file(path).unwrap());
    assert!(a.json(&["backup", "list", "orders"]).as_array().unwrap().is_empty());
    assert!(source.copies().is_empty());

    // Now it can be backed up, but for the rows that the server does not copy.
    a.keiki_ok(&back_up);
    note_check(&mut said, &a, &["--latest"], &["tables", "log format"]);
    said.refuses(
        &a,
        &["clone", "orders", "--as", "copy", "--set", "lower_case_table_names=1"],
        "lower_case_table_names",
    );
    let port = free_port();
    a.keiki_ok(&["clone", "orders", "--as", "copy", "--latest", "--port", &port.to_string(), "--hold"]);
    let data_dir = lab.path("clones-a/copy");
    let clone = CloneAt { run_dir: data_dir.with_extension("run"), data_dir, port };
    assert_eq!(ask(&endpoint_of(&clone), "SELECT COUNT(*) AS n FROM shop.m").first("n"), Some("0"));
    a.keiki_ok(&["discard", "copy", "--yes"]);
    // A change of such a row cannot be replayed, and nothing is handed over that lacks it.
    run(&source, &["SET GLOBAL binlog_format = 'ROW'"]);
    run(&source, &["UPDATE shop.m SET i = 2"]);
    wait_until_shipped(&a, "orders");
    refusal(&a.keiki(&["clone", "orders", "--as", "copy", "--latest"]), "shop.m").unwrap();
    assert!(!lab.path("clones-a/copy").exists());

    run(&source, &["SET GLOBAL binlog_encryption = ON"]);
    said.note("binlog_encryption = ON: keiki status", &problem_with(&a, "encrypted"));
    said.refuses(&a, &back_up, "encrypted");
    said.text.push_str("# with binlog_encryption = ON\n");
    note_doctor(&mut said, &a);
    // What stays is a hole, and a new backup is all that it takes.
    run(&source, &["SET GLOBAL binlog_encryption = OFF", "FLUSH BINARY LOGS"]);
    let open = end_of_log(&source);
    run(&source, &[&format!("PURGE BINARY LOGS TO '{}'", open.split(':').next().unwrap())]);
    said.note("the encrypted log is purged: keiki status", &problem_with(&a, "was gone from the server"));
    a.keiki_ok(&back_up);

    a.stop_agent();
    source.stop();
    source.arguments.push("--skip-log-bin".to_string());
    source.launch();
    a.start_agent();
    said.text.push_str("# with --skip-log-bin\n");
    note_doctor(&mut said, &a);
    said.refuses(&a, &back_up, "writes no binary log");
    insta::assert_snapshot!(said.finish());
}
