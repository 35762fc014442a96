//! Unit tests of `backup_writer`.

use std::collections::BTreeMap;

use super::*;
use crate::base::bulk::run_on_thread;
use crate::base::clock::Clock;
use crate::format::frame::FrameDecoder;
use crate::format::manifest::Extent;
use crate::model::backup::{BackupKind, FileKind, FileMeta};
use crate::model::position::Position;
use crate::repo::backup_reader::{BackupReader, Backups};
use crate::repo::restore_plan::plan_reads;
use crate::repo::test_site::{Site, noise, site};
use crate::store::faulty::{Fault, Operation, When};

const MIB: usize = 1 << 20;

type Files = BTreeMap<String, Vec<u8>>;

fn kind_of<T>(result: Result<T>) -> Kind {
    result.err().unwrap().kind()
}

fn backup_id(number: u64) -> BackupId {
    BackupId::new("2026-11-21T09:59:00Z".parse().unwrap(), number)
}

fn draft(site: &Site, id: BackupId) -> Backup {
    Backup {
        id,
        incarnation: site.incarnation,
        kind: BackupKind::Manual,
        start: Position::Count(1),
        stop: Position::Count(2),
        began_at: site.clock.now(),
        ended_at: site.clock.now(),
        engine_version: String::from("1"),
        file_count: 0,
        restored_bytes: 0,
        stored_bytes: 0,
        engine_facts: [(String::from("port"), String::from("5432"))].into(),
    }
}

async fn begin(site: &Site, id: BackupId) -> BackupWriter {
    let options = BackupOptions {
        job: JobId::fresh(),
        backup: id,
        host: String::from("a"),
        began_at: site.clock.now(),
        zstd_level: 1,
        spool_dir: std::env::temp_dir(),
    };
    BackupWriter::begin(site.repo.clone(), site.lease.clone(), options).await.unwrap()
}

fn meta(path: &str, kind: FileKind) -> FileMeta {
    FileMeta { path: path.to_string(), kind, mode: 0o600 }
}

/// Writes files through one lane on a thread, in pieces of `piece_bytes`.
async fn write(writer: &BackupWriter, files: Files, piece_bytes: usize) -> Result<()> {
    let mut lane = writer.lane();
    run_on_thread("lane", move || {
        for (path, content) in &files {
            lane.begin(meta(path, FileKind::Regular))?;
            for piece in content.chunks(piece_bytes) {
                lane.write(piece)?;
            }
            lane.end()?;
        }
        lane.finish()
    })
    .await
}

#[tokio::test]
async fn of_backups_that_began_in_the_same_second_the_later_one_is_the_newest() {
    let site = site().await;
    let backups = Backups::new(site.repo.clone());
    // The letters behind the second say nothing about the time.
    for (number, milliseconds) in [(1, 100), (3, 200), (2, 300), (0, 400), (4, 350)] {
        let writer = begin(&site, backup_id(number)).await;
        let began_at = site.clock.now() + std::time::Duration::from_millis(milliseconds);
        writer.publish(Backup { began_at, ended_at: began_at, ..draft(&site, backup_id(number)) }).await.unwrap();
    }
    let newest = backups.newest(site.incarnation, std::time::Duration::ZERO, |_| true).await.unwrap();
    assert_eq!(newest.unwrap().id, backup_id(0));
    assert_eq!(backups.newest_remembered(site.incarnation).await.unwrap().id, backup_id(0));
}

