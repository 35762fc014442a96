//! The usual stage of a story: host a with a server whose log goes into a directory, host b for clones, and the
//! comparison that says whether a copy is exact. The server is any row of the matrix; where a story is about PostgreSQL
//! alone it is that.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::hosts::{Host, HostOptions, KEIKI, Lab, fingerprint, free_port, instance_section, wait_for};
use super::matrix::{CloneAt, Contents, SourceServer};
use super::postgres::{ServerOptions, TestServer, Version};

/// How long anything may take that ought to happen soon.
pub const SOON: Duration = Duration::from_secs(60);

/// How the log leaves the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ship {
    ArchiveCommand,
    Slot,
}

/// How host b reaches the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// It has no access of its own and goes through host a.
    Peer,
    /// It sees the same directory, or the same bucket.
    Directory,
}

/// See the module. A value of each thing that a story may want to stop, start or break.
pub struct TwoHosts<S = TestServer> {
    pub a: Host,
    pub b: Host,
    pub source: S,
    pub repository: PathBuf,
    // Dropped last: everything lies in it.
    pub lab: Lab,
}

impl TwoHosts {
    /// A source of version 15 with segments of 1 MiB, so that there are many of them; both agents run and the log is
    /// being shipped.
    pub fn start(ship: Ship, via: Via) -> TwoHosts {
        let lab = Lab::new();
        let repository = lab.path("repository");
        fs::create_dir(&repository).unwrap();
        let url = format!("file://{}", repository.display());
        TwoHosts::start_in(lab, ship, via, &url)
    }

    /// The same with a repository for which these are the lines of the section `[repository]`.
    pub fn start_on(ship: Ship, via: Via, repository_lines: &str) -> TwoHosts {
        TwoHosts::start_in(Lab::new(), ship, via, repository_lines)
    }

    fn start_in(lab: Lab, ship: Ship, via: Via, url: &str) -> TwoHosts {
        let mut options = ServerOptions::new(Version::V15).initdb("--wal-segsize=1");
        let ship_text = match ship {
            Ship::ArchiveCommand => {
                let socket = lab.path("host-a/keiki.sock");
                let command = format!("'{KEIKI}' --socket '{}' wal-push %p", socket.display());
                options = options.set("archive_mode", "on").set("archive_command", &command);
                "archive_command"
            }
            Ship::Slot => "slot",
        };
        let source = options.start();
        let section = instance_section("orders", &source, &format!("ship = \"{ship_text}\"\nship_every = \"1s\""));
        TwoHosts::around(lab, source, &section, via, url)
    }
}

impl<S: SourceServer> TwoHosts<S> {
    /// A source that is the row of the matrix; both agents run and the log is being shipped.
    pub fn of(via: Via) -> TwoHosts<S> {
        let lab = Lab::new();
        let repository = lab.path("repository");
        fs::create_dir(&repository).unwrap();
        let source = S::start(&lab);
        let section = source.instance_section("orders");
        TwoHosts::around(lab, source, &section, via, &format!("file://{}", repository.display()))
    }

    fn around(lab: Lab, source: S, instance: &str, via: Via, url: &str) -> TwoHosts<S> {
        let (port_a, port_b) = (free_port(), free_port());
        let bin_dir = source.bin_dir();
        let host = |name, repository: &str, peer, sections, listen_port| {
            let repository = repository.to_string();
            let peers = vec![peer];
            HostOptions { name, repository, peers, sections, listen_port, clone_bin_dir: &bin_dir }
        };
        let clones = source.clone_sections();
        let a = Host::start(&lab, &host("a", url, ("b", port_b), format!("{clones}{instance}"), port_a));
        a.keiki_ok(&["repository", "init"]);
        let url_b = if via == Via::Peer { "peer://a" } else { url };
        let b = Host::start(&lab, &host("b", url_b, ("a", port_a), clones, port_b));
        let stage = TwoHosts { a, b, source, repository: lab.path("repository"), lab };
        stage.wait_until_archiving();
        stage
    }

    pub fn wait_until_archiving(&self) {
        wait_until_state(&self.a, "orders", "archiving");
    }

    /// Waits until the repository has everything that the server has written.
    pub fn wait_until_shipped(&self) {
        wait_until_shipped(&self.a, "orders");
    }

    /// Where a clone of host b lies if nobody says otherwise.
    pub fn clone_dir(&self, name: &str) -> PathBuf {
        self.lab.path("clones-b").join(name)
    }

    /// A clone of host b with this name and port.
    pub fn clone_at(&self, name: &str, port: u16) -> CloneAt {
        let data_dir = self.clone_dir(name);
        CloneAt { run_dir: data_dir.with_extension("run"), data_dir, port }
    }

    /// The directory of an instance's incarnation in the repository.
    pub fn incarnation_dir(&self, host: &Host, name: &str) -> PathBuf {
        let incarnation = host.instance(name)["incarnation"].as_str().expect("an incarnation").to_string();
        let dir = self.repository.join("incarnations").join(incarnation);
        assert!(dir.is_dir(), "'{}' is not there", dir.display());
        dir
    }

    /// Clones everything that is committed now to host b, compares it with the source, and deletes the clone.
    ///
    /// Nobody may write to the source meanwhile.
    pub fn assert_latest_is_exact(&self, name: &str) {
        let port = free_port();
        let arguments = ["clone", "orders", "--to", "b", "--as", name, "--port", &port.to_string(), "--latest"];
        self.a.keiki_ok(&arguments);
        self.assert_clone_is_exact(&self.clone_at(name, port));
        self.b.keiki_ok(&["discard", name, "--yes"]);
        assert!(!self.clone_dir(name).exists(), "a discarded clone left its directory");
    }

