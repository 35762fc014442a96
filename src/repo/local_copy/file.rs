//! The file of one incarnation: `<dir>/<repository>/<incarnation>`, a line with the BLAKE3 hash of the rest in
//! hexadecimal, then a JSON document. A file that is anything else is as good as none.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::base::durable::{create_dir_all_durable, write_file_durable};
use crate::error::{Error, Kind, Result};
use crate::format::frame::ObjectSeal;
use crate::format::layout;
use crate::format::summary::ManifestObject;
use crate::model::id::{BackupId, IncarnationId, RepositoryId};
use crate::repo::backup_reader::KnownBackups;
use crate::repo::log_catalogue::FileParts;

const FORMAT: u32 = 1;
/// A million log files. What is longer is not read: listing it again is no slower.
const FILE_BYTES_MAX: u64 = 128 << 20;

/// What a file holds.
pub(in crate::repo) struct CopyOfIncarnation {
    pub backups: KnownBackups,
    pub log: Option<KeptLog>,
}

/// When all of the log was listed, and what is known of it since.
pub(in crate::repo) struct KeptLog {
    pub all_listed_at: Timestamp,
    pub files: BTreeMap<String, FileParts>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: u32,
    repository: String,
    incarnation: String,
    backups: Vec<BackupDocument>,
    log: Option<LogDocument>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BackupDocument {
    /// Of the manifest, which is read again if it has another one.
    size_bytes: u64,
    id: String,
    summary: Value,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogDocument {
    all_listed_at: String,
    files: Vec<FileDocument>,
}

/// Name, size of the sealed object, and of each chunk from, to and size.
#[derive(Serialize, Deserialize)]
struct FileDocument(String, Option<u64>, Vec<(u64, u64, u64)>);

fn path_of(dir: &Path, repository: RepositoryId, incarnation: IncarnationId) -> PathBuf {
    dir.join(repository.to_string()).join(incarnation.to_string())
}

/// Reads what was kept, or nothing if there is nothing good. Blocking.
pub(super) fn read(dir: &Path, repository: RepositoryId, incarnation: IncarnationId) -> Option<CopyOfIncarnation> {
    let path = path_of(dir, repository, incarnation);
    let file = std::fs::File::open(&path).ok()?;
    let mut bytes = Vec::new();
    let outcome = file
        .take(FILE_BYTES_MAX)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io("cannot read it", error))
        .and_then(|_| parse(&bytes, repository, incarnation));
    outcome.inspect_err(|error| tracing::warn!("'{}' is not used and will be made anew: {error}", path.display())).ok()
}

fn parse(bytes: &[u8], repository: RepositoryId, incarnation: IncarnationId) -> Result<CopyOfIncarnation> {
    let damaged = |why: &str| Error::new(Kind::Damaged, why);
    let end_of_line = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(|| damaged("it has no first line"))?;
    let (hash, body) = (&bytes[..end_of_line], &bytes[end_of_line + 1..]);
    if hash != blake3::hash(body).to_hex().as_bytes() {
        return Err(damaged("its hash is wrong"));
    }
    let document: Document = serde_json::from_slice(body).map_err(|error| damaged(&error.to_string()))?;
    let is_ours = document.format == FORMAT
        && document.repository == repository.to_string()
        && document.incarnation == incarnation.to_string();
    if !is_ours {
        return Err(damaged("it belongs to something else"));
    }
    let mut backups = KnownBackups::default();
    for backup in document.backups {
        let id = BackupId::parse(&backup.id)?;
        let seal = ObjectSeal::of(&layout::manifest_key(incarnation, &id));
        let object = ManifestObject::parse(&seal, &backup.summary)?;
        if object.backup.id != id || object.backup.incarnation != incarnation {
            return Err(damaged("it names a backup of something else"));
        }
        backups.remember(id, backup.size_bytes, Arc::new(object));
    }
    let log = document.log.map(parse_log).transpose()?;
    Ok(CopyOfIncarnation { backups, log })
}

fn parse_log(log: LogDocument) -> Result<KeptLog> {
    let all_listed_at: Timestamp =
        log.all_listed_at.parse().map_err(|_| Error::new(Kind::Damaged, "it names no time"))?;
    let mut files = BTreeMap::new();
    for FileDocument(name, sealed, chunks) in log.files {
        layout::check_log_file_name(&name)?;
        files.insert(name, FileParts::of(sealed, &chunks));
    }
    Ok(KeptLog { all_listed_at, files })
}

/// Writes what is known. Blocking.
pub(super) fn write(
    dir: &Path,
    repository: RepositoryId,
    incarnation: IncarnationId,
    copy: &CopyOfIncarnation,
) -> Result<()> {
    let cannot = |error: serde_json::Error| Error::new(Kind::Internal, format!("cannot write it down: {error}"));
    let mut backups = Vec::new();
    for (id, size_bytes, object) in copy.backups.facts() {
        let summary = serde_json::to_value(object.document()).map_err(cannot)?;
        backups.push(BackupDocument { size_bytes, id: id.to_string(), summary });
    }
    let line = |(name, parts): (&String, &FileParts)| FileDocument(name.clone(), parts.sealed(), parts.chunks());
    let log = copy.log.as_ref().map(|log| LogDocument {
        all_listed_at: log.all_listed_at.to_string(),
        files: log.files.iter().map(line).collect(),
    });
    let document = Document {
        format: FORMAT,
        repository: repository.to_string(),
        incarnation: incarnation.to_string(),
        backups,
        log,
    };
    let body = serde_json::to_vec(&document).map_err(cannot)?;
    let mut bytes = blake3::hash(&body).to_hex().as_bytes().to_vec();
    bytes.push(b'\n');
    bytes.extend_from_slice(&body);
    let path = path_of(dir, repository, incarnation);
    create_dir_all_durable(path.parent().unwrap_or(dir), 0o700)?;
    write_file_durable(&path, &bytes, 0o600)
}
