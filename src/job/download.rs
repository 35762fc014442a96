//! Writes a backup as plain files, with the log that was written while it was taken: a directory, or a tar stream.
//!
//! What comes out for PostgreSQL is a data directory that a server can be started in without anything else: it replays
//! that log, and is consistent at the end of it. (A clone to the same backup stops exactly where the backup was
//! consistent; here replay goes on to the end of the last log file that the backup needs.) For engines whose servers do
//! not do that, `engine::plain` says what is to be done.
//!
//! Everything is verified while it is read. An output is finished only when all of it was the right bytes, and an output
//! that is not finished cannot be taken for one that is. Memory is bounded: some frames of 1 MiB, and of files that lie
//! in many parts the places of the parts.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::engine::plain::{plain_advice, plain_files, plain_log_dir};
use crate::engine::{LogGeometry, log_geometry};
use crate::error::{Error, Kind, Result};
use crate::format::frame::FrameDecoder;
use crate::format::manifest::{Extent, FilePart, ManifestEntry, PackRef, Run};
use crate::job::window::archived_span;
use crate::model::backup::{Backup, FileKind, FileMeta};
use crate::model::engine_kind::EngineKind;
use crate::model::id::BackupId;
use crate::model::incarnation::Incarnation;
use crate::model::position::Position;
use crate::repo::backup_reader::BackupReader;
use crate::repo::log_catalogue::{ListedLogFile, LogCatalogue};
use crate::repo::log_reader::LogReader;
use crate::repo::repository::Repository;

mod directory;
mod links;
mod tar;

pub use crate::engine::Progress;
pub use directory::DirectoryOutput;
pub use links::{LinksMade, write_links};
pub use tar::TarOutput;

/// Decoded frames that are kept because small files that follow each other share them: one for each lane of the backup
/// and some more.
const FRAMES_KEPT: usize = 48;
/// Log is read in pieces of this size.
const LOG_PIECE_BYTES: usize = 4 << 20;

/// Where plain files go. Blocking. Parents come before what is in them.
pub trait Output: Send {
    fn directory(&mut self, path: &str, mode: u32) -> Result<()>;
    fn link(&mut self, path: &str, to: &str) -> Result<()>;
    /// Begins a file of exactly so many bytes, which follow in `write` and `hole`.
    fn begin_file(&mut self, path: &str, mode: u32, bytes: u64) -> Result<()>;
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    /// So many zero bytes.
    fn hole(&mut self, bytes: u64) -> Result<()>;
    fn end_file(&mut self) -> Result<()>;
    /// Everything has come and is right: makes it durable, then gives it its name.
    fn finish(&mut self) -> Result<()>;
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Downloaded {
    pub files: u64,
    pub bytes: u64,
    pub log_files: u64,
    /// Links of the source that lead out of its data directory.
    pub left_out: Vec<String>,
    /// What whoever starts a server in the files must know.
    pub advice: &'static str,
}

/// Writes a backup into `output`.
pub async fn download(
    repo: &Arc<Repository>,
    incarnation: &Incarnation,
    backup: &BackupId,
    output: &mut dyn Output,
    progress: &dyn Progress,
) -> Result<Downloaded> {
    let reader = BackupReader::open(repo.clone(), incarnation.id, backup).await?;
    // First, because without it the rest is worth nothing.
    let log = SpanLog::find(repo, incarnation, reader.backup()).await?;
    let mut content = Content { reader: &reader, decoder: FrameDecoder::new()?, kept: VecDeque::new() };
    let done = Downloaded { advice: plain_advice(incarnation.engine), ..Downloaded::default() };
    let mut writer = Writer { engine: incarnation.engine, output, done, made: HashSet::new() };
    let total = reader.backup().restored_bytes;
    let mut parts: HashMap<String, Vec<FilePart>> = HashMap::new();
    let mut entries = reader.entries();
    while let Some(batch) = entries.next_batch().await? {
        for entry in batch {
            match entry {
                ManifestEntry::Part(mut part) => {
                    // Nobody asks for these here, and they are most of a part.
                    part.hashes = Vec::new();
                    let path = part.path.clone();
                    let is_last = part.is_last;
                    parts.entry(path.clone()).or_default().push(part);
                    if is_last && let Some(parts) = parts.remove(&path) {
                        writer.file(&parts, &mut content).await?;
                    }
                }
                node => writer.node(&node.meta())?,
            }
            progress.set(writer.done.bytes, total);
        }
    }
    if let Some(log) = log {
        log.write(&mut writer).await?;
    }
    writer.output.finish()?;
    Ok(writer.done)
}

struct Writer<'a> {
    engine: EngineKind,
    output: &'a mut dyn Output,
    done: Downloaded,
    /// Directories that are made for several records.
    made: HashSet<String>,
}

