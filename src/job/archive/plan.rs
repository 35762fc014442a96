//! Decides what to ship: a pure function of what the server has and what the repository holds.

use crate::engine::{LogGeometry, LogListing};
use crate::error::Result;
use crate::job::window::is_gap;
use crate::model::log::LogFile;
use crate::model::position::Position;
use crate::model::window::Hole;

/// What the repository is known to hold of a log file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Archived {
    pub sealed: bool,
    /// Contiguous bytes from the start; of a sealed file whatever it has.
    pub bytes: u64,
    /// This run has shipped or compared the whole file: it is the one that the server has.
    pub confirmed: bool,
    /// The server asked whether it is safe.
    pub asked: bool,
}

/// A byte range of a log file to be made durable in the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShipAction {
    pub file: LogFile,
    pub from_bytes: u64,
    pub to_bytes: u64,
    pub sealed: bool,
}

/// What to do about one listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShipPlan {
    /// Files of an earlier run that are compared with the server's, before anything new is archived: whatever follows
    /// another history must not be archived behind this one.
    pub compared: Vec<ShipAction>,
    /// Small files that say how to read the others, one after the other, before all else.
    pub companions: Vec<ShipAction>,
    /// Whole files, in any order and at the same time.
    pub sealed: Vec<ShipAction>,
    /// New bytes of the file that the server is writing.
    pub open: Option<ShipAction>,
    /// There is more than this plan does.
    pub has_more: bool,
    /// Bytes that the server has and the repository has not, before the plan is carried out.
    pub backlog_bytes: u64,
}

impl ShipPlan {
    pub fn is_empty(&self) -> bool {
        self.compared.is_empty() && self.companions.is_empty() && self.sealed.is_empty() && self.open.is_none()
    }
}

/// Limits of one plan.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Whole files in one plan, so that the lease and the server hear of progress in between.
    pub sealed_files_max: usize,
    /// How many files that were archived by an earlier run are compared with the server's: enough to notice that the
    /// directory was set back, without reading everything that the server keeps.
    pub compare_files_max: usize,
    /// Whether new bytes of the open file go now.
    pub ship_open: bool,
}

/// The plan for a listing. `archived` answers for a file's name; nothing if the repository has none of it.
pub fn plan_shipping(
    listing: &LogListing,
    geometry: &dyn LogGeometry,
    archived: impl Fn(&str) -> Option<Archived>,
    limits: Limits,
) -> Result<ShipPlan> {
    let mut plan = ShipPlan::default();
    for file in &listing.files {
        let known = archived(&file.name);
        let is_companion = geometry.span(&file.name, 0)?.is_none();
        let whole = ShipAction { file: file.clone(), from_bytes: 0, to_bytes: file.readable_bytes, sealed: true };
        match known {
            Some(Archived { sealed: true, confirmed: true, .. }) => {}
            Some(Archived { sealed: true, asked, .. }) if file.sealed => {
                if asked {
                    plan.push_whole(whole, is_companion, limits);
                } else {
                    plan.compared.push(whole);
                }
            }
            // The repository has it as finished and the server says that it is open: the writer refuses that.
            _ if file.sealed => {
                plan.backlog_bytes += file.readable_bytes.saturating_sub(known.map_or(0, |known| known.bytes));
                plan.push_whole(whole, is_companion, limits);
            }
            _ => {
                let from_bytes = known.map_or(0, |known| if known.sealed { 0 } else { known.bytes });
                let new_bytes = file.readable_bytes.saturating_sub(from_bytes);
                plan.backlog_bytes += new_bytes;
                if new_bytes > 0 && limits.ship_open {
                    plan.open = Some(ShipAction { from_bytes, sealed: false, ..whole });
                }
            }
        }
    }
    let skip = plan.compared.len().saturating_sub(limits.compare_files_max);
    plan.compared.drain(..skip);
    Ok(plan)
}

impl ShipPlan {
    fn push_whole(&mut self, action: ShipAction, is_companion: bool, limits: Limits) {
        if is_companion {
            self.companions.push(action);
        } else if self.sealed.len() < limits.sealed_files_max {
            self.sealed.push(action);
        } else {
            self.has_more = true;
        }
    }
}

/// How far the log is in the repository without a gap, seen from one listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reached {
    /// Everything before is durable in the repository; nothing if the listing does not say.
    pub shipped: Option<Position>,
    /// What the server may forget: the start of the first file that is not archived as a whole.
    pub releasable: Option<Position>,
    /// Nothing of the listing is missing in the repository.
    pub is_all: bool,
    /// The last file before which (and with which) everything is archived as a whole and known to be the server's.
    pub settled_file: Option<String>,
}

