//! The online base backup of MySQL: the server's own CLONE puts a copy of itself beside its data directory, the agent
//! sends the copy, and removes it.
//!
//! The server copies while it writes, and blocks nobody: the copy is consistent at a place in the log between the start
//! and the stop of the backup, and knows its transactions when a server is started in it. So that replay can begin at
//! the start, everything in the log before it must be in the copy: it is waited for before the copy begins.
//!
//! A copy that was left behind by a kill is found by its name when the agent comes back, and removed.
//!
//! Sources: MySQL manual, "Cloning Data Locally", "Clone Plugin Limitations", "WAIT_FOR_EXECUTED_GTID_SET()".

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{base_name, data_bytes, fact, option_files, plugin_facts, setting_facts};
use crate::base::bulk::{run_blocking, run_on_thread};
use crate::base::durable::free_bytes;
use crate::base::ownership::give_to;
use crate::base::random::random_u64;
use crate::base::users::User;
use crate::engine::mysql::log_files::{LogPlace, end_of_log};
use crate::engine::mysql::ondisk::gtid_set::GtidSet;
use crate::engine::mysql::ondisk::transaction::{LogState, TransactionId};
use crate::engine::mysql::ondisk::walker::Walker;
use crate::engine::mysql::session::{Session, quoted};
use crate::engine::mysql::source::server_time;
use crate::engine::mysql::{MySqlEngine, MySqlSource};
use crate::engine::{BaseLane, BaseSink, BaseSpan};
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::{FileKind, FileMeta};
use crate::model::bytes_text::human_bytes;
use crate::model::position::Position;

/// A copy takes as long as its disk does.
const COPY_LIMIT: Duration = Duration::from_secs(30 * 86400);
/// How long transactions that are in the log may take to be committed.
const SETTLE_SECONDS_MAX: u64 = 300;
/// How long the server may take to give up a copy.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(120);
const PIECE_BYTES: usize = 1 << 20;
const COPY_PREFIX: &str = "keiki-copy-";

/// Takes the backup: see [`crate::engine::Engine::back_up`].
pub(super) async fn run(engine: &MySqlEngine, sink: Arc<dyn BaseSink>, cancel: &CancellationToken) -> Result<BaseSpan> {
    let _one_at_a_time = engine.copying.lock().await;
    let source = engine.open_session().await?;
    let session = &source.session;
    let place = LogPlace::ask(session).await?;
    let mut facts = collect_facts(engine, session).await?;
    facts.insert(fact::LOG_BASE.to_string(), base_name(&place.base));
    refuse_what_cannot_be_copied(session).await?;
    remove_left_copies(engine, session).await?;
    let scratch = make_scratch(&engine.source, &place).await?;
    sink.expect_bytes(scratch.expected_bytes);
    let began_at = server_time(session).await?;
    let start = end_of_log(session).await?;
    if facts.get(fact::GTID_MODE).is_some_and(|mode| mode == "ON") {
        facts.insert(fact::GTID_STATE.to_string(), settled_state(session, &place, start).await?.to_string());
    }
    let path = scratch.directory.join(format!("{COPY_PREFIX}{}-{:016x}", facts[fact::SYSTEM_ID], random_u64()));
    let outcome = async {
        copy(engine, session, &path, cancel).await?;
        let ended_at = server_time(session).await?;
        // All that the copy has is in the log by now.
        let stop = end_of_log(session).await?;
        let (from, to, cancel) = (path.clone(), sink.clone(), cancel.clone());
        run_on_thread("base-copy", move || send(&from, to.as_ref(), &cancel)).await?;
        Ok((ended_at, stop))
    };
    let outcome = outcome.await;
    let removed = remove_copy(path).await;
    let (ended_at, stop) = outcome?;
    removed?;
    let files = option_files::collect(&engine.source).await?;
    run_on_thread("base-tail", move || option_files::store(&files, sink.lane()?)).await?;
    let position = |(number, offset)| Position::File { number, offset };
    Ok(BaseSpan { start: position(start), stop: position(stop), began_at, ended_at, facts, damaged_blocks: Vec::new() })
}

