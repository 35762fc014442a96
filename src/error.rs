//! The one error shape of keiki.
//!
//! Every failure that a person or a program can see says what could not be done, to what, and why, and then
//! gives a hint that names the likely mistake or the next command. The same value is printed on the terminal,
//! written to the log, rendered as JSON and sent in a peer's reply.
//!
//! Grammar: lower case, no full stop, values in single quotes (``cannot open repository 'file:///srv/k'``).
//! Causes are joined with a colon. A hint is a question that names the likely mistake, or the next command.

use std::fmt;

/// The result of everything in keiki that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure it was. Closed: a caller may match on it and the exit code follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request itself is wrong: a bad argument, a bad configuration, an impossible target.
    BadInput,
    /// The named thing does not exist.
    NotFound,
    /// The thing exists already, or exists with other content.
    Conflict,
    /// The caller may not do this.
    Forbidden,
    /// Another agent holds the lease, or the directory is not the one that the incarnation belongs to.
    Fenced,
    /// Bytes do not say what they should: a checksum, a magic number, a torn file.
    Damaged,
    /// The other side does not answer now; the same call may succeed later.
    Unreachable,
    /// The disk or the bucket is full.
    Full,
    /// The database server refused, failed or is in the wrong state.
    Server,
    /// This version of keiki, or this engine, cannot do it.
    Unsupported,
    /// Somebody asked for the work to stop.
    Cancelled,
    /// An operating system call failed in a way that no other kind describes.
    System,
    /// A defect of keiki.
    Internal,
}

impl Kind {
    /// Every kind with its stable name and process exit code. The codes are part of the command line's contract;
    /// 2 is what clap uses for usage errors, so bad input shares it.
    const TABLE: &'static [(Kind, &'static str, u8)] = &[
        (Kind::BadInput, "bad-input", 2),
        (Kind::NotFound, "not-found", 3),
        (Kind::Conflict, "conflict", 4),
        (Kind::Forbidden, "forbidden", 5),
        (Kind::Fenced, "fenced", 6),
        (Kind::Damaged, "damaged", 7),
        (Kind::Unreachable, "unreachable", 8),
        (Kind::Full, "full", 9),
        (Kind::Server, "server", 10),
        (Kind::Unsupported, "unsupported", 11),
        (Kind::Cancelled, "cancelled", 12),
        (Kind::System, "system", 13),
        (Kind::Internal, "internal", 70),
    ];

    /// The stable name used in JSON and on the wire.
    pub fn name(self) -> &'static str {
        Self::TABLE.iter().find(|row| row.0 == self).map_or("internal", |row| row.1)
    }

    /// The kind with this stable name; an unknown name (a newer peer) becomes `Internal`.
    pub fn from_name(name: &str) -> Kind {
        Self::TABLE.iter().find(|row| row.1 == name).map_or(Kind::Internal, |row| row.0)
    }

    /// The exit code of the process when this error reaches `main`.
    pub fn exit_code(self) -> u8 {
        Self::TABLE.iter().find(|row| row.0 == self).map_or(70, |row| row.2)
    }
}

/// A failure: kind, message, and a hint where one helps.
#[derive(Clone, PartialEq, Eq)]
pub struct Error(Box<Inner>);

#[derive(Clone, PartialEq, Eq)]
struct Inner {
    kind: Kind,
    message: String,
    hint: Option<String>,
}

impl Error {
    /// An error of the given kind; `message` says what could not be done, to what, and why.
    pub fn new(kind: Kind, message: impl Into<String>) -> Error {
        Error(Box::new(Inner { kind, message: message.into(), hint: None }))
    }

    /// The same error with a hint; an earlier hint is kept, because it is closer to the cause.
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The same error seen from one level further up: `what: message`. The kind and the hint stay.
    pub fn while_doing(mut self, what: impl fmt::Display) -> Error {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// The same error under another kind, for the rare place that knows better than the one below.
    pub fn with_kind(mut self, kind: Kind) -> Error {
        self.0.kind = kind;
        self
    }

    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    pub fn message(&self) -> &str {
        &self.0.message
    }

    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Whether doing the same thing again later may succeed without anybody changing anything.
    pub fn is_temporary(&self) -> bool {
        matches!(self.0.kind, Kind::Unreachable | Kind::Full)
    }

    /// An operating system error while doing `what`. Full disks, missing files and permissions keep their kind.
    pub fn io(what: impl fmt::Display, error: std::io::Error) -> Error {
        use std::io::ErrorKind as Io;
        let kind = match error.kind() {
            Io::NotFound => Kind::NotFound,
            Io::AlreadyExists => Kind::Conflict,
            Io::StorageFull | Io::QuotaExceeded => Kind::Full,
            Io::ConnectionRefused
            | Io::ConnectionReset
            | Io::ConnectionAborted
            | Io::TimedOut
            | Io::BrokenPipe
            | Io::HostUnreachable
            | Io::NetworkUnreachable
            | Io::UnexpectedEof => Kind::Unreachable,
            _ => Kind::System,
        };
        Error::new(kind, format!("{what}: {}", plain_io_reason(&error)))
    }
}

/// "No such file or directory (os error 2)" without capital letter and number.
fn plain_io_reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().collect::<String>() + letters.as_str(),
        None => String::from("unknown error"),
    }
}

impl fmt::Display for Error {
    /// The message only; the hint is printed by the edge that talks to a person.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.kind.name(), self.0.message)?;
        match &self.0.hint {
            Some(hint) => write!(f, " (hint: {hint})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// Adds the verb phrase of the caller to an error: `cannot read 'x'`.
pub trait Context<T> {
    /// Wraps an error as `what: reason`.
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T> Context<T> for std::io::Result<T> {
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| Error::io(what(), error))
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|errno| Error::io(what(), std::io::Error::from(errno)))
    }
}

impl<T> Context<T> for Result<T> {
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| error.while_doing(what()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hint_closest_to_the_cause_wins() {
        let error = Error::new(Kind::NotFound, "no such key").hint("near").while_doing("cannot read 'a'").hint("far");
        assert_eq!(error.message(), "cannot read 'a': no such key");
        assert_eq!(error.hint_text(), Some("near"));
    }

    #[test]
    fn every_kind_has_its_own_name_and_exit_code() {
        for (index, row) in Kind::TABLE.iter().enumerate() {
            assert_eq!(Kind::from_name(row.1), row.0);
            for other in &Kind::TABLE[index + 1..] {
                assert_ne!(row.1, other.1);
                assert_ne!(row.2, other.2);
            }
        }
    }

    #[test]
    fn a_system_reason_reads_as_part_of_a_sentence() {
        let error = Error::io("cannot open 'x'", std::io::Error::from_raw_os_error(2));
        assert_eq!(error.to_string(), "cannot open 'x': no such file or directory");
        assert_eq!(error.kind(), Kind::NotFound);
    }
}
