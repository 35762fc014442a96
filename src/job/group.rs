//! Growing a group: clones of several instances to one moment, accepted or discarded as one.
//!
//! The group is a job, and each member's clone is a job of its own whose order follows from that of the group, so that
//! giving it again after a crash is harmless. Invariants: no member begins before the check lists of all have passed;
//! every member is held, closed, until all are ready; once the step `accept` is begun, which the journal says first, all
//! are opened, whatever dies in between. A member is decided about by its group only.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::future::select_all;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::engine::{TiedMember, Ties};
use crate::error::{Error, Kind, Result};
use crate::job::clone::{CloneHost, remove_accepted, serving_site};
use crate::job::step::cancelled;
use crate::job::{JobRunner, Restart, StepContext, StepPlan, UndoCause, Work};
use crate::model::bytes_text::human_bytes;
use crate::model::check::CheckItem;
use crate::model::engine_kind::EngineKind;
use crate::model::group::{GroupOrder, TIE_PREFIX, member_ids, member_order};
use crate::model::id::JobId;
use crate::model::job::{CloneOrder, JobReport, JobState, Order, ProgressUnit, StepState};
use crate::model::target::{Target, utc_text};

mod check;

const CLAIM: &str = "claim";
const CHECK: &str = "check";
const GROW: &str = "grow";
const ACCEPT: &str = "accept";

/// What steps leave for later ones in the job's journal. Those of a member have its number behind a dot.
mod facts {
    /// The moment that all members show, in RFC 3339.
    pub const TIME: &str = "time";
    /// Host and instance, so that a name cannot begin to mean another one.
    pub const SOURCE: &str = "source";
    pub const ENGINE: &str = "engine";
    pub const PORT: &str = "port";

    pub fn of(fact: &str, member: usize) -> String {
        format!("{fact}.{member}")
    }
}

/// One member, once it is known what its source is and where its clone goes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    /// `host/instance`.
    source: String,
    clone_name: String,
    engine: EngineKind,
    port: u16,
}

impl Member {
    fn order(&self, at: Timestamp, ties: Ties) -> CloneOrder {
        CloneOrder {
            source: self.source.clone(),
            clone_name: self.clone_name.clone(),
            target: Target::Time(at),
            data_dir: None,
            port: Some(self.port),
            settings: BTreeMap::new(),
            hold: true,
            passwords_for: Default::default(),
            keep_expired: false,
            ties,
        }
    }
}

/// One order of a group.
pub struct GroupWork {
    host: Arc<CloneHost>,
    /// Where the members' own jobs run.
    runner: JobRunner,
    order: GroupOrder,
}

impl GroupWork {
    /// Refuses orders that cannot be meant.
    pub fn new(host: Arc<CloneHost>, runner: JobRunner, order: GroupOrder) -> Result<GroupWork> {
        order.check()?;
        Ok(GroupWork { host, runner, order })
    }

    /// The check lists of all members, for `--check`. Nothing is reserved or touched.
    pub async fn check_only(&self) -> Result<Vec<CheckItem>> {
        let members = self.find_members().await?;
        Ok(check::check(self, &members, &[]).await?.items)
    }

    /// Chooses a port for each member, so that every later step, also after a restart, speaks of the same.
    async fn claim(&self, context: &StepContext) -> Result<()> {
        context.result("target", self.order.target.to_string());
        for (index, member) in self.find_members().await?.iter().enumerate() {
            context.record(&facts::of(facts::SOURCE, index), member.source.clone()).await?;
            context.record(&facts::of(facts::ENGINE, index), member.engine.name()).await?;
            context.record(&facts::of(facts::PORT, index), member.port.to_string()).await?;
        }
        Ok(())
    }

    /// The members as they were claimed.
    fn members(&self, context: &StepContext) -> Result<Vec<Member>> {
        let member = |(index, clone_name)| {
            let port = context.need_fact(&facts::of(facts::PORT, index))?;
            Ok(Member {
                source: context.need_fact(&facts::of(facts::SOURCE, index))?,
                clone_name,
                engine: EngineKind::parse(&context.need_fact(&facts::of(facts::ENGINE, index))?)?,
                port: port.parse().map_err(|_| Error::new(Kind::Damaged, format!("the journal says port '{port}'")))?,
            })
        };
        self.order.member_names().into_iter().enumerate().map(member).collect()
    }

    async fn check(&self, context: &StepContext) -> Result<()> {
        let members = self.members(context)?;
        let checked = check::check(self, &members, &member_ids(&context.order)).await?;
        context.checks(checked.items.clone());
        let (at, ties) = checked.into_outcome(&self.order)?;
        context.record(facts::TIME, at.to_string()).await?;
        for (index, ties) in ties.iter().enumerate() {
            for (key, value) in ties {
                context.record(&facts::of(key, index), value.clone()).await?;
            }
        }
        context.progress().note(format!("everything passed; all members as of {}", utc_text(at)));
        context.result("target", utc_text(at));
        Ok(())
    }

