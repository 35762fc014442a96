//! Reads a binary log event by event and finds its transactions.
//!
//! Bytes come in pieces of any size. Of an event only its start and its last few bytes are ever kept, so that memory
//! does not grow with a length that the bytes claim. A file that ends inside an event or a transaction is no error: it
//! is what a crash leaves, and nothing behind the last complete transaction was ever acknowledged as part of the log.

use super::binlog::{
    CHECKSUM_BYTES, EventHeader, FIRST_EVENT_AT, Format, GtidEvent, HEADER_BYTES, IN_USE_AT, IN_USE_FLAG, MAGIC,
    ends_transaction, event_type, goes_before_statement, gtid_list,
};
use super::gtid::{Gtid, GtidState};
use crate::error::{Error, Kind, Result};

/// Enough of an event's body for everything that is looked at; a GTID list with more entries is not read.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Enough for "\0ROLLBACK" and a checksum.
const TAIL_BYTES: usize = 32;

/// A complete transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transaction {
    pub gtid: Gtid,
    /// Offsets in the file: of the GTID event, and behind the last event.
    pub start: u64,
    pub end: u64,
    /// When its last statement began, in seconds since 1970: it was committed then or later, and before the next one.
    pub at_seconds: u32,
}

/// See the module.
pub struct Walker {
    /// Of the next byte.
    offset: u64,
    state: State,
    format: Option<Format>,
    /// The start of the header, or of the body, of the event that is being read.
    head: Vec<u8>,
    /// The last bytes of the body.
    tail: Vec<u8>,
    group: Option<Group>,
    /// The state that the file says it begins with.
    first_state: Option<GtidState>,
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
    gtid: Gtid,
    start: u64,
    at_seconds: u32,
    is_standalone: bool,
}

impl Walker {
    /// A walker for a file from its first byte on.
    pub fn new() -> Walker {
        Walker {
            offset: 0,
            state: State::Magic,
            format: None,
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
        walker.first_state = self.first_state.clone();
        walker
    }

    /// Whether the first event, which says how the others are to be read, was walked.
    pub fn knows_format(&self) -> bool {
        self.format.is_some()
    }

    /// The GTID state that the file begins with, once its event was walked.
    pub fn first_state(&self) -> Option<&GtidState> {
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
                    let room = HEAD_BYTES_MAX - self.head.len();
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
            self.format = Some(Format::parse(&self.head)?);
            return Ok(());
        }
        if self.format.is_none() {
            return Err(self.damaged("its first event does not describe its format"));
        }
        let body_bytes = header.bytes as usize - HEADER_BYTES;
        match header.kind {
            event_type::START_ENCRYPTION => Err(Error::new(Kind::Unsupported, "the binary log is encrypted").hint(
                "keiki cannot read it: set 'encrypt_binlog = OFF' on the source; the repository can be kept encrypted",
            )),
            event_type::MYSQL_GTID | event_type::MYSQL_ANONYMOUS_GTID | event_type::MYSQL_TAGGED_GTID => {
                Err(Error::new(Kind::Unsupported, "this is a binary log of MySQL and not of MariaDB"))
            }
            event_type::GTID_LIST => {
                if self.first_state.is_none() && body_bytes <= HEAD_BYTES_MAX {
                    self.first_state = gtid_list(&self.head);
                }
                Ok(())
            }
            event_type::GTID => self.begin(header),
            _ => self.go_on(header, found),
        }
    }

    fn begin(&mut self, header: EventHeader) -> Result<()> {
        let event = GtidEvent::parse(&self.head, header.server)
            .ok_or_else(|| self.damaged("the start of a transaction is cut short"))?;
        // A transaction that did not end: the server died while it wrote it, and went on in the same file only if
        // what came before did not count.
        self.group = Some(Group {
            gtid: event.gtid,
            start: self.offset - u64::from(header.bytes).min(self.offset),
            at_seconds: header.at_seconds,
            is_standalone: event.is_standalone,
        });
        Ok(())
    }

    /// An event that may belong to a transaction, and may be its last.
    fn go_on(&mut self, header: EventHeader, found: &mut dyn FnMut(Transaction) -> Result<()>) -> Result<()> {
        let Some(group) = self.group else { return Ok(()) };
        let ends = match header.kind {
            // The file ends, and the transaction did not.
            event_type::STOP | event_type::ROTATE => {
                self.group = None;
                return Ok(());
            }
            _ if group.is_standalone => !goes_before_statement(header.kind),
            event_type::XID | event_type::XA_PREPARE => true,
            event_type::QUERY => ends_transaction(self.tail_without_checksum()),
            _ => false,
        };
        if ends {
            self.group = None;
            return found(Transaction {
                gtid: group.gtid,
                start: group.start,
                end: self.offset,
                at_seconds: group.at_seconds.max(header.at_seconds),
            });
        }
        Ok(())
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
