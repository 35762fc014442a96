//! The spool against streams that are cut at any byte, agents that die, and servers that forget.

use super::*;
use crate::engine::redis::recovery::cut::{Cut, End};

const ID: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const SELECT_3: &str = "*2\r\n$6\r\nSELECT\r\n$1\r\n3\r\n";
const SET: &str = "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\n*1\r\n$\r\n";
const PING: &str = "*1\r\n$4\r\nPING\r\n";
const TRANSACTION: &str = "*1\r\n$5\r\nMULTI\r\n*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n*1\r\n$4\r\nEXEC\r\n";

fn place(offset: u64) -> Place {
    Place { history: ID.to_string(), offset }
}

fn spool(dir: &Path) -> Spool {
    Spool::open(dir, 1 << 30).unwrap()
}

fn begun(dir: &Path) -> Spool {
    let mut spool = spool(dir);
    spool.begin_anew(place(1000), 50_000_000).unwrap();
    spool
}

/// The stream in a file, without what the agent has added.
fn stream_of(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let mut kept = String::new();
    for line in text.split_inclusive("\r\n") {
        if !line.starts_with("#KEIKI-") {
            kept += line;
        }
    }
    kept
}

#[test]
fn the_stream_stands_in_the_file_byte_for_byte_however_it_arrives() {
    let stream = [SELECT_3, SET, PING, TRANSACTION, SET].concat();
    for piece in [1, 2, 7, 30, 1000] {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = begun(dir.path());
        for (number, bytes) in stream.as_bytes().chunks(piece).enumerate() {
            spool.append(50_000_001 + number as i64, bytes).unwrap();
        }
        assert_eq!(spool.place(), Some(&place(1000 + stream.len() as u64)));
        let files = spool.files().unwrap();
        assert_eq!((files.len(), files[0].number, files[0].finished), (1, 50_000, false));
        assert_eq!(stream_of(&files[0].path), stream, "{piece}");
        // Every offset of a boundary is found, and what stands behind it is what was sent after it.
        let text = std::fs::read_to_string(&files[0].path).unwrap();
        for (offset, rest) in
            [(0, SELECT_3), (SELECT_3.len(), SET), (SELECT_3.len() + SET.len() + PING.len(), "*1\r\n$5")]
        {
            let (_, at) = spool.locate(ID, 1000 + offset as u64).unwrap().file().unwrap();
            let behind: String =
                text[at as usize..].split_inclusive("\r\n").filter(|line| !line.starts_with('#')).collect();
            assert!(behind.starts_with(rest), "offset {offset}: {behind:?}");
        }
    }
}

#[test]
fn an_agent_that_dies_asks_for_what_was_not_complete() {
    let stream = [SELECT_3, SET, TRANSACTION].concat();
    for length in 0..=stream.len() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = begun(dir.path());
        first.append(50_000_001, &stream.as_bytes()[..length]).unwrap();
        drop(first);
        let mut again = spool(dir.path());
        let whole = [0, SELECT_3.len(), SELECT_3.len() + SET.len(), stream.len()];
        let kept = whole.into_iter().rev().find(|end| *end <= length).unwrap();
        assert_eq!(again.place(), Some(&place(1000 + kept as u64)), "{length}");
        again.append(50_000_002, &stream.as_bytes()[kept..]).unwrap();
        assert_eq!(stream_of(&again.files().unwrap()[0].path), stream);
    }
}

#[test]
fn a_torn_annotation_or_zeros_at_the_end_are_no_part_of_the_log() {
    for tail in ["#KEIKI-AT:5000", "#KEI", "\0\0\0\0", "*3\r\n$3\r\nSE"] {
        let dir = tempfile::tempdir().unwrap();
        let mut first = begun(dir.path());
        first.append(50_000_001, SET.as_bytes()).unwrap();
        let path = first.files().unwrap()[0].path.clone();
        drop(first);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(tail.as_bytes()).unwrap();
        assert_eq!(spool(dir.path()).place(), Some(&place(1000 + SET.len() as u64)), "{tail:?}");
    }
}

