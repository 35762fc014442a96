//! A cluster of Redis or Valkey of three shards, one of them with a replica, is cloned as a group: the clones serve as a cluster of new
//! nodes only, with every key as it was, and the source's cluster does not notice.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;

use jiff::Timestamp;
use serde_json::Value;

use super::support::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use super::support::postgres::server_user;
use super::support::redis::{Answer, Client, Product, TestRedis};
use super::support::two_hosts::SOON;

const SHARDS: [&str; 3] = ["s1", "s2", "s3"];
const SLOTS: [&str; 3] = ["0 5460", "5461 10922", "10923 16383"];
const KEYS: usize = 400;

/// The keys of a shard with their values as DUMP gives them.
type Dump = BTreeMap<Vec<u8>, Vec<u8>>;

struct Scene {
    a: Host,
    b: Host,
    shards: Vec<TestRedis>,
    ports: Vec<u16>,
    _replica: TestRedis,
    lab: Lab,
}

/// A free port with another 10000 above it, as a node of a cluster needs.
fn node_port() -> u16 {
    (0..1000)
        .map(|_| free_port())
        .find(|port| port.checked_add(10_000).is_some_and(|bus| TcpListener::bind(("127.0.0.1", bus)).is_ok()))
        .expect("a free port for a node")
}

fn node(product: Product, port: u16) -> TestRedis {
    let port = port.to_string();
    let settings = [
        ("port", port.as_str()),
        ("bind", "127.0.0.1"),
        ("cluster-enabled", "yes"),
        ("cluster-node-timeout", "20000"),
        ("auto-aof-rewrite-percentage", "0"),
    ];
    TestRedis::start_of(product, &settings)
}

fn text(answer: Answer) -> String {
    String::from_utf8(answer.bytes()).unwrap()
}

fn cluster_is_ok(client: &mut Client, nodes: usize) -> bool {
    let info = text(client.run(&["CLUSTER", "INFO"]));
    info.contains("cluster_state:ok")
        && info.contains("cluster_slots_ok:16384")
        && info.contains(&format!("cluster_known_nodes:{nodes}\r"))
}

impl Scene {
    fn start(product: Product) -> Scene {
        let lab = Lab::new();
        let repository = lab.path("repository");
        std::fs::create_dir(&repository).unwrap();
        let ports: Vec<u16> = (0..4).map(|_| node_port()).collect();
        let mut nodes: Vec<TestRedis> = ports.iter().map(|port| node(product, *port)).collect();
        for (number, slots) in SLOTS.iter().enumerate() {
            let range: Vec<&str> = slots.split(' ').collect();
            nodes[number].run(&["CLUSTER", "ADDSLOTSRANGE", range[0], range[1]]);
            nodes[number].run(&["CLUSTER", "SET-CONFIG-EPOCH", &(number + 1).to_string()]);
        }
        for port in &ports[1..] {
            nodes[0].run(&["CLUSTER", "MEET", "127.0.0.1", &port.to_string()]);
        }
        for node in &nodes {
            wait_for("the cluster to form", SOON, || cluster_is_ok(&mut node.client(), 4));
        }
        let first = text(nodes[0].run(&["CLUSTER", "MYID"]));
        nodes[3].run(&["CLUSTER", "REPLICATE", &first]);
        wait_for("the replica to follow", SOON, || nodes[3].info("master_link_status") == "up");
        let replica = nodes.pop().unwrap();

        let (user, engine) = (server_user().name, product.engine().name());
        // One of the products is followed as a replica, the others have their append-only files shipped.
        let log = if product == Product::Redis8 { "log = \"replication\"\n" } else { "" };
        let mut sections = String::new();
        for (name, shard) in SHARDS.iter().zip(&nodes) {
            sections += &format!(
                "[[instance]]\nname = \"{name}\"\nengine = \"{engine}\"\ndata_dir = \"{}\"\nsocket = \"{}\"\n\
                 run_as = \"{user}\"\nship_every = \"1s\"\n{log}",
                shard.data_dir.display(),
                shard.socket.display()
            );
        }
        sections += "[[group]]\nname = \"carts\"\nmembers = [\"s1\", \"s2\", \"s3\"]\n\
                     [[group]]\nname = \"half\"\nmembers = [\"s1\", \"s2\"]\n";
        let bin_dir = product.bin_dir();
        let clones = format!("[clone.{engine}]\nrun_as = \"{user}\"\nbin_dir = \"{}\"\n", bin_dir.display());
        let (port_a, port_b) = (free_port(), free_port());
        let options = |name, repository, peers, sections, listen_port| HostOptions {
            name,
            repository,
            peers,
            sections,
            listen_port,
            clone_bin_dir: &bin_dir,
        };
        let url = format!("file://{}", repository.display());
        let a = Host::start(&lab, &options("a", url, vec![("b", port_b)], sections, port_a));
        a.keiki_ok(&["repository", "init"]);
        let b = Host::start(&lab, &options("b", "peer://a".into(), vec![("a", port_a)], clones, port_b));
        for name in SHARDS {
            wait_for("archiving to begin", SOON, || a.instance(name)["state"] == "archiving");
        }
        Scene { a, b, shards: nodes, ports, _replica: replica, lab }
    }

