//! What every store promises, checked on every store: alone, behind a fault injector that does nothing, and through a
//! peer whose connection breaks all the time. A new store adds one `contract_holds_for!` line.

#[path = "store_contract/promises.rs"]
mod promises;
#[path = "store_contract/faults.rs"]
mod faults;
#[path = "store_contract/directory.rs"]
mod directory;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use keiki::base::clock::SystemClock;
use keiki::base::retry::RetryPolicy;
use keiki::error::Kind;
use keiki::store::faulty::{Fault, Faults, FaultyStore, Operation, When};
use keiki::store::fs::FsStore;
use keiki::store::memory::MemoryStore;
use keiki::store::peer::PeerStore;
use keiki::store::{Key, Store};

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

contract_holds_for!(of_memory, memory());
contract_holds_for!(of_a_directory, directory());
contract_holds_for!(of_memory_behind_no_faults, behind_faults(memory(), &Faults::new()));
contract_holds_for!(of_a_directory_behind_no_faults, behind_faults(directory(), &Faults::new()));
contract_holds_for!(of_a_peer, through_peer(memory()));
contract_holds_for!(of_a_peer_behind_no_faults, behind_faults(through_peer(directory()), &Faults::new()));
contract_holds_for!(of_a_peer_with_a_broken_connection, through_peer(behind_faults(memory(), &broken_connection())));
contract_holds_for!(of_another_agent, crate::peers::behind_another_agent(directory()).await);
contract_holds_for!(of_a_peer_that_is_another_agent, through_peer(crate::peers::behind_another_agent(memory()).await));
