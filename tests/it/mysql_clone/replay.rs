//! Replay to every kind of target, and what is refused.

use super::*;

#[tokio::test]
async fn a_mariadb_clone_has_exactly_the_transactions_of_its_target() {
    let mut source = Source::start(&[]).await;
    source.commit_rows(1, 40).await;
    source.back_up().await;
    source.commit_rows(41, 80).await;
    source.session.execute("FLUSH BINARY LOGS").await.unwrap();
    source.commit_rows(81, 100).await;
    let gtid_of_100 = source.session.value("SELECT @@last_gtid").await.unwrap().unwrap();
    source.commit_rows(101, 120).await;
    source.session.execute("ALTER TABLE shop.ledger ADD COLUMN extra INT DEFAULT 7").await.unwrap();
    let second = source.quiet_second().await;
    let position = source.position().await;
    source.session.execute("ALTER TABLE shop.ledger DROP COLUMN extra").await.unwrap();
    source.session.execute("CREATE USER joe@localhost IDENTIFIED BY 'x'").await.unwrap();
    source.session.execute("FLUSH BINARY LOGS").await.unwrap();
    source.session.execute("INSERT INTO shop.old VALUES (1)").await.unwrap();
    source.commit_rows(121, 150).await;
    source.archive_log().await;
    let gtid = |included| Target::Transaction { id: gtid_of_100.clone(), included };
    let targets = [
        (gtid(true), 100, 2),
        (gtid(false), 99, 2),
        (Target::Backup(a_backup_id()), 40, 2),
        (Target::Position(position), 120, 3),
        (Target::Time(second), 120, 3),
        (Target::Latest, 150, 2),
    ];
    for (target, expected, columns) in targets {
        let clone = Clone::stage(&source).await;
        if let Target::Transaction { id, included } = &target {
            let find = async |file: &str, held: &[String]| {
                clone.cloner.find_transaction(id, file, held, &source.archive).await.unwrap()
            };
            let (start, end) = find("binlog.0000000002", &[]).await.unwrap();
            assert!(start < end && end < position, "{included}");
            assert_eq!(find("binlog.0000000002", &["0-5-1..2".into()]).await, None);
            assert_eq!(find("binlog.0000000001", &[]).await, None);
        }
        let recovered = clone.recover(&source, target.clone()).await.unwrap();
        assert_eq!(clone.rows().await, rows(expected), "{target}");
        let session = clone.session().await;
        let sql =
            "SELECT COUNT(*) FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = 'shop' AND TABLE_NAME = 'ledger'";
        assert_eq!(session.number(sql).await.unwrap(), columns, "{target}");
        if target == Target::Position(position) {
            assert_eq!(recovered.departed_at, position);
        }
        // Asking again after the agent died gives the same answer.
        assert_eq!(clone.recover(&source, target).await.unwrap().departed_at, recovered.departed_at);
    }
}

