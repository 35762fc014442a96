//! Reading by links: every read and every listing of the store below is answered by a `LinksStore` over links that were
//! made for it, written to a file and read again.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use jiff::Timestamp;
use keiki::base::clock::SystemClock;
use keiki::error::{Kind, Result};
use keiki::format::links::{LinkLine, LinksHeader, LinksWriter};
use keiki::model::capabilities::Capabilities;
use keiki::model::id::{BackupId, IncarnationId};
use keiki::store::links::LinksStore;
use keiki::store::read::list_all;
use keiki::store::{ByteStream, Key, LINKS_MAX, ObjectInfo, PutCondition, Store, Tag};

use super::Fixture;

struct ReadByLinks {
    inner: Arc<dyn Store>,
}

pub fn reading_by_links(fixture: Fixture) -> Fixture {
    Fixture { store: Arc::new(ReadByLinks { inner: fixture.store }), ..fixture }
}

impl ReadByLinks {
    async fn links_to(&self, objects: &[ObjectInfo]) -> LinksStore {
        let now = Timestamp::now();
        let mut writer = LinksWriter::default();
        let header = LinksHeader {
            keiki: "test".into(),
            repository: self.inner.describe(),
            incarnation: IncarnationId::fresh(),
            backup: BackupId::parse("20261121T095900Z-k3xq").unwrap(),
            backup_ended_at: now,
            made_at: now,
            expires_at: now,
        };
        let mut text = writer.header(&header).unwrap();
        for some in objects.chunks(LINKS_MAX) {
            let keys: Vec<Key> = some.iter().map(|object| object.key.clone()).collect();
            let links = self.inner.presign(&keys, Duration::from_secs(600)).await.unwrap();
            for (object, url) in some.iter().zip(links.urls) {
                let (bytes, etag) = (object.size_bytes, object.tag.0.clone());
                text += &writer.link(&LinkLine { key: object.key.to_string(), bytes, etag, url }).unwrap();
            }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text + &writer.end().unwrap()).unwrap();
        LinksStore::open(file.path(), None, Arc::new(SystemClock)).unwrap()
    }
}

#[async_trait]
impl Store for ReadByLinks {
    async fn get(&self, key: &Key, range: Option<Range<u64>>) -> Result<ByteStream> {
        let found: Vec<ObjectInfo> = self.inner.head(key).await?.into_iter().collect();
        self.links_to(&found).await.get(key, range).await
    }

    async fn put(&self, key: &Key, body: Bytes, condition: PutCondition) -> Result<Tag> {
        self.inner.put(key, body, condition).await
    }

    async fn put_stream(&self, key: &Key, body: ByteStream, condition: PutCondition) -> Result<Tag> {
        self.inner.put_stream(key, body, condition).await
    }

    async fn head(&self, key: &Key) -> Result<Option<ObjectInfo>> {
        let found: Vec<ObjectInfo> = self.inner.head(key).await?.into_iter().collect();
        self.links_to(&found).await.head(key).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>> {
        let pages: Vec<_> = list_all(self.inner.as_ref(), prefix, None).collect().await;
        let all: Vec<ObjectInfo> = pages.into_iter().flat_map(|page| page.unwrap()).collect();
        self.links_to(&all).await.list(prefix, after, limit).await
    }

    async fn delete(&self, keys: &[Key]) -> Result<()> {
        self.inner.delete(keys).await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn probe(&self) -> Result<Option<Capabilities>> {
        self.inner.probe().await
    }

    fn adopt(&self, found: &Capabilities) {
        self.inner.adopt(found);
    }
}

#[tokio::test]
async fn a_store_without_links_says_so() {
    for fixture in [super::memory(), super::directory(), super::through_peer(super::memory())] {
        let error = fixture.store.presign(&[super::key("a")], Duration::from_secs(60)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
        assert!(error.hint_text().unwrap().contains("keiki backup download"), "{error:?}");
    }
}
