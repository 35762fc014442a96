//! Everything in keiki that reads bytes which somebody else wrote, as functions from bytes to nothing: they must not
//! panic, must end, and must not take more memory than what they have read deserves. Shared by the deterministic test
//! (`tests/it/hostile_bytes.rs`) and the fuzz targets beside this file.

use bytes::Bytes;
use futures_util::FutureExt;
use keiki::engine::mysql::ondisk::backup_info::BinlogInfo;
use keiki::engine::mysql::ondisk::gtid::{Gtid, GtidState};
use keiki::engine::mysql::ondisk::gtid_event::{MySqlGtidEvent, previous_gtids};
use keiki::engine::mysql::ondisk::gtid_set::{GtidSet, SeriesGtid};
use keiki::engine::mysql::ondisk::transaction::TransactionRange;
use keiki::engine::mysql::ondisk::walker::{Walker, mask_in_use};
use keiki::engine::mysql::ondisk::{aria_control, auto_cnf, mbstream};
use keiki::engine::mysql::session::wire as mysql_wire;
use keiki::engine::postgres::ondisk::backup_label::BackupLabel;
use keiki::engine::postgres::ondisk::control::{ControlFile, without_checkpoint};
use keiki::engine::postgres::ondisk::history::TimelineHistory;
use keiki::engine::postgres::ondisk::segment::{SegmentSize, WalFile};
use keiki::engine::postgres::ondisk::versions::Major;
use keiki::engine::postgres::ondisk::wal::{Cutter, Decision, Scanner, Step, Stop, WalFormat, WalReader, decode};
use keiki::engine::postgres::ondisk::{page, tablespace_map};
use keiki::engine::redis::base_stream;
use keiki::engine::redis::ondisk::aof::AofWalker;
use keiki::engine::redis::ondisk::manifest::Manifest;
use keiki::engine::redis::ondisk::rdb::{RdbCheck, RdbHeader, RdbVersion};
use keiki::engine::redis::recovery::cut::{Cut, End};
use keiki::engine::redis::replica::{SnapshotEnd, parse_answer, parse_snapshot_end};
use keiki::engine::redis::session::read_answer;
use keiki::engine::redis::spool::{Place, Spool};
use keiki::format::container::{ContainerKind, read_whole};
use keiki::format::document::{Header, LeaseRecord, Work, parse_identity};
use keiki::format::frame::{FrameDecoder, ObjectSeal};
use keiki::format::layout::{parse_identity_key, parse_log_key, parse_manifest_key};
use keiki::format::links::LinksParser;
use keiki::format::manifest::read_records;
use keiki::format::summary::{LogObject, ManifestObject, PackObject};
use keiki::model::id::IncarnationId;
use keiki::model::position::Lsn;
use keiki::peer::wire::{AnswerReader, MessageReader, decode_request};

/// A parser of foreign bytes.
pub struct Target {
    pub name: &'static str,
    pub read: fn(&[u8]),
    /// Memory that it may have at a time whatever it reads, and for each byte that it was given.
    pub base_bytes: usize,
    pub bytes_per_byte: usize,
}

/// What most of them keep to: some state of fixed size, and what they make of what they read. An error repeats a part of it.
const fn target(name: &'static str, read: fn(&[u8])) -> Target {
    Target { name, read, base_bytes: 64 << 10, bytes_per_byte: 16 }
}

