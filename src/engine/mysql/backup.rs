//! The online base backup: MySQL copies itself (`clone_plugin`); for MariaDB it is `mariadb-backup --stream=mbstream`,
//! taken apart here as it comes.
//!
//! The program copies the data files while the server writes, follows the redo log, blocks commits for the moment in
//! which it notes the place in the binary log, and streams everything: nothing lies on the source's disk. Several files
//! are in the stream at the same time, so each open one has a lane of its own. The place in the binary log is both the
//! start and the stop of the backup: the restored copy is consistent exactly there.
//!
//! Source: MariaDB knowledge base, "mariadb-backup Options"; `extra/mariabackup/` of MariaDB.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::base::bulk::{run_blocking, run_on_thread};
use crate::base::child::ChildCommand;
use crate::base::users::User;
use crate::engine::mysql::geometry::server_log_number;
use crate::engine::mysql::log_files::LogPlace;
use crate::engine::mysql::ondisk::backup_info::{BINLOG_INFO, BinlogInfo};
use crate::engine::mysql::ondisk::mbstream::Decoder;
use crate::engine::mysql::product::Product;
use crate::engine::mysql::programs::{self, Program, Version};
use crate::engine::mysql::session::Session;
use crate::engine::mysql::settings::{self, SETTING_FACT_PREFIX};
use crate::engine::mysql::source::{SourceSession, server_time};
use crate::engine::mysql::{MySqlEngine, MySqlSource};
use crate::engine::{BaseSink, BaseSpan};
use crate::error::{Context, Error, Kind, Result};
use crate::model::position::Position;

pub(super) mod clone_plugin;
mod demux;
mod option_files;

pub use option_files::CONFIG_DIRECTORY;

use demux::Demux;

/// How long the program may take to end by itself after its stream ended.
const LAST_WORDS_LIMIT: std::time::Duration = std::time::Duration::from_secs(5);
/// What `mariadb-backup` says when it has not copied all of the redo log (`xtrabackup.cc`).
const LOG_NOT_COPIED: &str = "Was only able to copy log";
const PIECE_BYTES: usize = 1 << 20;
/// How often the program looks for new redo log. Commits are blocked until it has seen the end of it: with its own second
/// they wait for that long.
const LOG_COPY_MILLISECONDS: u32 = 20;
/// More copying threads gain nothing: the stream is one pipe.
const COPY_THREADS_MAX: usize = 4;

/// Facts of a backup, see `Backup::engine_facts`. Keys once given are never used for anything else.
pub mod fact {
    /// The base name of the source's binary log, without directory.
    pub const LOG_BASE: &str = "log_base";
    /// The GTID state at the place of the backup.
    pub const GTID_STATE: &str = "gtid_state";
    /// As in `aria_log_control`.
    pub const SYSTEM_ID: &str = "system_id";
    pub const SERVER_ID: &str = "server_id";
    pub const GTID_DOMAIN: &str = "gtid_domain_id";
    /// `NAME LIBRARY` of each plugin that the server loaded from a library, separated by commas.
    pub const PLUGINS: &str = "plugins";
    /// How long commits were blocked, in seconds, as the program says.
    pub const LOCK_SECONDS: &str = "lock_seconds";
    pub const TOOL_VERSION: &str = "tool_version";
    /// MySQL: `ON` if every transaction has a name, and how strict the server is about it.
    pub const GTID_MODE: &str = "gtid_mode";
    pub const GTID_CONSISTENCY: &str = "enforce_gtid_consistency";
    /// MySQL: tables that a backup has without their rows, separated by commas.
    pub const EMPTY_TABLES: &str = "empty_tables";
    /// MySQL: how many replication channels the source had; missing if it was not told.
    pub const CHANNELS: &str = "replication_channels";
}

/// Takes the backup: see [`crate::engine::Engine::back_up`].
pub(super) async fn back_up(
    engine: &MySqlEngine,
    _label: &str,
    sink: Arc<dyn BaseSink>,
    cancel: CancellationToken,
) -> Result<BaseSpan> {
    let what = || format!("cannot back up instance '{}'", engine.source.name);
    match engine.source.product {
        Product::MariaDb => run(engine, sink, &cancel).await,
        Product::MySql => clone_plugin::run(engine, sink, &cancel).await,
    }
    .context(what)
}

/// Whether the program lost its place in the redo log. It does so now and then on a busy server whose redo log is large
/// enough, and then says that it is not (MDEV-39468).
pub(super) fn may_back_up_again(error: &Error) -> bool {
    error.message().contains(LOG_NOT_COPIED)
}

/// The backup program that goes together with a server, or why there is none.
pub(super) async fn find_tool(source: &MySqlSource, server: &str) -> Result<Program> {
    let needed = Version::find(server)
        .ok_or_else(|| Error::new(Kind::Unsupported, format!("'{server}' is not a version of MariaDB")))?;
    programs::find(Product::MariaDb, &programs::BACKUP, source.bin_dir.as_deref(), needed).await
}

