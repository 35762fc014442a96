//! Who may ask what: pure decisions on a caller, a request and the rules of the configuration.
//!
//! * Root, the user who runs the agent and the group `keiki` of its own host may do everything. Other users of the
//!   host may only ask whether a log segment is safe, which is what a database server does.
//! * Over the network nothing is allowed but what a rule allows, except to ask an agent for its name.
//! * Some requests are for the host itself only, whatever the rules say.
//! * Nobody writes into the archive of an incarnation that belongs to another host, whatever the rules say.

use std::fmt;

use crate::error::{Error, Kind, Result};
use crate::format::layout::INCARNATIONS_PREFIX;
use crate::model::id::IncarnationId;
use crate::model::incarnation::Incarnation;
use crate::model::job::Task;
use crate::peer::api::Request;

/// Who asks, as authenticated by the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A process on this host, by its credentials at the control socket.
    Local {
        uid: u32,
        name: String,
        /// Root, the user of the agent, or a member of the group `keiki`.
        is_admin: bool,
    },
    /// An agent, or whoever else has its certificate.
    Host(String),
    /// A person with a certificate.
    Operator(String),
}

impl fmt::Display for Caller {
    /// As orders and rules write it: `local:root`, `host:a`, `operator:ann`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Caller::Local { name, .. } => write!(f, "local:{name}"),
            Caller::Host(name) => write!(f, "host:{name}"),
            Caller::Operator(name) => write!(f, "operator:{name}"),
        }
    }
}

/// One thing that an `[[allow]]` rule can permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Permission {
    /// See what runs here, jobs, backups and windows.
    Status,
    /// Order a backup of an instance.
    Backup,
    /// Order a clone of an instance onto this host, or its check list.
    Clone,
    /// Open a quarantined clone.
    Accept,
    /// Delete a quarantined clone.
    Discard,
    /// Cancel and resume jobs.
    Job,
    /// Ask for what is durable now to be shipped.
    Ship,
    /// Read the repository through this agent.
    ReadRepository,
    /// Write to the repository through this agent, below incarnations of the caller's own host.
    WriteRepository,
}

impl Permission {
    const NAMES: &'static [(Permission, &'static str)] = &[
        (Permission::Status, "status"),
        (Permission::Backup, "backup"),
        (Permission::Clone, "clone"),
        (Permission::Accept, "accept"),
        (Permission::Discard, "discard"),
        (Permission::Job, "job"),
        (Permission::Ship, "ship"),
        (Permission::ReadRepository, "read-repository"),
        (Permission::WriteRepository, "write-repository"),
    ];

    /// The word of the configuration.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|row| row.0 == self).map_or("unknown", |row| row.1)
    }

    /// The permission with this name.
    pub fn from_name(name: &str) -> Option<Permission> {
        Self::NAMES.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// All permissions, which the configuration writes as `*`.
    pub fn all() -> Vec<Permission> {
        Self::NAMES.iter().map(|row| row.0).collect()
    }

    /// All words of the configuration, in the order of the manual.
    pub fn names() -> Vec<&'static str> {
        Self::NAMES.iter().map(|row| row.1).collect()
    }
}

/// One `[[allow]]` of the configuration. In patterns `*` stands for any number of characters, `?` for one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowRule {
    /// `operator:PATTERN` or `host:PATTERN`.
    pub who: String,
    pub may: Vec<Permission>,
    /// Patterns of instance names.
    pub instances: Vec<String>,
}

/// Checks the form of a rule's `who`: `operator:PATTERN` or `host:PATTERN`.
pub fn check_who(who: &str) -> Result<()> {
    let good = |pattern: &str| {
        !pattern.is_empty()
            && pattern.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'*' | b'?'))
    };
    match who.split_once(':') {
        Some(("operator" | "host", pattern)) if good(pattern) => Ok(()),
        _ => Err(Error::new(Kind::BadInput, format!("'{who}' does not say who may"))
            .hint("write 'operator:NAME' or 'host:NAME' as in the certificates; '*' stands for any name")),
    }
}

