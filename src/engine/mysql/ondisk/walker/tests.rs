//! The walker on logs that are made here, whole, torn and hostile. Logs of real servers: `tests/it/mariadb_log.rs`.

use proptest::prelude::*;

use super::*;

/// A log file, event by event.
struct Forge(Vec<u8>);

impl Forge {
    fn new() -> Forge {
        let mut forge = Forge(MAGIC.to_vec());
        let mut body = vec![4, 0];
        body.extend([b'x'; 50]);
        body.extend([0; 4]);
        body.push(HEADER_BYTES as u8);
        body.extend([0; 20]);
        body.push(1);
        forge.event(event_type::FORMAT_DESCRIPTION, 1, &body);
        forge
    }

    fn event(&mut self, kind: u8, at: u32, body: &[u8]) {
        let bytes = HEADER_BYTES + body.len() + CHECKSUM_BYTES;
        let end = (self.0.len() + bytes) as u32;
        self.0.extend(at.to_le_bytes());
        self.0.push(kind);
        self.0.extend(7u32.to_le_bytes());
        self.0.extend((bytes as u32).to_le_bytes());
        self.0.extend(end.to_le_bytes());
        self.0.extend([0, 0]);
        self.0.extend(body);
        self.0.extend([0xaa; CHECKSUM_BYTES]);
    }

    fn gtid(&mut self, at: u32, sequence: u64, flags: u8) {
        let mut body = sequence.to_le_bytes().to_vec();
        body.extend(3u32.to_le_bytes());
        body.push(flags);
        body.extend([0; 6]);
        self.event(event_type::GTID, at, &body);
    }

    fn query(&mut self, at: u32, text: &str) {
        self.query_that_ran(at, 0, text);
    }

    fn query_that_ran(&mut self, at: u32, ran_seconds: u32, text: &str) {
        let mut body = vec![0; 13];
        body[4..8].copy_from_slice(&ran_seconds.to_le_bytes());
        body.extend(b"db\0");
        body.extend(text.as_bytes());
        self.event(event_type::QUERY, at, &body);
    }
}

/// Four transactions of every way to end, and the offsets behind them.
fn sample() -> (Vec<u8>, Vec<u64>) {
    let mut log = Forge::new();
    let mut ends = Vec::new();
    log.event(event_type::GTID_LIST, 1, &[0, 0, 0, 0]);
    log.gtid(10, 1, 1);
    log.event(event_type::INTVAR, 10, &[0; 9]);
    log.query(10, "create table t (id int)");
    ends.push(log.0.len() as u64);
    log.gtid(12, 2, 4);
    log.query(11, "insert into t values (1) -- COMMIT");
    log.event(event_type::XID, 13, &[0; 8]);
    ends.push(log.0.len() as u64);
    log.gtid(14, 3, 0);
    log.event(event_type::TABLE_MAP, 14, &[0; 40]);
    log.query(14, "COMMIT");
    ends.push(log.0.len() as u64);
    log.gtid(15, 4, 0);
    log.query(15, "rollback");
    ends.push(log.0.len() as u64);
    log.event(event_type::STOP, 16, &[]);
    (log.0, ends)
}

#[test]
fn a_statement_that_is_a_transaction_was_committed_when_it_had_run_whatever_its_session_says() {
    let mut log = Forge::new();
    for (sequence, at, ran) in [(1, 100, 0), (2, 101, 300), (3, 2_000_000_000, 402u32.wrapping_sub(2_000_000_000))] {
        log.gtid(at, sequence, 1);
        log.query_that_ran(at, ran, "alter table t add c int");
    }
    // What another server has made says nothing about this one's clock.
    let from = log.0.len();
    log.gtid(403, 4, 1);
    log.query_that_ran(403, 3600, "alter table t add d int");
    let bytes = u32::from_le_bytes(log.0[from + 9..from + 13].try_into().unwrap()) as usize;
    log.0[from + bytes + 5] = 9;
    let (outcome, found, _) = walk(&log.0, 7);
    outcome.unwrap();
    assert_eq!(found.iter().map(|transaction| transaction.at.as_second()).collect::<Vec<_>>(), [100, 401, 402, 403]);
}

