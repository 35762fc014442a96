//! Unit tests of `manifest`.

use super::*;
use proptest::prelude::*;

fn own() -> IncarnationId {
    IncarnationId::parse("01938c5e-0000-7000-8000-000000000001").unwrap()
}

fn pack(last: char, incarnation: IncarnationId) -> PackRef {
    PackRef { incarnation, pack: PackId::parse(&format!("01938c5e-0000-7000-8000-00000000000{last}")).unwrap() }
}

fn ancestor() -> IncarnationId {
    IncarnationId::parse("01938c5e-0000-7000-8000-000000000002").unwrap()
}

fn part() -> FilePart {
    let block = HASHED_BLOCK_BYTES;
    FilePart {
        path: String::from("base/5/1259"),
        mode: 0o600,
        at: PART_BYTES,
        bytes: 3 * block + 5,
        is_last: true,
        extents: vec![
            Extent::Run(Run { pack: pack('a', own()), offset: 16, skip_bytes: 7, bytes: block, frames: vec![100] }),
            Extent::Hole { bytes: block },
            Extent::Run(Run {
                pack: pack('b', ancestor()),
                offset: 116,
                skip_bytes: (FRAME_PLAIN_BYTES_MAX - 1) as u32,
                bytes: block + 5,
                frames: vec![50, 60],
            }),
        ],
        hashes: vec![[1; 16], [0xfe; 16], [2; 16], [3; 16]],
    }
}

fn text_of(entry: &ManifestEntry) -> String {
    let mut out = Vec::new();
    write_record(own(), entry, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn records_read_back() {
    let entries = [
        ManifestEntry::Directory { path: String::from("base"), mode: 0o700 },
        ManifestEntry::Link { path: String::from("pg_tblspc/1"), mode: 0o777, to: String::from("/srv/a b\n") },
        ManifestEntry::Part(part()),
        ManifestEntry::Part(FilePart {
            path: String::from("ordentlich/größe"),
            mode: 0,
            at: 0,
            bytes: 0,
            is_last: true,
            extents: vec![],
            hashes: vec![],
        }),
    ];
    let text: String = entries.iter().map(text_of).collect();
    assert_eq!(text.lines().count(), entries.len());
    assert_eq!(read_records(own(), text.as_bytes()).unwrap(), entries);
}

#[test]
fn the_packs_of_an_ancestor_stay_the_ancestors() {
    // Read as the manifest of a clone, the same text names other packs where no incarnation is given.
    let text = text_of(&ManifestEntry::Part(part()));
    assert_eq!(text.matches(&ancestor().to_string()).count(), 1);
    assert_eq!(text.matches(&own().to_string()).count(), 0);
}

#[test]
fn a_record_that_does_not_add_up_is_refused() {
    let good = text_of(&ManifestEntry::Part(part()));
    for (from, to) in [
        ("\"bytes\":196613", "\"bytes\":196612"),
        ("\"at\":67108864", "\"at\":67108865"),
        ("\"at\":67108864", "\"at\":18446744073642442752"),
        (",\"end\":true", ""),
        ("65536,[1,", "18446744073709551615,[1,"),
        ("[0,16,", "[2,16,"),
        ("[0,16,", "[0,15,"),
        ("[100]", "[32]"),
        ("[100]", "[1048609]"),
        ("[100]", "[100,100]"),
        ("[50,60]", "[50]"),
        (",7,65536", ",7,0"),
        ("\"0600\"", "\"0800\""),
        ("\"0600\"", "\"70000\""),
        ("\"hashes\":\"01", "\"hashes\":\"0"),
        ("\"hashes\":\"01", "\"hashes\":\"0g"),
        ("\"hashes\":\"", "\"hashes\":\"01010101010101010101010101010101"),
        ("base/5/1259", "base/../../etc/passwd"),
        ("base/5/1259", "/etc/passwd"),
        ("base/5/1259", ""),
        ("\"file\"", "\"files\""),
        ("\"file\"", "\"dir\":\"x\",\"file\""),
    ] {
        assert!(good.contains(from), "{from} not in {good}");
        let error = read_records(own(), good.replacen(from, to, 1).as_bytes()).expect_err(to);
        assert_eq!(error.kind(), Kind::Damaged, "{to}: {error}");
    }
}

#[test]
fn a_frame_that_ends_in_the_middle_of_a_line_is_refused() {
    let good = text_of(&ManifestEntry::Directory { path: String::from("a"), mode: 0o700 });
    for length in 0..good.len() {
        assert!(read_records(own(), &good.as_bytes()[..length]).is_err(), "{length}");
    }
}

proptest! {
    #[test]
    fn any_path_that_is_allowed_reads_back(path in "[^\u{0}]{1,20}", mode in 0..=0o7777u32) {
        let entry = ManifestEntry::Directory { path: path.clone(), mode };
        let read_back = read_records(own(), text_of(&entry).as_bytes());
        match check_path(&path) {
            Ok(()) => prop_assert_eq!(read_back.unwrap(), vec![entry]),
            Err(_) => prop_assert!(read_back.is_err()),
        }
    }

    #[test]
    fn foreign_bytes_never_panic(text in "[\\[\\]{}\",:a-f0-9\n]{0,60}") {
        let _ = read_records(own(), text.as_bytes());
        let _ = read_records(own(), format!("{{\"file\":\"a\",\"mode\":\"0\",\"extents\":[{text}]}}\n").as_bytes());
    }
}
