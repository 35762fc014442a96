//! Which libraries a server sorts text with. Another version of one of them may sort differently, and indexes on text
//! are sorted: rows that are there are then not found.

use std::path::Path;

use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_blocking;
use crate::base::child::ChildCommand;
use crate::engine::CloneSite;
use crate::model::check::CheckItem;

/// Facts of a backup: the version of the C library on the source's host, of its own making (`2.36`), and the major
/// version of ICU that the server's program is linked with (`72`).
pub const GLIBC_FACT: &str = "library.glibc";
pub const ICU_FACT: &str = "library.icu";
/// The version of the C library as the server's collations have it, which backups had before the others.
const SERVER_GLIBC_FACT: &str = "collation_version.c";
const DATABASE_FACT_PREFIX: &str = "database.";

/// The name of the library of ICU that holds the collations, in the program that needs it.
const ICU_LIBRARY: &[u8] = b"libicui18n";

/// The version of the C library of this host: `2.36`. Nothing where there is another one.
pub async fn glibc_version() -> Option<String> {
    let command = ChildCommand::new("getconf").arg("GNU_LIBC_VERSION");
    let finished = command.run_checked(&CancellationToken::new()).await.ok()?;
    let said = String::from_utf8_lossy(&finished.stdout).into_owned();
    said.split_whitespace().nth(1).map(str::to_string)
}

/// The major version of ICU that a program of PostgreSQL is linked with: `72`. Nothing if it uses none, has it built
/// in, or cannot be read.
pub async fn icu_version_of(program: &Path) -> Option<String> {
    let program = program.to_path_buf();
    let read = run_blocking("program", move || Ok(std::fs::read(&program).ok())).await.ok().flatten()?;
    icu_version_in(&read)
}

/// The program that runs as the postmaster of a data directory.
pub fn running_program(data_dir: &Path) -> Option<std::path::PathBuf> {
    let text = std::fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    let pid: u32 = text.lines().next()?.trim().parse().ok()?;
    Some(std::path::PathBuf::from(format!("/proc/{pid}/exe")))
}

/// Looks for `libicui18n.so.72` among the names of the libraries that a program needs.
fn icu_version_in(program: &[u8]) -> Option<String> {
    let at = program.windows(ICU_LIBRARY.len()).position(|window| window == ICU_LIBRARY)?;
    let name: Vec<u8> = program[at..].iter().copied().take(128).take_while(|byte| *byte != 0).collect();
    let name = String::from_utf8(name).ok()?;
    let (_, version) = name.rsplit_once(".so.")?;
    let major: String = version.chars().take_while(char::is_ascii_digit).collect();
    (!major.is_empty()).then_some(major)
}

/// Compares what the backup says of its source with this host.
pub async fn check(site: &CloneSite, program: Option<&Path>) -> CheckItem {
    let glibc_here = glibc_version().await;
    let icu_here = match program {
        Some(program) => icu_version_of(program).await,
        None => None,
    };
    let fact = |name: &str| site.facts.get(name).filter(|value| !value.is_empty()).cloned();
    compare(
        [("glibc", fact(GLIBC_FACT).or(fact(SERVER_GLIBC_FACT)), glibc_here), ("ICU", fact(ICU_FACT), icu_here)],
        uses_icu(site),
    )
}

/// Whether a database sorts by ICU; single columns may as well, and are reported after the clean-up.
fn uses_icu(site: &CloneSite) -> bool {
    let mut databases = site.facts.iter().filter(|(key, _)| key.starts_with(DATABASE_FACT_PREFIX));
    databases.any(|(_, value)| value.split(' ').any(|word| word == "provider=i"))
}

/// Pure part: for each library its name, the version on the source and the version here.
fn compare(libraries: [(&str, Option<String>, Option<String>); 2], uses_icu: bool) -> CheckItem {
    let what = "collation library";
    let mut same = Vec::new();
    let mut different = Vec::new();
    for (name, source, here) in libraries {
        let matters = name != "ICU" || uses_icu;
        match (source, here) {
            (Some(source), Some(here)) if source == here => same.push(format!("{name} {here} here and on the source")),
            (Some(source), Some(here)) if matters => {
                different.push(format!("{name} {here} here, {source} on the source"))
            }
            (Some(source), None) if matters => different.push(format!("{name} {source} on the source, not known here")),
            (None, Some(here)) if matters => {
                same.push(format!("{name} {here} here; the backup does not say what the source has"))
            }
            _ => {}
        }
    }
    if different.is_empty() {
        return CheckItem::pass(what, if same.is_empty() { "none is known".to_string() } else { same.join("; ") });
    }
    CheckItem::warn(
        what,
        different.join("; "),
        "text may sort differently: the clone's report will list the databases whose indexes must be rebuilt",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::check::Verdict;

    #[test]
    fn the_version_of_icu_stands_in_the_names_of_needed_libraries() {
        assert_eq!(icu_version_in(b"\x7fELF..libxml2.so.2\0libicui18n.so.72\0libicuuc.so.72\0").unwrap(), "72");
        assert_eq!(icu_version_in(b"\0libicui18n-b4ad9b0b.so.60.3\0").unwrap(), "60");
        for without in [&b"\0libicuuc.so.72\0"[..], b"\0libicui18n.so\0", b"", b"libicui18n.so."] {
            assert_eq!(icu_version_in(without), None);
        }
    }

    #[test]
    fn another_version_of_a_library_that_sorts_is_a_warning_that_names_both() {
        let text = |version: &str| Some(version.to_string());
        let verdict = |glibc, icu, uses_icu| {
            let (glibc, icu): ((_, _), (_, _)) = (glibc, icu);
            compare([("glibc", glibc.0, glibc.1), ("ICU", icu.0, icu.1)], uses_icu)
        };
        let same = (text("2.36"), text("2.36"));
        let good = verdict(same.clone(), (text("72"), text("72")), true);
        assert_eq!(
            (good.verdict, good.found.as_str()),
            (Verdict::Pass, "glibc 2.36 here and on the source; ICU 72 here and on the source")
        );
        let other = verdict((text("2.31"), text("2.36")), (None, None), false);
        assert_eq!((other.verdict, other.found.as_str()), (Verdict::Warn, "glibc 2.36 here, 2.31 on the source"));
        assert_eq!(verdict(same.clone(), (text("72"), text("76")), true).verdict, Verdict::Warn);
        assert_eq!(verdict(same.clone(), (text("72"), text("76")), false).verdict, Verdict::Pass);
        let unknown = verdict((None, text("2.36")), (None, None), false);
        assert_eq!(unknown.verdict, Verdict::Pass);
        assert!(unknown.found.contains("does not say"), "{}", unknown.found);
    }
}
