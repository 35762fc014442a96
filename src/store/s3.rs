//! A bucket as a store (`s3://backups/keiki`), on any server that speaks the S3 API.
//!
//! How the contract is kept:
//! * An object is visible when it is whole, and at once for everybody: both are what S3 promises, and what a server must
//!   do to be called one. Small objects are one PUT; larger ones go up in parts, of which at most two are under way, and
//!   become an object when they are completed. What fails is aborted; what a dead process left is aborted a day later.
//! * Calls that fail with a temporary error are made again, a little later each time, and more slowly for everybody when
//!   the server asks for that. Bodies that break go on at the byte where they broke, of the same version.
//! * A put whose answer was lost is known again: by its bytes, or by the mark of its upload.
//! * `Create` and `IfMatch` are conditions of the server where it honours them under a race. Some servers ignore them
//!   without a word. So what a server does is tried once ([`probe`]) and recorded in the repository; until that is known,
//!   and where it does not, writers of the same key exclude each other by [`claims`].
//!
//! Everything lies below the prefix. Names that begin with `.keiki/` belong to this module; no key can be one.

mod body;
pub(super) mod bucket;
mod claims;
mod credentials;
pub(super) mod explain;
mod listing;
mod presign;
mod probe;
pub(super) mod transport;
pub(super) mod trust;
mod upload;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Builder, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig,
};
use aws_smithy_async::time::TimeSource;
use aws_smithy_types::retry::RetryConfig;
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use self::body::Resumable;
use self::bucket::{Bucket, Condition, Pace};
pub use self::bucket::{Encryption, PutOptions};
pub use self::credentials::CredentialsSource;
use self::listing::Rests;
use self::presign::Presigner;
use self::transport::Transport;
pub use self::transport::{Bandwidth, Timeouts};
use super::metered::Meter;
use super::read::get_optional;
use super::{ByteStream, Key, LIST_PAGE_OBJECTS_MAX, Links, ObjectInfo, PutCondition, Store, Tag};
use crate::base::clock::Clock;
use crate::base::retry::{RetryPolicy, retry};
use crate::error::{Error, Kind, Result};
use crate::model::capabilities::{Capabilities, ChecksumKind};

/// The smallest part of an upload, except for the last (Amazon S3 user guide, "Multipart upload limits").
pub const PART_BYTES_MIN: usize = 5 << 20;

/// Where a bucket is and how it is used.
#[derive(Clone)]
pub struct S3Options {
    pub bucket: String,
    /// Below which prefix everything lies, without slashes at its ends; may be empty.
    pub prefix: String,
    /// `https://s3.example.net`; nothing means that of Amazon for the region.
    pub endpoint: Option<String>,
    /// What links name instead of the endpoint: as whoever gets them reaches the server.
    pub public_endpoint: Option<String>,
    pub region: String,
    /// Whether the bucket is part of the path or of the host's name.
    pub path_style: bool,
    /// A file of certificates to trust beside those that the host trusts.
    pub ca: Option<PathBuf>,
    pub credentials: CredentialsSource,
    pub put: PutOptions,
    /// The size of the parts of an upload; three of them are in memory for each upload that is under way.
    pub part_bytes: usize,
    pub connections: usize,
    pub timeouts: Timeouts,
    pub bandwidth: Bandwidth,
    pub retry: RetryPolicy,
}

