//! From the errors of the SDK, of servers and of TLS to errors that say what to do.
//!
//! Codes are those of the Amazon S3 API reference, "Error responses"; other servers use the same ones or leave them
//! out, so the HTTP status decides where no code is known.

use std::error::Error as StdError;
use std::time::Duration;

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_types::error::display::DisplayErrorContext;

use crate::error::{Error, Kind};

/// What a failed call was about, for hints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Read,
    Write,
    List,
    Delete,
}

impl Action {
    /// The permission of the policy language that allows it.
    fn permission(self) -> &'static str {
        match self {
            Action::Read => "s3:GetObject",
            Action::Write => "s3:PutObject and s3:AbortMultipartUpload",
            Action::List => "s3:ListBucket",
            Action::Delete => "s3:DeleteObject",
        }
    }
}

/// A failed call: the error, and what the server said beside it.
pub struct Failure {
    pub error: Error,
    /// The server or something before it asks for fewer requests.
    pub is_throttling: bool,
    /// For how long it asks to be left alone.
    pub retry_after: Option<Duration>,
    /// The HTTP status, where there was an answer.
    pub status: Option<u16>,
    /// The error code in the answer; answers without a body, as to HEAD, have none.
    pub code: Option<String>,
}

/// Explains why a call on `bucket` failed.
pub fn explain<E>(action: Action, bucket: &str, error: &SdkError<E, HttpResponse>) -> Failure
where
    E: ProvideErrorMetadata + StdError + 'static,
{
    let (status, code, said) = match error {
        SdkError::ServiceError(service) => {
            let meta = service.err().meta();
            (Some(service.raw().status().as_u16()), meta.code(), meta.message().unwrap_or_default())
        }
        SdkError::ResponseError(response) => (Some(response.raw().status().as_u16()), None, ""),
        _ => (None, None, ""),
    };
    let header = |name: &str| error.raw_response().and_then(|raw| raw.headers().get(name));
    let Some(status) = status else {
        let error = own_error(error).unwrap_or_else(|| without_answer(error));
        return Failure { error, is_throttling: false, retry_after: None, status: None, code: None };
    };
    let answer = Answer {
        action,
        bucket,
        status,
        code: code.unwrap_or_default(),
        said,
        date: header("date").unwrap_or("unknown"),
        region: header("x-amz-bucket-region"),
    };
    Failure {
        error: answer.error(),
        is_throttling: answer.is_throttling(),
        retry_after: header("retry-after").and_then(|text| text.parse().ok()).map(Duration::from_secs),
        status: Some(status),
        code: code.map(str::to_string),
    }
}

