//! Agents that talk to each other: a real server and a real client in this process, over TLS on loopback and over a
//! control socket, with certificates made for the test.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use keiki::base::clock::{Clock, ManualClock, SystemClock};
use keiki::error::{Error, Kind, Result};
use keiki::model::check::CheckItem;
use keiki::peer::access::{AllowRule, Caller, Permission, decide};
use keiki::peer::api::{ObjectFacts, PutWhen, Request, Response};
use keiki::peer::ca::Authority;
use keiki::peer::client::{Client, PeerObjects};
use keiki::peer::server::{LocalUsers, Server, ServerOptions, Service, bind_tcp, bind_unix};
use keiki::peer::tls::{Identity, TlsConfig, TlsIdentity};
use keiki::peer::wire::{PROTOCOL_HEADER, PROTOCOL_VERSION};
use keiki::store::memory::MemoryStore;
use keiki::store::{ByteStream, Key, PutCondition, Store, Tag};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::store_contract::Fixture;

/// Bodies that a test makes and does not keep.
const PATTERN_PIECE: usize = 256 << 10;

/// An agent as far as this floor knows one: rules, a repository, and some odd answers by name.
struct TestAgent {
    rules: Vec<AllowRule>,
    store: Arc<dyn Store>,
    callers: mpsc::UnboundedSender<Caller>,
    entered: Notify,
    may_leave: Notify,
    swallowed_bytes: AtomicUsize,
}

#[async_trait]
impl Service for TestAgent {
    async fn handle(
        &self,
        caller: Caller,
        request: Request,
        body: Option<ByteStream>,
    ) -> Result<(Response, Option<ByteStream>)> {
        decide(&caller, &request, &self.rules)?;
        // Not every test listens.
        let _ = self.callers.send(caller);
        let done = |response| Ok((response, None));
        match request {
            Request::Hello => {
                let now = Timestamp::UNIX_EPOCH;
                done(Response::Hello { host: "b".into(), version: "1".into(), now })
            }
            Request::Doctor => panic!("a defect for the test"),
            Request::ListJobs => {
                self.entered.notify_one();
                self.may_leave.notified().await;
                done(Response::Jobs(vec![]))
            }
            Request::Status => done(Response::Checks(
                (0..3000).map(|number| CheckItem::pass(format!("check {number}"), "x".repeat(100))).collect(),
            )),
            Request::GetObject { key, .. } if key.starts_with("pattern/") => {
                let size_bytes: u64 = key.trim_start_matches("pattern/").parse().unwrap();
                Ok((Response::Body { size_bytes }, Some(pattern(size_bytes as usize))))
            }
            Request::GetObject { key, .. } if key == "short" => {
                Ok((Response::Body { size_bytes: 1 << 20 }, Some(pattern(1 << 19))))
            }
            Request::PutObject { key, .. } if key == "refused" => {
                Err(Error::new(Kind::Forbidden, "not this one").hint("ask somebody"))
            }
            Request::PutObject { key, .. } if key == "swallow" => {
                let mut body = body.unwrap();
                while let Some(piece) = body.next().await {
                    self.swallowed_bytes.fetch_add(piece?.len(), Ordering::SeqCst);
                }
                done(Response::Stored { tag: "t".into() })
            }
            request => self.objects(request, body).await,
        }
    }
}

