//! The wire between a primary and a replica, from the replica's side.
//!
//! A link asks for the stream from an offset on (PSYNC) or for a snapshot (PSYNC ? -1), and then only listens and
//! acknowledges. Source: `src/replication.c` of Redis 7.0 and Valkey 9 (syncCommand, masterTryPartialResynchronization,
//! replicationSetupSlaveForFullResync, replconfCommand, replicationCron) and the replica's side in readSyncBulkPayload.

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use crate::engine::redis::ondisk::aof::is_history_id;
use crate::engine::redis::session::{Endpoint, Session, Stream, request_of, server_error};
use crate::error::{Context, Error, Kind, Result};

/// The mark that ends a snapshot of unknown length (`RDB_EOF_MARK_SIZE`).
pub const END_MARK_BYTES: usize = 40;
const LINE_BYTES_MAX: u64 = 4096;

/// What a link is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkUse {
    /// The stream of commands.
    Stream,
    /// A snapshot and nothing behind it: the server keeps no stream for us meanwhile.
    Snapshot,
    /// To make the server keep a backlog: a snapshot of nothing, which is not waited for.
    Backlog,
}

/// What the server says to PSYNC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The stream follows from where it was asked for, maybe under another history id.
    Continue { history: Option<String> },
    /// A snapshot follows, of the data as they were at this offset of this history.
    Full { history: String, offset: u64 },
}

/// How the bytes of a snapshot end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotEnd {
    /// After so many bytes: the server has it in a file.
    Bytes(u64),
    /// With this mark: the server sends it while it makes it.
    Mark([u8; END_MARK_BYTES]),
}

/// A connection on which we are a replica.
pub struct Link {
    stream: BufReader<Box<dyn Stream>>,
}

impl Link {
    /// Connects and says what we can do. Nothing is asked for yet.
    pub async fn open(endpoint: &Endpoint, link_use: LinkUse) -> Result<Link> {
        let mut session = Session::open(endpoint).await?;
        session.ask(&["REPLCONF", "capa", "eof", "capa", "psync2"]).await?;
        match link_use {
            LinkUse::Stream => {}
            LinkUse::Snapshot => {
                session.ask(&["REPLCONF", "rdb-only", "1"]).await?;
            }
            LinkUse::Backlog => {
                session.ask(&["REPLCONF", "rdb-only", "1", "rdb-filter-only", ""]).await?;
            }
        }
        Ok(Link { stream: session.into_stream() })
    }

    async fn send(&mut self, words: &[&str]) -> Result<()> {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        let sent = self.stream.get_mut().write_all(&request_of(&words)).await;
        sent.context(|| "cannot write to the server")
    }

    /// Asks for the stream behind this offset.
    pub async fn ask_stream(&mut self, history: &str, offset: u64) -> Result<()> {
        // The server counts from the first byte that is wanted.
        self.send(&["PSYNC", history, &offset.saturating_add(1).to_string()]).await
    }

    /// Asks for a snapshot.
    pub async fn ask_snapshot(&mut self) -> Result<()> {
        self.send(&["PSYNC", "?", "-1"]).await
    }

    /// The answer to PSYNC. Of a snapshot it comes when the server begins it, which may take long: it sends line breaks
    /// meanwhile.
    pub async fn answer(&mut self) -> Result<Answer> {
        let line = self.line().await?;
        if let Some(message) = line.strip_prefix('-') {
            return Err(server_error(message));
        }
        parse_answer(&line).ok_or_else(|| Error::new(Kind::Server, format!("the server answers '{line}' to PSYNC")))
    }

    /// How the snapshot that follows will end.
    pub async fn snapshot_end(&mut self) -> Result<SnapshotEnd> {
        let line = self.line().await?;
        if let Some(message) = line.strip_prefix('-') {
            return Err(server_error(message));
        }
        parse_snapshot_end(&line)
            .ok_or_else(|| Error::new(Kind::Server, format!("the server sends '{line}' before a snapshot")))
    }

    /// The next line that is not empty.
    async fn line(&mut self) -> Result<String> {
        loop {
            let mut line = Vec::new();
            let read = (&mut self.stream).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await;
            if read.context(|| "cannot read from the server")? == 0 || !line.ends_with(b"\n") {
                return Err(Error::new(Kind::Unreachable, "the server ended the replica link"));
            }
            let text = String::from_utf8_lossy(&line).trim_end().to_string();
            if !text.is_empty() {
                return Ok(text);
            }
        }
    }

