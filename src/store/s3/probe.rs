//! What a server really does, found out by trying.
//!
//! Some servers ignore conditions without a word, and some honour them only as long as nobody races. So each condition
//! is tried twice: one after the other, and by several writers at once.

use bytes::Bytes;
use futures_util::future::join_all;

use super::S3Store;
use super::bucket::Condition;
use crate::error::{Error, Kind, Result};
use crate::model::capabilities::{Capabilities, ChecksumKind};
use crate::store::Store;

const RACERS: usize = 8;
const ROUNDS: usize = 3;

/// Tries everything below a prefix of its own, which is removed afterwards.
pub(super) async fn probe(store: &S3Store) -> Result<Capabilities> {
    let trial = Trial { store, prefix: format!(".keiki/probe/{}/", uuid::Uuid::now_v7()) };
    let found = trial.run().await;
    // What stays behind after a failure does no harm.
    let removed = trial.clean_up().await;
    let found = found?;
    removed?;
    Ok(found)
}

struct Trial<'a> {
    store: &'a S3Store,
    prefix: String,
}

fn body(number: usize) -> Bytes {
    Bytes::from(format!("written by number {number}\n"))
}

/// A condition that does not hold, or a server that does not know conditions, makes an answer; anything else is an
/// error of the probe.
fn is_refused<T>(outcome: Result<T>) -> Result<bool> {
    match outcome {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == Kind::Conflict => Ok(true),
        Err(error) => Err(error),
    }
}

impl Trial<'_> {
    async fn run(&self) -> Result<Capabilities> {
        // Without a condition it must work; and why it does not is the most useful error of a new bucket.
        self.put("plain", 0, &Condition::None).await?;
        Ok(Capabilities {
            conditional_create: self.honours_create().await?,
            conditional_replace: self.honours_replace().await?,
            conditional_complete: self.honours_complete().await?,
            ordered_listing: self.lists_in_order().await?,
            checksums: self.checksums().await?,
        })
    }

    async fn put(&self, name: &str, number: usize, condition: &Condition) -> Result<String> {
        let name = format!("{}{name}", self.prefix);
        let what = "cannot try what the server can do";
        self.store.ask(what, || self.store.bucket().put(&name, body(number), condition, None)).await
    }

    /// How many of several puts at once succeed.
    async fn winners(&self, name: &str, condition: &Condition) -> Result<usize> {
        let name = format!("{}{name}", self.prefix);
        let racing = (0..RACERS).map(|number| self.store.bucket().put(&name, body(number), condition, None));
        let mut winners = 0;
        for outcome in join_all(racing).await {
            match outcome {
                Ok(_) => winners += 1,
                // "Try again" is an answer to a race as good as "no".
                Err(error) if matches!(error.kind(), Kind::Conflict | Kind::Unreachable) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(winners)
    }

    async fn honours_create(&self) -> Result<bool> {
        match self.put("create", 0, &Condition::Absent).await {
            Err(error) if is_not_known(&error) => return Ok(false),
            other => other?,
        };
        if !is_refused(self.put("create", 1, &Condition::Absent).await)? {
            return Ok(false);
        }
        for round in 0..ROUNDS {
            if self.winners(&format!("create-{round}"), &Condition::Absent).await? > 1 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn honours_replace(&self) -> Result<bool> {
        let first = self.put("replace", 0, &Condition::None).await?;
        let mut tag = self.put("replace", 1, &Condition::None).await?;
        match is_refused(self.put("replace", 2, &Condition::Tag(first)).await) {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) if is_not_known(&error) => return Ok(false),
            Err(error) => return Err(error),
        }
        // A tag that is right must do, too.
        tag = match self.put("replace", 100, &Condition::Tag(tag)).await {
            Err(error) if error.kind() == Kind::Conflict => return Ok(false),
            other => other?,
        };
        for round in 0..ROUNDS {
            let name = format!("{}replace", self.prefix);
            if self.winners("replace", &Condition::Tag(tag)).await? > 1 {
                return Ok(false);
            }
            let number = 200 + round;
            let what = "cannot try what the server can do";
            tag = self.store.ask(what, || self.store.bucket().put(&name, body(number), &Condition::None, None)).await?;
        }
        Ok(true)
    }

    async fn honours_complete(&self) -> Result<bool> {
        let name = format!("{}complete", self.prefix);
        let bucket = self.store.bucket();
        self.put("complete", 0, &Condition::None).await?;
        let what = "cannot try uploads in parts";
        let id = self.store.ask(what, || bucket.begin_upload(&name, "probe")).await?;
        let part = self.store.ask(what, || bucket.upload_part(&name, &id, 1, body(1))).await?;
        let outcome = bucket.complete_upload(&name, &id, vec![part], &Condition::Absent).await;
        let honoured = match is_refused(outcome) {
            Err(error) if is_not_known(&error) => Ok(false),
            other => other,
        };
        if honoured.as_ref().ok() != Some(&false) {
            self.store.ask(what, || bucket.abort_upload(&name, &id)).await?;
        }
        honoured
    }

    async fn lists_in_order(&self) -> Result<bool> {
        // Byte order is not the order of directories: '-' and '.' are before '/', and '0' is after it.
        let names = ["order/a-b/x", "order/a.b", "order/a/x", "order/a0"];
        for name in names {
            self.put(name, 0, &Condition::None).await?;
        }
        let what = "cannot list objects";
        let prefix = format!("{}order/", self.prefix);
        let page = self.store.ask(what, || self.store.bucket().list(&prefix, None, None, 10)).await?;
        let listed: Vec<&str> = page.found.iter().filter_map(|found| found.name.strip_prefix(&self.prefix)).collect();
        if listed.len() != names.len() {
            let message = format!(
                "cannot list objects in {}: {} of {} are shown",
                self.store.describe(),
                listed.len(),
                names.len()
            );
            return Err(Error::new(Kind::Unsupported, message)
                .hint("the server must show an object in listings as soon as it is stored"));
        }
        Ok(listed == names)
    }

    async fn checksums(&self) -> Result<Vec<ChecksumKind>> {
        let mut taken = Vec::new();
        for kind in ChecksumKind::all() {
            let name = format!("{}checksum", self.prefix);
            match self.store.bucket().put(&name, body(0), &Condition::None, Some(kind)).await {
                Ok(_) => taken.push(kind),
                Err(error) if error.is_temporary() => return Err(error),
                Err(error) => tracing::debug!("the server does not take checksums by {}: {error}", kind.name()),
            }
        }
        Ok(taken)
    }

    async fn clean_up(&self) -> Result<()> {
        let bucket = self.store.bucket();
        let what = "cannot remove the objects of a trial";
        let page = self.store.ask(what, || bucket.list(&self.prefix, None, None, 1000)).await?;
        let names: Vec<String> = page.found.into_iter().map(|found| found.name).collect();
        if names.is_empty() { Ok(()) } else { self.store.ask(what, || bucket.delete(&names)).await }
    }
}

/// A server that knows of no conditions may say so.
fn is_not_known(error: &Error) -> bool {
    matches!(error.kind(), Kind::Unsupported | Kind::BadInput)
}
