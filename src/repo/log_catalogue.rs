//! What the repository holds of an incarnation's log: which files, how far, and what is in them.
//!
//! Kept in memory from one LIST of the whole, then refreshed from where it left off: what was added is found behind the
//! last files, what was removed by age before the first one, and about once a day all is listed again, in case something
//! was removed in between. A local writer notes what it ships, so that an archiving agent lists once in its life. What only the objects themselves know (how long a sealed file is,
//! which commits it holds) is read from their ends when it is asked for, and kept.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use futures_util::StreamExt;
use jiff::Timestamp;

use crate::base::clock::{Clock, is_within};
use crate::error::{Error, Kind, Result};
use crate::format::container::ContainerKind;
use crate::format::layout::{self, LogPart};
use crate::format::summary::LogObject;
use crate::model::id::IncarnationId;
use crate::model::log::{ArchivedLogFile, LogChunk, LogSummary};
use crate::repo::local_copy::{KeptLog, LIST_ALL_EVERY};
use crate::repo::objects::{OpenObject, object_key, open_object};
use crate::repo::repository::Repository;
use crate::store::read::list_all;
use crate::store::{Key, ObjectInfo, Store};

/// A refresh looks again at so many of the last sealed files: a writer that ships in parallel fills gaps behind the
/// newest one.
const REFRESH_OVERLAP_FILES: usize = 64;
/// And at so many unsealed files that lie further back, newest first.
const REFRESH_STRAGGLERS_MAX: usize = 16;
/// How many objects' summaries are kept.
const FACTS_MAX: usize = 4096;

/// A log file as listing it shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedLogFile {
    pub name: String,
    pub sealed: bool,
    /// Contiguous bytes from the start of the file. Not known from a listing for a sealed file, which is whole: ask
    /// [`LogCatalogue::file`].
    pub bytes: Option<u64>,
}

/// An object that holds a part of a log file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LogPiece {
    pub key: Key,
    pub part: LogPart,
    pub size_bytes: u64,
}

/// See the module.
pub struct LogCatalogue {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    incarnation: IncarnationId,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, FileParts>,
    /// Files of which a put failed in a way that leaves open whether it happened.
    uncertain: BTreeSet<String>,
    /// Listings under way, and what was noted meanwhile, which they may not show.
    listings: usize,
    noted: Vec<(String, LogPart, u64)>,
    facts: HashMap<Key, Arc<LogObject>>,
    /// When the whole was listed last.
    all_listed_at: Option<Timestamp>,
    /// Grows with whatever changes in `files`.
    changes: u64,
}

/// The sizes of the objects of one log file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FileParts {
    sealed: Option<u64>,
    chunks: BTreeMap<(u64, u64), u64>,
}

impl FileParts {
    /// Takes the size of the sealed object and from, to and size of each chunk.
    pub fn of(sealed: Option<u64>, chunks: &[(u64, u64, u64)]) -> FileParts {
        FileParts { sealed, chunks: chunks.iter().map(|(from, to, size)| ((*from, *to), *size)).collect() }
    }

    pub fn sealed(&self) -> Option<u64> {
        self.sealed
    }

    pub fn chunks(&self) -> Vec<(u64, u64, u64)> {
        self.chunks.iter().map(|((from, to), size)| (*from, *to, *size)).collect()
    }

    fn add(&mut self, part: LogPart, size_bytes: u64) {
        match part {
            LogPart::Sealed => self.sealed = Some(size_bytes),
            LogPart::Chunk { from, to } => drop(self.chunks.insert((from, to), size_bytes)),
        }
    }

    /// Bytes that the chunks cover from the start without a gap. They may overlap: a chunk whose acknowledgement was
    /// lost is there beside the longer one that was shipped instead.
    fn contiguous_bytes(&self) -> u64 {
        let mut covered = 0;
        for (from, to) in self.chunks.keys() {
            if *from > covered {
                break;
            }
            covered = covered.max(*to);
        }
        covered
    }
}

impl LogCatalogue {
    fn new(repo: &Repository, incarnation: IncarnationId, state: State) -> Arc<LogCatalogue> {
        let (store, clock) = (repo.store().clone(), repo.local_copy().clock().clone());
        Arc::new(LogCatalogue { store, clock, incarnation, state: Mutex::new(state) })
    }

