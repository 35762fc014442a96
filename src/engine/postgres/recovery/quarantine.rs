//! The settings of a server in quarantine, as one pure function.
//!
//! A quarantined server is reached through one socket in a directory of mode 0700 that belongs to its own operating
//! system user. Whoever can open that socket is that user or root and could read and write the data files anyway, so
//! the socket asks for nothing: with the clone's own `pg_hba.conf` the agent might not get in at all. It listens on no
//! address, archives nothing, applies no subscription, starts no scheduler, fires no login trigger and knows no
//! primary. It does not fsync: the directory is worthless until it is made durable as a whole, which is done before it
//! is handed over, or before it is held in quarantine for somebody to look at; then it fsyncs like any other server.

use std::path::Path;

use crate::engine::postgres::ondisk::control::{ControlFile, RecoveryParameters};
use crate::engine::postgres::settings::{SourceSettings, is_scheduler, render_line, split_list};

/// What the settings are made from.
pub struct QuarantineInput<'a> {
    pub clone_name: &'a str,
    pub data_dir: &'a Path,
    pub run_dir: &'a Path,
    pub port: u16,
    pub control: &'a ControlFile,
    /// At least what `pg_control` and the log so far insist on.
    pub parameters: RecoveryParameters,
    pub source: &'a SourceSettings,
    /// `shared_preload_libraries` of the order, if it names any.
    pub preload_override: Option<&'a str>,
    /// The timeline that replay follows, if it is another than that of the base backup.
    pub follow_timeline: Option<u32>,
    pub memory_bytes: u64,
    pub free_bytes: u64,
    /// The directory was made durable and is to stay so.
    pub is_durable: bool,
}

/// Files of the quarantine in the run directory.
pub const CONF_FILE: &str = "keiki_quarantine.conf";
pub const HBA_FILE: &str = "keiki_quarantine_hba.conf";
pub const IDENT_FILE: &str = "keiki_quarantine_ident.conf";

/// The content of [`HBA_FILE`]; the module says why this is enough.
pub const HBA_CONTENT: &str = "# Only the owner of this directory and root can open the socket.\nlocal all all trust\nlocal replication all trust\n";

/// The server's own default for shared_buffers, in bytes.
const DEFAULT_SHARED_BUFFERS_BYTES: u64 = 128 << 20;

