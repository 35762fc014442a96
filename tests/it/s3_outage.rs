//! What an unreachable, slow, lying or broken S3 server does to shipping and to restoring: nothing that lasts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use keiki::format::layout::{self, LogPart};
use keiki::model::id::IncarnationId;
use keiki::store::read::list_all;
use keiki::store::s3::S3Options;
use serde_json::Value;

use super::support::hosts::{Host, free_port, tail, wait_for};
use super::support::s3::{Weed, fresh_prefix, open};
use super::support::s3_proxy::{Proxy, Weather};
use super::support::two_hosts::{Ship, TwoHosts, Via};

/// Added to the section of the repository, so that nobody waits long for a server that hangs.
const SHORT_TIMEOUT: &str = "\ntimeout = \"2s\"";

/// What an agent may need more while log waits for the server to come back, and how much waits then: it would be more than
/// that even after compression, which makes half of it.
const GROWTH_KIB_MAX: u64 = 48 << 10;
const FILLER_MIB: u64 = 128;

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
        scope.spawn(move || live_through(&quick, 0));
        scope.spawn(|| live_through(&[Weather::SlowDown], FILLER_MIB));
        scope.spawn(|| live_through(&[Weather::Hang], FILLER_MIB));
    });
}

/// One outage after the other for one pair of hosts, with a server of its own. So much log is written during each of them,
/// beside some rows.
fn live_through(weathers: &[Weather], filler_mib: u64) {
    let mut weed = Weed::start();
    let proxy = Proxy::start(weed.port());
    let prefix = fresh_prefix();
    let lines = weed.repository_lines_at(&proxy.endpoint(), &prefix) + SHORT_TIMEOUT;
    let mut stage = TwoHosts::start_on(Ship::ArchiveCommand, Via::Directory, &lines);
    stage.source.sql("CREATE TABLE t (i int, filler text)");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    // Memory that the backup needed would hide what an outage needs.
    stage.a.stop_agent();
    stage.a.start_agent();
    for weather in weathers {
        stage.wait_until_shipped();
        outage(&stage, &mut weed, &proxy, *weather, filler_mib);
    }
    for _ in 0..2 {
        stage.source.sql("INSERT INTO t VALUES (0, 'after')");
        stage.source.sql("SELECT pg_switch_wal()");
        stage.wait_until_shipped();
    }
    if weathers.contains(&Weather::SlowDown) {
        let log = stage.a.log();
        assert!(log.contains("SlowDown") || log.contains("fewer requests"), "{}", tail(&log, 60));
    }
    let window: Value = stage.a.json(&["window", "orders"]);
    assert_eq!(window["holes"].as_array().map(Vec::len), Some(0), "{window:#}");
    assert_no_duplicate(&stage, weed.options(&prefix));
    stage.assert_latest_is_exact("after-the-outages");
    assert!(status(&stage.a)["repository_error"].is_null());
}

/// Each log file but the last one, which is open, is one object, and no part of it is there beside.
fn assert_no_duplicate(stage: &TwoHosts, options: S3Options) {
    let incarnation = stage.a.instance("orders")["incarnation"].as_str().unwrap().to_string();
    let incarnation = IncarnationId::parse(&incarnation).unwrap();
    let list = async {
        let store = open(options).await;
        let mut files: BTreeMap<String, Vec<LogPart>> = BTreeMap::new();
        let mut pages = list_all(store.as_ref(), &layout::log_prefix(incarnation), None);
        while let Some(page) = pages.next().await {
            for object in page.unwrap() {
                let (file, part) = layout::parse_log_key(incarnation, object.key.as_str()).unwrap();
                files.entry(file.to_string()).or_default().push(part);
            }
        }
        files
    };
    let mut files = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(list);
    let (last, _) = files.pop_last().unwrap();
    assert!(files.len() > 10, "{files:?}");
    for (file, parts) in files {
        assert_eq!(parts, [LogPart::Sealed], "of '{file}', which is not the last one ('{last}')");
    }
}