/// The error of our own transport or of a body that broke, which travels inside those of the SDK.
pub fn own_error(error: &(dyn StdError + 'static)) -> Option<Error> {
    let mut next = Some(error);
    while let Some(inner) = next {
        if let Some(own) = inner.downcast_ref::<Error>() {
            return Some(own.clone());
        }
        next = inner.source();
    }
    None
}

/// No answer came, and not because of the network: the request could not be made, or there were no credentials.
fn without_answer(error: &(dyn StdError + 'static)) -> Error {
    let text = words_of(error);
    if text.contains("redential") || text.contains("dentity") {
        return no_credentials();
    }
    Error::new(Kind::Internal, format!("the request could not be made: {text}"))
}

/// An error of the SDK with all that is behind it.
pub fn words_of(error: &(dyn StdError + 'static)) -> String {
    DisplayErrorContext(error).to_string()
}

pub fn no_credentials() -> Error {
    Error::new(Kind::Forbidden, "no credentials were found").hint(
        "name a file with 'credentials_file' in [repository], or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY \
         in the environment of the agent, or give the machine a role",
    )
}

/// An answer that is not what was asked for.
struct Answer<'a> {
    action: Action,
    bucket: &'a str,
    status: u16,
    code: &'a str,
    said: &'a str,
    date: &'a str,
    region: Option<&'a str>,
}

impl Answer<'_> {
    fn is_throttling(&self) -> bool {
        const CODES: [&str; 6] = [
            "SlowDown",
            "Throttling",
            "ThrottlingException",
            "RequestLimitExceeded",
            "TooManyRequests",
            "ServiceUnavailable",
        ];
        matches!(self.status, 429 | 503) || CODES.contains(&self.code)
    }

    /// `AccessDenied: Access Denied. (status 403)`, as far as it is known.
    fn words(&self) -> String {
        let words: Vec<&str> =
            [self.code, self.said.trim_end_matches('.')].into_iter().filter(|w| !w.is_empty()).collect();
        match words.join(": ") {
            text if text.is_empty() => format!("the server answered with status {}", self.status),
            text => format!("the server answered '{text}' (status {})", self.status),
        }
    }

    fn of_kind(&self, kind: Kind) -> Error {
        Error::new(kind, self.words())
    }

    fn error(&self) -> Error {
        let bucket = self.bucket;
        match self.code {
            // Not `NotFound`, which would call every object missing.
            "NoSuchBucket" => Error::new(Kind::BadInput, format!("there is no bucket '{bucket}'"))
                .hint("is the name right, and the endpoint? create the bucket first: keiki never creates one"),
            "InvalidAccessKeyId" => Error::new(Kind::Forbidden, "the server does not know the access key")
                .hint("is it the key of this server? was it deleted, or not created yet?"),
            "SignatureDoesNotMatch" => Error::new(Kind::Forbidden, "the secret key does not belong to the access key")
                .hint(
                    "compare the secret key with the one that was issued; a proxy that changes requests does this too",
                ),
            "RequestTimeTooSkewed" | "RequestExpired" => {
                let message =
                    format!("the clocks of this host and of the server differ too much (it says {})", self.date);
                Error::new(Kind::Forbidden, message).hint(
                    "set the clock of this host, and let it follow time servers: 'timedatectl' shows whether it does",
                )
            }
            "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" => self
                .of_kind(Kind::Forbidden)
                .hint("the temporary credentials are over: whatever writes them has stopped doing so"),
            "AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException" => {
                self.wrong_region()
            }
            "InvalidObjectState" => Error::new(Kind::Unsupported, "the object is in an archive storage class")
                .hint("restore it in the object store first; for backups use a class that can be read at once"),
            "NoSuchKey" | "NotFound" => Error::new(Kind::NotFound, "no such object"),
            "NoSuchUpload" => Error::new(Kind::NotFound, "the upload does not exist any more"),
            "PreconditionFailed" => Error::new(Kind::Conflict, "it is not what it was"),
            // Nothing was stored: a write of somebody else was under way. Amazon S3 asks to try again.
            "ConditionalRequestConflict" | "OperationAborted" => self.of_kind(Kind::Unreachable),
            "QuotaExceeded" | "XMinioStorageFull" | "InsufficientStorage" | "XRustfsStorageFull" => self.full(),
            "BadDigest"
            | "XAmzContentSHA256Mismatch"
            | "InvalidDigest"
            | "IncompleteBody"
            | "RequestTimeout"
            | "InternalError" => self.of_kind(Kind::Unreachable),
            "NotImplemented" => self.of_kind(Kind::Unsupported),
            "AccessDenied" | "AllAccessDisabled" | "AccountProblem" => self.denied(),
            _ if self.is_throttling() => self
                .of_kind(Kind::Unreachable)
                .hint("the server asks for fewer requests: it is tried again, more slowly"),
            _ => self.error_by_status(),
        }
    }

    fn error_by_status(&self) -> Error {
        match self.status {
            301 | 307 | 400 if self.region.is_some() => self.wrong_region(),
            401 | 403 => self.denied(),
            404 => Error::new(Kind::NotFound, "no such object"),
            408 | 425 => self.of_kind(Kind::Unreachable),
            409 | 412 => Error::new(Kind::Conflict, "it is not what it was"),
            416 => Error::new(Kind::BadInput, "it has no such range"),
            501 => self.of_kind(Kind::Unsupported),
            507 => self.full(),
            500..=599 => self.of_kind(Kind::Unreachable).hint("the server has a problem: its log says more"),
            // An answer that cannot be read: something else answered, or it was changed on the way.
            200..=399 => self.of_kind(Kind::Unreachable).hint("is that an S3 server? a proxy may have answered"),
            _ => self.of_kind(Kind::BadInput),
        }
    }

    fn full(&self) -> Error {
        self.of_kind(Kind::Full).hint("make room in the object store, raise its quota, or expire backups")
    }

    fn denied(&self) -> Error {
        let (permission, bucket) = (self.action.permission(), self.bucket);
        self.of_kind(Kind::Forbidden)
            .hint(format!("the credentials need the permission {permission} for bucket '{bucket}' and its prefix"))
    }

    fn wrong_region(&self) -> Error {
        let hint = match self.region {
            Some(region) => format!("set region = \"{region}\" in [repository]"),
            None => "does 'region' in [repository] fit the bucket and the endpoint?".to_string(),
        };
        self.of_kind(Kind::BadInput).hint(hint)
    }
}

/// Why a TLS handshake failed, if it was the certificate or the protocol: nothing that goes away by trying again.
pub fn tls_reason(host: &str, error: &std::io::Error) -> Option<Error> {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>())?;
    let refuse = |why: &str, hint: &str| {
        Error::new(Kind::Forbidden, format!("the certificate of '{host}' is not good: {why}")).hint(hint)
    };
    use rustls::CertificateError as Bad;
    Some(match tls {
        rustls::Error::InvalidCertificate(Bad::UnknownIssuer) => refuse(
            "nobody who is trusted has signed it",
            "name the file of its certificate authority with 'ca' in [repository], or with --ca-file for links",
        ),
        rustls::Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => refuse(
            "it is for another name",
            "write the name of the certificate in 'endpoint' (for links, 'public_endpoint'), or is it the wrong server?",
        ),
        rustls::Error::InvalidCertificate(
            Bad::Expired | Bad::ExpiredContext { .. } | Bad::NotValidYet | Bad::NotValidYetContext { .. },
        ) => refuse("it is not valid now", "renew it, or is the clock of this host wrong?"),
        rustls::Error::InvalidCertificate(other) => {
            refuse(&format!("{other:?}"), "name its certificate authority with 'ca' in [repository]")
        }
        rustls::Error::InvalidMessage(_) => Error::new(Kind::BadInput, format!("'{host}' does not speak TLS there"))
            .hint("does the endpoint need 'http://' instead of 'https://', or another port?"),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, code: &'static str) -> Error {
        let region = (status == 301).then_some("eu-central-1");
        Answer { action: Action::Write, bucket: "b1", status, code, said: "Words.", date: "today", region }.error()
    }

    #[test]
    fn what_may_pass_is_tried_again_and_what_may_not_is_not() {
        for (status, code) in [(503, "SlowDown"), (503, ""), (429, ""), (500, "InternalError"), (502, ""), (200, "")] {
            assert_eq!(answer(status, code).kind(), Kind::Unreachable, "{status} {code}");
        }
        assert_eq!(answer(409, "ConditionalRequestConflict").kind(), Kind::Unreachable);
        assert_eq!(answer(507, "").kind(), Kind::Full);
        for (status, code, kind) in [
            (403, "AccessDenied", Kind::Forbidden),
            (403, "", Kind::Forbidden),
            (403, "SignatureDoesNotMatch", Kind::Forbidden),
            (404, "NoSuchBucket", Kind::BadInput),
            (404, "NoSuchKey", Kind::NotFound),
            (412, "", Kind::Conflict),
            (501, "", Kind::Unsupported),
            (400, "InvalidArgument", Kind::BadInput),
        ] {
            assert_eq!(answer(status, code).kind(), kind, "{status} {code}");
        }
    }

    #[test]
    fn a_refusal_names_the_permission_that_is_missing_and_a_wrong_region_the_right_one() {
        let denied = answer(403, "AccessDenied");
        assert_eq!(denied.message(), "the server answered 'AccessDenied: Words' (status 403)");
        assert!(denied.hint_text().unwrap().contains("s3:PutObject"), "{denied:?}");
        assert_eq!(answer(301, "").hint_text().unwrap(), "set region = \"eu-central-1\" in [repository]");
        assert!(answer(403, "RequestTimeTooSkewed").message().contains("today"));
    }
}
