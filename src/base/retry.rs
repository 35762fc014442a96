//! The one retry of the code base: exponential backoff with jitter on errors that may pass by themselves.
//!
//! Only errors for which [`Error::is_temporary`] holds are tried again; every other error is returned at once. The
//! waits are asked of a [`Clock`], so that a test can live through an hour of outage in a millisecond.

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::clock::Clock;
use super::random::random_u64;
use crate::error::{Error, Kind, Result};

/// How long and how often to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The wait after the first failure, before jitter; it doubles with every further one.
    pub first_wait: Duration,
    /// No wait is longer than this.
    pub longest_wait: Duration,
    /// The number of attempts in all; nothing means for ever (until cancelled).
    pub attempts_max: Option<u32>,
    /// From this failure on every failure is a warning in the log; earlier ones are normal life.
    pub warn_from_failure: u32,
}

impl RetryPolicy {
    /// A few quick attempts within some seconds, for work that somebody waits for.
    pub fn brief() -> RetryPolicy {
        RetryPolicy {
            first_wait: Duration::from_millis(200),
            longest_wait: Duration::from_secs(5),
            attempts_max: Some(6),
            warn_from_failure: 3,
        }
    }

    /// Until it works or is cancelled, for work that must happen, such as shipping a log.
    pub fn forever() -> RetryPolicy {
        RetryPolicy {
            first_wait: Duration::from_millis(500),
            longest_wait: Duration::from_secs(30),
            attempts_max: None,
            warn_from_failure: 3,
        }
    }

    /// The wait after failure number `failure` (from 1): between half of the backoff and all of it, so that many
    /// agents which lost the same server do not come back at the same moment.
    pub fn wait_after(&self, failure: u32) -> Duration {
        let doublings = failure.saturating_sub(1).min(31);
        let full = self.first_wait.saturating_mul(1 << doublings).min(self.longest_wait);
        let half = full / 2;
        let half_nanos = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX);
        half + Duration::from_nanos(random_u64() % half_nanos.saturating_add(1))
    }
}

/// Calls `operation` until it succeeds, fails for good, the policy's attempts are used up, or `cancel` fires.
///
/// `what` is a verb phrase for the log and for the error after the last attempt: `cannot read 'x'`. Cancelling drops a
/// running attempt and gives an error of kind `Cancelled` that names the last failure.
pub async fn retry<T, F, Attempt>(
    clock: &dyn Clock,
    policy: &RetryPolicy,
    cancel: &CancellationToken,
    what: &str,
    mut operation: F,
) -> Result<T>
where
    F: FnMut() -> Attempt,
    Attempt: Future<Output = Result<T>>,
{
    let mut failure = 0u32;
    let mut last: Option<Error> = None;
    loop {
        let outcome = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(cancelled(what, last.as_ref())),
            outcome = operation() => outcome,
        };
        let error = match outcome {
            Ok(value) => {
                if failure >= policy.warn_from_failure {
                    tracing::info!(failures = failure, "{what}: works again");
                }
                return Ok(value);
            }
            Err(error) => error,
        };
        failure = failure.saturating_add(1);
        if !error.is_temporary() {
            return Err(error);
        }
        if policy.attempts_max.is_some_and(|most| failure >= most) {
            return Err(error.while_doing(format!("{what} (tried {failure} times)")));
        }
        let wait = policy.wait_after(failure);
        let wait_seconds = wait.as_secs_f64();
        if failure >= policy.warn_from_failure {
            tracing::warn!(failures = failure, wait_seconds, "{what}: {error}; trying again");
        } else {
            tracing::debug!(failures = failure, wait_seconds, "{what}: {error}; trying again");
        }
        last = Some(error);
        tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(cancelled(what, last.as_ref())),
            () = clock.sleep(wait) => {}
        }
    }
}

