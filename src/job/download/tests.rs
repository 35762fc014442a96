//! Unit tests of `download`.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use super::*;
use crate::engine::fake::record::{Event, RECORD_BYTES};
use crate::job::testing::Site;
use crate::store::read::read_all;
use crate::store::{Key, PutCondition};

struct Silent;

impl Progress for Silent {
    fn set(&self, _done: u64, _total: u64) {}
    fn note(&self, _text: String) {}
}

/// What a test gives away and looks at afterwards.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A database with files of all sizes, and a backup of it that has log of its own.
async fn scene() -> (Site, Incarnation, Backup) {
    let site = Site::new().await;
    let archiver = site.archiver().await;
    let incarnation = site.incarnation(&archiver).await;
    let root = site.database.data_dir.join("extra");
    std::fs::create_dir_all(root.join("deeply/nested").join("n".repeat(120))).unwrap();
    for number in 0..200u32 {
        std::fs::write(root.join(format!("small-{number}")), number.to_string().repeat(100)).unwrap();
    }
    let mut noise = vec![0; 3 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    std::fs::write(root.join("large"), &noise).unwrap();
    std::fs::write(root.join("empty"), b"").unwrap();
    let holes = std::fs::File::create(root.join("holes")).unwrap();
    holes.set_len(70 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&holes, b"end", (70 << 20) - 3).unwrap();
    site.write(100);
    site.engine.during_next_backup(|database| {
        for value in 100..300 {
            database.write(value).unwrap();
        }
    });
    let backup = site.back_up(&archiver).await;
    (site, incarnation, backup)
}

async fn into_directory(site: &Site, incarnation: &Incarnation, backup: &Backup, place: &Path) -> Result<Downloaded> {
    let mut output = DirectoryOutput::begin(place)?;
    download(&site.repo, incarnation, &backup.id, &mut output, &Silent).await
}

fn names_below(root: &Path) -> Vec<String> {
    let found = Command::new("find").arg(root).args(["-mindepth", "1", "-printf", "%P %y\n"]).output().unwrap();
    let mut names: Vec<String> = String::from_utf8(found.stdout).unwrap().lines().map(str::to_string).collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_directory_and_a_tar_stream_hold_the_same_files_and_the_log_of_the_span() {
    let (site, incarnation, backup) = scene().await;
    assert!(backup.start < backup.stop);
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("plain");
    let done = into_directory(&site, &incarnation, &backup, &place).await.unwrap();
    assert_eq!(done.bytes, backup.restored_bytes);
    let extra = site.database.data_dir.join("extra");
    let same = Command::new("diff").arg("-r").arg(&extra).arg(place.join("extra")).output().unwrap();
    assert!(same.status.success(), "{}", String::from_utf8_lossy(&same.stdout));
    // From 100 to 300 of 64 each: files 1 to 4.
    assert_eq!(done.log_files, 4);
    let mut events = 64;
    for number in 1..=4 {
        let bytes = std::fs::read(place.join(format!("log/{number:08}"))).unwrap();
        for record in bytes.chunks(RECORD_BYTES) {
            events += 1;
            Event::decode(record, events).unwrap();
        }
    }
    assert_eq!(events, 300);

    let tar = Shared::default();
    let mut output = TarOutput::new(Box::new(tar.clone()), 1_700_000_000, Box::new(|_| Ok(())));
    let of_tar = download(&site.repo, &incarnation, &backup.id, &mut output, &Silent).await.unwrap();
    assert_eq!(of_tar, done);
    let archive = dir.path().join("plain.tar");
    std::fs::write(&archive, &*tar.0.lock().unwrap()).unwrap();
    let unpacked = dir.path().join("unpacked");
    std::fs::create_dir(&unpacked).unwrap();
    let outcome = Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&unpacked).output().unwrap();
    assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
    assert_eq!(names_below(&unpacked), names_below(&place));
    let same = Command::new("diff").arg("-r").arg(&place).arg(&unpacked).output().unwrap();
    assert!(same.status.success(), "{}", String::from_utf8_lossy(&same.stdout));
}

async fn flip_a_bit(site: &Site, key: &Key) {
    let mut bytes = read_all(site.store.as_ref(), key, 1 << 30).await.unwrap().to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    site.store.put(key, Bytes::from(bytes), PutCondition::Replace).await.unwrap();
}

#[tokio::test]
async fn damage_is_found_and_leaves_neither_a_directory_nor_a_whole_stream() {
    let (site, incarnation, backup) = scene().await;
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("plain");
    for key in [site.keys("/packs/").await.remove(0), site.keys("/log/00000002/").await.remove(0)] {
        let key = Key::parse(&key).unwrap();
        let good = read_all(site.store.as_ref(), &key, 1 << 30).await.unwrap();
        flip_a_bit(&site, &key).await;
        let error = into_directory(&site, &incarnation, &backup, &place).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Damaged, "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let tar = Shared::default();
        let mut output = TarOutput::new(Box::new(tar.clone()), 0, Box::new(|_| panic!("it is not complete")));
        download(&site.repo, &incarnation, &backup.id, &mut output, &Silent).await.unwrap_err();
        assert!(!tar.0.lock().unwrap().ends_with(&[0; 1024]));
        site.store.put(&key, good, PutCondition::Replace).await.unwrap();
    }
    site.store.delete(&[Key::parse(&site.keys("/log/00000003/").await[0]).unwrap()]).await.unwrap();
    let error = into_directory(&site, &incarnation, &backup, &place).await.unwrap_err();
    assert!(error.message().ends_with("is not in the repository"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn nothing_that_is_there_is_written_into() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |place: &Path| DirectoryOutput::begin(place).err().unwrap();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    assert_eq!(refused(dir.path()).kind(), Kind::Conflict);
    refused(&dir.path().join("file"));
    let place = dir.path().join("plain");
    std::fs::create_dir(dir.path().join("plain.keiki-partial")).unwrap();
    assert!(refused(&place).hint_text().unwrap().contains("remove it"));
    assert!(dir.path().join("plain.keiki-partial").exists());
}
