//! The clone's own settings: what of the source's still makes sense, and why the rest does not. Pure.
//!
//! The result is one complete `postgresql.conf` without includes. The source's values come from the backup's facts and
//! not from its files, because files have includes, command lines and `ALTER SYSTEM` behind them.
//!
//! Invariants: nothing in the result archives elsewhere than through `archive_command` of the clone, connects to a
//! primary, names a file that the clone does not have, or names a recovery target; what was changed or dropped is
//! reported with its reason; what the order sets comes last and wins.

use std::collections::BTreeMap;
use std::path::Path;

use crate::engine::CleanUpItem;
use crate::engine::postgres::backup::SETTING_FACT_PREFIX;
use crate::error::{Error, Kind, Result};

mod tables;
#[cfg(test)]
mod tests;

pub use tables::is_scheduler;
use tables::{DROPPED, FILES_OF_TLS, NEVER_SET, OWNED_BY_KEIKI};

/// The settings of the source that were not the server's own defaults, as `current_setting` shows them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceSettings(BTreeMap<String, String>);

impl SourceSettings {
    /// Takes them out of the facts of a backup.
    pub fn from_facts(facts: &BTreeMap<String, String>) -> SourceSettings {
        let settings = facts.iter().filter_map(|(key, value)| {
            Some((key.strip_prefix(SETTING_FACT_PREFIX)?.to_ascii_lowercase(), value.clone()))
        });
        SourceSettings(settings.collect())
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A memory setting in bytes; a number without unit counts pages of 8 KiB, as for `shared_buffers`.
    pub fn bytes_of(&self, name: &str) -> Option<u64> {
        memory_bytes(self.get(name)?)
    }
}

/// `128MB`, `16GB`, `16384` (pages of 8 KiB) in bytes (manual, "Parameter Names and Values").
pub fn memory_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let unit: u64 = match text[digits..].trim() {
        "" => 8 << 10,
        "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        "TB" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(unit)
}

/// What the clone is, for its settings.
pub struct ClonePlace<'a> {
    pub clone_name: &'a str,
    pub major: u32,
    pub data_dir: &'a Path,
    /// A directory of the clone's own in which it always has a socket.
    pub run_dir: &'a Path,
    pub port: u16,
    pub listen_addresses: &'a str,
    pub archive_command: &'a str,
    /// `--set` of the order.
    pub overrides: &'a BTreeMap<String, String>,
    /// Whether a file or directory exists on this host and the server may use it. Relative paths are those of the data
    /// directory.
    pub exists: &'a dyn Fn(&Path) -> bool,
}

/// The plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingsPlan {
    /// Name and value in the order in which they are written; of a name that occurs twice the last one counts.
    pub settings: Vec<(String, String)>,
    /// What became different, for the report.
    pub report: Vec<CleanUpItem>,
}

impl SettingsPlan {
    /// The whole `postgresql.conf`.
    pub fn render(&self, clone_name: &str, source_version: &str) -> String {
        let mut text = format!(
            "# Settings of '{clone_name}', written by keiki when it was cloned from a PostgreSQL {source_version}.\n\
             # The files of the source lie beside this one as *.source. The file is yours from now on.\n\n"
        );
        for (name, value) in &self.settings {
            text += &render_line(name, value);
            text.push('\n');
        }
        text
    }

    fn set(&mut self, name: &str, value: impl Into<String>) {
        self.settings.push((name.to_string(), value.into()));
    }

    fn report(&mut self, name: &str, done: String) {
        self.report.push(CleanUpItem { what: format!("setting '{name}'"), done });
    }
}

/// Plans the clone's settings. An override that cannot be is `BadInput`.
pub fn plan_settings(source: &SourceSettings, place: &ClonePlace<'_>) -> Result<SettingsPlan> {
    for name in place.overrides.keys() {
        check_override(name)?;
    }
    let mut plan = SettingsPlan { settings: Vec::new(), report: Vec::new() };
    let tls_is_possible = plan_tls(source, place, &mut plan);
    for (name, value) in &source.0 {
        if NEVER_SET.contains(&name.as_str()) || OWNED_BY_KEIKI.contains(&name.as_str()) {
            continue;
        }
        if let Some((_, reason)) = DROPPED.iter().find(|row| row.0 == name) {
            if !value.is_empty() {
                plan.report(name, format!("dropped '{}': {reason}", shown(name, value)));
            }
            continue;
        }
        if FILES_OF_TLS.contains(&name.as_str()) && !tls_is_possible {
            continue;
        }
        plan_one(name, value, tls_is_possible, place, &mut plan);
    }
    plan_identity(source, place, &mut plan);
    for (name, value) in place.overrides {
        plan.set(&name.to_ascii_lowercase(), value.clone());
        plan.report(name, format!("set to '{value}' by the order"));
    }
    Ok(plan)
}

