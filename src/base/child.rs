//! Child processes: started in a session of their own, with a clean environment, as another user where wanted, with
//! bounded output; and processes known by more than a number that may be given again.
//!
//! Invariants: a child never inherits the environment, the working directory or the standard input of the agent. Memory
//! for its output is bounded. A [`RunningChild`] that is dropped is killed with its whole process group, unless it was
//! detached.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::users::{User, become_user_in_this_thread, may_become_another_user};
use crate::error::{Context, Error, Kind, Result};

/// Of captured output the last bytes are kept, for standard output and standard error each.
pub const CAPTURED_BYTES_MAX: usize = 64 << 10;

/// How long a cancelled child may take to end after SIGTERM before it gets SIGKILL.
const TERMINATION_SECONDS: u64 = 10;

/// A grandchild may hold the pipe open after the child ended (a daemon it started); its output is not waited for.
const LAST_OUTPUT_MILLIS: u64 = 500;

/// The search path of children, whatever that of the agent.
const SAFE_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process to be started.
#[derive(Debug, Clone)]
pub struct ChildCommand {
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: BTreeMap<OsString, OsString>,
    directory: PathBuf,
    user: Option<User>,
    output_file: Option<PathBuf>,
    output_pipe: Option<std::sync::Arc<std::io::PipeWriter>>,
}

/// How a child ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    /// The last [`CAPTURED_BYTES_MAX`] bytes; empty if the output went to a file.
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Finished {
    /// `exit code 1` or `signal 9`, for messages.
    pub fn ending(&self) -> String {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => String::from("an unknown end"),
        }
    }

    /// The last line with text that it wrote to standard error, or else to standard output.
    pub fn last_words(&self) -> Option<String> {
        [&self.stderr, &self.stdout].into_iter().find_map(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_string)
        })
    }
}

impl ChildCommand {
    /// A command without arguments; a program without `/` is searched for in the system's usual directories.
    pub fn new(program: impl Into<PathBuf>) -> ChildCommand {
        let mut environment = BTreeMap::new();
        environment.insert(OsString::from("PATH"), OsString::from(SAFE_PATH));
        // Messages that are read by a program must not be translated.
        environment.insert(OsString::from("LC_ALL"), OsString::from("C"));
        ChildCommand {
            program: program.into(),
            arguments: Vec::new(),
            environment,
            directory: PathBuf::from("/"),
            user: None,
            output_file: None,
            output_pipe: None,
        }
    }

    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> ChildCommand {
        self.arguments.push(argument.as_ref().to_os_string());
        self
    }

    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> ChildCommand {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_os_string()));
        self
    }

    /// Sets a variable of the child's environment, which otherwise has PATH, LC_ALL=C, HOME, USER and LOGNAME.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> ChildCommand {
        self.environment.insert(name.as_ref().to_os_string(), value.as_ref().to_os_string());
        self
    }

    /// The working directory of the child; `/` if not set.
    pub fn current_dir(mut self, directory: impl Into<PathBuf>) -> ChildCommand {
        self.directory = directory.into();
        self
    }

    /// Runs the child as this user with all its groups. If we are that user already, nothing changes.
    pub fn as_user(mut self, user: &User) -> ChildCommand {
        self.user = Some(user.clone());
        self
    }

    /// Appends standard output and standard error to this file (created with mode 0600) instead of capturing them.
    pub fn output_to_file(mut self, path: impl Into<PathBuf>) -> ChildCommand {
        self.output_file = Some(path.into());
        self
    }

    /// Sends standard output into this pipe instead of capturing it, for output that is long; whoever holds the other
    /// end sees it end with the child. Standard error is still captured.
    pub fn output_to_pipe(mut self, pipe: std::io::PipeWriter) -> ChildCommand {
        self.output_pipe = Some(std::sync::Arc::new(pipe));
        self
    }

    fn what(&self) -> String {
        format!("cannot run '{}'", self.program.display())
    }

    /// Starts the child. Must be called within a runtime.
    pub fn spawn(self) -> Result<RunningChild> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).env_clear().current_dir(&self.directory).stdin(Stdio::null());
        if let Some(user) = &self.user {
            command.env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name);
        }
        command.envs(&self.environment);
        match &self.output_file {
            None => {
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
            }
            Some(path) => {
                let open = || {
                    let file = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
                    Ok((file.try_clone()?, file))
                };
                let (stdout, stderr): (std::fs::File, std::fs::File) = std::io::Result::context(open(), || {
                    format!("{}: cannot open '{}' for its output", self.what(), path.display())
                })?;
                command.stdout(stdout).stderr(stderr);
            }
        }
        if let Some(pipe) = &self.output_pipe {
            let pipe =
                std::io::Result::context(pipe.try_clone(), || format!("{}: no pipe for its output", self.what()))?;
            command.stdout(pipe);
        }
        let other_user = self.user.as_ref().filter(|user| !user.is_current());
        if let Some(user) = other_user
            && !may_become_another_user()
        {
            let reason = format!("{} as user '{}': this process may not become another user", self.what(), user.name);
            return Err(Error::new(Kind::Forbidden, reason)
                .hint(format!("run keiki as root, or as user '{}' itself", user.name)));
        }
        let identity = other_user.map(|user| (user.uid, user.gid, user.groups.clone()));
        // SAFETY: between fork and exec only system calls that neither allocate nor lock are made.
        unsafe {
            command.pre_exec(move || {
                nix::unistd::setsid()?;
                match &identity {
                    Some((uid, gid, groups)) => become_user_in_this_thread(*uid, *gid, groups),
                    None => Ok(()),
                }
            });
        }
        let mut child = command.spawn().context(|| self.what())?;
        let pid = child.id().unwrap_or(0);
        // It cannot have been waited for yet, so the number is still its own, even if it ended already.
        let process = Process { pid, start_ticks: process_start_ticks(pid).unwrap_or(0) };
        let stdout = child.stdout.take().map(|pipe| capture(Box::pin(pipe)));
        let stderr = child.stderr.take().map(|pipe| capture(Box::pin(pipe)));
        Ok(RunningChild { what: self.what(), process, child: Some(child), stdout, stderr })
    }

    /// Runs the child to its end, whatever its exit code.
    pub async fn run(self, cancel: &CancellationToken) -> Result<Finished> {
        self.spawn()?.wait(cancel).await
    }

    /// Runs the child to its end; an exit code other than 0 is an error of kind `Server` with its last words.
    pub async fn run_checked(self, cancel: &CancellationToken) -> Result<Finished> {
        let what = self.what();
        let finished = self.run(cancel).await?;
        if finished.status.success() {
            return Ok(finished);
        }
        let words = finished.last_words().unwrap_or_else(|| String::from("no message"));
        Err(Error::new(Kind::Server, format!("{what}: {}: {words}", finished.ending())))
    }
}

