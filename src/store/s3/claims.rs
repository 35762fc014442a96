//! Conditions on servers that ignore them: writers of one key exclude each other by claims.
//!
//! A claim is an object with a name of its own, `.keiki/claims/<hash of the key>/<id>`. Who wants to write the key puts a
//! claim, lists the claims of the key, and may only write if there is no other. Reads and listings see what was written
//! before they began. So of two writers, the one whose claim came later sees the claim of the other in its listing,
//! whatever the clocks say: two writers never both find themselves alone. Who is not alone withdraws and tries again
//! later, except for the one with the smallest id, who stays until the others are gone; so somebody gets through.
//! The condition itself (nothing there; still this tag) is looked at while alone.
//!
//! Only for writers that die is time needed. A claim that is [`DEAD_AFTER_SECONDS`] older than our own, both by the clock
//! of the server, is removed. A living writer gives up long before that: it begins no write when its claim is older than
//! [`WRITE_WITHIN`], and ends it after [`WRITE_FOR`]. A request that is held up in the network for minutes and arrives
//! after all is what this cannot exclude, and a server that honours conditions can.
//!
//! This costs about six requests instead of one. All agents of a repository must do the same, so what a server can do is
//! read from the header of the repository and never guessed.

use std::time::Duration;

use tokio::time::Instant;

use super::S3Store;
use super::bucket::{Condition, Found};
use crate::base::random::random_u64;
use crate::error::{Error, Kind, Result};
use crate::store::{Key, PutCondition, Store, Tag};

const DEAD_AFTER_SECONDS: i64 = 1800;
const WRITE_WITHIN: Duration = Duration::from_secs(60);
/// How long a write may take with all its attempts.
const WRITE_FOR: Duration = Duration::from_secs(600);
/// How long somebody tries before many writers are called an error.
const GIVE_UP_AFTER: Duration = Duration::from_secs(120);
const LONGEST_WAIT: Duration = Duration::from_millis(800);

/// Puts by `write`, which must be unconditional, if the condition holds and nobody else writes this key meanwhile.
pub(super) async fn alone<W, Attempt>(store: &S3Store, key: &Key, condition: &PutCondition, mut write: W) -> Result<Tag>
where
    W: FnMut() -> Attempt + Send,
    Attempt: Future<Output = Result<Tag>> + Send,
{
    let began = Instant::now();
    let prefix = format!(".keiki/claims/{}/", &blake3::hash(key.as_str().as_bytes()).to_hex()[..32]);
    let mut wait = Duration::from_millis(20);
    while began.elapsed() < GIVE_UP_AFTER {
        check(store, key, condition).await?;
        let claim = Claim::put(store, key, &prefix).await?;
        while claim.began.elapsed() < WRITE_WITHIN {
            match claim.look(&prefix).await? {
                Others::None => {
                    check(store, key, condition).await?;
                    if claim.began.elapsed() >= WRITE_WITHIN {
                        break;
                    }
                    let tag = tokio::time::timeout(WRITE_FOR, write()).await.unwrap_or_else(|_| {
                        let what = format!("cannot store '{key}' in {}", store.describe());
                        Err(Error::new(Kind::Unreachable, format!("{what}: it took too long")))
                    })?;
                    claim.withdraw().await;
                    return Ok(tag);
                }
                // They see us, and withdraw.
                Others::Later => pause(Duration::from_millis(50)).await,
                Others::Earlier => break,
            }
        }
        claim.withdraw().await;
        pause(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
    let what = format!("cannot store '{key}' in {}", store.describe());
    Err(Error::new(Kind::Unreachable, format!("{what}: others are writing it all the time"))
        .hint("does more than one agent work on the same instance?"))
}

async fn pause(longest: Duration) {
    let micros = u64::try_from(longest.as_micros()).unwrap_or(u64::MAX).max(2);
    tokio::time::sleep(Duration::from_micros(micros / 2 + random_u64() % (micros / 2))).await;
}

/// Whether the condition holds now.
async fn check(store: &S3Store, key: &Key, condition: &PutCondition) -> Result<()> {
    let found = match condition {
        PutCondition::Replace => return Ok(()),
        _ => store.head(key).await?,
    };
    let why_not = match (condition, found) {
        (PutCondition::Create, Some(_)) => "it exists already",
        (PutCondition::IfMatch(_), None) => "it does not exist any more",
        (PutCondition::IfMatch(tag), Some(found)) if found.tag != *tag => "it was changed by somebody else",
        _ => return Ok(()),
    };
    Err(Error::new(Kind::Conflict, format!("cannot store '{key}' in {}: {why_not}", store.describe())))
}

/// Who else has a claim.
enum Others {
    None,
    /// Only such as give way to us.
    Later,
    /// One to which we give way.
    Earlier,
}

/// A claim of ours; withdrawn when it is dropped.
struct Claim {
    store: S3Store,
    name: String,
    began: Instant,
    is_withdrawn: bool,
}

impl Claim {
    async fn put(store: &S3Store, key: &Key, prefix: &str) -> Result<Claim> {
        // Ids grow with time, so that the one who waits longest comes first.
        let name = format!("{prefix}{}", uuid::Uuid::now_v7());
        let claim = Claim { store: store.clone(), name, began: Instant::now(), is_withdrawn: false };
        let body = bytes::Bytes::from(format!("{key}\n"));
        let what = format!("cannot claim '{key}'");
        store.ask(&what, || store.bucket().put(&claim.name, body.clone(), &Condition::None, None)).await?;
        Ok(claim)
    }

    async fn look(&self, prefix: &str) -> Result<Others> {
        let what = "cannot list claims";
        let store = &self.store;
        let page = store.ask(what, || store.bucket().list(prefix, None, None, 1000)).await?;
        let Some(own) = page.found.iter().find(|found| found.name == self.name) else {
            // Removed by somebody who thought us dead, or lost: to be begun again.
            return Ok(Others::Earlier);
        };
        let (dead, living): (Vec<&Found>, Vec<&Found>) = page
            .found
            .iter()
            .filter(|found| found.name != self.name)
            .partition(|found| own.modified_at - found.modified_at > DEAD_AFTER_SECONDS);
        if !dead.is_empty() {
            let names: Vec<String> = dead.iter().map(|found| found.name.clone()).collect();
            store.ask("cannot remove claims of dead writers", || store.bucket().delete(&names)).await?;
        }
        Ok(match living.iter().map(|found| &found.name).min() {
            None => Others::None,
            Some(first) if *first > self.name => Others::Later,
            Some(_) => Others::Earlier,
        })
    }

    async fn withdraw(mut self) {
        let names = [self.name.clone()];
        let store = self.store.clone();
        // What was written stays written; a claim that stays dies by itself.
        if let Err(error) = store.ask("cannot withdraw a claim", || store.bucket().delete(&names)).await {
            tracing::info!("{error}");
        }
        self.is_withdrawn = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.is_withdrawn {
            return;
        }
        let (store, names) = (self.store.clone(), [self.name.clone()]);
        runtime.spawn(async move {
            let _ = store.ask("cannot withdraw a claim", || store.bucket().delete(&names)).await;
        });
    }
}
