//! PostgreSQL as a subject.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use keiki::engine::postgres::clone::PostgresCloner;
use keiki::engine::postgres::{PostgresEngine, ShipMode};
use keiki::engine::{CloneEngine, CloneSite, Engine};

use super::{Base, Subject};
use crate::support::postgres::{ServerOptions, TestServer, Version, free_port, server_user};

pub struct PostgresSubject {
    server: TestServer,
    engine: Arc<PostgresEngine>,
}

impl PostgresSubject {
    pub fn start(version: Version) -> PostgresSubject {
        let options = ServerOptions::new(version).initdb("--wal-segsize=1");
        // Nothing is archived by the server itself: it keeps all log for the agent to read.
        let server = options.set("archive_mode", "on").set("archive_command", "false").start();
        server.sql("CREATE TABLE numbers (at serial PRIMARY KEY, value int8)");
        let engine = Arc::new(PostgresEngine::new(server.source("orders", ShipMode::ArchiveCommand)));
        PostgresSubject { server, engine }
    }
}

impl Subject for PostgresSubject {
    fn engine(&self) -> Arc<dyn Engine> {
        self.engine.clone()
    }

    fn cloner(&self) -> Arc<dyn CloneEngine> {
        Arc::new(PostgresCloner::default())
    }

    fn commit(&self, value: u64) {
        self.server.sql(&format!("INSERT INTO numbers (value) VALUES ({value})"));
    }

    fn name_point(&self, name: &str) {
        self.server.sql(&format!("SELECT pg_create_restore_point('{name}')"));
    }

    fn now(&self) -> Timestamp {
        let text = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
        self.server.sql(text).parse().unwrap()
    }

    fn switch_log(&self) {
        self.server.sql("SELECT pg_switch_wal()");
    }

    fn site(&self, root: &Path, base: &Base) -> CloneSite {
        CloneSite {
            clone_name: "check".into(),
            data_dir: root.join("data"),
            run_dir: root.join("run"),
            bin_dir: Some(self.server.version.bin_dir()),
            port: free_port(),
            listen_addresses: "127.0.0.1".into(),
            run_as: server_user().name,
            settings: BTreeMap::new(),
            passwords_for: Default::default(),
            keep_expired: false,
            engine_version: base.version.clone(),
            facts: base.span.facts.clone(),
            backup_start: base.span.start,
            backup_stop: base.span.stop,
            archive_command: "true".into(),
        }
    }

    fn own(&self, path: &Path) {
        self.server.own(path);
    }

    fn values(&self, site: &CloneSite) -> Vec<u64> {
        let port = site.port.to_string();
        let mut command = self.server.command("psql");
        command.args(["-h", &site.run_dir.display().to_string(), "-p", &port, "-U", &self.server.role]);
        command.args(["-d", "postgres", "-XAtq", "-c", "SELECT value FROM numbers ORDER BY at"]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect()
    }
}
