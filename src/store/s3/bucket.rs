//! The calls of the S3 API that keiki needs, one attempt each (Amazon S3 API reference, API version 2006-03-01).
//!
//! Names are relative to the repository's prefix in the bucket. Nothing here tries again: `S3Store` does, and slows down
//! when the server asks for it ([`Pace`]).

use std::sync::Mutex;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{
    ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart, Delete, ObjectIdentifier, ServerSideEncryption,
    StorageClass,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_types::base64;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use md5::{Digest, Md5};
use tokio::time::Instant;

use super::explain::{Action, Failure, explain};
use crate::base::retry::RetryPolicy;
use crate::error::{Error, Kind, Result};
use crate::model::capabilities::ChecksumKind;

/// The user metadata by which an upload in parts is known again when its answer was lost.
const UPLOAD_MARK: &str = "keiki-upload";

/// Smaller objects stay in the bucket's usual class: the cheaper ones bill at least 128 KiB for each object (Amazon S3
/// user guide, "Storage classes").
const STORAGE_CLASS_BYTES_MIN: usize = 128 << 10;

/// How the server keeps what is put.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Encryption {
    /// As the bucket is set up.
    #[default]
    OfTheBucket,
    /// SSE-S3: `AES256`.
    Managed,
    /// SSE-KMS with this key, or with the account's own.
    Kms(Option<String>),
}

/// What is said with each object that is put.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PutOptions {
    pub encryption: Encryption,
    /// For objects that are not small; nothing means the usual one.
    pub storage_class: Option<String>,
    /// Object tags; none unless somebody wants them, because some servers refuse them and some bill them.
    pub tags: Vec<(String, String)>,
}

/// Under which condition something is written, in terms of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    None,
    /// `If-None-Match: *`.
    Absent,
    /// `If-Match` with this entity tag.
    Tag(String),
}

/// An object as the server describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub name: String,
    pub size_bytes: u64,
    pub tag: String,
    /// By the clock of the server, in seconds since 1970.
    pub modified_at: i64,
    /// The mark of the upload in parts that made it.
    pub upload_mark: Option<String>,
}

/// The body of an object, or of a part of it.
pub struct Opened {
    pub body: SdkBody,
    pub tag: String,
    /// Which bytes these are: first and last one more, and the size of the whole.
    pub from: u64,
    pub to: u64,
    pub size_bytes: u64,
}

/// One page of a listing.
pub struct Page {
    pub found: Vec<Found>,
    /// How to ask for the next one.
    pub next: Option<String>,
}

/// An upload in parts that is not finished.
pub struct Unfinished {
    pub name: String,
    pub id: String,
    pub begun_at: i64,
}

/// See the module.
pub struct Bucket {
    pub client: Client,
    pub name: String,
    /// Empty, or ending in `/`.
    pub prefix: String,
    pub put: PutOptions,
    pub pace: Pace,
}

/// The pause that a server asks for, kept by all requests of a store.
#[derive(Default)]
pub struct Pace(Mutex<Pause>);

#[derive(Default)]
struct Pause {
    until: Option<Instant>,
    in_a_row: u32,
}

impl Pace {
    fn lock(&self) -> std::sync::MutexGuard<'_, Pause> {
        // Held for assignments only, which cannot panic.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits until the server may be asked again.
    pub async fn wait(&self) {
        let until = self.lock().until;
        if let Some(until) = until {
            tokio::time::sleep_until(until).await;
        }
    }

    fn note<T>(&self, outcome: &Result<T, Failure>) {
        /// Nobody is left alone for longer.
        const PAUSE_MAX: Duration = Duration::from_secs(30);
        let mut pause = self.lock();
        match outcome {
            Err(failure) if failure.is_throttling => {
                pause.in_a_row = pause.in_a_row.saturating_add(1);
                let wait = failure.retry_after.unwrap_or_else(|| RetryPolicy::brief().wait_after(pause.in_a_row));
                let until = Instant::now() + wait.min(PAUSE_MAX);
                pause.until = Some(pause.until.map_or(until, |before| before.max(until)));
            }
            // Of a request that was on its way before the pause began, too: what was asked for still holds, and ends by itself.
            Ok(_) => pause.in_a_row = 0,
            Err(_) => {}
        }
    }
}

