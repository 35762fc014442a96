//! What can be wrong with a repository. Each damage is done to a copy, which a host of its own then clones from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use jiff::Timestamp;

use super::super::support::hosts::{Host, HostOptions, fingerprint, free_port, wait_for};
use super::super::support::two_hosts::{SOON, Ship, TwoHosts, Via};
use super::{Mask, Said, assert_unchanged, standing};

/// A repository with two backups and sealed log before, between and behind them.
struct Scene {
    stage: TwoHosts,
    /// A moment and a position between the backups.
    between: Timestamp,
    between_lsn: String,
}

fn scene() -> Scene {
    let stage = TwoHosts::start(Ship::ArchiveCommand, Via::Directory);
    stage.source.sql("CREATE TABLE t AS SELECT i, md5(i::text) AS filler FROM generate_series(1, 20000) AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    let fill = |value: i32| {
        stage.source.sql(&format!("INSERT INTO t SELECT {value}, 'x' FROM generate_series(1, 100)"));
        stage.source.sql("SELECT pg_switch_wal()");
    };
    (1..=4).for_each(fill);
    // Inside of a segment.
    stage.source.sql("INSERT INTO t VALUES (0, 'between')");
    let between = Timestamp::now();
    let between_lsn = stage.source.sql("SELECT pg_current_wal_lsn()");
    (5..=8).for_each(fill);
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    (9..=12).for_each(fill);
    stage.wait_until_shipped();
    Scene { stage, between, between_lsn }
}

/// What is done to a repository, and what is then asked and answered.
struct Damage<'a> {
    title: &'static str,
    damage: &'a dyn Fn(&Path),
    questions: Vec<(Vec<&'a str>, &'static str)>,
}

