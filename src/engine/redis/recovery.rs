//! Puts the append-only file of a clone together so that it ends exactly at the target, and lets a server load it.
//!
//! Nothing is aimed at: the server is given a manifest, a base and increments that contain what was ordered and nothing
//! else, and loads all of it, with `aof-load-truncated no`, so that any damage is an error. The last increment is cut at a
//! command, and never inside MULTI ... EXEC. When the target lies in an older increment, the later ones are left out.
//!
//! A target in time keeps everything that was executed before that second. The log counts in whole seconds, and an
//! annotation stands before the first command of each: so a target of a whole second is exact, and one between seconds
//! shows the second before it. A replication stream has annotations of when its parts were received, in milliseconds: kept
//! is what was received before. Nothing that came later is ever in a clone.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_blocking;
use crate::base::durable::{sync_filesystem, write_file_durable};
use crate::base::ownership::{give_to, write_owned};
use crate::base::users::User;
use crate::engine::redis::backup::{BASE_FACT, DATABASE_FACT, LOG_TIMES_FACT, LOG_TIMES_RECEIVED, LOG_TIMES_SECONDS};
use crate::engine::redis::clone::Grounds;
use crate::engine::redis::geometry::file_name;
use crate::engine::redis::keep_expired::{self, Kept};
use crate::engine::redis::ondisk::aof::select_command;
use crate::engine::redis::ondisk::manifest::{Manifest, ManifestPart, PartKind};
use crate::engine::redis::server::stop_now;
use crate::engine::redis::session::database_number;
use crate::engine::redis::settings::{APPEND_DIR, APPEND_FILE, QUARANTINE_CONF_FILE, databases_of, quarantine_conf};
use crate::engine::{CloneSite, LogSource, Progress, Recovered};
use crate::error::{Context, Error, Kind, Result};
use crate::model::bytes_text::human_bytes;
use crate::model::check::CheckItem;
use crate::model::position::Position;
use crate::model::target::{Target, utc_text};

pub mod cut;
mod tools;

pub(in crate::engine::redis) use cut::End;
use cut::{Cut, Times};
use tools::check_by_tool;

/// Files up to this size come as a whole: they are read ahead.
const WHOLE_FILE_BYTES_MAX: u64 = 64 << 20;
const PIECE_BYTES: usize = 8 << 20;

/// What was put together.
#[derive(Debug)]
struct Assembled {
    end: Position,
    times: Times,
    /// Bytes of all increments.
    log_bytes: u64,
    increments: u64,
    base_bytes: u64,
    /// The log uses so many databases at least.
    databases_used: u32,
    /// Expired keys are kept by the last increment.
    kept: Option<Kept>,
}

pub(super) async fn recover(
    grounds: &Grounds,
    site: &CloneSite,
    target: &Target,
    logs: Arc<dyn LogSource>,
    progress: Arc<dyn Progress>,
    cancel: &CancellationToken,
) -> Result<Recovered> {
    let what = || format!("cannot recover clone '{}' to {target}", site.clone_name);
    run(grounds, site, target, logs, progress, cancel).await.context(what)
}

async fn run(
    grounds: &Grounds,
    site: &CloneSite,
    target: &Target,
    logs: Arc<dyn LogSource>,
    progress: Arc<dyn Progress>,
    cancel: &CancellationToken,
) -> Result<Recovered> {
    let end = end_of(site, target)?;
    stop_now(&site.data_dir).await?;
    let mut assembly = Assembly::begin(site, &grounds.server.user).await?;
    assembly.take_log(site, end, logs.as_ref(), progress.as_ref(), cancel).await?;
    let assembled = assembly.finish(site, end).await?;
    let mut verified = Vec::new();
    verified.extend(check_by_tool(grounds, site, cancel).await?);
    progress.note("the server loads the data".to_string());
    start(grounds, site, &progress, cancel, &assembled, &mut verified).await?;
    if let Target::Time(time) = target {
        verified.extend(time_item(site, *time, end, assembled.times));
    }
    Ok(Recovered {
        departed_at: assembled.end,
        now_at: Position::File { number: 1, offset: assembled.log_bytes },
        last_commit_at: assembled.times.last.and_then(|millis| Timestamp::from_millisecond(millis).ok()),
        verified,
    })
}

/// What can be said about a target in time beyond what was ordered: of a log that counts in seconds, which one is shown; of
/// a stream, what is proved to be in the clone, because what was executed is received a moment later. Pure.
fn time_item(site: &CloneSite, time: Timestamp, end: End, times: Times) -> Option<CheckItem> {
    let text = |millis: i64| Timestamp::from_millisecond(millis).map_or_else(|_| millis.to_string(), utc_text);
    if is_received(site) {
        let executed = times.executed.map(|millis| format!("everything that was executed by {}, and ", text(millis)));
        let found = format!("{}nothing that was received at {} or later", executed.unwrap_or_default(), utc_text(time));
        return Some(CheckItem::pass("time", found));
    }
    match end {
        End::Before(millis) if time.subsec_nanosecond() > 0 => {
            Some(CheckItem::pass("time", format!("the log counts in seconds: shown is {}", text(millis))))
        }
        _ => None,
    }
}

