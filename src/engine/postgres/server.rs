//! A PostgreSQL server as processes and files: finding its programs, starting it, seeing whether it runs, stopping it.
//!
//! Invariants: a server is started in a session of its own, so that it outlives the agent; starting has no time limit,
//! because recovery takes as long as it takes, but a server that died is noticed and its last log lines are quoted; a
//! server is known by the data directory that its processes work in, never by a number that may be given again.
//!
//! Sources: `src/include/utils/pidfile.h` (lines of `postmaster.pid`), manual, "Shutting Down the Server" (signals).

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio_util::sync::CancellationToken;

use crate::base::child::{ChildCommand, Process, process_start_ticks};
use crate::base::processes::{DirectoryId, all_pids};
use crate::base::users::User;
use crate::engine::postgres::session::{Endpoint, Session};
use crate::engine::server_log::{LogMarks, last_log_lines};
use crate::error::{Context, Error, Kind, Result};

/// How often a condition is looked at while waiting for a server.
const POLL: Duration = Duration::from_millis(20);

/// How long a server that is told to stop at once may take before it is killed.
const IMMEDIATE_STOP_SECONDS: u64 = 30;

pub const LOG_MARKS: LogMarks =
    LogMarks { started: "starting PostgreSQL", grave: &["FATAL:", "PANIC:"], lines_of_reason: 4, lines_of_end: 3 };

/// The longest path of a unix socket (unix(7): sun_path has 108 bytes with the NUL).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The programs of one installed major version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    pub bin_dir: PathBuf,
    /// As the program calls itself: `15.18`.
    pub version: String,
}

impl Programs {
    /// Finds the programs of a major version: in `wanted` and nowhere else if it is given, otherwise where Debian, the
    /// packages of postgresql.org and a build from source put them, and then on the search path. `NotFound` says where
    /// it was looked for.
    pub async fn find(major: u32, wanted: Option<&Path>) -> Result<Programs> {
        let mut found_others = Vec::new();
        let candidates = match wanted {
            Some(directory) => vec![directory.to_path_buf()],
            None => usual_directories(major),
        };
        for bin_dir in &candidates {
            if !bin_dir.join("postgres").is_file() {
                continue;
            }
            match Programs::at(bin_dir).await {
                Ok(programs) if programs.major() == Some(major) => return Ok(programs),
                Ok(other) => found_others.push(format!("PostgreSQL {} in '{}'", other.version, bin_dir.display())),
                Err(error) => found_others.push(error.message().to_string()),
            }
        }
        let found = match (found_others.is_empty(), wanted) {
            (false, _) => format!("found only {}", found_others.join(", ")),
            (true, Some(directory)) => format!("there is no 'postgres' in '{}'", directory.display()),
            (true, None) => String::from("it is not installed in a usual place"),
        };
        Err(Error::new(Kind::NotFound, format!("cannot find the programs of PostgreSQL {major}: {found}")).hint(
            format!("install PostgreSQL {major} on this host, or set 'bin_dir' to the directory of its programs"),
        ))
    }

    /// The programs in this directory, asked for their version.
    async fn at(bin_dir: &Path) -> Result<Programs> {
        let command = ChildCommand::new(bin_dir.join("postgres")).arg("--version");
        let finished = command.run_checked(&CancellationToken::new()).await?;
        let text = String::from_utf8_lossy(&finished.stdout).into_owned();
        let version = version_of(&text).ok_or_else(|| {
            Error::new(Kind::Server, format!("'{}' says '{}' about its version", bin_dir.display(), text.trim()))
        })?;
        Ok(Programs { bin_dir: bin_dir.to_path_buf(), version })
    }

    /// 15 for 15.18.
    pub fn major(&self) -> Option<u32> {
        let digits: String = self.version.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    }

    pub fn postgres(&self) -> PathBuf {
        self.bin_dir.join("postgres")
    }
}

/// `15.18` out of `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
fn version_of(text: &str) -> Option<String> {
    let word = text.split_once("(PostgreSQL)")?.1.split_whitespace().next()?;
    word.starts_with(|c: char| c.is_ascii_digit()).then(|| word.to_string())
}

