//! Groups: clones of two sources that are made, opened and deleted as one, whatever dies in between.

use keiki::job::clone::ports_of_jobs;
use keiki::model::group::{GroupOrder, member_ids};
use keiki::store::faulty::{Fault, Operation, When};

use super::*;

const STEPS: [&str; 7] = ["claim", "check", "grow", "stage", "recover", "clean up", "accept"];
/// Each source commits a number a second; clones are made of this second, in numbers.
const TARGET: u64 = 60;

/// Two sources with the same numbers at the same times, and the moment of number [`TARGET`].
async fn world() -> (World, Target) {
    let mut world = World::new().await;
    world.add_cart().await;
    write_both(&world, 10);
    world.back_up().await;
    world.back_up_instance("cart").await;
    write_both(&world, TARGET - 10);
    let at = Target::Time(world.clock.now());
    write_both(&world, 50);
    for archiver in world.archivers() {
        archiver.ship_now().await.unwrap();
    }
    (world, at)
}

fn write_both(world: &World, count: u64) {
    let cart = &world.cart.as_ref().unwrap().database;
    for _ in 0..count {
        world.write(1);
        cart.write(cart.count() + 1).unwrap();
    }
}

fn group(target: &Target, hold: bool) -> Order {
    let task = Task::CloneGroup(GroupOrder {
        group: "shop".into(),
        clone_name: "check".into(),
        sources: vec!["orders".into(), "a/cart".into()],
        target: target.clone(),
        hold,
    });
    Order { id: JobId::fresh(), by: "operator:ann".into(), task }
}

fn assert_both_hold(world: &World, count: u64, what: impl std::fmt::Debug) {
    for name in ["check-orders", "check-cart"] {
        assert_eq!(rows_in(&world.clone_dir(name)).unwrap(), numbers(count), "{name}, {what:?}");
    }
}

