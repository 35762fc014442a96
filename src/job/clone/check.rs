//! The check list of a clone: everything that can be known to go wrong, before anything is touched.

use std::net::TcpListener;

use crate::engine::{CloneSite, log_geometry};
use crate::error::{Error, Kind, Result};
use crate::job::clone::log_source::RepositoryLog;
use crate::job::clone::plan::{Choice, choose};
use crate::job::clone::space::{log_bytes_at_once, space_item};
use crate::job::clone::{CloneHost, Grower, Place, site};
use crate::job::window::{confirm_log, window_of};
use crate::model::bytes_text::human_bytes;
use crate::model::check::{CheckItem, Verdict, worst};
use crate::model::engine_kind::EngineKind;
use crate::model::incarnation::Incarnation;
use crate::model::job::CloneOrder;
use crate::model::position::Position;
use crate::model::target::Target;
use crate::model::window::Window;
use crate::repo::log_catalogue::LogCatalogue;
use crate::repo::log_reader::LogReader;
use crate::repo::repository::Repository;

/// What the check found out besides its list.
pub struct Checked {
    pub items: Vec<CheckItem>,
    /// What the clone is made from, unless the target cannot be reached.
    pub choice: Option<Choice>,
    /// Log that lies in the clone beside its data, at most.
    pub log_bytes: u64,
    /// Where the log ends that the clone may read, if somebody is adding to it: what is there behind that may have gaps
    /// that are being filled.
    pub log_end: Option<Position>,
    /// Why the target cannot be reached: this is what the person reads first.
    pub refusal: Option<Error>,
}

impl Checked {
    /// The error that a failed list ends the job with; the choice if nothing failed.
    pub fn into_choice(self, order: &CloneOrder) -> Result<Choice> {
        if let Some(refusal) = self.refusal {
            return Err(refusal);
        }
        if worst(&self.items) == Verdict::Fail {
            let first = self.items.iter().find(|item| item.verdict == Verdict::Fail);
            let (what, found, hint) = match first {
                Some(item) => (item.what.as_str(), item.found.as_str(), item.hint.clone().unwrap_or_default()),
                None => ("check list", "failed", String::new()),
            };
            // What begins like this says itself what it is about.
            let why = if found.starts_with("cannot ") { found.to_string() } else { format!("{what}: {found}") };
            return Err(Error::new(Kind::BadInput, format!("cannot clone '{}': {why}", order.source)).hint(hint));
        }
        self.choice.ok_or_else(|| Error::new(Kind::Internal, "a check list passed without a choice of backup"))
    }
}

/// Looks at everything. An item that could not be looked at is a failed item; an error is returned only if the
/// repository itself cannot be read.
pub async fn check(
    host: &CloneHost,
    repository: &std::sync::Arc<Repository>,
    source: &Incarnation,
    order: &CloneOrder,
    place: &Place,
) -> Result<Checked> {
    let mut items = vec![CheckItem::pass(
        "source",
        format!("'{}' on host '{}', {} {}", source.instance, source.host, source.engine.name(), source.engine_version),
    )];
    let (source_agent, shipped, advice) = source_agent_item(host, source).await;
    items.push(source_agent);
    let mut window = window_of(repository, source, shipped).await?;
    let backups = host.backups_of(repository, source.id).await?;
    let named_at = match &order.target {
        Target::Name(name) => find_name(repository, source, name).await?,
        Target::Transaction { id, included } => find_transaction(host, repository, source, id, *included).await?,
        _ => None,
    };
    let choice = |window: &Window| choose(&order.source, &source.host, &order.target, named_at, &backups, window);
    let choice = match choice(&window) {
        // The window is made of what is remembered; what the clone will read is looked at.
        Ok(chosen) if confirm_log(repository, source, &chosen.backup).await? => {
            window = window_of(repository, source, shipped).await?;
            choice(&window)
        }
        other => other,
    };
    let newest = window.reaches.last().filter(|_| shipped.is_some() && window.holes.is_empty());
    let log_end = newest.map(|reach| reach.to);
    items.extend(keep_expired_item(source.engine, order));
    items.push(place_item(host, order, place)?);
    items.push(port_item(host, order, place.port));
    match choice {
        Ok(choice) => {
            items.push(CheckItem::pass("target", format!("{} is reachable", order.target)));
            items.push(CheckItem::pass(
                "backup",
                format!(
                    "'{}', consistent at {}, {}",
                    choice.backup.id,
                    choice.backup.stop,
                    human_bytes(choice.backup.restored_bytes)
                ),
            ));
            let log_bytes = log_bytes_at_once(host, repository, source, &choice, &order.target).await?;
            items.push(space_item(choice.backup.restored_bytes, log_bytes, &place.data_dir, host.keep_free_bytes)?);
            items.extend(match host.grower(source.engine) {
                Ok(grower) => {
                    engine_items(grower, &host.site(grower, order, place, &choice.backup), &order.target).await
                }
                Err(error) => vec![failed("server programs", &error)],
            });
            Ok(Checked { items, choice: Some(choice), log_bytes, log_end, refusal: None })
        }
        Err(refusal) => {
            let refusal = with_advice(refusal, advice);
            items.push(CheckItem::fail(
                "target",
                refusal.message(),
                refusal.hint_text().unwrap_or("see 'keiki window'"),
            ));
            Ok(Checked { items, choice: None, log_bytes: 0, log_end: None, refusal: Some(refusal) })
        }
    }
}

/// The refusal of a target, with what the source's agent says to do about its log: that may be why.
fn with_advice(refusal: Error, advice: Option<String>) -> Error {
    let Some(advice) = advice else { return refusal };
    let whole = Error::new(refusal.kind(), refusal.message());
    match refusal.hint_text() {
        Some(hint) => whole.hint(format!("{advice}; after that: {hint}")),
        None => whole.hint(advice),
    }
}

