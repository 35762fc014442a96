//! Drives one job from where it stands to its end, step by step.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;

use crate::base::bulk::run_blocking;
use crate::error::{Error, Kind, Result};
use crate::job::records::{EndRecord, ErrorRecord, Instant, Record};
use crate::job::restart::Next;
use crate::job::runner::{Inner, Job};
use crate::job::step::{StepContext, cancelled};
use crate::job::{UndoCause, Work, secrets};

/// Carries out `next` and all that follows from it. When the agent is stopping, it returns without recording anything.
pub(super) async fn drive(inner: Arc<Inner>, job: Arc<Job>, work: Arc<dyn Work>, next: Next) {
    match next {
        Next::Rest => {}
        Next::Finish => end(&inner, &job, EndRecord::Done, None).await,
        Next::Undo { cause, error } => undo(&inner, &job, work.as_ref(), cause, error).await,
        Next::Run { step, repeated } => match run_steps(&inner, &job, work.as_ref(), step, repeated).await {
            _ if inner.stopping.is_cancelled() => {}
            Ok(RunEnd::Held) => {}
            Ok(RunEnd::Done) => end(&inner, &job, EndRecord::Done, None).await,
            Err(error) => {
                let cancel_asked = job.live.history().cancel_asked;
                let (cause, error) = match (cancel_asked, error.kind()) {
                    (true, Kind::Cancelled) => (UndoCause::Cancelled, None),
                    // It failed by itself before it noticed; both are true, and nothing of it is wanted any more.
                    (true, _) => (UndoCause::Cancelled, Some(error)),
                    (false, _) => (UndoCause::Failed, Some(error)),
                };
                undo(&inner, &job, work.as_ref(), cause, error).await;
            }
        },
    }
}

enum RunEnd {
    Done,
    Held,
}

async fn run_steps(inner: &Inner, job: &Job, work: &dyn Work, first: usize, repeated: bool) -> Result<RunEnd> {
    let _place = match work.is_heavy() {
        true => Some(wait_for_place(inner, job, first).await?),
        false => None,
    };
    let names: Vec<String> = job.live.history().report.steps.iter().map(|step| step.name.clone()).collect();
    for (index, name) in names.iter().enumerate().skip(first) {
        let (cancel_asked, accepted) = {
            let history = job.live.history();
            (history.cancel_asked, history.accepted)
        };
        if cancel_asked && work.may_cancel(name) {
            return Err(cancelled());
        }
        if work.holds_before() == Some(name) && !accepted {
            job.live.append(Record::Held { at: now(inner) }).await?;
            return Ok(RunEnd::Held);
        }
        job.live.append(Record::StepBegun { at: now(inner), step: name.clone() }).await?;
        let context = context_of(job, index, repeated && index == first);
        let outcome = caught(work.run(name, &context)).await;
        if inner.stopping.is_cancelled() {
            return Err(cancelled());
        }
        record_outcome(inner, job, index, outcome).await?;
    }
    Ok(RunEnd::Done)
}

async fn wait_for_place<'a>(inner: &'a Inner, job: &Job, first: usize) -> Result<tokio::sync::SemaphorePermit<'a>> {
    if let Ok(place) = inner.heavy.try_acquire() {
        return Ok(place);
    }
    if let Some(step) = job.live.history().report.steps.get_mut(first) {
        step.note = String::from("waits for other clones on this host to end");
    }
    job.live.publish();
    let cancel = job.cancel_token();
    tokio::select! {
        place = inner.heavy.acquire() => place.map_err(|_| cancelled()),
        () = cancel.cancelled() => Err(cancelled()),
    }
}

