//! The settings of a source that a clone takes over, and those that it must not.
//!
//! A server says of each of its variables where its value comes from (MariaDB: `information_schema.SYSTEM_VARIABLES`,
//! GLOBAL_VALUE_ORIGIN; MySQL: `performance_schema.variables_info`, VARIABLE_SOURCE). What the user set, in a file, on the command line or while it ran, goes into the facts of a
//! backup; what is about the source's host, its network, its files, its log and its replication stays out of a clone.

use std::collections::BTreeMap;

use crate::engine::mysql::product::Product;
use crate::engine::mysql::session::Session;
use crate::error::Result;

/// The prefix of a setting's key in the facts of a backup.
pub const SETTING_FACT_PREFIX: &str = "setting.";

/// Recorded whatever their origin: data written under one value are read wrongly, or not at all, under another, and the
/// log is replayed as it was written.
const ALWAYS_RECORDED: [&str; 11] = [
    "binlog_format",
    "character_set_server",
    "collation_server",
    "innodb_data_file_path",
    "innodb_page_size",
    "innodb_undo_tablespaces",
    "lower_case_table_names",
    "max_allowed_packet",
    "sql_mode",
    "time_zone",
    "explicit_defaults_for_timestamp",
];

/// Of those, the ones that are part of how a data directory is laid out: a server with another value does not start on it,
/// or does not find its tables.
pub const LAYOUT: [&str; 4] =
    ["innodb_data_file_path", "innodb_page_size", "innodb_undo_tablespaces", "lower_case_table_names"];

/// Beginnings of the names of settings that a clone does not take over.
const LEFT_PREFIXES: [&str; 30] = [
    "aria_log_dir",
    "basedir",
    "bind_address",
    "binlog",
    "character_sets_dir",
    "datadir",
    "encrypt_",
    "expire_logs",
    "extra_",
    "general_log",
    "gtid",
    "hostname",
    "init_",
    "innodb_data_home",
    "innodb_log_group_home",
    "innodb_undo_directory",
    "lc_messages_dir",
    "log_",
    "pid_file",
    "plugin",
    "port",
    "read_only",
    "relay",
    "replicate",
    "report_",
    "rpl_",
    "secure_file",
    "server_id",
    "slave",
    "slow_query",
];
const LEFT_MORE: [&str; 18] = [
    "event_scheduler",
    "innodb_buffer_pool_filename",
    "innodb_temp_data_file_path",
    "innodb_temp_tablespaces",
    "innodb_tmpdir",
    "innodb_read_only",
    "innodb_force_recovery",
    "license",
    "log_bin",
    "master_verify_checksum",
    "skip_networking",
    "skip_name_resolve",
    "socket",
    "ssl",
    "system_time_zone",
    "tls_",
    "tmpdir",
    "wsrep",
];

/// The same, of names that only MySQL has.
const LEFT_OF_MYSQL: [&str; 21] = [
    "admin_",
    "auto_generate_certs",
    "build_id",
    "caching_sha2_password_p",
    "clone_",
    "component_",
    "core_file",
    "disabled_storage_engines",
    "early_plugin",
    "enforce_gtid",
    "group_replication",
    "innodb_directories",
    "innodb_doublewrite_dir",
    "keyring",
    "mysqlx",
    "persist",
    "replica_",
    "server_uuid",
    "sha256_password_p",
    "source_",
    "super_read_only",
];

/// Whether a clone runs with the source's value of this setting.
pub fn is_taken_over(name: &str) -> bool {
    let name = name.replace('-', "_").to_ascii_lowercase();
    if name == "log_bin_trust_function_creators" {
        return true;
    }
    !LEFT_PREFIXES.iter().chain(&LEFT_MORE).chain(&LEFT_OF_MYSQL).any(|left| name.starts_with(left))
}

/// Asks a server for its settings.
pub async fn ask(session: &Session) -> Result<BTreeMap<String, String>> {
    let always: Vec<String> = ALWAYS_RECORDED.iter().map(|name| format!("'{name}'")).collect();
    let always = always.join(", ");
    let sql = match Product::of_text(session.server_text()) {
        Product::MariaDb => format!(
            "SELECT LOWER(VARIABLE_NAME), GLOBAL_VALUE FROM information_schema.SYSTEM_VARIABLES WHERE GLOBAL_VALUE IS \
             NOT NULL AND (GLOBAL_VALUE_ORIGIN IN ('CONFIG', 'SQL') OR LOWER(VARIABLE_NAME) IN ({always})) ORDER BY 1"
        ),
        Product::MySql => format!(
            "SELECT LOWER(i.VARIABLE_NAME), g.VARIABLE_VALUE FROM performance_schema.variables_info i JOIN \
             performance_schema.global_variables g ON g.VARIABLE_NAME = i.VARIABLE_NAME WHERE i.VARIABLE_SOURCE <> \
             'COMPILED' OR LOWER(i.VARIABLE_NAME) IN ({always}) ORDER BY 1"
        ),
    };
    let rows = session.query(&sql).await?;
    let pairs = rows.rows.into_iter().filter_map(|row| {
        let mut values = row.into_iter();
        Some((values.next()??, values.next()??))
    });
    Ok(pairs.collect())
}

/// The settings in the facts of a backup that a clone takes over.
pub fn taken_over(facts: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let settings = facts.iter().filter_map(|(key, value)| Some((key.strip_prefix(SETTING_FACT_PREFIX)?, value)));
    settings
        .filter(|(name, value)| is_taken_over(name) && !value.contains(['\n', '\0']))
        .map(|(name, value)| (name.to_string(), value.clone()))
        .collect()
}

/// A line of an option file: `name = "value"`, as `mysys/my_default.c` reads it (backslash is an escape there).
pub fn option_line(name: &str, value: &str) -> String {
    format!("{name} = \"{}\"\n", value.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_about_the_source_itself_is_not_taken_over() {
        for name in ["port", "socket", "log_bin_basename", "log-bin", "server_id", "slave_parallel_threads", "datadir"]
        {
            assert!(!is_taken_over(name), "{name}");
        }
        for name in ["sql_mode", "innodb_page_size", "max_connections", "lower_case_table_names", "time_zone"] {
            assert!(is_taken_over(name), "{name}");
        }
    }

    #[test]
    fn facts_become_settings_and_lines_of_an_option_file() {
        let facts = [("setting.sql_mode", "ANSI"), ("setting.port", "3306"), ("setting.x", "a\nb"), ("version", "1")];
        let facts = facts.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        assert_eq!(taken_over(&facts).into_iter().collect::<Vec<_>>(), [("sql_mode".into(), "ANSI".into())]);
        assert_eq!(option_line("x", r#"a"b\c"#), "x = \"a\\\"b\\\\c\"\n");
    }
}