type Capture = JoinHandle<()>;
type Captured = (std::sync::Arc<std::sync::Mutex<Vec<u8>>>, Capture);

/// Reads a pipe to its end and keeps the last bytes.
fn capture(mut pipe: std::pin::Pin<Box<dyn tokio::io::AsyncRead + Send>>) -> Captured {
    let kept = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let task = tokio::spawn({
        let kept = kept.clone();
        async move {
            let mut buffer = vec![0u8; 8 << 10];
            while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
                let mut kept = kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                kept.extend_from_slice(&buffer[..count]);
                let surplus = kept.len().saturating_sub(CAPTURED_BYTES_MAX);
                kept.drain(..surplus);
            }
        }
    });
    (kept, task)
}

async fn take_captured(captured: Option<Captured>) -> Vec<u8> {
    let Some((kept, task)) = captured else { return Vec::new() };
    let abort = task.abort_handle();
    let _ = tokio::time::timeout(Duration::from_millis(LAST_OUTPUT_MILLIS), task).await;
    abort.abort();
    std::mem::take(&mut *kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
}

/// A child that was started by this process.
pub struct RunningChild {
    what: String,
    process: Process,
    /// Nothing after it was detached.
    child: Option<Child>,
    stdout: Option<Captured>,
    stderr: Option<Captured>,
}

impl RunningChild {
    /// Number and start of the child, which is also the leader of its process group.
    pub fn process(&self) -> Process {
        self.process
    }

    /// Whether it ended, without waiting.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        let what = || self.what.clone();
        match &mut self.child {
            Some(child) => child.try_wait().context(what),
            None => Ok(None),
        }
    }

    /// Waits for the end. When `cancel` fires, the process group gets SIGTERM and after ten seconds SIGKILL, and the
    /// error is of kind `Cancelled`.
    pub async fn wait(mut self, cancel: &CancellationToken) -> Result<Finished> {
        let what = self.what.clone();
        let Some(child) = &mut self.child else {
            return Err(Error::new(Kind::Internal, format!("{what}: it was detached")));
        };
        let ended = tokio::select! {
            status = child.wait() => Some(status.context(|| &what)?),
            () = cancel.cancelled() => None,
        };
        if let Some(status) = ended {
            let stdout = take_captured(self.stdout.take()).await;
            let stderr = take_captured(self.stderr.take()).await;
            return Ok(Finished { status, stdout, stderr });
        }
        self.process.signal_group(Signal::SIGTERM)?;
        let grace = Duration::from_secs(TERMINATION_SECONDS);
        if tokio::time::timeout(grace, child.wait()).await.is_err() {
            self.process.signal_group(Signal::SIGKILL)?;
            child.wait().await.context(|| &what)?;
        }
        Err(Error::new(Kind::Cancelled, format!("{what}: cancelled")))
    }

    /// Lets the child live on by itself; the runtime collects its exit status when it ends.
    pub fn detach(mut self) -> Process {
        self.child = None;
        self.process
    }
}

