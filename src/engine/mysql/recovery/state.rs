//! What a recovery remembers in the clone's run directory, so that whoever comes after the death of the agent knows what
//! the directory is.
//!
//! Replay runs without syncing. What is recovered is then handed to the operating system, so that it survives the death of
//! any process but not that of the machine: the boot id tells the two apart.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::feed::End;
use super::stage_again;
use crate::base::child::boot_id;
use crate::base::durable::{remove_file_durable, write_file_durable};
use crate::engine::mysql::ondisk::transaction::LogState;
use crate::engine::mysql::product::Product;
use crate::error::{Context, Error, Kind, Result};
use crate::model::engine_kind::EngineKind;

/// In place of the boot id: no restart of the machine loses anything.
const DURABLE: &str = "durable";
const FILE: &str = "keiki_recovery.state";

/// How far a recovery is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The copied files are being made consistent, which may be repeated.
    Applying,
    /// The log is being applied.
    Replaying,
    /// The target was reached and verified.
    Recovered,
    /// The directory is durable and the new life's log was begun.
    HandedOver,
}

const PHASES: [(Phase, &str); 4] = [
    (Phase::Applying, "applying"),
    (Phase::Replaying, "replaying"),
    (Phase::Recovered, "recovered"),
    (Phase::HandedOver, "handed-over"),
];

/// The content of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryState {
    pub boot_id: String,
    /// What was ordered, as text: another order must not go on with this directory.
    pub target: String,
    pub phase: Phase,
    pub end: Option<End>,
}

fn path_in(run_dir: &Path) -> PathBuf {
    run_dir.join(FILE)
}

impl RecoveryState {
    /// Reads it; nothing if no recovery began here. A file that cannot be understood is `Damaged`.
    pub fn load(run_dir: &Path) -> Result<Option<RecoveryState>> {
        let path = path_in(run_dir);
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.context(|| format!("cannot read '{}'", path.display()))?,
        };
        RecoveryState::parse(&text).map(Some).ok_or_else(|| {
            Error::new(Kind::Damaged, format!("cannot understand '{}'", path.display()))
                .hint("discard the clone and order it again")
        })
    }

    /// Whether nothing can have been lost, if the machine runs under this boot id now.
    pub fn is_safe_after(&self, boot: &str) -> bool {
        self.boot_id == boot || self.boot_id == DURABLE || self.phase == Phase::HandedOver
    }

    pub fn save(&self, run_dir: &Path) -> Result<()> {
        write_file_durable(&path_in(run_dir), self.render().as_bytes(), 0o600)
    }

    fn render(&self) -> String {
        let phase = PHASES.iter().find(|row| row.0 == self.phase).map_or("", |row| row.1);
        let target = self.target.replace('\n', " ");
        let mut text = format!("boot_id={}\ntarget={target}\nphase={phase}\n", self.boot_id);
        if let Some(end) = &self.end {
            let product = match end.state {
                LogState::MariaDb(_) => Product::MariaDb,
                LogState::MySql(_) => Product::MySql,
            };
            text += &format!(
                "product={}\nnumber={}\noffset={}\nstate={}\n",
                product.kind().name(),
                end.number,
                end.offset,
                end.state
            );
            if let Some(time) = end.last_commit_at {
                text += &format!("last_commit_at={time}\n");
            }
        }
        text + "complete\n"
    }

    fn parse(text: &str) -> Option<RecoveryState> {
        let body = text.strip_suffix("complete\n")?;
        let values: BTreeMap<&str, &str> = body.lines().filter_map(|line| line.split_once('=')).collect();
        // Those of earlier versions are all of MariaDB and do not say so.
        let kind = EngineKind::parse(values.get("product").copied().unwrap_or("mariadb")).ok()?;
        let product = Product::of_kind(kind).ok()?;
        let end = match values.get("number") {
            None => None,
            Some(number) => Some(End {
                number: number.parse().ok()?,
                offset: values.get("offset")?.parse().ok()?,
                state: product.parse_state(values.get("state")?).ok()?,
                last_commit_at: match values.get("last_commit_at") {
                    None => None,
                    Some(time) => Some(time.parse().ok()?),
                },
            }),
        };
        let phase = PHASES.iter().find(|row| values.get("phase") == Some(&row.1))?.0;
        let text_of = |name: &str| values.get(name).map(|value| value.to_string());
        Some(RecoveryState { boot_id: text_of("boot_id")?, target: text_of("target")?, phase, end })
    }
}

