//! What could be in the standard library: no module here knows what a database or a repository is.

pub mod bulk;
pub mod child;
pub mod clock;
pub mod durable;
pub mod journal;
pub mod memory;
pub mod ownership;
pub mod processes;
pub mod random;
pub mod rate;
pub mod resolve;
pub mod retry;
pub mod users;
pub mod watch;
pub mod words;