/// `"abc"` and `abc` are the same tag.
pub(in crate::store) fn plain_tag(tag: Option<&str>) -> String {
    tag.unwrap_or_default().trim_matches('"').to_string()
}

fn quoted(tag: &str) -> String {
    format!("\"{tag}\"")
}

fn size(length: Option<i64>) -> u64 {
    length.and_then(|length| u64::try_from(length).ok()).unwrap_or(0)
}

/// Reads `bytes 5-9/20` (RFC 9110, section 14.4).
pub(in crate::store) fn parse_content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, size): (u64, u64, u64) = (first.parse().ok()?, last.parse().ok()?, size.parse().ok()?);
    (first <= last && last < size).then_some((first, last + 1, size))
}

impl Bucket {
    /// The key in the bucket.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn finish<T, E>(&self, action: Action, outcome: Result<T, SdkError<E, HttpResponse>>) -> Result<T, Failure>
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let outcome = outcome.map_err(|error| explain(action, &self.name, &error));
        self.pace.note(&outcome);
        outcome
    }

    fn done<T, E>(&self, action: Action, outcome: Result<T, SdkError<E, HttpResponse>>) -> Result<T>
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        self.finish(action, outcome).map_err(|failure| failure.error)
    }

    /// The body of `from..to`, or from there to the end, or of the whole object; of the version `tag` if one is named.
    pub async fn get(&self, name: &str, range: Option<(u64, Option<u64>)>, tag: Option<&str>) -> Result<Opened> {
        let range_text = range.map(|(from, to)| match to {
            // Servers read signed numbers.
            Some(to) => format!("bytes={from}-{}", to.saturating_sub(1).min(i64::MAX as u64 - 1)),
            None => format!("bytes={from}-"),
        });
        let request = self.client.get_object().bucket(&self.name).key(self.path(name));
        let request = request.set_range(range_text).set_if_match(tag.map(quoted));
        let output = self.done(Action::Read, request.send().await)?;
        let length = size(output.content_length());
        let told = output.content_range().and_then(parse_content_range);
        let (from, to, size_bytes) = match (range, told) {
            (None, _) => (0, length, length),
            (Some(_), Some(told)) => told,
            // The whole object came instead of a range of it.
            (Some((0, _)), None) => (0, length, length),
            (Some(_), None) => {
                let reason = "the server ignored the range that was asked for";
                return Err(Error::new(Kind::Unsupported, reason).hint("is there a proxy that drops 'Range'?"));
            }
        };
        let tag = plain_tag(output.e_tag());
        Ok(Opened { body: output.body.into_inner(), tag, from, to, size_bytes })
    }

    /// The object's description, or nothing if there is none.
    pub async fn head(&self, name: &str) -> Result<Option<Found>> {
        let request = self.client.head_object().bucket(&self.name).key(self.path(name));
        match self.finish(Action::Read, request.send().await) {
            Ok(output) => Ok(Some(Found {
                name: name.to_string(),
                size_bytes: size(output.content_length()),
                tag: plain_tag(output.e_tag()),
                modified_at: output.last_modified().map_or(0, |time| time.secs()),
                upload_mark: output.metadata().and_then(|known| known.get(UPLOAD_MARK)).cloned(),
            })),
            // An answer to HEAD has no body, so a missing bucket looks like a missing object, and a wrong key like a
            // missing permission. The same question as GET is answered with the reason.
            Err(failure) if failure.status.is_some_and(|status| (300..500).contains(&status)) => {
                match self.get(name, Some((0, Some(1))), None).await {
                    Err(error) if error.kind() == Kind::NotFound => Ok(None),
                    Err(error) => Err(error),
                    Ok(_) => Err(Error::new(Kind::Unreachable, "the object came or changed while it was looked at")),
                }
            }
            Err(failure) => Err(failure.error),
        }
    }

    /// Stores a whole object.
    pub async fn put(
        &self,
        name: &str,
        body: Bytes,
        condition: &Condition,
        checksum: Option<ChecksumKind>,
    ) -> Result<String> {
        let options = &self.put;
        let class = options.storage_class.as_deref().filter(|_| body.len() >= STORAGE_CLASS_BYTES_MIN);
        let (encryption, key) = encryption_words(&options.encryption);
        let mut request = self
            .client
            .put_object()
            .bucket(&self.name)
            .key(self.path(name))
            .set_server_side_encryption(encryption)
            .set_ssekms_key_id(key)
            .set_storage_class(class.map(StorageClass::from))
            .set_tagging(tagging(&options.tags));
        request = match checksum {
            Some(ChecksumKind::Crc32c) => request.checksum_crc32_c(crc32c(&body)),
            Some(ChecksumKind::Sha256) => request.checksum_algorithm(ChecksumAlgorithm::Sha256),
            Some(ChecksumKind::Md5) => request.content_md5(md5_of(&body)),
            None => request,
        };
        request = match condition {
            Condition::None => request,
            Condition::Absent => request.if_none_match("*"),
            Condition::Tag(tag) => request.if_match(quoted(tag)),
        };
        let outcome = request.body(ByteStream::from(body)).send().await;
        match self.finish(Action::Write, outcome) {
            Ok(output) => Ok(plain_tag(output.e_tag())),
            Err(failure) => Err(of_condition(failure, condition)),
        }
    }

    /// A page of the objects whose name begins with `prefix`: those after the name `after`, or those of the page
    /// `next`.
    pub async fn list(&self, prefix: &str, after: Option<&str>, next: Option<String>, limit: usize) -> Result<Page> {
        let limit = i32::try_from(limit.clamp(1, 1000)).unwrap_or(1000);
        let after = after.filter(|_| next.is_none()).map(|after| self.path(after));
        let request = self.client.list_objects_v2().bucket(&self.name).prefix(self.path(prefix)).max_keys(limit);
        let asked = next.clone();
        let request = request.set_start_after(after).set_continuation_token(next);
        let output = self.done(Action::List, request.send().await)?;
        let found = output.contents().iter().filter_map(|object| {
            Some(Found {
                name: object.key()?.strip_prefix(&self.prefix)?.to_string(),
                size_bytes: size(object.size()),
                tag: plain_tag(object.e_tag()),
                modified_at: object.last_modified().map_or(0, |time| time.secs()),
                upload_mark: None,
            })
        });
        let found = found.collect();
        let next = match output.is_truncated() {
            Some(true) => Some(next_page(asked.as_deref(), output.next_continuation_token())?),
            _ => None,
        };
        Ok(Page { found, next })
    }

    /// Removes at most 1000 objects; those that are not there count as removed.
    pub async fn delete(&self, names: &[String]) -> Result<()> {
        if let [name] = names {
            return self.delete_one(name).await;
        }
        let what = |error: aws_sdk_s3::error::BuildError| Error::new(Kind::Internal, error.to_string());
        let mut delete = Delete::builder().quiet(true);
        for name in names {
            delete = delete.objects(ObjectIdentifier::builder().key(self.path(name)).build().map_err(what)?);
        }
        let request = self.client.delete_objects().bucket(&self.name).delete(delete.build().map_err(what)?);
        // The SDK sends a CRC; older servers insist on the digest that came before it.
        let request = request.customize().mutate_request(add_content_md5);
        let output = match self.finish(Action::Delete, request.send().await) {
            Ok(output) => output,
            // Not every server has this call.
            Err(failure) if matches!(failure.status, Some(400 | 404 | 405 | 501)) && !is_about_bucket(&failure) => {
                for name in names {
                    self.delete_one(name).await?;
                }
                return Ok(());
            }
            Err(failure) => return Err(failure.error),
        };
        for refused in output.errors() {
            let code = refused.code().unwrap_or_default();
            if !matches!(code, "NoSuchKey" | "NotFound") {
                let name = refused.key().unwrap_or_default();
                let message =
                    format!("'{name}': the server answered '{code}: {}'", refused.message().unwrap_or_default());
                let kind = if code == "AccessDenied" { Kind::Forbidden } else { Kind::Unreachable };
                return Err(Error::new(kind, message));
            }
        }
        Ok(())
    }

    async fn delete_one(&self, name: &str) -> Result<()> {
        let request = self.client.delete_object().bucket(&self.name).key(self.path(name));
        match self.finish(Action::Delete, request.send().await) {
            Err(failure) if failure.error.kind() == Kind::NotFound => Ok(()),
            Err(failure) => Err(failure.error),
            Ok(_) => Ok(()),
        }
    }

    /// Begins an upload in parts and returns its id. `mark` is how it is known again.
    pub async fn begin_upload(&self, name: &str, mark: &str) -> Result<String> {
        let options = &self.put;
        let (encryption, key) = encryption_words(&options.encryption);
        let request = self
            .client
            .create_multipart_upload()
            .bucket(&self.name)
            .key(self.path(name))
            .metadata(UPLOAD_MARK, mark)
            .set_server_side_encryption(encryption)
            .set_ssekms_key_id(key)
            .set_storage_class(options.storage_class.as_deref().map(StorageClass::from))
            .set_tagging(tagging(&options.tags));
        let output = self.done(Action::Write, request.send().await)?;
        let none = || Error::new(Kind::Unreachable, "the server began an upload without an id");
        output.upload_id().map(str::to_string).ok_or_else(none)
    }

    /// Sends a part, whose number counts from 1; returns what completes the upload.
    pub async fn upload_part(&self, name: &str, upload: &str, number: i32, body: Bytes) -> Result<CompletedPart> {
        let request = self.client.upload_part().bucket(&self.name).key(self.path(name)).upload_id(upload);
        let outcome = request.part_number(number).body(ByteStream::from(body)).send().await;
        let output = self.done(Action::Write, outcome)?;
        Ok(CompletedPart::builder().part_number(number).set_e_tag(output.e_tag().map(str::to_string)).build())
    }

    /// Makes one object of the parts.
    pub async fn complete_upload(
        &self,
        name: &str,
        upload: &str,
        parts: Vec<CompletedPart>,
        condition: &Condition,
    ) -> Result<String> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let request = self.client.complete_multipart_upload().bucket(&self.name).key(self.path(name));
        let mut request = request.upload_id(upload).multipart_upload(parts);
        request = match condition {
            Condition::None => request,
            Condition::Absent => request.if_none_match("*"),
            Condition::Tag(tag) => request.if_match(quoted(tag)),
        };
        match self.finish(Action::Write, request.send().await) {
            Ok(output) => Ok(plain_tag(output.e_tag())),
            Err(failure) if failure.code.as_deref() == Some("NoSuchUpload") => Err(failure.error),
            Err(failure) => Err(of_condition(failure, condition)),
        }
    }

    /// Throws the parts away; an upload that is gone already is fine.
    pub async fn abort_upload(&self, name: &str, upload: &str) -> Result<()> {
        let request = self.client.abort_multipart_upload().bucket(&self.name).key(self.path(name)).upload_id(upload);
        match self.finish(Action::Write, request.send().await) {
            Err(failure) if failure.error.kind() == Kind::NotFound => Ok(()),
            Err(failure) => Err(failure.error),
            Ok(_) => Ok(()),
        }
    }

    /// A page of the uploads in parts below the repository's prefix that are not finished: the first one, or the one behind
    /// the key and the upload that `after` names; and what names the next page. A page whose successor cannot be named is
    /// the last one.
    pub async fn unfinished_uploads(
        &self,
        after: Option<(String, String)>,
    ) -> Result<(Vec<Unfinished>, Option<(String, String)>)> {
        let (key, upload) = after.clone().unzip();
        let request = self.client.list_multipart_uploads().bucket(&self.name).prefix(&self.prefix);
        let request = request.set_key_marker(key).set_upload_id_marker(upload);
        let output = self.done(Action::List, request.send().await)?;
        let unfinished = output.uploads().iter().filter_map(|upload| {
            Some(Unfinished {
                name: upload.key()?.strip_prefix(&self.prefix)?.to_string(),
                id: upload.upload_id()?.to_string(),
                begun_at: upload.initiated()?.secs(),
            })
        });
        let next = output.next_key_marker().filter(|_| output.is_truncated() == Some(true));
        let next = next.map(|key| (key.to_string(), output.next_upload_id_marker().unwrap_or_default().to_string()));
        Ok((unfinished.collect(), next.filter(|next| !next.0.is_empty() && after.as_ref() != Some(next))))
    }
}

