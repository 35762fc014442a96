//! A running server as it describes itself: who it is, whether it logs everything, and what of its log is where.
//!
//! `observe` is one look. Its order is what makes it exact: the clock is read first, then it is waited until everything
//! that the server had executed by then is in its file, then the manifest is read and new increments are linked (`hold`),
//! and then the server is asked whether anything happened since the last look that it did not log.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;

use crate::base::bulk::run_blocking;
use crate::base::durable::{remove_dir_all_durable, write_file_durable};
use crate::engine::ServerIdentity;
use crate::engine::redis::hold::{HeldFile, Hold, LINK_ATTEMPTS};
use crate::engine::redis::ondisk::aof::{AofWalker, Mark};
use crate::engine::redis::ondisk::manifest::Manifest;
use crate::engine::redis::session::Session;
use crate::engine::redis::spool::SPOOL_DIR;
use crate::engine::redis::{Inner, RedisSource};
use crate::error::{Context, Error, Kind, Result};
use crate::model::engine_kind::EngineKind;

/// What a server without a system identifier is called in an identity: it has none that survives a restart (run_id) or
/// a failover (master_replid). The inode of its data directory tells directories apart.
pub const NO_SYSTEM_ID: &str = "-";
/// The first version with an append-only file in parts.
const MAJOR_MIN: u32 = 7;
/// How long the server may keep commands in memory before it writes them: it postpones a write for two seconds while the
/// disk is busy (`src/aof.c`, flushAppendOnlyFile), and then it writes all the same.
const FLUSH_SECONDS_MAX: u64 = 5;
const FLUSH_POLL: Duration = Duration::from_millis(5);

/// By what could commands have been executed that are not in the append-only file, as far as the server counts it:
/// turning it off and on, following another server, debugging. Two equal ones mean: nothing of that in between.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fingerprint {
    values: BTreeMap<String, String>,
    commands_processed: u64,
}

/// What of INFO goes into a fingerprint. A command that was never called has no line.
const FINGERPRINT_KEYS: [&str; 10] = [
    "run_id",
    "role",
    "master_replid",
    "aof_enabled",
    "cmdstat_config|set",
    "cmdstat_config|resetstat",
    "cmdstat_replicaof",
    "cmdstat_slaveof",
    "cmdstat_debug",
    "cmdstat_failover",
];

impl Fingerprint {
    /// The fingerprint in the lines of INFO.
    pub fn of(info: &BTreeMap<String, String>) -> Fingerprint {
        let mut values = BTreeMap::new();
        for key in FINGERPRINT_KEYS {
            let value = info.get(key).map_or("", String::as_str);
            // Of `calls=3,usec=17,...` only the count says something.
            values.insert(key.to_string(), value.split(',').next().unwrap_or_default().to_string());
        }
        let commands = info.get("total_commands_processed").and_then(|text| text.parse().ok());
        Fingerprint { values, commands_processed: commands.unwrap_or(0) }
    }

    /// Whether everything that was executed between this fingerprint and a later one was logged.
    pub fn proves(&self, later: &Fingerprint) -> bool {
        let is_logging = self.values.get("aof_enabled").is_some_and(|value| value == "1");
        let is_known = self.values.get("run_id").is_some_and(|value| !value.is_empty());
        // Counters that were set back could hide what they counted.
        is_logging && is_known && self.values == later.values && self.commands_processed <= later.commands_processed
    }

    fn render(&self) -> String {
        let lines: String = self.values.iter().map(|(key, value)| format!("{key} {value}\n")).collect();
        format!("{lines}commands {}\n", self.commands_processed)
    }

    fn parse(text: &str) -> Fingerprint {
        let mut fingerprint = Fingerprint::default();
        for (key, value) in text.lines().filter_map(|line| line.split_once(' ')) {
            if key == "commands" {
                fingerprint.commands_processed = value.parse().unwrap_or(u64::MAX);
            } else {
                fingerprint.values.insert(key.to_string(), value.to_string());
            }
        }
        fingerprint
    }
}

