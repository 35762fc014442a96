//! A Redis server as processes and files: finding its program, starting it, seeing whether it runs, stopping it.
//!
//! Invariants: a server is started in a session of its own, so that it outlives the agent; starting has no time limit,
//! because loading takes as long as it takes, but a server that died is noticed and its last log lines are quoted; a
//! server is known by the directory that it works in (it changes into `dir`), never by a number that may be given again.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio_util::sync::CancellationToken;

use crate::base::child::{ChildCommand, Process};
use crate::base::processes::DirectoryId;
use crate::base::users::User;
use crate::engine::redis::session::{Address, Endpoint, Session};
use crate::engine::redis::settings::{LOG_FILE, SOCKET_FILE};
use crate::engine::redis::source::{major_of, product_name};
use crate::engine::server_log::{LogMarks, last_log_lines, text_from};
use crate::error::{Context, Error, Kind, Result};
use crate::model::check::CheckItem;
use crate::model::engine_kind::EngineKind;

const POLL: Duration = Duration::from_millis(20);
/// How long a server that is told to stop may take before it is killed, if its data do not matter.
const STOP_SECONDS: u64 = 20;
/// No word tells a grave line of Redis from another, so the last lines are quoted.
const LOG_MARKS: LogMarks = LogMarks { started: "", grave: &[], lines_of_reason: 3, lines_of_end: 3 };
/// What a server writes into its log about a command that it refuses while it loads, before the reason and the command.
const REFUSED: &str = "is sending an error to its AOF-loading-client:";
/// The end of such a line about a command by which a node of Valkey 9 remembers that slots come from another node.
const REFUSED_OF_CLUSTER: &str = "after processing the command 'cluster|syncslots'";
/// The longest path of a unix socket (unix(7): sun_path has 108 bytes with the NUL).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// An installed server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// Redis or Valkey.
    pub engine: EngineKind,
    pub server: PathBuf,
    /// As the program calls itself: `7.0.15`.
    pub version: String,
}

impl Programs {
    /// Finds `redis-server` or `valkey-server`: in `wanted` and nowhere else if it is given, otherwise where distributions
    /// put it. A program of the other product under that name is refused.
    pub async fn find(engine: EngineKind, wanted: Option<&Path>) -> Result<Programs> {
        let product = product_name(engine);
        let program = format!("{}-server", engine.name());
        let candidates = match wanted {
            Some(directory) => vec![directory.to_path_buf()],
            None => {
                let own = format!("/opt/{}/bin", engine.name());
                ["/usr/bin", "/usr/local/bin", &own, "/usr/sbin"].map(PathBuf::from).to_vec()
            }
        };
        for directory in &candidates {
            let server = directory.join(&program);
            if server.is_file() {
                return Programs::at(engine, server).await;
            }
        }
        let places: Vec<String> = candidates.iter().map(|path| format!("'{}'", path.display())).collect();
        let section = engine.name();
        Err(Error::new(Kind::NotFound, format!("there is no '{program}' in {}", places.join(", "))).hint(format!(
            "install {product} on this host, or set 'bin_dir' under [clone.{section}] to the directory of its programs"
        )))
    }

    async fn at(engine: EngineKind, server: PathBuf) -> Result<Programs> {
        let finished = ChildCommand::new(&server).arg("--version").run_checked(&CancellationToken::new()).await?;
        let text = String::from_utf8_lossy(&finished.stdout).into_owned();
        let version = version_of(&text).ok_or_else(|| {
            Error::new(Kind::Server, format!("'{}' says '{}' about its version", server.display(), text.trim()))
        })?;
        // Distributions that replace one product by the other leave the old name behind as a link.
        let product = product_name(engine);
        if !text.starts_with(product) {
            return Err(Error::new(
                Kind::Unsupported,
                format!("'{}' is another product than {product}: it says '{}'", server.display(), text.trim()),
            )
            .hint(format!("install {product} on this host: the other product does not read all of its files")));
        }
        Ok(Programs { engine, server, version })
    }

    /// `redis-check-aof` and the like, for `aof` or `rdb`.
    pub fn name_of_check(&self, what: &str) -> String {
        format!("{}-check-{what}", self.engine.name())
    }

    /// The program of that name beside the server, if it is installed.
    pub fn check_tool(&self, what: &str) -> Option<PathBuf> {
        let path = self.server.with_file_name(self.name_of_check(what));
        path.is_file().then_some(path)
    }
}

/// `7.0.15` out of `Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=...`.
fn version_of(text: &str) -> Option<String> {
    let word = text.split_whitespace().find_map(|word| word.strip_prefix("v="))?;
    major_of(word).map(|_| word.to_string())
}

