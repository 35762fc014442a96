//! The small JSON documents of the repository: header, identity, lease, work in progress.
//!
//! Each begins with `format_version`. That is read first, so that a document of a later version is refused by its
//! version and not by a field that is not known. Within a version, unknown fields are ignored, except in the header,
//! where one could say that nothing else means what it seems to (encryption).

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::format::{FORMAT_VERSION, instant, unsupported_version};
use crate::model::capabilities::{Capabilities, ChecksumKind};
use crate::model::engine_kind::EngineKind;
use crate::model::id::{IncarnationId, JobId, RepositoryId, RunId};
use crate::model::incarnation::{Incarnation, Lease, LeaseHolder};
use crate::model::position::Position;

/// A document is never longer than this; readers need not fetch more.
pub const DOCUMENT_BYTES_MAX: usize = 64 << 10;

/// The facts of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub repository: RepositoryId,
    pub created_at: Timestamp,
    /// What its object store can do, where that had to be found out.
    pub capabilities: Option<Capabilities>,
}

/// A lease as it is stored: the lease, and whether its holder has given it up for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRecord {
    pub lease: Lease,
    /// Anybody who has the identity may take the lease. The epoch goes on.
    pub released: bool,
}

/// Work that is going on: packs made since it began are not garbage, though no manifest names them yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    pub job: JobId,
    pub host: String,
    pub began_at: Timestamp,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderDocument {
    format_version: u16,
    repository_id: String,
    #[serde(with = "instant")]
    created_at: Timestamp,
    encryption: EncryptionDocument,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    capabilities: Option<CapabilitiesDocument>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CapabilitiesDocument {
    conditional_create: bool,
    conditional_replace: bool,
    conditional_complete: bool,
    ordered_listing: bool,
    /// Kinds that are not known here are not used.
    checksums: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum EncryptionDocument {
    None,
}

#[derive(Serialize, Deserialize)]
struct IdentityDocument {
    format_version: u16,
    id: String,
    engine: String,
    engine_version: String,
    instance: String,
    host: String,
    system_id: String,
    #[serde(with = "instant")]
    began_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<ParentDocument>,
}

#[derive(Serialize, Deserialize)]
struct ParentDocument {
    incarnation: String,
    departed_at: String,
}

#[derive(Serialize, Deserialize)]
struct LeaseDocument {
    format_version: u16,
    epoch: u64,
    released: bool,
    holder: HolderDocument,
    #[serde(with = "instant")]
    renewed_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    covered: Option<CoveredDocument>,
}

#[derive(Serialize, Deserialize)]
struct HolderDocument {
    host: String,
    run: String,
    machine_id: String,
    boot_id: String,
    process_id: u32,
    process_start_ticks: u64,
}

#[derive(Serialize, Deserialize)]
struct CoveredDocument {
    position: String,
    #[serde(with = "instant")]
    observed_at: Timestamp,
}

#[derive(Serialize, Deserialize)]
struct WorkDocument {
    format_version: u16,
    job: String,
    host: String,
    #[serde(with = "instant")]
    began_at: Timestamp,
}

/// A document as text for people and programs, with a final line feed.
fn write(document: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(document)
        .map_err(|error| Error::new(Kind::Internal, format!("cannot write a document: {error}")))?;
    text.push(b'\n');
    Ok(text)
}

fn damaged(key: &str, why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Damaged, format!("object '{key}': {why}"))
        .hint("was it overwritten, or is the disk failing? Put it back from a copy of the repository")
}

/// Reads a document of this version. `key` is for the message.
fn read<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct VersionOnly {
        format_version: u64,
    }
    if bytes.len() > DOCUMENT_BYTES_MAX {
        return Err(damaged(key, format_args!("is longer than {DOCUMENT_BYTES_MAX} bytes")));
    }
    let bad = |error: serde_json::Error| damaged(key, format_args!("is not a document of keiki: {error}"));
    let version = serde_json::from_slice::<VersionOnly>(bytes).map_err(bad)?.format_version;
    if version != u64::from(FORMAT_VERSION) {
        return Err(unsupported_version(&format!("object '{key}'"), version));
    }
    serde_json::from_slice(bytes).map_err(bad)
}

/// An id or position inside a document: what it is wrong with is the document.
fn field<T>(key: &str, value: Result<T>) -> Result<T> {
    value.map_err(|error| damaged(key, error.message()))
}