/// What the server has when it has everything up to a place in the log: what the file of that place begins with, what
/// follows in it, and what was never in a log that is still there. Returns when all of it is committed.
async fn settled_state(session: &Session, place: &LogPlace, (number, offset): (u64, u64)) -> Result<GtidSet> {
    let path = place.file(number);
    let in_log = run_blocking("binary log", move || state_at(&path, offset)).await?;
    let limit = Duration::from_secs(SETTLE_SECONDS_MAX + 30);
    let wait = format!("SELECT WAIT_FOR_EXECUTED_GTID_SET({}, {SETTLE_SECONDS_MAX})", quoted(&in_log.to_string()));
    let waited = session.query_within(limit, &wait).await?;
    if waited.rows.first().and_then(|row| row.first()) != Some(&Some("0".to_string())) {
        return Err(Error::new(
            Kind::Unreachable,
            format!("transactions in the log were not committed within {SETTLE_SECONDS_MAX} seconds"),
        )
        .hint("does something hold up commits? see 'SHOW PROCESSLIST'"));
    }
    let purged = session.value("SELECT @@GLOBAL.gtid_purged").await?.unwrap_or_default();
    let mut state = GtidSet::parse(&purged)?;
    state.add_all(&in_log);
    Ok(state)
}

/// The transactions of a log file and of all before it, up to an offset. Blocking.
fn state_at(path: &Path, offset: u64) -> Result<GtidSet> {
    let what = || format!("cannot read '{}' up to byte {offset}", path.display());
    let mut file = File::open(path).context(what)?.take(offset);
    let (mut walker, mut state) = (Walker::new(), GtidSet::default());
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let count = file.read(&mut piece).context(what)?;
        if count == 0 {
            break;
        }
        let walked = walker.feed(&piece[..count], &mut |transaction| {
            if let TransactionId::MySql(gtid) = transaction.id {
                state.add(gtid);
            }
            Ok(())
        });
        walked.context(what)?;
    }
    match walker.first_state() {
        Some(LogState::MySql(before)) if walker.boundary() == offset => state.add_all(before),
        _ => return Err(Error::new(Kind::Damaged, format!("{}: it has no list of GTIDs, or ends elsewhere", what()))),
    }
    Ok(state)
}

/// Lets the server make its copy. Gives it up when cancelled.
async fn copy(engine: &MySqlEngine, session: &Session, path: &Path, cancel: &CancellationToken) -> Result<()> {
    let connection = session.number("SELECT CONNECTION_ID()").await?;
    let text = path.to_str().filter(|text| !text.contains('\0')).ok_or_else(|| {
        Error::new(Kind::Unsupported, format!("'{}' is not a path that MySQL can be told", path.display()))
    })?;
    let sql = format!("CLONE LOCAL DATA DIRECTORY = {}", quoted(text));
    let copying = session.query_within(COPY_LIMIT, &sql);
    tokio::pin!(copying);
    let outcome = tokio::select! {
        outcome = &mut copying => outcome,
        () = cancel.cancelled() => {
            let other = engine.open_session().await?;
            other.session.execute(&format!("KILL QUERY {connection}")).await?;
            let _ = tokio::time::timeout(GIVE_UP_LIMIT, copying).await;
            return Err(Error::new(Kind::Cancelled, "it was cancelled"));
        }
    };
    outcome.map(|_| ()).map_err(|error| {
        let hint = match error.message() {
            text if text.contains("(error 1227)") => "GRANT BACKUP_ADMIN ON *.* TO the account in 'user'",
            text if text.contains("(error 1524)") || text.contains("(error 1064)") => INSTALL_PLUGIN,
            _ => "may the server write into the directory in 'backup_dir'? AppArmor and SELinux may forbid it",
        };
        error.while_doing("the server cannot copy itself").hint(hint)
    })
}

/// How the plugin gets into a server.
pub const INSTALL_PLUGIN: &str = "INSTALL PLUGIN clone SONAME 'mysql_clone.so'; on the source, once";

/// The directory that copies are made in, and how many bytes one has.
pub(in crate::engine::mysql) struct Scratch {
    pub directory: PathBuf,
    pub expected_bytes: u64,
    pub free_bytes: u64,
}

/// Where copies are made.
fn scratch_directory(source: &MySqlSource) -> PathBuf {
    source.backup_dir.clone().unwrap_or_else(|| {
        let mut beside = source.data_dir.clone().into_os_string();
        beside.push(".keiki");
        PathBuf::from(beside)
    })
}

/// Looks at the directory that copies are made in, and the space there.
pub(in crate::engine::mysql) async fn look_at_scratch(source: &MySqlSource, place: &LogPlace) -> Result<Scratch> {
    let (directory, data_dir, base) = (scratch_directory(source), source.data_dir.clone(), place.base.clone());
    run_blocking("space", move || {
        let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_path_buf();
        Ok(Scratch { expected_bytes: data_bytes(&data_dir, &base), free_bytes: free_bytes(&existing)?, directory })
    })
    .await
}