/// Renders the configuration file.
pub fn quarantine_conf(input: &QuarantineInput<'_>) -> String {
    let run_file = |name: &str| input.run_dir.join(name).display().to_string();
    let mut lines =
        vec![String::from("# Written by keiki: a clone in quarantine. Rewritten at each start of a recovery.")];
    let mut set = |name: &str, value: &str| lines.push(render_line(name, value));

    set("data_directory", &input.data_dir.display().to_string());
    set("hba_file", &run_file(HBA_FILE));
    set("ident_file", &run_file(IDENT_FILE));
    set("cluster_name", &format!("keiki {}", input.clone_name));
    set("update_process_title", "on");

    set("listen_addresses", "");
    set("port", &input.port.to_string());
    set("unix_socket_directories", &input.run_dir.display().to_string());
    set("unix_socket_permissions", "0700");
    set("ssl", "off");

    set("archive_mode", "off");
    set("restore_command", "");
    set("primary_conninfo", "");
    set("primary_slot_name", "");
    set("synchronous_standby_names", "");
    set("max_logical_replication_workers", "0");
    set("autovacuum", "off");
    if input.control.major.number() >= 17 {
        set("event_triggers", "off");
    }
    let preload = input.preload_override.or(input.source.get("shared_preload_libraries")).unwrap_or("");
    let kept: Vec<String> = split_list(preload).into_iter().filter(|library| !is_scheduler(library)).collect();
    set("shared_preload_libraries", &kept.join(", "));

    set("hot_standby", "on");
    set("recovery_target_timeline", &input.follow_timeline.map_or(String::from("current"), |id| id.to_string()));
    // Replay never waits for a query of ours: the query is cancelled.
    set("max_standby_archive_delay", "0");
    set("max_standby_streaming_delay", "0");
    set("wal_retrieve_retry_interval", "20ms");
    set("restart_after_crash", "off");
    for (name, value) in parameters_to_set(input) {
        set(name, &value.to_string());
    }
    set("wal_level", &input.control.wal_level.to_string());
    set("wal_log_hints", if input.control.wal_log_hints { "on" } else { "off" });
    // Turned off it would throw away the recorded times when the clone is promoted.
    set("track_commit_timestamp", input.source.get("track_commit_timestamp").unwrap_or("off"));
    // What is recovered must fit: origins and slots of the source are restored at start-up.
    for name in ["max_replication_slots", "max_active_replication_origins"] {
        if let Some(value) = input.source.get(name) {
            set(name, value);
        }
    }

    set("fsync", if input.is_durable { "on" } else { "off" });
    set("wal_recycle", "off");
    set("wal_init_zero", "off");
    set("checkpoint_timeout", "30min");
    let log_megabytes = max_wal_megabytes(input);
    set("max_wal_size", &format!("{log_megabytes}MB"));
    set("min_wal_size", &format!("{}MB", (2 * u64::from(input.control.wal_segment_size.bytes())) >> 20));
    set("shared_buffers", &format!("{}kB", shared_buffers_bytes(input) >> 10));
    set("huge_pages", "off");

    set("logging_collector", "off");
    set("log_destination", "stderr");
    set("log_line_prefix", "%m [%p] ");
    set("log_timezone", "UTC");
    set("timezone", "UTC");
    set("lc_messages", "C");
    lines.push(String::new());
    lines.join("\n")
}

fn parameters_to_set(input: &QuarantineInput<'_>) -> [(&'static str, u32); 5] {
    // A value of 0 is impossible for the first and the last; older control files of a fresh server carry none.
    let floor =
        RecoveryParameters { max_connections: 20, max_locks_per_transaction: 64, ..RecoveryParameters::default() };
    input.parameters.at_least(floor).settings()
}

/// Much enough that restart points are rare, little enough that old log does not fill the disk: the server removes
/// log only at restart points, and between two of them that much of it may pile up.
fn max_wal_megabytes(input: &QuarantineInput<'_>) -> u64 {
    let segment = u64::from(input.control.wal_segment_size.bytes()) >> 20;
    ((input.free_bytes >> 20) / 8).clamp(256, 4096).max(4 * segment)
}