impl Writer<'_> {
    fn node(&mut self, meta: &FileMeta) -> Result<()> {
        let placed = plain_files(self.engine, meta);
        if placed.is_empty()
            && let FileKind::Link { to } = &meta.kind
        {
            self.done.left_out.push(format!("link '{}' to '{to}'", meta.path));
        }
        for one in placed {
            match &one.kind {
                FileKind::Directory if self.made.insert(one.path.clone()) => {
                    self.output.directory(&one.path, one.mode)?;
                }
                FileKind::Link { to } => self.output.link(&one.path, to)?,
                FileKind::Directory | FileKind::Regular => {}
            }
        }
        Ok(())
    }

    /// Writes a file from all its parts, which follow each other: the reader of the manifest has checked that.
    async fn file(&mut self, parts: &[FilePart], content: &mut Content<'_>) -> Result<()> {
        let Some(last) = parts.last() else { return Ok(()) };
        let meta = FileMeta { path: last.path.clone(), kind: FileKind::Regular, mode: last.mode };
        let Some(placed) = plain_files(self.engine, &meta).into_iter().next() else { return Ok(()) };
        let bytes = last.at.saturating_add(last.bytes);
        self.output.begin_file(&placed.path, placed.mode, bytes)?;
        for extent in parts.iter().flat_map(|part| &part.extents) {
            match extent {
                Extent::Hole { bytes } => self.output.hole(*bytes)?,
                Extent::Run(run) => content.write(run, self.output).await?,
            }
        }
        self.output.end_file()?;
        self.done.files += 1;
        self.done.bytes += bytes;
        Ok(())
    }
}

/// The content of a backup's files, frame by frame.
struct Content<'a> {
    reader: &'a BackupReader,
    decoder: FrameDecoder,
    kept: VecDeque<((PackRef, u64), Bytes)>,
}

impl Content<'_> {
    async fn write(&mut self, run: &Run, output: &mut dyn Output) -> Result<()> {
        let mut skip = run.skip_bytes as usize;
        let mut left = run.bytes;
        let give = |plain: &Bytes, skip: &mut usize, left: &mut u64, output: &mut dyn Output| {
            let from = (*skip).min(plain.len());
            let until = from.saturating_add(usize::try_from(*left).unwrap_or(usize::MAX)).min(plain.len());
            *left -= (until - from) as u64;
            *skip = 0;
            output.write(&plain[from..until])
        };
        if run.frames.len() == 1
            && let Some(plain) = self.find(run.pack, run.offset)
        {
            give(&plain, &mut skip, &mut left, output)?;
        } else {
            let mut frames = self.reader.read_run(run.pack, run.offset..run.end_offset()).await?;
            while let Some(frame) = frames.next().await? {
                let plain = frame.decode(&mut self.decoder)?;
                give(&plain, &mut skip, &mut left, output)?;
                if left == 0 {
                    self.keep(run.pack, frame.offset, plain);
                }
            }
        }
        if left > 0 {
            let pack = run.pack.pack;
            return Err(Error::new(Kind::Damaged, format!("pack '{pack}' has fewer bytes than the backup needs")));
        }
        Ok(())
    }

    fn find(&self, pack: PackRef, offset: u64) -> Option<Bytes> {
        self.kept.iter().find(|(place, _)| *place == (pack, offset)).map(|(_, plain)| plain.clone())
    }

    fn keep(&mut self, pack: PackRef, offset: u64, plain: Bytes) {
        if self.kept.len() == FRAMES_KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(((pack, offset), plain));
    }
}

