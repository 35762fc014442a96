//! Who is at the other end: mutual TLS 1.3 with a private certification authority.

use std::path::PathBuf;

/// Where this host's identity lies. All three are PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// Certificates of the private authority: everybody who may talk has a certificate of one of them.
    pub ca: PathBuf,
    /// This host's certificate, with `keiki://host/<name>` as its subject alternative name.
    pub certificate: PathBuf,
    /// The private key of the certificate.
    pub key: PathBuf,
}
