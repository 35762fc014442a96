//! What is wrong with a MariaDB server as a source or with a host as a target of its clones, and, with MySQL alike, what
//! happens to binary logs before they are shipped: purged, damaged, encrypted, begun again, of another server.

use std::fs;
use std::path::{Path, PathBuf};

use keiki::engine::mysql::session::{Endpoint, Session};

use super::super::support::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use super::super::support::mariadb::{MariaServer, Release};
use super::super::support::matrix::SourceServer;
use super::super::support::mysql::MySqlServer;
use super::super::support::postgres::server_user;
use super::super::support::two_hosts::{SOON, wait_until_shipped, wait_until_state};
use super::{Mask, Said, assert_unchanged, standing};

/// A server with a binary log.
trait BinlogServer: SourceServer {
    /// Removes all logs and begins again.
    const RESET: &'static str;

    /// One that has no tables yet.
    async fn begin() -> Self;

    fn endpoint(&self) -> Endpoint;

    /// Makes the bytes of a log file look like those that a server writes which encrypts its log.
    fn look_encrypted(bytes: &mut [u8]);

    /// Listens where another server did.
    fn take_over(&mut self, other: &Self);
}

impl BinlogServer for MariaServer {
    const RESET: &'static str = "RESET MASTER";

    async fn begin() -> MariaServer {
        MariaServer::start(&[])
    }

    fn endpoint(&self) -> Endpoint {
        MariaServer::endpoint(self)
    }

    /// What a server with encrypt_binlog writes into a new file behind the description of its format (log_event.h:
    /// START_ENCRYPTION_EVENT is 164); the library that encrypts is not among the packages that tests need.
    fn look_encrypted(bytes: &mut [u8]) {
        let second_event = 4 + u32::from_le_bytes(bytes[13..17].try_into().unwrap()) as usize;
        assert_eq!(bytes[second_event + 4], 163, "a list of GTIDs");
        bytes[second_event + 4] = 164;
    }

    fn take_over(&mut self, other: &MariaServer) {
        self.socket = other.socket.clone();
    }
}

impl BinlogServer for MySqlServer {
    const RESET: &'static str = "RESET BINARY LOGS AND GTIDS";

    async fn begin() -> MySqlServer {
        MySqlServer::start(&[]).await
    }

    fn endpoint(&self) -> Endpoint {
        MySqlServer::endpoint(self)
    }

    /// `sql/rpl_log_encryption.h`: kMagic.
    fn look_encrypted(bytes: &mut [u8]) {
        bytes[0] = 0xfd;
    }

    fn take_over(&mut self, other: &MySqlServer) {
        self.socket = other.socket.clone();
    }
}

/// A host that ships into the directory `repository` of the lab.
pub(super) fn host_with(lab: &Lab, name: &str, sections: String) -> Host {
    let options = HostOptions {
        name,
        repository: format!("file://{}", lab.path("repository").display()),
        peers: Vec::new(),
        sections,
        listen_port: free_port(),
        clone_bin_dir: Path::new("/usr/bin"),
    };
    Host::start(lab, &options)
}

pub(super) fn new_lab() -> Lab {
    let lab = Lab::new();
    fs::create_dir(lab.path("repository")).unwrap();
    lab
}

fn mask(lab: &Lab) -> Mask {
    Mask::default()
        .known(lab.path("").display(), "LAB/")
        .known(Release::V11_8.bin_dir().display(), "BIN11")
        .known(Release::V11_8.program("mariadb-backup").parent().unwrap().display(), "BIN11")
        .known(Release::V10_11.bin_dir().display(), "BIN10")
        .known(Release::V10_11.program("mariadb-backup").parent().unwrap().display(), "BIN10")
        .known(format!("'{}'", server_user().name), "'USER'")
}

