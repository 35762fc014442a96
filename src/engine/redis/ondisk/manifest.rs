//! The manifest of a multi-part append-only file: which files make it up, in which order.
//!
//! A line per file, pairs of key and value in any order: `file appendonly.aof.1.base.rdb seq 1 type b`. Redis 8 adds
//! `startoffset` and `endoffset`. Source: `src/aof.c` of Redis 7.0 (aofLoadManifestFromFile, aofInfoFormat), and of 8.0.

use std::fmt::Write;

use crate::error::{Error, Kind, Result};

/// The longest line that the servers read (`MANIFEST_MAX_LINE`).
const LINE_BYTES_MAX: usize = 1024;
/// A manifest has a handful of lines; what is longer than this is some other file.
pub const MANIFEST_BYTES_MAX: usize = 1 << 20;

/// What a file is in the append-only file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartKind {
    /// The data set at a moment: a snapshot, or commands that make it.
    Base,
    /// Commands that follow.
    Increment,
    /// What a rewrite has replaced and the server is about to delete.
    History,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestPart {
    /// Name within the directory of the append-only file; no path.
    pub name: String,
    /// Numbers of bases and of increments are counted apart.
    pub sequence: u64,
    pub kind: PartKind,
    /// Replication offsets of its first and after its last byte, since Redis 8; the end only of a file that is closed.
    pub start_offset: Option<i64>,
    pub end_offset: Option<i64>,
}

/// The whole manifest. Increments are in the order of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    pub base: Option<ManifestPart>,
    pub increments: Vec<ManifestPart>,
    pub history: Vec<ManifestPart>,
}

impl Manifest {
    /// Reads a manifest with the servers' own rules: names without a path, one base, numbers of increments that grow.
    pub fn parse(bytes: &[u8]) -> Result<Manifest> {
        let damaged = |line: usize, why: &str| {
            Error::new(Kind::Damaged, format!("line {line} of the manifest of the append-only file is wrong: {why}"))
        };
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(damaged(1, "the file is too long to be a manifest"));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| damaged(1, "it is not text"))?;
        let mut manifest = Manifest::default();
        let mut lines = 0;
        for (index, line) in text.lines().enumerate() {
            lines = index + 1;
            if line.starts_with('#') {
                continue;
            }
            let part = parse_line(line).map_err(|why| damaged(lines, why))?;
            match part.kind {
                PartKind::Base if manifest.base.is_some() => return Err(damaged(lines, "it names a second base")),
                PartKind::Base => manifest.base = Some(part),
                PartKind::Increment
                    if manifest.increments.last().is_some_and(|last| last.sequence >= part.sequence) =>
                {
                    return Err(damaged(lines, "the numbers of increments do not grow"));
                }
                PartKind::Increment => manifest.increments.push(part),
                PartKind::History => manifest.history.push(part),
            }
        }
        if lines == 0 || !text.ends_with('\n') {
            return Err(damaged(lines.max(1), "it is cut off"));
        }
        Ok(manifest)
    }

    /// The text that makes a server load these files. Offsets are left out: they belong to another life.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let parts = self.base.iter().chain(&self.history).chain(&self.increments);
        for part in parts {
            let kind = match part.kind {
                PartKind::Base => 'b',
                PartKind::Increment => 'i',
                PartKind::History => 'h',
            };
            // Writing into a string cannot fail.
            let _ = writeln!(text, "file {} seq {} type {kind}", quoted(&part.name), part.sequence);
        }
        text
    }
}

fn parse_line(line: &str) -> Result<ManifestPart, &'static str> {
    if line.len() >= LINE_BYTES_MAX {
        return Err("it is too long");
    }
    let words = split(line)?;
    if words.len() < 6 || words.len() % 2 != 0 {
        return Err("it has too few or unpaired words");
    }
    let (mut name, mut sequence, mut kind, mut start_offset, mut end_offset) = (None, None, None, None, None);
    for pair in words.chunks_exact(2) {
        let value = pair[1].as_str();
        match pair[0].as_str() {
            "file" => name = Some(value.to_string()),
            "seq" => sequence = Some(value.parse().map_err(|_| "its number is none")?),
            "type" => {
                kind = Some(match value {
                    "b" => PartKind::Base,
                    "i" => PartKind::Increment,
                    "h" => PartKind::History,
                    _ => return Err("its type is not known"),
                });
            }
            "startoffset" => start_offset = Some(value.parse().map_err(|_| "its start offset is no number")?),
            "endoffset" => end_offset = Some(value.parse().map_err(|_| "its end offset is no number")?),
            // Newer servers may add keys; these three decide what is loaded.
            _ => {}
        }
    }
    let (Some(name), Some(sequence), Some(kind)) = (name, sequence, kind) else {
        return Err("it lacks a file, a number or a type");
    };
    if name.is_empty() || name.contains(['/', '\0']) || matches!(name.as_str(), "." | "..") {
        return Err("its file is not a plain name");
    }
    Ok(ManifestPart { name, sequence, kind, start_offset, end_offset })
}

