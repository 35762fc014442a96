//! Links to everything that `download` reads of a backup, for a host that has neither an agent nor credentials.
//!
//! The manifest is read once to see which packs it needs; their sizes come from listings, a thousand to a request. Lines
//! are written as they are made, and what stays in memory is the id of each pack.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;

use super::SpanLog;
use crate::error::{Context, Error, Kind, Result};
use crate::format::layout::{self, LogPart};
use crate::format::links::{LinkLine, LinksHeader, LinksWriter};
use crate::format::manifest::{Extent, ManifestEntry};
use crate::model::id::{BackupId, IncarnationId};
use crate::model::incarnation::Incarnation;
use crate::repo::backup_reader::BackupReader;
use crate::repo::repository::Repository;
use crate::store::read::list_all;
use crate::store::{Key, LINKS_MAX, ObjectInfo, Store};

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinksMade {
    pub objects: u64,
    /// Their sizes together: what a restore fetches at most.
    pub bytes: u64,
    pub expires_at: Timestamp,
    /// The credentials that made them are temporary.
    pub may_end_earlier: bool,
}

/// Writes a file of links to a backup into `to`. Nothing is written if the store has no links, or none for so long.
pub async fn write_links(
    repo: &Arc<Repository>,
    incarnation: &Incarnation,
    backup: &BackupId,
    valid_for: Duration,
    made_at: Timestamp,
    to: &mut (dyn Write + Send),
) -> Result<LinksMade> {
    let store = repo.store().as_ref();
    // First, because it is what is impossible most often.
    let header_key = Key::parse(layout::HEADER_KEY)?;
    let terms = store.presign(std::slice::from_ref(&header_key), valid_for).await?;
    let reader = BackupReader::open(repo.clone(), incarnation.id, backup).await?;
    let header = LinksHeader {
        keiki: env!("CARGO_PKG_VERSION").to_string(),
        repository: terms.urls.first().map_or_else(|| repo.describe(), |url| place_of(url).to_string()),
        incarnation: incarnation.id,
        backup: backup.clone(),
        backup_ended_at: reader.backup().ended_at,
        made_at,
        expires_at: terms.expires_at,
    };
    let made = LinksMade { objects: 0, bytes: 0, expires_at: terms.expires_at, may_end_earlier: terms.may_end_earlier };
    let mut sink = Sink { store, valid_for, to, lines: LinksWriter::default(), waiting: Vec::new(), made };
    let first = sink.lines.header(&header)?;
    sink.write(&first)?;
    let manifest = layout::manifest_key(incarnation.id, backup);
    for key in [header_key, Key::parse(&layout::identity_key(incarnation.id))?, Key::parse(&manifest)?] {
        let found = store.head(&key).await?;
        sink.add(found.ok_or_else(|| gone(&key))?).await?;
    }
    if let Some(log) = SpanLog::find(repo, incarnation, reader.backup()).await? {
        for (file, _) in &log.files {
            sink.add(finished_log(store, incarnation.id, &file.name).await?).await?;
        }
    }
    for (owner, packs) in packs_of(&reader).await? {
        sink.add_packs(owner, packs).await?;
    }
    sink.end().await
}

/// Where links lead, given that to the header of the repository. What the store says of itself would be how the caller
/// gets there, which is through an agent.
fn place_of(url: &str) -> &str {
    let path = url.split_once('?').map_or(url, |(path, _)| path);
    path.trim_end_matches(layout::HEADER_KEY).trim_end_matches('/')
}

fn gone(key: &Key) -> Error {
    Error::new(Kind::Damaged, format!("object '{key}' is not in the repository any more"))
        .hint("choose another backup: 'keiki backup list' shows them")
}

/// The packs that a backup needs, by whose they are.
async fn packs_of(reader: &BackupReader) -> Result<BTreeMap<IncarnationId, BTreeSet<String>>> {
    let mut needed: BTreeMap<IncarnationId, BTreeSet<String>> = BTreeMap::new();
    let mut entries = reader.entries();
    while let Some(batch) = entries.next_batch().await? {
        let parts = batch.iter().filter_map(|entry| match entry {
            ManifestEntry::Part(part) => Some(part),
            _ => None,
        });
        for extent in parts.flat_map(|part| &part.extents) {
            if let Extent::Run(run) = extent {
                let key = layout::pack_key(run.pack.incarnation, run.pack.pack);
                needed.entry(run.pack.incarnation).or_default().insert(key);
            }
        }
    }
    Ok(needed)
}

/// The object of a log file that is whole. One that is still in parts would be replaced while somebody restores.
async fn finished_log(store: &dyn Store, incarnation: IncarnationId, file: &str) -> Result<ObjectInfo> {
    let prefix = layout::log_file_prefix(incarnation, file)?;
    let mut pages = list_all(store, &prefix, None);
    while let Some(page) = pages.next().await {
        for object in page? {
            if let Some((_, LogPart::Sealed)) = layout::parse_log_key(incarnation, object.key.as_str()) {
                return Ok(object);
            }
        }
    }
    Err(Error::new(Kind::Unreachable, format!("log file '{file}', which the backup needs, is still being written"))
        .hint("try again when the server has gone on to its next log file"))
}

/// Where lines go, a batch of links at a time.
struct Sink<'a> {
    store: &'a dyn Store,
    valid_for: Duration,
    to: &'a mut (dyn Write + Send),
    lines: LinksWriter,
    waiting: Vec<ObjectInfo>,
    made: LinksMade,
}

impl Sink<'_> {
    async fn add(&mut self, object: ObjectInfo) -> Result<()> {
        self.waiting.push(object);
        if self.waiting.len() == LINKS_MAX { self.flush().await } else { Ok(()) }
    }

    async fn add_packs(&mut self, owner: IncarnationId, mut needed: BTreeSet<String>) -> Result<()> {
        let store = self.store;
        let prefix = layout::packs_prefix(owner);
        let mut pages = list_all(store, &prefix, None);
        while let Some(page) = pages.next().await {
            for object in page? {
                if needed.remove(object.key.as_str()) {
                    self.add(object).await?;
                }
            }
        }
        match needed.first() {
            Some(missing) => Err(gone(&Key::parse(missing)?)),
            None => Ok(()),
        }
    }

    async fn flush(&mut self) -> Result<()> {
        let objects = std::mem::take(&mut self.waiting);
        let keys: Vec<Key> = objects.iter().map(|object| object.key.clone()).collect();
        if keys.is_empty() {
            return Ok(());
        }
        let links = self.store.presign(&keys, self.valid_for).await?;
        self.made.may_end_earlier |= links.may_end_earlier;
        if links.urls.len() != keys.len() {
            return Err(Error::new(Kind::Internal, "another number of links came than were asked for"));
        }
        for (object, url) in objects.into_iter().zip(links.urls) {
            let (bytes, etag) = (object.size_bytes, object.tag.0);
            let line = self.lines.link(&LinkLine { key: object.key.to_string(), bytes, etag, url })?;
            self.write(&line)?;
            self.made.objects += 1;
            self.made.bytes = self.made.bytes.saturating_add(bytes);
        }
        Ok(())
    }

    async fn end(mut self) -> Result<LinksMade> {
        self.flush().await?;
        let last = std::mem::take(&mut self.lines).end()?;
        self.write(&last)?;
        self.to.flush().context(|| "cannot write the links")?;
        Ok(self.made)
    }

    fn write(&mut self, line: &str) -> Result<()> {
        self.to.write_all(line.as_bytes()).context(|| "cannot write the links")
    }
}
