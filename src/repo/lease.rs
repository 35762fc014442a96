//! Who may archive an incarnation: one run of one agent at a time.
//!
//! The lease is an object that is only ever replaced by compare-and-swap. A holder is never outwaited: time alone
//! proves nothing about a machine that cannot be seen. The lease changes hands only if the old holder is known to be
//! gone (its process has ended, its machine has started again) or has released it. A holder that finds somebody else's
//! lease stops for good; the epoch, which grows with each change of hands, tells people in which order it happened.
//! A record that names the holder itself, but that it has not written, was written by a copy of it: of a virtual machine
//! that was copied or set back with its memory. It counts as somebody else's.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};

use crate::base::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::format::document::{DOCUMENT_BYTES_MAX, LeaseRecord};
use crate::format::layout;
use crate::model::id::IncarnationId;
use crate::model::incarnation::{Lease, LeaseHolder};
use crate::model::position::Position;
use crate::model::target::utc_text;
use crate::repo::objects::object_key;
use crate::repo::repository::Repository;
use crate::store::read::get_optional;
use crate::store::{Key, PutCondition, Tag};

/// How often a race for the lease is run again before it is called one.
const ATTEMPTS: usize = 5;

const COPY_HINT: &str = "was this machine copied or set back while the agent was running? The copy archives the same \
     instance: stop one of the two, give it another /etc/machine-id and remove the state of its agent. If there is no other \
     any more, restart this agent";

/// What somebody who wants the lease may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// There is none yet.
    Create,
    /// It is held by this very run.
    Renew,
    /// The holder is gone.
    TakeOver,
}

/// Whether `me` may have the lease. Pure. `is_alive` says whether the holder's process runs, if it ran on this machine
/// since it started; otherwise it does not matter.
///
/// `ttl` is for one case: a machine with the same id but another start. After a reboot the old start has stopped
/// renewing; but a virtual machine that was copied has the same id too, and its original goes on renewing. So such a
/// lease is taken only when it was not renewed for `ttl`; until then the error is temporary.
pub fn may_take(
    current: Option<&Lease>,
    me: &LeaseHolder,
    now: Timestamp,
    ttl: Duration,
    is_alive: bool,
) -> Result<Decision> {
    let Some(current) = current else { return Ok(Decision::Create) };
    let holder = &current.holder;
    if holder.run == me.run && holder.machine_id == me.machine_id && holder.boot_id == me.boot_id {
        return Ok(Decision::Renew);
    }
    let held = format!(
        "host '{}' holds it (process {}, renewed {})",
        holder.host,
        holder.process_id,
        utc_text(current.renewed_at)
    );
    if holder.machine_id != me.machine_id {
        return Err(Error::new(Kind::Fenced, held).hint(format!(
            "was 'state_dir' copied from host '{}'? Remove the copy here, so that a new incarnation begins; the archive \
             of the other host stays as it is",
            holder.host
        )));
    }
    if holder.boot_id != me.boot_id {
        let quiet_for = now.duration_since(current.renewed_at);
        if quiet_for > SignedDuration::try_from(ttl).unwrap_or(SignedDuration::MAX) {
            return Ok(Decision::TakeOver);
        }
        return Err(Error::new(Kind::Unreachable, format!("{held}, on a machine with the same id")).hint(format!(
            "after a restart of this machine it is free {} s after the last renewal; if it goes on being renewed, this \
             machine is a copy: give it another /etc/machine-id and remove the copied state of the agent",
            ttl.as_secs()
        )));
    }
    if is_alive && (holder.process_id, holder.process_start_ticks) == (me.process_id, me.process_start_ticks) {
        // Another run of this very process: this one has lost the lease to its copy.
        return Err(Error::new(Kind::Fenced, held).hint(COPY_HINT));
    }
    if is_alive {
        return Err(Error::new(Kind::Fenced, held).hint(format!(
            "is a second agent running on this machine? Process {} archives this instance already",
            holder.process_id
        )));
    }
    Ok(Decision::TakeOver)
}

/// The lease of an incarnation as anybody may read it, or nothing if it was never held.
pub async fn read_lease(repo: &Repository, incarnation: IncarnationId) -> Result<Option<Lease>> {
    let key = object_key(layout::lease_key(incarnation))?;
    let bytes = get_optional(repo.store().as_ref(), &key, DOCUMENT_BYTES_MAX as u64).await?;
    bytes.map(|bytes| LeaseRecord::parse(key.as_str(), &bytes).map(|record| record.lease)).transpose()
}

/// A held lease. Every writer of the incarnation asks it before publishing.
pub struct LeaseKeeper {
    repo: Arc<Repository>,
    incarnation: IncarnationId,
    key: Key,
    holder: LeaseHolder,
    clock: Arc<dyn Clock>,
    ttl: Duration,
    /// Locked for the whole of a renewal, so that renewals cannot overtake each other.
    stored: tokio::sync::Mutex<Stored>,
    local: Mutex<Local>,
}

