//! Database servers on this host.

pub mod postgres;
