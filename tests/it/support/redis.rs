//! Real Redis servers for tests: private, in temporary directories, reached through a unix socket.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use keiki::engine::redis::session::{Address, Endpoint};
use keiki::engine::redis::{LogKind, RedisSource};
use keiki::model::engine_kind::EngineKind;

use super::hosts::wait_for;
use super::postgres::{end_cleanly, server_user};

/// A product in one version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    Redis7,
    Redis8,
    Valkey8,
    Valkey9,
}

impl Product {
    pub fn engine(self) -> EngineKind {
        match self {
            Product::Redis7 | Product::Redis8 => EngineKind::Redis,
            Product::Valkey8 | Product::Valkey9 => EngineKind::Valkey,
        }
    }

    /// `redis-server` or `valkey-server`.
    fn program(self) -> String {
        format!("{}-server", self.engine().name())
    }

    /// The directory of the programs, as `packaging/test-servers.sh` has found or made it.
    pub fn bin_dir(self) -> PathBuf {
        let variable = match self {
            Product::Redis7 => "KEIKI_TEST_REDIS7_BIN",
            Product::Redis8 => "KEIKI_TEST_REDIS8_BIN",
            Product::Valkey8 => "KEIKI_TEST_VALKEY8_BIN",
            Product::Valkey9 => "KEIKI_TEST_VALKEY9_BIN",
        };
        let dir = std::env::var_os(variable).map(PathBuf::from);
        let dir = dir.unwrap_or_else(|| panic!("{variable} is not set: run packaging/test-servers.sh"));
        assert!(dir.join(self.program()).exists(), "there is no {} in '{}'", self.program(), dir.display());
        dir
    }
}

/// The programs of Redis 7.
pub fn bin_dir() -> PathBuf {
    Product::Redis7.bin_dir()
}

/// A running server, killed when this is dropped.
pub struct TestRedis {
    pub product: Product,
    pub data_dir: PathBuf,
    pub socket: PathBuf,
    /// Open files of increments that a test wants to read after the server has deleted them, by the server's numbers.
    pub increments: std::sync::Mutex<std::collections::BTreeMap<u64, fs::File>>,
    settings: Vec<(String, String)>,
    child: Option<Child>,
    _dir: tempfile::TempDir,
}

impl TestRedis {
    /// Starts a Redis 7 with an append-only file that has times; `settings` come after that.
    pub fn start(settings: &[(&str, &str)]) -> TestRedis {
        TestRedis::start_of(Product::Redis7, settings)
    }

    /// The same of any product.
    pub fn start_of(product: Product, settings: &[(&str, &str)]) -> TestRedis {
        let mut server = TestRedis::prepare_of(product, settings);
        server.start_again();
        server
    }

    /// An empty data directory, and nothing started.
    pub fn prepare_of(product: Product, settings: &[(&str, &str)]) -> TestRedis {
        let dir = tempfile::Builder::new().prefix("keiki-redis-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let data_dir = dir.path().join("data");
        fs::create_dir(&data_dir).unwrap();
        let user = server_user();
        for path in [dir.path(), &data_dir] {
            std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).unwrap();
        }
        let socket = dir.path().join("s");
        let settings = settings.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        TestRedis { product, data_dir, socket, increments: Default::default(), settings, child: None, _dir: dir }
    }

    /// Starts the server that was stopped or killed.
    pub fn start_again(&mut self) {
        let user = server_user();
        let mut command = Command::new(self.product.bin_dir().join(self.product.program()));
        command.args(["--port", "0", "--unixsocket", self.socket.to_str().unwrap(), "--unixsocketperm", "777"]);
        command.args(["--dir", self.data_dir.to_str().unwrap(), "--appendonly", "yes", "--save", ""]);
        command.args(["--aof-timestamp-enabled", "yes", "--enable-debug-command", "yes"]);
        for (name, value) in &self.settings {
            command.arg(format!("--{name}")).arg(value);
        }
        if nix::unistd::geteuid().is_root() {
            command.uid(user.uid).gid(user.gid);
        }
        let log = fs::File::create(self.data_dir.with_file_name("log")).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
        wait_for("redis to answer", Duration::from_secs(20), || {
            Client::try_open(&self.socket).is_some_and(|mut client| client.ask(&[b"PING"]) == Answer::text("PONG"))
        });
    }

    /// Changes what it is started with the next time.
    pub fn set(&mut self, name: &str, value: &str) {
        self.settings.push((name.to_string(), value.to_string()));
    }

    /// The server as an agent is told about it.
    pub fn source(&self, name: &str) -> RedisSource {
        RedisSource {
            name: name.to_string(),
            engine: self.product.engine(),
            data_dir: self.data_dir.clone(),
            endpoint: Endpoint {
                address: Address::Socket(self.socket.clone()),
                user: None,
                password_file: None,
                run_as: server_user().name,
            },
            log: LogKind::AppendOnlyFile,
            hold_limit_bytes: 1 << 30,
        }
    }

    pub fn client(&self) -> Client {
        Client::open(&self.socket)
    }

    /// Asks for something and expects that it is done.
    pub fn run(&self, words: &[&str]) -> Answer {
        self.client().run(words)
    }

