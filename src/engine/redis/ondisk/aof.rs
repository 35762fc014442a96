//! Walks the commands of an append-only file, byte by byte as they come, and says where it may be cut.
//!
//! Commands are arrays of bulk strings: `*2\r\n$6\r\nSELECT\r\n$1\r\n0\r\n`. Between them stand annotations:
//! `#TS:1795247841\r\n` before the first command of each new second, if `aof-timestamp-enabled` is on. A cut is only
//! possible where a server could stop: between commands, and outside of MULTI ... EXEC, which also holds together what a
//! script or a function has written. Source: `src/aof.c` of Redis 7.0 (loadSingleAppendOnlyFile, catAppendOnlyGenericCommand,
//! genAofTimestampAnnotationIfNeeded).
//!
//! Values are counted, never kept: a command of any size takes the same few bytes of memory.
//!
//! In a file that the agent writes itself, from the replication stream (`spool`), stand annotations of its own, which a
//! server passes over like all others: `#KEIKI-AT:<milliseconds>:<offset>`, what follows was received then or later;
//! `#KEIKI-BY:<milliseconds>:<offset>`, everything that was executed by then stands before; `#KEIKI-OF:<id>:<offset>`, what
//! follows belongs to this replication history. The offsets are those of the stream before the annotation.

use crate::error::{Error, Kind};

/// The longest header line that is accepted: `*` or `$`, and a number. The servers read 128 bytes.
const HEADER_LINE_BYTES_MAX: usize = 32;
/// The longest annotation (`AOF_ANNOTATION_LINE_MAX_LEN`).
const ANNOTATION_BYTES_MAX: usize = 1024;
/// As much of a command's name as tells MULTI and EXEC from all others.
const NAME_BYTES_KEPT: u64 = 8;
const TIMESTAMP_PREFIX: &[u8] = b"#TS:";
const RECEIVED_PREFIX: &str = "#KEIKI-AT:";
const EXECUTED_PREFIX: &str = "#KEIKI-BY:";
const HISTORY_PREFIX: &str = "#KEIKI-OF:";
/// The number of a database in decimal.
const DATABASE_BYTES_KEPT: usize = 10;
/// A replication id has 40 letters (`CONFIG_RUN_ID_SIZE` in `src/server.h`).
const HISTORY_BYTES: usize = 40;

/// Something that was passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// An annotation of time stands here, between commands and outside of any transaction: all that follows was executed
    /// in this second or later. Cutting at `at` leaves out everything from that second on.
    Second { at: u64, unix_seconds: i64 },
    /// An annotation of the agent's: what follows from `end` on was received at this time or later, and begins with this
    /// offset of the stream.
    Received { at: u64, end: u64, unix_millis: i64, stream_offset: u64 },
    /// An annotation of the agent's: everything that was executed by this time stands before it.
    Executed { at: u64, end: u64, unix_millis: i64, stream_offset: u64 },
    /// A command, or a whole transaction, ends here.
    Boundary { at: u64 },
}

/// What cannot be a part of an append-only file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AofDamage {
    /// Bytes from the start of the file.
    pub at: u64,
    pub why: &'static str,
}

impl AofDamage {
    /// The damage of a file, as an error.
    pub fn of(&self, file: &str) -> Error {
        Error::new(Kind::Damaged, format!("append-only file '{file}' is damaged at byte {}: {}", self.at, self.why))
    }
}

/// The annotation that what follows was received at a time or later.
pub fn received_line(unix_millis: i64, stream_offset: u64) -> String {
    format!("{RECEIVED_PREFIX}{unix_millis}:{stream_offset}\r\n")
}

/// The annotation that everything that was executed by a time stands before it.
pub fn executed_line(unix_millis: i64, stream_offset: u64) -> String {
    format!("{EXECUTED_PREFIX}{unix_millis}:{stream_offset}\r\n")
}

/// The annotation that what follows belongs to a replication history.
pub fn history_line(id: &str, stream_offset: u64) -> String {
    format!("{HISTORY_PREFIX}{id}:{stream_offset}\r\n")
}

