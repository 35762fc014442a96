//! New passwords for accounts of a clone, on real servers: the old one is refused, the new one lets in, a name that is
//! not there is refused with the nearest that are, and the passwords are nowhere afterwards.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use keiki::engine::mysql::session::{Endpoint, Session};

use super::support::hosts::{Host, HostOptions, Lab, free_port};
use super::support::mariadb::MariaServer;
use super::support::mysql::{self, MySqlServer};
use super::support::postgres::server_user;
use super::support::redis::{Answer, TestRedis};
use super::support::redis_stage::RedisStage;
use super::support::two_hosts::{Ship, TwoHosts, Via, sql_at, wait_until_ended, wait_until_state};

const OLD: &str = "old-Word-1";
/// With what strings of the servers end at.
const NEW: &str = "n3w'\\ \"W%rd";

/// A file as `--password` wants it.
fn password_file(lab: &Lab, name: &str, text: &str) -> String {
    let path = lab.path(name);
    fs::write(&path, format!("{text}\nsecond line\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path.to_str().unwrap().to_string()
}

/// Looks for a password in every file of the lab: state and logs of the agents, journals, the repository, clones with
/// everything that their servers have written.
fn assert_nowhere(lab: &Lab, text: &str, but: &[&str]) {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
    let mut open = vec![lab.path("")];
    let mut seen = 0;
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_symlink() || but.iter().any(|one| path == Path::new(one)) {
                continue;
            }
            if path.is_dir() {
                open.push(path);
                continue;
            }
            let Ok(bytes) = fs::read(&path) else { continue };
            seen += 1;
            for needle in [text.as_bytes(), escaped.as_bytes()] {
                let found = bytes.windows(needle.len()).any(|window| window == needle);
                assert!(!found, "'{}' has the password", path.display());
            }
        }
    }
    assert!(seen > 20, "{seen} files are not all");
}

/// Where the passwords of the jobs of a host are kept while they may be needed.
fn kept_passwords(host: &Host) -> Vec<std::path::PathBuf> {
    let jobs = fs::read_dir(host.dir.join("state/jobs")).unwrap().map(|entry| entry.unwrap().path());
    jobs.filter(|path| path.extension().is_some_and(|suffix| suffix == "passwords")).collect()
}

