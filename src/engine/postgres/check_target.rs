//! What this host lacks to run a clone: asked before anything is written.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_blocking;
use crate::base::child::ChildCommand;
use crate::base::users::{User, may_become_another_user};
use crate::engine::CloneSite;
use crate::engine::postgres::clone::major_of;
use crate::engine::postgres::collation;
use crate::engine::postgres::geometry::SEGMENT_SIZE_FACT;
use crate::engine::postgres::recovery::replica::memory_bytes;
use crate::engine::postgres::server::Programs;
use crate::engine::postgres::settings::{SourceSettings, check_override, memory_bytes as parse_memory, split_list};
use crate::error::{Kind, Result};
use crate::model::check::CheckItem;

/// Facts of a backup: of each database the extensions with their versions, and how it sorts.
const EXTENSIONS_FACT_PREFIX: &str = "extensions.";
const DATABASE_FACT_PREFIX: &str = "database.";

/// Looks at everything that can be known without the backup's files.
pub async fn check_target(site: &CloneSite, default_bin_dir: Option<&Path>) -> Result<Vec<CheckItem>> {
    let mut items = Vec::new();
    items.push(check_user(&site.run_as).await?);
    items.extend(check_reach(site).await?);
    items.extend(check_settings(site));
    items.push(check_memory(site));
    items.push(check_locales(site).await);
    if !site.facts.contains_key(SEGMENT_SIZE_FACT) {
        items.push(CheckItem::fail(
            "backup",
            format!("it does not say its '{SEGMENT_SIZE_FACT}'"),
            "it was made by another version of keiki: take a new one",
        ));
    }
    let major = major_of(&site.engine_version)?;
    let programs = Programs::find(major, site.bin_dir.as_deref().or(default_bin_dir)).await;
    items.push(collation::check(site, programs.as_ref().ok().map(Programs::postgres).as_deref()).await);
    match programs {
        Ok(programs) => {
            items.extend(check_version(site, &programs));
            items.extend(check_names(site, &programs).await);
            items.extend(check_libraries(site, &programs).await);
        }
        Err(error) if error.kind() == Kind::NotFound => {
            let hint = error.hint_text().unwrap_or("install PostgreSQL on this host").to_string();
            items.push(CheckItem::fail(format!("programs of PostgreSQL {major}"), error.message(), hint));
        }
        Err(error) => return Err(error),
    }
    Ok(items)
}

async fn check_user(name: &str) -> Result<CheckItem> {
    let what = "user of the server";
    let owned = name.to_string();
    Ok(match run_blocking("user", move || User::by_name(&owned)).await {
        Ok(user) if user.uid == 0 => {
            CheckItem::fail(what, "'root'", "PostgreSQL refuses to run as root: set 'run_as' to another user")
        }
        Ok(user) if user.is_current() || may_become_another_user() => {
            CheckItem::pass(what, format!("'{}', number {}", user.name, user.uid))
        }
        Ok(user) => CheckItem::fail(
            what,
            format!("'{}', but this agent may not become another user", user.name),
            format!("run the agent as root or as '{}'", user.name),
        ),
        Err(error) if error.kind() == Kind::NotFound => CheckItem::fail(
            what,
            error.message(),
            "set 'run_as' to the user that runs PostgreSQL on this host, or create it",
        ),
        Err(error) => return Err(error),
    })
}

/// Whether the server's user may pass through the directories above those of the clone. Nothing is said about a user
/// who does not exist; that is another item.
async fn check_reach(site: &CloneSite) -> Result<Vec<CheckItem>> {
    let (name, paths) = (site.run_as.clone(), [site.data_dir.clone(), site.run_dir.clone()]);
    run_blocking("directories", move || {
        let Ok(user) = User::by_name(&name) else { return Ok(Vec::new()) };
        let closed = paths.iter().find_map(|path| first_closed_above(&user, path));
        Ok(vec![match closed {
            None => CheckItem::pass("directories", "the server's user can reach them"),
            Some(directory) => CheckItem::fail(
                "directories",
                format!("user '{name}' may not pass through '{}'", directory.display()),
                format!("'chmod o+x {}', or choose another directory", directory.display()),
            ),
        }])
    })
    .await
}