impl S3Options {
    /// The usual options for a bucket.
    pub fn new(bucket: &str, prefix: &str) -> S3Options {
        S3Options {
            bucket: bucket.to_string(),
            prefix: prefix.to_string(),
            endpoint: None,
            public_endpoint: None,
            region: "us-east-1".to_string(),
            path_style: false,
            ca: None,
            credentials: CredentialsSource::default(),
            put: PutOptions::default(),
            part_bytes: 8 << 20,
            connections: 32,
            timeouts: Timeouts::default(),
            bandwidth: Bandwidth::default(),
            retry: RetryPolicy::brief(),
        }
    }
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct S3Store {
    inner: Arc<Inner>,
}

struct Inner {
    bucket: Bucket,
    clock: Arc<dyn Clock>,
    retry: RetryPolicy,
    part_bytes: usize,
    capabilities: ArcSwap<Capabilities>,
    rests: Rests,
    presigner: Presigner,
    meter: Arc<Meter>,
    described: String,
}

impl S3Store {
    /// Opens the store. Asks nothing of the server yet; mistakes in files that the options name are found.
    pub async fn open(options: S3Options, clock: Arc<dyn Clock>) -> Result<S3Store> {
        let prefix = match options.prefix.trim_matches('/') {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        let described = format!("s3://{}/{}", options.bucket, prefix.trim_end_matches('/'));
        let described = described.trim_end_matches('/').to_string();
        let failed = |error: Error| error.while_doing(format!("cannot open {described}"));
        let tls = trust::trusting(options.ca.as_deref()).map_err(failed)?;
        let transport = Transport::new(tls, options.bandwidth.clone(), options.connections, options.timeouts);
        let credentials =
            credentials::provider(&options.credentials, &options.region, &transport).await.map_err(failed)?;
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(options.timeouts.connect)
            .read_timeout(options.timeouts.silence)
            .build();
        let meter = Meter::new(clock.clone());
        let mut config = Builder::new();
        config.set_endpoint_url(options.endpoint.clone());
        let config = config
            .behavior_version(BehaviorVersion::latest())
            // What is asked to get credentials is no request of the store.
            .http_client(transport.counting(meter.clone()))
            .credentials_provider(credentials.clone())
            .region(Region::new(options.region.clone()))
            .force_path_style(options.path_style)
            .time_source(ClockTime(clock.clone()))
            // A host whose clock is wrong must be told: times of logs and of targets come from it.
            .disable_clock_skew_correction(true)
            // Trying again is done here, where the answer that was lost is known again.
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts)
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            // Checksums in trailers break servers that do not know them.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .build();
        let presigner = Presigner::new(&config, options.public_endpoint.as_deref(), credentials, &options.credentials);
        let bucket = Bucket {
            client: Client::from_conf(config),
            name: options.bucket,
            prefix,
            put: options.put,
            pace: Pace::default(),
        };
        Ok(S3Store {
            inner: Arc::new(Inner {
                bucket,
                clock,
                retry: options.retry,
                part_bytes: options.part_bytes.max(PART_BYTES_MIN),
                capabilities: ArcSwap::default(),
                rests: Rests::default(),
                presigner,
                meter,
                described,
            }),
        })
    }

    /// What the store was told about its server; nothing can be done until then.
    pub fn capabilities(&self) -> Arc<Capabilities> {
        self.inner.capabilities.load_full()
    }

    fn bucket(&self) -> &Bucket {
        &self.inner.bucket
    }

    /// Makes a call until it is answered, as the policy says. Errors begin with `what`.
    async fn ask<T, F, Attempt>(&self, what: &str, mut call: F) -> Result<T>
    where
        F: FnMut() -> Attempt + Send,
        Attempt: Future<Output = Result<T>> + Send,
    {
        let what = format!("{what} in {}", self.inner.described);
        let paced = || {
            let attempt = call();
            async {
                self.bucket().pace.wait().await;
                attempt.await
            }
        };
        let outcome = retry(&*self.inner.clock, &self.inner.retry, &CancellationToken::new(), &what, paced).await;
        outcome.map_err(|error| match error.message().starts_with(&what) {
            true => error,
            false => error.while_doing(&what),
        })
    }

    /// The checksum that goes with a put, if the server takes one: not needed, since the signature covers the body, but
    /// kept with the object where it is kept.
    fn checksum(&self) -> Option<ChecksumKind> {
        self.inner.capabilities.load().checksums.first().copied()
    }

    /// Puts under a condition that the server sees to, or under none.
    async fn put_plainly(&self, key: &Key, body: Bytes, condition: &Condition) -> Result<Tag> {
        let answer_was_lost = AtomicBool::new(false);
        let checksum = self.checksum();
        let outcome = self
            .ask(&format!("cannot store '{key}'"), || async {
                let outcome = self.bucket().put(key.as_str(), body.clone(), condition, checksum).await;
                if outcome.as_ref().is_err_and(Error::is_temporary) {
                    answer_was_lost.store(true, Ordering::Relaxed);
                }
                outcome
            })
            .await;
        let is_conflict = outcome.as_ref().is_err_and(|error| error.kind() == Kind::Conflict);
        if is_conflict
            && answer_was_lost.load(Ordering::Relaxed)
            && let Some(tag) = self.tag_of_bytes(key, &body).await?
        {
            return Ok(tag);
        }
        outcome.map(Tag)
    }

    /// The tag of the object if it has exactly these bytes.
    async fn tag_of_bytes(&self, key: &Key, body: &Bytes) -> Result<Option<Tag>> {
        let before = self.head(key).await?;
        let stored = match get_optional(self, key, body.len() as u64).await {
            // A larger object is not ours.
            Err(error) if error.kind() == Kind::Damaged => None,
            other => other?,
        };
        let after = self.head(key).await?;
        match (stored, before, after) {
            (Some(stored), Some(before), Some(after)) if stored == *body && before.tag == after.tag => {
                Ok(Some(after.tag))
            }
            _ => Ok(None),
        }
    }

