//! The `backup_label` file, by which a restored server knows where to begin, and the backup history file, which says
//! the same and where the backup ended.
//!
//! The text comes from `pg_backup_stop` and goes into the restored directory byte for byte; keiki only reads it
//! (`src/backend/access/transam/xlogbackup.c`, build_backup_content; the server's reader is read_backup_label in
//! `xlogrecovery.c`).

use crate::error::{Error, Kind, Result};
use crate::model::position::Lsn;

/// How the backup was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupMethod {
    /// By `pg_basebackup` or `pg_backup_start`; replay has to reach the end of the backup.
    Streamed,
    /// By `pg_rewind`.
    Rewound,
}

/// What a `backup_label` or a backup history file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// The redo position: the first byte of log that the backup needs.
    pub start: Lsn,
    /// The name of the segment that holds it.
    pub start_segment: String,
    pub start_timeline: u32,
    /// Where the backup's checkpoint record lies.
    pub checkpoint: Lsn,
    /// `None` in a backup history file that does not say.
    pub method: Option<BackupMethod>,
    /// Whether the backup was taken on a standby; then its end is not marked by a record in the log.
    pub from_standby: bool,
    /// The server's text, in its own time zone; not for arithmetic.
    pub start_time: String,
    pub label: String,
    /// Only in a backup history file: the position after the last byte of log that the backup needs.
    pub stop: Option<Lsn>,
    pub stop_timeline: Option<u32>,
    /// Since 17, only for an incremental backup: the position of the backup it builds on. Such a directory cannot
    /// be started before `pg_combinebackup`.
    pub incremental_from: Option<Lsn>,
}

impl BackupLabel {
    /// Reads the file. Unknown lines are skipped, as later versions add some; a known line that occurs twice (a line
    /// end in a label can forge one) or cannot be read is `Damaged`.
    pub fn parse(content: &[u8]) -> Result<BackupLabel> {
        let text = String::from_utf8_lossy(content);
        let lines = Lines { text: &text };
        let (start, start_segment) = position_and_file(lines.required("START WAL LOCATION")?)?;
        Ok(BackupLabel {
            start,
            start_segment: start_segment.to_owned(),
            start_timeline: timeline(lines.required("START TIMELINE")?)?,
            checkpoint: position(lines.required("CHECKPOINT LOCATION")?)?,
            method: lines.optional("BACKUP METHOD")?.map(method).transpose()?,
            from_standby: lines.optional("BACKUP FROM")? == Some("standby"),
            start_time: lines.optional("START TIME")?.unwrap_or_default().to_owned(),
            label: lines.optional("LABEL")?.unwrap_or_default().to_owned(),
            stop: lines.optional("STOP WAL LOCATION")?.map(|text| Ok(position_and_file(text)?.0)).transpose()?,
            stop_timeline: lines.optional("STOP TIMELINE")?.map(timeline).transpose()?,
            incremental_from: lines.optional("INCREMENTAL FROM LSN")?.map(position).transpose()?,
        })
    }
}

/// The `KEY: value` lines of the file.
struct Lines<'a> {
    text: &'a str,
}

impl<'a> Lines<'a> {
    fn optional(&self, key: &str) -> Result<Option<&'a str>> {
        let mut found = self.text.split('\n').filter_map(|line| {
            line.trim_end_matches('\r').strip_prefix(key)?.strip_prefix(": ").or_else(|| {
                // An empty value may have lost its trailing space.
                line.trim_end().strip_prefix(key)?.strip_prefix(':').filter(|rest| rest.is_empty())
            })
        });
        let first = found.next();
        match found.next() {
            None => Ok(first),
            Some(_) => {
                Err(damaged(&format!("'{key}' occurs twice"))
                    .hint("was the backup started with a line end in its label?"))
            }
        }
    }

    fn required(&self, key: &str) -> Result<&'a str> {
        self.optional(key)?.ok_or_else(|| damaged(&format!("it has no '{key}'")))
    }
}

fn position(text: &str) -> Result<Lsn> {
    Lsn::parse(text).map_err(|_| damaged(&format!("'{text}' is not a log position")))
}