    /// Process id of the running server.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running server").id()
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self) {
        if let Some(child) = self.child.take() {
            end_cleanly(child);
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// The value of a line of INFO.
    pub fn info(&self, key: &str) -> String {
        self.client().info(key)
    }

    /// Rewrites the append-only file and waits for the end of it.
    pub fn rewrite(&self) {
        self.client().rewrite();
    }
}

impl Drop for TestRedis {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Connects to a server that was just started.
pub fn open_when_ready(socket: &Path) -> Client {
    wait_for("redis to listen", Duration::from_secs(20), || Client::try_open(socket).is_some());
    Client::open(socket)
}

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Nothing,
    Bytes(Vec<u8>),
    Number(i64),
    List(Vec<Answer>),
    Error(String),
}

impl Answer {
    pub fn text(text: &str) -> Answer {
        Answer::Bytes(text.as_bytes().to_vec())
    }

    pub fn bytes(self) -> Vec<u8> {
        match self {
            Answer::Bytes(bytes) => bytes,
            other => panic!("{other:?} are no bytes"),
        }
    }

    pub fn list(self) -> Vec<Answer> {
        match self {
            Answer::List(list) => list,
            other => panic!("{other:?} is no list"),
        }
    }

    pub fn number(self) -> i64 {
        match self {
            Answer::Number(number) => number,
            other => panic!("{other:?} is no number"),
        }
    }
}

/// A connection that shares no code with what is tested.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    pub fn open(socket: &Path) -> Client {
        Client::try_open(socket).unwrap_or_else(|| panic!("nobody listens at '{}'", socket.display()))
    }

    fn try_open(socket: &Path) -> Option<Client> {
        Some(Client { stream: BufReader::new(UnixStream::connect(socket).ok()?) })
    }

    pub fn run(&mut self, words: &[&str]) -> Answer {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        self.run_bytes(&words)
    }

    pub fn run_bytes(&mut self, words: &[&[u8]]) -> Answer {
        match self.ask(words) {
            Answer::Error(error) => panic!("{:?}: {error}", String::from_utf8_lossy(words[0])),
            answer => answer,
        }
    }

    pub fn ask(&mut self, words: &[&[u8]]) -> Answer {
        self.send(words).unwrap();
        self.answer()
    }

    /// The same; nothing if the server is gone.
    pub fn try_ask(&mut self, words: &[&[u8]]) -> Option<Answer> {
        self.send(words).ok()?;
        // Whether there is an answer at all.
        self.stream.fill_buf().ok().filter(|bytes| !bytes.is_empty())?;
        Some(self.answer())
    }

    fn send(&mut self, words: &[&[u8]]) -> std::io::Result<()> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend(format!("${}\r\n", word.len()).into_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        self.stream.get_mut().write_all(&request)
    }

    fn answer(&mut self) -> Answer {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line).unwrap();
        let line = String::from_utf8_lossy(&line).trim_end().to_string();
        assert!(!line.is_empty(), "the server ended the connection");
        let (kind, rest) = line.split_at(1);
        let number = || rest.parse::<i64>().unwrap();
        match kind {
            "+" => Answer::text(rest),
            "-" => Answer::Error(rest.to_string()),
            ":" => Answer::Number(number()),
            "$" | "*" if number() < 0 => Answer::Nothing,
            "$" => {
                let mut bytes = vec![0; number() as usize + 2];
                self.stream.read_exact(&mut bytes).unwrap();
                bytes.truncate(bytes.len() - 2);
                Answer::Bytes(bytes)
            }
            "*" => Answer::List((0..number()).map(|_| self.answer()).collect()),
            _ => panic!("'{line}' is no answer"),
        }
    }

    /// The value of a line of INFO.
    pub fn info(&mut self, key: &str) -> String {
        let text = String::from_utf8(self.run(&["INFO", "everything"]).bytes()).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.unwrap_or_default().to_string()
    }

    /// Rewrites the append-only file and waits for the end of it.
    pub fn rewrite(&mut self) {
        self.ask(&[b"BGREWRITEAOF"]);
        wait_for("the rewrite to end", Duration::from_secs(60), || {
            self.info("aof_rewrite_in_progress") == "0" && self.info("aof_rewrite_scheduled") == "0"
        });
    }

    /// Every key of a database with its value as DUMP gives it.
    pub fn dump(&mut self) -> std::collections::BTreeMap<Vec<u8>, Vec<u8>> {
        let mut found = std::collections::BTreeMap::new();
        let mut cursor = b"0".to_vec();
        loop {
            let mut page = self.run_bytes(&[b"SCAN", &cursor, b"COUNT", b"1000"]).list().into_iter();
            cursor = page.next().unwrap().bytes();
            let keys: Vec<Vec<u8>> = page.next().unwrap().list().into_iter().map(Answer::bytes).collect();
            // Many questions at once: one by one a copy of a hundred thousand keys would take minutes.
            for keys in keys.chunks(100) {
                keys.iter().for_each(|key| self.send(&[b"DUMP", key]).unwrap());
                for key in keys {
                    if let Answer::Bytes(value) = self.answer() {
                        found.insert(key.clone(), value);
                    }
                }
            }
            if cursor == b"0" {
                return found;
            }
        }
    }
}