/// What the object was when it was written last.
struct Stored {
    tag: Tag,
    lease: Lease,
    /// When the renewals were begun whose answers did not come since: each of them may be what is stored.
    unanswered: Vec<Timestamp>,
}

/// More renewals without an answer are not remembered: those of about a day.
const UNANSWERED_MAX: usize = 10_000;

impl Stored {
    /// A renewal is about to be sent.
    fn expect(&mut self, renewed_at: Timestamp) {
        if self.unanswered.len() >= UNANSWERED_MAX {
            // What was stored is most likely one of the first, when the answers ceased to come, or of the last.
            self.unanswered.remove(UNANSWERED_MAX / 2);
        }
        self.unanswered.push(renewed_at);
    }

    /// Whether this run has sent a record.
    fn is_ours(&self, found: &Lease) -> bool {
        let lease = &self.lease;
        let is_same_run = (&found.holder, found.epoch) == (&lease.holder, lease.epoch);
        // Written records keep nanoseconds, as the clock does: a copy of this run writes other moments.
        is_same_run && (found.renewed_at == lease.renewed_at || self.unanswered.contains(&found.renewed_at))
    }
}

/// What `check` looks at.
struct Local {
    lost: Option<Error>,
    is_lost_to_copy: bool,
    /// By this process's clock, before the request was sent.
    renewed_at: Timestamp,
}

impl LeaseKeeper {
    /// Takes the lease of `incarnation` for `me`, or says who has it: `Fenced` if that will not change by itself.
    /// `ttl` is how long the holder goes on publishing without a renewal that succeeded.
    pub async fn acquire(
        repo: Arc<Repository>,
        incarnation: IncarnationId,
        me: LeaseHolder,
        clock: Arc<dyn Clock>,
        ttl: Duration,
        is_alive: impl Fn(&LeaseHolder) -> bool + Send + Sync,
    ) -> Result<Arc<LeaseKeeper>> {
        let key = object_key(layout::lease_key(incarnation))?;
        let what = || format!("cannot archive incarnation '{incarnation}'");
        for _ in 0..ATTEMPTS {
            let found = read_with_tag(&repo, &key).await?;
            let now = clock.now();
            let current = found.as_ref().filter(|(record, _)| !record.released).map(|(record, _)| &record.lease);
            let decision = may_take(current, &me, now, ttl, current.is_some_and(|lease| is_alive(&lease.holder)))
                .map_err(|error| error.while_doing(what()))?;
            let before = found.as_ref().map(|(record, _)| &record.lease);
            let epoch = match (decision, before) {
                (Decision::Renew, Some(lease)) => lease.epoch,
                (_, Some(lease)) => lease.epoch.saturating_add(1),
                (_, None) => 1,
            };
            let lease =
                Lease { epoch, holder: me.clone(), renewed_at: now, covered: before.and_then(|lease| lease.covered) };
            let condition = found.map_or(PutCondition::Create, |(_, tag)| PutCondition::IfMatch(tag));
            match put(&repo, &key, &lease, false, condition).await {
                Ok(tag) => {
                    let stored = tokio::sync::Mutex::new(Stored { tag, lease, unanswered: Vec::new() });
                    let local = Mutex::new(Local { lost: None, is_lost_to_copy: false, renewed_at: now });
                    return Ok(Arc::new(LeaseKeeper { repo, incarnation, key, holder: me, clock, ttl, stored, local }));
                }
                // Somebody was faster: look again who it is.
                Err(error) if error.kind() == Kind::Conflict => {}
                Err(error) => return Err(error.while_doing(what())),
            }
        }
        Err(Error::new(Kind::Unreachable, format!("{}: its lease changes all the time", what()))
            .hint("are several agents started for this instance?"))
    }

    pub fn incarnation(&self) -> IncarnationId {
        self.incarnation
    }

    /// Renews the lease and records how far the repository covers the log; `None` leaves that as it was. `Fenced` means
    /// that somebody else has the lease now, for ever.
    pub async fn renew(&self, covered: Option<(Position, Timestamp)>) -> Result<()> {
        let mut stored = self.stored.lock().await;
        self.not_lost()?;
        let now = self.clock.now();
        let lease = Lease { renewed_at: now, covered: covered.or(stored.lease.covered), ..stored.lease.clone() };
        self.replace(&mut stored, lease, false).await?;
        self.lock_local().renewed_at = now;
        Ok(())
    }

    /// Gives the lease up for good, so that any agent with the incarnation's identity may take it: for an instance that
    /// leaves the configuration. An agent that merely stops keeps its lease: the next run on the same machine may take
    /// it, and nobody else.
    pub async fn release(&self) -> Result<()> {
        let mut stored = self.stored.lock().await;
        self.not_lost()?;
        let lease = Lease { renewed_at: self.clock.now(), ..stored.lease.clone() };
        self.replace(&mut stored, lease, true).await?;
        let reason = format!("the lease of incarnation '{}' was released", self.incarnation);
        self.lock_local().lost = Some(Error::new(Kind::Fenced, reason));
        Ok(())
    }