impl Header {
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        write(&HeaderDocument {
            format_version: FORMAT_VERSION,
            repository_id: self.repository.to_string(),
            created_at: self.created_at,
            encryption: EncryptionDocument::None,
            capabilities: self.capabilities.as_ref().map(|found| CapabilitiesDocument {
                conditional_create: found.conditional_create,
                conditional_replace: found.conditional_replace,
                conditional_complete: found.conditional_complete,
                ordered_listing: found.ordered_listing,
                checksums: found.checksums.iter().map(|kind| kind.name().to_string()).collect(),
            }),
        })
    }

    /// `key` is where the bytes came from, for messages; so in all `parse` of this module.
    pub fn parse(key: &str, bytes: &[u8]) -> Result<Header> {
        let document: HeaderDocument = read(key, bytes)?;
        let EncryptionDocument::None = document.encryption;
        Ok(Header {
            repository: field(key, RepositoryId::parse(&document.repository_id))?,
            created_at: document.created_at,
            capabilities: document.capabilities.map(|found| Capabilities {
                conditional_create: found.conditional_create,
                conditional_replace: found.conditional_replace,
                conditional_complete: found.conditional_complete,
                ordered_listing: found.ordered_listing,
                checksums: found.checksums.iter().filter_map(|name| ChecksumKind::from_name(name)).collect(),
            }),
        })
    }
}

/// The document of an incarnation.
pub fn identity_to_bytes(incarnation: &Incarnation) -> Result<Vec<u8>> {
    write(&IdentityDocument {
        format_version: FORMAT_VERSION,
        id: incarnation.id.to_string(),
        engine: incarnation.engine.name().to_string(),
        engine_version: incarnation.engine_version.clone(),
        instance: incarnation.instance.clone(),
        host: incarnation.host.clone(),
        system_id: incarnation.system_id.clone(),
        began_at: incarnation.began_at,
        parent: incarnation
            .parent
            .map(|(id, position)| ParentDocument { incarnation: id.to_string(), departed_at: position.to_string() }),
    })
}

pub fn parse_identity(key: &str, bytes: &[u8]) -> Result<Incarnation> {
    let document: IdentityDocument = read(key, bytes)?;
    let parent = match &document.parent {
        Some(parent) => Some((
            field(key, IncarnationId::parse(&parent.incarnation))?,
            field(key, Position::parse(&parent.departed_at))?,
        )),
        None => None,
    };
    Ok(Incarnation {
        id: field(key, IncarnationId::parse(&document.id))?,
        // An engine that is not known here is not damage: it keeps its own kind of error.
        engine: EngineKind::parse(&document.engine).map_err(|error| error.while_doing(format!("object '{key}'")))?,
        engine_version: document.engine_version,
        instance: document.instance,
        host: document.host,
        system_id: document.system_id,
        began_at: document.began_at,
        parent,
    })
}

impl LeaseRecord {
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let holder = &self.lease.holder;
        write(&LeaseDocument {
            format_version: FORMAT_VERSION,
            epoch: self.lease.epoch,
            released: self.released,
            holder: HolderDocument {
                host: holder.host.clone(),
                run: holder.run.to_string(),
                machine_id: holder.machine_id.clone(),
                boot_id: holder.boot_id.clone(),
                process_id: holder.process_id,
                process_start_ticks: holder.process_start_ticks,
            },
            renewed_at: self.lease.renewed_at,
            covered: self
                .lease
                .covered
                .map(|(position, observed_at)| CoveredDocument { position: position.to_string(), observed_at }),
        })
    }

    pub fn parse(key: &str, bytes: &[u8]) -> Result<LeaseRecord> {
        let document: LeaseDocument = read(key, bytes)?;
        let covered = match &document.covered {
            Some(covered) => Some((field(key, Position::parse(&covered.position))?, covered.observed_at)),
            None => None,
        };
        Ok(LeaseRecord {
            lease: Lease {
                epoch: document.epoch,
                holder: LeaseHolder {
                    host: document.holder.host,
                    run: field(key, RunId::parse(&document.holder.run))?,
                    machine_id: document.holder.machine_id,
                    boot_id: document.holder.boot_id,
                    process_id: document.holder.process_id,
                    process_start_ticks: document.holder.process_start_ticks,
                },
                renewed_at: document.renewed_at,
                covered,
            },
            released: document.released,
        })
    }
}

