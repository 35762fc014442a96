//! The bytes in the repository: version 1 of the format, open and complete.
//!
//! A repository is a set of objects under keys that a person can read (`layout`):
//!
//! ```text
//! keiki.json                                             header: version, repository id
//! incarnations/<id>/identity.json                        who this life of a data directory is; written once
//! incarnations/<id>/lease.json                           which agent may archive it now; compare-and-swap
//! incarnations/<id>/log/<file>/sealed                    a whole log file
//! incarnations/<id>/log/<file>/<from>-<to>               bytes of a log file that is still open
//! incarnations/<id>/packs/<pack id>                      file content of backups
//! incarnations/<id>/backups/<backup id>/manifest         a backup; written last
//! incarnations/<id>/work/<job id>.json                   work in progress: what is not referenced yet is not garbage
//! ```
//!
//! Small objects are JSON documents (`document`); log, packs and manifests are containers (`container`) of frames
//! (`frame`) with a document of their own kind in the index. Numbers in containers are little-endian, times are RFC
//! 3339 in UTC, hashes are BLAKE3, positions are written as `model::position` prints them.
//!
//! Invariants: this floor does no I/O. Nothing read here is believed before it was checked, a length is compared with
//! its limit before memory is allocated, no bytes make it panic, and every error names its object.

pub mod container;
pub mod document;
pub mod frame;
#[cfg(test)]
mod golden;
mod instant;
pub mod layout;
pub mod links;
pub mod manifest;
pub mod summary;

use crate::error::{Error, Kind};

/// The version of the format that this program writes, and the only one that it reads.
pub const FORMAT_VERSION: u16 = 1;

/// The refusal of bytes that another version of keiki has written; `what` begins the sentence.
pub(crate) fn unsupported_version(what: &str, found: u64) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("{what} has format version {found}, and this keiki reads version {FORMAT_VERSION}"),
    )
    .hint("upgrade keiki on this host to the version that wrote it")
}
