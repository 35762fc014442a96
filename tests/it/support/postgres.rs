//! A private PostgreSQL server for a test: made by initdb in a temporary directory, reachable on a unix socket and on
//! loopback, and gone when the value is dropped, however the test ends.
//!
//! Root cannot run PostgreSQL, so the server then runs as `postgres`, or `nobody` where there is no such user; an
//! ordinary user runs it as itself. The superuser role has the name of that user and comes in by peer authentication.
//! A server that a test needs and cannot find is a failure with the command that installs it.

// Not every test uses all of it.
#![allow(dead_code)]

use std::fmt::Write as _;
use std::io::Read as _;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use keiki::base::users::{User, current_user};
use keiki::engine::postgres::{PostgresSource, ShipMode};

/// How long anything may take that ought to happen soon.
const PATIENCE: Duration = Duration::from_secs(90);

/// A major version that tests run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V15,
    V18,
}

impl Version {
    pub const ALL: [Version; 2] = [Version::V15, Version::V18];

    pub fn number(self) -> u32 {
        match self {
            Version::V15 => 15,
            Version::V18 => 18,
        }
    }

    /// Where the programs are: `KEIKI_TEST_PG15_BIN`, `KEIKI_TEST_PG18_BIN`, or Debian's place for 15.
    pub fn bin_dir(self) -> PathBuf {
        let variable = format!("KEIKI_TEST_PG{}_BIN", self.number());
        let found = match (std::env::var_os(&variable), self) {
            (Some(set), _) => Some(PathBuf::from(set)),
            (None, Version::V15) => Some(PathBuf::from("/usr/lib/postgresql/15/bin")),
            (None, Version::V18) => None,
        };
        match found {
            Some(directory) if directory.join("postgres").exists() => directory,
            Some(directory) => {
                panic!("no PostgreSQL {} in '{}': run 'make install-test-servers'", self.number(), directory.display())
            }
            None => panic!("{variable} is not set: run 'make install-test-servers', then 'make test'"),
        }
    }
}

/// The operating system user that servers run as.
pub fn server_user() -> User {
    let me = current_user().expect("the current user");
    if me.uid != 0 {
        return me;
    }
    User::by_name("postgres").or_else(|_| User::by_name("nobody")).expect("a user that is not root")
}

/// Runs `work` again and again until it gives a value; fails with `what` after a long time.
pub fn wait_until<T>(what: &str, mut work: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = work() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What a server is made with.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    pub version: Version,
    /// Lines of postgresql.conf.
    pub settings: Vec<(String, String)>,
    /// Further arguments of initdb, such as `--wal-segsize=1`.
    pub initdb: Vec<String>,
    /// Page checksums, whatever the version's default is.
    pub checksums: bool,
}

impl ServerOptions {
    pub fn new(version: Version) -> ServerOptions {
        ServerOptions { version, settings: Vec::new(), initdb: Vec::new(), checksums: true }
    }

    pub fn set(mut self, name: &str, value: &str) -> ServerOptions {
        self.settings.push((name.to_string(), value.to_string()));
        self
    }

    pub fn initdb(mut self, argument: &str) -> ServerOptions {
        self.initdb.push(argument.to_string());
        self
    }

    pub fn without_checksums(mut self) -> ServerOptions {
        self.checksums = false;
        self
    }

    /// Makes the cluster and starts it.
    pub fn start(self) -> TestServer {
        let mut server = TestServer::prepare(self.version);
        let mut initdb = vec![
            String::from("-D"),
            server.data_dir.display().to_string(),
            format!("--username={}", server.role),
            String::from("--auth-local=peer"),
            String::from("--auth-host=trust"),
            String::from("--encoding=UTF8"),
            String::from("--locale=C"),
            String::from("--no-sync"),
        ];
        match (self.checksums, self.version) {
            (true, _) => initdb.push(String::from("--data-checksums")),
            // Since 18 checksums are the default.
            (false, Version::V18) => initdb.push(String::from("--no-data-checksums")),
            (false, _) => {}
        }
        initdb.extend(self.initdb);
        server.must_run("initdb", &initdb.iter().map(String::as_str).collect::<Vec<_>>());
        // A test that wants the real thing sets it again: the last line counts.
        server.append_settings(&[(String::from("fsync"), String::from("off"))]);
        server.append_settings(&self.settings);
        server.launch();
        server
    }
}

