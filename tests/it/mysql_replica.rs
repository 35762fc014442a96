//! A MySQL server that is itself a replica, and one whose tables a copy has without their rows: what a clone of them is.

use std::time::Duration;

use keiki::engine::mysql::session::{Rows, Session};

use super::support::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use super::support::matrix::{CloneAt, endpoint_of};
use super::support::mysql::{MySqlServer, bin_dir};
use super::support::two_hosts::wait_until_state;

/// A host with a server that archives into a directory and whose clones lie beside it.
fn host_of(lab: &Lab, source: &MySqlServer) -> Host {
    std::fs::create_dir(lab.path("repository")).unwrap();
    let host = Host::start(
        lab,
        &HostOptions {
            name: "a",
            repository: format!("file://{}", lab.path("repository").display()),
            peers: vec![],
            sections: MySqlServer::clone_section() + &source.instance_section("orders"),
            listen_port: free_port(),
            clone_bin_dir: &bin_dir(),
        },
    );
    host.keiki_ok(&["repository", "init"]);
    wait_until_state(&host, "orders", "archiving");
    host
}

/// Asks a clone as its agent does.
async fn ask_clone(lab: &Lab, name: &str, sql: &str) -> Rows {
    let data_dir = lab.path("clones-a").join(name);
    let clone = CloneAt { run_dir: data_dir.with_extension("run"), data_dir, port: 0 };
    Session::open(&endpoint_of(&clone)).await.unwrap().query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
}

#[tokio::test]
async fn a_clone_of_a_replica_replicates_nothing_and_the_events_of_the_source_wait_in_it() {
    let lab = Lab::new();
    let source = MySqlServer::start(&[]).await;
    for sql in [
        "CREATE DATABASE shop",
        "CREATE TABLE shop.ledger (id INT PRIMARY KEY, note VARCHAR(20))",
        "CREATE TABLE shop.ticks (id INT AUTO_INCREMENT PRIMARY KEY, at DATETIME(6))",
        "CHANGE REPLICATION SOURCE TO SOURCE_HOST = 'primary.invalid', SOURCE_USER = 'repl', SOURCE_PORT = 9",
        "CHANGE REPLICATION SOURCE TO SOURCE_HOST = 'other.invalid', SOURCE_USER = 'repl' FOR CHANNEL 'far'",
        "CREATE EVENT shop.tick ON SCHEDULE EVERY 1 SECOND DO INSERT INTO shop.ticks (at) VALUES (NOW(6))",
        "INSERT INTO shop.ledger VALUES (1, 'before')",
    ] {
        source.sql(sql).await;
    }
    let host = host_of(&lab, &source);
    host.keiki_ok(&["backup", "create", "orders"]);
    source.sql("INSERT INTO shop.ledger VALUES (2, 'behind')").await;
    // An event that is made while the log is replayed.
    source
        .sql("CREATE EVENT shop.late ON SCHEDULE EVERY 1 SECOND DO INSERT INTO shop.ticks (at) VALUES (NOW(6))")
        .await;
    let port = free_port().to_string();
    host.keiki_ok(&["clone", "orders", "--as", "copy", "--port", &port]);
    let job = host.json(&["job", "list"]);
    let job = job.as_array().unwrap().iter().find(|job| job["task"]["kind"] == "clone").unwrap().clone();
    let said = job["results"].to_string();
    for part in [
        "2 channel(s) to sources removed, with their relay logs",
        "2 enabled (shop.late, shop.tick) and the scheduler off",
    ] {
        assert!(said.contains(part), "'{part}' is not in {said}");
    }
    wait_until_state(&host, "copy", "archiving");
    let rows = ask_clone(&lab, "copy", "SELECT COUNT(*) AS rows_there FROM shop.ledger").await;
    assert_eq!(rows.first("rows_there"), Some("2"));
    assert_eq!(ask_clone(&lab, "copy", "SHOW REPLICA STATUS").await.rows.len(), 0);
    let answer = ask_clone(&lab, "copy", "SELECT @@GLOBAL.event_scheduler AS on_off").await;
    assert_eq!(answer.first("on_off"), Some("OFF"));
    // The source's events go on, those of the clone do not.
    let ticks = "SELECT COUNT(*) AS ticks FROM shop.ticks";
    let count = |rows: Rows| rows.first("ticks").unwrap().parse::<u64>().unwrap();
    let (in_source, in_clone) = (count(source.sql(ticks).await), count(ask_clone(&lab, "copy", ticks).await));
    let began = std::time::Instant::now();
    while count(source.sql(ticks).await) <= in_source + 1 {
        assert!(began.elapsed() < Duration::from_secs(60), "the source's event does not run");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(count(ask_clone(&lab, "copy", ticks).await), in_clone);
    assert_eq!(source.sql("SHOW REPLICA STATUS").await.rows.len(), 2, "the source keeps its channels");
}

#[tokio::test]
async fn a_row_that_came_with_no_copy_stops_the_replay_and_the_error_says_which_clones_can_be_made() {
    let lab = Lab::new();
    let source = MySqlServer::start(&["--event-scheduler=OFF"]).await;
    for sql in [
        "CREATE DATABASE shop",
        "CREATE TABLE shop.kept (id INT PRIMARY KEY)",
        "CREATE TABLE shop.seats (id INT PRIMARY KEY, taken INT) ENGINE = MEMORY",
        "INSERT INTO shop.kept VALUES (1)",
        "INSERT INTO shop.seats VALUES (1, 0)",
    ] {
        source.sql(sql).await;
    }
    let host = host_of(&lab, &source);
    host.keiki_ok(&["backup", "create", "orders"]);
    source.sql("UPDATE shop.seats SET taken = 1").await;
    let wanted = source.sql("SELECT @@GLOBAL.gtid_executed AS state").await.first("state").unwrap().to_string();
    wait_for("the update to be shipped", Duration::from_secs(60), || {
        host.keiki(&["window", "orders"]).status.success() && host.instance("orders")["backlog_bytes"] == 0
    });
    let port = free_port().to_string();
    let refused = host.keiki(&["clone", "orders", "--as", "copy", "--port", &port]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned() + &String::from_utf8_lossy(&refused.stdout);
    assert!(!refused.status.success(), "{said}");
    for part in [
        "not InnoDB, so a clone has them without their rows: shop.seats",
        "the server stopped applying the log",
        "tables that are not InnoDB come without rows; clone to the backup",
    ] {
        assert!(said.contains(part), "'{part}' is not in {said}\n{wanted}");
    }
    host.keiki(&["discard", "copy", "--yes"]);
    let id = host.json(&["backup", "list", "orders"])[0]["id"].as_str().unwrap().to_string();
    host.keiki_ok(&["clone", "orders", "--as", "copy", "--port", &port, "--backup", &id]);
    let rows = ask_clone(&lab, "copy", "SELECT COUNT(*) AS rows_there FROM shop.kept").await;
    assert_eq!(rows.first("rows_there"), Some("1"));
}
