//! Orders the backups that the configuration asks for, each when its window has come.

use std::sync::Arc;
use std::time::Duration;

use crate::agent::config::next_start;
use crate::agent::host::Host;
use crate::error::{Kind, Result};
use crate::model::backup::BackupKind;
use crate::model::id::JobId;
use crate::model::job::{Order, Task};

/// Windows are given in minutes; looking this often begins a backup in the minute that was asked for.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Runs until the agent stops.
pub async fn run(host: Arc<Host>) {
    let local = jiff::tz::TimeZone::system();
    loop {
        tokio::select! {
            () = host.stop.cancelled() => return,
            () = host.clock.sleep(LOOK_EVERY) => {}
        }
        let now = host.clock.now();
        for instance in host.instances() {
            let Some(schedule) = &instance.config.backup else { continue };
            // While the repository cannot be asked, it is not known whether a backup is due; it will be later.
            let Ok(last) = instance.last_automatic_backup_began_at().await else { continue };
            let is_due = next_start(&schedule.schedule, now, last, &local).is_some_and(|start| start <= now);
            if is_due && let Err(error) = order(&host, &instance.config.name).await {
                tracing::warn!("cannot begin the scheduled backup of '{}': {error}", instance.config.name);
            }
        }
    }
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
