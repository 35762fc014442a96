//! Orders the backups that the configuration asks for, each when its window has come or when a server has saved its data by
//! itself, and those that a hole in the log makes necessary.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::agent::config::{BackupSchedule, next_start};
use crate::agent::host::Host;
use crate::agent::supervisor::Supervisor;
use crate::base::clock::is_within;
use crate::error::{Kind, Result};
use crate::model::backup::BackupKind;
use crate::model::id::JobId;
use crate::model::job::{Order, Task};

/// Windows are given in minutes; looking this often begins a backup in the minute that was asked for.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// How long it is believed when the newest backup was; when one seems to be due, it is looked again. A backup that
/// this agent takes is known at once.
const BELIEVED: Duration = Duration::from_secs(3600);
const BELIEVED_WHEN_DUE: Duration = Duration::from_secs(300);

/// A backup that is taken because of a hole in the log is not tried more often than this, whatever comes of it: it may cost
/// the server a fork.
const BETWEEN_HOLES: Duration = Duration::from_secs(600);

/// Runs until the agent stops.
pub async fn run(host: Arc<Host>) {
    let local = TimeZone::system();
    let mut ordered_behind_hole: BTreeMap<String, Timestamp> = BTreeMap::new();
    loop {
        tokio::select! {
            () = host.stop.cancelled() => return,
            () = host.clock.sleep(LOOK_EVERY) => {}
        }
        host.repository.save_local_copy(false).await;
        host.repository.abort_stale_uploads_once_a_day();
        let now = host.clock.now();
        for instance in host.instances() {
            let name = &instance.config.name;
            let is_patient = ordered_behind_hole.get(name).is_some_and(|at| is_within(*at, now, BETWEEN_HOLES));
            if !is_patient && is_behind_hole(instance.as_ref()).await.unwrap_or(false) {
                tracing::warn!("log of '{name}' is missing behind its newest backup: taking another one");
                ordered_behind_hole.insert(name.clone(), now);
                if let Err(error) = order(&host, name).await {
                    tracing::warn!("cannot begin the backup of '{name}' behind the hole: {error}");
                }
            }
            let Some(schedule) = &instance.config.backup else { continue };
            let is_due = is_due(instance.as_ref(), schedule, now, &local).await;
            let has_saved = schedule.also_when_saved && instance.has_saved().await.unwrap_or(false);
            // While the repository cannot be asked, it is not known whether a backup is due; it will be later.
            if (is_due.unwrap_or(false) || has_saved)
                && let Err(error) = order(&host, &instance.config.name).await
            {
                tracing::warn!("cannot begin the scheduled backup of '{}': {error}", instance.config.name);
            }
        }
    }
}

// Each of the two asks by what is believed of the backups, and again by a newer look if that says that one is to be taken: a
// look costs requests, and a quiet instance makes next to none.

async fn is_behind_hole(instance: &Supervisor) -> Result<bool> {
    Ok(instance.needs_backup_behind_hole(BELIEVED).await?
        && instance.needs_backup_behind_hole(BELIEVED_WHEN_DUE).await?)
}

async fn is_due(instance: &Supervisor, schedule: &BackupSchedule, now: Timestamp, local: &TimeZone) -> Result<bool> {
    for max_age in [BELIEVED, BELIEVED_WHEN_DUE] {
        let last = instance.last_automatic_backup_began_at(max_age).await?;
        if next_start(&schedule.schedule, now, last, local).is_none_or(|start| start > now) {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn order(host: &Host, instance: &str) -> Result<()> {
    let task = Task::Backup { instance: instance.to_string(), kind: BackupKind::Automatic };
    let order = Order { id: JobId::fresh(), by: "schedule".to_string(), task };
    match host.runner()?.submit(order).await {
        // One is running already.
        Err(error) if error.kind() == Kind::Conflict => Ok(()),
        other => other.map(|_| ()),
    }
}
