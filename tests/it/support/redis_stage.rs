//! The usual stage of a story about Redis: host a with a server that archives into a directory, host b for clones.

use std::path::PathBuf;
use std::time::Duration;

use super::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use super::postgres::server_user;
use super::redis::{Client, TestRedis};

/// A value of each thing that a story may want to stop, start or break.
pub struct RedisStage {
    pub a: Host,
    pub b: Host,
    pub source: TestRedis,
    // Dropped last: everything lies in it.
    pub lab: Lab,
}

impl RedisStage {
    /// Both agents run, with the source as instance 'cart' of host a; `instance_lines` are further lines of its section.
    pub fn start(source: TestRedis, instance_lines: &str) -> RedisStage {
        let stage = RedisStage::start_without_archiving(source, instance_lines);
        stage.wait_until_archiving();
        stage
    }

    /// The same for a source that cannot be archived.
    pub fn start_without_archiving(source: TestRedis, instance_lines: &str) -> RedisStage {
        let lab = Lab::new();
        let repository = lab.path("repository");
        std::fs::create_dir(&repository).unwrap();
        let (port_a, port_b) = (free_port(), free_port());
        let bin_dir = source.product.bin_dir();
        let engine = source.product.engine().name();
        let user = server_user().name;
        let instance = format!(
            "[[instance]]\nname = \"cart\"\nengine = \"{engine}\"\ndata_dir = \"{}\"\nsocket = \"{}\"\nrun_as = \"{user}\"\n\
             ship_every = \"1s\"\n{instance_lines}\n",
            source.data_dir.display(),
            source.socket.display(),
        );
        let clones = format!("[clone.{engine}]\nrun_as = \"{user}\"\nbin_dir = \"{}\"\n", bin_dir.display());
        let options = |name, repository, peer, sections, listen_port| HostOptions {
            name,
            repository,
            peers: vec![peer],
            sections,
            listen_port,
            clone_bin_dir: &bin_dir,
        };
        let url = format!("file://{}", repository.display());
        let a = Host::start(&lab, &options("a", url.clone(), ("b", port_b), instance, port_a));
        a.keiki_ok(&["repository", "init"]);
        let b = Host::start(&lab, &options("b", url, ("a", port_a), clones, port_b));
        RedisStage { a, b, source, lab }
    }

    pub fn wait_until_archiving(&self) {
        wait_for("archiving to begin", Duration::from_secs(60), || self.a.instance("cart")["state"] == "archiving");
    }

    /// Where a clone of host b lies.
    pub fn clone_dir(&self, name: &str) -> PathBuf {
        self.lab.path("clones-b").join(name)
    }

    /// A connection to a clone of host b, as nobody in particular.
    pub fn client_of(&self, name: &str) -> Client {
        Client::open(&self.lab.path("clones-b").join(format!("{name}.run")).join("redis.sock"))
    }
}
