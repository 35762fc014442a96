//! A counting "database" that obeys the engine's ports, so that jobs can be tested in milliseconds.
//!
//! Its data directory holds `rows` (eight bytes per event, the value at its place), `log/NNNNNNNN` (records of 64
//! bytes, 64 to a file), `control` (without it nothing starts: the marker), `running` while a "server" runs there, and
//! `quarantine` in a clone that was not handed over. A position is the number of events that it includes. Like a real
//! database, its backup is torn until the log up to the stop position has been replayed over it.

pub mod clone;
pub mod database;
pub mod geometry;
pub mod record;
pub mod source;

pub use clone::FakeCloneEngine;
pub use database::FakeDatabase;
pub use source::FakeEngine;