    async fn replace(&self, stored: &mut Stored, lease: Lease, released: bool) -> Result<()> {
        // Before it is sent: whoever waits for the answer may be dropped.
        stored.expect(lease.renewed_at);
        for _ in 0..ATTEMPTS {
            let condition = PutCondition::IfMatch(stored.tag.clone());
            let error = match put(&self.repo, &self.key, &lease, released, condition).await {
                Ok(tag) => {
                    *stored = Stored { tag, lease, unanswered: Vec::new() };
                    return Ok(());
                }
                Err(error) => error,
            };
            if !matches!(error.kind(), Kind::Conflict | Kind::NotFound) {
                return Err(error.while_doing(format!("cannot renew the lease of '{}'", self.incarnation)));
            }
            match read_with_tag(&self.repo, &self.key).await? {
                // Written by this run: the answer to an earlier renewal was lost on the way.
                Some((record, tag)) if stored.is_ours(&record.lease) => stored.tag = tag,
                other => return Err(self.lose(other.map(|(record, _)| record.lease))),
            }
        }
        Err(Error::new(
            Kind::Unreachable,
            format!("cannot renew the lease of '{}': it changes all the time", self.incarnation),
        ))
    }

    /// Remembers that the lease is lost, and says to whom.
    fn lose(&self, to: Option<Lease>) -> Error {
        let what = format!("the lease of incarnation '{}' was lost", self.incarnation);
        let is_lost_to_copy = to.as_ref().is_some_and(|lease| lease.holder == self.holder);
        let error = match to {
            Some(lease) if is_lost_to_copy => Error::new(
                Kind::Fenced,
                format!("{what}: it was renewed at {}, but not by this process", utc_text(lease.renewed_at)),
            )
            .hint(COPY_HINT),
            Some(lease) => Error::new(
                Kind::Fenced,
                format!(
                    "{what}: host '{}' has it since epoch {} (process {})",
                    lease.holder.host, lease.epoch, lease.holder.process_id
                ),
            )
            .hint("two agents archive the same instance: stop one of them; this one has stopped"),
            None => Error::new(Kind::Fenced, format!("{what}: its object is gone"))
                .hint("was the archive deleted while the agent was running? Restart the agent to take a new lease"),
        };
        let mut local = self.lock_local();
        (local.lost, local.is_lost_to_copy) = (Some(error.clone()), is_lost_to_copy);
        error
    }

    /// Whether this run may publish now. Cheap, asks nobody: the lease was not found lost, and the last renewal is not
    /// older than the ttl; one that far in the future says nothing, because the clock was set back. Both are
    /// `Unreachable`, because the next renewal may succeed.
    pub fn check(&self) -> Result<()> {
        self.not_lost()?;
        let renewed_at = self.lock_local().renewed_at;
        let age = self.clock.now().duration_since(renewed_at);
        if age.unsigned_abs() > self.ttl {
            return Err(Error::new(
                Kind::Unreachable,
                format!(
                    "the lease of incarnation '{}' was not renewed since {}",
                    self.incarnation,
                    utc_text(renewed_at)
                ),
            ));
        }
        Ok(())
    }

    /// Whether a copy of this process has the lease now. Who then wants it must be another run, or takes it back from the
    /// copy, which takes it back, and so on.
    pub fn is_lost_to_copy(&self) -> bool {
        self.lock_local().is_lost_to_copy
    }

    pub async fn epoch(&self) -> u64 {
        self.stored.lock().await.lease.epoch
    }

    /// How far the repository covers the log, as recorded last.
    pub async fn covered(&self) -> Option<(Position, Timestamp)> {
        self.stored.lock().await.lease.covered
    }

    fn not_lost(&self) -> Result<()> {
        self.lock_local().lost.clone().map_or(Ok(()), Err)
    }

    fn lock_local(&self) -> std::sync::MutexGuard<'_, Local> {
        // Held for assignments only, which cannot panic.
        self.local.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The record and a tag that is not newer than it: if it changed in between, a put with the tag fails.
async fn read_with_tag(repo: &Repository, key: &Key) -> Result<Option<(LeaseRecord, Tag)>> {
    let Some(info) = repo.store().head(key).await? else { return Ok(None) };
    let Some(bytes) = get_optional(repo.store().as_ref(), key, DOCUMENT_BYTES_MAX as u64).await? else {
        return Ok(None);
    };
    Ok(Some((LeaseRecord::parse(key.as_str(), &bytes)?, info.tag)))
}

async fn put(repo: &Repository, key: &Key, lease: &Lease, released: bool, condition: PutCondition) -> Result<Tag> {
    let record = LeaseRecord { lease: lease.clone(), released };
    repo.store().put(key, Bytes::from(record.to_bytes()?), condition).await
}

#[cfg(test)]
mod tests;
