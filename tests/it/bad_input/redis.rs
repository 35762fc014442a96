//! What can be wrong with a source of Redis or Valkey: its settings, its files, its answers, what it lets the agent do.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::super::support::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use super::super::support::postgres::server_user;
use super::super::support::redis::{Product, TestRedis};
use super::super::support::two_hosts::{SOON, wait_until_state};
use super::{Mask, Said, assert_unchanged, standing};

/// One instance of the host, with what is wrong with it.
struct Sick {
    name: &'static str,
    server: TestRedis,
    /// What the configuration calls it.
    engine: &'static str,
    lines: String,
}

fn sick(name: &'static str, server: TestRedis) -> Sick {
    let engine = server.product.engine().name();
    Sick { name, server, engine, lines: String::new() }
}

fn section(name: &str, engine: &str, data_dir: &Path, socket: &Path, lines: &str) -> String {
    format!(
        "[[instance]]\nname = \"{name}\"\nengine = \"{engine}\"\ndata_dir = \"{}\"\nsocket = \"{}\"\nrun_as = \"{}\"\n\
         ship_every = \"1s\"\n{lines}\n",
        data_dir.display(),
        socket.display(),
        server_user().name,
    )
}

/// A socket on which every question gets this answer.
fn answers(lab: &Lab, name: &str, answer: &'static [u8]) -> (PathBuf, PathBuf) {
    let dir = lab.directory_of_server_user(name);
    let socket = lab.path(&format!("{name}.sock"));
    let listener = UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
    // It ends with the process of the test.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut question = [0; 4096];
            while stream.read(&mut question).is_ok_and(|bytes| bytes > 0) {
                if stream.write_all(answer).is_err() {
                    break;
                }
            }
        }
    });
    (dir, socket)
}

fn password_file(lab: &Lab, name: &str) -> String {
    let path = lab.path(name);
    fs::write(&path, "not-the-password\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    format!("password_file = \"{}\"", path.display())
}

/// The file of a server's append-only directory whose name has this in it.
fn append_file(server: &TestRedis, part: &str) -> PathBuf {
    let entries = fs::read_dir(server.data_dir.join("appendonlydir")).unwrap();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.file_name().unwrap().to_str().unwrap().contains(part));
    found.sort();
    found.pop().unwrap_or_else(|| panic!("no '{part}' in '{}'", server.data_dir.display()))
}

/// All kinds of instances; those whose files get damaged are still sound.
fn instances(lab: &Lab) -> Vec<Sick> {
    let mut all = vec![
        sick("off", TestRedis::start(&[("appendonly", "no")])),
        sick("untimed", TestRedis::start(&[("aof-timestamp-enabled", "no")])),
        sick("replica", TestRedis::start(&[("replicaof 127.0.0.1", "1")])),
        // The programs for clones here are those of Redis 7 and Valkey 8.
        sick("newer", TestRedis::start_of(Product::Redis8, &[])),
        sick("newer-valkey", TestRedis::start_of(Product::Valkey9, &[])),
        Sick { engine: "redis", ..sick("valkey", TestRedis::start_of(Product::Valkey8, &[])) },
        Sick { engine: "valkey", ..sick("redis", TestRedis::start(&[])) },
    ];
    let locked = sick("locked", TestRedis::start(&[]));
    let mut wrong = sick("wrong", TestRedis::start(&[]));
    wrong.lines = password_file(lab, "wrong-password");
    for one in [&locked, &wrong] {
        one.server.run(&["CONFIG", "SET", "requirepass", "s3cret"]);
    }
    let mut limited = sick("limited", TestRedis::start(&[]));
    limited.server.run(&["ACL", "SETUSER", "watcher", "on", ">not-the-password", "+ping", "+info"]);
    limited.lines = format!("user = \"watcher\"\n{}", password_file(lab, "limited-password"));
    all.extend([locked, wrong, limited]);
    for name in ["flipped", "no-base", "no-increment", "torn", "tight"] {
        let one = sick(name, TestRedis::start(&[]));
        let mut client = one.server.client();
        for number in 0..100 {
            client.run(&["SET", &format!("key:{number}"), &format!("value {number}")]);
        }
        // Enough to be counted in MiB on every machine.
        client.run(&["SET", "large", &"x".repeat(3 << 20)]);
        one.server.rewrite();
        client.run(&["SET", "after", "1"]);
        all.push(one);
    }
    all
}

fn damage(all: &[Sick]) {
    let server = |name: &str| &all.iter().find(|one| one.name == name).unwrap().server;
    let base = append_file(server("flipped"), ".base.rdb");
    let mut bytes = fs::read(&base).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&base, bytes).unwrap();
    fs::remove_file(append_file(server("no-base"), ".base.rdb")).unwrap();
    fs::remove_file(append_file(server("no-increment"), ".incr.aof")).unwrap();
    // Where a command began there are zeros, as a disk may leave them behind.
    let torn = append_file(server("torn"), ".incr.aof");
    let mut bytes = fs::read(&torn).unwrap();
    let last = bytes.iter().rposition(|byte| *byte == b'*').unwrap();
    bytes[last..].fill(0);
    fs::write(&torn, bytes).unwrap();
    server("torn").run(&["SET", "behind", "1"]);
}

