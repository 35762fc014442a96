//! Hostile bytes: real files and messages, changed a little in every way that hurts parsers, some ten thousand times for
//! each parser of foreign bytes. None panics, all end, and none takes memory for what it has not read.
//!
//! The changes follow from a seed, so that a failure can be repeated: it names the round and keeps the bytes.
//! `KEIKI_HOSTILE_SEED` and `KEIKI_HOSTILE_ROUNDS` choose others; `KEIKI_WRITE_CORPUS=DIR` writes the unchanged bytes to
//! where `cargo fuzz` takes them (`tests/fuzz/README.md`).

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[path = "../fuzz/targets.rs"]
mod targets;

mod memory;
mod mutate;
mod specimens;

use mutate::Mutator;
use targets::{TARGETS, Target};

/// As many as there is time for, but not more: the changes of a parser's later rounds are no other than the earlier.
const ROUNDS: u64 = 20_000;
const TIME: Duration = Duration::from_secs(4);
/// A round that takes longer does not end.
const ROUND_LIMIT: Duration = Duration::from_secs(60);

macro_rules! hostile {
    ($($name:ident)+) => {
        $(#[test]
        fn $name() {
            let wanted = stringify!($name);
            attack(TARGETS.iter().find(|target| target.name == wanted).unwrap());
        })+

        #[test]
        fn every_parser_of_foreign_bytes_is_attacked() {
            let attacked = [$(stringify!($name)),+];
            let known: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(known, attacked);
            let fuzzed = include_str!("../fuzz/Cargo.toml");
            let missing: Vec<_> =
                known.iter().filter(|name| !fuzzed.contains(&format!("name = \"{name}\"\n"))).collect();
            assert!(missing.is_empty(), "tests/fuzz/Cargo.toml has no [[bin]] for {missing:?}");
        }
    };
}

hostile! {
    mysql_binlog mysql_mbstream mysql_gtid mysql_backup_info mysql_aria_control mysql_gtid_events mysql_auto_cnf
    mysql_wire
    redis_resp redis_aof redis_manifest redis_rdb redis_replication redis_spool
    postgres_wal postgres_control postgres_backup_label postgres_history postgres_tablespace_map postgres_page
    postgres_names
    format_container format_frame format_manifest format_document format_summary format_links format_keys
    peer_request peer_answer
}

fn number_from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: '{text}'")))
}

fn attack(target: &'static Target) {
    let specimens = specimens::of(target.name);
    assert!(!specimens.is_empty());
    if let Some(dir) = std::env::var_os("KEIKI_WRITE_CORPUS") {
        write_corpus(Path::new(&dir), target, &specimens);
    }
    let seed = number_from_environment("KEIKI_HOSTILE_SEED").unwrap_or(20_261_121);
    let rounds = number_from_environment("KEIKI_HOSTILE_ROUNDS");
    let began = Instant::now();
    // Round and when it began, in milliseconds, for who watches.
    let (round_now, round_began) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (told, told_time) = (round_now.clone(), round_began.clone());
    let worker = std::thread::spawn(move || {
        let mut mutator = Mutator::new(seed, target.name);
        let mut largest = (0, 0);
        for round in 0.. {
            let is_over = match rounds {
                Some(rounds) => round >= rounds,
                None => round >= ROUNDS || began.elapsed() > TIME,
            };
            if is_over {
                return (round, largest);
            }
            told_time.store(began.elapsed().as_millis() as u64, Ordering::Relaxed);
            told.store(round, Ordering::Relaxed);
            // First what is right, then what is not.
            let bytes = match usize::try_from(round).ok().and_then(|index| specimens.get(index)) {
                Some(specimen) => specimen.clone(),
                None => mutator.change(&specimens),
            };
            let taken = try_one(target, &bytes, round, seed);
            largest = largest.max((taken, bytes.len()));
        }
        unreachable!("numbers do not end")
    });
    while !worker.is_finished() {
        std::thread::sleep(Duration::from_millis(10));
        let (round, at) = (round_now.load(Ordering::Relaxed), round_began.load(Ordering::Relaxed));
        let waited = began.elapsed().saturating_sub(Duration::from_millis(at));
        assert!(
            worker.is_finished() || waited < ROUND_LIMIT,
            "{}: round {round} of seed {seed} does not end",
            target.name
        );
    }
    let (rounds, (largest, length)) = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    println!(
        "{:24} {rounds:6} rounds in {:.1} s; at most {largest} bytes of memory, for {length} bytes",
        target.name,
        began.elapsed().as_secs_f64()
    );
    assert!(rounds > 100, "{}: only {rounds} rounds", target.name);
}

