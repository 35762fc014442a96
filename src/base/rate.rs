//! A limit on bytes per second that many connections share, and a stream of bytes that keeps to it.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// What may be saved up while nobody sends: so much of a second's worth.
const BURST_SECONDS: f64 = 0.125;
/// Smaller portions would cost more in calls than they give in evenness.
const PORTION_BYTES_MIN: f64 = 4096.0;

/// So many bytes per second for everybody who takes from it (a token bucket).
pub struct RateLimit {
    bytes_per_second: f64,
    state: Mutex<Bucket>,
}

struct Bucket {
    available: f64,
    filled_at: Instant,
}

impl RateLimit {
    /// A limit of this many bytes per second; zero counts as one.
    pub fn new(bytes_per_second: u64) -> RateLimit {
        let bytes_per_second = bytes_per_second.max(1) as f64;
        RateLimit { bytes_per_second, state: Mutex::new(Bucket { available: 0.0, filled_at: Instant::now() }) }
    }

    /// Takes at most `wanted` bytes of what may be moved now, at least one; or says after which time to ask again.
    pub fn take(&self, wanted: usize) -> Result<usize, Duration> {
        // Held for arithmetic only, which cannot panic.
        let mut bucket = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let now = Instant::now();
        let burst = (self.bytes_per_second * BURST_SECONDS).max(PORTION_BYTES_MIN);
        let earned = now.duration_since(bucket.filled_at).as_secs_f64() * self.bytes_per_second;
        bucket.available = (bucket.available + earned).min(burst);
        bucket.filled_at = now;
        let portion = PORTION_BYTES_MIN.min(wanted as f64).max(1.0);
        if bucket.available < portion {
            let wait = (portion - bucket.available) / self.bytes_per_second;
            return Err(Duration::from_secs_f64(wait.max(0.001)));
        }
        let taken = wanted.min(bucket.available as usize).max(1);
        bucket.available -= taken as f64;
        Ok(taken)
    }

    /// Gives back what was taken and not moved.
    pub fn give_back(&self, bytes: usize) {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).available += bytes as f64;
    }
}

/// When bytes were moved last, so that somebody else can see a connection that hangs. Waiting for a limit counts as
/// moving: the other side is not to blame for it.
pub struct Activity {
    began: Instant,
    last_millis: AtomicU64,
}

impl Activity {
    pub fn new() -> Arc<Activity> {
        Arc::new(Activity { began: Instant::now(), last_millis: AtomicU64::new(0) })
    }

    /// Something moved just now.
    pub fn touch(&self) {
        let passed = self.began.elapsed().as_millis();
        self.last_millis.store(u64::try_from(passed).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// When something moved last.
    pub fn last(&self) -> Instant {
        self.began + Duration::from_millis(self.last_millis.load(Ordering::Relaxed))
    }
}

/// A connection that keeps to limits and notes when it moves bytes.
pub struct LimitedStream<S> {
    inner: S,
    upload: Option<Arc<RateLimit>>,
    download: Option<Arc<RateLimit>>,
    upload_wait: Option<Pin<Box<Sleep>>>,
    download_wait: Option<Pin<Box<Sleep>>>,
    activity: Arc<Activity>,
}

impl<S> LimitedStream<S> {
    pub fn new(
        inner: S,
        upload: Option<Arc<RateLimit>>,
        download: Option<Arc<RateLimit>>,
        activity: Arc<Activity>,
    ) -> LimitedStream<S> {
        LimitedStream { inner, upload, download, upload_wait: None, download_wait: None, activity }
    }
}

/// How many of `wanted` bytes may be moved now.
fn poll_allowance(
    limit: &Option<Arc<RateLimit>>,
    wait: &mut Option<Pin<Box<Sleep>>>,
    activity: &Activity,
    wanted: usize,
    context: &mut Context<'_>,
) -> Poll<usize> {
    let Some(limit) = limit else { return Poll::Ready(wanted) };
    loop {
        if let Some(waiting) = wait {
            ready!(waiting.as_mut().poll(context));
            *wait = None;
        }
        match limit.take(wanted) {
            Ok(taken) => return Poll::Ready(taken),
            Err(later) => {
                activity.touch();
                *wait = Some(Box::pin(tokio::time::sleep(later)));
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for LimitedStream<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Some(limit) = this.download.clone() else {
            let before = buffer.filled().len();
            let outcome = Pin::new(&mut this.inner).poll_read(context, buffer);
            if buffer.filled().len() > before {
                this.activity.touch();
            }
            return outcome;
        };
        let wanted = buffer.remaining();
        if wanted == 0 {
            return Poll::Ready(Ok(()));
        }
        let allowed = ready!(poll_allowance(&this.download, &mut this.download_wait, &this.activity, wanted, context));
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(allowed));
        let outcome = Pin::new(&mut this.inner).poll_read(context, &mut part);
        let moved = part.filled().len();
        buffer.advance(moved);
        limit.give_back(allowed - moved);
        if moved > 0 {
            this.activity.touch();
        }
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LimitedStream<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let allowed = ready!(poll_allowance(&this.upload, &mut this.upload_wait, &this.activity, bytes.len(), context));
        let outcome = Pin::new(&mut this.inner).poll_write(context, &bytes[..allowed.min(bytes.len())]);
        let moved = match &outcome {
            Poll::Ready(Ok(moved)) => *moved,
            _ => 0,
        };
        if let Some(limit) = &this.upload {
            limit.give_back(allowed.saturating_sub(moved));
        }
        if moved > 0 {
            this.activity.touch();
        }
        outcome
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn two_streams_share_one_limit_in_each_direction() {
        const EACH: usize = 40_000;
        let (upload, download) = (Arc::new(RateLimit::new(100_000)), Arc::new(RateLimit::new(50_000)));
        let began = Instant::now();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..2 {
            let (near, mut far) = tokio::io::duplex(1 << 20);
            let mut near = LimitedStream::new(near, Some(upload.clone()), Some(download.clone()), Activity::new());
            tasks.spawn(async move {
                near.write_all(&[1; EACH]).await.unwrap();
                let sent_after = began.elapsed();
                let mut back = vec![0; EACH];
                near.read_exact(&mut back).await.unwrap();
                assert!(back.iter().all(|byte| *byte == 2));
                (sent_after, began.elapsed())
            });
            tokio::spawn(async move {
                far.write_all(&[2; EACH]).await.unwrap();
                let mut all = vec![0; EACH];
                far.read_exact(&mut all).await.unwrap();
                assert!(all.iter().all(|byte| *byte == 1));
                // The connection stays open until everything was read.
                far.read_u8().await.unwrap_err();
            });
        }
        let times = tasks.join_all().await;
        let sent = times.iter().map(|time| time.0).max().unwrap().as_secs_f64();
        let all = times.iter().map(|time| time.1).max().unwrap().as_secs_f64();
        // 80 kB at 100 kB/s, then 80 kB at 50 kB/s, though one may begin with that while the other still sends. A loaded
        // machine is slower, none is faster.
        assert!(sent >= 0.6, "{sent}");
        assert!(all >= 1.5, "{all}");
    }

    #[tokio::test]
    async fn what_was_saved_up_is_little_and_a_limit_of_one_byte_still_moves() {
        assert!(RateLimit::new(1).take(1).is_err());
        let limit = RateLimit::new(80_000_000);
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(limit.take(usize::MAX).unwrap(), 10_000_000);
        assert!(limit.take(1 << 20).is_err());
        limit.give_back(1 << 20);
        assert!(limit.take(4096).is_ok());
    }
}
