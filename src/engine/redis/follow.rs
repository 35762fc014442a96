//! Follows a server as a replica and writes what it sends into the spool, for as long as the instance is shipped.
//!
//! Whether the stream goes on without a gap is decided before the server is asked, by what it says about its backlog: a
//! server that cannot continue would make a snapshot instead, which costs it a fork. Where it cannot continue there is a
//! hole, and the stream begins anew at the server's present offset, which costs nothing. A server that has no backlog yet
//! begins one when a replica asks for a snapshot; that request is given up at once. Source: `src/replication.c` of Redis 7.0
//! and Valkey 9 (masterTryPartialResynchronization, syncCommand, createReplicationBacklog).
//!
//! What was received is acknowledged as any replica does, several times a second and when the server asks for it, so that a
//! server that is stopped waits until the agent has everything. A gap in time is bounded from both sides: the stream says when something
//! was received, and a question that is repeated while data change (TIME, then the offset) says what had been executed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::base::bulk::run_blocking;
use crate::engine::redis::RedisSource;
use crate::engine::redis::replica::{Answer, Link, LinkUse};
use crate::engine::redis::session::Session;
use crate::engine::redis::source::{hold_of, prove, require_primary, server_time};
use crate::engine::redis::spool::{Place, Spool, SpoolFile};
use crate::error::{Error, Kind, Result};
use crate::model::position::Position;

const RECEIVE_BYTES: usize = 1 << 20;
/// How often is acknowledged and asked what has been executed.
const TICK: Duration = Duration::from_millis(250);
const PAUSE_BEFORE_RETRY: Duration = Duration::from_millis(500);
/// The server answers at once if it can continue; one that makes a snapshot instead waits for seconds before it says so.
const CONTINUE_SECONDS_MAX: u64 = 60;
/// How long it takes a server to begin a backlog, and a follower to receive what the server has sent, as long as something
/// comes.
const PATIENCE: Duration = Duration::from_secs(20);
/// How the stream ends when the server, or a client that waits for its replicas, wants to know how far we are: REPLCONF
/// GETACK (`replicationRequestAckFromSlaves`).
const ACKNOWLEDGEMENT_WANTED: &[u8] = b"$6\r\nGETACK\r\n$1\r\n*\r\n";
const MOVED_BYTES_MIN: u64 = 64 << 10;
const POLL: Duration = Duration::from_millis(10);
/// Whoever waits has asked the server a moment ago.
const FORMER_IDS_KEPT: usize = 16;

/// How the link is.
#[derive(Debug, Clone, Default)]
struct LinkState {
    /// Nothing while there is no link.
    place: Option<Place>,
    /// Ids that the same stream had before: its offsets go on under the present one.
    former: Vec<String>,
    problem: Option<Error>,
}

impl LinkState {
    /// Whether everything up to this offset of this history was received.
    fn has(&self, history: &str, offset: u64) -> bool {
        self.place.as_ref().is_some_and(|place| place.offset >= offset) && self.is_of(history)
    }

    /// Whether what comes belongs to this history or goes on from it.
    fn is_of(&self, history: &str) -> bool {
        let is_present = self.place.as_ref().is_some_and(|place| place.history == history);
        is_present || self.former.iter().any(|former| former == history)
    }

    /// The stream goes on under another id.
    fn rename(&mut self, place: Place, before: String) {
        if place.history != before {
            self.former.push(before);
            let more = self.former.len().saturating_sub(FORMER_IDS_KEPT);
            self.former.drain(..more);
        }
        (self.place, self.problem) = (Some(place), None);
    }
}

struct Shared {
    source: RedisSource,
    spool: Mutex<Option<Spool>>,
    link: watch::Sender<LinkState>,
}

/// See the module. The following ends when this is dropped.
pub(super) struct Follower {
    shared: Arc<Shared>,
    _ends: DropGuard,
}

