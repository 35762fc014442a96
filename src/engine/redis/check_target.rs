//! What this host lacks to run a clone: the program, its version, modules, memory, the user.

use std::path::Path;

use jiff::Timestamp;

use crate::base::bulk::run_blocking;
use crate::base::memory::memory;
use crate::base::users::User;
use crate::engine::CloneSite;
use crate::engine::redis::backup::{RDB_VERSION_FACT, USED_MEMORY_FACT};
use crate::engine::redis::ondisk::rdb::{RdbFamily, RdbVersion};
use crate::engine::redis::recovery::end_of;
use crate::engine::redis::server::Programs;
use crate::engine::redis::settings::{check_ordered, modules};
use crate::error::Result;
use crate::model::bytes_text::human_bytes;
use crate::model::check::CheckItem;
use crate::model::target::{Target, utc_text};

pub(super) async fn check_target(
    site: &CloneSite,
    target: &Target,
    default_bin_dir: Option<&Path>,
) -> Result<Vec<CheckItem>> {
    let mut items = Vec::new();
    items.extend(target_item(site, target));
    match Programs::find(site.bin_dir.as_deref().or(default_bin_dir)).await {
        Ok(programs) => items.push(version_item(site, &programs.version)),
        Err(error) => {
            items.push(CheckItem::fail("server programs", error.message(), error.hint_text().unwrap_or_default()));
        }
    }
    let run_as = site.run_as.clone();
    items.push(match run_blocking("user", move || User::by_name(&run_as)).await {
        Ok(user) => CheckItem::pass("user", format!("'{}' with id {}", user.name, user.uid)),
        Err(error) => CheckItem::fail("user", error.message(), "create the user, or set 'run_as' under [clone]"),
    });
    items.push(match check_ordered(&site.settings) {
        Ok(()) => CheckItem::pass("settings", format!("{} ordered", site.settings.len())),
        Err(error) => CheckItem::fail("settings", error.message(), error.hint_text().unwrap_or_default()),
    });
    items.extend(module_item(site));
    items.extend(memory_item(site));
    Ok(items)
}

/// Whether the log that was shipped can tell where this target lies. Says nothing where nothing is to be said.
fn target_item(site: &CloneSite, target: &Target) -> Option<CheckItem> {
    let what = "moment";
    match (target, end_of(site, target)) {
        (_, Err(error)) => Some(CheckItem::fail(what, error.message(), error.hint_text().unwrap_or_default())),
        (Target::Time(time), Ok(_)) if time.subsec_nanosecond() > 0 => {
            let shown = Timestamp::from_second(time.as_second()).map_or_else(|_| time.to_string(), utc_text);
            Some(CheckItem::warn(
                what,
                format!("the log counts in seconds: the clone will show {shown}"),
                "order a whole second",
            ))
        }
        _ => None,
    }
}

/// The newest format of snapshots that a version of Redis reads (`RDB_VERSION` in `src/rdb.h` of each).
fn newest_readable(version: &str) -> u32 {
    match major_and_minor(version) {
        (0..=6, _) => 9,
        (7, 0..=1) => 10,
        (7, 2..=3) => 11,
        _ => 12,
    }
}

