//! Unit tests of `window`.

use std::time::Duration;

use super::*;
use crate::base::clock::Clock;
use crate::job::testing::Site;
use crate::model::target::utc_text;

#[tokio::test]
async fn the_window_reaches_from_the_first_backup_to_what_the_source_had_made_durable() {
    let site = Site::new().await;
    let archiver = site.archiver().await;
    let incarnation = site.incarnation(&archiver).await;
    assert_eq!(window_of(&site.repo, &incarnation).await.unwrap(), Window::default());
    site.write(100);
    let backup = site.back_up(&archiver).await;
    site.write(100);
    let last_write_at = site.clock.now();
    // The database is quiet from now on; the agent goes on looking.
    site.clock.advance(Duration::from_secs(3600));
    archiver.ship_now().await.unwrap();
    let window = window_of(&site.repo, &incarnation).await.unwrap();
    assert_eq!(window.holes, []);
    let reach = &window.reaches[0];
    assert_eq!((reach.from, reach.to), (Position::Count(100), Position::Count(200)));
    assert_eq!((reach.backup.clone(), reach.from_time), (backup.id, backup.ended_at));
    assert_eq!(reach.last_commit_at, Some(last_write_at));
    assert_eq!(reach.covered_until.map(utc_text), Some(utc_text(site.clock.now())));
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
    let window = window_of(&site.repo, &incarnation).await.unwrap();
    assert_eq!(window.reaches.len(), 1, "behind the hole there is no backup yet");
    assert_eq!(window.reaches[0].to, Position::Count(100));
    assert_eq!(window.reaches[0].covered_until, Some(before));
    let hole = &window.holes[0];
    assert_eq!((hole.from, hole.to), (Position::Count(100), Position::Count(256)));
    assert!(hole.from_time.unwrap() <= hole.to_time.unwrap());
    site.back_up(&archiver).await;
    assert_eq!(window_of(&site.repo, &incarnation).await.unwrap().reaches.len(), 2);
}
