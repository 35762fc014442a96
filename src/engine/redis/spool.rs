//! The replication stream as log files: what the agent receives as a replica, written down until it is shipped.
//!
//! A file is an increment of an append-only file: the commands of the stream, byte for byte, between annotations of the
//! agent's own (`ondisk::aof`) that say when they were received, which offset of the stream stands there, and of which
//! replication history it is. So a file explains itself: after a kill the agent reads its last file and asks the server for
//! what comes next. Each file begins with a SELECT of the database that the stream was in, because a server begins to load
//! each file in database 0.
//!
//! The files lie in `keiki-stream` in the server's working directory. Their numbers begin at the second in which the first
//! one began; the next number follows only where nothing is missing in between, otherwise a number is left out, which is a
//! hole. What follows the last command that may have changed data (PING and the like) is not shipped before the next such
//! command comes, so that a quiet server costs no requests. What the files take on the disk has a limit; beyond it the
//! oldest are given up. All of this is blocking.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::base::durable::{LockGuard, create_dir_all_durable, fsync_dir, lock_file, remove_file_durable};
use crate::engine::redis::geometry::{file_name, file_number};
use crate::engine::redis::ondisk::aof::{AofWalker, Mark, executed_line, history_line, received_line, select_command};
use crate::engine::redis::source::walk_file;
use crate::error::{Context, Error, Kind, Result};
use crate::model::bytes_text::human_bytes;
use crate::model::position::Position;

/// Below the server's working directory.
pub const SPOOL_DIR: &str = "keiki-stream";
/// A file that is longer or older than this ends at the next command: a file is one object in the repository.
const FILE_BYTES_MAX: u64 = 64 << 20;
const FILE_MILLIS_MAX: i64 = 3_600_000;
/// Places in the stream that are remembered, for backups that ask where they begin: hours of a quiet server, and many
/// seconds of a busy one.
const MARKS_KEPT: usize = 65_536;

/// Where the stream goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The id of the replication history.
    pub history: String,
    /// Bytes of the stream before, as the server counts them.
    pub offset: u64,
}

/// A file of the spool as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpoolFile {
    pub number: u64,
    pub path: PathBuf,
    /// What may be shipped: durable here, and never changed again.
    pub readable_bytes: u64,
    pub finished: bool,
}

/// The spool of one server. One process at a time has it.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    limit_bytes: u64,
    open: Option<OpenFile>,
    /// The stream's offset and the place behind an annotation, in the order of the log.
    marks: VecDeque<(u64, Position)>,
    _lock: LockGuard,
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    path: PathBuf,
    number: u64,
    walker: AofWalker,
    /// Where the stream is after everything that was received.
    place: Place,
    /// What a backup or an annotation has made worth shipping, beyond the last change.
    wanted: u64,
    received_at: i64,
    /// What `received_at` was when something last changed.
    change_received_at: i64,
    executed_at: i64,
    began_at: i64,
    /// An annotation that waits until this offset of the stream has passed.
    executed_waits: Option<(i64, u64)>,
}

impl Spool {
    /// Takes the spool below a server's working directory and finds out where it had come to. What was not complete when
    /// the agent died is cut off: the server is asked for it again. `Conflict` if another process has it.
    pub fn open(data_dir: &Path, limit_bytes: u64) -> Result<Spool> {
        let dir = data_dir.join(SPOOL_DIR);
        create_dir_all_durable(&dir, 0o700)?;
        let lock = lock_file(&dir.join("lock"))?;
        let mut spool = Spool { dir, limit_bytes, open: None, marks: VecDeque::new(), _lock: lock };
        if let Some((number, path)) = spool.paths()?.pop() {
            spool.open = spool.reopen(number, path)?;
        }
        Ok(spool)
    }