    /// What the engine tells a member of the others, as the check has recorded it.
    fn ties(&self, context: &StepContext, index: usize) -> Ties {
        let of_member = |(key, value): (String, String)| {
            let key = key.strip_suffix(&format!(".{index}"))?.to_string();
            key.starts_with(TIE_PREFIX).then_some((key, value))
        };
        context.facts().into_iter().filter_map(of_member).collect()
    }

    /// Gives the members' orders, and waits until each clone is made, verified and cleaned up, and closed.
    async fn grow(&self, context: &StepContext) -> Result<()> {
        let at = context.need_fact(facts::TIME)?;
        let at = at.parse().map_err(|_| Error::new(Kind::Damaged, format!("the journal says time '{at}'")))?;
        let members = self.members(context)?;
        for (index, member) in members.iter().enumerate() {
            let clone = member.order(at, self.ties(context, index));
            let order = member_order(&context.order, &self.order, index, clone);
            let report = self.runner.submit(order).await?;
            if report.state == JobState::Failed && context.is_repeated {
                self.runner.resume(report.order.id).await?;
            }
        }
        let reports = self.wait_for_all(context, &[JobState::Held, JobState::Done]).await?;
        for (member, report) in members.iter().zip(&reports) {
            let reached = report.results.iter().find(|(name, _)| name == "reached").map(|(_, text)| text.as_str());
            let reached = reached.unwrap_or("nothing that it tells of");
            let text = format!("{}, {reached}, port {}", member.engine.name(), member.port);
            context.result(&member.clone_name, text);
        }
        if self.order.hold {
            let name = &self.order.clone_name;
            context.result("quarantine", format!("all closed until 'keiki accept {name}' or 'keiki discard {name}'"));
        }
        Ok(())
    }

    /// Opens all members. What was begun here is carried through: a repeated call goes on where the last one died.
    async fn accept(&self, context: &StepContext) -> Result<()> {
        for id in member_ids(&context.order) {
            let report = self.runner.accept_member(id).await?;
            if report.state == JobState::Failed {
                self.runner.resume(id).await?;
            }
        }
        self.wait_for_all(context, &[JobState::Done]).await?;
        for (index, member) in self.members(context)?.iter().enumerate() {
            let ties = self.ties(context, index);
            if ties.is_empty() {
                continue;
            }
            let site = serving_site(&self.host, member.engine, &member.order(Timestamp::UNIX_EPOCH, ties))?;
            let engine = self.host.engine(member.engine)?;
            for item in engine.confirm_ties(&site, context.cancel.clone()).await? {
                context.result(&item.what, item.done);
            }
        }
        Ok(())
    }

    /// Waits until every member's job is in one of these states; an error as soon as one has failed or was discarded.
    async fn wait_for_all(&self, context: &StepContext, wanted: &[JobState]) -> Result<Vec<JobReport>> {
        let ids = member_ids(&context.order);
        let mut watchers = ids.iter().map(|id| self.runner.subscribe(*id)).collect::<Result<Vec<_>>>()?;
        loop {
            let reports: Vec<JobReport> = watchers.iter_mut().map(|one| one.borrow_and_update().clone()).collect();
            let ready = reports.iter().filter(|report| wanted.contains(&report.state)).count();
            context.progress().set(ready as u64, ids.len() as u64);
            context.progress().note(reports.iter().map(brief).collect::<Vec<_>>().join("; "));
            if reports.iter().any(has_failed) {
                return Err(self.failure(context.order.id, &reports));
            }
            if ready == ids.len() {
                return Ok(reports);
            }
            let changes = watchers.iter_mut().map(|watcher| Box::pin(watcher.changed()));
            tokio::select! {
                _ = select_all(changes) => {}
                () = context.cancel.cancelled() => return Err(cancelled()),
            }
        }
    }

    /// What went wrong, and what can be done now. The other members stay as they are, so that going on costs only what
    /// failed.
    fn failure(&self, id: JobId, members: &[JobReport]) -> Error {
        let named = |report: &JobReport| format!("'{}'", report.order.task.clone_name().unwrap_or_default());
        let failed: Vec<&JobReport> = members.iter().filter(|report| has_failed(report)).collect();
        let names: Vec<String> = failed.iter().map(|report| named(report)).collect();
        let is_open = |report: &&JobReport| report.state == JobState::Done;
        let open: Vec<String> = members.iter().filter(is_open).map(named).collect();
        let others = match open.is_empty() {
            true => "the other members wait closed".to_string(),
            false => format!("open already: {}", open.join(", ")),
        };
        let next = format!(
            "{others}: 'keiki job resume {id}' goes on, 'keiki discard {}' deletes all members",
            self.order.clone_name
        );
        let first = failed.iter().find_map(|report| report.error.clone());
        let (kind, why, hint) = match &first {
            Some(error) => (error.kind(), error.message().to_string(), error.hint_text()),
            None => (Kind::Conflict, String::from("it was cancelled"), None),
        };
        let hint = hint.map_or(next.clone(), |hint| format!("{hint}; {next}"));
        Error::new(kind, format!("cannot clone group '{}': {}: {why}", self.order.group, names.join(", "))).hint(hint)
    }

