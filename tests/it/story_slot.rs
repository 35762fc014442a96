//! A stock server, `archive_mode` off, is shipped by a physical slot: nothing is restarted or set.

use super::support::hosts::wait_for;
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
        let held = format!("SELECT restart_lsn >= '{written}'::pg_lsn - 1048576 FROM pg_replication_slots");
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
    stage.assert_clone_is_exact(port);
    let slots = super::support::two_hosts::sql_at(&stage.source, port, SLOTS);
    assert!(!slots.contains("keiki_orders"), "the clone has its source's slot: {slots}");
    stage.b.keiki_ok(&["discard", "copy", "--yes"]);
    assert_eq!(stage.source.sql(SLOTS), "keiki_orders physical");
}