fn walk(bytes: &[u8], piece: usize) -> (Result<()>, Vec<Transaction>, Walker) {
    let (mut walker, mut found) = (Walker::new(), Vec::new());
    let mut outcome = Ok(());
    for piece in bytes.chunks(piece.max(1)) {
        outcome = walker.feed(piece, &mut |transaction| {
            found.push(transaction);
            Ok(())
        });
        if outcome.is_err() {
            break;
        }
    }
    (outcome, found, walker)
}

#[test]
fn transactions_end_where_the_server_ends_them() {
    let (bytes, ends) = sample();
    let (outcome, found, walker) = walk(&bytes, usize::MAX);
    outcome.unwrap();
    assert_eq!(found.iter().map(|transaction| transaction.end).collect::<Vec<_>>(), ends);
    assert_eq!(found.iter().map(|transaction| transaction.at.as_second()).collect::<Vec<_>>(), [10, 13, 14, 15]);
    assert_eq!(found[1].id.to_string(), "3-7-2");
    assert_eq!(found[1].start, ends[0]);
    assert_eq!((walker.event_end(), walker.boundary()), (bytes.len() as u64, bytes.len() as u64));
    assert_eq!(walker.first_state(), Some(&LogState::MariaDb(Default::default())));
}

#[test]
fn a_log_that_is_encrypted_is_refused_by_name() {
    let mut log = Forge::new();
    log.event(event_type::START_ENCRYPTION, 1, &[0; 30]);
    let mysql = [&ENCRYPTED_MAGIC[..], &[7; 600]].concat();
    for bytes in [log.0, mysql] {
        let error = walk(&bytes, 100).0.unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.message().contains("encrypted"), "{error}");
    }
}

const UUID: [u8; 16] = *b"ABCDEFGHIJKLMNOP";

impl Forge {
    /// The event that begins a transaction of MySQL whose other events take so many bytes.
    fn mysql_gtid(&mut self, sequence: u64, at_microseconds: u64, rest: u64) {
        let kind = if sequence == 0 { event_type::MYSQL_ANONYMOUS_GTID } else { event_type::MYSQL_GTID };
        let mut body = vec![0];
        body.extend(UUID);
        body.extend(sequence.to_le_bytes());
        body.extend([2; 17]);
        body.extend(&at_microseconds.to_le_bytes()[..7]);
        let own = (HEADER_BYTES + body.len() + 9 + 4 + CHECKSUM_BYTES) as u64;
        body.push(254);
        body.extend(own.wrapping_add(rest).to_le_bytes());
        body.extend([0; 4]);
        self.event(kind, 5, &body);
    }
}

const OTHER_EVENT_BYTES: u64 = (HEADER_BYTES + 8 + CHECKSUM_BYTES) as u64;

fn mysql_sample() -> (Vec<u8>, Vec<u64>) {
    let mut log = Forge::new();
    let mut ends = Vec::new();
    log.event(event_type::MYSQL_PREVIOUS_GTIDS, 1, &[0; 8]);
    log.mysql_gtid(1, 7_000_001, 2 * OTHER_EVENT_BYTES);
    log.event(event_type::QUERY, 1, &[0; 8]);
    log.event(event_type::XID, 1, &[0; 8]);
    ends.push(log.0.len() as u64);
    // Compressed: one event, in which nothing is looked at, even if it looks like the end of the file.
    log.mysql_gtid(2, 8_000_000, OTHER_EVENT_BYTES);
    log.event(40, 1, &[4; 8]);
    ends.push(log.0.len() as u64);
    log.mysql_gtid(0, 9_000_000, OTHER_EVENT_BYTES);
    log.event(event_type::QUERY, 1, &[0; 8]);
    ends.push(log.0.len() as u64);
    log.event(event_type::ROTATE, 16, &[0; 8]);
    (log.0, ends)
}