/// Whether `text` fits `pattern`, in which `*` stands for any number of characters and `?` for one. Takes time
/// proportional to the product of the lengths at worst, whatever the pattern.
pub fn matches_pattern(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut pattern_at, mut text_at) = (0, 0);
    // Where to go on after the last star swallowed one more character.
    let mut retry: Option<(usize, usize)> = None;
    while text_at < text.len() {
        match pattern.get(pattern_at) {
            Some(b'*') => {
                retry = Some((pattern_at + 1, text_at));
                pattern_at += 1;
            }
            Some(letter) if *letter == b'?' || *letter == text[text_at] => {
                pattern_at += 1;
                text_at += 1;
            }
            _ => match retry {
                Some((after_star, swallowed)) => {
                    retry = Some((after_star, swallowed + 1));
                    pattern_at = after_star;
                    text_at = swallowed + 1;
                }
                None => return false,
            },
        }
    }
    pattern[pattern_at..].iter().all(|letter| *letter == b'*')
}

/// What a request needs.
enum Need<'r> {
    /// To be anybody with a good certificate.
    Acquaintance,
    /// To be on this host, in its group of administrators.
    LocalAdmin,
    /// To be on this host.
    Local,
    /// Rules, for each of the named instances where there are any.
    Rule(Permission, Vec<&'r str>),
}

/// One permission, for an instance where there is one, and what asking for it is called in a refusal.
fn rule<'r>(permission: Permission, instance: Option<&'r String>, what: &'static str) -> (Need<'r>, &'static str) {
    (Need::Rule(permission, instance.map(String::as_str).into_iter().collect()), what)
}

/// What each request needs, and what it is called in a refusal.
fn need(request: &Request) -> (Need<'_>, &'static str) {
    match request {
        Request::Hello => (Need::Acquaintance, "ask for its name"),
        Request::Status => rule(Permission::Status, None, "see the status"),
        Request::Doctor => rule(Permission::Status, None, "run the checks"),
        Request::ListJobs => rule(Permission::Status, None, "see the jobs"),
        Request::ShowJob { .. } => rule(Permission::Status, None, "see a job"),
        Request::ListBackups { instance } => rule(Permission::Status, Some(instance), "see the backups"),
        Request::ShowWindow { instance } => rule(Permission::Status, Some(instance), "see the window"),
        Request::Submit { order, .. } | Request::Check { order } => match &order.task {
            Task::Backup { instance, .. } => rule(Permission::Backup, Some(instance), "order a backup"),
            Task::Clone(clone) => rule(Permission::Clone, Some(&clone.source), "order a clone"),
            Task::CloneGroup(group) => {
                let sources = group.sources.iter().map(String::as_str).collect();
                (Need::Rule(Permission::Clone, sources), "order a clone")
            }
        },
        Request::CancelJob { .. } => rule(Permission::Job, None, "cancel a job"),
        Request::ResumeJob { .. } => rule(Permission::Job, None, "resume a job"),
        Request::Accept { clone } => rule(Permission::Accept, Some(clone), "accept a clone"),
        Request::Discard { clone } => rule(Permission::Discard, Some(clone), "discard a clone"),
        Request::ShipNow { .. } => rule(Permission::Ship, None, "have the log shipped"),
        Request::ShowRepository => rule(Permission::Status, None, "see what the repository holds"),
        Request::ShowCost => rule(Permission::Status, None, "see what the repository costs"),
        Request::InitRepository => (Need::LocalAdmin, "initialise the repository"),
        Request::PushLog { .. } => (Need::Local, "ask for a segment of the log"),
        Request::Forward { .. } => (Need::LocalAdmin, "have a request forwarded"),
        Request::GetObject { .. } | Request::HeadObject { .. } | Request::ListObjects { .. } => {
            rule(Permission::ReadRepository, None, "read the repository")
        }
        Request::LinkObjects { .. } => rule(Permission::ReadRepository, None, "have links made to the repository"),
        Request::PutObject { .. } | Request::DeleteObjects { .. } => {
            rule(Permission::WriteRepository, None, "write to the repository")
        }
    }
}

