//! MariaDB 10.11 with its binary log.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use keiki::base::random::random_u64;
use keiki::engine::mysql::clone::{ACCOUNT, PASSWORD_FILE, SOCKET_FILE};
use keiki::engine::mysql::session::{Endpoint, Rows, Session};
use keiki::engine::mysql::source::read_password;

use super::{CloneAt, Contents, SourceServer, Writers, copy_tree};
use crate::support::hosts::Lab;
use crate::support::mariadb::MariaServer;
use crate::support::postgres::server_user;

/// How long a statement may take.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

impl SourceServer for MariaServer {
    const ENGINE: &'static str = "mariadb";
    const ENDS_UNSEEN: u32 = 3;
    // The backup program writes once more what the source wrote while it was copied, and makes a new redo log.
    const ALL_WRITES_PER_BYTE_LIMIT: f64 = 1.25;

    fn start(_lab: &Lab) -> MariaServer {
        let server = MariaServer::start(&["--max-binlog-size=1M", "--innodb-fast-shutdown=1"]);
        ask(&server.endpoint(), "CREATE DATABASE shop");
        ask(&server.endpoint(), "CREATE TABLE shop.t (i INT PRIMARY KEY)");
        ask(&server.endpoint(), "CREATE TABLE shop.written (id BIGINT PRIMARY KEY, filler TEXT NOT NULL)");
        server
    }

    fn copy(&self) -> MariaServer {
        let copy = MariaServer::prepare(self.release, &self.arguments);
        copy_tree(&self.data_dir, &copy.data_dir);
        copy
    }

    fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    fn pid(&self) -> u32 {
        MariaServer::pid(self)
    }

    fn instance_section(&self, name: &str) -> String {
        format!(
            "[[instance]]\nname = \"{name}\"\nengine = \"mariadb\"\ndata_dir = \"{}\"\nsocket = \"{}\"\nrun_as = \"{}\"\n\
             ship_every = \"1s\"\n",
            self.data_dir.display(),
            self.socket.display(),
            self.user.name,
        )
    }

    fn clone_sections(&self) -> String {
        format!("[clone.mariadb]\nrun_as = \"{}\"\n", self.user.name)
    }

    fn bin_dir(&self) -> PathBuf {
        self.release.bin_dir()
    }

    fn write(&self, number: u32) {
        ask(&self.endpoint(), &format!("INSERT INTO shop.t VALUES ({number})"));
    }

    fn fill(&self, mebibytes: u32) {
        let name = format!("shop.fill_{}", random_u64());
        ask(&self.endpoint(), &format!("CREATE TABLE {name} (id INT PRIMARY KEY, filler TEXT NOT NULL)"));
        with_session(&self.endpoint(), async |session| {
            for part in 0..mebibytes {
                let (from, to) = (part * 1000 + 1, part * 1000 + 1000);
                let rows = format!("SELECT seq, REPEAT(MD5(seq), 31) FROM shop.seq_{from}_to_{to}");
                session.query_within(LIMIT, &format!("INSERT INTO {name} {rows}")).await.unwrap();
            }
        });
    }

    fn load(&self) -> Writers {
        Load::start(&self.endpoint(), |id| format!("INSERT INTO shop.written VALUES ({id}, REPEAT(MD5({id}), 60))"))
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
        MariaServer::stop(self);
    }

    fn kill9(&mut self) {
        MariaServer::kill9(self);
    }

    fn launch(&mut self) {
        MariaServer::launch(self);
    }

    fn facts(&self) -> BTreeMap<String, String> {
        facts(&self.endpoint(), self.pid())
    }

    fn is_own_business(path: &str) -> bool {
        // What a server writes when it begins or ends its life, beside its log and its tables.
        let own = ["binlog.", "shop/", "ibtmp", "ddl.log", "ddl_recovery", "ib_buffer_pool", "tc.log"];
        own.iter().any(|start| path.starts_with(start))
    }

    fn is_startable(data_dir: &Path) -> bool {
        data_dir.join("mysql").exists()
    }

