//! What the integration tests share.

pub mod hosts;
pub mod ledger;
pub mod postgres;
pub mod two_hosts;
