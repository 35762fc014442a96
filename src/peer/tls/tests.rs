//! Handshakes over loopback between two ends with files made by `ca`.

use std::path::PathBuf;

use tokio::net::TcpListener;

use super::*;
use crate::peer::ca::{Authority, Issued};

struct Site {
    directory: tempfile::TempDir,
}

impl Site {
    fn new() -> Site {
        Site { directory: tempfile::tempdir().unwrap() }
    }

    fn authority(&self, name: &str) -> Authority {
        let path = self.directory.path().join(name);
        Authority::open(&path).or_else(|_| Authority::init(&path, Timestamp::now())).unwrap()
    }

    fn issue(&self, identity: Identity) -> TlsConfig {
        config(&self.authority("ca").issue(&identity, Timestamp::now(), 30).unwrap())
    }

    fn host(&self, name: &str) -> Arc<TlsIdentity> {
        TlsIdentity::load(self.issue(Identity::Host(name.into()))).unwrap()
    }

    /// A certificate that is valid between two moments, in seconds from now.
    fn between(&self, name: &str, from: i64, until: i64) -> Arc<TlsIdentity> {
        let now = Timestamp::now();
        let second = now.as_second();
        let identity = Identity::Host(name.into());
        let issued = self.authority("ca").issue_between(&identity, now, second + from, second + until).unwrap();
        TlsIdentity::load(config(&issued)).unwrap()
    }

    fn stranger(&self, name: &str) -> Arc<TlsIdentity> {
        let issued = self.authority("other").issue(&Identity::Host(name.into()), Timestamp::now(), 30).unwrap();
        TlsIdentity::load(config(&issued)).unwrap()
    }
}

fn config(issued: &Issued) -> TlsConfig {
    TlsConfig { ca: issued.ca.clone(), certificate: issued.certificate.clone(), key: issued.key.clone() }
}

/// What both ends think: who called, and whether the caller got its first byte.
async fn meet(server: &TlsIdentity, client: &TlsIdentity, wanted: &str) -> (Result<Identity>, Result<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async {
        let (socket, _) = listener.accept().await.unwrap();
        let mut accepted = server.accept(socket).await?;
        accepted.stream.write_all(b"!").await.unwrap();
        accepted.stream.shutdown().await.unwrap();
        Ok(accepted.peer.identity)
    };
    let call = async {
        let explain = |error: std::io::Error| explain_client_side(&error, wanted).expect("a reason of TLS");
        let socket = TcpStream::connect(address).await.unwrap();
        // With TLS 1.3 a client learns with the first byte only whether it was accepted.
        let mut stream = client.connect(socket, wanted).await.map_err(explain)?;
        stream.read_u8().await.map_err(explain)?;
        Ok(())
    };
    tokio::join!(serve, call)
}

fn text(error: &Error) -> String {
    format!("{error} | {}", error.hint_text().unwrap_or("-"))
}

#[tokio::test]
async fn two_hosts_of_one_authority_know_each_other_by_name() {
    let site = Site::new();
    let (caller, answer) = meet(&site.host("b"), &site.host("a"), "b").await;
    assert_eq!(caller.unwrap(), Identity::Host("a".into()));
    answer.unwrap();
    let operator = TlsIdentity::load(site.issue(Identity::Operator("ann".into()))).unwrap();
    assert_eq!(meet(&site.host("b"), &operator, "b").await.0.unwrap(), Identity::Operator("ann".into()));
}

#[tokio::test]
async fn a_host_of_another_authority_is_refused_by_both_sides() {
    let site = Site::new();
    let (_, answer) = meet(&site.stranger("b"), &site.host("a"), "b").await;
    let error = answer.unwrap_err();
    insta::assert_snapshot!(text(&error), @"its certificate is of another authority | both hosts need certificates of the same authority: is 'ca' in [tls] the same file on both?");
    assert_eq!(error.kind(), Kind::Forbidden);

    // A caller who trusts the right authority but has a certificate of another one.
    let mixed = site.directory.path().join("mixed.pem");
    let both = ["ca/ca.pem", "other/ca.pem"].map(|name| std::fs::read(site.directory.path().join(name)).unwrap());
    std::fs::write(&mixed, both.concat()).unwrap();
    let issued = site.authority("other").issue(&Identity::Host("a".into()), Timestamp::now(), 30).unwrap();
    let mixed = TlsIdentity::load(TlsConfig { ca: mixed, ..config(&issued) }).unwrap();
    let (caller, answer) = meet(&site.host("b"), &mixed, "b").await;
    insta::assert_snapshot!(text(&caller.unwrap_err()), @"its certificate is of another authority | both hosts need certificates of the same authority: is 'ca' in [tls] the same file on both?");
    insta::assert_snapshot!(text(&answer.unwrap_err()), @"it refused this host's certificate as one of another authority | both hosts need certificates of the same authority: is 'ca' in [tls] the same file on both?");
}

