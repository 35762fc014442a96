//! What a MySQL server may be like that the ledger's is not: with tags, compressed transactions, events, a replication of
//! its own, without GTIDs; and what it lacks as a source, and what an earlier backup left behind.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use keiki::engine::mysql::clone::{ACCOUNT, PASSWORD_FILE, SOCKET_FILE};
use keiki::engine::mysql::session::{Endpoint, Session};
use keiki::engine::mysql::source::read_password;

use super::support::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use super::support::mysql::{MySqlServer, bin_dir};
use super::support::two_hosts::{SOON, wait_until_state};

/// A host with these instances, which clones to itself.
fn host_of(lab: &Lab, instances: &[(&str, &MySqlServer)]) -> Host {
    fs::create_dir(lab.path("repository")).unwrap();
    let sections: String = instances.iter().map(|(name, server)| server.instance_section(name)).collect();
    let host = Host::start(
        lab,
        &HostOptions {
            name: "a",
            repository: format!("file://{}", lab.path("repository").display()),
            peers: Vec::new(),
            sections: MySqlServer::clone_section() + &sections,
            listen_port: free_port(),
            clone_bin_dir: &bin_dir(),
        },
    );
    host.keiki_ok(&["repository", "init"]);
    for (name, _) in instances {
        wait_until_state(&host, name, "archiving");
    }
    host
}