    /// Aborts uploads in parts below the prefix that began more than a day ago: whoever began them has died, or has
    /// given up without being able to say so. Returns how many there were. Servers that cannot list uploads have none.
    pub async fn abort_stale_uploads(&self) -> Result<usize> {
        self.abort_uploads_older_than(Duration::from_secs(24 * 3600)).await
    }

    /// The same for another age. The age is by the clock of this host and what the server says about the begin, so it
    /// should be large beside the difference of clocks that servers allow.
    pub async fn abort_uploads_older_than(&self, age: Duration) -> Result<usize> {
        let oldest = self.inner.clock.now().as_second() - i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
        let mut aborted = 0;
        let mut after = None;
        loop {
            let list = || self.bucket().unfinished_uploads(after.clone());
            let (unfinished, next) = match self.ask("cannot list unfinished uploads", list).await {
                Err(error) if error.kind() == Kind::Unsupported => return Ok(aborted),
                other => other?,
            };
            for upload in unfinished.iter().filter(|upload| upload.begun_at < oldest) {
                tracing::info!("aborting an upload of '{}' that a dead writer left", upload.name);
                let what = format!("cannot abort an upload of '{}'", upload.name);
                self.ask(&what, || self.bucket().abort_upload(&upload.name, &upload.id)).await?;
                aborted += 1;
            }
            if next.is_none() {
                return Ok(aborted);
            }
            after = next;
        }
    }
}

/// The clock of the agent, as the SDK asks for the time that it signs.
struct ClockTime(Arc<dyn Clock>);

impl std::fmt::Debug for ClockTime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClockTime")
    }
}

impl TimeSource for ClockTime {
    fn now(&self) -> SystemTime {
        let since = Duration::try_from(self.0.now().as_duration()).unwrap_or_default();
        SystemTime::UNIX_EPOCH + since
    }
}

fn condition_of(condition: &PutCondition) -> Condition {
    match condition {
        PutCondition::Create => Condition::Absent,
        PutCondition::Replace => Condition::None,
        PutCondition::IfMatch(tag) => Condition::Tag(tag.0.clone()),
    }
}

#[async_trait]
impl Store for S3Store {
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream> {
        Resumable::open(self, key, range).await
    }

    async fn put(&self, key: &Key, body: Bytes, condition: PutCondition) -> Result<Tag> {
        let known = self.capabilities();
        let is_honoured = match condition {
            PutCondition::Create => known.conditional_create,
            PutCondition::IfMatch(_) => known.conditional_replace,
            PutCondition::Replace => true,
        };
        if is_honoured {
            return self.put_plainly(key, body, &condition_of(&condition)).await;
        }
        claims::alone(self, key, &condition, || self.put_plainly(key, body.clone(), &Condition::None)).await
    }

    async fn put_stream(&self, key: &Key, body: ByteStream, condition: PutCondition) -> Result<Tag> {
        if matches!(condition, PutCondition::IfMatch(_)) {
            return Err(super::if_match_of_a_stream(key));
        }
        upload::put_stream(self, key, body, condition).await
    }

    async fn head(&self, key: &Key) -> Result<Option<ObjectInfo>> {
        let found = self.ask(&format!("cannot look at '{key}'"), || self.bucket().head(key.as_str())).await?;
        Ok(found.map(|found| ObjectInfo { key: key.clone(), size_bytes: found.size_bytes, tag: Tag(found.tag) }))
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>> {
        listing::list(self, prefix, after, limit).await
    }

    async fn delete(&self, keys: &[Key]) -> Result<()> {
        for keys in keys.chunks(LIST_PAGE_OBJECTS_MAX) {
            let names: Vec<String> = keys.iter().map(|key| key.as_str().to_string()).collect();
            self.ask("cannot delete objects", || self.bucket().delete(&names)).await?;
        }
        Ok(())
    }

    fn describe(&self) -> String {
        self.inner.described.clone()
    }

    async fn probe(&self) -> Result<Option<Capabilities>> {
        probe::probe(self).await.map(Some)
    }

    fn adopt(&self, found: &Capabilities) {
        self.inner.capabilities.store(Arc::new(found.clone()));
    }

    async fn presign(&self, keys: &[Key], valid_for: Duration) -> Result<Links> {
        presign::presign(self, keys, valid_for).await
    }

    fn meter(&self) -> Option<Arc<Meter>> {
        Some(self.inner.meter.clone())
    }
}
