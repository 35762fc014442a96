//! What containers say about themselves: the summaries in the indexes of packs, log objects and manifests.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::format::frame::ObjectSeal;
use crate::format::instant;
use crate::model::backup::{Backup, BackupKind};
use crate::model::id::{BackupId, IncarnationId, PackId};
use crate::model::log::{LogChunk, LogSummary};
use crate::model::position::Position;

fn read<T: DeserializeOwned>(object: &ObjectSeal, summary: &Value) -> Result<T> {
    T::deserialize(summary).map_err(|error| object.damaged(format!("its summary cannot be read: {error}")))
}

fn field<T>(object: &ObjectSeal, value: Result<T>) -> Result<T> {
    value.map_err(|error: Error| object.damaged(error.message()))
}

/// The summary of an object of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogObject {
    pub chunk: LogChunk,
    /// BLAKE3 of the bytes `from..to` of the log file, in hexadecimal: what "the same content" means.
    pub content_hash: String,
    pub summary: LogSummary,
}

#[derive(Serialize, Deserialize)]
struct LogDocument {
    file: String,
    from: u64,
    to: u64,
    sealed: bool,
    content_hash: String,
    #[serde(default, with = "instant::optional", skip_serializing_if = "Option::is_none")]
    first_commit_at: Option<Timestamp>,
    #[serde(default, with = "instant::optional", skip_serializing_if = "Option::is_none")]
    last_commit_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last_commit: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    named_points: Vec<(String, String)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    transactions: Vec<String>,
}

impl LogObject {
    /// The document for `ContainerWriter::finish`.
    pub fn document(&self) -> impl Serialize + use<> {
        LogDocument {
            file: self.chunk.file.clone(),
            from: self.chunk.from_bytes,
            to: self.chunk.to_bytes,
            sealed: self.chunk.sealed,
            content_hash: self.content_hash.clone(),
            first_commit_at: self.summary.first_commit_at,
            last_commit_at: self.summary.last_commit_at,
            last_commit: self.summary.last_commit.map(|position| position.to_string()),
            named_points: self.summary.named_points.iter().map(|(name, at)| (name.clone(), at.to_string())).collect(),
            transactions: self.summary.transactions.clone(),
        }
    }

    pub fn parse(object: &ObjectSeal, summary: &Value) -> Result<LogObject> {
        let document: LogDocument = read(object, summary)?;
        if document.from > document.to {
            return Err(object.damaged("its summary names a range that ends before it begins"));
        }
        let position = |text: &String| field(object, Position::parse(text));
        let named_points = document.named_points.iter().map(|(name, at)| Ok((name.clone(), position(at)?)));
        Ok(LogObject {
            summary: LogSummary {
                first_commit_at: document.first_commit_at,
                last_commit_at: document.last_commit_at,
                last_commit: document.last_commit.as_ref().map(position).transpose()?,
                named_points: named_points.collect::<Result<_>>()?,
                transactions: document.transactions,
            },
            chunk: LogChunk {
                file: document.file,
                from_bytes: document.from,
                to_bytes: document.to,
                sealed: document.sealed,
            },
            content_hash: document.content_hash,
        })
    }
}

/// The summary of a pack: whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackObject {
    pub incarnation: IncarnationId,
    pub pack: PackId,
}

#[derive(Serialize, Deserialize)]
struct PackDocument {
    incarnation: String,
    pack: String,
}

impl PackObject {
    pub fn document(&self) -> impl Serialize + use<> {
        PackDocument { incarnation: self.incarnation.to_string(), pack: self.pack.to_string() }
    }

    pub fn parse(object: &ObjectSeal, summary: &Value) -> Result<PackObject> {
        let document: PackDocument = read(object, summary)?;
        Ok(PackObject {
            incarnation: field(object, IncarnationId::parse(&document.incarnation))?,
            pack: field(object, PackId::parse(&document.pack))?,
        })
    }
}