/// The log that was written while a backup was taken.
struct SpanLog {
    reader: LogReader,
    directory: &'static str,
    /// With the length that the server expects of each.
    files: Vec<(ListedLogFile, u64)>,
}

impl SpanLog {
    /// Finds the files from the one with the start of the backup to the one with its stop; `Damaged` if one of them is
    /// missing. Nothing if servers of the engine do not read log when they start.
    async fn find(repo: &Arc<Repository>, incarnation: &Incarnation, backup: &Backup) -> Result<Option<SpanLog>> {
        let Some(directory) = plain_log_dir(incarnation.engine) else { return Ok(None) };
        let geometry = log_geometry(incarnation.engine, &backup.engine_facts)?;
        let names = names_of_span(geometry.as_ref(), backup)?;
        let catalogue = match names.first() {
            Some(first) => LogCatalogue::beginning_with(repo, incarnation.id, first).await?,
            None => return Ok(None),
        };
        let listed = catalogue.files();
        let mut files = Vec::new();
        let mut reached = backup.start;
        for name in &names {
            let found = listed.iter().find(|file| file.name == *name);
            let span = found.map(|file| archived_span(file, geometry.as_ref())).transpose()?.flatten();
            let (Some(file), Some((from, to))) = (found, span) else { break };
            if from > reached {
                break;
            }
            let whole_bytes = match (geometry.sealed_span(name)?, catalogue.file(name).await?) {
                (Some((Position::Wal { lsn: from, .. }, Position::Wal { lsn: to, .. })), _) => {
                    to.0.saturating_sub(from.0)
                }
                (_, file) => file.map_or(0, |file| file.bytes),
            };
            files.push((file.clone(), whole_bytes));
            reached = reached.max(to);
        }
        if reached < backup.stop {
            return Err(Error::new(
                Kind::Damaged,
                format!(
                    "cannot write backup '{}': the log from {reached} to {} is not in the repository",
                    backup.id, backup.stop
                ),
            )
            .hint("choose another backup: 'keiki backup list' shows them"));
        }
        let reader = LogReader::new(repo.clone(), catalogue);
        Ok(Some(SpanLog { reader, directory, files }))
    }

    async fn write(&self, writer: &mut Writer<'_>) -> Result<()> {
        if writer.made.insert(self.directory.to_string()) {
            writer.output.directory(self.directory, 0o700)?;
        }
        for (file, whole_bytes) in &self.files {
            writer.output.begin_file(&format!("{}/{}", self.directory, file.name), 0o600, *whole_bytes)?;
            let mut at = 0u64;
            while at < *whole_bytes {
                let wanted = usize::try_from(whole_bytes - at).unwrap_or(usize::MAX).min(LOG_PIECE_BYTES);
                let piece = self.reader.read(&file.name, at, wanted).await?;
                if piece.is_empty() {
                    break;
                }
                writer.output.write(&piece)?;
                at += piece.len() as u64;
            }
            // The rest of a file that the server had not finished.
            writer.output.hole(whole_bytes - at)?;
            writer.output.end_file()?;
            writer.done.log_files += 1;
        }
        Ok(())
    }
}

/// The names of the log files between a backup's start and its stop.
fn names_of_span(geometry: &dyn LogGeometry, backup: &Backup) -> Result<Vec<String>> {
    let end_of = |name: &str| -> Result<Position> {
        let span = geometry.sealed_span(name)?;
        span.map(|(_, to)| to)
            .ok_or_else(|| Error::new(Kind::Internal, format!("'{name}' follows a log file and is none itself")))
    };
    let mut name = geometry.file_before(backup.start)?;
    if end_of(&name)? <= backup.start {
        name = geometry.next_file(&name)?;
    }
    let mut names = Vec::new();
    loop {
        let end = end_of(&name)?;
        let next = geometry.next_file(&name)?;
        names.push(name);
        if end >= backup.stop {
            return Ok(names);
        }
        name = next;
    }
}

#[cfg(test)]
mod tests;
