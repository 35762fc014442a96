//! Which binary log files there are, and how far they may be read.
//!
//! The server says where its log ends: `SHOW MASTER STATUS`, by whatever name, waits for the group of transactions that is being written,
//! so that what lies before that position is complete, flushed, and synced as far as `sync_binlog` says. The index file
//! says which files there are; it is read from disk, because `SHOW BINARY LOGS` waits for whoever purges. A file is
//! finished when the server has begun the next one.

use std::path::{Path, PathBuf};

use crate::base::bulk::run_blocking;
use crate::engine::mysql::MySqlEngine;
use crate::engine::mysql::geometry::{log_name, log_number, server_log_number};
use crate::engine::mysql::product::Product;
use crate::engine::mysql::session::Session;
use crate::engine::mysql::source::server_time;
use crate::engine::{DurableEnd, LogListing};
use crate::error::{Context, Error, Kind, Result};
use crate::model::log::LogFile;
use crate::model::position::Position;

/// Where the server keeps its log: the base of the files' names with the directory, and the index file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LogPlace {
    pub base: PathBuf,
    pub index: PathBuf,
}

impl LogPlace {
    /// Asks the server. `BadInput` if it writes no binary log.
    pub async fn ask(session: &Session) -> Result<LogPlace> {
        let rows = session.query("SELECT @@GLOBAL.log_bin_basename AS base, @@GLOBAL.log_bin_index AS names").await?;
        match (rows.first("base"), rows.first("names")) {
            (Some(base), Some(index)) if !base.is_empty() => {
                Ok(LogPlace { base: PathBuf::from(base), index: PathBuf::from(index) })
            }
            _ => Err(Error::new(Kind::BadInput, "the server writes no binary log, so there is nothing to ship")
                .hint("set 'log_bin' and 'binlog_format = ROW' in the server's configuration and restart it")),
        }
    }

    /// The path of the log file with this number. The server writes at least six digits (`sql/log.cc`,
    /// find_uniq_filename).
    pub fn file(&self, number: u64) -> PathBuf {
        let mut path = self.base.clone().into_os_string();
        path.push(format!(".{number:06}"));
        PathBuf::from(path)
    }

