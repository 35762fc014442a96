//! The ledger story on a real MySQL server: see `support::sql_ledger`.

use std::time::Duration;

use super::support::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use super::support::mysql::{MySqlServer, bin_dir, program};
use super::support::sql_ledger::{self, BULK_ROWS, Product, Rival};

#[test]
fn story_mysql_every_row_is_there_exactly_if_it_was_committed_by_then() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (passed, failures) = runtime.block_on(story());
    println!("{passed} passed, {} failed", failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

async fn story() -> (usize, Vec<String>) {
    let lab = Lab::new();
    let repository = lab.path("repository");
    std::fs::create_dir(&repository).unwrap();
    let source = MySqlServer::start(&[]).await;
    let (port_a, port_b) = (free_port(), free_port());
    let (instance, clones, clone_bin_dir) =
        (source.instance_section("orders"), MySqlServer::clone_section(), bin_dir());
    let options = |name, url, peers, sections, listen_port| HostOptions {
        name,
        repository: url,
        peers,
        sections,
        listen_port,
        clone_bin_dir: &clone_bin_dir,
    };
    let url = format!("file://{}", repository.display());
    let a = Host::start(&lab, &options("a", url, vec![("b", port_b)], format!("{clones}{instance}"), port_a));
    a.keiki_ok(&["repository", "init"]);
    // The target has no access of its own: it reads and writes the repository through host a.
    let b = Host::start(&lab, &options("b", "peer://a".to_string(), vec![("a", port_a)], clones, port_b));
    wait_for("archiving to begin", Duration::from_secs(60), || a.instance("orders")["state"] == "archiving");

    let rival = Rival {
        log_reader: program("mysqlbinlog"),
        client: program("mysql"),
        client_arguments: vec!["--max-allowed-packet=1G"],
        source_data_dir: source.data_dir.clone(),
        log_base: "binlog".to_string(),
        // The large transaction comes as few statements.
        preparation: vec!["SET GLOBAL innodb_flush_log_at_trx_commit = 0", "SET GLOBAL max_allowed_packet = 1 << 30"],
    };
    sql_ledger::run(&lab, &a, &b, &source.endpoint(), &product(), &rival).await
}

fn product() -> Product {
    Product {
        last_gtid: "SELECT GTID FROM performance_schema.events_transactions_history WHERE THREAD_ID = \
                    PS_CURRENT_THREAD_ID() AND GTID LIKE '%:%' ORDER BY EVENT_ID DESC LIMIT 1",
        log_end: "SHOW BINARY LOG STATUS",
        log_state: "SELECT @@gtid_executed",
        // MySQL 9 has no MD5.
        bulk: format!(
            "INSERT INTO shop.bulk SELECT ROW_NUMBER() OVER (), REPEAT(SHA2(one.help_topic_id * 1000 + \
             other.help_keyword_id, 256), 16) FROM mysql.help_relation AS one JOIN mysql.help_relation AS other LIMIT {BULK_ROWS}"
        ),
        has_whole_seconds: false,
        times: 8,
    }
}