#[tokio::test]
async fn an_accepted_mariadb_clone_goes_on_in_a_log_of_its_own() {
    let mut source = Source::start(&[]).await;
    source
        .session
        .execute("CREATE EVENT shop.tick ON SCHEDULE EVERY 1 SECOND DO DELETE FROM shop.ledger")
        .await
        .unwrap();
    source.commit_rows(1, 10).await;
    source.back_up().await;
    source.commit_rows(11, 20).await;
    let later = "CREATE EVENT shop.later ON SCHEDULE EVERY 1 SECOND DO DELETE FROM shop.ledger";
    source.session.execute(later).await.unwrap();
    source.archive_log().await;
    let gtid = source.session.value("SELECT @@gtid_binlog_pos").await.unwrap().unwrap();
    let clone = Clone::stage(&source).await;
    clone.recover(&source, Target::Latest).await.unwrap();
    let items = clone.cloner.clean_up(&clone.site).await.unwrap();
    assert!(items.iter().any(|item| item.what == "events" && item.done.contains("shop.later, shop.tick")), "{items:?}");
    let held = clone.cloner.hand_over(&clone.site, false).await.unwrap();
    assert!(!clone.cloner.is_running(&clone.site.data_dir));
    assert_eq!(clone.cloner.hand_over(&clone.site, true).await.unwrap(), held);
    let session = clone.session().await;
    let ids =
        session.query("SELECT @@server_id AS id, @@gtid_binlog_pos AS pos, @@log_bin AS log, @@port AS port").await;
    let ids = ids.unwrap();
    assert_ne!(ids.first("id"), Some("5"));
    assert_eq!((ids.first("pos"), ids.first("log")), (Some(gtid.as_str()), Some("1")));
    assert_eq!(ids.first("port"), Some(clone.site.port.to_string().as_str()));
    assert_eq!(clone.rows().await, rows(20));
    session.execute("INSERT INTO shop.ledger VALUES (1000, 'of the clone')").await.unwrap();
    let next = session.value("SELECT @@last_gtid").await.unwrap().unwrap();
    let sequence = |gtid: &str| gtid.rsplit('-').next().unwrap().parse::<u64>().unwrap();
    assert_eq!(sequence(&next), sequence(&gtid) + 1);
    let leftovers: Vec<String> = std::fs::read_dir(&clone.site.data_dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("keiki") || name.starts_with("xtrabackup"))
        .collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
    // After a restart of the machine it is launched as it is.
    drop(session);
    clone.cloner.stop(&clone.site).await.unwrap();
    let site = &clone.site;
    let accepted = AcceptedClone {
        data_dir: site.data_dir.clone(),
        run_dir: site.run_dir.clone(),
        bin_dir: None,
        port: site.port,
        run_as: site.run_as.clone(),
    };
    clone.cloner.launch(&accepted).await.unwrap();
    clone.cloner.launch(&accepted).await.unwrap();
    // It is a source like any other, with another life of the same data.
    let mut config = source.server.source("copy");
    config.data_dir = clone.site.data_dir.clone();
    config.socket = clone.site.run_dir.join(SOCKET_FILE);
    config.user = ACCOUNT.to_string();
    config.password_file = Some(clone.site.run_dir.join(PASSWORD_FILE));
    let engine = MySqlEngine::new(config);
    assert_eq!(engine.identify().await.unwrap(), held);
    let listing = engine.list_log(None).await.unwrap();
    assert_eq!(listing.files.first().unwrap().name, "binlog.0000000001");
    // Its account logs in with a password, for the backup program too.
    let sink = DirectorySink::new(&source.server.work_dir.join("second"));
    let span = engine.back_up("second", Arc::new(sink), CancellationToken::new()).await.unwrap();
    assert!(span.facts["gtid_state"].starts_with("0-") && span.start == span.stop, "{span:?}");
}

#[tokio::test]
async fn much_log_is_replayed_in_batches_the_next_of_which_is_placed_meanwhile() {
    let mut source = Source::start(&["--sync-binlog=0", "--innodb-flush-log-at-trx-commit=0"]).await;
    source.commit_rows(1, 5).await;
    source.back_up().await;
    // More than the first batch holds, and then three files more.
    for sql in [
        "CREATE TABLE shop.wide (id INT PRIMARY KEY, filler TEXT NOT NULL)",
        "INSERT INTO shop.wide SELECT seq, REPEAT(MD5(seq), 31) FROM shop.seq_1_to_36000",
        "FLUSH BINARY LOGS",
    ] {
        source.session.query_within(std::time::Duration::from_secs(120), sql).await.unwrap();
    }
    for from in [6, 26, 46] {
        source.commit_rows(from, from + 19).await;
        source.session.execute("FLUSH BINARY LOGS").await.unwrap();
    }
    source.commit_rows(66, 80).await;
    source.archive_log().await;
    let sum = "SELECT CONCAT(COUNT(*), ' ', SUM(CRC32(filler))) FROM shop.wide";
    let wanted = source.session.value(sum).await.unwrap();
    let clone = Clone::stage(&source).await;
    clone.recover(&source, Target::Latest).await.unwrap();
    assert_eq!(clone.rows().await, rows(80));
    assert_eq!(clone.session().await.value(sum).await.unwrap(), wanted);
    let log = std::fs::read_to_string(clone.site.run_dir.join("mariadb.log")).unwrap();
    assert_eq!(log.matches(" as process ").count(), 2, "the server is started once for each batch");
    let names = std::fs::read_dir(&clone.site.data_dir).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = names.filter(|name| name.to_string_lossy().contains("relay-1.")).collect();
    assert!(left.is_empty(), "{left:?} of the first batch take space");
}

/// Cancels a replay when the log is asked for.
struct CancelledHere(Archive, CancellationToken);

