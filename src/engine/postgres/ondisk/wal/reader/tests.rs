//! Unit tests of `reader`.

use proptest::prelude::*;

use super::super::super::fixtures;
use super::super::super::segment::SegmentSize;
use super::super::super::versions::Major;
use super::super::forge::{self, Forge};
use super::super::record::decode;
use super::*;

/// A record without its borrow, for comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Owned {
    start: Lsn,
    end: Lsn,
    next: Lsn,
    previous: Lsn,
    xid: u32,
    kind: (u8, u8),
    length: u32,
    body: Vec<u8>,
}

impl From<Record<'_>> for Owned {
    fn from(record: Record<'_>) -> Owned {
        Owned {
            start: record.start,
            end: record.end,
            next: record.next,
            previous: record.previous,
            xid: record.xid,
            kind: (record.resource_manager, record.info),
            length: record.length,
            body: record.body.to_vec(),
        }
    }
}

/// Reads pieces one after the other.
fn read_pieces<'a>(mut reader: WalReader, pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Owned>, Option<End>) {
    let mut records = Vec::new();
    for piece in pieces {
        let mut rest = piece;
        loop {
            match reader.next(&mut rest) {
                Step::Record(record) => records.push(record.into()),
                Step::NeedMore => break,
                Step::End(end) => return (records, Some(end)),
            }
        }
        assert!(rest.is_empty(), "the reader left bytes behind");
    }
    (records, None)
}

fn read(format: WalFormat, start: Lsn, bytes: &[u8]) -> (Vec<Owned>, Option<End>) {
    read_pieces(WalReader::new(format, start).unwrap(), std::iter::once(bytes))
}

/// A log of all shapes: short and long records, one that fills its page, a record header across pages, a given-up
/// record, a switch, zeros.
fn varied(major: Major) -> Forge {
    let mut log = Forge::new(forge::format(major), 5);
    log.write(10, 0x20, 3, &[1; 100]);
    log.write(1, 0, 7, &forge::plain_body(&[0; 8]));
    log.write(10, 0, 3, &[2; 30_000]);
    log.fill_page(8);
    log.write(1, 0, 8, &forge::plain_body(&[0; 8]));
    log.fill_page(0);
    log.write(0, 0x20, 0, &[]);
    log.write_torn(40_000, 2);
    log.write(1, 0x20, 9, &forge::plain_body(&[0; 8]));
    log.switch();
    log.timeline = 2;
    log.write(1, 0, 10, &forge::plain_body(&vec![0; 20_000]));
    log.zeros();
    log
}

#[test]
fn every_record_of_a_real_log_is_found_where_pg_waldump_found_it() {
    for fixture in fixtures::all() {
        for (timeline, (start, bytes)) in [(1, fixture.timeline_1()), (2, fixture.timeline_2())] {
            let (records, end) = read(fixture.format(), start, &bytes);
            let end = end.unwrap();
            assert!(end.reason.is_ordinary(), "{end:?}");
            assert_eq!(end.valid_until, records.last().unwrap().next);
            if timeline == 1 {
                assert_eq!(records.len(), fixture.record_count());
            }
            let decoded: Vec<&Owned> =
                records.iter().filter(|record| is_decoded(record.kind.0, record.kind.1)).collect();
            let dump = fixture.dump(timeline);
            // pg_waldump prints some operations that are not decoded further, and the other way round nothing.
            assert_eq!(decoded.len(), dump.len());
            for (record, line) in decoded.iter().zip(&dump) {
                assert_eq!((record.start, record.previous), (line.start, line.previous), "{line:?}");
                assert_eq!((record.length, record.xid), (line.length, line.xid), "{line:?}");
            }
        }
    }
}

