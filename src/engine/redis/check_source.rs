//! What is wrong or risky with a server as a source, for `doctor` and before a backup.

use std::collections::BTreeMap;

use crate::engine::redis::source::{APPEND_ONLY_HINT, product_of};
use crate::engine::redis::{Inner, permissions};
use crate::error::{Context, Result};
use crate::model::bytes_text::human_bytes;
use crate::model::check::CheckItem;

/// Where a setting has a value that costs something: name, value, what it means, what to do.
const RISKS: [(&str, &str, &str, &str); 4] = [
    (
        "aof-timestamp-enabled",
        "no",
        "there are no times in the append-only file: a clone to a time is not possible",
        "redis-cli CONFIG SET aof-timestamp-enabled yes, then take a backup; CONFIG REWRITE keeps it",
    ),
    (
        "appendfsync",
        "no",
        "the server itself may lose many seconds when its host fails",
        "redis-cli CONFIG SET appendfsync everysec",
    ),
    (
        "aof-disable-auto-gc",
        "yes",
        "the server keeps every old append-only file for ever",
        "redis-cli CONFIG SET aof-disable-auto-gc no; keiki does not need it",
    ),
    (
        "rdbchecksum",
        "no",
        "damage in a snapshot cannot be noticed before it is loaded",
        "remove 'rdbchecksum no' from the server's configuration",
    ),
];

pub(super) async fn check_source(inner: &Inner) -> Result<Vec<CheckItem>> {
    let name = &inner.source().name;
    let asked = inner.with_session(async |session| {
        let info = session.info(&["server", "persistence", "replication", "cluster"]).await?;
        let settings = session.settings("*").await?;
        Ok((info, settings, permissions::check(session, &inner.source().endpoint, inner.source().log).await?))
    });
    let (info, settings, may) = asked.await.context(|| format!("cannot ask instance '{name}'"))?;
    let mut items = about_server(&info, &settings);
    items.push(may);
    if items.iter().all(|item| item.verdict != crate::model::check::Verdict::Fail) {
        items.push(match inner.observe().await {
            Ok(seen) => {
                let held: u64 = seen.files.iter().filter(|file| file.held.only_held).map(|file| file.held.bytes).sum();
                CheckItem::pass("log", format!("readable; {} held until it is shipped", human_bytes(held)))
            }
            Err(error) => CheckItem::fail("log", error.message(), error.hint_text().unwrap_or("see the agent's log")),
        });
    }
    Ok(items)
}

/// What the server says about itself. Pure.
fn about_server(info: &BTreeMap<String, String>, settings: &BTreeMap<String, String>) -> Vec<CheckItem> {
    let mut items = server_items(info);
    items.push(match info.get("aof_enabled").is_some_and(|value| value == "1") {
        true => CheckItem::pass("append-only file", "on"),
        false => CheckItem::fail("append-only file", "off: there is nothing to ship", APPEND_ONLY_HINT),
    });
    items.extend(risk_items(&RISKS, settings));
    items
}

/// What matters wherever the log comes from. Pure.
pub(super) fn server_items(info: &BTreeMap<String, String>) -> Vec<CheckItem> {
    let is = |key: &str, value: &str| info.get(key).is_some_and(|found| found == value);
    let mut items = vec![match product_of(info) {
        Ok((engine, version)) => CheckItem::pass("server", format!("{} {version} is running", engine.name())),
        Err(error) => CheckItem::fail("server", error.message(), error.hint_text().unwrap_or_default()),
    }];
    items.push(match is("role", "master") {
        true => CheckItem::pass("role", "primary"),
        false => CheckItem::fail("role", "the server is a replica", "configure keiki on the host of its primary"),
    });
    if is("cluster_enabled", "1") {
        items.push(CheckItem::warn(
            "cluster",
            "the server is one node of a cluster",
            "a clone of it has this node's keys only: for all of them, name all primaries in one [[group]] and clone that",
        ));
    }
    items
}

/// A warning for each setting that has a value which costs something. Pure.
pub(super) fn risk_items<'a>(
    risks: &'a [(&'a str, &'a str, &'a str, &'a str)],
    settings: &'a BTreeMap<String, String>,
) -> impl Iterator<Item = CheckItem> + 'a {
    let set = move |name: &str, value: &str| settings.get(name).is_some_and(|set| set == value);
    let found = risks.iter().filter(move |(name, value, ..)| set(name, value));
    found.map(|(name, _, found, hint)| CheckItem::warn(*name, *found, *hint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::check::{Verdict, worst};

    fn lines(lines: &[(&str, &str)]) -> BTreeMap<String, String> {
        lines.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    const GOOD: [(&str, &str); 3] = [("redis_version", "7.0.15"), ("role", "master"), ("aof_enabled", "1")];

    #[test]
    fn a_server_that_logs_passes_and_one_that_does_not_fails_with_the_command_to_type() {
        let settings = lines(&[("aof-timestamp-enabled", "yes"), ("appendfsync", "everysec")]);
        assert_eq!(worst(&about_server(&lines(&GOOD), &settings)), Verdict::Pass);
        let mut off = lines(&GOOD);
        off.insert("aof_enabled".into(), "0".into());
        let items = about_server(&off, &settings);
        let failed = items.iter().find(|item| item.verdict == Verdict::Fail).unwrap();
        assert!(failed.hint.as_ref().unwrap().contains("CONFIG SET appendonly yes"), "{failed:?}");
    }

    #[test]
    fn a_log_without_times_is_a_warning_that_says_what_is_lost() {
        let items = about_server(&lines(&GOOD), &lines(&[("aof-timestamp-enabled", "no")]));
        assert_eq!(worst(&items), Verdict::Warn);
        assert!(items.last().unwrap().found.contains("clone to a time"), "{items:?}");
    }
}
