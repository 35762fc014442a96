//! Users of the operating system, and acting as one of them.
//!
//! getpwnam(3) and its relatives are never called: in a static binary they load foreign modules and crash. The files
//! `/etc/passwd` and `/etc/group` (passwd(5), group(5)) are read, and whoever is not in them is asked of the program
//! `getent`, which honours sssd and LDAP. All calls block.

use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Kind, Result};

/// An account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// Every group of the user, the primary one included, in ascending order.
    pub groups: Vec<u32>,
    pub home: PathBuf,
}

/// A directory service that does not answer must not hold up an agent for longer.
const GETENT_SECONDS_MAX: u64 = 10;

/// Far more than an account has; what is longer is not an answer of getent.
const GETENT_BYTES_MAX: u64 = 1 << 20;

impl User {
    /// The account called `name`; an unknown one is `NotFound`.
    pub fn by_name(name: &str) -> Result<User> {
        Sources::of_this_machine().find(name, |entry| entry.name == name)
    }

    /// The account with this number; an unknown one is `NotFound`.
    pub fn by_uid(uid: u32) -> Result<User> {
        Sources::of_this_machine().find(&uid.to_string(), |entry| entry.uid == uid)
    }

    /// Whether this process acts as this user already.
    pub fn is_current(&self) -> bool {
        nix::unistd::geteuid().as_raw() == self.uid
    }
}

/// The account this process acts as. One that no source knows (a container with a bare number) gets its number as
/// its name and `/` as its home.
pub fn current_user() -> Result<User> {
    let uid = nix::unistd::geteuid().as_raw();
    match User::by_uid(uid) {
        Err(error) if error.kind() == Kind::NotFound => {
            let gid = nix::unistd::getegid().as_raw();
            Ok(User { name: uid.to_string(), uid, gid, groups: vec![gid], home: PathBuf::from("/") })
        }
        other => other,
    }
}

/// The number of the group called `name`, or nothing if there is no such group.
pub fn group_id(name: &str) -> Result<Option<u32>> {
    Sources::of_this_machine().group_id(name)
}

/// Whether this process can take on another user: it has CAP_SETGID and CAP_SETUID (capabilities(7): numbers 6 and 7).
pub fn may_become_another_user() -> bool {
    // The capabilities are those of the calling thread, which are the process's own unless a thread gave some up.
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    match effective {
        Some(bits) => bits & 0b1100_0000 == 0b1100_0000,
        // Without /proc: the usual meaning of root.
        None => nix::unistd::geteuid().is_root(),
    }
}

/// Where accounts are looked up; other files in tests.
struct Sources {
    passwd: PathBuf,
    group: PathBuf,
    getent: Vec<PathBuf>,
}

/// One line of passwd(5).
struct Entry {
    name: String,
    uid: u32,
    gid: u32,
    home: PathBuf,
}

impl Entry {
    /// `name:password:uid:gid:comment:home:shell`; anything else is not an account.
    fn parse(line: &[u8]) -> Option<Entry> {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
        let [name, _password, uid, gid, _comment, home, ..] = fields.as_slice() else { return None };
        let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse().ok();
        Some(Entry {
            name: std::str::from_utf8(name).ok().filter(|name| !name.is_empty())?.to_string(),
            uid: number(uid)?,
            gid: number(gid)?,
            home: PathBuf::from(std::ffi::OsStr::from_bytes(home)),
        })
    }
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
}

impl Sources {
    fn of_this_machine() -> Sources {
        Sources {
            passwd: PathBuf::from("/etc/passwd"),
            group: PathBuf::from("/etc/group"),
            // Fixed places and no search path: this may run as root.
            getent: vec![PathBuf::from("/usr/bin/getent"), PathBuf::from("/bin/getent")],
        }
    }

