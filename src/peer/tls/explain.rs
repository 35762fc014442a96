//! From the words of a TLS library to what a person can do about it.

use std::error::Error as StdError;

use jiff::Timestamp;
use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError};

use super::verify::WrongIdentity;
use crate::error::{Error, Kind};
use crate::model::target::utc_text;

const OTHER_AUTHORITY: &str =
    "both hosts need certificates of the same authority: is 'ca' in [tls] the same file on both?";
const CLOCKS: &str = "is the clock of one of the hosts wrong?";

/// The error of the TLS library inside of an error of something that used it.
fn tls_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // An I/O error hides what it is made of from `source`.
        next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

fn instant(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    Timestamp::from_second(seconds).map_or_else(|_| String::from("a time far away"), utc_text)
}

/// Why a client that meant `host` gave up, if it was for a reason of TLS.
pub fn explain_client_side(error: &(dyn StdError + 'static), host: &str) -> Option<Error> {
    let error = tls_error(error)?;
    Some(match error {
        rustls::Error::InvalidCertificate(reason) => about_certificate(reason, &format!("--host {host}")),
        rustls::Error::AlertReceived(alert) => about_refusal(*alert),
        rustls::Error::InvalidMessage(_) => no_tls(),
        other => Error::new(Kind::Forbidden, format!("no safe connection: {other}")),
    })
}

/// Why a server gave up on a caller.
pub fn explain_server_side(error: &std::io::Error) -> Error {
    match tls_error(error) {
        Some(rustls::Error::InvalidCertificate(reason)) => about_certificate(reason, "--host or --operator NAME"),
        Some(rustls::Error::NoCertificatesPresented) => {
            Error::new(Kind::Forbidden, "it has no certificate").hint("'keiki ca issue' makes one")
        }
        Some(rustls::Error::PeerIncompatible(_)) => Error::new(Kind::Forbidden, "it does not speak TLS 1.3"),
        Some(rustls::Error::InvalidMessage(_)) => Error::new(Kind::Forbidden, "it does not speak TLS"),
        Some(rustls::Error::AlertReceived(alert)) => {
            Error::new(Kind::Forbidden, format!("it refused our certificate: {alert:?}"))
        }
        Some(other) => Error::new(Kind::Forbidden, format!("no safe connection: {other}")),
        None => Error::new(Kind::Unreachable, format!("the connection broke: {error}")),
    }
}

fn no_tls() -> Error {
    Error::new(Kind::Forbidden, "what answers there does not speak TLS").hint("is that the port of an agent of keiki?")
}

/// What is wrong with the other end's certificate; `issue` is what to give to `keiki ca issue` for a new one.
fn about_certificate(reason: &CertificateError, issue: &str) -> Error {
    let forbidden = |message: String| Error::new(Kind::Forbidden, message);
    let renew = format!("issue a new one with 'keiki ca issue {issue}'; or {CLOCKS}");
    match reason {
        CertificateError::ExpiredContext { not_after, .. } => {
            forbidden(format!("its certificate expired on {}", instant(*not_after))).hint(renew)
        }
        CertificateError::Expired => forbidden("its certificate has expired".into()).hint(renew),
        CertificateError::NotValidYetContext { not_before, .. } => {
            forbidden(format!("its certificate is not valid before {}", instant(*not_before))).hint(CLOCKS)
        }
        CertificateError::NotValidYet => forbidden("its certificate is not valid yet".into()).hint(CLOCKS),
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            forbidden("its certificate is of another authority".into()).hint(OTHER_AUTHORITY)
        }
        CertificateError::InvalidPurposeContext { .. } | CertificateError::InvalidPurpose => {
            forbidden("its certificate is not made for this".into())
                .hint("an agent needs a certificate of 'keiki ca issue --host', not one of an operator")
        }
        CertificateError::Other(other) => match other.0.downcast_ref::<WrongIdentity>() {
            Some(wrong) => forbidden(wrong.to_string())
                .hint("is the address in [[peer]] that of another host, or was the wrong certificate installed there?"),
            None => match other.0.downcast_ref::<Error>() {
                Some(ours) => ours.clone(),
                None => forbidden(format!("its certificate cannot be used: {}", other.0)),
            },
        },
        other => forbidden(format!("its certificate cannot be used: {other}")),
    }
}

/// What the other end thought of us.
fn about_refusal(alert: AlertDescription) -> Error {
    let forbidden = |message: &str| Error::new(Kind::Forbidden, message);
    match alert {
        AlertDescription::CertificateExpired => forbidden("it refused this host's certificate as not valid now")
            .hint("'keiki doctor' shows until when it is valid, 'keiki ca issue' makes a new one"),
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            forbidden("it refused this host's certificate as one of another authority").hint(OTHER_AUTHORITY)
        }
        AlertDescription::CertificateRequired => forbidden("it wants a certificate")
            .hint("[tls] in the configuration names the files, 'keiki ca issue' makes them"),
        AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure => {
            forbidden("it has no version of TLS in common with this host").hint("keiki speaks TLS 1.3 only")
        }
        other => Error::new(Kind::Forbidden, format!("it refused this host's certificate: {other:?}"))
            .hint("was it made by 'keiki ca issue'? the log of the other agent says more"),
    }
}