/// A setting that is kept unless this host cannot serve it.
fn plan_one(name: &str, value: &str, tls_is_possible: bool, place: &ClonePlace<'_>, plan: &mut SettingsPlan) {
    match name {
        "ssl" if !tls_is_possible && value == "on" => plan.set(name, "off"),
        "huge_pages" if value == "on" => {
            plan.set(name, "try");
            plan.report(name, String::from("changed from 'on' to 'try': this host may have none reserved"));
        }
        "log_directory" if value.starts_with('/') => {
            plan.set(name, "log");
            plan.report(name, format!("changed from '{value}' to 'log': the source may write there on this host"));
        }
        "dynamic_library_path" | "extension_control_path" => {
            let missing: Vec<&str> =
                value.split(':').filter(|part| part.starts_with('/') && !(place.exists)(Path::new(part))).collect();
            let kept: Vec<&str> = value.split(':').filter(|part| !missing.contains(part)).collect();
            plan.set(name, kept.join(":"));
            if !missing.is_empty() {
                plan.report(name, format!("left out '{}': not on this host", missing.join(":")));
            }
        }
        "shared_preload_libraries" => {
            plan.set(name, value);
            let schedulers: Vec<String> =
                split_list(value).into_iter().filter(|library| is_scheduler(library)).collect();
            if !schedulers.is_empty() {
                plan.report(
                    name,
                    format!(
                        "kept '{}' out of quarantine: it starts with the accepted clone; look at its jobs first, or \
                         order the clone with '--set shared_preload_libraries=...'",
                        schedulers.join(", ")
                    ),
                );
            }
        }
        _ => plan.set(name, value),
    }
}

/// Whether the source's certificate and key are on this host too; reports what is missing.
fn plan_tls(source: &SourceSettings, place: &ClonePlace<'_>, plan: &mut SettingsPlan) -> bool {
    if source.get("ssl") != Some("on") {
        return true;
    }
    let file_of = |name: &'static str| match (name, source.get(name)) {
        (_, Some(file)) => file.to_string(),
        ("ssl_cert_file", None) => String::from("server.crt"),
        ("ssl_key_file", None) => String::from("server.key"),
        _ => String::new(),
    };
    let missing: Vec<String> = FILES_OF_TLS
        .iter()
        .map(|name| file_of(name))
        .filter(|file| !file.is_empty() && !(place.exists)(Path::new(file)))
        .collect();
    if missing.is_empty() {
        return true;
    }
    plan.report("ssl", format!("turned off: '{}' cannot be read on this host", missing.join("', '")));
    false
}

/// What the clone is and the source is not: always written, after everything that came from the source.
fn plan_identity(source: &SourceSettings, place: &ClonePlace<'_>, plan: &mut SettingsPlan) {
    let file = |name: &str| place.data_dir.join(name).display().to_string();
    plan.set("data_directory", place.data_dir.display().to_string());
    plan.set("hba_file", file("pg_hba.conf"));
    plan.set("ident_file", file("pg_ident.conf"));
    plan.set("cluster_name", place.clone_name);
    plan.set("listen_addresses", place.listen_addresses);
    plan.set("port", place.port.to_string());
    let mut sockets = vec![place.run_dir.display().to_string()];
    for directory in split_list(source.get("unix_socket_directories").unwrap_or("")) {
        // Another port is another file in a shared directory; an abstract one has no directory.
        if directory.starts_with('/') && (place.exists)(Path::new(&directory)) && !sockets.contains(&directory) {
            sockets.push(directory);
        }
    }
    plan.set("unix_socket_directories", sockets.join(", "));
    plan.set("archive_mode", "on");
    plan.set("archive_command", place.archive_command);
    if place.major >= 15 {
        plan.set("archive_library", "");
    }
    for (name, found, now) in [
        ("port", source.get("port"), place.port.to_string()),
        ("listen_addresses", source.get("listen_addresses"), place.listen_addresses.to_string()),
        ("cluster_name", source.get("cluster_name"), place.clone_name.to_string()),
        ("archive_mode", source.get("archive_mode"), String::from("on")),
        ("archive_command", source.get("archive_command"), place.archive_command.to_string()),
        ("archive_library", source.get("archive_library"), String::new()),
    ] {
        match found {
            Some(found) if !found.is_empty() && found != now => {
                plan.report(name, format!("changed from '{}' to '{now}'", shown(name, found)));
            }
            _ => {}
        }
    }
}

/// Refuses names that are no names and settings that keiki answers for.
pub fn check_override(name: &str) -> Result<()> {
    let lower = name.to_ascii_lowercase();
    let is_name = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$')
    };
    if name.len() > 127 || !name.split('.').all(is_name) {
        return Err(Error::new(Kind::BadInput, format!("'{}' cannot be the name of a setting", name.escape_default()))
            .hint("write it as in '--set work_mem=64MB'"));
    }
    let owned = OWNED_BY_KEIKI.contains(&lower.as_str()) || DROPPED.iter().any(|row| row.0 == lower);
    if owned || NEVER_SET.contains(&lower.as_str()) {
        let hint = match lower.as_str() {
            "port" => "use '--port'",
            "data_directory" => "use '--dir'",
            _ => "it is part of what makes the clone a server of its own; change it after it was accepted",
        };
        return Err(Error::new(Kind::BadInput, format!("setting '{name}' cannot be given with an order")).hint(hint));
    }
    Ok(())
}

/// `name = 'value'` with the escapes of a configuration file (`src/backend/utils/misc/guc-file.l`, DeescapeQuotedString).
pub fn render_line(name: &str, value: &str) -> String {
    let mut quoted = String::with_capacity(value.len() + 2);
    for letter in value.chars() {
        match letter {
            '\'' => quoted.push_str("''"),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            // Ends the text for the server.
            '\0' => {}
            other => quoted.push(other),
        }
    }
    format!("{name} = '{quoted}'")
}

/// The entries of a comma-separated list of names or paths, without the quotes around some.
pub fn split_list(text: &str) -> Vec<String> {
    text.split(',').map(|part| part.trim().trim_matches('"').to_string()).filter(|part| !part.is_empty()).collect()
}

/// A value for the report; connection strings and commands may carry passwords.
fn shown<'a>(name: &str, value: &'a str) -> &'a str {
    let may_hold_secrets = name.ends_with("conninfo") || value.to_ascii_lowercase().contains("passw");
    if may_hold_secrets { "..." } else { value }
}
