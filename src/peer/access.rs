//! Who may ask what: pure decisions on a caller, a request and the rules of the configuration.

use crate::error::{Error, Kind, Result};

/// One thing that an `[[allow]]` rule can permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Permission {
    /// See what runs here, jobs, backups and windows.
    Status,
    /// Order a backup of an instance.
    Backup,
    /// Order a clone of an instance onto this host, or its check list.
    Clone,
    /// Open a quarantined clone.
    Accept,
    /// Delete a quarantined clone.
    Discard,
    /// Cancel and resume jobs.
    Job,
    /// Ask for what is durable now to be shipped.
    Ship,
    /// Read the repository through this agent.
    ReadRepository,
    /// Write to the repository through this agent, below incarnations of the caller's own host.
    WriteRepository,
}

impl Permission {
    const NAMES: &'static [(Permission, &'static str)] = &[
        (Permission::Status, "status"),
        (Permission::Backup, "backup"),
        (Permission::Clone, "clone"),
        (Permission::Accept, "accept"),
        (Permission::Discard, "discard"),
        (Permission::Job, "job"),
        (Permission::Ship, "ship"),
        (Permission::ReadRepository, "read-repository"),
        (Permission::WriteRepository, "write-repository"),
    ];

    /// The word of the configuration.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|row| row.0 == self).map_or("unknown", |row| row.1)
    }

    /// The permission with this name.
    pub fn from_name(name: &str) -> Option<Permission> {
        Self::NAMES.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// All words of the configuration, in the order of the manual.
    pub fn names() -> Vec<&'static str> {
        Self::NAMES.iter().map(|row| row.1).collect()
    }
}

/// One `[[allow]]` of the configuration. In patterns `*` stands for any number of characters, `?` for one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowRule {
    /// `operator:PATTERN` or `host:PATTERN`.
    pub who: String,
    pub may: Vec<Permission>,
    /// Patterns of instance names.
    pub instances: Vec<String>,
}

/// Checks the form of a rule's `who`: `operator:PATTERN` or `host:PATTERN`.
pub fn check_who(who: &str) -> Result<()> {
    let good = |pattern: &str| {
        !pattern.is_empty()
            && pattern.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'*' | b'?'))
    };
    match who.split_once(':') {
        Some(("operator" | "host", pattern)) if good(pattern) => Ok(()),
        _ => Err(Error::new(Kind::BadInput, format!("'{who}' does not say who may"))
            .hint("write 'operator:NAME' or 'host:NAME' as in the certificates; '*' stands for any name")),
    }
}

/// Whether `text` fits `pattern`, in which `*` stands for any number of characters and `?` for one. Takes time
/// proportional to the product of the lengths at worst, whatever the pattern.
pub fn matches_pattern(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut pattern_at, mut text_at) = (0, 0);
    // Where to go on after the last star swallowed one more character.
    let mut retry: Option<(usize, usize)> = None;
    while text_at < text.len() {
        match pattern.get(pattern_at) {
            Some(b'*') => {
                retry = Some((pattern_at + 1, text_at));
                pattern_at += 1;
            }
            Some(letter) if *letter == b'?' || *letter == text[text_at] => {
                pattern_at += 1;
                text_at += 1;
            }
            _ => match retry {
                Some((after_star, swallowed)) => {
                    retry = Some((after_star, swallowed + 1));
                    pattern_at = after_star;
                    text_at = swallowed + 1;
                }
                None => return false,
            },
        }
    }
    pattern[pattern_at..].iter().all(|letter| *letter == b'*')
}
