//! A group of servers whose logs are their replication streams is cloned to a moment between two seconds; with a member
//! whose log counts in seconds it is not, and that member is named.

use jiff::Timestamp;

use super::support::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use super::support::postgres::server_user;
use super::support::redis::{Answer, Client, Product, TestRedis};
use super::support::two_hosts::SOON;

const STREAMED: [(&str, &str); 2] = [("appendonly", "no"), ("repl-diskless-sync-delay", "0")];
/// Two with a stream, and one with an append-only file.
const MEMBERS: [&str; 3] = ["cart", "sessions", "stock"];

fn start(lab: &Lab, servers: &[TestRedis; 3]) -> Host {
    let user = server_user().name;
    let instance = |(name, server): (&str, &TestRedis)| {
        let log = if name == "stock" { "" } else { "log = \"replication\"\n" };
        format!(
            "[[instance]]\nname = \"{name}\"\nengine = \"{}\"\ndata_dir = \"{}\"\nsocket = \"{}\"\nrun_as = \"{user}\"\n\
             ship_every = \"1s\"\n{log}",
            server.product.engine().name(),
            server.data_dir.display(),
            server.socket.display(),
        )
    };
    let mut sections: String = MEMBERS.into_iter().zip(servers).map(instance).collect();
    for product in [Product::Redis7, Product::Valkey9] {
        let (engine, bin_dir) = (product.engine().name(), product.bin_dir());
        sections += &format!("[clone.{engine}]\nrun_as = \"{user}\"\nbin_dir = \"{}\"\n", bin_dir.display());
    }
    sections += "[[group]]\nname = \"pair\"\nmembers = [\"cart\", \"sessions\"]\n";
    sections += "[[group]]\nname = \"three\"\nmembers = [\"cart\", \"sessions\", \"stock\"]\n";
    let repository = format!("file://{}", lab.path("repository").display());
    std::fs::create_dir(lab.path("repository")).unwrap();
    let clone_bin_dir = &Product::Redis7.bin_dir();
    let options =
        HostOptions { name: "a", repository, peers: vec![], sections, listen_port: free_port(), clone_bin_dir };
    let host = Host::start(lab, &options);
    host.keiki_ok(&["repository", "init"]);
    for name in MEMBERS {
        wait_for("archiving to begin", SOON, || host.instance(name)["state"] == "archiving");
        host.keiki_ok(&["backup", "create", name]);
    }
    host
}

fn has_received(server: &TestRedis, value: &[u8]) -> bool {
    let files = std::fs::read_dir(server.data_dir.join("keiki-stream")).unwrap().flatten();
    let mut contents = files.filter_map(|file| std::fs::read(file.path()).ok());
    contents.any(|bytes| bytes.windows(value.len()).any(|part| part == value))
}

#[test]
fn a_group_of_streams_is_cloned_to_a_moment_between_two_seconds_and_others_are_not() {
    let servers = [Product::Redis7, Product::Valkey9].map(|product| TestRedis::start_of(product, &STREAMED));
    let [cart, sessions] = servers;
    let servers = [cart, sessions, TestRedis::start(&[])];
    let lab = Lab::new();
    let host = start(&lab, &servers);
    let write = |value: &str| servers.iter().for_each(|server| drop(server.run(&["SET", "key", value])));
    write("before");
    for server in &servers[..2] {
        wait_for("the agent to receive it", SOON, || has_received(server, b"before"));
    }
    // Whatever it is, it is no whole second.
    let moment = Timestamp::from_millisecond(Timestamp::now().as_millisecond() / 10 * 10 + 11).unwrap();
    wait_for("the moment to pass", SOON, || Timestamp::now() > moment);
    write("after");

    let at = moment.to_string();
    let order = |group, name| ["clone", group, "--to", "a", "--as", name, "--at", &at].map(str::to_string);
    let said = host.keiki_fails(&order("three", "no").each_ref().map(String::as_str));
    assert!(said.contains("the log of 'a/stock' (redis) counts in whole seconds"), "{said}");
    host.keiki_ok(&order("pair", "then").each_ref().map(String::as_str));
    let found = |group: &str, member: &str| {
        let run_dir = lab.path("clones-a").join(format!("{group}-{member}.run"));
        Client::open(&run_dir.join("redis.sock")).run(&["GET", "key"])
    };
    host.keiki_ok(&["clone", "pair", "--to", "a", "--as", "now", "--latest"]);
    for member in &MEMBERS[..2] {
        assert_eq!(
            (found("then", member), found("now", member)),
            (Answer::text("before"), Answer::text("after")),
            "{member}"
        );
    }
    for group in ["then", "now"] {
        host.keiki_ok(&["discard", group, "--yes"]);
    }
}
