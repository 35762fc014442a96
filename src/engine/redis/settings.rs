//! What a backup remembers of the source's settings, and the configuration files of a clone made from it. Pure.
//!
//! Invariants: of the source's settings only those of [`KEPT`] go into a clone, because they say how data are stored and
//! limited; whatever names a place, another server or a secret does not. What the order sets comes last and wins.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use crate::engine::redis::cluster;
use crate::error::{Error, Kind, Result};

/// Facts of a backup: `setting.<name>`, `acl.<number>` (a line of ACL LIST) and `module.<name>` (path and arguments).
pub const SETTING_FACT_PREFIX: &str = "setting.";
pub const ACL_FACT_PREFIX: &str = "acl.";
pub const MODULE_FACT_PREFIX: &str = "module.";

/// Where things lie in a data directory of a clone, and in the base backup.
pub const APPEND_DIR: &str = "appendonlydir";
pub const APPEND_FILE: &str = "appendonly.aof";
pub const ACL_FILE: &str = "users.acl";
pub const CONF_FILE: &str = "redis.conf";
/// In the run directory of a clone.
pub const QUARANTINE_CONF_FILE: &str = "quarantine.conf";
pub const SOCKET_FILE: &str = "redis.sock";
pub const LOG_FILE: &str = "redis.log";
/// The agent's own way into an accepted clone: a user of its access control list, and the file with the password.
pub const AGENT_USER: &str = "keiki";
pub const AGENT_PASSWORD_FILE: &str = "keiki.password";
/// What the agent's user may do: ask about the server, and nothing about the data.
pub const AGENT_RULES: &str = "resetkeys resetchannels -@all +auth +ping +time +info +config|get +bgrewriteaof +acl|list +module|list +cluster|info +cluster|nodes";

/// The settings that a clone takes over from its source.
const KEPT: [&str; 53] = [
    "databases",
    "maxmemory",
    "maxmemory-policy",
    "maxmemory-samples",
    "maxmemory-clients",
    "maxmemory-eviction-tenacity",
    "maxclients",
    "timeout",
    "tcp-keepalive",
    "hash-max-listpack-entries",
    "hash-max-listpack-value",
    "list-max-listpack-size",
    "list-compress-depth",
    "set-max-intset-entries",
    "set-max-listpack-entries",
    "set-max-listpack-value",
    "zset-max-listpack-entries",
    "zset-max-listpack-value",
    "hll-sparse-max-bytes",
    "stream-node-max-bytes",
    "stream-node-max-entries",
    "activerehashing",
    "active-expire-effort",
    "activedefrag",
    "lazyfree-lazy-eviction",
    "lazyfree-lazy-expire",
    "lazyfree-lazy-server-del",
    "lazyfree-lazy-user-del",
    "lazyfree-lazy-user-flush",
    "appendfsync",
    "no-appendfsync-on-rewrite",
    "auto-aof-rewrite-percentage",
    "auto-aof-rewrite-min-size",
    "aof-timestamp-enabled",
    "aof-use-rdb-preamble",
    "rdbcompression",
    "rdbchecksum",
    "save",
    "stop-writes-on-bgsave-error",
    "notify-keyspace-events",
    "slowlog-log-slower-than",
    "slowlog-max-len",
    "latency-monitor-threshold",
    "lfu-log-factor",
    "lfu-decay-time",
    "proto-max-bulk-len",
    "client-query-buffer-limit",
    "client-output-buffer-limit",
    "busy-reply-threshold",
    "acl-pubsub-default",
    "hz",
    "dynamic-hz",
    "io-threads",
];

/// Settings whose value is a list of words and not one word.
const OF_WORDS: [&str; 2] = ["save", "client-output-buffer-limit"];

/// What an order may not set, because it is what makes the clone a clone of its own.
const NOT_BY_ORDER: [&str; 14] = [
    "port",
    "dir",
    "replicaof",
    "slaveof",
    "appendonly",
    "appendfilename",
    "appenddirname",
    "unixsocket",
    "aclfile",
    "daemonize",
    "pidfile",
    "cluster-config-file",
    "include",
    "requirepass",
];

/// The settings that go into the facts of a backup.
pub fn facts_of_settings(settings: &BTreeMap<String, String>) -> impl Iterator<Item = (String, String)> {
    KEPT.iter().filter_map(|name| {
        let value = settings.get(*name)?;
        Some((format!("{SETTING_FACT_PREFIX}{name}"), value.clone()))
    })
}

/// A module that the source had loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    pub name: String,
    /// Empty for one that is built into the server.
    pub path: String,
    pub arguments: Vec<String>,
}

