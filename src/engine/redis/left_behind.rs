//! What a source has that its clone does not take over and that somebody may miss: whom it follows, its cluster, how it is
//! reached, where it writes. A backup remembers it as facts, and the clean-up of a clone reports it. Pure.
//!
//! Secrets are never remembered, only that there was one.

use std::collections::BTreeMap;

use crate::engine::CleanUpItem;

/// Facts of a backup: `left.<setting>` with its value.
const FACT_PREFIX: &str = "left.";
/// Fact of a backup: commands that the source does not know by their own names.
const RENAMED_FACT: &str = "renamed_commands";

/// A setting, the value that says nothing, and what its loss means.
const SETTINGS: [(&str, &str, &str); 15] = [
    ("replicaof", "", "the clone follows nobody"),
    ("masterauth", "", "the clone follows nobody"),
    ("masteruser", "", "the clone follows nobody"),
    ("replica-announce-ip", "", "nobody follows the clone"),
    ("replica-announce-port", "0", "nobody follows the clone"),
    ("min-replicas-to-write", "0", "nobody follows the clone"),
    ("cluster-announce-ip", "", "it belongs to the source's host"),
    ("aclfile", "", "the clone has an access control list of its own"),
    ("tls-port", "0", "the clone speaks no TLS before '--set' or its configuration says so"),
    ("tls-cert-file", "", "it belongs to the source's host"),
    ("tls-key-file", "", "it belongs to the source's host"),
    ("unixsocket", "", "the clone has a socket of its own"),
    ("logfile", "", "the clone writes its log beside its data directory"),
    ("pidfile", "", "the clone has a file of its own"),
    ("dir", "", "the clone has a directory of its own"),
];

/// Their values are never written down.
const SECRETS: [&str; 1] = ["masterauth"];

/// Commands that people rename or disable (`rename-command`), and the only trace of it: the server does not know them.
pub(super) const OFTEN_RENAMED: [&str; 12] = [
    "CONFIG",
    "DEBUG",
    "EVAL",
    "FLUSHALL",
    "FLUSHDB",
    "KEYS",
    "MODULE",
    "MONITOR",
    "REPLICAOF",
    "SAVE",
    "SHUTDOWN",
    "SLAVEOF",
];

/// The facts in a source's settings.
pub(super) fn facts(settings: &BTreeMap<String, String>) -> Vec<(String, String)> {
    let rows = SETTINGS.iter().filter_map(|(name, nothing, _)| {
        let value = settings.get(*name).filter(|value| value != nothing && !value.is_empty())?;
        let shown = if SECRETS.contains(name) { "set" } else { value.as_str() };
        Some((format!("{FACT_PREFIX}{name}"), shown.to_string()))
    });
    rows.collect()
}

/// The fact about commands that the source does not know, if there are any.
pub(super) fn renamed_fact(unknown: &[&str]) -> Option<(String, String)> {
    (!unknown.is_empty()).then(|| (RENAMED_FACT.to_string(), unknown.join(", ")))
}

/// The lines of the report about all of it.
pub(super) fn items(facts: &BTreeMap<String, String>) -> Vec<CleanUpItem> {
    let of_setting = |(name, _, means): &(&str, &str, &str)| {
        let value = facts.get(&format!("{FACT_PREFIX}{name}"))?;
        let was = if SECRETS.contains(name) { "it was set".to_string() } else { format!("it was '{value}'") };
        Some(CleanUpItem { what: format!("setting '{name}'"), done: format!("not taken over, {was}: {means}") })
    };
    let mut items: Vec<CleanUpItem> = SETTINGS.iter().filter_map(of_setting).collect();
    items.extend(facts.get(RENAMED_FACT).map(|names| CleanUpItem {
        what: "commands".to_string(),
        done: format!("the source has these under other names or not at all, the clone has them as they are: {names}"),
    }));
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_taken_over_is_told_and_no_secret_is_remembered() {
        let settings = [
            ("replicaof", "db1 6379"),
            ("masterauth", "s3cret"),
            ("masteruser", ""),
            ("tls-port", "0"),
            ("aclfile", "/etc/redis/users.acl"),
            ("maxmemory", "100"),
        ];
        let settings = settings.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let mut facts: BTreeMap<String, String> = super::facts(&settings).into_iter().collect();
        facts.extend(renamed_fact(&["KEYS", "FLUSHALL"]));
        assert_eq!(renamed_fact(&[]), None);
        assert!(!format!("{facts:?}").contains("s3cret"));
        let said: Vec<String> = items(&facts).iter().map(|item| format!("{}: {}", item.what, item.done)).collect();
        assert_eq!(said.len(), 4, "{said:#?}");
        assert_eq!(said[0], "setting 'replicaof': not taken over, it was 'db1 6379': the clone follows nobody");
        assert!(said[1].contains("it was set"), "{said:?}");
        assert!(said[3].ends_with("as they are: KEYS, FLUSHALL"), "{said:?}");
    }
}
