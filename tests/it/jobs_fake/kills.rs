//! Agents that die in the middle, and jobs that are cancelled there.

use keiki::store::faulty::{Fault, Operation, When};

use super::*;

const STEPS: [&str; 6] = ["claim", "check", "stage", "recover", "clean up", "accept"];

/// Kills the agent at a moment of a clone and returns the order.
async fn die_at(world: &World, moment: Moment, order: Order) -> Order {
    let agent = world.agent().await;
    *world.death.at.lock().unwrap() = Some(moment);
    agent.submit(order.clone()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), world.death.has_come.notified()).await.expect("the moment comes");
    agent.shut_down().await;
    *world.death.at.lock().unwrap() = None;
    order
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_whose_agent_dies_at_any_boundary_of_its_steps_is_finished_by_the_next_one() {
    for step in STEPS {
        for moment in [Moment::Before(step), Moment::After(step)] {
            let world = World::new().await;
            world.write(10);
            world.back_up().await;
            world.write(100);
            world.archiver.ship_now().await.unwrap();
            let before = world.archive_of(world.archiver.incarnation()).await;
            let order = die_at(&world, moment, clone_order("check", Target::Latest)).await;
            let agent = world.agent().await;
            let report = agent.wait(order.id).await.unwrap();
            assert_eq!(report.state, JobState::Done, "{moment:?}: {:?}", report.error);
            assert!(report.steps.iter().all(|step| step.state == StepState::Done));
            assert_eq!(rows_in(&world.clone_dir("check")).unwrap(), numbers(110), "{moment:?}");
            // One clone, one life: nothing that was done twice is there twice.
            assert_eq!(world.incarnations().await.len(), 2, "{moment:?}");
            assert_eq!(world.registry.places().len(), 1);
            assert_eq!(world.archive_of(world.archiver.incarnation()).await, before, "{moment:?}");
            agent.shut_down().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn log_that_is_lost_between_check_and_replay_fails_the_clone_and_does_not_shorten_it() {
    for target in [Target::Latest, Target::Time("2026-11-21T10:03:25Z".parse().unwrap())] {
        let world = World::new().await;
        world.write(10);
        world.back_up().await;
        world.write(200);
        world.archiver.ship_now().await.unwrap();
        let order = die_at(&world, Moment::Before("recover"), clone_order("check", target)).await;
        let prefix = format!("incarnations/{}/log/00000003/", world.archiver.incarnation());
        let objects = world.store.list(&prefix, None, 1000).await.unwrap();
        world.store.delete(std::slice::from_ref(&objects[0].key)).await.unwrap();
        let agent = world.agent().await;
        let report = agent.wait(order.id).await.unwrap();
        assert_eq!(report.state, JobState::Failed);
        let error = report.error.unwrap();
        assert!(error.message().contains("was lost from the repository since the clone was checked"), "{error}");
        assert_eq!(world.traces(), Vec::<String>::new());
        agent.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_restored_directory_cannot_be_started_and_is_restored_again() {
    let world = World::new().await;
    std::fs::write(world.database.data_dir.join("blob"), vec![5u8; 3 << 20]).unwrap();
    world.write(10);
    world.back_up().await;
    world.write(10);
    world.faults.inject_for_key(Operation::Get, "/packs/", When::Every, Fault::Delay(Duration::from_secs(20)));
    let order = clone_order("check", Target::Latest);
    let agent = world.agent().await;
    agent.submit(order.clone()).await.unwrap();
    let begun = world.clone_dir("check").join("blob");
    tokio::time::timeout(Duration::from_secs(60), async {
        while !begun.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the restore has begun");
    agent.shut_down().await;
    assert!(!world.clone_dir("check").join("control").exists(), "what makes it startable must come last");
    // Something of the first attempt lies there that the second does not write.
    std::fs::write(world.clone_dir("check").join("leftover"), b"x").unwrap();
    world.faults.clear();
    let agent = world.agent().await;
    let report = agent.wait(order.id).await.unwrap();
    assert_eq!(report.state, JobState::Done, "{:?}", report.error);
    assert_eq!(rows_in(&world.clone_dir("check")).unwrap(), numbers(20));
    assert!(!world.clone_dir("check").join("leftover").exists());
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_is_cancelled_while_it_is_restored_leaves_nothing() {
    let world = World::new().await;
    world.write(10);
    world.back_up().await;
    world.faults.inject_for_key(Operation::Get, "/packs/", When::Every, Fault::Delay(Duration::from_millis(300)));
    let order = clone_order("check", Target::Latest);
    let agent = world.agent().await;
    agent.submit(order.clone()).await.unwrap();
    until_running(&agent, order.id, "stage").await;
    agent.cancel(order.id).await.unwrap();
    let report = agent.wait(order.id).await.unwrap();
    assert_eq!(report.state, JobState::Cancelled, "{:?}", report.error);
    assert_eq!(world.traces(), Vec::<String>::new());
    // The name is free again.
    world.faults.clear();
    assert_eq!(run(&agent, clone_order("check", Target::Latest)).await.state, JobState::Done);
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_agent_dies_is_taken_again_and_published_once() {
    for step in ["check", "copy", "wait for log", "publish"] {
        for moment in [Moment::Before(step), Moment::After(step)] {
            let world = World::new().await;
            world.write(10);
            let task = Task::Backup { instance: "orders".into(), kind: BackupKind::Manual };
            let order = Order { id: JobId::fresh(), by: "local:root".into(), task };
            let agent = world.agent().await;
            *world.death.at.lock().unwrap() = Some(moment);
            agent.submit(order.clone()).await.unwrap();
            tokio::time::timeout(Duration::from_secs(60), world.death.has_come.notified()).await.unwrap();
            agent.shut_down().await;
            *world.death.at.lock().unwrap() = None;
            let agent = world.agent().await;
            let report = agent.wait(order.id).await.unwrap();
            assert_eq!(report.state, JobState::Done, "{moment:?}: {:?}", report.error);
            let backups = keiki::repo::backup_reader::Backups::new(world.repo.clone());
            assert_eq!(backups.list(world.archiver.incarnation()).await.unwrap().backups.len(), 1, "{moment:?}");
            let report = run(&agent, clone_order("check", Target::Latest)).await;
            assert_eq!(report.state, JobState::Done, "{moment:?}: {:?}", report.error);
            assert_eq!(rows_in(&world.clone_dir("check")).unwrap(), numbers(10));
            agent.shut_down().await;
        }
    }
}

async fn until_running(agent: &JobRunner, id: JobId, step: &str) {
    let mut watcher = agent.subscribe(id).unwrap();
    let is_there = |report: &JobReport| {
        assert_eq!(report.state, JobState::Running, "{:?}", report.error);
        report.steps.iter().any(|found| found.name == step && found.state == StepState::Running)
    };
    tokio::time::timeout(Duration::from_secs(60), watcher.wait_for(is_there)).await.unwrap().unwrap();
}
