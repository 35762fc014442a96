//! `keiki clone`: one plain command with a check list before and a progress bar during.

use std::collections::BTreeMap;

use crate::cli::Outcome;
use crate::cli::arguments::{CloneArguments, TargetArguments};
use crate::cli::connection::{Connection, expect_response};
use crate::cli::group;
use crate::cli::job::submit_and_follow;
use crate::cli::output::checks;
use crate::cli::passwords;
use crate::error::{Error, Kind, Result};
use crate::model::group::{Group, GroupOrder};
use crate::model::id::{BackupId, JobId, check_name};
use crate::model::job::{CloneOrder, Order, Task};
use crate::model::position::{Lsn, Position};
use crate::model::target::Target;
use crate::peer::api::{Request, Response};

pub async fn run(agent: &Connection, typed: CloneArguments, as_json: bool) -> Result<Outcome> {
    let passwords = passwords::read(&typed.passwords)?;
    let passwords_for = passwords.keys().cloned().collect();
    let task = match group::find(agent, &typed.source).await? {
        Some(group) => Task::CloneGroup(read_group_order(&typed, group)?),
        None => Task::Clone(CloneOrder { passwords_for, ..read_order(&typed)? }),
    };
    let hosts: Vec<Option<&str>> = match typed.to.as_slice() {
        [] => vec![agent.host()],
        named => named.iter().map(|host| Some(host.as_str())).collect(),
    };
    let own_host = own_host_name(agent).await?;
    let mut outcome = Outcome::Good;
    for host in hosts {
        // The agent of this host is asked directly: it need not be its own peer.
        let host = host.filter(|name| *name != own_host);
        let order = Order { id: JobId::fresh(), by: String::new(), task: task.clone() };
        if !as_json {
            let place = host.unwrap_or(&own_host);
            eprintln!("{}", announcement(&task, place));
        }
        let one = if typed.check {
            let answer = agent.ask_host(host, Request::Check { order }).await?;
            checks::print(&expect_response!(answer, "check", Response::Checks(items) => items), as_json)
        } else {
            submit_and_follow(agent, host, order, passwords.clone(), typed.detach, as_json).await?
        };
        if let Outcome::Bad = one {
            outcome = Outcome::Bad;
        }
    }
    Ok(outcome)
}

/// What is about to happen, with the moment as it was understood.
fn announcement(task: &Task, host: &str) -> String {
    match task {
        Task::Clone(clone) => {
            format!("{} on host '{host}' from '{}' as of {}", clone.clone_name, clone.source, clone.target)
        }
        Task::CloneGroup(order) => {
            let names = order.member_names().join(", ");
            format!("{names} on host '{host}' from group '{}' as of {}", order.group, order.target)
        }
        Task::Backup { instance, .. } => format!("backup of '{instance}'"),
    }
}

async fn own_host_name(agent: &Connection) -> Result<String> {
    let answer = agent.ask_host(None, Request::Hello).await?;
    Ok(expect_response!(answer, "hello", Response::Hello { host, .. } => host))
}

/// What was typed, checked as far as it can be without asking anybody.
fn read_order(typed: &CloneArguments) -> Result<CloneOrder> {
    check_name("a clone", &typed.clone_name)?;
    for part in typed.source.splitn(2, '/') {
        check_name("an instance", part)?;
    }
    let mut settings = BTreeMap::new();
    for setting in &typed.settings {
        let (name, value) = setting.split_once('=').ok_or_else(|| {
            Error::new(Kind::BadInput, format!("cannot read setting '{setting}': there is no '='"))
                .hint("write it as --set parameter=value")
        })?;
        settings.insert(name.trim().to_string(), value.to_string());
    }
    if let Some(dir) = &typed.dir
        && !dir.starts_with('/')
    {
        return Err(Error::new(Kind::BadInput, format!("directory '{dir}' is not an absolute path"))
            .hint("it is a directory on the target host: write it from the root"));
    }
    Ok(CloneOrder {
        source: typed.source.clone(),
        clone_name: typed.clone_name.clone(),
        target: read_target(&typed.target)?,
        data_dir: typed.dir.clone(),
        port: typed.port,
        settings,
        hold: typed.hold,
        passwords_for: Default::default(),
        keep_expired: typed.keep_expired,
        ties: BTreeMap::new(),
    })
}

/// The order of a group; what means one instance only is refused.
fn read_group_order(typed: &CloneArguments, group: Group) -> Result<GroupOrder> {
    let refuse = |option, hint| Err(group::refuse(&group.name, option, hint));
    if typed.dir.is_some() {
        return refuse("--dir", "its clones lie below '[clone] data_root' of the target host");
    }
    if typed.port.is_some() {
        return refuse(
            "--port",
            "its clones get free ports of '[clone] ports' of the target host, and the result names them",
        );
    }
    if !typed.settings.is_empty() {
        return refuse("--set", "order it with --hold, and set on each server what you want before 'keiki accept'");
    }
    if !typed.passwords.is_empty() {
        return refuse("--password", "order it with --hold, and change them on each server before 'keiki accept'");
    }
    if typed.keep_expired {
        return refuse("--keep-expired", "clone the instance whose expired keys you want by itself");
    }
    let of_one = [
        (typed.target.position.is_some(), "--position"),
        (typed.target.gtid.is_some(), "--gtid"),
        (typed.target.before_gtid.is_some(), "--before-gtid"),
        (typed.target.name.is_some(), "--name"),
        (typed.target.backup.is_some(), "--backup"),
    ];
    if let Some((_, option)) = of_one.iter().find(|(is_given, _)| *is_given) {
        return refuse(option, "choose a time with --at, or --latest: all members show the same moment");
    }
    let order = GroupOrder {
        group: group.name.clone(),
        clone_name: typed.clone_name.clone(),
        sources: group.members,
        target: read_target(&typed.target)?,
        hold: typed.hold,
    };
    order.check()?;
    Ok(order)
}