impl TestAgent {
    async fn objects(&self, request: Request, body: Option<ByteStream>) -> Result<(Response, Option<ByteStream>)> {
        let store = self.store.as_ref();
        let facts = |info: keiki::store::ObjectInfo| ObjectFacts {
            key: info.key.to_string(),
            size_bytes: info.size_bytes,
            tag: info.tag.0,
        };
        let response = match request {
            Request::GetObject { key, range } => {
                let key = Key::parse(&key)?;
                let (size_bytes, body) = keiki::store::read::get_sized(store, &key, range).await?;
                return Ok((Response::Body { size_bytes }, Some(body)));
            }
            Request::HeadObject { key } => Response::Object(store.head(&Key::parse(&key)?).await?.map(facts)),
            Request::ListObjects { prefix, after, limit } => {
                let found = store.list(&prefix, after.as_deref(), limit as usize).await?;
                Response::Objects(found.into_iter().map(facts).collect())
            }
            Request::PutObject { key, condition } => {
                let (key, body) = (Key::parse(&key)?, body.unwrap());
                let tag = match condition {
                    PutWhen::Create => store.put_stream(&key, body, PutCondition::Create).await?,
                    PutWhen::Replace => store.put_stream(&key, body, PutCondition::Replace).await?,
                    PutWhen::IfMatch(tag) => {
                        let bytes = keiki::store::read::collect_body(body, 1 << 20, &key).await?;
                        store.put(&key, bytes, PutCondition::IfMatch(Tag(tag))).await?
                    }
                };
                Response::Stored { tag: tag.0 }
            }
            Request::DeleteObjects { keys } => {
                let keys: Vec<Key> = keys.iter().map(|key| Key::parse(key)).collect::<Result<_>>()?;
                store.delete(&keys).await?;
                Response::Done
            }
            other => panic!("no test asks {other:?}"),
        };
        Ok((response, None))
    }
}

fn pattern(bytes: usize) -> ByteStream {
    Box::pin(stream::unfold((0, bytes), |(piece, left)| async move {
        if left == 0 {
            return None;
        }
        let length = left.min(PATTERN_PIECE);
        Some((Ok(Bytes::from(vec![piece as u8; length])), (piece + 1, left - length)))
    }))
}

/// A directory with an authority, a running server 'b', and what a test needs to look at.
struct Site {
    directory: tempfile::TempDir,
    agent: Arc<TestAgent>,
    callers: mpsc::UnboundedReceiver<Caller>,
    address: String,
    socket: PathBuf,
    identity: Arc<TlsIdentity>,
    stop: CancellationToken,
    servers: Vec<JoinHandle<bool>>,
}

impl Site {
    async fn new() -> Site {
        Site::with(ServerOptions::default(), Arc::new(SystemClock)).await
    }

    async fn with(options: ServerOptions, clock: Arc<dyn Clock>) -> Site {
        Site::with_store(options, clock, Arc::new(MemoryStore::new("test"))).await
    }

    async fn with_store(options: ServerOptions, clock: Arc<dyn Clock>, store: Arc<dyn Store>) -> Site {
        let directory = tempfile::tempdir().unwrap();
        Authority::init(&directory.path().join("ca"), Timestamp::now()).unwrap();
        let (sender, callers) = mpsc::unbounded_channel();
        let all = ["status", "job", "read-repository", "write-repository"].map(|n| Permission::from_name(n).unwrap());
        let rule = |who: &str| AllowRule { who: who.into(), may: all.into(), instances: vec!["*".into()] };
        let agent = Arc::new(TestAgent {
            rules: vec![rule("host:a"), rule("operator:ann")],
            store,
            callers: sender,
            entered: Notify::new(),
            may_leave: Notify::new(),
            swallowed_bytes: AtomicUsize::new(0),
        });
        let identity = TlsIdentity::load(issue(&directory, Identity::Host("b".into()))).unwrap();
        let (stop, socket) = (CancellationToken::new(), directory.path().join("run/keiki.sock"));
        let tcp = bind_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = tcp.local_addr().unwrap().to_string();
        let unix = bind_unix(&socket).await.unwrap();
        let server = Server::new(agent.clone(), clock, options);
        let servers = vec![
            tokio::spawn(server.clone().serve_tls(tcp, identity.clone(), stop.clone())),
            tokio::spawn(server.serve_unix(unix, LocalUsers::default(), stop.clone())),
        ];
        Site { directory, agent, callers, address, socket, identity, stop, servers }
    }

    fn identity(&self, identity: Identity) -> Arc<TlsIdentity> {
        TlsIdentity::load(issue(&self.directory, identity)).unwrap()
    }

    fn client_as(&self, identity: Identity) -> Client {
        Client::tls(&self.address, "b", self.identity(identity))
    }

    fn client(&self) -> Client {
        self.client_as(Identity::Host("a".into()))
    }