#[test]
fn every_decoded_record_says_what_pg_waldump_says() {
    use super::super::record::Event;
    for fixture in fixtures::all() {
        for (timeline, (start, bytes)) in [(1, fixture.timeline_1()), (2, fixture.timeline_2())] {
            let mut dump = fixture.dump(timeline).into_iter();
            let mut reader = WalReader::new(fixture.format(), start).unwrap();
            let mut rest = &bytes[..];
            while let Step::Record(record) = reader.next(&mut rest) {
                if !is_decoded(record.resource_manager, record.info) {
                    continue;
                }
                let line = dump.next().unwrap();
                let time = |time: jiff::Timestamp| time.strftime("%Y-%m-%d %H:%M:%S.%6f UTC").to_string();
                let wanted = match decode(&record, fixture.major).unwrap() {
                    Event::Commit(end) | Event::Abort(end) if end.prepared => {
                        format!("PREPARED {}: {}", end.xid, time(end.time))
                    }
                    Event::Commit(end) => format!("COMMIT {}", time(end.time)),
                    Event::Abort(end) => format!("ABORT {}", time(end.time)),
                    Event::RestorePoint { name, .. } => format!("RESTORE_POINT {name}"),
                    Event::Switch => "SWITCH".to_owned(),
                    Event::ShutdownCheckpoint(checkpoint) => format!(
                        "CHECKPOINT_SHUTDOWN redo {}; tli {}; prev tli {};",
                        checkpoint.redo, checkpoint.timeline, checkpoint.previous_timeline
                    ),
                    Event::OnlineCheckpoint(checkpoint) => format!(
                        "CHECKPOINT_ONLINE redo {}; tli {}; prev tli {};",
                        checkpoint.redo, checkpoint.timeline, checkpoint.previous_timeline
                    ),
                    Event::EndOfRecovery { timeline, previous_timeline, time: at } => {
                        format!("END_OF_RECOVERY tli {timeline}; prev tli {previous_timeline}; time {}", time(at))
                    }
                    Event::ParameterChange { parameters, wal_level } => format!(
                        "PARAMETER_CHANGE max_connections={} max_worker_processes={} max_wal_senders={} \
                         max_prepared_xacts={} max_locks_per_xact={} wal_level={wal_level}",
                        parameters.max_connections,
                        parameters.max_worker_processes,
                        parameters.max_wal_senders,
                        parameters.max_prepared_transactions,
                        parameters.max_locks_per_transaction
                    ),
                    Event::BackupEnd { start } => format!("BACKUP_END {start}"),
                    Event::Overwrite { .. } | Event::Other => continue,
                };
                assert!(line.description.contains(&wanted), "'{wanted}' is not in {line:?}");
                let dropped = line
                    .description
                    .split_once("rels:")
                    .map_or(0, |(_, rels)| rels.split(';').next().unwrap_or_default().split_whitespace().count());
                if let Event::Commit(end) | Event::Abort(end) = decode(&record, fixture.major).unwrap() {
                    assert_eq!(end.dropped_relations as usize, dropped, "{line:?}");
                }
            }
        }
    }
}

#[test]
fn every_version_s_log_is_read_and_no_other_version_s() {
    for major in Major::all() {
        let log = varied(major);
        let (records, end) = read(forge::format(major), log.start, &log.bytes);
        assert_eq!(records.len(), 11, "PostgreSQL {major}");
        assert_eq!(end.unwrap().reason, EndReason::Zeros);
        for other in Major::all().filter(|other| *other != major) {
            let (records, end) = read(forge::format(other), log.start, &log.bytes);
            assert!(records.is_empty());
            assert_eq!(end.unwrap().reason, EndReason::WrongPageMagic(major.wal_page_magic()));
        }
    }
}

#[test]
fn a_record_that_fills_its_page_ends_at_the_boundary_and_the_next_starts_behind_the_header() {
    let mut log = Forge::new(forge::format(Major::V15), 1);
    let full = log.fill_page(0);
    let after = log.write(10, 0, 1, &[1; 10]);
    let (records, _) = read(forge::format(Major::V15), log.start, &log.bytes);
    assert_eq!((records[0].end, records[0].next), (full.end, full.end));
    assert_eq!(full.end.0 % 8192, 0);
    assert_eq!(records[1].start, after.start);
    assert_eq!(after.start, forge::format(Major::V15).start_after(full.end));
    assert_eq!(after.start.0 % 8192, 24);
}

