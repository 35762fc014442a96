//! Reads a binary log event by event and finds its transactions.
//!
//! Bytes come in pieces of any size. Of an event only its start and its last few bytes are ever kept, so that memory
//! does not grow with a length that the bytes claim. A file that ends inside an event or a transaction is no error: it
//! is what a crash leaves, and nothing behind the last complete transaction was ever acknowledged as part of the log.

use jiff::Timestamp;

use super::binlog::{
    CHECKSUM_BYTES, ENCRYPTED_MAGIC, EventHeader, FIRST_EVENT_AT, Format, GtidEvent, HEADER_BYTES, IN_USE_AT,
    IN_USE_FLAG, MAGIC, ends_transaction, event_type, goes_before_statement, gtid_list,
};
use super::bytes::u32_at;
use super::gtid_event::{MySqlGtidEvent, previous_gtids};
use super::transaction::{LogState, Transaction, TransactionId};
use crate::error::{Error, Kind, Result};

/// Enough of an event's body for everything that is looked at but a list of GTIDs.
const HEAD_BYTES_MAX: usize = 1 << 10;
/// A list of GTIDs that is longer is not read.
const LIST_BYTES_MAX: usize = 4 << 20;
/// Enough for "\0ROLLBACK" and a checksum.
const TAIL_BYTES: usize = 32;

/// See the module.
pub struct Walker {
    /// Of the next byte.
    offset: u64,
    state: State,
    format: Option<Format>,
    /// The number of the server that writes the file.
    writer: Option<u32>,
    /// The start of the header, or of the body, of the event that is being read.
    head: Vec<u8>,
    /// The last bytes of the body.
    tail: Vec<u8>,
    group: Option<Group>,
    /// The state that the file says it begins with.
    first_state: Option<LogState>,
    /// Where the last event ended.
    event_end: u64,
    /// Where the last event ended that was not inside a transaction, or the last of one.
    boundary: u64,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Magic,
    Header,
    Body { header: EventHeader, left: u64 },
}

#[derive(Debug, Clone, Copy)]
struct Group {
    id: TransactionId,
    start: u64,
    at: Timestamp,
    ends: Ending,
}

/// How the end of a transaction is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// By the event that commits it.
    Commit,
    /// By its only statement.
    Statement,
    /// By its length, with which MySQL begins each: the events of a compressed one are not looked at.
    At(u64),
}

impl Walker {
    /// A walker for a file from its first byte on.
    pub fn new() -> Walker {
        Walker {
            offset: 0,
            state: State::Magic,
            format: None,
            writer: None,
            head: Vec::new(),
            tail: Vec::new(),
            group: None,
            first_state: None,
            event_end: 0,
            boundary: 0,
        }
    }

    /// A walker that goes on at an event's start, in a file whose beginning (at least its first event) was walked by
    /// `self`.
    pub fn resumed_at(&self, offset: u64) -> Walker {
        let state = if offset < FIRST_EVENT_AT { State::Magic } else { State::Header };
        let mut walker =
            Walker { offset, state, format: self.format, event_end: offset, boundary: offset, ..Walker::new() };
        (walker.first_state, walker.writer) = (self.first_state.clone(), self.writer);
        walker
    }

    /// Whether the first event, which says how the others are to be read, was walked.
    pub fn knows_format(&self) -> bool {
        self.format.is_some()
    }

    /// The GTID state that the file begins with, once its event was walked.
    pub fn first_state(&self) -> Option<&LogState> {
        self.first_state.as_ref()
    }

    /// Where the last complete event ended.
    pub fn event_end(&self) -> u64 {
        self.event_end
    }

    /// The last place up to which there are only whole events and whole transactions: a log can end here.
    pub fn boundary(&self) -> u64 {
        self.boundary
    }

    /// Walks the next bytes and hands each transaction that is complete with them to `found`, which may refuse to go
    /// on. `Damaged` for bytes that are no binary log, `Unsupported` for one that cannot be read.
    pub fn feed(&mut self, mut bytes: &[u8], found: &mut dyn FnMut(Transaction) -> Result<()>) -> Result<()> {
        while !bytes.is_empty() {
            let wanted = match self.state {
                State::Magic => MAGIC.len() - self.head.len(),
                State::Header => HEADER_BYTES - self.head.len(),
                State::Body { left, .. } => usize::try_from(left).unwrap_or(usize::MAX),
            };
            let (now, later) = bytes.split_at(wanted.min(bytes.len()));
            bytes = later;
            self.offset = self.offset.checked_add(now.len() as u64).ok_or_else(|| self.damaged("it has no end"))?;
            match self.state {
                State::Magic | State::Header => self.head.extend_from_slice(now),
                State::Body { header, left } => {
                    let room = head_bytes_max(header.kind).saturating_sub(self.head.len());
                    self.head.extend_from_slice(&now[..room.min(now.len())]);
                    self.keep_tail(now);
                    self.state = State::Body { header, left: left - now.len() as u64 };
                }
            }
            if now.len() == wanted {
                self.end_part(found)?;
            }
        }
        Ok(())
    }

