//! One binary for all integration tests.

mod support;

mod bad_input;
mod download;
mod hostile_bytes;
mod catalogue_scale;
mod story_cluster;
mod story_cost;
mod engine_contract;
mod story_fencing;
mod story_group;
mod story_held;
mod story_schedule;
mod jobs_fake;
mod mysql_clone;
mod story_killing;
mod peers;
mod postgres_backup;
mod postgres_clone;
mod postgres_source;
mod s3_errors;
mod s3_lease;
mod s3_links;
mod s3_outage;
mod s3_store;
mod s3_wire;
mod story_s3;
mod story_slot;
mod redis_expired;
mod redis_source;
mod store_contract;
mod story_redis;
mod story_valkey;
mod story_mariadb;
mod story_passwords;
mod story_postgres;
