//! An item of a check list, as `doctor` and `clone --check` print it.

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Pass,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckItem {
    /// What was checked, in a few words: `free disk space`.
    pub what: String,
    pub verdict: Verdict,
    /// What was found, and what was wanted where that is not the same.
    pub found: String,
    /// What to do about it; always present on a failure.
    pub hint: Option<String>,
}

impl CheckItem {
    pub fn pass(what: impl Into<String>, found: impl Into<String>) -> CheckItem {
        CheckItem { what: what.into(), verdict: Verdict::Pass, found: found.into(), hint: None }
    }

    pub fn warn(what: impl Into<String>, found: impl Into<String>, hint: impl Into<String>) -> CheckItem {
        CheckItem { what: what.into(), verdict: Verdict::Warn, found: found.into(), hint: Some(hint.into()) }
    }

    pub fn fail(what: impl Into<String>, found: impl Into<String>, hint: impl Into<String>) -> CheckItem {
        CheckItem { what: what.into(), verdict: Verdict::Fail, found: found.into(), hint: Some(hint.into()) }
    }
}

/// The worst verdict of a list; an empty list passes.
pub fn worst(items: &[CheckItem]) -> Verdict {
    items.iter().map(|item| item.verdict).max().unwrap_or(Verdict::Pass)
}