impl Shared {
    /// Does something with the spool on a thread for blocking work; takes the spool first if nobody has it yet.
    async fn with_spool<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut Spool) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let shared = self.clone();
        run_blocking("replication spool", move || {
            // A panic below leaves the spool as it is on the disk, from where it is read again.
            let mut spool = shared.spool.lock().unwrap_or_else(|poisoned| {
                let mut spool = poisoned.into_inner();
                *spool = None;
                spool
            });
            let open = match spool.take() {
                Some(open) => open,
                // Whoever has it may be ending; that only one agent ships an instance is decided elsewhere.
                None => Spool::open(&shared.source.data_dir, shared.source.hold_limit_bytes).map_err(|error| {
                    if error.kind() == Kind::Conflict { error.with_kind(Kind::Unreachable) } else { error }
                })?,
            };
            work(spool.insert(open))
        })
        .await
    }
}

impl Follower {
    /// Begins to follow.
    pub(super) fn start(source: &RedisSource) -> Follower {
        let shared = Arc::new(Shared {
            source: source.clone(),
            spool: Mutex::new(None),
            link: watch::Sender::new(LinkState::default()),
        });
        let cancel = CancellationToken::new();
        let (following, ended) = (shared.clone(), cancel.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = ended.cancelled() => {}
                () = keep_following(&following) => {}
            }
        });
        Follower { shared, _ends: cancel.drop_guard() }
    }

    /// Waits until the link is there. To be asked before the server is: it begins another history when it first has a
    /// replica.
    pub(super) async fn wait_until_following(&self) -> Result<()> {
        self.wait_until(|link| link.place.is_some(), |_| false).await
    }

    /// Waits until everything up to this offset of this history is in the spool.
    pub(super) async fn wait_for(&self, history: &str, offset: u64) -> Result<()> {
        self.wait_until(|link| link.has(history, offset), |link| link.is_of(history)).await
    }

    /// Waits for longer than usual only while what comes `is_awaited`.
    async fn wait_until(
        &self,
        is_there: impl Fn(&LinkState) -> bool,
        is_awaited: impl Fn(&LinkState) -> bool,
    ) -> Result<()> {
        let mut link = self.shared.link.subscribe();
        let mut deadline = Instant::now() + PATIENCE;
        let mut moved = None;
        loop {
            let state = link.borrow_and_update().clone();
            if is_there(&state) {
                return Ok(());
            }
            let is_awaited = is_awaited(&state);
            let LinkState { place, problem, .. } = state;
            // Waiting does not change what somebody must act on.
            if problem.is_some_and(|problem| !problem.is_temporary()) {
                return Err(self.problem(place));
            }
            // As long as much comes, a long command is on its way; a server that only says that it is there is not waited for.
            let offset = place.as_ref().map(|place| place.offset);
            if is_awaited
                && moved
                    .zip(offset)
                    .is_some_and(|(before, now): (u64, u64)| now.saturating_sub(before) > MOVED_BYTES_MIN)
            {
                (moved, deadline) = (offset, Instant::now() + PATIENCE);
            }
            moved = moved.or(offset);
            // Where something changes all the time, the timeout alone would never be looked at.
            let is_late = Instant::now() >= deadline;
            if is_late || tokio::time::timeout_at(deadline, link.changed()).await.is_err() {
                return Err(self.problem(place));
            }
        }
    }

    fn problem(&self, place: Option<Place>) -> Error {
        let name = &self.shared.source.name;
        match self.shared.link.borrow().problem.clone() {
            Some(problem) => problem.while_doing(format!("cannot follow the replication stream of instance '{name}'")),
            None => Error::new(
                Kind::Unreachable,
                match place {
                    Some(place) => format!("instance '{name}' sends nothing behind offset {}", place.offset),
                    None => format!("instance '{name}' is not followed yet"),
                },
            ),
        }
    }

    /// Notes that everything that was executed by `at` lies before `offset`, and lists what may be shipped.
    pub(super) async fn look(&self, at: Timestamp, offset: u64) -> Result<Vec<SpoolFile>> {
        self.shared
            .with_spool(move |spool| {
                spool.note_executed(at.as_millisecond(), offset)?;
                spool.files()
            })
            .await
    }

    /// Where an offset lies in the log, once it was received, and the first moment that a clone can show of the log from
    /// there on.
    pub(super) async fn locate(&self, history: &str, offset: u64) -> Result<(Position, Timestamp)> {
        self.wait_for(history, offset).await?;
        // The stream may begin anew at any time: whether it still is that history is looked at together with the offset.
        let history = history.to_string();
        let located =
            self.shared.with_spool(move |spool| Ok((spool.locate(&history, offset)?, spool.received_before())));
        let (position, unix_millis) = located.await?;
        // What was received by now was received before, even if it lies in a file that is finished.
        let now = Timestamp::now();
        Ok((position, Timestamp::from_millisecond(unix_millis).map_or(now, |before| before.max(now))))
    }

    /// The path of a log file.
    pub(super) async fn path(&self, number: u64) -> Result<std::path::PathBuf> {
        self.shared.with_spool(move |spool| Ok(spool.path(number))).await
    }

    pub(super) async fn release_before(&self, number: u64) -> Result<()> {
        self.shared.with_spool(move |spool| spool.release_before(number)).await
    }

    /// Keeps the spool within its limit while nothing is shipped.
    pub(super) async fn guard(&self) -> Result<()> {
        self.shared.with_spool(|spool| spool.enforce_limit().map(|_| ())).await
    }
}

