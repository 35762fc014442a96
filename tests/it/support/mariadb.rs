//! A private MariaDB server for a test: made by mariadb-install-db in a temporary directory, reachable on a unix socket
//! only, and gone when the value is dropped, however the test ends.
//!
//! It runs as the user that test servers of PostgreSQL run as; the account of that name comes in by unix_socket. A
//! server that a test needs and cannot find is a failure with the command that installs it.

// Not every test uses all of it.
#![allow(dead_code)]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use keiki::base::users::User;
use keiki::engine::mysql::MySqlSource;
use keiki::engine::mysql::product::Product;
use keiki::engine::mysql::session::{Endpoint, Rows, Session};

use super::postgres::{end_cleanly, server_user, spawn_that_dies_with_us, tail, wait_until};

/// The servers that tests know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// As Debian 12 has it.
    V10_11,
    /// In a root of its own.
    V11_8,
}

impl Release {
    /// The root below which Debian's packages were unpacked, unless they are installed.
    fn root(self) -> Option<PathBuf> {
        match self {
            Release::V10_11 => None,
            Release::V11_8 => {
                let root = std::env::var_os("KEIKI_TEST_MARIADB11_ROOT").map(PathBuf::from);
                Some(root.expect("KEIKI_TEST_MARIADB11_ROOT is not set: run 'make install-test-servers'"))
            }
        }
    }

    /// The directory that its server's program lies in.
    pub fn bin_dir(self) -> PathBuf {
        self.program("mariadbd").parent().unwrap().to_path_buf()
    }

    /// The program's path, or a failure that says how to get it.
    pub fn program(self, name: &str) -> PathBuf {
        let directories = match (self.root(), std::env::var_os("KEIKI_TEST_MARIADB_BIN")) {
            (Some(root), _) => vec![root.join("usr/sbin"), root.join("usr/bin")],
            (None, Some(set)) => vec![PathBuf::from(set)],
            (None, None) => vec![PathBuf::from("/usr/sbin"), PathBuf::from("/usr/bin")],
        };
        let found = directories.iter().map(|directory| directory.join(name)).find(|path| path.is_file());
        found.unwrap_or_else(|| panic!("no '{name}' in {directories:?}: run 'make install-test-servers'"))
    }

    /// A command of this release that finds its own messages and plugins.
    fn server_command(self, name: &str) -> Command {
        self.server_command_with(name, "--no-defaults")
    }

    /// The same with the option file that the first argument names.
    fn server_command_with(self, name: &str, defaults: &str) -> Command {
        let mut command = Command::new(self.program(name));
        command.arg(defaults);
        if let Some(root) = self.root() {
            command.arg(format!("--basedir={}", root.join("usr").display()));
        }
        command
    }
}

/// A running server.
pub struct MariaServer {
    pub release: Release,
    pub work_dir: PathBuf,
    pub data_dir: PathBuf,
    pub socket: PathBuf,
    pub user: User,
    pub arguments: Vec<String>,
    child: Option<Child>,
    _root: tempfile::TempDir,
}

/// A program of the installed release.
pub fn program(name: &str) -> PathBuf {
    Release::V10_11.program(name)
}

impl MariaServer {
    /// Makes and starts a server that writes a binary log; `arguments` come after the usual ones.
    pub fn start(arguments: &[&str]) -> MariaServer {
        MariaServer::start_release(Release::V10_11, arguments)
    }

    /// The same of any release.
    pub fn start_release(release: Release, arguments: &[&str]) -> MariaServer {
        let arguments: Vec<String> = arguments.iter().map(|argument| argument.to_string()).collect();
        let mut server = MariaServer::prepare(release, &arguments);
        std::fs::remove_dir(&server.data_dir).unwrap();
        let mut install = release.server_command("mariadb-install-db");
        install.args(["--auth-root-authentication-method=socket", "--skip-test-db"]);
        install.arg(format!("--auth-root-socket-user={}", server.user.name));
        install.arg(format!("--datadir={}", server.data_dir.display()));
        // A server that starts removes the temporary tables of all others from a shared directory.
        install.arg(format!("--tmpdir={}", server.work_dir.display()));
        as_user(&mut install, &server.user);
        let output = install.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        server.launch();
        server
    }