#[test]
fn a_switch_is_followed_by_the_next_segment_whatever_lies_between() {
    let mut log = Forge::new(forge::format(Major::V15), 1);
    let switch = log.switch();
    // The server leaves zeros there, but nobody looks.
    let from = log.bytes.len() - 9000;
    log.bytes[from..].fill(0xee);
    let after = log.write(10, 0, 1, &[1; 10]);
    let (records, end) = read(forge::format(Major::V15), log.start, &log.bytes);
    assert_eq!((records[0].end, records[0].next), (switch.end, Lsn(2 << 20)));
    assert_eq!((records[1].start, end), (after.start, None));
}

#[test]
fn the_rest_of_an_earlier_record_is_skipped_at_the_start() {
    for pages in [1, 3] {
        let mut log = Forge::new(forge::format(Major::V18), 1);
        log.write(10, 0, 1, &vec![1; pages * 8192]);
        let after = log.write(1, 0, 2, &forge::plain_body(&[0; 8]));
        let (records, _) = read(forge::format(Major::V18), Lsn(log.start.0 + 8192), &log.bytes[8192..]);
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].start, after.start);
    }
}

#[test]
fn reading_may_begin_at_any_record() {
    let log = varied(Major::V16);
    let format = forge::format(Major::V16);
    let (records, _) = read(format, log.start, &log.bytes);
    for (index, record) in records.iter().enumerate() {
        let from = (record.start.0 - log.start.0) as usize;
        let mut reader = WalReader::new(format, record.start).unwrap();
        if let Some(before) = index.checked_sub(1) {
            reader = reader.with_previous(records[before].start);
        }
        let (tail, end) = read_pieces(reader, std::iter::once(&log.bytes[from..]));
        assert_eq!(tail, records[index..]);
        assert_eq!(end.unwrap().valid_until, records.last().unwrap().next);
    }
}

#[test]
fn a_record_that_was_given_up_is_passed_over_only_if_its_successor_names_it() {
    let mut log = Forge::new(forge::format(Major::V14), 1);
    log.write(10, 0, 1, &[1; 50]);
    let (torn, overwrite) = log.write_torn(30_000, 1);
    log.write(10, 0, 1, &[1; 50]);
    let (records, end) = read(forge::format(Major::V14), log.start, &log.bytes);
    assert_eq!(records.iter().map(|record| record.start).collect::<Vec<_>>()[1], overwrite.start);
    assert_eq!((records.len(), end), (3, None));
    assert!(torn < overwrite.start);

    let mut log = Forge::new(forge::format(Major::V14), 1);
    let previous = log.previous;
    let (_, overwrite) = log.write_torn(30_000, 1);
    log.previous = previous;
    let at = (overwrite.start.0 - log.start.0) as usize;
    // Another record in its place, valid in itself.
    log.bytes.truncate(at);
    log.write(10, 0, 1, &[1; 50]);
    let (records, end) = read(forge::format(Major::V14), log.start, &log.bytes);
    assert!(records.is_empty());
    assert_eq!(end.unwrap().reason, EndReason::WrongOverwrite);
}

#[test]
fn a_record_that_follows_another_one_than_was_read_ends_the_log() {
    let format = forge::format(Major::V15);
    let mut log = Forge::new(format, 1);
    let first = log.write(10, 0, 1, &[1; 50]);
    // Valid in itself: what a recycled page or a file of another server's log looks like.
    log.previous = Lsn(first.start.0 - 8);
    let second = log.write(10, 0, 1, &[1; 50]);
    let (records, end) = read(format, log.start, &log.bytes);
    let end = end.unwrap();
    assert_eq!((records.len(), end.at), (1, second.start));
    assert_eq!(end.reason, EndReason::WrongPrevious(Lsn(first.start.0 - 8)));

    let from = (second.start.0 - log.start.0) as usize;
    let reader = WalReader::new(format, second.start).unwrap().with_previous(first.start);
    assert!(read_pieces(reader, std::iter::once(&log.bytes[from..])).0.is_empty());
    // Without knowledge of the record before, it only has to lie before.
    assert_eq!(read(format, second.start, &log.bytes[from..]).0.len(), 1);
}

