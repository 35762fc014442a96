//! What a clone of Redis must not take over from its source, with real servers that have all of it: whom they follow,
//! passwords for that, access control lists, other names of commands, TLS, places; and modules, which it must have.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::support::hosts::{Lab, free_port};
use super::support::postgres::server_user;
use super::support::redis::{Answer, Product, TestRedis};
use super::support::redis_stage::RedisStage;
use super::support::two_hosts::wait_until_state;

fn results_of(stage: &RedisStage, name: &str) -> BTreeMap<String, String> {
    let jobs = stage.b.json(&["job", "list"]);
    let job = jobs.as_array().unwrap().iter().find(|job| job["task"]["name"] == name).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_string();
    job["results"].as_array().unwrap().iter().map(|line| (text(&line["name"]), text(&line["value"]))).collect()
}

/// Certificates that the server's user can read.
fn certificates(lab: &Lab, dir: &Path) -> [String; 3] {
    let ca = lab.path("ca");
    lab.keiki_without_agent(&["ca", "issue", ca.to_str().unwrap(), "--host", "cache"]);
    let user = server_user();
    [("ca.pem", "ca.pem"), ("issued/cache.pem", "cache.pem"), ("issued/cache.key", "cache.key")].map(|(from, to)| {
        let path = dir.join(to);
        fs::copy(ca.join(from), &path).unwrap();
        std::os::unix::fs::chown(&path, Some(user.uid), Some(user.gid)).unwrap();
        path.to_str().unwrap().to_string()
    })
}

#[test]
fn a_clone_of_redis_leaves_behind_what_ties_its_source_to_others_and_says_so() {
    let lab = Lab::new();
    let place = lab.directory_of_server_user("source");
    let [ca, certificate, key] = certificates(&lab, &place);
    let acl = place.join("users.acl");
    fs::write(&acl, "user default on nopass ~* &* +@all\nuser app on >app-Password ~* +@all\n").unwrap();
    std::os::unix::fs::chown(&acl, Some(server_user().uid), Some(server_user().gid)).unwrap();
    let (log, pid) = (place.join("redis.log"), place.join("redis.pid"));
    let tls_port = free_port().to_string();
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let source = TestRedis::start(&[
        ("aclfile", &text(&acl)),
        ("logfile", &text(&log)),
        ("pidfile", &text(&pid)),
        ("tls-port", &tls_port),
        ("tls-ca-cert-file", &ca),
        ("tls-cert-file", &certificate),
        ("tls-key-file", &key),
        ("masterauth", "masters-Password"),
        ("masteruser", "follower"),
        ("replica-announce-ip", "10.1.2.3"),
        ("rename-command FLUSHALL", ""),
        ("rename-command KEYS", "LISTKEYS"),
    ]);
    source.run(&["SET", "a", "1"]);
    let (source_dir, source_socket) = (text(&source.data_dir), text(&source.socket));
    let stage = RedisStage::start(source, "");
    stage.a.keiki_ok(&["backup", "create", "cart"]);
    stage.a.keiki_ok(&["clone", "cart", "--to", "b", "--as", "copy"]);
    wait_until_state(&stage.b, "copy", "archiving");

    let said = results_of(&stage, "copy");
    let expected = [
        ("setting 'masterauth'", "it was set"),
        ("setting 'masteruser'", "'follower'"),
        ("setting 'replica-announce-ip'", "'10.1.2.3'"),
        ("setting 'aclfile'", acl.to_str().unwrap()),
        ("setting 'tls-port'", "speaks no TLS"),
        ("setting 'tls-key-file'", &key),
        ("setting 'logfile'", log.to_str().unwrap()),
        ("setting 'pidfile'", pid.to_str().unwrap()),
        ("setting 'unixsocket'", &source_socket),
        ("setting 'dir'", &source_dir),
        ("commands", "FLUSHALL, KEYS"),
        ("replication and cluster", "stands alone"),
    ];
    for (what, part) in expected {
        let found = said.get(what).unwrap_or_else(|| panic!("nothing is said about {what}: {said:#?}"));
        assert!(found.contains(part), "{what}: {found}");
    }
    // No file of the clone knows anything of it, and the running server neither.
    let clone_dir = stage.clone_dir("copy");
    for file in ["redis.conf", "users.acl"] {
        let conf = fs::read_to_string(clone_dir.join(file)).unwrap();
        for foreign in [
            "masters-Password",
            "follower",
            "10.1.2.3",
            "tls",
            "rename",
            source_dir.as_str(),
            source_socket.as_str(),
            place.to_str().unwrap(),
        ] {
            assert!(!conf.contains(foreign), "{file} has '{foreign}':\n{conf}");
        }
    }
    let mut copy = stage.client_of("copy");
    for (name, value) in [
        ("masterauth", ""),
        ("masteruser", ""),
        ("replicaof", ""),
        ("replica-announce-ip", ""),
        ("tls-port", "0"),
        ("cluster-enabled", "no"),
        ("dir", clone_dir.to_str().unwrap()),
        ("aclfile", clone_dir.join("users.acl").to_str().unwrap()),
    ] {
        let found = copy.run(&["CONFIG", "GET", name]).list();
        assert_eq!(found[1], Answer::text(value), "{name}");
    }
    assert_eq!(copy.info("role"), "master");
    assert_eq!(copy.run(&["KEYS", "*"]).list(), [Answer::text("a")]);
    assert_eq!(copy.ask(&[b"AUTH", b"app", b"app-Password"]), Answer::text("OK"));
    stage.b.keiki_ok(&["discard", "copy", "--yes"]);
}

