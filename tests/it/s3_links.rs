//! Links to a backup: whoever has them gets the same files as the agent's own download, and needs nothing else; whoever
//! has bad ones gets an error that says why, and no half of a directory.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use keiki::error::Kind;
use keiki::format::links::{LinkLine, LinksParser, LinksWriter};
use keiki::store::read::read_all;
use keiki::store::{Key, PutCondition, Store};

use super::download::{row_counts_in, start_host};
use super::support::hosts::{Host, KEIKI, Lab, fingerprint, free_port, wait_for};
use super::support::postgres::{TestServer, Version};
use super::support::s3::{Weed, fresh_prefix, open, self_signed};
use super::support::s3_proxy::{Proxy, Weather};

/// Runs `keiki restore` as on a host where nothing else of keiki is: no agent, no configuration, no credentials.
fn restore(links: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(KEIKI);
    command.env_clear().args(["--config", "/nonexistent", "restore", "--from-links"]).arg(links).args(more);
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What lies below a directory, by names relative to it.
fn contents(dir: &Path) -> Vec<(PathBuf, blake3::Hash)> {
    fingerprint(dir).into_iter().map(|(path, hash)| (path.strip_prefix(dir).unwrap().to_path_buf(), hash)).collect()
}

/// A file of links with each object as `change` makes it, whole as if it had been written so.
fn forged(links: &Path, place: PathBuf, change: impl Fn(LinkLine) -> LinkLine) -> PathBuf {
    let original = fs::read(links).unwrap();
    let mut lines = original.split_inclusive(|byte| *byte == b'\n');
    let (header, mut parser) = LinksParser::begin(lines.next().unwrap()).unwrap();
    let mut writer = LinksWriter::default();
    let mut text = writer.header(&header).unwrap();
    for line in lines {
        if let Some(link) = parser.next(line).unwrap() {
            text += &writer.link(&change(link)).unwrap();
        }
    }
    fs::write(&place, text + &writer.end().unwrap()).unwrap();
    place
}

fn objects_of(links: &Path) -> Vec<LinkLine> {
    let lines = fs::read_to_string(links).unwrap();
    let objects: Vec<LinkLine> = lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(objects.len(), lines.lines().count() - 2);
    objects
}

/// Host a with a PostgreSQL and a backup of it in a bucket, whose links lead through a proxy.
struct Scene {
    lab: Lab,
    a: Host,
    source: TestServer,
    port_a: u16,
    weed: Weed,
    prefix: String,
    proxy: Proxy,
    backup: String,
    authority: PathBuf,
}

impl Scene {
    fn start() -> Scene {
        let lab = Lab::new();
        let (certificate, key) = self_signed(&lab.path("ca"));
        let weed = Weed::start_with(Some((certificate.clone(), key)));
        let proxy = Proxy::start(weed.port());
        let prefix = fresh_prefix();
        let lines = format!("{}\npublic_endpoint = \"{}\"", weed.repository_lines(&prefix), proxy.endpoint());
        let source = TestServer::start(Version::V15, &[("wal_level", "replica")]);
        let port_a = free_port();
        let a = start_host(&lab, "a", &lines, &source, vec![], port_a);
        a.keiki_ok(&["repository", "init"]);
        wait_for("archiving to begin", Duration::from_secs(60), || a.instance("orders")["state"] == "archiving");
        source.sql("CREATE TABLE elsewhere AS SELECT generate_series(1, 777) AS i");
        source.sql("CREATE TABLE t AS SELECT generate_series(1, 100000) AS i");
        a.keiki_ok(&["backup", "create", "orders"]);
        source.sql("DELETE FROM t");
        let backup = a.json(&["backup", "list", "orders"])[0]["id"].as_str().unwrap().to_string();
        Scene { lab, a, source, port_a, weed, prefix, proxy, backup, authority: certificate }
    }

    fn links(&self, name: &str, valid_for: &str) -> PathBuf {
        let place = self.lab.path(name);
        let text = place.to_str().unwrap();
        let said = self.a.keiki_ok(&["backup", "download", "orders", &self.backup, "--link", valid_for, "--to", text]);
        assert!(said.contains("work until") && said.contains("keiki restore --from-links"), "{said}");
        place
    }

    /// Restores by links that are good for nothing; returns what is said. Nothing may be left.
    fn restore_fails(&self, links: &Path) -> String {
        let place = self.lab.path("never");
        let output = restore(links, &["--to", place.to_str().unwrap()]);
        let said = text(&output.stderr);
        assert!(!output.status.success(), "{}", text(&output.stdout));
        assert!(said.contains("hint: "), "{said}");
        let left = fs::read_dir(self.lab.path("")).unwrap().flatten().map(|entry| entry.file_name());
        let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with("never")).collect();
        assert!(left.is_empty(), "{left:?}");
        said
    }
}

