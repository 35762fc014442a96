//! What can be wrong between an agent and a bucket: each is an error that says what, and what to do.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keiki::base::clock::{Clock, ManualClock, SystemClock};
use keiki::base::retry::RetryPolicy;
use keiki::error::{Error, Kind};
use keiki::repo::repository::Repository;
use keiki::store::Store;
use keiki::store::s3::{CredentialsSource, S3Options, S3Store};
use tempfile::TempDir;

use super::support::hosts::{Host, HostOptions, Lab, free_port};
use super::support::postgres::Version;
use super::support::s3::in_process::{self, Conditions};
use super::support::s3::{Weed, fresh_prefix, open, self_signed};

/// The error of the first thing that anybody does with a repository.
async fn init_error(options: S3Options, clock: Arc<dyn Clock>) -> Error {
    let retry = RetryPolicy { attempts_max: Some(2), first_wait: Duration::from_millis(10), ..RetryPolicy::brief() };
    let store = match S3Store::open(S3Options { retry, ..options }, clock).await {
        Ok(store) => Arc::new(store),
        Err(error) => return error,
    };
    Repository::init(store, Timestamp::now()).await.err().expect("it should not be possible to begin a repository")
}

fn assert_says(error: &Error, kind: Kind, message: &str, hint: &str) {
    assert_eq!(error.kind(), kind, "{error:?}");
    assert!(error.message().contains(message), "{error:?}");
    assert!(error.hint_text().unwrap_or_default().contains(hint), "{error:?}");
    assert!(!format!("{error:?}").contains("SKTEST"), "a secret is shown: {error:?}");
}