    fn reopen(&mut self, number: u64, path: PathBuf) -> Result<Option<OpenFile>> {
        let what = || format!("cannot open '{}'", path.display());
        let file = OpenOptions::new().read(true).append(true).open(&path).context(what)?;
        let bytes = file.metadata().context(what)?.len();
        let mut walker = AofWalker::new(0);
        // The tail may be torn or, after a crash of the machine, zeros.
        if let Err(error) = walk_file(&file, &mut walker, bytes, &path, |_| {}) {
            tracing::debug!("the end of the spool is not used: {error}");
        }
        let boundary = walker.boundary();
        file.set_len(boundary).context(what)?;
        let mut walker = AofWalker::new(0);
        let (mut last, mut began_at) = (None, None);
        let (mut received_at, mut executed_at) = (0, 0);
        let mut marks = VecDeque::new();
        walk_file(&file, &mut walker, boundary, &path, |mark| {
            let (end, stream_offset) = match mark {
                Mark::Received { end, unix_millis, stream_offset, .. } => {
                    received_at = unix_millis;
                    began_at.get_or_insert(unix_millis);
                    (end, stream_offset)
                }
                Mark::Executed { end, unix_millis, stream_offset, .. } => {
                    executed_at = unix_millis;
                    (end, stream_offset)
                }
                Mark::Second { .. } | Mark::Boundary { .. } => return,
            };
            last = Some((end, stream_offset));
            if marks.len() == MARKS_KEPT {
                marks.pop_front();
            }
            marks.push_back((stream_offset, Position::File { number, offset: end }));
        })?;
        let (Some((end, offset)), Some(history)) = (last, walker.history().map(str::to_string)) else {
            return Ok(None);
        };
        let offset = offset.saturating_add(boundary.saturating_sub(end));
        let wanted = walker.changed();
        let place = Place { history, offset };
        self.marks = marks;
        Ok(Some(OpenFile {
            file,
            path,
            number,
            walker,
            place,
            wanted,
            received_at,
            change_received_at: received_at,
            executed_at,
            began_at: began_at.unwrap_or(received_at),
            executed_waits: None,
        }))
    }

    /// Where the stream goes on, if anything of it is here.
    pub fn place(&self) -> Option<&Place> {
        self.open.as_ref().map(|open| &open.place)
    }

    /// Begins a file at a place that has nothing to do with what was before: a hole, unless it is the first.
    pub fn begin_anew(&mut self, place: Place, unix_millis: i64) -> Result<()> {
        let unix_seconds = u64::try_from(unix_millis / 1000).unwrap_or(0);
        // Another history counts from the beginning: an offset of before would be looked for in the wrong place.
        self.marks.clear();
        let number = match self.paths()?.last() {
            Some((last, path)) => {
                let what = || format!("cannot end '{}'", path.display());
                let file = match self.open.take() {
                    Some(open) => {
                        // Of a command that was not received to its end nothing stays.
                        open.file.set_len(open.walker.boundary()).context(what)?;
                        open.file
                    }
                    None => File::open(path).context(what)?,
                };
                // From now on it is said to be finished, which includes that it is durable.
                file.sync_all().context(what)?;
                last.saturating_add(2).max(unix_seconds)
            }
            None => unix_seconds,
        };
        self.begin_file(number, place, unix_millis, None)
    }

    fn begin_file(&mut self, number: u64, place: Place, unix_millis: i64, database: Option<u32>) -> Result<()> {
        let path = self.dir.join(file_name(number));
        let what = || format!("cannot make '{}'", path.display());
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create_new(true).mode(0o600).open(&path).context(what)?;
        let mut open = OpenFile {
            file,
            path,
            number,
            walker: AofWalker::new(0),
            place,
            wanted: 0,
            received_at: 0,
            change_received_at: 0,
            executed_at: 0,
            began_at: unix_millis,
            executed_waits: None,
        };
        let mut head = history_line(&open.place.history, open.place.offset);
        if let Some(database) = database {
            head += &select_command(database);
        }
        open.write(head.as_bytes())?;
        let mark = open.mark_received(unix_millis)?;
        fsync_dir(&self.dir)?;
        self.open = Some(open);
        self.remember(mark);
        Ok(())
    }

    fn remember(&mut self, mark: Option<(u64, Position)>) {
        self.marks.extend(mark);
        while self.marks.len() > MARKS_KEPT {
            self.marks.pop_front();
        }
    }

    /// The server says that the same stream goes on under another history id, from here on.
    pub fn rename_history(&mut self, id: &str) {
        if let Some(open) = &mut self.open {
            open.place.history = id.to_string();
        }
    }