async fn record_outcome(inner: &Inner, job: &Job, index: usize, outcome: Result<()>) -> Result<()> {
    let said = job.live.said();
    let (step, note, done, total) = {
        let history = job.live.history();
        let step = &history.report.steps[index];
        (step.name.clone(), step.note.clone(), step.done, step.total)
    };
    let at = now(inner);
    match outcome {
        Ok(()) => job.live.append(Record::StepDone { at, step, done, total, note, said }).await,
        Err(error) => {
            tracing::warn!(job = %job.id, step, "a step of a job has failed: {error}");
            let record = Record::StepFailed { at, step, note, said, error: ErrorRecord::from(&error) };
            if let Err(second) = job.live.append(record).await {
                tracing::error!(job = %job.id, "cannot record the failure of a step: {second}");
            }
            Err(error)
        }
    }
}

async fn undo(inner: &Inner, job: &Job, work: &dyn Work, cause: UndoCause, error: Option<Error>) {
    let at = {
        let history = job.live.history();
        let steps = &history.report.steps;
        steps.iter().position(|step| step.state != crate::model::job::StepState::Done).unwrap_or(0)
    };
    let mut context = context_of(job, at, true);
    // Undoing must not be stopped by the cancellation that asked for it, only by the end of the agent.
    context.cancel = inner.stopping.child_token();
    let outcome = caught(work.undo(&context, cause)).await;
    if inner.stopping.is_cancelled() {
        return;
    }
    match (outcome, cause, error) {
        (Ok(()), UndoCause::Cancelled, error) => end(inner, job, EndRecord::Cancelled, error.as_ref()).await,
        (Ok(()), UndoCause::Failed, error) => end(inner, job, EndRecord::Failed, error.as_ref()).await,
        (Err(left), _, error) => {
            let error = match error {
                Some(error) => {
                    let text =
                        format!("{}; and what it made could not be removed: {}", error.message(), left.message());
                    let whole = Error::new(error.kind(), text);
                    match error.hint_text() {
                        Some(hint) => whole.hint(hint),
                        None => whole,
                    }
                }
                None => left.while_doing("what the job made could not be removed"),
            };
            let error = error.hint(format!("'keiki job cancel {}' tries to remove it again", job.id));
            end(inner, job, EndRecord::Failed, Some(&error)).await;
        }
    }
}

/// Records the end of a job. If the journal cannot be written, the job is over in memory, and picked up again from
/// what the journal says when the agent starts the next time.
pub(super) async fn end(inner: &Inner, job: &Job, state: EndRecord, error: Option<&Error>) {
    if state != EndRecord::Failed {
        forget_secrets(inner, job).await;
    }
    let record = Record::Ended { at: now(inner), state, error: error.map(ErrorRecord::from) };
    if let Err(second) = job.live.append(record).await {
        tracing::error!(job = %job.id, "cannot record the end of a job: {second}");
        let shown = error.unwrap_or(&second);
        let at = now(inner);
        job.live.close().await;
        job.live.end_in_memory(&Record::Ended { at, state: EndRecord::Failed, error: Some(shown.into()) });
    }
    tracing::info!(job = %job.id, state = ?state, "a job has ended");
}

/// Before the end is recorded: who sees a job as done or cancelled can rely on it.
async fn forget_secrets(inner: &Inner, job: &Job) {
    let (directory, id) = (inner.directory.clone(), job.id);
    if let Err(error) = run_blocking("forget passwords", move || secrets::forget(&directory, id)).await {
        tracing::error!(job = %id, "the passwords of a job that is over are still there until the next start: {error}");
    }
}

fn context_of(job: &Job, step: usize, is_repeated: bool) -> StepContext {
    let order = job.live.history().report.order.clone();
    StepContext { order, cancel: job.cancel_token(), is_repeated, step, live: job.live.clone() }
}

fn now(inner: &Inner) -> Instant {
    Instant(inner.clock.now())
}

/// A panic becomes an error, so that the job can be undone and its end recorded.
async fn caught(step: impl Future<Output = Result<()>>) -> Result<()> {
    match AssertUnwindSafe(step).catch_unwind().await {
        Ok(outcome) => outcome,
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            Err(Error::new(Kind::Internal, format!("the step panicked: {text}")).hint("this is a defect of keiki"))
        }
    }
}