/// Restores a backup into memory, as a job does on disk. Also returns how many frames were decoded.
async fn restore(site: &Site, id: &BackupId) -> Result<(Files, usize)> {
    let reader = BackupReader::open(site.repo.clone(), site.incarnation, id).await?;
    let mut entries_of = reader.entries();
    let (mut files, mut decoded) = (Files::new(), 0);
    let mut decoder = FrameDecoder::new()?;
    while let Some(entries) = entries_of.next_batch().await? {
        for entry in &entries {
            if let ManifestEntry::Part(part) = entry {
                files.entry(part.path.clone()).or_default().resize((part.at + part.bytes) as usize, 0);
            }
        }
        for read in plan_reads(&entries) {
            let mut copies = read.copies.iter().peekable();
            let mut run = reader.read_run(read.pack, read.offsets).await?;
            while let Some(frame) = run.next().await? {
                decoded += 1;
                let content = frame.decode(&mut decoder)?;
                while let Some(copy) = copies.next_if(|copy| copy.frame_offset == frame.offset) {
                    let file = files.get_mut(entries[copy.entry].path()).unwrap();
                    let (at, bytes) = (copy.file_at as usize, copy.bytes as usize);
                    let skip = copy.skip_bytes as usize;
                    file[at..at + bytes].copy_from_slice(&content[skip..skip + bytes]);
                }
            }
            assert!(copies.next().is_none(), "a frame did not come");
        }
    }
    Ok((files, decoded))
}

async fn keys(site: &Site, part: &str) -> Vec<String> {
    let prefix = format!("incarnations/{}/{part}", site.incarnation);
    let found = site.store.list(&prefix, None, 1000).await.unwrap();
    found.iter().map(|object| object.key.to_string()).collect()
}

