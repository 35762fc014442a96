//! MySQL's global transaction ids: `uuid:number` or `uuid:tag:number`, and sets of them.
//!
//! Sources: MySQL manual, "GTID Format and Storage"; `sql/rpl_gtid_set.cc` and `libs/mysql/gtid/` of MySQL 9.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::{Error, Kind, Result};

/// Characters of a tag (`tag_max_length`).
pub const TAG_BYTES_MAX: usize = 32;
/// Numbers of transactions are below this (GNO_END).
const SEQUENCE_END: u64 = i64::MAX as u64;

/// A word that a user gave to a series of transactions, in lower case; most have none (MySQL 8.3 and later).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag {
    bytes: [u8; TAG_BYTES_MAX],
}

impl Tag {
    pub const NONE: Tag = Tag { bytes: [0; TAG_BYTES_MAX] };

    /// A letter or `_`, then letters, digits and `_`; nothing for other bytes. No bytes are no tag.
    pub fn of(text: &[u8]) -> Option<Tag> {
        let is_first = |byte: &u8| byte.is_ascii_alphabetic() || *byte == b'_';
        let is_later = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
        let is_tag = text.first().is_none_or(is_first) && text.iter().all(is_later);
        let mut tag = Tag::NONE;
        tag.bytes.get_mut(..text.len()).filter(|_| is_tag)?.copy_from_slice(text);
        tag.bytes.make_ascii_lowercase();
        Some(tag)
    }

    fn text(&self) -> &str {
        let end = self.bytes.iter().position(|byte| *byte == 0).unwrap_or(TAG_BYTES_MAX);
        std::str::from_utf8(&self.bytes[..end]).unwrap_or_default()
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.text())
    }
}

/// Who numbers a series of transactions: a server, and a tag (TSID).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Series {
    pub uuid: [u8; 16],
    pub tag: Tag,
}

impl Series {
    fn parse(uuid: &str, tag: &str) -> Option<Series> {
        // The server takes other ways of writing a UUID as well; people copy this one.
        let uuid = Some(uuid).filter(|text| text.len() == 36)?.parse::<uuid::Uuid>().ok()?;
        Some(Series { uuid: uuid.into_bytes(), tag: Tag::of(tag.as_bytes())? })
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", uuid::Uuid::from_bytes(self.uuid))?;
        if self.tag == Tag::NONE { Ok(()) } else { write!(f, ":{}", self.tag.text()) }
    }
}

/// One transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeriesGtid {
    pub series: Series,
    /// From 1 on.
    pub sequence: u64,
}

impl SeriesGtid {
    /// Reads `uuid:number` or `uuid:tag:number`.
    pub fn parse(text: &str) -> Result<SeriesGtid> {
        let parts: Vec<&str> = text.trim().split(':').collect();
        let (uuid, tag, number) = match parts.as_slice() {
            [uuid, number] => (*uuid, "", *number),
            [uuid, tag, number] if !tag.is_empty() => (*uuid, *tag, *number),
            _ => ("", "", ""),
        };
        Series::parse(uuid, tag)
            .zip(sequence(number))
            .map(|(series, sequence)| SeriesGtid { series, sequence })
            .ok_or_else(|| {
                Error::new(Kind::BadInput, format!("'{text}' is not a GTID of MySQL")).hint(
                    "one transaction is meant, as in '3e11fa47-71ca-11e1-9e33-c80aa9429562:23'; \
                     'SHOW BINARY LOG STATUS' prints the ids of all",
                )
            })
    }
}

impl fmt::Display for SeriesGtid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.series, self.sequence)
    }
}

fn sequence(digits: &str) -> Option<u64> {
    let is_decimal = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|number| is_decimal && (1..SEQUENCE_END).contains(number))
}

/// A set of transactions, as `gtid_executed` has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GtidSet {
    /// First and last number of each run, in order, with a gap between any two. No series is empty.
    runs: BTreeMap<Series, Vec<(u64, u64)>>,
}