/// What is kept between looks.
#[derive(Default)]
pub struct Kept {
    session: Option<Session>,
    hold: Option<Hold>,
    /// From before the manifest of the last look was read.
    fingerprint: Option<Fingerprint>,
    walks: BTreeMap<u64, Walk>,
    /// Everything before this file may go. What the server still had when that was said goes when the server has deleted
    /// it, which nobody tells.
    released: u64,
}

/// How far a file of the log was walked through. Bytes behind the last command may still change: after a crash the server
/// cuts off a command that it did not write to its end, and the annotation before it.
#[derive(Debug, Clone, Copy, Default)]
struct Walk {
    command_end: u64,
    /// With the annotations behind it, which stay as soon as another file follows.
    boundary: u64,
    /// What was synced to the disk, or found there when the file was last read.
    durable_bytes: u64,
    /// The last annotation of time that was passed, and the latest.
    last_second: Option<i64>,
    newest_second: Option<i64>,
}

/// One file of the log as it is now.
#[derive(Debug, Clone)]
pub struct SeenFile {
    pub held: HeldFile,
    /// Up to the last place where it may be cut, of what is durable.
    pub readable_bytes: u64,
    /// Another file follows it.
    pub finished: bool,
}

/// One look at the log.
#[derive(Debug, Clone)]
pub struct Observation {
    /// Everything that was executed before is in the files.
    pub observed_at: Timestamp,
    /// The instant up to which the log tells times, if they end before `observed_at`.
    pub timed_until: Option<Timestamp>,
    pub files: Vec<SeenFile>,
    pub manifest: Manifest,
    pub append_dir: PathBuf,
    pub info: BTreeMap<String, String>,
    /// `aof-timestamp-enabled`.
    pub writes_times: bool,
    /// The last and the latest second that each file says, by its number; also of the last one before all of them.
    seconds: BTreeMap<u64, (i64, i64)>,
}

impl Observation {
    /// The latest second that counts in the log from file `number` on. A server writes no annotation before its clock has
    /// passed the one that it wrote last, which may be in an earlier file.
    pub fn newest_second(&self, number: u64) -> Option<i64> {
        let before = self.seconds.range(..number).next_back().map(|(_, (last, _))| *last);
        let within = self.seconds.range(number..).map(|(_, (_, newest))| *newest).max();
        before.max(within)
    }
}

impl Inner {
    /// Asks the server who it is.
    pub(super) async fn ask_identity(&self) -> Result<ServerIdentity> {
        let mut kept = self.kept.lock().await;
        let outcome = identify(&self.source, kept.session(&self.source).await?).await;
        kept.after(outcome).context(|| format!("cannot identify instance '{}'", self.source.name))
    }

    /// Asks something in a session that was proved to be with this server.
    pub(super) async fn with_session<T>(&self, ask: impl AsyncFnOnce(&mut Session) -> Result<T>) -> Result<T> {
        let mut kept = self.kept.lock().await;
        let session = kept.session(&self.source).await?;
        let outcome = ask(session).await;
        kept.after(outcome)
    }

    /// One look at the log: see the module.
    pub(super) async fn observe(&self) -> Result<Observation> {
        let mut kept = self.kept.lock().await;
        let outcome = observe(&self.source, &mut kept).await;
        kept.after(outcome)
    }

    /// Everything before log file `number` may go: now, or when the server has deleted it.
    pub(super) async fn release_before(&self, number: u64) -> Result<()> {
        let hold = {
            let mut kept = self.kept.lock().await;
            kept.released = kept.released.max(number);
            kept.hold.clone()
        };
        match hold {
            Some(hold) => run_blocking("release log", move || hold.release_before(number)).await,
            None => Ok(()),
        }
    }

    /// Where this server's increments are held, without a look at them.
    pub(super) async fn find_hold(&self) -> Result<Hold> {
        let settings = self.with_session(async |session| session.settings("append*").await).await?;
        Ok(hold_of(&self.source, &settings))
    }

    /// The held files, as far as they are known; nothing before the first look.
    pub(super) async fn hold(&self) -> Option<Hold> {
        self.kept.lock().await.hold.clone()
    }
}