async fn make_scratch(source: &MySqlSource, place: &LogPlace) -> Result<Scratch> {
    let scratch = look_at_scratch(source, place).await?;
    let (path, name) = (scratch.directory.clone(), source.run_as.clone());
    if scratch.free_bytes < scratch.expected_bytes {
        let (free, needed) = (human_bytes(scratch.free_bytes), human_bytes(scratch.expected_bytes));
        let reason = format!("the server's copy of itself needs {needed}, and '{}' has {free} free", path.display());
        return Err(Error::new(Kind::Full, reason).hint("set 'backup_dir' of the instance to a directory with space"));
    }
    run_blocking("backup directory", move || {
        let user = User::by_name(&name)?;
        let what = || format!("cannot make the directory '{}' for the server's copy of itself", path.display());
        let hint = "make it, with the server's user as its owner, or set 'backup_dir' of the instance to another";
        if !path.exists() {
            std::fs::create_dir(&path).context(what).map_err(|error| error.hint(hint))?;
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).context(what)?;
            give_to(&user, &path)?;
        }
        Ok(())
    })
    .await?;
    Ok(scratch)
}

/// Ends and removes what an earlier backup left behind, if none is being made now.
pub(in crate::engine::mysql) async fn sweep(engine: &MySqlEngine) -> Result<()> {
    let Ok(_one_at_a_time) = engine.copying.try_lock() else { return Ok(()) };
    let source = engine.open_session().await?;
    remove_left_copies(engine, &source.session).await
}

async fn remove_left_copies(engine: &MySqlEngine, session: &Session) -> Result<()> {
    let uuid = session.value("SELECT @@GLOBAL.server_uuid").await?.unwrap_or_default();
    let (directory, prefix) = (scratch_directory(&engine.source), format!("{COPY_PREFIX}{uuid}-"));
    let found = run_blocking("left copies", move || {
        let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
        let ours = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        Ok(ours.map(|entry| entry.path()).collect::<Vec<_>>())
    })
    .await?;
    if found.is_empty() {
        return Ok(());
    }
    // The server does not notice by itself that nobody waits for it.
    let began = std::time::Instant::now();
    loop {
        let sql = "SELECT PID FROM performance_schema.clone_status WHERE STATE = 'In Progress' AND PID > 0";
        let Some(pid) = session.value(sql).await? else { break };
        if began.elapsed() > GIVE_UP_LIMIT {
            return Err(Error::new(Kind::Conflict, "the server is making another copy of itself")
                .hint("wait until it has ended: see performance_schema.clone_status"));
        }
        // It may have ended meanwhile.
        let _ = session.execute(&format!("KILL QUERY {pid}")).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    for path in found {
        tracing::info!("removing '{}', which an earlier backup left behind", path.display());
        remove_copy(path).await?;
    }
    Ok(())
}

async fn remove_copy(path: PathBuf) -> Result<()> {
    run_blocking("remove copy", move || match std::fs::remove_dir_all(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove the server's copy of itself in '{}'", path.display()), error))
        }
        _ => Ok(()),
    })
    .await
}

/// Tables that CLONE makes without their rows, and what it cannot copy at all.
async fn refuse_what_cannot_be_copied(session: &Session) -> Result<()> {
    for (sql, what, hint) in REFUSED {
        if let Some(found) = session.value(sql).await? {
            return Err(Error::new(Kind::Unsupported, format!("{what}: {found}")).hint(*hint));
        }
    }
    Ok(())
}

/// What no copy can be made of: how the first is found, what it is, what to do.
pub(in crate::engine::mysql) const REFUSED: &[(&str, &str, &str)] = &[
    (
        "SELECT NAME FROM information_schema.INNODB_TABLESPACES WHERE ENCRYPTION = 'Y' LIMIT 1",
        "a tablespace is encrypted, and its key is not a part of a backup",
        "keiki cannot clone encrypted tablespaces of MySQL; the repository can be kept encrypted",
    ),
    (
        "SELECT PATH FROM information_schema.INNODB_DATAFILES WHERE PATH LIKE '/%' LIMIT 1",
        "a tablespace lies outside of the data directory",
        "keiki clones servers whose tables all lie in the data directory",
    ),
];