    fn objects(&self) -> PeerObjects {
        PeerObjects::new(Arc::new(self.client()), "b")
    }

    /// What a raw HTTP message over the control socket is answered with, until the server closes.
    async fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut socket = UnixStream::connect(&self.socket).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await.unwrap();
        answer
    }
}

/// The same store as another agent's clients see it. What serves it ends with the test's runtime.
pub async fn behind_another_agent(fixture: Fixture) -> Fixture {
    let site = Site::with_store(ServerOptions::default(), Arc::new(SystemClock), fixture.store).await;
    Fixture { store: Arc::new(site.objects()), directory: fixture.directory }
}

fn issue(directory: &tempfile::TempDir, identity: Identity) -> TlsConfig {
    let authority = Authority::open(&directory.path().join("ca")).unwrap();
    let issued = authority.issue(&identity, Timestamp::now(), 30).unwrap();
    TlsConfig { ca: issued.ca, certificate: issued.certificate, key: issued.key }
}

fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

fn text(error: &Error) -> String {
    format!("{}: {error} | {}", error.kind().name(), error.hint_text().unwrap_or("-"))
}

/// The frames of a request with the head that belongs to them.
/// The header by which the versions are compared.
fn version_line() -> String {
    format!("{PROTOCOL_HEADER}: {PROTOCOL_VERSION}\r\n")
}

fn http(head: &str, body: &[u8]) -> Vec<u8> {
    let mut message =
        format!("POST /v1/request HTTP/1.1\r\nhost: keiki\r\nconnection: close\r\n{head}\r\n").into_bytes();
    message.extend_from_slice(body);
    message
}

/// The readable part of an answer that holds an error.
fn readable(answer: &[u8]) -> String {
    String::from_utf8_lossy(answer).into_owned()
}

// === who calls ===

#[tokio::test]
async fn the_service_learns_who_calls_from_the_certificate_or_the_socket() {
    let mut site = Site::new().await;
    for identity in [Identity::Host("a".into()), Identity::Operator("ann".into())] {
        site.client_as(identity.clone()).ask(Request::Hello).await.unwrap();
        assert_eq!(site.callers.recv().await.unwrap().to_string(), identity.to_string());
    }
    Client::unix(&site.socket).ask(Request::Hello).await.unwrap();
    let uid = nix::unistd::geteuid().as_raw();
    match site.callers.recv().await.unwrap() {
        Caller::Local { uid: found, is_admin: true, .. } => assert_eq!(found, uid),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_operator_is_not_a_host_of_the_same_name() {
    let site = Site::new().await;
    site.client_as(Identity::Operator("ann".into())).ask(Request::Status).await.unwrap();
    for stranger in [Identity::Host("ann".into()), Identity::Operator("a".into())] {
        let error = site.client_as(stranger).ask(Request::Status).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Forbidden);
        assert!(error.hint_text().unwrap().contains("[[allow]]"), "{error:?}");
    }
}

#[tokio::test]
async fn what_is_for_the_host_itself_is_refused_over_the_network() {
    let site = Site::new().await;
    let forward = Request::Forward { host: "c".into(), request: Box::new(Request::Hello) };
    for request in [Request::InitRepository, forward] {
        assert_eq!(site.client().ask(request).await.unwrap_err().kind(), Kind::Forbidden);
    }
}

#[tokio::test]
async fn a_caller_of_another_authority_reads_why_it_is_refused() {
    let site = Site::new().await;
    let other = tempfile::tempdir().unwrap();
    Authority::init(&other.path().join("ca"), Timestamp::now()).unwrap();
    let files = issue(&other, Identity::Host("a".into()));
    let stranger = TlsIdentity::load(files.clone()).unwrap();
    let error = Client::tls(&site.address, "b", stranger).ask(Request::Hello).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Forbidden);
    let expected =
        format!("cannot reach the agent of host 'b' at '{}': its certificate is of another authority", site.address);
    assert_eq!(error.message(), expected);

    // It may trust the right authority and still have a certificate of its own.
    let both = [files.ca.clone(), site.directory.path().join("ca/ca.pem")].map(|path| std::fs::read(path).unwrap());
    let ca = other.path().join("both.pem");
    std::fs::write(&ca, both.concat()).unwrap();
    let stranger = TlsIdentity::load(TlsConfig { ca, ..files }).unwrap();
    let error = Client::tls(&site.address, "b", stranger).ask(Request::Hello).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Forbidden, "{error:?}");
    assert!(error.message().ends_with("it refused this host's certificate as one of another authority"), "{error}");
}

