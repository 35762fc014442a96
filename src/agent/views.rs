//! What people and peers want to know of the repository and of this host's instances.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::agent::host::Host;
use crate::error::{Error, Kind, Result};
use crate::format::FORMAT_VERSION;
use crate::job::archive::Archiver;
use crate::job::clone::run_dir_of;
use crate::model::backup::Backup;
use crate::model::capabilities::Capabilities;
use crate::model::id::IncarnationId;
use crate::model::incarnation::Incarnation;
use crate::peer::access::Caller;
use crate::peer::api::{RepositoryCost, RepositoryFacts, Response};
use crate::repo::backup_reader::Backups;
use crate::repo::incarnations::Incarnations;
use crate::repo::inventory::take_inventory;
use crate::repo::log_catalogue::LogCatalogue;

/// PostgreSQL asks again after an answer of "not yet", so a question need not be held for long; a segment that is just
/// being shipped is usually done within this.
const PUSH_WAIT: Duration = Duration::from_secs(20);
/// See [`patience`].
const PUSH_WAIT_OF_CLONE: Duration = Duration::from_secs(3);

/// How often somebody who asks early looks whether the instance is there now.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The incarnation that a person means by an instance's name: of this host if there is one, else of any.
pub async fn find_incarnation(host: &Host, name: &str) -> Result<Incarnation> {
    let incarnations = Incarnations::new(host.repository.get().await?);
    if !name.contains('/')
        && let Ok(instance) = host.instance(name)
        && let Some(id) = instance.incarnation()
    {
        return incarnations.get(id).await;
    }
    incarnations.find(name).await
}

pub async fn backups(host: &Host, instance: &str) -> Result<Vec<Backup>> {
    let incarnation = find_incarnation(host, instance).await?;
    let list = Backups::new(host.repository.get().await?).list(incarnation.id).await?;
    match (list.backups.is_empty(), list.unreadable.into_iter().next()) {
        // Nothing but damage is not the same as nothing.
        (true, Some((_, error))) => Err(error),
        _ => Ok(list.backups),
    }
}

pub async fn window(host: &Host, instance: &str) -> Result<Response> {
    let incarnation = find_incarnation(host, instance).await?;
    let repository = host.repository.get().await?;
    let archived_here = host.instances().into_iter().find(|instance| instance.incarnation() == Some(incarnation.id));
    let shipped = archived_here.and_then(|instance| instance.archiver().ok()?.status().shipped);
    let window = crate::job::window::window_of(&repository, &incarnation, shipped).await?;
    Ok(Response::Window { incarnation: incarnation.id, window })
}

/// The repository as a whole, by a listing of all of it.
pub async fn repository(host: &Host) -> Result<RepositoryFacts> {
    let repository = host.repository.get().await?;
    Ok(RepositoryFacts {
        url: host.repository.describe(),
        id: repository.id(),
        format_version: FORMAT_VERSION,
        created_at: repository.created_at(),
        capabilities: repository.capabilities().map(capability_lines).unwrap_or_default(),
        inventory: take_inventory(&repository).await?,
    })
}

/// What was found out about a bucket, in words.
fn capability_lines(found: &Capabilities) -> Vec<(String, String)> {
    let word = |can: bool, yes: &str, no: &str| if can { yes.to_string() } else { no.to_string() };
    let checksums: Vec<&str> = found.checksums.iter().map(|kind| kind.name()).collect();
    vec![
        ("creation".to_string(), word(found.conditional_create, "by condition", "by claims")),
        ("replacement".to_string(), word(found.conditional_replace, "by condition", "by claims")),
        ("parts".to_string(), word(found.conditional_complete, "by condition", "by claims")),
        ("listing".to_string(), word(found.ordered_listing, "in order", "not in order")),
        ("checksums".to_string(), if checksums.is_empty() { "none".to_string() } else { checksums.join(", ") }),
    ]
}

