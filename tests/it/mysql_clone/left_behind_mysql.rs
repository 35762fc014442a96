//! What is about the source itself stays behind when a server of MySQL is cloned, through the real program: what is held
//! is closed and does nothing by itself, and what is accepted is a server of its own.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use keiki::engine::mysql::session::{Rows, Session};

use crate::support::hosts::{Host, HostOptions, Lab, free_port};
use crate::support::matrix::{CloneAt, endpoint_of};
use crate::support::mysql::{AGENT, MySqlServer, bin_dir};
use crate::support::two_hosts::{wait_until_shipped, wait_until_state};

/// Addresses, paths, and what a server does by itself.
fn arguments(logs: &Path) -> Vec<String> {
    let logs = logs.display();
    [
        "--report-host=db1.example",
        "--report-port=3399",
        "--bind-address=192.0.2.7",
        "--init-connect=SET @seen = 1",
        "--general-log=ON",
        &format!("--general-log-file={logs}/general"),
        "--slow-query-log=ON",
        &format!("--slow-query-log-file={logs}/slow"),
        "--event-scheduler=ON",
        "--sql-mode=ANSI",
        "--max-connections=77",
    ]
    .map(str::to_string)
    .to_vec()
}

async fn on(clone: &CloneAt, sql: &str) -> Rows {
    let session = Session::open(&endpoint_of(clone)).await.unwrap();
    session.query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
}

/// The first column of the first row.
async fn value(clone: &CloneAt, sql: &str) -> String {
    let rows = on(clone, sql).await.rows;
    rows.first().and_then(|row| row.first().cloned().flatten()).unwrap_or_else(|| String::from("NULL"))
}

/// Whose work the events are, and what their bodies mean.
async fn events(session: &Session) -> Vec<Vec<Option<String>>> {
    let sql = "SELECT EVENT_NAME, DEFINER, SQL_MODE, TIME_ZONE, CHARACTER_SET_CLIENT, COLLATION_CONNECTION, \
               EVENT_DEFINITION FROM information_schema.EVENTS WHERE EVENT_SCHEMA = 'shop' ORDER BY 1";
    session.query(sql).await.unwrap().rows
}

/// The report of the job that made the clone.
fn report(host: &Host) -> BTreeMap<String, String> {
    let jobs = host.json(&["job", "list"]);
    let job = jobs.as_array().unwrap().iter().find(|job| job["task"]["kind"] == "clone").unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_string();
    job["results"].as_array().unwrap().iter().map(|line| (text(&line["name"]), text(&line["value"]))).collect()
}

