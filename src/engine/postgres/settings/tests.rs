//! Unit tests of `settings`.

use super::*;

fn source(pairs: &[(&str, &str)]) -> SourceSettings {
    let facts = pairs.iter().map(|(name, value)| (format!("{SETTING_FACT_PREFIX}{name}"), value.to_string()));
    SourceSettings::from_facts(&facts.collect())
}

fn plan_with(pairs: &[(&str, &str)], overrides: &[(&str, &str)]) -> Result<SettingsPlan> {
    let overrides = overrides.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let place = ClonePlace {
        clone_name: "orders-check",
        major: 15,
        data_dir: Path::new("/srv/clones/orders-check"),
        run_dir: Path::new("/run/keiki/orders-check"),
        port: 5501,
        listen_addresses: "127.0.0.1",
        archive_command: "keiki wal-push %p",
        overrides: &overrides,
        exists: &|path| !path.to_string_lossy().contains("absent"),
    };
    plan_settings(&source(pairs), &place)
}

/// The value that the server would take: the last one.
fn value<'a>(plan: &'a SettingsPlan, name: &str) -> Option<&'a str> {
    plan.settings.iter().rev().find(|row| row.0 == name).map(|row| row.1.as_str())
}

fn reported(plan: &SettingsPlan, name: &str) -> String {
    let what = format!("setting '{name}'");
    plan.report.iter().filter(|item| item.what == what).map(|item| item.done.clone()).collect::<Vec<_>>().join("; ")
}

#[test]
fn nothing_of_the_source_can_pull_the_clone_back_to_it() {
    let dangerous = [
        ("archive_command", "cp %p /source/archive/%f"),
        ("archive_library", "basic_archive"),
        ("restore_command", "cp /source/archive/%f %p"),
        ("primary_conninfo", "host=db1 password=secret"),
        ("primary_slot_name", "s1"),
        ("synchronous_standby_names", "*"),
        ("recovery_target_time", "2026-01-01 00:00:00+00"),
        ("external_pid_file", "/run/postgresql/15-main.pid"),
        ("data_directory", "/var/lib/postgresql/15/main"),
        ("hba_file", "/etc/postgresql/15/main/pg_hba.conf"),
        ("config_file", "/etc/postgresql/15/main/postgresql.conf"),
        ("port", "5432"),
        ("listen_addresses", "*"),
        ("cluster_name", "15/main"),
    ];
    let plan = plan_with(&dangerous, &[]).unwrap();
    let text = plan.render("orders-check", "15.18");
    for (name, old) in dangerous {
        assert_ne!(value(&plan, name), Some(old), "{name}");
        assert!(!text.contains(&format!("= '{old}'")), "{name} in {text}");
    }
    assert_eq!(value(&plan, "archive_command"), Some("keiki wal-push %p"));
    assert_eq!(value(&plan, "archive_mode"), Some("on"));
    assert_eq!(value(&plan, "port"), Some("5501"));
    assert_eq!(value(&plan, "primary_conninfo"), None);
    assert!(reported(&plan, "primary_conninfo").contains("follows nobody"));
    assert!(plan.report.iter().all(|item| !item.done.contains("secret")), "{:?}", plan.report);
    assert!(reported(&plan, "archive_command").contains("cp %p /source/archive/%f"));
}

#[test]
fn what_still_makes_sense_is_kept_word_for_word() {
    let plan = plan_with(&[("work_mem", "64MB"), ("max_connections", "400"), ("app.greeting", "it's \\ fine")], &[]);
    let plan = plan.unwrap();
    assert_eq!(value(&plan, "work_mem"), Some("64MB"));
    assert_eq!(value(&plan, "max_connections"), Some("400"));
    assert_eq!(plan.report, []);
    assert!(plan.render("c", "15.18").contains("app.greeting = 'it''s \\\\ fine'\n"));
}

#[test]
fn tls_is_turned_off_and_reported_where_its_files_are_missing() {
    let plan = plan_with(&[("ssl", "on"), ("ssl_cert_file", "/absent/server.crt")], &[]).unwrap();
    assert_eq!((value(&plan, "ssl"), value(&plan, "ssl_cert_file")), (Some("off"), None));
    assert!(reported(&plan, "ssl").contains("/absent/server.crt"));
    let plan = plan_with(&[("ssl", "on"), ("ssl_cert_file", "/etc/server.crt")], &[]).unwrap();
    assert_eq!((value(&plan, "ssl"), value(&plan, "ssl_cert_file")), (Some("on"), Some("/etc/server.crt")));
}

#[test]
fn paths_of_the_source_host_are_replaced() {
    let settings = [
        ("log_directory", "/var/log/postgresql"),
        ("dynamic_library_path", "/absent/lib:$libdir:/opt/lib"),
        ("unix_socket_directories", "/var/run/postgresql, /absent/sock"),
        ("huge_pages", "on"),
    ];
    let plan = plan_with(&settings, &[]).unwrap();
    assert_eq!(value(&plan, "log_directory"), Some("log"));
    assert_eq!(value(&plan, "dynamic_library_path"), Some("$libdir:/opt/lib"));
    assert_eq!(value(&plan, "unix_socket_directories"), Some("/run/keiki/orders-check, /var/run/postgresql"));
    assert_eq!(value(&plan, "huge_pages"), Some("try"));
    for name in ["log_directory", "dynamic_library_path", "huge_pages"] {
        assert_ne!(reported(&plan, name), "", "{name}");
    }
}

#[test]
fn schedulers_are_reported_and_known_by_path_too() {
    let plan = plan_with(&[("shared_preload_libraries", "pg_stat_statements, \"$libdir/pg_cron\"")], &[]).unwrap();
    let report = reported(&plan, "shared_preload_libraries");
    assert!(report.contains("pg_cron") && !report.contains("pg_stat_statements"), "{report}");
    assert!(is_scheduler("pg_cron") && is_scheduler("/usr/lib/pg_cron.so") && !is_scheduler("timescaledb"));
}

#[test]
fn an_override_wins_and_what_keiki_answers_for_is_refused() {
    let plan = plan_with(&[("work_mem", "64MB")], &[("Work_Mem", "1MB")]).unwrap();
    assert_eq!(value(&plan, "work_mem"), Some("1MB"));
    for bad in ["archive_command", "port", "restore_command", "server_version", "a b", "", "x=y", "a..b", "1a"] {
        let error = plan_with(&[], &[(bad, "x")]).unwrap_err();
        assert_eq!(error.kind(), Kind::BadInput, "{bad}");
        assert!(error.hint_text().is_some(), "{bad}");
    }
}

#[test]
fn a_value_cannot_leave_its_line() {
    assert_eq!(render_line("a", "x'\nport = 1 #\r"), "a = 'x''\\nport = 1 #\\r'");
}

#[test]
fn memory_is_read_with_and_without_unit() {
    let sizes = [("16384", 128 << 20), ("128MB", 128 << 20), ("1 GB", 1 << 30), ("8kB", 8192), ("64B", 64)];
    for (text, bytes) in sizes {
        assert_eq!(memory_bytes(text), Some(bytes), "{text}");
    }
    for bad in ["", "MB", "1m", "99999999999999999999", "99999999999TB"] {
        assert_eq!(memory_bytes(bad), None, "{bad}");
    }
}
