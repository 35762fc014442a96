//! Places the log as relay logs, batch by batch, and ends it at the target.
//!
//! A relay log is a byte for byte copy of a binary log file up to where the log is cut, which is always behind a whole
//! transaction: behind the last one of the target, or where a server died while it wrote. At the start of each file
//! stands the GTID state that the server had then; it must be the state that was counted so far, so a hole in the log
//! or a log of another server is found here and not by a missing row.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_blocking;
use crate::base::ownership::{give_to, write_owned};
use crate::base::users::User;
use crate::engine::mysql::backup::fact;
use crate::engine::mysql::geometry::{log_name, log_number};
use crate::engine::mysql::ondisk::binlog::{EventHeader, FIRST_EVENT_AT, HEADER_BYTES, event_type};
use crate::engine::mysql::ondisk::transaction::{LogState, Transaction, TransactionId, TransactionRange};
use crate::engine::mysql::ondisk::walker::Walker;
use crate::engine::mysql::product::Product;
use crate::engine::{CloneSite, LogSource};
use crate::error::{Context, Error, Kind, Result};
use crate::model::position::Position;
use crate::model::target::Target;

/// Log in one batch; two lie in the clone at the same time. One file may be longer.
const BATCH_BYTES: u64 = 1 << 30;
/// Of the first batch, because nothing is applied while it is placed.
const FIRST_BATCH_BYTES: u64 = 32 << 20;
const PIECE_BYTES: usize = 4 << 20;
/// MariaDB: the first file is copied from its start, for the event that describes its format, up to here; what lies
/// between this and the start of replay is left out, and a hole in the copy.
const START_BYTES: u64 = 64 << 10;
/// Beginning of the names of the relay logs.
pub const RELAY_PREFIX: &str = "keiki-relay";

/// Where the log was cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    pub number: u64,
    pub offset: u64,
    /// What a server has that has all of it.
    pub state: LogState,
    pub last_commit_at: Option<Timestamp>,
}

impl End {
    pub fn position(&self) -> Position {
        Position::File { number: self.number, offset: self.offset }
    }
}

/// A relay log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Without directory.
    pub name: String,
    pub bytes: u64,
    /// Where in it replay begins.
    pub start: u64,
}

/// Relay logs that lie ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The base of their names.
    pub base: String,
    pub files: Vec<Placed>,
    /// The number of the first file in the source's log.
    pub first_number: u64,
    /// Where in that file replay begins.
    pub first_offset: u64,
    /// Bytes to be replayed.
    pub bytes: u64,
    pub transactions: u64,
    /// How many of them have no name, so that the state does not show them.
    pub nameless: u64,
    /// Which of the files has the end of the last transaction, and where in it.
    pub end_at: (usize, u64),
    /// The state behind the last transaction.
    pub end_state: LogState,
}

impl Batch {
    /// Which of the files the server is in, and where, by what it says; nothing if it names another one. It begins a file
    /// of its own behind them as it starts, and is in that when it has applied them all.
    pub fn place(&self, name: &str, offset: &str) -> Option<(usize, u64)> {
        let name = name.rsplit('/').next().unwrap_or(name);
        if let Some(at) = self.files.iter().position(|file| file.name == name) {
            return Some((at, offset.parse().ok()?));
        }
        let number: usize = name.strip_prefix(&self.base)?.strip_prefix('.')?.parse().ok()?;
        (number > self.files.len()).then_some((self.files.len(), 0))
    }

    /// How many of its bytes lie before a place.
    pub fn bytes_before(&self, (at, offset): (usize, u64)) -> u64 {
        let before: u64 = self.files[..at].iter().map(|file| file.bytes.saturating_sub(file.start)).sum();
        before + self.files.get(at).map_or(0, |file| offset.saturating_sub(file.start))
    }
}