    fn after_power_cut(&self, _clone: &CloneAt) {}
}

/// Running writers.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    /// Two that run the statement for different numbers.
    pub(super) fn start(endpoint: &Endpoint, statement: fn(u64) -> String) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..2)
            .map(|_| {
                let (endpoint, stop) = (endpoint.clone(), stop.clone());
                std::thread::spawn(move || {
                    runtime().block_on(async {
                        let Ok(session) = Session::open(&endpoint).await else { return };
                        while !stop.load(Ordering::Relaxed) {
                            // The server may be killed.
                            if session.query_within(LIMIT, &statement(random_u64() >> 2)).await.is_err() {
                                return;
                            }
                        }
                    });
                })
            })
            .collect();
        Box::new(Load { stop, threads })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Does something on a connection of its own.
pub fn with_session<T>(endpoint: &Endpoint, work: impl AsyncFnOnce(&Session) -> T) -> T {
    runtime().block_on(async {
        let session =
            Session::open(endpoint).await.unwrap_or_else(|error| panic!("{}: {error}", endpoint.socket.display()));
        work(&session).await
    })
}

/// Runs one statement.
pub fn ask(endpoint: &Endpoint, sql: &str) -> Rows {
    with_session(endpoint, async |session| {
        session.query_within(LIMIT, sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
    })
}

pub fn endpoint_of(clone: &CloneAt) -> Endpoint {
    Endpoint {
        socket: clone.run_dir.join(SOCKET_FILE),
        user: ACCOUNT.to_string(),
        password: Some(read_password(&clone.run_dir.join(PASSWORD_FILE)).unwrap()),
        run_as: server_user().name,
    }
}

/// The bytes of each binary log that the server has.
pub(super) fn own_log(endpoint: &Endpoint, data_dir: &Path) -> Vec<Vec<u8>> {
    let rows = ask(endpoint, "SHOW BINARY LOGS");
    let names = rows.rows.iter().map(|row| row[0].clone().unwrap());
    names
        .map(|name| {
            let mut bytes = std::fs::read(data_dir.join(name)).unwrap();
            // The lowest bit of the first event's flags says that the file is in use.
            bytes[4 + 17] &= !1;
            bytes
        })
        .collect()
}

/// The settings of a server, and the number of its process.
pub(super) fn facts(endpoint: &Endpoint, pid: u32) -> BTreeMap<String, String> {
    let rows = ask(endpoint, "SHOW GLOBAL VARIABLES");
    let pairs = rows.rows.into_iter().map(|row| (row[0].clone().unwrap(), row[1].clone().unwrap_or_default()));
    // These follow what is written.
    let mut facts: BTreeMap<_, _> =
        pairs.filter(|(name, _)| !name.starts_with("gtid_") || name.ends_with("_mode")).collect();
    facts.insert("process".to_string(), pid.to_string());
    facts
}

/// The checksum of all rows of each table that a user has made.
pub(super) fn contents(endpoint: &Endpoint) -> Contents {
    with_session(endpoint, async |session| {
        let tables = "SELECT CONCAT(TABLE_SCHEMA, '.', TABLE_NAME) FROM information_schema.TABLES \
                      WHERE TABLE_SCHEMA = 'shop' AND TABLE_TYPE = 'BASE TABLE' ORDER BY 1";
        let tables = session.query_within(LIMIT, tables).await.unwrap().rows;
        let mut found = Contents::new();
        for table in tables.into_iter().map(|row| row[0].clone().unwrap()) {
            let rows = session.query_within(LIMIT, &format!("CHECKSUM TABLE {table} EXTENDED")).await.unwrap();
            let sum = rows.first("Checksum").map(str::to_string).unwrap();
            let count = session.query_within(LIMIT, &format!("SELECT COUNT(*) AS n FROM {table}")).await.unwrap();
            found.insert(table, format!("{} rows, {sum}", count.first("n").unwrap()));
        }
        found
    })
}