impl GtidSet {
    /// Reads the list that the server prints: `uuid:1-5:7:tag:1-2,uuid:…`; an empty text is the empty set.
    pub fn parse(text: &str) -> Result<GtidSet> {
        let wrong = || Error::new(Kind::BadInput, format!("'{text}' is not a set of GTIDs of MySQL"));
        let mut set = GtidSet::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let mut words = part.split(':').map(str::trim);
            let uuid = words.next().unwrap_or_default();
            let mut series = Series::parse(uuid, "").ok_or_else(wrong)?;
            for word in words {
                if !word.starts_with(|first: char| first.is_ascii_digit()) {
                    series = Series::parse(uuid, word).filter(|_| !word.is_empty()).ok_or_else(wrong)?;
                    continue;
                }
                let (first, last) = word.split_once('-').unwrap_or((word, word));
                match (sequence(first.trim()), sequence(last.trim())) {
                    (Some(first), Some(last)) if first <= last => set.add_run(series, first, last),
                    _ => return Err(wrong()),
                }
            }
        }
        Ok(set)
    }

    /// Adds a transaction.
    pub fn add(&mut self, gtid: SeriesGtid) {
        self.add_run(gtid.series, gtid.sequence, gtid.sequence);
    }

    /// Adds the transactions of a series from `first` to `last`; nothing if that is none.
    pub fn add_run(&mut self, series: Series, first: u64, last: u64) {
        if first > last {
            return;
        }
        let runs = self.runs.entry(series).or_default();
        // Most come in order: the last run grows.
        match runs.last_mut() {
            Some(run) if first == run.1.saturating_add(1) => run.1 = last,
            Some(run) if first <= run.1 => merge(runs, first, last),
            _ => runs.push((first, last)),
        }
    }

    /// Adds all of another set.
    pub fn add_all(&mut self, other: &GtidSet) {
        for (series, runs) in &other.runs {
            runs.iter().for_each(|(first, last)| self.add_run(*series, *first, *last));
        }
    }

    pub fn contains(&self, gtid: SeriesGtid) -> bool {
        self.runs.get(&gtid.series).is_some_and(|runs| holds(runs, gtid.sequence, gtid.sequence))
    }

    /// A transaction of `self` that `other` has not; nothing if `other` has all.
    pub fn first_missing_in(&self, other: &GtidSet) -> Option<SeriesGtid> {
        self.runs.iter().find_map(|(series, runs)| {
            let theirs = other.runs.get(series).map_or(&[][..], Vec::as_slice);
            let (first, _) = runs.iter().find(|(first, last)| !holds(theirs, *first, *last))?;
            // The first of the run, or the one behind their run that holds it.
            let at = theirs.partition_point(|run| run.1 < *first);
            let sequence = theirs.get(at).filter(|run| run.0 <= *first).map_or(*first, |run| run.1.saturating_add(1));
            Some(SeriesGtid { series: *series, sequence })
        })
    }
}

/// Whether one of the runs has all from `first` to `last`.
fn holds(runs: &[(u64, u64)], first: u64, last: u64) -> bool {
    let at = runs.partition_point(|run| run.1 < first);
    runs.get(at).is_some_and(|run| run.0 <= first && last <= run.1)
}

fn merge(runs: &mut Vec<(u64, u64)>, first: u64, last: u64) {
    // Those that overlap it or touch it become one with it.
    let from = runs.partition_point(|run| run.1.saturating_add(1) < first);
    let to = runs.partition_point(|run| run.0 <= last.saturating_add(1)).max(from);
    let start = runs.get(from).filter(|_| from < to).map_or(first, |run| run.0.min(first));
    let end =
        to.checked_sub(1).filter(|at| *at >= from).and_then(|at| runs.get(at)).map_or(last, |run| run.1.max(last));
    runs.splice(from..to, [(start, end)]);
}