#[tokio::test]
async fn an_expired_caller_reads_that_its_certificate_has_expired() {
    let site = Site::new().await;
    let authority = Authority::open(&site.directory.path().join("ca")).unwrap();
    let now = Timestamp::now();
    let span = (now.as_second() - 9000, now.as_second() - 60);
    let issued = authority.issue_between(&Identity::Host("a".into()), now, span.0, span.1).unwrap();
    let files = TlsConfig { ca: issued.ca, certificate: issued.certificate, key: issued.key };
    let expired = TlsIdentity::load(files).unwrap();
    let error = Client::tls(&site.address, "b", expired).ask(Request::Hello).await.unwrap_err();
    assert!(error.message().ends_with("it refused this host's certificate as not valid now"), "{error}");
    assert!(error.hint_text().unwrap().contains("keiki ca issue"));
}

#[tokio::test]
async fn a_certificate_that_expires_during_a_connection_ends_it() {
    let clock = ManualClock::new(Timestamp::now());
    let site = Site::with(ServerOptions::default(), clock.clone()).await;
    let client = site.client();
    client.ask(Request::Hello).await.unwrap();
    clock.advance(Duration::from_secs(31 * 86400));
    let error = client.ask(Request::Hello).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Forbidden);
    assert!(error.message().starts_with("the certificate of 'host:a' expired on "), "{error}");
}

#[tokio::test]
async fn another_host_than_the_one_that_was_meant_is_refused() {
    let site = Site::new().await;
    let client = Client::tls(&site.address, "c", site.identity(Identity::Host("a".into())));
    let error = client.ask(Request::Hello).await.unwrap_err();
    assert!(error.message().ends_with("its certificate is for 'keiki://host/b', not for 'keiki://host/c'"), "{error}");
}

#[tokio::test]
async fn a_replaced_certificate_counts_for_the_next_request() {
    let site = Site::new().await;
    let client = site.client();
    client.ask(Request::Hello).await.unwrap();
    // The files of 'b' now say that this is host 'c'.
    let renamed = issue(&site.directory, Identity::Host("c".into()));
    std::fs::copy(&renamed.key, site.directory.path().join("ca/issued/b.key")).unwrap();
    std::fs::copy(&renamed.certificate, site.directory.path().join("ca/issued/b.pem")).unwrap();
    site.identity.reload().unwrap();
    // The answer on the kept connection is its last one; the new connection meets the new certificate.
    client.ask(Request::Hello).await.unwrap();
    let error = client.ask(Request::Hello).await.unwrap_err();
    assert!(error.message().contains("'keiki://host/c'"), "{error}");
}

// === who does not answer ===

#[tokio::test]
async fn an_agent_that_cannot_be_reached_is_named_with_a_hint() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("keiki.sock");
    let missing = Client::unix(&socket).ask(Request::Hello).await.unwrap_err();
    let shown = |error: &Error| text(error).replace(&directory.path().display().to_string(), "/run/keiki");
    insta::assert_snapshot!(shown(&missing), @"unreachable: cannot reach the agent on this host: there is no control socket '/run/keiki/keiki.sock' | is it running? 'systemctl status keiki' shows it, 'keiki agent' runs it in the foreground");
    drop(bind_unix(&socket).await.unwrap());
    let left_behind = Client::unix(&socket).ask(Request::Hello).await.unwrap_err();
    insta::assert_snapshot!(shown(&left_behind), @"unreachable: cannot reach the agent on this host: nobody listens at '/run/keiki/keiki.sock' | it has stopped: 'systemctl status keiki' says why, 'systemctl restart keiki' starts it again");

    let site = Site::new().await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap().to_string();
    drop(closed);
    let refused = Client::tls(&address, "b", site.identity.clone()).ask(Request::Hello).await.unwrap_err();
    insta::assert_snapshot!(text(&refused).replace(&address, "10.0.0.2:7420"), @"unreachable: cannot reach the agent of host 'b' at '10.0.0.2:7420': connection refused | is it running there? does its [listen] address fit the address of the [[peer]] here?");
}

