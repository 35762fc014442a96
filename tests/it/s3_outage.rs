//! What an unreachable, slow, lying or broken S3 server does to shipping and to restoring: nothing that lasts.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::support::hosts::{Host, free_port, tail, wait_for};
use super::support::s3::{Weed, fresh_prefix};
use super::support::s3_proxy::{Proxy, Weather};
use super::support::two_hosts::{Ship, TwoHosts, Via};

/// Added to the section of the repository, so that nobody waits long for a server that hangs.
const SHORT_TIMEOUT: &str = "\ntimeout = \"2s\"";

/// What an agent may need in all, whatever waits for the server to come back.
const RESIDENT_KIB_MAX: u64 = 400 << 10;

fn status(host: &Host) -> Value {
    let output = host.keiki(&["--json", "status"]);
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

fn resident_kib(process: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Goal: whatever is wrong with the server while PostgreSQL writes, everything is there when it is over, and until then
/// somebody who looks is told what is wrong and how much waits.
#[test]
fn an_outage_of_any_kind_loses_nothing_and_is_told() {
    // Side by side, because most of the time is that of agents which wait before they try again.
    std::thread::scope(|scope| {
        let quick = [Weather::Refuse, Weather::Cut(20_000), Weather::FlipUp(10_000)];
        scope.spawn(move || live_through(&quick));
        scope.spawn(|| live_through(&[Weather::SlowDown]));
        scope.spawn(|| live_through(&[Weather::Hang]));
    });
}

/// One outage after the other for one pair of hosts, with a server of its own.
fn live_through(weathers: &[Weather]) {
    let mut weed = Weed::start();
    let proxy = Proxy::start(weed.port());
    let lines = weed.repository_lines_at(&proxy.endpoint(), &fresh_prefix()) + SHORT_TIMEOUT;
    let stage = TwoHosts::start_on(Ship::ArchiveCommand, Via::Directory, &lines);
    stage.source.sql("CREATE TABLE t (i int, filler text)");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    for weather in weathers {
        stage.wait_until_shipped();
        outage(&stage, &mut weed, &proxy, *weather);
    }
    stage.source.sql("SELECT pg_switch_wal()");
    stage.wait_until_shipped();
    if weathers.contains(&Weather::SlowDown) {
        let log = stage.a.log();
        assert!(log.contains("SlowDown") || log.contains("fewer requests"), "{}", tail(&log, 60));
    }
    let window: Value = stage.a.json(&["window", "orders"]);
    assert_eq!(window["holes"].as_array().map(Vec::len), Some(0), "{window:#}");
    stage.assert_latest_is_exact("after-the-outages");
    assert!(status(&stage.a)["repository_error"].is_null());
}

/// Writes before and during an outage, looks at what is said of it, and ends it.
fn outage(stage: &TwoHosts, weed: &mut Weed, proxy: &Proxy, weather: Weather) {
    let rows = "INSERT INTO t SELECT i, md5(i::text) || md5((i + 1)::text) FROM generate_series(1, 20000) i";
    let struck = proxy.struck();
    proxy.set(weather);
    if weather == Weather::Refuse {
        weed.stop();
    }
    stage.source.sql(rows);
    stage.source.sql("SELECT pg_switch_wal()");
    wait_for(&format!("the outage '{weather:?}' to be told"), Duration::from_secs(120), || {
        let known = stage.a.instance("orders");
        known["backlog_bytes"].as_u64().is_some_and(|bytes| bytes > 100_000) && !known["problem"].is_null()
    });
    let problem = stage.a.instance("orders")["problem"].to_string();
    assert!(problem.contains("s3://keiki/"), "{weather:?}: {problem}");
    // A person who asks is answered soon, also while the server hangs.
    let asked = Instant::now();
    let text = stage.a.keiki(&["status"]);
    assert!(asked.elapsed() < Duration::from_secs(15), "{:?}", asked.elapsed());
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("retrying") && text.contains("iB, "), "{weather:?}: {text}");
    assert!(weather == Weather::Refuse || proxy.struck() > struck, "{weather:?} did no harm");
    stage.source.sql(rows);
    let resident = resident_kib(stage.a.agent_process_id());
    assert!(resident < RESIDENT_KIB_MAX, "{weather:?}: {resident} KiB");
    if weather == Weather::Refuse {
        weed.start_again();
    }
    proxy.set(Weather::Fine);
}

/// Goal: a restore either succeeds or ends with an error that names the object; it never hands over something else.
#[test]
fn a_restore_through_a_bad_network_is_exact_or_names_what_it_could_not_read() {
    let weed = Weed::shared();
    let prefix = fresh_prefix();
    let proxy = Proxy::start(weed.port());
    let lines = weed.repository_lines(&prefix) + SHORT_TIMEOUT;
    let mut stage = TwoHosts::start_on(Ship::Slot, Via::Directory, &lines);
    stage.b.rewrite_config(|text| text.replace(&weed.endpoint(), &proxy.endpoint()));
    stage.b.stop_agent();
    stage.b.start_agent();
    stage.source.sql("CREATE TABLE t AS SELECT i, md5(i::text) AS m FROM generate_series(1, 30000) i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.wait_until_shipped();

    // Bodies that break go on where they broke, and a server that asks for a pause gets it.
    proxy.set(Weather::Cut(150_000));
    proxy.slow_down_next(5);
    let struck = proxy.struck();
    stage.assert_latest_is_exact("through-cuts");
    assert!(proxy.struck() > struck, "nothing was cut");

    let lasting = [
        (Weather::FlipDown(30_000), "wrong-bytes"),
        (Weather::SlowDown, "slow-down"),
        (Weather::Hang, "hanging"),
        (Weather::Refuse, "gone"),
    ];
    for (weather, name) in lasting {
        proxy.set(weather);
        let port = free_port().to_string();
        let said = stage.a.keiki_fails(&["clone", "orders", "--to", "b", "--as", name, "--port", &port, "--latest"]);
        assert!(said.contains("s3://keiki/") || said.contains("object '"), "{weather:?}: {said}");
        proxy.set(Weather::Fine);
        stage.b.keiki(&["discard", name, "--yes"]);
        assert!(!stage.clone_dir(name).join("global/pg_control").exists(), "{weather:?} left something to be started");
    }
    stage.assert_latest_is_exact("in-fine-weather");
}