async fn keep_following(shared: &Arc<Shared>) {
    let mut told = None;
    loop {
        let Err(error) = follow(shared).await;
        let text = error.to_string();
        if told.as_ref() != Some(&text) {
            tracing::warn!("instance '{}': the replica link is down: {text}", shared.source.name);
            told = Some(text);
        }
        shared.link.send_modify(|link| (link.place, link.problem) = (None, Some(error)));
        tokio::time::sleep(PAUSE_BEFORE_RETRY).await;
    }
}

/// What a server says about its replication stream.
struct Backlog {
    history: String,
    offset: u64,
    /// The history before this one, and the first offset that does not belong to it any more.
    earlier: Option<(String, u64)>,
    /// The first byte that is still there and how many there are, if there is a backlog.
    kept: Option<(u64, u64)>,
}

impl Backlog {
    /// Reads the lines of INFO replication.
    fn of(info: &BTreeMap<String, String>) -> Result<Backlog> {
        let number = |key: &str| info.get(key).and_then(|text| text.parse::<u64>().ok());
        let id = |key: &str| info.get(key).cloned();
        let missing = || Error::new(Kind::Server, "the server does not say where its replication stream is");
        let (history, offset) = id("master_replid").zip(number("master_repl_offset")).ok_or_else(missing)?;
        let earlier = id("master_replid2").zip(number("second_repl_offset"));
        let kept = number("repl_backlog_first_byte_offset").zip(number("repl_backlog_histlen"));
        let kept = kept.filter(|_| number("repl_backlog_active") == Some(1));
        Ok(Backlog { history, offset, earlier, kept })
    }

    /// Whether the server would continue there: the conditions are its own.
    fn continues(&self, place: &Place) -> bool {
        let wanted = place.offset.saturating_add(1);
        let is_ours = place.history == self.history
            || self.earlier.as_ref().is_some_and(|(id, end)| *id == place.history && wanted <= *end);
        is_ours && self.kept.is_some_and(|(first, count)| first <= wanted && wanted <= first.saturating_add(count))
    }
}

async fn ask_backlog(session: &mut Session) -> Result<Backlog> {
    Backlog::of(&session.info(&["replication"]).await?)
}