#[async_trait]
impl LogSource for CancelledHere {
    async fn available(&self, name: &str) -> Result<Option<u64>> {
        self.0.available(name).await
    }

    async fn is_sealed(&self, name: &str) -> Result<bool> {
        self.0.is_sealed(name).await
    }

    async fn read(&self, name: &str, from: u64, max_bytes: usize) -> Result<Bytes> {
        self.1.cancel();
        self.0.read(name, from, max_bytes).await
    }
}

#[tokio::test]
async fn a_recovery_of_mariadb_that_was_cancelled_goes_on_or_says_that_it_cannot() {
    let mut source = Source::start(&[]).await;
    source.commit_rows(1, 10).await;
    source.back_up().await;
    source.commit_rows(11, 20).await;
    source.archive_log().await;
    let clone = Clone::stage(&source).await;
    let (cancel, quiet) = (CancellationToken::new(), Arc::new(Quiet));
    cancel.cancel();
    let logs = Arc::new(source.archive.clone());
    let outcome = clone.cloner.recover(&clone.site, &Target::Latest, logs, quiet.clone(), cancel).await;
    assert_eq!(outcome.unwrap_err().kind(), Kind::Cancelled);
    // Another order must not go on with this directory; the same one may.
    let other = clone.recover(&source, Target::Backup(a_backup_id())).await.unwrap_err();
    assert!(other.message().contains("it was being recovered to"), "{other}");
    clone.recover(&source, Target::Latest).await.unwrap();
    assert_eq!(clone.rows().await, rows(20));

    let clone = Clone::stage(&source).await;
    let cancel = CancellationToken::new();
    let logs = Arc::new(CancelledHere(source.archive.clone(), cancel.clone()));
    let outcome = clone.cloner.recover(&clone.site, &Target::Latest, logs, quiet, cancel).await;
    assert_eq!(outcome.unwrap_err().kind(), Kind::Cancelled);
    assert!(!clone.cloner.is_running(&clone.site.data_dir));
    let error = clone.recover(&source, Target::Latest).await.unwrap_err();
    assert!(error.message().contains("an earlier replay was interrupted"), "{error}");
    let error = clone.cloner.hand_over(&clone.site, true).await.unwrap_err();
    assert!(error.message().contains("its recovery did not end"), "{error}");
}

#[tokio::test]
async fn a_backup_program_that_outlived_its_agent_is_ended_before_a_copy_is_worked_on_or_thrown_away() {
    let mut source = Source::start(&[]).await;
    source.commit_rows(1, 5).await;
    source.back_up().await;
    let clone = Clone::stage(&source).await;
    let staged = clone.site.data_dir.join("keiki_staged");
    let program = clone.site.run_dir.join("mariadb-backup");
    std::fs::copy("/bin/sleep", &program).unwrap();
    let start = || std::process::Command::new(&program).arg("600").current_dir(&staged).spawn().unwrap();
    let mut orphan = start();
    stop_now(&clone.site.data_dir).await.unwrap();
    assert!(!orphan.wait().unwrap().success());
    let mut orphan = start();
    clone.recover(&source, Target::Backup(a_backup_id())).await.unwrap();
    assert!(!orphan.wait().unwrap().success());
    assert_eq!(clone.rows().await, rows(5));
}

#[tokio::test]
async fn a_hole_in_the_log_and_a_target_that_is_no_target_are_refused() {
    let mut source = Source::start(&[]).await;
    source.commit_rows(1, 10).await;
    source.back_up().await;
    for from in [11, 21, 31] {
        source.commit_rows(from, from + 9).await;
        source.session.execute("FLUSH BINARY LOGS").await.unwrap();
    }
    source.archive_log().await;
    let clone = Clone::stage(&source).await;
    let before = Target::Position(Position::File { number: 1, offset: 4 });
    assert_eq!(clone.recover(&source, before).await.unwrap_err().kind(), Kind::BadInput);
    let clone = Clone::stage(&source).await;
    assert_eq!(clone.recover(&source, Target::Name("x".into())).await.unwrap_err().kind(), Kind::BadInput);
    // The second file with the content of the third: of the right name, and not what follows.
    std::fs::copy(source.archive.0.join("binlog.0000000003"), source.archive.0.join("binlog.0000000002")).unwrap();
    let clone = Clone::stage(&source).await;
    let error = clone.recover(&source, Target::Latest).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
    assert!(error.message().contains("begins after transaction"), "{error}");
    assert!(!clone.cloner.is_running(&clone.site.data_dir));
}

