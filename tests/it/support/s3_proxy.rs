//! A network that fails on order: a proxy between an agent and an S3 server, on loopback.

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
        let weather = *self.weather.lock().unwrap();
        match weather {
            Weather::Refuse => {}
            Weather::SlowDown => {
                self.struck.fetch_add(1, Ordering::SeqCst);
                slow_down(&mut client);
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

    /// Copies one direction until it ends or the weather ends it.
    fn copy(&self, mut from: TcpStream, mut to: TcpStream, weather: Weather, is_up: bool) {
        let flip_each = match weather {
            Weather::FlipUp(each) if is_up => Some(each),
            Weather::FlipDown(each) if !is_up => Some(each),
            _ => None,
        };
        let mut buffer = vec![0; 64 << 10];
        let mut passed = 0usize;
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
            if to.write_all(bytes).is_err() || is_last {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}

/// Answers every request of a connection, whatever it is, once its head has come.
fn slow_down(client: &mut TcpStream) {
    const BODY: &str = "<?xml version=\"1.0\"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.\
                        </Message></Error>";
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match client.read(&mut byte) {
            Ok(1) if head.len() < 64 << 10 => head.push(byte[0]),
            _ => return,
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
}