/// The first directory above `path` that exists and that the user may not pass through, by its mode.
fn first_closed_above(user: &User, path: &Path) -> Option<PathBuf> {
    let above: Vec<&Path> = path.ancestors().skip(1).collect();
    let is_closed = |directory: &&Path| {
        let Ok(metadata) = std::fs::metadata(directory) else { return false };
        let bits = match (metadata.uid() == user.uid, user.groups.contains(&metadata.gid())) {
            (true, _) => metadata.mode() >> 6,
            (false, true) => metadata.mode() >> 3,
            (false, false) => metadata.mode(),
        };
        user.uid != 0 && bits & 0o1 == 0
    };
    above.into_iter().rev().find(is_closed).map(Path::to_path_buf)
}

fn check_settings(site: &CloneSite) -> Vec<CheckItem> {
    let refused = site.settings.keys().filter_map(|name| check_override(name).err());
    refused
        .map(|error| {
            CheckItem::fail("settings of the order", error.message(), error.hint_text().unwrap_or("leave it out"))
        })
        .collect()
}

/// Whether the server knows the settings of the order: those with a dot belong to extensions and are not asked about.
async fn check_names(site: &CloneSite, programs: &Programs) -> Vec<CheckItem> {
    let wanted: Vec<&String> = site.settings.keys().filter(|name| !name.contains('.')).collect();
    if wanted.is_empty() {
        return Vec::new();
    }
    let command = ChildCommand::new(programs.postgres()).arg("--describe-config");
    let known: BTreeSet<String> = match output_lines(command).await {
        Some(lines) => lines.iter().filter_map(|line| line.split('\t').next()).map(str::to_ascii_lowercase).collect(),
        None => return Vec::new(),
    };
    let mut items = Vec::new();
    for name in wanted {
        if !known.contains(&name.to_ascii_lowercase()) {
            items.push(CheckItem::fail(
                "settings of the order",
                format!("PostgreSQL {} has no setting '{name}'", programs.version),
                "is it misspelt? 'SELECT name FROM pg_settings' on the source lists them",
            ));
        } else if let Some(refusal) = refused_value(programs, name, &site.settings[name]).await {
            items.push(CheckItem::fail("settings of the order", refusal, "give another value with '--set'"));
        }
    }
    items
}

/// What the server's own parser says against a value. It reads the values of its command line before it looks for its
/// data directory (`src/backend/postmaster/postmaster.c`, PostmasterMain), and there is none here: nothing starts.
async fn refused_value(programs: &Programs, name: &str, value: &str) -> Option<String> {
    let finished = ChildCommand::new(programs.postgres())
        .args(["-D", "/nonexistent", "-C", "port", "-c"])
        .arg(format!("{name}={value}"))
        .run(&CancellationToken::new())
        .await
        .ok()?;
    let said = String::from_utf8_lossy(&finished.stderr).into_owned();
    said.lines().find_map(|line| line.split_once("FATAL:")).map(|(_, refusal)| refusal.trim().replace('"', "'"))
}

fn check_version(site: &CloneSite, programs: &Programs) -> Vec<CheckItem> {
    let what = "version of PostgreSQL";
    let minor = |version: &str| version.split_once('.').and_then(|(_, minor)| minor.parse::<u32>().ok());
    vec![match (minor(&site.engine_version), minor(&programs.version)) {
        (Some(source), Some(here)) if here < source => CheckItem::warn(
            what,
            format!("{} here, {} on the source", programs.version, site.engine_version),
            "an older minor version may lack fixes that the source's data need: update this host",
        ),
        _ => CheckItem::pass(what, format!("{} in '{}'", programs.version, programs.bin_dir.display())),
    }]
}

