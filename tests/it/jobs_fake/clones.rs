//! What clones hold, what they refuse, and what they leave behind.

use keiki::model::check::Verdict;
use keiki::model::id::BackupId;
use keiki::model::position::Position;
use keiki::store::PutCondition;
use keiki::store::faulty::{Fault, Operation, When};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_to_any_second_holds_exactly_what_was_committed_by_then() {
    let world = World::new().await;
    world.write(100);
    world.back_up().await;
    let mut moments = Vec::new();
    for _ in 0..60 {
        world.write(3);
        moments.push((world.clock.now(), world.database.count()));
    }
    let agent = world.agent().await;
    for (number, (at, count)) in moments.iter().enumerate().step_by(9) {
        let name = format!("at-{number}");
        let report = run(&agent, clone_order(&name, Target::Time(*at))).await;
        assert_eq!(report.state, JobState::Done, "{:?}", report.error);
        assert_eq!(rows_in(&world.clone_dir(&name)).unwrap(), numbers(*count), "{at}");
        // Between two commits the earlier one is the last.
        let name = format!("before-{number}");
        let before = *at - Duration::from_millis(1);
        run(&agent, clone_order(&name, Target::Time(before))).await;
        assert_eq!(rows_in(&world.clone_dir(&name)).unwrap(), numbers(count - 1), "{before}");
    }
    let lines: Vec<String> = agent.list()[0].results.iter().map(|line| line.0.clone()).collect();
    for line in ["source", "from backup", "reached", "data directory", "port", "incarnation"] {
        assert!(lines.iter().any(|known| known == line), "no line '{line}' in {lines:?}");
    }
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_reaches_latest_a_named_point_a_quiet_moment_and_one_backup_set() {
    let world = World::new().await;
    world.write(10);
    world.back_up().await;
    world.write(10);
    world.database.name_point("before the migration").unwrap();
    let named = world.database.count();
    world.write(10);
    // Everything that was committed before this moment, and for an hour nothing else.
    world.clock.advance(Duration::from_secs(3600));
    let end = world.database.count();
    let backup = keiki::repo::backup_reader::Backups::new(world.repo.clone());
    let backup = backup.list(world.archiver.incarnation()).await.unwrap().backups.remove(0);
    let targets = [
        (Target::Latest, end),
        (Target::Time(world.clock.now()), end),
        (Target::Name("before the migration".into()), named),
        (Target::Backup(backup.id), 10),
    ];
    let agent = world.agent().await;
    for (number, (target, count)) in targets.into_iter().enumerate() {
        let name = format!("clone-{number}");
        let report = run(&agent, clone_order(&name, target.clone())).await;
        assert_eq!(report.state, JobState::Done, "{target}: {:?}", report.error);
        assert_eq!(rows_in(&world.clone_dir(&name)).unwrap().len() as u64, count, "{target}");
    }
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_kinds_of_files_are_restored_as_they_were() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new().await;
    let dir = &world.database.data_dir;
    std::fs::create_dir_all(dir.join("deep/er")).unwrap();
    std::fs::create_dir(dir.join("empty")).unwrap();
    std::fs::write(dir.join("deep/er/none"), b"").unwrap();
    let mut blob: Vec<u8> = (0..5 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    blob[1 << 20..3 << 20].fill(0);
    std::fs::write(dir.join("deep/blob"), &blob).unwrap();
    std::fs::set_permissions(dir.join("deep/blob"), std::fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("deep/blob", dir.join("link")).unwrap();
    std::fs::write(dir.join("left_out"), b"x").unwrap();
    // More files than a process may have open at a time, in one batch of the manifest.
    std::fs::create_dir(dir.join("many")).unwrap();
    for number in 0..3000u32 {
        std::fs::write(dir.join(format!("many/{number}")), number.to_le_bytes()).unwrap();
    }
    world.write(5);
    world.back_up().await;
    let agent = world.agent().await;
    let report = run(&agent, clone_order("copy", Target::Latest)).await;
    assert_eq!(report.state, JobState::Done, "{:?}", report.error);
    let copy = world.clone_dir("copy");
    assert!(std::fs::read(copy.join("deep/blob")).unwrap() == blob);
    let metadata = std::fs::metadata(copy.join("deep/blob")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o640);
    let allocated = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
    assert!(allocated < 4 << 20, "a hole of 2 MiB became {allocated} bytes of blocks");
    assert_eq!(std::fs::read_link(copy.join("link")).unwrap(), Path::new("deep/blob"));
    assert_eq!(std::fs::read(copy.join("deep/er/none")).unwrap(), b"");
    assert!(copy.join("empty").is_dir() && !copy.join("left_out").exists());
    for number in [0u32, 1499, 2999] {
        assert_eq!(std::fs::read(copy.join(format!("many/{number}"))).unwrap(), number.to_le_bytes());
    }
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_accepted_clone_archives_its_own_life_and_never_its_parents() {
    let world = World::new().await;
    world.write(10);
    world.back_up().await;
    world.write(10);
    let agent = world.agent().await;
    let report = run(&agent, clone_order("check", Target::Latest)).await;
    assert_eq!(report.state, JobState::Done, "{:?}", report.error);
    agent.shut_down().await;
    let registered = world.registry.instances.lock().unwrap()["check"].clone();
    assert_eq!(registered.parent, (world.archiver.incarnation(), Position::Count(20)));
    assert_eq!(*world.registry.first_backups.lock().unwrap(), ["check"]);
    let known = world.incarnations().await;
    assert_eq!(known.len(), 2);
    let recorded = known.iter().find(|incarnation| incarnation.id == registered.incarnation).unwrap();
    assert_eq!((recorded.parent, recorded.instance.as_str()), (Some(registered.parent), "check"));

    let before = world.archive_of(world.archiver.incarnation()).await;
    let clone = Arc::new(FakeDatabase::start(&world.clone_dir("check"), world.clock.clone()).unwrap());
    for _ in 0..100 {
        clone.write(1_000_000).unwrap();
    }
    let engine = Arc::new(FakeEngine::new(clone));
    let root = world.directory.path();
    let archiver = claim("check", "b", root, engine.clone(), &world.repo, &world.clock).await.unwrap();
    assert_eq!(archiver.incarnation(), registered.incarnation);
    archiver.ship_now().await.unwrap();
    assert_eq!(world.archive_of(world.archiver.incarnation()).await, before);
    assert!(world.archive_of(archiver.incarnation()).await.len() > 1);

    // Somebody points the source's instance at the clone, with the source's own state.
    let error = claim("orders", "a", root, engine, &world.repo, &world.clock).await.err().expect("fenced");
    assert_eq!(error.kind(), Kind::Fenced);
    assert_eq!(world.archive_of(world.archiver.incarnation()).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_clone_is_closed_until_it_is_accepted_and_gone_when_it_is_discarded() {
    let world = World::new().await;
    world.write(10);
    world.back_up().await;
    let agent = world.agent().await;
    for name in ["keep", "drop"] {
        let report = run(&agent, changed(clone_order(name, Target::Latest), |order| order.hold = true)).await;
        assert_eq!(report.state, JobState::Held, "{:?}", report.error);
        assert!(world.clone_dir(name).join("quarantine").exists());
    }
    assert_eq!(world.incarnations().await.len(), 1);
    assert!(world.registry.places().is_empty());
    let kept = agent.accept("keep").await.unwrap().order.id;
    let dropped = agent.discard("drop").await.unwrap().order.id;
    assert_eq!(agent.wait(kept).await.unwrap().state, JobState::Done);
    assert_eq!(agent.wait(dropped).await.unwrap().state, JobState::Cancelled);
    assert!(!world.clone_dir("keep").join("quarantine").exists());
    let traces = world.traces();
    assert!(traces.iter().all(|name| name.starts_with("keep")), "{traces:?}");
    assert_eq!(world.incarnations().await.len(), 2);
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_cloned_is_refused_with_a_hint_and_leaves_no_trace() {
    let world = World::new().await;
    world.write(10);
    let early = world.clock.now();
    world.write(10);
    world.back_up().await;
    world.write(10);
    std::fs::create_dir(world.directory.path().join("full")).unwrap();
    std::fs::write(world.directory.path().join("full/letter"), b"x").unwrap();
    let full = world.directory.path().join("full").display().to_string();
    let own = world.database.data_dir.display().to_string();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().port();
    let future = world.clock.now() + Duration::from_secs(7200);
    let latest = || clone_order("check", Target::Latest);
    let cases = [
        (clone_order("check", Target::Time(early)), "before the end of the first backup"),
        (clone_order("check", Target::Time(future)), "archive ends at"),
        (clone_order("check", Target::Name("no such".into())), "no restore point of that name"),
        (clone_order("check", Target::Backup(BackupId::new(future, 1))), "no such backup"),
        (changed(latest(), |order| order.source = "unknown".into()), "unknown"),
        (changed(latest(), |order| order.data_dir = Some(full)), "is not empty"),
        (changed(latest(), |order| order.data_dir = Some(own)), "a server is running"),
        (changed(latest(), |order| order.port = Some(taken)), "is in use"),
    ];
    let agent = world.agent().await;
    for (order, wanted) in cases {
        let report = run(&agent, order).await;
        assert_eq!(report.state, JobState::Failed, "{wanted}");
        let error = report.error.unwrap();
        assert!(error.message().contains(wanted), "'{wanted}' is not in: {error}");
        assert!(error.message().starts_with("cannot clone '"), "{error}");
        assert!(error.hint_text().is_some(), "{error} has no hint");
        assert!(report.checks.iter().all(|item| item.verdict == Verdict::Pass || item.hint.is_some()));
        assert_eq!(world.traces(), Vec::<String>::new());
    }
    assert!(world.directory.path().join("full/letter").exists());
    assert_eq!(world.incarnations().await.len(), 1);
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_in_a_hole_is_refused_and_both_sides_of_it_are_reached() {
    let world = World::new().await;
    world.write(10);
    world.back_up().await;
    world.write(90);
    world.archiver.ship_now().await.unwrap();
    let shipped = (world.clock.now(), world.database.count());
    world.write(100);
    let lost = world.clock.now();
    world.write(100);
    for number in [1, 2, 3] {
        std::fs::remove_file(world.database.data_dir.join(format!("log/{number:08}"))).unwrap();
    }
    world.back_up().await;
    world.write(5);
    let agent = world.agent().await;
    let error = run(&agent, clone_order("hole", Target::Time(lost))).await.error.unwrap();
    assert!(error.message().contains("no archived log covers"), "{error}");
    let report = run(&agent, clone_order("before", Target::Time(shipped.0))).await;
    assert_eq!(report.state, JobState::Done, "{:?}", report.error);
    assert_eq!(rows_in(&world.clone_dir("before")).unwrap(), numbers(shipped.1));
    let report = run(&agent, clone_order("behind", Target::Latest)).await;
    assert_eq!(report.state, JobState::Done, "{:?}", report.error);
    assert_eq!(rows_in(&world.clone_dir("behind")).unwrap(), numbers(305));
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_bytes_and_missing_objects_fail_the_clone_and_its_directory_is_removed() {
    for (part, is_missing) in [("/packs/", false), ("/packs/", true), ("/log/", false), ("/log/", true)] {
        let world = World::new().await;
        // Does not compress, so that its pack is larger than any other and content from end to end.
        let noise: Vec<u8> =
            (0..100_000u32).map(|at| (at.wrapping_mul(at).wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        std::fs::write(world.database.data_dir.join("blob"), noise).unwrap();
        world.write(10);
        world.back_up().await;
        world.write(150);
        world.archiver.ship_now().await.unwrap();
        let prefix = format!("incarnations/{}{part}", world.archiver.incarnation());
        let objects = world.store.list(&prefix, None, 1000).await.unwrap();
        let key = objects.into_iter().max_by_key(|object| object.size_bytes).unwrap().key;
        if is_missing {
            world.store.delete(std::slice::from_ref(&key)).await.unwrap();
        } else {
            let mut bytes = keiki::store::read::read_all(world.store.as_ref(), &key, 1 << 30).await.unwrap().to_vec();
            // Behind the headers of the object and of its first frame, where content lies.
            let middle = bytes.len() / 3;
            bytes[middle] ^= 1;
            world.store.put(&key, bytes.into(), PutCondition::Replace).await.unwrap();
        }
        let agent = world.agent().await;
        let report = run(&agent, clone_order("check", Target::Latest)).await;
        assert_eq!(report.state, JobState::Failed, "{part} {is_missing}");
        let error = report.error.unwrap();
        assert!(error.hint_text().is_some() || error.message().contains("object"), "{error:?}");
        assert_eq!(world.traces(), Vec::<String>::new(), "{part} {is_missing}: {error}");
        assert_eq!(world.incarnations().await.len(), 1);
        agent.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_now_and_then_delays_a_clone_and_does_not_spoil_it() {
    let world = World::new().await;
    world.write(10);
    world.back_up().await;
    world.write(200);
    world.faults.inject_for_key(Operation::Get, "/packs/", When::Nth(1), Fault::CutBody(20));
    let agent = world.agent().await;
    let order = clone_order("check", Target::Latest);
    let report = run(&agent, order.clone()).await;
    if report.state == JobState::Failed {
        agent.resume(order.id).await.unwrap();
        let report = agent.wait(order.id).await.unwrap();
        assert_eq!(report.state, JobState::Done, "{:?}", report.error);
    }
    assert_eq!(rows_in(&world.clone_dir("check")).unwrap(), numbers(210));
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn latest_is_refused_when_the_end_of_the_log_cannot_be_reached_rather_than_less_being_shown() {
    let world = World::new().await;
    world.write(10);
    world.back_up().await;
    world.write(200);
    world.archiver.ship_now().await.unwrap();
    // In the middle a later file shows the hole; at the end only what the lease says was there.
    for file in ["00000001", "00000003"] {
        let prefix = format!("incarnations/{}/log/{file}/", world.archiver.incarnation());
        let objects = world.store.list(&prefix, None, 1000).await.unwrap();
        assert_eq!(objects.len(), 1);
        let kept = keiki::store::read::read_all(world.store.as_ref(), &objects[0].key, 1 << 20).await.unwrap();
        world.store.delete(std::slice::from_ref(&objects[0].key)).await.unwrap();
        let agent = world.agent().await;
        let report = run(&agent, clone_order("check", Target::Latest)).await;
        let error = report.error.unwrap_or_else(|| panic!("without '{file}' there is no latest"));
        assert!(error.message().contains("no archived log covers"), "{error}");
        assert_eq!(world.traces(), Vec::<String>::new());
        agent.shut_down().await;
        world.store.put(&objects[0].key, kept, PutCondition::Create).await.unwrap();
    }
    let agent = world.agent().await;
    assert_eq!(run(&agent, clone_order("check", Target::Latest)).await.state, JobState::Done);
    agent.shut_down().await;
}
