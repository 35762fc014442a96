//! Messages that are cut short, too long or nonsense, to a running agent and from one: no message of a stranger changes
//! anything, or takes an agent or the command line away from those who mean well.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use keiki::peer::tls::{TlsConfig, TlsIdentity};
use keiki::peer::wire::{MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::super::support::hosts::{Host, HostOptions, Lab, free_port};
use super::super::support::postgres::Version;
use super::{Mask, Said, assert_unchanged, standing};

fn start(lab: &Lab, name: &str, listen_port: u16, peers: Vec<(&str, u16)>) -> Host {
    fs::create_dir_all(lab.path("repository")).unwrap();
    let options = HostOptions {
        name,
        repository: format!("file://{}", lab.path("repository").display()),
        peers,
        sections: String::new(),
        listen_port,
        clone_bin_dir: &Version::V15.bin_dir(),
    };
    Host::start(lab, &options)
}

/// The certificate of a host.
fn identity(lab: &Lab, host: &str) -> Arc<TlsIdentity> {
    let file = |name: &str| lab.path("ca").join(name);
    let (certificate, key) = (file(&format!("issued/{host}.pem")), file(&format!("issued/{host}.key")));
    TlsIdentity::load(TlsConfig { ca: file("ca.pem"), certificate, key }).unwrap()
}

/// A request as it travels: HTTP with frames in it.
fn request(content_length: usize, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST /v1/request HTTP/1.1\r\nhost: keiki\r\nconnection: close\r\nkeiki-protocol: {PROTOCOL_VERSION}\r\n\
         content-length: {content_length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// What nobody who means well sends, and what the answer says, if there is one to be heard.
fn bad_requests() -> Vec<(&'static str, Vec<u8>, Option<&'static str>)> {
    let endless = [&(0x8000_0000u32 | 0x1_0000).to_be_bytes()[..], &[0; 0x1_0000]].concat().repeat(20);
    assert!(endless.len() > MESSAGE_BYTES_MAX);
    vec![
        ("nothing", Vec::new(), None),
        ("half a head", b"POST /v1/request HTTP/1.1\r\nhost: k".to_vec(), None),
        ("no body", request(0, b""), Some("the request ends in the middle")),
        ("half a body", request(100, &[0, 0, 0, 90, 1, 2, 3]), None),
        ("an unknown request", request(6, &[0, 0, 0, 2, 0, 99]), Some("cannot understand the request")),
        ("a frame that is too long", request(4, &[0x7f, 0xff, 0xff, 0xff]), Some("sent a frame of 2147483647 bytes")),
        ("a message that is too long", request(endless.len(), &endless), Some("a message of more than 1048576 bytes")),
        (
            "another protocol",
            b"GET / HTTP/1.1\r\nhost: k\r\nconnection: close\r\n\r\n".to_vec(),
            Some("does not answer"),
        ),
        ("no protocol at all", vec![0xff; 4096], None),
    ]
}

#[test]
fn bad_messages_to_an_agent_are_refused_and_leave_it_as_well_as_before() {
    let lab = Lab::new();
    let port = free_port();
    let host = start(&lab, "a", port, Vec::new());
    lab.keiki_without_agent(&["ca", "issue", lab.path("ca").to_str().unwrap(), "--host", "b"]);
    let repository = lab.path("repository");
    let before = standing(&lab, &[&host], &repository);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for (title, message, expected) in bad_requests() {
        let answers = [
            ask_socket(&host.dir.join("keiki.sock"), &message, expected.is_none()),
            runtime.block_on(ask_network(&lab, port, &message, expected.is_none())),
        ];
        for (way, answer) in ["socket", "network"].into_iter().zip(answers) {
            assert!(!answer.starts_with("HTTP/1.1 200"), "{title} over the {way}: {answer}");
            if let Some(expected) = expected {
                assert!(answer.contains(expected), "{title} over the {way}: '{answer}'");
            }
        }
    }
    assert_eq!(host.json(&["job", "list"]), serde_json::json!([]), "the agent is not as well as before");
    assert_unchanged(&before, &lab, &[&host], &repository, "bad messages");
}

/// Sends everything, says that this was all if it is `cut`, and reads until the other side closes.
fn ask_socket(path: &Path, message: &[u8], cut: bool) -> String {
    let mut socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // The agent may hang up before it has heard all.
    let _ = socket.write_all(message);
    if cut {
        let _ = socket.shutdown(std::net::Shutdown::Write);
    }
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

async fn ask_network(lab: &Lab, port: u16, message: &[u8], cut: bool) -> String {
    let socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let mut stream = identity(lab, "b").connect(socket, "a").await.unwrap();
    let _ = stream.write_all(message).await;
    let _ = stream.flush().await;
    if cut {
        let _ = stream.shutdown().await;
    }
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// The head of an answer with this much body.
fn http_answer(content_length: usize, body: &[u8]) -> Vec<u8> {
    let head =
        format!("HTTP/1.1 200 OK\r\nkeiki-protocol: {PROTOCOL_VERSION}\r\ncontent-length: {content_length}\r\n\r\n");
    [head.as_bytes(), body].concat()
}

#[test]
fn bad_answers_of_another_agent_are_an_error_that_names_it() {
    let lab = Lab::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let host = start(&lab, "a", free_port(), vec![("b", listener.local_addr().unwrap().port())]);
    lab.keiki_without_agent(&["ca", "issue", lab.path("ca").to_str().unwrap(), "--host", "b"]);
    let repository = lab.path("repository");
    let before = standing(&lab, &[&host], &repository);
    let endless = [&(0x8000_0000u32 | 0x1_0000).to_be_bytes()[..], &[0; 0x1_0000]].concat().repeat(20);
    let cases: [(&str, Vec<u8>); 8] = [
        ("nothing", Vec::new()),
        ("half a head", b"HTTP/1.1 200 O".to_vec()),
        ("an empty answer", http_answer(0, b"")),
        ("half an answer", http_answer(100, &[0, 0, 0, 90, 0, 1, 2])),
        ("an unknown answer", http_answer(6, &[0, 0, 0, 2, 0, 99])),
        ("a frame that is too long", http_answer(4, &[0x7f, 0xff, 0xff, 0xff])),
        ("a message that is too long", http_answer(endless.len(), &endless)),
        ("a page of a web server", b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nnope".to_vec()),
    ];
    let mut said = Said::new(Mask::default().known(lab.path("").display(), "LAB/"));
    let answer = Arc::new(Mutex::new(Vec::new()));
    runtime.spawn(always_answer(listener, identity(&lab, "b"), answer.clone()));
    for (title, bytes) in cases {
        *answer.lock().unwrap() = bytes;
        said.text.push_str(&format!("# {title}\n"));
        said.refuses(&host, &["clone", "orders", "--to", "b", "--as", "copy"], "host 'b'");
    }
    assert_eq!(host.json(&["job", "list"]), serde_json::json!([]), "the agent is not as well as before");
    assert_unchanged(&before, &lab, &[&host], &repository, "bad answers");
    insta::assert_snapshot!(said.finish());
}

/// Reads a little of each request, answers what it is told to, and hangs up.
async fn always_answer(listener: TcpListener, identity: Arc<TlsIdentity>, answer: Arc<Mutex<Vec<u8>>>) {
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        let Ok(accepted) = identity.accept(socket).await else { continue };
        let mut stream = accepted.stream;
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).await;
        let bytes = answer.lock().unwrap().clone();
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
    }
}
