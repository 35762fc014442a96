//! Which timeline each segment of the log is taken from.
//!
//! A log normally stays on one timeline. Where the source itself was promoted in place, the log of its later life has a
//! new one, and a history file says where it left the old one. Replay follows the newest timeline that the base backup
//! leads to. As in the server, the segment in which a timeline was left is taken from the newer timeline, which began
//! with a copy of it (`src/backend/access/transam/xlogrecovery.c`, XLogFileReadAnyTLI).

use crate::engine::LogSource;
use crate::engine::postgres::ondisk::history::TimelineHistory;
use crate::engine::postgres::ondisk::segment::{SegmentName, SegmentSize, history_file_name};
use crate::error::Result;
use crate::model::position::Lsn;

/// How many numbers without a history are tried before no newer timeline is believed to exist: numbers may be left out
/// where a promotion failed half way.
const MISSING_HISTORIES_MAX: u32 = 8;

/// A history file is a few lines long.
const HISTORY_BYTES_MAX: usize = 1 << 20;

/// The way through the timelines from a base backup on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPath {
    history: TimelineHistory,
    /// Name and content of the history files on the way, for the server to find.
    pub history_files: Vec<(String, Vec<u8>)>,
}

impl LogPath {
    /// Finds the way: the newest timeline in `logs` on whose history the backup's stop position lies.
    pub async fn find(logs: &dyn LogSource, backup_timeline: u32, backup_stop: Lsn) -> Result<LogPath> {
        let mut found = LogPath { history: TimelineHistory::of_first(backup_timeline), history_files: Vec::new() };
        if let Some((history, file)) = read_history(logs, backup_timeline).await? {
            found = LogPath { history, history_files: vec![file] };
        }
        let mut missing = 0;
        let mut timeline = backup_timeline;
        while missing < MISSING_HISTORIES_MAX && timeline < u32::MAX {
            timeline += 1;
            match read_history(logs, timeline).await? {
                None => missing += 1,
                Some((history, file)) => {
                    missing = 0;
                    if history.contains(backup_timeline, backup_stop) {
                        found.history_files.push(file);
                        found.history = history;
                    }
                }
            }
        }
        Ok(found)
    }

    /// The timeline that replay ends on, if it has all the log there is.
    pub fn newest_timeline(&self) -> u32 {
        self.history.timeline()
    }

    /// The timeline that a log belongs to which ends at `end`.
    pub fn timeline_at(&self, end: Lsn) -> u32 {
        self.history.timeline_of(Lsn(end.0.saturating_sub(1)))
    }

    /// The segment with this number.
    pub fn segment(&self, number: u64, size: SegmentSize) -> SegmentName {
        SegmentName { timeline: self.timeline_at(size.start_of(number.saturating_add(1))), number }
    }
}

async fn read_history(logs: &dyn LogSource, timeline: u32) -> Result<Option<(TimelineHistory, (String, Vec<u8>))>> {
    let name = history_file_name(timeline);
    if logs.available(&name).await?.is_none() {
        return Ok(None);
    }
    let bytes = logs.read(&name, 0, HISTORY_BYTES_MAX).await?;
    let history = TimelineHistory::parse(timeline, &bytes)?;
    Ok(Some((history, (name, bytes.to_vec()))))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use async_trait::async_trait;
    use bytes::Bytes;

    use super::*;

    struct Files(BTreeMap<String, &'static str>);

    #[async_trait]
    impl LogSource for Files {
        async fn available(&self, name: &str) -> Result<Option<u64>> {
            Ok(self.0.get(name).map(|text| text.len() as u64))
        }

        async fn is_sealed(&self, _name: &str) -> Result<bool> {
            Ok(true)
        }

        async fn read(&self, name: &str, _from: u64, _max_bytes: usize) -> Result<Bytes> {
            Ok(Bytes::from_static(self.0[name].as_bytes()))
        }
    }

    #[tokio::test]
    async fn replay_follows_the_newest_timeline_that_the_backup_leads_to() {
        let size = SegmentSize::DEFAULT;
        let files = Files(BTreeMap::from([
            (String::from("00000002.history"), "1\t0/5800000\tx\n"),
            // Left timeline 1 before the backup ended: a way that the backup is not on.
            (String::from("00000004.history"), "1\t0/1000000\tx\n"),
        ]));
        let path = LogPath::find(&files, 1, Lsn(0x400_0000)).await.unwrap();
        assert_eq!(path.newest_timeline(), 2);
        assert_eq!(path.history_files.len(), 1);
        assert_eq!(path.segment(4, size), SegmentName { timeline: 1, number: 4 });
        assert_eq!(path.segment(5, size), SegmentName { timeline: 2, number: 5 });
        assert_eq!((path.timeline_at(Lsn(0x580_0000)), path.timeline_at(Lsn(0x580_0008))), (1, 2));

        let alone = LogPath::find(&Files(BTreeMap::new()), 3, Lsn(0x400_0000)).await.unwrap();
        assert_eq!(alone.segment(4, size), SegmentName { timeline: 3, number: 4 });
        assert!(alone.history_files.is_empty());
    }
}
