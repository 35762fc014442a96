//! A file of links: what reads one backup without credentials, as lines of JSON.
//!
//! The first line says what the links are for, each further one has an object of the repository with its size, its entity
//! tag and its link, and the last one says how many there were and has the BLAKE3 hash of everything before it. So a file
//! that was cut or changed on its way is known as such. (Not by whom: whoever has the file can read the backup, and what
//! is read is checked against itself, so a file is as good as the way by which it came.)

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::instant;
use crate::error::{Error, Kind, Result};
use crate::model::id::{BackupId, IncarnationId};

/// The version of this form of file.
const LINKS_VERSION: u16 = 1;
/// No line is longer: a link has a signature, perhaps a session token of some KiB, and a key.
pub const LINE_BYTES_MAX: usize = 64 << 10;

/// What links are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinksHeader {
    /// The version of the program that made them.
    pub keiki: String,
    /// Where the repository is.
    pub repository: String,
    pub incarnation: IncarnationId,
    pub backup: BackupId,
    pub backup_ended_at: Timestamp,
    pub made_at: Timestamp,
    /// When they stop working.
    pub expires_at: Timestamp,
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkLine {
    /// Its name in the repository.
    pub key: String,
    pub bytes: u64,
    /// Its entity tag, which changes with its bytes; empty where the server has none.
    pub etag: String,
    pub url: String,
}

