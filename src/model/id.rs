//! Identifiers. Each is a type of its own, so that a backup's id can never be used where a job's is wanted.

use std::fmt;

use crate::error::{Error, Kind, Result};

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $word:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(uuid::Uuid);

        impl $name {
            /// A fresh id; ids sort by the time they were made (UUID version 7, RFC 9562).
            pub fn fresh() -> $name {
                $name(uuid::Uuid::now_v7())
            }

            /// Reads the 36 character form.
            pub fn parse(text: &str) -> Result<$name> {
                match uuid::Uuid::try_parse(text) {
                    Ok(id) if text.len() == 36 => Ok($name(id)),
                    _ => Err(Error::new(Kind::BadInput, format!(concat!("'{}' is not the id of ", $word), text))
                        .hint("an id has 36 characters, as 'keiki job list' prints them")),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

uuid_id!(/** One life of an instance's data directory. */ IncarnationId, "an incarnation");
uuid_id!(/** A repository, given when it is initialised. */ RepositoryId, "a repository");
uuid_id!(/** One backup, job or order: a job carries the id of the order that began it. */ JobId, "a job");
impl JobId {
    /// The id of an order that this one gives; `number` is its own among them and not 0. Always the same, so that giving it
    /// again is harmless.
    pub fn sibling(self, number: u8) -> JobId {
        // 62 of the last bits of an id are random (RFC 9562, version 7), so nothing else has the neighbour of one.
        JobId(uuid::Uuid::from_u128(self.0.as_u128() ^ u128::from(number)))
    }
}

uuid_id!(/** A pack of frames. */ PackId, "a pack");
uuid_id!(/** One run of an agent process. */ RunId, "an agent's run");

/// The name of a backup set: the UTC second at which it began and four letters against collisions,
/// as in `20261121T095900Z-k3xq`. It sorts by time and can be typed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackupId(String);

impl BackupId {
    /// The id of a backup that begins at `at`; `random` chooses the letters.
    pub fn new(at: jiff::Timestamp, random: u64) -> BackupId {
        // No vowels and no letters that look like digits, so that no word and no mistake can come out.
        const LETTERS: &[u8] = b"bcdfghjkmnpqrstvwxz23456789";
        let mut rest = random;
        let suffix: String = (0..4)
            .map(|_| {
                let letter = LETTERS[(rest % LETTERS.len() as u64) as usize] as char;
                rest /= LETTERS.len() as u64;
                letter
            })
            .collect();
        BackupId(format!("{}-{suffix}", at.strftime("%Y%m%dT%H%M%SZ")))
    }

    /// Reads an id as it was printed.
    pub fn parse(text: &str) -> Result<BackupId> {
        let shape_is_right = text.len() == 21
            && text.bytes().enumerate().all(|(at, byte)| match at {
                8 => byte == b'T',
                15 => byte == b'Z',
                16 => byte == b'-',
                0..=14 => byte.is_ascii_digit(),
                _ => byte.is_ascii_lowercase() || byte.is_ascii_digit(),
            });
        if shape_is_right {
            Ok(BackupId(text.to_string()))
        } else {
            Err(Error::new(Kind::BadInput, format!("'{text}' is not the id of a backup"))
                .hint("an id looks like '20261121T095900Z-k3xq'; 'keiki backup list' shows them"))
        }
    }
}

impl BackupId {
    /// The part that two backups share which began in the same second: it sorts by time, what follows does not.
    pub fn second(&self) -> &str {
        self.0.split_once('-').map_or(&self.0, |(second, _)| second)
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks the name of a host or an instance: it becomes part of paths, keys and certificates.
///
/// Takes what the name is for in `what` ("host", "instance"). A name has 1 to 63 letters, digits, `-` or `_` and
/// begins with a letter or digit.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    let good = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        && name.as_bytes()[0].is_ascii_alphanumeric();
    if good {
        return Ok(());
    }
    Err(Error::new(Kind::BadInput, format!("'{name}' cannot be the name of {what}"))
        .hint("use 1 to 63 letters, digits, '-' or '_', beginning with a letter or a digit"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backup_ids_sort_by_time_and_read_back() {
        let early = BackupId::new("2026-11-21T09:59:00Z".parse().unwrap(), u64::MAX);
        let late = BackupId::new("2026-11-21T09:59:01Z".parse().unwrap(), 0);
        assert!(early < late);
        assert_eq!(BackupId::parse(&early.to_string()).unwrap(), early);
        assert!(BackupId::parse("20261121T095900Z").is_err());
        assert!(BackupId::parse("../../../../etc/passw").is_err());
    }

    #[test]
    fn names_that_could_leave_a_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "-rf", "a b", "ä", &"x".repeat(64)] {
            assert!(check_name("an instance", bad).is_err(), "{bad}");
        }
        check_name("an instance", "orders-check_2").unwrap();
    }
}