fn as_profile(profile: &str) -> S3Options {
    let weed = Weed::shared();
    let file = Some(weed.credentials_file());
    let credentials = CredentialsSource { file, profile: Some(profile.to_string()) };
    S3Options { credentials, ..weed.options(&fresh_prefix()) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_are_not_known_or_do_not_fit_are_told_apart() {
    let clock = || Arc::new(SystemClock);
    let unknown = init_error(as_profile("unknown"), clock()).await;
    assert_says(&unknown, Kind::Forbidden, "does not know the access key", "deleted");
    let wrong = init_error(as_profile("wrong"), clock()).await;
    assert_says(&wrong, Kind::Forbidden, "secret key does not belong", "compare");
    let missing = init_error(as_profile("nobody"), clock()).await;
    assert_says(&missing, Kind::BadInput, "no section '[nobody]'", "profile");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_may_not_write_and_a_bucket_that_is_missing_are_told() {
    let denied = init_error(as_profile("reader"), Arc::new(SystemClock)).await;
    assert_says(&denied, Kind::Forbidden, "AccessDenied", "s3:PutObject");
    let options = S3Options { bucket: "no-such-bucket".into(), ..Weed::shared().options("x") };
    let missing = init_error(options.clone(), Arc::new(SystemClock)).await;
    assert_says(&missing, Kind::BadInput, "there is no bucket 'no-such-bucket'", "create the bucket");
    // Nor is an object in it called missing, which would look like a new repository, or a lost lease.
    let store = open(options).await;
    let name = keiki::store::Key::parse("a/lease.json").unwrap();
    assert_eq!(store.head(&name).await.unwrap_err().kind(), Kind::BadInput);
    assert_eq!(store.get(&name, None).await.err().unwrap().kind(), Kind::BadInput);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_an_hour_off_is_told() {
    let options = Weed::shared().options(&fresh_prefix());
    let clock = ManualClock::new(Timestamp::now() - jiff::SignedDuration::from_hours(1));
    let error = init_error(options, clock).await;
    assert_says(&error, Kind::Forbidden, "clocks of this host and of the server differ", "timedatectl");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_holds_a_repository_is_not_begun_anew() {
    let options = Weed::shared().options(&fresh_prefix());
    let made = Repository::init(open(options.clone()).await, Timestamp::now()).await.unwrap();
    let error = init_error(options.clone(), Arc::new(SystemClock)).await;
    assert_says(&error, Kind::Conflict, "there is a repository already", "another directory or prefix");
    let opened = Repository::open(open(options).await).await.unwrap();
    assert_eq!(opened.id(), made.id());
    // What the server can do was found out once, and is known to everybody who opens it.
    let found = opened.capabilities().unwrap();
    assert!(found.conditional_create && found.conditional_replace && found.conditional_complete, "{found:?}");
    assert!(!found.checksums.is_empty(), "{found:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_ignores_conditions_is_found_out() {
    let directory = TempDir::new().unwrap();
    let careless = in_process::start(&directory.path().join("careless"), Conditions::Ignored).await;
    let made = Repository::init(open(careless).await, Timestamp::now()).await.unwrap();
    let found = made.capabilities().unwrap();
    assert!(!found.conditional_create && !found.conditional_replace && !found.conditional_complete, "{found:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_counts_only_if_its_authority_is_named() {
    let directory = TempDir::new().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (own, key) = self_signed(directory.path());
    let weed = Weed::start_with(Some((own.clone(), key)));
    let options = S3Options { endpoint: Some(weed.https_endpoint()), ..weed.options("tls") };

    let error = init_error(options.clone(), Arc::new(SystemClock)).await;
    assert_says(&error, Kind::Forbidden, "certificate of '127.0.0.1' is not good", "'ca' in [repository]");
    let no_pem = S3Options { ca: Some(write("none.pem", "no certificate\n")), ..options.clone() };
    assert_says(&init_error(no_pem, Arc::new(SystemClock)).await, Kind::BadInput, "there is none in it", "PEM");
    let bad_pem = "-----BEGIN CERTIFICATE-----\nbm9uc2Vuc2U=\n-----END CERTIFICATE-----\n";
    let bad = S3Options { ca: Some(write("bad.pem", bad_pem)), ..options.clone() };
    assert_eq!(init_error(bad, Arc::new(SystemClock)).await.kind(), Kind::BadInput);
    let plain = S3Options { endpoint: Some(weed.endpoint().replace("http:", "https:")), ..options.clone() };
    assert_says(&init_error(plain, Arc::new(SystemClock)).await, Kind::BadInput, "does not speak TLS", "http://");

    let trusted = S3Options { ca: Some(own), ..options };
    Repository::init(open(trusted).await, Timestamp::now()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_not_there_is_told_and_may_come_back() {
    let endpoint = Some(format!("http://127.0.0.1:{}", free_port()));
    let gone = S3Options { endpoint, ..Weed::shared().options("x") };
    let error = init_error(gone, Arc::new(SystemClock)).await;
    assert_says(&error, Kind::Unreachable, "connection refused", "server running");
    assert!(error.message().contains("tried 2 times"), "{error}");
}

/// Goal: whoever sets up a repository and has made one of the usual mistakes is told so by the program, with what to do
/// and an exit code that scripts can tell apart, and no secret is in what is printed or logged.
#[test]
fn the_program_tells_what_is_wrong_with_a_bucket_and_what_to_do() {
    let (lab, weed) = (Lab::new(), Weed::shared());
    let used = fresh_prefix();
    let good = weed.repository_lines(&used);
    let (certificate, key) = self_signed(&lab.path("ca"));
    let encrypted = Weed::start_with(Some((certificate, key)));
    let profile = |name: &str| format!("{}\nprofile = \"{name}\"", weed.repository_lines(&fresh_prefix()));
    let mistakes = [
        ("unknown", profile("unknown"), Kind::Forbidden, "does not know the access key"),
        ("wrong", profile("wrong"), Kind::Forbidden, "secret key does not belong"),
        ("reader", profile("reader"), Kind::Forbidden, "s3:PutObject"),
        ("bucket", good.replace("s3://keiki/", "s3://no-such-bucket/"), Kind::BadInput, "no bucket 'no-such-bucket'"),
        (
            "tls",
            encrypted.repository_lines_at(&encrypted.https_endpoint(), "x"),
            Kind::Forbidden,
            "nobody who is trusted",
        ),
        ("used", good.clone(), Kind::Conflict, "there is a repository already"),
    ];
    let host = |name: &str, lines: &str| {
        let options = HostOptions {
            name,
            repository: lines.to_string(),
            peers: Vec::new(),
            sections: String::new(),
            listen_port: free_port(),
            clone_bin_dir: &Version::V15.bin_dir(),
        };
        Host::start(&lab, &options)
    };
    host("first", &good).keiki_ok(&["repository", "init"]);
    for (name, lines, kind, words) in mistakes {
        let host = host(name, &lines);
        let output = host.keiki(&["repository", "init"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(i32::from(kind.exit_code())), "{name}: {said}");
        assert!(said.contains("error: ") && said.contains("hint: ") && said.contains(words), "{name}: {said}");
        for secret in ["SKTEST", "SKREAD", "SKWRONG"] {
            assert!(!said.contains(secret) && !host.log().contains(secret), "{name}: {said}{}", host.log());
        }
    }
}
