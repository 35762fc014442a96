//! Containers that version 1 has written, kept in `tests/fixtures/repository`: they must be readable for ever.

use bytes::Bytes;

use crate::format::container::{ContainerIndex, ContainerKind, read_whole};
use crate::format::frame::ObjectSeal;
use crate::format::layout::{log_chunk_key, manifest_key, pack_key};
use crate::format::manifest::{Extent, ManifestEntry, PackRef, Run, block_hash, read_records};
use crate::format::summary::{LogObject, ManifestObject, PackObject};
use crate::model::backup::BackupKind;
use crate::model::id::{BackupId, IncarnationId, PackId};
use crate::model::position::Position;

fn incarnation() -> IncarnationId {
    IncarnationId::parse("01938c5e-0000-7000-8000-000000000001").unwrap()
}

fn pack() -> PackId {
    PackId::parse("01938c5e-0000-7000-8000-00000000000a").unwrap()
}

/// What the pack holds: a frame that zstd made small, and one that stayed as it was.
fn contents() -> [Vec<u8>; 2] {
    [b"keiki ".repeat(2000), (0..=255).collect()]
}

fn read(key: &str, kind: ContainerKind, bytes: &'static [u8]) -> (ObjectSeal, ContainerIndex, Vec<Bytes>) {
    let seal = ObjectSeal::of(key);
    let (index, contents) = read_whole(&seal, kind, &Bytes::from_static(bytes)).unwrap();
    (seal, index, contents)
}

#[test]
fn a_pack_of_version_1_is_read() {
    let bytes = include_bytes!("../../tests/fixtures/repository/v1-pack");
    let (seal, index, found) = read(&pack_key(incarnation(), pack()), ContainerKind::Pack, bytes);
    assert_eq!(found, contents());
    // The first is compressed, the second is not: both codecs are held.
    let lengths: Vec<_> = index.frames.iter().map(|frame| frame.stored_bytes < frame.plain_bytes).collect();
    assert_eq!(lengths, [true, false]);
    let owner = PackObject { incarnation: incarnation(), pack: pack() };
    assert_eq!(PackObject::parse(&seal, &index.summary).unwrap(), owner);
}

#[test]
fn a_chunk_of_log_of_version_1_is_read() {
    let bytes = include_bytes!("../../tests/fixtures/repository/v1-log-chunk");
    let key = log_chunk_key(incarnation(), "000000010000000000000007", 8192, 8192 + 12000).unwrap();
    let (seal, index, found) = read(&key, ContainerKind::Log, bytes);
    assert_eq!(found, contents()[..1]);
    let object = LogObject::parse(&seal, &index.summary).unwrap();
    assert_eq!(object.content_hash, blake3::hash(&contents()[0]).to_hex().as_str());
    assert_eq!((object.chunk.from_bytes, object.chunk.to_bytes, object.chunk.sealed), (8192, 20192, false));
    assert_eq!(object.summary.last_commit_at.unwrap().to_string(), "2026-11-21T09:59:00.25Z");
    assert_eq!(object.summary.named_points, [(String::from("before"), Position::parse("1@0/7003000").unwrap())]);
}

#[test]
fn a_manifest_of_version_1_is_read() {
    let bytes = include_bytes!("../../tests/fixtures/repository/v1-manifest");
    let id = BackupId::parse("20261121T095900Z-k3xq").unwrap();
    let (seal, index, found) = read(&manifest_key(incarnation(), &id), ContainerKind::Manifest, bytes);
    let object = ManifestObject::parse(&seal, &index.summary).unwrap();
    assert_eq!((object.record_count, object.backup.kind, object.backup.id), (4, BackupKind::Automatic, id));
    assert_eq!(object.backup.engine_facts["wal_segment_size"], "16777216");
    let records = read_records(incarnation(), &found[0]).unwrap();
    assert_eq!(records.len(), 4);
    assert_eq!(records[0], ManifestEntry::Directory { path: String::from("base"), mode: 0o700 });
    let link = ManifestEntry::Link { path: String::from("pg_tblspc/1"), mode: 0o777, to: String::from("/srv/ts") };
    assert_eq!(records[1], link);
    let ManifestEntry::Part(part) = &records[2] else { panic!("the third record is a file") };
    let reference = PackRef { incarnation: incarnation(), pack: pack() };
    assert_eq!((part.path.as_str(), part.bytes, part.is_last), ("base/1259", 12000 + 65536, true));
    assert_eq!(part.extents[1], Extent::Hole { bytes: 65536 });
    assert!(matches!(&part.extents[0], Extent::Run(Run { pack, offset: 16, .. }) if *pack == reference));
    assert_eq!(part.hashes.len(), 2);
    let ManifestEntry::Part(part) = &records[3] else { panic!("the fourth record is a file") };
    assert!(matches!(&part.extents[0], Extent::Run(Run { skip_bytes: 6, bytes: 250, .. })));
    assert_eq!(part.hashes, [block_hash(&contents()[1][6..])]);
}
