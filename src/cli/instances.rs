//! `keiki instances`: every instance of this host and its peers.

use serde_json::json;

use crate::cli::Outcome;
use crate::cli::connection::Connection;
use crate::cli::hosts::all_statuses;
use crate::cli::output::{error, json as shapes, table};
use crate::error::Result;

pub async fn run(agent: &Connection, as_json: bool) -> Result<Outcome> {
    let all = all_statuses(agent).await?;
    if as_json {
        let values: Vec<_> = all
            .iter()
            .map(|(host, status)| match status {
                Ok(status) => json!({
                    "host": host,
                    "instances": status.instances.iter().map(shapes::instance).collect::<Vec<_>>(),
                    "groups": shapes::groups(&status.groups),
                }),
                Err(cause) => json!({ "host": host, "error": shapes::error(cause) }),
            })
            .collect();
        println!("{}", serde_json::Value::Array(values));
        return Ok(Outcome::Good);
    }
    let mut rows = Vec::new();
    for (host, status) in &all {
        for instance in status.iter().flat_map(|status| &status.instances) {
            rows.push(vec![
                host.clone(),
                instance.name.clone(),
                format!("{} {}", instance.engine, instance.engine_version.as_deref().unwrap_or("?")),
                shapes::instance_state_name(instance.state).to_string(),
                instance.port.to_string(),
                instance.data_dir.clone(),
            ]);
        }
    }
    table::print(&["HOST", "INSTANCE", "ENGINE", "STATE", "PORT", "DATA DIRECTORY"], rows);
    let groups = all.iter().flat_map(|(host, status)| status.iter().map(move |status| (host, &status.groups)));
    let rows: Vec<Vec<String>> = groups
        .flat_map(|(host, groups)| {
            groups.iter().map(|group| vec![host.clone(), group.name.clone(), group.members.join(", ")])
        })
        .collect();
    if !rows.is_empty() {
        println!();
        table::print(&["HOST", "GROUP", "MEMBERS"], rows);
    }
    for (_, status) in &all {
        if let Err(cause) = status {
            error::print(cause, false);
        }
    }
    Ok(Outcome::Good)
}