/// Whether this can be the id of a replication history.
pub fn is_history_id(id: &str) -> bool {
    id.len() == HISTORY_BYTES && id.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between commands.
    Start,
    /// Inside a line that began with `*`, `$` or `#`.
    Line,
    /// A bulk string's bytes; so many are left.
    Value { left: u64 },
    /// The line break after a bulk string.
    ValueEnd { seen_cr: bool },
    /// The next argument's header must follow.
    Argument,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct AofWalker {
    at: u64,
    state: State,
    line: Vec<u8>,
    line_began: u64,
    arguments: u64,
    arguments_left: u64,
    name: Vec<u8>,
    in_transaction: bool,
    boundary: u64,
    command_end: u64,
    last_second: Option<i64>,
    /// The second argument of a SELECT.
    argument: Vec<u8>,
    database: Option<u32>,
    highest_database: Option<u32>,
    history: Option<String>,
    /// What ended last is an annotation.
    is_annotation: bool,
    /// What ended last says nothing about the data.
    is_idle: bool,
    changed: u64,
    damage: Option<AofDamage>,
}

impl AofWalker {
    /// A walker that begins at byte `at` of a file, which must be a boundary.
    pub fn new(at: u64) -> AofWalker {
        AofWalker {
            at,
            state: State::Start,
            line: Vec::new(),
            line_began: at,
            arguments: 0,
            arguments_left: 0,
            name: Vec::new(),
            in_transaction: false,
            boundary: at,
            command_end: at,
            last_second: None,
            argument: Vec::new(),
            database: None,
            highest_database: None,
            history: None,
            is_annotation: true,
            is_idle: true,
            changed: at,
            damage: None,
        }
    }

    /// How far it has walked, in bytes from the start of the file.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// The last place at which the file may be cut.
    pub fn boundary(&self) -> u64 {
        self.boundary
    }

    /// Where the last command or transaction ended: only annotations follow. To here a server cuts a file whose last
    /// command is torn, so in a file that is still written nothing behind it is sure to stay.
    pub fn command_end(&self) -> u64 {
        self.command_end
    }

    /// The second of the last annotation that was passed.
    pub fn last_second(&self) -> Option<i64> {
        self.last_second
    }

    /// The database that was selected last, if any was.
    pub fn database(&self) -> Option<u32> {
        self.database
    }

    /// The highest number of a database that was selected, if any was.
    pub fn highest_database(&self) -> Option<u32> {
        self.highest_database
    }

    /// The replication history that was named last.
    pub fn history(&self) -> Option<&str> {
        self.history.as_deref()
    }

    /// Where the last command or transaction ended that may have changed data: what follows are annotations and what a
    /// server says on its replication stream while nothing happens (PING, REPLCONF, SELECT).
    pub fn changed(&self) -> u64 {
        self.changed
    }

    /// Bytes that follow and need not be shown to the walker: the inside of a value. See [`AofWalker::skip`].
    pub fn skippable(&self) -> u64 {
        match self.state {
            State::Value { left } if !self.wants_name() && !self.wants_argument() => left,
            _ => 0,
        }
    }

    /// Passes `bytes` of the file without looking at them, at most as many as are skippable.
    pub fn skip(&mut self, bytes: u64) {
        if let State::Value { left } = self.state {
            let passed = bytes.min(left);
            self.at += passed;
            self.state = value_state(left - passed);
        }
    }

    /// Walks over the next bytes. Damage is final: the walker stays where it met it.
    pub fn feed(&mut self, mut bytes: &[u8], mut visit: impl FnMut(Mark)) -> Result<(), AofDamage> {
        if let Some(damage) = &self.damage {
            return Err(damage.clone());
        }
        while let Some(first) = bytes.first().copied() {
            let outcome = match self.state {
                State::Value { left } => Ok(self.value(bytes, left)),
                State::ValueEnd { seen_cr } => self.value_end(first, seen_cr),
                State::Start | State::Argument => self.begin_line(first),
                State::Line => self.line(bytes, &mut visit),
            };
            match outcome {
                // In bounds: every step passes at most what it was given.
                Ok(passed) => {
                    self.at += passed as u64;
                    bytes = &bytes[passed..];
                    if self.state == State::Start && !self.in_transaction && self.boundary < self.at {
                        self.boundary = self.at;
                        if !self.is_annotation {
                            self.command_end = self.at;
                        }
                        if !self.is_idle {
                            self.changed = self.at;
                        }
                        visit(Mark::Boundary { at: self.at });
                    }
                }
                Err(why) => {
                    let damage = AofDamage { at: self.at, why };
                    self.damage = Some(damage.clone());
                    return Err(damage);
                }
            }
        }
        Ok(())
    }

    /// An error unless the file may end here.
    pub fn finish(&self) -> Result<(), AofDamage> {
        if let Some(damage) = &self.damage {
            return Err(damage.clone());
        }
        match (self.boundary == self.at, self.in_transaction) {
            (true, _) => Ok(()),
            (false, true) => Err(AofDamage { at: self.boundary, why: "the transaction that begins here does not end" }),
            (false, false) => Err(AofDamage { at: self.boundary, why: "the command that begins here is cut off" }),
        }
    }

    fn wants_name(&self) -> bool {
        self.arguments_left == self.arguments && (self.name.len() as u64) < NAME_BYTES_KEPT
    }

    fn is_named(&self, name: &[u8]) -> bool {
        self.name.eq_ignore_ascii_case(name)
    }

    fn wants_argument(&self) -> bool {
        self.arguments == 2
            && self.arguments_left == 1
            && self.argument.len() < DATABASE_BYTES_KEPT
            && self.is_named(b"SELECT")
    }

    fn value(&mut self, bytes: &[u8], left: u64) -> usize {
        let passed = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        if self.wants_name() {
            let room = (NAME_BYTES_KEPT as usize).saturating_sub(self.name.len());
            self.name.extend_from_slice(&bytes[..passed.min(room)]);
        } else if self.wants_argument() {
            let room = DATABASE_BYTES_KEPT.saturating_sub(self.argument.len());
            self.argument.extend_from_slice(&bytes[..passed.min(room)]);
        }
        self.state = value_state(left - passed as u64);
        passed
    }

    fn value_end(&mut self, byte: u8, seen_cr: bool) -> Result<usize, &'static str> {
        match (seen_cr, byte) {
            (false, b'\r') => self.state = State::ValueEnd { seen_cr: true },
            (true, b'\n') => {
                self.arguments_left -= 1;
                if self.arguments_left == 0 {
                    self.end_command();
                } else {
                    self.state = State::Argument;
                }
            }
            _ => return Err("a value is longer or shorter than its length says"),
        }
        Ok(1)
    }

    fn end_command(&mut self) {
        self.state = State::Start;
        self.is_annotation = false;
        // Neither has arguments; in a transaction a second MULTI is an error that the server does not write down.
        self.is_idle = self.is_named(b"PING") || self.is_named(b"REPLCONF") || self.is_named(b"SELECT");
        if self.arguments == 1 && self.is_named(b"MULTI") {
            self.in_transaction = true;
        } else if self.arguments == 1 && self.is_named(b"EXEC") {
            self.in_transaction = false;
        } else if self.arguments == 2 && self.is_named(b"SELECT") {
            self.database = number(&self.argument).and_then(|number| number.try_into().ok());
            self.highest_database = self.highest_database.max(self.database);
        }
    }

    fn begin_line(&mut self, first: u8) -> Result<usize, &'static str> {
        match (self.state, first) {
            (State::Start, b'*' | b'#') | (State::Argument, b'$') => {}
            (State::Start, 0) => return Err("there are zeros where a command should begin"),
            (State::Start, _) => return Err("no command begins here"),
            _ => return Err("an argument of a command is missing"),
        }
        self.line_began = self.at;
        self.line.clear();
        self.line.push(first);
        self.state = State::Line;
        Ok(1)
    }

    fn line(&mut self, bytes: &[u8], visit: &mut impl FnMut(Mark)) -> Result<usize, &'static str> {
        let is_annotation = self.line.first() == Some(&b'#');
        let room = if is_annotation { ANNOTATION_BYTES_MAX } else { HEADER_LINE_BYTES_MAX } - self.line.len();
        let window = &bytes[..bytes.len().min(room)];
        let Some(end) = window.iter().position(|byte| *byte == b'\n') else {
            self.line.extend_from_slice(window);
            return if bytes.len() >= room { Err("a line is too long") } else { Ok(window.len()) };
        };
        self.line.extend_from_slice(&window[..end]);
        if self.line.pop() != Some(b'\r') {
            return Err("a line does not end in a line break of two bytes");
        }
        if is_annotation {
            self.annotation(visit)?;
        } else {
            self.header()?;
        }
        Ok(end + 1)
    }

    fn annotation(&mut self, visit: &mut impl FnMut(Mark)) -> Result<(), &'static str> {
        self.state = State::Start;
        (self.is_annotation, self.is_idle) = (true, true);
        let Some(digits) = self.line.strip_prefix(TIMESTAMP_PREFIX) else {
            self.own_annotation(visit);
            return Ok(());
        };
        let text = std::str::from_utf8(digits).map_err(|_| "an annotation of time is no number")?;
        let unix_seconds = text.parse().map_err(|_| "an annotation of time is no number")?;
        self.last_second = Some(unix_seconds);
        if !self.in_transaction {
            visit(Mark::Second { at: self.line_began, unix_seconds });
        }
        Ok(())
    }

    /// What looks like one of ours and is none is passed over like any other annotation.
    fn own_annotation(&mut self, visit: &mut impl FnMut(Mark)) {
        let Ok(text) = std::str::from_utf8(&self.line) else { return };
        let (at, end) = (self.line_began, self.line_began.saturating_add(self.line.len() as u64 + 2));
        let stamp = |prefix: &str| -> Option<(i64, u64)> {
            let (millis, offset) = text.strip_prefix(prefix)?.split_once(':')?;
            Some((millis.parse().ok()?, offset.parse().ok()?))
        };
        if self.in_transaction {
            return;
        }
        if let Some((unix_millis, stream_offset)) = stamp(RECEIVED_PREFIX) {
            visit(Mark::Received { at, end, unix_millis, stream_offset });
        } else if let Some((unix_millis, stream_offset)) = stamp(EXECUTED_PREFIX) {
            visit(Mark::Executed { at, end, unix_millis, stream_offset });
        } else if let Some((id, _)) = text.strip_prefix(HISTORY_PREFIX).and_then(|rest| rest.split_once(':'))
            && is_history_id(id)
        {
            self.history = Some(id.to_string());
        }
    }

    fn header(&mut self) -> Result<(), &'static str> {
        let number = number(&self.line[1..]).ok_or("a length is no number")?;
        if self.line[0] == b'*' {
            // `argc < 1` is a format error to the servers too, and they keep it in an int.
            if number == 0 || number > i32::MAX as u64 {
                return Err("a command has an impossible number of arguments");
            }
            (self.arguments, self.arguments_left) = (number, number);
            self.name.clear();
            self.argument.clear();
            self.state = State::Argument;
        } else {
            if number > i64::MAX as u64 - self.at {
                return Err("a value has an impossible length");
            }
            self.state = value_state(number);
        }
        Ok(())
    }
}

fn value_state(left: u64) -> State {
    if left == 0 { State::ValueEnd { seen_cr: false } } else { State::Value { left } }
}

/// The command that goes on in another database.
pub fn select_command(database: u32) -> String {
    let text = database.to_string();
    format!("*2\r\n$6\r\nSELECT\r\n${}\r\n{text}\r\n", text.len())
}

/// A decimal number without sign; nothing else.
fn number(digits: &[u8]) -> Option<u64> {
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| is_number)?.parse().ok()
}

#[cfg(test)]
mod tests;