#[test]
fn a_backup_restored_by_links_alone_is_the_one_that_is_downloaded() {
    let scene = Scene::start();
    let place = |name: &str| scene.lab.path(name);
    let (plain, archive) = (place("plain"), place("plain.tar"));
    let download = ["backup", "download", "orders", scene.backup.as_str()];
    for more in [["--to", plain.to_str().unwrap()], ["--tar", archive.to_str().unwrap()]] {
        scene.a.keiki_ok(&[&download[..], &more[..]].concat());
    }

    let links = scene.links("links", "1h");
    assert_eq!(fs::metadata(&links).unwrap().permissions().mode() & 0o777, 0o600);
    let first: serde_json::Value =
        serde_json::from_str(fs::read_to_string(&links).unwrap().lines().next().unwrap()).unwrap();
    assert_eq!((&first["backup"], &first["keiki"]), (&scene.backup.clone().into(), &env!("CARGO_PKG_VERSION").into()));
    assert_eq!(first["repository"], format!("{}/keiki/{}", scene.proxy.endpoint(), scene.prefix));
    let objects = objects_of(&links);
    for part in ["keiki.json", "/identity.json", "/manifest", "/packs/", "/log/"] {
        assert!(objects.iter().any(|object| object.key.contains(part)), "no link to '{part}'");
    }
    assert!(objects.iter().all(|object| !object.etag.is_empty() && object.url.starts_with(&scene.proxy.endpoint())));
    let mut secrets = fs::read_to_string(&links).unwrap();
    secrets.retain(|letter| letter != '\n');
    assert!(!secrets.contains("SKTESTSKTEST"), "the secret key is in the links");

    let restored = place("restored");
    let output = restore(&links, &["--to", restored.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains(" log file"), "{}", text(&output.stdout));
    assert_eq!(contents(&restored), contents(&plain));
    assert_eq!(row_counts_in(&scene.lab, &restored), "100000|5000050000|777");
    let piped = restore(&links, &["--tar", "-"]);
    assert!(piped.status.success(), "{}", text(&piped.stderr));
    assert!(piped.stdout == fs::read(&archive).unwrap(), "the streams differ");
    let again = restore(&links, &["--to", restored.to_str().unwrap()]);
    assert!(text(&again.stderr).contains("is not empty"), "{}", text(&again.stderr));

    // Printed, where no file is named, and bodies that break go on where they broke.
    let printed = scene.a.keiki(&[&download[..], &["--link", "10min"]].concat());
    assert!(
        printed.status.success() && text(&printed.stderr).contains("whoever has them"),
        "{}",
        text(&printed.stderr)
    );
    fs::write(place("printed"), &printed.stdout).unwrap();
    scene.proxy.set(Weather::Cut(100_000));
    let struck = scene.proxy.struck();
    let piped = restore(&place("printed"), &["--tar", "-"]);
    assert!(piped.status.success(), "{}", text(&piped.stderr));
    assert!(piped.stdout == fs::read(&archive).unwrap() && scene.proxy.struck() > struck);
    scene.proxy.set(Weather::Fine);

    // A host without access of its own has links made through another agent; TLS counts by its authority.
    let public = format!("https://127.0.0.1:{}", scene.weed.https_endpoint().rsplit(':').next().unwrap());
    let port_b = free_port();
    let lines = format!("{}\npublic_endpoint = \"{public}\"", scene.weed.repository_lines(&scene.prefix));
    let _b = start_host(&scene.lab, "b", &lines, &scene.source, vec![("a", scene.port_a)], port_b);
    let c =
        start_host(&scene.lab, "c", "peer://b", &scene.source, vec![("a", scene.port_a), ("b", port_b)], free_port());
    let encrypted = place("encrypted");
    c.keiki_ok(&["backup", "download", "a/orders", &scene.backup, "--link", "1h", "--to", encrypted.to_str().unwrap()]);
    assert!(objects_of(&encrypted).iter().all(|object| object.url.starts_with("https://127.0.0.1:")));
    let said = scene.restore_fails(&encrypted);
    assert!(said.contains("nobody who is trusted") && said.contains("--ca-file"), "{said}");
    let authority = scene.authority.to_str().unwrap();
    let piped = restore(&encrypted, &["--ca-file", authority, "--tar", "-"]);
    assert!(piped.status.success(), "{}", text(&piped.stderr));
    assert!(piped.stdout == fs::read(&archive).unwrap(), "the streams differ");
}

#[test]
fn bad_links_are_refused_with_the_reason_and_leave_nothing() {
    let scene = Scene::start();
    let download = ["backup", "download", "orders", scene.backup.as_str()];
    for (valid_for, reason) in [("8d", "7 days at most"), ("0s", "a second at least"), ("soon", "is not a duration")] {
        let never = scene.lab.path("never");
        let more = ["--link", valid_for, "--to", never.to_str().unwrap()];
        let said = scene.a.keiki_fails(&[&download[..], &more[..]].concat());
        assert!(said.contains(reason) && said.contains("hint: ") && !never.exists(), "{said}");
    }
    let links = scene.links("links", "1h");

    let short = scene.links("short", "1s");
    std::thread::sleep(Duration::from_secs(2));
    let said = scene.restore_fails(&short);
    assert!(said.contains("which is over") && said.contains("--link 12h"), "{said}");

    let mut bytes = fs::read(&links).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let changed = scene.lab.path("changed");
    fs::write(&changed, &bytes).unwrap();
    assert!(scene.restore_fails(&changed).contains("was it cut or changed"));
    fs::write(&changed, &bytes[..middle]).unwrap();
    assert!(scene.restore_fails(&changed).contains("was it cut or changed"));

    // Another name of the host than the one that was signed, and one where nobody is.
    let (wrong, signed) = (scene.lab.path("wrong"), scene.proxy.endpoint());
    let elsewhere = |endpoint: String| {
        forged(&links, wrong.clone(), |link| LinkLine { url: link.url.replace(&signed, &endpoint), ..link })
    };
    let said = scene.restore_fails(&elsewhere(scene.weed.endpoint()));
    assert!(said.contains("SignatureDoesNotMatch") && said.contains("public_endpoint"), "{said}");
    let said = scene.restore_fails(&elsewhere(format!("http://127.0.0.1:{}", free_port())));
    assert!(said.contains("connection refused"), "{said}");
    let said = scene.restore_fails(&forged(&links, wrong.clone(), |link| LinkLine { url: "x".into(), ..link }));
    assert!(said.contains("the link leads nowhere"), "{said}");

    // Wrong bytes on the way are found by what the backup says of them.
    let packs: Vec<LinkLine> = objects_of(&links).into_iter().filter(|link| link.key.contains("/packs/")).collect();
    scene.proxy.set(Weather::FlipDown(100_000));
    let said = scene.restore_fails(&links);
    assert!(said.contains("object '") || said.contains("cannot read '"), "{said}");
    scene.proxy.set(Weather::Fine);

    // The object itself: another one, and none.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (key, good) = runtime.block_on(async {
        let store = open(scene.weed.options(&scene.prefix)).await;
        let key = Key::parse(&packs[0].key).unwrap();
        let good = read_all(&*store, &key, 1 << 30).await.unwrap();
        let mut bad = good.to_vec();
        bad[20] ^= 1;
        store.put(&key, bad.into(), PutCondition::Replace).await.unwrap();
        (key, good)
    });
    let said = scene.restore_fails(&links);
    assert!(said.contains(key.as_str()) && said.contains("is not the one that the link was made for"), "{said}");
    runtime.block_on(async {
        let store = open(scene.weed.options(&scene.prefix)).await;
        store.delete(std::slice::from_ref(&key)).await.unwrap();
    });
    let said = scene.restore_fails(&links);
    assert!(said.contains(key.as_str()) && said.contains("is not there"), "{said}");
    let said = scene.a.keiki_fails(&[&download[..], &["--link", "1h"]].concat());
    assert!(said.contains(key.as_str()) && said.contains("not in the repository any more"), "{said}");
    runtime.block_on(async {
        let store = open(scene.weed.options(&scene.prefix)).await;
        store.put(&key, good, PutCondition::Create).await.unwrap();
        // Links are for reading.
        let links =
            keiki::store::links::LinksStore::open(&links, None, std::sync::Arc::new(keiki::base::clock::SystemClock));
        let links = links.unwrap();
        assert_eq!(links.put(&key, "x".into(), PutCondition::Replace).await.unwrap_err().kind(), Kind::Unsupported);
        assert_eq!(links.delete(&[key]).await.unwrap_err().kind(), Kind::Unsupported);
    });
    let output = restore(&links, &["--to", scene.lab.path("after-all").to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
}
