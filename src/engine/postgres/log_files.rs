//! Which files of `pg_wal` are to be shipped, and how far they may be read.
//!
//! The server says how far its log is flushed; the directory says which files there are; the markers in
//! `archive_status` say which of them the server keeps until they are acknowledged. What follows from the three is a
//! pure function, `plan`.
//!
//! * A segment is sealed when the server has flushed past its end, or has put a marker beside it, which it does only
//!   after the segment was synced (`src/backend/access/transam/xlog.c`, XLogWrite). The segment that holds the flush
//!   position is readable up to there and not a byte further: what lies behind is not durable or is an older segment
//!   under a new name.
//! * Segments with numbers behind the flush position are recycled files waiting for their turn: never listed.
//! * A companion (timeline history, `.partial`, `.backup`) is listed as long as the server waits for it to be
//!   archived, **whatever `after` is**: it may appear long after its neighbours by name were shipped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::base::bulk::run_blocking;
use crate::engine::postgres::ondisk::segment::{ArchiveStatus, RawSegmentName, SegmentName, SegmentSize, WalFile};
use crate::engine::postgres::session::{CLOCK_NOW, column, lsn_column, timestamp_column};
use crate::engine::postgres::source::SourceSession;
use crate::engine::postgres::{PostgresEngine, ShipMode, slot};
use crate::engine::{DurableEnd, LogListing};
use crate::error::{Context, Error, Kind, Result};
use crate::model::log::LogFile;
use crate::model::position::{Lsn, Position};

/// What the server says about its log at one moment.
#[derive(Debug, Clone, Copy)]
struct LogState {
    timeline: u32,
    flushed: Lsn,
    observed_at: Timestamp,
    /// `archive_mode` is `on` or `always`.
    archiving: bool,
}

/// What `pg_wal` and `archive_status` hold.
#[derive(Debug, Default)]
struct WalDirectory {
    /// Sizes in bytes of the regular files, by name.
    files: BTreeMap<String, u64>,
    markers: BTreeMap<String, ArchiveStatus>,
}

/// What the server keeps until it is told that it may forget.
#[derive(Debug, Clone, Copy)]
enum Kept {
    /// Whatever is not marked as archived.
    UntilAcknowledged,
    /// Everything from this position on: there is a slot.
    From(Lsn),
    /// Nothing is promised: neither archiving nor a slot is on.
    Nothing,
}

/// The log files after `after` and the durable end: see [`crate::engine::Engine::list_log`].
pub(super) async fn list(engine: &PostgresEngine, after: Option<&str>) -> Result<LogListing> {
    list_unnamed(engine, after).await.context(|| format!("cannot list the log of instance '{}'", engine.source.name))
}

async fn list_unnamed(engine: &PostgresEngine, after: Option<&str>) -> Result<LogListing> {
    let source = engine.session().await?;
    let slot_start = match engine.source.ship {
        ShipMode::Slot { limit_bytes } => Some(slot::ensure(engine, &source, limit_bytes).await?),
        ShipMode::ArchiveCommand => None,
    };
    let state = ask_state(&source).await?;
    let size = source.format.segment_size;
    drop(source);
    let kept = match slot_start {
        Some(lsn) => Kept::From(lsn),
        None if state.archiving => Kept::UntilAcknowledged,
        None => Kept::Nothing,
    };
    // After the server was asked: whatever it has flushed by then has its file.
    let (wal, status) = (engine.source.wal_dir(), engine.source.archive_status_dir());
    let directory = run_blocking("list pg_wal", move || read_directory(&wal, &status)).await?;
    let files = plan(&directory, state, size, kept, after)?;
    let position = Position::Wal { timeline: state.timeline, lsn: state.flushed };
    Ok(LogListing { files, durable_end: DurableEnd { position, observed_at: state.observed_at } })
}

async fn ask_state(source: &SourceSession) -> Result<LogState> {
    // The clock is read before the position: all that was durable at that time lies before that position. The
    // timeline is the one that is written to now; the one in pg_control lags after a promotion.
    let sql = format!(
        "SELECT asked.at, asked.flushed::text, pg_walfile_name(asked.flushed), current_setting('archive_mode') \
         FROM (SELECT {CLOCK_NOW} AS at, pg_current_wal_flush_lsn() AS flushed OFFSET 0) AS asked"
    );
    let row = source.session.row(&sql, &[]).await?;
    let name: String = column(&row, 2)?;
    let segment = RawSegmentName::parse(&name)
        .ok_or_else(|| Error::new(Kind::Server, format!("the server names a log file '{name}'")))?;
    Ok(LogState {
        timeline: segment.timeline,
        flushed: lsn_column(&row, 1)?,
        observed_at: timestamp_column(&row, 0)?,
        archiving: column::<String>(&row, 3)? != "off",
    })
}

