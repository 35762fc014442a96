//! A server that writes down every request and answers as an S3 server would that believes everybody: to see what keiki
//! really sends. It also answers as what gives credentials to machines and containers.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    pub target: String,
    /// By names in lower case.
    pub headers: BTreeMap<String, String>,
}

impl Seen {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    fn query(&self) -> &str {
        self.target.split_once('?').map_or("", |(_, query)| query)
    }

    fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }
}

/// See the module. It runs until this process ends.
pub struct Recorder {
    port: u16,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    seen: Vec<Seen>,
    objects: BTreeMap<String, Vec<u8>>,
    /// What is answered to who lists uploads that are not finished.
    uploads: String,
}

/// The keys that a machine gets, those of a container, and the secrets of both, which nobody may print.
pub const ROLE_KEY: &str = "AKROLE";
pub const CONTAINER_KEY: &str = "AKCONTAINER";
pub const SECRETS: [&str; 2] = ["SK-of-the-role", "token-of-the-role"];

impl Recorder {
    pub fn start() -> Recorder {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state: Arc<Mutex<State>> = Arc::default();
        let shared = state.clone();
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || {
                    let _ = serve(&socket, &state);
                });
            }
        });
        Recorder { port, state }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.state.lock().unwrap().seen.clone()
    }

    /// An object that is there already; the path begins with the bucket.
    pub fn put(&self, path: &str, bytes: &[u8]) {
        self.state.lock().unwrap().objects.insert(path.to_string(), bytes.to_vec());
    }

    /// Uploads that somebody began long ago, by key and id.
    pub fn begin_uploads(&self, uploads: &[(&str, &str)]) {
        let upload = |(key, id): &(&str, &str)| {
            format!(
                "<Upload><Key>{key}</Key><UploadId>{id}</UploadId><Initiated>2020-01-01T00:00:00.000Z</Initiated></Upload>"
            )
        };
        let all: String = uploads.iter().map(upload).collect();
        self.state.lock().unwrap().uploads = format!("<ListMultipartUploadsResult>{all}</ListMultipartUploadsResult>");
    }
}

fn serve(socket: &TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(socket);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_ascii_whitespace();
        let (method, target) = (words.next().unwrap().to_string(), words.next().unwrap().to_string());
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
        }
        let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let seen = Seen { method, target, headers };
        let (status, extra, body) = {
            let mut state = state.lock().unwrap();
            state.seen.push(seen.clone());
            answer(&mut state, &seen, body)
        };
        let mut socket = socket;
        let head = format!("HTTP/1.1 {status} x\r\n{extra}content-length: {}\r\n\r\n", body.len());
        socket.write_all(head.as_bytes())?;
        if seen.method != "HEAD" {
            socket.write_all(&body)?;
        }
    }
}

fn credentials(key: &str) -> Vec<u8> {
    format!(
        "{{\"Code\":\"Success\",\"LastUpdated\":\"2026-01-01T00:00:00Z\",\"Type\":\"AWS-HMAC\",\"AccessKeyId\":\"{key}\",\
         \"SecretAccessKey\":\"{}\",\"Token\":\"{}\",\"Expiration\":\"2099-01-01T00:00:00Z\"}}",
        SECRETS[0], SECRETS[1]
    )
    .into()
}

/// Status, further headers, body.
fn answer(state: &mut State, seen: &Seen, body: Vec<u8>) -> (u16, &'static str, Vec<u8>) {
    const TAG: &str = "etag: \"tag\"\r\n";
    let missing = || (404, "", b"<Error><Code>NoSuchKey</Code><Message>None.</Message></Error>".to_vec());
    let (path, query) = (seen.path(), seen.query());
    match (seen.method.as_str(), path) {
        ("PUT", "/latest/api/token") => {
            return (200, "x-aws-ec2-metadata-token-ttl-seconds: 21600\r\n", b"token-of-imds".to_vec());
        }
        ("GET", "/latest/meta-data/iam/security-credentials/") => return (200, "", b"keiki-role".to_vec()),
        ("GET", "/latest/meta-data/iam/security-credentials/keiki-role") => return (200, "", credentials(ROLE_KEY)),
        ("GET", "/container-credentials") => return (200, "", credentials(CONTAINER_KEY)),
        (_, path) if path.starts_with("/latest/") => return missing(),
        _ => {}
    }
    match seen.method.as_str() {
        "GET" if query.starts_with("uploads") => (200, "", state.uploads.clone().into()),
        "GET" if query.contains("list-type") => (200, "", b"<ListBucketResult></ListBucketResult>".to_vec()),
        "GET" | "HEAD" => state.objects.get(path).map_or_else(missing, |bytes| (200, TAG, bytes.clone())),
        "PUT" => {
            if !query.contains("uploadId") {
                state.objects.insert(path.to_string(), body);
            }
            (200, TAG, Vec::new())
        }
        "POST" if query.starts_with("uploads") => {
            let body = "<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>";
            (200, "", body.into())
        }
        "POST" => {
            let body = "<CompleteMultipartUploadResult><ETag>\"tag\"</ETag></CompleteMultipartUploadResult>";
            (200, "", body.into())
        }
        _ => (204, "", Vec::new()),
    }
}