fn read_target(typed: &TargetArguments) -> Result<Target> {
    if let Some(time) = &typed.at {
        return Target::parse_time(time);
    }
    if let Some(backup) = &typed.backup {
        return Ok(Target::Backup(BackupId::parse(backup)?));
    }
    if let Some(position) = &typed.position {
        return read_position(position);
    }
    for (typed, included) in [(&typed.gtid, true), (&typed.before_gtid, false)] {
        if let Some(id) = typed {
            return Ok(Target::Transaction { id: id.clone(), included });
        }
    }
    match &typed.name {
        Some(name) => Ok(Target::Name(name.clone())),
        None => Ok(Target::Latest),
    }
}

/// A position as the server prints it: an LSN, or the name of a numbered log file and an offset in it.
fn read_position(text: &str) -> Result<Target> {
    let in_file = text.rsplit_once(':').and_then(|(file, offset)| {
        let digits = file.rsplit(['.', ':']).next()?;
        let decimal = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok())?;
        Some(Position::File { number: decimal(digits)?, offset: decimal(offset)? })
    });
    match in_file {
        Some(position) => Ok(Target::Position(position)),
        None => Ok(Target::Lsn(
            Lsn::parse(text)
                .map_err(|error| error.hint("write '16/B374D848' for PostgreSQL, 'binlog.000012:4567' for MariaDB"))?,
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed() -> CloneArguments {
        CloneArguments {
            source: "orders".into(),
            to: vec![],
            clone_name: "orders-check".into(),
            target: TargetArguments {
                at: None,
                backup: None,
                position: None,
                gtid: None,
                before_gtid: None,
                name: None,
                latest: false,
            },
            dir: None,
            port: None,
            settings: vec![],
            passwords: vec![],
            keep_expired: false,
            check: false,
            hold: false,
            detach: false,
        }
    }

    #[test]
    fn settings_keep_everything_after_the_first_equals_sign() {
        let order = read_order(&CloneArguments { settings: vec!["a.b = x=y".into()], ..typed() }).unwrap();
        assert_eq!(order.settings["a.b"], " x=y");
        assert_eq!(order.target, Target::Latest);
    }

    #[test]
    fn positions_and_transactions_are_read_as_the_servers_print_them() {
        let at = |text: &str| read_position(text);
        let in_file = Target::Position(Position::File { number: 12, offset: 4567 });
        assert_eq!(at("binlog.000012:4567").unwrap(), in_file);
        assert_eq!(at("/var/log/my.host-bin.000012:4567").unwrap(), in_file);
        assert_eq!(at("file:12:4567").unwrap(), in_file);
        assert_eq!(at("16/B374D848").unwrap(), Target::Lsn(Lsn(0x16_B374_D848)));
        for wrong in ["binlog.000012", "binlog.000012:", "binlog.x:5", "12"] {
            assert!(at(wrong).unwrap_err().hint_text().is_some(), "{wrong}");
        }
    }

    #[test]
    fn what_means_one_instance_is_refused_for_a_group_with_a_hint() {
        let group = || Group { name: "shop".into(), members: vec!["orders".into(), "db2/cart".into()] };
        let at = |target: TargetArguments| CloneArguments { clone_name: "check".into(), target, ..typed() };
        let time = TargetArguments { at: Some("2026-11-21 10:00:00Z".into()), ..typed().target };
        let order = read_group_order(&at(time), group()).unwrap();
        assert_eq!(order.member_names(), ["check-orders", "check-cart"]);
        assert_eq!(order.target.to_string(), "2026-11-21 10:00:00Z");
        let wrong = [
            at(TargetArguments { position: Some("0/1".into()), ..typed().target }),
            at(TargetArguments { gtid: Some("0-1-1".into()), ..typed().target }),
            at(TargetArguments { before_gtid: Some("0-1-1".into()), ..typed().target }),
            at(TargetArguments { name: Some("x".into()), ..typed().target }),
            at(TargetArguments { backup: Some("x".into()), ..typed().target }),
            CloneArguments { port: Some(1), ..typed() },
            CloneArguments { dir: Some("/d".into()), ..typed() },
            CloneArguments { settings: vec!["a=b".into()], ..typed() },
        ];
        for wrong in wrong {
            let error = read_group_order(&wrong, group()).unwrap_err();
            assert!(error.message().contains("group 'shop' with --"), "{error}");
            assert!(error.hint_text().is_some(), "{error}");
        }
    }

    #[test]
    fn what_is_typed_wrong_is_refused_before_anybody_is_asked() {
        for wrong in [
            CloneArguments { settings: vec!["work_mem".into()], ..typed() },
            CloneArguments { dir: Some("relative".into()), ..typed() },
            CloneArguments { clone_name: "../x".into(), ..typed() },
            CloneArguments { source: "a/b/c".into(), ..typed() },
        ] {
            let error = read_order(&wrong).unwrap_err();
            assert_eq!(error.kind(), Kind::BadInput);
            assert!(error.hint_text().is_some(), "{error}");
        }
    }
}
