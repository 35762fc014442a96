//! How long a bucket's server is waited for, how often and by how many at once it is asked, and what becomes of what
//! breaks in the middle.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use keiki::base::retry::RetryPolicy;
use keiki::error::{Error, Kind};
use keiki::model::capabilities::Capabilities;
use keiki::model::cost::RequestKind;
use keiki::store::read::{body_from_bytes, list_all, read_range};
use keiki::store::s3::{CredentialsSource, S3Options, S3Store, Timeouts};
use keiki::store::{ByteStream, Key, PutCondition, Store};
use tempfile::TempDir;

use super::store_contract::noise;
use super::support::hosts::wait_for;
use super::support::s3::{BUCKET, Weed, fresh_prefix, open, write_private};
use super::support::s3_proxy::{Proxy, Weather};
use super::support::two_hosts::{SOON, Ship, TwoHosts, Via};

fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

const STORED: &str = "HTTP/1.1 200 OK\r\netag: \"tag\"\r\ncontent-length: 0\r\n\r\n";

/// A server on loopback that leaves every connection to `serve`; returns its port.
fn server(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let serve = serve.clone();
            std::thread::spawn(move || serve(socket));
        }
    });
    port
}

/// Reads requests from a connection and lets `answer` write what it likes to each, which is given by its first line.
fn each_request(socket: &TcpStream, mut answer: impl FnMut(&str, &mut dyn Write) -> std::io::Result<()>) {
    let mut reader = BufReader::new(socket);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if !reader.read_line(&mut head).is_ok_and(|length| length > 0) {
                return;
            }
        }
        let length = |line: &str| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok();
        let mut body = vec![0; head.lines().find_map(length).unwrap_or(0)];
        let mut writer = socket;
        if reader.read_exact(&mut body).is_err() || answer(head.lines().next().unwrap(), &mut writer).is_err() {
            return;
        }
    }
}

/// Options for such a server, with keys in a directory: nothing is tried twice.
fn options(dir: &TempDir, endpoint: String) -> S3Options {
    let file = dir.path().join("keys");
    write_private(&file, "aws_access_key_id = AK\naws_secret_access_key = SK\n");
    S3Options {
        endpoint: Some(endpoint),
        path_style: true,
        credentials: CredentialsSource { file: Some(file), profile: None },
        retry: RetryPolicy { attempts_max: Some(1), ..RetryPolicy::brief() },
        part_bytes: 5 << 20,
        ..S3Options::new(BUCKET, "x")
    }
}

