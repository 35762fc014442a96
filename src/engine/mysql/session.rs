//! One connection to a MariaDB or MySQL server over its unix socket, and errors that a person understands.
//!
//! The client is our own because of two things that ready ones do not do: it connects with the credentials of the
//! operating system user that runs the server, whom Debian's and Red Hat's servers let in by `unix_socket`, and it
//! answers that plugin. It asks in text, one statement at a time. Every call has a time limit; a session of which an
//! answer was given up is broken. Never a TCP connection, never a host name.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use crate::base::bulk::run_blocking;
use crate::base::users::{User, connect_unix_as};
use crate::error::{Context, Error, Kind, Result};

pub mod wire;

use wire::{Greeting, Reply};

/// How long the server may take to let us in.
const CONNECT_SECONDS_MAX: u64 = 15;
/// How long a query that only looks something up may take.
const LOOK_UP_SECONDS_MAX: u64 = 30;
/// An answer to one of our questions is a few pages.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Where a server listens and who asks.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub socket: PathBuf,
    /// Account of the database.
    pub user: String,
    /// Nothing where the account needs none.
    pub password: Option<String>,
    /// Operating system user with whose credentials the socket is connected.
    pub run_as: String,
}

/// The rows of an answer; values as text, nothing for NULL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows {
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Option<String>>>,
}

impl Rows {
    /// A value of the first row by the name of its column; nothing if there is no row, no such column, or NULL.
    pub fn first(&self, column: &str) -> Option<&str> {
        let at = self.columns.iter().position(|name| name.eq_ignore_ascii_case(column))?;
        self.rows.first()?.get(at)?.as_deref()
    }
}

/// An open connection.
pub struct Session {
    stream: Mutex<UnixStream>,
    version: String,
    /// A query was given up while the server may still work on it.
    given_up: AtomicBool,
}

impl Session {
    /// Connects. `Unreachable` if no server listens or it is not ready yet, `Forbidden` if it does not let us in.
    pub async fn open(endpoint: &Endpoint) -> Result<Session> {
        let what = || format!("cannot connect to the server at '{}'", endpoint.socket.display());
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
        let (run_as, path) = (endpoint.run_as.clone(), endpoint.socket.clone());
        let stream = run_blocking("connect", move || connect_unix_as(&User::by_name(&run_as)?, &path))
            .await
            .map_err(not_running_hint)?;
        stream.set_nonblocking(true).context(|| "cannot prepare the connection")?;
        let mut stream = UnixStream::from_std(stream).context(|| "cannot prepare the connection")?;
        let (number, packet) = read_packet(&mut stream).await?;
        let greeting = Greeting::parse(&packet)?;
        let answer = greeting.answer(&endpoint.user, endpoint.password.as_deref());
        log_in(&mut stream, number, answer, endpoint).await?;
        let session =
            Session { stream: Mutex::new(stream), version: greeting.version, given_up: AtomicBool::new(false) };
        // Sessions are kept while work goes on; the rest is what our own text is written for.
        session
            .execute("SET SESSION sql_mode = 'ANSI_QUOTES', SESSION time_zone = '+00:00', SESSION wait_timeout = 86400")
            .await?;
        Ok(session)
    }

    /// As the server calls itself: `10.11.19-MariaDB-0+deb12u1-log`.
    pub fn server_text(&self) -> &str {
        &self.version
    }

