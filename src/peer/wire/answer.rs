//! Twins of answers. New variants go to the end and raise the protocol version.

use serde::{Deserialize, Serialize};

use super::noun::{
    WireBackup, WireCheckItem, WireError, WireInstant, WireJobReport, WirePosition, WireWindow, plain_twin,
};
use super::repository::{WireRepositoryCost, WireRepositoryFacts};
use super::{FRAME_BYTES_MAX, Twin, encoded_bytes};
use crate::error::{Error, Kind, Result};
use crate::model::group::Group;
use crate::peer::api::{HostStatus, InstanceState, InstanceStatus, ObjectFacts, PeerFacts, Response};

/// One message of an answer.
#[derive(Serialize, Deserialize)]
pub enum WireAnswer {
    Failed(WireError),
    Done,
    Hello { host: String, version: String, now: WireInstant },
    Status(WireHostStatus),
    Job(WireJobReport),
    Window { incarnation: String, window: WireWindow },
    Shipped { position: WirePosition, observed_at: WireInstant },
    Body { size_bytes: u64 },
    Object(Option<WireObjectFacts>),
    Stored { tag: String },
    Checks(Page<WireCheckItem>),
    Jobs(Page<WireJobReport>),
    Backups(Page<WireBackup>),
    Objects(Page<WireObjectFacts>),
    Repository(WireRepositoryFacts),
    RepositoryCost(WireRepositoryCost),
    Links { urls: Vec<String>, expires_at: WireInstant, may_end_earlier: bool },
}

/// Some items of a list.
#[derive(Serialize, Deserialize)]
pub struct Page<T> {
    items: Vec<T>,
    /// Another message with items of the same list follows.
    more: bool,
}

#[derive(Serialize, Deserialize)]
pub struct WireObjectFacts {
    key: String,
    size_bytes: u64,
    tag: String,
}

impl Twin for ObjectFacts {
    type Wire = WireObjectFacts;

    fn to_wire(&self) -> WireObjectFacts {
        let ObjectFacts { key, size_bytes, tag } = self.clone();
        WireObjectFacts { key, size_bytes, tag }
    }

    fn from_wire(wire: WireObjectFacts) -> Result<ObjectFacts> {
        let WireObjectFacts { key, size_bytes, tag } = wire;
        Ok(ObjectFacts { key, size_bytes, tag })
    }
}

plain_twin!(InstanceState, WireInstanceState { Starting, Archiving, Retrying, Stopped, Quarantine, Down });

#[derive(Serialize, Deserialize)]
pub struct WireHostStatus {
    host: String,
    version: String,
    began_at: WireInstant,
    now: WireInstant,
    repository: String,
    repository_error: Option<WireError>,
    instances: Vec<WireInstanceStatus>,
    peers: Vec<(String, String)>,
    groups: Vec<(String, Vec<String>)>,
}

#[derive(Serialize, Deserialize)]
pub struct WireInstanceStatus {
    name: String,
    engine: String,
    engine_version: Option<String>,
    data_dir: String,
    port: u16,
    state: WireInstanceState,
    incarnation: Option<String>,
    shipped: Option<WirePosition>,
    durable: Option<WirePosition>,
    durable_at: Option<WireInstant>,
    backlog_bytes: u64,
    backlog_seconds: u64,
    last_backup: Option<(String, WireInstant)>,
    problem: Option<WireError>,
}

impl Twin for InstanceStatus {
    type Wire = WireInstanceStatus;

    fn to_wire(&self) -> WireInstanceStatus {
        WireInstanceStatus {
            name: self.name.clone(),
            engine: self.engine.clone(),
            engine_version: self.engine_version.clone(),
            data_dir: self.data_dir.clone(),
            port: self.port,
            state: self.state.to_wire(),
            incarnation: self.incarnation.to_wire(),
            shipped: self.shipped.to_wire(),
            durable: self.durable.to_wire(),
            durable_at: self.durable_at.to_wire(),
            backlog_bytes: self.backlog_bytes,
            backlog_seconds: self.backlog_seconds,
            last_backup: self.last_backup.as_ref().map(|(id, at)| (id.clone(), at.to_wire())),
            problem: self.problem.to_wire(),
        }
    }

