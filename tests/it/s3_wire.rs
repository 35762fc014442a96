//! What really goes to an S3 server: options as headers, addresses, whose keys sign, how many requests and how fast.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use keiki::base::clock::SystemClock;
use keiki::model::capabilities::Capabilities;
use keiki::model::cost::RequestKind;
use keiki::store::read::{body_from_bytes, read_all};
use keiki::store::s3::{CredentialsSource, Encryption, PutOptions, S3Options, S3Store};
use keiki::store::{Key, PutCondition, Store};

use super::support::hosts::{Host, HostOptions, Lab, free_port, instance_section, tail, wait_for};
use super::support::postgres::{TestServer, Version};
use super::support::s3::{BUCKET, Weed, fresh_prefix, open, write_private};
use super::support::s3_proxy::Proxy;
use super::support::s3_recorder::{CONTAINER_KEY, ROLE_KEY, Recorder, SECRETS, Seen};
use super::support::two_hosts::{SOON, wait_until_shipped, wait_until_state};

fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

/// A directory with a file of keys, and options for a recorder.
fn options(recorder: &Recorder, dir: &tempfile::TempDir) -> S3Options {
    let file = dir.path().join("keys");
    write_private(&file, "aws_access_key_id = AKFILE\naws_secret_access_key = SK-of-the-file\n");
    S3Options {
        endpoint: Some(recorder.endpoint()),
        path_style: true,
        part_bytes: 5 << 20,
        credentials: CredentialsSource { file: Some(file), profile: None },
        ..S3Options::new(BUCKET, "some/prefix")
    }
}

