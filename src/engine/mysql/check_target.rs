//! What a host lacks to run a clone.

use std::path::Path;

use crate::base::bulk::run_blocking;
use crate::base::users::User;
use crate::engine::CloneSite;
use crate::engine::mysql::backup::fact;
use crate::engine::mysql::check_source::mysql_items::empty_tables_item;
use crate::engine::mysql::clone::version_of;
use crate::engine::mysql::product::Product;
use crate::engine::mysql::programs::{self, BACKUP};
use crate::engine::mysql::settings::{LAYOUT, SETTING_FACT_PREFIX};
use crate::error::Result;
use crate::model::check::CheckItem;
use crate::model::target::Target;

/// Where distributions put a server's plugins, from the directory of its program.
const PLUGIN_DIRS: [&str; 5] = [
    "../lib/mysql/plugin",
    "../lib64/mysql/plugin",
    "../lib/plugin",
    "../lib/x86_64-linux-gnu/mariadb19/plugin",
    "../lib64/mariadb/plugin",
];

/// See [`crate::engine::CloneEngine::check_target`].
pub async fn check_target(
    product: Product,
    site: &CloneSite,
    target: &Target,
    default_bin_dir: Option<&Path>,
) -> Result<Vec<CheckItem>> {
    let mut items: Vec<CheckItem> = match product {
        Product::MariaDb => second_item(target).into_iter().collect(),
        Product::MySql => mysql_items(site, target),
    };
    items.extend(layout_items(site));
    items.extend(statement_item(product, site, target));
    let version = version_of(site)?;
    let bin_dir = site.bin_dir.as_deref().or(default_bin_dir);
    let server: (&str, &[&str]) = ("server program", product.server_programs());
    let wanted: &[(&str, &[&str])] = match product {
        Product::MariaDb => &[server, ("backup program", &BACKUP)],
        Product::MySql => &[server],
    };
    for (what, names) in wanted.iter().copied() {
        let found = programs::find(product, names, bin_dir, version).await;
        items.push(match &found {
            Ok(program) if program.version >= version => {
                CheckItem::pass(what, format!("{} at '{}'", program.version, program.path.display()))
            }
            // MySQL manual, "Downgrading MySQL"; its server refuses newer files within the series of 8.0.
            Ok(program) if product == Product::MySql => CheckItem::fail(
                what,
                format!("{} at '{}', and the source has {version}", program.version, program.path.display()),
                format!("install MySQL {version} or a later one of the same series on this host"),
            ),
            Ok(program) => CheckItem::warn(
                what,
                format!("{} at '{}', and the source has {version}", program.version, program.path.display()),
                "an older version of the same series usually works; install the source's to be sure",
            ),
            Err(error) => CheckItem::fail(what, error.message(), error.hint_text().unwrap_or("install the server")),
        });
        if let (Ok(program), "server program") = (&found, what) {
            items.extend(plugins_item(site, program.path.parent().unwrap_or(Path::new("/"))));
        }
    }
    let name = site.run_as.clone();
    let user = run_blocking("user", move || User::by_name(&name)).await;
    items.push(match user {
        Ok(user) => CheckItem::pass("user", format!("'{}' (uid {})", user.name, user.uid)),
        Err(error) => CheckItem::fail("user", error.message(), "set 'run_as' of this host's clones to an account"),
    });
    Ok(items)
}

/// What a backup of MySQL lacks: tables that came without rows, and names of transactions.
fn mysql_items(site: &CloneSite, target: &Target) -> Vec<CheckItem> {
    let tables = site.facts.get(fact::EMPTY_TABLES).map_or("", String::as_str);
    let tables: Vec<String> = tables.split(',').filter(|name| !name.is_empty()).map(str::to_string).collect();
    let mut items = vec![empty_tables_item(&tables)];
    let mode = site.facts.get(fact::GTID_MODE).map_or("ON", String::as_str);
    if mode != "ON" {
        items.push(match target {
            Target::Transaction { .. } => CheckItem::fail(
                "gtid_mode",
                format!("{mode} on the source: not every transaction has a GTID"),
                "choose a time, or a log file and offset",
            ),
            _ => CheckItem::warn(
                "gtid_mode",
                format!("{mode} on the source: what was replayed is proved by its place in the log only"),
                "turn GTIDs on at the source, then take a new backup",
            ),
        });
    }
    items
}

/// The log has whole seconds: of what was committed within one, nothing says what came before a part of it.
fn second_item(target: &Target) -> Option<CheckItem> {
    let Target::Time(at) = target else { return None };
    let floor = jiff::Timestamp::from_second(at.as_second()).ok().filter(|floor| floor != at)?;
    Some(CheckItem::fail(
        "time",
        format!("{target} is not a whole second, and the log of MariaDB has only those"),
        format!("choose {}, or a GTID, or a log file and offset", Target::Time(floor)),
    ))
}

/// What an order must not set, because the files of the source are as they are.
fn layout_items(site: &CloneSite) -> Vec<CheckItem> {
    let differs = |name: &&str| {
        let wanted = site.settings.iter().find(|(set, _)| set.replace('-', "_").eq_ignore_ascii_case(name))?.1;
        let found = site.facts.get(&format!("{SETTING_FACT_PREFIX}{name}")).filter(|found| *found != wanted)?;
        Some(CheckItem::fail(
            *name,
            format!("'{wanted}' was ordered, and the files of the source were written with '{found}'"),
            format!("leave out '--set {name}=...': a clone has the source's value"),
        ))
    };
    LAYOUT.iter().filter_map(differs).collect()
}

/// A replayed statement need not do what it did on the source.
fn statement_item(product: Product, site: &CloneSite, target: &Target) -> Option<CheckItem> {
    if site.facts.get(&format!("{SETTING_FACT_PREFIX}binlog_format"))? != "STATEMENT" {
        return None;
    }
    let hint = match (product, target) {
        (Product::MariaDb, Target::Backup(_)) => return None,
        (Product::MariaDb, _) => {
            "clone to a backup, which replays nothing; 'SET GLOBAL binlog_format = ROW' on the source, and take a new one"
        }
        // A copy becomes exact by what was logged while it was made.
        (Product::MySql, _) => "'SET GLOBAL binlog_format = ROW' on the source, and take a new backup",
    };
    let found =
        "STATEMENT when the backup was taken: a replayed statement may do something else than it did on the source";
    Some(CheckItem::warn("log format", found, hint))
}

/// The libraries of the source's plugins. Where this host keeps them is not known if none of the usual places exists.
fn plugins_item(site: &CloneSite, program_dir: &Path) -> Option<CheckItem> {
    let wanted = site.facts.get(fact::PLUGINS).filter(|text| !text.is_empty())?;
    let directories: Vec<_> = PLUGIN_DIRS.iter().map(|directory| program_dir.join(directory)).collect();
    let directories: Vec<_> = directories.into_iter().filter(|directory| directory.is_dir()).collect();
    let libraries = wanted.split(',').filter_map(|plugin| plugin.rsplit_once(' ').map(|(_, library)| library));
    let missing: Vec<&str> =
        libraries.filter(|library| !directories.iter().any(|directory| directory.join(library).is_file())).collect();
    Some(match missing.is_empty() {
        true => CheckItem::pass("plugins", wanted.clone()),
        false => CheckItem::warn(
            "plugins",
            format!("not found here: {}", missing.join(", ")),
            "install the packages that hold them, unless no table and no account needs them",
        ),
    })
}