    /// Does something with a key on whichever shard has it.
    fn run(&self, words: &[&str]) {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        let done = self.shards.iter().any(|shard| match shard.client().ask(&words) {
            Answer::Error(error) => {
                assert!(error.starts_with("MOVED"), "{error}");
                false
            }
            _ => true,
        });
        assert!(done, "no shard takes {words:?}");
    }

    fn write(&self, round: usize) {
        for number in 0..KEYS {
            let (key, value) = (format!("k{number}"), format!("{round}-{number}"));
            match number % 4 {
                0 => self.run(&["SET", &key, &value]),
                1 => self.run(&["HSET", &key, &value, "v"]),
                2 => self.run(&["RPUSH", &key, &value]),
                _ => self.run(&["ZADD", &key, &number.to_string(), &value]),
            }
        }
    }

    fn back_up(&self) {
        for name in SHARDS {
            self.a.keiki_ok(&["backup", "create", name]);
        }
    }

    /// Every key of all shards, and the next whole second, before which it was all there.
    fn remember(&self) -> (Vec<Dump>, Timestamp) {
        let dumps = self.shards.iter().map(|shard| shard.client().dump()).collect();
        // What the agent receives as a replica has the time at which it did.
        for shard in &self.shards {
            let end: u64 = shard.info("master_repl_offset").parse().unwrap();
            wait_for("the shard's replicas to have everything", SOON, || {
                let replicas = ["slave0", "slave1"].map(|replica| shard.info(replica));
                let offset = |line: &str| line.split(',').find_map(|word| word.strip_prefix("offset=")?.parse().ok());
                replicas.iter().all(|line| line.is_empty() || offset(line).is_some_and(|offset: u64| offset >= end))
            });
        }
        let second = Timestamp::now().as_second() + 1;
        wait_for("the next second", SOON, || Timestamp::now().as_second() > second);
        (dumps, Timestamp::from_second(second).unwrap())
    }

    /// Nodes of the source's cluster as each of them sees it: ids, addresses, roles and slots.
    fn tables(&self) -> Vec<Vec<String>> {
        self.shards.iter().map(|shard| table(&mut shard.client())).collect()
    }

    fn run_dir(&self, group: &str, shard: &str) -> PathBuf {
        self.lab.path("clones-b").join(format!("{group}-{shard}.run"))
    }

    fn clients(&self, group: &str) -> Vec<Client> {
        SHARDS.iter().map(|shard| Client::open(&self.run_dir(group, shard).join("redis.sock"))).collect()
    }
}

