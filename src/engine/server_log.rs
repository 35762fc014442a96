//! Why a server stopped, in the words of its own log.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// How much of the end of a log is looked at.
const TAIL_BYTES: u64 = 16 << 10;

/// How the servers of an engine write.
#[derive(Debug, Clone, Copy)]
pub struct LogMarks {
    /// In the first line of each start: what stands before the last one is of an earlier life.
    pub started: &'static str,
    /// In lines that say why a server ends.
    pub grave: &'static [&'static str],
    /// So many lines are quoted from the first grave one of the last start on: what follows it are details.
    pub lines_of_reason: usize,
    /// So many lines of the end are quoted if none is grave.
    pub lines_of_end: usize,
}

/// The lines that say why a server stopped, newest last, in one line.
pub fn last_log_lines(path: &Path, marks: LogMarks) -> String {
    let length = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let text = text_from(path, length.saturating_sub(TAIL_BYTES));
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let started = lines.iter().rposition(|line| line.contains(marks.started)).unwrap_or(0);
    let is_grave = |line: &&str| marks.grave.iter().any(|word| line.contains(word));
    let (from, most) = match lines[started..].iter().position(is_grave) {
        Some(index) => (started + index, marks.lines_of_reason),
        None => (lines.len().saturating_sub(marks.lines_of_end), marks.lines_of_end),
    };
    match lines[from..].iter().take(most).copied().collect::<Vec<_>>().join(" / ") {
        empty if empty.is_empty() => String::from("its log is empty"),
        quoted => format!("its log says '{quoted}'"),
    }
}

/// What stands in a log from a place on, at most 16 KiB of it; nothing of a log that cannot be read.
pub fn text_from(path: &Path, from: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}
