//! The walker against a plain model of what a server writes, and against bytes that no server writes.

use proptest::prelude::*;

use super::*;

/// A unit of the log: an annotation, a command, or a transaction of commands.
#[derive(Debug, Clone)]
enum Unit {
    Second(i64),
    Command(Vec<Vec<u8>>),
    Transaction(Vec<Vec<Vec<u8>>>),
}

fn command(arguments: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", arguments.len()).into_bytes();
    for argument in arguments {
        bytes.extend(format!("${}\r\n", argument.len()).into_bytes());
        bytes.extend(argument);
        bytes.extend(b"\r\n");
    }
    bytes
}

fn encode(unit: &Unit) -> Vec<u8> {
    match unit {
        Unit::Second(second) => format!("#TS:{second}\r\n").into_bytes(),
        Unit::Command(arguments) => command(arguments),
        Unit::Transaction(commands) => {
            let mut bytes = command(&[b"MULTI".to_vec()]);
            commands.iter().for_each(|one| bytes.extend(command(one)));
            bytes.extend(command(&[b"exec".to_vec()]));
            bytes
        }
    }
}

fn arguments() -> impl Strategy<Value = Vec<Vec<u8>>> {
    // Values that look like the syntax around them are what a careless reader falls for.
    let hostile = prop_oneof![
        Just(b"\r\n*1\r\n$5\r\nMULTI\r\n".to_vec()),
        Just(b"#TS:99999999999\r\n".to_vec()),
        Just(b"$3\r\n".to_vec()),
        proptest::collection::vec(any::<u8>(), 0..40),
    ];
    proptest::collection::vec(hostile, 0..4).prop_map(|values| {
        let mut arguments = vec![b"SET".to_vec()];
        arguments.extend(values);
        arguments
    })
}

fn units() -> impl Strategy<Value = Vec<Unit>> {
    let unit = prop_oneof![
        (1_000i64..1_100).prop_map(Unit::Second),
        arguments().prop_map(Unit::Command),
        proptest::collection::vec(arguments(), 0..4).prop_map(Unit::Transaction),
    ];
    proptest::collection::vec(unit, 0..12)
}

fn walk(bytes: &[u8], piece: usize) -> (Vec<Mark>, AofWalker) {
    let mut walker = AofWalker::new(0);
    let mut marks = Vec::new();
    for part in bytes.chunks(piece) {
        walker.feed(part, |mark| marks.push(mark)).unwrap();
    }
    (marks, walker)
}

proptest! {
    #[test]
    fn every_end_of_a_unit_is_a_boundary_and_nothing_else_is(units in units(), piece in 1usize..50) {
        let mut bytes = Vec::new();
        let mut wanted = Vec::new();
        for unit in &units {
            if let Unit::Second(second) = unit {
                wanted.push(Mark::Second { at: bytes.len() as u64, unix_seconds: *second });
            }
            bytes.extend(encode(unit));
            wanted.push(Mark::Boundary { at: bytes.len() as u64 });
        }
        let (marks, walker) = walk(&bytes, piece);
        prop_assert_eq!(marks, wanted);
        prop_assert_eq!(walker.boundary(), bytes.len() as u64);
        walker.finish().unwrap();
    }

    #[test]
    fn a_torn_end_is_never_a_boundary(units in units(), keep in 0.0f64..1.0) {
        let bytes: Vec<u8> = units.iter().flat_map(encode).collect();
        let keep = (bytes.len() as f64 * keep) as usize;
        let (_, walker) = walk(&bytes[..keep], 7);
        let mut ends = vec![0u64];
        for unit in &units {
            ends.push(ends.last().unwrap() + encode(unit).len() as u64);
        }
        let wanted = ends.iter().rev().find(|end| **end <= keep as u64).unwrap();
        prop_assert_eq!(walker.boundary(), *wanted);
        prop_assert_eq!(walker.finish().is_ok(), *wanted == keep as u64);
    }

    #[test]
    fn hostile_bytes_never_panic_and_take_no_memory(bytes: Vec<u8>, text in "[*$#TS:0-9\r\na-c]{0,60}", piece in 1usize..30) {
        for bytes in [&bytes[..], text.as_bytes()] {
            let mut walker = AofWalker::new(0);
            for part in bytes.chunks(piece) {
                let _ = walker.feed(part, |_| {});
                prop_assert!(walker.line.capacity() <= 2 * ANNOTATION_BYTES_MAX && walker.name.capacity() <= 64);
                prop_assert!(walker.boundary() <= walker.at());
            }
        }
    }

    #[test]
    fn skipping_the_inside_of_values_changes_nothing(units in units()) {
        let bytes: Vec<u8> = units.iter().flat_map(encode).collect();
        let (wanted, _) = walk(&bytes, bytes.len().max(1));
        let mut walker = AofWalker::new(0);
        let mut marks = Vec::new();
        while (walker.at() as usize) < bytes.len() {
            if walker.skippable() > 0 {
                walker.skip(walker.skippable());
            } else {
                let at = walker.at() as usize;
                walker.feed(&bytes[at..at + 1], |mark| marks.push(mark)).unwrap();
            }
        }
        prop_assert_eq!(marks, wanted);
    }
}

