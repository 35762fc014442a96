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
