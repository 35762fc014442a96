//! Unit tests of `lease`.

use super::*;
use crate::base::clock::ManualClock;
use crate::model::id::RunId;
use crate::store::Store;
use crate::store::faulty::{Fault, Faults, FaultyStore, Operation, When};
use crate::store::memory::MemoryStore;

const TTL: Duration = Duration::from_secs(30);

fn holder(machine: &str, boot: &str, process_id: u32) -> LeaseHolder {
    LeaseHolder {
        host: format!("host-{machine}"),
        run: RunId::fresh(),
        machine_id: machine.to_string(),
        boot_id: boot.to_string(),
        process_id,
        process_start_ticks: 5,
    }
}

struct Site {
    store: Arc<dyn Store>,
    repo: Arc<Repository>,
    clock: Arc<ManualClock>,
    incarnation: IncarnationId,
}

async fn site_on(store: Arc<dyn Store>) -> Site {
    let clock = ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap());
    let repo = Repository::init(store.clone(), clock.now()).await.unwrap();
    Site { store, repo, clock, incarnation: IncarnationId::fresh() }
}

async fn site() -> Site {
    site_on(Arc::new(MemoryStore::new("t"))).await
}

impl Site {
    async fn acquire(&self, me: &LeaseHolder, is_alive: bool) -> Result<Arc<LeaseKeeper>> {
        let clock: Arc<dyn Clock> = self.clock.clone();
        LeaseKeeper::acquire(self.repo.clone(), self.incarnation, me.clone(), clock, TTL, |_| is_alive).await
    }
}

fn kind_of<T>(result: Result<T>) -> Kind {
    result.err().unwrap().kind()
}

#[test]
fn a_lease_changes_hands_only_when_its_holder_is_known_to_be_gone() {
    let old = holder("m", "b", 7);
    let lease = Lease { epoch: 3, holder: old.clone(), renewed_at: Timestamp::UNIX_EPOCH, covered: None };
    let soon = Timestamp::from_second(30).unwrap();
    let late = Timestamp::from_second(31).unwrap();
    let years = Timestamp::from_second(1 << 30).unwrap();
    let before = Timestamp::from_second(-5).unwrap();
    let other_machine = holder("n", "b", 7);
    let rebooted = holder("m", "c", 7);
    let next_run = holder("m", "b", 9);
    let decide = |me: &LeaseHolder, now, is_alive| may_take(Some(&lease), me, now, TTL, is_alive);

    assert_eq!(may_take(None, &other_machine, years, TTL, false).unwrap(), Decision::Create);
    assert_eq!(decide(&old, years, true).unwrap(), Decision::Renew);
    assert_eq!(decide(&next_run, soon, false).unwrap(), Decision::TakeOver);
    assert_eq!(kind_of(decide(&next_run, years, true)), Kind::Fenced);
    assert_eq!(decide(&rebooted, late, false).unwrap(), Decision::TakeOver);
    assert_eq!(kind_of(decide(&rebooted, soon, false)), Kind::Unreachable);
    assert_eq!(kind_of(decide(&rebooted, before, false)), Kind::Unreachable);
    for now in [soon, late, years] {
        for is_alive in [true, false] {
            assert_eq!(kind_of(decide(&other_machine, now, is_alive)), Kind::Fenced);
        }
    }
    // A copied state directory brings the run along, but not the machine.
    let copied_run = LeaseHolder { run: old.run, ..other_machine };
    assert_eq!(kind_of(decide(&copied_run, years, false)), Kind::Fenced);
}

#[tokio::test]
async fn of_many_racing_agents_exactly_one_gets_the_lease() {
    let site = Arc::new(site().await);
    let mut racers = tokio::task::JoinSet::new();
    for number in 0..20 {
        let site = site.clone();
        racers.spawn(async move { site.acquire(&holder("m", "b", number), true).await.map(|_| number) });
    }
    let outcomes = racers.join_all().await;
    let winners: Vec<u32> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok().copied()).collect();
    assert_eq!(winners.len(), 1);
    let lease = read_lease(&site.repo, site.incarnation).await.unwrap().unwrap();
    assert_eq!((lease.holder.process_id, lease.epoch), (winners[0], 1));
    for error in outcomes.into_iter().filter_map(|outcome| outcome.err()) {
        assert_eq!(error.kind(), Kind::Fenced);
        assert!(error.message().contains(&format!("host 'host-m' holds it (process {}", winners[0])), "{error}");
    }
}

