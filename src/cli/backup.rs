//! `keiki backup`: take, list, show and download base backups.

use std::collections::BTreeMap;

use crate::cli::Outcome;
use crate::cli::arguments::BackupAction;
use crate::cli::connection::{Connection, expect_response};
use crate::cli::download;
use crate::cli::job::submit_and_follow;
use crate::cli::output::{json, table};
use crate::error::{Error, Kind, Result};
use crate::model::backup::{Backup, BackupKind};
use crate::model::bytes_text::human_bytes;
use crate::model::id::{BackupId, JobId};
use crate::model::job::{Order, Task};
use crate::model::password::Passwords;
use crate::model::target::utc_text;
use crate::peer::api::{Request, Response};

pub async fn run(agent: &Connection, action: BackupAction, as_json: bool) -> Result<Outcome> {
    match action {
        BackupAction::Create { instance, detach } => {
            let task = Task::Backup { instance, kind: BackupKind::Manual };
            let order = Order { id: JobId::fresh(), by: String::new(), task };
            submit_and_follow(agent, agent.host(), order, Passwords::new(), detach, as_json).await
        }
        BackupAction::List { instance } => {
            let backups = list(agent, &instance).await?;
            if as_json {
                println!("{}", serde_json::Value::Array(backups.iter().map(json::backup).collect()));
            } else if backups.is_empty() {
                println!("no backup of '{instance}' yet; take one with 'keiki backup create {instance}'");
            } else {
                let rows = backups.iter().map(row).collect();
                table::print(&["BACKUP", "KIND", "ENDED", "SIZE", "STORED", "FILES", "FROM", "CONSISTENT AT"], rows);
            }
            Ok(Outcome::Good)
        }
        BackupAction::Show { instance, backup } => {
            let id = BackupId::parse(&backup)?;
            let backups = list(agent, &instance).await?;
            let found = backups.iter().find(|candidate| candidate.id == id).ok_or_else(|| {
                Error::new(Kind::NotFound, format!("'{instance}' has no backup '{id}'"))
                    .hint(format!("'keiki backup list {instance}' shows what there is"))
            })?;
            if as_json {
                println!("{}", json::backup(found));
            } else {
                show(found);
            }
            Ok(Outcome::Good)
        }
        BackupAction::Download(arguments) => download::run(agent, arguments, as_json).await,
    }
}

async fn list(agent: &Connection, instance: &str) -> Result<Vec<Backup>> {
    let answer = agent.ask(Request::ListBackups { instance: instance.to_string() }).await?;
    Ok(expect_response!(answer, "list backups", Response::Backups(backups) => backups))
}

fn row(backup: &Backup) -> Vec<String> {
    vec![
        backup.id.to_string(),
        json::backup_kind_name(backup.kind).to_string(),
        utc_text(backup.ended_at),
        human_bytes(backup.restored_bytes),
        human_bytes(backup.stored_bytes),
        backup.file_count.to_string(),
        backup.start.to_string(),
        backup.stop.to_string(),
    ]
}

fn show(backup: &Backup) {
    let facts: BTreeMap<_, _> = backup.engine_facts.iter().collect();
    let mut lines = vec![
        ("backup", backup.id.to_string()),
        ("incarnation", backup.incarnation.to_string()),
        ("kind", json::backup_kind_name(backup.kind).to_string()),
        ("server", backup.engine_version.clone()),
        ("began", utc_text(backup.began_at)),
        ("ended", utc_text(backup.ended_at)),
        ("replay from", backup.start.to_string()),
        ("consistent at", backup.stop.to_string()),
        ("files", backup.file_count.to_string()),
        ("size", human_bytes(backup.restored_bytes)),
        ("stored", human_bytes(backup.stored_bytes)),
    ];
    lines.extend(facts.into_iter().map(|(name, value)| (name.as_str(), value.clone())));
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in lines {
        println!("{}", format!("{name:width$}  {value}").trim_end());
    }
}