fn major_and_minor(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

fn version_item(site: &CloneSite, here: &str) -> CheckItem {
    let what = "version";
    let source = &site.engine_version;
    if major_and_minor(here) < major_and_minor(source) {
        return CheckItem::fail(
            what,
            format!("the source is Redis {source}, this host has {here}, which is older"),
            format!("install Redis {source} or later on this host, or name its directory as 'bin_dir' under [clone]"),
        );
    }
    let format = site.facts.get(RDB_VERSION_FACT).and_then(|text| RdbVersion::parse_text(text));
    match format {
        Some(RdbVersion { family: RdbFamily::Valkey, .. }) => CheckItem::fail(
            what,
            format!("the backup's snapshot is in a format of Valkey ({source}), which Redis {here} cannot read"),
            "clone to a host that has Valkey",
        ),
        Some(version) if version.number > newest_readable(here) => CheckItem::fail(
            what,
            format!("the backup's snapshot has format {version}; Redis {here} reads up to {}", newest_readable(here)),
            format!("install Redis {source} or later on this host"),
        ),
        _ => CheckItem::pass(what, format!("{here} here, {source} on the source")),
    }
}

/// A server does not start without the modules that its data need.
fn module_item(site: &CloneSite) -> Option<CheckItem> {
    let modules = modules(&site.facts);
    if modules.is_empty() {
        return None;
    }
    let is_missing = |path: &str| !path.is_empty() && !Path::new(path).is_file();
    let missing: Vec<String> = modules
        .iter()
        .filter(|module| is_missing(&module.path))
        .map(|module| format!("'{}' ({})", module.name, module.path))
        .collect();
    Some(if missing.is_empty() {
        CheckItem::pass("modules", format!("{} as on the source", modules.len()))
    } else {
        CheckItem::fail("modules", format!("missing here: {}", missing.join(", ")), "install them at the same paths")
    })
}

fn memory_item(site: &CloneSite) -> Option<CheckItem> {
    let wanted: u64 = site.facts.get(USED_MEMORY_FACT)?.parse().ok()?;
    let available = memory()?.available_bytes;
    let found = format!("{} available, the source uses {}", human_bytes(available), human_bytes(wanted));
    Some(if available >= wanted {
        CheckItem::pass("memory", found)
    } else {
        CheckItem::fail("memory", found, "clone to a host with more memory, or stop something on this one")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::redis::backup::LOG_TIMES_FACT;
    use crate::engine::redis::settings::MODULE_FACT_PREFIX;
    use crate::model::check::Verdict;
    use crate::model::position::Position;

    fn site(version: &str, facts: &[(&str, &str)]) -> CloneSite {
        CloneSite {
            clone_name: "c".into(),
            data_dir: "/d".into(),
            run_dir: "/d.run".into(),
            bin_dir: None,
            port: 1,
            listen_addresses: "localhost".into(),
            run_as: "redis".into(),
            settings: Default::default(),
            passwords_for: Default::default(),
            keep_expired: false,
            engine_version: version.into(),
            facts: facts.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
            backup_start: Position::File { number: 1, offset: 0 },
            backup_stop: Position::File { number: 1, offset: 0 },
            archive_command: String::new(),
        }
    }

    #[test]
    fn a_snapshot_that_the_server_here_cannot_read_is_refused_with_both_versions() {
        let cases = [
            ("7.0.15", "REDIS0010", "7.0.15", Verdict::Pass),
            ("7.0.15", "REDIS0010", "8.0.3", Verdict::Pass),
            ("7.2.4", "REDIS0011", "7.0.15", Verdict::Fail),
            ("8.0.1", "REDIS0012", "7.2.4", Verdict::Fail),
            ("7.2.4", "REDIS0012", "7.2.4", Verdict::Fail),
            ("7.2.4", "VALKEY080", "8.0.0", Verdict::Fail),
        ];
        for (source, format, here, verdict) in cases {
            let item = version_item(&site(source, &[(RDB_VERSION_FACT, format)]), here);
            assert_eq!(item.verdict, verdict, "{source} {format} {here}: {item:?}");
            assert!(item.found.contains(source) && item.found.contains(here), "{item:?}");
        }
    }

    #[test]
    fn a_time_is_refused_where_the_log_has_none_and_rounded_where_it_falls_between_seconds() {
        let ask = |times: &str, target: &Target| target_item(&site("7.0.0", &[(LOG_TIMES_FACT, times)]), target);
        let at = |text: &str| Target::parse_time(text).unwrap();
        let refused = ask("no", &at("2026-11-21 10:00:00Z")).unwrap();
        assert_eq!(refused.verdict, Verdict::Fail);
        assert!(refused.hint.unwrap().contains("CONFIG SET aof-timestamp-enabled yes"));
        assert_eq!(ask("no", &Target::Latest), None);
        assert_eq!(ask("yes", &at("2026-11-21 10:00:00Z")), None);
        let rounded = ask("yes", &at("2026-11-21 10:00:00.5Z")).unwrap();
        assert!(
            rounded.verdict == Verdict::Warn && rounded.found.ends_with("show 2026-11-21 10:00:00Z"),
            "{rounded:?}"
        );
        assert_eq!(ask("yes", &Target::Name("x".into())).unwrap().verdict, Verdict::Fail);
    }

    #[test]
    fn a_module_that_is_not_here_is_named() {
        let key = format!("{MODULE_FACT_PREFIX}bf");
        let item = module_item(&site("7.0.0", &[(&key, "/nowhere/bloom.so")])).unwrap();
        assert!(item.verdict == Verdict::Fail && item.found.contains("/nowhere/bloom.so"), "{item:?}");
        assert_eq!(module_item(&site("7.0.0", &[])), None);
    }
}
