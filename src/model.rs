//! The nouns of keiki as values and pure functions.
//!
//! Invariants: nothing here does I/O, reads a clock or is `Serialize`. What goes to disk or over the wire has its
//! own types in `format` and `peer`, converted by hand, so that changing a noun never changes bytes by accident.

pub mod backup;
pub mod bytes_text;
pub mod capabilities;
pub mod check;
pub mod cost;
pub mod engine_kind;
pub mod group;
pub mod id;
pub mod incarnation;
pub mod inventory;
pub mod job;
pub mod log;
pub mod password;
pub mod position;
pub mod target;
pub mod window;