/// All of them.
pub const TARGETS: &[Target] = &[
    target("mysql_binlog", mysql_binlog),
    target("mysql_mbstream", mysql_mbstream),
    target("mysql_gtid", mysql_gtid),
    target("mysql_backup_info", mysql_backup_info),
    target("mysql_aria_control", mysql_aria_control),
    target("mysql_gtid_events", mysql_gtid_events),
    target("mysql_auto_cnf", mysql_auto_cnf),
    target("mysql_wire", mysql_wire_packets),
    // An empty list of four bytes is a value of thirty-two in a list that doubles when it is full.
    Target { bytes_per_byte: 40, ..target("redis_resp", redis_resp) },
    target("redis_aof", redis_aof),
    target("redis_manifest", redis_manifest),
    target("redis_rdb", redis_rdb),
    // Pieces of 1 MiB.
    Target { base_bytes: 4 << 20, ..target("redis_replication", redis_replication) },
    Target { base_bytes: 4 << 20, ..target("redis_spool", redis_spool) },
    target("postgres_wal", postgres_wal),
    target("postgres_control", postgres_control),
    target("postgres_backup_label", postgres_backup_label),
    target("postgres_history", postgres_history),
    target("postgres_tablespace_map", postgres_tablespace_map),
    target("postgres_page", postgres_page),
    target("postgres_names", postgres_names),
    // A frame's content is at most 1 MiB, an index at most 8 MiB; both are hashed before they are decompressed.
    Target { base_bytes: 9 << 20, bytes_per_byte: 64, ..target("format_container", format_container) },
    Target { base_bytes: 9 << 20, ..target("format_frame", format_frame) },
    // Small values in JSON: `{}` of two bytes is a value with a name in a list.
    Target { bytes_per_byte: 120, ..target("format_manifest", format_manifest) },
    Target { bytes_per_byte: 64, ..target("format_document", format_document) },
    Target { bytes_per_byte: 64, ..target("format_summary", format_summary) },
    Target { bytes_per_byte: 64, ..target("format_links", format_links) },
    target("format_keys", format_keys),
    // Before it has read the elements of a list, serde sets aside up to 1 MiB for it (`size_hint::cautious`), and lists lie
    // in lists.
    Target { base_bytes: 4 << 20, bytes_per_byte: 200, ..target("peer_request", peer_request) },
    Target { base_bytes: 4 << 20, bytes_per_byte: 200, ..target("peer_answer", peer_answer) },
];

/// Pieces of uneven sizes, which the first byte chooses: what is cut anywhere must read the same.
fn pieces(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let size = 1 + usize::from(bytes.first().copied().unwrap_or(0)) * 37 % 4096;
    bytes.chunks(size)
}

fn mysql_binlog(bytes: &[u8]) {
    let mut walker = Walker::new();
    let mut last_end = 0;
    for piece in pieces(bytes) {
        let walked = walker.feed(piece, &mut |transaction| {
            assert!(transaction.start < transaction.end && transaction.start >= last_end);
            last_end = transaction.end;
            Ok(())
        });
        assert!(walker.boundary() <= walker.event_end() && walker.event_end() <= bytes.len() as u64);
        if walked.is_err() {
            break;
        }
    }
    let _ = (walker.first_state().map(ToString::to_string), walker.knows_format());
    let mut masked = bytes.to_vec();
    mask_in_use(&mut masked, 0);
    // From the middle, as after a restart of the agent.
    let middle = walker.boundary() / 2;
    let mut resumed = walker.resumed_at(middle);
    let _ = resumed.feed(&bytes[usize::try_from(middle).unwrap()..], &mut |_| Ok(()));
}

fn mysql_mbstream(bytes: &[u8]) {
    let mut decoder = mbstream::Decoder::new();
    let mut total = 0;
    let is_good = pieces(bytes).all(|piece| {
        let fed = decoder.feed(piece, &mut |part| {
            let (path, length) = match part {
                mbstream::Part::Data { path, bytes } => (path, bytes.len()),
                mbstream::Part::End { path } => (path, 0),
            };
            assert!(!path.starts_with('/') && !path.split('/').any(|part| part == ".."), "'{path}' leads elsewhere");
            total += length;
            Ok(())
        });
        fed.is_ok()
    });
    assert!(total <= bytes.len());
    if is_good {
        let _ = decoder.finish();
    }
}

fn mysql_gtid(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let _ = (Gtid::parse(&text), SeriesGtid::parse(&text), TransactionRange::parse(&text));
    if let Ok(state) = GtidState::parse(&text) {
        assert_eq!(GtidState::parse(&state.to_string()).unwrap(), state);
    }
    if let Ok(set) = GtidSet::parse(&text) {
        assert_eq!(GtidSet::parse(&set.to_string()).unwrap(), set);
    }
}

fn mysql_gtid_events(bytes: &[u8]) {
    let _ = (MySqlGtidEvent::parse(bytes, false), MySqlGtidEvent::parse(bytes, true));
    let _ = MySqlGtidEvent::parse_tagged(bytes);
    if let Some(set) = previous_gtids(bytes) {
        assert_eq!(GtidSet::parse(&set.to_string()).unwrap(), set);
    }
}

fn mysql_auto_cnf(bytes: &[u8]) {
    let _ = auto_cnf::uuid(bytes);
}

fn mysql_backup_info(bytes: &[u8]) {
    let _ = BinlogInfo::parse(bytes);
}