/// A running server, or one that was stopped or killed and can be started again.
pub struct TestServer {
    pub version: Version,
    pub data_dir: PathBuf,
    pub socket_dir: PathBuf,
    pub port: u16,
    /// Operating system user that runs the server.
    pub run_as: String,
    /// Superuser role: it has the name of `run_as`.
    pub role: String,
    pub bin_dir: PathBuf,
    /// A directory that the server's user may write to, for tablespaces and the like.
    pub work_dir: PathBuf,
    user: User,
    log_path: PathBuf,
    child: Option<Child>,
    /// Removed last.
    _root: tempfile::TempDir,
}

impl TestServer {
    /// A fresh cluster with these settings, running.
    pub fn start(version: Version, settings: &[(&str, &str)]) -> TestServer {
        let options = ServerOptions::new(version);
        settings.iter().fold(options, |options, (name, value)| options.set(name, value)).start()
    }

    /// Directories for a server, without a cluster and nothing started: a test puts files into `data_dir`, hands them
    /// over with `own`, and calls `launch`.
    pub fn prepare(version: Version) -> TestServer {
        let user = server_user();
        let root = tempfile::Builder::new().prefix("keiki-pg").tempdir().expect("a temporary directory");
        set_mode(root.path(), 0o755);
        let make = |name: &str, mode: u32| {
            let path = root.path().join(name);
            std::fs::create_dir(&path).expect("a directory");
            set_mode(&path, mode);
            own(&path, &user);
            path
        };
        let (data_dir, socket_dir, work_dir) = (make("data", 0o700), make("s", 0o755), make("work", 0o755));
        TestServer {
            version,
            socket_dir,
            work_dir,
            port: free_port(),
            run_as: user.name.clone(),
            role: user.name.clone(),
            bin_dir: version.bin_dir(),
            log_path: data_dir.with_file_name("server.log"),
            data_dir,
            user,
            child: None,
            _root: root,
        }
    }

    /// This server as an instance of keiki.
    pub fn source(&self, name: &str, ship: ShipMode) -> PostgresSource {
        PostgresSource {
            name: name.to_string(),
            data_dir: self.data_dir.clone(),
            socket_dir: self.socket_dir.clone(),
            port: self.port,
            user: self.role.clone(),
            run_as: self.run_as.clone(),
            ship,
            archive_command: String::from("/usr/bin/keiki wal-push %p"),
        }
    }

    /// Adds lines to postgresql.conf; the last value of a setting counts.
    pub fn append_settings(&self, settings: &[(String, String)]) {
        let mut text = String::new();
        for (name, value) in settings {
            let _ = writeln!(text, "{name} = '{}'", value.replace('\'', "''"));
        }
        let path = self.data_dir.join("postgresql.conf");
        let existing = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(&path, existing + &text).expect("postgresql.conf");
        own(&path, &self.user);
    }

    /// Starts the server and waits until it accepts connections. With a port that somebody took meanwhile, on another.
    pub fn launch(&mut self) {
        for _ in 0..5 {
            match self.try_launch() {
                Ok(()) => return,
                Err(log) if log.contains("Address already in use") => self.port = free_port(),
                Err(log) => panic!("PostgreSQL did not start: {log}"),
            }
        }
        panic!("no free port for PostgreSQL");
    }