/// Follows until something is in the way.
async fn follow(shared: &Arc<Shared>) -> Result<std::convert::Infallible> {
    let source = &shared.source;
    let mut session = Session::open(&source.endpoint).await?;
    prove(source, &mut session).await?;
    require_primary(source, &session.info(&["persistence", "replication"]).await?)?;
    // What an agent that shipped the append-only file has left there means nothing here, and nobody would release it.
    let hold = hold_of(source, &session.settings("append*").await?);
    run_blocking("replication spool", move || hold.give_up()).await?;
    let known = shared.with_spool(|spool| Ok(spool.place().cloned())).await?;
    let backlog = ask_backlog(&mut session).await?;
    let link = match known {
        Some(place) if backlog.continues(&place) => resume(shared, &place).await?,
        known => begin(shared, &mut session, backlog, known).await?,
    };
    let Some(link) = link else {
        return Err(Error::new(Kind::Unreachable, "the server did not continue its replication stream"));
    };
    receive(shared, link, session).await
}

/// Goes on where the spool ends. Nothing if the server would rather send a snapshot.
async fn resume(shared: &Arc<Shared>, place: &Place) -> Result<Option<Link>> {
    let Some((link, history)) = attach(shared, place).await? else { return Ok(None) };
    let before = place.history.clone();
    let place = Place { history, ..place.clone() };
    let id = place.history.clone();
    shared
        .with_spool(move |spool| {
            spool.rename_history(&id);
            Ok(())
        })
        .await?;
    shared.link.send_modify(|link| link.rename(place, before));
    Ok(Some(link))
}

async fn attach(shared: &Arc<Shared>, place: &Place) -> Result<Option<(Link, String)>> {
    let mut link = Link::open(&shared.source.endpoint, LinkUse::Stream).await?;
    link.ask_stream(&place.history, place.offset).await?;
    match tokio::time::timeout(Duration::from_secs(CONTINUE_SECONDS_MAX), link.answer()).await {
        Ok(Ok(Answer::Continue { history })) => Ok(Some((link, history.unwrap_or_else(|| place.history.clone())))),
        Ok(Err(error)) => Err(error),
        // The link is dropped, and with it what the server was about to do for it.
        Ok(Ok(Answer::Full { .. })) | Err(_) => Ok(None),
    }
}

/// Begins at the server's present offset.
async fn begin(
    shared: &Arc<Shared>,
    session: &mut Session,
    mut backlog: Backlog,
    known: Option<Place>,
) -> Result<Option<Link>> {
    let name = &shared.source.name;
    if backlog.kept.is_none() {
        let mut link = Link::open(&shared.source.endpoint, LinkUse::Backlog).await?;
        link.ask_snapshot().await?;
        let began = Instant::now();
        while backlog.kept.is_none() {
            if began.elapsed() > PATIENCE {
                return Err(Error::new(Kind::Server, "the server begins no replication backlog")
                    .hint("is 'repl-backlog-size' 0? 'redis-cli INFO replication' shows repl_backlog_active"));
            }
            tokio::time::sleep(POLL).await;
            backlog = ask_backlog(session).await?;
        }
    }
    let place = Place { history: backlog.history, offset: backlog.offset };
    let Some((link, history)) = attach(shared, &place).await? else { return Ok(None) };
    let place = Place { history, ..place };
    match known {
        Some(before) => tracing::warn!(
            "instance '{name}': the replication stream between offset {} of '{}' and offset {} of '{}' is lost, because the \
             server's backlog does not reach so far back: the archive has a hole here until the next backup",
            before.offset,
            before.history,
            place.offset,
            place.history
        ),
        None => tracing::info!("instance '{name}': following the replication stream from offset {}", place.offset),
    }
    let (now, first) = (Timestamp::now().as_millisecond(), place.clone());
    shared.with_spool(move |spool| spool.begin_anew(first, now)).await?;
    shared.link.send_replace(LinkState { place: Some(place), ..LinkState::default() });
    Ok(Some(link))
}

