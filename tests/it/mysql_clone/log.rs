//! The log of a real server through the engine: what is shipped, and what torn and hostile bytes do to the walker.

use keiki::engine::mysql::ondisk::transaction::Transaction;
use keiki::engine::mysql::ondisk::walker::Walker;

use super::*;

fn walk(bytes: &[u8]) -> (Result<()>, Vec<Transaction>, u64) {
    let (mut walker, mut found) = (Walker::new(), Vec::new());
    let mut outcome = Ok(());
    for piece in bytes.chunks(4093) {
        outcome = outcome.and(walker.feed(piece, &mut |transaction| {
            found.push(transaction);
            Ok(())
        }));
    }
    (outcome, found, walker.boundary())
}

#[tokio::test]
async fn the_open_log_file_of_mariadb_has_the_bytes_that_it_has_when_it_is_finished() {
    let source = Source::start(&[]).await;
    source.commit_rows(1, 20).await;
    source.session.execute("INSERT INTO shop.old VALUES (1), (2)").await.unwrap();
    let summaries = source.archive_log().await;
    let name = "binlog.0000000001";
    let open = std::fs::read(source.archive.0.join(name)).unwrap();
    let on_disk = std::fs::read(source.server.data_dir.join("binlog.000001")).unwrap();
    assert_ne!(open, on_disk, "the server marks the file as in use");
    source.session.execute("FLUSH BINARY LOGS").await.unwrap();
    source.archive_log().await;
    let sealed = std::fs::read(source.archive.0.join(name)).unwrap();
    assert!(sealed.starts_with(&open) && sealed.len() > open.len());

    // What the walker finds is what the server has given out.
    let (outcome, found, boundary) = walk(&sealed);
    outcome.unwrap();
    assert_eq!(boundary, sealed.len() as u64);
    let pos = source.session.value("SELECT @@gtid_binlog_pos").await.unwrap().unwrap();
    assert_eq!(found.last().unwrap().id.to_string(), pos);
    let ids: Vec<String> = found.iter().map(|transaction| transaction.id.to_string()).collect();
    assert_eq!(ids, (1..=ids.len()).map(|sequence| format!("0-5-{sequence}")).collect::<Vec<_>>());
    assert_eq!(found.last().unwrap().end, open.len() as u64);
    let summary = &summaries[name];
    assert_eq!(summary.transactions, [format!("0-5-1..{}", ids.len())]);
    assert_eq!(summary.last_commit, Some(Position::File { number: 1, offset: open.len() as u64 }));

    // Torn anywhere: exactly the transactions that are complete.
    for cut in (0..sealed.len()).step_by(37) {
        let (outcome, part, _) = walk(&sealed[..cut]);
        outcome.unwrap();
        let complete = found.iter().filter(|transaction| transaction.end <= cut as u64).count();
        assert_eq!(part.len(), complete, "cut at {cut}");
    }
    // Changed anywhere: an error or nothing, never a panic.
    for at in (0..sealed.len()).step_by(11) {
        let mut changed = sealed.clone();
        changed[at] ^= 0xff;
        let _ = walk(&changed);
    }
}

#[tokio::test]
async fn a_log_of_mariadb_that_begins_again_stops_archiving_instead_of_mixing_two() {
    let source = Source::start(&[]).await;
    source.commit_rows(1, 20).await;
    source.session.execute("FLUSH BINARY LOGS").await.unwrap();
    source.commit_rows(21, 22).await;
    let listing = source.engine.list_log(None).await.unwrap();
    assert_eq!(listing.files.iter().map(|file| file.sealed).collect::<Vec<_>>(), [true, false]);
    let open = listing.files[1].clone();
    let mut reader = source.engine.open_log(&open, 0, open.readable_bytes).await.unwrap();
    while !reader.read().unwrap().is_empty() {}
    // It goes on where it ended, by the walker that was kept.
    source.commit_rows(23, 24).await;
    let grown = source.engine.list_log(Some("binlog.0000000001")).await.unwrap().files.remove(0);
    let mut reader = source.engine.open_log(&grown, open.readable_bytes, grown.readable_bytes).await.unwrap();
    while !reader.read().unwrap().is_empty() {}
    assert_eq!(reader.summary().transactions, ["0-5-27..28"]);

    source.session.execute("RESET MASTER").await.unwrap();
    source.commit_rows(100, 199).await;
    let error = source.engine.list_log(Some("binlog.0000000001")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
    source.session.execute("FLUSH BINARY LOGS").await.unwrap();
    source.commit_rows(200, 299).await;
    let other = source.engine.list_log(Some("binlog.0000000001")).await.unwrap().files.remove(0);
    assert!(other.readable_bytes > grown.readable_bytes);
    let error = source.engine.open_log(&other, grown.readable_bytes, other.readable_bytes).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
}

#[tokio::test]
async fn a_killed_mariadb_leaves_a_log_that_goes_on_where_it_ended() {
    let mut source = Source::start(&[]).await;
    source.commit_rows(1, 10).await;
    source.back_up().await;
    source.commit_rows(11, 30).await;
    source.server.kill9();
    source.server.launch();
    source.session = source.server.connect().await;
    source.commit_rows(31, 40).await;
    let summaries = source.archive_log().await;
    assert_eq!(summaries.len(), 2);
    let clone = Clone::stage(&source).await;
    clone.recover(&source, Target::Latest).await.unwrap();
    assert_eq!(clone.rows().await, rows(40));
}

#[tokio::test]
async fn a_backup_of_mariadb_that_cannot_be_stored_or_is_cancelled_ends_with_that_reason() {
    let source = Source::start(&[]).await;
    let engine = &source.engine;
    let mut full = DirectorySink::new(&source.server.work_dir.join("full"));
    full.full_at = Some("ibdata1".into());
    let error = engine.back_up("x", Arc::new(full), CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Full, "{error}");
    let cancel = CancellationToken::new();
    cancel.cancel();
    let sink = DirectorySink::new(&source.server.work_dir.join("cancelled"));
    assert_eq!(engine.back_up("x", Arc::new(sink), cancel).await.unwrap_err().kind(), Kind::Cancelled);
    let items = engine.check_source().await.unwrap();
    let verdict = |what: &str| items.iter().find(|item| item.what == what).unwrap().verdict;
    assert_eq!(verdict("log_bin"), keiki::model::check::Verdict::Pass);
    assert_eq!(verdict("tables"), keiki::model::check::Verdict::Warn);
    assert_eq!(verdict("mariadb-backup"), keiki::model::check::Verdict::Pass);
}