/// Whether the caller may ask this. The refusal says what would allow it.
pub fn decide(caller: &Caller, request: &Request, rules: &[AllowRule]) -> Result<()> {
    let (need, what) = need(request);
    match (caller, need) {
        (Caller::Local { is_admin: true, .. }, _) => Ok(()),
        (Caller::Local { .. }, Need::Acquaintance | Need::Local) => Ok(()),
        (Caller::Local { name, .. }, _) => {
            Err(Error::new(Kind::Forbidden, format!("user '{name}' may not {what} on this host"))
                .hint(format!("run it as root, or add the user to the group: usermod -aG keiki {name}")))
        }
        (Caller::Host(_) | Caller::Operator(_), Need::Acquaintance) => Ok(()),
        (Caller::Host(_) | Caller::Operator(_), Need::Local | Need::LocalAdmin) => {
            Err(Error::new(Kind::Forbidden, format!("'{caller}' may not {what} from another host"))
                .hint("this can be done on the host itself only"))
        }
        (Caller::Host(_) | Caller::Operator(_), Need::Rule(permission, instances)) => {
            let is_allowed = |instance| rules.iter().any(|rule| allows(rule, caller, permission, instance));
            if instances.is_empty() && !is_allowed(None) {
                return Err(refusal(caller, permission, None, what));
            }
            match instances.into_iter().find(|instance| !is_allowed(Some(*instance))) {
                Some(refused) => Err(refusal(caller, permission, Some(refused), what)),
                None => Ok(()),
            }
        }
    }
}

fn allows(rule: &AllowRule, caller: &Caller, permission: Permission, instance: Option<&str>) -> bool {
    let instance_fits = |pattern: &String| match instance {
        None => true,
        Some(instance) => {
            // `a/orders` is the instance 'orders' as it is called on host 'a'.
            let name = instance.rsplit('/').next().unwrap_or(instance);
            matches_pattern(pattern, name)
        }
    };
    rule.may.contains(&permission)
        && matches_pattern(&rule.who, &caller.to_string())
        && rule.instances.iter().any(instance_fits)
}

fn refusal(caller: &Caller, permission: Permission, instance: Option<&str>, what: &str) -> Error {
    let mut lines = format!("[[allow]]\nwho = \"{caller}\"\nmay = [\"{}\"]", permission.name());
    let mut of_instance = String::new();
    if let Some(instance) = instance {
        let name = instance.rsplit('/').next().unwrap_or(instance);
        lines.push_str(&format!("\ninstances = [\"{}\"]", name.escape_default()));
        of_instance = format!(" of '{}'", instance.escape_default());
    }
    Error::new(Kind::Forbidden, format!("'{caller}' may not {what}{of_instance} on this host"))
        .hint(format!("to allow it, add to the configuration of that host:\n{lines}"))
}

/// Whether the caller may write or remove the object with this key. `identity` is the identity document of the
/// incarnation that the key belongs to: the stored one, or the one that is about to be stored under this very key.
/// Rules cannot widen this: a host writes below its own incarnations and nowhere else.
pub fn may_write(caller: &Caller, key: &str, identity: Option<&Incarnation>) -> Result<()> {
    let refuse = |why: &str| {
        Err(Error::new(Kind::Forbidden, format!("'{caller}' may not write '{}': {why}", key.escape_default()))
            .hint("through another agent a host can write to the archives of its own instances only"))
    };
    let host = match caller {
        Caller::Local { is_admin: true, .. } => return Ok(()),
        Caller::Host(host) => host,
        Caller::Local { .. } | Caller::Operator(_) => return refuse("only hosts have archives"),
    };
    let owner = key.strip_prefix(INCARNATIONS_PREFIX).and_then(|rest| rest.split_once('/'));
    let Some(id) = owner.filter(|(_, rest)| !rest.is_empty()).and_then(|(id, _)| IncarnationId::parse(id).ok()) else {
        return refuse("it belongs to no incarnation");
    };
    match identity {
        None => refuse("its incarnation does not exist"),
        Some(identity) if identity.id != id => refuse("the identity is that of another incarnation"),
        Some(identity) if identity.host != *host => refuse(&format!("it belongs to host '{}'", identity.host)),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