/// Where a transaction begins and ends in a log file, if it is there. `held` is what the summary of the file says;
/// without a summary the file is read.
pub async fn find_transaction(
    wanted: TransactionId,
    file: &str,
    held: &[String],
    logs: &dyn LogSource,
) -> Result<Option<(Position, Position)>> {
    let may_hold = |text: &String| TransactionRange::parse(text).is_none_or(|range| range.may_hold(wanted));
    if !held.is_empty() && !held.iter().any(may_hold) {
        return Ok(None);
    }
    let number = log_number(file)?;
    let bytes = logs.available(file).await?.unwrap_or(0);
    let (mut walker, mut at, mut found) = (Walker::new(), 0, None);
    while at < bytes && found.is_none() {
        let wanted_bytes = usize::try_from(bytes - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        let piece = logs.read(file, at, wanted_bytes).await?;
        if piece.is_empty() {
            break;
        }
        at += piece.len() as u64;
        let walked = walker.feed(&piece, &mut |transaction| {
            if transaction.id == wanted {
                let position = |offset| Position::File { number, offset };
                found = Some((position(transaction.start), position(transaction.end)));
            }
            Ok(())
        });
        match walked {
            // What a crash left behind the last transaction.
            Err(error) if error.kind() == Kind::Damaged && walker.knows_format() => break,
            other => other?,
        }
    }
    Ok(found)
}

/// Decides where the log ends for a target. Pure.
struct Cutter {
    target: Target,
    /// Of a target that is one.
    transaction: Option<(TransactionId, bool)>,
    end: End,
    transactions: u64,
    nameless: u64,
    /// The target's last transaction was passed.
    is_cut: bool,
    /// The first transaction that was left out, with its time.
    left_out: Option<Transaction>,
}

impl Cutter {
    fn new(product: Product, target: &Target, number: u64, offset: u64, state: LogState) -> Result<Cutter> {
        let transaction = match target {
            Target::Transaction { id, included } => Some((product.parse_id(id)?, *included)),
            _ => None,
        };
        let end = End { number, offset, state, last_commit_at: None };
        let is_cut = matches!(target, Target::Backup(_));
        Ok(Cutter { target: target.clone(), transaction, end, transactions: 0, nameless: 0, is_cut, left_out: None })
    }

    /// Takes the next transaction of file `number`.
    fn add(&mut self, number: u64, transaction: Transaction) -> Result<()> {
        if self.is_cut {
            return Ok(());
        }
        let is_wanted = self.transaction.is_some_and(|(id, _)| id == transaction.id);
        let is_beyond = match &self.target {
            Target::Transaction { included, .. } => is_wanted && !included,
            Target::Time(at) => transaction.is_beyond(*at),
            Target::Position(position) => Position::File { number, offset: transaction.end } > *position,
            _ => false,
        };
        if is_beyond {
            (self.is_cut, self.left_out) = (true, Some(transaction));
            return Ok(());
        }
        self.transactions += 1;
        self.nameless += u64::from(transaction.id == TransactionId::Anonymous);
        (self.end.number, self.end.offset) = (number, transaction.end);
        self.end.state.advance(transaction.id)?;
        self.end.last_commit_at = self.end.last_commit_at.max(Some(transaction.at));
        self.is_cut = is_wanted;
        Ok(())
    }
}

/// See the module.
pub struct Feed {
    logs: Arc<dyn LogSource>,
    product: Product,
    data_dir: PathBuf,
    cutter: Cutter,
    /// What the copy has without the log.
    base: LogState,
    /// The next file, and where in it replay begins.
    number: u64,
    offset: u64,
    batches: u32,
    total_bytes: u64,
    start: (u64, u64),
    /// Where the log ends that was placed so far.
    log_end: Position,
    is_over: bool,
    /// Every transaction has a name, so that the state at the start of a file proves that none before it is missing.
    is_proved: bool,
    /// Where the bytes of the file that was placed last make no sense any more.
    unreadable_from: Option<u64>,
}

impl Feed {
    /// Of a copy that has everything up to `start`, which is `state`. Refuses a target that lies before the backup.
    pub async fn new(
        logs: Arc<dyn LogSource>,
        product: Product,
        site: &CloneSite,
        target: &Target,
        start: (u64, u64),
        state: LogState,
    ) -> Result<Feed> {
        let (number, offset) = start;
        match target {
            Target::Position(position) => {
                position.file().map_err(|error| error.with_kind(Kind::BadInput))?;
                if *position < site.backup_stop {
                    return Err(before_backup(&format!("position '{position}'"), site.backup_stop));
                }
            }
            Target::Lsn(_) | Target::Name(_) => {
                return Err(Error::new(Kind::BadInput, format!("'{target}' is no target in a binary log"))
                    .hint("choose a time, a file and offset, a GTID, a backup, or latest"));
            }
            Target::Latest | Target::Time(_) | Target::Backup(_) | Target::Transaction { .. } => {}
        }
        let mut total_bytes = 0;
        let mut next = number;
        while let Some(bytes) = logs.available(&log_name(next)).await? {
            total_bytes += bytes;
            if !logs.is_sealed(&log_name(next)).await? {
                break;
            }
            next += 1;
        }
        let cutter = Cutter::new(product, target, number, offset, state.clone())?;
        let is_over = cutter.is_cut;
        Ok(Feed {
            logs,
            product,
            data_dir: site.data_dir.clone(),
            cutter,
            base: state,
            number,
            offset,
            batches: 0,
            total_bytes: total_bytes.saturating_sub(offset),
            start,
            log_end: site.backup_start,
            is_over,
            is_proved: site.facts.get(fact::GTID_MODE).is_none_or(|mode| mode == "ON"),
            unreadable_from: None,
        })
    }

    /// Bytes of log from the start of the backup to the end of the archive.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Places the next batch; nothing if the log or the target is at its end.
    pub async fn next_batch(&mut self, user: &User, cancel: &CancellationToken) -> Result<Option<Batch>> {
        if self.is_over {
            return Ok(None);
        }
        self.batches += 1;
        let base = format!("{RELAY_PREFIX}-{}", self.batches);
        let mut batch = Batch {
            base,
            files: Vec::new(),
            first_number: self.number,
            first_offset: self.offset.max(FIRST_EVENT_AT),
            bytes: 0,
            transactions: self.cutter.transactions,
            nameless: self.cutter.nameless,
            end_at: (0, 0),
            end_state: self.cutter.end.state.clone(),
        };
        let limit = if self.batches == 1 { FIRST_BATCH_BYTES } else { BATCH_BYTES };
        while !self.is_over && batch.bytes < limit {
            let name = log_name(self.number);
            let Some(bytes) = self.logs.available(&name).await? else {
                self.is_over = true;
                break;
            };
            let placed = self.place_file(&name, bytes, &batch, user, cancel).await?;
            if self.cutter.end.number == self.number {
                let replayed = self.cutter.end.offset.saturating_sub(self.offset.max(FIRST_EVENT_AT));
                batch.end_at = (batch.files.len(), placed.start + replayed);
            }
            batch.bytes += placed.bytes.saturating_sub(placed.start);
            batch.files.push(placed);
            // What follows an unfinished file in the repository does not follow it in the log: something is missing.
            let is_whole = self.logs.is_sealed(&name).await?;
            self.require_within(&name, bytes, is_whole)?;
            self.require_proved(&name, is_whole).await?;
            self.is_over |= self.cutter.is_cut || !is_whole;
            self.log_end = match is_whole {
                true => Position::File { number: self.number + 1, offset: 0 },
                false => Position::File { number: self.number, offset: bytes },
            };
            (self.number, self.offset) = (self.number + 1, 0);
        }
        if batch.files.is_empty() {
            return Ok(None);
        }
        let index: String = batch.files.iter().map(|file| format!("./{}\n", file.name)).collect();
        let (user, path) = (user.clone(), self.data_dir.join(format!("{}.index", batch.base)));
        run_blocking("relay log index", move || write_owned(&user, &path, index.as_bytes())).await?;
        batch.transactions = self.cutter.transactions - batch.transactions;
        batch.nameless = self.cutter.nameless - batch.nameless;
        batch.end_state = self.cutter.end.state.clone();
        Ok(Some(batch))
    }

    /// Refuses a position behind the end of a file that is whole: it is a slip, and not the file's end.
    fn require_within(&self, name: &str, bytes: u64, is_whole: bool) -> Result<()> {
        match self.cutter.target {
            Target::Position(Position::File { number, offset })
                if is_whole && number == self.number && offset > bytes =>
            {
                Err(Error::new(Kind::BadInput, format!("log file '{name}' has {bytes} bytes, and not {offset}"))
                    .hint("'SHOW BINARY LOGS' on the source prints how long its files are"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a file that makes no sense to its end if others follow it and its transactions have no names: then nothing
    /// shows whether any are missing. A server that died while it wrote cuts its last file before it begins another one
    /// (`sql/binlog/recovery.cc`).
    async fn require_proved(&self, name: &str, is_whole: bool) -> Result<()> {
        let Some(from) = self.unreadable_from.filter(|_| is_whole && !self.is_proved && !self.cutter.is_cut) else {
            return Ok(());
        };
        match self.logs.available(&log_name(self.number + 1)).await? {
            None => Ok(()),
            Some(_) => Err(Error::new(
                Kind::Damaged,
                format!("log file '{name}' is no binary log behind offset {from}, and the log goes on in another file"),
            )
            .hint(format!(
                "choose a position up to '{}', or a later backup",
                Position::File { number: self.number, offset: from }
            ))),
        }
    }

    /// Copies one log file as far as it belongs to the target.
    async fn place_file(
        &mut self,
        name: &str,
        bytes: u64,
        batch: &Batch,
        user: &User,
        cancel: &CancellationToken,
    ) -> Result<Placed> {
        let what = || format!("cannot place log file '{name}'");
        let placed = format!("{}.{:06}", batch.base, batch.files.len() + 1);
        let path = self.data_dir.join(&placed);
        let (owner, made) = (user.clone(), path.clone());
        let file = Arc::new(run_blocking("relay log", move || make_file(&owner, &made)).await.context(what)?);
        if bytes < self.offset {
            return Err(Error::new(Kind::NotFound, format!("log file '{name}' ends before the backup does"))
                .hint("the archive has lost log of the backup; use another backup"));
        }
        let (head, gap) = self.head_and_gap(name).await.context(what)?;
        let mut walker = Walker::new();
        let mut at = 0;
        self.unreadable_from = None;
        while at < bytes && !self.cutter.is_cut {
            if cancel.is_cancelled() {
                return Err(Error::new(Kind::Cancelled, "replay was cancelled"));
            }
            if self.offset > head && at == head {
                at = self.offset;
                walker = walker.resumed_at(at);
                // Nothing may have been written since the backup.
                continue;
            }
            let limit = if at < self.offset { head } else { bytes };
            let wanted = usize::try_from(limit - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let piece = self.logs.read(name, at, wanted).await?;
            if piece.is_empty() {
                return Err(Error::new(Kind::Damaged, format!("{}: it is shorter than it was said to be", what())));
            }
            let is_readable = self.walk(&mut walker, &piece, at).context(what)?;
            let from = if at < self.offset { at } else { at - gap };
            let (file, count) = (file.clone(), piece.len() as u64);
            run_blocking("relay log", move || file.write_all_at(&piece, from).context(|| "cannot write a relay log"))
                .await
                .context(what)?;
            at += count;
            if !is_readable {
                self.unreadable_from = Some(walker.boundary());
                break;
            }
            if at == self.offset {
                walker = walker.resumed_at(at);
            }
        }
        let end = match self.cutter.is_cut && self.cutter.end.number == self.number {
            true => self.cutter.end.offset,
            // The target's last transaction lies in an earlier file: only the description of the format is left.
            false if self.cutter.is_cut => {
                walker.boundary().min(self.cutter.left_out.map_or(u64::MAX, |left| left.start))
            }
            false => walker.boundary().max(self.offset),
        };
        let end = end.saturating_sub(gap);
        run_blocking("relay log", move || file.set_len(end).context(|| "cannot cut a relay log")).await?;
        Ok(Placed { name: placed, bytes: end, start: self.offset.max(FIRST_EVENT_AT) - gap })
    }

    async fn event_at(&self, name: &str, offset: u64) -> Result<Option<EventHeader>> {
        Ok(EventHeader::parse(&self.logs.read(name, offset, HEADER_BYTES).await?))
    }

    /// How many bytes of the start of the next file are copied before the place where replay begins, and how many between
    /// the two do not count. MySQL ends the newest relay log where it cannot read on (`sql/rpl_relay_log_sanitizer.cc`),
    /// so there what is left out is no hole: the description of the format and the list of GTIDs are followed by what is replayed.
    async fn head_and_gap(&self, name: &str) -> Result<(u64, u64)> {
        if self.product == Product::MariaDb || self.offset <= FIRST_EVENT_AT {
            return Ok((self.offset.min(START_BYTES), 0));
        }
        let format = self.event_at(name, FIRST_EVENT_AT).await?;
        let format = format.filter(|header| header.kind == event_type::FORMAT_DESCRIPTION);
        let format = format.ok_or_else(|| Error::new(Kind::Damaged, "its first event does not describe its format"))?;
        let mut head = FIRST_EVENT_AT + u64::from(format.bytes);
        // Without the list that stands behind it the server takes the file for corrupt.
        if let Some(list) =
            self.event_at(name, head).await?.filter(|list| list.kind == event_type::MYSQL_PREVIOUS_GTIDS)
        {
            head += u64::from(list.bytes);
        }
        let head = head.min(self.offset);
        Ok((head, self.offset - head))
    }

    /// Walks the next piece. Says whether the file goes on as a binary log: what a crash of the source's host left
    /// behind its last transaction is not one.
    fn walk(&mut self, walker: &mut Walker, piece: &[u8], at: u64) -> Result<bool> {
        let (number, offset) = (self.number, self.offset);
        let before_start = at < offset;
        let had_state = walker.first_state().is_some();
        let cutter = &mut self.cutter;
        // Compared before a transaction of the file is counted: the list stands in front of them all.
        let expected = cutter.end.state.clone();
        let walked = walker.feed(piece, &mut |transaction| {
            if !before_start && transaction.start >= offset { cutter.add(number, transaction) } else { Ok(()) }
        });
        if let Some(found) = walker.first_state().filter(|_| !had_state && offset == 0 && number != self.start.0) {
            found.require_follows(&expected, &self.base)?;
        }
        match walked {
            Ok(()) => Ok(true),
            // Behind at least the description of the format; the next file's state shows whether anything is missing.
            Err(error) if error.kind() == Kind::Damaged && walker.boundary() > 0 && walker.knows_format() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Where the log was cut, or why this target cannot be served.
    pub fn into_end(self) -> Result<End> {
        let cutter = self.cutter;
        if let (Target::Time(_), Some(_), 0) = (&cutter.target, cutter.left_out, cutter.transactions) {
            // Nothing was replayed because the first transaction after the backup is later, which is as it should be:
            // the backup ended before the target, or it would not have been chosen.
            return Ok(cutter.end);
        }
        if let (Some((id, _)), false) = (cutter.transaction, cutter.is_cut) {
            return Err(Error::new(Kind::NotFound, format!("transaction '{id}' is not in the log behind the backup"))
                .hint("choose an earlier backup, or another transaction"));
        }
        if let (Target::Position(position), false) = (&cutter.target, cutter.is_cut)
            && self.log_end < *position
        {
            return Err(Error::new(Kind::NotFound, format!("the log ends at '{}'", self.log_end))
                .hint("'keiki window' shows the newest position that can be reached"));
        }
        Ok(cutter.end)
    }
}

fn make_file(user: &User, path: &Path) -> Result<File> {
    let what = || format!("cannot make '{}'", path.display());
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(path).context(what)?;
    give_to(user, path)?;
    Ok(file)
}

/// Removes what replay has placed. The server must not run. Blocking.
pub fn remove_relay_logs(data_dir: &Path) -> Result<()> {
    let what = || format!("cannot remove the relay logs in '{}'", data_dir.display());
    for entry in std::fs::read_dir(data_dir).context(what)? {
        let entry = entry.context(what)?;
        if entry.file_name().to_string_lossy().starts_with(RELAY_PREFIX) {
            std::fs::remove_file(entry.path()).context(what)?;
        }
    }
    Ok(())
}

fn before_backup(what: &str, stop: Position) -> Error {
    Error::new(Kind::BadInput, format!("{what} lies before the end of the base backup at '{stop}'"))
        .hint("choose a later target, or an earlier backup; 'keiki backup list' shows them")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_applied_when_the_server_stands_behind_the_last_transaction_whatever_lies_between_the_files() {
        let file = |name: &str, bytes, start| Placed { name: name.to_string(), bytes, start };
        let batch = Batch {
            base: "keiki-relay-2".to_string(),
            files: vec![file("r.000001", 1000, 400), file("r.000002", 126, 4), file("r.000003", 300, 4)],
            first_number: 7,
            first_offset: 400,
            bytes: 600 + 122 + 296,
            transactions: 3,
            nameless: 3,
            end_at: (2, 290),
            end_state: Product::MySql.parse_state("").unwrap(),
        };
        let at = |name: &str, offset: &str| batch.place(name, offset).unwrap();
        for (name, offset) in [("./r.000001", "1000"), ("./r.000002", "126"), ("r.000003", "4"), ("r.000003", "289")] {
            assert!(at(name, offset) < batch.end_at, "{name} {offset}");
        }
        assert!(at("./r.000003", "290") >= batch.end_at && at("./r.000003", "300") >= batch.end_at);
        assert_eq!(
            [at("r.000001", "400"), at("r.000002", "4"), at("r.000003", "300")].map(|p| batch.bytes_before(p)),
            [0, 600, batch.bytes]
        );
        assert_eq!(batch.place("other.000001", "4"), None);
        let own = batch.place("./keiki-relay-2.000004", "157").unwrap();
        assert!(own >= batch.end_at);
        assert_eq!(batch.bytes_before(own), batch.bytes);
        assert_eq!(batch.place("keiki-relay-1.000004", "157"), None);
    }
}
