//! What is about the source itself stays behind, and the report says so item by item.

use super::*;

/// The source's option file: addresses, paths, and what a server does by itself.
fn option_file(logs: &Path) -> String {
    format!(
        "[mysqld]\nreport_host = db1.example\nreport_port = 3399\nbind_address = 192.0.2.7\ninit_connect = 'SET @seen = 1'\n\
         general_log = ON\ngeneral_log_file = {logs}/general\nslow_query_log = ON\nslow_query_log_file = {logs}/slow\n\
         event_scheduler = ON\nsql_mode = ANSI\nmax_connections = 77\n",
        logs = logs.display()
    )
}

#[tokio::test]
async fn what_is_about_the_source_itself_is_reported_and_is_not_in_the_clone() {
    let own_logs = tempfile::Builder::new().prefix("keiki-ml").tempdir().unwrap();
    std::fs::set_permissions(own_logs.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let cnf = own_logs.path().join("my.cnf");
    std::fs::write(&cnf, option_file(own_logs.path())).unwrap();
    std::fs::set_permissions(&cnf, PermissionsExt::from_mode(0o644)).unwrap();
    let mut source = Source::start(&[&format!("--defaults-file={}", cnf.display())]).await;
    for sql in [
        "CREATE EVENT shop.tick ON SCHEDULE EVERY 1 HOUR DO DELETE FROM shop.ledger",
        "CREATE SERVER far FOREIGN DATA WRAPPER mysql OPTIONS (HOST 'db9.example', DATABASE 'x')",
        "CHANGE MASTER TO MASTER_HOST = 'primary.example', MASTER_USER = 'repl'",
    ] {
        source.session.execute(sql).await.unwrap();
    }
    source.commit_rows(1, 5).await;
    source.back_up().await;
    source.commit_rows(6, 10).await;
    source.archive_log().await;
    let state = source.session.value("SELECT @@gtid_binlog_pos").await.unwrap().unwrap();

    // The file of settings is part of the backup, as it is.
    let kept = source.base.directory.join("keiki_config").join(cnf.strip_prefix("/").unwrap());
    assert_eq!(std::fs::read(&kept).unwrap(), std::fs::read(&cnf).unwrap());

    let clone = Clone::stage(&source).await;
    clone.recover(&source, Target::Latest).await.unwrap();
    let items = clone.cloner.clean_up(&clone.site).await.unwrap();
    let own = |name: &str| own_logs.path().join(name).display().to_string();
    for (what, wanted) in [
        ("replication", "none came with the copy"),
        ("events", "1 enabled (shop.tick) and the scheduler off"),
        ("server id", "a new one"),
        ("GTID", state.as_str()),
        ("account of the agent", "'keiki_agent'@'localhost'"),
        ("setting 'report_host'", "not taken over; it was 'db1.example'"),
        ("setting 'report_port'", "not taken over; it was '3399'"),
        ("setting 'bind_address'", "not taken over; it was '192.0.2.7'"),
        ("setting 'init_connect'", "not taken over; it was 'SET @seen = 1'"),
        ("setting 'general_log_file'", &own("general")),
        ("setting 'slow_query_log_file'", &own("slow")),
        ("foreign servers", "found and left: far"),
    ] {
        let item = items.iter().find(|item| item.what == what).unwrap_or_else(|| panic!("no '{what}' in {items:#?}"));
        assert!(item.done.contains(wanted), "'{what}' says '{}' and not '{wanted}'", item.done);
    }

    clone.cloner.hand_over(&clone.site, true).await.unwrap();
    let session = clone.session().await;
    for (sql, wanted) in [
        ("SELECT @@GLOBAL.report_host", None),
        ("SELECT @@GLOBAL.general_log", Some("0")),
        ("SELECT @@GLOBAL.slow_query_log", Some("0")),
        ("SELECT @@GLOBAL.event_scheduler", Some("OFF")),
        ("SELECT @@GLOBAL.init_connect", Some("")),
        ("SELECT @@GLOBAL.server_id = 5", Some("0")),
        ("SELECT @@GLOBAL.gtid_binlog_pos", Some(state.as_str())),
        ("SELECT COUNT(*) FROM mysql.servers", Some("1")),
        // What is about the data comes along.
        ("SELECT @@GLOBAL.max_connections", Some("77")),
        ("SELECT @@GLOBAL.sql_mode LIKE '%ANSI%'", Some("1")),
    ] {
        assert_eq!(session.value(sql).await.unwrap().as_deref(), wanted, "{sql}");
    }
    assert!(session.query("SHOW ALL SLAVES STATUS").await.unwrap().rows.is_empty());
    let options = std::fs::read_to_string(clone.site.data_dir.join("my.cnf")).unwrap();
    for stranger in
        ["db1.example", "192.0.2.7", own_logs.path().to_str().unwrap(), source.server.work_dir.to_str().unwrap()]
    {
        assert!(!options.contains(stranger), "{stranger} in {options}");
    }
    let names = std::fs::read_dir(&clone.site.data_dir).unwrap();
    let names: Vec<String> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.contains("relay") || name == "master.info"), "{names:?}");
    // Every server makes this one: the names of further connections to sources.
    assert_eq!(std::fs::read_to_string(clone.site.data_dir.join("multi-master.info")).unwrap_or_default().trim(), "");
}