async fn run(engine: &MySqlEngine, sink: Arc<dyn BaseSink>, cancel: &CancellationToken) -> Result<BaseSpan> {
    let source = engine.open_session().await?;
    let tool = find_tool(&engine.source, &source.version).await?;
    let place = LogPlace::ask(&source.session).await?;
    let mut facts = collect_facts(engine, &source).await?;
    facts.insert(fact::TOOL_VERSION.to_string(), tool.version.to_string());
    let began_at = server_time(&source.session).await?;
    let (data_dir, base) = (engine.source.data_dir.clone(), place.base.clone());
    let expected = run_blocking("data directory", move || Ok(data_bytes(&data_dir, &base))).await?;
    sink.expect_bytes(expected);
    let copied = copy(engine, &tool, sink.clone(), cancel).await?;
    let ended_at = server_time(&engine.open_session().await?.session).await?;
    let info = copied.binlog_info()?;
    let base = base_name(&place.base);
    let number =
        server_log_number(&info.file).filter(|_| info.file.rsplit_once('.').map(|(name, _)| name) == Some(&base));
    let number = number.ok_or_else(|| {
        Error::new(Kind::Conflict, format!("the backup belongs to log file '{}', not to one of '{base}'", info.file))
    })?;
    facts.insert(fact::LOG_BASE.to_string(), base);
    facts.insert(fact::GTID_STATE.to_string(), info.gtid_state.to_string());
    facts.extend(copied.lock_seconds().map(|seconds| (fact::LOCK_SECONDS.to_string(), seconds)));
    let files = option_files::collect(&engine.source).await?;
    run_on_thread("base-tail", move || option_files::store(&files, sink.lane()?)).await?;
    let at = Position::File { number, offset: info.offset };
    Ok(BaseSpan { start: at, stop: at, began_at, ended_at, facts, damaged_blocks: Vec::new() })
}

/// What the program left in its small files.
struct Copied(BTreeMap<String, Vec<u8>>);

impl Copied {
    fn binlog_info(&self) -> Result<BinlogInfo> {
        let bytes = BINLOG_INFO.iter().find_map(|name| self.0.get(*name)).ok_or_else(|| {
            Error::new(Kind::Server, "mariadb-backup did not say where in the binary log its copy belongs")
                .hint("is the binary log of the server on? 'SELECT @@log_bin' must print 1")
        })?;
        BinlogInfo::parse(bytes)
    }

    fn lock_seconds(&self) -> Option<String> {
        let info = self.0.iter().find(|(name, _)| name.ends_with("_info") && !BINLOG_INFO.contains(&name.as_str()))?;
        let text = String::from_utf8_lossy(info.1);
        let line = text.lines().find_map(|line| line.strip_prefix("lock_time = "))?;
        Some(line.trim().to_string())
    }
}

/// Runs the program and gives what it streams to the sink.
async fn copy(
    engine: &MySqlEngine,
    tool: &Program,
    sink: Arc<dyn BaseSink>,
    cancel: &CancellationToken,
) -> Result<Copied> {
    let source = &engine.source;
    let endpoint = source.endpoint().await?;
    let name = source.run_as.clone();
    let user = run_blocking("user", move || User::by_name(&name)).await?;
    let threads = sink.lanes_wanted().clamp(1, COPY_THREADS_MAX);
    let (reader, writer) = std::io::pipe().context(|| "cannot make a pipe")?;
    let mut command = ChildCommand::new(&tool.path)
        .args(["--no-defaults", "--backup", "--stream=mbstream"])
        .arg(format!("--parallel={threads}"))
        .arg(format!("--log-copy-interval={LOG_COPY_MILLISECONDS}"))
        .arg(format!("--user={}", endpoint.user))
        .arg(with_path("--socket=", &source.socket))
        .arg(with_path("--datadir=", &source.data_dir))
        // Never made: everything is streamed.
        .arg(with_path("--target-dir=", &source.data_dir.join("keiki_not_made")))
        .as_user(&user)
        .output_to_pipe(writer);
    if let Some(password) = &endpoint.password {
        // The arguments of a process can be read by everybody, its environment by its user and root.
        command = command.env("MYSQL_PWD", password);
    }
    let child = command.spawn()?;
    let stop = CancellationToken::new();
    let decoding = run_on_thread("base-stream", move || decode(reader, sink));
    let waiting = child.wait(&stop);
    tokio::pin!(decoding, waiting);
    // Whoever ends first: a stream that cannot be taken ends the program, and a cancelled backup both.
    let decoded = tokio::select! {
        decoded = &mut decoding => decoded,
        () = cancel.cancelled() => {
            stop.cancel();
            let _ = waiting.await;
            let _ = decoding.await;
            return Err(Error::new(Kind::Cancelled, "it was cancelled"));
        }
    };
    let finished = if decoded.is_err() {
        // A stream that ended too early: the program knows why, if it ended by itself.
        match tokio::time::timeout(LAST_WORDS_LIMIT, &mut waiting).await {
            Ok(finished) => finished,
            Err(_) => {
                stop.cancel();
                waiting.await
            }
        }
    } else {
        waiting.await
    };
    match (decoded, finished) {
        (Ok(copied), Ok(finished)) if finished.status.success() => Ok(copied),
        // What our side could not take is the reason, and not that the program then could not write.
        (Err(error), _) if error.kind() != Kind::Damaged => Err(error),
        (_, Ok(finished)) if !finished.status.success() => {
            let words = finished.last_words().unwrap_or_else(|| String::from("no message"));
            let hint = match words.contains(LOG_NOT_COPIED) {
                true => "order the backup again when less is written; a larger 'innodb_log_file_size' helps",
                false => "the account needs RELOAD, PROCESS, LOCK TABLES and BINLOG MONITOR; 'keiki doctor' checks it",
            };
            Err(Error::new(Kind::Server, format!("mariadb-backup ended with {}: {words}", finished.ending()))
                .hint(hint))
        }
        (Err(error), _) | (Ok(_), Err(error)) => Err(error),
        (Ok(_), Ok(_)) => Err(Error::new(Kind::Internal, "mariadb-backup ended in an unknown way")),
    }
}