    /// Starts the server and waits until it accepts connections; the error is its log.
    pub fn try_launch(&mut self) -> Result<(), String> {
        assert!(self.child.is_none(), "the server is running");
        let log_before = self.log_text().len();
        let log = std::fs::File::options().create(true).append(true).open(&self.log_path).expect("the log");
        let mut command = self.command("postgres");
        command
            .args(["-D".as_ref(), self.data_dir.as_os_str(), "-k".as_ref(), self.socket_dir.as_os_str()])
            .args(["-p", &self.port.to_string(), "-h", "127.0.0.1"])
            .args(["-c", "log_min_messages=info", "-c", "logging_collector=off"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log"))
            .stderr(log);
        self.child = Some(spawn_that_dies_with_us(command));
        let start = Instant::now();
        loop {
            if self.is_ready() {
                return Ok(());
            }
            let child = self.child.as_mut().expect("just started");
            if child.try_wait().expect("a child").is_some() {
                self.child = None;
                return Err(self.log_text().split_off(log_before));
            }
            if start.elapsed() > PATIENCE {
                self.kill9();
                return Err(format!("no answer in time: {}", self.log_text().split_off(log_before)));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The status line of postmaster.pid (`src/include/utils/pidfile.h`, LOCK_FILE_LINE_PM_STATUS), if it is ours.
    fn is_ready(&self) -> bool {
        let text = std::fs::read_to_string(self.data_dir.join("postmaster.pid")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let pid = self.child.as_ref().map(|child| child.id().to_string());
        lines.first().copied() == pid.as_deref() && lines.get(7) == Some(&"ready")
    }

    /// Process id of the postmaster.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running server").id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().expect("a child").is_none())
    }

    /// What the server has logged.
    pub fn log_text(&self) -> String {
        std::fs::read(&self.log_path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Kills the postmaster and all its children without warning, as a crash of the machine's memory would.
    pub fn kill9(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let children = children_of(child.id());
        let _ = child.kill();
        for pid in &children {
            signal(*pid, libc::SIGKILL);
        }
        let _ = child.wait();
        wait_until("all processes of the server are gone", || children.iter().all(|pid| !exists(*pid)).then_some(()));
    }

    /// A clean ("fast") shutdown.
    pub fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        signal(child.id(), libc::SIGINT);
        let start = Instant::now();
        while child.try_wait().expect("a child").is_none() {
            assert!(start.elapsed() < PATIENCE, "PostgreSQL does not stop: {}", self.log_text());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops cleanly if it runs, and starts again.
    pub fn restart(&mut self) {
        self.stop();
        self.launch();
    }

    /// The answer of the database `postgres` without decoration: columns with `|`, rows on lines.
    pub fn sql(&self, sql: &str) -> String {
        self.sql_in("postgres", sql)
    }

    /// The answer of a database.
    pub fn sql_in(&self, database: &str, sql: &str) -> String {
        match self.try_sql_in(database, sql) {
            Ok(answer) => answer,
            Err(error) => panic!("{sql}\n{error}\nserver log: {}", tail(&self.log_text())),
        }
    }

    /// The answer of a database, or what psql complains about. Several statements are one transaction each, in order.
    pub fn try_sql_in(&self, database: &str, sql: &str) -> Result<String, String> {
        self.psql(database, &self.role, sql)
    }

    /// The answer of the database `postgres` to another role.
    pub fn try_sql_as(&self, role: &str, sql: &str) -> Result<String, String> {
        self.psql("postgres", role, sql)
    }

    fn psql(&self, database: &str, role: &str, sql: &str) -> Result<String, String> {
        let mut command = self.command("psql");
        command.args(["-h".as_ref(), self.socket_dir.as_os_str(), "-p".as_ref(), self.port.to_string().as_ref()]);
        command.args(["-U", role, "-d", database, "-XAtq", "-v", "ON_ERROR_STOP=1", "-f", "-"]);
        let output = run_with_input(command, sql);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_string();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Waits until a query answers `wanted`.
    pub fn wait_for_sql(&self, sql: &str, wanted: &str) {
        wait_until(&format!("'{sql}' is '{wanted}'"), || (self.sql(sql) == wanted).then_some(()));
    }

    /// Runs a program of the server's bin directory as the server's user.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = self.command(program);
        command.args(arguments);
        run_with_input(command, "")
    }

    /// The same; its failure is ours.
    pub fn must_run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.run(program, arguments);
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{program} {arguments:?} ended with {}: {text}", output.status);
        text
    }

    /// pgbench's tables with this many times 100 000 accounts.
    pub fn pgbench_initialise(&self, scale: u32) {
        let mut command = self.command("pgbench");
        self.add_connection(&mut command);
        command.args(["-i", "-q", "-s", &scale.to_string(), "postgres"]);
        let output = run_with_input(command, "");
        assert!(output.status.success(), "pgbench -i: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// pgbench's usual transactions until the value is dropped.
    pub fn pgbench_load(&self, clients: u32) -> Load {
        let mut command = self.command("pgbench");
        self.add_connection(&mut command);
        command.args(["-n", "-T", "600", "-c", &clients.to_string(), "postgres"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Load(spawn_that_dies_with_us(command))
    }

    /// Makes a file or a tree the server's.
    pub fn own(&self, path: &Path) {
        own(path, &self.user);
    }

    fn add_connection(&self, command: &mut Command) {
        command.args(["-h".as_ref(), self.socket_dir.as_os_str(), "-U".as_ref(), self.role.as_ref()]);
        command.args(["-p", &self.port.to_string()]);
    }

    /// A program of the bin directory, to be run as the server's user in a directory that it may enter.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin_dir.join(program));
        command.current_dir(&self.work_dir).env_clear().env("LC_ALL", "C").env("PATH", "/usr/bin:/bin");
        if !self.user.is_current() {
            command.uid(self.user.uid).gid(self.user.gid);
        }
        command
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("last words of PostgreSQL {}:\n{}", self.version.number(), tail(&self.log_text()));
        }
        self.kill9();
    }
}

/// A client program that runs until it is dropped.
pub struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The last lines of a log.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("a mode");
}

fn own(path: &Path, user: &User) {
    if user.is_current() {
        return;
    }
    std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid)).expect("an owner");
    if path.is_dir() && !path.is_symlink() {
        for entry in std::fs::read_dir(path).expect("a directory") {
            own(&entry.expect("an entry").path(), user);
        }
    }
}

/// A port that nobody had a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

fn exists(pid: u32) -> bool {
    // A zombie whose parent is gone is reaped by init; until then it holds nothing.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(") ").next().unwrap_or_default().starts_with('Z'))
}

fn children_of(parent: u32) -> Vec<u32> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // Field 4 of proc(5), counted behind the name, which may hold anything.
        let fields = stat.rsplit(") ").next().unwrap_or_default();
        if fields.split(' ').nth(1).and_then(|field| field.parse::<u32>().ok()) == Some(parent) {
            children.push(pid);
        }
    }
    children
}

fn signal(pid: u32, number: i32) {
    let pid = i32::try_from(pid).expect("a process id");
    // SAFETY: kill(2) takes two numbers.
    unsafe { libc::kill(pid, number) };
}

fn run_with_input(mut command: Command, input: &str) -> Output {
    use std::io::Write as _;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let mut pipe = child.stdin.take().expect("a pipe");
    let mut stderr = child.stderr.take().expect("a pipe");
    let complaints = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stderr.read_to_end(&mut bytes);
        bytes
    });
    // A program that does not read its input closes it.
    let _ = pipe.write_all(input.as_bytes());
    drop(pipe);
    let mut output = child.wait_with_output().expect("a child");
    output.stderr = complaints.join().expect("a thread");
    output
}

/// SIGTERM, and waits until the process has ended.
pub fn end_cleanly(mut child: Child) {
    signal(child.id(), libc::SIGTERM);
    wait_until("the server ends", || child.try_wait().expect("a child"));
}

type SpawnRequest = (Command, mpsc::Sender<std::io::Result<Child>>);

/// Starts a program that gets SIGQUIT when this process dies, even by SIGKILL. The kernel sends it when the **thread**
/// ends that started the program (prctl(2), PR_SET_PDEATHSIG), so one thread that lives as long as we starts them all.
pub fn spawn_that_dies_with_us(mut command: Command) -> Child {
    static SPAWNER: OnceLock<std::sync::Mutex<mpsc::Sender<SpawnRequest>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<SpawnRequest>();
        std::thread::spawn(move || {
            for (mut command, answer) in requests {
                let _ = answer.send(command.spawn());
            }
        });
        std::sync::Mutex::new(sender)
    });
    // SAFETY: prctl is a plain system call, and nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGQUIT) == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        });
    }
    let (sender, answer) = mpsc::channel();
    spawner.lock().expect("no panic while sending").send((command, sender)).expect("the spawner");
    answer.recv().expect("the spawner").expect("a program that can be started")
}

/// Whether a program ended by this signal.
pub fn ended_by(output: &Output, number: i32) -> bool {
    output.status.signal() == Some(number)
}