    fn keep_tail(&mut self, now: &[u8]) {
        let last = &now[now.len().saturating_sub(TAIL_BYTES)..];
        self.tail.extend_from_slice(last);
        let surplus = self.tail.len().saturating_sub(TAIL_BYTES);
        self.tail.drain(..surplus);
    }

    fn damaged(&self, why: &str) -> Error {
        Error::new(Kind::Damaged, format!("these are not bytes of a binary log, before offset {}: {why}", self.offset))
    }

    /// The magic, a header or a body is complete.
    fn end_part(&mut self, found: &mut dyn FnMut(Transaction) -> Result<()>) -> Result<()> {
        match self.state {
            State::Magic => {
                if self.head == ENCRYPTED_MAGIC {
                    return Err(encrypted());
                }
                if self.head != MAGIC {
                    return Err(self.damaged("they do not begin like one"));
                }
                self.next_event();
            }
            State::Header => {
                let header = EventHeader::parse(&self.head)
                    .ok_or_else(|| self.damaged("an event is shorter than its own header"))?;
                let left = u64::from(header.bytes) - HEADER_BYTES as u64;
                let end = self.offset.wrapping_add(left);
                // Ends are modulo 2^32 in files that are longer than that.
                if header.end != 0 && header.end != end as u32 {
                    return Err(self.damaged("an event does not end where it says"));
                }
                self.head.clear();
                self.tail.clear();
                self.state = State::Body { header, left };
                if left == 0 {
                    return self.end_part(found);
                }
            }
            State::Body { header, .. } => {
                self.end_event(header, found)?;
                self.next_event();
            }
        }
        Ok(())
    }

    fn next_event(&mut self) {
        self.event_end = self.offset;
        if self.group.is_none() {
            self.boundary = self.offset;
        }
        self.head.clear();
        self.tail.clear();
        self.state = State::Header;
    }

    /// The last bytes of the body, without its checksum.
    fn tail_without_checksum(&self) -> &[u8] {
        let has_checksum = self.format.is_some_and(|format| format.has_checksums);
        let end = self.tail.len().saturating_sub(if has_checksum { CHECKSUM_BYTES } else { 0 });
        &self.tail[..end]
    }

    fn end_event(&mut self, header: EventHeader, found: &mut dyn FnMut(Transaction) -> Result<()>) -> Result<()> {
        if header.kind == event_type::FORMAT_DESCRIPTION {
            (self.format, self.writer) = (Some(Format::parse(&self.head)?), Some(header.server));
            return Ok(());
        }
        if self.format.is_none() {
            return Err(self.damaged("its first event does not describe its format"));
        }
        let is_whole = header.bytes as usize - HEADER_BYTES <= LIST_BYTES_MAX;
        match header.kind {
            event_type::START_ENCRYPTION => Err(encrypted()),
            event_type::GTID_LIST | event_type::MYSQL_PREVIOUS_GTIDS if self.first_state.is_none() && is_whole => {
                self.first_state = match header.kind {
                    event_type::GTID_LIST => gtid_list(&self.head).map(LogState::MariaDb),
                    _ => previous_gtids(self.body()).map(LogState::MySql),
                };
                Ok(())
            }
            event_type::GTID => self.begin(header),
            event_type::MYSQL_GTID | event_type::MYSQL_ANONYMOUS_GTID | event_type::MYSQL_TAGGED_GTID => {
                self.begin_mysql(header)
            }
            _ => self.go_on(header, found),
        }
    }

    /// The body that was kept, without its checksum if it was kept whole.
    fn body(&self) -> &[u8] {
        let has_checksum = self.format.is_some_and(|format| format.has_checksums);
        &self.head[..self.head.len().saturating_sub(if has_checksum { CHECKSUM_BYTES } else { 0 })]
    }

    fn start_of(&self, header: EventHeader) -> u64 {
        self.offset.saturating_sub(u64::from(header.bytes))
    }