#[test]
fn a_value_of_any_claimed_length_is_counted_and_not_kept() {
    let mut walker = AofWalker::new(0);
    walker.feed(b"*2\r\n$3\r\nSET\r\n$9000000000000000000\r\nabc", |_| {}).unwrap();
    assert_eq!(walker.skippable(), 9_000_000_000_000_000_000 - 3);
    assert_eq!(walker.boundary(), 0);
    assert!(walker.finish().is_err());
}

#[test]
fn what_no_server_writes_is_damage_with_its_place() {
    let cases: [(&[u8], u64); 9] = [
        (b"SET a 1\r\n", 0),
        (b"\0\0\0\0", 0),
        (b"*0\r\n", 1),
        (b"*-1\r\n", 1),
        (b"*1\n", 1),
        (b"*1\r\n*1\r\n", 4),
        (b"*1\r\n$1\r\nab\r\n", 9),
        (b"*99999999999\r\n", 1),
        (b"#TS:soon\r\n", 1),
    ];
    for (bytes, at) in cases {
        let mut walker = AofWalker::new(0);
        let damage = walker.feed(bytes, |_| {}).unwrap_err();
        assert_eq!(damage.at, at, "{:?}: {}", String::from_utf8_lossy(bytes), damage.why);
        assert_eq!(walker.feed(b"*1\r\n", |_| {}), Err(damage));
    }
}

#[test]
fn the_walker_knows_the_database_the_history_and_what_changes_nothing() {
    let id = "0123456789abcdef0123456789abcdef01234567";
    let select = |database: &str| String::from_utf8(command(&[b"select".to_vec(), database.into()])).unwrap();
    let set = String::from_utf8(command(&[b"SET".to_vec(), b"k".to_vec(), b"SELECT".to_vec()])).unwrap();
    let ping = String::from_utf8(command(&[b"PING".to_vec()])).unwrap();
    let ask = String::from_utf8(command(&[b"REPLCONF".to_vec(), b"GETACK".to_vec(), b"*".to_vec()])).unwrap();
    let head = history_line(id, 7) + &select("3") + &received_line(5, 7);
    let text = format!("{head}{set}{ping}{ask}{}{}", executed_line(6, 9), select("12"));
    for piece in [1, 2, 5, 1000] {
        let mut walker = AofWalker::new(0);
        let mut marks = Vec::new();
        for part in text.as_bytes().chunks(piece) {
            let seen = |mark: Mark| match mark {
                Mark::Boundary { .. } | Mark::Second { .. } => {}
                mark => marks.push(mark),
            };
            walker.feed(part, seen).unwrap();
        }
        assert_eq!((walker.database(), walker.history()), (Some(12), Some(id)));
        assert_eq!(walker.changed(), (head.len() + set.len()) as u64, "{piece}");
        let place = |line: String| {
            let at = text.find(&line).unwrap() as u64;
            (at, at + line.len() as u64)
        };
        let ((one, one_end), (two, two_end)) = (place(received_line(5, 7)), place(executed_line(6, 9)));
        assert_eq!(
            marks,
            [
                Mark::Received { at: one, end: one_end, unix_millis: 5, stream_offset: 7 },
                Mark::Executed { at: two, end: two_end, unix_millis: 6, stream_offset: 9 },
            ]
        );
    }
}

#[test]
fn annotations_that_only_look_like_ours_are_passed_over() {
    for line in ["#KEIKI-AT:\r\n", "#KEIKI-AT:x:1\r\n", "#KEIKI-OF:short:1\r\n", "#KEIKI-BY:1\r\n", "#else\r\n"] {
        let mut walker = AofWalker::new(0);
        walker.feed(line.as_bytes(), |mark| assert!(matches!(mark, Mark::Boundary { .. }), "{mark:?}")).unwrap();
        assert_eq!((walker.history(), walker.boundary(), walker.changed()), (None, line.len() as u64, 0));
    }
}
