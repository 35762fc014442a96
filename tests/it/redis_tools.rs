//! The product's own check tools read the files of a clone where they are installed, and a clone says so; where they are
//! not, it is made all the same and claims nothing.

use std::path::Path;

use keiki::engine::{CloneSite, Engine};
use keiki::model::check::Verdict;
use keiki::model::target::Target;
use tokio_util::sync::CancellationToken;

use crate::engine_contract::redis::RedisSubject;
use crate::engine_contract::{Base, Grown, MemoryLog, Subject, back_up};
use crate::support::redis::Product;

/// A subject whose clones find the programs of this directory only.
struct WithPrograms<'a>(&'a RedisSubject, &'a Path);

impl Subject for WithPrograms<'_> {
    fn engine(&self) -> std::sync::Arc<dyn Engine> {
        self.0.engine()
    }

    fn cloner(&self) -> std::sync::Arc<dyn keiki::engine::CloneEngine> {
        self.0.cloner()
    }

    fn commit(&self, value: u64) {
        self.0.commit(value);
    }

    fn base_alone_is_no_database(&self) -> bool {
        self.0.base_alone_is_no_database()
    }

    fn name_point(&self, name: &str) {
        self.0.name_point(name);
    }

    fn now(&self) -> jiff::Timestamp {
        self.0.now()
    }

    fn switch_log(&self) {
        self.0.switch_log();
    }

    fn site(&self, root: &Path, base: &Base) -> CloneSite {
        CloneSite { bin_dir: Some(self.1.to_path_buf()), ..self.0.site(root, base) }
    }

    fn own(&self, path: &Path) {
        self.0.own(path);
    }

    fn values(&self, site: &CloneSite) -> Vec<u64> {
        self.0.values(site)
    }
}

/// What a clone to the latest moment says that check tools said of it.
async fn said_by_tools(subject: &dyn Subject, base: &Base) -> Vec<String> {
    let grown = Grown::stage(subject, base).await;
    let recovered = grown.recover(&Target::Latest, MemoryLog::of(subject).await).await.unwrap();
    assert_eq!(grown.values(), [1, 2, 3]);
    grown.stop().await;
    let of_tools = recovered.verified.into_iter().filter(|item| item.what.contains("-check-"));
    of_tools
        .map(|item| {
            assert_eq!((item.verdict, item.found.as_str()), (Verdict::Pass, "found nothing wrong"), "{item:?}");
            item.what
        })
        .collect()
}

/// A server whose log has two increments, and a backup from before the second.
async fn with_backup(product: Product) -> (RedisSubject, Base) {
    let subject = RedisSubject::start_of(product);
    subject.commit(1);
    let base = back_up(&subject, CancellationToken::new()).await.unwrap();
    subject.commit(2);
    subject.switch_log();
    subject.commit(3);
    (subject, base)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_products_own_tool_has_read_the_files_of_a_clone_and_is_named() {
    let products = [
        (Product::Redis7, "redis-check-aof"),
        (Product::Redis8, "redis-check-aof"),
        // Its tool for the append-only file does not know its own format of snapshots.
        (Product::Valkey9, "valkey-check-rdb and valkey-check-aof"),
    ];
    for (product, wanted) in products {
        let (subject, base) = with_backup(product).await;
        assert_eq!(said_by_tools(&subject, &base).await, [wanted], "{product:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_the_tool_makes_the_clone_and_claims_no_check() {
    let (subject, base) = with_backup(Product::Redis7).await;
    let programs = tempfile::Builder::new().prefix("keiki-programs").tempdir().unwrap();
    std::fs::set_permissions(programs.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let server = Product::Redis7.bin_dir().join("redis-server");
    std::fs::copy(server.canonicalize().unwrap(), programs.path().join("redis-server")).unwrap();
    let subject = WithPrograms(&subject, programs.path());
    assert_eq!(said_by_tools(&subject, &base).await, Vec::<String>::new());
}