/// What this agent asks of its repository, and what is stored there as far as the catalogue says.
pub async fn cost(host: &Host) -> Result<RepositoryCost> {
    let repository = host.repository.get().await?;
    let meter = repository.store().meter();
    // Before it is asked for what is stored, which takes requests of its own.
    let reading = meter.map(|meter| meter.read()).ok_or_else(|| {
        Error::new(Kind::Internal, format!("nothing counts the requests to '{}'", repository.describe()))
    })?;
    let mut stored_bytes = 0u64;
    for incarnation in Incarnations::new(repository.clone()).all().await? {
        let backups = Backups::new(repository.clone()).list(incarnation.id).await?.backups;
        let (_, log_bytes) = LogCatalogue::look(&repository, incarnation.id).await?.stored();
        let of_backups = backups.iter().fold(0u64, |sum, backup| sum.saturating_add(backup.stored_bytes));
        stored_bytes = stored_bytes.saturating_add(log_bytes).saturating_add(of_backups);
    }
    let prices = host.config.repository.prices.clone();
    Ok(RepositoryCost { repository: host.repository.describe(), reading, stored_bytes, prices })
}

/// Ships everything that is durable now, for a peer that is about to clone.
pub async fn ship_now(host: &Host, incarnation: IncarnationId) -> Result<Response> {
    let owner = host.instances().into_iter().find(|instance| instance.incarnation() == Some(incarnation));
    let owner = owner.ok_or_else(|| {
        Error::new(
            Kind::NotFound,
            format!("host '{}' does not archive incarnation '{incarnation}'", host.config.host.name),
        )
        .hint("was the instance moved, or is its agent still starting? 'keiki status' on that host says")
    })?;
    let end = owner.archiver()?.ship_now().await?;
    Ok(Response::Shipped { position: end.position, observed_at: end.observed_at })
}

/// Answers PostgreSQL's question whether a segment is safe: only when it is.
pub async fn push_log(host: &Arc<Host>, caller: &Caller, data_dir: &str, file: &str) -> Result<Response> {
    let began = tokio::time::Instant::now();
    let asked = std::path::Path::new(data_dir);
    let archiver = loop {
        match archiver_of(host, caller, asked, file) {
            Err(error) if began.elapsed() < patience(asked, &error) => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            other => break other?,
        }
    };
    archiver.wait_durable(file, PUSH_WAIT.saturating_sub(began.elapsed())).await?;
    Ok(Response::Done)
}

/// How long an answer is put off. A clone that is just being accepted asks before it is an instance, and an agent that just
/// started has not looked at its instances yet: neither is worth a failed archive_command. Of a clone it is a short time,
/// because an agent that died in the middle of that stops the server once more, and a server that is stopped waits until its
/// archiver has asked three times. A copy that somebody made by hand is told at once.
fn patience(data_dir: &Path, error: &Error) -> Duration {
    match error.kind() {
        Kind::NotFound if run_dir_of(data_dir).is_dir() => PUSH_WAIT_OF_CLONE,
        Kind::Unreachable => PUSH_WAIT,
        _ => Duration::ZERO,
    }
}

/// Who ships the log of a data directory.
fn archiver_of(host: &Host, caller: &Caller, data_dir: &Path, file: &str) -> Result<Arc<Archiver>> {
    let canonical = data_dir.canonicalize().unwrap_or_else(|_| data_dir.to_path_buf());
    let instance = host.instances().into_iter().find(|instance| {
        let own = &instance.config.data_dir;
        own == data_dir || own.canonicalize().is_ok_and(|own| own == canonical)
    });
    let instance = instance.ok_or_else(|| {
        Error::new(
            Kind::NotFound,
            format!("cannot archive '{file}': no instance of this host has data directory '{}'", data_dir.display()),
        )
        .hint(
            "is this a copy of another server with its settings? set archive_mode = off there, or make it an \
                 [[instance]] of its own",
        )
    })?;
    instance.check_asker(caller)?;
    instance.archiver()
}
