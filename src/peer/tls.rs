//! Who is at the other end: mutual TLS 1.3 with a private certification authority.
//!
//! * A certificate names exactly one identity, as a URI among its subject alternative names: `keiki://host/NAME` or
//!   `keiki://operator/NAME`. DNS names and addresses in it mean nothing, so hosts may move.
//! * Both sides must have a certificate of an authority in the file `ca`. A client insists on the host that it means,
//!   not on the address at which it found it.
//! * There is no resumption: each connection proves its identity anew, with the files as they are then.
//! * The files are read again when they change. What cannot be read then leaves the identity as it was, and is logged.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};

use crate::error::{Context, Error, Kind, Result};
use crate::model::check::CheckItem;
use crate::model::id::check_name;
use crate::model::target::utc_text;

mod explain;
mod verify;

pub use explain::{explain_client_side, explain_server_side};

/// The files are looked at again at a handshake, but not more often than this.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// A file of certificates is a few kilobytes; what is much longer is something else.
const PEM_BYTES_MAX: u64 = 1 << 20;
/// `doctor` warns this long before a certificate expires.
const WARN_BEFORE_EXPIRY_SECONDS: i64 = 30 * 86400;

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

/// Who a certificate is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Identity {
    Host(String),
    Operator(String),
}

impl Identity {
    /// Reads `keiki://host/NAME` or `keiki://operator/NAME`.
    pub fn parse_uri(uri: &str) -> Result<Identity> {
        let identity = match uri.strip_prefix("keiki://").and_then(|rest| rest.split_once('/')) {
            Some(("host", name)) => Identity::Host(name.to_string()),
            Some(("operator", name)) => Identity::Operator(name.to_string()),
            _ => return Err(Error::new(Kind::BadInput, format!("'{}' names no identity", uri.escape_default()))),
        };
        check_name(identity.what(), identity.name())?;
        Ok(identity)
    }

    /// `keiki://host/NAME`, as it stands in the certificate.
    pub fn uri(&self) -> String {
        match self {
            Identity::Host(name) => format!("keiki://host/{name}"),
            Identity::Operator(name) => format!("keiki://operator/{name}"),
        }
    }

    pub fn name(&self) -> &str {
        match self {
            Identity::Host(name) | Identity::Operator(name) => name,
        }
    }

    /// For messages about its name.
    pub fn what(&self) -> &'static str {
        match self {
            Identity::Host(_) => "a host",
            Identity::Operator(_) => "an operator",
        }
    }
}

impl fmt::Display for Identity {
    /// As rules write it: `host:a`, `operator:ann`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::Host(name) => write!(f, "host:{name}"),
            Identity::Operator(name) => write!(f, "operator:{name}"),
        }
    }
}

/// What keiki reads from a certificate. Whether anybody vouches for it is another question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    pub identity: Identity,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
}

impl CertificateFacts {
    /// Reads a certificate in DER, which may come from a stranger.
    pub fn read(der: &[u8]) -> Result<CertificateFacts> {
        let damaged = || Error::new(Kind::Damaged, "the certificate cannot be read");
        let (rest, certificate) = x509_parser::parse_x509_certificate(der).map_err(|_| damaged())?;
        let names = certificate.subject_alternative_name().map_err(|_| damaged())?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                x509_parser::extensions::GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .collect();
        let [uri] = uris[..] else {
            let error = format!("the certificate names {} identities, not one", uris.len());
            return Err(Error::new(Kind::Forbidden, error).hint("was it made by 'keiki ca issue'?"));
        };
        let instant = |time: x509_parser::time::ASN1Time| Timestamp::from_second(time.timestamp());
        match (instant(certificate.validity.not_before), instant(certificate.validity.not_after)) {
            (Ok(not_before), Ok(not_after)) if rest.is_empty() => {
                Ok(CertificateFacts { identity: Identity::parse_uri(uri)?, not_before, not_after })
            }
            _ => Err(damaged()),
        }
    }
}

/// The identity of this host or person, as loaded from its files.
pub struct TlsIdentity {
    config: TlsConfig,
    current: ArcSwap<Loaded>,
    last_look: Mutex<LastLook>,
}

struct LastLook {
    at: Instant,
    stamps: Vec<FileStamp>,
}

/// Changes when a file is replaced or written.
#[derive(PartialEq, Eq, Clone)]
struct FileStamp {
    modified: Option<std::time::SystemTime>,
    inode: u64,
    bytes: u64,
}

/// One reading of the files.
pub struct Loaded {
    /// Tells one reading from the next.
    generation: u64,
    facts: CertificateFacts,
    roots: Arc<RootCertStore>,
    key: Arc<CertifiedKey>,
    server: Arc<ServerConfig>,
}