    /// Removes one member, whatever it is by now.
    async fn undo_member(&self, id: JobId, cancel: &CancellationToken) -> Result<()> {
        loop {
            let Ok(report) = self.runner.show(id) else { return Ok(()) };
            match report.state {
                JobState::Cancelled => return Ok(()),
                JobState::Done => return remove_accepted(&self.host, &report, &self.runner.facts(id)?).await,
                JobState::Running | JobState::Held | JobState::Failed => {}
            }
            match self.runner.cancel(id).await {
                // It is being opened, and cannot be stopped there: it is removed when it is open.
                Err(error) if error.kind() == Kind::Conflict && report.state == JobState::Running => {}
                other => drop(other?),
            }
            let after = tokio::select! {
                after = self.runner.wait(id) => after?,
                () = cancel.cancelled() => return Err(cancelled()),
            };
            if let (JobState::Failed, Some(error)) = (after.state, after.error) {
                return Err(error);
            }
        }
    }
}

/// Deletes a group of clones that was accepted, or what is left of it. Takes the order of the group.
pub async fn remove_accepted_group(host: &CloneHost, runner: &JobRunner, order: &Order) -> Result<()> {
    for id in member_ids(order) {
        // One that was discarded alone, later, is gone already; one whose job is forgotten is an instance of its own.
        let Ok(report) = runner.show(id) else { continue };
        if report.state == JobState::Done {
            remove_accepted(host, &report, &runner.facts(id)?).await?;
        }
    }
    Ok(())
}

fn has_failed(report: &JobReport) -> bool {
    matches!(report.state, JobState::Failed | JobState::Cancelled)
}

/// A member in a few words: `check-orders: recover, 1.0 GiB of 3.0 GiB`.
fn brief(report: &JobReport) -> String {
    let name = report.order.task.clone_name().unwrap_or_default();
    let running = report.steps.iter().find(|step| step.state == StepState::Running);
    let state = match (report.state, running) {
        (JobState::Held, _) => "ready".to_string(),
        (JobState::Done, _) => "open".to_string(),
        (JobState::Failed, _) => "failed".to_string(),
        (JobState::Cancelled, _) => "discarded".to_string(),
        (JobState::Running, None) => "waits".to_string(),
        (JobState::Running, Some(step)) => match (step.unit, step.total) {
            (_, 0) | (ProgressUnit::Items, _) => step.name.clone(),
            (ProgressUnit::Bytes, total) => {
                format!("{}, {} of {}", step.name, human_bytes(step.done), human_bytes(total))
            }
        },
    };
    format!("{name}: {state}")
}

#[async_trait]
impl Work for GroupWork {
    fn steps(&self) -> Vec<StepPlan> {
        [CLAIM, CHECK, GROW, ACCEPT].map(StepPlan::items).to_vec()
    }

    fn exclusive(&self) -> Vec<String> {
        let names = std::iter::once(self.order.clone_name.clone()).chain(self.order.member_names());
        names.map(|name| format!("clone name '{name}'")).collect()
    }

    fn is_heavy(&self) -> bool {
        // Its members are.
        false
    }

    fn holds_before(&self) -> Option<&'static str> {
        self.order.hold.then_some(ACCEPT)
    }

    fn may_cancel(&self, step: &str) -> bool {
        step != ACCEPT
    }

    fn after_interruption(&self, _step: &str) -> Restart {
        Restart::Again
    }

    async fn run(&self, step: &str, context: &StepContext) -> Result<()> {
        match step {
            CLAIM => self.claim(context).await,
            CHECK => self.check(context).await,
            GROW => self.grow(context).await,
            ACCEPT => self.accept(context).await,
            other => Err(Error::new(Kind::Internal, format!("a group has no step '{other}'"))),
        }
    }

    async fn undo(&self, context: &StepContext, cause: UndoCause) -> Result<()> {
        if cause == UndoCause::Failed {
            // Whoever resumes the group wants to repeat only what failed; the rest is closed, and waits.
            return Ok(());
        }
        let mut outcome = Ok(());
        for id in member_ids(&context.order) {
            // One that cannot be removed keeps none of the others.
            let removed = self.undo_member(id, &context.cancel).await;
            outcome = outcome.and(removed);
        }
        outcome
    }
}