impl Module {
    /// As a fact: path and arguments in lines.
    pub fn fact(&self) -> (String, String) {
        let mut value = self.path.clone();
        for argument in &self.arguments {
            value += "\n";
            value += argument;
        }
        (format!("{MODULE_FACT_PREFIX}{}", self.name), value)
    }
}

/// The modules in the facts of a backup.
pub fn modules(facts: &BTreeMap<String, String>) -> Vec<Module> {
    let rows = facts.iter().filter_map(|(key, value)| Some((key.strip_prefix(MODULE_FACT_PREFIX)?, value)));
    rows.map(|(name, value)| {
        let mut lines = value.lines().map(str::to_string);
        Module { name: name.to_string(), path: lines.next().unwrap_or_default(), arguments: lines.collect() }
    })
    .collect()
}

/// The lines of the access control list in the facts of a backup.
pub fn acl_lines(facts: &BTreeMap<String, String>) -> Vec<String> {
    let mut rows: Vec<(u64, &String)> = facts
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(ACL_FACT_PREFIX)?.parse().ok()?, value)))
        .collect();
    rows.sort();
    rows.into_iter().map(|(_, line)| line.clone()).collect()
}

/// The access control list of an accepted clone: the source's users with their password hashes, and the agent's own user.
pub fn acl_file(facts: &BTreeMap<String, String>, agent_password_sha256: &str) -> String {
    let own = format!("user {AGENT_USER} ");
    let mut text = String::new();
    for line in acl_lines(facts).iter().filter(|line| !line.starts_with(&own) && !line.contains(['\n', '\r'])) {
        text += line;
        text += "\n";
    }
    text + &format!("user {AGENT_USER} on #{agent_password_sha256} {AGENT_RULES}\n")
}

/// Whether these settings can be ordered for a clone.
pub fn check_ordered(settings: &BTreeMap<String, String>) -> Result<()> {
    for (name, value) in settings {
        let lower = name.to_ascii_lowercase();
        if NOT_BY_ORDER.contains(&lower.as_str()) {
            return Err(Error::new(Kind::BadInput, format!("setting '{name}' cannot be chosen for a clone"))
                .hint("keiki sets it; leave it out"));
        }
        let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if !is_name || value.contains(['\n', '\r', '\0']) {
            return Err(Error::new(Kind::BadInput, format!("'{name}' with value '{value}' is not a setting of Redis"))
                .hint("write it as in redis.conf, as in 'maxmemory=2gb'"));
        }
    }
    Ok(())
}

/// Where a clone is, for its configuration files.
#[derive(Debug, Clone, Copy)]
pub struct ConfInput<'a> {
    pub data_dir: &'a Path,
    pub run_dir: &'a Path,
    pub port: u16,
    pub listen_addresses: &'a str,
    pub facts: &'a BTreeMap<String, String>,
    pub ordered: &'a BTreeMap<String, String>,
    /// So many databases at least are in the data.
    pub databases_used: u32,
}

/// What a server has if its configuration says nothing (`databases`).
const DATABASES_DEFAULT: u64 = 16;
/// More are not believed to be used: a server makes all of them when it starts.
const DATABASES_USED_MAX: u32 = 1 << 16;

/// How many databases a clone has: as many as its source, as were ordered or as are used, whichever is most. A SELECT of
/// one that is not there would leave the commands behind it in another.
pub fn databases_of(facts: &BTreeMap<String, String>, ordered: &BTreeMap<String, String>, used: u32) -> u64 {
    let number = |text: &String| text.parse::<u64>().ok();
    let fact = |name: &str| facts.get(&format!("{SETTING_FACT_PREFIX}{name}")).and_then(number);
    let used = Some(used).filter(|used| *used <= DATABASES_USED_MAX).map(u64::from);
    let of_source = fact("databases").unwrap_or(DATABASES_DEFAULT);
    // In quarantine a node of a cluster is none.
    let others = [fact("cluster-databases"), databases_ordered(ordered).and_then(number), used];
    others.into_iter().flatten().fold(of_source, u64::max)
}

/// What an order says about the number of databases.
pub fn databases_ordered(ordered: &BTreeMap<String, String>) -> Option<&String> {
    ordered.iter().find(|(name, _)| name.eq_ignore_ascii_case("databases")).map(|(_, value)| value)
}

