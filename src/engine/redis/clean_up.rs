//! What a copy of a Redis server must not keep, and the clone's own files.
//!
//! The data directory holds only the append-only file that recovery has put together: no `nodes.conf`, no configuration of
//! Sentinel, no `dump.rdb`. Who the source follows, its cluster, its `masterauth` and its password are settings, and of
//! those only the ones in `settings` come along. Users come along with the hashes of their passwords.

use crate::base::durable::write_file_durable;
use crate::base::ownership::write_owned;
use crate::base::random::random_u64;
use crate::engine::redis::clone::Grounds;
use crate::engine::redis::session::Session;
use crate::engine::redis::settings::{
    ACL_FILE, AGENT_PASSWORD_FILE, AGENT_USER, APPEND_DIR, CONF_FILE, acl_file, acl_lines, final_conf, modules,
};
use crate::engine::redis::{cluster, left_behind};
use crate::engine::{CleanUpItem, CloneSite};
use crate::error::{Context, Error, Kind, Result};

/// Removes what does not belong there and writes the clone's settings and users. Repeating it is harmless.
pub(super) async fn clean_up(grounds: &Grounds, site: &CloneSite) -> Result<Vec<CleanUpItem>> {
    let user = &grounds.server.user;
    let mut items = remove_strangers(site)?;
    let mut session = Session::open(&grounds.server.endpoint()).await?;
    let info = session.info(&["replication", "cluster"]).await?;
    let is = |key: &str, value: &str| info.get(key).is_some_and(|found| found == value);
    if !is("role", "master") || is("cluster_enabled", "1") {
        return Err(Error::new(
            Kind::Server,
            "the clone follows another server or a cluster, although it was told not to",
        ));
    }
    match cluster::place_table(&grounds.server.endpoint(), user, site).await? {
        None => items.push(item("replication and cluster", "not taken over: the clone stands alone")),
        Some(table) => items.extend([item("replication", "not taken over"), table]),
    }
    items.extend(left_behind::items(&site.facts));
    let (password, hash) = agent_password(&mut session).await?;
    write_file_durable(&site.run_dir.join(AGENT_PASSWORD_FILE), password.as_bytes(), 0o600)?;
    write_owned(user, &site.data_dir.join(ACL_FILE), acl_file(&site.facts, &hash).as_bytes())?;
    let users = acl_lines(&site.facts).len();
    items.push(item(
        "users",
        &format!("{users} with their passwords, and '{AGENT_USER}' for the agent, which sees no data"),
    ));
    // As many as in quarantine: that is what the log was found to need.
    let databases = session.setting("databases").await?.parse().unwrap_or(0);
    let conf = final_conf(grounds.conf_input(site, databases));
    write_owned(user, &site.data_dir.join(CONF_FILE), conf.as_bytes())?;
    items.push(item("settings", &format!("'{}'", site.data_dir.join(CONF_FILE).display())));
    let modules = modules(&site.facts);
    if !modules.is_empty() {
        let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
        items.push(item("modules", &format!("loaded as on the source: {}", names.join(", "))));
    }
    Ok(items)
}

/// A password of 128 random bits, and its hash as the server writes it (SHA-256 in hexadecimal).
async fn agent_password(session: &mut Session) -> Result<(String, String)> {
    let password = format!("{:016x}{:016x}", random_u64(), random_u64());
    session.ask(&["ACL", "SETUSER", AGENT_USER, "reset", "on", &format!(">{password}")]).await?;
    let own = format!("user {AGENT_USER} ");
    for line in session.ask(&["ACL", "LIST"]).await?.list()? {
        let line = line.text()?;
        if let Some(hash) =
            line.starts_with(&own).then(|| line.split(' ').find_map(|word| word.strip_prefix('#'))).flatten()
        {
            return Ok((password, hash.to_string()));
        }
    }
    Err(Error::new(Kind::Server, "the server does not list the user that it was given"))
}

/// Removes everything that is neither the append-only file nor ours.
fn remove_strangers(site: &CloneSite) -> Result<Vec<CleanUpItem>> {
    let what = || format!("cannot look into '{}'", site.data_dir.display());
    let mut removed = Vec::new();
    for entry in std::fs::read_dir(&site.data_dir).context(what)? {
        let path = entry.context(what)?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if [APPEND_DIR, ACL_FILE, CONF_FILE].contains(&name.as_str()) {
            continue;
        }
        let outcome = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        outcome.context(|| format!("cannot remove '{}'", path.display()))?;
        removed.push(name);
    }
    Ok(if removed.is_empty() {
        Vec::new()
    } else {
        vec![item("files of the source", &format!("removed: {}", removed.join(", ")))]
    })
}

fn item(what: &str, done: &str) -> CleanUpItem {
    CleanUpItem { what: what.to_string(), done: done.to_string() }
}
