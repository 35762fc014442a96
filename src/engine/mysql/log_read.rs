//! Reads a range of a binary log file in order, as bytes that are the same whether the file is finished or not.
//!
//! A range that does not begin at byte 0 must begin where an event ends: so the walker of the last range is kept, and
//! where there is none (the agent was restarted) the file is walked from its start. A server whose log was reset writes
//! a file of the same name with other events; what was shipped of the old one would otherwise go on with the new one.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use jiff::Timestamp;

use crate::base::bulk::run_blocking;
use crate::engine::LogRead;
use crate::engine::mysql::MySqlEngine;
use crate::engine::mysql::geometry::log_number;
use crate::engine::mysql::log_files::LogPlace;
use crate::engine::mysql::ondisk::transaction::{Transaction, TransactionRange};
use crate::engine::mysql::ondisk::walker::{Walker, mask_in_use};
use crate::error::{Context, Error, Kind, Result};
use crate::model::log::{LogFile, LogSummary};
use crate::model::position::Position;

const PIECE_BYTES_MAX: u64 = 1 << 20;
/// A stretch of log with more series of transactions has no list of them; a search reads it.
const RANGES_MAX: usize = 64;

/// How far a file was walked.
pub struct Walked {
    number: u64,
    inode: (u64, u64),
    walker: Walker,
}

/// Opens bytes `from..to` of a log file: see [`crate::engine::Engine::open_log`].
pub(super) async fn open(engine: &MySqlEngine, file: &LogFile, from: u64, to: u64) -> Result<Box<dyn LogRead>> {
    let what = format!("cannot read log file '{}' of instance '{}'", file.name, engine.source.name);
    if from > to || to > file.readable_bytes {
        let readable = file.readable_bytes;
        return Err(Error::new(Kind::Internal, format!("{what}: {from} to {to} is not within {readable} bytes")));
    }
    let number = log_number(&file.name)?;
    let place = {
        let source = engine.session().await.context(|| &what)?;
        LogPlace::ask(&source.session).await.context(|| &what)?
    };
    let (path, kept, label) = (place.file(number), engine.walked.clone(), what.clone());
    let opened = run_blocking("open log file", move || {
        let file = File::open(&path).context(|| format!("cannot open '{}'", path.display()))?;
        let metadata = file.metadata().context(|| format!("cannot look at '{}'", path.display()))?;
        let inode = (metadata.dev(), metadata.ino());
        let walker = walker_at(&file, number, inode, from, &kept)?;
        let facts = Facts { number, ..Facts::default() };
        Ok(BinlogRead { file, number, inode, at: from, to, walker: Some(walker), facts, kept, what: label })
    });
    Ok(Box::new(opened.await.context(|| &what)?))
}

/// The walker for a range: a new one at the start of the file, the one that was kept, or one that has walked there.
fn walker_at(file: &File, number: u64, inode: (u64, u64), from: u64, kept: &Mutex<Option<Walked>>) -> Result<Walker> {
    if from == 0 {
        return Ok(Walker::new());
    }
    {
        let kept = kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let fits = |kept: &&Walked| {
            (kept.number, kept.inode, kept.walker.event_end()) == (number, inode, from) && kept.walker.knows_format()
        };
        if let Some(kept) = kept.as_ref().filter(fits) {
            return Ok(kept.walker.resumed_at(from));
        }
    }
    let mut walker = Walker::new();
    let mut at = 0;
    let walked = loop {
        let mut piece = vec![0; usize::try_from(PIECE_BYTES_MAX.min(from - at)).unwrap_or(0)];
        if piece.is_empty() {
            break walker.event_end() == from;
        }
        if file.read_exact_at(&mut piece, at).is_err() || walker.feed(&piece, &mut |_| Ok(())).is_err() {
            break false;
        }
        at += piece.len() as u64;
    };
    if walked {
        return Ok(walker.resumed_at(from));
    }
    Err(Error::new(Kind::Conflict, format!("no event begins at byte {from}, up to which it was shipped"))
        .hint("was the log reset, or was the data directory set back? the archive keeps what it has"))
}

struct BinlogRead {
    file: File,
    number: u64,
    inode: (u64, u64),
    at: u64,
    to: u64,
    /// Nothing behind bytes that are no events: what a crash of the host left is shipped as it is.
    walker: Option<Walker>,
    facts: Facts,
    kept: Arc<Mutex<Option<Walked>>>,
    what: String,
}

impl LogRead for BinlogRead {
    fn read(&mut self) -> Result<Bytes> {
        if self.at == self.to {
            return Ok(Bytes::new());
        }
        let mut piece = vec![0; usize::try_from(PIECE_BYTES_MAX.min(self.to - self.at)).unwrap_or(0)];
        self.file.read_exact_at(&mut piece, self.at).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::new(Kind::Damaged, format!("{}: the file is shorter than the server said", self.what))
            }
            _ => Error::io(&self.what, error),
        })?;
        mask_in_use(&mut piece, self.at);
        self.walk(&piece)?;
        self.at += piece.len() as u64;
        if let Some(walker) = self.walker.as_ref().filter(|_| self.at == self.to) {
            let walker = walker.resumed_at(walker.event_end());
            let walked = Walked { number: self.number, inode: self.inode, walker };
            *self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(walked);
        }
        Ok(Bytes::from(piece))
    }

    fn summary(&self) -> LogSummary {
        self.facts.summary()
    }
}

impl BinlogRead {
    fn walk(&mut self, piece: &[u8]) -> Result<()> {
        let Some(walker) = &mut self.walker else { return Ok(()) };
        let facts = &mut self.facts;
        let walked = walker.feed(piece, &mut |transaction| {
            facts.add(transaction);
            Ok(())
        });
        match walked {
            Err(error) if error.kind() == Kind::Damaged && walker.knows_format() => {
                tracing::warn!("{}: {error}", self.what);
                self.walker = None;
                Ok(())
            }
            other => other.context(|| &self.what),
        }
    }
}

/// What was found in a stretch of log.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Of the file.
    pub number: u64,
    first_at: Option<Timestamp>,
    last_at: Option<Timestamp>,
    last_end: Option<u64>,
    ranges: Vec<TransactionRange>,
    has_too_many_ranges: bool,
}

impl Facts {
    pub fn add(&mut self, transaction: Transaction) {
        let at = transaction.at;
        self.first_at = Some(self.first_at.map_or(at, |first| first.min(at)));
        self.last_at = Some(self.last_at.map_or(at, |last| last.max(at)));
        self.last_end = Some(transaction.end);
        if self.ranges.iter_mut().any(|range| range.extend(transaction.id)) {
            return;
        }
        match TransactionRange::of(transaction.id) {
            Some(range) if self.ranges.len() < RANGES_MAX => self.ranges.push(range),
            Some(_) => self.has_too_many_ranges = true,
            // It cannot be asked for by name.
            None => {}
        }
    }

    pub fn summary(&self) -> LogSummary {
        LogSummary {
            first_commit_at: self.first_at,
            last_commit_at: self.last_at,
            last_commit: self.last_end.map(|offset| Position::File { number: self.number, offset }),
            named_points: Vec::new(),
            transactions: match self.has_too_many_ranges {
                true => Vec::new(),
                false => self.ranges.iter().map(TransactionRange::to_string).collect(),
            },
        }
    }
}
