//! `keiki hosts`: this host and its peers, and whether their agents answer.

use crate::cli::Outcome;
use crate::cli::connection::{Connection, expect_response};
use crate::cli::output::table;
use crate::error::Result;
use crate::peer::api::{HostStatus, Request, Response};

pub async fn run(agent: &Connection, as_json: bool) -> Result<Outcome> {
    let own = expect_response!(agent.ask(Request::Status).await?, "status", Response::Status(status) => status);
    let mut rows = vec![(own.host.clone(), "this host".to_string(), Ok(own.version.clone()))];
    for peer in &own.peers {
        let answer = agent.ask_host(Some(&peer.name), Request::Hello).await;
        let version = match answer {
            Ok(Response::Hello { version, .. }) => Ok(version),
            Ok(other) => Err(super::connection::unexpected("hello", &other)),
            Err(error) => Err(error),
        };
        rows.push((peer.name.clone(), peer.address.clone(), version));
    }
    if as_json {
        let values: Vec<_> = rows
            .iter()
            .map(|(name, address, version)| {
                serde_json::json!({
                    "host": name, "address": address, "version": version.as_ref().ok(),
                    "error": version.as_ref().err().map(super::output::json::error),
                })
            })
            .collect();
        println!("{}", serde_json::Value::Array(values));
    } else {
        let text_rows = rows
            .into_iter()
            .map(|(name, address, version)| {
                let answer =
                    version.map_or_else(|error| format!("no answer: {error}"), |version| format!("keiki {version}"));
                vec![name, address, answer]
            })
            .collect();
        table::print(&["HOST", "ADDRESS", "AGENT"], text_rows);
    }
    Ok(Outcome::Good)
}

/// The status of this host and of every peer that answers, with the error of those that do not.
pub async fn all_statuses(agent: &Connection) -> Result<Vec<(String, Result<HostStatus>)>> {
    let own = expect_response!(agent.ask(Request::Status).await?, "status", Response::Status(status) => status);
    let peers = own.peers.clone();
    let mut all = vec![(own.host.clone(), Ok(own))];
    for peer in peers {
        let status = match agent.ask_host(Some(&peer.name), Request::Status).await {
            Ok(Response::Status(status)) => Ok(status),
            Ok(other) => Err(super::connection::unexpected("status", &other)),
            Err(error) => Err(error),
        };
        all.push((peer.name, status));
    }
    Ok(all)
}
