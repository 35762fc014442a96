//! Jobs: the only place where engines and the repository meet.
//!
//! A job is an order, a plan (a pure function of what is known), numbered steps that carry it out, and one commit
//! point. Invariants, held by [`runner::JobRunner`] for every kind of work:
//! * A step is begun only when that is durable in the journal, and the next only when its end is.
//! * A step may be run again after a crash in the middle of it: [`Work::after_interruption`] says how.
//! * A job that failed or was cancelled has been undone before its end is recorded; if the agent dies in between, it is
//!   undone after the restart.
//! * The same order submitted again is answered with the job as it stands; another order under its id is refused.

use std::sync::Arc;

use async_trait::async_trait;

use crate::error::{Error, Result};
use crate::model::job::{Order, ProgressUnit};

pub mod archive;
pub mod backup;
pub mod clone;
pub mod download;
mod drive;
pub mod group;
pub mod journal;
pub mod ports;
pub mod records;
pub mod restart;
pub mod runner;
pub mod secrets;
pub mod step;
#[cfg(test)]
mod testing;
pub mod window;

pub use runner::{JobRunner, RunnerOptions};
pub use step::StepContext;

/// A step as the plan of a job shows it, before anything has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepPlan {
    /// Unique in its job, in a word or two: `stage`, `wait for log`.
    pub name: &'static str,
    pub unit: ProgressUnit,
}

impl StepPlan {
    pub const fn items(name: &'static str) -> StepPlan {
        StepPlan { name, unit: ProgressUnit::Items }
    }

    pub const fn bytes(name: &'static str) -> StepPlan {
        StepPlan { name, unit: ProgressUnit::Bytes }
    }
}

/// Where a job goes on whose agent died in the middle of a step, or that failed there and is resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Restart {
    /// The step itself goes on with what it finds, or begins again; `StepContext::is_repeated` says so to it.
    Again,
    /// This and what came after an earlier step is worthless now: begin there.
    From(&'static str),
    /// The job cannot go on.
    Fail(Error),
}

/// Why a job is undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UndoCause {
    /// A step failed. What a resumed job needs may stay, if it cannot be mistaken for finished work.
    Failed,
    /// Somebody cancelled or discarded the job: nothing of it may stay.
    Cancelled,
}

/// What one kind of order does. One value serves one job; all state that must survive is in the step's facts.
#[async_trait]
pub trait Work: Send + Sync {
    /// The steps in order. Pure, and always the same for the same order.
    fn steps(&self) -> Vec<StepPlan>;

    /// What this job uses alone, as words that nobody else reads: `backup of 'orders'`, `clone name 'check'`. While
    /// another job that is not over uses one of them, the order is refused.
    fn exclusive(&self) -> Vec<String>;

    /// Whether the job competes for one of the few places for heavy work (clones).
    fn is_heavy(&self) -> bool;

    /// The step before which the job waits for accept or discard, if the order asks for that.
    fn holds_before(&self) -> Option<&'static str> {
        None
    }

    /// Whether the job may be cancelled while this step runs. Past its commit point a job can only go forward.
    fn may_cancel(&self, step: &str) -> bool;

    /// How to go on when the agent died in `step` or `step` failed and the job is resumed. Pure.
    fn after_interruption(&self, step: &str) -> Restart;

    /// Carries out one step. Returns soon with an error of kind `Cancelled` when `context.cancel` fires.
    async fn run(&self, step: &str, context: &StepContext) -> Result<()>;

    /// Removes what the job made, as far as `cause` wants it. Repeating it is harmless; it may meet any state that any
    /// step can leave behind.
    async fn undo(&self, context: &StepContext, cause: UndoCause) -> Result<()>;
}

/// Makes the work for an order: the agent knows the instances and the host's settings.
pub trait Workshop: Send + Sync {
    /// The work that an order asks for. An order that cannot be meant (an unknown instance, a bad name) is refused here,
    /// and nothing is recorded.
    fn work(&self, order: &Order) -> Result<Arc<dyn Work>>;
}