#[tokio::test]
async fn a_holder_that_was_replaced_stops_for_good_and_says_by_whom() {
    let site = site().await;
    let first = site.acquire(&holder("m", "b", 1), true).await.unwrap();
    let position = Position::Count(5);
    first.renew(Some((position, site.clock.now()))).await.unwrap();
    first.check().unwrap();
    let second = site.acquire(&holder("m", "b", 2), false).await.unwrap();
    assert_eq!(second.epoch().await, 2);
    // What was covered stays covered, whoever archives.
    assert_eq!(second.covered().await.unwrap().0, position);

    let error = first.renew(None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Fenced);
    assert!(error.message().contains("host 'host-m' has it since epoch 2 (process 2)"), "{error}");
    assert_eq!(first.check().unwrap_err(), error);
    assert_eq!(first.renew(None).await.unwrap_err(), error);
    assert_eq!(first.release().await.unwrap_err(), error);
    second.renew(None).await.unwrap();
}

#[tokio::test]
async fn a_renewal_whose_answer_was_lost_is_not_taken_for_a_loss() {
    let faults = Faults::new();
    let site = site_on(Arc::new(FaultyStore::new(Arc::new(MemoryStore::new("t")), faults.clone()))).await;
    let keeper = site.acquire(&holder("m", "b", 1), true).await.unwrap();
    faults.inject_for_key(Operation::Put, "lease.json", When::Nth(1), Fault::AnswerLost);
    assert_eq!(kind_of(keeper.renew(None).await), Kind::Unreachable);
    // Others do not arrive before one is answered.
    faults.inject_for_key(Operation::Put, "lease.json", When::Nth(2), Fault::Fail(Kind::Unreachable));
    site.clock.advance(Duration::from_secs(1));
    assert_eq!(kind_of(keeper.renew(None).await), Kind::Unreachable);
    site.clock.advance(Duration::from_secs(1));
    keeper.renew(Some((Position::Count(9), site.clock.now()))).await.unwrap();
    let lease = read_lease(&site.repo, site.incarnation).await.unwrap().unwrap();
    assert_eq!(lease.covered.unwrap().0, Position::Count(9));
}

#[tokio::test]
async fn nothing_is_published_when_the_last_renewal_is_older_than_the_ttl() {
    let site = site().await;
    let keeper = site.acquire(&holder("m", "b", 1), true).await.unwrap();
    site.clock.advance(TTL);
    keeper.check().unwrap();
    site.clock.advance(Duration::from_millis(1));
    assert_eq!(kind_of(keeper.check()), Kind::Unreachable);
    keeper.renew(None).await.unwrap();
    keeper.check().unwrap();
}

#[tokio::test]
async fn a_released_lease_is_free_for_another_machine_and_its_epoch_goes_on() {
    let site = site().await;
    let first = site.acquire(&holder("m", "b", 1), true).await.unwrap();
    first.release().await.unwrap();
    assert_eq!(kind_of(first.check()), Kind::Fenced);
    let second = site.acquire(&holder("n", "c", 1), true).await.unwrap();
    assert_eq!(second.epoch().await, 2);
}

#[tokio::test]
async fn a_lease_whose_object_was_deleted_is_lost() {
    let site = site().await;
    let keeper = site.acquire(&holder("m", "b", 1), true).await.unwrap();
    site.store.delete(&[object_key(layout::lease_key(site.incarnation)).unwrap()]).await.unwrap();
    assert_eq!(kind_of(keeper.renew(None).await), Kind::Fenced);
    assert_eq!(kind_of(keeper.check()), Kind::Fenced);
}

#[tokio::test]
async fn a_renewal_that_seems_to_lie_in_the_future_does_not_count_as_one() {
    let site = site().await;
    let keeper = site.acquire(&holder("m", "b", 1), true).await.unwrap();
    site.clock.set_back(TTL + Duration::from_millis(1));
    assert_eq!(kind_of(keeper.check()), Kind::Unreachable);
    keeper.renew(None).await.unwrap();
    keeper.check().unwrap();
}

#[tokio::test]
async fn of_two_copies_of_one_process_the_one_that_did_not_renew_last_stops_and_does_not_come_back() {
    let site = site().await;
    let me = holder("m", "b", 1);
    let first = site.acquire(&me, true).await.unwrap();
    site.clock.advance(Duration::from_secs(1));
    let copy = site.acquire(&me, true).await.unwrap();
    site.clock.advance(Duration::from_secs(1));
    copy.renew(None).await.unwrap();
    site.clock.advance(Duration::from_secs(1));
    let error = first.renew(None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Fenced);
    assert!(error.message().contains("renewed at 2026-11-21 10:00:02Z, but not by this process"), "{error}");
    assert_eq!(first.check().unwrap_err(), error);
    assert!(first.is_lost_to_copy() && !copy.is_lost_to_copy());
    // What the process does next is another run, for which its own process is alive.
    let next = LeaseHolder { run: RunId::fresh(), ..me };
    let refused = site.acquire(&next, true).await.err().unwrap();
    assert_eq!(refused.kind(), Kind::Fenced);
    assert_eq!(refused.hint_text(), error.hint_text());
    copy.renew(None).await.unwrap();
}