#[test]
fn a_torn_record_without_a_successor_ends_the_log_before_it() {
    let mut log = Forge::new(forge::format(Major::V15), 1);
    let last = log.write(10, 0, 1, &[1; 50]);
    log.write_torn(30_000, 1);
    let torn_page = 2 * 8192;
    log.bytes.truncate(torn_page);
    log.bytes.extend([0; 8192]);
    let (records, end) = read(forge::format(Major::V15), log.start, &log.bytes);
    assert_eq!(records.len(), 1);
    let end = end.unwrap();
    assert_eq!((end.valid_until, end.reason), (last.end, EndReason::MissingContinuation));
    assert_eq!(end.at, Lsn(log.start.0 + torn_page as u64));
}

#[test]
fn a_recycled_page_is_an_ordinary_end() {
    let mut log = Forge::new(forge::format(Major::V15), 7);
    let full = log.fill_page(0);
    let mut old = Forge::new(forge::format(Major::V15), 3);
    old.start = Lsn(old.start.0 + 8192);
    old.write(10, 0, 1, &[1; 10]);
    log.bytes.extend(old.bytes);
    let (_, end) = read(forge::format(Major::V15), log.start, &log.bytes);
    let end = end.unwrap();
    assert_eq!((end.valid_until, end.at, end.reason), (full.end, full.end, EndReason::Recycled));
    assert!(end.reason.is_ordinary());
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let format = forge::format(Major::V15);
    let mut log = Forge::new(format, 2);
    log.timeline = 3;
    log.fill_page(0);
    log.timeline = 2;
    log.write(10, 0, 1, &[1; 10]);
    let reason = |format, bytes: &[u8]| read(format, Lsn(2 << 20), bytes).1.map(|end| end.reason);
    assert_eq!(reason(format, &log.bytes), Some(EndReason::WrongTimeline(2)));
    let reader = WalReader::new(format, log.start).unwrap().with_newest_timeline(2);
    assert_eq!(read_pieces(reader, std::iter::once(&log.bytes[..])).1.unwrap().reason, EndReason::WrongTimeline(3));
    let other = WalFormat { system_identifier: Some(1), ..format };
    assert_eq!(reason(other, &log.bytes), Some(EndReason::WrongSystemIdentifier(forge::SYSTEM_IDENTIFIER)));
    let other = WalFormat { segment_size: SegmentSize::new(2 << 20).unwrap(), ..format };
    assert_eq!(reason(other, &log.bytes), Some(EndReason::WrongSegmentSize(1 << 20)));
    let other = WalFormat { page_bytes: 4096, ..format };
    assert_eq!(reason(other, &log.bytes), Some(EndReason::WrongPageSize(8192)));
    let elsewhere = read(format, Lsn(1 << 20), &log.bytes).1.unwrap();
    assert_eq!(elsewhere.reason, EndReason::WrongPageAddress(Lsn(2 << 20)));
    let error = elsewhere.into_error();
    assert_eq!(
        error.message(),
        "the log ends at '0/100000': cannot read what lies at '0/100000': the page says it is 0/200000"
    );
}

#[test]
fn a_reader_cannot_begin_where_no_record_can() {
    let format = forge::format(Major::V15);
    for bad in [1, 8, 0x2000 + 16, (1 << 20) + 24, (1 << 20) + 41, u64::MAX - 7] {
        assert!(WalReader::new(format, Lsn(bad)).is_err(), "{bad:#x}");
    }
    assert!(WalReader::new(WalFormat { page_bytes: 0, ..format }, Lsn(0)).is_err());
}

