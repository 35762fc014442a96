//! A writer that does nothing but commit and take the time: what a backup does to commits is seen in the longest of them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use keiki::engine::mysql::session::{Endpoint, Session};

/// How long a commit may take before the test has failed.
const LIMIT: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(5);

/// When a commit began, and how long it took.
type Beat = (Instant, Duration);

/// A running writer.
pub struct Pulse {
    beats: Arc<Mutex<Vec<Beat>>>,
    stop: Arc<AtomicBool>,
    writer: tokio::task::JoinHandle<()>,
    /// When there was a backup.
    spans: Mutex<Vec<(Instant, Instant)>>,
}

impl Pulse {
    pub async fn start(source: &Endpoint) -> Pulse {
        let (beats, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (noted, stopped, session) = (beats.clone(), stop.clone(), Session::open(source).await.unwrap());
        let writer = tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                session.query_within(LIMIT, "INSERT INTO shop.pulse (at) VALUES (NOW(6))").await.unwrap();
                noted.lock().unwrap().push((began, began.elapsed()));
                tokio::time::sleep(PAUSE).await;
            }
        });
        Pulse { beats, stop, writer, spans: Mutex::default() }
    }

    /// Does something, a backup, and says what it did to commits.
    pub fn during<T>(&self, backup: impl FnOnce() -> T) -> String {
        let from = Instant::now();
        backup();
        let to = Instant::now();
        self.spans.lock().unwrap().push((from, to));
        let beats = self.beats.lock().unwrap();
        let within: Vec<Duration> = beats.iter().filter(|beat| overlaps(beat, from, to)).map(|beat| beat.1).collect();
        assert!(!within.is_empty(), "nothing was committed during the backup");
        let longest = within.iter().max().map_or(0.0, |longest| longest.as_secs_f64() * 1e3);
        let took = to.duration_since(from).as_secs_f64();
        format!("{} commits in the {took:.1} s of the backup, the longest took {longest:.0} ms", within.len())
    }

    /// Ends the writer, and says how long commits took while there was no backup.
    pub async fn stop(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        self.writer.await.unwrap();
        let (beats, spans) = (self.beats.lock().unwrap(), self.spans.lock().unwrap());
        let is_outside = |beat: &&Beat| !spans.iter().any(|(from, to)| overlaps(beat, *from, *to));
        let longest = beats.iter().filter(is_outside).map(|beat| beat.1).max().unwrap_or_default();
        format!("without a backup the longest of {} commits took {:.0} ms", beats.len(), longest.as_secs_f64() * 1e3)
    }
}

fn overlaps(beat: &Beat, from: Instant, to: Instant) -> bool {
    beat.0 < to && beat.0 + beat.1 > from
}
