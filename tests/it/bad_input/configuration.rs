//! What can be wrong in the configuration: each mistake is named with file, line and key, by the agent and by the
//! command line, and no agent starts with it.

use std::fs;

use super::super::support::hosts::{Host, HostOptions, Lab};
use super::super::support::postgres::Version;
use super::{Mask, Said, paths_below, refusal};

const INSTANCE: &str = "[[instance]]\nname = \"orders\"\nengine = \"postgres\"\ndata_dir = \"/pg\"\n";

#[test]
fn a_mistake_in_the_configuration_is_named_with_file_line_and_key() {
    let lab = Lab::new();
    let bin_dir = Version::V15.bin_dir();
    let options = HostOptions {
        name: "a",
        repository: format!("file://{}", lab.path("repository").display()),
        // Nothing is started that would listen or call.
        peers: vec![("b", 7420)],
        sections: String::new(),
        listen_port: 7420,
        clone_bin_dir: &bin_dir,
    };
    let host = Host::prepare(&lab, &options);
    let good = fs::read_to_string(&host.config).unwrap();
    let place = lab.path("").display().to_string();
    let mask = Mask::default().keep_numbers().known(&place, "LAB/").known(place.trim_start_matches('/'), "LAB/");
    let mut said = Said::new(mask);
    let appended: [(&str, &str); 21] = [
        ("wal_levl = 1\n", "wal_levl"),
        ("[hosts]\n", "key 'hosts'"),
        ("[[instance]]\nname = \"orders\"\n", "'engine'"),
        ("ship_evry = \"5s\"\n", "'instance.ship_evry'"),
        ("ship_every = 5\n", "'instance.ship_every'"),
        ("ship_every = \"soon\"\n", "'instance.ship_every'"),
        ("ship_every = \"1ms\"\n", "'instance.ship_every'"),
        ("ship = \"wal\"\n", "'instance.ship'"),
        ("port = \"5432\"\n", "'instance.port'"),
        ("port = 70000\n", "'instance.port'"),
        ("run_as = \"\"\n", "'instance.run_as'"),
        ("slot_limit = \"16 gigs\"\n", "'instance.slot_limit'"),
        ("[instance.backup]\nschedule = \"nightly\"\n", "'instance.backup.schedule'"),
        ("[instance.backup]\nschedule = 5\n", "'instance.backup.schedule'"),
        ("[instance.backup]\nkeep_for = \"7d\"\n", "'schedule'"),
        (
            "[[instance]]\nname = \"orders\"\nengine = \"postgres\"\ndata_dir = \"/other\"\n",
            "'orders' is there already",
        ),
        ("[[instance]]\nname = \"x\"\nengine = \"oracle\"\ndata_dir = \"/other\"\n", "'instance.engine'"),
        ("[[allow]]\nwho = \"ann\"\nmay = [\"clone\"]\n", "'allow.who'"),
        ("[[allow]]\nwho = \"operator:ann\"\nmay = [\"clones\"]\n", "'allow.may'"),
        ("[host]\nname = \"b\"\n", "duplicate"),
        ("[[instance\n", "line "),
    ];
    for (text, expected) in appended {
        let whole = match text {
            "wal_levl = 1\n" => text.to_string() + &good,
            _ => format!("{good}\n{INSTANCE}{text}"),
        };
        try_with(&host, &mut said, &whole, text.trim_end(), expected);
    }
    let replaced = [
        ("name = \"a\"", "name = a", "line 2"),
        ("name = \"a\"", "name = \"../a\"", "'host.name'"),
        ("[host]\nname = \"a\"", "[host]", "'name'"),
        ("[repository]", "[depository]", "'depository'"),
        ("url = \"file:///", "url = \"file://", "'repository.url'"),
        ("url = \"file:///", "url = \"/", "'repository.url'"),
        ("url = \"file:///", "url = \"peer://z/", "'repository.url'"),
        ("data_root = \"/", "data_root = \"", "'clone.data_root'"),
        ("name = \"b\"", "name = \"a\"", "'peer.name'"),
        ("address = \"127.0.0.1:", "address = \"127.0.0.1.", "'listen.address'"),
    ];
    for (from, to, expected) in replaced {
        assert!(good.contains(from), "there is no '{from}'");
        try_with(&host, &mut said, &good.replacen(from, to, 1), &format!("'{to}' for '{from}'"), expected);
    }
    insta::assert_snapshot!(said.finish());
}

/// Neither the agent nor a verb goes on with this configuration, and both say the same.
fn try_with(host: &Host, said: &mut Said, text: &str, title: &str, expected: &str) {
    fs::write(&host.config, text).unwrap();
    let [by_agent, by_verb] = ["agent", "status"].map(|verb| {
        let error = refusal(&host.keiki(&[verb]), expected).unwrap_or_else(|why| panic!("{title}: {why}"));
        let begin = format!("error: cannot read configuration '{}': ", host.config.display());
        assert!(error.starts_with(&begin), "{title}: the file is not named first: {error}");
        error
    });
    assert_eq!(by_agent, by_verb, "{title}");
    assert!(paths_below(&host.dir.join("state")).is_empty(), "{title}: the agent began to work");
    said.note(title, &by_agent);
}

#[test]
fn a_configuration_that_is_not_there_is_named() {
    let lab = Lab::new();
    let missing = lab.path("nothing.toml").to_str().unwrap().to_string();
    let output = std::process::Command::new(super::super::support::hosts::KEIKI)
        .args(["--config", &missing, "agent"])
        .output()
        .unwrap();
    let mut said = Said::new(Mask::default().keep_numbers().known(lab.path("").display(), "LAB/"));
    said.note("keiki agent", &refusal(&output, &missing).unwrap());
    insta::assert_snapshot!(said.finish());
}