fn check_memory(site: &CloneSite) -> CheckItem {
    let source = SourceSettings::from_facts(&site.facts);
    let ordered = site.settings.get("shared_buffers").and_then(|value| parse_memory(value));
    let wanted = ordered.or(source.bytes_of("shared_buffers")).unwrap_or(128 << 20);
    let memory = memory_bytes();
    let what = "memory";
    let found = format!("shared_buffers of {} MB, this host has {} MB", wanted >> 20, memory >> 20);
    if wanted > memory / 10 * 9 {
        CheckItem::fail(what, found, "order the clone with '--set shared_buffers=...'")
    } else if wanted > memory / 2 {
        CheckItem::warn(what, found, "order the clone with '--set shared_buffers=...' if it shall not crowd this host")
    } else {
        CheckItem::pass(what, found)
    }
}

/// Libraries that the server loads at its start, and extensions of the databases.
async fn check_libraries(site: &CloneSite, programs: &Programs) -> Vec<CheckItem> {
    let source = SourceSettings::from_facts(&site.facts);
    let preload = site.settings.get("shared_preload_libraries").map(String::as_str);
    let libraries = split_list(preload.or(source.get("shared_preload_libraries")).unwrap_or(""));
    let extensions = extensions_of(site);
    let (library_dir, share_dir) = directories(programs).await;
    let mut items = Vec::new();
    let missing: Vec<&String> =
        libraries.iter().filter(|library| !library_exists(library, library_dir.as_deref())).collect();
    items.push(match missing.as_slice() {
        [] => CheckItem::pass("preloaded libraries", list_or_none(&libraries)),
        missing => CheckItem::fail(
            "preloaded libraries",
            format!("'{}' cannot be found on this host", join(missing)),
            "install the packages of these extensions, or order the clone with '--set shared_preload_libraries=...'",
        ),
    });
    let extension_dir = share_dir.map(|directory| directory.join("extension"));
    let is_missing = |name: &&String| {
        extension_dir.as_ref().is_some_and(|directory| !directory.join(format!("{name}.control")).exists())
    };
    let missing: Vec<&String> = extensions.iter().filter(is_missing).collect();
    items.push(match missing.as_slice() {
        [] => CheckItem::pass("extensions", list_or_none(&extensions)),
        missing => CheckItem::warn(
            "extensions",
            format!("'{}' are not installed on this host", join(missing)),
            "what uses them fails in the clone: install their packages",
        ),
    });
    items
}

/// The names of the extensions of all databases, without their versions.
fn extensions_of(site: &CloneSite) -> Vec<String> {
    let lists = site.facts.iter().filter(|(key, _)| key.starts_with(EXTENSIONS_FACT_PREFIX)).map(|(_, list)| list);
    let names = lists.flat_map(|list| split_list(list)).filter_map(|entry| entry.split(' ').next().map(str::to_string));
    names.collect::<BTreeSet<String>>().into_iter().collect()
}

/// A database whose locale this host does not have cannot be opened here at all.
async fn check_locales(site: &CloneSite) -> CheckItem {
    let what = "locales of the databases";
    let Some(known) = output_lines(ChildCommand::new("locale").arg("-a")).await else {
        return CheckItem::pass(what, "this host does not list its locales");
    };
    let known: BTreeSet<String> = known.iter().map(|name| plain_locale(name)).collect();
    let mut missing = BTreeSet::new();
    for (key, value) in &site.facts {
        let Some(database) = key.strip_prefix(DATABASE_FACT_PREFIX) else { continue };
        for name in value.split(' ').filter_map(|word| word.strip_prefix("collate=").or(word.strip_prefix("ctype="))) {
            let is_built_in = ["", "C", "POSIX"].contains(&name);
            if !is_built_in && !known.contains(&plain_locale(name)) {
                missing.insert(format!("{name} (database '{database}')"));
            }
        }
    }
    if missing.is_empty() {
        return CheckItem::pass(what, "all are on this host");
    }
    let found = format!("missing: {}", missing.into_iter().collect::<Vec<_>>().join(", "));
    CheckItem::fail(what, found, "generate them, on Debian with 'dpkg-reconfigure locales', then start PostgreSQL anew")
}

