//! How much space a clone needs, and whether its disk has it.

use std::path::Path;
use std::sync::Arc;

use crate::base::durable;
use crate::engine::{LogGeometry, log_geometry};
use crate::error::Result;
use crate::job::clone::CloneHost;
use crate::job::clone::plan::Choice;
use crate::job::window::archived_span;
use crate::model::bytes_text::human_bytes;
use crate::model::check::CheckItem;
use crate::model::incarnation::Incarnation;
use crate::model::position::Position;
use crate::model::target::Target;
use crate::repo::log_catalogue::LogCatalogue;
use crate::repo::repository::Repository;

/// What a clone needs beyond what was counted: a part of its size, for what replay adds, and a floor.
const MARGIN_PARTS: u64 = 20;
const MARGIN_BYTES_MIN: u64 = 64 << 20;

/// How many bytes of log lie in the clone at the same time as its data, at most.
pub async fn log_bytes_at_once(
    host: &CloneHost,
    repository: &Arc<Repository>,
    source: &Incarnation,
    choice: &Choice,
    target: &Target,
) -> Result<u64> {
    let Ok(grower) = host.grower(source.engine) else { return Ok(0) };
    let max = grower.engine.log_bytes_at_once_max();
    let end = match target {
        Target::Backup(_) => choice.backup.stop,
        Target::Position(position) => choice.log_end.min(*position),
        _ => choice.log_end,
    };
    let start = choice.backup.start;
    if let (Position::Wal { lsn: from, .. }, Position::Wal { lsn: to, .. }) = (start, end) {
        return Ok(to.0.saturating_sub(from.0).min(max));
    }
    let geometry = log_geometry(source.engine, &choice.backup.engine_facts)?;
    let catalogue = LogCatalogue::look(repository, source.id).await?;
    bytes_of_files(&catalogue, geometry.as_ref(), start, end, max).await
}

/// The bytes of the log files between two positions, or `max` if there are more: how long a whole file is only its object
/// says, and no more objects are asked than that takes.
async fn bytes_of_files(
    catalogue: &LogCatalogue,
    geometry: &dyn LogGeometry,
    from: Position,
    to: Position,
    max: u64,
) -> Result<u64> {
    let mut sum: u64 = 0;
    for listed in catalogue.files() {
        let Some((start, end)) = archived_span(&listed, geometry)? else { continue };
        if end <= from || start >= to {
            continue;
        }
        let bytes = match listed.bytes {
            Some(bytes) => bytes,
            None => catalogue.file(&listed.name).await?.map_or(0, |file| file.bytes),
        };
        sum = sum.saturating_add(bytes_within(start, bytes, from, to));
        if sum >= max {
            return Ok(max);
        }
    }
    Ok(sum)
}

/// How many of a file's bytes lie between two positions; all, where positions do not count bytes of files.
fn bytes_within(start: Position, bytes: u64, from: Position, to: Position) -> u64 {
    let offset_in_file = |position: Position| match (start, position) {
        (Position::File { number, .. }, Position::File { number: other, offset }) if number == other => Some(offset),
        _ => None,
    };
    let end = offset_in_file(to).map_or(bytes, |offset| offset.min(bytes));
    end.saturating_sub(offset_in_file(from).unwrap_or(0))
}

/// Whether the disk below `data_dir` has room for the data, the log and a margin, and what must stay free besides.
pub fn space_item(data_bytes: u64, log_bytes: u64, data_dir: &Path, keep_free_bytes: u64) -> Result<CheckItem> {
    let what = "free disk space";
    let needed = data_bytes.saturating_add(log_bytes).saturating_add((data_bytes / MARGIN_PARTS).max(MARGIN_BYTES_MIN));
    let existing = data_dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let free = durable::free_bytes(existing)?;
    let mut found = format!("{} free for '{}', {} needed", human_bytes(free), data_dir.display(), human_bytes(needed));
    if keep_free_bytes > 0 {
        found.push_str(&format!(", {} to be kept free", human_bytes(keep_free_bytes)));
    }
    Ok(if free >= needed.saturating_add(keep_free_bytes) {
        CheckItem::pass(what, found)
    } else if free >= needed {
        let hint = "choose a directory on a larger disk with --dir, or lower '[clone] keep_free' on that host";
        CheckItem::fail(what, found, hint)
    } else {
        CheckItem::fail(what, found, "free some space there, or choose a directory on a larger disk with --dir")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::check::Verdict;

    fn at(number: u64, offset: u64) -> Position {
        Position::File { number, offset }
    }

    #[test]
    fn of_the_first_and_the_last_file_only_the_bytes_between_are_counted() {
        let (from, to) = (at(3, 40), at(5, 60));
        assert_eq!(bytes_within(at(3, 0), 100, from, to), 60);
        assert_eq!(bytes_within(at(4, 0), 100, from, to), 100);
        assert_eq!(bytes_within(at(5, 0), 100, from, to), 60);
        assert_eq!(bytes_within(at(5, 0), 50, from, to), 50);
        assert_eq!(bytes_within(at(3, 0), 100, from, at(3, 40)), 0);
        assert_eq!(bytes_within(at(3, 0), 10, from, to), 0);
    }

    #[test]
    fn log_that_lies_beside_the_data_is_part_of_what_a_clone_needs() {
        let directory = tempfile::tempdir().unwrap();
        let free = durable::free_bytes(directory.path()).unwrap();
        let verdict = |log_bytes| space_item(1 << 20, log_bytes, directory.path(), 0).unwrap().verdict;
        assert_eq!(verdict(0), Verdict::Pass);
        assert_eq!(verdict(free), Verdict::Fail);
    }
}
