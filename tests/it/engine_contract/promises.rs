//! The promises of the ports in `keiki::engine`, one function each.

use std::os::unix::fs::MetadataExt;

use keiki::error::Kind;
use keiki::model::backup::FileKind;
use keiki::model::check::{Verdict, worst};
use keiki::model::id::BackupId;
use keiki::model::target::Target;
use tokio_util::sync::CancellationToken;

use super::{Grown, MemoryLog, Subject, back_up, names, read_log};

pub async fn the_identity_is_that_of_the_directory(subject: &dyn Subject) {
    let engine = subject.engine();
    let identity = engine.identify().await.unwrap();
    assert_eq!(engine.identify().await.unwrap(), identity);
    assert_eq!(identity.data_dir.canonicalize().unwrap(), identity.data_dir);
    let metadata = std::fs::metadata(&identity.data_dir).unwrap();
    assert_eq!(identity.data_dir_inode, (metadata.dev(), metadata.ino()));
    assert!(!identity.version.is_empty() && !identity.system_id.is_empty());
    for item in engine.check_source().await.unwrap() {
        assert!(item.verdict == Verdict::Pass || item.hint.is_some(), "{item:?}");
    }
    for directory in engine.log_directories() {
        assert!(directory.is_dir(), "{}", directory.display());
    }
}

pub async fn what_was_committed_is_in_the_durable_log(subject: &dyn Subject) {
    let engine = subject.engine();
    let before = engine.list_log(None).await.unwrap();
    subject.commit(1);
    let between = subject.now();
    subject.commit(2);
    let after = engine.list_log(None).await.unwrap();
    assert!(after.durable_end.position > before.durable_end.position);
    assert!(after.durable_end.observed_at > between);
    let mut sorted = names(&after);
    sorted.sort();
    assert_eq!(names(&after), sorted, "names sort in the order of the log");
    subject.switch_log();
    subject.commit(3);
    let listing = engine.list_log(None).await.unwrap();
    let geometry = engine.log_geometry().await.unwrap();
    let logs: Vec<_> =
        listing.files.iter().filter(|file| geometry.span(&file.name, 0).unwrap().is_some()).cloned().collect();
    assert!(logs.len() >= 2 && logs[logs.len() - 2].sealed && !logs[logs.len() - 1].sealed, "{logs:?}");
    let middle = logs[logs.len() - 2].name.clone();
    let later = engine.list_log(Some(&middle)).await.unwrap();
    assert!(names(&later).iter().all(|name| *name > middle), "{:?}", names(&later));
    assert!(names(&later).contains(&logs[logs.len() - 1].name));
}

pub async fn any_range_of_a_log_file_reads_the_same_bytes(subject: &dyn Subject) {
    let engine = subject.engine();
    subject.commit(4);
    // Where a range may begin and end is for the engine to say: where it said that its log ends, at some time.
    let earlier = engine.list_log(None).await.unwrap();
    let before = subject.now();
    subject.commit(5);
    let after = subject.now();
    let listing = engine.list_log(None).await.unwrap();
    let open = listing.files.last().unwrap();
    let end = open.readable_bytes;
    let whole = read_log(engine.as_ref(), open, 0, end).await.unwrap();
    assert_eq!(whole.len() as u64, end);
    let middle = earlier.files.iter().find(|file| file.name == open.name).map_or(0, |file| file.readable_bytes);
    assert!(middle < end, "the log has not grown");
    let mut parts = read_log(engine.as_ref(), open, 0, middle).await.unwrap();
    parts.extend(read_log(engine.as_ref(), open, middle, end).await.unwrap());
    assert!(whole == parts, "two halves are not the whole");
    assert!(read_log(engine.as_ref(), open, 0, end + 1).await.is_err(), "what is not durable must not be read");
    let mut reader = engine.open_log(open, 0, end).await.unwrap();
    while !reader.read().unwrap().is_empty() {}
    let last = reader.summary().last_commit_at.expect("the log is understood");
    assert!(before < last && last < after, "{before} {last} {after}");
    // What was read once never changes: the file grows behind it.
    subject.commit(6);
    assert!(read_log(engine.as_ref(), open, 0, end).await.unwrap() == whole);
}

pub async fn names_and_positions_agree_with_the_files(subject: &dyn Subject) {
    let engine = subject.engine();
    subject.commit(7);
    let listing = engine.list_log(None).await.unwrap();
    let geometry = engine.log_geometry().await.unwrap();
    let logs = listing.files.iter().filter(|file| geometry.span(&file.name, 0).unwrap().is_some());
    let mut last = None;
    for file in logs {
        let span = match file.sealed {
            true => geometry.sealed_span(&file.name),
            false => geometry.span(&file.name, file.readable_bytes),
        };
        let (start, end) = span.unwrap().unwrap();
        if let Some((name, last_end)) = last {
            assert_eq!(geometry.next_file(name).unwrap(), file.name);
            assert_eq!(last_end, start, "'{name}' and '{}' do not meet", file.name);
        }
        last = Some((&file.name, end));
    }
    let (name, end) = last.unwrap();
    assert_eq!(end, listing.durable_end.position);
    assert_eq!(geometry.file_before(end).unwrap(), *name);
}

