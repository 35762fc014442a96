//! One connection to a PostgreSQL server over its unix socket, and errors that a person understands.
//!
//! A session connects with the credentials of the operating system user that runs the server, because Debian's and
//! Red Hat's `pg_hba.conf` let that user in by peer authentication; it asks in small queries with `pg_catalog` as the
//! only schema searched, so that nothing in a user's schema can be called by accident. Every call has a time limit.
//! Dropping a session says goodbye to the server and ends its driver task.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, NoTls, Row};

use crate::base::bulk::run_blocking;
use crate::base::users::{User, connect_unix_as};
use crate::error::{Context, Error, Kind, Result};
use crate::model::position::Lsn;

/// How long the server may take to let us in.
const CONNECT_SECONDS_MAX: u64 = 15;
/// How long a query that only looks something up may take.
const LOOK_UP_SECONDS_MAX: u64 = 30;

/// Where a server listens and who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// A directory of the server's `unix_socket_directories`.
    pub socket_dir: PathBuf,
    pub port: u16,
    pub database: String,
    /// Database role.
    pub role: String,
    /// Operating system user with whose credentials the socket is connected.
    pub run_as: String,
}

impl Endpoint {
    /// The socket file, named as in `src/include/libpq/pqcomm.h` (UNIXSOCK_PATH).
    pub fn socket_path(&self) -> PathBuf {
        self.socket_dir.join(format!(".s.PGSQL.{}", self.port))
    }
}

/// An open connection.
pub struct Session {
    client: Client,
    /// The server's `server_version_num`: 150018 is 15.18.
    version_number: u32,
    /// A query was given up while the server may still work on it.
    given_up: AtomicBool,
}

impl Session {
    /// Connects. `Unreachable` if no server listens or it is not ready yet, `Forbidden` if it does not let us in.
    pub async fn open(endpoint: &Endpoint) -> Result<Session> {
        let what = || format!("cannot connect to PostgreSQL at '{}'", endpoint.socket_path().display());
        let limit = Duration::from_secs(CONNECT_SECONDS_MAX);
        match tokio::time::timeout(limit, Session::open_unlimited(endpoint)).await {
            Ok(outcome) => outcome.context(what),
            Err(_) => Err(Error::new(
                Kind::Unreachable,
                format!("{}: no answer within {CONNECT_SECONDS_MAX} seconds", what()),
            )
            .hint("is the server overloaded, or stopped with SIGSTOP?")),
        }
    }