/// Whether the log is a replication stream with the times at which it was received.
pub(super) fn is_received(site: &CloneSite) -> bool {
    site.facts.get(LOG_TIMES_FACT).is_some_and(|value| value == LOG_TIMES_RECEIVED)
}

/// What a target means for the log. Pure.
pub(super) fn end_of(site: &CloneSite, target: &Target) -> Result<End> {
    let at = |position: Position| position.file().map(|(number, offset)| End::At { number, offset });
    match target {
        Target::Latest => Ok(End::Open),
        Target::Backup(_) => at(site.backup_stop),
        Target::Position(position) => at(*position),
        // Within the millisecond of an annotation more may have been received.
        Target::Time(time) if is_received(site) => Ok(End::Before(time.as_millisecond())),
        Target::Time(time) if site.facts.get(LOG_TIMES_FACT).is_some_and(|value| value == LOG_TIMES_SECONDS) => {
            Ok(End::Before(time.as_second().saturating_mul(1000)))
        }
        Target::Time(_) => Err(no_times()),
        Target::Lsn(_) | Target::Name(_) | Target::Transaction { .. } => {
            Err(Error::new(Kind::BadInput, "the log of Redis has neither such positions nor named points")
                .hint("clone to a time, to the latest state or to a backup"))
        }
    }
}

/// Why a clone to a time is refused.
fn no_times() -> Error {
    Error::new(Kind::Unsupported, "there are no times in the source's append-only file").hint(
        "turn them on without a restart: 'redis-cli CONFIG SET aof-timestamp-enabled yes', and take a backup; until then \
         clone to the latest state or to a backup",
    )
}

/// The directory of the append-only file while it is put together.
struct Assembly {
    dir: PathBuf,
    user: User,
    base: ManifestPart,
    base_bytes: u64,
    increments: Vec<ManifestPart>,
    /// What each increment begins with, before the log. A server begins to load each file in database 0, and a file of the
    /// stream says in which it is only if the stream has said so since the agent began to follow it. Where it has, the
    /// file's own SELECT follows and counts.
    preamble: Vec<u8>,
    end: Position,
    times: Times,
    log_bytes: u64,
    databases_used: u32,
}

impl Assembly {
    /// Finds the base and removes everything else that an earlier attempt made.
    async fn begin(site: &CloneSite, user: &User) -> Result<Assembly> {
        let name = site.facts.get(BASE_FACT).cloned();
        let name = name.ok_or_else(|| Error::new(Kind::Damaged, "the backup does not name its base"))?;
        let (dir, user, start) = (site.data_dir.join(APPEND_DIR), user.clone(), site.backup_start);
        let database = site.facts.get(DATABASE_FACT).and_then(|text| text.parse::<u32>().ok());
        run_blocking("assemble", move || {
            let what = || format!("cannot look into '{}'", dir.display());
            for entry in std::fs::read_dir(&dir).context(what)? {
                let path = entry.context(what)?.path();
                if path.file_name().is_none_or(|found| found != name.as_str()) {
                    let removed =
                        if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                    removed.context(|| format!("cannot remove '{}'", path.display()))?;
                }
            }
            give_to(&user, &dir)?;
            let base_bytes = std::fs::metadata(dir.join(&name)).context(what)?.len();
            let base = part(name, 1, PartKind::Base);
            Ok(Assembly {
                dir,
                user,
                base,
                base_bytes,
                increments: vec![],
                preamble: database.map(|number| select_command(number).into_bytes()).unwrap_or_default(),
                end: start,
                times: Times::default(),
                log_bytes: 0,
                databases_used: database.map_or(0, |highest| highest.saturating_add(1)),
            })
        })
        .await
    }

    /// Writes one increment after the other until the end is reached or there is no more.
    async fn take_log(
        &mut self,
        site: &CloneSite,
        end: End,
        logs: &dyn LogSource,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let (mut number, mut from) = site.backup_start.file()?;
        loop {
            if matches!(end, End::At { number: last, offset } if (number, from) >= (last, offset)) {
                return Ok(());
            }
            let name = file_name(number);
            let Some(bytes) = logs.available(&name).await? else { return Ok(()) };
            let is_cut = self.take_file(number, from..bytes, end, logs, progress, cancel).await?;
            // What follows an unfinished file in the repository does not follow it in the log: something is missing.
            if is_cut || !logs.is_sealed(&name).await? {
                return Ok(());
            }
            (number, from) = (number.saturating_add(1), 0);
            self.end = Position::File { number, offset: 0 };
        }
    }

