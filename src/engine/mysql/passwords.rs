//! New passwords for accounts of a clone, MariaDB and MySQL alike.
//!
//! `SET PASSWORD` and not `ALTER USER … IDENTIFIED BY`: the latter would also give the account another plugin than the
//! source's applications expect, and take a second way in (`OR unix_socket`) from it. The server makes the hash. In
//! quarantine there is no binary log; the general and the slow log are off for the session.

use std::collections::{BTreeMap, BTreeSet};

use crate::engine::CleanUpItem;
use crate::engine::accounts::missing;
use crate::engine::mysql::clone::ACCOUNT;
use crate::engine::mysql::session::{Session, quoted};
use crate::error::{Error, Kind, Result};
use crate::model::password::Passwords;

/// ER_SET_PASSWORD_AUTH_PLUGIN, as a session tells errors.
const NOT_APPLICABLE: &str = "(error 1699)";

/// One account: a user as it may come from one host.
struct Account {
    host: String,
    plugin: String,
}

/// Changes them all, on every host that the users may come from. With the server in quarantine.
pub async fn change(session: &Session, passwords: &Passwords) -> Result<Vec<CleanUpItem>> {
    let is_mariadb = session.server_text().contains("MariaDB");
    let accounts = accounts(session, is_mariadb).await?;
    let wanted: BTreeSet<String> = passwords.keys().cloned().collect();
    let known = accounts.keys().cloned().collect();
    if let Some(error) = missing("user", &wanted, &known) {
        return Err(error);
    }
    session.execute("SET SESSION sql_log_off = 1").await?;
    // A session cannot turn off what is measured in the general log's stead: no statement is that slow.
    session.execute("SET SESSION long_query_time = 3600").await?;
    let mut items = Vec::new();
    for (user, password) in passwords {
        let text = quoted(password.expose());
        let value = if is_mariadb { format!("PASSWORD({text})") } else { text };
        let (mut changed, mut without, mut last_error) = (Vec::new(), Vec::new(), None);
        for account in accounts.get(user).into_iter().flatten() {
            let name = format!("{}@{}", quoted(user), quoted(&account.host));
            let sql = format!("SET PASSWORD FOR {name} = {value}");
            match session.execute_hidden(&sql, &format!("SET PASSWORD FOR {name}")).await {
                Ok(()) => changed.push(format!("'{}'", account.host)),
                // The operating system or a directory says who they are.
                Err(error) if error.message().contains(NOT_APPLICABLE) || has_no_password(&account.plugin) => {
                    without.push(format!("'{}' ({})", account.host, account.plugin));
                    last_error = Some(error);
                }
                Err(error) => return Err(error.while_doing(format!("cannot change the password of '{user}'"))),
            }
        }
        if changed.is_empty() {
            let error = last_error.unwrap_or_else(|| Error::new(Kind::Server, "it has no accounts"));
            return Err(error
                .while_doing(format!("cannot change the password of '{user}'"))
                .hint(format!("it logs in without a password, by {}: leave it out", without.join(", "))));
        }
        let mut done = format!("changed, from {}", changed.join(", "));
        if !without.is_empty() {
            done += &format!("; not from {}, where the server takes none", without.join(", "));
        }
        items.push(CleanUpItem { what: format!("password of '{user}'"), done });
    }
    Ok(items)
}

/// Plugins that take no password of the server's own (MariaDB knowledge base, "Authentication Plugins"; MySQL manual,
/// "Available Authentication Plugins").
fn has_no_password(plugin: &str) -> bool {
    ["unix_socket", "auth_socket", "named_pipe", "pam", "auth_pam", "gssapi", "mysql_no_login"].contains(&plugin)
        || plugin.starts_with("authentication_")
}

/// The accounts by user; roles and the agent's own are none.
async fn accounts(session: &Session, is_mariadb: bool) -> Result<BTreeMap<String, Vec<Account>>> {
    let no_roles = if is_mariadb { "AND is_role = 'N'" } else { "" };
    let sql = format!(
        "SELECT User, Host, plugin FROM mysql.user WHERE User <> '' AND User <> {} {no_roles} ORDER BY User, Host",
        quoted(ACCOUNT)
    );
    let mut accounts: BTreeMap<String, Vec<Account>> = BTreeMap::new();
    for row in session.query(&sql).await?.rows {
        let mut values = row.into_iter().map(Option::unwrap_or_default);
        let (user, host, plugin) = (values.next(), values.next(), values.next());
        if let (Some(user), Some(host)) = (user, host) {
            accounts.entry(user).or_default().push(Account { host, plugin: plugin.unwrap_or_default() });
        }
    }
    Ok(accounts)
}
