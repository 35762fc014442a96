//! The names of objects. The only place that knows them, in both directions.
//!
//! A log file that is open lies in chunks named `<from>-<to>`, twelve hexadecimal digits each, so that their keys sort
//! by offset and before `sealed`.

use crate::error::{Error, Kind, Result};
use crate::model::id::{BackupId, IncarnationId, JobId, PackId};

/// The header of the repository.
pub const HEADER_KEY: &str = "keiki.json";
/// Below this lies everything but the header.
pub const INCARNATIONS_PREFIX: &str = "incarnations/";

/// A log file cannot be longer than this: offsets in keys have twelve hexadecimal digits.
pub const LOG_FILE_BYTES_MAX: u64 = (1 << 48) - 1;

const LOG_FILE_NAME_BYTES_MAX: usize = 128;
const SEALED: &str = "sealed";

pub fn identity_key(incarnation: IncarnationId) -> String {
    format!("{INCARNATIONS_PREFIX}{incarnation}/identity.json")
}

pub fn lease_key(incarnation: IncarnationId) -> String {
    format!("{INCARNATIONS_PREFIX}{incarnation}/lease.json")
}

pub fn log_prefix(incarnation: IncarnationId) -> String {
    format!("{INCARNATIONS_PREFIX}{incarnation}/log/")
}

/// Below this lie all objects of one log file, and nothing of another.
pub fn log_file_prefix(incarnation: IncarnationId, file: &str) -> Result<String> {
    check_log_file_name(file)?;
    Ok(format!("{}{file}/", log_prefix(incarnation)))
}

pub fn sealed_log_key(incarnation: IncarnationId, file: &str) -> Result<String> {
    Ok(format!("{}{SEALED}", log_file_prefix(incarnation, file)?))
}

/// The key of bytes `from..to` of a log file that is still open.
pub fn log_chunk_key(incarnation: IncarnationId, file: &str, from: u64, to: u64) -> Result<String> {
    if from >= to || to > LOG_FILE_BYTES_MAX {
        return Err(Error::new(Kind::Internal, format!("log file '{file}' cannot have a chunk from {from} to {to}")));
    }
    Ok(format!("{}{from:012x}-{to:012x}", log_file_prefix(incarnation, file)?))
}

pub fn packs_prefix(incarnation: IncarnationId) -> String {
    format!("{INCARNATIONS_PREFIX}{incarnation}/packs/")
}

pub fn pack_key(incarnation: IncarnationId, pack: PackId) -> String {
    format!("{}{pack}", packs_prefix(incarnation))
}

pub fn backups_prefix(incarnation: IncarnationId) -> String {
    format!("{INCARNATIONS_PREFIX}{incarnation}/backups/")
}

pub fn manifest_key(incarnation: IncarnationId, backup: &BackupId) -> String {
    format!("{}{backup}/manifest", backups_prefix(incarnation))
}

pub fn work_prefix(incarnation: IncarnationId) -> String {
    format!("{INCARNATIONS_PREFIX}{incarnation}/work/")
}

pub fn work_key(incarnation: IncarnationId, job: JobId) -> String {
    format!("{}{job}.json", work_prefix(incarnation))
}

/// Checks that the engine's name of a log file can be a part of a key.
pub fn check_log_file_name(name: &str) -> Result<()> {
    let is_good = !name.is_empty()
        && name.len() <= LOG_FILE_NAME_BYTES_MAX
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    if is_good {
        return Ok(());
    }
    Err(Error::new(Kind::BadInput, format!("'{}' cannot be the name of a log file", name.escape_default())))
}

/// Which part of a log file an object holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LogPart {
    Chunk { from: u64, to: u64 },
    Sealed,
}

/// The log file and the part of it that a key below `log_prefix` names; nothing for any other key, which is then left
/// alone: it may belong to a later version.
pub fn parse_log_key(incarnation: IncarnationId, key: &str) -> Option<(&str, LogPart)> {
    let (file, part) = key.strip_prefix(&log_prefix(incarnation))?.split_once('/')?;
    check_log_file_name(file).ok()?;
    if part == SEALED {
        return Some((file, LogPart::Sealed));
    }
    let offset = |digits: &str| {
        let is_ours = digits.len() == 12 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if is_ours { u64::from_str_radix(digits, 16).ok() } else { None }
    };
    let (from, to) = part.split_once('-')?;
    let (from, to) = (offset(from)?, offset(to)?);
    if from < to { Some((file, LogPart::Chunk { from, to })) } else { None }
}

/// The incarnation of a key `incarnations/<id>/identity.json`.
pub fn parse_identity_key(key: &str) -> Option<IncarnationId> {
    IncarnationId::parse(key.strip_prefix(INCARNATIONS_PREFIX)?.strip_suffix("/identity.json")?).ok()
}

/// The backup of a key that `manifest_key` made.
pub fn parse_manifest_key(incarnation: IncarnationId, key: &str) -> Option<BackupId> {
    BackupId::parse(key.strip_prefix(&backups_prefix(incarnation))?.strip_suffix("/manifest")?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incarnation() -> IncarnationId {
        IncarnationId::parse("01938c5e-0000-7000-8000-000000000001").unwrap()
    }

    #[test]
    fn keys_read_back_and_chunks_sort_by_offset_and_before_the_sealed_file() {
        let id = incarnation();
        let keys = [
            log_chunk_key(id, "0001", 0, 0x9000).unwrap(),
            log_chunk_key(id, "0001", 0x9000, 0xa_0000_0000).unwrap(),
            sealed_log_key(id, "0001").unwrap(),
            log_chunk_key(id, "0002", 0, 1).unwrap(),
        ];
        assert!(keys.is_sorted());
        assert_eq!(parse_log_key(id, &keys[1]), Some(("0001", LogPart::Chunk { from: 0x9000, to: 0xa_0000_0000 })));
        assert_eq!(parse_log_key(id, &keys[2]), Some(("0001", LogPart::Sealed)));
        assert_eq!(parse_identity_key(&identity_key(id)), Some(id));
        let backup = BackupId::parse("20261121T095900Z-k3xq").unwrap();
        assert_eq!(parse_manifest_key(id, &manifest_key(id, &backup)), Some(backup));
    }

    #[test]
    fn names_of_log_files_cannot_lead_elsewhere() {
        for bad in ["", ".", "..", ".tmp", "a/b", "../lease.json", "a b", "ä", &"x".repeat(129)] {
            assert_eq!(sealed_log_key(incarnation(), bad).unwrap_err().kind(), Kind::BadInput, "{bad}");
        }
    }

    #[test]
    fn keys_of_other_things_are_not_taken_for_log() {
        let id = incarnation();
        let log = log_prefix(id);
        for other in
            ["a/b/sealed", "a/sealed2", "a/000-001", "a/+00000000001-000000000002", "a/00000000000A-00000000000B"]
        {
            assert_eq!(parse_log_key(id, &format!("{log}{other}")), None, "{other}");
        }
        assert_eq!(parse_log_key(id, &format!("{log}a/000000000002-000000000001")), None);
        assert_eq!(parse_log_key(id, "keiki.json"), None);
    }
}