/// The server of one data directory. A description: nothing runs because of it.
#[derive(Debug, Clone)]
pub struct Server {
    pub programs: Programs,
    pub data_dir: PathBuf,
    pub run_dir: PathBuf,
    pub user: User,
}

impl Server {
    fn product(&self) -> &'static str {
        product_name(self.programs.engine)
    }

    pub fn log_file(&self) -> PathBuf {
        self.run_dir.join(LOG_FILE)
    }

    /// How long its log is now: what it says later stands behind.
    pub fn log_bytes(&self) -> u64 {
        std::fs::metadata(self.log_file()).map_or(0, |metadata| metadata.len())
    }

    /// Where the server is asked, without a password.
    pub fn endpoint(&self) -> Endpoint {
        Endpoint {
            address: Address::Socket(self.run_dir.join(SOCKET_FILE)),
            user: None,
            password_file: None,
            run_as: self.user.name.clone(),
        }
    }

    /// Starts the server with this configuration file. Returns as soon as the process exists.
    pub fn start(&self, conf: &Path) -> Result<Process> {
        let what = || format!("cannot start {} in '{}'", self.product(), self.data_dir.display());
        if let Some(process) = processes_in(&self.data_dir).first() {
            return Err(Error::new(Kind::Conflict, format!("{}: process {} runs there already", what(), process.pid)));
        }
        let socket = self.run_dir.join(SOCKET_FILE);
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(Error::new(
                Kind::BadInput,
                format!("{}: the path of its socket is too long: '{}'", what(), socket.display()),
            )
            .hint(format!("a unix socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes: choose a shorter --dir")));
        }
        // Created by us and not by the server, because the directory may belong to root.
        std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(self.log_file())
            .context(|| format!("{}: cannot open '{}'", what(), self.log_file().display()))?;
        let child = ChildCommand::new(&self.programs.server)
            .arg(conf)
            .current_dir(&self.data_dir)
            .as_user(&self.user)
            .output_to_file(self.log_file())
            .spawn()
            .context(what)?;
        Ok(child.detach())
    }

    /// Waits until the server lets us in and has loaded its data. No limit in time: fails if the process dies, with the
    /// last lines of its log, or when `cancel` fires. Tells `progress` bytes loaded and their total.
    pub async fn wait_until_loaded(
        &self,
        process: Process,
        endpoint: &Endpoint,
        cancel: &CancellationToken,
        progress: impl Fn(u64, u64),
    ) -> Result<Session> {
        loop {
            match self.try_loaded(endpoint, &progress).await {
                Ok(Some(session)) => return Ok(session),
                Ok(None) => {}
                Err(error) if error.kind() == Kind::Unreachable => {}
                Err(error) => return Err(error),
            }
            self.require_alive(process)?;
            pause(cancel).await?;
        }
    }

    async fn try_loaded(&self, endpoint: &Endpoint, progress: &impl Fn(u64, u64)) -> Result<Option<Session>> {
        // PING is refused while loading, so a session is only opened when it is over; INFO is not.
        let mut session = Session::open_loading(endpoint).await?;
        let info = session.info(&["persistence"]).await?;
        let number = |key: &str| info.get(key).and_then(|text| text.parse().ok()).unwrap_or(0);
        if info.get("loading").is_some_and(|value| value == "0") {
            return Ok(Some(session));
        }
        progress(number("loading_loaded_bytes"), number("loading_total_bytes"));
        Ok(None)
    }

    /// An error if the server refused commands of what it has loaded. It only counts them and goes on behind them: what
    /// follows a SELECT of a database that it does not have would be in another one. Takes a session with it, and how long
    /// its log was before it was started. Returns what is to be said about refused commands that do not touch data. Source:
    /// afterErrorReply in `src/networking.c` of Redis 7.0 and 8 and of Valkey 9.
    pub async fn require_all_taken(&self, session: &mut Session, log_began: u64) -> Result<Option<CheckItem>> {
        let info = session.info(&["stats"]).await?;
        let count = info.get("unexpected_error_replies").and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        let log = text_from(&self.log_file(), log_began);
        let of_cluster = log.lines().filter(|line| line.ends_with(REFUSED_OF_CLUSTER)).count() as u64;
        if count == 0 {
            return Ok(None);
        }
        if count <= of_cluster {
            return Ok(Some(CheckItem::warn(
                "slots",
                format!(
                    "{count} commands in the log are about slots that came from another node, and were passed over"
                ),
                "if that migration failed, keys of those slots are in the clone",
            )));
        }
        let first = log.lines().find(|line| line.contains(REFUSED) && !line.ends_with(REFUSED_OF_CLUSTER));
        let said: String =
            first.and_then(|line| line.split(REFUSED).nth(1)).unwrap_or_default().chars().take(300).collect();
        Err(Error::new(
            Kind::Server,
            format!("the server refused {} commands of the log, the first with{said}", count - of_cluster),
        )
        .hint(format!(
            "if a database is out of range, order the clone with --set databases=N, as many as the source has; \
             '{}' has all of them in lines with CRITICAL",
            self.log_file().display()
        )))
    }

    /// An error with the last lines of the log if the process is not there any more.
    pub fn require_alive(&self, process: Process) -> Result<()> {
        if process.is_alive() {
            return Ok(());
        }
        let said = last_log_lines(&self.log_file(), LOG_MARKS);
        Err(Error::new(
            Kind::Server,
            format!("{} in '{}' stopped by itself: {said}", self.product(), self.data_dir.display()),
        )
        .hint(format!("the whole log is '{}'", self.log_file().display())))
    }

    /// Stops the server so that its append-only file is written and synced, however long that takes; an error if it
    /// died instead. Succeeds if none runs.
    pub async fn stop_cleanly(&self, cancel: &CancellationToken) -> Result<()> {
        let before = self.log_bytes();
        let running = processes_in(&self.data_dir);
        let Some(process) = running.first() else { return Ok(()) };
        process.signal(Signal::SIGTERM)?;
        while running.iter().any(Process::is_alive) {
            pause(cancel).await?;
        }
        if text_from(&self.log_file(), before).contains("ready to exit, bye bye") {
            return Ok(());
        }
        let said = last_log_lines(&self.log_file(), LOG_MARKS);
        Err(Error::new(
            Kind::Server,
            format!("{} in '{}' did not stop cleanly: {said}", self.product(), self.data_dir.display()),
        )
        .hint(format!("the whole log is '{}'", self.log_file().display())))
    }
}

