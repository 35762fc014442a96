//! One binary for all integration tests.

mod support;

mod bad_input;
mod cost;
mod engine_contract;
mod fencing;
mod jobs_fake;
mod killing;
mod peers;
mod postgres_backup;
mod postgres_clone;
mod postgres_source;
mod slot;
mod store_contract;
mod story_postgres;