    /// Writes down what was received at a time.
    pub fn append(&mut self, unix_millis: i64, mut bytes: &[u8]) -> Result<()> {
        let open = self.open.as_mut().ok_or_else(no_file)?;
        if !open.is_at_boundary() {
            // A command that began to arrive earlier was executed before that.
            let rest = open.bytes_to_boundary(bytes)?;
            open.receive(&bytes[..rest])?;
            bytes = &bytes[rest..];
        }
        if open.is_at_boundary() {
            let mark = open.mark_executed()?;
            self.remember(mark);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        self.end_file_if_due(unix_millis)?;
        let open = self.open.as_mut().ok_or_else(no_file)?;
        let mark = open.mark_received(unix_millis)?;
        open.receive(bytes)?;
        let executed = if open.is_at_boundary() { open.mark_executed()? } else { None };
        self.remember(mark);
        self.remember(executed);
        Ok(())
    }

    /// Goes on in another file if this one has become long or old. Only between commands.
    fn end_file_if_due(&mut self, unix_millis: i64) -> Result<()> {
        let Some(open) = &self.open else { return Ok(()) };
        let age = unix_millis.saturating_sub(open.began_at);
        let is_old = age > FILE_MILLIS_MAX && open.walker.changed() > 0;
        let renamed = open.walker.history() != Some(open.place.history.as_str());
        if open.walker.at() < FILE_BYTES_MAX && !is_old && !renamed {
            return Ok(());
        }
        open.file.sync_data().context(|| format!("cannot sync '{}'", open.path.display()))?;
        let (number, place, database) = (open.number.saturating_add(1), open.place.clone(), open.walker.database());
        self.begin_file(number, place, unix_millis, database)?;
        self.enforce_limit().map(|_| ())
    }

    /// To be noted as soon as this much of the stream is here: everything that was executed by then stands before.
    pub fn note_executed(&mut self, unix_millis: i64, stream_offset: u64) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.executed_waits = Some((unix_millis, stream_offset));
        let mark = if open.is_at_boundary() { open.mark_executed()? } else { None };
        self.remember(mark);
        Ok(())
    }

    /// The place of an offset of the stream in a history, which must have been received, and makes it worth shipping.
    /// `NotFound` if it is too long ago, or if the stream has begun anew in another history since.
    pub fn locate(&mut self, history: &str, stream_offset: u64) -> Result<Position> {
        let missing =
            || Error::new(Kind::NotFound, format!("offset {stream_offset} of the replication stream is not known"));
        if self.place().is_none_or(|place| place.history != history) {
            return Err(missing());
        }
        let after = self.marks.partition_point(|(offset, _)| *offset <= stream_offset);
        let mark = after.checked_sub(1).and_then(|index| self.marks.get(index));
        let (offset, position) = mark.ok_or_else(missing)?;
        let (number, at) = position.file()?;
        let at = at.saturating_add(stream_offset - offset);
        if let Some(open) = self.open.as_mut().filter(|open| open.number == number) {
            if at > open.walker.boundary() {
                return Err(Error::new(Kind::Server, format!("offset {stream_offset} lies within a command")));
            }
            open.wanted = open.wanted.max(at);
        }
        Ok(Position::File { number, offset: at })
    }

    /// All that was received so far is noted as received before this time, in milliseconds since 1970. A backup whose log
    /// goes on in the middle of it shows no moment before: the annotation that covers the rest stands before that place.
    pub fn received_before(&self) -> i64 {
        self.open.as_ref().map_or(0, |open| open.received_at.saturating_add(1))
    }

    /// The files in the order of the log; what they say is readable is durable.
    pub fn files(&mut self) -> Result<Vec<SpoolFile>> {
        let paths = self.paths()?;
        let mut files = Vec::with_capacity(paths.len());
        for (number, path) in paths {
            let file = match &self.open {
                Some(open) if open.number == number => {
                    open.file.sync_data().context(|| format!("cannot sync '{}'", path.display()))?;
                    let readable_bytes = open.walker.changed().max(open.wanted);
                    SpoolFile { number, path, readable_bytes, finished: false }
                }
                _ => {
                    let metadata =
                        std::fs::metadata(&path).context(|| format!("cannot look at '{}'", path.display()))?;
                    SpoolFile { number, path, readable_bytes: metadata.len(), finished: true }
                }
            };
            files.push(file);
        }
        Ok(files)
    }

    /// Removes everything before file `number`; the newest file stays.
    pub fn release_before(&mut self, number: u64) -> Result<()> {
        let mut paths = self.paths()?;
        paths.pop();
        for (_, path) in paths.into_iter().filter(|(found, _)| *found < number) {
            remove_file_durable(&path)?;
        }
        Ok(())
    }

