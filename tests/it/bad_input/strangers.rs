//! Who may not: callers without permission, certificates of another authority, expired, or of the wrong name, and what
//! is not an agent at all.

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use keiki::base::users::current_user;
use keiki::peer::ca::Authority;
use keiki::peer::tls::Identity;

use super::super::support::hosts::{Host, HostOptions, KEIKI, Lab, free_port, wait_for};
use super::super::support::postgres::{Version, server_user};
use super::{Mask, Said, assert_unchanged, refusal, standing};

/// Hosts without any database, and an empty directory as repository.
struct Scene {
    lab: Lab,
    bin_dir: PathBuf,
}

impl Scene {
    fn new() -> Scene {
        let lab = Lab::new();
        fs::create_dir(lab.path("repository")).unwrap();
        Scene { lab, bin_dir: Version::V15.bin_dir() }
    }

    /// Certificate and configuration of a host, which is not started.
    fn prepare(&self, name: &str, listen_port: u16, peers: Vec<(&str, u16)>) -> Host {
        let options = HostOptions {
            name,
            repository: format!("file://{}", self.lab.path("repository").display()),
            peers,
            sections: String::new(),
            listen_port,
            clone_bin_dir: &self.bin_dir,
        };
        Host::prepare(&self.lab, &options)
    }

    fn said(&self) -> Said {
        Said::new(Mask::default().known(self.lab.path("").display(), "LAB/"))
    }

    /// Issues the certificate of a host anew, valid for these seconds from now; returns the second of its end.
    fn issue(&self, name: &str, seconds: i64) -> i64 {
        let authority = Authority::open(&self.lab.path("ca")).unwrap();
        let now = Timestamp::now();
        let until = now.as_second() + seconds;
        authority.issue_between(&Identity::Host(name.into()), now, until - 9000, until).unwrap();
        until
    }
}

/// Changes the configuration of a host that does not run yet.
fn edit(host: &Host, from: &str, to: &str) {
    let text = fs::read_to_string(&host.config).unwrap();
    assert!(text.contains(from), "there is no '{from}' in {text}");
    fs::write(&host.config, text.replace(from, to)).unwrap();
}

const CLONE: [&str; 6] = ["clone", "orders", "--to", "b", "--as", "copy"];

#[test]
fn a_caller_without_permission_is_told_what_would_allow_it_and_nothing_happens() {
    let scene = Scene::new();
    let (port_a, port_b) = (free_port(), free_port());
    let mut a = scene.prepare("a", port_a, vec![("b", port_b)]);
    let mut b = scene.prepare("b", port_b, vec![("a", port_a)]);
    let all = "may = [\"status\", \"backup\", \"clone\", \"accept\", \"discard\", \"job\", \"ship\", \
               \"read-repository\", \"write-repository\"]";
    edit(&b, all, "may = [\"status\"]");
    a.start_agent();
    b.start_agent();
    let before = standing(&scene.lab, &[&a, &b], &scene.lab.path("repository"));
    let mut said = scene.said();
    let job = "0199e1ac-0000-7000-8000-000000000000";
    let cases: [(&[&str], &str); 9] = [
        (&CLONE, "'host:a' may not order a clone of 'orders' on this host"),
        (&["clone", "orders", "--to", "b", "--as", "copy", "--check"], "may not order a clone"),
        (&["--on", "b", "backup", "create", "orders"], "may not order a backup"),
        (&["--on", "b", "accept", "copy"], "may not accept a clone"),
        (&["--on", "b", "discard", "copy", "--yes"], "may not discard a clone"),
        (&["--on", "b", "job", "cancel", job], "may not cancel a job"),
        (&["--on", "b", "job", "resume", job], "may not resume a job"),
        (&["--on", "b", "repository", "init"], "may not initialise the repository from another host"),
        (&["--on", "b", "wal-push", "pg_wal/000000010000000000000001"], "may not ask for a segment of the log"),
    ];
    for (arguments, expected) in cases {
        said.refuses(&a, arguments, expected);
        // It is written down where it was refused.
        let line = b.log().lines().rev().find(|line| line.contains("refused: ")).map(str::to_string);
        assert!(
            line.is_some_and(|line| line.contains("host:a")),
            "the agent does not say whom it refused:\n{}",
            b.log()
        );
    }
    // What is allowed still works.
    a.keiki_ok(&["--on", "b", "job", "list"]);
    if current_user().unwrap().uid == 0 {
        // A user of the host who is not in the group. Only root can be somebody else.
        let mut command = Command::new(KEIKI);
        command.args(["--socket", a.dir.join("keiki.sock").to_str().unwrap(), "status"]);
        let user = server_user();
        let output = command.uid(user.uid).gid(user.gid).current_dir("/").output().unwrap();
        let expected = format!("user '{}' may not see the status on this host", user.name);
        refusal(&output, &expected).unwrap();
    }
    assert_unchanged(&before, &scene.lab, &[&a, &b], &scene.lab.path("repository"), "a caller without permission");
    insta::assert_snapshot!(said.finish());
}