#[tokio::test]
async fn an_expired_certificate_is_refused_with_the_day_and_the_command() {
    let site = Site::new();
    let expired = site.between("b", -100_000, -60);
    let error = meet(&expired, &site.host("a"), "b").await.1.unwrap_err();
    assert_eq!(error.kind(), Kind::Forbidden);
    let day = utc_text(expired.facts().not_after);
    assert_eq!(error.message(), format!("its certificate expired on {day}"));
    assert!(error.hint_text().unwrap().contains("'keiki ca issue --host b'"), "{error:?}");

    let (caller, answer) = meet(&site.host("b"), &site.between("a", -100_000, -60), "b").await;
    assert!(caller.unwrap_err().message().starts_with("its certificate expired on "));
    insta::assert_snapshot!(text(&answer.unwrap_err()), @"it refused this host's certificate as not valid now | 'keiki doctor' shows until when it is valid, 'keiki ca issue' makes a new one");
}

#[tokio::test]
async fn a_certificate_from_the_future_points_at_the_clock() {
    let site = Site::new();
    let error = meet(&site.between("b", 4000, 9000), &site.host("a"), "b").await.1.unwrap_err();
    assert!(error.message().starts_with("its certificate is not valid before "), "{error}");
    assert!(error.hint_text().unwrap().contains("clock"));
}

#[tokio::test]
async fn another_host_at_the_address_is_refused() {
    let site = Site::new();
    let error = meet(&site.host("c"), &site.host("a"), "b").await.1.unwrap_err();
    insta::assert_snapshot!(text(&error), @"its certificate is for 'keiki://host/c', not for 'keiki://host/b' | is the address in [[peer]] that of another host, or was the wrong certificate installed there?");
}

#[tokio::test]
async fn an_operator_cannot_pretend_to_be_an_agent() {
    let site = Site::new();
    let operator = TlsIdentity::load(site.issue(Identity::Operator("b".into()))).unwrap();
    let error = meet(&operator, &site.host("a"), "b").await.1.unwrap_err();
    insta::assert_snapshot!(text(&error), @"its certificate is not made for this | an agent needs a certificate of 'keiki ca issue --host', not one of an operator");
}

#[tokio::test]
async fn a_caller_without_certificate_is_refused() {
    let site = Site::new();
    let server = site.host("b");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let call = async {
        let verifier = verify::HostVerifier::new(server.current().roots.clone(), "b");
        let config = ClientConfig::builder_with_provider(verify::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        let socket = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("b").unwrap();
        let mut stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await.unwrap();
        explain_client_side(&stream.read_u8().await.unwrap_err(), "b").unwrap()
    };
    let serve = async { server.accept(listener.accept().await.unwrap().0).await.err().unwrap() };
    let (refused, seen) = tokio::join!(serve, call);
    insta::assert_snapshot!(text(&refused), @"it has no certificate | 'keiki ca issue' makes one");
    insta::assert_snapshot!(text(&seen), @"it wants a certificate | [tls] in the configuration names the files, 'keiki ca issue' makes them");
}

/// Sends raw bytes to a server and gives its verdict.
async fn verdict_on(bytes: &[u8]) -> Error {
    let site = Site::new();
    let server = site.host("b");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let call = async {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // Whether the other side says anything before it closes does not matter here.
        let _ = socket.read_to_end(&mut answer).await;
    };
    let serve = async { server.accept(listener.accept().await.unwrap().0).await.err().unwrap() };
    tokio::join!(serve, call).0
}

#[tokio::test]
async fn a_client_that_speaks_only_tls_1_2_is_refused() {
    // RFC 5246: record header, handshake header, version 1.2, random, no session, one suite, no compression, and the
    // extensions that such clients send (signature algorithms and groups), but no supported_versions.
    let extensions = [&[0, 13, 0, 4, 0, 2, 4, 3][..], &[0, 10, 0, 4, 0, 2, 0, 23], &[0, 11, 0, 2, 1, 0]].concat();
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0, 0, extensions.len() as u8]);
    hello.extend(extensions);
    let mut record = vec![22, 3, 1, 0, hello.len() as u8 + 4, 1, 0, 0, hello.len() as u8];
    record.extend(hello);
    insta::assert_snapshot!(text(&verdict_on(&record).await), @"it does not speak TLS 1.3 | -");
}

