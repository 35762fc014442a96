//! What of an incarnation can be reached: its archived log, its backups and its lease, put together with the engine's
//! arithmetic of log files.

use std::sync::Arc;

use jiff::Timestamp;

use crate::engine::{LogGeometry, log_geometry};
use crate::error::{Error, Kind, Result};
use crate::model::backup::Backup;
use crate::model::incarnation::{Incarnation, Lease};
use crate::model::position::Position;
use crate::model::window::{Hole, Window};
use crate::repo::backup_reader::Backups;
use crate::repo::lease::read_lease;
use crate::repo::log_catalogue::{ListedLogFile, LogCatalogue};
use crate::repo::repository::Repository;
use crate::repo::window::{LogRange, window};

/// So many files without a single commit are looked through for a commit time before it is called unknown.
const QUIET_FILES_MAX: usize = 64;

/// Log without a gap, and the files that it lies in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    pub from: Position,
    pub to: Position,
    /// In the order of the log; without companions.
    pub files: Vec<String>,
}

/// Whether log is missing between a position and a later one. Positions of two timelines of one life are compared by
/// their place in the log alone.
pub fn is_gap(end: Position, start: Position) -> bool {
    match (end, start) {
        (Position::Wal { lsn: end, .. }, Position::Wal { lsn: start, .. }) => end < start,
        (end, start) => end < start,
    }
}

/// Where a file of the catalogue lies in the log; nothing for a companion.
pub fn archived_span(file: &ListedLogFile, geometry: &dyn LogGeometry) -> Result<Option<(Position, Position)>> {
    match file.bytes {
        Some(bytes) => geometry.span(&file.name, bytes),
        None => geometry.sealed_span(&file.name),
    }
}

/// The archived log as stretches without a gap, in the order of the log.
pub fn contiguous(catalogue: &LogCatalogue, geometry: &dyn LogGeometry) -> Result<Vec<Stretch>> {
    let mut stretches: Vec<Stretch> = Vec::new();
    for file in catalogue.files() {
        let Some((from, to)) = archived_span(&file, geometry)?.filter(|(from, to)| from < to) else { continue };
        match stretches.last_mut() {
            Some(last) if !is_gap(last.to, from) => {
                last.to = last.to.max(to);
                last.files.push(file.name);
            }
            _ => stretches.push(Stretch { from, to, files: vec![file.name] }),
        }
    }
    Ok(stretches)
}

/// Leaves out the stretches at the end that lie behind log that is still on its way. Whole files are shipped side by side,
/// so a later one may be there before an earlier one. Only an archiver that is at work can say so: up to `shipped`, says
/// the one that was just asked, nothing is missing. A gap before that is a hole, and if nobody is at work each gap is.
fn settled(mut stretches: Vec<Stretch>, shipped: Option<Position>) -> Vec<Stretch> {
    let Some(shipped) = shipped else { return stretches };
    while let [.., earlier, _] = stretches.as_slice()
        && !is_gap(earlier.to, shipped)
    {
        stretches.pop();
    }
    stretches
}

/// The window of an incarnation. Without any backup nothing can be reached. `shipped` is what the archiver says that is at
/// work on it, if one is: it has shipped everything up to there, and is shipping what comes later.
pub async fn window_of(repo: &Arc<Repository>, incarnation: &Incarnation, shipped: Option<Position>) -> Result<Window> {
    let backups = Backups::new(repo.clone()).list(incarnation.id).await?.backups;
    let Some(newest) = backups.last() else { return Ok(Window::default()) };
    let geometry = log_geometry(incarnation.engine, &newest.engine_facts)?;
    // The lease first: what it says is covered is then in the catalogue, which is read later.
    let lease = read_lease(repo, incarnation.id).await?;
    let catalogue = LogCatalogue::look(repo, incarnation.id).await?;
    let mut ranges = Vec::new();
    for stretch in settled(contiguous(&catalogue, geometry.as_ref())?, shipped) {
        ranges.push(range_of(&catalogue, &stretch, lease.as_ref()).await?);
    }
    add_backups_without_log(&backups, &mut ranges, lease.as_ref());
    let mut window = window(&backups, &ranges);
    let covered = lease.and_then(|lease| lease.covered);
    window.holes.extend(ranges.last().zip(covered).and_then(|(last, covered)| lost_tail(last, covered)));
    Ok(window)
}