    pub fn base_name(&self) -> String {
        self.base.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// The numbers of the files that the server has, in order, up to the open one. Blocking.
    pub fn numbers(&self, open: u64) -> Result<Vec<u64>> {
        let index =
            std::fs::read_to_string(&self.index).context(|| format!("cannot read '{}'", self.index.display()))?;
        Ok(numbers_in_index(&index, &self.base_name(), open))
    }
}

/// The log files after `after` and the durable end: see [`crate::engine::Engine::list_log`].
pub(super) async fn list(engine: &MySqlEngine, after: Option<&str>) -> Result<LogListing> {
    list_unnamed(engine, after).await.context(|| format!("cannot list the log of instance '{}'", engine.source.name))
}

async fn list_unnamed(engine: &MySqlEngine, after: Option<&str>) -> Result<LogListing> {
    let after = after.map(log_number).transpose()?;
    let source = engine.session().await?;
    let place = LogPlace::ask(&source.session).await?;
    // The clock first: all that was committed at that time lies before the position that is asked for next.
    let observed_at = server_time(&source.session).await?;
    let (open, offset) = end_of_log(&source.session).await?;
    drop(source);
    if after.is_some_and(|after| open <= after) {
        return Err(begins_again(open, after.unwrap_or(0)));
    }
    // After the server was asked: whatever it names has its file.
    let files = run_blocking("list binary logs", move || {
        let mut numbers = place.numbers(open)?;
        numbers.retain(|number| after.is_none_or(|after| *number > after));
        require_next(after, numbers.first().copied())?;
        listed_files(&place, numbers.into_iter(), offset)
    });
    let position = Position::File { number: open, offset };
    Ok(LogListing { files: files.await?, durable_end: DurableEnd { position, observed_at } })
}

fn begins_again(open: u64, after: u64) -> Error {
    Error::new(
        Kind::Conflict,
        format!("the binary log begins again: the server writes file {open}, and file {after} was shipped as finished"),
    )
    .hint(
        "was the log reset ('RESET MASTER', 'RESET BINARY LOGS AND GTIDS'), 'log_bin' renamed, or the data directory set \
         back? its old archive stays as it is: give the instance another name in the configuration, and take a backup",
    )
}

/// The server gives its files numbers without a gap, so a number that is left out was purged.
fn require_next(after: Option<u64>, first: Option<u64>) -> Result<()> {
    match (after.and_then(|after| after.checked_add(1)), first) {
        (Some(next), Some(first)) if next < first => Err(Error::new(
            Kind::NotFound,
            format!("log file {next} was purged before it was shipped: the binary log begins with file {first} now"),
        )
        .hint("the archive has a hole there: take a new backup, and see 'binlog_expire_logs_seconds'")),
        _ => Ok(()),
    }
}

/// Number and offset of the end of the log.
pub(super) async fn end_of_log(session: &Session) -> Result<(u64, u64)> {
    let product = Product::of_text(session.server_text());
    let statement = product.log_end(session.server_text());
    let rows = session.query(statement).await.map_err(|error| match error.kind() {
        Kind::Forbidden => error.hint(format!("GRANT {} ON *.* TO the account in 'user'", product.log_end_right())),
        _ => error,
    })?;
    let number = rows.first("File").and_then(server_log_number);
    let offset = rows.first("Position").and_then(|offset| offset.parse().ok());
    number.zip(offset).ok_or_else(|| {
        Error::new(Kind::BadInput, "the server does not say where its binary log ends")
            .hint(format!("is 'log_bin' set? '{statement}' must print a file"))
    })
}

/// The numbers of the files in the index, in its order, up to the open one. Files with another base name are of a time
/// before the log was renamed.
fn numbers_in_index(index: &str, base_name: &str, open: u64) -> Vec<u64> {
    let mut numbers: Vec<u64> = Vec::new();
    for line in index.lines() {
        let name = line.rsplit('/').next().unwrap_or(line).trim();
        let is_ours = name.rsplit_once('.').is_some_and(|(base, _)| base == base_name);
        if let Some(number) = server_log_number(name).filter(|number| is_ours && *number <= open) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// Blocking.
fn listed_files(place: &LogPlace, numbers: impl Iterator<Item = u64>, open_bytes: u64) -> Result<Vec<LogFile>> {
    let mut numbers = numbers.peekable();
    let mut files = Vec::new();
    while let Some(number) = numbers.next() {
        let sealed = numbers.peek().is_some();
        let path = place.file(number);
        let readable_bytes = match (sealed, file_bytes(&path)?) {
            (true, Some(bytes)) => bytes,
            (false, _) => open_bytes,
            // Purged since the index was read.
            (true, None) => continue,
        };
        files.push(LogFile { name: log_name(number), readable_bytes, sealed });
    }
    Ok(files)
}

fn file_bytes(path: &Path) -> Result<Option<u64>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata.len())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("cannot look at '{}'", path.display()), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_is_read_with_paths_of_every_kind_and_without_the_files_of_another_name() {
        let index =
            "./old-bin.000009\n./binlog.000010\n/var/log/mysql/binlog.000011\nbinlog.1000000\nbinlog.000012\n\n";
        assert_eq!(numbers_in_index(index, "binlog", 12), [10, 11, 12]);
        assert_eq!(numbers_in_index(index, "binlog", 2_000_000), [10, 11, 12, 1_000_000]);
    }

    #[test]
    fn a_number_that_is_left_out_is_a_file_that_was_purged() {
        assert_eq!(require_next(Some(4), Some(6)).unwrap_err().kind(), Kind::NotFound);
        for (after, first) in [(None, Some(6)), (Some(5), Some(6)), (Some(5), None), (Some(u64::MAX), Some(1))] {
            require_next(after, first).unwrap();
        }
    }

    #[test]
    fn all_files_but_the_last_are_finished_and_of_that_one_only_what_the_server_says_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let place = LogPlace { base: directory.path().join("b"), index: directory.path().join("b.index") };
        for (number, bytes) in [(3, 300), (5, 500)] {
            std::fs::write(place.file(number), vec![0; bytes]).unwrap();
        }
        // Number 4 was purged a moment ago.
        let files = listed_files(&place, [3, 4, 5].into_iter(), 450).unwrap();
        let told: Vec<_> = files.iter().map(|file| (file.name.as_str(), file.readable_bytes, file.sealed)).collect();
        assert_eq!(told, [("binlog.0000000003", 300, true), ("binlog.0000000005", 450, false)]);
    }
}