/// How to ask for what follows a page that is not the last one. Without an answer, or with that for the page itself, the rest
/// would be taken for missing, or asked for without end.
fn next_page(asked: Option<&str>, next: Option<&str>) -> Result<String> {
    let reason = match next {
        None | Some("") => "the server says that its listing goes on, and not how",
        Some(next) if asked == Some(next) => "the server gives the same page of its listing again and again",
        Some(next) => return Ok(next.to_string()),
    };
    Err(Error::new(Kind::Unsupported, reason).hint("is there a proxy or a gateway before it that changes its answers?"))
}

/// A condition that did not hold, whichever way a server says it: an object that should be replaced may be gone.
fn of_condition(failure: Failure, condition: &Condition) -> Error {
    match (condition, failure.error.kind()) {
        (Condition::Tag(_), Kind::NotFound) => Error::new(Kind::Conflict, "it does not exist any more"),
        (Condition::Tag(_), Kind::Conflict) => Error::new(Kind::Conflict, "it was changed by somebody else"),
        (Condition::Absent, Kind::Conflict) => Error::new(Kind::Conflict, "it exists already"),
        _ => failure.error,
    }
}

fn is_about_bucket(failure: &Failure) -> bool {
    failure.code.as_deref() == Some("NoSuchBucket")
}