#[test]
fn a_certificate_that_does_not_fit_is_refused_by_either_side_with_what_to_do() {
    let scene = Scene::new();
    let other = Lab::new();
    let (port_a, port_b, port_c) = (free_port(), free_port(), free_port());
    let mut said = scene.said();
    let own_ca = scene.lab.path("ca").to_str().unwrap().to_string();
    let other_ca = other.path("ca").to_str().unwrap().to_string();

    // Whoever is called has a certificate of another authority.
    let mut a = scene.prepare("a", port_a, vec![("b", port_b)]);
    let mut b = scene.prepare("b", port_b, vec![("a", port_a)]);
    other.keiki_without_agent(&["ca", "issue", &other_ca, "--host", "b"]);
    edit(&b, &own_ca, &other_ca);
    a.start_agent();
    b.start_agent();
    let before = standing(&scene.lab, &[&a, &b], &scene.lab.path("repository"));
    said.refuses(&a, &CLONE, "its certificate is of another authority");
    // The other way round it is the caller who has it.
    said.refuses(&b, &["--on", "a", "status"], "its certificate is of another authority");
    b.kill_agent();
    edit(&b, &other_ca, &own_ca);

    // It trusts ours, but its own certificate is still of another one.
    let certificate = format!("certificate = \"{own_ca}/issued/b.pem\"\nkey = \"{own_ca}/issued/b.key\"");
    let foreign = format!("certificate = \"{other_ca}/issued/b.pem\"\nkey = \"{other_ca}/issued/b.key\"");
    let both = scene.lab.path("both.pem");
    fs::write(&both, [&own_ca, &other_ca].map(|ca| fs::read_to_string(format!("{ca}/ca.pem")).unwrap()).concat())
        .unwrap();
    edit(&b, &certificate, &foreign);
    edit(&b, &format!("ca = \"{own_ca}/ca.pem\""), &format!("ca = \"{}\"", both.display()));
    b.start_agent();
    said.refuses(&b, &["--on", "a", "status"], "it refused this host's certificate as one of another authority");
    b.kill_agent();
    edit(&b, &foreign, &certificate);

    // It expires while it runs. Nobody has called before: a connection that was begun in time is kept.
    let expires_at = scene.issue("b", 2);
    b.start_agent();
    wait_for("the certificate to expire", Duration::from_secs(30), || Timestamp::now().as_second() > expires_at);
    said.refuses(&a, &CLONE, "its certificate expired on");
    said.refuses(&b, &["--on", "a", "status"], "it refused this host's certificate as not valid now");
    // What needs no other host goes on.
    b.keiki_ok(&["job", "list"]);
    // A new one counts without a restart.
    scene.issue("b", 9000);
    let accepts = || a.keiki(&["--on", "b", "job", "list"]).status.success();
    wait_for("the new certificate to count", Duration::from_secs(30), accepts);

    // Another host answers at that address.
    let mut c = scene.prepare("c", port_c, Vec::new());
    c.start_agent();
    a.kill_agent();
    edit(&a, &format!("127.0.0.1:{port_b}"), &format!("127.0.0.1:{port_c}"));
    a.start_agent();
    said.refuses(&a, &CLONE, "its certificate is for 'keiki://host/c', not for 'keiki://host/b'");
    assert_unchanged(&before, &scene.lab, &[&a, &b], &scene.lab.path("repository"), "a certificate that does not fit");
    insta::assert_snapshot!(said.finish());
}

