//! The base backup: the base of the append-only file, as it lies on the server's disk.
//!
//! A server with an append-only file has on its disk, at all times, the data set of a moment (the base) and every command
//! since (the increments), and both meet exactly: the increment that follows a base was opened in the same instant in which
//! the base's process was forked. So a backup reads the base and remembers with which log file the log goes on. It costs
//! the server nothing but the reading: no fork, no memory, no file written, where BGSAVE and a stream over the replication
//! protocol fork and write or send all of the data. Replaying is what the server itself would replay after a restart. Only
//! where that has become much, because the server does not rewrite by itself, it is told to (BGREWRITEAOF): when the log
//! since the base is longer than the base, which is the server's own rule (`auto-aof-rewrite-percentage 100`).
//!
//! The base's checksum is verified while it is read; a damaged one is refused here and not found in a clone.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_on_thread;
use crate::engine::redis::ondisk::aof::AofWalker;
use crate::engine::redis::ondisk::manifest::ManifestPart;
use crate::engine::redis::ondisk::rdb::{HEADER_BYTES_WANTED, RdbCheck, RdbHeader, RdbVerdict};
use crate::engine::redis::session::{Reply, Session};
use crate::engine::redis::settings::{ACL_FACT_PREFIX, APPEND_DIR, APPEND_FILE, Module, facts_of_settings};
use crate::engine::redis::source::{Observation, server_time};
use crate::engine::redis::{Inner, cluster, left_behind};
use crate::engine::{BaseSink, BaseSpan};
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::{FileKind, FileMeta};
use crate::model::position::Position;

/// Facts of a backup besides those of `settings`.
pub const RDB_VERSION_FACT: &str = "rdb_version";
/// The name of the base in the clone's directory of the append-only file.
pub const BASE_FACT: &str = "base";
/// `yes` if the log has times in it from the end of the backup on: whole seconds; `received` if the agent has written down
/// when it received what.
pub const LOG_TIMES_FACT: &str = "log_times";
pub const LOG_TIMES_SECONDS: &str = "yes";
pub const LOG_TIMES_RECEIVED: &str = "received";
/// The database that the log is in where it goes on from the base, if it does not say so itself.
pub const DATABASE_FACT: &str = "database";
pub const USED_MEMORY_FACT: &str = "used_memory";

/// Below this a rewrite is not worth its fork (`auto-aof-rewrite-min-size`, 64 MiB by default).
const REWRITE_BYTES_MIN: u64 = 64 << 20;
const REWRITE_POLL: Duration = Duration::from_millis(100);
/// How often a base may vanish under our hands because the server has made another one.
const OPEN_ATTEMPTS: usize = 10;

/// An open base, and where the log goes on from it.
struct OpenBase {
    file: File,
    source_path: PathBuf,
    name: String,
    bytes: u64,
    start: Position,
    began_at: Timestamp,
}

/// Takes the backup: see [`crate::engine::Engine::back_up`].
pub(super) async fn back_up(
    inner: &Inner,
    label: &str,
    sink: Arc<dyn BaseSink>,
    cancel: CancellationToken,
) -> Result<BaseSpan> {
    let what = || format!("cannot back up instance '{}'", inner.source().name);
    run(inner, label, sink, &cancel).await.context(what)
}

async fn run(inner: &Inner, label: &str, sink: Arc<dyn BaseSink>, cancel: &CancellationToken) -> Result<BaseSpan> {
    let base = open_base(inner, cancel).await?;
    let (start, began_at) = (base.start, base.began_at);
    if let Some(name) = base.source_path.file_name() {
        inner.note_saved(name.to_string_lossy().into_owned());
    }
    let cancelled = cancel.clone();
    let (mut facts, verdict) = run_on_thread("redis-base", move || copy(base, sink.as_ref(), &cancelled)).await?;
    let seen = inner.observe().await?;
    let last = seen.files.last().ok_or_else(|| Error::new(Kind::Server, "the manifest names no increments"))?;
    let stop = Position::File { number: last.held.number, offset: last.readable_bytes };
    let log_times = if seen.writes_times { LOG_TIMES_SECONDS } else { "no" };
    describe(inner, &mut facts, label, verdict, (log_times, &seen.info)).await?;
    // The log's times are whole seconds, and commands that were executed while it was looked at may be in it: the first
    // moment that this backup can show is the second after all that was written, and after now.
    let now = inner.with_session(server_time).await?;
    let ended_at = second_after(now, seen.newest_second(start.file()?.0))?;
    let wait = ended_at.duration_since(Timestamp::now());
    if let Ok(wait) = Duration::try_from(wait) {
        tokio::time::sleep(wait.min(Duration::from_secs(2))).await;
    }
    Ok(BaseSpan { start, stop, began_at, ended_at, facts, damaged_blocks: Vec::new() })
}