    /// Gives up the oldest files while all of them take more than the limit. Returns what was given up.
    pub fn enforce_limit(&mut self) -> Result<u64> {
        let paths = self.paths()?;
        let size = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
        let mut total: u64 = paths.iter().map(|(_, path)| size(path)).sum();
        let mut given_up = 0;
        for (_, path) in paths.iter().take(paths.len().saturating_sub(1)) {
            if total <= self.limit_bytes {
                break;
            }
            let bytes = size(path);
            remove_file_durable(path)?;
            total = total.saturating_sub(bytes);
            given_up += bytes;
        }
        if given_up > 0 {
            tracing::warn!(
                "gave up {} of the replication stream that was not shipped yet, because more than {} would lie in '{}'",
                human_bytes(given_up),
                human_bytes(self.limit_bytes),
                self.dir.display()
            );
        }
        Ok(given_up)
    }

    /// The path of a file that is here.
    pub fn path(&self, number: u64) -> PathBuf {
        self.dir.join(file_name(number))
    }

    fn paths(&self) -> Result<Vec<(u64, PathBuf)>> {
        let what = || format!("cannot read directory '{}'", self.dir.display());
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(&self.dir).context(what)? {
            let entry = entry.context(what)?;
            if let Some(number) = entry.file_name().to_str().and_then(|name| file_number(name).ok()) {
                paths.push((number, entry.path()));
            }
        }
        paths.sort();
        Ok(paths)
    }
}

fn no_file() -> Error {
    Error::new(Kind::Internal, "the spool has no open file")
}

impl OpenFile {
    fn is_at_boundary(&self) -> bool {
        self.walker.boundary() == self.walker.at()
    }

    fn here(&self) -> Position {
        Position::File { number: self.number, offset: self.walker.at() }
    }

    /// How many of the bytes belong to the command that is being received.
    fn bytes_to_boundary(&self, bytes: &[u8]) -> Result<usize> {
        let mut ahead = self.walker.clone();
        let mut first = None;
        ahead
            .feed(bytes, |mark| {
                if let (Mark::Boundary { at }, None) = (mark, first) {
                    first = Some(at);
                }
            })
            .map_err(|damage| damage.of(&self.path.display().to_string()))?;
        let end = first.map_or(bytes.len() as u64, |at| at.saturating_sub(self.walker.at()));
        Ok(usize::try_from(end).unwrap_or(bytes.len()).min(bytes.len()))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).context(|| format!("cannot write '{}'", self.path.display()))?;
        self.walker.feed(bytes, |_| {}).map_err(|damage| damage.of(&self.path.display().to_string()))
    }

    fn receive(&mut self, bytes: &[u8]) -> Result<()> {
        let before = self.walker.changed();
        self.write(bytes)?;
        if self.walker.changed() > before {
            self.change_received_at = self.received_at;
        }
        self.place.offset = self.place.offset.saturating_add(bytes.len() as u64);
        Ok(())
    }

    /// One annotation for each millisecond at most: a clock that stands or goes back adds none.
    fn mark_received(&mut self, unix_millis: i64) -> Result<Option<(u64, Position)>> {
        if unix_millis <= self.received_at {
            return Ok(None);
        }
        self.write(received_line(unix_millis, self.place.offset).as_bytes())?;
        self.received_at = unix_millis;
        Ok(Some((self.place.offset, self.here())))
    }

    fn mark_executed(&mut self) -> Result<Option<(u64, Position)>> {
        let Some((unix_millis, stream_offset)) = self.executed_waits else { return Ok(None) };
        if stream_offset > self.place.offset {
            return Ok(None);
        }
        self.executed_waits = None;
        // Where nothing has changed since, the last one still says enough, if it is of later than the annotation before the
        // last change: a clone to a moment until then does not have that change.
        let has_changed = self.walker.changed() > self.wanted;
        let completes = self.executed_at <= self.change_received_at && unix_millis > self.change_received_at;
        if unix_millis <= self.executed_at || !(has_changed || completes) {
            return Ok(None);
        }
        self.write(executed_line(unix_millis, self.place.offset).as_bytes())?;
        (self.executed_at, self.wanted) = (unix_millis, self.walker.at());
        Ok(Some((self.place.offset, self.here())))
    }
}

#[cfg(test)]
mod tests;