fn with_path(option: &str, path: &Path) -> std::ffi::OsString {
    let mut argument = std::ffi::OsString::from(option);
    argument.push(path);
    argument
}

/// Takes the stream apart until it ends. Blocking.
fn decode(reader: std::io::PipeReader, sink: Arc<dyn BaseSink>) -> Result<Copied> {
    let mut stream = std::fs::File::from(OwnedFd::from(reader));
    let mut decoder = Decoder::new();
    let mut demux = Demux::new(sink.clone());
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        if sink.is_cancelled() {
            return Err(Error::new(Kind::Cancelled, "it was cancelled"));
        }
        let count = match stream.read(&mut piece) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            other => other.context(|| "cannot read what mariadb-backup streams")?,
        };
        if count == 0 {
            decoder.finish()?;
            return demux.finish().map(Copied);
        }
        decoder.feed(&piece[..count], &mut |part| demux.take(part))?;
    }
}

fn base_name(base: &Path) -> String {
    base.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// About how many bytes will be copied: the files of the data directory and of its databases without the binary log.
/// Blocking; what cannot be looked at is not counted.
fn data_bytes(data_dir: &Path, log_base: &Path) -> u64 {
    let log = base_name(log_base);
    let entries = |path: PathBuf| std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut sum = 0;
    for entry in entries(data_dir.to_path_buf()) {
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            sum += entries(entry.path()).filter_map(|file| file.metadata().ok()).map(|file| file.len()).sum::<u64>();
        } else if !entry.file_name().to_string_lossy().starts_with(&log) {
            sum += metadata.len();
        }
    }
    sum
}

async fn collect_facts(engine: &MySqlEngine, source: &SourceSession) -> Result<BTreeMap<String, String>> {
    let mut facts = setting_facts(&source.session).await?;
    let ids = source.session.query("SELECT @@GLOBAL.server_id AS server, @@GLOBAL.gtid_domain_id AS domain").await?;
    for (key, column) in [(fact::SERVER_ID, "server"), (fact::GTID_DOMAIN, "domain")] {
        facts.extend(ids.first(column).map(|value| (key.to_string(), value.to_string())));
    }
    facts.insert(fact::PLUGINS.to_string(), plugin_facts(&source.session).await?);
    let identity = super::source::identify(engine).await?;
    facts.insert(fact::SYSTEM_ID.to_string(), identity.system_id);
    Ok(facts)
}

async fn setting_facts(session: &Session) -> Result<BTreeMap<String, String>> {
    let settings = settings::ask(session).await?;
    Ok(settings.into_iter().map(|(name, value)| (format!("{SETTING_FACT_PREFIX}{name}"), value)).collect())
}

/// See [`fact::PLUGINS`].
async fn plugin_facts(session: &Session) -> Result<String> {
    let plugins = session
        .query(
            "SELECT PLUGIN_NAME, PLUGIN_LIBRARY FROM information_schema.PLUGINS WHERE PLUGIN_STATUS = 'ACTIVE' AND \
             PLUGIN_LIBRARY IS NOT NULL ORDER BY 1",
        )
        .await?;
    let plugins: Vec<String> =
        plugins.rows.iter().map(|row| row.iter().flatten().cloned().collect::<Vec<_>>().join(" ")).collect();
    Ok(plugins.join(","))
}
