//! Fencing in a bucket: of two agents that want the lease of one incarnation at the same moment, exactly one has it.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keiki::base::clock::SystemClock;
use keiki::error::Kind;
use keiki::model::id::{IncarnationId, RunId};
use keiki::model::incarnation::LeaseHolder;
use keiki::repo::lease::LeaseKeeper;
use keiki::repo::repository::Repository;
use keiki::store::s3::S3Options;

use super::support::hosts::{Host, free_port, tail, wait_for};
use super::support::s3::in_process::{self, Conditions};
use super::support::s3::{Weed, fresh_prefix, open};
use super::support::two_hosts::{SOON, Ship, TwoHosts, Via, wait_until_shipped};

const ROUNDS: usize = 8;

fn holder(number: usize) -> LeaseHolder {
    LeaseHolder {
        host: format!("host-{number}"),
        run: RunId::fresh(),
        machine_id: format!("machine-{number}"),
        boot_id: format!("boot-{number}"),
        process_id: 1,
        process_start_ticks: 1,
    }
}

/// Agents with connections of their own race for leases; each of them can renew what it has, and nothing else.
async fn race(options: S3Options, agents: usize) {
    Repository::init(open(options.clone()).await, Timestamp::now()).await.unwrap();
    for _ in 0..ROUNDS {
        let incarnation = IncarnationId::fresh();
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..agents {
            let repository = Repository::open(open(options.clone()).await).await.unwrap();
            tasks.spawn(async move {
                let (clock, ttl) = (Arc::new(SystemClock), Duration::from_secs(60));
                LeaseKeeper::acquire(repository, incarnation, holder(number), clock, ttl, |_| true).await
            });
        }
        let mut keepers = Vec::new();
        for outcome in tasks.join_all().await {
            match outcome {
                Ok(keeper) => keepers.push(keeper),
                Err(error) => {
                    assert_eq!(error.kind(), Kind::Fenced, "{error}");
                    assert!(error.message().contains("holds it"), "{error}");
                }
            }
        }
        assert_eq!(keepers.len(), 1, "the lease has {} holders", keepers.len());
        keepers[0].renew(None).await.unwrap();
        keepers[0].check().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_racing_agents_has_the_lease_where_conditions_are_honoured() {
    race(Weed::shared().options(&fresh_prefix()), 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_racing_agents_has_the_lease_where_conditions_are_ignored() {
    let directory = tempfile::tempdir().unwrap();
    race(in_process::start(directory.path(), Conditions::Ignored).await, 3).await;
}

#[test]
fn of_two_agents_for_an_instance_in_a_bucket_one_archives_also_if_they_start_at_the_same_moment() {
    let lines = Weed::shared().repository_lines(&fresh_prefix());
    let mut stage = TwoHosts::start_on(Ship::ArchiveCommand, Via::Directory, &lines);
    let mut twin = Host::start_twin(&stage.lab, &stage.a, "twin", free_port());
    wait_for("the twin to stop", SOON, || twin.instance("orders")["state"] == "stopped");
    let problem = twin.instance("orders")["problem"].to_string();
    assert!(problem.contains("holds it") || problem.contains("has it"), "{problem}\n{}", tail(&twin.log(), 20));
    stage.source.sql("CREATE TABLE t AS SELECT 1 AS i");
    stage.wait_until_shipped();
    assert_eq!(stage.a.instance("orders")["state"], "archiving");

    // Neither is there before the other: whoever is first, the other one says who it is and ships nothing.
    for round in 0..4 {
        stage.a.stop_agent();
        twin.stop_agent();
        let racers = if round % 2 == 0 { [&mut stage.a, &mut twin] } else { [&mut twin, &mut stage.a] };
        racers.into_iter().for_each(Host::spawn_agent);
        let state = |host: &Host| host.instance("orders")["state"].as_str().unwrap_or_default().to_string();
        wait_for("the race to be decided", SOON, || {
            let mut states = [state(&stage.a), state(&twin)];
            states.sort();
            states == ["archiving", "stopped"]
        });
        let is_first = state(&stage.a) == "archiving";
        let (winner, loser) = if is_first { (&stage.a, &twin) } else { (&twin, &stage.a) };
        let problem = loser.instance("orders")["problem"].to_string();
        let process = format!("holds it (process {}", winner.agent_process_id());
        assert!(problem.contains(&process), "{problem}\n{}", tail(&loser.log(), 20));
        stage.source.sql(&format!("INSERT INTO t VALUES ({round})"));
        wait_until_shipped(winner, "orders");
        assert_eq!([state(winner), state(loser)], ["archiving", "stopped"]);
        println!("round {round}: the first host {}", if is_first { "archives" } else { "does not" });
    }
}
