//! MySQL 9 with its binary log.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use keiki::base::random::random_u64;

use super::mariadb::{LIMIT, Load, ask, contents, endpoint_of, facts, own_log, runtime, with_session};
use super::{CloneAt, Contents, SourceServer, Writers, copy_tree};
use crate::support::hosts::Lab;
use crate::support::mysql::{MySqlServer, bin_dir};

impl SourceServer for MySqlServer {
    const ENGINE: &'static str = "mysql";
    const ENDS_UNSEEN: u32 = 3;
    // A server makes its redo log and its temporary tables anew each time it starts, some 35 MiB.
    const ALL_WRITES_PER_BYTE_LIMIT: f64 = 1.3;

    fn start(_lab: &Lab) -> MySqlServer {
        let server = runtime().block_on(MySqlServer::start(&["--max-binlog-size=1M"]));
        ask(&server.endpoint(), "CREATE DATABASE shop");
        ask(&server.endpoint(), "CREATE TABLE shop.t (i INT PRIMARY KEY)");
        ask(&server.endpoint(), "CREATE TABLE shop.written (id BIGINT PRIMARY KEY, filler TEXT NOT NULL)");
        server
    }

    fn copy(&self) -> MySqlServer {
        let copy = MySqlServer::prepare(&self.arguments);
        copy_tree(&self.data_dir, &copy.data_dir);
        copy
    }

    fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    fn pid(&self) -> u32 {
        MySqlServer::pid(self)
    }

    fn instance_section(&self, name: &str) -> String {
        MySqlServer::instance_section(self, name)
    }

    fn clone_sections(&self) -> String {
        MySqlServer::clone_section()
    }

    fn bin_dir(&self) -> PathBuf {
        bin_dir()
    }

    fn write(&self, number: u32) {
        ask(&self.endpoint(), &format!("INSERT INTO shop.t VALUES ({number})"));
    }

    fn fill(&self, mebibytes: u32) {
        let name = format!("shop.fill_{}", random_u64());
        ask(&self.endpoint(), &format!("CREATE TABLE {name} (id INT PRIMARY KEY, filler TEXT NOT NULL)"));
        with_session(&self.endpoint(), async |session| {
            for part in 0..mebibytes {
                // As many rows as a recursion may have by default.
                let numbers = format!(
                    "WITH RECURSIVE seq (n) AS (SELECT {} UNION ALL SELECT n + 1 FROM seq WHERE n < {})",
                    part * 1000 + 1,
                    part * 1000 + 1000
                );
                let sql = format!("INSERT INTO {name} {numbers} SELECT n, REPEAT(SHA2(n, 256), 16) FROM seq");
                session.query_within(LIMIT, &sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
            }
        });
    }

    fn load(&self) -> Writers {
        Load::start(&self.endpoint(), |id| {
            format!("INSERT INTO shop.written VALUES ({id}, REPEAT(SHA2({id}, 256), 30))")
        })
    }

    fn end_log_file(&self) {
        ask(&self.endpoint(), "FLUSH BINARY LOGS");
    }

    fn contents(&self) -> Contents {
        contents(&self.endpoint())
    }

    fn contents_of(&self, clone: &CloneAt) -> Contents {
        contents(&endpoint_of(clone))
    }

    fn write_to(&self, clone: &CloneAt) {
        ask(&endpoint_of(clone), "INSERT INTO shop.t VALUES (-1) ON DUPLICATE KEY UPDATE i = i - 1");
    }

    fn end_log_file_of(&self, clone: &CloneAt) {
        ask(&endpoint_of(clone), "FLUSH BINARY LOGS");
    }

    fn own_log(&self) -> Vec<Vec<u8>> {
        own_log(&self.endpoint(), &self.data_dir)
    }

    fn stop(&mut self) {
        MySqlServer::stop(self);
    }

    fn kill9(&mut self) {
        MySqlServer::kill9(self);
    }

    fn launch(&mut self) {
        MySqlServer::launch(self);
    }

    fn facts(&self) -> BTreeMap<String, String> {
        facts(&self.endpoint(), self.pid())
    }

    fn is_own_business(path: &str) -> bool {
        // What a server writes when it begins or ends its life, beside its log and its tables.
        let own = [
            "binlog.",
            "shop/",
            "ibtmp",
            "#innodb_temp",
            "#innodb_redo",
            "#ib_archive/ib_dblwr",
            "performance_schema/",
            "undo_",
            "ib_buffer_pool",
        ];
        own.iter().any(|start| path.starts_with(start))
    }

    /// The server makes the copy itself, beside its data directory.
    fn helpers(&self) -> Vec<String> {
        self.copies().iter().map(|path| path.display().to_string()).collect()
    }

    fn is_startable(data_dir: &Path) -> bool {
        data_dir.join("mysql.ibd").exists()
    }

    fn after_power_cut(&self, clone: &CloneAt) {
        // The number in it is that of another process of the same user after a restart of the machine.
        let lock = clone.run_dir.join("mysqld.sock.lock");
        std::fs::write(lock, format!("{}\n", self.pid())).unwrap();
    }
}
