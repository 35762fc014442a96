//! What the integration tests share.

pub mod hosts;
pub mod ledger;
pub mod mariadb;
pub mod postgres;
pub mod two_hosts;
