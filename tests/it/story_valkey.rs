//! The ledger story of Redis on Valkey, whose snapshots have a format of their own from version 9 on.

use super::story_redis::tell;
use super::support::redis::Product;

#[test]
fn story_valkey_8_every_key_is_there_exactly_as_it_was_by_then() {
    tell(Product::Valkey8);
}

#[test]
fn story_valkey_9_every_key_is_there_exactly_as_it_was_by_then() {
    tell(Product::Valkey9);
}
