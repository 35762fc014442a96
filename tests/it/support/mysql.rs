//! A private MySQL server for a test: made by `mysqld --initialize-insecure` in a temporary directory, reachable on a unix
//! socket only, and gone when the value is dropped, however the test ends.
//!
//! It runs as the user that test servers of PostgreSQL run as; `root` has no password, and the agent has an account of
//! its own with the rights that the documentation names. A server that a test needs and cannot find is a failure with
//! the command that installs it.

// Not every test uses all of it.
#![allow(dead_code)]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use keiki::base::users::User;
use keiki::engine::mysql::MySqlSource;
use keiki::engine::mysql::product::Product;
use keiki::engine::mysql::session::{Endpoint, Rows, Session};

use super::mariadb::{as_user, own};
use super::postgres::{end_cleanly, server_user, spawn_that_dies_with_us, tail, wait_until};

/// The agent's account on every server.
pub const AGENT: &str = "keiki";
const AGENT_PASSWORD: &str = "it's \\ a secret";
/// As `config/keiki.toml` names them.
const AGENT_RIGHTS: &str = "SELECT, PROCESS, REPLICATION CLIENT, BACKUP_ADMIN";

/// A running server.
pub struct MySqlServer {
    pub work_dir: PathBuf,
    pub data_dir: PathBuf,
    pub socket: PathBuf,
    pub user: User,
    pub password_file: PathBuf,
    pub arguments: Vec<String>,
    program: PathBuf,
    child: Option<Child>,
    _root: tempfile::TempDir,
}

/// The directory of the server's program, or a failure that says how to get it.
pub fn bin_dir() -> PathBuf {
    let root = std::env::var_os("KEIKI_TEST_MYSQL9_ROOT").map(PathBuf::from);
    let directory =
        root.unwrap_or_else(|| panic!("KEIKI_TEST_MYSQL9_ROOT is not set: run 'make install-test-servers'"));
    let directory = directory.join("usr/sbin");
    assert!(directory.join("mysqld").is_file(), "no 'mysqld' in {directory:?}: run 'make install-test-servers'");
    directory
}

/// One of the server's client programs.
pub fn program(name: &str) -> PathBuf {
    let path = bin_dir().with_file_name("bin").join(name);
    assert!(path.is_file(), "no program {path:?}: run 'make install-test-servers'");
    path
}

impl MySqlServer {
    /// Makes and starts a server with GTIDs, the clone plugin and the agent's account; `arguments` come after the usual
    /// ones.
    pub async fn start(arguments: &[&str]) -> MySqlServer {
        let arguments: Vec<String> = arguments.iter().map(|argument| argument.to_string()).collect();
        MySqlServer::prepare(&arguments).start_first().await
    }

    /// The same with a keyring, which `binlog_encryption` needs: the server looks for what says so beside its program,
    /// and in the directory of its plugins (MySQL manual, "Keyring Component Installation").
    pub async fn start_with_keyring(arguments: &[&str]) -> MySqlServer {
        let arguments: Vec<String> = arguments.iter().map(|argument| argument.to_string()).collect();
        let mut server = MySqlServer::prepare(&arguments);
        let usr = bin_dir().parent().unwrap().to_path_buf();
        let programs = server.work_dir.join("programs");
        std::fs::create_dir(&programs).unwrap();
        let link = |from: PathBuf| std::os::unix::fs::symlink(&from, programs.join(from.file_name().unwrap())).unwrap();
        link(usr.join("sbin/mysqld"));
        for plugin in ["mysql_clone.so", "component_keyring_file.so"] {
            link(usr.join("lib/mysql/plugin").join(plugin));
        }
        let keyring = server.work_dir.join("keyring");
        let config = format!("{{\"path\": \"{}\", \"read_only\": false}}", keyring.display());
        std::fs::write(programs.join("component_keyring_file.cnf"), config).unwrap();
        std::fs::write(programs.join("mysqld.my"), "{\"components\": \"file://component_keyring_file\"}").unwrap();
        server.program = programs.join("mysqld");
        server.arguments.push(format!("--basedir={}", usr.display()));
        server.arguments.push(format!("--plugin-dir={}", programs.display()));
        server.start_first().await
    }