/// Tables of users that CLONE makes without their rows.
pub(in crate::engine::mysql) async fn tables_left_empty(session: &Session) -> Result<Vec<String>> {
    let rows = session
        .query(
            "SELECT CONCAT(TABLE_SCHEMA, '.', TABLE_NAME) FROM information_schema.TABLES WHERE TABLE_TYPE = 'BASE \
             TABLE' AND ENGINE NOT IN ('InnoDB', 'BLACKHOLE', 'PERFORMANCE_SCHEMA') AND TABLE_SCHEMA NOT IN \
             ('mysql', 'information_schema', 'performance_schema', 'sys') ORDER BY 1",
        )
        .await?;
    Ok(rows.rows.into_iter().flatten().flatten().collect())
}

async fn collect_facts(engine: &MySqlEngine, session: &Session) -> Result<BTreeMap<String, String>> {
    let mut facts = setting_facts(session).await?;
    let sql =
        "SELECT @@GLOBAL.server_id AS id, @@GLOBAL.gtid_mode AS mode, @@GLOBAL.enforce_gtid_consistency AS strict";
    let rows = session.query(sql).await?;
    for (key, column) in [(fact::SERVER_ID, "id"), (fact::GTID_MODE, "mode"), (fact::GTID_CONSISTENCY, "strict")] {
        facts.extend(rows.first(column).map(|value| (key.to_string(), value.to_string())));
    }
    facts.insert(fact::PLUGINS.to_string(), plugin_facts(session).await?);
    // A privilege of its own, which a server that is no replica need not give.
    if let Ok(channels) = session.query("SHOW REPLICA STATUS").await {
        facts.insert(fact::CHANNELS.to_string(), channels.rows.len().to_string());
    }
    facts.insert(fact::EMPTY_TABLES.to_string(), tables_left_empty(session).await?.join(","));
    let identity = crate::engine::mysql::source::identify(engine).await?;
    facts.insert(fact::SYSTEM_ID.to_string(), identity.system_id);
    Ok(facts)
}

/// Sends a directory that nobody changes, on as many threads as the sink wants. Blocking.
fn send(root: &Path, sink: &dyn BaseSink, cancel: &CancellationToken) -> Result<()> {
    let mut lane = sink.lane()?;
    let mut files = VecDeque::new();
    list(root, Path::new(""), &mut *lane, &mut files)?;
    lane.finish()?;
    let (files, threads) = (Mutex::new(files), sink.lanes_wanted().max(1));
    std::thread::scope(|scope| {
        let start = |_| scope.spawn(|| send_files(root, sink, &files, cancel));
        let threads: Vec<_> = (0..threads).map(start).collect();
        let outcomes = threads.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|_| Err(Error::new(Kind::Internal, "a thread of the backup panicked")))
        });
        // All are waited for, and the first error is told.
        outcomes.collect::<Vec<_>>().into_iter().collect()
    })
}

/// Gives directories to the lane and collects files.
fn list(root: &Path, below: &Path, lane: &mut dyn BaseLane, files: &mut VecDeque<(PathBuf, FileMeta)>) -> Result<()> {
    let what = || format!("cannot list '{}'", root.join(below).display());
    for entry in std::fs::read_dir(root.join(below)).context(what)? {
        let entry = entry.context(what)?;
        let metadata = entry.metadata().context(what)?;
        let relative = below.join(entry.file_name());
        let path = relative.to_str().map(str::to_string).ok_or_else(|| {
            Error::new(Kind::Unsupported, format!("the name of '{}' is not UTF-8", entry.path().display()))
        })?;
        let mode = metadata.permissions().mode() & 0o777;
        if metadata.is_dir() {
            lane.begin(FileMeta { path, kind: FileKind::Directory, mode })?;
            list(root, &relative, lane, files)?;
        } else if metadata.is_file() {
            files.push_back((entry.path(), FileMeta { path, kind: FileKind::Regular, mode }));
        }
    }
    Ok(())
}

fn send_files(
    root: &Path,
    sink: &dyn BaseSink,
    files: &Mutex<VecDeque<(PathBuf, FileMeta)>>,
    cancel: &CancellationToken,
) -> Result<()> {
    let mut lane = sink.lane()?;
    let mut piece = vec![0; PIECE_BYTES];
    let next = || files.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop_front();
    while let Some((path, meta)) = next() {
        let what = || format!("cannot read '{}' of the copy in '{}'", meta.path, root.display());
        let mut file = File::open(&path).context(what)?;
        lane.begin(meta.clone())?;
        loop {
            if sink.is_cancelled() || cancel.is_cancelled() {
                return Err(Error::new(Kind::Cancelled, "it was cancelled"));
            }
            let count = file.read(&mut piece).context(what)?;
            if count == 0 {
                break;
            }
            lane.write(&piece[..count])?;
        }
        lane.end()?;
    }
    lane.finish()
}
