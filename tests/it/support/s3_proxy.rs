//! A network that fails on order: a proxy between an agent and an S3 server, on loopback.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What the network does with connections that are made from now on; those that are open when it changes are closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    /// Everything goes through.
    Fine,
    /// Nobody listens.
    Refuse,
    /// Every request is answered with 503 SlowDown.
    SlowDown,
    /// Requests are taken and never answered.
    Hang,
    /// A connection breaks when so many bytes have gone through it in one direction.
    Cut(usize),
    /// Of every so many bytes that go to the server on a connection, one has a bit that is the other one.
    FlipUp(usize),
    /// The same for bytes that come from the server.
    FlipDown(usize),
}

/// See the module.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    target: u16,
    weather: Mutex<Weather>,
    open: Mutex<Vec<TcpStream>>,
    /// Connections on which the weather did harm.
    struck: AtomicUsize,
    /// Requests that came, by kind.
    requests: Mutex<BTreeMap<&'static str, u64>>,
    bytes_up: AtomicUsize,
    bytes_down: AtomicUsize,
    /// So many connections get `SlowDown` in fine weather.
    slow_down_next: AtomicUsize,
    is_over: AtomicBool,
}

impl Proxy {
    /// A proxy to a port of loopback, in fine weather.
    pub fn start(target: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            target,
            weather: Mutex::new(Weather::Fine),
            open: Mutex::default(),
            struck: AtomicUsize::new(0),
            requests: Mutex::default(),
            bytes_up: AtomicUsize::new(0),
            bytes_down: AtomicUsize::new(0),
            slow_down_next: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
        });
        let own = shared.clone();
        std::thread::spawn(move || own.serve(listener, port));
        Proxy { port, shared }
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Changes the weather and closes every connection.
    pub fn set(&self, weather: Weather) {
        *self.shared.weather.lock().unwrap() = weather;
        self.shared.close_all();
        // Wakes the listener.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }

    /// Answers the next connections with 503 SlowDown, whatever the weather; no open connection is closed.
    pub fn slow_down_next(&self, connections: usize) {
        self.shared.slow_down_next.store(connections, Ordering::SeqCst);
    }

    /// How many requests came so far of each kind: `get`, `head`, `list`, `put`, `part`, `delete`.
    pub fn requests(&self) -> BTreeMap<&'static str, u64> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// Bytes that went to the server so far.
    pub fn bytes_up(&self) -> usize {
        self.shared.bytes_up.load(Ordering::SeqCst)
    }

    /// Bytes that came from it.
    pub fn bytes_down(&self) -> usize {
        self.shared.bytes_down.load(Ordering::SeqCst)
    }

    /// How many connections were harmed so far.
    pub fn struck(&self) -> usize {
        self.shared.struck.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        self.set(Weather::Fine);
    }
}

