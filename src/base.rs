//! What could be in the standard library: no module here knows what a database or a repository is.

pub mod clock;
pub mod random;