    fn from_wire(wire: WireInstanceStatus) -> Result<InstanceStatus> {
        let last_backup = match wire.last_backup {
            Some((id, at)) => Some((id, Twin::from_wire(at)?)),
            None => None,
        };
        Ok(InstanceStatus {
            name: wire.name,
            engine: wire.engine,
            engine_version: wire.engine_version,
            data_dir: wire.data_dir,
            port: wire.port,
            state: Twin::from_wire(wire.state)?,
            incarnation: Twin::from_wire(wire.incarnation)?,
            shipped: Twin::from_wire(wire.shipped)?,
            durable: Twin::from_wire(wire.durable)?,
            durable_at: Twin::from_wire(wire.durable_at)?,
            backlog_bytes: wire.backlog_bytes,
            backlog_seconds: wire.backlog_seconds,
            last_backup,
            problem: Twin::from_wire(wire.problem)?,
        })
    }
}

impl Twin for HostStatus {
    type Wire = WireHostStatus;

    fn to_wire(&self) -> WireHostStatus {
        WireHostStatus {
            host: self.host.clone(),
            version: self.version.clone(),
            began_at: self.began_at.to_wire(),
            now: self.now.to_wire(),
            repository: self.repository.clone(),
            repository_error: self.repository_error.to_wire(),
            instances: self.instances.to_wire(),
            peers: self.peers.iter().map(|peer| (peer.name.clone(), peer.address.clone())).collect(),
            groups: self.groups.iter().map(|group| (group.name.clone(), group.members.clone())).collect(),
        }
    }

    fn from_wire(wire: WireHostStatus) -> Result<HostStatus> {
        Ok(HostStatus {
            host: wire.host,
            version: wire.version,
            began_at: Twin::from_wire(wire.began_at)?,
            now: Twin::from_wire(wire.now)?,
            repository: wire.repository,
            repository_error: Twin::from_wire(wire.repository_error)?,
            instances: Twin::from_wire(wire.instances)?,
            peers: wire.peers.into_iter().map(|(name, address)| PeerFacts { name, address }).collect(),
            groups: wire.groups.into_iter().map(|(name, members)| Group { name, members }).collect(),
        })
    }
}

/// The messages of an answer, in order.
pub fn to_wire(answer: &Result<Response>) -> Vec<WireAnswer> {
    let response = match answer {
        Ok(response) => response,
        Err(error) => return vec![WireAnswer::Failed(error.to_wire())],
    };
    vec![match response {
        Response::Done => WireAnswer::Done,
        Response::Hello { host, version, now } => {
            WireAnswer::Hello { host: host.clone(), version: version.clone(), now: now.to_wire() }
        }
        Response::Status(status) => WireAnswer::Status(status.to_wire()),
        Response::Job(job) => WireAnswer::Job(job.to_wire()),
        Response::Window { incarnation, window } => {
            WireAnswer::Window { incarnation: incarnation.to_wire(), window: window.to_wire() }
        }
        Response::Shipped { position, observed_at } => {
            WireAnswer::Shipped { position: position.to_wire(), observed_at: observed_at.to_wire() }
        }
        Response::Body { size_bytes } => WireAnswer::Body { size_bytes: *size_bytes },
        Response::Object(facts) => WireAnswer::Object(facts.to_wire()),
        Response::Stored { tag } => WireAnswer::Stored { tag: tag.clone() },
        Response::Repository(facts) => WireAnswer::Repository(facts.to_wire()),
        Response::RepositoryCost(cost) => WireAnswer::RepositoryCost(cost.to_wire()),
        Response::Links { urls, expires_at, may_end_earlier } => WireAnswer::Links {
            urls: urls.clone(),
            expires_at: expires_at.to_wire(),
            may_end_earlier: *may_end_earlier,
        },
        Response::Checks(items) => return pages(items, WireAnswer::Checks),
        Response::Jobs(items) => return pages(items, WireAnswer::Jobs),
        Response::Backups(items) => return pages(items, WireAnswer::Backups),
        Response::Objects(items) => return pages(items, WireAnswer::Objects),
    }]
}