#[tokio::test]
async fn what_is_no_tls_at_all_is_refused() {
    insta::assert_snapshot!(text(&verdict_on(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n").await), @"it does not speak TLS | -");
    assert_eq!(verdict_on(&[22, 3, 1, 2, 0, 1]).await.kind(), Kind::Unreachable);
}

#[tokio::test]
async fn a_replaced_certificate_is_used_without_restart_and_a_broken_one_is_not() {
    let site = Site::new();
    let b_files = site.issue(Identity::Host("b".into()));
    let (a, b) = (site.host("a"), TlsIdentity::load(b_files.clone()).unwrap());
    assert!(b.is_current(1));

    // Half of a replacement: the new certificate is there, its key not yet.
    let old_key = std::fs::read(&b_files.key).unwrap();
    site.issue(Identity::Host("b".into()));
    let new_key = std::fs::read(&b_files.key).unwrap();
    std::fs::write(&b_files.key, old_key).unwrap();
    let error = b.reload().unwrap_err();
    assert!(error.message().contains("is not its key"), "{error}");
    meet(&b, &a, "b").await.1.unwrap();
    assert!(b.is_current(1));

    std::fs::write(&b_files.key, new_key).unwrap();
    b.reload().unwrap();
    assert!(!b.is_current(1) && b.is_current(2));
    meet(&b, &a, "b").await.1.unwrap();
}

#[tokio::test]
async fn changed_files_are_noticed_at_a_handshake() {
    let site = Site::new();
    let files = site.issue(Identity::Host("b".into()));
    let b = TlsIdentity::load(files).unwrap();
    let before = b.facts();
    let issued = site.authority("ca").issue(&Identity::Host("b".into()), Timestamp::now(), 60).unwrap();
    // As if the last look had been a while ago.
    b.last_look.lock().unwrap().at -= LOOK_AGAIN_AFTER;
    meet(&b, &site.host("a"), "b").await.1.unwrap();
    assert_ne!(b.facts(), before);
    assert_eq!(b.facts().not_after, issued.entry.not_after);
}

/// The message and hint with the directory of the test taken out.
fn refusal(site: &Site, config: &TlsConfig) -> String {
    let error = TlsIdentity::load(config.clone()).err().unwrap();
    text(&error).replace(&site.directory.path().display().to_string(), "")
}

#[test]
fn files_that_do_not_fit_are_refused_with_their_names() {
    use std::os::unix::fs::PermissionsExt;
    let site = Site::new();
    let a = site.issue(Identity::Host("a".into()));
    let b = site.issue(Identity::Host("b".into()));
    let missing = TlsConfig { key: PathBuf::from("/nowhere/a.key"), ..a.clone() };
    insta::assert_snapshot!(refusal(&site, &missing), @"cannot read key '/nowhere/a.key': no such file or directory | 'keiki ca issue' makes the files; see [tls] in the configuration");
    insta::assert_snapshot!(refusal(&site, &TlsConfig { key: b.key.clone(), ..a.clone() }), @"cannot use certificate '/ca/issued/a.pem': '/ca/issued/b.key' is not its key | copy both files of one 'keiki ca issue'");
    insta::assert_snapshot!(refusal(&site, &TlsConfig { key: a.certificate.clone(), ..a.clone() }), @"cannot read key '/ca/issued/a.pem': it holds no private key | it should begin with '-----BEGIN PRIVATE KEY-----'");
    insta::assert_snapshot!(refusal(&site, &TlsConfig { certificate: a.key.clone(), ..a.clone() }), @"cannot read certificate '/ca/issued/a.key': it is not a PEM file | it should begin with '-----BEGIN CERTIFICATE-----'");
    insta::assert_snapshot!(refusal(&site, &TlsConfig { certificate: a.ca.clone(), ..a.clone() }), @"cannot use certificate '/ca/ca.pem': the certificate names 0 identities, not one | was it made by 'keiki ca issue'?");
    site.authority("other");
    let other = site.directory.path().join("other/ca.pem");
    insta::assert_snapshot!(refusal(&site, &TlsConfig { ca: other, ..a.clone() }), @"cannot use certificate '/ca/issued/a.pem': no authority in '/other/ca.pem' has signed it | are both files of the same 'keiki ca init'?");
    std::fs::set_permissions(&a.key, std::fs::Permissions::from_mode(0o644)).unwrap();
    insta::assert_snapshot!(refusal(&site, &a), @"cannot use key '/ca/issued/a.key': every user can read it | chmod 600 '/ca/issued/a.key'; if it was copied about like that, issue a new one");
}

#[test]
fn doctor_says_when_a_certificate_ends() {
    use crate::model::check::Verdict;
    let site = Site::new();
    let now = Timestamp::now();
    let verdict = |identity: Arc<TlsIdentity>| identity.check(now).verdict;
    assert_eq!(verdict(site.between("a", -60, 90 * 86400)), Verdict::Pass);
    assert_eq!(verdict(site.between("a", -60, 86400)), Verdict::Warn);
    assert_eq!(verdict(site.between("a", -3600, -60)), Verdict::Fail);
    assert_eq!(verdict(site.between("a", 3600, 7200)), Verdict::Fail);
}

#[test]
fn only_the_two_kinds_of_identity_are_read() {
    assert_eq!(Identity::parse_uri("keiki://host/a").unwrap().to_string(), "host:a");
    assert_eq!(Identity::parse_uri("keiki://operator/ann").unwrap().uri(), "keiki://operator/ann");
    for bad in ["", "host/a", "keiki://root/a", "keiki://host/", "keiki://host/a/b", "https://host/a", "keiki://host/*"]
    {
        assert!(Identity::parse_uri(bad).is_err(), "{bad}");
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_a_certificate_or_an_error(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let _ = CertificateFacts::read(&bytes);
    }
}
