//! Everything that could hurt later, looked at now: configuration, permissions, servers, repository, groups, peers.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;

use crate::agent::config::Config;
use crate::agent::host::Host;
use crate::base::durable;
use crate::base::users;
use crate::error::{Error, Kind, Result};
use crate::job::window::window_of;
use crate::model::bytes_text::human_bytes;
use crate::model::check::CheckItem;
use crate::model::group::Group;
use crate::peer::api::{Request, Response};
use crate::repo::incarnations::Incarnations;

/// Clocks that differ by more make 'clone as of 12:00:00' mean two things.
const CLOCK_OFFSET_SECONDS_MAX: i64 = 2;
/// A peer that is down must not hold up the list.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);
/// Below this a state directory cannot hold the journals of some backups.
const STATE_FREE_BYTES_MIN: u64 = 100 << 20;

/// The whole list, in the order in which a person would fix it.
pub async fn examine(host: &Host) -> Vec<CheckItem> {
    let mut items = vec![user_item(&host.config), state_item(&host.config.host.state_dir)];
    items.extend(host.peers.certificate_item());
    items.push(repository_item(host).await);
    items.extend(clone_items(&host.config));
    for instance in host.instances() {
        let name = instance.config.name.clone();
        match instance.engine.check_source().await {
            Ok(found) => items.extend(found.into_iter().map(|mut item| {
                item.what = format!("{name}: {}", item.what);
                item
            })),
            Err(error) => items.push(failed(format!("{name}: server"), &error)),
        }
        if let Some(problem) = instance.status().await.problem {
            items.push(failed(format!("{name}: archiving"), &problem));
        }
    }
    for group in &host.config.groups {
        items.push(group_item(host, group).await);
    }
    for peer in &host.config.peers {
        items.push(peer_item(host, &peer.name).await);
    }
    items
}

/// Whether every member of a group could be cloned: one that could not makes a clone of the group impossible.
async fn group_item(host: &Host, group: &Group) -> CheckItem {
    let what = format!("group '{}'", group.name);
    let mut members = Vec::new();
    for name in &group.members {
        match reachable_member(host, name).await {
            Ok(member) => members.push(member),
            Err(error) => return failed(what, &error),
        }
    }
    CheckItem::pass(what, members.join(", "))
}

/// `host/instance` of a member; an error if nothing of it was archived, or no backup is there.
async fn reachable_member(host: &Host, name: &str) -> Result<String> {
    let repository = host.repository.get().await?;
    let source = Incarnations::new(repository.clone()).find(name).await?;
    let member = format!("{}/{}", source.host, source.instance);
    if window_of(&repository, &source, None).await?.reaches.is_empty() {
        return Err(Error::new(Kind::NotFound, format!("there is no backup of '{member}' yet"))
            .hint(format!("take one: 'keiki backup create {}' on host '{}'", source.instance, source.host)));
    }
    Ok(member)
}

/// An error as a failed item; its hint stays.
fn failed(what: impl Into<String>, error: &Error) -> CheckItem {
    CheckItem::fail(what, error.message(), error.hint_text().unwrap_or("see the agent's log"))
}

fn user_item(config: &Config) -> CheckItem {
    let what = "agent's user";
    match users::current_user() {
        Err(error) => failed(what, &error),
        Ok(_) if users::may_become_another_user() => CheckItem::pass(what, "may act as the servers' users"),
        Ok(user) => {
            let strangers: Vec<&str> = config
                .instances
                .iter()
                .map(|instance| instance.run_as.as_str())
                .chain([config.clone.run_as.as_str()])
                .filter(|name| *name != user.name)
                .collect();
            match strangers.first() {
                None => CheckItem::pass(what, format!("'{}', who also runs the servers", user.name)),
                Some(stranger) => CheckItem::fail(
                    what,
                    format!("'{}' cannot act as '{stranger}'", user.name),
                    format!("run the agent as root, or as '{stranger}'"),
                ),
            }
        }
    }
}

fn state_item(state_dir: &Path) -> CheckItem {
    let what = "state directory";
    match durable::free_bytes(state_dir) {
        Err(error) => failed(what, &error),
        Ok(free) if free < STATE_FREE_BYTES_MIN => CheckItem::fail(
            what,
            format!("{} free in '{}'", human_bytes(free), state_dir.display()),
            format!("journals and manifests in progress need {}", human_bytes(STATE_FREE_BYTES_MIN)),
        ),
        Ok(free) => CheckItem::pass(what, format!("'{}', {} free", state_dir.display(), human_bytes(free))),
    }
}

async fn repository_item(host: &Host) -> CheckItem {
    let what = "repository";
    match host.repository.problem().await {
        Some(error) => failed(what, &error),
        None => CheckItem::pass(what, host.repository.describe()),
    }
}

fn clone_items(config: &Config) -> Vec<CheckItem> {
    let what = "place for clones";
    let root = &config.clone.data_root;
    let existing = root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let space = match durable::free_bytes(existing) {
        Err(error) => failed(what, &error),
        Ok(free) if existing == root => {
            CheckItem::pass(what, format!("'{}', {} free", root.display(), human_bytes(free)))
        }
        Ok(free) => CheckItem::pass(what, format!("'{}' will be made, {} free", root.display(), human_bytes(free))),
    };
    let user = match users::User::by_name(&config.clone.run_as) {
        Ok(_) => CheckItem::pass("clones' user", format!("'{}'", config.clone.run_as)),
        Err(error) => CheckItem::warn(
            "clones' user",
            error.message(),
            "no clone can grow on this host until '[clone] run_as' names a user who exists",
        ),
    };
    vec![space, user]
}

async fn peer_item(host: &Host, name: &str) -> CheckItem {
    let what = format!("peer '{name}'");
    let asked_at = Timestamp::now();
    let answer = tokio::time::timeout(PEER_TIMEOUT, host.peers.ask(name, Request::Hello)).await;
    match answer {
        Err(_) => CheckItem::fail(what, "does not answer in time", "is its agent running, and the port open?"),
        Ok(Err(error)) => failed(what, &error),
        Ok(Ok(Response::Hello { version, now, .. })) => {
            let offset = now.as_second() - asked_at.as_second();
            if offset.abs() > CLOCK_OFFSET_SECONDS_MAX {
                CheckItem::warn(
                    what,
                    format!("keiki {version}, its clock differs by {offset} s"),
                    "let both hosts follow the same time servers: targets are given in time",
                )
            } else {
                CheckItem::pass(what, format!("keiki {version}"))
            }
        }
        Ok(Ok(_)) => {
            CheckItem::fail(what, "answers something else than it was asked", "install the same version on both")
        }
    }
}
