//! One connection to a Redis or Valkey server on this host, and errors that a person understands.
//!
//! It speaks the second version of the protocol (RESP2) itself: a handful of short questions is all it asks, answers are
//! limited in size, every call has a time limit, and no name is ever resolved. A session whose answer was not read to its
//! end is broken and not used again. Source: Redis documentation, "Redis serialization protocol specification".

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

use crate::base::bulk::run_blocking;
use crate::base::users::{User, connect_unix_as};
use crate::error::{Context, Error, Kind, Result};

const CONNECT_SECONDS_MAX: u64 = 15;
/// A server that runs a slow command for somebody answers nobody else meanwhile.
const ANSWER_SECONDS_MAX: u64 = 60;
/// The largest answer to one of our questions: `CONFIG GET *` and `INFO everything` are far below.
const ANSWER_BYTES_MAX: usize = 8 << 20;
const ANSWER_DEPTH_MAX: usize = 8;
const LINE_BYTES_MAX: usize = 64 << 10;
/// A password is a line of text.
const PASSWORD_BYTES_MAX: u64 = 4096;

/// What a source must allow to the agent's user, as rules of its access control list: questions about the server and one
/// command that makes it rewrite its append-only file. No key can be read.
pub const NEEDED_RULES: &str =
    "+ping +info +time +config|get +bgrewriteaof +acl|list +module|list +command|info +cluster|nodes";
/// What a replica must be allowed besides. It receives every key.
pub const REPLICA_RULES: &str = "+psync +replconf";

/// Where a server listens on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Socket(PathBuf),
    /// By number, without names.
    Tcp(SocketAddr),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Socket(path) => write!(f, "{}", path.display()),
            Address::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// Where to connect and as whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub address: Address,
    /// A user of the server's access control list; nothing means its default user.
    pub user: Option<String>,
    /// A file with the password in its first line; nothing means that no password is given.
    pub password_file: Option<PathBuf>,
    /// Operating system user with whose rights a unix socket is connected.
    pub run_as: String,
}

impl Endpoint {
    /// A server on a loopback address.
    pub fn loopback(port: u16, run_as: &str) -> Endpoint {
        let address = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), port);
        Endpoint { address: Address::Tcp(address), user: None, password_file: None, run_as: run_as.to_string() }
    }
}

/// An answer of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Nothing,
    Text(Vec<u8>),
    Number(i64),
    List(Vec<Reply>),
    Error(String),
}

impl Reply {
    /// The bytes of a string.
    pub fn bytes(self) -> Result<Vec<u8>> {
        match self {
            Reply::Text(bytes) => Ok(bytes),
            other => Err(unexpected(&other)),
        }
    }

    /// A string that must be text.
    pub fn text(self) -> Result<String> {
        String::from_utf8(self.bytes()?)
            .map_err(|_| Error::new(Kind::Server, "the server answers with bytes, not text"))
    }

    pub fn number(self) -> Result<i64> {
        match self {
            Reply::Number(number) => Ok(number),
            other => Err(unexpected(&other)),
        }
    }