/// Adds what every backup says: its label and how its bytes were checked, which times its log has, and the server as it is
/// and as its INFO said.
pub(super) async fn describe(
    inner: &Inner,
    facts: &mut BTreeMap<String, String>,
    label: &str,
    verdict: &str,
    (log_times, info): (&str, &BTreeMap<String, String>),
) -> Result<()> {
    facts.insert(String::from("label"), label.to_string());
    facts.insert(String::from("checksum"), verdict.to_string());
    facts.insert(LOG_TIMES_FACT.to_string(), log_times.to_string());
    if let Some(used) = info.get("used_memory") {
        facts.insert(USED_MEMORY_FACT.to_string(), used.clone());
    }
    facts.extend(inner.with_session(server_facts).await?);
    Ok(())
}

/// The whole second after the one of `at`, and after `newest` as well.
fn second_after(at: Timestamp, newest: Option<i64>) -> Result<Timestamp> {
    let second = newest.map_or(at.as_second(), |newest| newest.max(at.as_second())).saturating_add(1);
    Timestamp::from_second(second)
        .map_err(|_| Error::new(Kind::Server, format!("the server's clock says '{at}', and second {second} its log")))
}

/// Opens the newest base; lets the server make a new one first if what follows it has become long.
async fn open_base(inner: &Inner, cancel: &CancellationToken) -> Result<OpenBase> {
    let mut may_rewrite = true;
    let mut missing = None;
    let mut times_are_lost = has_lost_times(inner).await?;
    for _ in 0..OPEN_ATTEMPTS {
        let seen = inner.observe().await?;
        let Some(part) = seen.manifest.base.clone() else {
            rewrite(inner, &seen, cancel).await?;
            continue;
        };
        let start = first_log_file(&seen)?;
        let source_path = seen.append_dir.join(&part.name);
        let file = match File::open(&source_path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                if missing.as_ref() == Some(&part) {
                    return Err(Error::new(
                        Kind::Damaged,
                        format!("the manifest names '{}', which is not there", source_path.display()),
                    )
                    .hint("'redis-cli BGREWRITEAOF' makes a new base; the server could not start with this one"));
                }
                missing = Some(part);
                continue;
            }
            Err(error) => return Err(error).context(|| format!("cannot open '{}'", source_path.display())),
        };
        let bytes = file.metadata().context(|| format!("cannot look at '{}'", source_path.display()))?.len();
        if times_are_lost {
            times_are_lost = false;
            rewrite(inner, &seen, cancel).await?;
            continue;
        }
        let log_bytes = log_bytes_since(&seen, start);
        if may_rewrite && log_bytes > bytes.max(REWRITE_BYTES_MIN) {
            may_rewrite = false;
            rewrite(inner, &seen, cancel).await?;
            continue;
        }
        let suffix = if part.name.ends_with(".rdb") { "rdb" } else { "aof" };
        let name = format!("{APPEND_FILE}.1.base.{suffix}");
        return Ok(OpenBase { file, source_path, name, bytes, start, began_at: seen.observed_at });
    }
    Err(Error::new(Kind::Unreachable, "the server rewrites its append-only file faster than it can be opened"))
}

/// Whether the log had times, lost them and has them again: then it takes a new file for them to mean something.
async fn has_lost_times(inner: &Inner) -> Result<bool> {
    let seen = inner.observe().await?;
    let (Some(hold), Some(last)) = (inner.hold().await, seen.files.last()) else { return Ok(false) };
    let number = last.held.number;
    let lost = run_on_thread("redis-times", move || Ok(hold.untimed(number).is_some())).await?;
    Ok(seen.writes_times && lost)
}

