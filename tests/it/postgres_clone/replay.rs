//! Replay to each kind of target, compared row by row with what was committed.

use super::*;

/// Rows 1 to 400 with a base after 100; returns what a clone is ordered to.
struct Moments {
    time_of_200: Timestamp,
    lsn_of_250: Lsn,
}

fn ledger_story(version: Version) -> (Source, Moments) {
    let mut source = Source::start(version, &[("max_connections", "37")]);
    source.commit_rows(1, 50);
    source.back_up_during(|source| source.commit_rows(51, 100));
    source.commit_rows(101, 200);
    let time_of_200 = source.now();
    source.commit_rows(201, 250);
    let lsn_of_250 = source.position();
    source.server.sql("SELECT pg_switch_wal(); CHECKPOINT");
    source.commit_rows(251, 300);
    source.server.sql("SELECT pg_create_restore_point('before the drop')");
    source.commit_rows(301, 350);
    // More log than a replay may be ahead, so that it must wait and the server must replay meanwhile.
    source.server.sql("CREATE TABLE bulk AS SELECT repeat('y', 500) FROM generate_series(1, 60000)");
    source.archive_log();
    source.commit_rows(351, 400);
    source.archive_log();
    (source, Moments { time_of_200, lsn_of_250 })
}

async fn every_target_is_exact(version: Version) {
    let (source, moments) = ledger_story(version);
    let targets = [
        (Target::Latest, 400),
        (Target::Time(moments.time_of_200), 200),
        (Target::Lsn(moments.lsn_of_250), 250),
        (Target::Name(String::from("before the drop")), 300),
        (Target::Backup(a_backup_id()), 100),
    ];
    for (target, expected) in targets {
        let clone = Clone::stage(&source).await;
        let recovered = clone.recover(&source, target.clone()).await.unwrap();
        assert_eq!(clone.ledger(&source).await, rows(expected), "{target}");
        let (timeline, left_at) = recovered.departed_at.wal().unwrap();
        assert_eq!(timeline, 1);
        assert!(left_at >= source.stop, "{target}");
        assert_eq!(recovered.now_at.wal().unwrap().0, 2);
        assert!(recovered.last_commit_at.is_some() && recovered.verified.len() >= 4, "{recovered:?}");
        if let Target::Lsn(lsn) = target {
            assert!(left_at <= lsn, "{left_at} is behind {lsn}");
        }
        assert!(!names_in(&clone.site.data_dir.join("pg_wal")).iter().any(|name| name.starts_with("keiki")));
        assert_eq!(clone.seen.done.load(Ordering::Relaxed), clone.seen.total.load(Ordering::Relaxed));
        // The clone is a server of its own.
        assert_eq!(clone.sql(&source, "SHOW listen_addresses").await, "");
        assert_eq!(clone.sql(&source, "SHOW archive_mode").await, "off");
        assert_eq!(clone.sql(&source, "SHOW max_connections").await, "37");
        clone.sql(&source, "INSERT INTO ledger VALUES (1000, '')").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_target_is_exact_on_15() {
    every_target_is_exact(Version::V15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_target_is_exact_on_18() {
    every_target_is_exact(Version::V18).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_targets_and_damaged_logs_are_refused() {
    let mut source = Source::start(Version::V15, &[]);
    let too_early = source.now();
    source.commit_rows(1, 20);
    let early_position = source.position();
    source.back_up_during(|source| source.commit_rows(21, 40));
    source.commit_rows(41, 300);
    source.server.sql("CREATE TABLE bulk AS SELECT repeat('y', 500) FROM generate_series(1, 8000)");
    source.archive_log();
    let clone = Clone::stage(&source).await;

    let error = refused(clone.recover(&source, Target::Lsn(early_position)).await, Kind::BadInput);
    assert!(error.message().contains("before the end of the base backup"), "{error:?}");
    let error = refused(clone.recover(&source, Target::Time(too_early)).await, Kind::BadInput);
    assert!(error.message().contains("before the end of the base backup"), "{error:?}");
    assert!(!clone.cloner.is_running(&clone.site.data_dir), "{}", clone.log());

    clone.restage(&source).await;
    let beyond = Lsn(source.position().0 + (64 << 20));
    let error = refused(clone.recover(&source, Target::Lsn(beyond)).await, Kind::NotFound);
    assert!(error.message().contains("before the target"), "{error:?}");
    stop_now(&clone.site.data_dir).await.unwrap();
    clone.restage(&source).await;
    let error = refused(clone.recover(&source, Target::Name(String::from("nobody"))).await, Kind::NotFound);
    assert!(error.message().contains("restore point 'nobody'"), "{error:?}");

    // One flipped bit in the middle, with sound log behind it.
    stop_now(&clone.site.data_dir).await.unwrap();
    clone.restage(&source).await;
    let segments: Vec<String> =
        names_in(&source.archive.directory).into_iter().filter(|name| name.len() == 24).collect();
    let damaged = source.archive.directory.join(&segments[segments.len() - 3]);
    let mut bytes = std::fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&damaged, bytes).unwrap();
    let error = refused(clone.recover(&source, Target::Latest).await, Kind::Damaged);
    assert!(error.message().contains(&segments[segments.len() - 3]), "{error:?}");

    // A segment of which the archive has only a part, with later ones behind it.
    stop_now(&clone.site.data_dir).await.unwrap();
    clone.restage(&source).await;
    let bytes = std::fs::read(&damaged).unwrap();
    std::fs::write(&damaged, &bytes[..4096]).unwrap();
    let error = refused(clone.recover(&source, Target::Latest).await, Kind::Damaged);
    assert!(error.message().contains("has it only up to"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_that_was_cancelled_anywhere_goes_on_and_ends_exactly() {
    let (source, moments) = ledger_story(Version::V15);
    let target = Target::Time(moments.time_of_200);
    let latest = source.archive.directory.clone();
    let segments = names_in(&latest).len() as u64;
    let clone = Clone::stage(&source).await;
    for reads in [1, 3, segments / 2, segments - 1] {
        let cancel = CancellationToken::new();
        let archive =
            Archive { cancel_after: Some((reads, cancel.clone())), reads: Arc::default(), ..source.archive.clone() };
        let error = clone.recover_from(archive.clone(), Target::Latest, cancel.clone()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Cancelled, "{error:?}");
        // The agent dies there: nobody cleans up, and the server lives on.
        let cancel = CancellationToken::new();
        let archive = Archive { cancel_after: Some((reads, cancel.clone())), reads: Arc::default(), ..archive };
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            outcome = clone.recover_from(archive, Target::Latest, CancellationToken::new()) => panic!("{outcome:?}"),
        }
    }
    // The server dies as well, without a chance to write anything.
    let pid = std::fs::read_to_string(clone.site.data_dir.join("postmaster.pid")).unwrap();
    let pid: i32 = pid.lines().next().unwrap().parse().unwrap();
    // SAFETY: kill(2) takes two numbers; the process is this test's own server.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
    // Another target must not go on with what was begun.
    refused(clone.recover(&source, target.clone()).await, Kind::Damaged);
    clone.recover(&source, Target::Latest).await.unwrap();
    assert_eq!(clone.ledger(&source).await, rows(400));
    // Called once more after success: it only verifies, with the server running and after it died.
    let again = clone.recover(&source, Target::Latest).await.unwrap();
    stop_now(&clone.site.data_dir).await.unwrap();
    let once_more = clone.recover(&source, Target::Latest).await.unwrap();
    assert_eq!((again.departed_at, again.last_commit_at), (once_more.departed_at, once_more.last_commit_at));
    assert_eq!(clone.ledger(&source).await, rows(400));

    // After a restart of the machine nothing of it may be believed.
    let state = clone.site.run_dir.join("keiki_recovery.state");
    let text = std::fs::read_to_string(&state).unwrap();
    std::fs::write(&state, text.replacen("boot_id=", "boot_id=another-", 1)).unwrap();
    let error = refused(clone.recover(&source, Target::Latest).await, Kind::Damaged);
    assert!(error.message().contains("staged again"), "{error:?}");
    // Staged anew it works again, with another target.
    stop_now(&clone.site.data_dir).await.unwrap();
    clone.restage(&source).await;
    clone.recover(&source, target).await.unwrap();
    assert_eq!(clone.ledger(&source).await, rows(200));
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_that_were_raised_on_the_way_do_not_stop_the_replay() {
    let mut source = Source::start(Version::V15, &[("max_connections", "25"), ("max_prepared_transactions", "0")]);
    source.commit_rows(1, 10);
    source.back_up();
    source.commit_rows(11, 20);
    let raised = [
        (String::from("max_connections"), String::from("60")),
        (String::from("max_prepared_transactions"), String::from("5")),
    ];
    source.server.append_settings(&raised);
    source.server.restart();
    source.commit_rows(21, 30);
    source.server.sql("BEGIN; INSERT INTO ledger VALUES (31, repeat('x', 31)); PREPARE TRANSACTION 'later'");
    source.commit_rows(32, 40);
    source.archive_log();
    let clone = Clone::stage(&source).await;
    clone.recover(&source, Target::Latest).await.unwrap();
    let expected: BTreeSet<u32> = rows(40).into_iter().filter(|id| *id != 31).collect();
    assert_eq!(clone.ledger(&source).await, expected);
    assert_eq!(clone.sql(&source, "SHOW max_connections").await, "60");
    let items = clone.cloner.clean_up(&clone.site).await.unwrap();
    assert!(items.iter().any(|item| item.what.contains("prepared transaction 'later'")), "{items:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_comes_to_lie_in_the_clone_and_a_new_one_on_the_way_is_refused() {
    for version in Version::ALL {
        let mut source = Source::start(version, &[]);
        let place = source.server.work_dir.join("space");
        std::fs::create_dir(&place).unwrap();
        source.server.own(&place);
        source.server.sql(&format!("CREATE TABLESPACE space LOCATION '{}'", place.display()));
        source.server.sql("CREATE TABLE far (id int) TABLESPACE space; INSERT INTO far VALUES (1)");
        source.back_up();
        source.server.sql("INSERT INTO far VALUES (2)");
        source.archive_log();
        let clone = Clone::stage(&source).await;
        clone.recover(&source, Target::Latest).await.unwrap();
        assert_eq!(clone.sql(&source, "SELECT sum(id) FROM far").await, "3");
        let location =
            clone.sql(&source, "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'space'").await;
        assert!(Path::new(&location).starts_with(&clone.site.data_dir), "{location}");
        clone.sql(&source, "INSERT INTO far VALUES (10)").await;
        assert_eq!(source.server.sql("SELECT sum(id) FROM far"), "3");
        // A base backup of the clone by the server's own tool takes the tablespace once.
        let copy = source.server.work_dir.join("copy");
        source.server.must_run(
            "pg_basebackup",
            &[
                "-h",
                &clone.site.run_dir.display().to_string(),
                "-p",
                &clone.site.port.to_string(),
                "-U",
                &source.server.role,
                "-Ft",
                "-X",
                "none",
                "-D",
                &copy.display().to_string(),
            ],
        );
        assert_eq!(names_in(&copy).iter().filter(|name| name.ends_with(".tar")).count(), 2, "{:?}", names_in(&copy));
        let listing = std::process::Command::new("tar").arg("-tf").arg(copy.join("base.tar")).output().unwrap();
        let listing = String::from_utf8_lossy(&listing.stdout).into_owned();
        let twice = listing.lines().filter(|line| line.contains("keiki_tablespaces/") && !line.ends_with('/')).count();
        assert_eq!(twice, 0, "{listing}");
        drop(clone);

        let other = source.server.work_dir.join("other");
        std::fs::create_dir(&other).unwrap();
        source.server.own(&other);
        source.server.sql(&format!("CREATE TABLESPACE other LOCATION '{}'", other.display()));
        source.archive_log();
        let before = names_in(&other);
        let clone = Clone::stage(&source).await;
        let error = refused(clone.recover(&source, Target::Latest).await, Kind::Unsupported);
        assert!(error.message().contains("a tablespace was created"), "{error:?}");
        assert_eq!(names_in(&other), before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_follows_a_source_that_was_promoted_in_place() {
    for version in Version::ALL {
        let mut source = Source::start(version, &[]);
        source.commit_rows(1, 20);
        source.back_up();
        source.commit_rows(21, 40);
        source.archive_log();
        source.server.stop();
        let signal = source.server.data_dir.join("standby.signal");
        std::fs::write(&signal, b"").unwrap();
        source.server.own(&signal);
        source.server.launch();
        assert_eq!(source.server.sql("SELECT pg_promote()"), "t");
        assert!(source.server.sql("SELECT pg_walfile_name(pg_current_wal_lsn())").starts_with("00000002"));
        source.commit_rows(41, 60);
        source.server.sql("SELECT pg_switch_wal()");
        source.commit_rows(61, 70);
        source.archive_log();
        let clone = Clone::stage(&source).await;
        let recovered = clone.recover(&source, Target::Latest).await.unwrap();
        assert_eq!(clone.ledger(&source).await, rows(70));
        let timelines = (recovered.departed_at.wal().unwrap().0, recovered.now_at.wal().unwrap().0);
        assert_eq!(timelines, (2, 3));
    }
}
