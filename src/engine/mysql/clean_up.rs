//! Removes what a copy of a server must not keep, and says what was found.

use crate::engine::mysql::backup::fact;
use crate::engine::mysql::clone::OPTION_FILE;
use crate::engine::mysql::product::Product;
use crate::engine::mysql::session::Session;
use crate::engine::{CleanUpItem, CloneSite};
use crate::error::Result;

mod mysql_items;

pub(super) use mysql_items::reset_channels;

/// Settings of the source that point at its host or its replication, for the report.
const SHOWN: [&str; 12] = [
    "bind_address",
    "general_log_file",
    "init_connect",
    "init_file",
    "init_slave",
    "log_error",
    "report_host",
    "report_port",
    "slow_query_log_file",
    "ssl_cert",
    "ssl_key",
    "wsrep_cluster_address",
];

/// What is said about the account, `{}` being the run directory.
const ACCOUNT_LEFT: &str = "'keiki_agent'@'localhost' with a new password in '{}/password'; all other accounts and \
                            passwords are the source's";

/// Cleans up, with the server in quarantine. Repeating it is harmless.
pub async fn clean_up(product: Product, session: &Session, site: &CloneSite) -> Result<Vec<CleanUpItem>> {
    match product {
        Product::MariaDb => clean_up_mariadb(session, site).await,
        Product::MySql => mysql_items::clean_up(session, site).await,
    }
}

async fn clean_up_mariadb(session: &Session, site: &CloneSite) -> Result<Vec<CleanUpItem>> {
    let mut items = Vec::new();
    let mut done = |what: &str, done: String| items.push(CleanUpItem { what: what.to_string(), done });
    let slaves = session.query("SHOW ALL SLAVES STATUS").await?.rows.len();
    session.execute("STOP ALL SLAVES").await?;
    session.execute("RESET SLAVE ALL").await?;
    done(
        "replication",
        match slaves {
            0 => "none came with the copy".to_string(),
            count => format!("{count} connection(s) to sources removed, with their relay logs"),
        },
    );
    // Events that were made while the log was replayed are marked as those of a replication source.
    if let Some(source) = site.facts.get(fact::SERVER_ID).and_then(|id| id.parse::<u32>().ok()) {
        session
            .execute(&format!(
                "UPDATE mysql.event SET status = 'ENABLED', originator = @@GLOBAL.server_id WHERE status = \
                 'SLAVESIDE_DISABLED' AND originator = {source}"
            ))
            .await?;
    }
    let events = session
        .query(
            "SELECT CONCAT(EVENT_SCHEMA, '.', EVENT_NAME) FROM information_schema.EVENTS WHERE STATUS = 'ENABLED' \
             ORDER BY 1",
        )
        .await?;
    let names: Vec<String> = events.rows.iter().flatten().flatten().cloned().collect();
    done(
        "events",
        match names.len() {
            0 => "none is enabled".to_string(),
            count => format!(
                "{count} enabled ({}) and the scheduler off: turn it on with 'SET GLOBAL event_scheduler = ON' when the \
             clone may do their work",
                shortened(&names)
            ),
        },
    );
    done("server id", format!("a new one in '{}'", site.data_dir.join(OPTION_FILE).display()));
    let state = session.value("SELECT @@GLOBAL.gtid_slave_pos").await?.unwrap_or_default();
    done("GTID", format!("the binary log of the new life begins where the clone left its source, at '{state}'"));
    done("account of the agent", ACCOUNT_LEFT.replace("{}", &site.run_dir.display().to_string()));
    for name in SHOWN {
        if let Some(value) = site.facts.get(&format!("setting.{name}")).filter(|value| !value.is_empty()) {
            done(&format!("setting '{name}'"), format!("not taken over; it was '{value}'"));
        }
    }
    let servers = session.query("SELECT Server_name FROM mysql.servers ORDER BY 1").await?;
    let names: Vec<String> = servers.rows.iter().flatten().flatten().cloned().collect();
    if !names.is_empty() {
        done(
            "foreign servers",
            format!("found and left: {}; tables that use them reach the source's peers", shortened(&names)),
        );
    }
    Ok(items)
}

/// Some names, and how many more there are.
fn shortened(names: &[String]) -> String {
    let shown = names.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > 5 { format!("{shown} and {} more", names.len() - 5) } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::mysql::clone::{ACCOUNT, PASSWORD_FILE};

    #[test]
    fn long_lists_are_shortened_with_their_length() {
        let account = format!("'{}'@'localhost' with a new password in '{{}}/{}'", ACCOUNT, PASSWORD_FILE);
        assert!(ACCOUNT_LEFT.starts_with(&account), "{account}");
        let names: Vec<String> = (0..7).map(|number| format!("e{number}")).collect();
        assert_eq!(shortened(&names), "e0, e1, e2, e3, e4 and 2 more");
        assert_eq!(shortened(&names[..2]), "e0, e1");
    }
}