    /// The first account that `wanted` accepts; `key` is its name or number as text.
    fn find(&self, key: &str, wanted: impl Fn(&Entry) -> bool) -> Result<User> {
        let what = || format!("cannot look up user '{}'", key.escape_default());
        let unknown = || {
            Error::new(Kind::NotFound, format!("{}: no such user on this host", what()))
                .hint(format!("does 'getent passwd {}' show it?", key.escape_default()))
        };
        // getent(1) would take it for an option, or as several keys.
        if key.is_empty() || key.starts_with('-') || key.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(unknown());
        }
        let passwd = read_if_there(&self.passwd).context(what)?;
        let in_file = lines(&passwd).filter_map(Entry::parse).find(&wanted);
        let (entry, is_local) = match in_file {
            Some(entry) => (entry, true),
            None => {
                let answer = self.ask_getent("passwd", key).context(what)?;
                let entry = lines(&answer).filter_map(Entry::parse).find(&wanted).ok_or_else(unknown)?;
                (entry, false)
            }
        };
        let mut groups = self.groups_in_file(&entry.name).context(what)?;
        if !is_local {
            // `initgroups` answers `name gid gid ...` (getent(1)).
            let answer = self.ask_getent("initgroups", &entry.name).context(what)?;
            let text = String::from_utf8_lossy(&answer);
            groups.extend(text.split_whitespace().skip(1).filter_map(|gid| gid.parse::<u32>().ok()));
        }
        groups.push(entry.gid);
        groups.sort_unstable();
        groups.dedup();
        Ok(User { name: entry.name, uid: entry.uid, gid: entry.gid, groups, home: entry.home })
    }

    /// The groups that list the user as a member: `name:password:gid:member,member` (group(5)).
    fn groups_in_file(&self, name: &str) -> Result<Vec<u32>> {
        let text = read_if_there(&self.group)?;
        let gid_if_member = |line: &[u8]| {
            let fields: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
            let [_name, _password, gid, members] = fields.as_slice() else { return None };
            let is_member = members.split(|byte| *byte == b',').any(|member| member == name.as_bytes());
            is_member.then(|| std::str::from_utf8(gid).ok()?.parse::<u32>().ok())?
        };
        Ok(lines(&text).filter_map(gid_if_member).collect())
    }

    /// `name:password:gid:members` (group(5)), in the file or as `getent group` prints it.
    fn group_id(&self, name: &str) -> Result<Option<u32>> {
        let find = |text: &[u8]| {
            lines(text).find_map(|line| {
                let mut fields = line.split(|byte| *byte == b':');
                let is_wanted = fields.next() == Some(name.as_bytes());
                let gid = fields.nth(1).and_then(|gid| std::str::from_utf8(gid).ok()?.parse::<u32>().ok());
                gid.filter(|_| is_wanted)
            })
        };
        match find(&read_if_there(&self.group)?) {
            Some(gid) => Ok(Some(gid)),
            None => Ok(find(&self.ask_getent("group", name)?)),
        }
    }

    /// What `getent DATABASE KEY` prints; nothing if it knows nothing or is not installed.
    fn ask_getent(&self, database: &str, key: &str) -> Result<Vec<u8>> {
        let Some(program) = self.getent.iter().find(|path| path.exists()) else { return Ok(Vec::new()) };
        let what = || format!("cannot ask '{} {database}'", program.display());
        let mut child = Command::new(program)
            .args([database, key])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context(what)?;
        let output = child.stdout.take();
        // Reading on another thread, so that a service that hangs does not hang us; it ends when the child is killed.
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let outcome = output.map_or(Ok(0), |pipe| pipe.take(GETENT_BYTES_MAX).read_to_end(&mut bytes));
            outcome.map(|_| bytes)
        });
        let start = Instant::now();
        while !reader.is_finished() || child.try_wait().context(what)?.is_none() {
            if start.elapsed() > Duration::from_secs(GETENT_SECONDS_MAX) {
                // Both only fail if it ended just now.
                let _ = child.kill();
                let _ = child.wait();
                let reason = format!("{}: no answer within {GETENT_SECONDS_MAX} seconds", what());
                return Err(Error::new(Kind::Unreachable, reason).hint("does the directory service (sssd, LDAP) work?"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let read = reader.join().map_err(|_| Error::new(Kind::Internal, format!("{}: the reader panicked", what())))?;
        read.context(what)
    }
}

fn read_if_there(path: &Path) -> Result<Vec<u8>> {
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.context(|| format!("cannot read '{}'", path.display())),
    }
}

/// Takes on groups, group and user of the calling **thread** only, with plain system calls: the C library's functions
/// would change every thread. Also right in a forked child before exec: nothing here allocates or locks.
pub(super) fn become_user_in_this_thread(uid: u32, gid: u32, groups: &[u32]) -> std::io::Result<()> {
    let check = |outcome: libc::c_long| if outcome == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) };
    // Groups first, user last: after that there is no right to change the others. SAFETY: the pointer and the length
    // describe `groups`; the other arguments are numbers.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        check(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))
    }
}