    /// Lists the whole log of an incarnation. For who writes it: from now on everybody else in this process looks at
    /// the same catalogue, which the writer keeps true.
    pub async fn load(repo: Arc<Repository>, incarnation: IncarnationId) -> Result<Arc<LogCatalogue>> {
        let remembered = repo.local_copy().remembered(incarnation).await;
        let _one = remembered.asking.lock().await;
        let catalogue = LogCatalogue::new(&repo, incarnation, State::default());
        catalogue.list_all().await?;
        remembered.set_log(catalogue.clone());
        Ok(catalogue)
    }

    /// The catalogue that this process has of an incarnation, with what was added and removed by now. Shared: it goes on
    /// learning.
    pub async fn look(repo: &Arc<Repository>, incarnation: IncarnationId) -> Result<Arc<LogCatalogue>> {
        let remembered = repo.local_copy().remembered(incarnation).await;
        let _one = remembered.asking.lock().await;
        if let Some(catalogue) = remembered.log() {
            catalogue.refresh().await?;
            return Ok(catalogue);
        }
        let state = match remembered.take_kept_log() {
            Some(KeptLog { all_listed_at, files }) => {
                State { files, all_listed_at: Some(all_listed_at), ..State::default() }
            }
            None => State::default(),
        };
        let catalogue = LogCatalogue::new(repo, incarnation, state);
        // Before it is refreshed: if that fails, the next who asks goes on from here.
        remembered.set_log(catalogue.clone());
        catalogue.refresh().await?;
        Ok(catalogue)
    }

    /// Only the file `name` and what comes after it; of nobody else's concern.
    pub async fn beginning_with(
        repo: &Arc<Repository>,
        incarnation: IncarnationId,
        name: &str,
    ) -> Result<Arc<LogCatalogue>> {
        let catalogue = LogCatalogue::new(repo, incarnation, State::default());
        catalogue.refresh_from(name).await?;
        Ok(catalogue)
    }

    /// This catalogue as it is now; what others learn later does not change it.
    pub fn snapshot(&self) -> Arc<LogCatalogue> {
        let state = self.lock();
        let state = State {
            files: state.files.clone(),
            facts: state.facts.clone(),
            all_listed_at: state.all_listed_at,
            ..State::default()
        };
        let (store, clock) = (self.store.clone(), self.clock.clone());
        Arc::new(LogCatalogue { store, clock, incarnation: self.incarnation, state: Mutex::new(state) })
    }

    /// Grows with whatever changes.
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// What is to be kept for the next run; nothing before the whole was listed.
    pub(super) fn to_keep(&self) -> Option<KeptLog> {
        let state = self.lock();
        state.all_listed_at.map(|all_listed_at| KeptLog { all_listed_at, files: state.files.clone() })
    }

    /// How many objects hold the log, and how many bytes they have together.
    pub fn stored(&self) -> (u64, u64) {
        let state = self.lock();
        let sizes = state.files.values().flat_map(|parts| parts.sealed.iter().chain(parts.chunks.values()));
        sizes.fold((0, 0), |(count, sum), size| (count + 1, size.saturating_add(sum)))
    }