#[test]
fn a_source_of_redis_that_cannot_be_backed_up_or_cloned_is_refused_with_what_to_do() {
    let lab = Lab::new();
    let repository = lab.path("repository");
    fs::create_dir(&repository).unwrap();
    let all = instances(&lab);
    let fakes = [
        ("endless", answers(&lab, "endless", b"*999999999\r\n")),
        ("huge", answers(&lab, "huge", b"$999999999999\r\n")),
        (
            "nested",
            answers(&lab, "nested", b"*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n"),
        ),
        ("website", answers(&lab, "website", b"HTTP/1.1 400 Bad Request\r\n\r\n")),
    ];
    let mut sections = format!(
        "[clone.redis]\nrun_as = \"{user}\"\nbin_dir = \"{}\"\n[clone.valkey]\nrun_as = \"{user}\"\nbin_dir = \"{}\"\n",
        Product::Redis7.bin_dir().display(),
        Product::Valkey8.bin_dir().display(),
        user = server_user().name,
    );
    for one in &all {
        sections += &section(one.name, one.engine, &one.server.data_dir, &one.server.socket, &one.lines);
    }
    for (name, (dir, socket)) in &fakes {
        sections += &section(name, "redis", dir, socket, "");
    }
    let bin_dir = Product::Redis7.bin_dir();
    let mut host = Host::start(
        &lab,
        &HostOptions {
            name: "a",
            repository: format!("file://{}", repository.display()),
            peers: vec![],
            sections,
            listen_port: free_port(),
            clone_bin_dir: &bin_dir,
        },
    );
    host.keiki_ok(&["repository", "init"]);
    for name in ["untimed", "newer", "newer-valkey", "flipped", "no-base", "no-increment", "torn", "tight"] {
        wait_until_state(&host, name, "archiving");
    }
    for name in ["untimed", "tight", "newer", "newer-valkey"] {
        host.keiki_ok(&["backup", "create", name]);
    }
    // A whole second behind the backups, of which the log of both tells nothing or everything.
    let at = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second() + 1).unwrap().to_string();
    wait_for("that second to pass", SOON, || jiff::Timestamp::now().to_string() > at);
    host.stop_agent();
    damage(&all);
    host.start_agent();
    wait_for("the damage to be noticed", SOON, || !host.instance("torn")["problem"].is_null());

    let mut mask = Mask::default().known(lab.path("").display(), "LAB/");
    for one in &all {
        mask = mask.known(one.server.data_dir.display(), "SOURCE").known(one.server.socket.display(), "SOCKET");
    }
    let mut said = Said::new(mask);
    let hosts = [&host];
    let before = standing(&lab, &hosts, &repository);
    let backups = [
        ("off", "CONFIG SET appendonly yes"),
        ("replica", "is a replica"),
        ("valkey", "engine = \"valkey\""),
        ("redis", "engine = \"redis\""),
        ("locked", "NOAUTH"),
        ("wrong", "WRONGPASS"),
        ("limited", "ACL SETUSER"),
        ("flipped", "is damaged on the source"),
        ("no-base", "which is not there"),
        ("no-increment", "which is not there"),
        ("torn", "is damaged at byte"),
        ("endless", "is longer than"),
        ("huge", "is longer than"),
        ("nested", "nested too deep"),
        ("website", "not in the protocol of Redis"),
    ];
    for (name, expected) in backups {
        said.refuses(&host, &["backup", "create", name], expected);
    }
    let past = "2026-01-01 00:00:00Z";
    let limit = ["--set", "maxmemory=100kb", "--set", "maxmemory-policy=allkeys-lru"];
    said.refuses(&host, &["clone", "off", "--as", "copy", "--at", past], "appendonly yes");
    said.refuses(&host, &["clone", "untimed", "--as", "copy", "--at", &at], "aof-timestamp-enabled yes");
    said.refuses(&host, &["clone", "newer", "--as", "copy"], "which is older");
    said.refuses(&host, &["clone", "newer-valkey", "--as", "copy"], "which is older");
    said.refuses(&host, &[&["clone", "tight", "--as", "copy"], &limit[..]].concat(), "throw keys away");
    assert_unchanged(&before, &lab, &hosts, &repository, "sick sources");
    let doctor = host.keiki(&["doctor"]);
    let list = String::from_utf8_lossy(&doctor.stdout).into_owned();
    for expected in ["CONFIG SET appendonly yes", "the server is a replica", "WRONGPASS", "ACL SETUSER"] {
        assert!(list.contains(expected), "doctor does not say '{expected}':\n{list}");
    }
    insta::assert_snapshot!(said.finish());

    // The advice to a user of few rights: is good: what it says is enough.
    let hint = host.keiki_fails(&["backup", "create", "limited"]);
    let rules = hint.split_once("SETUSER USER ").unwrap().1.trim().to_string();
    let limited = &all.iter().find(|one| one.name == "limited").unwrap().server;
    limited.run(&[&["ACL", "SETUSER", "watcher"], &rules.split(' ').collect::<Vec<_>>()[..]].concat());
    wait_until_state(&host, "limited", "archiving");
    host.keiki_ok(&["backup", "create", "limited"]);

    // And so is the one about the torn file.
    let torn = &all.iter().find(|one| one.name == "torn").unwrap().server;
    torn.rewrite();
    for entry in fs::read_dir(torn.data_dir.join("appendonlydir/keiki-held")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|suffix| suffix == "aof") && fs::metadata(&path).unwrap().nlink() == 1 {
            fs::remove_file(path).unwrap();
        }
    }
    wait_until_state(&host, "torn", "archiving");
    wait_for("the problem to be over", SOON, || host.instance("torn")["problem"].is_null());
    host.keiki_ok(&["backup", "create", "torn"]);
}