    /// Adds what has come to `buffer`, at most as much as it has room for, and returns how much that was. An error of kind
    /// `Unreachable` when the server has ended the link. Nothing is lost when the future is dropped.
    pub async fn read(&mut self, buffer: &mut Vec<u8>) -> Result<usize> {
        let room = buffer.capacity().saturating_sub(buffer.len());
        let read = (&mut self.stream).take(room as u64).read_buf(buffer).await;
        match read.context(|| "cannot read from the server")? {
            0 if room > 0 => Err(Error::new(Kind::Unreachable, "the server ended the replica link")),
            length => Ok(length),
        }
    }

    /// Says how far we are. The server drops replicas that do not say it for a minute (`repl-timeout`).
    pub async fn acknowledge(&mut self, offset: u64) -> Result<()> {
        self.send(&["REPLCONF", "ACK", &offset.to_string()]).await
    }
}

/// The answer to PSYNC in a line without its end; nothing if it is another one.
pub fn parse_answer(line: &str) -> Option<Answer> {
    let words: Vec<&str> = line.split(' ').collect();
    match words.as_slice() {
        ["+CONTINUE"] => Some(Answer::Continue { history: None }),
        ["+CONTINUE", id] if is_history_id(id) => Some(Answer::Continue { history: Some(id.to_string()) }),
        ["+FULLRESYNC", id, offset] if is_history_id(id) => {
            Some(Answer::Full { history: id.to_string(), offset: offset.parse().ok()? })
        }
        _ => None,
    }
}

/// How the snapshot will end, in the line before it; nothing if it is another one.
pub fn parse_snapshot_end(line: &str) -> Option<SnapshotEnd> {
    let text = line.strip_prefix('$')?;
    match text.strip_prefix("EOF:") {
        Some(mark) => mark.as_bytes().try_into().ok().map(SnapshotEnd::Mark),
        None => text.parse().ok().map(SnapshotEnd::Bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn what_a_primary_says_is_understood_and_nothing_else_is() {
        assert_eq!(parse_answer("+CONTINUE"), Some(Answer::Continue { history: None }));
        assert_eq!(parse_answer(&format!("+CONTINUE {ID}")), Some(Answer::Continue { history: Some(ID.into()) }));
        let full = Answer::Full { history: ID.into(), offset: 14 };
        assert_eq!(parse_answer(&format!("+FULLRESYNC {ID} 14")), Some(full));
        for odd in ["", "+OK", "+CONTINUE x", "+FULLRESYNC", "+FULLRESYNC ? -1", &format!("+FULLRESYNC {ID} x")] {
            assert_eq!(parse_answer(odd), None, "{odd}");
        }
        assert_eq!(parse_snapshot_end("$89"), Some(SnapshotEnd::Bytes(89)));
        assert_eq!(
            parse_snapshot_end(&format!("$EOF:{ID}")),
            Some(SnapshotEnd::Mark(*ID.as_bytes().first_chunk().unwrap()))
        );
        for odd in ["", "$", "$-1", "$EOF:short", "89"] {
            assert_eq!(parse_snapshot_end(odd), None, "{odd}");
        }
    }

    fn link(bytes: &'static [u8]) -> Link {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        tokio::spawn(async move {
            let _ = theirs.write_all(bytes).await;
        });
        Link { stream: BufReader::new(Box::new(ours)) }
    }

    #[tokio::test]
    async fn line_breaks_before_an_answer_are_passed_over_and_what_follows_is_not_lost() {
        let mut link = link(b"\n\n+FULLRESYNC 0123456789abcdef0123456789abcdef01234567 7\r\n\n\n$5\r\nREDIS");
        assert_eq!(link.answer().await.unwrap(), Answer::Full { history: ID.into(), offset: 7 });
        assert_eq!(link.snapshot_end().await.unwrap(), SnapshotEnd::Bytes(5));
        let mut buffer = Vec::with_capacity(3);
        assert_eq!(link.read(&mut buffer).await.unwrap(), 3);
        assert_eq!(buffer, b"RED");
    }

    #[tokio::test]
    async fn a_refusal_is_said_in_the_servers_words() {
        let error =
            link(b"-NOPERM this user has no permissions to run the 'psync' command\r\n").answer().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Forbidden);
        assert!(error.hint_text().unwrap().contains("+psync"), "{error:?}");
        assert_eq!(link(b"no line").answer().await.unwrap_err().kind(), Kind::Unreachable);
    }
}
