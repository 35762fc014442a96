//! Rules of the house, as tests: the direction of imports, a contract at the top of every module, no left-overs.

use std::fs;
use std::path::{Path, PathBuf};

/// The floors, lowest first. A module may import from its own floor and from those before it.
const FLOORS: [&str; 11] =
    ["error", "base", "model", "format", "store", "repo", "engine", "job", "peer", "agent", "cli"];

/// Pairs that the order of floors would allow and the design forbids, each with its reason.
const FORBIDDEN: [(&str, &str, &str); 6] = [
    ("engine", "repo", "engines never see the repository; jobs join the two"),
    ("engine", "store", "engines never see the repository; jobs join the two"),
    ("engine", "format", "engines never see the repository; jobs join the two"),
    ("model", "base", "nouns are values: no I/O and no clock"),
    ("peer", "engine", "what peers say to each other does not depend on database servers"),
    ("cli", "engine", "the command line asks agents and touches no database"),
];

/// A file longer than this has two subjects.
const FILE_LINES_MAX: usize = 900;

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn source_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The floor of a file below `src`: its first folder, or its own name.
fn floor_of(path: &Path) -> String {
    let relative = path.strip_prefix(source_dir()).unwrap();
    let first = relative.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_string()
}

/// The floors that a source text names after `crate::`, with the line.
fn imported_floors(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut group_depth = 0usize;
    for (index, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        for part in code.split("crate::").skip(1) {
            if part.starts_with('{') {
                group_depth = 1;
            }
            let name: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if !name.is_empty() {
                found.push((index + 1, name));
            }
        }
        assert!(
            group_depth == 0,
            "line {}: write one 'use crate::floor::…' per floor, not a group at the root",
            index + 1
        );
    }
    found
}

/// Why a floor may not import another, if it may not.
fn objection(from: &str, to: &str) -> Option<String> {
    let height = |name: &str| FLOORS.iter().position(|floor| *floor == name);
    let (from_height, to_height) = (height(from)?, height(to)?);
    if to_height > from_height {
        return Some(format!("'{from}' is below '{to}': imports go downward only"));
    }
    FORBIDDEN
        .iter()
        .find(|row| row.0 == from && row.1 == to)
        .map(|row| format!("'{from}' must not import '{to}': {}", row.2))
}

#[test]
fn imports_go_downward_only() {
    let mut objections = Vec::new();
    for path in rust_files(&source_dir()) {
        let floor = floor_of(&path);
        if !FLOORS.contains(&floor.as_str()) {
            continue; // main.rs and lib.rs
        }
        let text = fs::read_to_string(&path).unwrap();
        // Unit tests may use what stands on higher floors no more than other code; they are not exempt.
        for (line, imported) in imported_floors(&text) {
            if let Some(reason) = objection(&floor, &imported) {
                objections.push(format!("{}:{line}: {reason}", path.display()));
            }
        }
    }
    assert!(objections.is_empty(), "{}", objections.join("\n"));
}

#[test]
fn the_rule_about_imports_finds_what_it_forbids() {
    assert!(objection("base", "model").is_some());
    assert!(objection("engine", "repo").is_some());
    assert!(objection("job", "engine").is_none());
    assert_eq!(imported_floors("use crate::repo::Repository; // crate::cli::x\n"), [(1, "repo".to_string())]);
}

#[test]
fn every_file_begins_with_what_it_is_and_has_one_subject() {
    let mut objections = Vec::new();
    for root in ["src", "tests"] {
        for path in rust_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join(root)) {
            let text = fs::read_to_string(&path).unwrap();
            if !text.starts_with("//! ") {
                objections.push(format!("{}: does not begin with '//! ' and a sentence", path.display()));
            }
            if text.lines().count() > FILE_LINES_MAX {
                objections.push(format!("{}: more than {FILE_LINES_MAX} lines", path.display()));
            }
        }
    }
    assert!(objections.is_empty(), "{}", objections.join("\n"));
}

#[test]
fn nothing_is_left_over() {
    // Put together here so that this file does not find itself.
    let banned = [
        ["TO", "DO"].concat(),
        ["FIX", "ME"].concat(),
        ["dbg", "!("].concat(),
        ["todo", "!("].concat(),
        ["unimpl", "emented!("].concat(),
        ["#[ig", "nore"].concat(),
    ];
    let mut objections = Vec::new();
    for root in ["src", "tests"] {
        for path in rust_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join(root)) {
            let text = fs::read_to_string(&path).unwrap();
            for (index, line) in text.lines().enumerate() {
                for word in banned.iter().filter(|word| line.contains(word.as_str())) {
                    objections.push(format!("{}:{}: '{word}'", path.display(), index + 1));
                }
            }
        }
    }
    assert!(objections.is_empty(), "{}", objections.join("\n"));
}

#[test]
fn no_process_exit_below_main() {
    for path in rust_files(&source_dir()) {
        if path.ends_with("main.rs") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        assert!(!text.contains("process::exit"), "{}: only main may end the process", path.display());
    }
}
