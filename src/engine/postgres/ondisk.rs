//! Pure parsers of PostgreSQL's files and of its write-ahead log, PostgreSQL 13 to 18.
//!
//! Slices go in, values come out: no I/O, no clock, no panic on any bytes, and never an allocation for bytes that
//! have not arrived. Everything that differs between major versions stands in `versions`.
//!
//! Only little-endian, 64-bit servers are understood, which is what PostgreSQL is run on: `pg_control` and WAL are
//! written in the byte order and alignment of the machine, and a foreign order fails at the first magic number.

mod bytes;

pub mod backup_label;
pub mod control;
pub mod history;
pub mod page;
pub mod relation_files;
pub mod segment;
pub mod tablespace_map;
pub mod versions;
pub mod wal;

#[cfg(test)]
mod fixtures;
