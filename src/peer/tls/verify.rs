//! Certificates are checked by webpki; these verifiers add whom a certificate must be about.

use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
};

use super::{CertificateFacts, Identity};

/// The one implementation of cryptography in keiki.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));
    PROVIDER.clone()
}

/// A good certificate about somebody else.
#[derive(Debug)]
pub struct WrongIdentity {
    pub wanted: String,
    pub found: String,
}

impl fmt::Display for WrongIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its certificate is for '{}', not for '{}'", self.found, self.wanted)
    }
}

impl std::error::Error for WrongIdentity {}

fn refuse(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

fn signed_by_authority(
    roots: &RootCertStore,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), Error> {
    let certificate = ParsedCertificate::try_from(end_entity)?;
    let algorithms = provider().signature_verification_algorithms;
    verify_server_cert_signed_by_trust_anchor(&certificate, roots, intermediates, now, algorithms.all)
}

/// Whether our own certificate is of one of our own authorities, whatever the date.
pub fn check_own(
    roots: &Arc<RootCertStore>,
    chain: &[CertificateDer<'static>],
    facts: &CertificateFacts,
) -> Result<(), Error> {
    let [own, intermediates @ ..] = chain else { return Err(Error::NoCertificatesPresented) };
    let inside = u64::try_from(facts.not_before.as_second()).unwrap_or(0);
    let now = UnixTime::since_unix_epoch(Duration::from_secs(inside));
    // A certificate that is good for callers only is enough: operators have such.
    CallerVerifier::new(roots.clone())?.verify_client_cert(own, intermediates, now).map(|_| ())
}

/// What a client insists on: the host that it means.
#[derive(Debug)]
pub struct HostVerifier {
    roots: Arc<RootCertStore>,
    wanted: Identity,
}

impl HostVerifier {
    pub fn new(roots: Arc<RootCertStore>, host: &str) -> HostVerifier {
        HostVerifier { roots, wanted: Identity::Host(host.to_string()) }
    }
}

impl ServerCertVerifier for HostVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        signed_by_authority(&self.roots, end_entity, intermediates, now)?;
        let found = CertificateFacts::read(end_entity).map_err(refuse)?.identity;
        if found == self.wanted {
            return Ok(ServerCertVerified::assertion());
        }
        Err(refuse(WrongIdentity { wanted: self.wanted.uri(), found: found.uri() }))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// What a server insists on: somebody with a name.
#[derive(Debug)]
pub struct CallerVerifier {
    inner: Arc<dyn ClientCertVerifier>,
}

impl CallerVerifier {
    pub fn new(roots: Arc<RootCertStore>) -> Result<CallerVerifier, Error> {
        let inner = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(CallerVerifier { inner })
    }
}

impl ClientCertVerifier for CallerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        CertificateFacts::read(end_entity).map_err(refuse)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
