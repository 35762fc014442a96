//! The private certification authority: `keiki ca`.
//!
//! A directory that need not be on any of the hosts:
//! * `ca.pem` is the authority's certificate, for `[tls] ca` of every host, `ca.key` its key, which never leaves.
//! * `issued/NAME.pem` and `issued/NAME.key` are what a host gets, `issued/operator-NAME.pem` what a person gets.
//! * `issued.journal` has a line for each certificate, written before the certificate exists: what is valid is listed.
//!
//! Keys are ECDSA on P-256 (FIPS 186-5, curve of RFC 5480), which every TLS library verifies fast.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use serde::{Deserialize, Serialize};

use crate::base::durable::{create_dir_all_durable, create_file_exclusive_durable, write_file_durable};
use crate::base::journal::Journal;
use crate::error::{Context, Error, Kind, Result};
use crate::model::id::check_name;
use crate::peer::tls::Identity;

/// How long an authority lasts; all hosts need another `ca.pem` after that.
pub const AUTHORITY_DAYS: u32 = 3650;
/// How long a certificate lasts if nobody says otherwise.
pub const CERTIFICATE_DAYS_DEFAULT: u32 = 825;
pub const CERTIFICATE_DAYS_MAX: u32 = 3650;

/// Clocks of hosts differ; a certificate that was made just now must be good on all of them.
const CLOCK_TOLERANCE_SECONDS: i64 = 3600;
const DAY_SECONDS: i64 = 86400;

/// An authority in its directory.
pub struct Authority {
    directory: PathBuf,
}

