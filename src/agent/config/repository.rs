//! Where the repository lies: `[repository]`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{PeerConfig, Reader, place, raw, value};
use crate::error::{Error, Kind, Result};
use crate::model::cost::Prices;
use crate::store::s3::{CredentialsSource, Encryption, PART_BYTES_MIN, PutOptions};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryConfig {
    pub url: RepositoryUrl,
    /// What its operator asks for; nothing if nobody has said.
    pub prices: Option<Prices>,
}

/// Where the repository lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RepositoryUrl {
    /// `file:///srv/keiki`.
    File(PathBuf),
    /// `s3://bucket/prefix`.
    S3(Box<S3Config>),
    /// `peer://a`: through the agent of that host.
    Peer(String),
}

/// A bucket and how to use it. Holds no secret: those are in files, in the environment or with the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Config {
    pub bucket: String,
    /// Without slashes at its ends; may be empty.
    pub prefix: String,
    /// Nothing means that of Amazon for the region.
    pub endpoint: Option<String>,
    /// As others reach the same server, for links.
    pub public_endpoint: Option<String>,
    pub region: String,
    pub path_style: bool,
    pub ca: Option<PathBuf>,
    pub credentials: CredentialsSource,
    pub put: PutOptions,
    pub part_bytes: usize,
    /// A request on which nothing moves for so long has failed.
    pub timeout: Duration,
    pub connections: usize,
}

impl Reader<'_> {
    pub(super) fn repository(&self, raw: &raw::RawRepository, peers: &[PeerConfig]) -> Result<RepositoryConfig> {
        let prices = raw.prices.as_ref().map(|prices| self.prices(prices)).transpose()?.flatten();
        let url = raw.url.get_ref();
        if let Some(place) = url.strip_prefix("s3://") {
            return Ok(RepositoryConfig { url: RepositoryUrl::S3(Box::new(self.s3(place, raw)?)), prices });
        }
        let url = self.parse(&raw.url, |url| {
            if let Some(path) = url.strip_prefix("file://") {
                if Path::new(path).is_absolute() {
                    return Ok(RepositoryUrl::File(PathBuf::from(path)));
                }
                return Err(Error::new(Kind::BadInput, format!("'{url}' does not name an absolute path"))
                    .hint("write three slashes, as in 'file:///srv/keiki'"));
            }
            let Some(peer) = url.strip_prefix("peer://") else { return Err(place::unknown_url(url)) };
            if peers.iter().any(|known| known.name == peer) {
                return Ok(RepositoryUrl::Peer(peer.to_string()));
            }
            let hint = format!("add a [[peer]] with name = \"{peer}\" and its address");
            Err(Error::new(Kind::BadInput, format!("'{url}' names a host that is not a peer")).hint(hint))
        })?;
        self.nothing_of_s3(raw)?;
        Ok(RepositoryConfig { url, prices })
    }

    /// Keys that only mean something for a bucket are a mistake elsewhere.
    fn nothing_of_s3(&self, raw: &raw::RawRepository) -> Result<()> {
        let texts = [
            &raw.endpoint,
            &raw.public_endpoint,
            &raw.region,
            &raw.ca,
            &raw.credentials_file,
            &raw.profile,
            &raw.encryption,
            &raw.kms_key,
            &raw.storage_class,
            &raw.part_size,
            &raw.timeout,
        ];
        let spans = texts.into_iter().filter_map(|text| text.as_ref().map(|text| text.span()));
        let others = [raw.path_style.as_ref().map(|flag| flag.span()), raw.connections.as_ref().map(|it| it.span())];
        let tags = raw.tags.as_ref().map(|tags| tags.span());
        match spans.chain(others.into_iter().flatten()).chain(tags).min_by_key(|span| span.start) {
            None => Ok(()),
            Some(span) => {
                let error = Error::new(Kind::BadInput, "this is for a repository in S3");
                Err(self.wrong(span, error.hint("leave it out, or write url = \"s3://BUCKET/PREFIX\"")))
            }
        }
    }

    fn s3(&self, place: &str, raw: &raw::RawRepository) -> Result<S3Config> {
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        let prefix = prefix.trim_end_matches('/');
        check_bucket(bucket).and_then(|()| check_prefix(prefix)).map_err(|error| self.wrong(raw.url.span(), error))?;
        let endpoint = raw.endpoint.as_ref().map(|text| self.parse(text, parse_endpoint)).transpose()?;
        if endpoint.is_none() && raw.region.is_none() {
            let error = Error::new(Kind::BadInput, "neither 'region' nor 'endpoint' says where the bucket is");
            let hint = "add region = \"eu-central-1\" for Amazon S3, or endpoint = \"https://s3.example.net\"";
            return Err(self.wrong(raw.url.span(), error.hint(hint)));
        }
        let path_style = match &raw.path_style {
            // Servers that one runs oneself rarely have a name for each bucket.
            None => endpoint.is_some(),
            Some(flag) => *flag.get_ref(),
        };
        let profile = raw.profile.as_ref().map(|_| self.word_or(&raw.profile, "")).transpose()?;
        let part_bytes = self.parse_or(&raw.part_size, 8 << 20, |text| {
            let bytes = value::parse_size(text)?;
            if (PART_BYTES_MIN as u64..=256 << 20).contains(&bytes) {
                return Ok(bytes);
            }
            Err(Error::new(Kind::BadInput, format!("'{text}' is not from '5MiB' to '256MiB'")))
        })?;
        Ok(S3Config {
            bucket: bucket.to_string(),
            prefix: prefix.to_string(),
            endpoint,
            public_endpoint: raw.public_endpoint.as_ref().map(|text| self.parse(text, parse_endpoint)).transpose()?,
            region: self.word_or(&raw.region, "us-east-1")?,
            path_style,
            ca: raw.ca.as_ref().map(|path| self.path(path)).transpose()?,
            credentials: CredentialsSource {
                file: raw.credentials_file.as_ref().map(|path| self.path(path)).transpose()?,
                profile,
            },
            put: self.put_options(raw)?,
            timeout: self.parse_or(&raw.timeout, Duration::from_secs(30), |text| {
                let timeout = value::parse_duration(text)?;
                if (Duration::from_secs(1)..=Duration::from_secs(600)).contains(&timeout) {
                    return Ok(timeout);
                }
                Err(Error::new(Kind::BadInput, format!("'{text}' is not from '1s' to '10min'")))
            })?,
            // At most 256 MiB, which fits.
            part_bytes: part_bytes as usize,
            connections: self.number_or(&raw.connections, 32, 1..=1024)?,
        })
    }

    fn key_without_kms(&self, key: &raw::Text) -> Error {
        let error = Error::new(Kind::BadInput, "a key is for encryption = \"aws:kms\"");
        self.wrong(key.span(), error.hint("write that too, or leave 'kms_key' out"))
    }

    fn put_options(&self, raw: &raw::RawRepository) -> Result<PutOptions> {
        let key = raw.kms_key.as_ref().map(|_| self.word_or(&raw.kms_key, "")).transpose()?;
        let encryption = match (&raw.encryption, &raw.kms_key) {
            (None, None) => Encryption::OfTheBucket,
            (Some(text), key_text) => match (text.get_ref().as_str(), key_text) {
                ("AES256", None) => Encryption::Managed,
                ("aws:kms", _) => Encryption::Kms(key),
                ("AES256", Some(key)) => return Err(self.key_without_kms(key)),
                (other, _) => {
                    let error = Error::new(Kind::BadInput, format!("'{other}' is not a kind of encryption"));
                    return Err(self.wrong(text.span(), error.hint("write 'AES256' or 'aws:kms'")));
                }
            },
            (None, Some(key)) => return Err(self.key_without_kms(key)),
        };
        let storage_class = raw.storage_class.as_ref().map(|text| self.parse(text, parse_storage_class)).transpose()?;
        let mut tags = Vec::new();
        if let Some(list) = &raw.tags {
            for text in list.get_ref() {
                tags.push(parse_tag(text).map_err(|error| self.wrong(list.span(), error))?);
            }
        }
        Ok(PutOptions { encryption, storage_class, tags })
    }
}