fn mysql_aria_control(bytes: &[u8]) {
    let _ = aria_control::uuid(bytes);
}

fn mysql_wire_packets(bytes: &[u8]) {
    if let Ok(greeting) = mysql_wire::Greeting::parse(bytes) {
        let _ = greeting.answer("keiki", Some("secret"));
    }
    for password in [None, Some("secret")] {
        let _ = mysql_wire::reply_to_log_in(bytes, &mut String::from("mysql_native_password"), password);
    }
    let _ = (mysql_wire::first_answer(bytes), mysql_wire::column_name(bytes), mysql_wire::is_end(bytes));
    for columns in [0, 1, 3, 10_000_000] {
        let _ = mysql_wire::row(bytes, columns);
    }
}

fn redis_resp(bytes: &[u8]) {
    let mut stream = tokio::io::BufReader::with_capacity(512, bytes);
    // What lies in memory is always there: nothing is ever waited for.
    while let Ok(reply) = read_answer(&mut stream).now_or_never().expect("no waiting") {
        let _ = (reply.clone().number(), reply.list());
    }
}

fn redis_aof(bytes: &[u8]) {
    let mut walker = AofWalker::new(0);
    let is_good = pieces(bytes).all(|piece| walker.feed(piece, |_| {}).is_ok());
    assert!(walker.boundary() <= walker.at() && walker.at() <= bytes.len() as u64);
    let _ = walker.finish();
    let place = End::At { number: 1, offset: bytes.len() as u64 / 2 };
    for end in [End::Open, End::Before(1_795_261_177_000), place] {
        let mut cut = Cut::new(1, 0, end);
        let is_read = pieces(bytes).all(|piece| cut.feed(piece).is_ok());
        if let (true, Ok(kept)) = (is_read, cut.kept(bytes.len() as u64)) {
            assert!(kept <= bytes.len() as u64 && (end != place || kept <= bytes.len() as u64 / 2 || !cut.is_found()));
            let _ = cut.times_kept(kept);
        }
    }
    // The same with values passed over instead of read, as large ones are.
    let (mut skipping, mut at) = (AofWalker::new(0), 0usize);
    while at < bytes.len() {
        let skippable = usize::try_from(skipping.skippable()).unwrap_or(usize::MAX).min(bytes.len() - at);
        if skippable > 0 {
            skipping.skip(skippable as u64);
            at += skippable;
        } else if skipping.feed(&bytes[at..=at], |_| {}).is_err() {
            break;
        } else {
            at += 1;
        }
    }
    assert_eq!(skipping.boundary(), walker.boundary());
    // Inside a bad line both may stop anywhere.
    assert!(!is_good || skipping.at() == walker.at());
}

fn redis_manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(bytes) {
        let names = manifest.base.iter().chain(&manifest.increments).map(|part| part.name.as_str());
        names.for_each(|name| assert!(!name.contains('/') && name != "..", "'{name}' leads elsewhere"));
        assert_eq!(Manifest::parse(manifest.render().as_bytes()).unwrap(), manifest);
    }
}

fn redis_rdb(bytes: &[u8]) {
    let _ = (RdbHeader::parse(bytes), RdbVersion::parse(bytes));
    let _ = RdbVersion::parse_text(&String::from_utf8_lossy(bytes));
    let mut check = RdbCheck::default();
    pieces(bytes).for_each(|piece| check.update(piece));
    let _ = check.finish();
}

/// What a primary says to a replica before a snapshot, and the snapshot: a mark of which the stream has as much as it likes.
fn redis_replication(bytes: &[u8]) {
    for line in bytes.split(|byte| *byte == b'\n') {
        let text = String::from_utf8_lossy(line);
        let _ = (parse_answer(text.trim_end()), parse_snapshot_end(text.trim_end()));
    }
    let mark = bytes.first_chunk().map(|mark| SnapshotEnd::Mark(*mark));
    for end in [Some(SnapshotEnd::Bytes(bytes.len() as u64 / 2)), mark].into_iter().flatten() {
        let mut cutter = base_stream::Cutter::new(end);
        let mut passed = 0;
        for piece in pieces(bytes) {
            if cutter.is_whole() {
                break;
            }
            let mut buffer = cutter.begin_piece();
            buffer.extend_from_slice(piece);
            passed += cutter.take(buffer).len();
        }
        assert!(passed <= bytes.len());
    }
}