/// The configuration of a clone in quarantine: reached through one socket in a private directory, following nobody,
/// rewriting nothing, evicting nothing, and refusing a log that is damaged anywhere.
pub fn quarantine_conf(input: ConfInput<'_>) -> String {
    let mut conf = Conf::begin("a clone in quarantine; it is replaced when the clone is accepted");
    conf.common(input);
    conf.set("port", "0");
    conf.set("save", "");
    conf.set("aof-load-truncated", "no");
    conf.set("auto-aof-rewrite-percentage", "0");
    conf.set("appendfsync", "everysec");
    conf.set("maxmemory", "0");
    conf.set("maxmemory-policy", "noeviction");
    conf.take_over(input, "proto-max-bulk-len");
    conf.set("databases", &databases_of(input.facts, input.ordered, input.databases_used).to_string());
    conf.text
}

/// The configuration of an accepted clone.
pub fn final_conf(input: ConfInput<'_>) -> String {
    let mut conf = Conf::begin("a clone; yours to change. '--set' of the order and 'CONFIG REWRITE' end up here too");
    conf.common(input);
    conf.set("port", &input.port.to_string());
    conf.words("bind", &bind_addresses(input.listen_addresses));
    conf.set("protected-mode", "yes");
    conf.set("aclfile", &input.data_dir.join(ACL_FILE).display().to_string());
    for name in KEPT {
        conf.take_over(input, name);
    }
    let databases = databases_of(input.facts, input.ordered, input.databases_used);
    conf.set("databases", &databases.to_string());
    let more = Some(databases).filter(|more| *more > databases_of(input.facts, &BTreeMap::new(), 0));
    for (name, value) in cluster::settings_of(input.facts, more) {
        conf.set(name, &value);
    }
    for (name, value) in input.ordered.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("databases")) {
        conf.set_any(&name.to_ascii_lowercase(), value);
    }
    conf.text
}

/// `localhost` and `*` in the words of `bind`.
fn bind_addresses(listen: &str) -> String {
    let words = listen.split([',', ' ']).filter(|word| !word.is_empty());
    let words = words.map(|word| match word {
        "localhost" => "127.0.0.1 -::1",
        "*" => "* -::*",
        other => other,
    });
    words.collect::<Vec<_>>().join(" ")
}

struct Conf {
    text: String,
}

impl Conf {
    fn begin(what: &str) -> Conf {
        Conf { text: format!("# Written by keiki for {what}.\n") }
    }

    fn common(&mut self, input: ConfInput<'_>) {
        self.set("daemonize", "no");
        self.set("dir", &input.data_dir.display().to_string());
        self.set("unixsocket", &input.run_dir.join(SOCKET_FILE).display().to_string());
        self.set("unixsocketperm", "700");
        self.set("pidfile", &input.run_dir.join("redis.pid").display().to_string());
        self.set("logfile", "");
        self.set("appendonly", "yes");
        self.set("appenddirname", APPEND_DIR);
        self.set("appendfilename", APPEND_FILE);
        for module in modules(input.facts).iter().filter(|module| !module.path.is_empty()) {
            let words: Vec<String> =
                [&module.path].into_iter().chain(&module.arguments).map(|word| quoted(word)).collect();
            self.words("loadmodule", &words.join(" "));
        }
    }

    fn take_over(&mut self, input: ConfInput<'_>, name: &str) {
        let value = input.facts.get(&format!("{SETTING_FACT_PREFIX}{name}"));
        if let Some(value) = value.filter(|value| !value.contains(['\n', '\r'])) {
            self.set_any(name, value);
        }
    }

    fn set_any(&mut self, name: &str, value: &str) {
        if OF_WORDS.contains(&name) && !value.is_empty() { self.words(name, value) } else { self.set(name, value) }
    }

    fn set(&mut self, name: &str, value: &str) {
        self.words(name, &quoted(value));
    }

    fn words(&mut self, name: &str, words: &str) {
        // Writing into a string cannot fail.
        let _ = writeln!(self.text, "{name} {words}");
    }
}