    /// Directories for a server, without tables and nothing started: a test puts files into `data_dir` and calls
    /// `launch`.
    pub fn prepare(release: Release, arguments: &[String]) -> MariaServer {
        let root = tempfile::Builder::new().prefix("keiki-mdb").tempdir().unwrap();
        std::fs::set_permissions(root.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let user = server_user();
        let work_dir = root.path().join("w");
        let data_dir = work_dir.join("data");
        for path in [&work_dir, &data_dir] {
            std::fs::create_dir(path).unwrap();
            own(path, &user);
        }
        let (socket, arguments) = (work_dir.join("s"), arguments.to_vec());
        MariaServer { release, work_dir, data_dir, socket, user, arguments, child: None, _root: root }
    }

    /// Starts the server again.
    pub fn launch(&mut self) {
        let log = self.work_dir.join("log");
        // A server takes this one in front only.
        let is_file = |argument: &&String| argument.starts_with("--defaults-file=");
        let defaults = self.arguments.iter().find(is_file).map_or("--no-defaults", String::as_str);
        let mut command = self.release.server_command_with("mariadbd", defaults);
        command
            .args(["--skip-networking", "--server-id=5", "--log-bin=binlog", "--binlog-format=ROW"])
            .args(["--sync-binlog=1", "--innodb-flush-log-at-trx-commit=1", "--gtid-strict-mode=1"])
            .args(["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=32M"])
            .arg(format!("--datadir={}", self.data_dir.display()))
            .arg(format!("--tmpdir={}", self.work_dir.display()))
            .arg(format!("--socket={}", self.socket.display()))
            .arg(format!("--pid-file={}", self.work_dir.join("pid").display()))
            .arg(format!("--log-error={}", log.display()))
            .args(self.arguments.iter().filter(|argument| !is_file(argument)))
            .current_dir(&self.data_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        as_user(&mut command, &self.user);
        self.child = Some(spawn_that_dies_with_us(command));
        wait_until("MariaDB listens", || {
            let child = self.child.as_mut().unwrap();
            if let Some(status) = child.try_wait().unwrap() {
                panic!("MariaDB ended with {status}: {}", std::fs::read_to_string(&log).unwrap_or_default());
            }
            std::os::unix::net::UnixStream::connect(&self.socket).ok()
        });
    }

    /// What the configuration would say about it.
    pub fn source(&self, name: &str) -> MySqlSource {
        MySqlSource {
            product: Product::MariaDb,
            name: name.to_string(),
            data_dir: self.data_dir.clone(),
            socket: self.socket.clone(),
            user: self.user.name.clone(),
            password_file: None,
            run_as: self.user.name.clone(),
            bin_dir: self.release.root().is_some().then(|| self.release.bin_dir()),
            backup_dir: None,
            purge_shipped: false,
        }
    }

    /// The section that makes it an instance of a host; `more` are further lines.
    pub fn instance_section(&self, name: &str, more: &str) -> String {
        format!(
            "[[instance]]\nname = \"{name}\"\nengine = \"mariadb\"\ndata_dir = \"{}\"\nsocket = \"{}\"\nbin_dir = \"{}\"\n\
             run_as = \"{}\"\n{more}\n",
            self.data_dir.display(),
            self.socket.display(),
            self.release.bin_dir().display(),
            self.user.name,
        )
    }

    /// What a host's configuration says about clones of such servers.
    pub fn clone_section(&self) -> String {
        format!(
            "[clone.mariadb]\nrun_as = \"{}\"\nbin_dir = \"{}\"\n",
            self.user.name,
            self.release.bin_dir().display()
        )
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint {
            socket: self.socket.clone(),
            user: self.user.name.clone(),
            password: None,
            run_as: self.user.name.clone(),
        }
    }

    pub async fn connect(&self) -> Session {
        Session::open(&self.endpoint()).await.unwrap()
    }

    /// Runs one statement.
    pub async fn sql(&self, sql: &str) -> Rows {
        self.connect().await.query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    /// Process id of the running server.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running server").id()
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self) {
        if let Some(child) = self.child.take() {
            end_cleanly(child);
        }
    }

    /// Ends the server as a power cut would end its process.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for MariaServer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.work_dir.join("log")).unwrap_or_default();
            eprintln!("last words of MariaDB:\n{}", tail(&log));
        }
        self.kill9();
    }
}

/// Runs a command as the servers' user, with no other group.
pub fn as_user(command: &mut Command, user: &User) {
    if !user.is_current() {
        command.uid(user.uid).gid(user.gid);
    }
}

pub fn own(path: &Path, user: &User) {
    if !user.is_current() {
        std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid)).unwrap();
    }
}