#[derive(Serialize, Deserialize)]
struct VersionOnly {
    keiki_links: u16,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderLine {
    keiki_links: u16,
    keiki: String,
    repository: String,
    incarnation: String,
    backup: String,
    #[serde(with = "instant")]
    backup_ended_at: Timestamp,
    #[serde(with = "instant")]
    made_at: Timestamp,
    #[serde(with = "instant")]
    expires_at: Timestamp,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EndLine {
    objects: u64,
    blake3: String,
}

/// Makes the lines of a file, one after the other.
#[derive(Default)]
pub struct LinksWriter {
    hasher: blake3::Hasher,
    objects: u64,
}

impl LinksWriter {
    /// The first line.
    pub fn header(&mut self, header: &LinksHeader) -> Result<String> {
        self.hashed(&HeaderLine {
            keiki_links: LINKS_VERSION,
            keiki: header.keiki.clone(),
            repository: header.repository.clone(),
            incarnation: header.incarnation.to_string(),
            backup: header.backup.to_string(),
            backup_ended_at: header.backup_ended_at,
            made_at: header.made_at,
            expires_at: header.expires_at,
        })
    }

    /// The line of an object.
    pub fn link(&mut self, link: &LinkLine) -> Result<String> {
        self.objects += 1;
        self.hashed(link)
    }

    /// The last line.
    pub fn end(self) -> Result<String> {
        line(&EndLine { objects: self.objects, blake3: self.hasher.finalize().to_hex().to_string() })
    }

    fn hashed(&mut self, value: &impl Serialize) -> Result<String> {
        let line = line(value)?;
        self.hasher.update(line.as_bytes());
        Ok(line)
    }
}

fn line(value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string(value);
    let text = text.map_err(|error| Error::new(Kind::Internal, format!("cannot write a line of links: {error}")))?;
    if text.len() >= LINE_BYTES_MAX {
        return Err(Error::new(Kind::Unsupported, format!("a link is longer than {LINE_BYTES_MAX} bytes")));
    }
    Ok(text + "\n")
}

/// Takes the lines of a file, one after the other, each with its end.
pub struct LinksParser {
    hasher: blake3::Hasher,
    objects: u64,
    is_over: bool,
}

impl LinksParser {
    /// Begins with the first line. `BadInput` if this is no file of links, `Unsupported` if it is of a later version.
    pub fn begin(first: &[u8]) -> Result<(LinksHeader, LinksParser)> {
        let no_links = |_| Error::new(Kind::BadInput, "it is no file of links");
        let version = serde_json::from_slice::<VersionOnly>(first).map_err(no_links)?.keiki_links;
        if version != LINKS_VERSION {
            let what = format!("it has version {version} of links, and this keiki reads version {LINKS_VERSION}");
            return Err(
                Error::new(Kind::Unsupported, what).hint("use the version of keiki that made it, or a later one")
            );
        }
        let header: HeaderLine = serde_json::from_slice(first).map_err(|error| damaged(error.to_string()))?;
        let mut parser = LinksParser { hasher: blake3::Hasher::new(), objects: 0, is_over: false };
        parser.hasher.update(first);
        let header = LinksHeader {
            keiki: header.keiki,
            repository: header.repository,
            incarnation: IncarnationId::parse(&header.incarnation)?,
            backup: BackupId::parse(&header.backup)?,
            backup_ended_at: header.backup_ended_at,
            made_at: header.made_at,
            expires_at: header.expires_at,
        };
        Ok((header, parser))
    }

    /// Takes the next line; returns the object of it, or nothing if it is the last one of the file.
    pub fn next(&mut self, line: &[u8]) -> Result<Option<LinkLine>> {
        if self.is_over {
            return Err(damaged("something follows its last line"));
        }
        if let Ok(end) = serde_json::from_slice::<EndLine>(line) {
            if end.objects != self.objects || end.blake3 != self.hasher.finalize().to_hex().as_str() {
                return Err(damaged("it is not what was written"));
            }
            self.is_over = true;
            return Ok(None);
        }
        let link = serde_json::from_slice(line).map_err(|_| damaged("it has a line that is none of its kind"))?;
        self.hasher.update(line);
        self.objects += 1;
        Ok(Some(link))
    }

    /// The file is over.
    pub fn finish(self) -> Result<()> {
        if self.is_over { Ok(()) } else { Err(damaged("it ends too early")) }
    }
}

fn damaged(what: impl std::fmt::Display) -> Error {
    Error::new(Kind::Damaged, what.to_string())
        .hint("was it cut or changed when it was copied? copy it again, or have it made again")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> LinksHeader {
        LinksHeader {
            keiki: "0.1.0".into(),
            repository: "s3://backups/keiki".into(),
            incarnation: IncarnationId::parse("01938c5e-0000-7000-8000-000000000001").unwrap(),
            backup: BackupId::parse("20261121T095900Z-k3xq").unwrap(),
            backup_ended_at: "2026-11-21T09:59:30Z".parse().unwrap(),
            made_at: "2026-11-21T10:00:00Z".parse().unwrap(),
            expires_at: "2026-11-21T11:00:00Z".parse().unwrap(),
        }
    }

    fn link(number: u64) -> LinkLine {
        LinkLine { key: format!("a/{number}"), bytes: number, etag: "e".into(), url: format!("https://x/{number}") }
    }

    fn file() -> String {
        let mut writer = LinksWriter::default();
        let mut text = writer.header(&header()).unwrap();
        for number in 0..3 {
            text += &writer.link(&link(number)).unwrap();
        }
        text + &writer.end().unwrap()
    }

    fn read(text: &[u8]) -> Result<(LinksHeader, Vec<LinkLine>)> {
        let mut lines = text.split_inclusive(|byte| *byte == b'\n');
        let (header, mut parser) = LinksParser::begin(lines.next().unwrap_or_default())?;
        let mut links = Vec::new();
        for line in lines {
            links.extend(parser.next(line)?);
        }
        parser.finish().map(|()| (header, links))
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(read(file().as_bytes()).unwrap(), (header(), (0..3).map(link).collect()));
    }

    #[test]
    fn a_file_of_which_any_byte_is_missing_or_another_one_is_refused() {
        let text = file().into_bytes();
        // Without the last line feed nothing is missing that says anything.
        for length in 0..text.len() - 1 {
            assert!(read(&text[..length]).is_err(), "cut at {length}");
        }
        for at in 0..text.len() - 1 {
            let mut changed = text.clone();
            changed[at] ^= 1;
            assert!(read(&changed).is_err(), "changed at {at}");
        }
        let twice = [&text[..], &text[..]].concat();
        assert_eq!(read(&twice).unwrap_err().kind(), Kind::Damaged);
    }

    #[test]
    fn a_file_of_something_else_or_of_a_later_version_is_called_so() {
        assert_eq!(read(b"#!/bin/sh\n").unwrap_err().kind(), Kind::BadInput);
        let later = file().replacen("\"keiki_links\":1", "\"keiki_links\":2", 1);
        let error = read(later.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.message().contains("version 2"), "{error}");
    }
}