/// Splits like `sdssplitargs`: words, or quoted strings with backslashes.
fn split(line: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while !rest.is_empty() {
        let (word, after) = match rest.as_bytes()[0] {
            quote @ (b'"' | b'\'') => unquote(&rest[1..], char::from(quote))?,
            _ => {
                let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
                (rest[..end].to_string(), &rest[end..])
            }
        };
        words.push(word);
        rest = after.trim_start();
    }
    Ok(words)
}

fn unquote(text: &str, quote: char) -> Result<(String, &str), &'static str> {
    let mut word = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '\\' => match letters.next() {
                Some((_, escaped @ ('"' | '\'' | '\\'))) => word.push(escaped),
                // Names with control characters or bytes that are no text are not supported.
                _ => return Err("its file has a name that cannot be used here"),
            },
            letter if letter == quote => return Ok((word, &text[at + quote.len_utf8()..])),
            letter => word.push(letter),
        }
    }
    Err("a quotation mark is missing")
}

fn quoted(name: &str) -> String {
    let is_plain = name.chars().all(|c| !c.is_whitespace() && !matches!(c, '"' | '\'' | '\\'));
    if is_plain { name.to_string() } else { format!("\"{}\"", name.replace('\\', "\\\\").replace('"', "\\\"")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests_of_redis_7_and_8_are_read() {
        let seven = "file appendonly.aof.2.base.rdb seq 2 type b\nfile appendonly.aof.1.incr.aof seq 1 type h\n\
                     file appendonly.aof.2.incr.aof seq 2 type i\nfile appendonly.aof.3.incr.aof seq 3 type i\n";
        let manifest = Manifest::parse(seven.as_bytes()).unwrap();
        assert_eq!(manifest.base.as_ref().unwrap().name, "appendonly.aof.2.base.rdb");
        assert_eq!(manifest.increments.iter().map(|part| part.sequence).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(manifest.history.len(), 1);
        assert_eq!(manifest.render(), seven);
        let eight = "file a.1.base.rdb seq 1 type b\nfile a.1.incr.aof seq 1 type i startoffset 14 endoffset 99\n";
        let manifest = Manifest::parse(eight.as_bytes()).unwrap();
        assert_eq!((manifest.increments[0].start_offset, manifest.increments[0].end_offset), (Some(14), Some(99)));
    }

    #[test]
    fn a_name_with_spaces_is_quoted_and_read_back() {
        let text = "file \"my \\\"aof\\\".1.base.rdb\" seq 1 type b\n";
        let manifest = Manifest::parse(text.as_bytes()).unwrap();
        assert_eq!(manifest.base.as_ref().unwrap().name, "my \"aof\".1.base.rdb");
        assert_eq!(manifest.render(), text);
    }

    #[test]
    fn what_a_server_would_not_load_is_refused() {
        let bad = [
            "",
            "file a seq 1 type b",
            "file a seq 1\n",
            "file a seq x type b\n",
            "file a seq 1 type z\n",
            "file ../a seq 1 type b\n",
            "file a seq 1 type b\nfile b seq 2 type b\n",
            "file a seq 2 type i\nfile b seq 2 type i\n",
            "file \"a seq 1 type b\n",
            "\n",
        ];
        for text in bad {
            assert_eq!(Manifest::parse(text.as_bytes()).unwrap_err().kind(), Kind::Damaged, "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes: Vec<u8>, words in "(file|seq|type|[\"'\\\\ a1bhi\n])*") {
            let _ = Manifest::parse(&bytes);
            let _ = Manifest::parse(words.as_bytes());
        }
    }
}
