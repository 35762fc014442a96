//! The option files that a clone's server is started with: in quarantine, and as the instance that it becomes.
//!
//! Both take over the source's settings (`settings`) and then the order's `--set`; what makes the quarantine closed, or
//! the instance itself, comes last, and last wins.

use std::path::Path;

use crate::engine::CloneSite;
use crate::engine::mysql::backup::fact;
use crate::engine::mysql::product::Product;
use crate::engine::mysql::programs::base_directory;
use crate::engine::mysql::server::Server;
use crate::engine::mysql::settings::{option_line, taken_over};

/// In the data directory of an accepted clone: everything that its server is started with.
pub const OPTION_FILE: &str = "my.cnf";
/// Bytes of memory for InnoDB's pages while the log is replayed, unless the order says otherwise.
const REPLAY_POOL_MIN: u64 = 128 << 20;

fn common(site: &CloneSite, server: &Server) -> String {
    // The version is read again where the server is launched.
    let product = server.program.product;
    let mut text =
        format!("# written by keiki for {} {}\n[{}]\n", product.name(), server.program.version, product.option_group());
    if product == Product::MySql {
        // The directory that is built into the program need not be here, and must not be shared.
        text += "secure_file_priv = NULL\nloose_mysqlx = OFF\n";
        for (name, fact) in [("gtid_mode", fact::GTID_MODE), ("enforce_gtid_consistency", fact::GTID_CONSISTENCY)] {
            text += &option_line(name, site.facts.get(fact).map_or("ON", String::as_str));
        }
    }
    for (name, value) in taken_over(&site.facts) {
        // A variable of a plugin that is not here must not stop the server.
        text += &option_line(&format!("loose_{}", option_name(&name)), &value);
    }
    for (name, value) in &site.settings {
        text += &option_line(name, value);
    }
    // A server elsewhere than it was built for would take the messages and plugins of another version.
    if let Some(base) = base_directory(&server.program.path) {
        text += &option_line("basedir", &base.display().to_string());
    }
    let run = |name: &str| site.run_dir.join(name).display().to_string();
    text += &option_line("datadir", &site.data_dir.display().to_string());
    // Never a shared one: a server that starts removes the temporary tables of all others from it.
    text += &option_line("tmpdir", &site.run_dir.display().to_string());
    text += &option_line("socket", &server.socket.display().to_string());
    text += &option_line("pid_file", &run(&format!("{}.pid", product.kind().name())));
    text += &option_line("log_error", &server.log_file.display().to_string());
    text += &option_line("server_id", &server_id(site).to_string());
    text
}

/// Most variables are options of the same name (MariaDB knowledge base, "mariadbd Options").
fn option_name(variable: &str) -> &str {
    if variable == "time_zone" { "default_time_zone" } else { variable }
}

/// A number that no server of the same replication is likely to have, and that stays with the clone: of its directory.
fn server_id(site: &CloneSite) -> u32 {
    let hash = blake3::hash(format!("{}\n{}", site.data_dir.display(), site.run_dir.display()).as_bytes());
    let bytes = hash.as_bytes();
    // Above what people give by hand, below the server's limit of 2^32 - 1.
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) | 0x8000_0000
}

const QUARANTINE_OF_MARIADB: &str = "skip_networking = ON
performance_schema = OFF
skip_log_bin
skip_slave_start = ON
event_scheduler = OFF
innodb_flush_log_at_trx_commit = 0
innodb_doublewrite = ON
sync_frm = OFF
read_only = OFF
relay_log = \"keiki-relay\"
relay_log_index = \"keiki-relay.index\"
relay_log_recovery = OFF
sync_relay_log = 0
sync_relay_log_info = 0
sync_master_info = 0
relay_log_purge = OFF
gtid_strict_mode = OFF
slave_exec_mode = STRICT
slave_run_triggers_for_rbr = NO
replicate_same_server_id = ON
slave_sql_verify_checksum = ON
slave_parallel_mode = optimistic
slave_transaction_retries = 100
";

const QUARANTINE_OF_MYSQL: &str = "skip_networking = ON
performance_schema = OFF
skip_log_bin
skip_replica_start = ON
event_scheduler = OFF
innodb_flush_log_at_trx_commit = 0
innodb_doublewrite = ON
read_only = OFF
super_read_only = OFF
relay_log = \"keiki-relay\"
relay_log_index = \"keiki-relay.index\"
relay_log_recovery = OFF
sync_relay_log = 0
sync_relay_log_info = 0
sync_source_info = 0
relay_log_purge = OFF
replica_exec_mode = STRICT
replicate_same_server_id = ON
replica_sql_verify_checksum = ON
replica_preserve_commit_order = ON
loose_replica_parallel_type = LOGICAL_CLOCK
replica_transaction_retries = 100
";

/// Closed: no network, no binary log, no events, no replication by itself. The scheduler is off and not disabled, because
/// the log may make events. What is replayed need not be synced: the directory is made durable as a whole before anybody
/// is told that it is there.
pub fn render_quarantine(site: &CloneSite, server: &Server, init_file: &Path) -> String {
    let mut text = common(site, server);
    text += &option_line("init_file", &init_file.display().to_string());
    text += match server.program.product {
        Product::MariaDb => QUARANTINE_OF_MARIADB,
        Product::MySql => QUARANTINE_OF_MYSQL,
    };
    if site.facts.get(fact::GTID_MODE).is_some_and(|mode| mode != "ON") {
        // Whatever the log has, with a name or without.
        text += "gtid_mode = ON_PERMISSIVE\nenforce_gtid_consistency = WARN\n";
    }
    text + &pool_line(site)
}

/// The size of the buffer pool, unless the order says one.
fn pool_line(site: &CloneSite) -> String {
    match site.settings.contains_key("innodb_buffer_pool_size") {
        true => String::new(),
        false => format!("innodb_buffer_pool_size = {}\n", replay_pool(site)),
    }
}

/// The source's pool, but not more than a quarter of this host's memory: other servers run here.
fn replay_pool(site: &CloneSite) -> u64 {
    let source = site.facts.get("setting.innodb_buffer_pool_size").and_then(|text| text.parse::<u64>().ok());
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let total_kib = total.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
    source.unwrap_or(REPLAY_POOL_MIN).min(total_kib * 1024 / 4).max(REPLAY_POOL_MIN)
}

/// As the instance that it is from now on: its own port, its own log, the source's settings.
pub fn render_instance(site: &CloneSite, server: &Server) -> String {
    let mut text = common(site, server);
    text += &option_line("bind_address", &site.listen_addresses);
    text += &format!("port = {}\n", site.port);
    text += &option_line("log_bin", &site.data_dir.join("binlog").display().to_string());
    text += "sync_binlog = 1\ninnodb_flush_log_at_trx_commit = 1\n";
    // What is new in MySQL 8.0.26 is not known to MariaDB, and the other way round from 8.4 on.
    text += match server.program.product {
        Product::MariaDb => "skip_slave_start = ON\n",
        Product::MySql => "skip_replica_start = ON\n",
    };
    // MySQL runs events unless it is told not to. Those of a copy are the source's work.
    if !site.settings.keys().any(|name| name.replace('-', "_").eq_ignore_ascii_case("event_scheduler")) {
        text += "event_scheduler = OFF\n";
    }
    if server.program.product == Product::MariaDb && !site.settings.contains_key("binlog_format") {
        text += "binlog_format = ROW\n";
    }
    text + &pool_line(site)
}