/// Turns the scheduler on and waits until each event has run once more.
async fn assert_events_run_for_their_definers(clone: &CloneAt) {
    let last = value(clone, "SELECT MAX(id) FROM shop.ticks").await;
    on(clone, "SET GLOBAL event_scheduler = ON").await;
    let ran = format!("SELECT COUNT(DISTINCT event) FROM shop.ticks WHERE id > {last}");
    let began = std::time::Instant::now();
    while value(clone, &ran).await != "2" {
        assert!(began.elapsed() < Duration::from_secs(60), "only {} of 2 events ran", value(clone, &ran).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(value(clone, "SELECT GROUP_CONCAT(DISTINCT who) FROM shop.ticks").await, "app@localhost");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_about_a_source_of_mysql_is_reported_and_is_not_in_the_clone() {
    let lab = Lab::new();
    std::fs::create_dir(lab.path("repository")).unwrap();
    let own_logs = lab.directory_of_server_user("logs");
    std::fs::set_permissions(&own_logs, PermissionsExt::from_mode(0o777)).unwrap();
    let own_arguments = arguments(&own_logs);
    let source = MySqlServer::start(&own_arguments.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let session = source.connect().await;
    for sql in [
        "CREATE DATABASE shop",
        "CREATE TABLE shop.ticks (id INT AUTO_INCREMENT PRIMARY KEY, event VARCHAR(20), who VARCHAR(99))",
        "CREATE USER app@localhost IDENTIFIED BY 'x'",
        "GRANT ALL ON shop.* TO app@localhost",
        "SET SESSION sql_mode = 'NO_ZERO_DATE', time_zone = '+05:00'",
        "CREATE DEFINER = app@localhost EVENT shop.tick ON SCHEDULE EVERY 1 SECOND DO INSERT INTO shop.ticks (event, who) \
         VALUES (\"tick\", CURRENT_USER())",
        "CREATE EVENT shop.asleep ON SCHEDULE EVERY 1 SECOND DISABLE DO DELETE FROM shop.ticks",
        "CREATE SERVER far FOREIGN DATA WRAPPER mysql OPTIONS (HOST 'db9.example', DATABASE 'x')",
        "CHANGE REPLICATION SOURCE TO SOURCE_HOST = 'primary.example', SOURCE_USER = 'repl'",
        "CHANGE REPLICATION SOURCE TO SOURCE_HOST = 'other.example', SOURCE_USER = 'repl' FOR CHANNEL 'second'",
        "SET PERSIST max_connect_errors = 4321",
    ] {
        session.execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    let bin_dir = bin_dir();
    let host = Host::start(
        &lab,
        &HostOptions {
            name: "a",
            repository: format!("file://{}", lab.path("repository").display()),
            peers: Vec::new(),
            sections: MySqlServer::clone_section() + &source.instance_section("orders"),
            listen_port: free_port(),
            clone_bin_dir: &bin_dir,
        },
    );
    host.keiki_ok(&["repository", "init"]);
    wait_until_state(&host, "orders", "archiving");
    host.keiki_ok(&["backup", "create", "orders"]);
    // Made while the log is replayed.
    for sql in [
        "CREATE DEFINER = app@localhost EVENT shop.later ON SCHEDULE EVERY 1 SECOND DO INSERT INTO shop.ticks (event, who) \
         VALUES (\"later\", CURRENT_USER())",
        "CREATE EVENT shop.asleep_too ON SCHEDULE EVERY 1 SECOND DISABLE DO SET @nothing = 1",
        "SET GLOBAL event_scheduler = OFF",
    ] {
        session.execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    wait_until_shipped(&host, "orders");
    let (wanted, state) = (events(&session).await, session.value("SELECT @@gtid_executed").await.unwrap().unwrap());
    let uuid = session.value("SELECT @@server_uuid").await.unwrap().unwrap();

    let port = free_port();
    host.keiki_ok(&["clone", "orders", "--as", "copy", "--latest", "--port", &port.to_string(), "--hold"]);
    let data_dir = lab.path("clones-a/copy");
    let clone = CloneAt { run_dir: data_dir.with_extension("run"), data_dir, port };
    let report = report(&host);
    let own = |name: &str| own_logs.join(name).display().to_string();
    for (what, wanted) in [
        ("replication", "2 channel(s) to sources removed, with their relay logs"),
        ("events", "3 enabled (shop.asleep_too, shop.later, shop.tick)"),
        ("events from the log", "turned on: shop.asleep_too, shop.later; a server does not keep"),
        ("server uuid", &format!("and not the source's '{uuid}'")),
        ("server id", "a new one"),
        ("GTID", "executed and purged"),
        ("account of the agent", "'keiki_agent'@'localhost'"),
        ("setting 'report_host'", "not taken over; it was 'db1.example'"),
        ("setting 'report_port'", "not taken over; it was '3399'"),
        ("setting 'bind_address'", "not taken over; it was '192.0.2.7'"),
        ("setting 'init_connect'", "not taken over; it was 'SET @seen = 1'"),
        ("setting 'general_log_file'", &own("general")),
        ("setting 'slow_query_log_file'", &own("slow")),
        ("foreign servers", "found and left: far"),
    ] {
        let done = report.get(what).unwrap_or_else(|| panic!("no '{what}' in {report:#?}"));
        assert!(done.contains(wanted), "'{what}' says '{done}' and not '{wanted}'");
    }

    // Held: everything is there that will be done, and nothing is done.
    let held = Session::open(&endpoint_of(&clone)).await.unwrap();
    assert_eq!(events(&held).await, wanted);
    let asleep = "SELECT STATUS FROM information_schema.EVENTS WHERE EVENT_NAME = 'asleep'";
    assert_eq!(value(&clone, asleep).await, "DISABLED");
    let ticks = "SELECT COUNT(*) FROM shop.ticks";
    let before = held.value(ticks).await.unwrap().unwrap();
    assert_ne!(before, "0", "no event ever ran on the source");
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(value(&clone, ticks).await, before, "events ran in quarantine");
    assert_eq!(value(&clone, "SELECT COUNT(*) FROM mysql.slave_master_info").await, "0");
    drop(held);

    host.keiki_ok(&["accept", "copy"]);
    wait_until_state(&host, "copy", "archiving");
    for (sql, wanted) in [
        ("SELECT @@GLOBAL.report_host", "NULL"),
        ("SELECT @@GLOBAL.report_port", port.to_string().as_str()),
        ("SELECT @@GLOBAL.bind_address", "127.0.0.1"),
        ("SELECT @@GLOBAL.general_log", "0"),
        ("SELECT @@GLOBAL.slow_query_log", "0"),
        ("SELECT @@GLOBAL.init_connect", ""),
        ("SELECT @@GLOBAL.server_id = 5", "0"),
        (&format!("SELECT @@GLOBAL.server_uuid = '{uuid}'"), "0"),
        ("SELECT COUNT(*) FROM mysql.slave_master_info", "0"),
        ("SELECT COUNT(*) FROM mysql.servers", "1"),
        // What is about the data comes along.
        ("SELECT @@GLOBAL.max_connections", "77"),
        ("SELECT @@GLOBAL.max_connect_errors", "4321"),
        ("SELECT @@GLOBAL.sql_mode LIKE '%ANSI%'", "1"),
    ] {
        assert_eq!(value(&clone, sql).await, wanted, "{sql}");
    }
    assert!(on(&clone, "SHOW REPLICA STATUS").await.rows.is_empty());
    let purged = value(&clone, "SELECT @@GLOBAL.gtid_purged").await;
    assert_eq!(purged, state, "what was replayed is behind the log of the new life");
    assert_events_run_for_their_definers(&clone).await;
    let executed = value(&clone, "SELECT @@GLOBAL.gtid_executed").await;
    let of_its_own = value(&clone, "SELECT @@GLOBAL.server_uuid").await;
    assert!(executed.contains(&uuid) && executed.contains(&of_its_own), "{executed}");

    let options = std::fs::read_to_string(clone.data_dir.join("my.cnf")).unwrap();
    for stranger in ["db1.example", "192.0.2.7", own_logs.to_str().unwrap(), source.work_dir.to_str().unwrap()] {
        assert!(!options.contains(stranger), "{stranger} in {options}");
    }
    let names = std::fs::read_dir(&clone.data_dir).unwrap();
    let names: Vec<String> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.contains("relay") || name == "mysqld-auto.cnf"), "{names:?}");
    assert_eq!(source.sql(&format!("SELECT COUNT(*) FROM mysql.user WHERE User = '{AGENT}'")).await.rows.len(), 1);
    host.keiki_ok(&["discard", "copy", "--yes"]);
}