pub async fn a_cancelled_backup_says_so(subject: &dyn Subject) {
    let cancel = CancellationToken::new();
    cancel.cancel();
    let error = back_up(subject, cancel).await.err().expect("it was cancelled");
    assert_eq!(error.kind(), Kind::Cancelled, "{error}");
    // Nothing of it is left on the server that would be in the way of the next.
    back_up(subject, CancellationToken::new()).await.unwrap();
}

pub async fn a_clone_holds_exactly_its_target(subject: &dyn Subject) {
    for value in 100..150 {
        subject.commit(value);
    }
    let base = back_up(subject, CancellationToken::new()).await.unwrap();
    assert!(base.span.start <= base.span.stop && base.span.began_at <= base.span.ended_at);
    assert!(base.files.iter().any(|(meta, _)| meta.kind == FileKind::Regular));
    let at_backup = subject.now();
    subject.commit(150);
    subject.commit(151);
    let between = subject.now();
    subject.switch_log();
    subject.commit(152);
    subject.name_point("contract point");
    subject.commit(153);
    let log = async || MemoryLog::of(subject).await;
    let backup = Target::Backup(BackupId::new(base.span.began_at, 1));
    let mut targets = vec![
        (Target::Latest, 153),
        (Target::Time(between), 151),
        (backup, 149),
        // A quiet moment after the last commit, and one before the first.
        (Target::Time(subject.now()), 153),
        (Target::Time(at_backup), 149),
    ];
    if subject.has_named_points() {
        targets.push((Target::Name("contract point".into()), 152));
    }
    for (target, last) in targets {
        let grown = Grown::stage(subject, &base).await;
        let log = log().await;
        assert!(log.bytes() > 0);
        let recovered = grown.recover(&target, log).await.unwrap();
        assert_ne!(worst(&recovered.verified), Verdict::Fail, "{:?}", recovered.verified);
        assert!(recovered.departed_at >= base.span.stop, "{recovered:?}");
        let numbers: Vec<u64> = grown.values().into_iter().filter(|value| *value >= 100).collect();
        assert_eq!(numbers, (100..=last).collect::<Vec<u64>>(), "{target}");
        assert!(subject.cloner().is_running(&grown.site.data_dir));
        grown.stop().await;
    }
    let grown = Grown::stage(subject, &base).await;
    let error = grown.recover(&Target::Name("never made".into()), log().await).await.unwrap_err();
    assert!(error.message().contains("never made"), "{error}");
    grown.stop().await;
}

pub async fn a_replay_that_was_cancelled_can_be_repeated(subject: &dyn Subject) {
    subject.commit(300);
    let base = back_up(subject, CancellationToken::new()).await.unwrap();
    subject.commit(301);
    subject.switch_log();
    subject.commit(302);
    let grown = Grown::stage(subject, &base).await;
    let cancel = CancellationToken::new();
    let log = MemoryLog::of(subject).await.cancelling(cancel.clone());
    let error = grown.recover_until(&Target::Latest, log, cancel).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Cancelled, "{error}");
    for _ in 0..2 {
        // The second call finds a clone that is complete.
        grown.recover(&Target::Latest, MemoryLog::of(subject).await).await.unwrap();
        assert_eq!(grown.values().last(), Some(&302));
    }
    grown.stop().await;
}

pub async fn a_clone_that_was_handed_over_is_another_directory(subject: &dyn Subject) {
    subject.commit(400);
    let base = back_up(subject, CancellationToken::new()).await.unwrap();
    let grown = Grown::stage(subject, &base).await;
    let items = subject.cloner().check_target(&grown.site, &Target::Latest).await.unwrap();
    assert_ne!(worst(&items), Verdict::Fail, "{items:?}");
    grown.recover(&Target::Latest, MemoryLog::of(subject).await).await.unwrap();
    for _ in 0..2 {
        for item in subject.cloner().clean_up(&grown.site).await.unwrap() {
            assert!(!item.what.is_empty() && !item.done.is_empty());
        }
    }
    let source = subject.engine().identify().await.unwrap();
    let cloned = subject.cloner().hand_over(&grown.site, true).await.unwrap();
    assert_eq!((&cloned.system_id, &cloned.version), (&source.system_id, &source.version));
    assert_ne!(cloned.data_dir_inode, source.data_dir_inode);
    assert_eq!(cloned.data_dir, grown.site.data_dir.canonicalize().unwrap());
    assert_eq!(grown.values().last(), Some(&400));
    assert_eq!(subject.engine().identify().await.unwrap(), source, "the source noticed nothing");
    grown.stop().await;
}

pub async fn what_was_released_is_not_listed_any_more(subject: &dyn Subject) {
    let engine = subject.engine();
    subject.commit(500);
    subject.switch_log();
    subject.commit(501);
    let listing = engine.list_log(None).await.unwrap();
    engine.release_log(listing.durable_end.position).await.unwrap();
    subject.commit(502);
    let listing = engine.list_log(None).await.unwrap();
    for file in &listing.files {
        read_log(engine.as_ref(), file, 0, file.readable_bytes).await.unwrap();
    }
    assert!(!listing.files.last().unwrap().sealed);
    engine.release_log(listing.durable_end.position).await.unwrap();
}
