//! The repository: what the objects of a store mean together.
//!
//! Invariants: databases are not known here, log files and data files are bytes with names. Nothing is changed under
//! an incarnation but by the holder of its lease. What a reader follows is published last and deleted first. Memory is
//! bounded by constants and by the number of log files, never by the size of data.

pub mod backup_reader;
pub mod backup_writer;
pub mod incarnations;
pub mod inventory;
pub mod lease;
pub mod local_copy;
pub mod log_catalogue;
pub mod log_reader;
pub mod log_writer;
mod manifest_spool;
mod objects;
pub mod repository;
pub mod restore_plan;
#[cfg(test)]
mod test_site;
mod upload;
pub mod window;
