//! What every store promises, checked on every store: alone, behind a fault injector that does nothing, and through a
//! peer whose connection breaks all the time. A new store adds one `contract_holds_for!` line.

#[path = "store_contract/promises.rs"]
mod promises;
#[path = "store_contract/faults.rs"]
mod faults;
#[path = "store_contract/directory.rs"]
mod directory;
#[path = "store_contract/links.rs"]
mod links;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use keiki::base::clock::SystemClock;
use keiki::base::retry::RetryPolicy;
use keiki::error::Kind;
use keiki::model::capabilities::Capabilities;
use keiki::store::faulty::{Fault, Faults, FaultyStore, Operation, When};
use keiki::store::fs::FsStore;
use keiki::store::memory::MemoryStore;
use keiki::store::peer::PeerStore;
use keiki::store::s3::S3Options;
use keiki::store::{Key, Store};

use crate::support::s3::in_process::{self, Conditions};
use crate::support::s3::{fresh_prefix, named, open};

/// A fresh store and what must live as long as it does.
pub struct Fixture {
    pub store: Arc<dyn Store>,
    pub directory: Option<tempfile::TempDir>,
}

pub fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

/// Bytes of which no two stretches are the same.
pub fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(length).collect::<Vec<u8>>().into()
}

pub fn memory() -> Fixture {
    Fixture { store: Arc::new(MemoryStore::new("test")), directory: None }
}

pub fn directory() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    Fixture { store: Arc::new(FsStore::open(directory.path()).unwrap()), directory: Some(directory) }
}

pub fn behind_faults(fixture: Fixture, faults: &Faults) -> Fixture {
    Fixture { store: Arc::new(FaultyStore::new(fixture.store, faults.clone())), ..fixture }
}

pub fn through_peer(fixture: Fixture) -> Fixture {
    let policy = RetryPolicy {
        first_wait: Duration::from_micros(100),
        longest_wait: Duration::from_millis(2),
        attempts_max: Some(40),
        warn_from_failure: 100,
    };
    Fixture { store: Arc::new(PeerStore::over(fixture.store, Arc::new(SystemClock), policy)), ..fixture }
}

/// A prefix of its own on a real server, with what the server can do found out by trying.
pub async fn s3_on_a_real_server() -> Fixture {
    static FOUND: tokio::sync::OnceCell<Capabilities> = tokio::sync::OnceCell::const_new();
    let store = s3_by_claims().await.store;
    let look = || async {
        let found = store.probe().await.unwrap().unwrap();
        println!("what the server can do: {found:?}");
        found
    };
    let found = FOUND.get_or_init(look).await;
    if !named::is_named() {
        assert!(found.conditional_create && found.conditional_replace && found.conditional_complete, "{found:?}");
    }
    store.adopt(found);
    Fixture { store, directory: None }
}

/// The same as long as nothing is known about the server.
pub async fn s3_by_claims() -> Fixture {
    let options = named::options(&fresh_prefix());
    Fixture { store: open(S3Options { part_bytes: 5 << 20, ..options }).await, directory: None }
}

/// s3s-fs does not honour conditions under a race, so it is used as a server that does not honour them at all.
pub async fn s3_in_process() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let mut options = in_process::start(directory.path(), Conditions::Ignored).await;
    options.part_bytes = 5 << 20;
    Fixture { store: open(options).await, directory: Some(directory) }
}

/// Every kind of call fails now and then, half of the failures after the work was done, and long bodies break.
fn broken_connection() -> Faults {
    let faults = Faults::new();
    for operation in [Operation::Get, Operation::Put, Operation::Head, Operation::List, Operation::Delete] {
        faults.inject(operation, When::EveryNth(3), Fault::Fail(Kind::Unreachable));
        faults.inject(operation, When::EveryNth(4), Fault::AnswerLost);
    }
    faults.inject(Operation::Get, When::Every, Fault::CutBody(3_000_001));
    faults
}