fn usual_directories(major: u32) -> Vec<PathBuf> {
    let mut directories = vec![
        PathBuf::from(format!("/usr/lib/postgresql/{major}/bin")),
        PathBuf::from(format!("/usr/pgsql-{major}/bin")),
        PathBuf::from("/usr/local/pgsql/bin"),
    ];
    let search_path = std::env::var_os("PATH").unwrap_or_default();
    directories.extend(std::env::split_paths(&search_path).filter(|directory| directory.is_absolute()));
    directories
}

/// The server of one data directory. A description: nothing runs because of it.
#[derive(Debug, Clone)]
pub struct Server {
    pub programs: Programs,
    pub data_dir: PathBuf,
    /// Who runs it.
    pub user: User,
    pub socket_dir: PathBuf,
    pub port: u16,
    /// Where its messages go that do not go elsewhere by its own settings.
    pub log_file: PathBuf,
}

impl Server {
    /// Starts the server with these arguments after `-D`. A server that already runs is `Conflict`. Returns as soon as
    /// the process exists.
    pub fn start(&self, arguments: &[String]) -> Result<Process> {
        let what = || format!("cannot start PostgreSQL in '{}'", self.data_dir.display());
        if let Some(process) = running_postmaster(&self.data_dir) {
            return Err(Error::new(Kind::Conflict, format!("{}: process {} runs there already", what(), process.pid)));
        }
        let socket_path = self.endpoint("", "").socket_path();
        remove_stale_locks(&self.data_dir, &socket_path)?;
        if socket_path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            let reason = format!("{}: the path of its socket is too long: '{}'", what(), socket_path.display());
            return Err(Error::new(Kind::BadInput, reason).hint(format!(
                "a unix socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes: choose a shorter 'state_dir'"
            )));
        }
        // Created by us and not by the server, because its directory may belong to root.
        std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&self.log_file)
            .context(|| format!("{}: cannot open '{}'", what(), self.log_file.display()))?;
        let child = ChildCommand::new(self.programs.postgres())
            .arg("-D")
            .arg(&self.data_dir)
            .args(arguments)
            // From its first moment on it is seen to work in this directory, also by an agent that did not start it.
            .current_dir(&self.data_dir)
            .as_user(&self.user)
            .output_to_file(&self.log_file)
            .spawn()
            .context(what)?;
        Ok(child.detach())
    }

    /// Where the server is asked.
    pub fn endpoint(&self, database: &str, role: &str) -> Endpoint {
        Endpoint {
            socket_dir: self.socket_dir.clone(),
            port: self.port,
            database: database.to_string(),
            role: role.to_string(),
            run_as: self.user.name.clone(),
        }
    }

    /// Waits until the server lets us in. No limit in time: fails if the process dies, with the last lines of its log,
    /// or when `cancel` fires.
    pub async fn wait_until_ready(
        &self,
        process: Process,
        database: &str,
        role: &str,
        cancel: &CancellationToken,
    ) -> Result<Session> {
        let endpoint = self.endpoint(database, role);
        loop {
            match Session::open(&endpoint).await {
                Ok(session) => return Ok(session),
                Err(error) if error.kind() != Kind::Unreachable => return Err(error),
                Err(_) => {}
            }
            self.require_alive(process)?;
            pause(cancel).await?;
        }
    }

    /// An error with the last lines of the log if the process is not there any more.
    pub fn require_alive(&self, process: Process) -> Result<()> {
        if process.is_alive() {
            return Ok(());
        }
        Err(Error::new(
            Kind::Server,
            format!(
                "PostgreSQL in '{}' stopped by itself: {}",
                self.data_dir.display(),
                last_log_lines(&self.log_file, LOG_MARKS)
            ),
        )
        .hint(format!("the whole log is '{}'", self.log_file.display())))
    }

    /// Checkpoints and stops the server, however long that takes; an error if it died instead. Succeeds if none runs.
    pub async fn stop_cleanly(&self, cancel: &CancellationToken) -> Result<()> {
        let Some(process) = running_postmaster(&self.data_dir) else { return Ok(()) };
        process.signal(Signal::SIGINT)?;
        while process.is_alive() {
            pause(cancel).await?;
        }
        wait_until_empty(&self.data_dir).await
    }
}

