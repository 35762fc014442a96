//! A stock server, `archive_mode` off, is shipped by a physical slot: nothing is restarted or set.

use std::fs;

use super::support::hosts::{Host, wait_for};
use super::support::two_hosts::{SOON, Ship, TwoHosts, Via};

const SLOTS: &str = "SELECT coalesce(string_agg(slot_name || ' ' || slot_type, ','), '') FROM pg_replication_slots";

#[test]
fn a_stock_server_is_shipped_by_a_slot_and_its_clone_is_exact() {
    let stage = TwoHosts::start(Ship::Slot, Via::Peer);
    assert_eq!(stage.source.sql("SHOW archive_mode"), "off");
    assert_eq!(stage.source.sql(SLOTS), "keiki_orders physical");
    stage.source.pgbench_initialise(1);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.sql("CREATE TABLE t AS SELECT i FROM generate_series(1, 100000) AS i");
    stage.source.sql("SELECT pg_switch_wal()");
    stage.source.sql("INSERT INTO t VALUES (-1)");
    stage.wait_until_shipped();
    let window = stage.a.json(&["window", "orders"]);
    assert_eq!(window["holes"].as_array().unwrap().len(), 0, "{window:#}");
    stage.assert_latest_is_exact("copy");

    // The slot moves on, so that the server can forget what is in the repository.
    stage.source.sql("SELECT pg_switch_wal()");
    stage.source.sql("INSERT INTO t VALUES (-2)");
    let written = stage.source.sql("SELECT pg_current_wal_lsn()");
    wait_for("the slot to be advanced", SOON, || {
        let held = format!("SELECT pg_wal_lsn_diff('{written}', restart_lsn) <= 1048576 FROM pg_replication_slots");
        stage.source.sql(&held) == "t"
    });
    assert_eq!(stage.source.sql("SHOW archive_mode"), "off");
}

#[test]
fn a_clone_does_not_inherit_the_slot_of_its_source() {
    let stage = TwoHosts::start(Ship::Slot, Via::Directory);
    stage.source.sql("CREATE TABLE t AS SELECT 1 AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let port = super::support::hosts::free_port();
    stage.a.keiki_ok(&["clone", "orders", "--to", "b", "--as", "copy", "--port", &port.to_string(), "--latest"]);
    stage.assert_clone_is_exact(&stage.clone_at("copy", port));
    let slots = super::support::two_hosts::sql_at(&stage.source, port, SLOTS);
    assert!(!slots.contains("keiki_orders"), "the clone has its source's slot: {slots}");
    stage.b.keiki_ok(&["discard", "copy", "--yes"]);
    assert_eq!(stage.source.sql(SLOTS), "keiki_orders physical");
}

/// Changes the configuration of a host.
fn edit(host: &Host, change: impl FnOnce(String) -> String) {
    let text = fs::read_to_string(&host.config).unwrap();
    fs::write(&host.config, change(text)).unwrap();
}

fn without_instances(text: String) -> String {
    text.split_once("[[instance]]").expect("an instance").0.to_string()
}

fn wait_for_slots(stage: &TwoHosts, wanted: &str) {
    wait_for(&format!("the slots to be '{wanted}'"), SOON, || stage.source.sql(SLOTS) == wanted);
}

#[test]
fn an_instance_that_leaves_the_configuration_leaves_no_slot_behind() {
    let mut stage = TwoHosts::start(Ship::Slot, Via::Directory);
    let whole = fs::read_to_string(&stage.a.config).unwrap();
    let reload = |stage: &TwoHosts| {
        let process = nix::unistd::Pid::from_raw(stage.a.agent_process_id() as i32);
        nix::sys::signal::kill(process, nix::sys::signal::SIGHUP).unwrap();
    };
    assert_eq!(stage.source.sql(SLOTS), "keiki_orders physical");

    // By a reload.
    edit(&stage.a, without_instances);
    reload(&stage);
    wait_for_slots(&stage, "");
    assert!(stage.a.instance("orders").is_null());
    // It comes back, by a reload as well, and goes on in the same archive.
    edit(&stage.a, |_| whole.clone());
    reload(&stage);
    wait_for_slots(&stage, "keiki_orders physical");
    stage.wait_until_shipped();
    assert_eq!(fs::read_dir(stage.repository.join("incarnations")).unwrap().count(), 1);

    // By a restart; the server is down at first.
    stage.a.stop_agent();
    stage.source.kill9();
    edit(&stage.a, without_instances);
    stage.a.start_agent();
    wait_for("the agent to say what it cannot do", SOON, || {
        stage.a.log().contains("cannot give back the slot of 'orders'")
    });
    stage.source.launch();
    wait_for_slots(&stage, "");

    // With a configuration that is wrong everything stays as it is.
    edit(&stage.a, |_| whole.clone());
    reload(&stage);
    wait_for_slots(&stage, "keiki_orders physical");
    edit(&stage.a, |_| "[host]\n".to_string());
    reload(&stage);
    wait_for("the mistake to be told", SOON, || stage.a.log().contains("the old configuration stays"));
    assert_eq!(stage.source.sql(SLOTS), "keiki_orders physical");
}

#[test]
fn a_slot_that_holds_too_much_is_told_long_before_and_then_given_up_and_the_hole_is_shown() {
    let mut stage = TwoHosts::start(Ship::Slot, Via::Directory);
    stage.source.sql("CREATE TABLE t (i int, filler text)");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.wait_until_shipped();
    stage.a.stop_agent();
    edit(&stage.a, |text| text.replace("ship = \"slot\"", "ship = \"slot\"\nslot_limit = \"16MiB\""));
    stage.a.start_agent();
    stage.wait_until_shipped();
    let held =
        "SELECT coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)), 0)::int8 FROM pg_replication_slots";
    let fill = || {
        stage.source.sql("INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series(1, 4000) AS i");
        stage.source.sql("SELECT pg_switch_wal()");
    };

    // The repository is away: the server must keep everything, and does, up to the limit.
    let aside = stage.lab.path("aside");
    fs::rename(&stage.repository, &aside).unwrap();
    while stage.source.sql(held).parse::<u64>().unwrap() < 10 << 20 {
        fill();
    }
    wait_for("the warning", SOON, || stage.a.log().contains("at 16.0 MiB it will be dropped"));
    assert_eq!(stage.source.sql(SLOTS), "keiki_orders physical", "it was given up too early");
    assert!(stage.a.instance("orders")["backlog_bytes"].as_u64().unwrap() > 0);
    // The limit also holds for an agent that was restarted meanwhile and has never seen the repository.
    stage.a.stop_agent();
    while stage.source.sql(held).parse::<u64>().unwrap() < 20 << 20 {
        fill();
    }
    assert_eq!(stage.source.sql(SLOTS), "keiki_orders physical");
    stage.a.start_agent();
    wait_for_slots(&stage, "");
    assert!(stage.a.log().contains("more than its limit of 16.0 MiB"), "{}", stage.a.log());
    // Now the server forgets what nobody holds.
    fill();
    stage.source.sql("CHECKPOINT");
    fill();
    stage.source.sql("CHECKPOINT");
    fs::rename(&aside, &stage.repository).unwrap();
    stage.wait_until_shipped();
    let window = stage.a.json(&["window", "orders"]);
    assert_eq!(window["holes"].as_array().unwrap().len(), 1, "{window:#}\n{}", stage.a.log());
    // What lies behind the hole needs a backup of its own, and then all is well.
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.wait_until_shipped();
    stage.assert_latest_is_exact("copy");
}