/// The node table without what changes by itself.
fn table(client: &mut Client) -> Vec<String> {
    let lines = text(client.run(&["CLUSTER", "NODES"]));
    let mut table: Vec<String> = lines
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            [&words[..4], &words[8..]].concat().join(" ")
        })
        .collect();
    table.sort();
    table
}

#[test]
fn story_cluster_of_redis_7_is_cloned_as_a_group_and_serves_from_its_new_nodes_only() {
    let scene = Scene::start(Product::Redis7);
    let (wanted, at) = clone_and_look(&scene);
    one_shard_alone_is_no_node(&scene, &wanted[0], at);
    a_moved_slot_is_noticed(&scene);
}

#[test]
fn story_cluster_of_redis_8_is_cloned_as_a_group_and_serves_from_its_new_nodes_only() {
    clone_and_look(&Scene::start(Product::Redis8));
}

#[test]
fn story_cluster_of_valkey_9_is_cloned_as_a_group_and_serves_from_its_new_nodes_only() {
    clone_and_look(&Scene::start(Product::Valkey9));
}

/// Clones the cluster to a moment, compares everything, and discards it. What each shard had at that moment.
fn clone_and_look(scene: &Scene) -> (Vec<Dump>, Timestamp) {
    let (a, b) = (&scene.a, &scene.b);
    scene.write(1);
    scene.back_up();
    scene.write(2);
    let (wanted, at) = scene.remember();
    scene.write(3);
    let before = scene.tables();

    let missing = a.keiki_fails(&["clone", "half", "--to", "b", "--as", "no", "--at", &at.to_string()]);
    assert!(missing.contains("no member of the group serves slots 10923-16383"), "{missing}");

    let held = a.json(&["clone", "carts", "--to", "b", "--as", "copy", "--at", &at.to_string(), "--hold"]);
    assert_eq!(held["state"], "held", "{held:#}");
    for mut client in scene.clients("copy") {
        assert!(matches!(client.ask(&[b"CLUSTER", b"INFO"]), Answer::Error(_)), "a shard in quarantine is a node");
    }
    assert_names_nobody_of_the_source(scene, "copy", &before);
    println!("{}", b.keiki_ok(&["accept", "copy"]));
    assert_serves(scene, "copy", &held, &wanted);
    assert_eq!(scene.tables(), before, "the source's cluster has changed");
    for (mut clone, wanted) in scene.clients("copy").into_iter().zip(&wanted) {
        assert_eq!(clone.dump().len(), wanted.len());
    }

    b.keiki_ok(&["discard", "copy", "--yes"]);
    for shard in SHARDS {
        assert!(!scene.run_dir("copy", shard).exists(), "'{shard}' left something");
    }
    (wanted, at)
}

fn one_shard_alone_is_no_node(scene: &Scene, wanted: &Dump, at: Timestamp) {
    scene.a.keiki_ok(&["clone", "s1", "--to", "b", "--as", "alone", "--at", &at.to_string()]);
    let mut alone = Client::open(&scene.lab.path("clones-b/alone.run/redis.sock"));
    assert!(matches!(alone.ask(&[b"CLUSTER", b"INFO"]), Answer::Error(_)), "a shard that was cloned alone is a node");
    assert_eq!(alone.dump(), *wanted);
    scene.b.keiki_ok(&["discard", "alone", "--yes"]);
}

/// No file of a clone has the id or the address of a node of the source, before any of them has opened a port.
fn assert_names_nobody_of_the_source(scene: &Scene, group: &str, tables: &[Vec<String>]) {
    for shard in SHARDS {
        let dir = scene.lab.path("clones-b").join(format!("{group}-{shard}"));
        for name in ["nodes.conf", "redis.conf", "users.acl"] {
            let text = std::fs::read_to_string(dir.join(name)).unwrap();
            for line in &tables[0] {
                let mut words = line.split(' ');
                let (id, address) = (words.next().unwrap(), words.next().unwrap().split('@').next().unwrap());
                assert!(!text.contains(id) && !text.contains(address), "'{name}' of {shard} names {line}:\n{text}");
            }
        }
    }
}