/// Connects a unix socket as `user`: servers with peer authentication look at the credentials at the moment of
/// connect(2) (unix(7), SO_PEERCRED). Without the right to become that user it connects as what we are, and the
/// server decides.
pub fn connect_unix_as(user: &User, path: &Path) -> Result<UnixStream> {
    let what = || format!("cannot connect to '{}' as user '{}'", path.display(), user.name);
    if user.is_current() || !may_become_another_user() {
        return UnixStream::connect(path).context(what);
    }
    // The thread lives for this one call, so no later work can run with the wrong credentials.
    let connected = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(String::from("connect-as")).spawn_scoped(scope, || {
            become_user_in_this_thread(user.uid, user.gid, &user.groups)?;
            UnixStream::connect(path)
        })?;
        thread.join().map_err(|_| std::io::Error::other("the connecting thread panicked"))?
    });
    connected.context(what)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

    use super::*;

    fn sources(directory: &Path, getent: &str) -> Sources {
        std::fs::write(directory.join("passwd"), "root:x:0:0::/root:/bin/sh\n+@nis\npg:x:70:71:P,,:/var/pg:/bin/sh\n")
            .unwrap();
        std::fs::write(directory.join("group"), "ssl:x:99:www,pg\nother:x:98:pgx\nadm:x:4:pg\n").unwrap();
        let program = directory.join("getent");
        std::fs::write(&program, format!("#!/bin/sh\n{getent}\n")).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Sources {
            passwd: directory.join("passwd"),
            group: directory.join("group"),
            getent: vec![directory.join("nowhere"), program],
        }
    }

    #[test]
    fn a_local_user_comes_from_the_files_with_every_group() {
        let directory = tempfile::tempdir().unwrap();
        let sources = sources(directory.path(), "exit 9");
        let user = sources.find("pg", |entry| entry.name == "pg").unwrap();
        let home = PathBuf::from("/var/pg");
        assert_eq!(user, User { name: String::from("pg"), uid: 70, gid: 71, groups: vec![4, 71, 99], home });
    }

    #[test]
    fn a_user_of_a_directory_service_comes_from_getent_with_its_groups() {
        let directory = tempfile::tempdir().unwrap();
        let script = r#"[ "$1" = passwd ] && echo 'dba:*:5000:5001::/home/dba:/bin/sh'; [ "$1" = initgroups ] && echo 'dba  5001 6000'"#;
        let sources = sources(directory.path(), script);
        let user = sources.find("5000", |entry| entry.uid == 5000).unwrap();
        assert_eq!((user.name.as_str(), user.groups), ("dba", vec![5001, 6000]));
    }

    #[test]
    fn an_unknown_user_is_not_found_and_an_option_is_not_a_name() {
        let directory = tempfile::tempdir().unwrap();
        let sources = sources(directory.path(), "exit 2");
        for name in ["nobody-here", "", "--help", "a b", "a\nb"] {
            let error = sources.find(name, |entry| entry.name == name).unwrap_err();
            assert_eq!(error.kind(), Kind::NotFound, "{name:?}");
        }
        assert_eq!(User::by_uid(0).unwrap().name, "root");
        assert_eq!(current_user().unwrap().uid, nix::unistd::geteuid().as_raw());
    }

    #[test]
    fn a_socket_sees_the_other_user_and_the_process_stays_what_it_was() {
        if !may_become_another_user() {
            // The promise for this case is the plain connect, which needs no privilege to be seen.
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
        let nobody = User::by_name("nobody").unwrap();
        let _client = connect_unix_as(&nobody, &path).unwrap();
        let (server, _) = listener.accept().unwrap();
        let seen = getsockopt(&server, PeerCredentials).unwrap();
        assert_eq!((seen.uid(), seen.gid()), (nobody.uid, nobody.gid));
        let threads = std::fs::read_dir("/proc/self/task").unwrap();
        for thread in threads {
            // A thread of another test may end meanwhile.
            let Ok(status) = std::fs::read_to_string(thread.unwrap().path().join("status")) else { continue };
            let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap().to_string();
            assert_eq!(uids.split_whitespace().next(), Some("0"), "{status}");
        }
        // A directory closed to that user stays closed: the connection really is made with its rights.
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o700)).unwrap();
        assert!(connect_unix_as(&nobody, &path).is_err());
    }
}
