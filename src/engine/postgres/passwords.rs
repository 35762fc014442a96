//! New passwords for roles of a clone.
//!
//! The server itself makes the verifier, as its `password_encryption` says, so that the clone is as the source's
//! applications expect it. The text of a password never becomes the text of a statement of ours: it travels as a value,
//! and what the server could write down about the statements of this session (its log, the statistics of
//! pg_stat_statements, an audit) is turned off for it. Only the verifier reaches the disk.

use std::collections::BTreeSet;

use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{IsNull, ToSql, Type};
use tokio_util::sync::CancellationToken;

use crate::engine::accounts::missing;
use crate::engine::postgres::clone::Grounds;
use crate::engine::postgres::recovery::ensure_quarantined;
use crate::engine::postgres::session::column;
use crate::engine::{CleanUpItem, CloneSite};
use crate::error::Result;
use crate::model::password::{Password, Passwords};

/// For this session alone. Settings of extensions that are not there are placeholders and do nothing.
const WRITE_NOTHING_DOWN: &str = "SELECT set_config(name, value, false) FROM (VALUES ('log_statement', 'none'), \
     ('log_duration', 'off'), ('log_min_duration_statement', '-1'), ('log_min_duration_sample', '-1'), \
     ('log_transaction_sample_rate', '0'), ('log_min_error_statement', 'panic'), ('log_min_messages', 'panic'), \
     ('client_min_messages', 'error'), ('pg_stat_statements.track', 'none'), ('auto_explain.log_min_duration', '-1'), \
     ('pgaudit.log', 'none')) AS quiet (name, value) \
     WHERE name LIKE '%.%' OR EXISTS (SELECT FROM pg_settings AS known WHERE known.name = quiet.name)";

/// ALTER ROLE takes no values, so a block of the server's own language puts them in.
const CHANGE: &str = "DO $keiki$ BEGIN EXECUTE format('ALTER ROLE %I PASSWORD %L', current_setting('keiki.role'), \
     current_setting('keiki.password')); END $keiki$";

/// A value that the client library cannot show either.
struct Hidden<'a>(&'a Password);

impl std::fmt::Debug for Hidden<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self.0, f)
    }
}

impl ToSql for Hidden<'_> {
    fn to_sql(&self, of: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.0.expose().to_sql(of, out)
    }

    fn accepts(of: &Type) -> bool {
        <&str as ToSql>::accepts(of)
    }

    tokio_postgres::types::to_sql_checked!();
}

/// `password_encryption` of the clone that is to be: the quarantine has settings of its own.
fn encryption(grounds: &Grounds, site: &CloneSite) -> Option<String> {
    const NAME: &str = "password_encryption";
    let ordered =
        site.settings.iter().find(|(name, _)| name.eq_ignore_ascii_case(NAME)).map(|(_, value)| value.clone());
    ordered.or_else(|| grounds.source.get(NAME).map(str::to_string))
}

/// Changes them all, in the server in quarantine.
pub async fn change(grounds: &Grounds, site: &CloneSite, passwords: &Passwords) -> Result<Vec<CleanUpItem>> {
    let session = ensure_quarantined(grounds, site, &CancellationToken::new()).await?;
    let rows = session.rows("SELECT rolname::text, rolcanlogin FROM pg_roles", &[]).await?;
    let roles =
        rows.iter().map(|row| Ok((column(row, 0)?, column(row, 1)?))).collect::<Result<Vec<(String, bool)>>>()?;
    let wanted: BTreeSet<String> = passwords.keys().cloned().collect();
    let known = roles.iter().filter(|(name, _)| !name.starts_with("pg_")).map(|(name, _)| name.clone()).collect();
    if let Some(error) = missing("role", &wanted, &known) {
        return Err(error);
    }
    session.rows(WRITE_NOTHING_DOWN, &[]).await?;
    session.execute_batch("SET default_transaction_read_only = off").await?;
    if let Some(method) = encryption(grounds, site) {
        session.row("SELECT set_config('password_encryption', $1, false)", &[&method]).await?;
    }
    let keep = "SELECT set_config('keiki.role', $1, false), set_config('keiki.password', $2, false)";
    let mut items = Vec::new();
    for (role, password) in passwords {
        session.row(keep, &[role, &Hidden(password)]).await?;
        session.execute_batch(CHANGE).await?;
        let sql = "SELECT rolpassword LIKE 'md5%' FROM pg_authid WHERE rolname = $1::text::name";
        let is_md5: bool = session.value(sql, &[role]).await?;
        let kind = if is_md5 { "md5" } else { "scram-sha-256" };
        let can_log_in = roles.iter().any(|(name, can_log_in)| name == role && *can_log_in);
        let but = if can_log_in { "" } else { "; the role may not log in" };
        items.push(CleanUpItem { what: format!("password of '{role}'"), done: format!("changed ({kind}){but}") });
    }
    session.row("SELECT set_config('keiki.password', '', false)", &[]).await?;
    Ok(items)
}
