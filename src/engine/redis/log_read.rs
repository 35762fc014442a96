//! Reads a part of an increment, walking over its commands on the way.

use std::fs::File;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use jiff::Timestamp;

use crate::base::bulk::run_blocking;
use crate::engine::LogRead;
use crate::engine::redis::Inner;
use crate::engine::redis::geometry::file_number;
use crate::engine::redis::ondisk::aof::{AofWalker, Mark};
use crate::error::{Context, Error, Kind, Result};
use crate::model::log::{LogFile, LogSummary};
use crate::model::position::Position;

const PIECE_BYTES: u64 = 1 << 20;

/// Opens bytes `from..to` of a log file, both of them boundaries of commands.
pub(super) async fn open(inner: &Inner, file: &LogFile, from: u64, to: u64) -> Result<Box<dyn LogRead>> {
    let what = || format!("cannot open log file '{}' of instance '{}'", file.name, inner.source().name);
    if from > to || to > file.readable_bytes {
        return Err(Error::new(Kind::Internal, format!("{}: bytes {from} to {to} cannot be read", what())));
    }
    let number = file_number(&file.name).context(what)?;
    if inner.is_streamed() {
        let path = inner.follower().path(number).await.context(what)?;
        let opened =
            run_blocking("open log", move || File::open(&path).context(|| format!("cannot open '{}'", path.display())));
        return Ok(Box::new(IncrementRead::new(opened.await.context(what)?, file, number, from..to, None)));
    }
    let hold = inner.hold().await.ok_or_else(|| Error::new(Kind::Internal, format!("{}: never listed", what())))?;
    let opened = run_blocking("open log", move || {
        let held = hold.held()?.into_iter().find(|held| held.number == number);
        let held = held.ok_or_else(|| Error::new(Kind::NotFound, "it was given up because it took too much disk"))?;
        let file = File::open(&held.path).context(|| format!("cannot open '{}'", held.path.display()))?;
        Ok((file, hold.untimed(number)))
    });
    let (opened, untimed) = opened.await.context(what)?;
    Ok(Box::new(IncrementRead::new(opened, file, number, from..to, untimed)))
}

struct IncrementRead {
    file: File,
    name: String,
    number: u64,
    to: u64,
    walker: AofWalker,
    first_at: Option<Timestamp>,
    last_at: Option<Timestamp>,
    /// Times after this second say nothing about what lies between: see `Hold::untimed`.
    untimed: Option<i64>,
}

impl IncrementRead {
    fn new(
        opened: File,
        file: &LogFile,
        number: u64,
        range: std::ops::Range<u64>,
        untimed: Option<i64>,
    ) -> IncrementRead {
        IncrementRead {
            file: opened,
            name: file.name.clone(),
            number,
            to: range.end,
            walker: AofWalker::new(range.start),
            first_at: None,
            last_at: None,
            untimed,
        }
    }
}

impl LogRead for IncrementRead {
    fn read(&mut self) -> Result<Bytes> {
        let at = self.walker.at();
        // Bounded by a constant, so it fits.
        let mut bytes = vec![0u8; self.to.saturating_sub(at).min(PIECE_BYTES) as usize];
        self.file.read_exact_at(&mut bytes, at).context(|| format!("cannot read log file '{}'", self.name))?;
        let limit = self.untimed.unwrap_or(i64::MAX);
        let (first_at, last_at) = (&mut self.first_at, &mut self.last_at);
        let walked = self.walker.feed(&bytes, |mark| {
            let at = match mark {
                Mark::Second { unix_seconds, .. } => Timestamp::from_second(unix_seconds.min(limit)).ok(),
                Mark::Received { unix_millis, .. } => Timestamp::from_millisecond(unix_millis).ok(),
                // Everything up to then stands before, also what the last annotation of receipt says nothing about yet: if
                // the server dies now, this is the last moment that is whole.
                Mark::Executed { unix_millis, .. } => {
                    *last_at = (*last_at).max(Timestamp::from_millisecond(unix_millis).ok());
                    None
                }
                Mark::Boundary { .. } => None,
            };
            if at.is_some() {
                *first_at = first_at.or(at);
                *last_at = at;
            }
        });
        walked.map_err(|damage| damage.of(&self.name))?;
        if self.walker.at() == self.to {
            self.walker.finish().map_err(|damage| damage.of(&self.name))?;
        }
        Ok(bytes.into())
    }

    fn summary(&self) -> LogSummary {
        LogSummary {
            first_commit_at: self.first_at,
            last_commit_at: self.last_at,
            last_commit: Some(Position::File { number: self.number, offset: self.walker.boundary() }),
            named_points: Vec::new(),
            transactions: Vec::new(),
        }
    }
}