/// The summary of a manifest: the backup, and how many records the manifest has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestObject {
    pub backup: Backup,
    pub record_count: u64,
}

#[derive(Serialize, Deserialize)]
struct ManifestDocument {
    id: String,
    incarnation: String,
    kind: String,
    start: String,
    stop: String,
    #[serde(with = "instant")]
    began_at: Timestamp,
    #[serde(with = "instant")]
    ended_at: Timestamp,
    engine_version: String,
    file_count: u64,
    restored_bytes: u64,
    stored_bytes: u64,
    record_count: u64,
    engine_facts: BTreeMap<String, String>,
}

const BACKUP_KINDS: [(BackupKind, &str); 2] = [(BackupKind::Automatic, "automatic"), (BackupKind::Manual, "manual")];

impl ManifestObject {
    pub fn document(&self) -> impl Serialize + use<> {
        let backup = &self.backup;
        ManifestDocument {
            id: backup.id.to_string(),
            incarnation: backup.incarnation.to_string(),
            kind: BACKUP_KINDS.iter().find(|row| row.0 == backup.kind).map_or("manual", |row| row.1).to_string(),
            start: backup.start.to_string(),
            stop: backup.stop.to_string(),
            began_at: backup.began_at,
            ended_at: backup.ended_at,
            engine_version: backup.engine_version.clone(),
            file_count: backup.file_count,
            restored_bytes: backup.restored_bytes,
            stored_bytes: backup.stored_bytes,
            record_count: self.record_count,
            engine_facts: backup.engine_facts.clone(),
        }
    }

    pub fn parse(object: &ObjectSeal, summary: &Value) -> Result<ManifestObject> {
        let document: ManifestDocument = read(object, summary)?;
        let kind = BACKUP_KINDS.iter().find(|row| row.1 == document.kind).map(|row| row.0);
        Ok(ManifestObject {
            record_count: document.record_count,
            backup: Backup {
                id: field(object, BackupId::parse(&document.id))?,
                incarnation: field(object, IncarnationId::parse(&document.incarnation))?,
                kind: kind.ok_or_else(|| object.damaged("its summary names an unknown kind of backup"))?,
                start: field(object, Position::parse(&document.start))?,
                stop: field(object, Position::parse(&document.stop))?,
                began_at: document.began_at,
                ended_at: document.ended_at,
                engine_version: document.engine_version,
                file_count: document.file_count,
                restored_bytes: document.restored_bytes,
                stored_bytes: document.stored_bytes,
                engine_facts: document.engine_facts,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_summary_of_log_reads_back_with_and_without_commits() {
        let chunk = LogChunk { file: String::from("a"), from_bytes: 5, to_bytes: 9, sealed: false };
        let point = Position::parse("1@0/5").unwrap();
        let full = LogSummary {
            first_commit_at: Some("2026-11-21T09:59:00Z".parse().unwrap()),
            last_commit_at: Some("2026-11-21T09:59:00.000001Z".parse().unwrap()),
            last_commit: Some(point),
            named_points: vec![(String::from("before \"it\""), point)],
            transactions: vec![String::from("0-5-1..9")],
        };
        for summary in [LogSummary::default(), full] {
            let object = LogObject { chunk: chunk.clone(), content_hash: String::from("aa"), summary };
            let value = serde_json::to_value(object.document()).unwrap();
            assert_eq!(LogObject::parse(&ObjectSeal::of("k"), &value).unwrap(), object);
        }
    }

    #[test]
    fn a_summary_with_a_wrong_field_is_damage_of_that_object() {
        let value = serde_json::json!({"incarnation": "../..", "pack": "x"});
        let error = PackObject::parse(&ObjectSeal::of("k"), &value).unwrap_err();
        assert_eq!(
            (error.kind(), error.message()),
            (Kind::Damaged, "object 'k': '../..' is not the id of an incarnation")
        );
    }
}
