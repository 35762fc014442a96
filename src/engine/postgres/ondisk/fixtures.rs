//! Files of real servers with what the servers' own tools said about them; `tests/fixtures/postgres/make.sh` made
//! them. Unit tests read them instead of starting a server.

use std::path::PathBuf;

use jiff::Timestamp;

use super::control::ControlFile;
use super::segment::{SegmentName, SegmentSize};
use super::versions::Major;
use super::wal::WalFormat;
use crate::model::position::Lsn;

/// The fixtures of one major version.
pub struct Fixture {
    pub major: Major,
    expected: String,
}

/// One line of `pg_waldump`: a record of the XLOG or Transaction resource manager.
#[derive(Debug)]
pub struct DumpLine {
    pub length: u32,
    pub xid: u32,
    pub start: Lsn,
    pub previous: Lsn,
    pub description: String,
}

/// The fixtures of every version that there are some of.
pub fn all() -> [Fixture; 2] {
    [v15(), v18()]
}

pub fn v15() -> Fixture {
    Fixture::load(Major::V15)
}

pub fn v18() -> Fixture {
    Fixture::load(Major::V18)
}

/// The segment size that the fixtures' servers were initialised with.
pub fn segment_size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

/// A time as `pg_controldata` prints it in the C locale.
pub fn c_time(time: Timestamp) -> String {
    time.strftime("%a %b %e %H:%M:%S %Y").to_string()
}

impl Fixture {
    fn load(major: Major) -> Fixture {
        let mut fixture = Fixture { major, expected: String::new() };
        fixture.expected = String::from_utf8(fixture.plain("expected.txt")).unwrap();
        fixture
    }

    /// How the servers wrote their log.
    pub fn format(&self) -> WalFormat {
        WalFormat::of(&ControlFile::parse(&self.control()).unwrap())
    }

    /// The bytes of a file that lies there uncompressed.
    pub fn plain(&self, name: &str) -> Vec<u8> {
        let path: PathBuf =
            [env!("CARGO_MANIFEST_DIR"), "tests/fixtures/postgres", &self.major.to_string(), name].iter().collect();
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    fn compressed(&self, name: &str) -> Vec<u8> {
        zstd::decode_all(&self.plain(&format!("{name}.zst"))[..]).unwrap()
    }

    pub fn control(&self) -> Vec<u8> {
        self.compressed("pg_control")
    }

    /// The first file of a table, with data checksums.
    pub fn relation(&self) -> Vec<u8> {
        self.compressed("relation")
    }

    pub fn segment(&self, name: SegmentName) -> Vec<u8> {
        self.compressed(&name.render(segment_size()))
    }

    /// The lines of the expectations that begin with this word, without it.
    fn lines(&self, word: &str) -> impl Iterator<Item = &str> {
        self.expected.lines().filter_map(move |line| line.strip_prefix(word)?.strip_prefix(' '))
    }

    /// What `pg_controldata` printed behind a label.
    pub fn control_line(&self, label: &str) -> String {
        let found = self.lines("control").find_map(|line| line.strip_prefix(label)?.strip_prefix(':'));
        found.unwrap_or_else(|| panic!("pg_controldata printed no '{label}'")).trim().to_owned()
    }

    fn name(&self, word: &str) -> SegmentName {
        SegmentName::parse(self.lines(word).next().unwrap(), segment_size()).unwrap()
    }

    /// The first and the last segment of timeline 1.
    pub fn first_and_last(&self) -> (SegmentName, SegmentName) {
        (self.name("first"), self.name("last"))
    }

    /// All bytes of timeline 1, and where they begin.
    pub fn timeline_1(&self) -> (Lsn, Vec<u8>) {
        let (first, last) = self.first_and_last();
        let names = (first.number..=last.number).map(|number| SegmentName { timeline: 1, number });
        (first.start(segment_size()), names.flat_map(|name| self.segment(name)).collect())
    }

    /// The bytes of the segment in which timeline 2 began, and where they begin.
    pub fn timeline_2(&self) -> (Lsn, Vec<u8>) {
        let name = self.name("second");
        (name.start(segment_size()), self.segment(name))
    }

    /// How many records `pg_waldump` saw on timeline 1.
    pub fn record_count(&self) -> usize {
        self.lines("all records").next().unwrap().trim().parse().unwrap()
    }

    /// What `pg_waldump` printed of the records of XLOG (without full-page images) and Transaction.
    pub fn dump(&self, timeline: u32) -> Vec<DumpLine> {
        self.lines(if timeline == 1 { "wal" } else { "wal2" }).map(DumpLine::parse).collect()
    }
}

impl DumpLine {
    /// `rmgr: XLOG  len (rec/tot): 98/ 98, tx: 0, lsn: 0/009308F0, prev 0/009303B8, desc: RESTORE_POINT x`
    fn parse(line: &str) -> DumpLine {
        let between = |from: &str, to: &str| {
            let rest = line.split_once(from).unwrap_or_else(|| panic!("no '{from}' in {line}")).1;
            rest.split_once(to).map_or(rest, |parts| parts.0).trim().to_owned()
        };
        let length = between("(rec/tot):", ", tx:");
        DumpLine {
            length: length.split_once('/').unwrap().1.trim().parse().unwrap(),
            xid: between("tx:", ",").parse().unwrap(),
            start: Lsn::parse(&between("lsn: ", ",")).unwrap(),
            previous: Lsn::parse(&between("prev ", ",")).unwrap(),
            description: line.split_once("desc: ").unwrap().1.trim().to_owned(),
        }
    }

    /// Whether the record ends a transaction.
    pub fn is_transaction_end(&self) -> bool {
        ["COMMIT", "ABORT"].iter().any(|word| self.description.starts_with(word))
    }

    /// The time of a transaction's end.
    pub fn time(&self) -> Timestamp {
        let words: Vec<&str> = self.description.split([' ', ';']).collect();
        let date = words.iter().position(|word| word.starts_with("20") && word.contains('-')).unwrap();
        format!("{}T{}Z", words[date], words[date + 1]).parse().unwrap()
    }
}
