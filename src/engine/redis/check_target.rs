//! What this host lacks to run a clone: the program, its version, modules, memory, the user.

use std::path::Path;

use jiff::Timestamp;

use crate::base::bulk::run_blocking;
use crate::base::memory::memory;
use crate::base::users::User;
use crate::engine::CloneSite;
use crate::engine::redis::backup::{RDB_VERSION_FACT, USED_MEMORY_FACT};
use crate::engine::redis::clone::RedisCloner;
use crate::engine::redis::ondisk::rdb::{RdbFamily, RdbVersion};
use crate::engine::redis::passwords;
use crate::engine::redis::recovery::{end_of, is_received};
use crate::engine::redis::settings::{SETTING_FACT_PREFIX, check_ordered, databases_of, databases_ordered, modules};
use crate::engine::redis::source::product_name;
use crate::error::Result;
use crate::model::bytes_text::human_bytes;
use crate::model::check::CheckItem;
use crate::model::engine_kind::EngineKind;
use crate::model::target::{Target, utc_text};

pub(super) async fn check_target(site: &CloneSite, target: &Target, cloner: &RedisCloner) -> Result<Vec<CheckItem>> {
    let mut items = Vec::new();
    items.extend(target_item(site, target));
    match cloner.programs(site.bin_dir.as_deref()).await {
        Ok(programs) => items.push(version_item(site, cloner.engine, &programs.version)),
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
    items.extend(passwords::check(site));
    items.extend(module_item(site));
    items.extend(memory_item(site));
    items.extend(limit_item(site));
    items.extend(databases_item(site));
    Ok(items)
}

/// Whether the log that was shipped can tell where this target lies. Says nothing where nothing is to be said.
fn target_item(site: &CloneSite, target: &Target) -> Option<CheckItem> {
    let what = "moment";
    match (target, end_of(site, target)) {
        (_, Err(error)) => Some(CheckItem::fail(what, error.message(), error.hint_text().unwrap_or_default())),
        (Target::Time(time), Ok(_)) if time.subsec_nanosecond() > 0 && !is_received(site) => {
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

/// The newest format of snapshots that a version reads, as far as it was looked up; a server reads what a server of its own
/// product and of its own or an earlier version has written. Source: `RDB_VERSION` in `src/rdb.h` of Redis 6.2, 7.0, 7.2,
/// 7.4 and 8.0; `RDB_VERSION` and `RDB_FOREIGN_VERSION_MIN` in `src/rdb.h` of Valkey 8 and 9, which read no format of Redis
/// from 12 on.
fn newest_readable(engine: EngineKind, version: (u32, u32), family: RdbFamily) -> Option<u32> {
    match (engine, family, version) {
        (EngineKind::Valkey, RdbFamily::Redis, _) => Some(11),
        (EngineKind::Valkey, RdbFamily::Valkey, (..=8, _)) => Some(0),
        (EngineKind::Valkey, RdbFamily::Valkey, _) => None,
        (_, RdbFamily::Valkey, _) => Some(0),
        (_, RdbFamily::Redis, (..=6, _)) => Some(9),
        (_, RdbFamily::Redis, (7, ..=1)) => Some(10),
        (_, RdbFamily::Redis, (7, ..=3)) => Some(11),
        (_, RdbFamily::Redis, (7, _) | (8, ..=1)) => Some(12),
        (_, RdbFamily::Redis, _) => None,
    }
}

fn major_and_minor(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

fn version_item(site: &CloneSite, engine: EngineKind, here: &str) -> CheckItem {
    let what = "version";
    let (source, product) = (&site.engine_version, product_name(engine));
    if major_and_minor(here) < major_and_minor(source) {
        return CheckItem::fail(
            what,
            format!("the source is {product} {source}, this host has {product} {here}, which is older"),
            format!(
                "install {product} {source} or later on this host, or name its directory as 'bin_dir' under [clone.{}]",
                engine.name()
            ),
        );
    }
    let format = site.facts.get(RDB_VERSION_FACT).and_then(|text| RdbVersion::parse_text(text));
    let readable = format.and_then(|format| newest_readable(engine, major_and_minor(here), format.family));
    match format.zip(readable) {
        Some((format, newest)) if format.number > newest => CheckItem::fail(
            what,
            format!(
                "the backup's snapshot, of {product} {source}, has format {format}, which {product} {here} on this host \
                 cannot read"
            ),
            format!("install {product} {source} or later on this host"),
        ),
        _ => CheckItem::pass(what, format!("{product} {here} here, {source} on the source")),
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

/// A limit that was ordered and is below what the data take: the accepted clone would throw keys away, or take no writes.
fn limit_item(site: &CloneSite) -> Option<CheckItem> {
    let ordered = |wanted: &str| {
        site.settings.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.as_str())
    };
    let limit = memory_bytes(ordered("maxmemory")?)?;
    let used: u64 = site.facts.get(USED_MEMORY_FACT)?.parse().ok()?;
    if limit == 0 || limit >= used {
        return None;
    }
    let found = format!("{} ordered, the data of the source take {}", human_bytes(limit), human_bytes(used));
    let kept = site.facts.get(&format!("{SETTING_FACT_PREFIX}maxmemory-policy")).map(String::as_str);
    let policy = ordered("maxmemory-policy").or(kept).unwrap_or("noeviction");
    let what = "maxmemory";
    Some(if policy.eq_ignore_ascii_case("noeviction") {
        CheckItem::warn(what, format!("{found}: the clone will refuse writes"), "order a larger one, or none")
    } else {
        CheckItem::fail(
            what,
            format!("{found}: with '{policy}' the clone would throw keys away as soon as it is open"),
            "order a larger one, or --set maxmemory-policy=noeviction",
        )
    })
}

/// A number of databases that was ordered and is below that of the source: what is in the others would be lost.
fn databases_item(site: &CloneSite) -> Option<CheckItem> {
    let ordered = databases_ordered(&site.settings)?;
    let wanted = databases_of(&site.facts, &Default::default(), 0);
    let hint = "order at least as many as the source has, or leave it out";
    match ordered.parse::<u64>() {
        Ok(number) if number >= wanted => None,
        Ok(number) => Some(CheckItem::fail("databases", format!("{number} ordered, the source has {wanted}"), hint)),
        Err(_) => Some(CheckItem::fail("databases", format!("'{ordered}' is no number"), hint)),
    }
}

/// `2gb` as the server reads it (`memtoull` in `src/util.c`): k and kb, m and mb, g and gb; those with a b are binary.
fn memory_bytes(text: &str) -> Option<u64> {
    let text = text.to_ascii_lowercase();
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let unit: u64 = match &text[digits..] {
        "" | "b" => 1,
        "k" => 1000,
        "kb" => 1 << 10,
        "m" => 1_000_000,
        "mb" => 1 << 20,
        "g" => 1_000_000_000,
        "gb" => 1 << 30,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(unit)
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
            (EngineKind::Redis, "7.0.15", "REDIS0010", "7.0.15", Verdict::Pass),
            (EngineKind::Redis, "7.0.15", "REDIS0010", "8.0.3", Verdict::Pass),
            (EngineKind::Redis, "7.2.4", "REDIS0011", "7.0.15", Verdict::Fail),
            (EngineKind::Redis, "8.0.1", "REDIS0012", "7.2.4", Verdict::Fail),
            (EngineKind::Redis, "7.2.4", "REDIS0012", "7.2.4", Verdict::Fail),
            (EngineKind::Redis, "7.2.4", "VALKEY080", "8.0.0", Verdict::Fail),
            (EngineKind::Redis, "8.10.0", "REDIS0015", "8.10.1", Verdict::Pass),
            (EngineKind::Valkey, "8.1.1", "REDIS0011", "9.1.2", Verdict::Pass),
            (EngineKind::Valkey, "9.1.2", "VALKEY080", "9.1.2", Verdict::Pass),
            (EngineKind::Valkey, "9.1.2", "VALKEY080", "8.1.1", Verdict::Fail),
            (EngineKind::Valkey, "8.0.0", "VALKEY080", "8.1.1", Verdict::Fail),
            (EngineKind::Valkey, "8.1.1", "REDIS0012", "9.1.2", Verdict::Fail),
        ];
        for (engine, source, format, here, verdict) in cases {
            let item = version_item(&site(source, &[(RDB_VERSION_FACT, format)]), engine, here);
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
        assert_eq!(ask("received", &at("2026-11-21 10:00:00.5Z")), None);
        assert_eq!(ask("yes", &Target::Name("x".into())).unwrap().verdict, Verdict::Fail);
    }

    #[test]
    fn a_limit_below_the_data_is_refused_if_keys_would_be_thrown_away_for_it() {
        let ask = |settings: &[(&str, &str)]| {
            let mut site = site("7.0.0", &[(USED_MEMORY_FACT, "5000000"), ("setting.maxmemory-policy", "allkeys-lru")]);
            site.settings = settings.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            limit_item(&site).map(|item| item.verdict)
        };
        assert_eq!(ask(&[]), None);
        assert_eq!(ask(&[("MaxMemory", "5mb")]), None);
        assert_eq!(ask(&[("maxmemory", "0")]), None);
        assert_eq!(ask(&[("maxmemory", "4mb")]), Some(Verdict::Fail));
        assert_eq!(ask(&[("maxmemory", "4m"), ("maxmemory-policy", "noeviction")]), Some(Verdict::Warn));
        assert_eq!(
            (memory_bytes("2GB"), memory_bytes("1x"), memory_bytes("99999999999gb")),
            (Some(2 << 30), None, None)
        );
    }

    #[test]
    fn fewer_databases_than_the_source_has_are_refused() {
        let ask = |ordered: &str| {
            let mut site = site("7.0.0", &[("setting.databases", "16")]);
            site.settings = [("Databases".to_string(), ordered.to_string())].into();
            databases_item(&site).map(|item| item.verdict)
        };
        assert_eq!((ask("16"), ask("32")), (None, None));
        assert_eq!((ask("4"), ask("many")), (Some(Verdict::Fail), Some(Verdict::Fail)));
    }

    #[test]
    fn a_module_that_is_not_here_is_named() {
        let key = format!("{MODULE_FACT_PREFIX}bf");
        let item = module_item(&site("7.0.0", &[(&key, "/nowhere/bloom.so")])).unwrap();
        assert!(item.verdict == Verdict::Fail && item.found.contains("/nowhere/bloom.so"), "{item:?}");
        assert_eq!(module_item(&site("7.0.0", &[])), None);
    }
}