impl Kept {
    async fn session(&mut self, source: &RedisSource) -> Result<&mut Session> {
        if let Some(mut session) = self.session.take()
            && !session.has_ended().await
        {
            return Ok(self.session.insert(session));
        }
        let mut session = Session::open(&source.endpoint).await?;
        prove(source, &mut session).await?;
        Ok(self.session.insert(session))
    }

    /// Gives up a session after anything but a plain refusal.
    fn after<T>(&mut self, outcome: Result<T>) -> Result<T> {
        if outcome.is_err() {
            self.session = None;
        }
        outcome
    }
}

/// Makes sure that the server at the endpoint is the one that works in the data directory.
pub(super) async fn prove(source: &RedisSource, session: &mut Session) -> Result<()> {
    require_data(&session.info(&["server"]).await?)?;
    let dir = PathBuf::from(session.setting("dir").await?);
    let (wanted, found) = (source.data_dir.clone(), dir.clone());
    let is_same = run_blocking("data directory", move || {
        let what = || format!("cannot look at data directory '{}'", wanted.display());
        let wanted = std::fs::metadata(&wanted).context(what)?;
        Ok(std::fs::metadata(&found).is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino())))
    })
    .await?;
    if is_same {
        return Ok(());
    }
    Err(Error::new(
        Kind::Conflict,
        format!(
            "the server at '{}' works in '{}' and not in '{}'",
            source.endpoint.address,
            dir.display(),
            source.data_dir.display()
        ),
    )
    .hint("correct 'data_dir', 'socket' or 'port' of the instance so that they name one server"))
}

async fn identify(source: &RedisSource, session: &mut Session) -> Result<ServerIdentity> {
    let info = session.info(&["server"]).await?;
    let (engine, version) = product_of(&info)?;
    if engine != source.engine {
        return Err(Error::new(Kind::Conflict, format!("the server is {} {version}", engine.name()))
            .hint(format!("write engine = \"{}\" for this instance", engine.name())));
    }
    require_version(&version)?;
    let data_dir = source.data_dir.clone();
    run_blocking("identify", move || {
        let what = || format!("cannot look at data directory '{}'", data_dir.display());
        let canonical = std::fs::canonicalize(&data_dir).context(what)?;
        let metadata = std::fs::metadata(&canonical).context(what)?;
        let data_dir_inode = (metadata.dev(), metadata.ino());
        Ok(ServerIdentity { engine, version, system_id: NO_SYSTEM_ID.into(), data_dir: canonical, data_dir_inode })
    })
    .await
}

/// Sentinel is the same program and answers at the same kind of port, and keeps no data.
fn require_data(info: &BTreeMap<String, String>) -> Result<()> {
    match info.get("redis_mode").is_some_and(|mode| mode == "sentinel") {
        true => Err(Error::new(Kind::BadInput, "it is a Sentinel, which watches servers and has no data")
            .hint("set 'socket' or 'port' of the instance to those of a server that it watches")),
        false => Ok(()),
    }
}

/// Product and version in the lines of INFO. Valkey says both `redis_version`, for old clients, and its own.
pub fn product_of(info: &BTreeMap<String, String>) -> Result<(EngineKind, String)> {
    let value = |key: &str| info.get(key).filter(|text| !text.is_empty()).cloned();
    if let Some(version) = value("valkey_version") {
        return Ok((EngineKind::Valkey, version));
    }
    let version = value("redis_version");
    let version = version.ok_or_else(|| Error::new(Kind::Server, "the server does not say its version"))?;
    Ok((EngineKind::Redis, version))
}

/// What people call a product.
pub fn product_name(engine: EngineKind) -> &'static str {
    if engine == EngineKind::Valkey { "Valkey" } else { "Redis" }
}