/// The start of the first log file behind the base of the manifest.
fn first_log_file(seen: &Observation) -> Result<Position> {
    // An empty increment has handed its number on to the one behind it.
    let has_content = |part: &&ManifestPart| {
        std::fs::metadata(seen.append_dir.join(&part.name)).map_or(true, |metadata| metadata.len() > 0)
    };
    let increments = &seen.manifest.increments;
    let first = increments.iter().find(has_content).or(increments.last());
    let first = first.ok_or_else(|| Error::new(Kind::Server, "the manifest names no increments"))?;
    let held = seen.files.iter().rev().find(|file| file.held.sequence == first.sequence);
    let held = held.ok_or_else(|| {
        Error::new(Kind::Damaged, format!("increment {} of the append-only file is not held any more", first.sequence))
            .hint("was it given up because it took too much disk? 'redis-cli BGREWRITEAOF' begins a new one")
    })?;
    Ok(Position::File { number: held.held.number, offset: 0 })
}

fn log_bytes_since(seen: &Observation, start: Position) -> u64 {
    let since = |number: u64| Position::File { number, offset: 0 } >= start;
    seen.files.iter().filter(|file| since(file.held.number)).map(|file| file.readable_bytes).sum()
}

/// Tells the server to rewrite its append-only file and waits until the manifest has another base.
async fn rewrite(inner: &Inner, before: &Observation, cancel: &CancellationToken) -> Result<()> {
    tracing::info!("instance '{}': asking the server for a new base (BGREWRITEAOF)", inner.source().name);
    let asked = inner.with_session(async |session| {
        // That one is in progress, or waits for a save to end, serves as well.
        match session.ask_bytes(&[b"BGREWRITEAOF"]).await? {
            Reply::Error(message) if !message.contains("already in progress") => {
                Err(Error::new(Kind::Server, format!("the server says '{message}'")))
            }
            _ => Ok(()),
        }
    });
    asked.await?;
    loop {
        tokio::select! {
            () = tokio::time::sleep(REWRITE_POLL) => {}
            () = cancel.cancelled() => return Err(Error::new(Kind::Cancelled, "it was cancelled")),
        }
        let seen = inner.observe().await?;
        let is = |key: &str, value: &str| seen.info.get(key).is_some_and(|found| found == value);
        if seen.manifest.base != before.manifest.base {
            return Ok(());
        }
        if is("aof_rewrite_in_progress", "0")
            && is("aof_rewrite_scheduled", "0")
            && is("aof_last_bgrewrite_status", "err")
        {
            return Err(Error::new(Kind::Server, "the server could not rewrite its append-only file")
                .hint("is there enough memory and disk? the server's log says more"));
        }
    }
}

/// Reads the base into the sink and checks it on the way. Blocking.
fn copy(
    mut base: OpenBase,
    sink: &dyn BaseSink,
    cancel: &CancellationToken,
) -> Result<(std::collections::BTreeMap<String, String>, &'static str)> {
    let what = || format!("cannot read '{}'", base.source_path.display());
    sink.expect_bytes(base.bytes);
    let mut lane = sink.lane()?;
    let path = format!("{APPEND_DIR}/{}", base.name);
    lane.begin(FileMeta { path, kind: FileKind::Regular, mode: 0o600 })?;
    let mut check = BaseCheck::of(&base.name);
    let mut head = Vec::new();
    let mut piece = vec![0u8; 1 << 20];
    loop {
        if cancel.is_cancelled() || sink.is_cancelled() {
            return Err(Error::new(Kind::Cancelled, "it was cancelled"));
        }
        let length = base.file.read(&mut piece).context(what)?;
        if length == 0 {
            break;
        }
        let bytes = &piece[..length];
        head.extend_from_slice(&bytes[..length.min(HEADER_BYTES_WANTED.saturating_sub(head.len()))]);
        check.update(bytes).context(what)?;
        lane.write(bytes)?;
    }
    let verdict = check.finish().context(|| {
        format!("the base of the append-only file, '{}', is damaged on the source", base.source_path.display())
    });
    let verdict = verdict.map_err(|error| error.hint("is the disk sound? 'redis-cli BGREWRITEAOF' makes a new one"))?;
    lane.end()?;
    lane.finish()?;
    let mut facts = std::collections::BTreeMap::from([(BASE_FACT.to_string(), base.name.clone())]);
    if let Ok(header) = RdbHeader::parse(&head) {
        facts.insert(RDB_VERSION_FACT.to_string(), header.version.to_string());
    }
    Ok((facts, verdict))
}

/// The check of a base: a snapshot has a checksum, a file of commands has its syntax.
enum BaseCheck {
    Snapshot(Box<RdbCheck>),
    Commands(Box<AofWalker>),
}

