//! The ledger story on real MariaDB servers: see `support::sql_ledger`.

use std::time::Duration;

use super::support::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use super::support::mariadb::{MariaServer, Release};
use super::support::sql_ledger::{self, BULK_ROWS, Product, Rival};

#[test]
fn story_mariadb_10_11_every_row_is_there_exactly_if_it_was_committed_by_then() {
    tell(Release::V10_11, &[], 8);
}

/// A large transaction becomes a log file of its own there.
#[test]
fn story_mariadb_11_8_every_row_is_there_exactly_if_it_was_committed_by_then() {
    tell(Release::V11_8, &["--binlog-large-commit-threshold=10M"], 2);
}

fn tell(release: Release, arguments: &[&str], times: usize) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (passed, failures) = runtime.block_on(story(release, arguments, times));
    println!("{passed} passed, {} failed", failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

async fn story(release: Release, arguments: &[&str], times: usize) -> (usize, Vec<String>) {
    let lab = Lab::new();
    let repository = lab.path("repository");
    std::fs::create_dir(&repository).unwrap();
    let source = MariaServer::start_release(release, arguments);
    let (port_a, port_b) = (free_port(), free_port());
    let bin_dir = release.bin_dir();
    let options = |name, url, peers, sections, listen_port| HostOptions {
        name,
        repository: url,
        peers,
        sections,
        listen_port,
        clone_bin_dir: &bin_dir,
    };
    let url = format!("file://{}", repository.display());
    let sections = source.clone_section() + &source.instance_section("orders", "ship_every = \"1s\"");
    let a = Host::start(&lab, &options("a", url, vec![("b", port_b)], sections, port_a));
    a.keiki_ok(&["repository", "init"]);
    // The target has no access of its own: it reads and writes the repository through host a.
    let b = Host::start(&lab, &options("b", "peer://a".into(), vec![("a", port_a)], source.clone_section(), port_b));
    wait_for("archiving to begin", Duration::from_secs(60), || a.instance("orders")["state"] == "archiving");

    let rival = Rival {
        // Of the newer release, because its programs are there wherever tests run.
        log_reader: Release::V11_8.program("mariadb-binlog"),
        client: Release::V11_8.program("mariadb"),
        // A socket of the older release offers none.
        client_arguments: vec!["--skip-ssl", "--max-allowed-packet=1G"],
        source_data_dir: source.data_dir.clone(),
        log_base: "binlog".to_string(),
        // The large transaction comes as one statement.
        preparation: vec!["SET GLOBAL innodb_flush_log_at_trx_commit = 0", "SET GLOBAL max_allowed_packet = 1 << 30"],
    };
    sql_ledger::run(&lab, &a, &b, &source.endpoint(), &product(times), &rival).await
}

fn product(times: usize) -> Product {
    Product {
        last_gtid: "SELECT @@last_gtid",
        log_end: "SHOW MASTER STATUS",
        log_state: "SELECT @@gtid_binlog_pos",
        bulk: format!("INSERT INTO shop.bulk SELECT seq, REPEAT(MD5(seq), 31) FROM shop.seq_1_to_{BULK_ROWS}"),
        has_whole_seconds: true,
        times,
    }
}