    /// Compares a running clone with the source, on which nobody may write meanwhile.
    pub fn assert_clone_is_exact(&self, clone: &CloneAt) {
        let wanted = self.source.contents();
        assert!(!wanted.is_empty(), "a comparison of nothing proves nothing");
        assert_eq!(
            difference(&self.source.contents_of(clone), &wanted),
            Vec::<String>::new(),
            "the clone is not exact"
        );
        // It can be written to: a clone is not a replica. That a difference is seen is seen here, too.
        self.source.write_to(clone);
        assert_ne!(self.source.contents_of(clone), wanted, "what was written to the clone is not there");
    }
}

/// What is not the same in two contents; at most the first ten.
pub fn difference(found: &Contents, wanted: &Contents) -> Vec<String> {
    let keys: std::collections::BTreeSet<_> = found.keys().chain(wanted.keys()).collect();
    let differ = keys.into_iter().filter(|key| found.get(*key) != wanted.get(*key));
    differ.map(|key| format!("'{key}' is {:?} and not {:?}", found.get(key), wanted.get(key))).take(10).collect()
}

/// What psql prints for a server on loopback; `programs` is any server of the same machine, for its psql and role.
pub fn sql_at(programs: &TestServer, port: u16, sql: &str) -> String {
    try_sql_at(programs, port, sql).unwrap_or_else(|error| panic!("{sql} on port {port}: {error}"))
}

/// The same; the error is what psql complains about.
pub fn try_sql_at(programs: &TestServer, port: u16, sql: &str) -> Result<String, String> {
    let mut command = programs.command("psql");
    command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", &programs.role, "-d", "postgres"]);
    command.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-c", sql]).stdin(Stdio::null());
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_string();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// All rows of all tables of users, as one number of rows and one sum of hashes for each table.
pub fn contents(programs: &TestServer, port: u16) -> BTreeMap<String, String> {
    let tables = sql_at(
        programs,
        port,
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1",
    );
    tables
        .lines()
        .map(|table| {
            let query = format!("SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)), 0) FROM {table} t");
            (table.to_string(), sql_at(programs, port, &query))
        })
        .collect()
}

pub fn wait_until_state(host: &Host, instance: &str, state: &str) {
    let mut last = Value::Null;
    let reached = (0..1200).any(|_| {
        last = host.instance(instance);
        let reached = last["state"] == state;
        if !reached {
            std::thread::sleep(Duration::from_millis(50));
        }
        reached
    });
    assert!(reached, "'{instance}' is not '{state}' but {last:#}\n--- agent\n{}", host.log());
}

/// Waits until nothing of an instance's log is missing in the repository.
pub fn wait_until_shipped(host: &Host, instance: &str) {
    let mut last = Value::Null;
    // What waits is told as of the last look, which may lie before what the caller has written.
    let asked_at = jiff::Timestamp::now();
    let shipped = (0..1200).any(|_| {
        last = host.instance(instance);
        let looked_at = last["durable_at"].as_str().and_then(|at| at.parse::<jiff::Timestamp>().ok());
        let shipped = last["state"] == "archiving"
            && last["backlog_bytes"] == 0
            && looked_at.is_some_and(|looked_at| looked_at >= asked_at);
        if !shipped {
            std::thread::sleep(Duration::from_millis(50));
        }
        shipped
    });
    assert!(shipped, "'{instance}' is not shipped: {last:#}\n--- agent\n{}", host.log());
}

/// A job as its host's agent knows it.
pub fn job(host: &Host, id: &str) -> Value {
    host.json(&["job", "show", id])
}

/// The step of a job with this name.
pub fn step<'a>(job: &'a Value, name: &str) -> &'a Value {
    let steps = job["steps"].as_array().expect("a job has steps");
    steps.iter().find(|step| step["name"] == name).unwrap_or_else(|| panic!("no step '{name}' in {job:#}"))
}

/// Waits until a job goes no further by itself.
pub fn wait_until_ended(host: &Host, id: &str) -> Value {
    let began = Instant::now();
    loop {
        let job = job(host, id);
        if job["state"] != "running" {
            return job;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "it does not end: {job:#}\n--- agent\n{}", host.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What lies below a directory now, without what is rewritten all the time: the lease, which is renewed, and files of
/// stores that are not finished.
pub fn lasting_objects(dir: &Path) -> BTreeMap<PathBuf, blake3::Hash> {
    fingerprint(dir).into_iter().filter(|(path, _)| !path.ends_with("lease.json")).collect()
}

/// The same once it no longer changes.
pub fn settled_objects(dir: &Path) -> BTreeMap<PathBuf, blake3::Hash> {
    let mut before = lasting_objects(dir);
    let mut quiet_rounds = 0;
    wait_for("the archive to come to rest", SOON, || {
        let now = lasting_objects(dir);
        quiet_rounds = if now == before { quiet_rounds + 1 } else { 0 };
        before = now;
        // A round lasts at least 50 ms and the open file is shipped each second.
        quiet_rounds >= 60
    });
    before
}

/// Every process whose working directory is this directory: the postmaster of a data directory and its children.
pub fn processes_in(dir: &Path) -> Vec<u32> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let ids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    ids.filter(|id| fs::read_link(format!("/proc/{id}/cwd")).is_ok_and(|cwd| cwd.starts_with(dir))).collect()
}

/// Copies the data directory of a server that does not run into that of another.
pub fn copy_data_dir(from: &TestServer, to: &TestServer) {
    let source = from.data_dir.join(".");
    let mut command = std::process::Command::new("cp");
    command.arg("-a").arg(source).arg(&to.data_dir).process_group(0);
    assert!(command.status().unwrap().success());
    to.own(&to.data_dir);
}
