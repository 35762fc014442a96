//! What an agent can be asked, as values. `wire` gives them bytes; `access` says who may ask what.

use std::ops::Range;

use jiff::Timestamp;

use crate::error::Error;
use crate::model::backup::Backup;
use crate::model::check::CheckItem;
use crate::model::cost::{Prices, Reading};
use crate::model::group::Group;
use crate::model::id::{IncarnationId, JobId, RepositoryId};
use crate::model::inventory::Inventory;
use crate::model::job::{JobReport, Order};
use crate::model::password::Passwords;
use crate::model::position::Position;
use crate::model::window::Window;

/// Everything that can be asked. Closed: a peer that asks anything else is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Who are you? Answered with `Hello`.
    Hello,
    /// Answered with `Status`.
    Status,
    /// Answered with `Checks`.
    Doctor,
    /// Record an order and begin it; the same order again is answered with the job as it stands. `Job`.
    Submit {
        order: Order,
        /// Of the accounts that the order names, and of no others.
        passwords: Passwords,
    },
    /// Only the check list of a clone order, nothing is recorded. Answered with `Checks`.
    Check {
        order: Order,
    },
    /// Answered with `Jobs`, newest first.
    ListJobs,
    ShowJob {
        id: JobId,
    },
    CancelJob {
        id: JobId,
    },
    /// Goes on with a failed or interrupted job from its last complete step.
    ResumeJob {
        id: JobId,
    },
    /// Opens a quarantined clone. Answered with `Job`: the clone's own job goes on.
    Accept {
        clone: String,
    },
    /// Deletes a quarantined clone and its directory. Answered with `Job`.
    Discard {
        clone: String,
    },
    /// Answered with `Backups`.
    ListBackups {
        instance: String,
    },
    /// Answered with `Window`.
    ShowWindow {
        instance: String,
    },
    /// Ship everything that is durable now, the open file too, and say how far that is. Answered with `Shipped`.
    ShipNow {
        incarnation: IncarnationId,
    },
    /// Initialise the configured repository. Local only. Answered with `Done`.
    InitRepository,
    /// What the repository is and holds, by a listing of all of it. Answered with `Repository`.
    ShowRepository,
    /// What this agent asks of its repository, and what that costs. Answered with `RepositoryCost`.
    ShowCost,
    /// PostgreSQL asks whether a segment is safe. Local only; answered with `Done` when it is durable.
    PushLog {
        data_dir: String,
        file: String,
    },
    /// Ask the agent of this peer instead, in the name of this host. Local only.
    Forward {
        host: String,
        request: Box<Request>,
    },
    /// Read access to this agent's repository for a host that has none. The bytes follow as the body.
    GetObject {
        key: String,
        range: Option<Range<u64>>,
    },
    HeadObject {
        key: String,
    },
    ListObjects {
        prefix: String,
        after: Option<String>,
        limit: u32,
    },
    /// Write access, below incarnations that belong to the caller's host only; the bytes come as the body.
    PutObject {
        key: String,
        condition: PutWhen,
    },
    DeleteObjects {
        keys: Vec<String>,
    },
    /// Addresses of objects that work without credentials for so long. Answered with `Links`.
    LinkObjects {
        keys: Vec<String>,
        valid_for_seconds: u64,
    },
}

/// `store::PutCondition` in terms of the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutWhen {
    Create,
    Replace,
    IfMatch(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    Done,
    Hello {
        host: String,
        version: String,
        now: Timestamp,
    },
    Status(HostStatus),
    Checks(Vec<CheckItem>),
    Job(JobReport),
    Jobs(Vec<JobReport>),
    Backups(Vec<Backup>),
    Window {
        incarnation: IncarnationId,
        window: Window,
    },
    Shipped {
        position: Position,
        observed_at: Timestamp,
    },
    /// A body of exactly this many bytes follows.
    Body {
        size_bytes: u64,
    },
    Object(Option<ObjectFacts>),
    Objects(Vec<ObjectFacts>),
    Stored {
        tag: String,
    },
    Repository(RepositoryFacts),
    RepositoryCost(RepositoryCost),
    /// One address for each key that was named.
    Links {
        urls: Vec<String>,
        expires_at: Timestamp,
        may_end_earlier: bool,
    },
}

/// A repository as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryFacts {
    pub url: String,
    pub id: RepositoryId,
    pub format_version: u16,
    pub created_at: Timestamp,
    /// What was found out about the store when the repository was begun, as names and values.
    pub capabilities: Vec<(String, String)>,
    pub inventory: Inventory,
}

/// What an agent asks of its repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryCost {
    pub repository: String,
    pub reading: Reading,
    /// By the manifests of all backups and the catalogues of all logs: garbage of failed backups is not in it.
    pub stored_bytes: u64,
    /// Nothing if the configuration of the agent names none.
    pub prices: Option<Prices>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectFacts {
    pub key: String,
    pub size_bytes: u64,
    pub tag: String,
}

/// What `keiki status` shows of one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostStatus {
    pub host: String,
    pub version: String,
    pub began_at: Timestamp,
    pub now: Timestamp,
    pub repository: String,
    /// Why the repository cannot be used now, if so.
    pub repository_error: Option<Error>,
    pub instances: Vec<InstanceStatus>,
    pub peers: Vec<PeerFacts>,
    /// The groups of the configuration of that host.
    pub groups: Vec<Group>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerFacts {
    pub name: String,
    pub address: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceStatus {
    pub name: String,
    pub engine: String,
    pub engine_version: Option<String>,
    pub data_dir: String,
    pub port: u16,
    pub state: InstanceState,
    pub incarnation: Option<IncarnationId>,
    /// How far the repository has it, and how far the server is.
    pub shipped: Option<Position>,
    pub durable: Option<Position>,
    /// When the server was last looked at.
    pub durable_at: Option<Timestamp>,
    pub backlog_bytes: u64,
    /// Age of the oldest change that is not in the repository, 0 if there is none.
    pub backlog_seconds: u64,
    pub last_backup: Option<(String, Timestamp)>,
    /// What is wrong now.
    pub problem: Option<Error>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstanceState {
    /// Being looked at for the first time.
    Starting,
    Archiving,
    /// Trying again after a failure; `problem` says which.
    Retrying,
    /// Stopped for good until somebody acts: fenced, conflict. `problem` says why.
    Stopped,
    /// A clone that waits for accept or discard.
    Quarantine,
    /// The server is not running.
    Down,
}