fn some_files() -> Files {
    let mut files = Files::new();
    files.insert(String::from("empty"), Vec::new());
    files.insert(String::from("exact"), noise(1, 2 * MIB));
    files.insert(String::from("holes"), [noise(2, MIB), vec![0; 3 * MIB], noise(3, MIB + 7), vec![0; 9]].concat());
    files.insert(String::from("zero"), vec![0; MIB + 1]);
    files.insert(String::from("long/end"), noise(4, MIB + 300_000));
    for number in 0..50u8 {
        files.insert(format!("small/{number}"), noise(number, usize::from(number) * 100));
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_several_lanes_reads_back_byte_for_byte() {
    let site = site().await;
    let writer = begin(&site, backup_id(1)).await;
    assert_eq!(keys(&site, "work/").await.len(), 1);
    let more: Files = some_files().into_iter().map(|(path, content)| (format!("b/{path}"), content)).collect();
    // Pieces that are aligned and pieces that are not.
    tokio::try_join!(write(&writer, some_files(), MIB), write(&writer, more.clone(), 77_777)).unwrap();
    let mut lane = writer.lane();
    run_on_thread("lane", move || {
        lane.begin(meta("base", FileKind::Directory))?;
        lane.begin(meta("link", FileKind::Link { to: String::from("/srv/x") }))?;
        lane.finish()
    })
    .await
    .unwrap();
    let published = writer.publish(draft(&site, backup_id(1))).await.unwrap();

    let mut expected = some_files();
    expected.extend(more);
    let total: usize = expected.values().map(Vec::len).sum();
    assert_eq!((published.file_count, published.restored_bytes), (expected.len() as u64, total as u64));
    assert_eq!(writer.progress().read_bytes, total as u64);
    let (restored, decoded) = restore(&site, &backup_id(1)).await.unwrap();
    assert!(restored == expected);
    // Per lane: 2 of 'exact', 1 + 1 of 'holes', 1 + 1 of 'long/end', 1 that all ends share. Holes are not stored.
    assert_eq!(decoded, 14);
    assert!(keys(&site, "work/").await.is_empty());
    let list = Backups::new(site.repo.clone()).list(site.incarnation).await.unwrap();
    assert_eq!((list.backups, list.unreadable), (vec![published], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_is_cut_into_parts_and_packs_stay_below_their_limit() {
    let site = site().await;
    let writer = begin(&site, backup_id(1)).await;
    let files =
        Files::from([(String::from("big"), noise(1, 131 * MIB + 5)), (String::from("part"), noise(2, 64 * MIB))]);
    write(&writer, files.clone(), MIB).await.unwrap();
    writer.publish(draft(&site, backup_id(1))).await.unwrap();
    let packs = site.store.list(&layout::packs_prefix(site.incarnation), None, 1000).await.unwrap();
    assert!(packs.len() == 4 && packs.iter().all(|pack| pack.size_bytes <= 64 << 20), "{packs:?}");
    assert!(restore(&site, &backup_id(1)).await.unwrap().0 == files);
    let reader = BackupReader::open(site.repo.clone(), site.incarnation, &backup_id(1)).await.unwrap();
    let entries = reader.entries().next_batch().await.unwrap().unwrap();
    let parts: Vec<_> = entries
        .iter()
        .map(|entry| match entry {
            ManifestEntry::Part(part) => {
                let runs = part.extents.iter().filter(|extent| matches!(extent, Extent::Run(_))).count();
                (part.at >> 20, part.bytes >> 20, part.is_last, runs <= 3)
            }
            _ => panic!("only files were written"),
        })
        .collect();
    assert_eq!(parts.iter().filter(|part| part.2).count(), 2);
    assert!(parts.contains(&(0, 64, false, true)) && parts.contains(&(128, 3, true, true)), "{parts:?}");
    assert!(parts.contains(&(0, 64, true, true)), "a file of exactly one part has one record: {parts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_shrinks_to_nothing_does_not_make_packs_without_end() {
    let site = site().await;
    let writer = begin(&site, backup_id(1)).await;
    let mut lane = writer.lane();
    run_on_thread("lane", move || {
        lane.begin(meta("f", FileKind::Regular))?;
        let frame = vec![7; MIB];
        (0..4200).try_for_each(|_| lane.write(&frame))?;
        lane.end()?;
        lane.finish()
    })
    .await
    .unwrap();
    let published = writer.publish(draft(&site, backup_id(1))).await.unwrap();
    assert_eq!(keys(&site, "packs/").await.len(), 2);
    assert_eq!(published.restored_bytes, 4200 << 20);
    assert!(published.stored_bytes < 2 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_backup_leaves_nothing() {
    let site = site().await;
    let writer = begin(&site, backup_id(1)).await;
    write(&writer, some_files(), MIB).await.unwrap();
    let mut lane = writer.lane();
    run_on_thread("lane", move || {
        lane.begin(meta("f", FileKind::Regular))?;
        lane.write(&noise(1, 3 * MIB))
    })
    .await
    .unwrap();
    assert_eq!(kind_of(writer.publish(draft(&site, backup_id(1))).await), Kind::Internal);
    writer.abort().await.unwrap();
    assert!(keys(&site, "").await.iter().all(|key| key.ends_with("lease.json")), "{:?}", keys(&site, "").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_was_given_up_does_not_remain_without_its_packs() {
    let site = site().await;
    let writer = begin(&site, backup_id(1)).await;
    write(&writer, some_files(), MIB).await.unwrap();
    site.faults.inject_for_key(Operation::PutStream, "manifest", When::First(1), Fault::AnswerLost);
    assert_eq!(kind_of(writer.publish(draft(&site, backup_id(1))).await), Kind::Unreachable);
    assert_eq!(keys(&site, "backups/").await.len(), 1);
    writer.abort().await.unwrap();
    assert!(keys(&site, "backups/").await.is_empty() && keys(&site, "packs/").await.is_empty());

    let published = begin(&site, backup_id(2)).await;
    write(&published, some_files(), MIB).await.unwrap();
    published.publish(draft(&site, backup_id(2))).await.unwrap();
    assert_eq!(kind_of(published.abort().await), Kind::Internal);
    assert!(restore(&site, &backup_id(2)).await.unwrap().0 == some_files());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_cannot_be_stored_fails_the_lane_with_its_reason_and_the_backup() {
    for fault in [Fault::Fail(Kind::Full), Fault::CutBody(1 << 20)] {
        let site = site().await;
        let writer = begin(&site, backup_id(1)).await;
        site.faults.inject_for_key(Operation::PutStream, "packs/", When::First(1), fault.clone());
        let error = write(&writer, Files::from([(String::from("f"), noise(1, 20 * MIB))]), MIB).await.unwrap_err();
        let expected = if fault == Fault::Fail(Kind::Full) { Kind::Full } else { Kind::Unreachable };
        assert_eq!(error.kind(), expected, "{error}");
        assert!(error.message().contains("cannot store pack"), "{error}");
        assert_eq!(kind_of(writer.publish(draft(&site, backup_id(1))).await), Kind::Internal);
        assert!(keys(&site, "backups/").await.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_whose_answer_was_lost_can_be_repeated_and_another_one_cannot_take_its_name() {
    let site = site().await;
    let writer = begin(&site, backup_id(1)).await;
    write(&writer, some_files(), MIB).await.unwrap();
    site.faults.inject_for_key(Operation::PutStream, "manifest", When::First(1), Fault::AnswerLost);
    assert_eq!(kind_of(writer.publish(draft(&site, backup_id(1))).await), Kind::Unreachable);
    let published = writer.publish(draft(&site, backup_id(1))).await.unwrap();
    assert_eq!(published.file_count, some_files().len() as u64);

    let second = begin(&site, backup_id(1)).await;
    write(&second, Files::new(), MIB).await.unwrap();
    assert_eq!(kind_of(second.publish(draft(&site, backup_id(1))).await), Kind::Conflict);
    assert!(restore(&site, &backup_id(1)).await.unwrap().0 == some_files());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_published_without_the_lease() {
    let site = site().await;
    let writer = begin(&site, backup_id(1)).await;
    write(&writer, some_files(), MIB).await.unwrap();
    site.clock.advance(std::time::Duration::from_secs(31));
    assert_eq!(kind_of(writer.publish(draft(&site, backup_id(1))).await), Kind::Unreachable);
    assert!(keys(&site, "backups/").await.is_empty());
    site.lease.renew(None).await.unwrap();
    writer.publish(draft(&site, backup_id(1))).await.unwrap();
}

async fn small_backup(site: &Site) -> Files {
    let writer = begin(site, backup_id(1)).await;
    let files = Files::from([(String::from("a"), b"content of a".to_vec()), (String::from("b"), noise(1, 700))]);
    write(&writer, files.clone(), MIB).await.unwrap();
    writer.publish(draft(site, backup_id(1))).await.unwrap();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn every_flipped_bit_in_what_is_read_of_a_backup_is_damage_that_names_the_object_and_a_way_out() {
    let site = site().await;
    small_backup(&site).await;
    let pack = keys(&site, "packs/").await.remove(0);
    let manifest = keys(&site, "backups/").await.remove(0);
    // A restore reads the frames of a pack, and everything of a manifest but its head.
    let frames_end = {
        let size = site.read_object(&pack).await.len() as u64;
        let store = site.store.as_ref();
        let kind = crate::format::container::ContainerKind::Pack;
        let open = crate::repo::objects::open_object(store, &Key::parse(&pack).unwrap(), size, kind).await.unwrap();
        open.index.frames.iter().map(|frame| frame.stored_bytes as usize).sum::<usize>() + 16
    };
    for (key, range) in [(&pack, 16..frames_end), (&manifest, 16..site.read_object(&manifest).await.len())] {
        let good = site.read_object(key).await;
        for at in range {
            let mut bad = good.to_vec();
            bad[at] ^= 1;
            site.replace_object(key, bad).await;
            let error = restore(&site, &backup_id(1)).await.expect_err("a flipped bit was restored");
            assert_eq!(error.kind(), Kind::Damaged, "{key} {at}: {error}");
            assert!(
                error.message().contains(key.as_str()) && error.message().contains("cannot read backup"),
                "{error}"
            );
            assert!(error.hint_text().unwrap().contains("keiki backup list"), "{error}");
        }
        site.replace_object(key, good.to_vec()).await;
    }
    restore(&site, &backup_id(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_or_shortened_pack_is_damage_of_the_backup_that_needs_it() {
    let site = site().await;
    small_backup(&site).await;
    let pack = keys(&site, "packs/").await.remove(0);
    let good = site.read_object(&pack).await;
    site.replace_object(&pack, good[..40].to_vec()).await;
    assert_eq!(kind_of(restore(&site, &backup_id(1)).await), Kind::Damaged);
    site.store.delete(&[Key::parse(&pack).unwrap()]).await.unwrap();
    let error = restore(&site, &backup_id(1)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged);
    assert!(error.message().contains(&backup_id(1).to_string()) && error.message().contains(&pack), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_manifest_does_not_hide_the_other_backups() {
    let site = site().await;
    small_backup(&site).await;
    let writer = begin(&site, backup_id(2)).await;
    writer.publish(draft(&site, backup_id(2))).await.unwrap();
    let damaged =
        keys(&site, "backups/").await.into_iter().find(|key| key.contains(&backup_id(1).to_string())).unwrap();
    site.replace_object(&damaged, b"KEIKI".to_vec()).await;
    let list = Backups::new(site.repo.clone()).list(site.incarnation).await.unwrap();
    assert_eq!(list.backups.len(), 1);
    assert_eq!((&list.unreadable[0].0, list.unreadable[0].1.kind()), (&backup_id(1), Kind::Damaged));
    assert_eq!(kind_of(BackupReader::open(site.repo.clone(), site.incarnation, &backup_id(3)).await), Kind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_the_newest_backup_again_and_again_reads_a_damaged_manifest_once() {
    let site = site().await;
    small_backup(&site).await;
    let manifest = keys(&site, "backups/").await.remove(0);
    let good = site.read_object(&manifest).await;
    let mut bad = good.to_vec();
    bad[20] ^= 1;
    let last = bad.len() - 1;
    bad[last] ^= 1;
    site.replace_object(&manifest, bad).await;
    let repo = Repository::open(site.repo.store().clone()).await.unwrap();
    let backups = Backups::new(repo);
    let newest = || backups.newest(site.incarnation, std::time::Duration::ZERO, |_| true);
    assert_eq!(newest().await.unwrap(), None);
    let gets = site.faults.calls(Operation::Get);
    for _ in 0..3 {
        assert_eq!(newest().await.unwrap(), None);
    }
    assert_eq!(site.faults.calls(Operation::Get), gets);
    // Who lists all of them looks himself, and another object is another matter.
    assert_eq!(backups.list(site.incarnation).await.unwrap().unreadable.len(), 1);
    assert!(site.faults.calls(Operation::Get) > gets);
    site.replace_object(&manifest, good.to_vec()).await;
    assert_eq!(newest().await.unwrap().unwrap().id, backup_id(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_stops_is_a_temporary_error_and_not_damage() {
    let site = site().await;
    small_backup(&site).await;
    site.faults.inject_for_key(Operation::Get, "packs/", When::First(1), Fault::CutBody(50));
    assert_eq!(kind_of(restore(&site, &backup_id(1)).await), Kind::Unreachable);
    restore(&site, &backup_id(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_many_small_files_needs_few_frames_and_a_manifest_of_many_frames_is_read_whole() {
    let site = site().await;
    let writer = begin(&site, backup_id(1)).await;
    let mut files = Files::new();
    for number in 0..9000u32 {
        files.insert(format!("dir/with/a/long/name/{number}"), number.to_le_bytes().repeat(3));
    }
    write(&writer, files.clone(), MIB).await.unwrap();
    writer.publish(draft(&site, backup_id(1))).await.unwrap();
    let reader = BackupReader::open(site.repo.clone(), site.incarnation, &backup_id(1)).await.unwrap();
    let mut entries = reader.entries();
    let mut batches = 0;
    while entries.next_batch().await.unwrap().is_some() {
        batches += 1;
    }
    assert!(batches > 1);
    let (restored, decoded) = restore(&site, &backup_id(1)).await.unwrap();
    assert!(restored == files);
    // Three shared frames of 4096 files at most; one that two batches need is decoded twice.
    assert!(decoded <= 3 + batches, "{decoded}");
}