/// Amazon S3 user guide, "Bucket naming rules"; other servers also take capitals and '_'.
fn check_bucket(bucket: &str) -> Result<()> {
    let is_good = (3..=63).contains(&bucket.len())
        && bucket.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
        && bucket.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if is_good {
        return Ok(());
    }
    Err(Error::new(Kind::BadInput, format!("'{bucket}' cannot be the name of a bucket"))
        .hint("write 's3://BUCKET/PREFIX'; a bucket has 3 to 63 letters, digits, '.' or '-'"))
}

/// Keys of up to 800 bytes must fit behind it; S3 allows 1024 in all.
fn check_prefix(prefix: &str) -> Result<()> {
    let part_is_good = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
    };
    if prefix.is_empty() || (prefix.len() <= 200 && prefix.split('/').all(part_is_good)) {
        return Ok(());
    }
    Err(Error::new(Kind::BadInput, format!("'{prefix}' cannot be a prefix"))
        .hint("use up to 200 letters, digits, '.', '-' or '_', with single slashes between them"))
}

fn parse_endpoint(text: &str) -> Result<String> {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or_default();
    let host = host.trim_end_matches('/');
    if host.is_empty() || host.contains(['/', '@', '?', '#']) || text.parse::<http::Uri>().is_err() {
        return Err(Error::new(Kind::BadInput, format!("'{}' is not an endpoint", without_secret(text)))
            .hint("write it like 'https://s3.example.net' or 'http://10.0.0.5:8333', without the bucket"));
    }
    Ok(text.trim_end_matches('/').to_string())
}

/// Somebody may have put a password into the endpoint.
fn without_secret(text: &str) -> String {
    match text.rsplit_once('@') {
        Some((_, host)) => format!("…@{host}"),
        None => text.to_string(),
    }
}

fn parse_storage_class(text: &str) -> Result<String> {
    if matches!(text, "GLACIER" | "DEEP_ARCHIVE") {
        return Err(Error::new(
            Kind::BadInput,
            format!("objects of class '{text}' cannot be read when they are needed"),
        )
        .hint("use 'STANDARD_IA', 'INTELLIGENT_TIERING' or 'GLACIER_IR'"));
    }
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_uppercase() || matches!(byte, b'_' | b'0'..=b'9')) {
        return Ok(text.to_string());
    }
    Err(Error::new(Kind::BadInput, format!("'{text}' is not a storage class"))
        .hint("write it as the server calls it, for example 'STANDARD_IA'"))
}

fn parse_tag(text: &str) -> Result<(String, String)> {
    let is_good = |word: &str| {
        !word.is_empty()
            && word.len() <= 128
            && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':' | b'/'))
    };
    match text.split_once('=') {
        Some((name, value)) if is_good(name) && is_good(value) => Ok((name.to_string(), value.to_string())),
        _ => Err(Error::new(Kind::BadInput, format!("'{text}' is not a tag"))
            .hint("write 'name=value' of letters, digits, '.', '-', '_', ':' and '/'")),
    }
}