impl Shared {
    fn serve(self: Arc<Shared>, listener: TcpListener, port: u16) {
        let mut listener = Some(listener);
        while !self.is_over.load(Ordering::SeqCst) {
            if *self.weather.lock().unwrap() == Weather::Refuse {
                listener = None;
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            let Some(open) = &listener else {
                listener = TcpListener::bind(("127.0.0.1", port)).ok();
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            if let Ok((socket, _)) = open.accept() {
                let shared = self.clone();
                std::thread::spawn(move || shared.carry(socket));
            }
        }
    }

    fn close_all(&self) {
        for socket in self.open.lock().unwrap().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn carry(self: Arc<Shared>, mut client: TcpStream) {
        self.open.lock().unwrap().push(client.try_clone().unwrap());
        let is_next = self.slow_down_next.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        let weather = if is_next.is_ok() { Weather::SlowDown } else { *self.weather.lock().unwrap() };
        match weather {
            Weather::Refuse => {}
            Weather::SlowDown => {
                self.struck.fetch_add(1, Ordering::SeqCst);
                if let Some(head) = slow_down(&mut client) {
                    self.count(&head);
                }
            }
            Weather::Hang => {
                self.struck.fetch_add(1, Ordering::SeqCst);
                let mut buffer = [0; 64 << 10];
                while client.read(&mut buffer).is_ok_and(|length| length > 0) {}
            }
            Weather::Fine | Weather::Cut(_) | Weather::FlipUp(_) | Weather::FlipDown(_) => {
                let Ok(server) = TcpStream::connect(("127.0.0.1", self.target)) else { return };
                self.open.lock().unwrap().push(server.try_clone().unwrap());
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let shared = self.clone();
                let up = std::thread::spawn(move || shared.copy(from, to, weather, true));
                self.copy(server, client, weather, false);
                let _ = up.join();
            }
        }
    }

    fn count(&self, head: &str) {
        *self.requests.lock().unwrap().entry(kind_of(head)).or_default() += 1;
    }

    /// Copies one direction until it ends or the weather ends it.
    fn copy(&self, mut from: TcpStream, mut to: TcpStream, weather: Weather, is_up: bool) {
        let flip_each = match weather {
            Weather::FlipUp(each) if is_up => Some(each),
            Weather::FlipDown(each) if !is_up => Some(each),
            _ => None,
        };
        let mut buffer = vec![0; 64 << 10];
        let mut passed = 0usize;
        let mut heads = Heads::default();
        while let Ok(length) = from.read(&mut buffer) {
            let mut bytes = &mut buffer[..length];
            let mut is_last = length == 0;
            if let Some(each) = flip_each {
                for number in (passed + 1..=passed + length).filter(|number| number % each == 0) {
                    bytes[number - passed - 1] ^= 1;
                    self.struck.fetch_add(1, Ordering::SeqCst);
                }
            }
            if let Weather::Cut(at) = weather
                && passed + length >= at
                && length > 0
            {
                bytes = &mut buffer[..at.saturating_sub(passed)];
                is_last = true;
                self.struck.fetch_add(1, Ordering::SeqCst);
            }
            passed += bytes.len();
            let all = if is_up { &self.bytes_up } else { &self.bytes_down };
            all.fetch_add(bytes.len(), Ordering::SeqCst);
            if is_up {
                heads.feed(bytes).iter().for_each(|head| self.count(head));
            }
            if to.write_all(bytes).is_err() || is_last {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}

/// Finds the heads of requests in what goes to the server on one connection.
#[derive(Default)]
struct Heads {
    head: Vec<u8>,
    body_bytes: usize,
}

impl Heads {
    fn feed(&mut self, mut bytes: &[u8]) -> Vec<String> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let body = self.body_bytes.min(bytes.len());
            self.body_bytes -= body;
            bytes = &bytes[body..];
            let Some((byte, rest)) = bytes.split_first() else { break };
            self.head.push(*byte);
            bytes = rest;
            if self.head.ends_with(b"\r\n\r\n") {
                let head = String::from_utf8(std::mem::take(&mut self.head)).unwrap();
                let length = head
                    .lines()
                    .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
                self.body_bytes = length.unwrap_or(0);
                found.push(head);
            }
        }
        found
    }
}

/// What an object store would bill a request as.
fn kind_of(head: &str) -> &'static str {
    let mut words = head.split_ascii_whitespace();
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let query = target.split_once('?').map_or("", |(_, query)| query);
    match method {
        "GET" if query.contains("list-type=2") || query.starts_with("uploads") => "list",
        "GET" => "get",
        "HEAD" => "head",
        "DELETE" => "delete",
        "POST" if query.starts_with("delete") => "delete",
        "POST" | "PUT" if query.contains("upload") => "part",
        "PUT" => "put",
        other => panic!("'{other} {target}' is no request that keiki makes"),
    }
}

/// Answers the request of a connection, whatever it is, once its head has come, and returns that.
fn slow_down(client: &mut TcpStream) -> Option<String> {
    const BODY: &str = "<?xml version=\"1.0\"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.\
                        </Message></Error>";
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match client.read(&mut byte) {
            Ok(1) if head.len() < 64 << 10 => head.push(byte[0]),
            _ => return None,
        }
    }
    let answer = format!(
        "HTTP/1.1 503 Slow Down\r\ncontent-type: application/xml\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{BODY}",
        BODY.len()
    );
    let _ = client.write_all(answer.as_bytes());
    let _ = client.shutdown(Shutdown::Write);
    // What the client still sends must be read, or the answer is lost with a reset.
    let _ = client.set_read_timeout(Some(Duration::from_secs(2)));
    let mut rest = [0; 64 << 10];
    while client.read(&mut rest).is_ok_and(|length| length > 0) {}
    String::from_utf8(head).ok()
}
