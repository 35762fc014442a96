//! The ledger story on a real MariaDB server: see `support::sql_ledger`.

use std::time::Duration;

use super::support::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use super::support::mariadb::MariaServer;
use super::support::postgres::server_user;
use super::support::sql_ledger::{self, BULK_ROWS, Product};

#[test]
fn story_mariadb_every_row_is_there_exactly_if_it_was_committed_by_then() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (passed, failures) = runtime.block_on(story());
    println!("{passed} passed, {} failed", failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

async fn story() -> (usize, Vec<String>) {
    let lab = Lab::new();
    let repository = lab.path("repository");
    std::fs::create_dir(&repository).unwrap();
    let source = MariaServer::start(&[]);
    let user = server_user().name;
    let (port_a, port_b) = (free_port(), free_port());
    let instance = format!(
        "[[instance]]\nname = \"orders\"\nengine = \"mariadb\"\ndata_dir = \"{}\"\nsocket = \"{}\"\nrun_as = \"{user}\"\n\
         ship_every = \"1s\"\n",
        source.data_dir.display(),
        source.socket.display(),
    );
    let clones = format!("[clone.mariadb]\nrun_as = \"{user}\"\n");
    let options = |name, url, peers, sections, listen_port| HostOptions {
        name,
        repository: url,
        peers,
        sections,
        listen_port,
        clone_bin_dir: std::path::Path::new("/usr/bin"),
    };
    let url = format!("file://{}", repository.display());
    let a = Host::start(&lab, &options("a", url, vec![("b", port_b)], format!("{clones}{instance}"), port_a));
    a.keiki_ok(&["repository", "init"]);
    // The target has no access of its own: it reads and writes the repository through host a.
    let b = Host::start(&lab, &options("b", "peer://a".to_string(), vec![("a", port_a)], clones, port_b));
    wait_for("archiving to begin", Duration::from_secs(60), || a.instance("orders")["state"] == "archiving");

    sql_ledger::run(&lab, &a, &b, &source.endpoint(), &product()).await
}

fn product() -> Product {
    Product {
        last_gtid: "SELECT @@last_gtid",
        log_end: "SHOW MASTER STATUS",
        log_state: "SELECT @@gtid_binlog_pos",
        bulk: format!("INSERT INTO shop.bulk SELECT seq, REPEAT(MD5(seq), 31) FROM shop.seq_1_to_{BULK_ROWS}"),
        has_whole_seconds: true,
    }
}