    /// Makes the tables, starts the server and makes the agent's account.
    async fn start_first(self) -> MySqlServer {
        let mut server = self;
        let mut install = Command::new(&server.program);
        install.args(["--no-defaults", "--initialize-insecure", "--secure-file-priv=NULL"]);
        // Those that say how tables are laid out, and where the server's own files are.
        let is_layout = |argument: &&String| {
            ["--lower-case-table-names", "--basedir", "--plugin-dir"].iter().any(|name| argument.starts_with(name))
        };
        install.args(server.arguments.iter().filter(is_layout));
        install.arg(format!("--datadir={}", server.data_dir.display()));
        install.arg(format!("--tmpdir={}", server.work_dir.display()));
        as_user(&mut install, &server.user);
        let output = install.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        server.launch();
        let quoted = keiki::engine::mysql::session::quoted(AGENT_PASSWORD);
        for sql in [
            "INSTALL PLUGIN clone SONAME 'mysql_clone.so'".to_string(),
            format!("CREATE USER {AGENT}@localhost IDENTIFIED WITH caching_sha2_password BY {quoted}"),
            format!("GRANT {AGENT_RIGHTS} ON *.* TO {AGENT}@localhost"),
        ] {
            server.sql(&sql).await;
        }
        server
    }

    /// Directories for a server, without tables and nothing started: a test puts files into `data_dir` and calls
    /// `launch`.
    pub fn prepare(arguments: &[String]) -> MySqlServer {
        let root = tempfile::Builder::new().prefix("keiki-my").tempdir().unwrap();
        std::fs::set_permissions(root.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let user = server_user();
        let work_dir = root.path().join("w");
        let data_dir = work_dir.join("data");
        for path in [&work_dir, &data_dir] {
            std::fs::create_dir(path).unwrap();
            own(path, &user);
        }
        let password_file = root.path().join("password");
        std::fs::write(&password_file, format!("{AGENT_PASSWORD}\n")).unwrap();
        let (socket, arguments) = (work_dir.join("s"), arguments.to_vec());
        let program = bin_dir().join("mysqld");
        MySqlServer { work_dir, data_dir, socket, user, password_file, arguments, program, child: None, _root: root }
    }

    /// Starts the server again.
    pub fn launch(&mut self) {
        let log = self.work_dir.join("log");
        let mut command = Command::new(&self.program);
        command
            .args(["--no-defaults", "--skip-networking", "--mysqlx=OFF", "--secure-file-priv=NULL", "--server-id=5"])
            .args(["--log-bin=binlog", "--gtid-mode=ON", "--enforce-gtid-consistency=ON", "--sync-binlog=1"])
            .args(["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=1"])
            .arg(format!("--datadir={}", self.data_dir.display()))
            .arg(format!("--tmpdir={}", self.work_dir.display()))
            .arg(format!("--socket={}", self.socket.display()))
            .arg(format!("--pid-file={}", self.work_dir.join("pid").display()))
            .arg(format!("--log-error={}", log.display()))
            .args(&self.arguments)
            .current_dir(&self.data_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        as_user(&mut command, &self.user);
        self.child = Some(spawn_that_dies_with_us(command));
        wait_until("MySQL listens", || {
            let child = self.child.as_mut().unwrap();
            if let Some(status) = child.try_wait().unwrap() {
                panic!("MySQL ended with {status}: {}", std::fs::read_to_string(&log).unwrap_or_default());
            }
            std::os::unix::net::UnixStream::connect(&self.socket).ok()
        });
    }

    /// What the configuration would say about it.
    pub fn source(&self, name: &str) -> MySqlSource {
        MySqlSource {
            product: Product::MySql,
            name: name.to_string(),
            data_dir: self.data_dir.clone(),
            socket: self.socket.clone(),
            user: AGENT.to_string(),
            password_file: Some(self.password_file.clone()),
            run_as: self.user.name.clone(),
            bin_dir: None,
            backup_dir: None,
            purge_shipped: false,
        }
    }

    /// Where the server puts a copy of itself unless the configuration says otherwise.
    pub fn backup_dir(&self) -> PathBuf {
        self.work_dir.join("data.keiki")
    }

    /// Copies of itself that lie there.
    pub fn copies(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.backup_dir()).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }

    /// The section that makes it an instance of a host.
    pub fn instance_section(&self, name: &str) -> String {
        format!(
            "[[instance]]\nname = \"{name}\"\nengine = \"mysql\"\ndata_dir = \"{}\"\nsocket = \"{}\"\nuser = \"{AGENT}\"\n\
             password_file = \"{}\"\nrun_as = \"{}\"\nship_every = \"1s\"\n",
            self.data_dir.display(),
            self.socket.display(),
            self.password_file.display(),
            self.user.name
        )
    }

    /// The section that says what clones of MySQL get on a host.
    pub fn clone_section() -> String {
        format!("[clone.mysql]\nrun_as = \"{}\"\nbin_dir = \"{}\"\n", server_user().name, bin_dir().display())
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint {
            socket: self.socket.clone(),
            user: "root".to_string(),
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

    /// The path of a file of its log.
    pub fn log_file(&self, number: u64) -> PathBuf {
        self.data_dir.join(format!("binlog.{number:06}"))
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

impl Drop for MySqlServer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.work_dir.join("log")).unwrap_or_default();
            eprintln!("last words of MySQL:\n{}", tail(&log));
        }
        self.kill9();
    }
}
