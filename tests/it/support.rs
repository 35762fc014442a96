//! What the integration tests share.

pub mod hosts;
pub mod ledger;
pub mod mariadb;
pub mod matrix;
pub mod mysql;
pub mod postgres;
pub mod redis;
pub mod redis_stage;
pub mod s3;
pub mod s3_proxy;
pub mod s3_recorder;
pub mod sql_ledger;
pub mod two_hosts;
