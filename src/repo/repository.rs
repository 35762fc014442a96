//! A repository as a whole: begin one, open one.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

use crate::base::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::format::document::{DOCUMENT_BYTES_MAX, Header};
use crate::format::layout;
use crate::model::capabilities::Capabilities;
use crate::model::id::RepositoryId;
use crate::repo::local_copy::LocalCopy;
use crate::store::read::get_optional;
use crate::store::{Key, PutCondition, Store};

/// An open repository. Cheap to share.
pub struct Repository {
    store: Arc<dyn Store>,
    header: Header,
    local_copy: LocalCopy,
}

impl Repository {
    /// Begins a repository in an empty store, after trying what the store can do. One that is there already, or remains of one, are a `Conflict`.
    pub async fn init(store: Arc<dyn Store>, now: Timestamp) -> Result<Arc<Repository>> {
        let where_it_is = store.describe();
        let refuse =
            |why: &str| Error::new(Kind::Conflict, format!("cannot initialise repository '{where_it_is}': {why}"));
        let exists = || {
            refuse("there is a repository already")
                .hint("it can be used as it is; to begin another one, choose another directory or prefix for it")
        };
        let key = Key::parse(layout::HEADER_KEY)?;
        if store.head(&key).await?.is_some() {
            return Err(exists());
        }
        if !store.list(layout::INCARNATIONS_PREFIX, None, 1).await?.is_empty() {
            return Err(refuse("it holds archives, but its header 'keiki.json' is missing").hint(
                "was the header deleted? Put it back from a copy of the bucket; to begin anew, use an empty prefix",
            ));
        }
        let probed = store.probe().await;
        let capabilities =
            probed.map_err(|error| error.while_doing(format!("cannot initialise repository '{where_it_is}'")))?;
        store.adopt(&capabilities.clone().unwrap_or_default());
        let header = Header { repository: RepositoryId::fresh(), created_at: now, capabilities };
        match store.put(&key, Bytes::from(header.to_bytes()?), PutCondition::Create).await {
            Ok(_) => Ok(Repository::new(store, header, None)),
            // Somebody else was faster, or the answer to an earlier attempt of this very call was lost.
            Err(error) if error.kind() == Kind::Conflict => Err(exists()),
            Err(error) => Err(error.while_doing(format!("cannot initialise repository '{where_it_is}'"))),
        }
    }

    /// Opens the repository that a store holds. Refuses one of a version that is not known.
    pub async fn open(store: Arc<dyn Store>) -> Result<Arc<Repository>> {
        let header = Repository::read_header(&store).await?;
        Ok(Repository::new(store, header, None))
    }

    /// Opens a repository and keeps what is learnt of it in files below `dir`, from one run of the agent to the next.
    /// The files may be lost at any time, and those of another repository do no harm.
    pub async fn open_with_local_copy(
        store: Arc<dyn Store>,
        dir: PathBuf,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Repository>> {
        let header = Repository::read_header(&store).await?;
        Ok(Repository::new(store, header, Some((dir, clock))))
    }

    fn new(store: Arc<dyn Store>, header: Header, local: Option<(PathBuf, Arc<dyn Clock>)>) -> Arc<Repository> {
        let local_copy = match local {
            Some((dir, clock)) => LocalCopy::in_dir(header.repository, dir, clock),
            None => LocalCopy::in_memory(header.repository),
        };
        Arc::new(Repository { store, header, local_copy })
    }

    /// Whether the repository can be read now: one small request. Errors as [`Repository::open`].
    pub async fn check(&self) -> Result<()> {
        Repository::read_header(&self.store).await.map(|_| ())
    }

    async fn read_header(store: &Arc<dyn Store>) -> Result<Header> {
        let what = format!("cannot open repository '{}'", store.describe());
        let key = Key::parse(layout::HEADER_KEY)?;
        let bytes = get_optional(store.as_ref(), &key, DOCUMENT_BYTES_MAX as u64)
            .await
            .map_err(|error| error.while_doing(&what))?;
        let Some(bytes) = bytes else {
            return Err(Error::new(Kind::NotFound, format!("{what}: there is none"))
                .hint("is the address right? 'keiki repository init' begins a new one"));
        };
        let header = Header::parse(layout::HEADER_KEY, &bytes).map_err(|error| error.while_doing(&what))?;
        store.adopt(&header.capabilities.clone().unwrap_or_default());
        Ok(header)
    }

    /// What this process remembers of it.
    pub fn local_copy(&self) -> &LocalCopy {
        &self.local_copy
    }

    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    pub fn id(&self) -> RepositoryId {
        self.header.repository
    }

    pub fn created_at(&self) -> Timestamp {
        self.header.created_at
    }

    /// What its object store can do, where that had to be found out when it was begun.
    pub fn capabilities(&self) -> Option<&Capabilities> {
        self.header.capabilities.as_ref()
    }

    /// Where it is, for messages.
    pub fn describe(&self) -> String {
        self.store.describe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    #[tokio::test]
    async fn a_repository_that_was_begun_is_opened_and_begun_only_once() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new("t"));
        let missing = Repository::open(store.clone()).await.err().unwrap();
        assert_eq!(missing.kind(), Kind::NotFound);
        assert!(missing.hint_text().unwrap().contains("keiki repository init"));

        let made = Repository::init(store.clone(), Timestamp::UNIX_EPOCH).await.unwrap();
        let opened = Repository::open(store.clone()).await.unwrap();
        assert_eq!((opened.id(), opened.created_at()), (made.id(), Timestamp::UNIX_EPOCH));
        assert_eq!(Repository::init(store, Timestamp::UNIX_EPOCH).await.err().unwrap().kind(), Kind::Conflict);
    }

    #[tokio::test]
    async fn a_repository_that_has_lost_its_header_is_not_begun_anew() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new("t"));
        let key = Key::parse("incarnations/x/identity.json").unwrap();
        store.put(&key, Bytes::from_static(b"{}"), PutCondition::Create).await.unwrap();
        assert_eq!(Repository::init(store, Timestamp::UNIX_EPOCH).await.err().unwrap().kind(), Kind::Conflict);
    }

    #[tokio::test]
    async fn a_repository_of_a_later_version_is_refused_by_its_version() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new("t"));
        let body = Bytes::from_static(br#"{"format_version": 2, "compressed": true}"#);
        store.put(&Key::parse("keiki.json").unwrap(), body, PutCondition::Create).await.unwrap();
        let error = Repository::open(store).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert_eq!(
            error.message(),
            "cannot open repository 'memory://t': object 'keiki.json' has format version 2, \
             and this keiki reads version 1"
        );
    }
}
