//! Replay as the manuals have it, `mysqlbinlog | mysql`, of the same log into a clone of the same backup: what keiki's
//! replay is measured against.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use keiki::engine::mysql::clone::{ACCOUNT, PASSWORD_FILE, SOCKET_FILE};
use keiki::engine::mysql::source::read_password;

use crate::support::mariadb::as_user;
use crate::support::postgres::server_user;

/// The two programs, and what they read.
pub struct Rival {
    pub log_reader: PathBuf,
    pub client: PathBuf,
    pub client_arguments: Vec<&'static str>,
    /// Where the source's log lies.
    pub source_data_dir: PathBuf,
    /// The base name of its files.
    pub log_base: String,
    /// What makes the server as careless as it is while keiki replays.
    pub preparation: Vec<&'static str>,
}

/// A part of the log: file numbers with offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    pub from: (u64, u64),
    pub to: (u64, u64),
}

impl Stretch {
    /// From `file:1:2345` as a backup says it to `binlog.000003:4567` as a server does.
    pub fn parse(from: &str, to: &str) -> Stretch {
        let numbers = |text: &str| {
            let (file, offset) = text.rsplit_once(':').unwrap();
            let number = file.rsplit([':', '.']).next().unwrap();
            (number.parse().unwrap(), offset.parse().unwrap())
        };
        Stretch { from: numbers(from), to: numbers(to) }
    }
}

impl Rival {
    /// How long it takes into the running clone with this run directory. The error is what the programs complain about.
    pub fn replay(&self, stretch: Stretch, run_dir: &Path) -> Result<Duration, String> {
        let files = (stretch.from.0..=stretch.to.0)
            .map(|number| self.source_data_dir.join(format!("{}.{number:06}", self.log_base)));
        let mut reader = Command::new(&self.log_reader);
        reader
            .args(["--no-defaults", "--disable-log-bin"])
            .arg(format!("--start-position={}", stretch.from.1))
            .arg(format!("--stop-position={}", stretch.to.1))
            .args(files)
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        as_user(&mut reader, &server_user());
        for sql in &self.preparation {
            let output = self.client(run_dir).arg("-e").arg(sql).output().unwrap();
            said(sql, &output)?;
        }
        let mut client = self.client(run_dir);
        client.arg("--binary-mode");
        let began = Instant::now();
        let mut reading = reader.spawn().unwrap();
        let output = client.stdin(reading.stdout.take().unwrap()).output().unwrap();
        let took = began.elapsed();
        let read = reading.wait().unwrap();
        said("the client", &output)?;
        match read {
            status if status.success() => Ok(took),
            status => Err(format!("'{}' ended with {status}", self.log_reader.display())),
        }
    }

    /// Says by which factor keiki was faster; an error if it was not.
    pub fn verdict(&self, keiki: Duration, other: Duration) -> Result<(), String> {
        let (keiki, other) = (keiki.as_secs_f64(), other.as_secs_f64());
        let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
        let pipe = format!("'{} | {}'", name(&self.log_reader), name(&self.client));
        let factor = other / keiki;
        let line = format!("replay {factor:.1} times as fast as {pipe}: {keiki:.1} s and {other:.1} s");
        println!("{line}");
        if factor >= 1.0 { Ok(()) } else { Err(line) }
    }

    fn client(&self, run_dir: &Path) -> Command {
        let mut command = Command::new(&self.client);
        command.arg("--no-defaults").args(&self.client_arguments);
        command.args(["-u", ACCOUNT, "-S"]).arg(run_dir.join(SOCKET_FILE));
        command.env("MYSQL_PWD", read_password(&run_dir.join(PASSWORD_FILE)).unwrap());
        command
    }
}

fn said(what: &str, output: &std::process::Output) -> Result<(), String> {
    // It prints the whole statement that failed, and last the reason.
    let text = String::from_utf8_lossy(&output.stderr);
    let reason = text.lines().rfind(|line| line.starts_with("ERROR")).unwrap_or("it does not say why");
    if output.status.success() { Ok(()) } else { Err(format!("{what}: {reason}")) }
}
