//! Unit tests of `window`.

use std::time::Duration;

use bytes::Bytes;

use super::*;
use crate::base::clock::Clock;
use crate::engine::postgres::geometry::WalGeometry;
use crate::engine::postgres::ondisk::segment::SegmentSize;
use crate::job::testing::Site;
use crate::model::id::IncarnationId;
use crate::model::position::Lsn;
use crate::model::target::utc_text;
use crate::store::memory::MemoryStore;
use crate::store::{Key, PutCondition, Store};

#[tokio::test]
async fn the_window_reaches_from_the_first_backup_to_what_the_source_had_made_durable() {
    let site = Site::new().await;
    let archiver = site.archiver().await;
    let incarnation = site.incarnation(&archiver).await;
    assert_eq!(window_of(&site.repo, &incarnation, None).await.unwrap(), Window::default());
    site.write(100);
    let backup = site.back_up(&archiver).await;
    site.write(100);
    let last_write_at = site.clock.now();
    // The database is quiet from now on; the agent goes on looking.
    site.clock.advance(Duration::from_secs(3600));
    archiver.ship_now().await.unwrap();
    let window = window_of(&site.repo, &incarnation, None).await.unwrap();
    assert_eq!(window.holes, []);
    let reach = &window.reaches[0];
    assert_eq!((reach.from, reach.to), (Position::Count(100), Position::Count(200)));
    assert_eq!((reach.backup.clone(), reach.from_time), (backup.id, backup.ended_at));
    assert_eq!(reach.last_commit_at, Some(last_write_at));
    assert_eq!(reach.covered_until.map(utc_text), Some(utc_text(site.clock.now())));
}

#[tokio::test]
async fn a_backup_of_a_server_that_never_wrote_is_reachable() {
    let site = Site::new().await;
    let archiver = site.archiver().await;
    let incarnation = site.incarnation(&archiver).await;
    let backup = site.back_up(&archiver).await;
    assert_eq!(backup.start, backup.stop);
    site.clock.advance(Duration::from_secs(60));
    archiver.ship_now().await.unwrap();
    let window = window_of(&site.repo, &incarnation, None).await.unwrap();
    assert_eq!((window.reaches[0].from, window.reaches[0].to), (backup.start, backup.start));
    assert_eq!(window.reaches[0].covered_until.map(utc_text), Some(utc_text(site.clock.now())));
}

#[tokio::test]
async fn log_that_was_lost_is_a_hole_with_the_times_on_both_sides() {
    let site = Site::new().await;
    let archiver = site.archiver().await;
    let incarnation = site.incarnation(&archiver).await;
    site.write(10);
    site.back_up(&archiver).await;
    site.write(90);
    archiver.ship_now().await.unwrap();
    let before = site.clock.now();
    drop(archiver);
    site.write(200);
    site.lose_log_files(&[1, 2, 3]);
    let archiver = site.archiver().await;
    site.write(1);
    archiver.ship_now().await.unwrap();
    let window = window_of(&site.repo, &incarnation, None).await.unwrap();
    assert_eq!(window.reaches.len(), 1, "behind the hole there is no backup yet");
    assert_eq!(window.reaches[0].to, Position::Count(100));
    assert_eq!(window.reaches[0].covered_until, Some(before));
    let hole = &window.holes[0];
    assert_eq!((hole.from, hole.to), (Position::Count(100), Position::Count(256)));
    assert!(hole.from_time.unwrap() <= hole.to_time.unwrap());
    site.back_up(&archiver).await;
    assert_eq!(window_of(&site.repo, &incarnation, None).await.unwrap().reaches.len(), 2);
}

/// The stretches of archived WAL: of a segment in chunks the key says how far it goes.
async fn stretches_of_wal(objects: &[&str]) -> Vec<(Position, Position)> {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new("t"));
    let repo = Repository::init(store.clone(), Timestamp::UNIX_EPOCH).await.unwrap();
    let incarnation = IncarnationId::fresh();
    for object in objects {
        let key = Key::parse(&format!("incarnations/{incarnation}/log/{object}")).unwrap();
        store.put(&key, Bytes::new(), PutCondition::Create).await.unwrap();
    }
    let catalogue = LogCatalogue::load(repo, incarnation).await.unwrap();
    let stretches = contiguous(&catalogue, &WalGeometry::new(SegmentSize::DEFAULT)).unwrap();
    stretches.iter().map(|stretch| (stretch.from, stretch.to)).collect()
}

#[test]
fn log_behind_a_gap_is_on_its_way_if_somebody_ships_it_and_the_gap_is_a_hole_otherwise() {
    let stretch = |from, to| Stretch { from: wal(1, from), to: wal(1, to), files: vec![format!("{from}")] };
    let all = vec![stretch(10, 50), stretch(60, 70), stretch(80, 90)];
    let kept = |shipped| settled(all.clone(), shipped).len();
    // Two gaps behind what is shipped: both are being filled.
    assert_eq!(kept(Some(wal(1, 40))), 1);
    assert_eq!(kept(Some(wal(1, 50))), 1);
    // The archiver has come past the first gap: that one is a hole.
    assert_eq!(kept(Some(wal(1, 65))), 2);
    assert_eq!(kept(Some(wal(1, 90))), 3);
    // Nobody is at work: a gap is a gap.
    assert_eq!(kept(None), 3);
    assert_eq!(settled(Vec::new(), Some(wal(1, 40))), []);
}

fn wal(timeline: u32, lsn: u64) -> Position {
    Position::Wal { timeline, lsn: Lsn(lsn) }
}

#[tokio::test]
async fn a_new_timeline_of_the_same_life_goes_on_where_the_old_one_ended() {
    // The server was promoted in segment 4: the old timeline's copy of it stays open, or was not even begun, the new
    // one's begins with the same bytes.
    let found = stretches_of_wal(&[
        "000000010000000000000003/sealed",
        "000000010000000000000004/000000000000-000000009000",
        "00000002.history/sealed",
        "000000020000000000000004/sealed",
        "000000020000000000000005/000000000000-000000001000",
    ])
    .await;
    assert_eq!(found, [(wal(1, 0x300_0000), wal(2, 0x500_1000))]);
    let found = stretches_of_wal(&["000000010000000000000003/sealed", "000000020000000000000004/sealed"]).await;
    assert_eq!(found, [(wal(1, 0x300_0000), wal(2, 0x500_0000))]);
    // Segment 4 is missing on both.
    let found = stretches_of_wal(&["000000010000000000000003/sealed", "000000020000000000000005/sealed"]).await;
    assert_eq!(found.len(), 2);
}
