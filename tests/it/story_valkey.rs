//! The ledger story of Redis on Valkey, whose snapshots have a format of their own from version 9 on.

use keiki::engine::redis::LogKind;

use super::story_redis::tell;
use super::support::redis::Product;

#[test]
fn story_valkey_8_every_key_is_there_exactly_as_it_was_by_then() {
    tell(Product::Valkey8, LogKind::AppendOnlyFile);
}

#[test]
fn story_valkey_9_every_key_is_there_exactly_as_it_was_by_then() {
    tell(Product::Valkey9, LogKind::AppendOnlyFile);
}

#[test]
fn story_valkey_9_without_an_append_only_file_is_cloned_from_its_replication_stream() {
    tell(Product::Valkey9, LogKind::ReplicationStream);
}