/// Sleeps for one poll, or fails because the work is to stop.
pub async fn pause(cancel: &CancellationToken) -> Result<()> {
    tokio::select! {
        () = tokio::time::sleep(POLL) => Ok(()),
        () = cancel.cancelled() => Err(Error::new(Kind::Cancelled, "cancelled while waiting for the server")),
    }
}

/// Stops whatever server works in this directory, at once: for a directory that is going to be thrown away or made again.
pub async fn stop_now(data_dir: &Path) -> Result<()> {
    let start = Instant::now();
    let mut told: Vec<Process> = Vec::new();
    loop {
        let left = processes_in(data_dir);
        if left.is_empty() {
            return Ok(());
        }
        let is_late = start.elapsed() > Duration::from_secs(STOP_SECONDS);
        for process in left {
            if is_late || told.contains(&process) {
                if is_late {
                    process.signal(Signal::SIGKILL)?;
                }
            } else {
                process.signal(Signal::SIGTERM)?;
                told.push(process);
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The living servers in a directory, the oldest first; a child that saves or rewrites counts too. The program file may be
/// called `redis-check-rdb`: it is one file with several names.
pub fn processes_in(data_dir: &Path) -> Vec<Process> {
    let is_server = |program: &str| program.starts_with("redis-") || program.starts_with("valkey-");
    DirectoryId::of(data_dir).map_or_else(Vec::new, |directory| directory.processes(is_server))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_as_the_program_prints_it() {
        let text = "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=d81bff71cbb150e\n";
        assert_eq!(version_of(text).as_deref(), Some("7.0.15"));
        assert_eq!(version_of("Redis server v=x"), None);
    }

    #[tokio::test]
    async fn programs_that_are_not_there_are_not_found_with_a_hint() {
        let directory = tempfile::tempdir().unwrap();
        for (engine, program) in [(EngineKind::Redis, "'redis-server'"), (EngineKind::Valkey, "'valkey-server'")] {
            let error = Programs::find(engine, Some(directory.path())).await.unwrap_err();
            assert_eq!(error.kind(), Kind::NotFound);
            assert!(error.message().contains(program), "{error:?}");
            assert!(error.hint_text().unwrap().contains("bin_dir"), "{error:?}");
        }
    }

    #[tokio::test]
    async fn a_program_of_the_other_product_under_the_old_name_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("redis-server");
        std::fs::write(&program, "#!/bin/sh\necho 'Valkey server v=9.1.2 sha=00000000:0'\n").unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let error = Programs::find(EngineKind::Redis, Some(directory.path())).await.unwrap_err();
        assert!(error.message().contains("Valkey server v=9.1.2"), "{error:?}");
    }

    #[test]
    fn a_test_that_works_in_a_directory_is_no_server_of_it() {
        assert_eq!(processes_in(Path::new(".")), []);
    }
}