fn encryption_words(encryption: &Encryption) -> (Option<ServerSideEncryption>, Option<String>) {
    match encryption {
        Encryption::OfTheBucket => (None, None),
        Encryption::Managed => (Some(ServerSideEncryption::Aes256), None),
        Encryption::Kms(key) => (Some(ServerSideEncryption::AwsKms), key.clone()),
    }
}

/// Tags as a query string. Keys and values are letters, digits and a few signs: the configuration sees to that.
fn tagging(tags: &[(String, String)]) -> Option<String> {
    let pairs: Vec<String> = tags.iter().map(|(name, value)| format!("{name}={value}")).collect();
    (!pairs.is_empty()).then(|| pairs.join("&"))
}

fn crc32c(body: &[u8]) -> String {
    base64::encode(crc_fast::crc32_iscsi(body).to_be_bytes())
}

fn md5_of(body: &[u8]) -> String {
    base64::encode(Md5::digest(body))
}

fn add_content_md5(request: &mut HttpRequest) {
    if let Some(bytes) = request.body().bytes() {
        let digest = md5_of(bytes);
        request.headers_mut().insert("content-md5", digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_that_came_is_read_and_one_that_cannot_be_is_not() {
        assert_eq!(parse_content_range("bytes 5-9/20"), Some((5, 10, 20)));
        for bad in ["bytes */20", "bytes 9-5/20", "bytes 5-20/20", "5-9/20", "bytes 5-9/*", ""] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn checksums_are_those_that_everybody_else_computes() {
        // RFC 3720, appendix B.4 (32 bytes of zeroes), and RFC 1321, appendix A.5.
        assert_eq!(crc32c(&[0; 32]), base64::encode([0x8a, 0x91, 0x36, 0xaa]));
        assert_eq!(md5_of(b"abc"), "kAFQmDzST7DWlj99KOF/cg==");
    }

    #[tokio::test]
    async fn a_pause_that_the_server_asked_for_lasts_also_when_an_earlier_request_is_answered() {
        let pace = Pace::default();
        let throttled = |retry_after| Failure {
            error: Error::new(Kind::Unreachable, "fewer requests"),
            is_throttling: true,
            retry_after,
            status: Some(503),
            code: None,
        };
        pace.note::<()>(&Err(throttled(Some(Duration::from_secs(20)))));
        pace.note(&Ok(()));
        assert!(tokio::time::timeout(Duration::from_millis(20), pace.wait()).await.is_err(), "the pause was ended");
        // It is over when its time is, and the next one is as short as the first.
        assert_eq!(pace.lock().in_a_row, 0);
        pace.lock().until = Some(Instant::now());
        tokio::time::timeout(Duration::from_secs(60), pace.wait()).await.unwrap();
    }
}