#[test]
fn a_hostile_length_does_not_allocate() {
    let mut log = Forge::new(forge::format(Major::V15), 1);
    let written = log.write(1, 0, 1, &[1; 5000]);
    let at = (written.start.0 - log.start.0) as usize;
    log.bytes[at..at + 4].copy_from_slice(&MAX_RECORD_BYTES.to_le_bytes());
    let mut reader = WalReader::new(forge::format(Major::V15), log.start).unwrap();
    assert_eq!(reader.next(&mut &log.bytes[..]), Step::NeedMore);
    assert!(reader.body.capacity() < 64 << 10, "{}", reader.body.capacity());
    assert_eq!(reader.undecided_from(), written.start);
    log.bytes[at..at + 4].copy_from_slice(&(MAX_RECORD_BYTES + 1).to_le_bytes());
    let (_, end) = read(forge::format(Major::V15), log.start, &log.bytes);
    assert_eq!(end.unwrap().reason, EndReason::WrongLength(MAX_RECORD_BYTES + 1));
}

#[test]
fn an_ended_reader_stays_ended() {
    let log = varied(Major::V17);
    let mut reader = WalReader::new(forge::format(Major::V17), log.start).unwrap();
    let mut rest = &log.bytes[..];
    while let Step::Record(_) = reader.next(&mut rest) {}
    let Step::End(end) = reader.next(&mut rest) else { panic!("not ended") };
    assert_eq!(reader.next(&mut &log.bytes[..]), Step::End(end));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_pieces_do_not_matter(cuts in prop::collection::vec(0usize..2 << 20, 0..40), tiny in 1usize..60) {
        let log = varied(Major::V15);
        let format = forge::format(Major::V15);
        let whole = read(format, log.start, &log.bytes);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % log.bytes.len()).collect();
        cuts.extend([0, log.bytes.len()]);
        cuts.sort_unstable();
        let reader = WalReader::new(format, log.start).unwrap();
        let pieces = read_pieces(reader, cuts.windows(2).map(|pair| &log.bytes[pair[0]..pair[1]]));
        prop_assert_eq!(&pieces, &whole);
        let reader = WalReader::new(format, log.start).unwrap();
        prop_assert_eq!(&read_pieces(reader, log.bytes.chunks(tiny)), &whole);
    }

    #[test]
    fn a_flipped_bit_can_only_end_the_log_earlier(at in any::<prop::sample::Index>(), bit in 0u8..8, first_page in any::<bool>()) {
        for (format, start, bytes) in [
            { let log = varied(Major::V18); (forge::format(Major::V18), log.start, log.bytes) },
            { let fixture = fixtures::v15(); let (start, bytes) = fixture.timeline_2(); (fixture.format(), start, bytes) },
        ] {
            let (intact, _) = read(format, start, &bytes);
            let written = (intact.last().unwrap().end.0 - start.0) as usize;
            let mut bytes = bytes;
            let at = at.index(if first_page { 8192 } else { written });
            bytes[at] ^= 1 << bit;
            let (records, _) = read(format, start, &bytes);
            prop_assert!(records.len() <= intact.len());
            // Padding and the unread rest after a switch may change unnoticed; a record may not.
            prop_assert_eq!(&records[..], &intact[..records.len()]);
        }
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..5000), from in 0u64..9000, piece in 1usize..3000) {
        let format = forge::format(Major::V13);
        if let Ok(reader) = WalReader::new(format, Lsn(from * 8)) {
            for piece in [piece, 5000] {
                let mut rest = Vec::new();
                rest.extend_from_slice(&bytes);
                let mut reader = WalReader::new(format, reader.position()).unwrap();
                for mut part in rest.chunks(piece) {
                    while let Step::Record(_) = reader.next(&mut part) {}
                }
            }
        }
    }
}
