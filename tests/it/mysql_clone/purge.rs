//! Binary logs that the server forgets once they are shipped, if the configuration says so, and not before.

use std::time::Duration;

use super::*;
use crate::support::hosts::{Host, HostOptions, Lab, wait_for};
use crate::support::mysql::{AGENT, MySqlServer};
use crate::support::two_hosts::{SOON, wait_until_shipped, wait_until_state};

async fn logs_of(session: &Session) -> Vec<String> {
    let rows = session.query("SHOW BINARY LOGS").await.unwrap().rows;
    rows.into_iter().map(|row| row[0].clone().unwrap()).collect()
}

async fn flush(session: &Session, times: u32) {
    for _ in 0..times {
        session.execute("FLUSH BINARY LOGS").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shipped_binary_logs_are_purged_if_the_configuration_says_so_and_clones_are_whole_all_the_same() {
    let lab = Lab::new();
    let repository = lab.path("repository");
    std::fs::create_dir(&repository).unwrap();
    let source = Source::start(&[]).await;
    let more = "ship_every = \"1s\"\npurge_shipped = true";
    let options = HostOptions {
        name: "a",
        repository: format!("file://{}", repository.display()),
        peers: Vec::new(),
        sections: source.server.clone_section() + &source.server.instance_section("orders", more),
        listen_port: free_port(),
        clone_bin_dir: Path::new("/usr/bin"),
    };
    let mut a = Host::start(&lab, &options);
    a.keiki_ok(&["repository", "init"]);
    wait_until_state(&a, "orders", "archiving");
    a.keiki_ok(&["backup", "create", "orders"]);
    source.commit_rows(1, 5).await;
    flush(&source.session, 11).await;
    source.commit_rows(6, 10).await;
    let only_the_open_one = async |session: &Session| {
        let mut logs = logs_of(session).await;
        let (began, mut flushed) = (std::time::Instant::now(), std::time::Instant::now());
        while logs.len() > 1 {
            // A server may keep a file that it ended a moment ago until the next one is ended.
            if flushed.elapsed() > Duration::from_secs(5) {
                flush(session, 1).await;
                flushed = std::time::Instant::now();
            }
            assert!(began.elapsed() < Duration::from_secs(120), "{logs:?} are left: {}", a.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
            logs = logs_of(session).await;
        }
        logs
    };
    assert!(only_the_open_one(&source.session).await[0].as_str() >= "binlog.000012");

    // What cannot be shipped stays.
    let away = lab.path("away");
    std::fs::rename(&repository, &away).unwrap();
    source.commit_rows(11, 15).await;
    flush(&source.session, 3).await;
    wait_for("status to say that nothing is shipped", SOON, || !a.instance("orders")["problem"].is_null());
    assert_eq!(logs_of(&source.session).await.len(), 4);
    std::fs::rename(&away, &repository).unwrap();
    assert!(only_the_open_one(&source.session).await[0].as_str() >= "binlog.000015");

    // An agent that sees only the rest of the log does not take what it purged itself for a hole.
    a.stop_agent();
    source.commit_rows(16, 20).await;
    flush(&source.session, 1).await;
    a.start_agent();
    wait_until_shipped(&a, "orders");
    assert!(a.instance("orders")["problem"].is_null(), "{:#}", a.instance("orders"));
    let port = free_port().to_string();
    a.keiki_ok(&["clone", "orders", "--as", "copy", "--latest", "--port", &port]);
    let run_dir = lab.path("clones-a").join("copy.run");
    let endpoint = Endpoint {
        socket: run_dir.join(SOCKET_FILE),
        user: ACCOUNT.to_string(),
        password: Some(read_password(&run_dir.join(PASSWORD_FILE)).unwrap()),
        run_as: source.server.user.name.clone(),
    };
    let clone = Session::open(&endpoint).await.unwrap();
    assert_eq!(clone.number("SELECT COUNT(*) FROM shop.ledger").await.unwrap(), 20);
    drop(clone);
    a.keiki_ok(&["discard", "copy", "--yes"]);
}

#[tokio::test]
async fn mysql_purges_what_is_shipped_and_says_which_right_that_takes() {
    let server = MySqlServer::start(&[]).await;
    let session = server.connect().await;
    flush(&session, 9).await;
    let before = logs_of(&session).await;
    let number = |name: &str| name.rsplit('.').next().unwrap().parse::<u64>().unwrap();
    let shipped = Position::File { number: number(&before[8]), offset: 0 };
    let mut config = server.source("billing");
    MySqlEngine::new(config.clone()).release_log(shipped).await.unwrap();
    assert_eq!(logs_of(&session).await, before);

    config.purge_shipped = true;
    let error = MySqlEngine::new(config.clone()).release_log(shipped).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Forbidden, "{error}");
    assert!(error.hint_text().unwrap().contains("GRANT BINLOG_ADMIN"), "{error}");
    assert_eq!(logs_of(&session).await, before);
    session.execute(&format!("GRANT BINLOG_ADMIN ON *.* TO {AGENT}@localhost")).await.unwrap();
    MySqlEngine::new(config).release_log(shipped).await.unwrap();
    assert_eq!(logs_of(&session).await, before[8..]);
}