/// An error unless the directory was recovered, and nothing of that can have been lost since.
pub fn require_recovered(run_dir: &Path) -> Result<()> {
    match RecoveryState::load(run_dir)? {
        Some(state) if !matches!(state.phase, Phase::Recovered | Phase::HandedOver) => {
            Err(stage_again("its recovery did not end"))
        }
        Some(state) if !state.is_safe_after(&boot_id()?) => {
            Err(stage_again("the host was restarted before what was replayed was made durable"))
        }
        Some(_) => Ok(()),
        None => Err(stage_again("its recovery did not begin")),
    }
}

/// Whether the new life has begun.
pub fn is_handed_over(run_dir: &Path) -> Result<bool> {
    Ok(RecoveryState::load(run_dir)?.is_some_and(|state| state.phase == Phase::HandedOver))
}

/// The directory is durable and its new life has begun.
pub fn mark_handed_over(run_dir: &Path) -> Result<()> {
    match RecoveryState::load(run_dir)? {
        Some(state) => RecoveryState { phase: Phase::HandedOver, ..state }.save(run_dir),
        None => Err(stage_again("its recovery did not end")),
    }
}

/// The directory was made durable as it is: a restart of the machine loses nothing of it.
pub fn mark_durable(run_dir: &Path) -> Result<()> {
    match RecoveryState::load(run_dir)? {
        Some(state) => RecoveryState { boot_id: String::from(DURABLE), ..state }.save(run_dir),
        None => Err(stage_again("its recovery did not end")),
    }
}

/// Forgets what an earlier recovery remembered: the directory was staged anew.
pub fn forget(run_dir: &Path) -> Result<()> {
    remove_file_durable(&path_in(run_dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_reads_back_as_saved_and_a_torn_one_is_damaged() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(RecoveryState::load(directory.path()).unwrap(), None);
        let end = |product: Product, state: &str| End {
            number: 12,
            offset: 4567,
            state: product.parse_state(state).unwrap(),
            last_commit_at: Some("2026-11-21T09:59:00Z".parse().unwrap()),
        };
        let mysql = end(Product::MySql, "3e11fa47-71ca-11e1-9e33-c80aa9429562:1-5:tag:3");
        let end = end(Product::MariaDb, "0-5-9,1-2-3");
        for (phase, _) in PHASES {
            for end in [None, Some(mysql.clone()), Some(end.clone()), Some(End { last_commit_at: None, ..end.clone() })]
            {
                let state = RecoveryState { boot_id: "b".into(), target: "2026=x".into(), phase, end };
                state.save(directory.path()).unwrap();
                assert_eq!(RecoveryState::load(directory.path()).unwrap(), Some(state));
            }
        }
        std::fs::write(path_in(directory.path()), "boot_id=b\ntarget=x\nphase=recovered\n").unwrap();
        assert_eq!(RecoveryState::load(directory.path()).unwrap_err().kind(), Kind::Damaged);
    }

    #[test]
    fn after_a_restart_of_the_machine_only_what_was_made_durable_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let run_dir = directory.path();
        let save = |phase, boot: String| {
            RecoveryState { boot_id: boot, target: "x".into(), phase, end: None }.save(run_dir).unwrap();
        };
        save(Phase::Replaying, boot_id().unwrap());
        assert!(require_recovered(run_dir).is_err());
        save(Phase::Recovered, boot_id().unwrap());
        require_recovered(run_dir).unwrap();
        save(Phase::Recovered, "another".into());
        assert!(require_recovered(run_dir).is_err());
        save(Phase::HandedOver, "another".into());
        require_recovered(run_dir).unwrap();
        assert!(is_handed_over(run_dir).unwrap());
    }
}
