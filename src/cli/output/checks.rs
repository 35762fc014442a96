//! Check lists: one line per item, the hint below what is not in order.

use crate::cli::Outcome;
use crate::cli::output::json;
use crate::model::check::{CheckItem, Verdict, worst};

/// Prints a check list; bad if an item failed.
pub fn print(items: &[CheckItem], as_json: bool) -> Outcome {
    if as_json {
        println!("{}", json::checks(items));
    } else {
        anstream::println!("{}", text(items));
    }
    match worst(items) {
        Verdict::Fail => Outcome::Bad,
        Verdict::Pass | Verdict::Warn => Outcome::Good,
    }
}

/// The list as text, with colour codes.
pub fn text(items: &[CheckItem]) -> String {
    let all = items.iter().collect::<Vec<_>>();
    let mut lines = item_lines(&all);
    let count = |verdict| items.iter().filter(|item| item.verdict == verdict).count();
    let warned = count(Verdict::Warn);
    lines.push(format!(
        "{} passed, {warned} {}, {} failed",
        count(Verdict::Pass),
        if warned == 1 { "warning" } else { "warnings" },
        count(Verdict::Fail)
    ));
    lines.join("\n")
}

/// The items of a list that warn, as text, with colour codes; nothing if none does.
pub fn warnings(items: &[CheckItem]) -> Option<String> {
    let warnings = items.iter().filter(|item| item.verdict == Verdict::Warn).collect::<Vec<_>>();
    (!warnings.is_empty()).then(|| item_lines(&warnings).join("\n"))
}

fn item_lines(items: &[&CheckItem]) -> Vec<String> {
    let width = items.iter().map(|item| item.what.chars().count()).max().unwrap_or(0);
    let mut lines = Vec::new();
    for item in items {
        let (word, colour) = match item.verdict {
            Verdict::Pass => ("pass", anstyle::AnsiColor::Green.on_default()),
            Verdict::Warn => ("warn", anstyle::AnsiColor::Yellow.on_default().bold()),
            Verdict::Fail => ("FAIL", anstyle::AnsiColor::Red.on_default().bold()),
        };
        lines.push(format!("{colour}{word}{colour:#}  {:width$}  {}", item.what, item.found));
        if let (Some(hint), Verdict::Warn | Verdict::Fail) = (&item.hint, item.verdict) {
            for line in hint.lines() {
                lines.push(format!("      {:width$}  hint: {line}", ""));
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_stand_alone_with_their_hints() {
        let items = [CheckItem::pass("server", "15.18"), CheckItem::warn("clock", "3 s apart", "run chrony")];
        insta::assert_snapshot!(anstream::adapter::strip_str(&warnings(&items).unwrap()).to_string(), @r"
        warn  clock  3 s apart
                     hint: run chrony
        ");
        assert_eq!(warnings(&items[..1]), None);
    }

    #[test]
    fn hints_stand_below_what_is_not_in_order_only() {
        let mut good = CheckItem::pass("server", "15.18");
        good.hint = Some("never shown".into());
        let items = [good, CheckItem::fail("free disk space", "1.0 GiB, wanted 2.0 GiB", "choose another --dir")];
        insta::assert_snapshot!(anstream::adapter::strip_str(&text(&items)).to_string(), @r"
        pass  server           15.18
        FAIL  free disk space  1.0 GiB, wanted 2.0 GiB
                               hint: choose another --dir
        1 passed, 0 warnings, 1 failed
        ");
    }
}
