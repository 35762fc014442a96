//! Names of settings by what becomes of them in a clone (manual, chapter "Server Configuration", 13 to 18).

/// Cannot be set in a file: the server shows them, or a session has them.
pub(super) const NEVER_SET: &[&str] = &[
    "application_name",
    "block_size",
    "client_encoding",
    "data_checksums",
    "data_directory_mode",
    "debug_assertions",
    "effective_wal_level",
    "huge_pages_status",
    "in_hot_standby",
    "integer_datetimes",
    "is_superuser",
    "lc_collate",
    "lc_ctype",
    "max_function_args",
    "max_identifier_length",
    "max_index_keys",
    "num_os_semaphores",
    "role",
    "search_path",
    "seed",
    "segment_size",
    "server_encoding",
    "server_version",
    "server_version_num",
    "session_authorization",
    "shared_memory_size",
    "shared_memory_size_in_huge_pages",
    "ssl_library",
    "transaction_deferrable",
    "transaction_isolation",
    "transaction_read_only",
    "wal_block_size",
    "wal_segment_size",
];

/// Written from what the clone is, whatever the source had.
pub(super) const OWNED_BY_KEIKI: &[&str] = &[
    "archive_command",
    "archive_library",
    "archive_mode",
    "cluster_name",
    "config_file",
    "data_directory",
    "hba_file",
    "ident_file",
    "listen_addresses",
    "port",
    "unix_socket_directories",
];

const STANDBY: &str = "the clone follows nobody";
const TARGET: &str = "the clone has been recovered";
const COMMAND: &str = "a command of the source's recovery";
const WAITS: &str = "the clone would wait for standbys that it does not have";
const HOST: &str = "belongs to the host of the source";

/// Dropped, each with its reason.
pub(super) const DROPPED: &[(&str, &str)] = &[
    ("archive_cleanup_command", COMMAND),
    ("bonjour", HOST),
    ("bonjour_name", HOST),
    ("external_pid_file", HOST),
    ("primary_conninfo", STANDBY),
    ("primary_slot_name", STANDBY),
    ("promote_trigger_file", STANDBY),
    ("recovery_end_command", COMMAND),
    ("recovery_min_apply_delay", STANDBY),
    ("recovery_target", TARGET),
    ("recovery_target_action", TARGET),
    ("recovery_target_inclusive", TARGET),
    ("recovery_target_lsn", TARGET),
    ("recovery_target_name", TARGET),
    ("recovery_target_time", TARGET),
    ("recovery_target_timeline", TARGET),
    ("recovery_target_xid", TARGET),
    ("restore_command", COMMAND),
    ("stats_temp_directory", HOST),
    ("sync_replication_slots", STANDBY),
    ("synchronized_standby_slots", WAITS),
    ("synchronous_standby_names", WAITS),
];

/// Files that TLS cannot work without, if they are named. The first two have names by default.
pub(super) const FILES_OF_TLS: &[&str] =
    &["ssl_cert_file", "ssl_key_file", "ssl_ca_file", "ssl_crl_file", "ssl_crl_dir", "ssl_dh_params_file"];

/// Libraries that begin work of their own as soon as the server runs, and that no data need to be read.
const SCHEDULERS: &[&str] = &[
    "bdr",
    "bgw_replstatus",
    "pg_auto_failover",
    "pg_cron",
    "pg_failover_slots",
    "pg_net",
    "pg_partman_bgw",
    "pg_squeeze",
    "pg_task",
    "pgautofailover",
    "pglogical",
    "repmgr",
    "spock",
];

/// Whether a library of `shared_preload_libraries` is kept out of a quarantined server. It may be given as a path.
pub fn is_scheduler(library: &str) -> bool {
    let name = library.rsplit('/').next().unwrap_or(library);
    SCHEDULERS.contains(&name.strip_suffix(".so").unwrap_or(name))
}