fn states(agent: &JobRunner, order: &Order) -> Vec<JobState> {
    member_ids(order).into_iter().map(|id| agent.show(id).unwrap().state).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_whose_agent_dies_at_any_boundary_of_its_steps_is_finished_by_the_next_one() {
    for step in STEPS {
        for moment in [Moment::Before(step), Moment::After(step)] {
            let (world, at) = world().await;
            let order = group(&at, false);
            let agent = world.agent().await;
            *world.death.at.lock().unwrap() = Some(moment);
            agent.submit(order.clone()).await.unwrap();
            tokio::time::timeout(Duration::from_secs(60), world.death.has_come.notified()).await.expect("it comes");
            agent.shut_down().await;
            *world.death.at.lock().unwrap() = None;

            let agent = world.agent().await;
            let report = agent.wait(order.id).await.unwrap();
            assert_eq!(report.state, JobState::Done, "{moment:?}: {:?}", report.error);
            assert_eq!(states(&agent, &order), [JobState::Done; 2], "{moment:?}");
            assert_both_hold(&world, TARGET, moment);
            // Two sources and two clones, each once, at ports of their own.
            assert_eq!(world.incarnations().await.len(), 4, "{moment:?}");
            let places = world.registry.places();
            assert!(places.len() == 2 && places[0].port != places[1].port, "{places:?}");
            // The same order again is answered with the job as it stands.
            assert_eq!(agent.submit(order.clone()).await.unwrap().state, JobState::Done);
            agent.shut_down().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_group_is_opened_or_deleted_as_one_and_its_members_by_nobody_else() {
    let (world, at) = world().await;
    let agent = world.agent().await;
    let order = group(&at, true);
    assert_eq!(run(&agent, order.clone()).await.state, JobState::Held);
    assert_eq!(states(&agent, &order), [JobState::Held; 2]);
    assert!(world.registry.places().is_empty(), "a held group is open");
    for id in member_ids(&order) {
        assert_eq!(agent.group_of(id).unwrap().order.id, order.id);
    }
    let ports = ports_of_jobs(&agent);
    assert!(ports.len() == 2 && ports[0] != ports[1], "{ports:?}");
    // Names of members are taken; another order under the same id is another order.
    let rival = agent.submit(clone_order("check-cart", Target::Latest)).await.unwrap_err();
    assert!(rival.kind() == Kind::Conflict && rival.message().contains("clone name 'check-cart'"), "{rival}");
    let changed = Order { id: order.id, ..group(&at, false) };
    assert_eq!(agent.submit(changed).await.unwrap_err().kind(), Kind::Conflict);

    agent.discard("check").await.unwrap();
    assert_eq!(agent.wait(order.id).await.unwrap().state, JobState::Cancelled);
    assert_eq!(states(&agent, &order), [JobState::Cancelled; 2]);
    assert_eq!(world.traces(), Vec::<String>::new());

    let order = group(&at, true);
    assert_eq!(run(&agent, order.clone()).await.state, JobState::Held);
    agent.accept("check").await.unwrap();
    assert_eq!(agent.wait(order.id).await.unwrap().state, JobState::Done);
    assert_eq!(world.registry.places().len(), 2);
    assert!(member_ids(&order).into_iter().all(|id| agent.group_of(id).is_none()), "decided about");
    assert_both_hold(&world, TARGET, "accepted");
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_cancelled_with_all_that_its_members_have_made() {
    let (world, at) = world().await;
    world.faults.inject_for_key(Operation::Get, "/packs/", When::Every, Fault::Delay(Duration::from_millis(300)));
    let agent = world.agent().await;
    let order = group(&at, false);
    agent.submit(order.clone()).await.unwrap();
    let mut watcher = agent.subscribe(order.id).unwrap();
    let grows = |report: &JobReport| report.steps.iter().any(|step| step.name == "grow" && step.total == 2);
    tokio::time::timeout(Duration::from_secs(60), watcher.wait_for(grows)).await.unwrap().unwrap();
    agent.cancel(order.id).await.unwrap();
    assert_eq!(agent.wait(order.id).await.unwrap().state, JobState::Cancelled);
    assert_eq!(states(&agent, &order), [JobState::Cancelled; 2]);
    assert_eq!(world.traces(), Vec::<String>::new());
    world.faults.clear();
    assert_eq!(run(&agent, group(&at, false)).await.state, JobState::Done);
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_with_a_failed_member_opens_nobody_and_goes_on_from_there() {
    let (world, at) = world().await;
    let cart = world.cart.as_ref().unwrap().archiver.incarnation();
    let broken = Fault::Fail(Kind::Damaged);
    world.faults.inject_for_key(Operation::Get, &format!("{cart}/packs/"), When::Every, broken);
    let agent = world.agent().await;
    let order = group(&at, false);
    let report = run(&agent, order.clone()).await;
    assert_eq!(report.state, JobState::Failed);
    let error = report.error.unwrap();
    assert!(error.message().starts_with("cannot clone group 'shop': 'check-cart': "), "{error}");
    assert!(error.hint_text().unwrap().contains("keiki discard check"), "{error:?}");
    // The other one is made all the same, and waits.
    assert_eq!(agent.wait(member_ids(&order)[0]).await.unwrap().state, JobState::Held);
    assert!(world.registry.places().is_empty());
    world.faults.clear();
    agent.resume(order.id).await.unwrap();
    let report = agent.wait(order.id).await.unwrap();
    assert_eq!(report.state, JobState::Done, "{:?}", report.error);
    assert_both_hold(&world, TARGET, "resumed");
    agent.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_begins_when_one_member_cannot_reach_the_moment() {
    let (world, _) = world().await;
    // A clock that goes on: nothing later than now is archived.
    let future = Target::Time(world.clock.now() + Duration::from_secs(3600));
    let agent = world.agent().await;
    let order = group(&future, false);
    let report = run(&agent, order.clone()).await;
    assert_eq!(report.state, JobState::Failed);
    assert!(report.error.unwrap().message().starts_with("cannot clone group 'shop': cannot clone 'a/orders' to "));
    assert!(report.checks.iter().any(|item| item.what == "check-cart: target"), "all members are looked at");
    assert!(member_ids(&order).into_iter().all(|id| agent.show(id).is_err()), "a member has begun");
    assert_eq!(world.traces(), Vec::<String>::new());
    // The latest moment of all is one that both can show.
    let latest = run(&agent, group(&Target::Latest, false)).await;
    assert_eq!(latest.state, JobState::Done, "{:?}", latest.error);
    assert_both_hold(&world, TARGET + 50, "latest");
    agent.shut_down().await;
}