async fn run(server: &MySqlServer, statements: &[&str]) {
    let session = server.connect().await;
    for sql in statements {
        session.execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
}

async fn value(session: &Session, sql: &str) -> String {
    session.value(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}")).unwrap_or_default()
}

/// Makes a clone, and a session with it.
async fn clone(lab: &Lab, host: &Host, source: &str, name: &str, arguments: &[&str]) -> Session {
    let port = free_port().to_string();
    host.keiki_ok(&[&["clone", source, "--as", name, "--port", &port], arguments].concat());
    open(lab, name, ACCOUNT, None).await.unwrap()
}

/// Logs in to a clone; as the agent if no password is given.
async fn open(lab: &Lab, name: &str, user: &str, password: Option<&str>) -> keiki::error::Result<Session> {
    let run_dir = lab.path(&format!("clones-a/{name}.run"));
    let password = password.map_or_else(|| read_password(&run_dir.join(PASSWORD_FILE)).unwrap(), str::to_string);
    let run_as = super::support::postgres::server_user().name;
    Session::open(&Endpoint {
        socket: run_dir.join(SOCKET_FILE),
        user: user.to_string(),
        password: Some(password),
        run_as,
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_of_mysql_is_exact_with_tags_and_compression_and_keeps_nothing_that_acts() {
    let lab = Lab::new();
    let source = MySqlServer::start(&["--binlog-transaction-compression=ON", "--event-scheduler=ON"]).await;
    let host = host_of(&lab, &[("orders", &source)]);
    run(
        &source,
        &[
            "CREATE DATABASE shop",
            "CREATE TABLE shop.t (i INT PRIMARY KEY)",
            "CREATE TABLE shop.ticks (at TIMESTAMP(6))",
            "CREATE EVENT shop.early ON SCHEDULE EVERY 1 SECOND DO INSERT INTO shop.ticks VALUES (NOW(6))",
            "CREATE USER app@'%' IDENTIFIED BY 'old'",
            "CREATE USER app@localhost IDENTIFIED BY 'old'",
            "CHANGE REPLICATION SOURCE TO SOURCE_HOST = '127.0.0.1', SOURCE_PORT = 1 FOR CHANNEL 'far'",
        ],
    )
    .await;
    host.keiki_ok(&["backup", "create", "orders"]);
    assert_eq!(source.copies(), Vec::<std::path::PathBuf>::new(), "the server's copy of itself was left");
    run(
        &source,
        &[
            "CREATE EVENT shop.late ON SCHEDULE EVERY 1 SECOND DO INSERT INTO shop.ticks VALUES (NOW(6))",
            "INSERT INTO shop.t VALUES (1)",
        ],
    )
    .await;
    let session = source.connect().await;
    session.execute("SET gtid_next = 'AUTOMATIC:some_tag'").await.unwrap();
    for number in 2..5 {
        session.execute(&format!("INSERT INTO shop.t VALUES ({number})")).await.unwrap();
    }
    let uuid = value(&session, "SELECT @@server_uuid").await;
    let second = format!("{uuid}:some_tag:2");
    let password = lab.path("password-of-app");
    fs::write(&password, "n3w'\\ word\n").unwrap();
    fs::set_permissions(&password, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let typed = format!("app={}", password.display());
    let copy = clone(&lab, &host, "orders", "with", &["--gtid", &second, "--password", &typed]).await;
    assert_eq!(value(&copy, "SELECT GROUP_CONCAT(i ORDER BY i) FROM shop.t").await, "1,2,3");
    // A new life, to which all that was replayed belongs, and in which nothing happens by itself.
    let executed = value(&copy, "SELECT @@gtid_purged").await.replace('\n', "");
    assert!(executed.contains("some_tag:1-2") && !executed.contains("1-3"), "{executed}");
    assert_ne!(value(&copy, "SELECT @@server_uuid").await, uuid);
    assert_ne!(value(&copy, "SELECT @@server_id").await, "5");
    assert_eq!(value(&copy, "SELECT @@event_scheduler").await, "OFF");
    assert_eq!(value(&copy, "SELECT COUNT(*) FROM performance_schema.replication_connection_configuration").await, "0");
    let events = "SELECT GROUP_CONCAT(EVENT_NAME, ' ', STATUS ORDER BY 1) FROM information_schema.EVENTS";
    assert_eq!(value(&copy, events).await, "early ENABLED,late ENABLED");
    let ticks = value(&copy, "SELECT COUNT(*) FROM shop.ticks").await;
    open(&lab, "with", "app", Some("n3w'\\ word")).await.unwrap();
    assert!(open(&lab, "with", "app", Some("old")).await.is_err(), "the old password lets in");
    let before = clone(&lab, &host, "orders", "before", &["--before-gtid", &second]).await;
    assert_eq!(value(&before, "SELECT GROUP_CONCAT(i ORDER BY i) FROM shop.t").await, "1,2");
    assert_eq!(value(&copy, "SELECT COUNT(*) FROM shop.ticks").await, ticks, "an event of the source ran in the clone");
    for name in ["with", "before"] {
        host.keiki_ok(&["discard", name, "--yes"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mysql_without_gtids_is_cloned_to_a_position_and_a_time_and_not_to_a_gtid() {
    let lab = Lab::new();
    let source = MySqlServer::start(&["--gtid-mode=OFF", "--enforce-gtid-consistency=OFF"]).await;
    let host = host_of(&lab, &[("orders", &source)]);
    run(&source, &["CREATE DATABASE shop", "CREATE TABLE shop.t (i INT PRIMARY KEY)"]).await;
    // Where in the log the copy is, is for the copy to say: somebody writes while it is made.
    let stop = Arc::new(AtomicBool::new(false));
    let (session, stopped) = (source.connect().await, stop.clone());
    let writer = tokio::spawn(async move {
        let mut number = 0;
        while !stopped.load(Ordering::Relaxed) {
            number += 1;
            session.execute(&format!("INSERT INTO shop.t VALUES ({number})")).await.unwrap();
        }
        number
    });
    tokio::task::block_in_place(|| host.keiki_ok(&["backup", "create", "orders"]));
    stop.store(true, Ordering::Relaxed);
    let written: u64 = writer.await.unwrap();
    assert!(written > 10, "{written} rows are no load");
    let session = source.connect().await;
    let end = session.query("SHOW BINARY LOG STATUS").await.unwrap();
    let position = format!("{}:{}", end.first("File").unwrap(), end.first("Position").unwrap());
    session.execute("INSERT INTO shop.t VALUES (1000001)").await.unwrap();
    let moment = Timestamp::now();
    session.execute("FLUSH BINARY LOGS").await.unwrap();
    session.execute("INSERT INTO shop.t VALUES (1000002)").await.unwrap();
    let at = moment.to_string();
    let cases = [
        ("position", vec!["--position", &position], written, written),
        ("time", vec!["--at", &at], written + 1, 1_000_001),
        ("latest", vec!["--latest"], written + 2, 1_000_002),
    ];
    for (name, arguments, rows, newest) in cases {
        let copy = clone(&lab, &host, "orders", name, &arguments).await;
        let found = value(&copy, "SELECT CONCAT(COUNT(*), ' ', MAX(i)) FROM shop.t").await;
        assert_eq!(found, format!("{rows} {newest}"), "{name}");
        host.keiki_ok(&["discard", name, "--yes"]);
    }
    let gtid = "3e11fa47-71ca-11e1-9e33-c80aa9429562:1";
    let said = host.keiki_fails(&["clone", "orders", "--as", "never", "--gtid", gtid]);
    assert!(said.contains("gtid") || said.contains("GTID") || said.contains(gtid), "{said}");
    assert!(!lab.path("clones-a/never").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_source_of_mysql_lacks_is_named_and_what_a_killed_backup_left_is_removed() {
    let lab = Lab::new();
    let source = MySqlServer::start(&["--binlog-format=STATEMENT", "--binlog-expire-logs-seconds=600"]).await;
    run(
        &source,
        &[
            "UNINSTALL PLUGIN clone",
            "CREATE DATABASE shop",
            "CREATE TABLE shop.m (i INT) ENGINE = MyISAM",
            "INSERT INTO shop.m VALUES (7)",
        ],
    )
    .await;
    // Of this server, as a killed agent leaves it; of another server, which shares the directory; and of somebody else.
    let uuid = value(&source.connect().await, "SELECT @@server_uuid").await;
    let directory = source.backup_dir();
    let [left, others, strange] = [
        format!("keiki-copy-{uuid}-00000000000000ff"),
        "keiki-copy-3e11fa47-71ca-11e1-9e33-c80aa9429562-00000000000000ff".to_string(),
        "notes".to_string(),
    ]
    .map(|name| directory.join(name));
    fs::create_dir(&directory).unwrap();
    super::support::mariadb::own(&directory, &source.user);
    for path in [&left, &others, &strange] {
        fs::create_dir(path).unwrap();
        fs::write(path.join("ibdata1"), "half a copy").unwrap();
    }
    let host = host_of(&lab, &[("orders", &source)]);
    wait_for("what was left behind to be removed", SOON, || !left.exists());
    assert!(others.exists() && strange.exists(), "what is not ours was removed");

    let output = host.keiki(&["--json", "doctor"]);
    let items: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let item = |what: &str| {
        let found = items.as_array().unwrap().iter().find(|item| item["what"].as_str().unwrap().ends_with(what));
        let found = found.unwrap_or_else(|| panic!("no '{what}' in {items:#}"));
        format!("{}: {}", found["verdict"].as_str().unwrap(), found["found"].as_str().unwrap())
    };
    assert!(item("clone plugin").starts_with("fail: not installed"), "{}", item("clone plugin"));
    assert!(item("tables").starts_with("warn") && item("tables").ends_with("shop.m"), "{}", item("tables"));
    assert!(item("binlog_format").starts_with("warn: STATEMENT"), "{}", item("binlog_format"));
    assert!(item("binlog_expire_logs_seconds").starts_with("warn: 600"));
    assert!(item("gtid_mode").starts_with("pass"), "{}", item("gtid_mode"));
    assert!(item("right to copy").starts_with("pass") && item("space for backups").starts_with("pass"));
    let said = host.keiki_fails(&["backup", "create", "orders"]);
    assert!(said.contains("the server cannot copy itself") && said.contains("INSTALL PLUGIN clone"), "{said}");
    assert_eq!(source.copies().len(), 2, "{:?}", source.copies());

    // With the plugin a backup can be taken, and says which tables it has without their rows.
    run(&source, &["INSTALL PLUGIN clone SONAME 'mysql_clone.so'"]).await;
    host.keiki_ok(&["backup", "create", "orders"]);
    let port = free_port().to_string();
    let said = host.keiki_ok(&["clone", "orders", "--as", "copy", "--port", &port, "--latest", "--check"]);
    assert!(said.contains("a clone has them without their rows: shop.m"), "{said}");
    assert_eq!(source.copies().len(), 2, "{:?}", source.copies());
}