fn cancelled(what: &str, last: Option<&Error>) -> Error {
    let reason = match last {
        Some(error) => format!("{what}: cancelled while waiting to try again after: {error}"),
        None => format!("{what}: cancelled"),
    };
    Error::new(Kind::Cancelled, reason)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use jiff::Timestamp;

    use super::super::clock::ManualClock;
    use super::*;

    fn policy(attempts_max: Option<u32>) -> RetryPolicy {
        RetryPolicy {
            first_wait: Duration::from_secs(1),
            longest_wait: Duration::from_secs(60),
            attempts_max,
            warn_from_failure: 2,
        }
    }

    /// An operation that fails `failures` times with `kind`, run to its end while the clock is pushed on.
    async fn run(policy: RetryPolicy, failures: u32, kind: Kind) -> (Result<u32>, u32, Duration) {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let calls = Arc::new(AtomicU32::new(0));
        let task = tokio::spawn({
            let (clock, calls) = (clock.clone(), calls.clone());
            async move {
                retry(&*clock, &policy, &CancellationToken::new(), "cannot ask", || async {
                    let call = calls.fetch_add(1, Ordering::SeqCst) + 1;
                    if call > failures { Ok(call) } else { Err(Error::new(kind, "no answer")) }
                })
                .await
            }
        });
        while !task.is_finished() {
            clock.advance(Duration::from_millis(250));
            tokio::task::yield_now().await;
        }
        let passed = clock.now().duration_since(Timestamp::UNIX_EPOCH).unsigned_abs();
        (task.await.unwrap(), calls.load(Ordering::SeqCst), passed)
    }

    #[tokio::test]
    async fn a_temporary_failure_is_tried_again_with_growing_waits() {
        let (result, calls, passed) = run(policy(None), 5, Kind::Unreachable).await;
        assert_eq!(result.unwrap(), 6);
        assert_eq!(calls, 6);
        // 1 + 2 + 4 + 8 + 16 seconds, each halved at most.
        assert!(passed >= Duration::from_millis(15_500) && passed <= Duration::from_secs(40), "{passed:?}");
    }

    #[tokio::test]
    async fn a_failure_that_cannot_pass_by_itself_is_returned_at_once() {
        let (result, calls, _) = run(policy(None), 1, Kind::Forbidden).await;
        assert_eq!(result.unwrap_err().kind(), Kind::Forbidden);
        assert_eq!(calls, 1);
    }

    #[tokio::test]
    async fn the_last_allowed_attempt_returns_its_error() {
        let (result, calls, _) = run(policy(Some(3)), 9, Kind::Full).await;
        let error = result.unwrap_err();
        assert_eq!(error.kind(), Kind::Full);
        assert_eq!(error.message(), "cannot ask (tried 3 times): no answer");
        assert_eq!(calls, 3);
    }

    #[tokio::test]
    async fn cancelling_ends_a_wait_and_a_hanging_attempt() {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let cancel = CancellationToken::new();
        let waiting = tokio::spawn({
            let (clock, cancel) = (clock.clone(), cancel.clone());
            async move {
                retry(&*clock, &policy(None), &cancel, "cannot ask", || async {
                    Err::<(), _>(Error::new(Kind::Unreachable, "no answer"))
                })
                .await
            }
        });
        let hanging = tokio::spawn({
            let (clock, cancel) = (clock.clone(), cancel.clone());
            async move { retry(&*clock, &policy(None), &cancel, "cannot ask", std::future::pending::<Result<()>>).await }
        });
        tokio::task::yield_now().await;
        cancel.cancel();
        let error = waiting.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::Cancelled);
        assert!(error.message().contains("no answer"), "{error}");
        assert_eq!(hanging.await.unwrap().unwrap_err().kind(), Kind::Cancelled);
    }

    #[test]
    fn no_wait_is_longer_than_the_longest_or_shorter_than_half_of_it() {
        for failure in [40, 4_000_000_000] {
            let wait = policy(None).wait_after(failure);
            assert!(wait >= Duration::from_secs(30) && wait <= Duration::from_secs(60));
        }
    }
}