/// A connection whose other end has proved who it is.
pub struct Accepted {
    pub stream: tokio_rustls::server::TlsStream<TcpStream>,
    pub peer: CertificateFacts,
    /// The reading of our own files that vouched for the peer.
    pub generation: u64,
}

impl TlsIdentity {
    /// Reads the three files and checks that they belong together. Whether the certificate is valid today is not
    /// checked: an agent whose certificate has expired goes on with what it can do alone.
    pub fn load(config: TlsConfig) -> Result<Arc<TlsIdentity>> {
        let stamps = stamps(&config);
        let loaded = read_files(&config, 1)?;
        Ok(Arc::new(TlsIdentity {
            config,
            current: ArcSwap::from_pointee(loaded),
            last_look: Mutex::new(LastLook { at: Instant::now(), stamps }),
        }))
    }

    /// Who this is.
    pub fn facts(&self) -> CertificateFacts {
        self.current.load().facts.clone()
    }

    /// Reads the files again now. If that fails, everything stays as it was.
    pub fn reload(&self) -> Result<()> {
        let mut look = self.last_look.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *look = LastLook { at: Instant::now(), stamps: stamps(&self.config) };
        let loaded = read_files(&self.config, self.current.load().generation + 1)?;
        self.current.store(Arc::new(loaded));
        Ok(())
    }

    /// Tells whether connections that were accepted in this generation should be made anew.
    pub fn is_current(&self, generation: u64) -> bool {
        self.current().generation == generation
    }

    /// The newest reading; the files are looked at if that was not done just now.
    fn current(&self) -> Arc<Loaded> {
        let changed = {
            let mut look = self.last_look.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let is_due = look.at.elapsed() >= LOOK_AGAIN_AFTER;
            if is_due {
                look.at = Instant::now();
            }
            is_due && stamps(&self.config) != look.stamps
        };
        if changed {
            match self.reload() {
                Ok(()) => tracing::info!("read the certificate '{}' again", self.config.certificate.display()),
                Err(error) => tracing::warn!("the earlier certificate stays in use: {error}"),
            }
        }
        self.current.load_full()
    }

    /// What `doctor` says about the files.
    pub fn check(&self, now: Timestamp) -> CheckItem {
        let current = self.current();
        let facts = &current.facts;
        let found = format!("'{}', valid until {}", facts.identity.uri(), utc_text(facts.not_after));
        let renew = "issue a new one with 'keiki ca issue' and copy it here; no restart is needed";
        if now > facts.not_after {
            CheckItem::fail("certificate", format!("{found}: it has expired"), renew)
        } else if now < facts.not_before {
            let found = format!("{found}, but from {} only", utc_text(facts.not_before));
            CheckItem::fail("certificate", found, "is the clock of this host wrong?")
        } else if facts.not_after.as_second() - now.as_second() < WARN_BEFORE_EXPIRY_SECONDS {
            CheckItem::warn("certificate", found, renew)
        } else {
            CheckItem::pass("certificate", found)
        }
    }

    /// Does the server's part of a handshake. The error says who was refused and why.
    pub async fn accept(&self, socket: TcpStream) -> Result<Accepted> {
        let loaded = self.current();
        let refuse = |error: std::io::Error| explain_server_side(&error);
        // The hello is read before anything is answered, so that what speaks no TLS at all is told apart.
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket).await.map_err(refuse)?;
        match start.into_stream(loaded.server.clone()).into_fallible().await {
            Ok(stream) => {
                let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
                let certificate = certificate.ok_or_else(|| Error::new(Kind::Forbidden, "it has no certificate"))?;
                let peer = CertificateFacts::read(certificate)?;
                Ok(Accepted { stream, peer, generation: loaded.generation })
            }
            Err((error, socket)) => {
                say_farewell(socket).await;
                Err(refuse(error))
            }
        }
    }

    /// Does the client's part of a handshake with `host`, which must prove that it is that host.
    pub async fn connect(
        &self,
        socket: TcpStream,
        host: &str,
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let loaded = self.current();
        let config = loaded.client_config(host).map_err(std::io::Error::other)?;
        // Not a name that anybody looks at: an address is not sent as SNI, and the verifier knows whom it wants.
        let name = ServerName::IpAddress(std::net::IpAddr::from([127, 0, 0, 1]).into());
        TlsConnector::from(Arc::new(config)).connect(name, socket).await
    }
}