/// The clones are a cluster of three nodes, all new, that serves every slot and has every key as it was.
fn assert_serves(scene: &Scene, group: &str, job: &Value, wanted: &[Dump]) {
    let ports: Vec<String> = job["members"].as_array().unwrap().iter().map(port_of).collect();
    let mut clients = scene.clients(group);
    for (number, client) in clients.iter_mut().enumerate() {
        assert!(cluster_is_ok(client, 3), "{}", text(client.run(&["CLUSTER", "INFO"])));
        let table = table(client);
        for line in &table {
            assert!(ports.iter().any(|port| line.contains(&format!(" 127.0.0.1:{port}@"))), "{line} is not new");
            assert!(!line.contains("slave"), "{line} is a replica");
        }
        assert!(table.iter().any(|line| line.ends_with(&SLOTS[number].replace(' ', "-"))), "{table:?}");
        assert_eq!(client.dump(), wanted[number], "keys of {}", SHARDS[number]);
        let port: u16 = ports[number].parse().unwrap();
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(), "nobody listens at {port}");
    }
    // A client that asks the wrong node is sent to a new one.
    let foreign = String::from_utf8(wanted[1].keys().next().unwrap().clone()).unwrap();
    let Answer::Error(moved) = clients[0].ask(&[b"TYPE", foreign.as_bytes()]) else { panic!("{foreign} was answered") };
    assert!(moved.starts_with("MOVED") && moved.ends_with(&format!(":{}", ports[1])), "{moved}");
}

fn port_of(job: &Value) -> String {
    let results = job["results"].as_array().unwrap();
    results.iter().find(|line| line["name"] == "port").unwrap()["value"].as_str().unwrap().to_string()
}

/// A slot goes from one shard to another after the backups: a clone of a moment after that would have keys in slots that
/// its table gives to another node, and is refused; after new backups it is made.
fn a_moved_slot_is_noticed(scene: &Scene) {
    let id = |number: usize| text(scene.shards[number].run(&["CLUSTER", "MYID"]));
    let (from, to) = (id(0), id(1));
    let key = String::from_utf8(scene.shards[0].client().dump().into_keys().next().unwrap()).unwrap();
    let slot = scene.shards[0].run(&["CLUSTER", "KEYSLOT", &key]).number().to_string();
    scene.shards[1].run(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from]);
    scene.shards[0].run(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to]);
    let keys = scene.shards[0].run(&["CLUSTER", "GETKEYSINSLOT", &slot, "100"]).list();
    for key in keys {
        let (key, port) = (text(key), scene.ports[1].to_string());
        scene.shards[0].run(&["MIGRATE", "127.0.0.1", &port, &key, "0", "5000"]);
    }
    for number in [1, 0, 2] {
        scene.shards[number].run(&["CLUSTER", "SETSLOT", &slot, "NODE", &to]);
    }
    // The latest moment is a whole second: one that comes after this.
    scene.remember();
    let said = scene.a.keiki_fails(&["clone", "carts", "--to", "b", "--as", "moved", "--latest"]);
    assert!(
        said.contains(&format!("the clone has keys of slot {slot}")) && said.contains("backup of each shard"),
        "{said}"
    );
    scene.b.keiki_ok(&["discard", "moved", "--yes"]);
    assert!(SHARDS.iter().all(|shard| !scene.run_dir("moved", shard).exists()), "a discarded group left something");

    scene.back_up();
    let (wanted, _) = scene.remember();
    let done = scene.a.json(&["clone", "carts", "--to", "b", "--as", "moved", "--latest"]);
    assert_eq!(done["state"], "done", "{done:#}");
    for ((client, wanted), shard) in scene.clients("moved").iter_mut().zip(&wanted).zip(SHARDS) {
        assert!(cluster_is_ok(client, 3), "{shard}");
        assert_eq!(client.dump(), *wanted, "keys of {shard}");
    }
    scene.b.keiki_ok(&["discard", "moved", "--yes"]);
}