/// A replication stream as a log: what was received stays readable, and an agent that dies goes on behind a whole command.
fn redis_spool(bytes: &[u8]) {
    // In memory where there is such a place: each round syncs many times.
    let memory = std::path::Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    let dir = parent.join(format!("keiki-hostile-spool-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir).expect("a temporary directory");
    {
        let mut spool = Spool::open(&dir, 1 << 20).expect("nobody else has it");
        let history = "a".repeat(40);
        spool.begin_anew(Place { history: history.clone(), offset: 1000 }, 50_000_000).expect("an empty directory");
        for (at, piece) in (50_000_001..).zip(pieces(bytes)) {
            if spool.append(at, piece).is_err() {
                break;
            }
            let _ = spool.note_executed(at, 1000 + at as u64 % 512);
        }
        for file in spool.files().expect("files of its own") {
            let mut walker = AofWalker::new(0);
            let content = std::fs::read(&file.path).expect("a file of its own");
            let readable = &content[..file.readable_bytes as usize];
            walker.feed(readable, |_| {}).expect("what may be shipped is whole");
            assert_eq!(walker.boundary(), file.readable_bytes);
        }
        drop(spool);
        let spool = Spool::open(&dir, 1 << 20).expect("it is let go");
        assert!(spool.place().is_some());
    }
    let _ = std::fs::remove_dir_all(&dir);
}

fn wal_format(major: Major) -> WalFormat {
    let segment_size = SegmentSize::new(1 << 20).expect("a size that servers have");
    WalFormat { major, segment_size, page_bytes: 8192, system_identifier: None }
}

/// A segment: its first page says where it belongs and which version wrote it. The checksums of its records are made
/// right first, or nothing would be seen of what lies behind them.
fn postgres_wal(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    repair_record_checksums(&mut bytes);
    let word = |at: usize| bytes.get(at..at + 8).map_or(0, |word| u64::from_le_bytes(word.try_into().unwrap()));
    let major = Major::from_wal_page_magic(word(0) as u16).unwrap_or(Major::V15);
    let (format, start) = (wal_format(major), Lsn(word(8)));
    if let Ok(mut scanner) = Scanner::new(format, start) {
        for piece in pieces(&bytes) {
            if !matches!(scanner.feed(piece), Ok(None)) {
                break;
            }
        }
        let _ = scanner.take_facts();
    }
    let Ok(mut reader) = WalReader::new(format, start) else { return };
    let mut cutter = Cutter::new(Stop::BeforeTime(jiff::Timestamp::UNIX_EPOCH), format);
    let mut rest = &bytes[..];
    while let Step::Record(record) = reader.next(&mut rest) {
        let Ok(event) = decode(&record, major) else { break };
        if matches!(cutter.observe(&record, &event), Decision::CutAt(_)) {
            break;
        }
    }
}

/// Page by page, as far as records lie within one: `src/include/access/xlogrecord.h`, CRC-32C over the body and then the
/// first 20 bytes.
fn repair_record_checksums(bytes: &mut [u8]) {
    for (number, page) in bytes.chunks_mut(8192).enumerate() {
        let mut at = if number == 0 { 40 } else { 24 };
        let word =
            |page: &[u8], at: usize| page.get(at..at + 4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
        if page.get(2).is_some_and(|flags| flags & 1 != 0) {
            at += (word(page, 16).unwrap_or(0) as usize).saturating_add(7) & !7;
        }
        while let Some(length) = word(page, at).map(|length| length as usize).filter(|length| *length >= 24) {
            let Some(record) = page.get_mut(at..at.saturating_add(length)) else { break };
            let mut crc = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
            crc.update(&record[24..]);
            crc.update(&record[..20]);
            record[20..24].copy_from_slice(&(crc.finalize() as u32).to_le_bytes());
            at += length.saturating_add(7) & !7;
        }
    }
}

/// With its checksum made right for each version, see `src/include/catalog/pg_control.h`.
fn postgres_control(bytes: &[u8]) {
    let _ = (ControlFile::parse(bytes), without_checkpoint(bytes));
    for crc_at in (256..bytes.len().saturating_sub(4).min(320)).step_by(4) {
        let mut repaired = bytes.to_vec();
        let mut crc = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
        crc.update(&repaired[..crc_at]);
        repaired[crc_at..crc_at + 4].copy_from_slice(&(crc.finalize() as u32).to_le_bytes());
        let _ = (ControlFile::parse(&repaired), without_checkpoint(&repaired));
    }
}

fn postgres_backup_label(bytes: &[u8]) {
    let _ = BackupLabel::parse(bytes);
}

fn postgres_history(bytes: &[u8]) {
    for timeline in [0, 2, 4, u32::MAX] {
        if let Ok(history) = TimelineHistory::parse(timeline, bytes) {
            let _ = (history.render(), history.timeline_of(Lsn(1 << 30)), history.begin_of(2), history.end_of(1));
        }
    }
}

fn postgres_tablespace_map(bytes: &[u8]) {
    if let Ok(tablespaces) = tablespace_map::parse(bytes) {
        assert_eq!(tablespace_map::parse(&tablespace_map::render(&tablespaces)).unwrap(), tablespaces);
    }
}

fn postgres_page(bytes: &[u8]) {
    for (number, block) in bytes.chunks(8192).enumerate() {
        let _ = (page::verify_block(block, number as u32), page::page_lsn(block));
    }
}

fn postgres_names(bytes: &[u8]) {
    let size = SegmentSize::new(16 << 20).expect("a size that servers have");
    for name in String::from_utf8_lossy(bytes).split('\n') {
        let _ = WalFile::classify(name, size);
        let path = std::path::Path::new(name);
        let _ = keiki::engine::postgres::ondisk::relation_files::treatment(path, Major::V15);
    }
}

fn incarnation() -> IncarnationId {
    IncarnationId::parse("01938c5e-0000-7000-8000-000000000001").expect("an id")
}

const PACK_KEY: &str = "incarnations/01938c5e-0000-7000-8000-000000000001/packs/01938c5e-0000-7000-8000-00000000000a";

fn format_container(bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    for (kind, name) in [
        (ContainerKind::Pack, "packs/01938c5e-0000-7000-8000-00000000000a"),
        (ContainerKind::Log, "log/000000010000000000000007/0000000000002000-0000000000004ee0"),
        (ContainerKind::Manifest, "backups/20261121T095900Z-k3xq/manifest"),
    ] {
        let key = format!("incarnations/{}/{name}", incarnation());
        let _ = read_whole(&ObjectSeal::of(&key), kind, &bytes);
    }
}

fn format_frame(bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    let mut decoder = FrameDecoder::new().expect("memory");
    for offset in [0, 16, u64::MAX] {
        let _ = decoder.decode_whole(&ObjectSeal::of(PACK_KEY), offset, &bytes);
    }
}

fn format_manifest(bytes: &[u8]) {
    for entry in read_records(incarnation(), bytes).into_iter().flatten() {
        let path = entry.path();
        assert!(!path.starts_with('/') && !path.split('/').any(|part| part == ".."), "'{path}' leads elsewhere");
    }
}

fn format_document(bytes: &[u8]) {
    let _ = (
        Header::parse("k", bytes),
        parse_identity("k", bytes),
        LeaseRecord::parse("k", bytes),
        Work::parse("k", bytes),
    );
}

fn format_summary(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(bytes) else { return };
    let seal = ObjectSeal::of(PACK_KEY);
    let _ = (LogObject::parse(&seal, &value), PackObject::parse(&seal, &value), ManifestObject::parse(&seal, &value));
}

fn format_links(bytes: &[u8]) {
    let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
    let Ok((_, mut parser)) = LinksParser::begin(lines.next().unwrap_or_default()) else { return };
    if lines.all(|line| parser.next(line).is_ok()) {
        let _ = parser.finish();
    }
}

fn format_keys(bytes: &[u8]) {
    for key in String::from_utf8_lossy(bytes).split('\n') {
        let _ = (parse_log_key(incarnation(), key), parse_identity_key(key), parse_manifest_key(incarnation(), key));
    }
}

fn peer_request(bytes: &[u8]) {
    let _ = decode_request(bytes);
    let mut reader = MessageReader::default();
    for piece in pieces(bytes) {
        reader.feed(piece);
        while let Ok(Some(message)) = reader.next_message() {
            let _ = decode_request(&message);
        }
    }
}

fn peer_answer(bytes: &[u8]) {
    let _ = AnswerReader::default().take(bytes);
    let (mut reader, mut answers) = (MessageReader::default(), AnswerReader::default());
    for piece in pieces(bytes) {
        reader.feed(piece);
        while let Ok(Some(message)) = reader.next_message() {
            if answers.take(&message).is_err() {
                return;
            }
        }
    }
}
