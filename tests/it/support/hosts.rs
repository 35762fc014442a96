//! Hosts for tests: an agent each, with certificates of one authority, a configuration file and a control socket of
//! their own, all below one temporary directory and on loopback.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::postgres::{TestServer, server_user};

/// The binary under test.
pub const KEIKI: &str = env!("CARGO_BIN_EXE_keiki");

/// A temporary directory in which everything of one test lies; other users can pass through it.
pub struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    pub fn new() -> Lab {
        let dir = tempfile::Builder::new().prefix("keiki-lab-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let lab = Lab { dir };
        lab.keiki_without_agent(&["ca", "init", lab.path("ca").to_str().unwrap()]);
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `keiki` for something that needs no agent and expects it to succeed.
    pub fn keiki_without_agent(&self, arguments: &[&str]) -> String {
        let output = Command::new(KEIKI).args(arguments).output().unwrap();
        assert!(output.status.success(), "keiki {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A directory that the user who runs the servers owns.
    pub fn directory_of_server_user(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        let user = server_user();
        std::os::unix::fs::chown(&path, Some(user.uid), Some(user.gid)).unwrap();
        path
    }
}

impl Drop for Lab {
    /// Servers of clones that a test left running go with the lab.
    fn drop(&mut self) {
        for process in super::two_hosts::processes_in(self.dir.path()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(process as i32), nix::sys::signal::SIGKILL);
        }
    }
}

/// A free port on loopback. Another process may take it before it is used; tests that fail for that say so.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What a host of a test is like; the rest is the same for all.
pub struct HostOptions<'a> {
    pub name: &'a str,
    /// `file://…` or `peer://…`, or the lines of the section `[repository]`.
    pub repository: String,
    /// Names and addresses of the other hosts.
    pub peers: Vec<(&'a str, u16)>,
    /// Further sections: instances and whatever the test is about.
    pub sections: String,
    pub listen_port: u16,
    /// The programs of the servers that clones on this host run.
    pub clone_bin_dir: &'a Path,
}

/// A host with a running agent, which is killed when this is dropped.
pub struct Host {
    pub name: String,
    pub dir: PathBuf,
    pub config: PathBuf,
    /// What the agent has in its environment beside what this process has.
    pub environment: Vec<(String, String)>,
    agent: Option<Child>,
}

impl Host {
    /// Writes certificates and configuration below the lab and starts the agent.
    pub fn start(lab: &Lab, options: &HostOptions) -> Host {
        let mut host = Host::prepare(lab, options);
        host.start_agent();
        host
    }

    /// The same without starting the agent.
    pub fn prepare(lab: &Lab, options: &HostOptions) -> Host {
        let dir = lab.path(&format!("host-{}", options.name));
        fs::create_dir_all(&dir).unwrap();
        let ca = lab.path("ca");
        let (ca_text, name) = (ca.to_str().unwrap(), options.name);
        if !ca.join(format!("issued/{name}.pem")).exists() {
            lab.keiki_without_agent(&["ca", "issue", ca_text, "--host", name]);
        }
        let clone_root = lab.directory_of_server_user(&format!("clones-{name}"));
        let peers: String = options
            .peers
            .iter()
            .map(|(peer, port)| format!("[[peer]]\nname = \"{peer}\"\naddress = \"127.0.0.1:{port}\"\n\n"))
            .collect();
        let text = format!(
            "[host]\nname = \"{name}\"\nstate_dir = \"{state}\"\ncontrol_socket = \"{socket}\"\n\n\
             [listen]\naddress = \"127.0.0.1:{listen}\"\n\n\
             [tls]\nca = \"{ca_text}/ca.pem\"\ncertificate = \"{ca_text}/issued/{name}.pem\"\nkey = \"{ca_text}/issued/{name}.key\"\n\n\
             [repository]\n{repository}\n\n{peers}\
             [clone]\ndata_root = \"{clones}\"\nports = \"{from}-{to}\"\nrun_as = \"{user}\"\nbin_dir = \"{bin_dir}\"\nlisten_addresses = \"127.0.0.1\"\n\n\
             [[allow]]\nwho = \"host:*\"\nmay = [\"status\", \"backup\", \"clone\", \"accept\", \"discard\", \"job\", \"ship\", \"read-repository\", \"write-repository\"]\ninstances = [\"*\"]\n\n{sections}",
            state = dir.join("state").display(),
            socket = dir.join("keiki.sock").display(),
            listen = options.listen_port,
            repository = repository_lines(&options.repository),
            clones = clone_root.display(),
            from = 20000 + u32::from(free_port()) % 10000,
            to = 40000,
            user = server_user().name,
            bin_dir = options.clone_bin_dir.display(),
            sections = options.sections,
        );
        let config = dir.join("keiki.toml");
        fs::write(&config, text).unwrap();
        Host { name: name.to_string(), dir, config, environment: Vec::new(), agent: None }
    }

    /// Starts a second agent with the configuration, the certificate and a copy of the state of another one that runs;
    /// only its control socket and its address are its own.
    pub fn start_twin(lab: &Lab, first: &Host, dir_name: &str, listen_port: u16) -> Host {
        Host::start_twin_with(lab, first, dir_name, listen_port, |text| text)
    }

    /// The same with a change of the configuration.
    pub fn start_twin_with(
        lab: &Lab,
        first: &Host,
        dir_name: &str,
        listen_port: u16,
        change: impl FnOnce(String) -> String,
    ) -> Host {
        let dir = lab.path(dir_name);
        fs::create_dir(&dir).unwrap();
        let copied = Command::new("cp").arg("-a").arg(first.dir.join("state")).arg(&dir).status().unwrap();
        assert!(copied.success());
        let text = fs::read_to_string(&first.config).unwrap();
        let (before, rest) = text.split_once("[listen]\naddress = \"127.0.0.1:").unwrap();
        let (_, after) = rest.split_once('"').unwrap();
        let own = format!("{before}[listen]\naddress = \"127.0.0.1:{listen_port}\"{after}")
            .replace(first.dir.to_str().unwrap(), dir.to_str().unwrap());
        let config = dir.join("keiki.toml");
        fs::write(&config, change(own)).unwrap();
        let mut twin = Host { name: first.name.clone(), dir, config, environment: Vec::new(), agent: None };
        twin.start_agent();
        twin
    }

    /// Changes the configuration; the agent reads it when it starts.
    pub fn rewrite_config(&self, change: impl FnOnce(String) -> String) {
        let text = fs::read_to_string(&self.config).unwrap();
        fs::write(&self.config, change(text)).unwrap();
    }

    /// Starts the agent and waits until it answers.
    pub fn start_agent(&mut self) {
        self.spawn_agent();
        wait_for("the agent to answer", Duration::from_secs(20), || {
            self.keiki(&["status", "--json"]).status.code() != Some(8)
        });
    }

    /// Starts the agent and returns at once.
    pub fn spawn_agent(&mut self) {
        assert!(self.agent.is_none());
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("agent.log")).unwrap();
        let child = Command::new(KEIKI)
            .args(["--config", self.config.to_str().unwrap(), "agent"])
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.agent = Some(child);
    }

    pub fn is_running(&self) -> bool {
        self.agent.is_some()
    }

    /// Process id of the running agent.
    pub fn agent_process_id(&self) -> u32 {
        self.agent.as_ref().unwrap().id()
    }

    /// The most memory that the running agent ever had (proc(5), VmHWM).
    pub fn peak_memory_bytes(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.agent_process_id())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a running process");
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
    }

    /// SIGKILL, as a power cut or the out-of-memory killer would do it.
    pub fn kill_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().unwrap();
            agent.wait().unwrap();
        }
    }

    /// SIGTERM, and waits for the end.
    pub fn stop_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(agent.id() as i32), nix::sys::signal::SIGTERM).unwrap();
            let status = agent.wait().unwrap();
            assert!(status.success(), "agent of '{}' ended with {status}: {}", self.name, self.log());
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default()
    }

    /// Runs `keiki` against this host's agent.
    pub fn keiki(&self, arguments: &[&str]) -> Output {
        Command::new(KEIKI).arg("--config").arg(&self.config).args(arguments).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs `keiki`, expects success, returns what it printed.
    pub fn keiki_ok(&self, arguments: &[&str]) -> String {
        let output = self.keiki(arguments);
        assert!(
            output.status.success(),
            "keiki {arguments:?} on '{}' ended with {}:\n{}{}\n--- agent log\n{}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            tail(&self.log(), 40),
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `keiki`, expects a failure, returns what it said.
    pub fn keiki_fails(&self, arguments: &[&str]) -> String {
        let output = self.keiki(arguments);
        assert!(!output.status.success(), "keiki {arguments:?} succeeded: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    }

    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let mut all = vec!["--json"];
        all.extend(arguments);
        serde_json::from_str(&self.keiki_ok(&all)).unwrap()
    }

    /// The status of one instance as JSON; null if there is none of that name.
    pub fn instance(&self, name: &str) -> serde_json::Value {
        let output = self.keiki(&["--json", "status"]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let instances = status["instances"].as_array().cloned().unwrap_or_default();
        instances.into_iter().find(|instance| instance["name"] == name).unwrap_or_default()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill_agent();
    }
}

/// A URL alone is the usual section.
fn repository_lines(repository: &str) -> String {
    match repository.contains('=') {
        true => repository.to_string(),
        false => format!("url = \"{repository}\""),
    }
}

/// The section that makes a test server an instance of a host.
pub fn instance_section(name: &str, server: &TestServer, more: &str) -> String {
    format!(
        "[[instance]]\nname = \"{name}\"\nengine = \"postgres\"\ndata_dir = \"{}\"\nbin_dir = \"{}\"\nsocket_dir = \"{}\"\n\
         port = {}\nrun_as = \"{}\"\nuser = \"{}\"\n{more}\n",
        server.data_dir.display(),
        server.bin_dir.display(),
        server.socket_dir.display(),
        server.port,
        server.run_as,
        server.role,
    )
}

/// Polls until a condition holds; panics with what was waited for when it takes too long.
pub fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < limit, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Whether nothing below a directory changed: names, sizes and contents.
pub fn fingerprint(dir: &Path) -> Vec<(PathBuf, blake3::Hash)> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.push((path.clone(), blake3::hash(&fs::read(&path).unwrap())));
            }
        }
    }
    found.sort_by(|one, other| one.0.cmp(&other.0));
    found
}