    pub fn list(self) -> Result<Vec<Reply>> {
        match self {
            Reply::List(list) => Ok(list),
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(reply: &Reply) -> Error {
    let shown: String = format!("{reply:?}").chars().take(80).collect();
    Error::new(Kind::Server, format!("the server gives an answer that was not expected: {shown}"))
}

/// What a connection is made of.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// An open connection.
pub struct Session {
    stream: BufReader<Box<dyn Stream>>,
    /// A question was asked whose answer was not read to its end.
    is_broken: bool,
}

impl Session {
    /// Connects, logs in and makes sure that the server answers. `Unreachable` if nobody listens or it is loading,
    /// `Forbidden` if the server does not let us in.
    pub async fn open(endpoint: &Endpoint) -> Result<Session> {
        let mut session = Session::open_loading(endpoint).await?;
        let pong = session.ask(&["PING"]).await;
        pong.context(|| format!("cannot connect to the server at '{}'", endpoint.address))?;
        Ok(session)
    }

    /// Connects and logs in to a server that may still be loading its data: it then answers INFO and little else.
    pub async fn open_loading(endpoint: &Endpoint) -> Result<Session> {
        let what = || format!("cannot connect to the server at '{}'", endpoint.address);
        let limit = Duration::from_secs(CONNECT_SECONDS_MAX);
        match tokio::time::timeout(limit, Session::open_unlimited(endpoint)).await {
            Ok(outcome) => outcome.context(what),
            Err(_) => {
                Err(Error::new(Kind::Unreachable, format!("{}: no answer in {CONNECT_SECONDS_MAX} seconds", what())))
            }
        }
    }

    async fn open_unlimited(endpoint: &Endpoint) -> Result<Session> {
        let stream: Box<dyn Stream> = match &endpoint.address {
            Address::Socket(path) => {
                let (path, run_as) = (path.clone(), endpoint.run_as.clone());
                let stream = run_blocking("connect", move || connect_unix_as(&User::by_name(&run_as)?, &path))
                    .await
                    .map_err(|error| match error.kind() {
                        Kind::NotFound => error.with_kind(Kind::Unreachable).hint("is the server running?"),
                        _ => error,
                    })?;
                stream.set_nonblocking(true).context(|| "cannot prepare the connection")?;
                Box::new(tokio::net::UnixStream::from_std(stream).context(|| "cannot prepare the connection")?)
            }
            Address::Tcp(address) => {
                let stream = tokio::net::TcpStream::connect(address).await;
                Box::new(stream.context(|| "no connection").map_err(|error| error.hint("is the server running?"))?)
            }
        };
        let mut session = Session { stream: BufReader::new(stream), is_broken: false };
        session.log_in(endpoint).await?;
        Ok(session)
    }

    async fn log_in(&mut self, endpoint: &Endpoint) -> Result<()> {
        if let Some(path) = &endpoint.password_file {
            let path = path.clone();
            let password = run_blocking("password", move || read_password(&path)).await?;
            match &endpoint.user {
                Some(user) => self.ask(&["AUTH", user, &password]).await?,
                None => self.ask(&["AUTH", &password]).await?,
            };
        }
        Ok(())
    }

    /// The connection without its questions and answers: for a replica link.
    pub(super) fn into_stream(self) -> BufReader<Box<dyn Stream>> {
        self.stream
    }

    /// Whether the connection cannot be used any more: because an answer did not come, or because the server has ended it
    /// since, when it was restarted or ends idle connections (`timeout`). Asking then would be an error that says nothing
    /// about the server as it is now.
    pub async fn has_ended(&mut self) -> bool {
        // Nothing is expected before something is asked, so anything that can be read now is the end, or worse.
        self.is_broken || tokio::time::timeout(Duration::ZERO, self.stream.fill_buf()).await.is_ok()
    }

    /// Asks and waits for the answer. An error of the server is an error.
    pub async fn ask(&mut self, words: &[&str]) -> Result<Reply> {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        match self.ask_bytes(&words).await? {
            Reply::Error(message) => Err(server_error(&message)),
            reply => Ok(reply),
        }
    }

    /// Asks and waits for the answer, which may be an error of the server as a value.
    pub async fn ask_bytes(&mut self, words: &[&[u8]]) -> Result<Reply> {
        let request = request_of(words);
        self.is_broken = true;
        let limit = Duration::from_secs(ANSWER_SECONDS_MAX);
        let answer = tokio::time::timeout(limit, async {
            self.stream.get_mut().write_all(&request).await.context(|| "cannot ask the server")?;
            read_answer(&mut self.stream).await
        });
        let reply = answer.await.map_err(|_| {
            Error::new(Kind::Unreachable, format!("the server did not answer in {ANSWER_SECONDS_MAX} seconds"))
                .hint("is it busy with a slow command? 'redis-cli SLOWLOG GET' shows such commands")
        })??;
        self.is_broken = false;
        Ok(reply)
    }

    /// The lines of `INFO`, all sections that are named, as key and value.
    pub async fn info(&mut self, sections: &[&str]) -> Result<BTreeMap<String, String>> {
        let mut words = vec!["INFO"];
        words.extend(sections);
        let text = String::from_utf8_lossy(&self.ask(&words).await?.bytes()?).into_owned();
        Ok(text.lines().filter_map(|line| line.split_once(':')).map(|(k, v)| (k.into(), v.into())).collect())
    }

    /// The settings whose names match `pattern`. Values that are no text are left out.
    pub async fn settings(&mut self, pattern: &str) -> Result<BTreeMap<String, String>> {
        let mut list = self.ask(&["CONFIG", "GET", pattern]).await?.list()?.into_iter();
        let mut settings = BTreeMap::new();
        while let (Some(name), Some(value)) = (list.next(), list.next()) {
            if let (Ok(name), Ok(value)) = (name.text(), value.text()) {
                settings.insert(name, value);
            }
        }
        Ok(settings)
    }

    /// The value of one setting; an error if the server does not know it.
    pub async fn setting(&mut self, name: &str) -> Result<String> {
        self.settings(name).await?.remove(name).ok_or_else(|| {
            Error::new(Kind::Unsupported, format!("the server has no setting '{name}'"))
                .hint("keiki works with Redis 7 and later and with Valkey")
        })
    }
}

/// The number of a database in the name of a line of INFO keyspace, `db3`.
pub(super) fn database_number(name: &str) -> Option<u32> {
    name.strip_prefix("db")?.parse().ok()
}

/// A question on the wire.
pub(super) fn request_of(words: &[&[u8]]) -> Vec<u8> {
    let mut request = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        request.extend_from_slice(word);
        request.extend_from_slice(b"\r\n");
    }
    request
}

/// What a server's error means.
pub(super) fn server_error(message: &str) -> Error {
    let shown: String = message.chars().take(300).collect();
    let code = message.split(' ').next().unwrap_or_default();
    match code {
        "NOAUTH" | "WRONGPASS" => Error::new(Kind::Forbidden, format!("the server does not let us in: {shown}"))
            .hint("set 'password_file' of the instance, and 'user' if it is not the default user"),
        "NOPERM" => Error::new(Kind::Forbidden, format!("the server refuses: {shown}"))
            .hint(format!("allow it to the agent's user: redis-cli ACL SETUSER USER {}", rules_for(&shown))),
        "LOADING" | "BUSY" | "MASTERDOWN" => Error::new(Kind::Unreachable, format!("the server is not ready: {shown}")),
        _ => Error::new(Kind::Server, format!("the server says '{shown}'")),
    }
}

/// The rules for a user who was refused with this message, which names the command.
fn rules_for(refusal: &str) -> String {
    let refusal = refusal.to_lowercase();
    match refusal.contains("psync") || refusal.contains("replconf") {
        true => format!("{NEEDED_RULES} {REPLICA_RULES}"),
        false => NEEDED_RULES.to_string(),
    }
}

fn read_password(path: &std::path::Path) -> Result<String> {
    let what = || format!("cannot read password file '{}'", path.display());
    let metadata = std::fs::metadata(path).context(what)?;
    if metadata.len() > PASSWORD_BYTES_MAX {
        return Err(Error::new(Kind::BadInput, format!("{}: it is too long for a password", what())));
    }
    let text = std::fs::read_to_string(path).context(what)?;
    Ok(text.lines().next().unwrap_or_default().to_string())
}

/// Reads one answer, within the limits of a session.
pub async fn read_answer<R: AsyncRead + Unpin>(stream: &mut BufReader<R>) -> Result<Reply> {
    read_reply(stream, &mut { ANSWER_BYTES_MAX }, ANSWER_DEPTH_MAX).await
}

/// Reads one answer of at most `left` bytes, in lists at most `depth` deep.
async fn read_reply<R: AsyncRead + Unpin>(stream: &mut BufReader<R>, left: &mut usize, depth: usize) -> Result<Reply> {
    let line = read_line(stream).await?;
    let (first, rest) = line.split_first().ok_or_else(|| Error::new(Kind::Server, "the server sends an empty line"))?;
    let text = String::from_utf8_lossy(rest);
    let number = || text.parse::<i64>().map_err(|_| Error::new(Kind::Server, "the server sends a length that is none"));
    match first {
        b'+' => Ok(Reply::Text(rest.to_vec())),
        b'-' => Ok(Reply::Error(text.into_owned())),
        b':' => Ok(Reply::Number(number()?)),
        b'$' | b'*' if number()? < 0 => Ok(Reply::Nothing),
        b'$' => {
            let length = take_room(number()?, left)?;
            // Grows with what arrives and not with what is promised.
            let (mut bytes, wanted) = (Vec::new(), length + 2);
            let read = (&mut *stream).take(wanted as u64).read_to_end(&mut bytes).await;
            if read.context(|| "the server's answer is cut off")? < wanted {
                return Err(Error::new(Kind::Unreachable, "the server's answer is cut off"));
            }
            bytes.truncate(length);
            Ok(Reply::Text(bytes))
        }
        b'*' => {
            // Each element is at least a line of four bytes.
            let length = number()?;
            take_room(length.saturating_mul(4), left)?;
            if depth == 0 {
                return Err(Error::new(Kind::Server, "the server's answer is nested too deep").hint(STRANGER_HINT));
            }
            let mut list = Vec::new();
            for _ in 0..length {
                list.push(Box::pin(read_reply(stream, left, depth - 1)).await?);
            }
            Ok(Reply::List(list))
        }
        _ => Err(Error::new(Kind::Server, "the answer is not in the protocol of Redis").hint(STRANGER_HINT)),
    }
}

const STRANGER_HINT: &str = "is it another kind of server there, or one that wants TLS?";

fn take_room(wanted: i64, left: &mut usize) -> Result<usize> {
    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
    match left.checked_sub(wanted) {
        Some(rest) => {
            *left = rest;
            Ok(wanted)
        }
        None => {
            let message = format!("the server's answer is longer than {ANSWER_BYTES_MAX} bytes");
            Err(Error::new(Kind::Server, message).hint(STRANGER_HINT))
        }
    }
}

async fn read_line<R: AsyncRead + Unpin>(stream: &mut BufReader<R>) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        let byte = stream.read_u8().await.context(|| "the server ended the connection")?;
        match byte {
            b'\n' if line.last() == Some(&b'\r') => {
                line.pop();
                return Ok(line);
            }
            _ if line.len() >= LINE_BYTES_MAX => {
                return Err(Error::new(Kind::Server, "a line of the server's answer is too long"));
            }
            byte => line.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bytes: &[u8]) -> Result<Reply> {
        let mut left = 1000;
        read_reply(&mut BufReader::new(bytes), &mut left, 3).await
    }

    #[tokio::test]
    async fn answers_of_every_kind_are_read() {
        let text = |text: &str| Reply::Text(text.as_bytes().to_vec());
        assert_eq!(read(b"+OK\r\n").await.unwrap(), text("OK"));
        assert_eq!(read(b"$4\r\na\r\nb\r\n").await.unwrap(), text("a\r\nb"));
        assert_eq!(read(b"$-1\r\n").await.unwrap(), Reply::Nothing);
        assert_eq!(
            read(b"*2\r\n:7\r\n*0\r\n").await.unwrap(),
            Reply::List(vec![Reply::Number(7), Reply::List(vec![])])
        );
        assert_eq!(read(b"-ERR no\r\n").await.unwrap(), Reply::Error("ERR no".into()));
    }

    #[tokio::test]
    async fn hostile_answers_take_no_memory_and_end() {
        for bytes in [
            &b"$999999999999\r\n"[..],
            b"*999999999\r\n",
            b"*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n",
            b"HTTP/1.1 400 Bad Request\r\n",
            b"$5\r\nab",
            b"$x\r\n",
            b"\r\n",
        ] {
            let error = read(bytes).await.unwrap_err();
            assert!(matches!(error.kind(), Kind::Server | Kind::Unreachable), "{error:?}");
        }
    }
}
