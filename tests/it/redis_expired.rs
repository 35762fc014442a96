//! Keys that had a time to live at the target and have expired since: `--keep-expired` shows them, without it they are
//! gone.

use std::time::Duration;

use super::support::hosts::wait_for;
use super::support::redis::{Answer, Client, Product, TestRedis};
use super::support::redis_stage::RedisStage;
use super::support::two_hosts::{SOON, wait_until_state};

fn get(client: &mut Client, key: &str) -> Answer {
    client.ask(&[b"GET", key.as_bytes()])
}

#[test]
fn keys_that_expired_since_the_target_are_kept_by_redis_7_if_that_was_ordered_and_gone_if_not() {
    keep_and_lose(Product::Redis7);
}

#[test]
fn keys_that_expired_since_the_target_are_kept_by_redis_8_if_that_was_ordered_and_gone_if_not() {
    keep_and_lose(Product::Redis8);
}

#[test]
fn keys_that_expired_since_the_target_are_kept_by_valkey_8_if_that_was_ordered_and_gone_if_not() {
    keep_and_lose(Product::Valkey8);
}

#[test]
fn keys_that_expired_since_the_target_are_kept_by_valkey_9_if_that_was_ordered_and_gone_if_not() {
    keep_and_lose(Product::Valkey9);
}

fn keep_and_lose(product: Product) {
    // The base of the append-only file is a snapshot, or with this commands like the rest of it.
    let preamble = if product == Product::Valkey8 { "no" } else { "yes" };
    let stage = RedisStage::start(TestRedis::start_of(product, &[("aof-use-rdb-preamble", preamble)]), "");
    let has_field_times = matches!(product, Product::Redis8 | Product::Valkey9);
    let source = &stage.source;
    // One in the base, one in the log, one in another database, one in a transaction.
    source.run(&["SET", "in-base", "1", "PX", "4000"]);
    source.run(&["SET", "gone-before", "1", "PX", "1"]);
    source.rewrite();
    stage.a.keiki_ok(&["backup", "create", "cart"]);
    let mut client = source.client();
    client.run(&["SET", "in-log", "2", "PX", "2000"]);
    client.run(&["SET", "for-long", "3", "EX", "100000"]);
    client.run(&["SET", "for-ever", "4"]);
    client.run(&["MULTI"]);
    client.run(&["HSET", "hash", "f", "5"]);
    client.run(&["PEXPIRE", "hash", "2000"]);
    client.run(&["EXEC"]);
    if has_field_times {
        client.run(&["HSET", "hash", "short", "7", "long", "8"]);
        client.run(&["HPEXPIRE", "hash", "2000", "FIELDS", "1", "short"]);
        client.run(&["HEXPIRE", "hash", "100000", "FIELDS", "1", "long"]);
    }
    client.run(&["SELECT", "3"]);
    client.run(&["SET", "elsewhere", "6", "PX", "2000"]);
    client.run(&["SELECT", "0"]);
    client.run(&["SET", "deleted", "7", "PX", "2000"]);
    client.run(&["DEL", "deleted"]);
    // The target is a whole second in which nothing has expired yet; the clones are made when all has.
    let target = jiff::Timestamp::now().as_second() + 1;
    let wait_until = |second: i64| {
        while jiff::Timestamp::now().as_second() < second {
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait_until(target);
    client.run(&["SET", "after", "8"]);
    wait_until(target + 5);
    let at = jiff::Timestamp::from_second(target).unwrap().to_string();

    stage.a.keiki_ok(&["clone", "cart", "--to", "b", "--as", "past", "--at", &at, "--keep-expired"]);
    wait_until_state(&stage.b, "past", "archiving");
    let mut past = stage.client_of("past");
    for (key, value) in [("in-base", "1"), ("in-log", "2"), ("for-long", "3"), ("for-ever", "4")] {
        assert_eq!(get(&mut past, key), Answer::text(value), "{key}");
        assert_eq!(past.ask(&[b"TTL", key.as_bytes()]), Answer::Number(-1), "{key}");
    }
    assert_eq!(past.ask(&[b"HGET", b"hash", b"f"]), Answer::text("5"));
    if has_field_times {
        // Redis hides such fields even while it loads; the report says so.
        let short = if product == Product::Valkey9 { Answer::text("7") } else { Answer::Nothing };
        assert_eq!(past.ask(&[b"HGET", b"hash", b"short"]), short);
        assert_eq!(past.ask(&[b"HGET", b"hash", b"long"]), Answer::text("8"));
        assert_eq!(past.ask(&[b"HTTL", b"hash", b"FIELDS", b"1", b"long"]), Answer::List(vec![Answer::Number(-1)]));
    }
    for key in ["gone-before", "deleted", "after"] {
        assert_eq!(get(&mut past, key), Answer::Nothing, "{key}");
    }
    // Nothing of ours is left among the keys.
    assert_eq!(past.ask(&[b"DBSIZE"]), Answer::Number(5));
    past.run(&["SELECT", "3"]);
    assert_eq!(get(&mut past, "elsewhere"), Answer::text("6"));
    let jobs = stage.b.json(&["job", "list"]);
    let report = jobs.as_array().unwrap().iter().find(|job| job["task"]["name"] == "past").unwrap();
    let said = report["results"].to_string();
    assert!(
        said.contains("5 keys that had a time to live are kept without one; 4 of them have expired since"),
        "{said}"
    );
    assert_eq!(report["task"]["keep_expired"], true);
    assert_eq!(said.contains("1 expired fields of hashes are gone"), product == Product::Redis8, "{said}");
    assert_eq!(said.contains("so are 2 fields of hashes"), product == Product::Valkey9, "{said}");

    // A backup of that clone, and a clone of it without the flag, still have them: they are ordinary keys now.
    wait_for("the first backup of the clone", SOON, || !stage.b.json(&["backup", "list", "past"])[0].is_null());
    stage.b.keiki_ok(&["clone", "past", "--as", "again", "--latest"]);
    wait_until_state(&stage.b, "again", "archiving");
    let mut again = stage.client_of("again");
    assert_eq!(get(&mut again, "in-log"), Answer::text("2"));
    assert_eq!(again.ask(&[b"DBSIZE"]), Answer::Number(5));

    stage.a.keiki_ok(&["clone", "cart", "--to", "b", "--as", "plain", "--at", &at]);
    wait_until_state(&stage.b, "plain", "archiving");
    let mut plain = stage.client_of("plain");
    for key in ["in-base", "in-log", "hash"] {
        assert_eq!(plain.ask(&[b"EXISTS", key.as_bytes()]), Answer::Number(0), "{key}");
    }
    assert_eq!(get(&mut plain, "for-long"), Answer::text("3"));
    assert!(plain.ask(&[b"TTL", b"for-long"]).number() > 90_000);
    for name in ["again", "past", "plain"] {
        stage.b.keiki_ok(&["discard", name, "--yes"]);
    }
}