#[tokio::test]
async fn something_else_at_the_address_is_not_taken_for_an_agent() {
    let site = Site::new().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut hello = [0; 4096];
            let _ = socket.read(&mut hello).await;
            let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
            let _ = socket.shutdown().await;
            while socket.read(&mut hello).await.is_ok_and(|bytes| bytes > 0) {}
        }
    });
    let error = Client::tls(&address, "b", site.identity.clone()).ask(Request::Hello).await.unwrap_err();
    insta::assert_snapshot!(text(&error).replace(&address, "10.0.0.2:7420"), @"forbidden: cannot reach the agent of host 'b' at '10.0.0.2:7420': what answers there does not speak TLS | is that the port of an agent of keiki?");
}

#[tokio::test]
async fn a_second_agent_does_not_take_the_socket_of_a_running_one() {
    let site = Site::new().await;
    assert_eq!(bind_unix(&site.socket).await.unwrap_err().kind(), Kind::Conflict);
    Client::unix(&site.socket).ask(Request::Hello).await.unwrap();
    let mode = std::fs::metadata(&site.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
}

#[tokio::test]
async fn a_file_in_the_place_of_the_socket_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keiki.sock");
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(bind_unix(&path).await.unwrap_err().kind(), Kind::Conflict);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

// === what is asked and answered ===

#[tokio::test]
async fn a_long_answer_arrives_whole_and_the_connection_is_used_again() {
    let site = Site::new().await;
    let client = site.client();
    for _ in 0..3 {
        match client.ask(Request::Status).await.unwrap() {
            Response::Checks(checks) => assert_eq!(checks.len(), 3000),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_defect_in_the_agent_is_an_answer_and_not_a_silence() {
    let site = Site::new().await;
    let client = site.client();
    let error = client.ask(Request::Doctor).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Internal);
    client.ask(Request::Hello).await.unwrap();
}

#[tokio::test]
async fn objects_travel_both_ways_with_their_conditions() {
    let site = Site::new().await;
    let objects = site.objects();
    assert_eq!(objects.describe(), "peer://b");
    let tag = objects.put(&key("a/1"), "one".into(), PutCondition::Create).await.unwrap();
    let again = objects.put(&key("a/1"), "two".into(), PutCondition::Create).await.unwrap_err();
    assert_eq!(again.kind(), Kind::Conflict);
    let tag = objects.put(&key("a/1"), "three".into(), PutCondition::IfMatch(tag)).await.unwrap();
    let info = objects.head(&key("a/1")).await.unwrap().unwrap();
    assert_eq!((info.size_bytes, info.tag), (5, tag));
    let bytes = keiki::store::read::read_all(&objects, &key("a/1"), 100).await.unwrap();
    assert_eq!(bytes, "three");
    let mut part = objects.get(&key("a/1"), Some(1..3)).await.unwrap();
    assert_eq!(part.next().await.unwrap().unwrap(), "hr");
    assert!(part.next().await.is_none());
    objects.put(&key("a/empty"), Bytes::new(), PutCondition::Replace).await.unwrap();
    let listed = objects.list("a/", Some("a/1"), 10).await.unwrap();
    assert_eq!(listed.iter().map(|info| info.key.as_str()).collect::<Vec<_>>(), ["a/empty"]);
    objects.delete(&[key("a/1"), key("a/empty"), key("a/none")]).await.unwrap();
    assert_eq!(objects.head(&key("a/1")).await.unwrap(), None);
    assert_eq!(objects.get(&key("a/1"), None).await.err().unwrap().kind(), Kind::NotFound);
}

#[tokio::test]
async fn a_stream_that_fails_is_not_stored_and_its_own_error_comes_back() {
    let site = Site::new().await;
    let objects = site.objects();
    let broken = pattern(3 << 20).chain(stream::once(async { Err(Error::new(Kind::Damaged, "the disk lies")) }));
    let error = objects.put_stream(&key("a/1"), Box::pin(broken), PutCondition::Create).await.unwrap_err();
    assert_eq!((error.kind(), error.message()), (Kind::Damaged, "the disk lies"));
    assert_eq!(objects.head(&key("a/1")).await.unwrap(), None);
    objects.put_stream(&key("a/1"), pattern(3 << 20), PutCondition::Create).await.unwrap();
    assert_eq!(objects.head(&key("a/1")).await.unwrap().unwrap().size_bytes, 3 << 20);
}

#[tokio::test]
async fn a_body_that_is_shorter_than_was_said_is_an_error_for_the_reader() {
    let site = Site::new().await;
    let mut body = site.objects().get(&key("short"), None).await.unwrap();
    let mut received = 0;
    let error = loop {
        match body.next().await {
            Some(Ok(piece)) => received += piece.len(),
            Some(Err(error)) => break error,
            None => panic!("{received} bytes were taken for the whole"),
        }
    };
    assert_eq!(error.kind(), Kind::Unreachable, "{error:?}");
}

#[tokio::test]
async fn a_refusal_arrives_while_the_body_is_still_being_sent() {
    let site = Site::new().await;
    let objects = site.objects();
    for _ in 0..5 {
        let error = objects.put_stream(&key("refused"), pattern(64 << 20), PutCondition::Create).await.unwrap_err();
        assert_eq!(text(&error), "forbidden: not this one | ask somebody");
    }
}

#[tokio::test]
async fn several_bodies_move_at_the_same_time() {
    let site = Site::new().await;
    let objects = site.objects();
    let mut bodies = Vec::new();
    for _ in 0..6 {
        // Begun, not read yet.
        bodies.push(objects.get(&key("pattern/4194304"), None).await.unwrap());
    }
    for body in bodies {
        let bytes: usize =
            body.map(|piece| piece.unwrap().len()).fold(0, |sum, bytes| async move { sum + bytes }).await;
        assert_eq!(bytes, 4 << 20);
    }
}

/// Goal: the memory of a transfer does not depend on its size. Method: both ends run here, so a body of which only the
/// beginning is read must not be pulled into memory: the sender is asked for few pieces.
#[tokio::test]
async fn sixty_four_mebibytes_move_in_bounded_memory() {
    let site = Site::new().await;
    let objects = site.objects();
    let made = Arc::new(AtomicUsize::new(0));
    let counted = |made: Arc<AtomicUsize>| -> ByteStream {
        Box::pin(pattern(64 << 20).inspect(move |_| {
            made.fetch_add(PATTERN_PIECE, Ordering::SeqCst);
        }))
    };
    let swallowed = site.agent.clone();
    let most_in_flight = Arc::new(AtomicUsize::new(0));
    let watched = {
        let (made, most) = (made.clone(), most_in_flight.clone());
        Box::pin(counted(made.clone()).inspect(move |_| {
            let in_flight = made.load(Ordering::SeqCst) - swallowed.swallowed_bytes.load(Ordering::SeqCst);
            most.fetch_max(in_flight, Ordering::SeqCst);
        }))
    };
    objects.put_stream(&key("swallow"), watched, PutCondition::Create).await.unwrap();
    assert_eq!(site.agent.swallowed_bytes.load(Ordering::SeqCst), 64 << 20);
    // Buffers of two sockets, TLS and HTTP on both sides.
    let most = most_in_flight.load(Ordering::SeqCst);
    assert!(most < 24 << 20, "{most} bytes were on their way at once");

    let mut body = objects.get(&key("pattern/67108864"), None).await.unwrap();
    let mut received = 0usize;
    let mut largest = 0;
    while let Some(piece) = body.next().await {
        let piece = piece.unwrap();
        largest = largest.max(piece.len());
        received += piece.len();
    }
    assert_eq!(received, 64 << 20);
    assert!(largest <= 1 << 20, "a piece of {largest} bytes");
}

// === what should not be asked ===

#[tokio::test]
async fn messages_that_are_not_requests_are_refused_with_a_reason() {
    let site = Site::new().await;
    let version = version_line();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"GET / HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n".into(), "an agent does not answer 'GET /'"),
        (http("content-length: 0\r\n", b""), "the caller none"),
        (http("keiki-protocol: 99\r\ncontent-length: 0\r\n", b""), "the caller 99"),
        (http(&format!("{version}content-length: 0\r\n"), b""), "the request ends in the middle"),
        (http(&format!("{version}content-length: 6\r\n"), &[0, 0, 0, 2, 0, 99]), "cannot understand the request"),
        (http(&format!("{version}content-length: 7\r\n"), &[0, 0, 0, 2, 0, 0, 0]), "there are bytes after the request"),
        (http(&format!("{version}content-length: 7\r\n"), &[0, 0, 0, 3, 0, 0, 0]), "cannot understand the request"),
        (
            http(&format!("{version}content-length: 4\r\n"), &[0x7f, 0xff, 0xff, 0xff]),
            "sent a frame of 2147483647 bytes",
        ),
        (http(&format!("{version}content-length: 4\r\n"), &[0, 0, 0, 0]), "sent a frame of 0 bytes"),
    ];
    for (message, reason) in cases {
        let answer = readable(&site.raw(&message).await);
        assert!(answer.starts_with("HTTP/1.1 400"), "{reason}: {answer}");
        assert!(answer.contains(reason), "{reason}: {answer}");
        assert!(answer.contains("connection: close"), "{answer}");
    }
    // The agent is as well as before.
    let answer = site.raw(&http(&format!("{version}content-length: 6\r\n"), &[0, 0, 0, 2, 0, 0])).await;
    assert!(readable(&answer).starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_head_that_is_too_long_is_refused() {
    let site = Site::new().await;
    let long = format!("x-long: {}\r\ncontent-length: 0\r\n", "x".repeat(100_000));
    let answer = readable(&site.raw(&http(&long, b"")).await);
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let many: String = (0..200).map(|number| format!("x-{number}: 1\r\n")).collect();
    let answer = readable(&site.raw(&http(&many, b"")).await);
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[tokio::test]
async fn a_message_without_end_is_refused_before_it_fills_the_memory() {
    let site = Site::new().await;
    let mut socket = UnixStream::connect(&site.socket).await.unwrap();
    let head = http(&format!("{}content-length: 1000000000\r\n", version_line()), b"");
    socket.write_all(&head).await.unwrap();
    let mut frame = (0x8001_0000u32).to_be_bytes().to_vec();
    frame.extend(vec![0; 0x1_0000]);
    let (mut read, mut write) = socket.into_split();
    let sending = tokio::spawn(async move {
        let mut sent = 0usize;
        while write.write_all(&frame).await.is_ok() {
            sent += frame.len();
        }
        sent
    });
    let mut answer = Vec::new();
    // Whether the end comes as an end or as a reset depends on what was still on its way.
    let _ = read.read_to_end(&mut answer).await;
    let ended = tokio::time::timeout(Duration::from_secs(20), sending).await;
    assert!(readable(&answer).contains("a message of more than 1048576 bytes"), "{}", readable(&answer));
    let sent = ended.expect("the server should close the connection").unwrap();
    assert!(sent < 500_000_000, "{sent} bytes were taken");
}

#[tokio::test]
async fn a_caller_that_dribbles_or_says_nothing_is_dropped() {
    let options = ServerOptions { idle: Duration::from_millis(300), ..ServerOptions::default() };
    let site = Site::with(options, Arc::new(SystemClock)).await;
    for start in [&b""[..], b"POST /v1/request HTTP/1.1\r\nhost:"] {
        let answer = tokio::time::timeout(Duration::from_secs(20), site.raw(start)).await;
        assert!(answer.is_ok(), "the connection stayed open after {start:?}");
    }
    // One that is kept after an answer, too.
    let hello = http(&format!("{}content-length: 6\r\n", version_line()), &[0, 0, 0, 2, 0, 0]);
    let kept = readable(&hello).replace("connection: close\r\n", "").into_bytes();
    let answer = tokio::time::timeout(Duration::from_secs(20), site.raw(&kept)).await;
    assert!(readable(&answer.expect("closed when idle")).starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_body_that_stalls_ends_the_request() {
    let options = ServerOptions { stall: Duration::from_millis(300), ..ServerOptions::default() };
    let site = Site::with(options, Arc::new(SystemClock)).await;
    let message = http(&format!("{}content-length: 100\r\n", version_line()), &[0, 0, 0, 2, 0]);
    let answer = tokio::time::timeout(Duration::from_secs(20), site.raw(&message)).await.expect("an end");
    assert!(readable(&answer).contains("sent nothing for"), "{}", readable(&answer));
}

#[tokio::test]
async fn one_connection_more_than_allowed_is_told_to_come_back() {
    let options = ServerOptions { connections_max: 2, ..ServerOptions::default() };
    let site = Site::with(options, Arc::new(SystemClock)).await;
    let (first, second) = (site.client(), site.client());
    let busy = [tokio::spawn(async move { first.ask(Request::ListJobs).await }), {
        site.agent.entered.notified().await;
        tokio::spawn(async move { second.ask(Request::ListJobs).await })
    }];
    site.agent.entered.notified().await;
    let error = site.client().ask(Request::Hello).await.unwrap_err();
    assert_eq!((error.kind(), error.is_temporary()), (Kind::Unreachable, true), "{error:?}");
    assert!(error.message().contains("serves 2 connections already"), "{error}");
    site.agent.may_leave.notify_one();
    site.agent.may_leave.notify_one();
    for request in busy {
        assert_eq!(request.await.unwrap().unwrap(), Response::Jobs(vec![]));
    }
}

#[tokio::test]
async fn callers_without_a_handshake_do_not_keep_others_out() {
    let site = Site::new().await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(&site.address).await.unwrap());
    }
    let answer = tokio::time::timeout(Duration::from_secs(5), site.client().ask(Request::Hello)).await;
    answer.expect("an answer in time").unwrap();
}

// === the end ===

#[tokio::test]
async fn a_request_that_runs_when_the_server_stops_is_answered() {
    let mut site = Site::new().await;
    let client = site.client();
    let asking = tokio::spawn(async move { client.ask(Request::ListJobs).await });
    site.agent.entered.notified().await;
    site.stop.cancel();
    site.agent.may_leave.notify_one();
    assert_eq!(asking.await.unwrap().unwrap(), Response::Jobs(vec![]));
    for server in site.servers.drain(..) {
        assert!(server.await.unwrap(), "all requests should have finished");
    }
    assert_eq!(site.client().ask(Request::Hello).await.unwrap_err().kind(), Kind::Unreachable);
}

#[tokio::test]
async fn a_request_that_does_not_end_is_ended_when_the_server_stops() {
    let options = ServerOptions { drain: Duration::from_millis(200), ..ServerOptions::default() };
    let mut site = Site::with(options, Arc::new(SystemClock)).await;
    let client = site.client();
    let asking = tokio::spawn(async move { client.ask(Request::ListJobs).await });
    site.agent.entered.notified().await;
    site.stop.cancel();
    assert!(!site.servers.remove(0).await.unwrap(), "somebody was still busy");
    let error = asking.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::Unreachable, "{error:?}");
}

#[tokio::test]
async fn a_kept_connection_that_the_server_has_closed_is_replaced_unnoticed() {
    let options = ServerOptions { idle: Duration::from_millis(100), ..ServerOptions::default() };
    let site = Site::with(options, Arc::new(SystemClock)).await;
    let client = site.client();
    // The server closes after 100 ms at a time that the client does not know: before, while and after it asks.
    for pause in [0, 90, 95, 100, 105, 110, 150, 98, 99, 101, 102] {
        client.ask(Request::Hello).await.unwrap();
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}