    async fn open_unlimited(endpoint: &Endpoint) -> Result<Session> {
        let path = endpoint.socket_path();
        let run_as = endpoint.run_as.clone();
        let stream = run_blocking("connect", move || connect_unix_as(&User::by_name(&run_as)?, &path))
            .await
            .map_err(not_running_hint)?;
        stream.set_nonblocking(true).context(|| "cannot prepare the connection")?;
        let stream = tokio::net::UnixStream::from_std(stream).context(|| "cannot prepare the connection")?;
        let mut config = Config::new();
        config.user(&endpoint.role).dbname(&endpoint.database).application_name("keiki");
        let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(|e| server_error(&e))?;
        // Ends when the client is dropped or the server goes away; a lost connection shows in the next query.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("connection to PostgreSQL ended: {error}");
            }
        });
        let mut session = Session { client, version_number: 0, given_up: AtomicBool::new(false) };
        // Set here and not in the start-up packet, so that `reset_val` of pg_settings still shows the server's own
        // value. Sessions are kept for hours; two of the limits exist from 14 and 17 on, and this works on all.
        session
            .rows(
                "SELECT pg_catalog.set_config(name, CASE name WHEN 'search_path' THEN 'pg_catalog' ELSE '0' END, false) \
                 FROM pg_catalog.pg_settings WHERE name IN ('search_path', 'statement_timeout', 'lock_timeout', \
                 'idle_session_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')",
                &[],
            )
            .await?;
        let number: i32 = session.value("SELECT current_setting('server_version_num')::int4", &[]).await?;
        session.version_number = u32::try_from(number).unwrap_or(0);
        Ok(session)
    }

    /// `server_version_num`: the major version times 10000 plus the minor one.
    pub fn version_number(&self) -> u32 {
        self.version_number
    }

    /// 15 for 15.18.
    pub fn major_number(&self) -> u32 {
        self.version_number / 10_000
    }

    /// `15.18`.
    pub fn version_text(&self) -> String {
        format!("{}.{}", self.major_number(), self.version_number % 10_000)
    }

    /// Whether the connection is known to be gone, or a query on it was given up.
    pub fn is_broken(&self) -> bool {
        self.client.is_closed() || self.given_up.load(Ordering::Relaxed)
    }

    /// All rows of a query that only looks something up.
    pub async fn rows(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        self.rows_within(Duration::from_secs(LOOK_UP_SECONDS_MAX), sql, values).await
    }

    /// All rows of a query that may take long. After the limit the connection counts as broken.
    pub async fn rows_within(&self, limit: Duration, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        self.answer_within(limit, sql, self.client.query(sql, values)).await
    }

    /// The only row of a query.
    pub async fn row(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Row> {
        let rows = self.rows(sql, values).await?;
        only_row(rows, sql)
    }

    /// The only row of a query that may take long.
    pub async fn row_within(&self, limit: Duration, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Row> {
        let rows = self.rows_within(limit, sql, values).await?;
        only_row(rows, sql)
    }

    /// The first column of the only row.
    pub async fn value<T>(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<T>
    where
        T: for<'a> tokio_postgres::types::FromSql<'a>,
    {
        column(&self.row(sql, values).await?, 0)
    }

    /// Runs one or several statements without a result; several are one transaction.
    pub async fn execute_batch(&self, sql: &str) -> Result<()> {
        let limit = Duration::from_secs(LOOK_UP_SECONDS_MAX);
        self.answer_within(limit, sql, self.client.batch_execute(sql)).await
    }

    async fn answer_within<T>(
        &self,
        limit: Duration,
        sql: &str,
        answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T> {
        // Stays true if this future is dropped half way: the answer to come would belong to nobody.
        self.given_up.store(true, Ordering::Relaxed);
        let outcome = tokio::time::timeout(limit, answer).await.map_err(|_| {
            Error::new(
                Kind::Unreachable,
                format!("PostgreSQL did not answer '{}' within {} seconds", first_words(sql), limit.as_secs()),
            )
            .hint("is the server overloaded, or is a lock in the way? see pg_stat_activity")
        })?;
        self.given_up.store(false, Ordering::Relaxed);
        outcome.map_err(|error| server_error(&error))
    }
}

/// A column of a row as a Rust value; a type that does not fit is our defect or a server of another kind.
pub fn column<T>(row: &Row, index: usize) -> Result<T>
where
    T: for<'a> tokio_postgres::types::FromSql<'a>,
{
    row.try_get(index).map_err(|error| Error::new(Kind::Internal, format!("unexpected answer of PostgreSQL: {error}")))
}

/// A column that was selected as `pg_lsn::text`.
pub fn lsn_column(row: &Row, index: usize) -> Result<Lsn> {
    Lsn::parse(&column::<String>(row, index)?)
}

/// A column that was selected with [`CLOCK_NOW`].
pub fn timestamp_column(row: &Row, index: usize) -> Result<Timestamp> {
    let text: String = column(row, index)?;
    text.parse().map_err(|_| Error::new(Kind::Server, format!("the server's clock shows an impossible time: '{text}'")))
}

/// SQL for the server's clock in UTC with microseconds, as text that does not depend on any setting.
pub const CLOCK_NOW: &str = "to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";

fn only_row(rows: Vec<Row>, sql: &str) -> Result<Row> {
    let count = rows.len();
    let mut rows = rows.into_iter();
    match (rows.next(), count) {
        (Some(row), 1) => Ok(row),
        _ => Err(Error::new(Kind::Server, format!("PostgreSQL answered '{}' with {count} rows", first_words(sql)))),
    }
}

/// Enough of a statement to recognise it in a message.
fn first_words(sql: &str) -> String {
    let line = sql.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(60) {
        Some((cut, _)) => format!("{} ...", &line[..cut]),
        None => line,
    }
}

fn not_running_hint(error: Error) -> Error {
    let error = match error.kind() {
        // The socket file goes away with the server.
        Kind::NotFound if error.hint_text().is_none() => error.with_kind(Kind::Unreachable),
        _ => error,
    };
    error.hint("is the server running, and are 'socket_dir' and 'port' of the instance right?")
}

/// What the server said, as our error. Codes: manual, appendix "PostgreSQL Error Codes".
pub(super) fn server_error(error: &tokio_postgres::Error) -> Error {
    let Some(said) = error.as_db_error() else {
        // Everything else is a connection that broke or bytes that are not the protocol.
        let mut reason = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            let text = cause.to_string();
            if !reason.contains(&text) {
                reason = format!("{reason}: {text}");
            }
            source = cause.source();
        }
        return Error::new(Kind::Unreachable, format!("the connection to PostgreSQL broke: {reason}"))
            .hint("was the server restarted? its log says why");
    };
    let code = said.code().code();
    let mut message = format!("PostgreSQL says '{}' (SQLSTATE {code})", said.message());
    if let Some(detail) = said.detail() {
        message = format!("{message}: {}", detail.replace('\n', " "));
    }
    let (kind, hint) = match code {
        "28000" | "28P01" => (
            Kind::Forbidden,
            "add a line 'local all <role> peer' to pg_hba.conf, or set 'user' of the instance to a role that may connect",
        ),
        // Whoever asked knows which right it takes.
        "42501" => (Kind::Forbidden, ""),
        "57P03" => (Kind::Unreachable, "the server is starting, stopping or recovering: try again when it is up"),
        "53300" => (Kind::Unreachable, "all connections are taken: raise max_connections or close idle ones"),
        "57P01" | "57P02" | "57P05" => (Kind::Unreachable, "was the server stopped? its log says why"),
        "3D000" => (Kind::NotFound, "does the database exist?"),
        _ => (Kind::Server, ""),
    };
    let error = Error::new(kind, message);
    match (said.hint(), hint) {
        (Some(server_hint), "") => error.hint(server_hint),
        (_, "") => error,
        (_, hint) => error.hint(hint),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_statement_is_shortened_at_a_character_border() {
        assert_eq!(first_words("SELECT\n  1"), "SELECT 1");
        let long = first_words(&"ä".repeat(200));
        assert_eq!(long, format!("{} ...", "ä".repeat(60)));
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_unreachable_with_a_hint() {
        let directory = tempfile::tempdir().unwrap();
        let me = crate::base::users::current_user().unwrap().name;
        let endpoint = Endpoint {
            socket_dir: directory.path().to_path_buf(),
            port: 5432,
            database: String::from("postgres"),
            role: me.clone(),
            run_as: me,
        };
        let error = Session::open(&endpoint).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Unreachable);
        assert!(error.hint_text().unwrap().contains("socket_dir"), "{error:?}");
    }
}
