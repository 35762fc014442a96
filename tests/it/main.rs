//! One binary for all integration tests.

mod support;

mod bad_input;
mod engine_contract;
mod jobs_fake;
mod peers;
mod postgres_backup;
mod postgres_clone;
mod postgres_source;
mod store_contract;
mod story_postgres;