    pub fn incarnation(&self) -> IncarnationId {
        self.incarnation
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic is done while it is held.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<BTreeMap<String, FileParts>> {
        let mut files: BTreeMap<String, FileParts> = BTreeMap::new();
        let mut pages = list_all(self.store.as_ref(), prefix, after);
        while let Some(page) = pages.next().await {
            for ObjectInfo { key, size_bytes, .. } in page? {
                if let Some((name, part)) = layout::parse_log_key(self.incarnation, key.as_str()) {
                    files.entry(name.to_string()).or_default().add(part, size_bytes);
                }
            }
        }
        Ok(files)
    }

    /// Learns what was added and removed since the last look, in a number of requests that does not grow with the
    /// archive, but about once a day.
    pub async fn refresh(&self) -> Result<()> {
        let all_listed_at = self.lock().all_listed_at;
        let now = self.clock.now();
        if all_listed_at.is_none_or(|at| !is_within(at, now, LIST_ALL_EVERY)) {
            return self.list_all().await;
        }
        let _listing = Listing::begin(self);
        let (after, stragglers) = refresh_from(&self.lock().files);
        let prefix = layout::log_prefix(self.incarnation);
        let start = after.as_ref().map(|name| layout::sealed_log_key(self.incarnation, name)).transpose()?;
        let mut found = self.list(&prefix, start.as_deref()).await?;
        for name in &stragglers {
            found.append(&mut self.list(&layout::log_file_prefix(self.incarnation, name)?, None).await?);
        }
        let first = match after {
            Some(_) => self.first_key(&prefix).await?,
            None => None,
        };
        self.lock().merge(found, |name| match &after {
            Some(after) => {
                let order = key_order(name);
                let is_gone = first.as_ref().is_none_or(|first| order < *first);
                order > key_order(after) || is_gone || stragglers.iter().any(|straggler| straggler == name)
            }
            None => true,
        });
        Ok(())
    }

    async fn list_all(&self) -> Result<()> {
        let _listing = Listing::begin(self);
        let began_at = self.clock.now();
        let found = self.list(&layout::log_prefix(self.incarnation), None).await?;
        let mut state = self.lock();
        state.merge(found, |_| true);
        state.all_listed_at = Some(began_at);
        // That is worth to be kept, too.
        state.changes += 1;
        Ok(())
    }

    /// The place of the first file that is there, by `key_order`: what comes before it was removed.
    async fn first_key(&self, prefix: &str) -> Result<Option<String>> {
        let page = self.store.list(prefix, None, 1).await?;
        let file = page.first().and_then(|object| {
            let (name, _) = layout::parse_log_key(self.incarnation, object.key.as_str())?;
            Some(key_order(name))
        });
        // Something there that is not ours says nothing.
        Ok(if page.is_empty() { None } else { Some(file.unwrap_or_default()) })
    }

    /// Looks again at the file `name` and all that come after it, whatever was known of them.
    pub async fn refresh_from(&self, name: &str) -> Result<()> {
        let _listing = Listing::begin(self);
        let prefix = layout::log_file_prefix(self.incarnation, name)?;
        let found = self.list(&layout::log_prefix(self.incarnation), Some(prefix.trim_end_matches('/'))).await?;
        self.lock().merge(found, |other| key_order(other) >= key_order(name));
        Ok(())
    }

    /// Learns what there is of one file.
    pub async fn refresh_file(&self, name: &str) -> Result<()> {
        let _listing = Listing::begin(self);
        let found = self.list(&layout::log_file_prefix(self.incarnation, name)?, None).await?;
        let mut state = self.lock();
        state.merge(found, |other| other == name);
        state.uncertain.remove(name);
        Ok(())
    }

    /// All log files, in the order of their names.
    pub fn files(&self) -> Vec<ListedLogFile> {
        let state = self.lock();
        let listed = state.files.iter().map(|(name, parts)| ListedLogFile {
            name: name.clone(),
            sealed: parts.sealed.is_some(),
            bytes: if parts.sealed.is_some() { None } else { Some(parts.contiguous_bytes()) },
        });
        listed.collect()
    }

    /// The name of the last file, if there is any.
    pub fn last_file(&self) -> Option<String> {
        self.lock().files.last_key_value().map(|(name, _)| name.clone())
    }

    /// Whether the file is there as a whole; asks nobody.
    pub fn is_sealed(&self, name: &str) -> bool {
        self.lock().files.get(name).is_some_and(|parts| parts.sealed.is_some())
    }

    /// One log file with its length, or nothing if the catalogue knows of no such file.
    pub async fn file(&self, name: &str) -> Result<Option<ArchivedLogFile>> {
        let Some(parts) = self.lock().files.get(name).cloned() else { return Ok(None) };
        let (bytes, sealed) = match parts.sealed {
            Some(size) => (self.facts(&self.piece(name, LogPart::Sealed, size)?).await?.chunk.to_bytes, true),
            None => (parts.contiguous_bytes(), false),
        };
        Ok(Some(ArchivedLogFile { name: name.to_string(), bytes, sealed }))
    }

    /// What the archived bytes of a log file contain; for a file in chunks all of them together.
    pub async fn summary(&self, name: &str) -> Result<LogSummary> {
        let mut all = LogSummary::default();
        for piece in self.pieces(name)? {
            let facts = self.facts(&piece).await?;
            let one = &facts.summary;
            let earlier = all.first_commit_at.into_iter().chain(one.first_commit_at).min();
            let later = all.last_commit_at.into_iter().chain(one.last_commit_at).max();
            all.first_commit_at = earlier;
            all.last_commit_at = later;
            all.last_commit = all.last_commit.into_iter().chain(one.last_commit).max();
            all.transactions.extend(one.transactions.iter().cloned());
            for point in &one.named_points {
                if !all.named_points.contains(point) {
                    all.named_points.push(point.clone());
                }
            }
        }
        Ok(all)
    }

    /// The number of the first of `names` (in the order of the log) that holds a commit later than `at`, or their number
    /// if there is none. Reads the ends of about log2 of them, and of neighbours without commits. The summaries are
    /// hints, so a caller begins a file earlier.
    pub async fn first_with_commit_after(&self, names: &[String], at: Timestamp) -> Result<usize> {
        let (mut low, mut high) = (0, names.len());
        while low < high {
            let middle = low + (high - low) / 2;
            // A file without commits says nothing: the next one that has some answers for it.
            let mut probe = middle;
            let mut last_commit_at = None;
            while probe < high && last_commit_at.is_none() {
                last_commit_at = self.summary(&names[probe]).await?.last_commit_at;
                probe += 1;
            }
            match last_commit_at {
                Some(last) if last <= at => low = probe,
                _ => high = middle,
            }
        }
        // `low` may be a file without commits before the one that was looked for.
        while low < names.len() && self.summary(&names[low]).await?.last_commit_at.is_none_or(|last| last <= at) {
            low += 1;
        }
        Ok(low)
    }

    /// The last piece of what there is of an unfinished file; nothing for one that is finished or not there.
    pub async fn last_chunk(&self, name: &str) -> Result<Option<Arc<LogObject>>> {
        if self.is_sealed(name) || !self.lock().files.contains_key(name) {
            return Ok(None);
        }
        match self.pieces(name)?.pop() {
            Some(piece) => self.facts(&piece).await.map(Some),
            None => Ok(None),
        }
    }

    /// The local writer has made this object durable.
    pub(super) fn note_shipped(&self, object: LogObject, key: Key, size_bytes: u64) {
        let LogChunk { file, from_bytes, to_bytes, sealed } = &object.chunk;
        let part = if *sealed { LogPart::Sealed } else { LogPart::Chunk { from: *from_bytes, to: *to_bytes } };
        let mut state = self.lock();
        state.files.entry(file.clone()).or_default().add(part, size_bytes);
        state.changes += 1;
        if state.listings > 0 {
            state.noted.push((file.clone(), part, size_bytes));
        }
        state.keep_facts(key, Arc::new(object));
    }

    /// The local writer does not know whether its last object for this file is there.
    pub(super) fn note_uncertain(&self, name: &str) {
        self.lock().uncertain.insert(name.to_string());
    }

    pub(super) fn is_uncertain(&self, name: &str) -> bool {
        self.lock().uncertain.contains(name)
    }

    /// Contiguous bytes in chunks, whether or not the file is sealed.
    pub(super) fn chunked_bytes(&self, name: &str) -> u64 {
        self.lock().files.get(name).map_or(0, FileParts::contiguous_bytes)
    }

    /// Chunks that a sealed file has replaced.
    pub(super) fn superseded_chunks(&self, name: &str) -> Result<Vec<LogPiece>> {
        let parts = self.lock().files.get(name).filter(|parts| parts.sealed.is_some()).cloned().unwrap_or_default();
        let chunks = parts.chunks.iter();
        chunks.map(|((from, to), size)| self.piece(name, LogPart::Chunk { from: *from, to: *to }, *size)).collect()
    }

    /// These chunks were deleted.
    pub(super) fn forget_chunks(&self, name: &str, chunks: &[LogPiece]) {
        let mut state = self.lock();
        state.changes += 1;
        for chunk in chunks {
            state.facts.remove(&chunk.key);
            if let (LogPart::Chunk { from, to }, Some(parts)) = (chunk.part, state.files.get_mut(name)) {
                parts.chunks.remove(&(from, to));
            }
        }
    }

    /// The objects that together hold the contiguous bytes of a file, in order: the sealed one, or the chunks without
    /// those that others cover.
    pub(super) fn pieces(&self, name: &str) -> Result<Vec<LogPiece>> {
        let Some(parts) = self.lock().files.get(name).cloned() else {
            return Err(Error::new(Kind::NotFound, format!("log file '{name}' is not in the repository")));
        };
        if let Some(size) = parts.sealed {
            return Ok(vec![self.piece(name, LogPart::Sealed, size)?]);
        }
        let mut pieces = Vec::new();
        let mut covered = 0;
        loop {
            // Of the chunks that touch what is covered, the one that reaches furthest.
            let best = parts.chunks.iter().filter(|((from, _), _)| *from <= covered).max_by_key(|((_, to), _)| *to);
            match best {
                Some(((from, to), size)) if *to > covered => {
                    pieces.push(self.piece(name, LogPart::Chunk { from: *from, to: *to }, *size)?);
                    covered = *to;
                }
                _ => return Ok(pieces),
            }
        }
    }

    fn piece(&self, name: &str, part: LogPart, size_bytes: u64) -> Result<LogPiece> {
        let key = match part {
            LogPart::Sealed => layout::sealed_log_key(self.incarnation, name)?,
            LogPart::Chunk { from, to } => layout::log_chunk_key(self.incarnation, name, from, to)?,
        };
        Ok(LogPiece { key: object_key(key)?, part, size_bytes })
    }

    /// What an object says about itself; kept.
    pub(super) async fn facts(&self, piece: &LogPiece) -> Result<Arc<LogObject>> {
        if let Some(known) = self.lock().facts.get(&piece.key) {
            return Ok(known.clone());
        }
        let object = open_object(self.store.as_ref(), &piece.key, piece.size_bytes, ContainerKind::Log).await?;
        let facts = Arc::new(log_object(self.incarnation, &object)?);
        self.lock().keep_facts(piece.key.clone(), facts.clone());
        Ok(facts)
    }
}

/// The summary of an object of the log, checked against its name and its content's length.
pub(super) fn log_object(incarnation: IncarnationId, object: &OpenObject) -> Result<LogObject> {
    let facts = LogObject::parse(&object.seal, &object.index.summary)?;
    let chunk = &facts.chunk;
    let is_itself = match layout::parse_log_key(incarnation, object.key.as_str()) {
        Some((file, LogPart::Sealed)) => chunk.file == file && chunk.sealed && chunk.from_bytes == 0,
        Some((file, LogPart::Chunk { from, to })) => {
            chunk.file == file && !chunk.sealed && (chunk.from_bytes, chunk.to_bytes) == (from, to)
        }
        None => false,
    };
    if !is_itself || object.index.plain_bytes() != chunk.to_bytes - chunk.from_bytes {
        return Err(object.seal.damaged("it does not hold what its name says"));
    }
    Ok(facts)
}

impl State {
    fn keep_facts(&mut self, key: Key, facts: Arc<LogObject>) {
        // Rarely reached, and then everything that is still asked for comes back by itself.
        if self.facts.len() >= FACTS_MAX {
            self.facts.clear();
        }
        self.facts.insert(key, facts);
    }