#[test]
fn a_quiet_server_has_nothing_to_ship() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = begun(dir.path());
    assert_eq!(spool.files().unwrap()[0].readable_bytes, 0);
    spool.append(50_000_001, SET.as_bytes()).unwrap();
    spool.note_executed(50_000_002, 1000).unwrap();
    let readable = spool.files().unwrap()[0].readable_bytes;
    assert!(readable > 0);
    for number in 0..10 {
        spool.append(50_010_000 + number, PING.as_bytes()).unwrap();
        spool.note_executed(50_010_000 + number, 1000).unwrap();
    }
    assert_eq!(spool.files().unwrap()[0].readable_bytes, readable);
    spool.append(50_020_000, TRANSACTION.as_bytes()).unwrap();
    assert!(spool.files().unwrap()[0].readable_bytes > readable + 10 * PING.len() as u64);
}

#[test]
fn a_note_about_what_was_executed_waits_for_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = begun(dir.path());
    let end = 1000 + SET.len() as u64;
    spool.note_executed(50_000_777, end).unwrap();
    spool.append(50_000_001, &SET.as_bytes()[..10]).unwrap();
    let text = |spool: &mut Spool| std::fs::read_to_string(&spool.files().unwrap()[0].path).unwrap();
    assert!(!text(&mut spool).contains("#KEIKI-BY"));
    spool.append(50_000_002, &SET.as_bytes()[10..]).unwrap();
    assert!(text(&mut spool).ends_with(&format!("{SET}#KEIKI-BY:50000777:{end}\r\n")), "{}", text(&mut spool));
}

#[test]
fn the_last_note_is_of_later_than_the_receipt_of_what_changed_last() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = begun(dir.path());
    let notes = |spool: &mut Spool| {
        let text = std::fs::read_to_string(&spool.files().unwrap()[0].path).unwrap();
        text.lines().filter_map(|line| line.strip_prefix("#KEIKI-BY:")?.split(':').next()?.parse().ok()).collect()
    };
    spool.append(50_000_005, SET.as_bytes()).unwrap();
    // Asked before, answered after: a clone to that moment has nothing of the change, and the next note tells of it.
    for millis in [50_000_003, 50_000_004, 50_000_005, 50_000_006, 50_000_007] {
        spool.note_executed(millis, 1000).unwrap();
    }
    let told: Vec<i64> = notes(&mut spool);
    assert_eq!(told, [50_000_003, 50_000_006]);
    let readable = spool.files().unwrap()[0].readable_bytes;
    spool.append(50_000_100, PING.as_bytes()).unwrap();
    spool.note_executed(50_000_101, 1000).unwrap();
    assert_eq!(notes(&mut spool), told);
    assert_eq!(spool.files().unwrap()[0].readable_bytes, readable);
}

#[test]
fn a_file_that_follows_begins_in_the_database_of_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = begun(dir.path());
    spool.append(50_000_001, [SELECT_3, SET].concat().as_bytes()).unwrap();
    spool.append(50_000_001 + FILE_MILLIS_MAX, SET.as_bytes()).unwrap();
    let files = spool.files().unwrap();
    assert_eq!(
        files.iter().map(|file| (file.number, file.finished)).collect::<Vec<_>>(),
        [(50_000, true), (50_001, false)]
    );
    assert_eq!(stream_of(&files[1].path), [SELECT_3, SET].concat());
    let offset = 1000 + SELECT_3.len() as u64 + 2 * SET.len() as u64;
    assert_eq!(spool.place(), Some(&place(offset)));
    drop(spool);
    assert_eq!(super::Spool::open(dir.path(), 1).unwrap().place(), Some(&place(offset)));
}

#[test]
fn what_does_not_follow_leaves_a_number_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = begun(dir.path());
    spool.append(50_000_001, &[SET, "*3\r\n$3"].concat().into_bytes()).unwrap();
    spool.begin_anew(place(9), 50_000_500).unwrap();
    spool.append(50_000_501, SET.as_bytes()).unwrap();
    let files = spool.files().unwrap();
    assert_eq!(files.iter().map(|file| file.number).collect::<Vec<_>>(), [50_000, 50_002]);
    assert_eq!(stream_of(&files[0].path), SET);
    spool.release_before(50_003).unwrap();
    assert_eq!(spool.files().unwrap().len(), 1, "the newest stays");
}