/// `0/2000028 (file 000000010000000000000002)`
fn position_and_file(text: &str) -> Result<(Lsn, &str)> {
    let (lsn, rest) = text.split_once(' ').ok_or_else(|| damaged("a position has no file name"))?;
    let file = rest.strip_prefix("(file ").and_then(|rest| rest.strip_suffix(')'));
    Ok((position(lsn)?, file.ok_or_else(|| damaged("a position has no file name"))?))
}

fn timeline(text: &str) -> Result<u32> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| damaged(&format!("'{text}' is not a timeline")))
}

fn method(text: &str) -> Result<BackupMethod> {
    match text {
        "streamed" => Ok(BackupMethod::Streamed),
        "pg_rewind" => Ok(BackupMethod::Rewound),
        other => Err(damaged(&format!("'{other}' is not a method of making a backup"))),
    }
}

fn damaged(why: &str) -> Error {
    Error::new(Kind::Damaged, format!("backup label cannot be read: {why}"))
}

#[cfg(test)]
mod tests {
    use super::super::fixtures;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_server_s_label_is_understood() {
        for fixture in fixtures::all() {
            let label = BackupLabel::parse(&fixture.plain("backup_label")).unwrap();
            assert_eq!(label.start, Lsn(0x00b0_0028));
            assert_eq!(label.start_segment, "00000001000000000000000B");
            assert_eq!(label.start_timeline, 1);
            assert!(label.checkpoint > label.start);
            assert_eq!(label.method, Some(BackupMethod::Streamed));
            assert!(!label.from_standby);
            assert_eq!(label.label, "fixture");
            assert!(label.start_time.ends_with("UTC"));
            assert_eq!((label.stop, label.incremental_from), (None, None));
        }
    }

    #[test]
    fn a_backup_history_file_says_where_the_backup_ended() {
        let text = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
                    STOP WAL LOCATION: 0/2000138 (file 000000010000000000000002)\n\
                    CHECKPOINT LOCATION: 0/2000060\nBACKUP METHOD: streamed\nBACKUP FROM: standby\n\
                    START TIME: 2026-11-21 10:00:00 CET\nLABEL: \nSTART TIMELINE: 1\n\
                    STOP TIME: 2026-11-21 10:00:01 CET\nSTOP TIMELINE: 2\nINCREMENTAL FROM LSN: 0/1000028\n";
        let label = BackupLabel::parse(text.as_bytes()).unwrap();
        assert_eq!(label.stop, Some(Lsn(0x0200_0138)));
        assert_eq!(label.stop_timeline, Some(2));
        assert_eq!(label.incremental_from, Some(Lsn(0x0100_0028)));
        assert!(label.from_standby);
        assert_eq!(label.label, "");
    }

    #[test]
    fn a_label_that_forges_a_line_is_refused() {
        let text = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000060\n\
                    LABEL: x\nSTART TIMELINE: 9\nSTART TIMELINE: 1\n";
        assert!(BackupLabel::parse(text.as_bytes()).unwrap_err().message().contains("START TIMELINE"));
    }

    #[test]
    fn what_recovery_needs_must_be_there() {
        let whole = String::from_utf8(fixtures::v15().plain("backup_label")).unwrap();
        for key in ["START WAL LOCATION", "CHECKPOINT LOCATION", "START TIMELINE"] {
            let without: String =
                whole.lines().filter(|line| !line.starts_with(key)).map(|line| format!("{line}\n")).collect();
            assert!(BackupLabel::parse(without.as_bytes()).unwrap_err().message().contains(key), "{key}");
        }
        for (from, to) in
            [("0/B00028", "B00028"), (" (file", " file"), ("TIMELINE: 1", "TIMELINE: 0"), ("streamed", "torn")]
        {
            assert!(BackupLabel::parse(whole.replace(from, to).as_bytes()).is_err(), "{from}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "(START WAL LOCATION: |LABEL: |START TIMELINE:|[ -~\n/(]|\\PC){0,40}") {
            let _ = BackupLabel::parse(text.as_bytes());
        }
    }
}