/// Asks the source's agent to ship what is durable now, so that the newest targets are reachable; up to where it has, and
/// what it says to do if it is there and cannot. A clone is possible without it.
async fn source_agent_item(host: &CloneHost, source: &Incarnation) -> (CheckItem, Option<Position>, Option<String>) {
    let what = "source's agent";
    match host.sources.ship_now(&source.host, source.id).await {
        Ok(end) => {
            let found = format!("has shipped everything up to {}", end.position);
            (CheckItem::pass(what, found), Some(end.position), None)
        }
        Err(error) => {
            let hint = "the clone can reach what was shipped before; 'keiki window' shows how far that is";
            // A host that is no peer and an agent that has no such instance know nothing of its log either.
            let has_looked = !matches!(error.kind(), Kind::Unreachable | Kind::NotFound);
            let advice = error.hint_text().filter(|_| has_looked).map(str::to_string);
            (CheckItem::warn(what, error.message(), hint), None, advice)
        }
    }
}

/// The position of a restore point, looked for from the newest log file back. The newest point of a name is meant.
async fn find_name(
    repository: &std::sync::Arc<Repository>,
    source: &Incarnation,
    name: &str,
) -> Result<Option<Position>> {
    let catalogue = LogCatalogue::look(repository, source.id).await?;
    for file in catalogue.files().iter().rev() {
        let summary = catalogue.summary(&file.name).await?;
        if let Some((_, position)) = summary.named_points.iter().rev().find(|(known, _)| known == name) {
            return Ok(Some(*position));
        }
    }
    Ok(None)
}

/// Where the log must end for a transaction, looked for from the newest log file back: behind it, or in front of it.
async fn find_transaction(
    host: &CloneHost,
    repository: &std::sync::Arc<Repository>,
    source: &Incarnation,
    id: &str,
    included: bool,
) -> Result<Option<Position>> {
    let engine = &host.grower(source.engine)?.engine;
    let backups = host.backups_of(repository, source.id).await?;
    let Some(backup) = backups.last() else { return Ok(None) };
    let geometry = log_geometry(source.engine, &backup.engine_facts)?;
    let catalogue = LogCatalogue::load(repository.clone(), source.id).await?;
    let reader = std::sync::Arc::new(LogReader::new(repository.clone(), catalogue.clone()));
    let logs = RepositoryLog::new(reader, geometry, None);
    for file in catalogue.files().iter().rev() {
        let held = catalogue.summary(&file.name).await?.transactions;
        if let Some((start, end)) = engine.find_transaction(id, &file.name, &held, &logs).await? {
            return Ok(Some(if included { end } else { start }));
        }
    }
    Ok(None)
}

/// Refuses `--keep-expired` where there is nothing that expires.
fn keep_expired_item(engine: EngineKind, order: &CloneOrder) -> Option<CheckItem> {
    (order.keep_expired && !engine.expires_keys()).then(|| {
        CheckItem::fail(
            "--keep-expired",
            format!("nothing in a database of {} expires by itself", engine.name()),
            "leave it out",
        )
    })
}

fn place_item(host: &CloneHost, order: &CloneOrder, place: &Place) -> Result<CheckItem> {
    let what = "data directory";
    let dir = &place.data_dir;
    for taken in host.registry.places() {
        if taken.name == order.clone_name {
            return Ok(CheckItem::fail(
                what,
                format!("host '{}' has an instance '{}' already", host.host_name, taken.name),
                "choose another name with --as",
            ));
        }
        if dir.starts_with(&taken.data_dir) || taken.data_dir.starts_with(dir) {
            let found = format!("'{}' belongs to instance '{}'", dir.display(), taken.name);
            return Ok(CheckItem::fail(what, found, "choose another directory with --dir"));
        }
    }
    if host.growers.values().any(|grower| grower.engine.is_running(dir)) {
        let found = format!("a server is running in '{}'", dir.display());
        return Ok(CheckItem::fail(what, found, "choose another directory with --dir"));
    }
    Ok(match site::objection_to(dir)? {
        Some(objection) => CheckItem::fail(what, objection, "choose another directory with --dir"),
        None => CheckItem::pass(what, format!("'{}' is free", dir.display())),
    })
}

fn port_item(host: &CloneHost, order: &CloneOrder, port: u16) -> CheckItem {
    let what = "port";
    if let Some(taken) = host.registry.places().iter().find(|taken| taken.port == port) {
        return CheckItem::fail(
            what,
            format!("{port} belongs to instance '{}'", taken.name),
            "choose another port with --port",
        );
    }
    match port_is_free(port) {
        true => CheckItem::pass(what, format!("{port} is free")),
        false => CheckItem::fail(
            what,
            format!("{port} is in use on host '{}'", host.host_name),
            match order.port {
                Some(_) => "choose another port with --port",
                None => "widen '[clone] ports' in the configuration of that host",
            },
        ),
    }
}

/// Whether nobody listens on a port, on any address.
pub fn port_is_free(port: u16) -> bool {
    TcpListener::bind(("0.0.0.0", port)).is_ok()
}

async fn engine_items(grower: &Grower, site: &CloneSite, target: &Target) -> Vec<CheckItem> {
    grower.engine.check_target(site, target).await.unwrap_or_else(|error| vec![failed("server programs", &error)])
}

fn failed(what: &str, error: &Error) -> CheckItem {
    CheckItem::fail(what, error.message(), error.hint_text().unwrap_or("see the agent's log"))
}