/// Writes down what comes.
async fn receive(shared: &Arc<Shared>, mut link: Link, mut session: Session) -> Result<std::convert::Infallible> {
    let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut received = current_offset(shared);
    let mut asked_at = received;
    loop {
        tokio::select! {
            biased;
            _ = tick.tick() => {
                link.acknowledge(received).await?;
                if received != asked_at {
                    if session.has_ended().await {
                        session = Session::open(&shared.source.endpoint).await?;
                    }
                    // If it has ended at this very moment: then next time.
                    let Ok((at, Backlog { history, offset, .. })) = ask_executed(&mut session).await else { continue };
                    if shared.link.borrow().place.as_ref().is_some_and(|place| place.history == history) {
                        shared.with_spool(move |spool| spool.note_executed(at.as_millisecond(), offset)).await?;
                    }
                    asked_at = received;
                }
            }
            read = link.read(&mut buffer) => {
                read?;
                let (now, bytes) = (Timestamp::now().as_millisecond(), buffer);
                let is_asked = bytes.ends_with(ACKNOWLEDGEMENT_WANTED);
                let outcome = shared.with_spool(move |spool| {
                    let outcome = spool.append(now, &bytes);
                    if outcome.is_err() {
                        // What is in the file may not be what the offset says: it is read again.
                        return Ok((bytes, outcome, None));
                    }
                    Ok((bytes, outcome, spool.place().cloned()))
                });
                let (bytes, outcome, place) = outcome.await?;
                if let Err(error) = outcome {
                    forget_spool(shared);
                    return Err(error);
                }
                buffer = bytes;
                buffer.clear();
                received = place.as_ref().map_or(received, |place| place.offset);
                shared.link.send_modify(|link| link.place = place);
                if is_asked {
                    link.acknowledge(received).await?;
                }
            }
        }
    }
}

/// What was executed by which time: all of it lies before the offset, because the time is asked first.
async fn ask_executed(session: &mut Session) -> Result<(Timestamp, Backlog)> {
    let at = server_time(session).await?;
    Ok((at, ask_backlog(session).await?))
}

fn current_offset(shared: &Shared) -> u64 {
    shared.link.borrow().place.as_ref().map_or(0, |place| place.offset)
}

/// The spool is opened again, from what is on the disk.
fn forget_spool(shared: &Shared) {
    *shared.spool.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = None;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(lines: &[(&str, &str)]) -> BTreeMap<String, String> {
        lines.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    #[test]
    fn who_waits_for_an_offset_gets_it_also_when_the_stream_has_another_id_by_then() {
        let place = |history: &str, offset| Place { history: history.into(), offset };
        let mut link = LinkState { place: Some(place("first", 100)), ..LinkState::default() };
        assert!(link.has("first", 100) && !link.has("first", 101) && !link.has("second", 1));
        link.rename(place("second", 120), "first".into());
        assert!(link.has("first", 110) && link.has("second", 120) && !link.has("first", 121) && !link.has("other", 1));
        link.rename(place("second", 130), "second".into());
        assert_eq!(link.former, ["first"]);
        link.place = None;
        assert!(!link.has("first", 1));
    }

    #[test]
    fn whether_the_server_continues_is_known_before_it_is_asked() {
        let lines = [
            ("master_replid", "new"),
            ("master_replid2", "old"),
            ("master_repl_offset", "150"),
            ("second_repl_offset", "121"),
            ("repl_backlog_active", "1"),
            ("repl_backlog_first_byte_offset", "101"),
            ("repl_backlog_histlen", "50"),
        ];
        let backlog = Backlog::of(&info(&lines)).unwrap();
        let continues = |history: &str, offset| backlog.continues(&Place { history: history.into(), offset });
        // The byte behind the offset is asked for: 101 to 151 can be.
        assert!(!continues("new", 99) && continues("new", 100) && continues("new", 150) && !continues("new", 151));
        assert!(continues("old", 120) && !continues("old", 121) && !continues("other", 120));
        let mut none = info(&lines);
        none.insert("repl_backlog_active".into(), "0".into());
        assert!(!Backlog::of(&none).unwrap().continues(&Place { history: "new".into(), offset: 120 }));
        assert!(Backlog::of(&info(&[("master_replid", "new")])).is_err());
    }
}