/// Reads the two directories. Blocking.
fn read_directory(wal_dir: &Path, status_dir: &Path) -> Result<WalDirectory> {
    let mut directory = WalDirectory::default();
    // Markers first: a file whose marker was seen is there, unless it was archived and recycled meanwhile.
    for_each_name(status_dir, |name, _| {
        if let Some((file, status)) = ArchiveStatus::of_marker(name) {
            directory.markers.insert(file.to_string(), status);
        }
        Ok(())
    })?;
    for_each_name(wal_dir, |name, entry| {
        match entry.metadata() {
            Ok(metadata) if metadata.is_file() => {
                directory.files.insert(name.to_string(), metadata.len());
            }
            Ok(_) => {}
            // Recycled between the listing and now.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(())
    })?;
    Ok(directory)
}

fn for_each_name(path: &Path, mut visit: impl FnMut(&str, &std::fs::DirEntry) -> std::io::Result<()>) -> Result<()> {
    let what = || format!("cannot read directory '{}'", path.display());
    for entry in std::fs::read_dir(path).context(what)? {
        let entry = entry.context(what)?;
        // Names that are no text are none of the server's.
        if let Some(name) = entry.file_name().to_str() {
            visit(name, &entry).context(what)?;
        }
    }
    Ok(())
}

/// The files to ship, in the order of the log. Pure.
fn plan(
    directory: &WalDirectory,
    state: LogState,
    size: SegmentSize,
    kept: Kept,
    after: Option<&str>,
) -> Result<Vec<LogFile>> {
    let begin = begin_segment(directory, state, size, kept, after)?;
    let last = size.number_before(state.flushed);
    let mut files = Vec::new();
    for (name, bytes) in &directory.files {
        let marker = directory.markers.get(name).copied();
        let waits = marker == Some(ArchiveStatus::Ready);
        let is_new = after.is_none_or(|after| name.as_str() > after);
        let listed =
            match WalFile::classify(name, size) {
                Some(WalFile::Segment(segment)) if segment.timeline == state.timeline => {
                    let is_whole = *bytes == u64::from(size.bytes());
                    (is_whole && (begin..=last).contains(&segment.number))
                        .then(|| current_segment(name, segment, state.flushed, size, marker.is_some()))
                }
                // What an old timeline has left to archive is complete: the server marks nothing else.
                Some(WalFile::Segment(segment)) => (waits && is_new && segment.timeline < state.timeline)
                    .then(|| LogFile { name: name.clone(), readable_bytes: *bytes, sealed: true }),
                Some(WalFile::History { timeline }) => (waits || (is_new && timeline == state.timeline))
                    .then(|| LogFile { name: name.clone(), readable_bytes: *bytes, sealed: true }),
                Some(WalFile::Partial(_) | WalFile::BackupHistory { .. }) => {
                    waits.then(|| LogFile { name: name.clone(), readable_bytes: *bytes, sealed: true })
                }
                None => None,
            };
        files.extend(listed.filter(|file| file.readable_bytes > 0));
    }
    // Names sort in the order of the log: a history before its segments ('.' < '0'), companions after their segment.
    Ok(files)
}

fn current_segment(name: &str, segment: SegmentName, flushed: Lsn, size: SegmentSize, marked: bool) -> LogFile {
    let sealed = marked || segment.end(size) <= flushed;
    let readable_bytes = if sealed { u64::from(size.bytes()) } else { flushed.0.saturating_sub(segment.start(size).0) };
    LogFile { name: name.to_string(), readable_bytes, sealed }
}

/// The number of the first segment of the current timeline to list. An error if log after `after` is gone.
fn begin_segment(
    directory: &WalDirectory,
    state: LogState,
    size: SegmentSize,
    kept: Kept,
    after: Option<&str>,
) -> Result<u64> {
    let last = size.number_before(state.flushed);
    let name_of = |number: u64| SegmentName { timeline: state.timeline, number }.render(size);
    let exists = |number: u64| directory.files.contains_key(&name_of(number));
    let Some(after) = after else {
        return match kept {
            Kept::From(lsn) => {
                let begin = size.number_of(lsn);
                require(begin, last, exists, name_of).map(|()| begin)
            }
            Kept::UntilAcknowledged => Ok(first_of_run(last, |number| {
                exists(number) && directory.markers.get(&name_of(number)) != Some(&ArchiveStatus::Done)
            })),
            Kept::Nothing => Ok(last),
        };
    };
    match WalFile::classify(after, size) {
        Some(WalFile::Segment(segment) | WalFile::Partial(segment) | WalFile::BackupHistory { start: segment, .. })
            if segment.timeline == state.timeline =>
        {
            let begin = segment.number.saturating_add(1);
            require(begin, last, exists, name_of).map(|()| begin)
        }
        Some(WalFile::Segment(SegmentName { timeline, .. }))
        | Some(WalFile::Partial(SegmentName { timeline, .. }))
        | Some(WalFile::BackupHistory { start: SegmentName { timeline, .. }, .. })
        | Some(WalFile::History { timeline })
            if timeline > state.timeline =>
        {
            Err(Error::new(
                Kind::Conflict,
                format!("log was shipped up to '{after}', but the server writes timeline {}", state.timeline),
            )
            .hint(
                "was the data directory replaced by an older copy? then it is another incarnation: see 'keiki status'",
            ))
        }
        // Shipped so far: an older timeline, or the history of this one. All that there is of this one is new.
        Some(_) => Ok(first_of_run(last, exists)),
        None => Err(Error::new(Kind::BadInput, format!("'{after}' is not the name of a WAL file"))),
    }
}

/// The start of the unbroken run of segments that ends with `last`; behind `last` if that is not one of them.
fn first_of_run(last: u64, is_in_run: impl Fn(u64) -> bool) -> u64 {
    let mut begin = last.saturating_add(1);
    while begin > 0 && is_in_run(begin - 1) {
        begin -= 1;
    }
    begin
}

/// Refuses to go on where the log would have a hole, and says which segments are gone.
fn require(begin: u64, last: u64, exists: impl Fn(u64) -> bool, name_of: impl Fn(u64) -> String) -> Result<()> {
    if begin > last || exists(begin) {
        return Ok(());
    }
    let resumes = first_of_run(last, exists);
    let gone_to = resumes.saturating_sub(1).max(begin);
    let gone = if gone_to == begin {
        format!("log file '{}' is gone", name_of(begin))
    } else {
        format!("log files '{}' to '{}' are gone", name_of(begin), name_of(gone_to))
    };
    Err(Error::new(Kind::NotFound, format!("{gone}: the server recycled log before it was shipped"))
        .hint("what was committed there can only be reached again through a new backup: 'keiki backup create'"))
}

/// The path of a log file.
pub(super) fn path_of(engine: &PostgresEngine, name: &str) -> PathBuf {
    engine.source.wal_dir().join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 16 << 20;

    fn segment(timeline: u32, number: u64) -> String {
        SegmentName { timeline, number }.render(SegmentSize::DEFAULT)
    }

    fn state(timeline: u32, flushed: u64) -> LogState {
        LogState { timeline, flushed: Lsn(flushed), observed_at: Timestamp::UNIX_EPOCH, archiving: true }
    }

    fn directory(segments: &[(u32, u64)], markers: &[(&str, ArchiveStatus)]) -> WalDirectory {
        let mut directory = WalDirectory::default();
        for (timeline, number) in segments {
            directory.files.insert(segment(*timeline, *number), SIZE);
        }
        for (name, status) in markers {
            directory.markers.insert(name.to_string(), *status);
        }
        directory
    }

    fn names(files: &[LogFile]) -> Vec<&str> {
        files.iter().map(|file| file.name.as_str()).collect()
    }

    fn plan_default(
        directory: &WalDirectory,
        state: LogState,
        kept: Kept,
        after: Option<&str>,
    ) -> Result<Vec<LogFile>> {
        plan(directory, state, SegmentSize::DEFAULT, kept, after)
    }

    #[test]
    fn the_open_segment_ends_at_the_flushed_position_and_later_files_are_not_named() {
        let directory = directory(&[(1, 3), (1, 4), (1, 5), (1, 6)], &[]);
        let files =
            plan_default(&directory, state(1, 4 * SIZE + 100), Kept::UntilAcknowledged, Some(&segment(1, 2))).unwrap();
        assert_eq!(
            files,
            [
                LogFile { name: segment(1, 3), readable_bytes: SIZE, sealed: true },
                LogFile { name: segment(1, 4), readable_bytes: 100, sealed: false },
            ]
        );
    }

    #[test]
    fn a_log_that_ends_on_a_boundary_has_no_open_segment() {
        let directory = directory(&[(1, 3), (1, 4)], &[]);
        let files = plan_default(&directory, state(1, 4 * SIZE), Kept::UntilAcknowledged, None).unwrap();
        assert_eq!(files, [LogFile { name: segment(1, 3), readable_bytes: SIZE, sealed: true }]);
    }

    #[test]
    fn a_marked_segment_is_sealed_even_if_the_flushed_position_was_read_too_early() {
        let three = segment(1, 3);
        let directory = directory(&[(1, 3)], &[(&three, ArchiveStatus::Ready)]);
        let files = plan_default(&directory, state(1, 3 * SIZE + 8), Kept::UntilAcknowledged, None).unwrap();
        assert_eq!(files, [LogFile { name: three.clone(), readable_bytes: SIZE, sealed: true }]);
    }

    #[test]
    fn shipping_begins_behind_what_was_archived_and_with_all_that_waits() {
        let (two, three, four) = (segment(1, 2), segment(1, 3), segment(1, 4));
        let directory = directory(
            &[(1, 2), (1, 3), (1, 4), (1, 5)],
            &[(&two, ArchiveStatus::Done), (&three, ArchiveStatus::Ready), (&four, ArchiveStatus::Ready)],
        );
        let files = plan_default(&directory, state(1, 5 * SIZE + 1), Kept::UntilAcknowledged, None).unwrap();
        assert_eq!(names(&files), [segment(1, 3), segment(1, 4), segment(1, 5)]);
        // Without any promise only the segment that is written to is safe to begin with.
        let files = plan_default(&directory, state(1, 5 * SIZE + 1), Kept::Nothing, None).unwrap();
        assert_eq!(names(&files), [segment(1, 5)]);
        let files = plan_default(&directory, state(1, 5 * SIZE + 1), Kept::From(Lsn(4 * SIZE + 77)), None).unwrap();
        assert_eq!(names(&files), [segment(1, 4), segment(1, 5)]);
    }

    #[test]
    fn a_hole_is_an_error_that_names_what_is_gone() {
        let directory = directory(&[(1, 6), (1, 7)], &[]);
        let ask = |after: u64| {
            let after = segment(1, after);
            plan_default(&directory, state(1, 7 * SIZE + 1), Kept::UntilAcknowledged, Some(&after))
        };
        let error = ask(3).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.message().contains(&format!("'{}' to '{}'", segment(1, 4), segment(1, 5))), "{error}");
        let error = ask(4).unwrap_err();
        assert!(error.message().contains(&format!("log file '{}' is gone", segment(1, 5))), "{error}");
        assert_eq!(names(&ask(5).unwrap()), [segment(1, 6), segment(1, 7)]);
        assert_eq!(ask(7).unwrap(), []);
        assert!(plan_default(&directory, state(1, 7 * SIZE + 1), Kept::From(Lsn(SIZE)), None).is_err());
    }

    #[test]
    fn companions_are_listed_until_they_are_archived() {
        let backup = format!("{}.00000028.backup", segment(1, 2));
        let partial = format!("{}.partial", segment(1, 4));
        let mut directory = directory(
            &[(1, 5), (2, 4), (2, 5)],
            &[
                (&backup, ArchiveStatus::Ready),
                (&partial, ArchiveStatus::Ready),
                (&segment(1, 3), ArchiveStatus::Ready),
            ],
        );
        for (name, bytes) in [
            (backup.clone(), 300),
            (partial.clone(), SIZE),
            (segment(1, 3), SIZE),
            (String::from("00000002.history"), 42),
            (format!("{}.00000028.backup", segment(1, 1)), 300),
            (String::from("xlogtemp.77"), 9),
        ] {
            directory.files.insert(name, bytes);
        }
        let at = state(2, 5 * SIZE + 9);
        let files = plan_default(&directory, at, Kept::UntilAcknowledged, None).unwrap();
        let history = String::from("00000002.history");
        assert_eq!(names(&files), [&backup, &segment(1, 3), &partial, &history, &segment(2, 4), &segment(2, 5)]);
        let files = plan_default(&directory, at, Kept::UntilAcknowledged, Some(&segment(2, 4))).unwrap();
        assert_eq!(names(&files), [&backup, &partial, &segment(2, 5)]);
    }

    #[test]
    fn a_server_that_went_back_to_an_older_timeline_is_refused() {
        let directory = directory(&[(1, 5)], &[]);
        let error = plan_default(&directory, state(1, 5 * SIZE + 9), Kept::UntilAcknowledged, Some(&segment(2, 4)))
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
        assert!(plan_default(&directory, state(1, 5 * SIZE + 9), Kept::Nothing, Some("core")).is_err());
    }
}
