//! What a directory promises beyond the contract: crashes, full disks, wrong directories.

use std::path::Path;
use std::time::{Duration, SystemTime};

use futures_util::stream;
use keiki::error::Error;

use super::*;
use keiki::store::PutCondition;
use keiki::store::read::{body_from_bytes, read_all};

fn unfinished(root: &Path) -> Vec<String> {
    let names = std::fs::read_dir(root.join(".tmp")).unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).filter(|name| !name.starts_with("lock-")).collect()
}

#[tokio::test]
async fn no_put_leaves_an_unfinished_file_however_it_ends() {
    let fixture = directory();
    let root = fixture.directory.as_ref().unwrap().path();
    let store = &fixture.store;
    store.put(&key("a"), noise(10, 1), PutCondition::Create).await.unwrap();
    store.put(&key("a"), noise(10, 1), PutCondition::Create).await.unwrap_err();
    let tag = store.put(&key("a"), noise(10, 2), PutCondition::Replace).await.unwrap();
    store.put(&key("a/b"), noise(10, 1), PutCondition::Create).await.unwrap_err();
    store.put(&key("b"), noise(10, 1), PutCondition::IfMatch(tag)).await.unwrap_err();
    let failing = stream::iter([Ok(noise(1 << 20, 1)), Err(Error::new(Kind::Damaged, "broken"))]);
    store.put_stream(&key("c"), Box::pin(failing), PutCondition::Create).await.unwrap_err();
    assert!(unfinished(root).is_empty(), "{:?}", unfinished(root));
    let endless = stream::pending();
    let name = key("d");
    let given_up = store.put_stream(&name, Box::pin(endless), PutCondition::Create);
    assert!(tokio::time::timeout(Duration::from_millis(50), given_up).await.is_err());
    while !unfinished(root).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_a_dead_writer_left_is_not_listed_and_goes_after_a_day() {
    let fixture = directory();
    let root = fixture.directory.as_ref().unwrap().path();
    let file = |name: &str, hours: u64| {
        let file = std::fs::File::create(root.join(".tmp").join(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
    };
    file("old.part", 25);
    file("young.part", 23);
    file("lock-00", 1000);
    assert!(fixture.store.list("", None, 10).await.unwrap().is_empty());
    let _again = FsStore::open(root).unwrap();
    assert_eq!(unfinished(root), ["young.part"]);
    assert!(root.join(".tmp/lock-00").exists());
}

#[test]
fn a_missing_root_is_refused_with_a_hint_and_a_file_is_no_root() {
    let outer = tempfile::tempdir().unwrap();
    let error = FsStore::open(&outer.path().join("none")).err().unwrap();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.hint_text().unwrap().contains("mounted"));
    std::fs::write(outer.path().join("file"), b"").unwrap();
    assert_eq!(FsStore::open(&outer.path().join("file")).err().unwrap().kind(), Kind::BadInput);
}

#[tokio::test]
async fn a_root_whose_file_system_went_away_says_so_and_calls_nothing_missing() {
    let fixture = directory();
    let root = fixture.directory.as_ref().unwrap().path();
    fixture.store.put(&key("a/b"), noise(10, 1), PutCondition::Create).await.unwrap();
    // What an unmounted file system leaves: an empty directory.
    std::fs::rename(root, root.with_extension("away")).unwrap();
    std::fs::create_dir(root).unwrap();
    let kinds = [
        fixture.store.get(&key("a/b"), None).await.err().unwrap().kind(),
        fixture.store.head(&key("a/b")).await.unwrap_err().kind(),
        fixture.store.list("a/", None, 10).await.unwrap_err().kind(),
        fixture.store.delete(&[key("a/b")]).await.unwrap_err().kind(),
        fixture.store.put(&key("c"), noise(1, 1), PutCondition::Create).await.unwrap_err().kind(),
        fixture
            .store
            .put_stream(&key("c"), body_from_bytes(noise(1, 1)), PutCondition::Replace)
            .await
            .unwrap_err()
            .kind(),
    ];
    assert_eq!(kinds, [Kind::Unreachable; 6]);
    assert_eq!(std::fs::read_dir(root).unwrap().count(), 0, "nothing is written beside the file system");
    std::fs::remove_dir(root).unwrap();
    std::fs::rename(root.with_extension("away"), root).unwrap();
    assert_eq!(read_all(&*fixture.store, &key("a/b"), 10).await.unwrap(), noise(10, 1));
}

/// With an empty directory in its place, as of an unmounted file system, or with none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_that_goes_away_while_an_object_is_written_is_not_made_again() {
    for stays_empty in [false, true] {
        let fixture = directory();
        let root = fixture.directory.as_ref().unwrap().path().to_path_buf();
        let gone = root.clone();
        let goes_away = stream::once(async move {
            while unfinished(&gone).is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            std::fs::rename(&gone, gone.with_extension("away")).unwrap();
            if stays_empty {
                std::fs::create_dir(&gone).unwrap();
            }
            Ok(noise(10, 1))
        });
        let stored = fixture.store.put_stream(&key("a/b"), Box::pin(goes_away), PutCondition::Create).await;
        assert_eq!(stored.unwrap_err().kind(), Kind::Unreachable);
        if stays_empty {
            std::fs::remove_dir(&root).expect("nothing is written beside the file system");
        }
        std::fs::rename(root.with_extension("away"), &root).expect("nothing is made where the root was");
        fixture.store.put(&key("a/b"), noise(10, 2), PutCondition::Create).await.unwrap();
    }
}

#[tokio::test]
async fn an_object_in_the_way_of_a_directory_is_a_conflict_and_keeps_its_bytes() {
    let fixture = directory();
    fixture.store.put(&key("a"), noise(10, 1), PutCondition::Create).await.unwrap();
    fixture.store.put(&key("d/e"), noise(10, 1), PutCondition::Create).await.unwrap();
    for (name, condition) in [
        ("a/b", PutCondition::Create),
        ("a/b/c", PutCondition::Replace),
        ("d", PutCondition::Create),
        ("d", PutCondition::Replace),
    ] {
        let error = fixture.store.put(&key(name), noise(10, 2), condition).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict, "{name}: {error}");
    }
    assert_eq!(read_all(&*fixture.store, &key("a"), 10).await.unwrap(), noise(10, 1));
    assert_eq!(read_all(&*fixture.store, &key("d/e"), 10).await.unwrap(), noise(10, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn puts_survive_deletions_that_remove_their_directory() {
    let fixture = directory();
    let store = fixture.store.clone();
    let deleting = tokio::spawn({
        let store = store.clone();
        async move {
            for _ in 0..300 {
                store.delete(&[key("d/e/f/deleted")]).await.unwrap();
                store.put(&key("d/e/f/deleted"), noise(1, 1), PutCondition::Replace).await.unwrap();
            }
        }
    });
    for round in 0..300 {
        let name = key(&format!("d/e/f/{round}"));
        store.put(&name, noise(1, 1), PutCondition::Create).await.unwrap();
        store.delete(&[name]).await.unwrap();
    }
    deleting.await.unwrap();
}

/// Writes for ever, so that it can be killed at any moment. Does nothing unless a test starts it with a directory.
#[tokio::test]
async fn writer_to_be_killed() {
    let Ok(root) = std::env::var("KEIKI_TEST_KILLED_WRITER") else { return };
    let store = FsStore::open(Path::new(&root)).unwrap();
    for round in 0u64.. {
        let body = || noise(300_000, round % 200);
        store.put(&key("state"), body(), PutCondition::Replace).await.unwrap();
        let name = key(&format!("packs/{}/{round}", round % 7));
        store.put_stream(&name, body_from_bytes(body()), PutCondition::Create).await.unwrap();
    }
}

#[tokio::test]
async fn a_writer_killed_at_any_moment_leaves_whole_objects_only() {
    let wanted: Vec<Bytes> = (0..200).map(|round| noise(300_000, round)).collect();
    let mut seen = 0;
    for kill_after_millis in [30, 45, 60, 80, 110, 150, 200] {
        let fixture = directory();
        let root = fixture.directory.as_ref().unwrap().path();
        let mut writer = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store_contract::directory::writer_to_be_killed"])
            .env("KEIKI_TEST_KILLED_WRITER", root)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        while !root.join("state").exists() {
            assert!(writer.try_wait().unwrap().is_none(), "the writer ended by itself");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(kill_after_millis)).await;
        writer.kill().unwrap();
        writer.wait().unwrap();
        let store = FsStore::open(root).unwrap();
        for object in store.list("", None, 1000).await.unwrap() {
            let bytes = read_all(&store, &object.key, 1 << 20).await.unwrap();
            assert!(wanted.contains(&bytes), "'{}' is torn: {} bytes", object.key, bytes.len());
            seen += 1;
        }
        store.put(&key("state"), noise(1, 1), PutCondition::Replace).await.unwrap();
    }
    assert!(seen > 20, "only {seen} objects were written before the kills");
}

/// Runs `test` on a thread that sees a file system of one MiB at the path it gets. Nothing else of this machine sees it,
/// and it goes with the thread. False if this process may not mount.
fn on_a_small_disk(test: impl FnOnce(&Path) + Send) -> bool {
    use nix::mount::{MsFlags, mount};
    let outer = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_err() {
                return false;
            }
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            mount(Some("small"), outer.path(), Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
            test(outer.path());
            true
        });
        thread.join().unwrap()
    })
}