#[tokio::test]
async fn nothing_is_replayed_of_what_comes_after_a_file_that_is_not_whole() {
    let mut source = Source::start(&[]).await;
    source.commit_rows(1, 10).await;
    source.back_up().await;
    source.session.execute("FLUSH BINARY LOGS").await.unwrap();
    source.commit_rows(11, 20).await;
    let whole_until = source.position().await;
    source.session.execute("FLUSH BINARY LOGS").await.unwrap();
    source.commit_rows(21, 30).await;
    let end = source.position().await;
    source.archive_log().await;
    // All its transactions are there, but nobody knows that.
    source.archive.1 = Some(String::from("binlog.0000000002"));
    let beyond_whole = Target::Position(Position::File { number: 1, offset: 1 << 40 });
    for (target, kind) in [(Target::Position(end), Kind::NotFound), (beyond_whole, Kind::BadInput)] {
        let error = Clone::stage(&source).await.recover(&source, target).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
    for target in [Target::Latest, Target::Position(whole_until)] {
        let clone = Clone::stage(&source).await;
        clone.recover(&source, target).await.unwrap();
        assert_eq!(clone.rows().await, rows(20));
    }
}

#[tokio::test]
async fn a_restored_half_cannot_be_started() {
    let mut source = Source::start(&[]).await;
    source.commit_rows(1, 5).await;
    source.back_up().await;
    let clone = Clone::stage(&source).await;
    let mut command = std::process::Command::new(crate::support::mariadb::program("mariadbd"));
    command
        .args(["--no-defaults", "--skip-networking", "--innodb-buffer-pool-size=32M"])
        .arg(format!("--datadir={}", clone.site.data_dir.display()))
        .arg(format!("--tmpdir={}", clone.site.run_dir.display()))
        .arg(format!("--socket={}", clone.site.run_dir.join("x").display()))
        .arg(format!("--pid-file={}", clone.site.run_dir.join("x.pid").display()));
    crate::support::mariadb::as_user(&mut command, &source.server.user);
    let output = command.output().unwrap();
    assert!(!output.status.success(), "a server got up in a directory that is not recovered");
    // And what that server left behind is not taken for a part of the backup.
    let error = clone.recover(&source, Target::Latest).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
}

#[tokio::test]
async fn ddl_counts_from_when_it_had_run_and_not_from_when_it_began() {
    let mut source = Source::start(&[]).await;
    source.session.execute("CREATE TABLE shop.wide (id INT)").await.unwrap();
    source.commit_rows(1, 5).await;
    source.back_up().await;
    source.commit_rows(6, 10).await;
    // It waits for a lock, and nothing else is committed meanwhile.
    let reader = source.server.connect().await;
    for sql in ["BEGIN", "SELECT COUNT(*) FROM shop.wide"] {
        reader.query(sql).await.unwrap();
    }
    let alter = "ALTER TABLE shop.wide ADD COLUMN extra INT DEFAULT 7";
    let (altered, moment) = tokio::join!(source.session.execute(alter), async {
        tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
        let moment = source.quiet_second().await;
        tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
        reader.query("COMMIT").await.unwrap();
        moment
    });
    altered.unwrap();
    // A session whose clock is wrong: neither is cut off what comes behind it, nor is it in clones of before.
    for sql in ["SET timestamp = 2000000000", "CREATE TABLE shop.late (id INT)", "SET timestamp = DEFAULT"] {
        source.session.execute(sql).await.unwrap();
    }
    let behind = source.quiet_second().await;
    source.commit_rows(11, 15).await;
    source.archive_log().await;
    let columns = "SELECT COUNT(*) FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = 'shop' AND TABLE_NAME = 'wide'";
    let late = "SELECT COUNT(*) FROM information_schema.TABLES WHERE TABLE_SCHEMA = 'shop' AND TABLE_NAME = 'late'";
    for (target, wanted) in [(moment, (10, 1, 0)), (behind, (10, 2, 1))] {
        let clone = Clone::stage(&source).await;
        clone.recover(&source, Target::Time(target)).await.unwrap();
        let session = clone.session().await;
        let found = (clone.rows().await, session.number(columns).await.unwrap(), session.number(late).await.unwrap());
        assert_eq!(found, (rows(wanted.0), wanted.1, wanted.2), "{target}");
    }
}
