//! What a recovery remembers in the clone's run directory, so that it can go on after the agent died.
//!
//! Replay runs without fsync, so its work survives the death of any process but not that of the machine: the boot id
//! tells the two apart.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::base::durable::write_file_durable;
use crate::error::{Context, Error, Kind, Result};
use crate::model::position::Lsn;

pub(super) const FILE: &str = "keiki_recovery.state";

/// The end of the log that was found for the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoundEnd {
    /// The timeline that the clone leaves, and where.
    pub timeline: u32,
    pub left_at: Lsn,
    /// The end of the last record that is kept; differs from `left_at` only behind a switch of segments.
    pub keep_until: Lsn,
    pub last_commit_at: Option<Timestamp>,
}

/// The content of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryState {
    pub boot_id: String,
    /// What was ordered, as text: another order must not go on with this directory.
    pub target: String,
    pub end: Option<FoundEnd>,
    /// What was replayed was made durable as a whole since, and the server runs with fsync: a restart of the machine
    /// loses nothing.
    pub is_durable: bool,
}

fn path_in(run_dir: &Path) -> PathBuf {
    run_dir.join(FILE)
}

impl RecoveryState {
    /// Reads it; `None` if no recovery began here. A file that cannot be understood is `Damaged`.
    pub fn load(run_dir: &Path) -> Result<Option<RecoveryState>> {
        let path = path_in(run_dir);
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.context(|| format!("cannot read '{}'", path.display()))?,
        };
        match RecoveryState::parse(&text) {
            Some(state) => Ok(Some(state)),
            None => Err(Error::new(Kind::Damaged, format!("cannot understand '{}'", path.display()))
                .hint("discard the clone and order it again")),
        }
    }

    pub fn save(&self, run_dir: &Path) -> Result<()> {
        write_file_durable(&path_in(run_dir), self.render().as_bytes(), 0o600)
    }

    fn render(&self) -> String {
        let mut text = format!("boot_id={}\ntarget={}\n", self.boot_id, self.target.replace('\n', " "));
        if let Some(end) = &self.end {
            text += &format!("timeline={}\nleft_at={}\nkeep_until={}\n", end.timeline, end.left_at, end.keep_until);
            if let Some(time) = end.last_commit_at {
                text += &format!("last_commit_at={time}\n");
            }
        }
        if self.is_durable {
            text += "durable=yes\n";
        }
        text + "complete\n"
    }

    fn parse(text: &str) -> Option<RecoveryState> {
        let body = text.strip_suffix("complete\n")?;
        let values: BTreeMap<&str, &str> = body.lines().filter_map(|line| line.split_once('=')).collect();
        let end = match values.get("timeline") {
            None => None,
            Some(timeline) => Some(FoundEnd {
                timeline: timeline.parse().ok()?,
                left_at: Lsn::parse(values.get("left_at")?).ok()?,
                keep_until: Lsn::parse(values.get("keep_until")?).ok()?,
                last_commit_at: match values.get("last_commit_at") {
                    None => None,
                    Some(time) => Some(time.parse().ok()?),
                },
            }),
        };
        let text_of = |name: &str| values.get(name).map(|value| value.to_string());
        let is_durable = values.get("durable") == Some(&"yes");
        Some(RecoveryState { boot_id: text_of("boot_id")?, target: text_of("target")?, end, is_durable })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_reads_back_as_saved_and_a_torn_one_is_damaged() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(RecoveryState::load(directory.path()).unwrap(), None);
        let end = FoundEnd {
            timeline: 3,
            left_at: Lsn(0x1_0200_0000),
            keep_until: Lsn(0x1_01ff_0000),
            last_commit_at: Some("2026-11-21T09:59:00.25Z".parse().unwrap()),
        };
        for end in [None, Some(end), Some(FoundEnd { last_commit_at: None, ..end })] {
            for is_durable in [false, true] {
                let state = RecoveryState { boot_id: "b".into(), target: "name a=b".into(), end, is_durable };
                state.save(directory.path()).unwrap();
                assert_eq!(RecoveryState::load(directory.path()).unwrap(), Some(state.clone()));
            }
        }
        std::fs::write(path_in(directory.path()), "boot_id=b\ntarget=x\ntimeline=3\n").unwrap();
        assert_eq!(RecoveryState::load(directory.path()).unwrap_err().kind(), Kind::Damaged);
    }
}