    /// Takes over what a listing found for the files that it covered, then what was noted meanwhile.
    fn merge(&mut self, found: BTreeMap<String, FileParts>, is_covered: impl Fn(&str) -> bool) {
        let before = self.files.len();
        self.files.retain(|name, _| !is_covered(name) || found.contains_key(name));
        let has_news =
            before != self.files.len() || found.iter().any(|(name, parts)| self.files.get(name) != Some(parts));
        self.changes += u64::from(has_news);
        self.files.extend(found);
        for (name, part, size_bytes) in &self.noted {
            if is_covered(name) {
                self.files.entry(name.clone()).or_default().add(*part, *size_bytes);
            }
        }
    }
}

/// While it lives, what is noted is remembered for the listings that are under way.
struct Listing<'a>(&'a LogCatalogue);

impl Listing<'_> {
    fn begin(catalogue: &LogCatalogue) -> Listing<'_> {
        catalogue.lock().listings += 1;
        Listing(catalogue)
    }
}

impl Drop for Listing<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.listings -= 1;
        if state.listings == 0 {
            state.noted.clear();
        }
    }
}

/// Keys sort by the name with the slash that follows it.
fn key_order(name: &str) -> String {
    format!("{name}/")
}

/// After which sealed file a refresh may begin to list, and which unsealed files before that it has to ask for.
fn refresh_from(files: &BTreeMap<String, FileParts>) -> (Option<String>, Vec<String>) {
    let mut in_key_order: Vec<&String> = files.keys().collect();
    // Almost sorted already: only names that begin with another name move.
    in_key_order.sort_by_cached_key(|name| key_order(name));
    let is_sealed = |name: &str| files.get(name).is_some_and(|parts| parts.sealed.is_some());
    let old_enough = in_key_order.len().saturating_sub(REFRESH_OVERLAP_FILES);
    let marker = in_key_order[..old_enough].iter().rposition(|name| is_sealed(name));
    match marker {
        Some(at) => {
            let before = in_key_order[..at].iter().rev();
            let open = before.filter(|name| !is_sealed(name)).take(REFRESH_STRAGGLERS_MAX);
            (Some(in_key_order[at].clone()), open.map(|name| name.to_string()).collect())
        }
        None => (None, Vec::new()),
    }
}

#[cfg(test)]
mod tests;