/// Puts a small object, one of some size, and one in parts; returns the requests that say how each is to be kept.
async fn put_three(options: S3Options, recorder: &Recorder) -> [Seen; 3] {
    let before = recorder.seen().len();
    let store = open(options).await;
    store.put(&key("small"), Bytes::from_static(b"x"), PutCondition::Replace).await.unwrap();
    store.put(&key("middle"), Bytes::from(vec![1; 200 << 10]), PutCondition::Replace).await.unwrap();
    let parts = body_from_bytes(Bytes::from(vec![2; 6 << 20]));
    store.put_stream(&key("in-parts"), parts, PutCondition::Replace).await.unwrap();
    let seen = recorder.seen().split_off(before);
    ["small", "middle", "in-parts"].map(|name| {
        let is_first = |one: &&Seen| one.target.split('?').next().unwrap().ends_with(name);
        seen.iter().find(is_first).unwrap_or_else(|| panic!("no request for '{name}'")).clone()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_objects_are_kept_is_said_with_each_of_them_and_not_unless_it_is_configured() {
    let (recorder, dir) = (Recorder::start(), tempfile::tempdir().unwrap());
    let plain = put_three(options(&recorder, &dir), &recorder).await;
    for seen in &plain {
        for name in ["server-side-encryption", "storage-class", "tagging"] {
            assert_eq!(seen.header(&format!("x-amz-{name}")), "", "{seen:?}");
        }
        // The bucket is part of the path, the body is of known length and no trailer follows it.
        assert!(seen.target.starts_with("/keiki/some/prefix/"), "{seen:?}");
        assert_eq!(seen.header("host"), format!("127.0.0.1:{}", recorder.port()));
        assert!(seen.header("transfer-encoding").is_empty() && seen.header("x-amz-trailer").is_empty(), "{seen:?}");
    }

    let put = PutOptions {
        encryption: Encryption::Managed,
        storage_class: Some("STANDARD_IA".into()),
        tags: vec![("team".into(), "databases".into()), ("cost".into(), "7".into())],
    };
    let [small, middle, in_parts] = put_three(S3Options { put, ..options(&recorder, &dir) }, &recorder).await;
    for seen in [&small, &middle, &in_parts] {
        assert_eq!(seen.header("x-amz-server-side-encryption"), "AES256", "{seen:?}");
        assert_eq!(seen.header("x-amz-tagging"), "team=databases&cost=7", "{seen:?}");
    }
    // Classes that bill 128 KiB at least are not for documents.
    assert_eq!(small.header("x-amz-storage-class"), "");
    assert_eq!([&middle, &in_parts].map(|seen| seen.header("x-amz-storage-class")), ["STANDARD_IA"; 2]);

    for (kms_key, said) in [(Some("alias/backups"), "alias/backups"), (None, "")] {
        let put = PutOptions { encryption: Encryption::Kms(kms_key.map(str::to_string)), ..PutOptions::default() };
        for seen in put_three(S3Options { put, ..options(&recorder, &dir) }, &recorder).await {
            assert_eq!(seen.header("x-amz-server-side-encryption"), "aws:kms", "{seen:?}");
            assert_eq!(seen.header("x-amz-server-side-encryption-aws-kms-key-id"), said, "{seen:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_host_style_the_bucket_is_part_of_the_name_that_is_asked() {
    let (recorder, dir) = (Recorder::start(), tempfile::tempdir().unwrap());
    let endpoint = Some(format!("http://localhost:{}", recorder.port()));
    let options = S3Options { endpoint, path_style: false, ..options(&recorder, &dir) };
    for seen in put_three(options, &recorder).await {
        assert_eq!(seen.header("host"), format!("keiki.localhost:{}", recorder.port()), "{seen:?}");
        assert!(seen.target.starts_with("/some/prefix/"), "{seen:?}");
        assert!(seen.header("authorization").contains("/us-east-1/s3/aws4_request"), "{seen:?}");
    }
}

/// Goal: a server that begins a listing at the key it is given, and ends it at the first key without the prefix, is not
/// made to answer that there is nothing. Garage is one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_begins_at_a_key_only_if_the_prefix_does_not_come_after_it() {
    let (recorder, dir) = (Recorder::start(), tempfile::tempdir().unwrap());
    let store = open(options(&recorder, &dir)).await;
    store.adopt(&Capabilities {
        conditional_create: true,
        conditional_replace: true,
        conditional_complete: true,
        ordered_listing: true,
        checksums: Vec::new(),
    });
    for (after, begins) in [("", false), ("a", false), ("b/", true), ("b/c", true), ("c", true)] {
        store.list("b/", Some(after), 10).await.unwrap();
        let seen = recorder.seen().pop().unwrap();
        assert_eq!(seen.target.contains("start-after="), begins, "'{after}': {seen:?}");
    }
}

/// Starts an agent in these surroundings, has it look for its repository, and returns the key that signed.
fn key_that_signs(lab: &Lab, name: &str, more: &str, environment: &[(&str, &str)], secrets: &[&str]) -> String {
    let recorder = Recorder::start();
    let options = HostOptions {
        name,
        repository: format!(
            "url = \"s3://{BUCKET}/x\"\nendpoint = \"{}\"\nregion = \"eu-test-1\"\n{more}",
            recorder.endpoint()
        ),
        peers: Vec::new(),
        sections: String::new(),
        listen_port: free_port(),
        clone_bin_dir: &Version::V15.bin_dir(),
    };
    let mut host = Host::prepare(lab, &options);
    let nothing = lab.path("nothing").display().to_string();
    // Nothing of whoever runs the tests may be found.
    for name in ["AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "HOME"] {
        host.environment.push((name.to_string(), nothing.clone()));
    }
    host.environment.push(("KEIKI_LOG".into(), "trace".into()));
    for (name, value) in environment {
        let value = value.replace("RECORDER", &recorder.endpoint());
        host.environment.push((name.to_string(), value));
    }
    host.start_agent();
    let mut said = String::from_utf8(host.keiki(&["repository", "init"]).stderr).unwrap();
    said += &String::from_utf8(host.keiki(&["doctor"]).stdout).unwrap();
    said += &host.log();
    for secret in secrets {
        assert!(!said.contains(secret), "{name}: '{secret}' is printed: {said}");
    }
    let signed = recorder.seen().into_iter().find(|seen| seen.target.contains("/keiki/x/"));
    let signed = signed.unwrap_or_else(|| panic!("{name}: nothing was asked: {}", tail(&said, 40)));
    let authorization = signed.header("authorization");
    assert!(authorization.contains("/eu-test-1/s3/aws4_request"), "{signed:?}");
    let (_, credential) = authorization.split_once("Credential=").unwrap();
    let key = credential.split('/').next().unwrap().to_string();
    let has_token = [ROLE_KEY, CONTAINER_KEY].contains(&key.as_str());
    assert_eq!(signed.header("x-amz-security-token"), if has_token { SECRETS[1] } else { "" });
    key
}

#[test]
fn keys_come_from_a_file_the_environment_a_profile_or_a_role_and_secrets_are_printed_nowhere() {
    let lab = Lab::new();
    let (file, profiles) = (lab.path("own-file"), lab.path("profiles"));
    write_private(&file, "[a]\naws_access_key_id = AKFILE\naws_secret_access_key = SK-of-the-file\n");
    write_private(
        &profiles,
        "[default]\naws_access_key_id = AKDEFAULT\naws_secret_access_key = SK-of-the-default\n\
         [backup]\naws_access_key_id = AKPROFILE\naws_secret_access_key = SK-of-the-profile\n",
    );
    let by_environment = [("AWS_ACCESS_KEY_ID", "AKENV"), ("AWS_SECRET_ACCESS_KEY", "SK-of-the-environment")];
    let by_profiles = [("AWS_SHARED_CREDENTIALS_FILE", profiles.to_str().unwrap())];
    let by_machine = [("AWS_EC2_METADATA_SERVICE_ENDPOINT", "RECORDER")];
    let by_container = [("AWS_CONTAINER_CREDENTIALS_FULL_URI", "RECORDER/container-credentials")];
    let of_file = format!("credentials_file = \"{}\"\nprofile = \"a\"", file.display());
    // A file that is named counts before all else.
    assert_eq!(key_that_signs(&lab, "file", &of_file, &by_environment, &["SK-of-the"]), "AKFILE");
    assert_eq!(key_that_signs(&lab, "environment", "", &by_environment, &["SK-of-the"]), "AKENV");
    assert_eq!(key_that_signs(&lab, "profile", "profile = \"backup\"", &by_profiles, &["SK-of-the"]), "AKPROFILE");
    assert_eq!(key_that_signs(&lab, "container", "", &by_container, &SECRETS), CONTAINER_KEY);
    assert_eq!(key_that_signs(&lab, "machine", "", &by_machine, &SECRETS), ROLE_KEY);
}

#[test]
fn an_agent_aborts_uploads_that_its_like_left_long_ago_and_those_of_nobody_else() {
    let (lab, recorder) = (Lab::new(), Recorder::start());
    let file = lab.path("keys");
    write_private(&file, "aws_access_key_id = AKFILE\naws_secret_access_key = SKFILE\n");
    let header = "{\"format_version\":1,\"repository_id\":\"01938c5e-0000-7000-8000-000000000001\",\
                  \"created_at\":\"2026-01-01T00:00:00Z\",\"encryption\":\"none\"}";
    recorder.put("/keiki/ours/keiki.json", header.as_bytes());
    recorder.begin_uploads(&[("ours/incarnations/x/packs/y", "dead"), ("theirs/file", "alive"), ("oursnot", "alive")]);
    let options = HostOptions {
        name: "a",
        repository: format!(
            "url = \"s3://{BUCKET}/ours\"\nendpoint = \"{}\"\ncredentials_file = \"{}\"",
            recorder.endpoint(),
            file.display()
        ),
        peers: Vec::new(),
        sections: String::new(),
        listen_port: free_port(),
        clone_bin_dir: &Version::V15.bin_dir(),
    };
    let host = Host::start(&lab, &options);
    let aborted = || -> Vec<String> {
        let seen = recorder.seen().into_iter().filter(|seen| seen.method == "DELETE");
        seen.map(|seen| seen.target).collect()
    };
    wait_for("the upload to be aborted", SOON, || {
        host.keiki(&["status"]);
        !aborted().is_empty()
    });
    wait_for("the log to say so", SOON, || host.log().contains("aborting an upload of 'incarnations/x/packs/y'"));
    let aborted = aborted();
    assert_eq!(aborted.len(), 1, "{aborted:?}");
    assert!(aborted[0].starts_with("/keiki/ours/incarnations/x/packs/y?") && aborted[0].contains("uploadId=dead"));
}

fn counted(store: &S3Store) -> BTreeMap<&'static str, u64> {
    let total = store.meter().unwrap().read().total;
    let counts = RequestKind::ALL.into_iter().map(|kind| (kind.name(), total.requests(kind)));
    counts.filter(|(_, count)| *count > 0).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_attempts_and_claims_are_counted_as_they_are_sent() {
    let proxy = Proxy::start(Weed::shared().port());
    let options =
        S3Options { endpoint: Some(proxy.endpoint()), part_bytes: 5 << 20, ..Weed::shared().options(&fresh_prefix()) };
    let store = Arc::new(S3Store::open(options, Arc::new(SystemClock)).await.unwrap());
    // Two attempts that are answered with 503, and one that is not.
    proxy.slow_down_next(2);
    store.put(&key("tried/again"), Bytes::from_static(b"x"), PutCondition::Replace).await.unwrap();
    let attempts = counted(&store)["put"];
    assert_eq!(attempts, 3);
    assert_eq!(counted(&store), proxy.requests());

    // Nothing is known of the server yet: a condition costs claims, and they are requests.
    store.put(&key("claimed"), Bytes::from_static(b"x"), PutCondition::Create).await.unwrap();
    let body = Bytes::from(vec![7; 12 << 20]);
    store.put_stream(&key("in/parts"), body_from_bytes(body.clone()), PutCondition::Create).await.unwrap();
    assert_eq!(read_all(&*store, &key("in/parts"), 1 << 30).await.unwrap(), body);
    store.head(&key("claimed")).await.unwrap().unwrap();
    store.head(&key("missing")).await.unwrap().ok_or(()).unwrap_err();
    store.list("", None, 1000).await.unwrap();
    store.delete(&[key("claimed"), key("in/parts")]).await.unwrap();
    store.delete(&[key("tried/again")]).await.unwrap();
    let seen = proxy.requests();
    assert_eq!(counted(&store), seen);
    // A begin, three parts and an end.
    assert_eq!(seen["part"], 5, "{seen:?}");
    assert!(seen["put"] >= attempts + 3 && seen["list"] >= 3 && seen["delete"] >= 4, "{seen:?}");
    let total = store.meter().unwrap().read().total;
    assert!(total.sent_bytes > 12 << 20 && total.received_bytes > 12 << 20, "{total:?}");

    // A link costs nothing: who makes it asks nobody.
    store.presign(&[key("claimed")], Duration::from_secs(60)).await.unwrap();
    assert_eq!(proxy.requests(), seen);
}

#[test]
fn what_an_agent_says_of_its_cost_is_what_went_over_the_wire_and_its_limits_hold() {
    let (lab, proxy) = (Lab::new(), Proxy::start(Weed::shared().port()));
    let lines = Weed::shared().repository_lines_at(&proxy.endpoint(), &fresh_prefix()) + "\npart_size = \"5MiB\"";
    let source = TestServer::start(Version::V15, &[("wal_level", "replica")]);
    let limits = "\n[limits]\nupload = \"6MiB\"\ndownload = \"6MiB\"\n";
    let options = HostOptions {
        name: "a",
        repository: lines,
        peers: Vec::new(),
        sections: format!("{}{limits}", instance_section("orders", &source, "ship_every = \"1s\"")),
        listen_port: free_port(),
        clone_bin_dir: &source.bin_dir,
    };
    let a = Host::start(&lab, &options);
    a.keiki_ok(&["repository", "init"]);
    wait_until_state(&a, "orders", "archiving");
    // Nothing that can be compressed: 18 MB, which go up in parts.
    source.sql(
        "CREATE TABLE noise AS SELECT decode(string_agg(md5(i::text || ' ' || j::text), ''), 'hex') AS n \
         FROM generate_series(1, 20000) i, generate_series(1, 60) j GROUP BY i",
    );
    wait_until_shipped(&a, "orders");
    let bytes_before = proxy.bytes_up();
    let began = Instant::now();
    a.keiki_ok(&["backup", "create", "orders"]);
    let took = began.elapsed();
    let sent = proxy.bytes_up() - bytes_before;
    assert!(sent > 18 << 20, "{sent}");
    // An eighth of a second may be saved up, and what was on its way before is small.
    let least = Duration::from_secs_f64(sent as f64 / f64::from(6 << 20) - 1.0);
    assert!(took >= least, "{sent} bytes in {took:?}");

    let backup = a.json(&["backup", "list", "orders"])[0]["id"].as_str().unwrap().to_string();
    let (bytes_before, began) = (proxy.bytes_down(), Instant::now());
    let plain = lab.path("plain");
    a.keiki_ok(&["backup", "download", "orders", &backup, "--to", plain.to_str().unwrap()]);
    let (took, received) = (began.elapsed(), proxy.bytes_down() - bytes_before);
    assert!(received > 18 << 20, "{received}");
    let least = Duration::from_secs_f64(received as f64 / f64::from(6 << 20) - 1.0);
    assert!(took >= least, "{received} bytes in {took:?}");
    fs::remove_dir_all(&plain).unwrap();

    // What is counted while nothing is asked; the agent renews its lease now and then.
    wait_for("both counts to be of one moment", SOON, || {
        let before = proxy.requests();
        let cost = a.json(&["repository", "cost"]);
        let said: BTreeMap<&str, u64> = RequestKind::ALL
            .into_iter()
            .map(|kind| (kind.name(), cost["total"]["requests"][kind.name()].as_u64().unwrap()))
            .filter(|(_, count)| *count > 0)
            .collect();
        let after = proxy.requests();
        for (kind, count) in &said {
            assert!(*count <= after.get(kind).copied().unwrap_or(0), "{kind}: {said:?} {after:?}");
        }
        for (kind, count) in &before {
            assert!(*count <= said.get(kind).copied().unwrap_or(0), "{kind}: {said:?} {before:?}");
        }
        said == before
    });
    assert!(proxy.requests()["part"] >= 5, "{:?}", proxy.requests());
}