/// Logs in to a clone of PostgreSQL by password.
fn log_in(stage: &TwoHosts, port: u16, role: &str, password: &str) -> Result<String, String> {
    let mut command = stage.source.command("psql");
    command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", role, "-d", "postgres", "-XAtqc", "SELECT 1"]);
    let output = command.env("PGPASSWORD", password).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[test]
fn story_passwords_of_postgres_are_changed_across_a_restart_of_the_agent_and_are_nowhere_afterwards() {
    let mut stage = TwoHosts::start(Ship::Slot, Via::Peer);
    let hba = stage.source.data_dir.join("pg_hba.conf");
    let rules = fs::read_to_string(&hba).unwrap();
    fs::write(&hba, format!("host all app,clerk 127.0.0.1/32 password\n{rules}")).unwrap();
    stage.source.own(&hba);
    stage.source.sql(&format!("CREATE ROLE app LOGIN PASSWORD '{OLD}'"));
    stage.source.sql(&format!("CREATE ROLE clerk LOGIN PASSWORD '{OLD}'"));
    // What comes along with the data and would have the server write down every statement.
    stage.source.sql(&format!("ALTER ROLE \"{}\" SET log_statement = 'all'", stage.source.role));
    stage.source.sql("ALTER DATABASE postgres SET log_min_duration_statement = 0");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let file = password_file(&stage.lab, "new-password", NEW);
    let typed = format!("app={file}");

    // The agent is killed as soon as it has taken the order, whatever it is doing then.
    let port = free_port();
    let port_text = port.to_string();
    let order = ["clone", "orders", "--to", "b", "--as", "copy", "--port", &port_text, "--hold", "--detach"];
    let id = stage.a.keiki_ok(&[&order[..], &["--password", &typed]].concat()).trim().to_string();
    stage.b.kill_agent();
    stage.b.start_agent();
    let job = wait_until_ended(&stage.b, &id);
    assert_eq!(job["state"], "held", "{job:#}\n{}", stage.b.log());
    assert_eq!(job["task"]["passwords_for"][0], "app");
    assert!(job["results"].to_string().contains("password of 'app'"), "{job:#}");
    let kept = kept_passwords(&stage.b);
    assert_eq!(kept.len(), 1);
    assert_eq!(fs::metadata(&kept[0]).unwrap().permissions().mode() & 0o777, 0o600);
    assert_nowhere(&stage.lab, NEW, &[&file, kept[0].to_str().unwrap()]);
    stage.b.keiki_ok(&["accept", "copy"]);
    wait_until_state(&stage.b, "copy", "archiving");
    assert_eq!(kept_passwords(&stage.b), Vec::<std::path::PathBuf>::new());
    assert_eq!(log_in(&stage, port, "app", NEW), Ok("1".to_string()));
    assert!(log_in(&stage, port, "app", OLD).unwrap_err().contains("password authentication failed"));
    // Whom nobody named keeps what it had; and so does the source.
    assert_eq!(log_in(&stage, port, "clerk", OLD), Ok("1".to_string()));
    assert_eq!(
        sql_at(&stage.source, port, "SELECT left(rolpassword, 13) FROM pg_authid WHERE rolname = 'app'"),
        "SCRAM-SHA-256"
    );
    assert_eq!(log_in(&stage, stage.source.port, "app", OLD), Ok("1".to_string()));
    assert_nowhere(&stage.lab, NEW, &[&file]);

    // A name that is not there: the clone is not handed over, and nothing of it stays.
    let said =
        stage.a.keiki_fails(&["clone", "orders", "--to", "b", "--as", "other", "--password", &format!("ap={file}")]);
    assert!(said.contains("cannot change the password of 'ap': there is no such role"), "{said}");
    assert!(said.contains("hint: the nearest names are 'app'"), "{said}");
    assert!(!stage.clone_dir("other").exists());
    assert_eq!(kept_passwords(&stage.b).len(), 1, "a failed job may be resumed");
    let failed = stage.b.json(&["job", "list"])[0]["id"].as_str().unwrap().to_string();
    stage.b.keiki_ok(&["job", "cancel", &failed]);
    wait_until_ended(&stage.b, &failed);
    assert_eq!(kept_passwords(&stage.b), Vec::<std::path::PathBuf>::new());
    assert_nowhere(&stage.lab, NEW, &[&file]);
}

#[tokio::test(flavor = "multi_thread")]
async fn story_passwords_of_mariadb_are_changed_for_every_host_of_a_user_with_the_plugin_it_has() {
    let source = MariaServer::start(&[]);
    let clones = format!("[clone.mariadb]\nrun_as = \"{}\"\n", server_user().name);
    let statements = [
        format!(
            "CREATE USER app@'10.0.0.%' IDENTIFIED VIA mysql_native_password USING PASSWORD('{OLD}') OR unix_socket"
        ),
        "CREATE USER app@'h3' IDENTIFIED VIA unix_socket".to_string(),
        "CREATE ROLE app_role".to_string(),
    ];
    let stage = SqlAccounts {
        endpoint: source.endpoint(),
        sections: clones + &source.instance_section("orders", "ship_every = \"1s\""),
        bin_dir: Path::new("/usr/bin"),
        statements: &statements,
        unchanged: "not from 'h3' (unix_socket)",
        strangers: &[("ap", "the nearest names are 'app'"), ("app_role", "'app'")],
    };
    stage.change_passwords().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn story_passwords_of_mysql_are_changed_for_every_host_of_a_user_with_the_plugin_it_has() {
    let source = MySqlServer::start(&[]).await;
    let statements = [
        format!("CREATE USER app@'10.0.0.%' IDENTIFIED WITH caching_sha2_password BY '{OLD}'"),
        "INSTALL PLUGIN auth_socket SONAME 'auth_socket.so'".to_string(),
        "CREATE USER app@'h3' IDENTIFIED WITH auth_socket".to_string(),
    ];
    let stage = SqlAccounts {
        endpoint: source.endpoint(),
        sections: MySqlServer::clone_section() + &source.instance_section("orders"),
        bin_dir: &mysql::bin_dir(),
        statements: &statements,
        unchanged: "not from 'h3' (auth_socket)",
        strangers: &[("ap", "the nearest names are 'app'")],
    };
    stage.change_passwords().await;
}

/// A server of the MySQL family whose user `app` comes in from several hosts.
struct SqlAccounts<'a> {
    endpoint: Endpoint,
    /// Of a host with the server as instance `orders` and with clones of it.
    sections: String,
    bin_dir: &'a Path,
    /// What makes the accounts of `app` at `10.0.0.%`, and of `h3`, which has no password.
    statements: &'a [String],
    /// What is said about the latter.
    unchanged: &'a str,
    /// Names that no user has, with a part of what is said of them.
    strangers: &'a [(&'a str, &'a str)],
}

impl SqlAccounts<'_> {
    async fn change_passwords(&self) {
        let lab = Lab::new();
        fs::create_dir(lab.path("repository")).unwrap();
        let options = HostOptions {
            name: "a",
            repository: format!("file://{}", lab.path("repository").display()),
            peers: vec![],
            sections: self.sections.clone(),
            listen_port: free_port(),
            clone_bin_dir: self.bin_dir,
        };
        let host = Host::start(&lab, &options);
        host.keiki_ok(&["repository", "init"]);
        wait_until_state(&host, "orders", "archiving");
        let session = Session::open(&self.endpoint).await.unwrap();
        let everywhere = ["app@'%'", "app@localhost", "clerk@localhost"]
            .map(|user| format!("CREATE USER {user} IDENTIFIED BY '{OLD}'"));
        for sql in everywhere.iter().chain(self.statements) {
            session.execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
        host.keiki_ok(&["backup", "create", "orders"]);
        let file = password_file(&lab, "new-password", NEW);
        let typed = format!("app={file}");
        let port = free_port().to_string();
        host.keiki_ok(&["clone", "orders", "--as", "copy", "--port", &port, "--password", &typed]);
        let jobs = host.json(&["job", "list"]);
        let job = jobs.as_array().unwrap().iter().find(|job| job["task"]["kind"] == "clone").unwrap();
        let said = job["results"].to_string();
        for part in ["changed, from '%', '10.0.0.%', 'localhost'", self.unchanged] {
            assert!(said.contains(part), "'{part}' is not in {said}");
        }
        let socket = lab.path("clones-a/copy.run/mysqld.sock");
        let open = async |user: &str, password: &str| {
            let endpoint = Endpoint {
                socket: socket.clone(),
                user: user.to_string(),
                password: Some(password.to_string()),
                run_as: server_user().name,
            };
            Session::open(&endpoint).await.map(|_| ())
        };
        open("app", NEW).await.unwrap();
        assert!(open("app", OLD).await.unwrap_err().message().contains("Access denied"));
        open("clerk", OLD).await.unwrap();
        assert_nowhere(&lab, NEW, &[&file]);
        for (name, expected) in self.strangers {
            let typed = format!("{name}={file}");
            let said = host.keiki_fails(&["clone", "orders", "--as", "other", "--password", &typed]);
            assert!(said.contains(&format!("'{name}': there is no such user")) && said.contains(expected), "{said}");
        }
        host.keiki_ok(&["discard", "copy", "--yes"]);
    }
}

#[test]
fn story_passwords_of_redis_are_changed_and_unknown_users_refused_before_anything_starts() {
    let source = TestRedis::start(&[]);
    source.run(&["ACL", "SETUSER", "app", "on", &format!(">{OLD}"), "~cart:*", "+get", "+set", "+auth"]);
    source.run(&["ACL", "SETUSER", "clerk", "on", &format!(">{OLD}"), "~*", "+get", "+auth"]);
    source.run(&["SET", "cart:1", "apple"]);
    let stage = RedisStage::start(source, "");
    stage.a.keiki_ok(&["backup", "create", "cart"]);
    let file = password_file(&stage.lab, "new-password", NEW);
    let (app, everybody) = (format!("app={file}"), format!("default={file}"));
    stage.a.keiki_ok(&["clone", "cart", "--to", "b", "--as", "copy", "--password", &app, "--password", &everybody]);
    wait_until_state(&stage.b, "copy", "archiving");
    let mut client = stage.client_of("copy");
    let mut log_in = |user: &str, password: &str| client.ask(&[b"AUTH", user.as_bytes(), password.as_bytes()]);
    for user in ["app", "default"] {
        assert!(matches!(log_in(user, OLD), Answer::Error(said) if said.starts_with("WRONGPASS")), "{user}");
        assert_eq!(log_in(user, NEW), Answer::text("OK"), "{user}");
    }
    assert_eq!(log_in("clerk", OLD), Answer::text("OK"));
    assert_eq!(log_in("app", NEW), Answer::text("OK"));
    assert_eq!(client.ask(&[b"GET", b"cart:1"]), Answer::text("apple"));
    assert!(matches!(client.ask(&[b"GET", b"other"]), Answer::Error(said) if said.starts_with("NOPERM")));
    let mut stranger = stage.client_of("copy");
    assert!(matches!(stranger.ask(&[b"GET", b"cart:1"]), Answer::Error(said) if said.starts_with("NOAUTH")));
    assert_nowhere(&stage.lab, NEW, &[&file]);

    let typed = format!("clark={file}");
    let said = stage.a.keiki_fails(&["clone", "cart", "--to", "b", "--as", "other", "--password", &typed]);
    assert!(said.contains("'clark': there is no such user") && said.contains("'clerk'"), "{said}");
    assert!(!stage.clone_dir("other").exists());
    stage.b.keiki_ok(&["discard", "copy", "--yes"]);
}
