//! `keiki status`: is everything being archived, how far behind, what is wrong.

use jiff::Timestamp;

use crate::cli::Outcome;
use crate::cli::connection::{Connection, expect_response};
use crate::cli::output::duration::human_seconds;
use crate::cli::output::{error, json, table};
use crate::error::Result;
use crate::model::bytes_text::human_bytes;
use crate::peer::api::{HostStatus, InstanceState, InstanceStatus, Request, Response};

pub async fn run(agent: &Connection, as_json: bool) -> Result<Outcome> {
    let status = expect_response!(agent.ask(Request::Status).await?, "status", Response::Status(status) => status);
    if as_json {
        println!("{}", json::host_status(&status));
    } else {
        anstream::println!("{}", text(&status));
    }
    let well = status.repository_error.is_none() && status.instances.iter().all(|instance| instance.problem.is_none());
    Ok(if well { Outcome::Good } else { Outcome::Bad })
}

/// The whole screen, with colour codes in the problems.
pub fn text(status: &HostStatus) -> String {
    let up = seconds_between(status.began_at, status.now);
    let mut parts = vec![format!(
        "host        {}\nagent       {}, up {}\nrepository  {}",
        status.host,
        status.version,
        human_seconds(up),
        status.repository
    )];
    if let Some(problem) = &status.repository_error {
        parts.push(error::text(problem));
    }
    if status.instances.is_empty() {
        parts.push("no instance is configured".to_string());
    } else {
        let rows = status.instances.iter().map(|instance| row(instance, status.now)).collect();
        parts.push(table::render(&["INSTANCE", "STATE", "BACKLOG", "SHIPPED TO", "LAST BACKUP", "PORT"], rows));
    }
    if !status.groups.is_empty() {
        let rows = status.groups.iter().map(|group| vec![group.name.clone(), group.members.join(", ")]).collect();
        parts.push(table::render(&["GROUP", "MEMBERS"], rows));
    }
    for instance in &status.instances {
        if let Some(problem) = &instance.problem {
            parts.push(format!("{}: {}", instance.name, error::text(problem)));
        }
    }
    parts.join("\n\n")
}

fn row(instance: &InstanceStatus, now: Timestamp) -> Vec<String> {
    let backlog = match (instance.state, instance.backlog_bytes) {
        (InstanceState::Starting | InstanceState::Quarantine, _) => "-".to_string(),
        (_, 0) => "none".to_string(),
        (_, bytes) => format!("{}, {}", human_bytes(bytes), human_seconds(instance.backlog_seconds)),
    };
    let last_backup = match &instance.last_backup {
        Some((id, at)) => format!("{id}, {} ago", human_seconds(seconds_between(*at, now))),
        None => "none".to_string(),
    };
    vec![
        instance.name.clone(),
        json::instance_state_name(instance.state).to_string(),
        backlog,
        instance.shipped.map_or("-".to_string(), |position| position.to_string()),
        last_backup,
        instance.port.to_string(),
    ]
}

fn seconds_between(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(to.as_second() - from.as_second()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};
    use crate::model::group::Group;
    use crate::model::position::{Lsn, Position};

    #[test]
    fn a_problem_stands_below_the_table_with_its_hint() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let status = HostStatus {
            host: "a".into(),
            version: "0.1.0".into(),
            began_at: at("2026-11-21T09:00:00Z"),
            now: at("2026-11-21T10:01:00Z"),
            repository: "file:///srv/keiki".into(),
            repository_error: None,
            peers: vec![],
            groups: vec![Group { name: "online".into(), members: vec!["orders".into(), "b/cart".into()] }],
            instances: vec![InstanceStatus {
                name: "orders".into(),
                engine: "postgres".into(),
                engine_version: Some("15.18".into()),
                data_dir: "/var/lib/postgresql/15/main".into(),
                port: 5432,
                state: InstanceState::Retrying,
                incarnation: None,
                shipped: Some(Position::Wal { timeline: 1, lsn: Lsn(0x300_0000) }),
                durable: Some(Position::Wal { timeline: 1, lsn: Lsn(0x500_0000) }),
                durable_at: Some(at("2026-11-21T10:00:00Z")),
                backlog_bytes: 0x200_0000,
                backlog_seconds: 75,
                last_backup: Some(("20261121T090000Z-k3xq".into(), at("2026-11-21T09:00:00Z"))),
                problem: Some(Error::new(Kind::Full, "cannot store 'x': no space left").hint("free some space")),
            }],
        };
        insta::assert_snapshot!(anstream::adapter::strip_str(&text(&status)).to_string(), @r"
        host        a
        agent       0.1.0, up 1h 1m
        repository  file:///srv/keiki

        INSTANCE  STATE     BACKLOG           SHIPPED TO   LAST BACKUP                       PORT
        orders    retrying  32.0 MiB, 1m 15s  1@0/3000000  20261121T090000Z-k3xq, 1h 1m ago  5432

        GROUP   MEMBERS
        online  orders, b/cart

        orders: error: cannot store 'x': no space left
        hint: free some space
        ");
    }
}
