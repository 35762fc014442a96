//! keiki grows clones of database servers: it ships their logs, takes base backups, and makes a copy of an
//! instance as it was at any moment, on another host, with an archive of its own.
//!
//! The modules are floors, lowest first. A module imports only from floors below it; `tests/tidy.rs` holds that.

pub mod error;

pub mod base;
pub mod model;
pub mod format;
pub mod store;
pub mod repo;
pub mod engine;
pub mod job;
pub mod peer;
pub mod agent;
pub mod cli;

pub use error::{Context, Error, Kind, Result};