/// What the source had, but no more than a quarter of the memory of this host.
fn shared_buffers_bytes(input: &QuarantineInput<'_>) -> u64 {
    let wanted = input.source.bytes_of("shared_buffers").unwrap_or(DEFAULT_SHARED_BUFFERS_BYTES);
    wanted.clamp(1 << 20, (input.memory_bytes / 4).max(16 << 20))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::engine::postgres::ondisk::control::{Checkpoint, ClusterState, WalLevel};
    use crate::engine::postgres::ondisk::segment::SegmentSize;
    use crate::engine::postgres::ondisk::versions::Major;
    use crate::model::position::Lsn;

    fn control(major: Major) -> ControlFile {
        let zero = jiff::Timestamp::UNIX_EPOCH;
        ControlFile {
            major,
            system_identifier: 7,
            control_version: major.control_version(),
            catalog_version: major.catalog_version(),
            state: ClusterState::InProduction,
            time: zero,
            checkpoint_record: Lsn(0x100),
            checkpoint: Checkpoint { redo: Lsn(0x100), timeline: 1, previous_timeline: 1, time: zero },
            min_recovery_point: Lsn(0),
            min_recovery_point_timeline: 0,
            backup_start_point: Lsn(0),
            backup_end_point: Lsn(0),
            backup_end_required: false,
            wal_level: WalLevel::Logical,
            wal_log_hints: true,
            parameters: RecoveryParameters::default(),
            block_size: 8192,
            relation_segment_blocks: 131_072,
            wal_block_size: 8192,
            wal_segment_size: SegmentSize::DEFAULT,
            data_checksum_version: 1,
        }
    }

    fn conf(major: Major, settings: &[(&str, &str)], change: impl FnOnce(&mut QuarantineInput<'_>)) -> String {
        let facts: BTreeMap<String, String> =
            settings.iter().map(|(name, value)| (format!("setting.{name}"), value.to_string())).collect();
        let (control, source) = (control(major), SourceSettings::from_facts(&facts));
        let mut input = QuarantineInput {
            clone_name: "orders-check",
            data_dir: Path::new("/srv/c"),
            run_dir: Path::new("/run/k/c"),
            port: 5501,
            control: &control,
            parameters: RecoveryParameters { max_connections: 300, ..RecoveryParameters::default() },
            source: &source,
            preload_override: None,
            follow_timeline: None,
            memory_bytes: 8 << 30,
            free_bytes: 100 << 30,
            is_durable: false,
        };
        change(&mut input);
        quarantine_conf(&input)
    }

    fn has(conf: &str, line: &str) -> bool {
        conf.lines().any(|other| other == line)
    }

    #[test]
    fn a_quarantined_server_is_closed_and_keeps_to_itself_whatever_the_source_had() {
        let source = [
            ("listen_addresses", "*"),
            ("archive_mode", "always"),
            ("primary_conninfo", "host=db1"),
            ("synchronous_standby_names", "*"),
            ("shared_preload_libraries", "pg_stat_statements, pg_cron"),
        ];
        let conf = conf(Major::V17, &source, |_| {});
        for line in [
            "listen_addresses = ''",
            "unix_socket_directories = '/run/k/c'",
            "unix_socket_permissions = '0700'",
            "archive_mode = 'off'",
            "restore_command = ''",
            "primary_conninfo = ''",
            "synchronous_standby_names = ''",
            "max_logical_replication_workers = '0'",
            "event_triggers = 'off'",
            "shared_preload_libraries = 'pg_stat_statements'",
            "max_connections = '300'",
            "wal_level = 'logical'",
            "recovery_target_timeline = 'current'",
        ] {
            assert!(has(&conf, line), "{line} in\n{conf}");
        }
        let names: Vec<&str> = conf.lines().filter_map(|line| line.split_once(" = ")).map(|row| row.0).collect();
        let unique: std::collections::BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(names.len(), unique.len(), "a setting occurs twice");
    }

    #[test]
    fn a_quarantine_that_is_held_is_as_durable_as_any_server() {
        assert!(has(&conf(Major::V15, &[], |_| {}), "fsync = 'off'"));
        assert!(has(&conf(Major::V15, &[], |input| input.is_durable = true), "fsync = 'on'"));
    }

    #[test]
    fn what_the_version_does_not_know_is_not_set() {
        assert!(!conf(Major::V16, &[], |_| {}).contains("event_triggers"));
        assert!(!conf(Major::V16, &[], |_| {}).contains("max_active_replication_origins"));
    }

    #[test]
    fn memory_and_log_are_bounded_by_what_this_host_has() {
        let large = [("shared_buffers", "64GB")];
        assert!(has(&conf(Major::V15, &large, |_| {}), "shared_buffers = '2097152kB'"));
        assert!(has(&conf(Major::V15, &[], |_| {}), "shared_buffers = '131072kB'"));
        assert!(has(&conf(Major::V15, &[], |_| {}), "max_wal_size = '4096MB'"));
        assert!(has(&conf(Major::V15, &[], |input| input.free_bytes = 1 << 30), "max_wal_size = '256MB'"));
        let follow = conf(Major::V15, &[], |input| input.follow_timeline = Some(3));
        assert!(has(&follow, "recovery_target_timeline = '3'"));
    }
}
