//! The nouns of keiki as values and pure functions.
//!
//! Invariants: nothing here does I/O, reads a clock or is `Serialize`. What goes to disk or over the wire has its
//! own types in `format` and `peer`, converted by hand, so that changing a noun never changes bytes by accident.

pub mod bytes_text;
pub mod engine_kind;
pub mod id;
pub mod position;
pub mod target;
