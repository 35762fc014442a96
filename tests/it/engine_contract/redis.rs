//! Redis as a subject. Its log counts time in seconds, so the clock of the tests leaves a quiet second around each answer.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keiki::engine::redis::RedisEngine;
use keiki::engine::redis::clone::RedisCloner;
use keiki::engine::{CloneEngine, CloneSite, Engine};

use super::{Base, Subject};
use crate::support::hosts::free_port;
use crate::support::postgres::server_user;
use crate::support::redis::{Client, Product, TestRedis};

pub struct RedisSubject {
    pub server: TestRedis,
    pub engine: Arc<RedisEngine>,
}

impl RedisSubject {
    pub fn start() -> RedisSubject {
        RedisSubject::start_of(Product::Redis7)
    }

    pub fn start_of(product: Product) -> RedisSubject {
        let server = TestRedis::start_of(product, &[]);
        let engine = Arc::new(RedisEngine::new(server.source("orders")));
        RedisSubject { server, engine }
    }

    /// The same server as it is told to another engine.
    pub fn with_engine(self, engine: Arc<RedisEngine>) -> RedisSubject {
        RedisSubject { engine, ..self }
    }
}

impl Subject for RedisSubject {
    fn engine(&self) -> Arc<dyn Engine> {
        self.engine.clone()
    }

    fn cloner(&self) -> Arc<dyn CloneEngine> {
        Arc::new(RedisCloner::of(self.server.product.engine()))
    }

    fn commit(&self, value: u64) {
        self.server.run(&["RPUSH", "numbers", &value.to_string()]);
    }

    fn has_named_points(&self) -> bool {
        false
    }

    fn base_alone_is_no_database(&self) -> bool {
        true
    }

    fn name_point(&self, _name: &str) {}

    fn now(&self) -> Timestamp {
        let until_second = |wanted: i64| {
            while Timestamp::now().as_second() < wanted {
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        let quiet = Timestamp::now().as_second() + 1;
        until_second(quiet + 1);
        Timestamp::from_millisecond(quiet * 1000 + 500).unwrap()
    }

    fn switch_log(&self) {
        self.server.rewrite();
    }

    fn site(&self, root: &Path, base: &Base) -> CloneSite {
        CloneSite {
            clone_name: "check".into(),
            data_dir: root.join("data"),
            run_dir: root.join("run"),
            bin_dir: Some(self.server.product.bin_dir()),
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
            archive_command: String::new(),
        }
    }

    fn own(&self, path: &Path) {
        let user = server_user();
        let owner = format!("{}:{}", user.uid, user.gid);
        let given = std::process::Command::new("chown").arg("-R").arg(owner).arg(path).status().unwrap();
        assert!(given.success());
    }

    fn values(&self, site: &CloneSite) -> Vec<u64> {
        let mut client = Client::open(&site.run_dir.join("redis.sock"));
        let list = client.run(&["LRANGE", "numbers", "0", "-1"]).list();
        list.into_iter().map(|value| String::from_utf8(value.bytes()).unwrap().parse().unwrap()).collect()
    }
}