impl Drop for RunningChild {
    fn drop(&mut self) {
        for (_, task) in [self.stdout.take(), self.stderr.take()].into_iter().flatten() {
            task.abort();
        }
        if let Some(child) = &mut self.child
            // As long as it was not collected its number, and so that of its group, is its own.
            && matches!(child.try_wait(), Ok(None))
        {
            let _ = self.process.signal_group(Signal::SIGKILL);
        }
    }
}

/// A process of this boot of the machine: the number alone would be given again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    /// See [`process_start_ticks`].
    pub start_ticks: u64,
}

impl Process {
    /// Whether it still runs. A zombie does not.
    pub fn is_alive(&self) -> bool {
        is_process_alive(self.pid, self.start_ticks)
    }

    /// Sends a signal; false if the process is not there any more.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        self.send(signal, |pid| kill(pid, signal))
    }

    /// Sends a signal to the process group that it leads; false if the group is not there any more.
    pub fn signal_group(&self, signal: Signal) -> Result<bool> {
        self.send(signal, |pid| killpg(pid, signal))
    }

    fn send(&self, signal: Signal, send: impl FnOnce(Pid) -> nix::Result<()>) -> Result<bool> {
        // 0 and 1 mean "my own group" and init to kill(2).
        let pid = match i32::try_from(self.pid) {
            Ok(pid @ 2..) if process_start_ticks(self.pid) == Some(self.start_ticks) => Pid::from_raw(pid),
            _ => return Ok(false),
        };
        match send(pid) {
            Ok(()) => Ok(true),
            Err(nix::errno::Errno::ESRCH) => Ok(false),
            Err(errno) => Err(Error::io(format!("cannot send {signal} to process {pid}"), errno.into())),
        }
    }
}

/// The moment a process started, in clock ticks since boot: field 22 of `/proc/PID/stat` (proc_pid_stat(5)). With the
/// boot id it names a process for ever.
pub fn process_start_ticks(pid: u32) -> Option<u64> {
    stat_field(pid, 22)?.parse().ok()
}

/// Whether the process with this number that started at `start_ticks` runs; a zombie does not.
pub fn is_process_alive(pid: u32, start_ticks: u64) -> bool {
    process_start_ticks(pid) == Some(start_ticks) && !matches!(stat_field(pid, 3).as_deref(), None | Some("Z" | "X"))
}

/// A field of `/proc/PID/stat`, counted from 1. The second is the name in parentheses, which may hold anything, also
/// spaces and parentheses; the last `)` ends it.
fn stat_field(pid: u32, number: usize) -> Option<String> {
    let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    let (_, rest) = text.rsplit_once(')')?;
    rest.split_whitespace().nth(number.checked_sub(3)?).map(str::to_string)
}

/// A random id of this boot of the machine (random(4), `boot_id`).
pub fn boot_id() -> Result<String> {
    one_line(Path::new("/proc/sys/kernel/random/boot_id"))
}

/// The id of this machine's installation (machine-id(5)), which must have been given: leases tell machines apart by it.
pub fn machine_id() -> Result<String> {
    let path = "/etc/machine-id";
    let id = match one_line(Path::new(path)) {
        Err(error) if error.kind() != Kind::NotFound => return Err(error),
        other => other.unwrap_or_default(),
    };
    // `uninitialized` is there during the first boot of an image.
    if id.is_empty() || id == "uninitialized" {
        return Err(Error::new(Kind::Unsupported, format!("this machine has no id in '{path}'"))
            .hint("archives are guarded by it; 'systemd-machine-id-setup' makes one"));
    }
    Ok(id)
}