/// A module with one type of data, so that its log cannot be loaded without it. Its declarations are those of Redis'
/// `redismodule.h` that it needs, written from the documentation ("Modules API reference").
const MODULE: &str = r#"
#include <stdint.h>
typedef struct Context Context;
typedef struct String String;
static int (*GetApi)(const char *, void *);
static void (*SetModuleAttribs)(Context *, const char *, int, int);
static int (*CreateCommand)(Context *, const char *, int (*)(Context *, String **, int), const char *, int, int, int);
static int (*ReplicateVerbatim)(Context *);
static int (*ReplyWithSimpleString)(Context *, const char *);
static int note(Context *context, String **words, int count) {
    (void)words; (void)count;
    ReplicateVerbatim(context);
    return ReplyWithSimpleString(context, "noted");
}
int RedisModule_OnLoad(Context *context, String **words, int count) {
    (void)words; (void)count;
    GetApi = (int (*)(const char *, void *))(uintptr_t)((void **)context)[0];
    GetApi("RedisModule_SetModuleAttribs", (void *)&SetModuleAttribs);
    GetApi("RedisModule_CreateCommand", (void *)&CreateCommand);
    GetApi("RedisModule_ReplicateVerbatim", (void *)&ReplicateVerbatim);
    GetApi("RedisModule_ReplyWithSimpleString", (void *)&ReplyWithSimpleString);
    SetModuleAttribs(context, "keiki_test", 1, 1);
    return CreateCommand(context, "keiki_test.note", note, "write", 0, 0, 0);
}
"#;

fn compile_module(dir: &Path) -> PathBuf {
    let (source, library) = (dir.join("module.c"), dir.join("keiki_test.so"));
    fs::write(&source, MODULE).unwrap();
    let output = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

#[test]
fn a_module_comes_along_by_its_path_and_one_that_is_missing_is_named_before_anything_starts() {
    for product in [Product::Redis7, Product::Valkey9] {
        let lab = Lab::new();
        let library = compile_module(&lab.directory_of_server_user("modules"));
        let path = library.to_str().unwrap();
        let source = TestRedis::start_of(product, &[("loadmodule", path)]);
        let stage = RedisStage::start(source, "");
        stage.a.keiki_ok(&["backup", "create", "cart"]);
        // In the log there is a command that only the module knows.
        stage.source.run(&["keiki_test.note"]);
        stage.source.run(&["SET", "a", "1"]);
        stage.a.keiki_ok(&["clone", "cart", "--to", "b", "--as", "copy"]);
        wait_until_state(&stage.b, "copy", "archiving");
        let mut copy = stage.client_of("copy");
        assert_eq!(copy.ask(&[b"GET", b"a"]), Answer::text("1"));
        assert_eq!(copy.ask(&[b"keiki_test.note"]), Answer::text("noted"));
        assert!(results_of(&stage, "copy")["modules"].contains("keiki_test"), "{:#?}", results_of(&stage, "copy"));
        stage.b.keiki_ok(&["discard", "copy", "--yes"]);

        fs::rename(&library, library.with_extension("away")).unwrap();
        let said = stage.a.keiki_fails(&["clone", "cart", "--to", "b", "--as", "copy"]);
        assert!(said.contains(&format!("missing here: 'keiki_test' ({path})")), "{said}");
        assert!(said.contains("hint: install them at the same paths"), "{said}");
        assert!(!stage.clone_dir("copy").exists());
    }
}