    /// Writes a range of one log file as an increment. Returns whether the end lay in it.
    async fn take_file(
        &mut self,
        number: u64,
        range: std::ops::Range<u64>,
        end: End,
        logs: &dyn LogSource,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<bool> {
        let sequence = self.increments.len() as u64 + 1;
        let name = format!("{APPEND_FILE}.{sequence}.incr.aof");
        let path = self.dir.join(&name);
        let log_name = file_name(number);
        let (from, bytes) = (range.start, range.end);
        let mut cut = Cut::new(number, from, end);
        let mut file = {
            let (path, user) = (path.clone(), self.user.clone());
            run_blocking("make increment", move || make_file(&path, &user)).await?
        };
        let preamble = self.preamble.clone();
        let head_bytes = preamble.len() as u64;
        if !preamble.is_empty() {
            let shown = path.clone();
            file = run_blocking("write increment", move || {
                file.write_all(&preamble).context(|| format!("cannot write '{}'", shown.display()))?;
                Ok(file)
            })
            .await?;
        }
        let piece = if bytes <= WHOLE_FILE_BYTES_MAX { WHOLE_FILE_BYTES_MAX as usize } else { PIECE_BYTES };
        let mut at = from;
        while at < bytes && !cut.is_found() {
            if cancel.is_cancelled() {
                return Err(Error::new(Kind::Cancelled, "it was cancelled"));
            }
            let content = logs.read(&log_name, at, piece).await?;
            if content.is_empty() {
                return Err(Error::new(
                    Kind::Damaged,
                    format!("log file '{log_name}' is shorter than it was said to be"),
                ));
            }
            at += content.len() as u64;
            cut.feed(&content).map_err(|damage| damage.of(&log_name))?;
            let shown = path.clone();
            file = run_blocking("write increment", move || {
                file.write_all(&content).context(|| format!("cannot write '{}'", shown.display()))?;
                Ok(file)
            })
            .await?;
            progress.set(self.log_bytes + (at - from), 0);
        }
        let kept = cut.kept(at).map_err(|damage| damage.of(&log_name))?;
        let shown = path.clone();
        run_blocking("cut increment", move || {
            file.set_len(head_bytes + kept - from).context(|| format!("cannot cut '{}'", shown.display()))
        })
        .await?;
        self.databases_used =
            self.databases_used.max(cut.highest_database().map_or(0, |highest| highest.saturating_add(1)));
        let times = cut.times_kept(kept);
        self.times = Times { last: times.last.or(self.times.last), executed: times.executed.or(self.times.executed) };
        self.log_bytes += head_bytes + kept - from;
        self.end = Position::File { number, offset: kept };
        self.increments.push(part(name, sequence, PartKind::Increment));
        Ok(cut.is_found())
    }

    /// Writes the manifest, last, and makes everything durable.
    async fn finish(mut self, site: &CloneSite, end: End) -> Result<Assembled> {
        if self.end < site.backup_stop {
            return Err(Error::new(
                Kind::Damaged,
                format!("the log ends at {}, before the backup is whole at {}", self.end, site.backup_stop),
            )
            .hint("choose a later target or an older backup; 'keiki window' shows what can be reached"));
        }
        if let End::At { number, offset } = end {
            let wanted = Position::File { number, offset };
            if self.end.file()?.0 < number {
                let message = format!("the log ends at {}, before {wanted}", self.end);
                return Err(Error::new(Kind::Damaged, message).hint("'keiki window' shows what can be reached"));
            }
        }
        if self.increments.is_empty() {
            // A server without any increment would make one; with its own name it is the same file for all of us.
            let name = format!("{APPEND_FILE}.1.incr.aof");
            let (path, user) = (self.dir.join(&name), self.user.clone());
            run_blocking("make increment", move || make_file(&path, &user).map(|_| ())).await?;
            self.increments.push(part(name, 1, PartKind::Increment));
        }
        let increments = self.increments.len() as u64;
        let kept = match site.keep_expired {
            true => Some(self.keep_expired(site, end).await?),
            false => None,
        };
        let manifest = Manifest { base: Some(self.base), increments: self.increments, history: Vec::new() };
        let (dir, user) = (self.dir, self.user);
        run_blocking("write manifest", move || {
            let path = dir.join(format!("{APPEND_FILE}.manifest"));
            write_file_durable(&path, manifest.render().as_bytes(), 0o600)?;
            give_to(&user, &path)?;
            sync_filesystem(&dir)
        })
        .await?;
        Ok(Assembled {
            end: self.end,
            times: self.times,
            log_bytes: self.log_bytes,
            increments,
            base_bytes: self.base_bytes,
            databases_used: self.databases_used,
            kept,
        })
    }

    /// Adds the increment that keeps expired keys, behind all others.
    async fn keep_expired(&mut self, site: &CloneSite, end: End) -> Result<Kept> {
        let by_millis = match end {
            End::Before(millis) => Some(millis),
            End::Open | End::At { .. } => self.times.last,
        };
        let sequence = self.increments.len() as u64 + 1;
        let name = format!("{APPEND_FILE}.{sequence}.incr.aof");
        let (path, user, site) = (self.dir.join(&name), self.user.clone(), site.clone());
        let databases = databases_of(&site.facts, &site.settings, self.databases_used);
        let write = move || keep_expired::write(&path, &user, databases, by_millis);
        let kept = run_blocking("keep expired keys", write).await?;
        self.increments.push(part(name, sequence, PartKind::Increment));
        Ok(kept)
    }
}

fn part(name: String, sequence: u64, kind: PartKind) -> ManifestPart {
    ManifestPart { name, sequence, kind, start_offset: None, end_offset: None }
}

fn make_file(path: &Path, user: &User) -> Result<File> {
    let what = || format!("cannot make '{}'", path.display());
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path);
    let file = file.context(what)?;
    give_to(user, path)?;
    Ok(file)
}

