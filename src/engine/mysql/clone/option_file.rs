//! The option files that a clone's server is started with: in quarantine, and as the instance that it becomes.
//!
//! Both take over the source's settings (`settings`) and then the order's `--set`; what makes the quarantine closed, or
//! the instance itself, comes last, and last wins.

use std::path::Path;

use crate::engine::CloneSite;
use crate::engine::mysql::programs::base_directory;
use crate::engine::mysql::server::Server;
use crate::engine::mysql::settings::{option_line, taken_over};

/// In the data directory of an accepted clone: everything that its server is started with.
pub const OPTION_FILE: &str = "my.cnf";
/// Bytes of memory for InnoDB's pages while the log is replayed, unless the order says otherwise.
const REPLAY_POOL_MIN: u64 = 128 << 20;

fn common(site: &CloneSite, server: &Server) -> String {
    // The version is read again where the server is launched.
    let mut text = format!("# written by keiki for MariaDB {}\n[mariadbd]\n", server.program.version);
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
    text += &option_line("pid_file", &run("mariadb.pid"));
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

/// Closed: no network, no binary log, no events, no replication by itself. The scheduler is off and not disabled, because
/// the log may make events. What is replayed need not be synced: the directory is made durable as a whole before anybody
/// is told that it is there.
pub fn render_quarantine(site: &CloneSite, server: &Server, init_file: &Path) -> String {
    let mut text = common(site, server);
    text += &option_line("init_file", &init_file.display().to_string());
    text += "skip_networking = ON\nperformance_schema = OFF\nskip_log_bin\nskip_slave_start = ON\nevent_scheduler = OFF\n\
             innodb_flush_log_at_trx_commit = 0\ninnodb_doublewrite = ON\nsync_frm = OFF\nread_only = OFF\n\
             relay_log = \"keiki-relay\"\nrelay_log_index = \"keiki-relay.index\"\nrelay_log_recovery = OFF\nsync_relay_log = 0\nsync_relay_log_info = 0\nsync_master_info = 0\n\
             relay_log_purge = OFF\ngtid_strict_mode = OFF\nslave_exec_mode = STRICT\n\
             slave_run_triggers_for_rbr = NO\nreplicate_same_server_id = ON\nslave_sql_verify_checksum = ON\n\
             slave_parallel_mode = optimistic\nslave_transaction_retries = 100\n";
    if !site.settings.contains_key("innodb_buffer_pool_size") {
        text += &format!("innodb_buffer_pool_size = {}\n", replay_pool(site));
    }
    text
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
    text += "sync_binlog = 1\ninnodb_flush_log_at_trx_commit = 1\nskip_slave_start = ON\n";
    if !site.settings.contains_key("binlog_format") {
        text += "binlog_format = ROW\n";
    }
    if !site.settings.contains_key("innodb_buffer_pool_size") {
        text += &format!("innodb_buffer_pool_size = {}\n", replay_pool(site));
    }
    text
}