/// Sleeps for one poll, or fails because the work is to stop.
pub async fn pause(cancel: &CancellationToken) -> Result<()> {
    tokio::select! {
        () = tokio::time::sleep(POLL) => Ok(()),
        () = cancel.cancelled() => Err(Error::new(Kind::Cancelled, "cancelled while waiting for PostgreSQL")),
    }
}

/// Stops whatever server works in this directory, at once and without a checkpoint: for a directory that is going to
/// be thrown away or to be recovered again. Processes that a dead postmaster left behind are ended too.
pub async fn stop_now(data_dir: &Path) -> Result<()> {
    let Some(directory) = DirectoryId::of(data_dir) else { return Ok(()) };
    let start = Instant::now();
    let mut told: Vec<Process> = Vec::new();
    loop {
        let left = directory.processes(is_postgres);
        if left.is_empty() {
            return Ok(());
        }
        let is_late = start.elapsed() > Duration::from_secs(IMMEDIATE_STOP_SECONDS);
        for process in &left {
            // A postmaster tells its children; children whose postmaster was killed have nobody who would.
            let has_leader = parent_pid(process.pid).is_some_and(|parent| left.iter().any(|other| other.pid == parent));
            if is_late {
                process.signal(Signal::SIGKILL)?;
            } else if !has_leader && !told.contains(process) {
                process.signal(Signal::SIGQUIT)?;
                told.push(*process);
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until no process works in the directory any more.
async fn wait_until_empty(data_dir: &Path) -> Result<()> {
    let Some(directory) = DirectoryId::of(data_dir) else { return Ok(()) };
    let start = Instant::now();
    while let Some(process) = directory.processes(is_postgres).first().copied() {
        if start.elapsed() > Duration::from_secs(IMMEDIATE_STOP_SECONDS) {
            return Err(Error::new(
                Kind::Server,
                format!("process {} still works in '{}' after its server stopped", process.pid, data_dir.display()),
            ));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Whether any PostgreSQL process works in this directory.
pub fn is_in_use(data_dir: &Path) -> bool {
    running_postmaster(data_dir).is_some()
        || DirectoryId::of(data_dir).is_some_and(|directory| !directory.processes(is_postgres).is_empty())
}

/// The server that `postmaster.pid` names, if it runs and works in this very directory: the file outlives a crash, and
/// its number may have been given to anybody since.
pub fn running_postmaster(data_dir: &Path) -> Option<Process> {
    let text = std::fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    // The number is negative for a server in single-user mode.
    let pid = text.lines().next()?.trim().parse::<i64>().ok()?.unsigned_abs();
    let pid = u32::try_from(pid).ok()?;
    let process = Process { pid, start_ticks: process_start_ticks(pid)? };
    let works_here = DirectoryId::of(data_dir)?.is_working_directory_of(pid);
    (process.is_alive() && works_here).then_some(process)
}

/// Removes the locks of a server that died, with the machine or without it: `postmaster.pid`, and the one beside its
/// socket, whose directory is this clone's alone. By now the number in them may belong to another process of the same
/// user, and PostgreSQL then refuses to start (`src/backend/utils/init/miscinit.c`, CreateLockFile). They are left alone
/// while any process of PostgreSQL works in the data directory.
fn remove_stale_locks(data_dir: &Path, socket_path: &Path) -> Result<()> {
    let mut socket_lock = socket_path.as_os_str().to_os_string();
    socket_lock.push(".lock");
    for path in [data_dir.join("postmaster.pid"), PathBuf::from(socket_lock)] {
        if path.exists() && !is_in_use(data_dir) {
            let what = || format!("cannot remove '{}' of a server that died", path.display());
            std::fs::remove_file(&path).context(what)?;
        }
    }
    Ok(())
}

/// Every PostgreSQL process has the data directory as its working directory (`src/backend/utils/init/miscinit.c`,
/// ChangeToDataDir).
fn is_postgres(program: &str) -> bool {
    program.starts_with("postgres")
}

fn parent_pid(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// What the process that replays shows in its title: the log file that it reads or waits for. It is all there is to see
/// before the server lets anybody in (`src/backend/access/transam/xlogrecovery.c`, XLogFileRead: "recovering %s",
/// "waiting for %s").
pub fn segment_being_replayed(postmaster: Process) -> Option<String> {
    all_pids().find_map(|pid| {
        if parent_pid(pid)? != postmaster.pid {
            return None;
        }
        let title = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        segment_in_title(&String::from_utf8_lossy(&title))
    })
}

/// The segment in `postgres: name: startup recovering 000000010000000000000003`.
fn segment_in_title(title: &str) -> Option<String> {
    let words: Vec<&str> = title.split([' ', '\0']).filter(|word| !word.is_empty()).collect();
    let at = words.iter().rposition(|word| *word == "startup")?;
    let last = *words[at + 1..].last()?;
    (last.len() == 24 && last.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| last.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_of_a_server_that_died_is_in_nobody_s_way_even_if_its_number_was_given_again() {
        let directory = tempfile::tempdir().unwrap();
        let (pid_file, socket) = (directory.path().join("postmaster.pid"), directory.path().join(".s.PGSQL.5432"));
        let socket_lock = directory.path().join(".s.PGSQL.5432.lock");
        remove_stale_locks(directory.path(), &socket).unwrap();
        // This process lives and is of our user, but no server and not in the directory.
        for path in [&pid_file, &socket_lock] {
            std::fs::write(path, format!("{}\n", std::process::id())).unwrap();
        }
        remove_stale_locks(directory.path(), &socket).unwrap();
        assert!(!pid_file.exists() && !socket_lock.exists());
    }

    #[test]
    fn the_version_is_read_as_distributions_print_it() {
        let debian = "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n";
        assert_eq!(version_of(debian).as_deref(), Some("15.18"));
        assert_eq!(version_of("postgres (PostgreSQL) 19devel\n").as_deref(), Some("19devel"));
        assert_eq!(version_of("pg_dump 15"), None);
        let programs = Programs { bin_dir: PathBuf::new(), version: String::from("19devel") };
        assert_eq!(programs.major(), Some(19));
    }

    #[test]
    fn the_replayed_segment_is_read_from_the_title_whatever_the_cluster_is_called() {
        let segment = Some(String::from("00000001000000A000000003"));
        assert_eq!(segment_in_title("postgres: startup recovering 00000001000000A000000003"), segment);
        assert_eq!(segment_in_title("postgres: a startup: startup waiting for 00000001000000A000000003\0"), segment);
        assert_eq!(segment_in_title("postgres: keiki: startup recovering 00000001000000A000000003\0\0"), segment);
        assert_eq!(segment_in_title("postgres: checkpointer "), None);
    }

    #[test]
    fn a_stale_pid_file_names_no_server() {
        let directory = tempfile::tempdir().unwrap();
        // A process that lives, but works elsewhere: this test.
        std::fs::write(directory.path().join("postmaster.pid"), format!("{}\n", std::process::id())).unwrap();
        assert_eq!(running_postmaster(directory.path()), None);
        std::fs::write(directory.path().join("postmaster.pid"), "garbage").unwrap();
        assert_eq!(running_postmaster(directory.path()), None);
        assert!(!is_in_use(directory.path()));
    }

    #[test]
    fn the_reason_for_the_end_is_quoted_and_an_older_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        assert_eq!(last_log_lines(&log, LOG_MARKS), "its log is empty");
        let text = "LOG:  starting PostgreSQL 15\nFATAL:  old\nLOG:  starting PostgreSQL 15\nLOG:  x\nFATAL:  new\nDETAIL:  d\n";
        std::fs::write(&log, text).unwrap();
        assert_eq!(last_log_lines(&log, LOG_MARKS), "its log says 'FATAL:  new / DETAIL:  d'");
    }

    #[tokio::test]
    async fn programs_that_are_not_there_are_not_found_with_a_hint() {
        let directory = tempfile::tempdir().unwrap();
        let error = Programs::find(15, Some(directory.path())).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.hint_text().unwrap().contains("bin_dir"), "{error:?}");
    }
}
