//! PostgreSQL 15, archiving by `archive_command`, with segments of 1 MiB, so that there are many of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{CloneAt, Contents, SourceServer, Writers, copy_tree};
use crate::story_schedule;
use crate::support::hosts::{KEIKI, Lab, instance_section};
use crate::support::postgres::{ServerOptions, TestServer, Version};
use crate::support::two_hosts::{contents, sql_at};

impl SourceServer for TestServer {
    const ENGINE: &'static str = "postgres";
    const ENDS_UNSEEN: u32 = 3;
    const ALL_WRITES_PER_BYTE_LIMIT: f64 = 1.1;

    fn start(lab: &Lab) -> TestServer {
        let socket = lab.path("host-a/keiki.sock");
        let command = format!("'{KEIKI}' --socket '{}' wal-push %p", socket.display());
        let options = ServerOptions::new(Version::V15).initdb("--wal-segsize=1");
        let options = options.set("archive_mode", "on").set("archive_command", &command);
        // What was archived can be compared afterwards.
        let server = options.set("wal_keep_size", "4GB").start();
        server.sql("CREATE TABLE t (i int)");
        server
    }

    fn copy(&self) -> TestServer {
        let copy = TestServer::prepare(self.version);
        copy_tree(&self.data_dir, &copy.data_dir);
        copy.own(&copy.data_dir);
        copy
    }

    fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    fn pid(&self) -> u32 {
        TestServer::pid(self)
    }

    fn instance_section(&self, name: &str) -> String {
        instance_section(name, self, "ship = \"archive_command\"\nship_every = \"1s\"")
    }

    fn bin_dir(&self) -> PathBuf {
        self.bin_dir.clone()
    }

    fn write(&self, number: u32) {
        self.sql(&format!("INSERT INTO t VALUES ({number})"));
    }

    fn fill(&self, mebibytes: u32) {
        let name = format!("fill_{}", keiki::base::random::random_u64());
        let rows = mebibytes * 1000;
        self.sql(&format!(
            "CREATE TABLE {name} AS SELECT i, repeat(md5(i::text), 31) AS filler FROM generate_series(1, {rows}) AS i"
        ));
    }

    fn load(&self) -> Writers {
        if self.sql("SELECT count(*) FROM pg_class WHERE relname = 'pgbench_accounts'") == "0" {
            self.pgbench_initialise(1);
        }
        Box::new(self.pgbench_load(2))
    }

    fn end_log_file(&self) {
        self.sql("SELECT pg_switch_wal()");
    }

    fn contents(&self) -> Contents {
        contents(self, self.port)
    }

    fn contents_of(&self, clone: &CloneAt) -> Contents {
        assert_eq!(sql_at(self, clone.port, "SELECT pg_is_in_recovery()"), "f");
        contents(self, clone.port)
    }

    fn write_to(&self, clone: &CloneAt) {
        sql_at(self, clone.port, "CREATE TABLE written_by_the_clone (i int)");
    }

    fn end_log_file_of(&self, clone: &CloneAt) {
        sql_at(self, clone.port, "SELECT pg_switch_wal()");
    }

    fn own_log(&self) -> Vec<Vec<u8>> {
        // The server prepares files for later under names that are not in use yet.
        let last = self.sql("SELECT pg_walfile_name(pg_current_wal_lsn())");
        let mut names: Vec<String> = std::fs::read_dir(self.data_dir.join("pg_wal"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| Self::is_log_file(name) && *name <= last)
            .collect();
        names.sort();
        names.iter().map(|name| std::fs::read(self.data_dir.join("pg_wal").join(name)).unwrap()).collect()
    }

    fn is_log_file(name: &str) -> bool {
        // Histories of backups and timelines lie beside the segments.
        name.len() == 24 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
    }

    fn stop(&mut self) {
        TestServer::stop(self);
    }

    fn kill9(&mut self) {
        TestServer::kill9(self);
    }

    fn launch(&mut self) {
        let port = self.port;
        TestServer::launch(self);
        assert_eq!(self.port, port, "another process took the server's port: run the test again");
    }

    fn facts(&self) -> BTreeMap<String, String> {
        let settings =
            "SELECT md5(string_agg(name || '=' || coalesce(setting, ''), ',' ORDER BY name)) FROM pg_settings";
        let ask = |what: &str, sql: &str| (what.to_string(), self.sql(sql));
        BTreeMap::from([
            ask("runs since", "SELECT pg_postmaster_start_time()"),
            ask("settings", settings),
            ask("failed archive_command", "SELECT failed_count FROM pg_stat_archiver"),
        ])
    }

    fn complaints(&self) -> Vec<String> {
        story_schedule::complaints(&self.log_text()).into_iter().map(str::to_string).collect()
    }

    fn is_own_business(path: &str) -> bool {
        path.starts_with("pg_") || path.starts_with("base/") || path.starts_with("global/") || path == "postmaster.pid"
    }

    fn is_startable(data_dir: &Path) -> bool {
        data_dir.join("global/pg_control").exists()
    }

    fn after_power_cut(&self, clone: &CloneAt) {
        // Perhaps nothing on this machine has reaped the process yet, so that its number is in use. That is not so after
        // a restart, which also empties the directory of sockets.
        std::fs::remove_file(clone.data_dir.join("postmaster.pid")).unwrap();
        std::fs::remove_file(self.socket_dir.join(format!(".s.PGSQL.{}.lock", clone.port))).unwrap();
    }
}