#[test]
fn transactions_of_mysql_end_where_their_length_says_with_their_time_in_microseconds() {
    let (bytes, ends) = mysql_sample();
    let (outcome, found, walker) = walk(&bytes, 7);
    outcome.unwrap();
    assert_eq!(found.iter().map(|transaction| transaction.end).collect::<Vec<_>>(), ends);
    let times: Vec<i64> = found.iter().map(|transaction| transaction.at.as_microsecond()).collect();
    assert_eq!(times, [7_000_001, 8_000_000, 9_000_000]);
    assert_eq!(found[1].id.to_string(), "41424344-4546-4748-494a-4b4c4d4e4f50:2");
    assert_eq!((found[2].id, found[1].start), (TransactionId::Anonymous, ends[0]));
    assert_eq!(walker.first_state(), Some(&LogState::MySql(Default::default())));
    assert_eq!(walker.boundary(), bytes.len() as u64);
}

#[test]
fn a_length_that_lies_is_damage_and_no_transaction() {
    for rest in [OTHER_EVENT_BYTES - 1, OTHER_EVENT_BYTES + 1, u64::MAX / 2, u64::MAX - 10] {
        let mut log = Forge::new();
        let start = log.0.len() as u64;
        log.mysql_gtid(1, 1, rest);
        log.event(event_type::QUERY, 1, &[0; 8]);
        log.event(event_type::QUERY, 1, &[0; 8]);
        let (outcome, found, walker) = walk(&log.0, 1000);
        assert_eq!((found.len(), walker.boundary()), (0, start), "{rest}");
        assert!(outcome.is_err() || rest > 1 << 40, "{rest}");
    }
}

#[test]
fn the_flag_of_a_file_in_use_is_masked_wherever_the_piece_begins() {
    let (sealed, _) = sample();
    let mut open = sealed.clone();
    open[IN_USE_AT as usize] |= IN_USE_FLAG;
    for from in [0, 4, 20, 21, 22, 60] {
        let mut piece = open[from..].to_vec();
        mask_in_use(&mut piece, from as u64);
        assert!(piece == sealed[from..], "from {from}");
    }
}

proptest! {
    #[test]
    fn pieces_of_any_size_find_the_same(piece in 1usize..600) {
        let (bytes, _) = sample();
        prop_assert_eq!(walk(&bytes, piece).1, walk(&bytes, usize::MAX).1);
    }

    #[test]
    fn a_torn_log_shows_exactly_the_transactions_that_are_complete(cut in 0usize..900, piece in 1usize..100) {
        let (bytes, ends) = sample();
        let cut = cut.min(bytes.len());
        let (outcome, found, walker) = walk(&bytes[..cut], piece);
        outcome.unwrap();
        let found_ends: Vec<u64> = found.iter().map(|transaction| transaction.end).collect();
        let complete: Vec<u64> = ends.into_iter().filter(|end| *end <= cut as u64).collect();
        prop_assert_eq!(&found_ends, &complete);
        prop_assert!(walker.boundary() <= walker.event_end() && walker.event_end() <= cut as u64);
        prop_assert!(found_ends.last().is_none_or(|last| *last <= walker.boundary()));
    }

    #[test]
    fn a_walker_goes_on_at_any_event_as_if_it_had_walked_there(number in 0usize..3) {
        let (bytes, ends) = sample();
        let from = ends[number] as usize;
        let mut found = Vec::new();
        let mut walker = walk(&bytes[..from], 64).2.resumed_at(from as u64);
        walker.feed(&bytes[from..], &mut |transaction| { found.push(transaction); Ok(()) }).unwrap();
        prop_assert_eq!(found, walk(&bytes, 64).1[number + 1..].to_vec());
    }

    #[test]
    fn hostile_bytes_are_an_error_or_nothing_and_memory_stays_bounded(
        changes in prop::collection::vec((0usize..900, any::<u8>()), 1..8),
        tail in prop::collection::vec(any::<u8>(), 0..200),
        piece in 1usize..300,
    ) {
        let (mut bytes, _) = sample();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        bytes.extend(tail);
        let (_, _, walker) = walk(&bytes, piece);
        prop_assert!(walker.head.capacity() <= 2 * HEAD_BYTES_MAX && walker.tail.capacity() <= 4096);
    }
}