/// A backup that needs no log is reachable before there is any: nothing has been written since.
fn add_backups_without_log(backups: &[Backup], ranges: &mut Vec<LogRange>, lease: Option<&Lease>) {
    let covered = lease.and_then(|lease| lease.covered);
    for Backup { start, stop, .. } in backups.iter().filter(|backup| backup.start == backup.stop) {
        if ranges.iter().all(|range| *start < range.from || range.to < *stop) {
            let covered_until = covered.filter(|(position, _)| position == stop).map(|(_, observed_at)| observed_at);
            let (from, to) = (*start, *stop);
            ranges.push(LogRange { from, to, first_commit_at: None, last_commit_at: None, covered_until });
        }
    }
    ranges.sort_by_key(|range| range.from);
}

/// Looks again at all log that replay from a backup may read, whatever is remembered of it; whether something was not as
/// it was remembered. A clone asks this before it begins, in a request for a thousand files of that log.
pub async fn confirm_log(repo: &Arc<Repository>, incarnation: &Incarnation, backup: &Backup) -> Result<bool> {
    let geometry = log_geometry(incarnation.engine, &backup.engine_facts)?;
    let catalogue = LogCatalogue::look(repo, incarnation.id).await?;
    let stretches = contiguous(&catalogue, geometry.as_ref())?;
    let is_meant = |stretch: &&Stretch| stretch.from <= backup.start && backup.start <= stretch.to;
    let Some(stretch) = stretches.iter().find(is_meant) else { return Ok(true) };
    let mut first = None;
    for file in &stretch.files {
        let begins = geometry.span(file, 0)?.is_some_and(|(from, _)| from <= backup.start);
        if begins || first.is_none() {
            first = Some(file);
        }
    }
    let Some(first) = first else { return Ok(true) };
    let before = catalogue.changes();
    catalogue.refresh_from(first).await?;
    Ok(catalogue.changes() != before)
}

/// An error unless the log that follows a backup still reaches as far as it did: replay ends where the log ends, and must
/// not end earlier because log was lost since somebody looked.
pub async fn require_log(
    repo: &Arc<Repository>,
    incarnation: &Incarnation,
    backup: &Backup,
    reached: Position,
) -> Result<()> {
    let geometry = log_geometry(incarnation.engine, &backup.engine_facts)?;
    let catalogue = LogCatalogue::look(repo, incarnation.id).await?;
    let stretches = contiguous(&catalogue, geometry.as_ref())?;
    let has_start = |stretch: &&Stretch| stretch.from <= backup.start && backup.start <= stretch.to;
    let found = stretches.iter().find(has_start).map_or(backup.stop, |stretch| stretch.to);
    if found >= reached {
        return Ok(());
    }
    let name = &incarnation.instance;
    Err(Error::new(
        Kind::NotFound,
        format!("log of '{name}' was lost from the repository since the clone was checked: it reached {reached}, and now {found}"),
    )
    .hint(format!(
        "has somebody deleted objects, or a rule of the bucket? 'keiki window {name}' shows what can be reached now"
    )))
}

/// Log that was in the repository once and is not there any more, at its end, where no later log shows the hole.
fn lost_tail(last: &LogRange, (position, observed_at): (Position, Timestamp)) -> Option<Hole> {
    is_gap(last.to, position).then_some(Hole {
        from: last.to,
        to: position,
        from_time: last.last_commit_at,
        to_time: Some(observed_at),
    })
}

async fn range_of(catalogue: &LogCatalogue, stretch: &Stretch, lease: Option<&Lease>) -> Result<LogRange> {
    let mut first_commit_at = None;
    for file in stretch.files.iter().take(QUIET_FILES_MAX) {
        first_commit_at = catalogue.summary(file).await?.first_commit_at;
        if first_commit_at.is_some() {
            break;
        }
    }
    let mut last_commit_at = None;
    for file in stretch.files.iter().rev().take(QUIET_FILES_MAX) {
        last_commit_at = catalogue.summary(file).await?.last_commit_at;
        if last_commit_at.is_some() {
            break;
        }
    }
    let covered = lease.and_then(|lease| lease.covered);
    Ok(LogRange {
        from: stretch.from,
        to: stretch.to,
        first_commit_at,
        last_commit_at,
        covered_until: covered.and_then(|covered| covered_by(stretch, covered)),
    })
}

/// What is recorded as covered counts for the stretch that holds that position.
fn covered_by(stretch: &Stretch, (position, observed_at): (Position, Timestamp)) -> Option<Timestamp> {
    (stretch.from <= position && position <= stretch.to).then_some(observed_at)
}

#[cfg(test)]
mod tests;