    /// A transaction begins. One that did not end: the server died while it wrote it, and went on in the same file only
    /// if what came before did not count.
    fn begin(&mut self, header: EventHeader) -> Result<()> {
        let event = GtidEvent::parse(&self.head, header.server)
            .ok_or_else(|| self.damaged("the start of a transaction is cut short"))?;
        self.group = Some(Group {
            id: TransactionId::MariaDb(event.gtid),
            start: self.start_of(header),
            at: seconds(header.at_seconds),
            ends: if event.is_standalone { Ending::Statement } else { Ending::Commit },
        });
        Ok(())
    }

    fn begin_mysql(&mut self, header: EventHeader) -> Result<()> {
        let event = match header.kind {
            event_type::MYSQL_TAGGED_GTID => MySqlGtidEvent::parse_tagged(self.body()),
            kind => MySqlGtidEvent::parse(self.body(), kind == event_type::MYSQL_ANONYMOUS_GTID),
        };
        let event = event.ok_or_else(|| self.damaged("the start of a transaction cannot be understood"))?;
        let start = self.start_of(header);
        let end = start.checked_add(event.transaction_bytes).filter(|end| *end > self.offset);
        let micros = i64::try_from(event.at_microseconds).unwrap_or(i64::MAX);
        self.group = Some(Group {
            id: event.gtid.map_or(TransactionId::Anonymous, TransactionId::MySql),
            start,
            at: Timestamp::from_microsecond(micros).unwrap_or(Timestamp::MAX),
            ends: Ending::At(end.ok_or_else(|| self.damaged("a transaction is shorter than its start"))?),
        });
        Ok(())
    }

    /// An event that may belong to a transaction, and may be its last.
    fn go_on(&mut self, header: EventHeader, found: &mut dyn FnMut(Transaction) -> Result<()>) -> Result<()> {
        let Some(group) = self.group else { return Ok(()) };
        let is_over = match (header.kind, group.ends) {
            // The file ends, and the transaction did not.
            (event_type::STOP | event_type::ROTATE, _) => {
                self.group = None;
                return Ok(());
            }
            (_, Ending::At(end)) if self.offset > end => {
                return Err(self.damaged("a transaction does not end where it says"));
            }
            (_, Ending::At(end)) => self.offset == end,
            (kind, Ending::Statement) => !goes_before_statement(kind),
            (event_type::XID | event_type::XA_PREPARE, Ending::Commit) => true,
            (event_type::QUERY, Ending::Commit) => ends_transaction(self.tail_without_checksum()),
            (_, Ending::Commit) => false,
        };
        if is_over {
            self.group = None;
            let at = match group.ends {
                Ending::At(_) => group.at,
                Ending::Commit | Ending::Statement => {
                    self.ended_at(header).unwrap_or_else(|| group.at.max(seconds(header.at_seconds)))
                }
            };
            return found(Transaction { id: group.id, start: group.start, end: self.offset, at });
        }
        Ok(())
    }

    /// When the statement that ends a transaction had run, if the event says it: its time is when the statement began, by
    /// the clock of the session (`SET TIMESTAMP`), and a QUERY has beside it how many seconds by the clock of the server
    /// went by until it was written (`Query_log_event`, post header: thread, then exec_time). The two together are the
    /// server's clock. Of an event that came from another server the difference is the delay of replication, too, and
    /// says nothing.
    fn ended_at(&self, header: EventHeader) -> Option<Timestamp> {
        let is_own = header.kind == event_type::QUERY && self.writer == Some(header.server);
        let ran_seconds = is_own.then(|| u32_at(&self.head, 4)).flatten()?;
        Some(seconds(header.at_seconds.wrapping_add(ran_seconds)))
    }
}

fn seconds(at: u32) -> Timestamp {
    Timestamp::from_second(i64::from(at)).unwrap_or(Timestamp::MAX)
}

fn encrypted() -> Error {
    Error::new(Kind::Unsupported, "the binary log is encrypted").hint(
        "keiki cannot read it: set 'encrypt_binlog = OFF' (MariaDB) or 'binlog_encryption = OFF' (MySQL) on the source; \
         the repository can be kept encrypted",
    )
}

fn head_bytes_max(kind: u8) -> usize {
    match kind {
        event_type::GTID_LIST | event_type::MYSQL_PREVIOUS_GTIDS => LIST_BYTES_MAX,
        _ => HEAD_BYTES_MAX,
    }
}

impl Default for Walker {
    fn default() -> Walker {
        Walker::new()
    }
}

/// Makes bytes of the start of a file the same whether the server still writes to it or not. `offset` is that of the
/// first byte.
pub fn mask_in_use(bytes: &mut [u8], offset: u64) {
    let at = IN_USE_AT.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
    if let Some(byte) = at.and_then(|at| bytes.get_mut(at)) {
        *byte &= !IN_USE_FLAG;
    }
}

#[cfg(test)]
mod tests;
