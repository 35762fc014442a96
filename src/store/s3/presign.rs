//! Links: addresses with a signature in them, with which whoever has one can read one object until a moment (Amazon S3
//! API reference, "Authenticating Requests: Using Query Parameters (AWS Signature Version 4)").
//!
//! They are made here, without a question to the server. The host's name is signed, so a link is for the endpoint that it
//! names and for no other: that of the configuration, or the one by which others reach the same server.

use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::Config;
use aws_sdk_s3::presigning::PresigningConfig;
use jiff::{SignedDuration, Timestamp};

use super::credentials::CredentialsSource;
use super::explain::no_credentials;
use super::{S3Store, explain};
use crate::error::{Error, Kind, Result};
use crate::store::{Key, LINKS_MAX, Links, Store};

/// No link lasts longer (the same page, parameter `X-Amz-Expires`).
const VALID_FOR_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// What makes links.
pub(super) struct Presigner {
    config: Config,
    credentials: SharedCredentialsProvider,
    /// The credentials say themselves when they end, if they do.
    tells_expiry: bool,
}

impl Presigner {
    pub fn new(
        config: &Config,
        public_endpoint: Option<&str>,
        credentials: SharedCredentialsProvider,
        source: &CredentialsSource,
    ) -> Presigner {
        let mut builder = config.to_builder();
        if let Some(endpoint) = public_endpoint {
            builder = builder.endpoint_url(endpoint);
        }
        // What a file of ours says about its end is when it is read again.
        Presigner { config: builder.build(), credentials, tells_expiry: source.file.is_none() }
    }
}

/// See `Store::presign`.
pub(super) async fn presign(store: &S3Store, keys: &[Key], valid_for: Duration) -> Result<Links> {
    let what = || format!("cannot make links to objects of {}", store.describe());
    check_valid_for(valid_for).map_err(|error| error.while_doing(what()))?;
    if keys.len() > LINKS_MAX {
        return Err(Error::new(Kind::BadInput, format!("{}: more than {LINKS_MAX} were asked for", what())));
    }
    let presigner = &store.inner.presigner;
    let credentials = presigner.credentials.provide_credentials().await;
    let credentials =
        credentials.map_err(|error| explain::own_error(&error).unwrap_or_else(no_credentials).while_doing(what()))?;
    let now = store.inner.clock.now();
    let until = end_of(&credentials, presigner.tells_expiry);
    let may_end_earlier = credentials.session_token().is_some();
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(now.as_second()).unwrap_or(0));
    let bad = |why: String| Error::new(Kind::Internal, format!("{}: {why}", what()));
    let terms = PresigningConfig::builder().start_time(start).expires_in(valid_for).build();
    let terms = terms.map_err(|error| bad(error.to_string()))?;
    // The same credentials for all, whose end is known.
    let client = Client::from_conf(presigner.config.to_builder().credentials_provider(credentials).build());
    let bucket = store.bucket();
    let mut urls = Vec::with_capacity(keys.len());
    for key in keys {
        let request = client.get_object().bucket(&bucket.name).key(bucket.path(key.as_str()));
        let signed = request.presigned(terms.clone()).await.map_err(|error| {
            explain::own_error(&error).map_or_else(|| bad(explain::words_of(&error)), |error| error.while_doing(what()))
        })?;
        if let Some((name, _)) = signed.headers().next() {
            return Err(bad(format!("a link that needs the header '{name}' is none")));
        }
        urls.push(signed.uri().to_string());
    }
    let expires_at = Timestamp::from_second(now.as_second())
        .and_then(|now| now.checked_add(SignedDuration::try_from(valid_for)?))
        .map_err(|error| bad(error.to_string()))?;
    Ok(Links { urls, expires_at: until.map_or(expires_at, |until| until.min(expires_at)), may_end_earlier })
}

fn check_valid_for(valid_for: Duration) -> Result<()> {
    if valid_for > VALID_FOR_MAX {
        return Err(Error::new(Kind::BadInput, "a link lasts 7 days at most, as S3 has it")
            .hint("ask for less, as in '--link 7d', and make new ones when they are over"));
    }
    if valid_for < Duration::from_secs(1) {
        return Err(Error::new(Kind::BadInput, "a link must last a second at least").hint("write '--link 1h'"));
    }
    Ok(())
}

/// When temporary credentials end, if they say so.
fn end_of(credentials: &Credentials, tells_expiry: bool) -> Option<Timestamp> {
    let end = credentials.expiry().filter(|_| tells_expiry && credentials.session_token().is_some())?;
    let seconds = end.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    Timestamp::from_second(i64::try_from(seconds).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_last_from_a_second_to_seven_days() {
        let kind = |seconds: u64| check_valid_for(Duration::from_secs(seconds)).err().map(|error| error.kind());
        assert_eq!((kind(1), kind(7 * 86400)), (None, None));
        assert_eq!((kind(0), kind(7 * 86400 + 1)), (Some(Kind::BadInput), Some(Kind::BadInput)));
    }

    #[test]
    fn only_temporary_credentials_that_say_so_have_an_end() {
        let end = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let with = |token: Option<&str>| Credentials::new("a", "s", token.map(str::to_string), Some(end), "test");
        assert_eq!(end_of(&with(Some("t")), true).unwrap().as_second(), 1_700_000_000);
        assert_eq!(end_of(&with(Some("t")), false), None);
        assert_eq!(end_of(&with(None), true), None);
    }
}
