//! A server of MariaDB or MySQL as a process: starting it, seeing whether it runs, stopping it.
//!
//! Invariants: a server is started in a session of its own, so that it outlives the agent; starting has no time limit,
//! but a server that died is noticed and its last log lines are quoted; a server is known by the data directory that its
//! process works in (`sql/mysqld.cc`: it changes into it), never by a number that may be given again.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio_util::sync::CancellationToken;

use crate::base::child::{ChildCommand, Process};
use crate::base::processes::DirectoryId;
use crate::base::users::User;
use crate::engine::mysql::clone::STAGED_DIR;
use crate::engine::mysql::programs::{BACKUP, Program, SERVERS};
use crate::engine::mysql::session::{Endpoint, Session};
use crate::engine::server_log::{LogMarks, last_log_lines};
use crate::error::{Context, Error, Kind, Result};

/// How often a condition is looked at while waiting for a server.
const POLL: Duration = Duration::from_millis(20);
/// 10.11 says "starting as process", 11.8 "Starting MariaDB ... as process".
const LOG_MARKS: LogMarks =
    LogMarks { started: " as process ", grave: &["[ERROR]"], lines_of_reason: 3, lines_of_end: 2 };
/// The longest path of a unix socket (unix(7): sun_path has 108 bytes with the NUL).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The server of one data directory. A description: nothing runs because of it.
#[derive(Debug, Clone)]
pub struct Server {
    pub program: Program,
    pub data_dir: PathBuf,
    /// Who runs it.
    pub user: User,
    pub socket: PathBuf,
    /// Where its messages go.
    pub log_file: PathBuf,
}

impl Server {
    /// MySQL does not start while the number in the file that locks its socket is that of a process of its user
    /// (`sql/conn_handler/socket_connection.cc`, Unix_socket::create_lockfile), and after a restart of the machine it may
    /// be that of any. The socket's directory is this server's alone, and it does not run.
    fn forget_lock_of_socket(&self) -> std::io::Result<()> {
        let mut lock = self.socket.clone().into_os_string();
        lock.push(".lock");
        match std::fs::remove_file(&lock) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Starts the server with these arguments. A server that already runs is `Conflict`. Returns as soon as the process
    /// exists.
    pub fn start(&self, arguments: &[String]) -> Result<Process> {
        let what = || format!("cannot start {} in '{}'", self.program.product.name(), self.data_dir.display());
        if let Some(process) = running_in(&self.data_dir) {
            return Err(Error::new(Kind::Conflict, format!("{}: process {} runs there already", what(), process.pid)));
        }
        if self.socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            let reason = format!("{}: the path of its socket is too long: '{}'", what(), self.socket.display());
            return Err(Error::new(Kind::BadInput, reason).hint(format!(
                "a unix socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes: choose a shorter --dir"
            )));
        }
        // Created by us and not by the server, because its directory may belong to root.
        let log_file = || format!("{}: cannot open '{}'", what(), self.log_file.display());
        let log = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&self.log_file)
            .context(log_file)?;
        if !self.user.is_current() {
            // MySQL opens it once more, by its name.
            std::os::unix::fs::fchown(&log, Some(self.user.uid), Some(self.user.gid)).context(log_file)?;
        }
        self.forget_lock_of_socket().context(what)?;
        let child = ChildCommand::new(&self.program.path)
            .args(arguments)
            // From its first moment on it is seen to work in this directory, also by an agent that did not start it.
            .current_dir(&self.data_dir)
            .as_user(&self.user)
            .output_to_file(&self.log_file)
            .spawn()
            .context(what)?;
        Ok(child.detach())
    }

    /// Waits until the server lets us in. No limit in time: fails if the process dies, with the last lines of its log,
    /// or when `cancel` fires. `patience` is for an account that the server makes after it has begun to listen.
    pub async fn wait_until_ready(
        &self,
        process: Process,
        endpoint: &Endpoint,
        patience: Duration,
        cancel: &CancellationToken,
    ) -> Result<Session> {
        let mut refused_since = None;
        loop {
            match Session::open(endpoint).await {
                Ok(session) => return Ok(session),
                Err(error) if error.kind() == Kind::Forbidden => {
                    if refused_since.get_or_insert_with(std::time::Instant::now).elapsed() > patience {
                        return Err(error);
                    }
                }
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
        let words = last_log_lines(&self.log_file, LOG_MARKS);
        let reason =
            format!("{} in '{}' stopped by itself: {words}", self.program.product.name(), self.data_dir.display());
        Err(Error::new(Kind::Server, reason).hint(format!("the whole log is '{}'", self.log_file.display())))
    }

    /// Shuts the server down cleanly, however long that takes. Succeeds if none runs.
    pub async fn stop_cleanly(&self, cancel: &CancellationToken) -> Result<()> {
        let Some(process) = running_in(&self.data_dir) else { return Ok(()) };
        process.signal(Signal::SIGTERM)?;
        while process.is_alive() {
            pause(cancel).await?;
        }
        Ok(())
    }
}

/// Sleeps for one poll, or fails because the work is to stop.
pub async fn pause(cancel: &CancellationToken) -> Result<()> {
    tokio::select! {
        () = tokio::time::sleep(POLL) => Ok(()),
        () = cancel.cancelled() => Err(Error::new(Kind::Cancelled, "cancelled while waiting for the server")),
    }
}

/// Ends whatever server works in this directory, and what makes a copy consistent that is staged in it, at once: for a
/// directory that is going to be thrown away or worked on anew. Programs outlive an agent that is killed.
pub async fn stop_now(data_dir: &Path) -> Result<()> {
    while let Some(process) = running_in(data_dir).or_else(|| preparing_in(&data_dir.join(STAGED_DIR))) {
        process.signal(Signal::SIGKILL)?;
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// The server that works in this directory, if there is one. Seen only for processes of our own user, or as root.
pub fn running_in(data_dir: &Path) -> Option<Process> {
    DirectoryId::of(data_dir)?.processes(|program| SERVERS.contains(&program)).first().copied()
}

/// The backup program that works in this directory, if there is one.
fn preparing_in(staged: &Path) -> Option<Process> {
    DirectoryId::of(staged)?.processes(|program| BACKUP.contains(&program)).first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_merely_works_in_a_directory_is_no_server() {
        assert_eq!(running_in(&std::env::current_dir().unwrap()), None);
        assert_eq!(running_in(Path::new("/no/such/directory")), None);
    }

    #[test]
    fn the_reason_for_the_end_is_quoted_and_an_older_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let text = "x starting as process 1\n[ERROR] old\nx Starting MariaDB 11.8.6-MariaDB server_uid f= as process 2\n[Note] a\n[ERROR] new\n[ERROR] Aborting\n";
        std::fs::write(&log, text).unwrap();
        assert_eq!(last_log_lines(&log, LOG_MARKS), "its log says '[ERROR] new / [ERROR] Aborting'");
        assert_eq!(last_log_lines(&directory.path().join("none"), LOG_MARKS), "its log is empty");
    }
}