impl BaseCheck {
    fn of(name: &str) -> BaseCheck {
        if name.ends_with(".rdb") {
            BaseCheck::Snapshot(Box::default())
        } else {
            BaseCheck::Commands(Box::new(AofWalker::new(0)))
        }
    }

    fn update(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            BaseCheck::Snapshot(check) => check.update(bytes),
            BaseCheck::Commands(walker) => {
                walker.feed(bytes, |_| {}).map_err(|damage| {
                    damage.of("base").hint("it is of an older version: 'redis-cli BGREWRITEAOF' makes a new one")
                })?;
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<&'static str> {
        match self {
            BaseCheck::Snapshot(check) => Ok(match check.finish()? {
                RdbVerdict::Verified => "verified",
                RdbVerdict::WithoutChecksum => "none",
            }),
            BaseCheck::Commands(walker) => {
                walker.finish().map_err(|damage| damage.of("base"))?;
                Ok("none")
            }
        }
    }
}

/// What a clone has to know about the server.
pub(super) async fn server_facts(session: &mut Session) -> Result<Vec<(String, String)>> {
    let settings = session.settings("*").await?;
    let mut facts: Vec<(String, String)> = facts_of_settings(&settings).collect();
    facts.extend(left_behind::facts(&settings));
    facts.extend(left_behind::renamed_fact(&unknown_commands(session).await?));
    for (number, line) in session.ask(&["ACL", "LIST"]).await?.list()?.into_iter().enumerate() {
        facts.push((format!("{ACL_FACT_PREFIX}{number}"), line.text()?));
    }
    for module in session.ask(&["MODULE", "LIST"]).await?.list()? {
        facts.push(module_of(module)?.fact());
    }
    facts.extend(cluster::facts_of(session, &settings).await?);
    Ok(facts)
}

/// Commands that everybody knows and the server does not. Best effort: a user of few rights may not ask.
async fn unknown_commands(session: &mut Session) -> Result<Vec<&'static str>> {
    let mut words: Vec<&[u8]> = vec![b"COMMAND", b"INFO"];
    words.extend(left_behind::OFTEN_RENAMED.iter().map(|name| name.as_bytes()));
    let Reply::List(known) = session.ask_bytes(&words).await? else { return Ok(Vec::new()) };
    let rows = left_behind::OFTEN_RENAMED.into_iter().zip(known);
    Ok(rows.filter(|(_, reply)| *reply == Reply::Nothing).map(|(name, _)| name).collect())
}

/// One entry of MODULE LIST: names and values in turn.
fn module_of(reply: Reply) -> Result<Module> {
    let mut module = Module { name: String::new(), path: String::new(), arguments: Vec::new() };
    let mut values = reply.list()?.into_iter();
    while let (Some(name), Some(value)) = (values.next(), values.next()) {
        match name.text()?.as_str() {
            "name" => module.name = value.text()?,
            // What is built into the server has a word here, as `lua` in Valkey 9.
            "path" => module.path = Some(value.text()?).filter(|path| path.contains('/')).unwrap_or_default(),
            "args" => {
                module.arguments = value.list()?.into_iter().map(Reply::text).collect::<Result<_>>()?;
            }
            _ => {}
        }
    }
    Ok(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_that_is_built_in_has_no_path() {
        let text = |text: &str| Reply::Text(text.as_bytes().to_vec());
        let entry =
            |path: &str| module_of(Reply::List(vec![text("name"), text("m"), text("path"), text(path)])).unwrap();
        assert_eq!(entry("/lib/m.so").path, "/lib/m.so");
        assert_eq!((entry("lua").path, entry("").path), (String::new(), String::new()));
    }

    #[test]
    fn the_first_second_that_a_backup_can_show_is_behind_its_end_and_all_that_its_log_says() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        // A command of that second may be in the log already.
        assert_eq!(second_after(at("2026-11-21T10:00:00Z"), None).unwrap(), at("2026-11-21T10:00:01Z"));
        let late = at("2026-11-21T10:00:00.999999Z");
        assert_eq!(second_after(late, Some(late.as_second() - 5)).unwrap(), at("2026-11-21T10:00:01Z"));
        assert_eq!(second_after(late, Some(late.as_second() + 30)).unwrap(), at("2026-11-21T10:00:31Z"));
        assert_eq!(second_after(late, Some(i64::MAX)).unwrap_err().kind(), Kind::Server);
    }
}