/// Starts the server in quarantine, waits until it has loaded everything and asks it what that was.
async fn start(
    grounds: &Grounds,
    site: &CloneSite,
    progress: &Arc<dyn Progress>,
    cancel: &CancellationToken,
    assembled: &Assembled,
    verified: &mut Vec<CheckItem>,
) -> Result<()> {
    let conf = site.run_dir.join(QUARANTINE_CONF_FILE);
    let input = grounds.conf_input(site, assembled.databases_used);
    write_owned(&grounds.server.user, &conf, quarantine_conf(input).as_bytes())?;
    let log_began = grounds.server.log_bytes();
    let process = grounds.server.start(&conf)?;
    let endpoint = grounds.server.endpoint();
    let show = |done: u64, total: u64| progress.set(done, total);
    let mut session = grounds.server.wait_until_loaded(process, &endpoint, cancel, show).await?;
    if let Some(kept) = &assembled.kept {
        verified.push(keep_expired::report(&mut session, kept).await?);
    }
    verified.extend(grounds.server.require_all_taken(&mut session, log_began).await?);
    let info = session.info(&["server", "persistence", "replication", "keyspace"]).await?;
    let value = |key: &str| info.get(key).map_or("", String::as_str);
    let logged: u64 = value("aof_current_size").parse().unwrap_or(0);
    let wanted = assembled.base_bytes + assembled.log_bytes;
    // It may be more by now: keys expire in the clone too, and their deletion is logged.
    if value("role") != "master" || value("aof_enabled") != "1" || logged < wanted {
        return Err(Error::new(
            Kind::Server,
            format!(
                "the server did not load what it was given: role '{}', append-only file '{}', {logged} of {wanted} bytes",
                value("role"),
                value("aof_enabled")
            ),
        )
        .hint(format!("the whole log is '{}'", grounds.server.log_file().display())));
    }
    verified.push(CheckItem::pass(
        "loaded",
        format!(
            "a base of {} and {} of log in {} increments, to the byte",
            human_bytes(assembled.base_bytes),
            human_bytes(assembled.log_bytes),
            assembled.increments
        ),
    ));
    verified.push(CheckItem::pass("keys", keys_text(&info)));
    let databases = |used: u32| databases_of(&site.facts, &site.settings, used);
    let (known, now) = (databases(0), databases(assembled.databases_used));
    if now > known {
        verified.push(CheckItem::pass("databases", format!("{now}: the log uses more than the {known} of the backup")));
    }
    Ok(())
}

/// `db0: 12, db3: 4` out of the lines of INFO keyspace: `db0:keys=12,expires=0,avg_ttl=0`.
fn keys_text(info: &std::collections::BTreeMap<String, String>) -> String {
    let rows = info.iter().filter(|(name, _)| database_number(name).is_some());
    let rows = rows.filter_map(|(name, value)| {
        let keys = value.strip_prefix("keys=")?.split(',').next()?;
        Some(format!("{name}: {keys}"))
    });
    match rows.collect::<Vec<_>>().join(", ") {
        empty if empty.is_empty() => "none".to_string(),
        text => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_of_every_database_are_told() {
        let info = [("db0", "keys=12,expires=0,avg_ttl=0"), ("db11", "keys=4,expires=1"), ("dbx", "1")];
        let info = info.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        assert_eq!(keys_text(&info), "db0: 12, db11: 4");
    }
}