/// 7 of `7.0.15`.
pub fn major_of(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

fn require_version(version: &str) -> Result<()> {
    match major_of(version) {
        Some(major) if major >= MAJOR_MIN => Ok(()),
        _ => Err(Error::new(Kind::Unsupported, format!("the server has version {version}"))
            .hint("keiki works with Redis 7 and Valkey 7.2 and later, whose append-only file is in parts")),
    }
}

async fn observe(source: &RedisSource, kept: &mut Kept) -> Result<Observation> {
    let session = kept.session(source).await?;
    let observed_at = server_time(session).await?;
    let info = flushed_info(session).await?;
    require_logging(source, &info)?;
    let settings = session.settings("a*").await?;
    let writes_times = settings.get("aof-timestamp-enabled").is_some_and(|value| value == "yes");
    let hold = hold_of(source, &settings);
    kept.hold = Some(hold.clone());
    let fingerprint = Fingerprint::of(&info);
    if kept.fingerprint.is_none() {
        // As in `follow`: what an agent that followed the replication stream has left there.
        let spool = source.data_dir.join(SPOOL_DIR);
        run_blocking("replication spool", move || if spool.is_dir() { remove_dir_all_durable(&spool) } else { Ok(()) })
            .await?;
        let path = fingerprint_path(&hold);
        kept.fingerprint = run_blocking("read fingerprint", move || Ok(std::fs::read_to_string(path).ok()))
            .await?
            .map(|text| Fingerprint::parse(&text));
    }
    let (releasing, released) = (hold.clone(), kept.released);
    run_blocking("release log", move || releasing.release_before(released)).await?;
    let (manifest, held) = hold_new(kept, source, &hold, observed_at, writes_times).await?;
    keep_fingerprint(kept, &hold, fingerprint).await?;
    let mut walks = std::mem::take(&mut kept.walks);
    let marking = hold.clone();
    let (files, walks, timed_until) = run_blocking("walk the log", move || {
        let files = walk_all(held, &mut walks)?;
        let timed_until = timed_until(&marking, &files, &walks, writes_times)?;
        Ok((files, walks, timed_until))
    })
    .await?;
    let seconds = walks.iter().filter_map(|(number, walk)| Some((*number, walk.last_second.zip(walk.newest_second)?)));
    let seconds = seconds.collect();
    kept.walks = walks;
    Ok(Observation {
        seconds,
        timed_until,
        observed_at,
        files,
        manifest,
        append_dir: hold.append_dir().to_path_buf(),
        info,
        writes_times,
    })
}

pub(super) fn hold_of(source: &RedisSource, settings: &BTreeMap<String, String>) -> Hold {
    let setting = |name: &str| settings.get(name).map_or("", String::as_str);
    Hold::new(source.data_dir.join(setting("appenddirname")), setting("appendfilename"))
}

pub(super) async fn server_time(session: &mut Session) -> Result<Timestamp> {
    let mut parts = session.ask(&["TIME"]).await?.list()?.into_iter();
    let mut next = || -> Result<i64> {
        let text = parts.next().unwrap_or(crate::engine::redis::session::Reply::Nothing).text()?;
        text.parse().map_err(|_| Error::new(Kind::Server, format!("the server says '{text}' is a time")))
    };
    let (seconds, micros) = (next()?, next()?);
    Timestamp::from_microsecond(seconds.saturating_mul(1_000_000).saturating_add(micros))
        .map_err(|_| Error::new(Kind::Server, format!("the server's clock says second {seconds}")))
}

/// INFO, as soon as everything that was executed before the call is in the append-only file.
async fn flushed_info(session: &mut Session) -> Result<BTreeMap<String, String>> {
    let number = |info: &BTreeMap<String, String>, key: &str| -> u64 {
        info.get(key).and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    let sections = ["server", "persistence", "replication", "stats", "commandstats", "cluster", "memory"];
    let mut info = session.info(&sections).await?;
    let wanted = number(&info, "aof_current_size") + number(&info, "aof_buffer_length");
    let began = std::time::Instant::now();
    while number(&info, "aof_buffer_length") > 0 && number(&info, "aof_current_size") < wanted {
        if began.elapsed() > Duration::from_secs(FLUSH_SECONDS_MAX) {
            return Err(Error::new(
                Kind::Unreachable,
                format!("the server has not written its append-only file for {FLUSH_SECONDS_MAX} seconds"),
            )
            .hint("is its disk full or very slow? 'redis-cli INFO persistence' shows aof_last_write_status"));
        }
        tokio::time::sleep(FLUSH_POLL).await;
        info = session.info(&sections).await?;
    }
    Ok(info)
}

/// An error unless the server has its data and follows nobody.
pub(super) fn require_primary(source: &RedisSource, info: &BTreeMap<String, String>) -> Result<()> {
    let value = |key: &str| info.get(key).map_or("", String::as_str);
    let name = &source.name;
    if value("loading") == "1" {
        return Err(Error::new(Kind::Unreachable, format!("instance '{name}' is loading its data")));
    }
    if value("role") != "master" {
        return Err(Error::new(Kind::Unsupported, format!("instance '{name}' is a replica"))
            .hint("configure keiki on the host of its primary; a replica becomes a source after it was promoted"));
    }
    Ok(())
}

fn require_logging(source: &RedisSource, info: &BTreeMap<String, String>) -> Result<()> {
    require_primary(source, info)?;
    let value = |key: &str| info.get(key).map_or("", String::as_str);
    let name = &source.name;
    if value("aof_enabled") != "1" {
        return Err(
            Error::new(Kind::Server, format!("instance '{name}' has no append-only file")).hint(APPEND_ONLY_HINT)
        );
    }
    if value("aof_last_write_status") == "err" {
        return Err(Error::new(Kind::Server, format!("instance '{name}' cannot write its append-only file"))
            .hint("is the disk full? the server's log says more"));
    }
    Ok(())
}

/// How the append-only file is turned on.
pub const APPEND_ONLY_HINT: &str = "turn it on without a restart: 'redis-cli CONFIG SET appendonly yes', then 'redis-cli CONFIG REWRITE' to keep it; or \
     write log = \"replication\" for this instance, which needs no setting of the server";

/// Links what is new. Returns the manifest and all held files.
async fn hold_new(
    kept: &mut Kept,
    source: &RedisSource,
    hold: &Hold,
    observed_at: Timestamp,
    timed: bool,
) -> Result<(Manifest, Vec<HeldFile>)> {
    let unix_seconds = u64::try_from(observed_at.as_second()).unwrap_or(0);
    for _ in 0..LINK_ATTEMPTS {
        let looking = hold.clone();
        let seen = run_blocking("look at the log", move || looking.look()).await?;
        let mut proved = false;
        if seen.needs_proof() {
            let earlier = kept.fingerprint.clone();
            let info =
                kept.session(source).await?.info(&["server", "persistence", "replication", "stats", "commandstats"]);
            let now = Fingerprint::of(&info.await?);
            proved = earlier.is_some_and(|earlier| earlier.proves(&now));
            if !proved {
                tracing::warn!(
                    "instance '{}': the append-only file was rewritten while nobody looked, and nothing proves that all \
                     commands are in it: the archive has a hole here until the next backup",
                    source.name
                );
            }
        }
        let (linking, limit) = (hold.clone(), source.hold_limit_bytes);
        let linked = run_blocking("hold the log", move || {
            let Some(held) = linking.link(&seen, proved, timed, unix_seconds)? else { return Ok(None) };
            match linking.enforce_limit(limit)? {
                0 => Ok(Some((seen.manifest, held))),
                _ => Ok(Some((seen.manifest, linking.held()?))),
            }
        })
        .await?;
        if let Some(found) = linked {
            return Ok(found);
        }
    }
    let looking = hold.clone();
    if let Some(name) = run_blocking("look at the log", move || looking.missing()).await? {
        let path = hold.append_dir().join(name);
        return Err(Error::new(Kind::Damaged, format!("the manifest names '{}', which is not there", path.display()))
            .hint("'redis-cli BGREWRITEAOF' begins a new append-only file; the server could not start with this one"));
    }
    Err(Error::new(Kind::Unreachable, "the append-only file is rewritten faster than it can be looked at"))
}

fn fingerprint_path(hold: &Hold) -> PathBuf {
    hold.held_dir().join("fingerprint")
}

async fn keep_fingerprint(kept: &mut Kept, hold: &Hold, fingerprint: Fingerprint) -> Result<()> {
    let changed = kept.fingerprint.as_ref().map(|old| &old.values) != Some(&fingerprint.values);
    kept.fingerprint = Some(fingerprint.clone());
    if !changed {
        return Ok(());
    }
    let path = fingerprint_path(hold);
    run_blocking("keep fingerprint", move || write_file_durable(&path, fingerprint.render().as_bytes(), 0o600)).await
}

/// The instant up to which the log tells times, if it is not now: from the moment on at which the server is seen to write
/// none, nothing later can be told apart, until a new file begins with times. A log that never had any is told by its
/// backups, which say so. Blocking.
fn timed_until(
    hold: &Hold,
    files: &[SeenFile],
    walks: &BTreeMap<u64, Walk>,
    writes_times: bool,
) -> Result<Option<Timestamp>> {
    let Some(last) = files.last().map(|file| file.held.number) else { return Ok(None) };
    let last_second = walks.values().rev().find_map(|walk| walk.last_second);
    if let (false, Some(second)) = (writes_times, last_second) {
        hold.mark_untimed(last, second)?;
    }
    Ok(hold.untimed(last).and_then(|second| Timestamp::from_second(second).ok()))
}

/// Makes what there is durable and finds the last place in each file where it may be cut. Blocking.
fn walk_all(held: Vec<HeldFile>, walks: &mut BTreeMap<u64, Walk>) -> Result<Vec<SeenFile>> {
    // What the last file before them said about time is still true when it is released.
    let first = held.first().map_or(0, |file| file.number);
    let before = walks.range(..first).rev().find(|(_, walk)| walk.last_second.is_some()).map(|(number, _)| *number);
    walks.retain(|number, _| Some(*number) == before || held.iter().any(|file| file.number == *number));
    let count = held.len();
    let mut files = Vec::with_capacity(count);
    for (index, held) in held.into_iter().enumerate() {
        let walk = walks.entry(held.number).or_default();
        walk_on(&held.path, walk)?;
        let finished = index + 1 < count;
        files.push(SeenFile {
            readable_bytes: if finished { walk.boundary } else { walk.command_end },
            finished,
            held,
        });
    }
    Ok(files)
}

fn walk_on(path: &Path, walk: &mut Walk) -> Result<()> {
    let what = || format!("cannot read '{}'", path.display());
    let file = File::open(path).context(what)?;
    let bytes = file.metadata().context(what)?.len();
    if bytes < walk.command_end {
        return Err(Error::new(
            Kind::Conflict,
            format!("'{}' was cut to {bytes} bytes, but {} were complete before", path.display(), walk.command_end),
        )
        .hint("was the append-only file repaired with redis-check-aof? Then a new life of the instance begins"));
    }
    // Where something is torn the server may put as much of something else.
    if bytes == walk.durable_bytes && bytes == walk.command_end && bytes > 0 {
        return Ok(());
    }
    // The server syncs once a second or never: what is archived must not be lost again by the source.
    file.sync_data().context(|| format!("cannot sync '{}'", path.display()))?;
    let mut walker = AofWalker::new(walk.command_end);
    let newest = &mut walk.newest_second;
    walk_file(&file, &mut walker, bytes, path, |mark| {
        if let Mark::Second { unix_seconds, .. } = mark {
            *newest = (*newest).max(Some(unix_seconds));
        }
    })?;
    (walk.command_end, walk.boundary, walk.durable_bytes) = (walker.command_end(), walker.boundary(), bytes);
    walk.last_second = walker.last_second().or(walk.last_second);
    Ok(())
}

/// Walks a file up to byte `to`, without reading the inside of long values. Blocking.
pub(super) fn walk_file(
    file: &File,
    walker: &mut AofWalker,
    to: u64,
    path: &Path,
    mut visit: impl FnMut(Mark),
) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let mut piece = vec![0u8; 256 << 10];
    while walker.at() < to {
        let left = to - walker.at();
        if walker.skippable() > piece.len() as u64 {
            walker.skip(walker.skippable().min(left));
            continue;
        }
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
        let read =
            file.read_at(&mut piece[..length], walker.at()).context(|| format!("cannot read '{}'", path.display()))?;
        if read == 0 {
            break;
        }
        walker.feed(&piece[..read], &mut visit).map_err(|damage| {
            damage.of(&path.display().to_string()).hint(
                "is the disk sound? 'redis-cli BGREWRITEAOF' makes the server write its data anew; then remove that file, \
                 and take a backup",
            )
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