    /// Whether a query was given up or the connection broke.
    pub fn is_broken(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// The answer to a query that only looks something up.
    pub async fn query(&self, sql: &str) -> Result<Rows> {
        self.query_within(Duration::from_secs(LOOK_UP_SECONDS_MAX), sql).await
    }

    /// Runs a statement that is quick and has no result.
    pub async fn execute(&self, sql: &str) -> Result<()> {
        self.query(sql).await.map(|_| ())
    }

    /// The first column of the only row, as text.
    pub async fn value(&self, sql: &str) -> Result<Option<String>> {
        let rows = self.query(sql).await?;
        Ok(rows.rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten())
    }

    /// The first column of the only row, which must be a number.
    pub async fn number(&self, sql: &str) -> Result<u64> {
        let text = self.value(sql).await?.unwrap_or_default();
        text.parse().map_err(|_| Error::new(Kind::Server, format!("the server answered '{sql}' with '{text}'")))
    }

    /// Runs a statement of which nothing may be shown: errors of ours speak of `shown` instead.
    pub async fn execute_hidden(&self, sql: &str, shown: &str) -> Result<()> {
        self.ask_within(Duration::from_secs(LOOK_UP_SECONDS_MAX), sql, shown).await.map(|_| ())
    }

    /// The answer to a statement that may take long. After the limit the connection counts as broken.
    pub async fn query_within(&self, limit: Duration, sql: &str) -> Result<Rows> {
        self.ask_within(limit, sql, sql).await
    }

    async fn ask_within(&self, limit: Duration, sql: &str, shown: &str) -> Result<Rows> {
        if self.is_broken() {
            return Err(broken("an earlier answer was given up"));
        }
        let mut stream = self.stream.lock().await;
        // Stays true if this future is dropped half way: the answer to come would belong to nobody.
        self.given_up.store(true, Ordering::Relaxed);
        let answered = tokio::time::timeout(limit, ask(&mut stream, sql)).await;
        let outcome = answered.map_err(|_| {
            Error::new(
                Kind::Unreachable,
                format!("the server did not answer '{}' within {} seconds", first_words(shown), limit.as_secs()),
            )
            .hint("is the server overloaded, or is a lock in the way? see 'SHOW PROCESSLIST'")
        })?;
        let lost = outcome.as_ref().is_err_and(|error| error.kind() == Kind::Unreachable);
        self.given_up.store(lost, Ordering::Relaxed);
        outcome
    }
}

/// A text as a string of SQL.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// Goes through the exchange of packets that the account's plugin wants.
async fn log_in(stream: &mut UnixStream, number: u8, answer: Vec<u8>, endpoint: &Endpoint) -> Result<()> {
    let mut number = number.wrapping_add(1);
    write_packet(stream, number, &answer).await?;
    let mut plugin = String::new();
    // More steps than any plugin has.
    for _ in 0..8 {
        let (theirs, packet) = read_packet(stream).await?;
        number = theirs.wrapping_add(1);
        match wire::reply_to_log_in(&packet, &mut plugin, endpoint.password.as_deref())? {
            Reply::Done => return Ok(()),
            Reply::Wait => {}
            Reply::Send(bytes) => write_packet(stream, number, &bytes).await?,
        }
    }
    Err(Error::new(Kind::Server, "the server never ends the log-in"))
}

async fn ask(stream: &mut UnixStream, sql: &str) -> Result<Rows> {
    let mut question = vec![wire::COM_QUERY];
    question.extend_from_slice(sql.as_bytes());
    write_packet(stream, 0, &question).await?;
    let (_, first) = read_packet(stream).await?;
    let count = match wire::first_answer(&first)? {
        None => return Ok(Rows::default()),
        Some(count) => count,
    };
    let mut answer = Rows::default();
    let mut total = 0usize;
    for _ in 0..count {
        let (_, packet) = read_packet(stream).await?;
        answer.columns.push(wire::column_name(&packet)?);
    }
    let (_, packet) = read_packet(stream).await?;
    if !wire::is_end(&packet) {
        return Err(wire::not_the_protocol());
    }
    loop {
        let (_, packet) = read_packet(stream).await?;
        if wire::is_end(&packet) {
            return Ok(answer);
        }
        total += packet.len();
        if total > ANSWER_BYTES_MAX {
            return Err(broken("an answer was longer than expected"));
        }
        answer.rows.push(wire::row(&packet, count)?);
    }
}

/// Length (3 bytes), number, content; a packet of the greatest length goes on in the next.
async fn read_packet(stream: &mut UnixStream) -> Result<(u8, Vec<u8>)> {
    let mut packet = Vec::new();
    loop {
        let mut header = [0; 4];
        stream.read_exact(&mut header).await.map_err(broken)?;
        let bytes = usize::from(header[0]) | usize::from(header[1]) << 8 | usize::from(header[2]) << 16;
        if packet.len() + bytes > ANSWER_BYTES_MAX {
            return Err(broken("an answer was longer than expected"));
        }
        let got = (&mut *stream).take(bytes as u64).read_to_end(&mut packet).await.map_err(broken)?;
        if got < bytes {
            return Err(broken("it ended in the middle of an answer"));
        }
        if bytes < wire::PACKET_BYTES_MAX {
            return Ok((header[3], packet));
        }
    }
}

async fn write_packet(stream: &mut UnixStream, number: u8, content: &[u8]) -> Result<()> {
    let length = u32::try_from(content.len()).ok().filter(|length| (*length as usize) < wire::PACKET_BYTES_MAX);
    let Some(length) = length else { return Err(Error::new(Kind::Internal, "a statement is too long")) };
    let [low, middle, high, _] = length.to_le_bytes();
    let mut packet = vec![low, middle, high, number];
    packet.extend_from_slice(content);
    stream.write_all(&packet).await.map_err(broken)
}

fn broken(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Unreachable, format!("the connection to the server broke: {why}"))
        .hint("was the server restarted? its log says why")
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
        // The socket file goes away with the server, or stays behind without one.
        Kind::NotFound if error.hint_text().is_none() => error.with_kind(Kind::Unreachable),
        Kind::System if error.message().contains("refused") => error.with_kind(Kind::Unreachable),
        _ => error,
    };
    error.hint("is the server running, and is 'socket' of the instance right?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_in_sql_cannot_end_its_string() {
        assert_eq!(quoted(r"it's a \ "), r"'it''s a \\ '");
        assert_eq!(first_words("SELECT\n  1"), "SELECT 1");
        assert_eq!(first_words(&"ä".repeat(200)), format!("{} ...", "ä".repeat(60)));
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_unreachable_with_a_hint() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("mysqld.sock");
        let run_as = crate::base::users::current_user().unwrap().name;
        let endpoint = Endpoint { socket: socket.clone(), user: run_as.clone(), password: None, run_as };
        for _ in 0..2 {
            let error = Session::open(&endpoint).await.err().unwrap();
            assert_eq!(error.kind(), Kind::Unreachable, "{error}");
            assert!(error.hint_text().unwrap().contains("'socket'"), "{error:?}");
            // The second time with a socket that nobody listens on.
            drop(std::os::unix::net::UnixListener::bind(&socket));
        }
    }
}
