//! The fake engine as a grower of clones: it replays events over a restored directory, exactly to the target.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::base::durable::{remove_file_durable, write_file_durable};
use crate::engine::fake::database::{VERSION, identity_of, is_running_in, stop_in};
use crate::engine::fake::geometry::{EVENTS_PER_FILE, FILE_BYTES, FakeGeometry, count_of, file_name};
use crate::engine::fake::record::{Event, RECORD_BYTES};
use crate::engine::{
    AcceptedClone, CleanUpItem, CloneEngine, CloneSite, LogGeometry, LogSource, Progress, Recovered, ServerIdentity,
};
use crate::error::{Context, Error, Kind, Result};
use crate::model::backup::FileMeta;
use crate::model::check::CheckItem;
use crate::model::position::Position;
use crate::model::target::Target;

/// Grows clones of fake databases.
pub struct FakeCloneEngine;

#[async_trait]
impl CloneEngine for FakeCloneEngine {
    async fn check_target(&self, site: &CloneSite, _target: &Target) -> Result<Vec<CheckItem>> {
        Ok(vec![if site.engine_version == VERSION {
            CheckItem::pass("version", format!("{VERSION} here and in the backup"))
        } else {
            let found = format!("the backup is of version '{}', this host has '{VERSION}'", site.engine_version);
            CheckItem::fail("version", found, "clone to a host that has the same version")
        }])
    }

    fn place(&self, _site: &CloneSite, meta: &FileMeta) -> Result<Option<FileMeta>> {
        Ok((meta.path != "left_out").then(|| meta.clone()))
    }

    fn is_marker(&self, path: &str) -> bool {
        path == "control"
    }

    async fn prepare(&self, site: &CloneSite) -> Result<()> {
        let path = site.data_dir.join("FAKE_VERSION");
        std::fs::read(&path).context(|| format!("cannot read '{}'", path.display()))?;
        write_file_durable(&site.data_dir.join("quarantine"), b"", 0o600)
    }

    fn first_log_file(&self, site: &CloneSite) -> Result<String> {
        Ok(file_name(count_of(site.backup_start)? / EVENTS_PER_FILE))
    }

    fn next_log_file(&self, _site: &CloneSite, name: &str) -> Result<String> {
        FakeGeometry.next_file(name)
    }

    async fn recover(
        &self,
        site: &CloneSite,
        target: &Target,
        logs: Arc<dyn LogSource>,
        progress: Arc<dyn Progress>,
        cancel: CancellationToken,
    ) -> Result<Recovered> {
        identity_of(&site.data_dir)?;
        write_file_durable(&site.data_dir.join("running"), b"0", 0o600)?;
        let stop = count_of(site.backup_stop)?;
        let mut replay = Replay { count: count_of(site.backup_start)?, last_at: None, reached: false };
        let mut name = self.first_log_file(site)?;
        while !replay.reached {
            if cancel.is_cancelled() {
                return Err(Error::new(Kind::Cancelled, "replay was cancelled"));
            }
            let Some(bytes) = logs.available(&name).await? else { break };
            let content = logs.read(&name, 0, FILE_BYTES as usize).await?;
            if content.len() as u64 != bytes {
                return Err(Error::new(Kind::Damaged, format!("log file '{name}' is shorter than it was said to be")));
            }
            replay.file(&site.data_dir, &content, target, stop)?;
            progress.set(replay.count * RECORD_BYTES as u64, 0);
            if bytes < FILE_BYTES {
                break;
            }
            name = self.next_log_file(site, &name)?;
        }
        replay.finish(site, target, stop)
    }

    async fn clean_up(&self, site: &CloneSite) -> Result<Vec<CleanUpItem>> {
        remove_file_durable(&site.data_dir.join("schedule"))?;
        Ok(vec![CleanUpItem { what: "scheduled work of the source".into(), done: "removed".into() }])
    }

    async fn hand_over(&self, site: &CloneSite, open: bool) -> Result<ServerIdentity> {
        stop_in(&site.data_dir)?;
        if open {
            remove_file_durable(&site.data_dir.join("quarantine"))?;
            write_file_durable(&site.data_dir.join("running"), b"0", 0o600)?;
        }
        identity_of(&site.data_dir)
    }

    async fn launch(&self, clone: &AcceptedClone) -> Result<()> {
        if is_running_in(&clone.data_dir) {
            return Ok(());
        }
        write_file_durable(&clone.data_dir.join("running"), b"0", 0o600)
    }

    async fn stop(&self, site: &CloneSite) -> Result<()> {
        stop_in(&site.data_dir)
    }

    fn is_running(&self, data_dir: &Path) -> bool {
        is_running_in(data_dir)
    }
}

struct Replay {
    count: u64,
    last_at: Option<jiff::Timestamp>,
    reached: bool,
}

impl Replay {
    /// Applies the events of one log file that are wanted; also keeps them as the clone's own log, as a server does.
    fn file(&mut self, data_dir: &Path, content: &[u8], target: &Target, stop: u64) -> Result<()> {
        let what = || format!("cannot write to '{}'", data_dir.display());
        let number = self.count / EVENTS_PER_FILE;
        let rows = OpenOptions::new().write(true).open(data_dir.join("rows")).context(what)?;
        let mut kept = 0;
        for (place, record) in content.chunks(RECORD_BYTES).enumerate() {
            let event = Event::decode(record, number * EVENTS_PER_FILE + place as u64 + 1)?;
            let beyond = match target {
                Target::Latest => false,
                Target::Time(instant) => event.at > *instant,
                Target::Lsn(lsn) => event.index > lsn.0,
                Target::Position(position) => event.index > count_of(*position)?,
                Target::Backup(_) => event.index > stop,
                Target::Name(_) | Target::Transaction { .. } => false,
            };
            // What the backup is torn over must be replayed; that a target before it is asked for shows at the end.
            if beyond && event.index > stop {
                self.reached = true;
                break;
            }
            kept = (place + 1) * RECORD_BYTES;
            if event.index <= self.count {
                continue;
            }
            rows.write_all_at(&event.value.to_le_bytes(), (event.index - 1) * 8).context(what)?;
            (self.count, self.last_at) = (event.index, Some(event.at));
            if event.name.is_some() && *target == Target::Name(event.name.unwrap_or_default()) {
                self.reached = true;
                break;
            }
        }
        write_file_durable(&data_dir.join("log").join(file_name(number)), &content[..kept], 0o600)
    }

    fn finish(self, site: &CloneSite, target: &Target, stop: u64) -> Result<Recovered> {
        let cannot = |why: String| Err(Error::new(Kind::Damaged, format!("cannot replay to '{target}': {why}")));
        if self.count < stop {
            return cannot(format!("the log ends at #{}, before the backup is consistent at #{stop}", self.count));
        }
        match target {
            Target::Name(_) if !self.reached => return cannot("there is no such point in the log".into()),
            Target::Position(position) if self.count != count_of(*position)? => {
                return cannot(format!("the log ends at #{}", self.count));
            }
            Target::Lsn(lsn) if self.count != lsn.0 => return cannot(format!("the log ends at #{}", self.count)),
            _ => {}
        }
        let rows = OpenOptions::new().write(true).open(site.data_dir.join("rows"));
        let what = || format!("cannot write to '{}'", site.data_dir.display());
        rows.context(what)?.set_len(self.count * 8).context(what)?;
        let at = Position::Count(self.count);
        Ok(Recovered {
            departed_at: at,
            now_at: at,
            last_commit_at: self.last_at,
            verified: vec![CheckItem::pass("events", format!("{} as ordered", self.count))],
        })
    }
}
