//! Clean-up, the clone's own settings, and the way out of quarantine.

use super::*;

async fn a_clone_becomes_a_server_of_its_own(version: Version) {
    let mut source = Source::start(
        version,
        &[("work_mem", "7MB"), ("archive_mode", "on"), ("archive_command", "false"), ("synchronous_standby_names", "")],
    );
    source.commit_rows(1, 10);
    source.server.sql("CREATE DATABASE shop");
    source.server.sql_in(
        "shop",
        "CREATE SUBSCRIPTION \"Sub 1\" CONNECTION 'host=db9 dbname=x password=secret' PUBLICATION p WITH (connect = false); \
         CREATE EXTENSION IF NOT EXISTS plpgsql",
    );
    source.back_up();
    source.server.sql("SELECT pg_create_physical_replication_slot('standby', true)");
    source.commit_rows(11, 20);
    source.archive_log();
    let mut clone = Clone::stage(&source).await;
    clone.site.settings.insert(String::from("work_mem"), String::from("9MB"));
    // A locale that only the source's host has.
    clone.site.facts.insert(String::from("setting.lc_messages"), String::from("xx_XX.UTF-8"));
    assert!(
        clone.cloner.check_target(&clone.site, &Target::Latest).await.unwrap().iter().all(|item| item.hint.is_none())
    );
    clone.recover(&source, Target::Latest).await.unwrap();
    clone.sql(&source, "SELECT pg_create_physical_replication_slot('left_over')").await;

    // The server of the quarantine died meanwhile: it is started again, as what it is.
    stop_now(&clone.site.data_dir).await.unwrap();
    let items = clone.cloner.clean_up(&clone.site).await.unwrap();
    let done = |what: &str| items.iter().find(|item| item.what.contains(what)).map_or("", |item| item.done.as_str());
    assert_eq!(done("slot 'left_over'"), "dropped");
    assert!(done("subscription 'Sub 1'").contains("cut off from slot"), "{items:?}");
    assert!(done("setting 'archive_command'").contains("false"), "{items:?}");
    assert!(done("setting 'lc_messages'").contains("left out"), "{items:?}");
    assert!(done("log of the parent").contains("marked as archived"), "{items:?}");
    assert!(items.iter().all(|item| !format!("{item:?}").contains("secret")));
    let subscription = "SELECT subenabled, subslotname IS NULL FROM pg_subscription";
    assert_eq!(clone.sql(&source, subscription).await, "f|t");
    let again = clone.cloner.clean_up(&clone.site).await.unwrap();
    assert!(again.iter().all(|item| item.what.starts_with("setting")), "{again:?}");

    // What was replayed without fsync must not be handed over after a restart of the machine.
    let state = clone.site.run_dir.join("keiki_recovery.state");
    let text = std::fs::read_to_string(&state).unwrap();
    std::fs::write(&state, text.replacen("boot_id=", "boot_id=another-", 1)).unwrap();
    refused(clone.cloner.hand_over(&clone.site, true).await, Kind::Damaged);
    std::fs::write(&state, text).unwrap();

    let identity = clone.cloner.hand_over(&clone.site, true).await.unwrap();
    assert_eq!(identity.system_id, source.server.sql("SELECT system_identifier FROM pg_control_system()"));
    assert!(clone.cloner.is_running(&clone.site.data_dir));
    assert_eq!(clone.ledger(&source).await, rows(20));
    for (name, value) in [("work_mem", "9MB"), ("archive_mode", "on"), ("archive_command", "true"), ("fsync", "off")] {
        assert_eq!(clone.sql(&source, &format!("SHOW {name}")).await, value, "{name}");
    }
    assert_eq!(clone.sql(&source, "SHOW port").await, clone.site.port.to_string());
    assert_eq!(clone.sql(&source, "SHOW listen_addresses").await, "127.0.0.1");
    clone.sql(&source, "SELECT pg_switch_wal()").await;
    wait_until("the clone archives its own timeline", || {
        let done = names_in(&clone.site.data_dir.join("pg_wal/archive_status"));
        done.iter().any(|name| name.starts_with("00000002") && name.ends_with(".done")).then_some(())
    });
    clone.cloner.stop(&clone.site).await.unwrap();
    assert!(!clone.cloner.is_running(&clone.site.data_dir));
    clone.cloner.stop(&clone.site).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_becomes_a_server_of_its_own_on_15() {
    a_clone_becomes_a_server_of_its_own(Version::V15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_becomes_a_server_of_its_own_on_18() {
    a_clone_becomes_a_server_of_its_own(Version::V18).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_misspelt_setting_and_a_missing_library_are_found_before_anything_is_written() {
    let mut source = Source::start(Version::V15, &[]);
    source.back_up();
    let mut clone = Clone::stage(&source).await;
    for (name, value) in [("wrok_mem", "1MB"), ("port", "5432"), ("shared_preload_libraries", "no_such_library")] {
        clone.site.settings = BTreeMap::from([(name.to_string(), value.to_string())]);
        let items = clone.cloner.check_target(&clone.site, &Target::Latest).await.unwrap();
        let failed: Vec<_> = items.iter().filter(|item| item.verdict == keiki::model::check::Verdict::Fail).collect();
        assert_eq!(failed.len(), 1, "{name}: {items:?}");
        assert!(failed[0].found.contains(name) || failed[0].found.contains(value), "{failed:?}");
    }
    clone.site.settings = BTreeMap::from([(String::from("work_mem"), String::from("a lot"))]);
    clone.recover(&source, Target::Latest).await.unwrap();
    let error = refused(clone.cloner.clean_up(&clone.site).await, Kind::BadInput);
    assert!(error.message().contains("work_mem"), "{error:?}");
}
