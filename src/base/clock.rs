//! Time as a port: code below `main` asks a `Clock` instead of the operating system, so that a test can replay a
//! week in a second.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;

/// Where "now" and "later" come from.
#[async_trait]
pub trait Clock: Send + Sync {
    /// The current instant in UTC.
    fn now(&self) -> Timestamp;
    /// Returns when `duration` has passed on this clock. Safe to cancel.
    async fn sleep(&self, duration: Duration);
}

/// The clock of the machine.
pub struct SystemClock;

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}

/// Whether `at` lies less than `duration` before `now`. A moment in the future does not: the clock was set back since, and
/// how long ago it was is not known. So whoever asks like this whether something is still fresh, or not due yet, is not
/// held up by a clock that was set back.
pub fn is_within(at: Timestamp, now: Timestamp, duration: Duration) -> bool {
    let duration = SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
    at <= now && now.duration_since(at) < duration
}

/// A clock that moves only when it is told to.
pub struct ManualClock {
    time: Mutex<ManualTime>,
    moved: Notify,
}

#[derive(Clone, Copy)]
struct ManualTime {
    now: Timestamp,
    /// What sleepers go by: as on a machine, it passes also while the clock is set back.
    passed: Duration,
}

impl ManualClock {
    pub fn new(now: Timestamp) -> Arc<ManualClock> {
        let time = ManualTime { now, passed: Duration::ZERO };
        Arc::new(ManualClock { time: Mutex::new(time), moved: Notify::new() })
    }

    // The lock is held for an addition only, so it cannot be poisoned by a panicking holder.
    fn lock(&self) -> MutexGuard<'_, ManualTime> {
        self.time.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Moves the clock forward and wakes every sleeper whose time has come.
    pub fn advance(&self, duration: Duration) {
        {
            let mut time = self.lock();
            time.now += duration;
            time.passed += duration;
        }
        self.moved.notify_waiters();
    }

    /// Sets the clock back, as somebody does who corrects it. No sleeper sleeps longer.
    pub fn set_back(&self, duration: Duration) {
        self.lock().now -= duration;
    }
}

#[async_trait]
impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        self.lock().now
    }

    async fn sleep(&self, duration: Duration) {
        let end = self.lock().passed.saturating_add(duration);
        loop {
            let moved = self.moved.notified();
            tokio::pin!(moved);
            // Registered before the clock is read, so that an advance in between is not missed.
            moved.as_mut().enable();
            if self.lock().passed >= end {
                return;
            }
            moved.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_sleeper_wakes_when_the_manual_clock_has_passed_its_end() {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let sleeper = tokio::spawn({
            let clock = clock.clone();
            async move { clock.sleep(Duration::from_secs(3600)).await }
        });
        tokio::task::yield_now().await;
        clock.advance(Duration::from_secs(3599));
        tokio::task::yield_now().await;
        assert!(!sleeper.is_finished());
        clock.advance(Duration::from_secs(1));
        sleeper.await.unwrap();
    }

    #[tokio::test]
    async fn a_clock_that_is_set_back_wakes_its_sleepers_in_time_and_makes_nothing_fresh() {
        let began = Timestamp::UNIX_EPOCH;
        let clock = ManualClock::new(began);
        let sleeper = tokio::spawn({
            let clock = clock.clone();
            async move { clock.sleep(Duration::from_secs(10)).await }
        });
        tokio::task::yield_now().await;
        clock.set_back(Duration::from_secs(3600));
        clock.advance(Duration::from_secs(10));
        sleeper.await.unwrap();
        let hour = Duration::from_secs(3600);
        assert!(!is_within(began, clock.now(), hour));
        clock.advance(hour);
        assert!(is_within(began, clock.now(), hour));
        clock.advance(hour - Duration::from_secs(10));
        assert!(!is_within(began, clock.now(), hour));
    }
}