/// Walks a listing in the order of the log.
pub fn reached(
    listing: &LogListing,
    geometry: &dyn LogGeometry,
    archived: impl Fn(&str) -> Option<Archived>,
) -> Result<Reached> {
    let mut reached = Reached { is_all: true, ..Reached::default() };
    let (mut is_contiguous, mut is_settled, mut is_releasable) = (true, true, true);
    for file in &listing.files {
        let known = archived(&file.name);
        let is_whole = known.is_some_and(|known| known.sealed) && file.sealed;
        let bytes = if is_whole { file.readable_bytes } else { known.map_or(0, |known| known.bytes) };
        let is_complete = is_whole || (!file.sealed && bytes >= file.readable_bytes);
        reached.is_all &= is_complete;
        let span = if is_whole { geometry.sealed_span(&file.name)? } else { geometry.span(&file.name, bytes)? };
        let Some((start, end)) = span else { continue };
        if is_releasable {
            reached.releasable = Some(if is_whole { end } else { start });
            is_releasable = is_whole;
        }
        if is_contiguous {
            reached.shipped = Some(end.min(listing.durable_end.position));
            is_contiguous = is_complete;
        }
        is_settled &= is_whole && known.is_some_and(|known| known.confirmed);
        if is_settled {
            reached.settled_file = Some(file.name.clone());
        }
    }
    if reached.is_all {
        // Files may end before the server's own count does (a boundary); nothing is missing all the same.
        reached.shipped = Some(listing.durable_end.position);
    }
    Ok(reached)
}

