//! One binary for all integration tests.

mod support;

mod engine_contract;
mod postgres_backup;
mod postgres_clone;
mod postgres_source;
mod store_contract;
mod peers;
