//! What to do with a job when the agent finds it in its state directory: a pure decision.

use crate::error::{Error, Kind};
use crate::job::journal::History;
use crate::job::{Restart, UndoCause, Work};
use crate::model::job::{JobState, StepState};

/// The next thing to happen to a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// It is over, or waits for somebody.
    Rest,
    /// All steps are complete; only the end is not recorded.
    Finish,
    /// Go on with the step of this number; `repeated` if it was begun before.
    Run { step: usize, repeated: bool },
    /// Undo it, and record this end.
    Undo { cause: UndoCause, error: Option<Error> },
}

/// Decides how a job goes on that no task drives.
pub fn decide(history: &History, work: &dyn Work) -> Next {
    if history.report.state != JobState::Running {
        return Next::Rest;
    }
    let steps = &history.report.steps;
    let Some(at) = steps.iter().position(|step| step.state != StepState::Done) else {
        return Next::Finish;
    };
    if history.cancel_asked && work.may_cancel(&steps[at].name) {
        return Next::Undo { cause: UndoCause::Cancelled, error: None };
    }
    match steps[at].state {
        StepState::Failed => Next::Undo { cause: UndoCause::Failed, error: history.report.error.clone() },
        StepState::Waiting | StepState::Done => Next::Run { step: at, repeated: false },
        StepState::Running => match work.after_interruption(&steps[at].name) {
            Restart::Again => Next::Run { step: at, repeated: true },
            Restart::From(name) => match steps.iter().position(|step| step.name == name) {
                Some(from) if from <= at => Next::Run { step: from, repeated: true },
                _ => Next::Undo {
                    cause: UndoCause::Failed,
                    error: Some(Error::new(Kind::Internal, format!("the plan has no step '{name}' to go back to"))),
                },
            },
            Restart::Fail(error) => Next::Undo { cause: UndoCause::Failed, error: Some(error) },
        },
    }
}