/// A certificate that was issued, with the files that belong to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    pub entry: IssuedEntry,
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// The certificate of the authority, which is needed beside them.
    pub ca: PathBuf,
}

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedEntry {
    pub identity: Identity,
    /// Hexadecimal, as `openssl x509 -serial` prints it.
    pub serial: String,
    pub issued_at: Timestamp,
    pub not_after: Timestamp,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EntryLine {
    identity: String,
    serial: String,
    issued_at: String,
    not_after: String,
}

impl Authority {
    /// Makes a new authority in `directory`, which is created if need be; one that is there already is kept and is an
    /// error.
    pub fn init(directory: &Path, now: Timestamp) -> Result<Authority> {
        let authority = Authority { directory: directory.to_path_buf() };
        let what = || format!("cannot make a certification authority in '{}'", directory.display());
        if authority.key_path().exists() || authority.certificate_path().exists() {
            return Err(Error::new(Kind::Conflict, format!("{}: there is one already", what()))
                .hint("every host trusts it; to issue certificates use 'keiki ca issue'"));
        }
        create_dir_all_durable(&authority.directory.join("issued"), 0o700).context(what)?;
        let key = KeyPair::generate().map_err(|error| crypto_error(&what(), &error))?;
        let mut params = CertificateParams::default();
        // The name differs from that of any other authority, so that "of another authority" can be told from "damaged".
        let serial = fresh_serial();
        params.distinguished_name = common_name(&format!("keiki authority {}", &hex(&serial.to_bytes())[..8]));
        params.serial_number = Some(serial);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let until = now.as_second() + i64::from(AUTHORITY_DAYS) * DAY_SECONDS;
        set_validity(&mut params, now.as_second() - CLOCK_TOLERANCE_SECONDS, until).context(what)?;
        let certificate = params.self_signed(&key).map_err(|error| crypto_error(&what(), &error))?;
        // Without its certificate a key is of no use, so a crash between the two leaves nothing that was trusted.
        create_file_exclusive_durable(&authority.key_path(), key.serialize_pem().as_bytes(), 0o600)?;
        create_file_exclusive_durable(&authority.certificate_path(), certificate.pem().as_bytes(), 0o644)?;
        Ok(authority)
    }

    /// Opens the authority in `directory`.
    pub fn open(directory: &Path) -> Result<Authority> {
        let authority = Authority { directory: directory.to_path_buf() };
        for path in [authority.key_path(), authority.certificate_path()] {
            if !path.exists() {
                let what = format!("there is no certification authority in '{}'", directory.display());
                return Err(Error::new(Kind::NotFound, format!("{what}: '{}' is missing", path.display()))
                    .hint(format!("'keiki ca init {}' makes one", directory.display())));
            }
        }
        Ok(authority)
    }

    /// Issues a certificate with a new key for `days` from now. An earlier one of the same identity stays valid until
    /// its own end; its files are replaced.
    pub fn issue(&self, identity: &Identity, now: Timestamp, days: u32) -> Result<Issued> {
        if !(1..=CERTIFICATE_DAYS_MAX).contains(&days) {
            return Err(Error::new(Kind::BadInput, format!("a certificate cannot be valid for {days} days"))
                .hint(format!("give 1 to {CERTIFICATE_DAYS_MAX} days")));
        }
        let until = now.as_second() + i64::from(days) * DAY_SECONDS;
        self.issue_between(identity, now, now.as_second() - CLOCK_TOLERANCE_SECONDS, until)
    }

    /// Issues a certificate that is valid from one second of the Unix epoch to another.
    pub fn issue_between(&self, identity: &Identity, now: Timestamp, from: i64, until: i64) -> Result<Issued> {
        check_name(identity.what(), identity.name())?;
        let what = || format!("cannot issue a certificate for '{identity}'");
        let serial = fresh_serial();
        let not_after = Timestamp::from_second(until)
            .map_err(|_| Error::new(Kind::BadInput, format!("{}: it would be valid too long", what())))?;
        let entry =
            IssuedEntry { identity: identity.clone(), serial: hex(&serial.to_bytes()), issued_at: now, not_after };
        let key = KeyPair::generate().map_err(|error| crypto_error(&what(), &error))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&identity.to_string());
        params.serial_number = Some(serial);
        set_validity(&mut params, from, until).context(what)?;
        let uri = identity.uri().try_into().map_err(|error| crypto_error(&what(), &error))?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match identity {
            Identity::Host(_) => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            // A person's certificate cannot pretend to be an agent.
            Identity::Operator(_) => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        params.use_authority_key_identifier_extension = true;
        let certificate =
            params.signed_by(&key, &self.issuer().context(what)?).map_err(|error| crypto_error(&what(), &error))?;
        self.record(&entry).context(what)?;
        let issued = self.paths_of(entry);
        create_dir_all_durable(&self.directory.join("issued"), 0o700).context(what)?;
        write_file_durable(&issued.key, key.serialize_pem().as_bytes(), 0o600).context(what)?;
        write_file_durable(&issued.certificate, certificate.pem().as_bytes(), 0o644).context(what)?;
        Ok(issued)
    }

    /// What was issued, oldest first.
    pub fn list(&self) -> Result<Vec<IssuedEntry>> {
        let path = self.journal_path();
        let damaged = |line: usize| {
            Error::new(Kind::Damaged, format!("cannot read '{}': line {} is not ours", path.display(), line + 1))
        };
        let lines = Journal::read_all(&path)?;
        lines.iter().enumerate().map(|(line, bytes)| read_entry(bytes).ok_or_else(|| damaged(line))).collect()
    }

    /// The authority's certificate.
    pub fn certificate_path(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    fn key_path(&self) -> PathBuf {
        self.directory.join("ca.key")
    }

    fn journal_path(&self) -> PathBuf {
        self.directory.join("issued.journal")
    }

    fn paths_of(&self, entry: IssuedEntry) -> Issued {
        let stem = match &entry.identity {
            Identity::Host(name) => format!("issued/{name}"),
            Identity::Operator(name) => format!("issued/operator-{name}"),
        };
        Issued {
            entry,
            certificate: self.directory.join(format!("{stem}.pem")),
            key: self.directory.join(format!("{stem}.key")),
            ca: self.certificate_path(),
        }
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>> {
        let read =
            |path: PathBuf| std::fs::read_to_string(&path).context(|| format!("cannot read '{}'", path.display()));
        let key_path = self.key_path();
        let key = KeyPair::from_pem(&read(key_path.clone())?)
            .map_err(|error| crypto_error(&format!("cannot read '{}'", key_path.display()), &error))?;
        Issuer::from_ca_cert_pem(&read(self.certificate_path())?, key)
            .map_err(|error| crypto_error(&format!("cannot read '{}'", self.certificate_path().display()), &error))
    }

    fn record(&self, entry: &IssuedEntry) -> Result<()> {
        let (mut journal, lines) = Journal::open(&self.journal_path())?;
        let ours = self.paths_of(entry.clone()).certificate;
        let taken = lines
            .iter()
            .filter_map(|line| read_entry(line))
            .find(|other| other.identity != entry.identity && self.paths_of(other.clone()).certificate == ours);
        if let Some(other) = taken {
            return Err(Error::new(Kind::Conflict, format!("'{}' holds that of '{}'", ours.display(), other.identity))
                .hint("choose another name"));
        }
        let line = EntryLine {
            identity: entry.identity.uri(),
            serial: entry.serial.clone(),
            issued_at: entry.issued_at.to_string(),
            not_after: entry.not_after.to_string(),
        };
        let line = serde_json::to_vec(&line).map_err(|error| Error::new(Kind::Internal, error.to_string()))?;
        journal.append(&line)
    }
}

fn read_entry(line: &[u8]) -> Option<IssuedEntry> {
    let line: EntryLine = serde_json::from_slice(line).ok()?;
    Some(IssuedEntry {
        identity: Identity::parse_uri(&line.identity).ok()?,
        serial: line.serial,
        issued_at: line.issued_at.parse().ok()?,
        not_after: line.not_after.parse().ok()?,
    })
}

fn crypto_error(what: &str, error: &rcgen::Error) -> Error {
    Error::new(Kind::System, format!("{what}: {error}"))
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// 128 random bits, positive, as RFC 5280 section 4.1.2.2 wants serial numbers.
fn fresh_serial() -> SerialNumber {
    let mut bytes = *uuid::Uuid::new_v4().as_bytes();
    bytes[0] &= 0x7f;
    bytes[0] |= 0x40;
    SerialNumber::from_slice(&bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// Sets from when to when the certificate is valid, in seconds of the Unix epoch.
fn set_validity(params: &mut CertificateParams, from: i64, until: i64) -> Result<()> {
    /// 9999-12-31T23:59:59Z: later years have no form in a certificate (RFC 5280 section 4.1.2.5).
    const LAST_SECOND: u64 = 253_402_300_799;
    let second = |second: i64| u64::try_from(second).ok().filter(|second| *second <= LAST_SECOND);
    let (Some(from), Some(until)) = (second(from), second(until)) else {
        return Err(
            Error::new(Kind::BadInput, "a certificate cannot be valid at such a time").hint("is the clock right?")
        );
    };
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(from);
    params.not_after = epoch + Duration::from_secs(until);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn now() -> Timestamp {
        "2026-11-21T09:59:00Z".parse().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn an_issued_certificate_names_its_identity_and_its_end() {
        use rustls::pki_types::pem::PemObject;
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::init(&directory.path().join("ca"), now()).unwrap();
        let issued = authority.issue(&Identity::Operator("ann".into()), now(), 30).unwrap();
        let der = rustls::pki_types::CertificateDer::from_pem_file(&issued.certificate).unwrap();
        let facts = crate::peer::tls::CertificateFacts::read(&der).unwrap();
        assert_eq!(facts.identity, Identity::Operator("ann".into()));
        assert_eq!(facts.not_after.to_string(), "2026-12-21T09:59:00Z");
        assert_eq!(facts.not_before.to_string(), "2026-11-21T08:59:00Z");
        assert_eq!(issued.certificate, directory.path().join("ca/issued/operator-ann.pem"));
    }

    #[test]
    fn keys_are_readable_by_their_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::init(directory.path(), now()).unwrap();
        let issued = authority.issue(&Identity::Host("a".into()), now(), 30).unwrap();
        assert_eq!(mode(&directory.path().join("ca.key")), 0o600);
        assert_eq!(mode(&issued.key), 0o600);
        assert_eq!(mode(&issued.ca), 0o644);
    }

    #[test]
    fn everything_issued_is_listed() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::init(directory.path(), now()).unwrap();
        let first = authority.issue(&Identity::Host("a".into()), now(), 30).unwrap();
        let renewed = authority.issue(&Identity::Host("a".into()), now(), 60).unwrap();
        assert_ne!(first.entry.serial, renewed.entry.serial);
        assert_eq!(Authority::open(directory.path()).unwrap().list().unwrap(), [first.entry, renewed.entry]);
    }

    #[test]
    fn an_authority_that_is_there_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        Authority::init(directory.path(), now()).unwrap();
        let before = std::fs::read(directory.path().join("ca.pem")).unwrap();
        assert_eq!(Authority::init(directory.path(), now()).err().unwrap().kind(), Kind::Conflict);
        assert_eq!(std::fs::read(directory.path().join("ca.pem")).unwrap(), before);
    }

    #[test]
    fn bad_names_days_and_directories_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let missing = Authority::open(directory.path()).err().unwrap();
        assert_eq!(missing.kind(), Kind::NotFound);
        assert!(missing.hint_text().unwrap().contains("keiki ca init"));
        let authority = Authority::init(directory.path(), now()).unwrap();
        for name in ["../x", "", "a/b", "ä"] {
            assert_eq!(authority.issue(&Identity::Host(name.into()), now(), 1).unwrap_err().kind(), Kind::BadInput);
        }
        for days in [0, CERTIFICATE_DAYS_MAX + 1] {
            assert_eq!(authority.issue(&Identity::Host("a".into()), now(), days).unwrap_err().kind(), Kind::BadInput);
        }
        assert_eq!(authority.list().unwrap(), []);
    }

    #[test]
    fn two_identities_never_share_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::init(directory.path(), now()).unwrap();
        authority.issue(&Identity::Operator("ann".into()), now(), 1).unwrap();
        let error = authority.issue(&Identity::Host("operator-ann".into()), now(), 1).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
    }
}