#[test]
fn damage_in_the_repository_is_found_before_a_clone_is_handed_over() {
    let Scene { stage, between, between_lsn } = scene();
    let between = between.to_string();
    let clone = |target: &[&'static str]| [&["clone", "orders", "--as", "copy"], target].concat();
    let latest = || clone(&["--latest"]);
    let in_the_hole = ["clone", "orders", "--as", "copy", "--at", &between];
    let at_the_hole = ["clone", "orders", "--as", "copy", "--position", &between_lsn];
    let all_are_damaged =
        |name: &'static str| move |repository: &Path| all(repository, name).iter().for_each(|p| flip(p, 2));
    let manifests = all_are_damaged("manifest");
    let packs =
        |part: usize| move |repository: &Path| all(repository, "packs").iter().for_each(|path| flip(path, part));
    let (early_pack, late_pack) = (packs(4), packs(2));
    let damages = [
        Damage {
            title: "there is no such directory",
            damage: &|repository| fs::remove_dir_all(repository).unwrap(),
            questions: vec![(latest(), "damaged-0"), (vec!["backup", "list", "orders"], "damaged-0")],
        },
        Damage {
            title: "there is no header",
            damage: &|repository| fs::remove_file(repository.join("keiki.json")).unwrap(),
            questions: vec![
                (latest(), "there is none"),
                (vec!["window", "orders"], "there is none"),
                (vec!["repository", "init"], "its header 'keiki.json' is missing"),
            ],
        },
        Damage {
            title: "the format is of another version",
            damage: &set_unknown_format_version,
            questions: vec![(latest(), "format version"), (vec!["backup", "list", "orders"], "format version")],
        },
        Damage {
            title: "the header is no header",
            damage: &|repository| fs::write(repository.join("keiki.json"), "<html>").unwrap(),
            questions: vec![(latest(), "keiki.json"), (vec!["window", "orders"], "keiki.json")],
        },
        Damage {
            title: "both manifests have a flipped bit",
            damage: &manifests,
            questions: vec![(latest(), "manifest")],
        },
        Damage {
            title: "the manifests are cut short",
            damage: &|repository| all(repository, "manifest").iter().for_each(|path| cut_short(path)),
            questions: vec![(latest(), "manifest"), (vec!["backup", "list", "orders"], "manifest")],
        },
        Damage {
            title: "the packs have a flipped bit, early",
            damage: &early_pack,
            questions: vec![(latest(), "packs/")],
        },
        Damage {
            title: "the packs have a flipped bit, in the middle",
            damage: &late_pack,
            questions: vec![(latest(), "packs/")],
        },
        Damage {
            title: "the packs are cut short",
            damage: &|repository| all(repository, "packs").iter().for_each(|path| cut_short(path)),
            questions: vec![(latest(), "packs/")],
        },
        Damage {
            title: "the packs are missing",
            damage: &|repository| all(repository, "packs").iter().for_each(|path| fs::remove_file(path).unwrap()),
            questions: vec![(latest(), "packs/")],
        },
        Damage {
            title: "a segment between the backups is missing",
            damage: &|repository| fs::remove_file(segment_with(repository, &between_lsn)).unwrap(),
            questions: vec![
                (in_the_hole.to_vec(), "no archived log covers"),
                (at_the_hole.to_vec(), "its log has a hole there"),
            ],
        },
        Damage {
            title: "the last segments are missing",
            damage: &|repository| {
                let segments = all(repository, "sealed");
                segments[segments.len() - 3..segments.len() - 1].iter().for_each(|path| fs::remove_file(path).unwrap());
            },
            questions: vec![(latest(), "no archived log covers")],
        },
        Damage {
            title: "the segments have a flipped bit",
            damage: &|repository| all(repository, "sealed").iter().for_each(|path| flip(path, 2)),
            questions: vec![(latest(), "log/")],
        },
    ];
    let mut said = Said::new(Mask::default().known(stage.lab.path("").display(), "LAB/"));
    for (number, Damage { title, damage, questions }) in damages.iter().enumerate() {
        said.text.push_str(&format!("# {title}\n"));
        let copy = stage.lab.path(&format!("damaged-{number}"));
        assert!(Command::new("cp").arg("-a").arg(&stage.repository).arg(&copy).status().unwrap().success());
        damage(&copy);
        let (host, before) = (start_on(&stage, number, &copy), number_of(&copy));
        let lasting = if copy.exists() { Some(standing(&stage.lab, &[&host], &copy)) } else { None };
        for (arguments, expected) in questions {
            said.refuses(&host, arguments, expected);
        }
        assert_eq!(number_of(&copy), before, "{title}: the repository changed");
        if let Some(lasting) = lasting {
            assert_unchanged(&lasting, &stage.lab, &[&host], &copy, title);
        }
    }
    // What is not damaged can still be had.
    let copy = stage.lab.path("damaged-10");
    let host = start_on(&stage, 90, &copy);
    let port = free_port().to_string();
    host.keiki_ok(&["clone", "orders", "--as", "copy", "--latest", "--port", &port]);
    stage.assert_clone_is_exact(&stage.clone_at("copy", port.parse().unwrap()));
    host.keiki_ok(&["discard", "copy", "--yes"]);
    insta::assert_snapshot!(said.finish());
}

/// Every file with its content, or nothing where there is no directory.
fn number_of(repository: &Path) -> Vec<(PathBuf, blake3::Hash)> {
    if !repository.exists() {
        return Vec::new();
    }
    fingerprint(repository)
        .into_iter()
        .filter(|(path, _)| !path.components().any(|part| part.as_os_str() == ".tmp"))
        .collect()
}

fn start_on(stage: &TwoHosts, number: usize, repository: &Path) -> Host {
    let name = format!("d{number}");
    let options = HostOptions {
        name: &name,
        repository: format!("file://{}", repository.display()),
        peers: Vec::new(),
        sections: String::new(),
        listen_port: free_port(),
        clone_bin_dir: &stage.source.bin_dir,
    };
    Host::start(&stage.lab, &options)
}

/// The objects of the source's archive whose key has this part, in the order of their keys.
fn all(repository: &Path, part: &str) -> Vec<PathBuf> {
    let found: Vec<PathBuf> = fingerprint(repository)
        .into_iter()
        .map(|(path, _)| path)
        .filter(|path| path.components().any(|component| component.as_os_str() == part))
        .filter(|path| !path.to_str().unwrap().contains(".history"))
        .collect();
    assert!(!found.is_empty(), "the repository has no '{part}'");
    found
}

/// Flips one bit at a fraction of the length.
fn flip(path: &Path, part: usize) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() / part;
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

fn cut_short(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

fn set_unknown_format_version(repository: &Path) {
    let path = repository.join("keiki.json");
    let mut header: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    header["format_version"] = serde_json::json!(99);
    fs::write(path, header.to_string()).unwrap();
}

/// The sealed object of the segment that a position lies in; the segments are of 1 MiB.
fn segment_with(repository: &Path, lsn: &str) -> PathBuf {
    let (high, low) = lsn.split_once('/').unwrap();
    let low = u32::from_str_radix(low, 16).unwrap();
    let name = format!("00000001{:0>8}{:08X}", high, low >> 20);
    let found = all(repository, "sealed").into_iter().find(|path| path.to_str().unwrap().contains(&name));
    found.unwrap_or_else(|| panic!("no sealed segment '{name}'"))
}

#[test]
fn a_repository_that_is_away_is_said_to_be_away_and_is_used_again_when_it_is_back() {
    let stage = TwoHosts::start(Ship::ArchiveCommand, Via::Peer);
    stage.source.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i");
    stage.a.keiki_ok(&["backup", "create", "orders"]);
    stage.wait_until_shipped();
    let aside = stage.lab.path("aside");
    fs::rename(&stage.repository, &aside).unwrap();
    let mut said = Said::new(Mask::default().known(stage.lab.path("").display(), "LAB/"));
    for arguments in [&["window", "orders"][..], &["clone", "orders", "--as", "copy", "--latest"]] {
        said.refuses(&stage.a, arguments, "repository");
        // The other host, which goes through the first one, hears the same.
        said.refuses(&stage.b, arguments, "repository");
    }
    fs::rename(&aside, &stage.repository).unwrap();
    wait_for("the repository to be used again", SOON, || stage.b.keiki(&["window", "orders"]).status.success());
    stage.wait_until_shipped();
    stage.assert_latest_is_exact("copy");
    insta::assert_snapshot!(said.finish());
}