#[test]
fn what_is_no_agent_or_does_not_answer_is_named_with_its_address() {
    let scene = Scene::new();
    // It takes connections, by way of its queue, and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let chatty = TcpListener::bind("127.0.0.1:0").unwrap();
    let (silent_port, chatty_port) = (silent.local_addr().unwrap().port(), chatty.local_addr().unwrap().port());
    // A server of something else: it says something and hangs up.
    std::thread::spawn(move || {
        for socket in chatty.incoming() {
            let _ = std::io::Write::write_all(&mut socket.unwrap(), b"220 mail.example.net ESMTP\r\n");
        }
    });
    let peers = vec![("silent", silent_port), ("mail", chatty_port), ("away", free_port())];
    let mut a = scene.prepare("a", free_port(), peers);
    a.start_agent();
    let mut said = scene.said();
    for (name, expected) in [
        ("silent", "no answer within"),
        ("mail", "does not speak TLS"),
        ("away", "cannot reach the agent of host 'away' at '127.0.0.1:"),
    ] {
        said.refuses(&a, &["clone", "orders", "--to", name, "--as", "copy"], expected);
    }
    a.kill_agent();
    said.refuses(&a, &["status"], "cannot reach the agent on this host");
    insta::assert_snapshot!(said.finish());
}

/// What an agent says that does not start. One that starts all the same is killed, and that is our failure.
fn refused_start(host: &Host) -> String {
    let mut agent = Command::new(KEIKI)
        .args(["--config", host.config.to_str().unwrap(), "agent"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while agent.try_wait().unwrap().is_none() {
        if began.elapsed() > Duration::from_secs(30) || host.dir.join("keiki.sock").exists() {
            agent.kill().unwrap();
            let output = agent.wait_with_output().unwrap();
            panic!("the agent started: {}", String::from_utf8_lossy(&output.stderr));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    refusal(&agent.wait_with_output().unwrap(), "").unwrap()
}

#[test]
fn an_agent_does_not_start_with_files_of_tls_that_do_not_fit() {
    let scene = Scene::new();
    let host = scene.prepare("a", free_port(), Vec::new());
    scene.prepare("b", free_port(), Vec::new());
    let ca = scene.lab.path("ca").to_str().unwrap().to_string();
    let good = fs::read_to_string(&host.config).unwrap();
    let mut said = scene.said();
    let cases = [
        (format!("{ca}/issued/a.key"), format!("{ca}/issued/b.key")),
        (format!("{ca}/issued/a.pem"), format!("{ca}/issued/nobody.pem")),
        (format!("{ca}/issued/a.pem"), format!("{ca}/issued/a.key")),
        (format!("{ca}/ca.pem"), host.config.display().to_string()),
    ];
    for (from, to) in cases {
        edit(&host, &from, &to);
        said.note(&format!("keiki agent, with '{to}' for '{from}'"), &refused_start(&host));
        fs::write(&host.config, &good).unwrap();
    }
    // A certificate for another name than the host's.
    edit(&host, "name = \"a\"", "name = \"z\"");
    said.note("keiki agent, on a host 'z' with the certificate of 'a'", &refused_start(&host));
    insta::assert_snapshot!(said.finish());
}