fn one_line(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).context(|| format!("cannot read '{}'", path.display()))?;
    Ok(text.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> ChildCommand {
        ChildCommand::new("/bin/sh").args(["-c", script])
    }

    async fn eventually(condition: impl Fn() -> bool) {
        for _ in 0..4000 {
            if condition() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("it does not happen");
    }

    async fn output(command: ChildCommand) -> String {
        let finished = command.run_checked(&CancellationToken::new()).await.unwrap();
        String::from_utf8(finished.stdout).unwrap()
    }

    #[tokio::test]
    async fn a_child_has_a_clean_environment_the_root_directory_and_its_own_session() {
        let script = "env | cut -d= -f1 | sort | tr '\\n' ' '; pwd; cut -d' ' -f6 /proc/self/stat; echo $$";
        let text = output(shell(script).env("EXTRA", "1")).await;
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("EXTRA LC_ALL PATH PWD /"));
        assert_eq!(lines.next(), lines.next(), "the session is not led by the child");
    }

    #[tokio::test]
    async fn of_long_output_the_end_is_kept() {
        let finished = shell("yes | head -c 1000000; echo end; echo oops >&2; exit 3");
        let finished = finished.run(&CancellationToken::new()).await.unwrap();
        assert_eq!(finished.stdout.len(), CAPTURED_BYTES_MAX);
        assert!(finished.stdout.ends_with(b"end\n"));
        assert_eq!((finished.ending().as_str(), finished.last_words().as_deref()), ("exit code 3", Some("oops")));
    }

    #[tokio::test]
    async fn a_failed_child_is_an_error_with_its_last_words() {
        let error = shell("echo 'disk on fire' >&2; exit 7").run_checked(&CancellationToken::new()).await.unwrap_err();
        assert_eq!(error.message(), "cannot run '/bin/sh': exit code 7: disk on fire");
        let missing = ChildCommand::new("/nowhere/postgres").spawn().err().unwrap();
        assert_eq!(missing.kind(), Kind::NotFound);
    }

    #[tokio::test]
    async fn a_daemon_that_keeps_the_pipe_does_not_hold_up_the_wait() {
        let start = std::time::Instant::now();
        let finished = shell("sleep 30 & echo $!").run(&CancellationToken::new()).await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(10));
        let pid = String::from_utf8(finished.stdout).unwrap().trim().parse().unwrap();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }

    #[tokio::test]
    async fn cancelling_ends_the_child_and_its_children() {
        let child = shell("sleep 60 & sleep 60").spawn().unwrap();
        let process = child.process();
        let cancel = CancellationToken::new();
        cancel.cancel();
        assert_eq!(child.wait(&cancel).await.unwrap_err().kind(), Kind::Cancelled);
        assert!(!process.is_alive());
        assert!(!process.signal(Signal::SIGTERM).unwrap());
        // The group is gone when nobody in it can be signalled.
        eventually(|| killpg(Pid::from_raw(process.pid as i32), None).is_err()).await;
    }

    #[tokio::test]
    async fn a_dropped_child_dies_and_a_detached_one_lives() {
        let dropped = shell("sleep 60").spawn().unwrap();
        let process = dropped.process();
        drop(dropped);
        eventually(|| !process.is_alive()).await;
        let process = shell("sleep 60").spawn().unwrap().detach();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(process.is_alive());
        assert!(
            !Process { start_ticks: process.start_ticks + 1, ..process }.is_alive(),
            "another process of that number"
        );
        assert!(process.signal_group(Signal::SIGKILL).unwrap());
    }

    #[tokio::test]
    async fn a_child_runs_as_the_other_user_with_only_its_groups() {
        let nobody = User::by_name("nobody").unwrap();
        let command = shell("id -u; id -g; id -G; grep ^CapEff /proc/self/status").as_user(&nobody);
        if !may_become_another_user() {
            assert_eq!(command.spawn().err().unwrap().kind(), Kind::Forbidden);
            return;
        }
        let text = output(command).await;
        let groups: Vec<String> = nobody.groups.iter().map(u32::to_string).collect();
        let expected = format!("{}\n{}\n{}\nCapEff:\t0000000000000000\n", nobody.uid, nobody.gid, groups.join(" "));
        assert_eq!(text, expected);
    }

    #[tokio::test]
    async fn output_goes_to_the_end_of_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        for _ in 0..2 {
            output(shell("echo out; echo err >&2").output_to_file(&path)).await;
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "out\nerr\nout\nerr\n");
    }

    #[test]
    fn this_process_is_alive_by_number_and_start() {
        let pid = std::process::id();
        assert!(is_process_alive(pid, process_start_ticks(pid).unwrap()));
        assert!(!is_process_alive(pid, 1));
        assert_eq!(boot_id().unwrap().len(), 36);
    }
}
