//! Pure parsers of what Redis and Valkey write on disk: snapshots, the append-only file, and its manifest.
//!
//! All of these bytes are foreign. Nothing here panics on any input, and no memory is taken on the word of a length that
//! was read: values are counted and not kept, whatever their size.

pub mod aof;
pub mod manifest;
pub mod nodes_conf;
pub mod rdb;
