//! How things look: text for people, JSON for programs.

pub mod checks;
pub mod duration;
pub mod error;
pub mod json;
pub mod partial;
pub mod progress;
pub mod table;