/// Divides a list so that a page fits into one frame, unless a single item does not.
fn pages<T: Twin>(items: &[T], message: impl Fn(Page<T::Wire>) -> WireAnswer) -> Vec<WireAnswer>
where
    T::Wire: Serialize,
{
    // What is around the items: variant, count and flag.
    const PAGE_BYTES_MAX: usize = FRAME_BYTES_MAX - 32;
    let mut messages = Vec::new();
    let mut page = Page { items: Vec::new(), more: false };
    let mut page_bytes = 0;
    for item in items {
        let wire = item.to_wire();
        let bytes = encoded_bytes(&wire);
        if !page.items.is_empty() && bytes.saturating_add(page_bytes) > PAGE_BYTES_MAX {
            let full = std::mem::replace(&mut page, Page { items: Vec::new(), more: false });
            messages.push(message(Page { more: true, ..full }));
            page_bytes = 0;
        }
        page.items.push(wire);
        page_bytes = page_bytes.saturating_add(bytes);
    }
    messages.push(message(page));
    messages
}

/// One message as a value, and whether more of the same list follow.
pub fn from_wire(wire: WireAnswer) -> Result<(Result<Response>, bool)> {
    let response = match wire {
        WireAnswer::Failed(error) => return Ok((Err(Twin::from_wire(error)?), false)),
        WireAnswer::Checks(page) => return Ok((Ok(Response::Checks(Twin::from_wire(page.items)?)), page.more)),
        WireAnswer::Jobs(page) => return Ok((Ok(Response::Jobs(Twin::from_wire(page.items)?)), page.more)),
        WireAnswer::Backups(page) => return Ok((Ok(Response::Backups(Twin::from_wire(page.items)?)), page.more)),
        WireAnswer::Objects(page) => return Ok((Ok(Response::Objects(Twin::from_wire(page.items)?)), page.more)),
        WireAnswer::Done => Response::Done,
        WireAnswer::Hello { host, version, now } => Response::Hello { host, version, now: Twin::from_wire(now)? },
        WireAnswer::Status(status) => Response::Status(Twin::from_wire(status)?),
        WireAnswer::Job(job) => Response::Job(Twin::from_wire(job)?),
        WireAnswer::Window { incarnation, window } => {
            Response::Window { incarnation: Twin::from_wire(incarnation)?, window: Twin::from_wire(window)? }
        }
        WireAnswer::Shipped { position, observed_at } => {
            Response::Shipped { position: Twin::from_wire(position)?, observed_at: Twin::from_wire(observed_at)? }
        }
        WireAnswer::Body { size_bytes } => Response::Body { size_bytes },
        WireAnswer::Object(facts) => Response::Object(Twin::from_wire(facts)?),
        WireAnswer::Stored { tag } => Response::Stored { tag },
        WireAnswer::Repository(facts) => Response::Repository(Twin::from_wire(facts)?),
        WireAnswer::RepositoryCost(cost) => Response::RepositoryCost(Twin::from_wire(cost)?),
        WireAnswer::Links { urls, expires_at, may_end_earlier } => {
            Response::Links { urls, expires_at: Twin::from_wire(expires_at)?, may_end_earlier }
        }
    };
    Ok((Ok(response), false))
}

/// A list and its next items.
pub fn join(so_far: Response, next: Response) -> Result<Response> {
    match (so_far, next) {
        (Response::Checks(all), Response::Checks(next)) => Ok(Response::Checks(both(all, next))),
        (Response::Jobs(all), Response::Jobs(next)) => Ok(Response::Jobs(both(all, next))),
        (Response::Backups(all), Response::Backups(next)) => Ok(Response::Backups(both(all, next))),
        (Response::Objects(all), Response::Objects(next)) => Ok(Response::Objects(both(all, next))),
        _ => Err(Error::new(Kind::Damaged, "the answer began as one list and went on as something else")),
    }
}

fn both<T>(mut all: Vec<T>, next: Vec<T>) -> Vec<T> {
    all.extend(next);
    all
}