/// `en_US.UTF-8` and `en_US.utf8` are the same to the C library.
fn plain_locale(name: &str) -> String {
    match name.split_once('.') {
        Some((language, codeset)) => format!("{language}.{}", codeset.to_ascii_lowercase().replace('-', "")),
        None => name.to_string(),
    }
}

fn join(names: &[&String]) -> String {
    names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join("', '")
}

fn list_or_none(names: &[String]) -> String {
    if names.is_empty() { String::from("none") } else { names.join(", ") }
}

/// `$libdir` and the share directory, from `pg_config` beside the programs, or from where they are laid out.
async fn directories(programs: &Programs) -> (Option<PathBuf>, Option<PathBuf>) {
    let command = ChildCommand::new(programs.bin_dir.join("pg_config")).args(["--pkglibdir", "--sharedir"]);
    let asked = output_lines(command).await;
    if let Some([library_dir, share_dir, ..]) = asked.as_deref() {
        return (Some(PathBuf::from(library_dir)), Some(PathBuf::from(share_dir)));
    }
    let above = programs.bin_dir.parent().map(Path::to_path_buf).unwrap_or_default();
    // Debian keeps the libraries of a major version beside its programs, and its share directory elsewhere; pg_config
    // is in a package for developers there.
    let major = programs.major().unwrap_or_default();
    let shares =
        [PathBuf::from(format!("/usr/share/postgresql/{major}")), above.join("share/postgresql"), above.join("share")];
    let share_dir = shares.into_iter().find(|directory| directory.join("extension").is_dir());
    let libraries = [above.join("lib/postgresql"), above.join("lib")];
    let library_dir = libraries.into_iter().find(|directory| directory.join("plpgsql.so").is_file());
    (library_dir, share_dir)
}

fn library_exists(library: &str, library_dir: Option<&Path>) -> bool {
    let name = library.strip_prefix("$libdir/").unwrap_or(library);
    let file = if name.ends_with(".so") { name.to_string() } else { format!("{name}.so") };
    if file.starts_with('/') {
        return Path::new(&file).is_file();
    }
    // Where the directory is not known the server will tell.
    library_dir
        .is_none_or(|directory| directory.join(&file).is_file() || directory.join("plugins").join(&file).is_file())
}

/// The lines of a program that only says something; `None` if it cannot be run or fails.
async fn output_lines(command: ChildCommand) -> Option<Vec<String>> {
    let finished = command.run_checked(&CancellationToken::new()).await.ok()?;
    Some(String::from_utf8_lossy(&finished.stdout).lines().map(str::to_string).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_the_servers_user_cannot_reach_is_named() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let closed = directory.path().join("closed");
        std::fs::create_dir(&closed).unwrap();
        let set_mode = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        set_mode(directory.path(), 0o755);
        set_mode(&closed, 0o700);
        let groups = vec![4_000_000_001];
        let name = String::from("x");
        let user = User { name, uid: 4_000_000_000, gid: 4_000_000_001, groups, home: PathBuf::from("/") };
        assert_eq!(first_closed_above(&user, &closed.join("clones/c")), Some(closed.clone()));
        set_mode(&closed, 0o711);
        assert_eq!(first_closed_above(&user, &closed.join("clones/c")), None);
    }

    #[test]
    fn a_locale_has_many_spellings_and_a_library_too() {
        assert_eq!(plain_locale("en_US.UTF-8"), plain_locale("en_US.utf8"));
        assert_ne!(plain_locale("en_US.UTF-8"), plain_locale("de_DE.utf8"));
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("auto_explain.so"), b"").unwrap();
        for library in ["auto_explain", "auto_explain.so", "$libdir/auto_explain"] {
            assert!(library_exists(library, Some(directory.path())), "{library}");
        }
        assert!(!library_exists("pg_cron", Some(directory.path())));
    }
}