async fn put(store: &S3Store, name: &str) -> keiki::error::Result<keiki::store::Tag> {
    store.put(&key(name), Bytes::from_static(b"x"), PutCondition::Replace).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connecting_the_first_byte_and_a_part_each_have_a_limit() {
    let dir = TempDir::new().unwrap();
    let timeouts = Timeouts {
        connect: Duration::from_millis(300),
        silence: Duration::from_millis(700),
        request: Duration::from_millis(2500),
    };
    // Takes connections and says nothing: with TLS there is none, without it there is no answer.
    let silent = server(|mut socket| while socket.read(&mut [0; 4096]).is_ok_and(|length| length > 0) {});
    for (scheme, reason) in [("https", "no connection within 0.3 seconds"), ("http", "received within 0.7 seconds")] {
        let store = open(S3Options { timeouts, ..options(&dir, format!("{scheme}://127.0.0.1:{silent}")) }).await;
        let error = put(&store, "a").await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unreachable, "{error}");
        assert!(error.message().contains("cannot store 'a'") && error.message().contains(reason), "{error}");
    }

    // Something moves all the time, and a part is never over.
    let aborted = Arc::new(Mutex::new(Vec::new()));
    let seen = aborted.clone();
    let endless = server(move |socket| {
        each_request(&socket, |line, answer| {
            if line.starts_with("POST") {
                let body = "<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>";
                return write!(answer, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            }
            if line.starts_with("DELETE") {
                seen.lock().unwrap().push(line.to_string());
                return write!(answer, "HTTP/1.1 204 x\r\n\r\n");
            }
            write!(answer, "HTTP/1.1 200 OK\r\n")?;
            for number in 0..200 {
                write!(answer, "x-{number}: 1\r\n")?;
                std::thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        });
    });
    let store = open(S3Options { timeouts, ..options(&dir, format!("http://127.0.0.1:{endless}")) }).await;
    let body = body_from_bytes(noise(6 << 20, 1));
    let error = store.put_stream(&key("in/parts"), body, PutCondition::Replace).await.unwrap_err();
    assert!(error.message().contains("no answer within 2.5 seconds"), "{error}");
    // What was begun is not left there.
    wait_for("the upload to be aborted", SOON, || !aborted.lock().unwrap().is_empty());
    assert!(aborted.lock().unwrap()[0].contains("/x/in/parts?") && aborted.lock().unwrap()[0].contains("uploadId=u1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_names_a_time_is_left_alone_by_everybody_until_then() {
    let dir = TempDir::new().unwrap();
    for (status, code) in [("429 Too Many Requests", "TooManyRequests"), ("503 Slow Down", "SlowDown")] {
        let came = Arc::new(Mutex::new(Vec::new()));
        let seen = came.clone();
        let port = server(move |socket| {
            each_request(&socket, |_, answer| {
                seen.lock().unwrap().push(Instant::now());
                if seen.lock().unwrap().len() > 1 {
                    return write!(answer, "{STORED}");
                }
                let body = format!("<Error><Code>{code}</Code><Message>Later.</Message></Error>");
                let length = body.len();
                write!(answer, "HTTP/1.1 {status}\r\nretry-after: 2\r\ncontent-length: {length}\r\n\r\n{body}")
            });
        });
        let store = open(options(&dir, format!("http://127.0.0.1:{port}"))).await;
        let error = put(&store, "first").await.unwrap_err();
        assert!(error.is_temporary() && error.message().contains(code), "{error}");
        for outcome in join_all(["a", "b", "c"].map(|name| put(&store, name))).await {
            outcome.unwrap();
        }
        let came = came.lock().unwrap();
        assert_eq!(came.len(), 4);
        assert!(came[1..].iter().all(|later| *later - came[0] >= Duration::from_secs(2)), "{came:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_requests_are_under_way_than_there_may_be_connections() {
    let dir = TempDir::new().unwrap();
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (running, highest) = (now.clone(), most.clone());
    let port = server(move |socket| {
        each_request(&socket, |_, answer| {
            highest.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(100));
            running.fetch_sub(1, Ordering::SeqCst);
            write!(answer, "{STORED}")
        });
    });
    let store = open(S3Options { connections: 3, ..options(&dir, format!("http://127.0.0.1:{port}")) }).await;
    let names: Vec<String> = (0..15).map(|number| format!("a/{number}")).collect();
    for outcome in join_all(names.iter().map(|name| put(&store, name))).await {
        outcome.unwrap();
    }
    assert_eq!((now.load(Ordering::SeqCst), most.load(Ordering::SeqCst)), (0, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_that_are_read_at_once_go_on_where_they_broke_and_of_the_same_version() {
    const RANGES: u64 = 8;
    const RANGE_BYTES: u64 = 512 << 10;
    let (weed, prefix) = (Weed::shared(), fresh_prefix());
    let proxy = Proxy::start(weed.port());
    let directly = open(weed.options(&prefix)).await;
    let store = open(S3Options { endpoint: Some(proxy.endpoint()), ..weed.options(&prefix) }).await;
    let (name, body) = (key("large"), noise((RANGES * RANGE_BYTES) as usize, 2));
    directly.put(&name, body.clone(), PutCondition::Create).await.unwrap();

    proxy.set(Weather::Cut(200_000));
    let reads = (0..RANGES).map(|number| {
        let (store, name) = (store.clone(), &name);
        async move {
            let range = number * RANGE_BYTES..(number + 1) * RANGE_BYTES;
            read_range(&*store, name, range).await.unwrap()
        }
    });
    let read = join_all(reads).await.concat();
    assert!(read == body, "the bytes are not those that were stored");
    // Each range needs three connections.
    assert!(proxy.struck() >= 2 * RANGES as usize, "{}", proxy.struck());

    let mut half: ByteStream = store.get(&name, None).await.unwrap();
    half.next().await.unwrap().unwrap();
    directly.put(&name, noise(body.len(), 3), PutCondition::Replace).await.unwrap();
    let mut rest = half.collect::<Vec<_>>().await;
    let error = rest.pop().unwrap().unwrap_err();
    assert!(rest.iter().all(Result::is_ok));
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
    assert!(error.message().contains("'large'") && error.message().contains("replaced while it was read"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_whose_source_fails_is_aborted_and_costs_nothing_later() {
    let prefix = fresh_prefix();
    let store = open(S3Options { part_bytes: 5 << 20, ..Weed::shared().options(&prefix) }).await;
    let name = key("half");
    let fails = stream::iter([Err(Error::new(Kind::Damaged, "the source is damaged"))]);
    let body = Box::pin(body_from_bytes(noise(12 << 20, 4)).chain(fails));
    let error = store.put_stream(&name, body, PutCondition::Create).await.unwrap_err();
    assert!(error.message().contains("the source is damaged"), "{error}");
    wait_for("the upload to be aborted", SOON, || {
        store.meter().unwrap().read().total.requests(RequestKind::Delete) > 0
    });
    assert_eq!(store.abort_uploads_older_than(Duration::ZERO).await.unwrap(), 0);
    assert_eq!(store.head(&name).await.unwrap(), None);
}

/// Goal: an instance with nothing to do costs next to nothing: its lease is renewed once a minute and nothing is listed.
/// Whoever asks for its status has one object read, because the status says whether the repository answers now.
#[test]
fn a_quiet_instance_makes_next_to_no_requests_and_lists_nothing() {
    let proxy = Proxy::start(Weed::shared().port());
    let lines = Weed::shared().repository_lines_at(&proxy.endpoint(), &fresh_prefix());
    let stage = TwoHosts::start_on(Ship::ArchiveCommand, Via::Peer, &lines);
    stage.source.sql("CREATE TABLE t AS SELECT 1 AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.source.sql("CHECKPOINT");
    stage.wait_until_shipped();
    let more = |before: &BTreeMap<&str, u64>, kinds: &[&str]| -> u64 {
        let now = proxy.requests();
        kinds.iter().map(|kind| now.get(kind).unwrap_or(&0) - before.get(kind).unwrap_or(&0)).sum()
    };
    let all = RequestKind::ALL.map(RequestKind::name);
    let (mut before, mut since) = (proxy.requests(), Instant::now());
    wait_for("ten seconds with no listing and one renewal at most", SOON, || {
        // What the backup began may still have to end.
        if more(&before, &["list"]) > 0 || more(&before, &all) > 2 {
            (before, since) = (proxy.requests(), Instant::now());
        }
        since.elapsed() >= Duration::from_secs(10)
    });
    let before = proxy.requests();
    for _ in 0..4 {
        stage.a.keiki_ok(&["status"]);
    }
    // The newest backup is looked for once a minute.
    assert!(more(&before, &["list"]) <= 1 && more(&before, &all) <= 8, "{before:?} {:?}", proxy.requests());
}

/// A page of a listing as a server sends it: which objects, and what it says of the next page.
fn page(names: &[&str], more: &str) -> String {
    let objects: String = names
        .iter()
        .map(|name| format!("<Contents><Key>x/{name}</Key><Size>1</Size><ETag>\"t\"</ETag></Contents>"))
        .collect();
    format!("<ListBucketResult>{objects}{more}</ListBucketResult>")
}

fn more(token: &str) -> String {
    format!("<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>")
}

/// A store on a server that answers listings with `answer`, which is given the request's first line; and how often it did.
async fn lister(dir: &TempDir, answer: fn(&str) -> String) -> (Arc<S3Store>, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let port = server(move |socket| {
        each_request(&socket, |line, writer| {
            count.fetch_add(1, Ordering::SeqCst);
            let body = answer(line);
            write!(writer, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        });
    });
    (open(options(dir, format!("http://127.0.0.1:{port}"))).await, asked)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_of_a_listing_is_full_or_the_last_one_whatever_pages_the_server_sends() {
    let dir = TempDir::new().unwrap();
    let (store, asked) = lister(&dir, |line| match line {
        line if line.contains("continuation-token=one") => page(&[".not-a-key"], &more("two")),
        line if line.contains("continuation-token=two") => page(&["c"], "<IsTruncated>false</IsTruncated>"),
        _ => page(&["a", "b"], &more("one")),
    })
    .await;
    store.adopt(&Capabilities { ordered_listing: true, ..Capabilities::default() });
    let names = |found: Vec<keiki::store::ObjectInfo>| -> Vec<String> {
        found.into_iter().map(|object| object.key.to_string()).collect()
    };
    assert_eq!(names(store.list("", None, 2).await.unwrap()), ["a", "b"]);
    assert_eq!(asked.swap(0, Ordering::SeqCst), 1);
    assert_eq!(names(store.list("", None, 1000).await.unwrap()), ["a", "b", "c"]);
    assert_eq!(asked.swap(0, Ordering::SeqCst), 3);
    let pages: Vec<_> = list_all(store.as_ref(), "", None).collect().await;
    assert_eq!(pages.into_iter().map(|page| names(page.unwrap())).collect::<Vec<_>>(), [["a", "b", "c"]]);
    assert_eq!(asked.load(Ordering::SeqCst), 3, "the end was asked for again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_that_goes_on_and_does_not_say_how_is_an_error_and_not_its_end() {
    let dir = TempDir::new().unwrap();
    let never: fn(&str) -> String = |_| page(&["a"], "<IsTruncated>true</IsTruncated>");
    let again: fn(&str) -> String = |_| page(&[], &more("x"));
    for (answer, reason) in [(never, "goes on, and not how"), (again, "again and again")] {
        for ordered_listing in [true, false] {
            let (store, asked) = lister(&dir, answer).await;
            let known = Capabilities { ordered_listing, ..Capabilities::default() };
            store.adopt(&known);
            let error = store.list("", None, 1000).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported, "{error}");
            let message = error.message();
            assert!(message.contains(&format!("s3://{BUCKET}/x")) && message.contains(reason), "{error}");
            assert!(asked.load(Ordering::SeqCst) <= 2);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_that_dead_writers_left_go_also_behind_the_first_page_of_them() {
    let dir = TempDir::new().unwrap();
    let aborted = Arc::new(Mutex::new(Vec::new()));
    let seen = aborted.clone();
    let port = server(move |socket| {
        each_request(&socket, |line, answer| {
            if line.starts_with("DELETE") {
                seen.lock().unwrap().push(line.split(['?', ' ']).nth(1).unwrap().to_string());
                return write!(answer, "HTTP/1.1 204 x\r\n\r\n");
            }
            let upload = |name: &str| {
                format!(
                    "<Upload><Key>x/{name}</Key><UploadId>u</UploadId>\
                     <Initiated>2026-01-01T00:00:00.000Z</Initiated></Upload>"
                )
            };
            // The server names the key of the repository's prefix, as it does in each answer.
            let body = if line.contains("key-marker=x%2Fa") && line.contains("upload-id-marker=u") {
                format!("<ListMultipartUploadsResult>{}</ListMultipartUploadsResult>", upload("b"))
            } else {
                format!(
                    "<ListMultipartUploadsResult><IsTruncated>true</IsTruncated><NextKeyMarker>x/a</NextKeyMarker>\
                     <NextUploadIdMarker>u</NextUploadIdMarker>{}</ListMultipartUploadsResult>",
                    upload("a")
                )
            };
            write!(answer, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        });
    });
    let store = open(options(&dir, format!("http://127.0.0.1:{port}"))).await;
    assert_eq!(store.abort_stale_uploads().await.unwrap(), 2);
    assert_eq!(*aborted.lock().unwrap(), [format!("/{BUCKET}/x/a"), format!("/{BUCKET}/x/b")]);
}