impl Work {
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        write(&WorkDocument {
            format_version: FORMAT_VERSION,
            job: self.job.to_string(),
            host: self.host.clone(),
            began_at: self.began_at,
        })
    }

    pub fn parse(key: &str, bytes: &[u8]) -> Result<Work> {
        let document: WorkDocument = read(key, bytes)?;
        Ok(Work { job: field(key, JobId::parse(&document.job))?, host: document.host, began_at: document.began_at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &[u8] = include_bytes!("../../tests/fixtures/repository/v1-keiki.json");
    const IDENTITY: &[u8] = include_bytes!("../../tests/fixtures/repository/v1-identity.json");
    const LEASE: &[u8] = include_bytes!("../../tests/fixtures/repository/v1-lease.json");
    const WORK: &[u8] = include_bytes!("../../tests/fixtures/repository/v1-work.json");

    #[test]
    fn the_documents_of_version_1_are_read_and_written_the_same_for_ever() {
        let header = Header::parse("h", HEADER).unwrap();
        assert_eq!(header.created_at.to_string(), "2026-11-21T09:59:00.5Z");
        assert_eq!(header.to_bytes().unwrap(), HEADER);
        let identity = parse_identity("i", IDENTITY).unwrap();
        assert_eq!(identity.parent.unwrap().1.to_string(), "1@16/B374D848");
        assert_eq!(identity_to_bytes(&identity).unwrap(), IDENTITY);
        let lease = LeaseRecord::parse("l", LEASE).unwrap();
        assert_eq!((lease.lease.epoch, lease.lease.holder.process_start_ticks), (7, 123456));
        assert_eq!(lease.to_bytes().unwrap(), LEASE);
        assert_eq!(Work::parse("w", WORK).unwrap().to_bytes().unwrap(), WORK);
    }

    #[test]
    fn what_an_object_store_can_do_is_part_of_the_header() {
        let capabilities = Capabilities {
            conditional_create: true,
            conditional_complete: true,
            checksums: vec![ChecksumKind::Crc32c, ChecksumKind::Md5],
            ..Capabilities::default()
        };
        let header = Header { capabilities: Some(capabilities), ..Header::parse("h", HEADER).unwrap() };
        let bytes = header.to_bytes().unwrap();
        assert_eq!(Header::parse("h", &bytes).unwrap(), header);
        let later = String::from_utf8(bytes).unwrap().replace("\"crc32c\"", "\"crc32c\", \"crc64nvme\"");
        assert_eq!(Header::parse("h", later.as_bytes()).unwrap(), header);
    }

    #[test]
    fn a_later_version_is_refused_by_its_number_even_if_everything_else_is_different() {
        for bytes in [&br#"{"format_version":2}"#[..], br#"{"format_version":70000,"new":[1]}"#] {
            let error = Header::parse("keiki.json", bytes).unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(error.message().contains("reads version 1"), "{error}");
            assert!(error.hint_text().unwrap().contains("upgrade"));
        }
    }

    #[test]
    fn a_header_with_something_unknown_in_it_is_not_guessed_at() {
        let text = String::from_utf8(HEADER.to_vec()).unwrap();
        let encrypted = text.replace("\"none\"", "\"aes\"");
        let extended = text.replace("\"encryption\"", "\"more\": 1, \"encryption\"");
        for bad in [encrypted, extended] {
            assert_eq!(Header::parse("keiki.json", bad.as_bytes()).unwrap_err().kind(), Kind::Damaged);
        }
    }

    #[test]
    fn documents_cut_anywhere_are_damaged_and_named() {
        for whole in [HEADER, IDENTITY, LEASE, WORK] {
            // The last byte is a line feed that nobody needs.
            for length in 0..whole.len() - 2 {
                let cut = &whole[..length];
                let errors = [
                    Header::parse("k", cut).unwrap_err(),
                    parse_identity("k", cut).unwrap_err(),
                    LeaseRecord::parse("k", cut).unwrap_err(),
                    Work::parse("k", cut).unwrap_err(),
                ];
                for error in errors {
                    assert_eq!(error.kind(), Kind::Damaged);
                    assert!(error.message().starts_with("object 'k': "), "{error}");
                }
            }
        }
    }
}