/// Makes one test of each promise for a store.
macro_rules! contract_holds_for {
    ($name:ident, $fixture:expr, [$($promise:ident),* $(,)?]) => {
        mod $name {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $promise() {
                    let fixture = $fixture;
                    promises::$promise(fixture.store.clone()).await;
                }
            )*
        }
    };
    ($name:ident, $fixture:expr) => {
        contract_holds_for!($name, $fixture, [
            what_is_put_is_read_and_found,
            a_range_gives_exactly_its_bytes_and_a_wrong_one_is_refused,
            a_replaced_object_has_another_tag_each_time,
            what_is_not_there_is_not_found_and_may_be_deleted,
            of_racing_creates_one_wins_and_its_bytes_stay,
            of_racing_if_match_puts_one_wins,
            an_if_match_put_fails_when_the_object_changed_or_went,
            a_listing_has_every_key_once_in_byte_order_from_any_start,
            a_streamed_object_is_whole,
            a_stream_that_fails_stores_nothing,
            a_stream_that_is_given_up_stores_nothing,
            a_reader_sees_the_old_or_the_new_object_and_never_a_mixture,
        ]);
    };
}

contract_holds_for!(of_s3_on_a_real_server, s3_on_a_real_server().await);
// What has no condition goes the same way as above; the listing has 2500 objects to create, each with claims.
contract_holds_for!(
    of_s3_on_a_real_server_by_claims,
    s3_by_claims().await,
    [
        a_replaced_object_has_another_tag_each_time,
        of_racing_creates_one_wins_and_its_bytes_stay,
        of_racing_if_match_puts_one_wins,
        an_if_match_put_fails_when_the_object_changed_or_went,
        a_streamed_object_is_whole,
        a_stream_that_fails_stores_nothing,
        a_stream_that_is_given_up_stores_nothing,
    ]
);
// Left out is what s3s-fs cannot do, which keeps keys as paths of a file system: it answers 500 to a question for a key
// that is a directory, its listings say nothing of tags, and a name must leave room for what it adds to it. The server
// above it does all of this by the same code.
contract_holds_for!(
    of_s3_in_process_without_conditions,
    s3_in_process().await,
    [
        a_range_gives_exactly_its_bytes_and_a_wrong_one_is_refused,
        a_replaced_object_has_another_tag_each_time,
        of_racing_creates_one_wins_and_its_bytes_stay,
        of_racing_if_match_puts_one_wins,
        an_if_match_put_fails_when_the_object_changed_or_went,
        a_streamed_object_is_whole,
        a_stream_that_fails_stores_nothing,
        a_stream_that_is_given_up_stores_nothing,
        a_reader_sees_the_old_or_the_new_object_and_never_a_mixture,
    ]
);
// Without what needs writers that race with readers: a link is to an object that is there. Listings have a test of their
// own beside that store, because all links would be made again for each page.
contract_holds_for!(
    of_s3_read_by_links,
    links::reading_by_links(s3_on_a_real_server().await),
    [
        what_is_put_is_read_and_found,
        a_range_gives_exactly_its_bytes_and_a_wrong_one_is_refused,
        what_is_not_there_is_not_found_and_may_be_deleted,
        a_streamed_object_is_whole,
        a_stream_that_fails_stores_nothing,
    ]
);
contract_holds_for!(of_memory, memory());
contract_holds_for!(of_a_directory, directory());
contract_holds_for!(of_memory_behind_no_faults, behind_faults(memory(), &Faults::new()));
contract_holds_for!(of_a_directory_behind_no_faults, behind_faults(directory(), &Faults::new()));
contract_holds_for!(of_a_peer, through_peer(memory()));
contract_holds_for!(of_a_peer_behind_no_faults, behind_faults(through_peer(directory()), &Faults::new()));
contract_holds_for!(of_a_peer_with_a_broken_connection, through_peer(behind_faults(memory(), &broken_connection())));
contract_holds_for!(of_another_agent, crate::peers::behind_another_agent(directory()).await);
contract_holds_for!(of_a_peer_that_is_another_agent, through_peer(crate::peers::behind_another_agent(memory()).await));