/// Lets the parser read; returns how much memory it had at a time.
fn try_one(target: &Target, bytes: &[u8], round: u64, seed: u64) -> usize {
    let before = memory::begin();
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| (target.read)(bytes)));
    let taken = memory::peak_since(before);
    if let Err(panic) = outcome {
        eprintln!("{}: round {round} of seed {seed} panicked on '{}'", target.name, keep(target, bytes).display());
        std::panic::resume_unwind(panic);
    }
    let limit = target.base_bytes + target.bytes_per_byte * bytes.len();
    assert!(
        taken <= limit,
        "{}: round {round} of seed {seed} took {taken} bytes of memory for {} bytes, kept as '{}'",
        target.name,
        bytes.len(),
        keep(target, bytes).display()
    );
    taken
}

/// Keeps the bytes of a failure; returns where.
fn keep(target: &Target, bytes: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("keiki-hostile-{}.bin", target.name));
    let _ = std::fs::write(&path, bytes);
    path
}

fn write_corpus(dir: &Path, target: &Target, specimens: &[Vec<u8>]) {
    let dir = dir.join(target.name);
    std::fs::create_dir_all(&dir).unwrap();
    for (number, specimen) in specimens.iter().enumerate() {
        std::fs::write(dir.join(format!("specimen-{number}")), specimen).unwrap();
    }
}

/// Attacks on bytes that were refused in the first place would prove little.
#[test]
fn what_is_changed_is_read_before_it_is_changed() {
    use keiki::engine::mysql::ondisk::{mbstream::Decoder, walker::Walker};
    use keiki::engine::postgres::ondisk::control::ControlFile;
    use keiki::engine::redis::ondisk::rdb::{RdbCheck, RdbVerdict};

    for log in specimens::of("mysql_binlog") {
        let (mut walker, mut transactions) = (Walker::new(), 0);
        let mut count = |_| {
            transactions += 1;
            Ok(())
        };
        walker.feed(&log, &mut count).unwrap();
        assert!(transactions > 0 && walker.boundary() == log.len() as u64, "{transactions}, {}", walker.boundary());
    }
    let (mut decoder, mut files) = (Decoder::new(), 0);
    let stream = &specimens::of("mysql_mbstream")[0];
    let mut count = |part: keiki::engine::mysql::ondisk::mbstream::Part<'_>| {
        files += usize::from(matches!(part, keiki::engine::mysql::ondisk::mbstream::Part::End { .. }));
        Ok(())
    };
    decoder.feed(stream, &mut count).unwrap();
    decoder.finish().unwrap();
    assert!(files > 2, "{files}");
    assert!(specimens::of("postgres_control").iter().all(|bytes| ControlFile::parse(bytes).is_ok()));
    let mut check = RdbCheck::default();
    check.update(&specimens::of("redis_rdb")[0]);
    assert_eq!(check.finish().unwrap(), RdbVerdict::Verified);
    assert_eq!(specimens::of("postgres_wal").len(), 2);
    let records = keiki::format::manifest::read_records(specimens::incarnation(), &specimens::of("format_manifest")[0]);
    assert_eq!(records.unwrap().len(), 4);
}

/// What counts memory and what ends endless rounds is itself tested.
#[test]
fn memory_that_is_promised_and_not_read_is_seen() {
    let before = memory::begin();
    drop(Vec::<u8>::with_capacity(3 << 20));
    assert!((3 << 20..4 << 20).contains(&memory::peak_since(before)));
    let before = memory::begin();
    let mut grown = Vec::new();
    (0..100_000u32).for_each(|number| grown.push(number));
    assert!((400_000..2_000_000).contains(&memory::peak_since(before)));
    drop(grown);
    assert_eq!(memory::peak_since(memory::begin()), 0);
}
