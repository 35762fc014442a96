//! Who keiki is to an S3 server. Secrets come from a file, the environment or the machine; they are never arguments,
//! never part of the configuration itself, and never printed.

use std::fmt;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::provider_config::ProviderConfig;
use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider, future};
use aws_sdk_s3::config::Region;

use super::transport::Transport;
use crate::error::{Context, Error, Kind, Result};

/// A file is read again after this, so that new keys count without a restart.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(300);
const FILE_BYTES_MAX: u64 = 64 << 10;
const PROFILE_DEFAULT: &str = "default";

/// Where the credentials come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CredentialsSource {
    /// A file in the form of `~/.aws/credentials`. Nothing means: the environment, the files of the AWS tools, a web
    /// identity, a container's or an instance's role, whichever is there first.
    pub file: Option<PathBuf>,
    /// The section of the file; `default` if nothing is said.
    pub profile: Option<String>,
}

/// What gives the SDK its credentials. A file is read once now, so that mistakes in it are found at the start.
pub(super) async fn provider(
    source: &CredentialsSource,
    region: &str,
    transport: &Transport,
) -> Result<SharedCredentialsProvider> {
    if let Some(path) = &source.file {
        let profile = source.profile.clone().unwrap_or_else(|| PROFILE_DEFAULT.to_string());
        let file = CredentialsFile { path: path.clone(), profile };
        file.read()?;
        return Ok(SharedCredentialsProvider::new(file));
    }
    let region = Region::new(region.to_string());
    let surroundings = ProviderConfig::default().with_region(Some(region.clone())).with_http_client(transport.clone());
    let mut chain = DefaultCredentialsChain::builder().region(region).configure(surroundings);
    if let Some(profile) = &source.profile {
        chain = chain.profile_name(profile);
    }
    Ok(SharedCredentialsProvider::new(chain.build().await))
}

struct CredentialsFile {
    path: PathBuf,
    profile: String,
}

impl fmt::Debug for CredentialsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialsFile").field("path", &self.path).finish_non_exhaustive()
    }
}

impl CredentialsFile {
    fn read(&self) -> Result<Credentials> {
        let text = read_private(&self.path)?;
        let keys = Keys::parse(&text, &self.profile)
            .map_err(|error| error.while_doing(format!("cannot read credentials '{}'", self.path.display())))?;
        let expires = SystemTime::now() + READ_AGAIN_AFTER;
        Ok(Credentials::new(keys.access_key, keys.secret_key, keys.token, Some(expires), "keiki credentials file"))
    }
}

impl ProvideCredentials for CredentialsFile {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::ready(self.read().map_err(CredentialsError::provider_error))
    }
}

/// The text of a file that holds secrets. Anybody else who can read it is an error.
fn read_private(path: &Path) -> Result<String> {
    let what = || format!("cannot read credentials '{}'", path.display());
    let file = std::fs::File::open(path).context(what).map_err(|error| match error.kind() {
        Kind::NotFound => error
            .with_kind(Kind::BadInput)
            .hint("write it with a section '[default]' and the lines aws_access_key_id and aws_secret_access_key"),
        _ => error,
    })?;
    let mode = file.metadata().context(what)?.mode();
    if mode & 0o007 != 0 {
        let message = format!("{}: everybody on this host can read it (mode {:03o})", what(), mode & 0o777);
        return Err(Error::new(Kind::Forbidden, message).hint(format!("chmod 600 '{}'", path.display())));
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).context(what)?;
    Ok(text)
}

struct Keys {
    access_key: String,
    secret_key: String,
    token: Option<String>,
}

impl Keys {
    /// Reads a section of a file of the AWS tools (AWS SDKs and Tools reference guide, "Shared config and credentials
    /// files"). A file without any section is read as if it had the wanted one. No value appears in an error.
    fn parse(text: &str, profile: &str) -> Result<Keys> {
        let has_sections = text.lines().any(|line| line.trim_start().starts_with('['));
        let mut is_in_section = !has_sections;
        let mut was_found = is_in_section;
        let (mut access_key, mut secret_key, mut token) = (None, None, None);
        for line in text.lines().map(str::trim) {
            if let Some(section) = line.strip_prefix('[') {
                let name = section.trim_end_matches(']').trim();
                is_in_section = name.strip_prefix("profile ").unwrap_or(name).trim() == profile;
                was_found |= is_in_section;
            }
            let Some((name, value)) = line.split_once('=').filter(|_| is_in_section && !line.starts_with(['#', ';']))
            else {
                continue;
            };
            let value = Some(value.trim().to_string()).filter(|value| !value.is_empty());
            match name.trim() {
                "aws_access_key_id" => access_key = value,
                "aws_secret_access_key" => secret_key = value,
                "aws_session_token" => token = value,
                _ => {}
            }
        }
        let missing = |what: String| Error::new(Kind::BadInput, what);
        if !was_found {
            return Err(missing(format!("it has no section '[{profile}]'"))
                .hint("write that section, or name another one with 'profile' in [repository]"));
        }
        let of = |name: &str| missing(format!("section '[{profile}]' has no '{name}'"));
        Ok(Keys {
            access_key: access_key.ok_or_else(|| of("aws_access_key_id"))?,
            secret_key: secret_key.ok_or_else(|| of("aws_secret_access_key"))?,
            token,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const TEXT: &str = "# mine\n[default]\naws_access_key_id = AK1\naws_secret_access_key=SK/1=\n\n[profile two]\n\
                        aws_access_key_id=AK2\naws_secret_access_key = SK2\naws_session_token = T\n[three]\n";

    #[test]
    fn the_keys_of_the_wanted_section_are_read() {
        let keys =
            |profile: &str| Keys::parse(TEXT, profile).map(|keys| (keys.access_key, keys.secret_key, keys.token));
        assert_eq!(keys("default").unwrap(), ("AK1".into(), "SK/1=".into(), None));
        assert_eq!(keys("two").unwrap(), ("AK2".into(), "SK2".into(), Some("T".into())));
        assert!(keys("three").unwrap_err().message().contains("no 'aws_access_key_id'"));
        assert!(keys("four").unwrap_err().message().contains("no section '[four]'"));
        assert_eq!(Keys::parse("aws_access_key_id=A\naws_secret_access_key=B", "x").unwrap().secret_key, "B");
    }

    #[test]
    fn a_file_that_everybody_can_read_is_refused_and_no_error_shows_a_secret() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        std::fs::write(&path, TEXT).unwrap();
        let file = CredentialsFile { path: path.clone(), profile: "default".into() };
        let mode = |mode: u32| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o644);
        let error = file.read().unwrap_err();
        assert_eq!(error.kind(), Kind::Forbidden);
        assert!(error.hint_text().unwrap().contains("chmod 600"), "{error:?}");
        mode(0o600);
        assert_eq!(file.read().unwrap().access_key_id(), "AK1");
        for text in [format!("{file:?}"), format!("{:?}", file.read().unwrap()), format!("{error:?}")] {
            assert!(!text.contains("SK/1"), "{text}");
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(file.read().unwrap_err().kind(), Kind::BadInput);
    }
}