impl fmt::Display for GtidSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut uuid = None;
        for (series, runs) in &self.runs {
            if uuid == Some(series.uuid) {
                write!(f, ":{}", series.tag.text())?;
            } else {
                write!(f, "{}{series}", if uuid.is_some() { "," } else { "" })?;
            }
            uuid = Some(series.uuid);
            for (first, last) in runs {
                if first == last { write!(f, ":{first}")? } else { write!(f, ":{first}-{last}")? }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const A: &str = "3e11fa47-71ca-11e1-9e33-c80aa9429562";
    const B: &str = "a9efa202-e59e-11f1-a868-02fc00000001";

    #[test]
    fn sets_read_back_as_the_server_prints_them() {
        for text in ["", &format!("{A}:1-20:22:abc_tag:1:zz:1-3,{B}:5"), &format!("{B}:only:7-9")] {
            assert_eq!(GtidSet::parse(text).unwrap().to_string(), text);
        }
        // As `SELECT @@gtid_executed` breaks its lines, in another order, with runs that touch.
        let set = GtidSet::parse(&format!("{B}:3-4:1-2,\n{A}:9,{B}:T:1")).unwrap();
        assert_eq!(set.to_string(), format!("{A}:9,{B}:1-4:t:1"));
    }

    #[test]
    fn what_is_no_gtid_is_refused() {
        let long = format!("{A}:{}:1", "t".repeat(33));
        for bad in
            ["", "1-2-3", A, &format!("{A}:0"), &format!("{A}:1-2"), &format!("{A}::1"), &format!("{A}:9t:1"), &long]
        {
            assert_eq!(SeriesGtid::parse(bad).unwrap_err().kind(), Kind::BadInput, "{bad}");
        }
        for bad in ["x", "0-1-2", &format!("{A}:5-4"), &format!("{A}:1:"), &format!("{A}:9223372036854775807")] {
            assert!(GtidSet::parse(bad).is_err(), "{bad}");
        }
        let gtid = SeriesGtid::parse(&format!("{A}:Some_Tag:12")).unwrap();
        assert_eq!(gtid.to_string(), format!("{A}:some_tag:12"));
    }

    #[test]
    fn what_one_set_has_and_another_has_not_is_named() {
        let set = |text: &str| GtidSet::parse(text).unwrap();
        let missing = |one: &str, other: &str| {
            set(&format!("{A}:{one}")).first_missing_in(&set(&format!("{A}:{other}"))).map(|gtid| gtid.sequence)
        };
        assert_eq!(missing("1-5", "1-9"), None);
        assert_eq!(missing("1-5", "1-4"), Some(5));
        assert_eq!(missing("3:7", "1-5"), Some(7));
        assert_eq!(missing("1-9", "2-9"), Some(1));
        assert_eq!(missing("1", "x:1"), Some(1));
    }

    proptest! {
        #[test]
        fn a_set_has_what_was_added_and_nothing_else(runs in prop::collection::vec((1u64..60, 0u64..6), 0..20)) {
            let series = Series::parse(A, "").unwrap();
            let (mut set, mut known) = (GtidSet::default(), BTreeSet::new());
            for (first, more) in runs {
                set.add_run(series, first, first + more);
                known.extend(first..=first + more);
            }
            for sequence in 1..70 {
                prop_assert_eq!(set.contains(SeriesGtid { series, sequence }), known.contains(&sequence));
            }
            prop_assert_eq!(&GtidSet::parse(&set.to_string()).unwrap(), &set);
            // As few runs as possible: equal sets are equal values.
            let mut one_by_one = GtidSet::default();
            known.iter().rev().for_each(|sequence| one_by_one.add(SeriesGtid { series, sequence: *sequence }));
            prop_assert_eq!(&one_by_one, &set);
            prop_assert!(set.first_missing_in(&one_by_one).is_none());
        }
    }
}