/// A word as `sdssplitargs` reads it.
fn quoted(word: &str) -> String {
    let is_plain =
        !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./:".contains(&byte));
    if is_plain {
        return word.to_string();
    }
    let mut text = String::from("\"");
    for letter in word.chars() {
        match letter {
            '"' | '\\' => text.extend(['\\', letter]),
            letter => text.push(letter),
        }
    }
    text + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> BTreeMap<String, String> {
        let settings = [
            ("databases", "4"),
            ("maxmemory", "1000"),
            ("save", "3600 1 300 100"),
            ("replicaof", "db1 6379"),
            ("masterauth", "secret"),
            ("requirepass", "secret"),
            ("cluster-enabled", "yes"),
            ("dir", "/var/lib/redis"),
        ];
        let settings = settings.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let mut facts: BTreeMap<String, String> = facts_of_settings(&settings).collect();
        for number in 0..12 {
            facts.insert(format!("{ACL_FACT_PREFIX}{number}"), format!("user u{number} on #ab ~* +@all"));
        }
        facts.insert(format!("{ACL_FACT_PREFIX}12"), "user keiki on #old +@all".to_string());
        let module = Module { name: "m".into(), path: "/lib/m.so".into(), arguments: vec!["a b".into()] };
        facts.extend([module.fact()]);
        facts
    }

    fn input<'a>(facts: &'a BTreeMap<String, String>, ordered: &'a BTreeMap<String, String>) -> ConfInput<'a> {
        ConfInput {
            data_dir: Path::new("/srv/clones/o c"),
            run_dir: Path::new("/srv/clones/oc.run"),
            port: 5500,
            listen_addresses: "localhost",
            facts,
            ordered,
            databases_used: 0,
        }
    }

    #[test]
    fn a_clone_has_every_database_that_anybody_uses_or_orders() {
        let (facts, mut ordered) = (facts(), BTreeMap::new());
        let both = |ordered: &BTreeMap<String, String>, databases_used: u32| {
            let input = ConfInput { databases_used, ..input(&facts, ordered) };
            [quarantine_conf(input), final_conf(input)].map(|conf| {
                let mut found = conf.lines().filter_map(|line| line.strip_prefix("databases "));
                found.next_back().unwrap().to_string()
            })
        };
        assert_eq!(both(&ordered, 0), ["4", "4"]);
        assert_eq!(both(&ordered, 21), ["21", "21"]);
        assert_eq!(both(&ordered, u32::MAX), ["4", "4"], "no server has so many");
        for (name, value, most) in [("Databases", "2", "4"), ("databases", "32", "32")] {
            ordered = [(name.to_string(), value.to_string())].into();
            assert_eq!(both(&ordered, 0), [most, most]);
        }
        let node = [(format!("{SETTING_FACT_PREFIX}cluster-databases"), "20".to_string())].into();
        assert_eq!(databases_of(&node, &BTreeMap::new(), 0), 20);
        assert_eq!(databases_of(&BTreeMap::new(), &BTreeMap::new(), 0), 16);
    }

    #[test]
    fn a_clone_in_quarantine_listens_nowhere_and_follows_nobody() {
        let (facts, ordered) = (facts(), BTreeMap::new());
        let conf = quarantine_conf(input(&facts, &ordered));
        for line in
            ["port 0", "save \"\"", "aof-load-truncated no", "databases 4", "dir \"/srv/clones/o c\"", "maxmemory 0"]
        {
            assert!(conf.lines().any(|found| found == line), "{line} is not in\n{conf}");
        }
        assert!(conf.contains("loadmodule /lib/m.so \"a b\"\n"), "{conf}");
        for foreign in ["replicaof", "masterauth", "secret", "cluster", "bind"] {
            assert!(!conf.contains(foreign), "{foreign} is in\n{conf}");
        }
    }

    #[test]
    fn an_accepted_clone_keeps_limits_and_users_but_no_secrets_and_no_ties() {
        let facts = facts();
        let ordered = [("MaxMemory".to_string(), "2gb".to_string())].into();
        let conf = final_conf(input(&facts, &ordered));
        assert!(conf.contains("\nsave 3600 1 300 100\n") && conf.contains("\nport 5500\n"), "{conf}");
        assert!(conf.contains("\nbind 127.0.0.1 -::1\n"), "{conf}");
        assert!(conf.ends_with("maxmemory 2gb\n"), "what was ordered comes last: {conf}");
        for foreign in ["replicaof", "masterauth", "secret", "cluster", "/var/lib/redis"] {
            assert!(!conf.contains(foreign), "{foreign} is in\n{conf}");
        }
        let acl = acl_file(&facts, "ffff");
        assert_eq!(acl.lines().count(), 13);
        assert!(acl.lines().nth(11).unwrap().starts_with("user u11 "), "{acl}");
        assert!(acl.contains("user keiki on #ffff ") && !acl.contains("#old"), "{acl}");
    }

    #[test]
    fn an_order_cannot_untie_what_makes_the_clone_its_own() {
        for (name, value) in [("replicaof", "a 1"), ("DIR", "/"), ("x\ny", "1"), ("maxmemory", "1\nreplicaof a 1")] {
            let ordered = [(name.to_string(), value.to_string())].into();
            assert_eq!(check_ordered(&ordered).unwrap_err().kind(), Kind::BadInput, "{name}");
        }
        check_ordered(&[("maxmemory".to_string(), "2gb".to_string())].into()).unwrap();
    }
}