impl Loaded {
    fn client_config(&self, host: &str) -> Result<ClientConfig, rustls::Error> {
        let verifier = verify::HostVerifier::new(self.roots.clone(), host);
        let mut config = ClientConfig::builder_with_provider(verify::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(self.key.clone())));
        config.resumption = rustls::client::Resumption::disabled();
        config.enable_sni = false;
        Ok(config)
    }
}

/// Lets the other end read why it was refused: closing a socket with unread bytes in it would throw the alert away.
async fn say_farewell(mut socket: TcpStream) {
    let farewell = async {
        let mut unread = [0u8; 4096];
        if socket.shutdown().await.is_ok() {
            while socket.read(&mut unread).await.is_ok_and(|bytes| bytes > 0) {}
        }
    };
    // Whoever does not close its end in this time does not want to know.
    let _ = tokio::time::timeout(Duration::from_secs(1), farewell).await;
}

fn stamps(config: &TlsConfig) -> Vec<FileStamp> {
    use std::os::unix::fs::MetadataExt;
    [&config.ca, &config.certificate, &config.key]
        .map(|path| match std::fs::metadata(path) {
            Ok(meta) => FileStamp { modified: meta.modified().ok(), inode: meta.ino(), bytes: meta.len() },
            Err(_) => FileStamp { modified: None, inode: 0, bytes: 0 },
        })
        .into()
}

fn read_pem(what: &str, path: &Path) -> Result<Vec<u8>> {
    let hint = "'keiki ca issue' makes the files; see [tls] in the configuration";
    let context = || format!("cannot read {what} '{}'", path.display());
    let meta = std::fs::metadata(path).context(context).map_err(|error| error.hint(hint))?;
    if !meta.is_file() || meta.len() > PEM_BYTES_MAX {
        return Err(Error::new(Kind::BadInput, format!("{}: it is not a PEM file", context())).hint(hint));
    }
    std::fs::read(path).context(context).map_err(|error| error.hint(hint))
}

fn read_certificates(what: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = read_pem(what, path)?;
    let certificates: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(Error::new(Kind::BadInput, format!("cannot read {what} '{}': it is not a PEM file", path.display()))
            .hint("it should begin with '-----BEGIN CERTIFICATE-----'")),
    }
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    use std::os::unix::fs::PermissionsExt;
    let pem = read_pem("key", path)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| {
        Error::new(Kind::BadInput, format!("cannot read key '{}': it holds no private key", path.display()))
            .hint("it should begin with '-----BEGIN PRIVATE KEY-----'")
    })?;
    let meta = std::fs::metadata(path).context(|| format!("cannot read key '{}'", path.display()))?;
    if meta.permissions().mode() & 0o007 != 0 {
        return Err(Error::new(Kind::BadInput, format!("cannot use key '{}': every user can read it", path.display()))
            .hint(format!("chmod 600 '{}'; if it was copied about like that, issue a new one", path.display())));
    }
    Ok(key)
}

fn read_files(config: &TlsConfig, generation: u64) -> Result<Loaded> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates("CA certificate", &config.ca)? {
        roots.add(certificate).map_err(|error| {
            Error::new(Kind::BadInput, format!("cannot use CA certificate '{}': {error}", config.ca.display()))
        })?;
    }
    let roots = Arc::new(roots);
    let chain = read_certificates("certificate", &config.certificate)?;
    let what = || format!("cannot use certificate '{}'", config.certificate.display());
    let facts = CertificateFacts::read(&chain[0]).context(what)?;
    verify::check_own(&roots, &chain, &facts).map_err(|_| {
        Error::new(Kind::BadInput, format!("{}: no authority in '{}' has signed it", what(), config.ca.display()))
            .hint("are both files of the same 'keiki ca init'?")
    })?;
    let key = CertifiedKey::from_der(chain, read_key(&config.key)?, &verify::provider()).map_err(|error| {
        let why = match error {
            rustls::Error::InconsistentKeys(_) => format!("'{}' is not its key", config.key.display()),
            other => format!("'{}' cannot be used: {other}", config.key.display()),
        };
        Error::new(Kind::BadInput, format!("{}: {why}", what())).hint("copy both files of one 'keiki ca issue'")
    })?;
    let key = Arc::new(key);
    let server = server_config(roots.clone(), key.clone())
        .map_err(|error| Error::new(Kind::BadInput, format!("{}: {error}", what())))?;
    Ok(Loaded { generation, facts, roots, key, server: Arc::new(server) })
}

fn server_config(roots: Arc<RootCertStore>, key: Arc<CertifiedKey>) -> Result<ServerConfig, rustls::Error> {
    let verifier = verify::CallerVerifier::new(roots)?;
    let mut config = ServerConfig::builder_with_provider(verify::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

#[cfg(test)]
mod tests;