/// The hole between what the repository has and the first log file that the server still has, if the server has
/// forgotten more than was shipped. `end` is where the contiguous bytes of the last log file in the repository end.
pub fn hole_before(listing: &LogListing, geometry: &dyn LogGeometry, end: Option<Position>) -> Result<Option<Hole>> {
    let Some(end) = end else { return Ok(None) };
    for file in &listing.files {
        let Some((start, _)) = geometry.span(&file.name, 0)? else { continue };
        let is_hole = is_gap(end, start);
        return Ok(is_hole.then_some(Hole { from: end, to: start, from_time: None, to_time: None }));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::DurableEnd;
    use crate::engine::fake::geometry::{FILE_BYTES, FakeGeometry, file_name};
    use crate::engine::fake::record::RECORD_BYTES;

    const LIMITS: Limits = Limits { sealed_files_max: 2, compare_files_max: 2, ship_open: true };

    /// Files `first..` of a server with `count` events, and a companion.
    fn listing(first: u64, count: u64) -> LogListing {
        let mut files = vec![LogFile { name: "history".into(), readable_bytes: 10, sealed: true }];
        for number in first..=count.saturating_sub(1) / 64 {
            let readable_bytes = (count - number * 64).min(64) * RECORD_BYTES as u64;
            files.push(LogFile { name: file_name(number), readable_bytes, sealed: readable_bytes == FILE_BYTES });
        }
        let observed_at = jiff::Timestamp::UNIX_EPOCH;
        LogListing { files, durable_end: DurableEnd { position: Position::Count(count), observed_at } }
    }

    fn whole(confirmed: bool) -> Option<Archived> {
        Some(Archived { sealed: true, bytes: FILE_BYTES, confirmed, asked: false })
    }

    fn names(actions: &[ShipAction]) -> Vec<&str> {
        actions.iter().map(|action| action.file.name.as_str()).collect()
    }

    #[test]
    fn companions_go_first_whole_files_in_batches_and_of_the_open_file_only_what_is_new() {
        let listing = listing(0, 64 * 3 + 10);
        let archived = |name: &str| {
            (name == "00000003").then_some(Archived { sealed: false, bytes: 256, confirmed: false, asked: false })
        };
        let plan = plan_shipping(&listing, &FakeGeometry, archived, LIMITS).unwrap();
        assert_eq!(names(&plan.companions), ["history"]);
        assert_eq!(names(&plan.sealed), ["00000000", "00000001"]);
        assert!(plan.has_more);
        let open = plan.open.clone().unwrap();
        assert_eq!((open.from_bytes, open.to_bytes, open.sealed), (256, 640, false));
        assert_eq!(plan.backlog_bytes, 10 + 3 * FILE_BYTES + 384);
        let later = Limits { ship_open: false, ..LIMITS };
        let plan = plan_shipping(&listing, &FakeGeometry, archived, later).unwrap();
        assert_eq!((plan.open, plan.backlog_bytes), (None, 10 + 3 * FILE_BYTES + 384));
    }

    #[test]
    fn files_of_an_earlier_run_are_compared_but_only_the_last_ones_and_those_asked_for() {
        let listing = listing(0, 64 * 6);
        let plan = |asked: &str, confirmed: &str| {
            let archived = |name: &str| {
                let mut known = whole(name == confirmed || name == "history").unwrap();
                known.asked = name == asked;
                Some(known)
            };
            let limits = Limits { sealed_files_max: 10, ..LIMITS };
            let plan = plan_shipping(&listing, &FakeGeometry, archived, limits).unwrap();
            (names(&plan.compared).join(" "), names(&plan.sealed).join(" "), plan.backlog_bytes)
        };
        assert_eq!(plan("", "00000005"), ("00000003 00000004".into(), "".into(), 0));
        assert_eq!(plan("00000001", ""), ("00000004 00000005".into(), "00000001".into(), 0));
    }

    #[test]
    fn the_server_may_forget_only_files_that_are_whole_in_the_repository() {
        let listing = listing(0, 64 * 2 + 10);
        let archived = |name: &str| match name {
            "00000000" => whole(true),
            // All its bytes are there in chunks, but the server must keep it until it is one object.
            "00000001" => Some(Archived { sealed: false, bytes: FILE_BYTES, confirmed: false, asked: false }),
            "history" => whole(true),
            _ => None,
        };
        let at = reached(&listing, &FakeGeometry, archived).unwrap();
        assert_eq!(at.releasable, Some(Position::Count(64)));
        assert_eq!(at.shipped, Some(Position::Count(128)));
        assert_eq!(at.settled_file.as_deref(), Some("00000000"));
        assert!(!at.is_all);
    }

    #[test]
    fn when_nothing_is_missing_the_servers_own_end_is_reached() {
        let listing = listing(1, 64 * 2 + 10);
        let archived = |name: &str| match name {
            "00000002" => Some(Archived { sealed: false, bytes: 640, confirmed: false, asked: false }),
            _ => whole(true),
        };
        let at = reached(&listing, &FakeGeometry, archived).unwrap();
        assert_eq!((at.shipped, at.is_all), (Some(Position::Count(138)), true));
        assert_eq!(at.releasable, Some(Position::Count(128)));
    }

    /// Files of any length: the number is in the name, and a finished one ends where the next begins.
    struct Numbered;

    impl LogGeometry for Numbered {
        fn span(&self, name: &str, offset: u64) -> Result<Option<(Position, Position)>> {
            let number = name.parse().unwrap();
            Ok(Some((Position::File { number, offset: 0 }, Position::File { number, offset })))
        }

        fn next_file(&self, name: &str) -> Result<String> {
            Ok((name.parse::<u64>().unwrap() + 1).to_string())
        }

        fn file_before(&self, position: Position) -> Result<String> {
            Ok(position.file()?.0.to_string())
        }

        fn sealed_span(&self, name: &str) -> Result<Option<(Position, Position)>> {
            let number = name.parse().unwrap();
            Ok(Some((Position::File { number, offset: 0 }, Position::File { number: number + 1, offset: 0 })))
        }
    }

    #[test]
    fn numbered_files_follow_each_other_only_if_the_earlier_one_is_known_to_be_finished() {
        let at = |number, offset| Position::File { number, offset };
        let file = |name: &str, bytes, sealed| LogFile { name: name.into(), readable_bytes: bytes, sealed };
        let durable_end = DurableEnd { position: at(8, 50), observed_at: jiff::Timestamp::UNIX_EPOCH };
        let files = vec![file("7", 900, true), file("8", 50, false)];
        let listing = LogListing { files, durable_end };
        let known = |sealed, bytes| Some(Archived { sealed, bytes, confirmed: true, asked: false });
        let both = |name: &str| if name == "7" { known(true, 900) } else { known(false, 50) };
        let looked = reached(&listing, &Numbered, both).unwrap();
        assert_eq!((looked.shipped, looked.releasable), (Some(at(8, 50)), Some(at(8, 0))));
        let chunks = |name: &str| if name == "7" { known(false, 900) } else { None };
        let looked = reached(&listing, &Numbered, chunks).unwrap();
        assert_eq!((looked.shipped, looked.releasable), (Some(at(7, 900)), Some(at(7, 0))));
        assert_eq!(hole_before(&listing, &Numbered, Some(at(7, 0))).unwrap(), None);
        assert_eq!(hole_before(&listing, &Numbered, Some(at(7, 5))).unwrap(), None);
        assert!(hole_before(&listing, &Numbered, Some(at(6, 900))).unwrap().is_some());
    }

    #[test]
    fn log_that_the_server_forgot_before_it_was_shipped_is_a_hole() {
        let listing = listing(4, 64 * 5);
        let hole = |end| hole_before(&listing, &FakeGeometry, Some(Position::Count(end))).unwrap();
        assert_eq!(hole(256), None);
        let found = hole(202).unwrap();
        assert_eq!((found.from, found.to), (Position::Count(202), Position::Count(256)));
        assert_eq!(hole_before(&listing, &FakeGeometry, None).unwrap(), None);
    }
}