#[test]
fn a_new_history_of_the_same_stream_begins_a_file_that_follows() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = begun(dir.path());
    spool.append(50_000_001, &[SET, "*3\r\n$3"].concat().into_bytes()).unwrap();
    let other = ID.replace('a', "b");
    spool.rename_history(&other);
    spool.append(50_000_002, &SET.as_bytes()["*3\r\n$3".len()..]).unwrap();
    spool.append(50_000_003, SET.as_bytes()).unwrap();
    let files = spool.files().unwrap();
    assert_eq!(files.iter().map(|file| file.number).collect::<Vec<_>>(), [50_000, 50_001]);
    assert_eq!(stream_of(&files[0].path), [SET, SET].concat());
    assert_eq!(stream_of(&files[1].path), SET);
    drop(spool);
    assert_eq!(super::Spool::open(dir.path(), 1).unwrap().place().unwrap().history, other);
}

#[test]
fn the_disk_of_the_server_has_a_limit_and_one_agent() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = Spool::open(dir.path(), 300).unwrap();
    spool.begin_anew(place(0), 50_000_000).unwrap();
    for hour in 0..6 {
        spool.append(50_000_001 + hour * (FILE_MILLIS_MAX + 1), SET.as_bytes()).unwrap();
    }
    let files = spool.files().unwrap();
    assert!(files.len() < 4, "{files:?}");
    assert_eq!(files.last().unwrap().number, 50_005);
    assert_eq!(Spool::open(dir.path(), 300).unwrap_err().kind(), Kind::Conflict);
}

#[test]
fn a_backup_in_the_middle_of_what_came_at_once_shows_no_moment_before_that() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = begun(dir.path());
    let came_at = 50_000_700;
    spool.append(came_at, [SET, SET, SET].concat().as_bytes()).unwrap();
    let (_, from) = spool.locate(ID, 1000 + SET.len() as u64).unwrap().file().unwrap();
    let first_moment = spool.received_before();
    spool.append(came_at + 5, SET.as_bytes()).unwrap();
    let log = std::fs::read(spool.path(50_000)).unwrap();
    // From there on a cut sees no annotation before the next one, so it keeps what came later than an earlier target.
    let kept = |limit| {
        let mut cut = Cut::new(50_000, from, End::Before(limit));
        cut.feed(&log[from as usize..]).unwrap();
        (cut.kept(log.len() as u64).unwrap() - from) as usize
    };
    assert_eq!(kept(came_at - 100), 2 * SET.len(), "which is why such a target needs an older backup");
    assert_eq!((first_moment, kept(first_moment)), (came_at + 1, 2 * SET.len()));
}

#[test]
fn an_offset_of_another_history_is_not_looked_for_in_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = begun(dir.path());
    for millis in 1..20 {
        spool.append(50_000_000 + millis, SET.as_bytes()).unwrap();
    }
    // The server was restarted without its data and counts from the beginning.
    let other = Place { history: "b".repeat(40), offset: 0 };
    spool.begin_anew(other, 60_000_000).unwrap();
    spool.append(60_000_001, SET.as_bytes()).unwrap();
    let other = "b".repeat(40);
    let (number, at) = spool.locate(&other, SET.len() as u64).unwrap().file().unwrap();
    let text = std::fs::read_to_string(spool.path(number)).unwrap();
    assert_eq!((number, &text[at as usize - SET.len()..at as usize]), (60_000, SET));
    assert_eq!(spool.locate(&other, 1000 + SET.len() as u64 * 30).unwrap_err().kind(), Kind::Server);
    // Whoever waited for the old one is not told a place in the new one.
    assert_eq!(spool.locate(ID, SET.len() as u64).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn an_agent_that_was_restarted_knows_the_places_that_it_knew_before() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = begun(dir.path());
    let end = |count: u64| 1000 + SET.len() as u64 * count;
    for count in 1..4 {
        first.append(50_000_000 + count as i64, SET.as_bytes()).unwrap();
        first.note_executed(50_000_500 + count as i64, end(count)).unwrap();
    }
    let place_now = first.place().unwrap().offset;
    let offsets = [1000, end(1), end(2), end(3)];
    let before = offsets.map(|offset| first.locate(ID, offset).unwrap());
    drop(first);
    // Nothing has come since: a backup of a quiet server begins where the stream stands.
    let mut again = spool(dir.path());
    assert_eq!(again.place().unwrap().offset, place_now);
    assert_eq!(offsets.map(|offset| again.locate(ID, offset).unwrap()), before);
    assert_eq!(again.locate(ID, 999).unwrap_err().kind(), Kind::NotFound);
}
