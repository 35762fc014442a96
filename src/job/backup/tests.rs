//! Unit tests of `backup`.

use super::*;
use crate::job::testing::{Site, backup_order, run_to_end};
use crate::model::job::JobState;
use crate::store::faulty::{Fault, Operation, When};

#[tokio::test]
async fn a_backup_is_published_when_the_log_of_its_span_is_in_the_repository() {
    let site = Site::new().await;
    let archiver = site.archiver().await;
    std::fs::create_dir(site.database.data_dir.join("extra")).unwrap();
    std::fs::write(site.database.data_dir.join("extra/blob"), vec![7u8; 3 << 20]).unwrap();
    site.write(100);
    let backup = site.back_up(&archiver).await;
    assert_eq!(backup.start, crate::model::position::Position::Count(100));
    assert!(archiver.has_log(backup.start, backup.stop).await.unwrap());
    assert!(backup.restored_bytes > 3 << 20 && backup.stored_bytes < 1 << 20, "{backup:?}");
    assert_eq!(site.keys("/backups/").await.len(), 1);
    assert_eq!(site.keys("/work/").await, Vec::<String>::new());
}

#[tokio::test]
async fn a_backup_that_cannot_store_its_files_leaves_nothing_behind() {
    let site = Site::new().await;
    let archiver = site.archiver().await;
    site.write(10);
    site.faults.inject_for_key(Operation::PutStream, "/packs/", When::Nth(1), Fault::Fail(Kind::Full));
    let runner = site.runner(site.source(&archiver));
    let order = backup_order();
    let report = run_to_end(&runner, order.clone()).await;
    assert_eq!(report.state, JobState::Failed);
    assert_eq!(report.error.unwrap().kind(), Kind::Full);
    assert_eq!(report.steps.iter().position(|step| step.state == crate::model::job::StepState::Failed), Some(1));
    for part in ["/packs/", "/backups/", "/work/"] {
        assert_eq!(site.keys(part).await, Vec::<String>::new());
    }
    runner.resume(order.id).await.unwrap();
    assert_eq!(runner.wait(order.id).await.unwrap().state, JobState::Done);
    assert_eq!(site.keys("/backups/").await.len(), 1);
}

#[tokio::test]
async fn a_copy_that_failed_for_a_reason_that_passes_is_made_again_and_leaves_one_backup() {
    for (failures, state, backups) in [(2, JobState::Done, 1), (3, JobState::Failed, 0)] {
        let site = Site::new().await;
        let archiver = site.archiver().await;
        site.write(10);
        site.engine.fail_next_backups(failures);
        let report = run_to_end(&site.runner(site.source(&archiver)), backup_order()).await;
        assert_eq!(report.state, state, "{report:?}");
        assert_eq!(site.keys("/backups/").await.len(), backups);
        // Each of the two lanes makes a pack if it gets a file.
        let packs = site.keys("/packs/").await.len();
        assert!((backups..=2 * backups).contains(&packs), "{packs} packs of {backups} backups");
        assert_eq!(site.keys("/work/").await, Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_backup_whose_log_has_a_hole_is_not_published() {
    let site = Site::new().await;
    let archiver = site.archiver().await;
    site.write(100);
    // The server forgets log that nobody has shipped, as after 'pg_resetwal' or a forced removal.
    site.engine.during_next_backup(|database| {
        for value in 0..200 {
            database.write(value).unwrap();
        }
        std::fs::remove_file(database.data_dir.join("log/00000002")).unwrap();
    });
    let runner = site.runner(site.source(&archiver));
    let report = run_to_end(&runner, backup_order()).await;
    let error = report.error.unwrap();
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
    assert_eq!(site.keys("/backups/").await, Vec::<String>::new());
    assert_eq!(site.keys("/packs/").await, Vec::<String>::new());
}

#[tokio::test]
async fn an_agent_that_died_after_the_manifest_was_written_does_not_take_a_second_backup() {
    let site = Site::new().await;
    let archiver = site.archiver().await;
    site.write(10);
    let runner = site.runner(site.source(&archiver));
    let order = backup_order();
    assert_eq!(run_to_end(&runner, order.clone()).await.state, JobState::Done);
    runner.shut_down().await;
    // The journal as it was when the manifest was there and its publication not yet recorded.
    let journal = site.directory.path().join("jobs").join(format!("{}.jsonl", order.id));
    let text = std::fs::read_to_string(&journal).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    std::fs::write(&journal, lines[..lines.len() - 2].join("\n") + "\n").unwrap();
    let runner = site.runner(site.source(&archiver));
    runner.recover_interrupted().await;
    let report = runner.wait(order.id).await.unwrap();
    assert_eq!((report.state, report.results[0].0.as_str()), (JobState::Done, "backup"));
    assert_eq!(site.keys("/backups/").await.len(), 1);
}

#[tokio::test]
async fn a_hole_behind_the_newest_backup_is_found_and_while_all_is_quiet_nobody_is_asked() {
    let site = Site::new().await;
    let archiver = site.archiver().await;
    let hour = Duration::from_secs(3600);
    site.write(100);
    archiver.ship_now().await.unwrap();
    assert!(!needs_backup_behind_hole(&archiver, hour).await.unwrap(), "there is no backup");
    site.back_up(&archiver).await;
    site.write(100);
    archiver.ship_now().await.unwrap();
    assert!(!needs_backup_behind_hole(&archiver, hour).await.unwrap());
    let calls = || [Operation::List, Operation::Get, Operation::Head].map(|operation| site.faults.calls(operation));
    let before = calls();
    for _ in 0..100 {
        site.clock.advance(Duration::from_secs(30));
        assert!(!needs_backup_behind_hole(&archiver, hour).await.unwrap());
    }
    assert_eq!(calls(), before);

    // The server forgets log before it was shipped.
    site.write(200);
    site.lose_log_files(&[4, 5]);
    archiver.ship_now().await.unwrap();
    assert!(needs_backup_behind_hole(&archiver, hour).await.unwrap());
    site.back_up(&archiver).await;
    assert!(!needs_backup_behind_hole(&archiver, hour).await.unwrap(), "a backup of this agent is known at once");
}