#[test]
fn a_full_disk_and_a_read_only_one_are_told_with_a_hint_and_keep_what_is_there() {
    let was_tried = on_a_small_disk(|root| {
        // Its blocking threads are started from this thread, so they see the same disk.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = FsStore::open(root).unwrap();
            store.put(&key("a"), noise(1000, 1), PutCondition::Create).await.unwrap();
            let big = || noise(2 << 20, 2);
            let full = store.put(&key("a"), big(), PutCondition::Replace).await.unwrap_err();
            let streamed = store.put_stream(&key("b"), body_from_bytes(big()), PutCondition::Create).await.unwrap_err();
            for error in [full, streamed] {
                assert_eq!(error.kind(), Kind::Full);
                assert!(error.hint_text().unwrap().contains("MiB free"), "{error:?}");
            }
            assert!(unfinished(root).is_empty());
            assert_eq!(read_all(&store, &key("a"), 1000).await.unwrap(), noise(1000, 1));
            store.put(&key("a"), noise(1000, 3), PutCondition::Replace).await.unwrap();

            let none = None::<&str>;
            let read_only = nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_RDONLY;
            nix::mount::mount(none, root, none, read_only, none).unwrap();
            let store = FsStore::open(root).unwrap();
            assert_eq!(read_all(&store, &key("a"), 1000).await.unwrap(), noise(1000, 3));
            let error = store.put(&key("c"), noise(1, 1), PutCondition::Create).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Forbidden);
            assert!(error.hint_text().unwrap().contains("must be writable"), "{error:?}");
            assert_eq!(store.delete(&[key("a")]).await.unwrap_err().kind(), Kind::Forbidden);
        });
    });
    if !was_tried {
        println!("not tried: this process may not mount a file system");
    }
}