/// The same instance with the programs of another directory.
fn section_with(server: &MariaServer, name: &str, bin_dir: &Path) -> String {
    let section = server.instance_section(name, "ship_every = \"1s\"");
    section.replace(server.release.bin_dir().to_str().unwrap(), bin_dir.to_str().unwrap())
}

async fn run(server: &impl BinlogServer, statements: &[&str]) {
    let session = Session::open(&server.endpoint()).await.unwrap();
    for sql in statements {
        session.execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
}

/// Writes down what doctor says about instances, but not what is well.
pub fn note_doctor(said: &mut Said, host: &Host) {
    let output = host.keiki(&["--json", "doctor"]);
    let items: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for item in items.as_array().unwrap() {
        let what = item["what"].as_str().unwrap();
        let is_of_an_instance = what.contains(": ") && !what.ends_with(": archiving");
        if is_of_an_instance && item["verdict"] != "pass" {
            let text = |key: &str| item[key].as_str().unwrap_or_default().to_string();
            said.note(
                &format!("keiki doctor: {} {what}", text("verdict")),
                &format!("{}\nhint: {}", text("found"), text("hint")),
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_source_of_mariadb_lacks_is_named_before_it_is_backed_up() {
    let lab = new_lab();
    let careless = MariaServer::start(&["--binlog-format=STATEMENT", "--binlog-expire-logs-seconds=600"]);
    let silent = MariaServer::start(&["--skip-log-bin"]);
    let newer = MariaServer::start_release(Release::V11_8, &[]);
    let older = MariaServer::start(&[]);
    run(
        &careless,
        &[
            "CREATE DATABASE shop",
            "CREATE TABLE shop.m (i INT) ENGINE = MyISAM",
            "CREATE TABLE shop.a (i INT) ENGINE = Aria",
        ],
    )
    .await;
    let empty = lab.directory_of_server_user("empty");
    let sections = [
        careless.instance_section("careless", ""),
        silent.instance_section("silent", ""),
        section_with(&newer, "newer", &Release::V10_11.bin_dir()),
        section_with(&older, "older", &Release::V11_8.bin_dir()),
    ];
    let a = host_with(&lab, "a", sections.concat());
    a.keiki_ok(&["repository", "init"]);
    for name in ["careless", "newer", "older"] {
        wait_until_state(&a, name, "archiving");
    }
    let mut said = Said::new(mask(&lab));
    note_doctor(&mut said, &a);
    said.refuses(&a, &["backup", "create", "silent"], "writes no binary log");
    said.refuses(&a, &["backup", "create", "newer"], "cannot find 'mariadb-backup' of MariaDB 11.8: found only");
    said.refuses(&a, &["backup", "create", "older"], "cannot find 'mariadb-backup' of MariaDB 10.11: found only");
    drop(a);
    let a = host_with(&lab, "c", section_with(&older, "bare", &empty));
    wait_until_state(&a, "bare", "archiving");
    said.refuses(&a, &["backup", "create", "bare"], "cannot find 'mariadb-backup' of MariaDB 10.11: it is not in");
    assert!(a.json(&["backup", "list", "bare"]).as_array().unwrap().is_empty());
    insta::assert_snapshot!(said.finish());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_of_mariadb_that_its_host_cannot_run_or_its_log_cannot_reach_is_refused() {
    let lab = new_lab();
    let source = MariaServer::start(&["--binlog-format=STATEMENT"]);
    run(&source, &["CREATE DATABASE shop", "CREATE TABLE shop.t (i INT PRIMARY KEY)"]).await;
    let a = host_with(&lab, "a", source.clone_section() + &source.instance_section("orders", "ship_every = \"1s\""));
    a.keiki_ok(&["repository", "init"]);
    wait_until_state(&a, "orders", "archiving");
    a.keiki_ok(&["backup", "create", "orders"]);
    run(&source, &["INSERT INTO shop.t VALUES (1)"]).await;
    wait_until_shipped(&a, "orders");
    let user = &source.user.name;
    let clones_with =
        |bin_dir: &Path| format!("[clone.mariadb]\nrun_as = \"{user}\"\nbin_dir = \"{}\"\n", bin_dir.display());
    let newer = host_with(&lab, "newer", clones_with(&Release::V11_8.bin_dir()));
    let bare = host_with(&lab, "bare", clones_with(Path::new("/nonexistent")));
    let hosts = [&a, &newer, &bare];
    let before = standing(&lab, &hosts, &lab.path("repository"));
    let mut said = Said::new(mask(&lab));
    let cases: [(&Host, &[&str], &str); 11] = [
        (&newer, &["--latest"], "cannot find 'mariadbd' of MariaDB 10.11: found only"),
        (&bare, &["--latest"], "cannot find 'mariadbd' of MariaDB 10.11: it is not in '/nonexistent'"),
        (&a, &["--latest", "--set", "lower_case_table_names=1"], "lower_case_table_names"),
        (&a, &["--latest", "--set", "innodb-page-size=65536"], "innodb_page_size"),
        (&a, &["--at", "2026-01-01 00:00:00.5+00"], "it lies before"),
        (&a, &["--at", "2226-01-01 00:00:00+00"], "its archive ends at"),
        (&a, &["--gtid", "0-5-99999"], "no transaction with that id is in its log"),
        (&a, &["--gtid", "5"], "is not a GTID"),
        (&a, &["--position", "binlog.000099:4"], "its archive ends at"),
        (&a, &["--position", "0/1A2B3C4D"], "position"),
        (&a, &["--name", "before the release"], "has no restore points"),
    ];
    for (host, more, expected) in cases {
        said.refuses(host, &[&["clone", "orders", "--as", "copy"], more].concat(), expected);
    }
    assert_unchanged(&before, &lab, &hosts, &lab.path("repository"), "a clone of MariaDB that is refused");
    let list = a.keiki(&["clone", "orders", "--as", "copy", "--latest", "--check"]);
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    let lines: Vec<&str> = list.lines().skip_while(|line| !line.contains("log format")).take(2).collect();
    assert!(!lines.is_empty(), "{list}");
    said.note("keiki clone orders --as copy --latest --check", &lines.join("\n"));
    insta::assert_snapshot!(said.finish());
}

/// A plugin that does nothing, in a library of its own, for a server of this version (`include/mysql/plugin.h`: a daemon
/// plugin is of type 3, and knows the server's version).
fn build_plugin(directory: &Path, version: &str) {
    let source = directory.join("keiki_probe.c");
    let code = "struct plugin { int type; void *info; const char *name, *author, *about; int license; \
                int (*start)(void *); int (*end)(void *); unsigned version; void *status, *settings; const char *text; \
                unsigned maturity; };\n\
                static int info = VERSION_ID << 8;\n\
                static int nothing(void *unused) { return 0; }\n\
                int _maria_plugin_interface_version_ = 0x010e;\n\
                int _maria_sizeof_struct_st_plugin_ = sizeof(struct plugin);\n\
                struct plugin _maria_plugin_declarations_[] = {{3, &info, \"keiki_probe\", \"\", \"\", 1, nothing, nothing, \
                1, 0, 0, \"1\", 5}, {0}};\n";
    fs::write(&source, code).unwrap();
    let numbers: Vec<u32> = version.split('.').map(|number| number.parse().unwrap()).collect();
    let output = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-w", "-o"])
        .arg(directory.join("keiki_probe.so"))
        .arg(format!("-DVERSION_ID={}", numbers[0] * 10_000 + numbers[1] * 100 + numbers[2]))
        .arg(&source)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_the_host_of_a_clone_of_mariadb_lacks_is_named_before_anything_is_done() {
    let lab = new_lab();
    let plugins = lab.directory_of_server_user("plugins");
    let version = std::process::Command::new(Release::V10_11.program("mariadbd")).arg("--version").output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    let version = version.split_once("Ver ").unwrap().1.split('-').next().unwrap().to_string();
    build_plugin(&plugins, &version);
    let plugin_dir = format!("--plugin-dir={}", plugins.display());
    let source = MariaServer::start(&[&plugin_dir, "--plugin-load-add=keiki_probe.so", "--plugin-maturity=unknown"]);
    let a = host_with(&lab, "a", source.clone_section() + &source.instance_section("orders", "ship_every = \"1s\""));
    a.keiki_ok(&["repository", "init"]);
    wait_until_state(&a, "orders", "archiving");
    a.keiki_ok(&["backup", "create", "orders"]);
    let mut said = Said::new(mask(&lab));
    let list = a.keiki_ok(&["clone", "orders", "--as", "copy", "--latest", "--check"]);
    let lines: Vec<&str> = list.lines().skip_while(|line| !line.contains("  plugins ")).take(2).collect();
    assert!(!lines.is_empty(), "{list}");
    said.note("keiki clone orders --as copy --latest --check", &lines.join("\n"));
    // Nothing that needs it, so the clone is made.
    let port = free_port().to_string();
    a.keiki_ok(&["clone", "orders", "--as", "copy", "--latest", "--port", &port]);
    a.keiki_ok(&["discard", "copy", "--yes"]);
    insta::assert_snapshot!(said.finish());
}

/// What status says is wrong with the instance, once it says something with this in it.
pub(super) fn problem_with(host: &Host, expected: &str) -> String {
    let mut found = String::new();
    wait_for(&format!("status to say '{expected}'"), SOON, || {
        let problem = host.instance("orders")["problem"].clone();
        let text = |key: &str| problem[key].as_str().unwrap_or_default().to_string();
        found = format!("error: {}\nhint: {}", text("message"), text("hint"));
        found.contains(expected)
    });
    found
}

/// The log file of the server with this number.
fn log_file(server: &impl SourceServer, number: u32) -> PathBuf {
    server.data_dir().join(format!("binlog.{number:06}"))
}

/// A source with a backup and three rows, the third in log file 2, which is open.
async fn shipped_source<S: BinlogServer>(lab: &Lab) -> (S, Host) {
    let source = S::begin().await;
    run(&source, &["CREATE DATABASE shop", "CREATE TABLE shop.t (i INT PRIMARY KEY)", "INSERT INTO shop.t VALUES (1)"])
        .await;
    let a = host_with(lab, "a", source.clone_sections() + &source.instance_section("orders"));
    a.keiki_ok(&["repository", "init"]);
    wait_until_state(&a, "orders", "archiving");
    a.keiki_ok(&["backup", "create", "orders"]);
    run(&source, &["INSERT INTO shop.t VALUES (2)", "FLUSH BINARY LOGS", "INSERT INTO shop.t VALUES (3)"]).await;
    wait_until_shipped(&a, "orders");
    (source, a)
}

#[tokio::test(flavor = "multi_thread")]
async fn binary_logs_that_were_purged_or_damaged_before_they_were_shipped_are_named() {
    insta::assert_snapshot!(purged_and_damaged::<MariaServer>().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn binary_logs_of_mysql_that_were_purged_or_damaged_before_they_were_shipped_are_named() {
    insta::assert_snapshot!(purged_and_damaged::<MySqlServer>().await);
}

async fn purged_and_damaged<S: BinlogServer>() -> String {
    let lab = new_lab();
    let mut said = Said::new(mask(&lab));
    let (source, mut a) = shipped_source::<S>(&lab).await;
    a.stop_agent();
    run(
        &source,
        &[
            "FLUSH BINARY LOGS",
            "INSERT INTO shop.t VALUES (4)",
            "FLUSH BINARY LOGS",
            "INSERT INTO shop.t VALUES (5)",
            "PURGE BINARY LOGS TO 'binlog.000004'",
        ],
    )
    .await;
    a.start_agent();
    let problem = problem_with(&a, "was gone from the server");
    said.note("binary logs were purged before they were shipped: keiki status", &problem);
    let clone = ["clone", "orders", "--as", "copy", "--latest"];
    said.refuses(&a, &clone, "no archived log covers");
    // A new backup is all that it takes.
    a.keiki_ok(&["backup", "create", "orders"]);
    a.keiki_ok(&[&clone[..], &["--check"]].concat());
    wait_for("status to be content", SOON, || a.instance("orders")["problem"].is_null());

    // Bytes in the middle of a log file that are none of an event: the server's disk is failing.
    a.stop_agent();
    let path = log_file(&source, 4);
    // What was shipped before stays as it is: there, other bytes would be another history.
    let at = fs::read(&path).unwrap().len() + 100;
    run(&source, &["INSERT INTO shop.t VALUES (6), (7), (8)", "FLUSH BINARY LOGS", "INSERT INTO shop.t VALUES (9)"])
        .await;
    let mut bytes = fs::read(&path).unwrap();
    bytes[at..].iter_mut().for_each(|byte| *byte ^= 0x5a);
    fs::write(&path, bytes).unwrap();
    a.start_agent();
    wait_until_shipped(&a, "orders");
    said.text.push_str("# half of a log file is no log\n");
    said.refuses(&a, &clone, "begins after transaction");
    said.finish()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binary_log_that_is_encrypted_begins_again_or_belongs_to_another_server_is_named() {
    insta::assert_snapshot!(encrypted_begun_again_and_of_another::<MariaServer>().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binary_log_of_mysql_that_is_encrypted_begins_again_or_belongs_to_another_server_is_named() {
    insta::assert_snapshot!(encrypted_begun_again_and_of_another::<MySqlServer>().await);
}

async fn encrypted_begun_again_and_of_another<S: BinlogServer>() -> String {
    let lab = new_lab();
    let mut said = Said::new(mask(&lab));
    let (mut source, mut a) = shipped_source::<S>(&lab).await;
    a.stop_agent();
    run(&source, &["FLUSH BINARY LOGS", "FLUSH BINARY LOGS", "FLUSH BINARY LOGS"]).await;
    let path = log_file(&source, 4);
    let plain = fs::read(&path).unwrap();
    let mut bytes = plain.clone();
    S::look_encrypted(&mut bytes);
    fs::write(&path, bytes).unwrap();
    a.start_agent();
    said.note("a log file is encrypted: keiki status", &problem_with(&a, "encrypted"));
    fs::write(&path, plain).unwrap();
    wait_until_shipped(&a, "orders");

    run(&source, &[S::RESET, "INSERT INTO shop.t VALUES (100)"]).await;
    said.note(&format!("{}: keiki status", S::RESET), &problem_with(&a, "begins again"));
    a.stop_agent();
    a.start_agent();
    said.note(&format!("{}, after a restart of the agent: keiki status", S::RESET), &problem_with(&a, "binlog"));
    // What was archived before can still be cloned.
    let port = free_port().to_string();
    a.keiki_ok(&["clone", "orders", "--as", "copy", "--latest", "--port", &port]);
    a.keiki_ok(&["discard", "copy", "--yes"]);

    // Another server takes over the socket.
    source.kill9();
    let mut other = S::begin().await;
    other.kill9();
    other.take_over(&source);
    let socket = source.endpoint().socket;
    let _ = fs::remove_file(&socket);
    other.launch();
    a.stop_agent();
    a.start_agent();
    let problem = problem_with(&a, "runs in");
    let problem = problem
        .replace(other.data_dir().to_str().unwrap(), "OTHER")
        .replace(source.data_dir().to_str().unwrap(), "SOURCE");
    said.note("another server behind the socket: keiki status", &problem.replace(socket.to_str().unwrap(), "SOCKET"));
    said.finish()
}