/// Whether a text names, in quotes, an object of a repository, or all objects of one log file.
fn names_object(text: &str) -> bool {
    text.split('\'').filter(|word| word.starts_with("incarnations/")).any(|word| match word.strip_suffix('/') {
        Some(prefix) => prefix.contains("/log/") && prefix.split('/').count() >= 4,
        None => word.split('/').count() >= 3,
    })
}

/// Writes before and during an outage, looks at what is said of it, and ends it.
fn outage(stage: &TwoHosts, weed: &mut Weed, proxy: &Proxy, weather: Weather, filler_mib: u64) {
    let rows = "INSERT INTO t SELECT i, md5(i::text) || md5((i + 1)::text) FROM generate_series(1, 20000) i";
    let struck = proxy.struck();
    let log_before = stage.a.log().len();
    let resident_before = resident_kib(stage.a.agent_process_id());
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
    assert!(problem.contains("s3://keiki/") && names_object(&problem), "{weather:?}: {problem}");
    // A person who asks is answered soon, also while the server hangs.
    let asked = Instant::now();
    let text = stage.a.keiki(&["status"]);
    assert!(asked.elapsed() < Duration::from_secs(15), "{:?}", asked.elapsed());
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("retrying") && text.contains("iB, "), "{weather:?}: {text}");
    assert!(weather == Weather::Refuse || proxy.struck() > struck, "{weather:?} did no harm");
    // So is a person who reads the log.
    let said = |words: &str| {
        let log = stage.a.log();
        let is_said = |line: &&str| line.contains(words) && !line.contains("waiting: 0 B");
        log[log_before..].lines().find(is_said).map(str::to_string)
    };
    wait_for("the log to say what is wrong", Duration::from_secs(120), || said("is held up; waiting:").is_some());
    let line = said("is held up; waiting:").unwrap();
    assert!(line.contains("'orders'") && line.contains("iB, the oldest for ") && names_object(&line), "{line}");
    stage.source.sql(rows);
    wait_while_little_is_needed(stage, weather, filler_mib, resident_before);
    if weather == Weather::Refuse {
        weed.start_again();
    }
    proxy.set(Weather::Fine);
    stage.wait_until_shipped();
    assert!(stage.a.log()[log_before..].contains("shipping of 'orders' goes on"), "{}", tail(&stage.a.log(), 20));
}

/// Writes so much log and waits until the agent knows of it: it must not keep it in memory.
fn wait_while_little_is_needed(stage: &TwoHosts, weather: Weather, filler_mib: u64, resident_before: u64) {
    // Text that is not found again within what a compressor looks back at.
    let filler = "DO $$ DECLARE filler text; BEGIN \
        SELECT string_agg(md5(random()::text), '') INTO filler FROM generate_series(1, 131072); \
        FOR i IN 1..COUNT LOOP PERFORM pg_logical_emit_message(false, 'filler', filler); END LOOP; END $$";
    stage.source.sql(&filler.replace("COUNT", &(filler_mib / 4).to_string()));
    let mut resident = 0;
    wait_for(&format!("what waits in '{weather:?}' to be told"), Duration::from_secs(180), || {
        resident = resident.max(resident_kib(stage.a.agent_process_id()));
        stage.a.instance("orders")["backlog_bytes"].as_u64().is_some_and(|bytes| bytes >= filler_mib << 20)
    });
    let growth = resident.saturating_sub(resident_before);
    println!("{weather:?}: {resident_before} KiB before, {growth} KiB more with {filler_mib} MiB waiting");
    assert!(growth < GROWTH_KIB_MAX, "{weather:?}: {growth} KiB more than {resident_before}");
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
        // Where nothing is answered, the first question is a listing, whose prefix is named.
        let is_listing = weather != Weather::FlipDown(30_000) && said.contains("cannot list 'incarnations/");
        assert!(names_object(&said) || is_listing && said.contains("s3://keiki/"), "{weather:?}: {said}");
        proxy.set(Weather::Fine);
        stage.b.keiki(&["discard", name, "--yes"]);
        assert!(!stage.clone_dir(name).join("global/pg_control").exists(), "{weather:?} left something to be started");
    }
    stage.assert_latest_is_exact("in-fine-weather");
}
