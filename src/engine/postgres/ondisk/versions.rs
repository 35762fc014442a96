//! The major versions of PostgreSQL that keiki understands, and everything in their files that differs by version.
//!
//! Sources, per release branch: `src/include/access/xlog_internal.h` (XLOG_PAGE_MAGIC),
//! `src/include/catalog/pg_control.h` (PG_CONTROL_VERSION), `src/include/catalog/catversion.h` (CATALOG_VERSION_NO).
//! All three are frozen when a major version is released.

use std::fmt;

use crate::error::{Error, Kind, Result};

/// A major version of PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Major {
    V13,
    V14,
    V15,
    V16,
    V17,
    V18,
}

/// What the files of one major version say about themselves.
struct Signature {
    major: Major,
    number: u32,
    wal_page_magic: u16,
    control_version: u32,
    catalog_version: u32,
}

const SIGNATURES: [Signature; 6] = [
    signature(Major::V13, 13, 0xD106, 1300, 202_007_201),
    signature(Major::V14, 14, 0xD10D, 1300, 202_107_181),
    signature(Major::V15, 15, 0xD110, 1300, 202_209_061),
    signature(Major::V16, 16, 0xD113, 1300, 202_307_071),
    signature(Major::V17, 17, 0xD116, 1700, 202_406_281),
    signature(Major::V18, 18, 0xD118, 1800, 202_506_291),
];

const fn signature(
    major: Major,
    number: u32,
    wal_page_magic: u16,
    control_version: u32,
    catalog_version: u32,
) -> Signature {
    Signature { major, number, wal_page_magic, control_version, catalog_version }
}

impl Major {
    /// Every version that is understood, oldest first.
    pub fn all() -> impl Iterator<Item = Major> {
        SIGNATURES.iter().map(|signature| signature.major)
    }

    fn signature(self) -> &'static Signature {
        &SIGNATURES[self as usize]
    }

    /// The number that people use: 15.
    pub fn number(self) -> u32 {
        self.signature().number
    }

    /// The first two bytes of every page of write-ahead log.
    pub fn wal_page_magic(self) -> u16 {
        self.signature().wal_page_magic
    }

    /// The format number of `pg_control`; 13 to 16 share one.
    pub fn control_version(self) -> u32 {
        self.signature().control_version
    }

    /// The catalogue number, which `pg_control` carries and which is part of the names of tablespace directories.
    pub fn catalog_version(self) -> u32 {
        self.signature().catalog_version
    }

    /// The directory inside a tablespace that belongs to this version: `PG_15_202209061`
    /// (`src/include/common/relpath.h`, TABLESPACE_VERSION_DIRECTORY).
    pub fn tablespace_directory(self) -> String {
        format!("PG_{}_{}", self.number(), self.catalog_version())
    }

    /// The version with this number, or an error that names the supported ones.
    pub fn from_number(number: u32) -> Result<Major> {
        SIGNATURES.iter().find(|signature| signature.number == number).map(|signature| signature.major).ok_or_else(
            || {
                Error::new(Kind::Unsupported, format!("PostgreSQL {number} is not supported"))
                    .hint("keiki works with PostgreSQL 13 to 18")
            },
        )
    }

    /// Reads the content of a `PG_VERSION` file: the number and a line end.
    pub fn from_pg_version_file(content: &[u8]) -> Result<Major> {
        let text = std::str::from_utf8(content).unwrap_or_default().trim_end();
        match text.parse::<u32>() {
            Ok(number) if text.bytes().all(|byte| byte.is_ascii_digit()) => Major::from_number(number),
            // Up to 9.6 the major version had two parts.
            _ if text.starts_with("9.") || text.starts_with("8.") => {
                Err(Error::new(Kind::Unsupported, format!("PostgreSQL {text} is not supported"))
                    .hint("keiki works with PostgreSQL 13 to 18"))
            }
            _ => Err(Error::new(Kind::Damaged, "PG_VERSION does not hold a version number")),
        }
    }

    /// The version whose `pg_control` and catalogue carry these two numbers; betas and forks are refused.
    pub fn from_control(control_version: u32, catalog_version: u32) -> Result<Major> {
        SIGNATURES
            .iter()
            .find(|signature| {
                signature.control_version == control_version && signature.catalog_version == catalog_version
            })
            .map(|signature| signature.major)
            .ok_or_else(|| {
                Error::new(
                    Kind::Unsupported,
                    format!("no supported PostgreSQL has control version {control_version} and catalogue version {catalog_version}"),
                )
                .hint("keiki works with released versions of PostgreSQL 13 to 18, not with betas, forks or other machines' byte order")
            })
    }

    /// The version whose WAL pages begin with this number.
    pub fn from_wal_page_magic(magic: u16) -> Option<Major> {
        SIGNATURES.iter().find(|signature| signature.wal_page_magic == magic).map(|signature| signature.major)
    }

    /// Whether extensions may write WAL records under their own resource manager (since 15,
    /// `src/include/access/rmgr.h`).
    pub fn has_custom_resource_managers(self) -> bool {
        self >= Major::V15
    }

    /// The size of one dropped-statistics entry in a commit record: none before 15, wider object ids since 18
    /// (`src/include/access/xact.h`, xl_xact_stats_item).
    pub fn dropped_stats_entry_bytes(self) -> Option<usize> {
        match self {
            Major::V13 | Major::V14 => None,
            Major::V15 | Major::V16 | Major::V17 => Some(12),
            Major::V18 => Some(16),
        }
    }

    /// Whether a full-page image is compressed, by its flag byte: one flag in 13 and 14, one per method since 15
    /// (`src/include/access/xlogrecord.h`, BKPIMAGE_*; in 13 and 14 0x04 meant "apply").
    pub fn image_is_compressed(self, image_flags: u8) -> bool {
        match self {
            Major::V13 | Major::V14 => image_flags & 0x02 != 0,
            _ => image_flags & (0x04 | 0x08 | 0x10) != 0,
        }
    }
}

impl fmt::Display for Major {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_is_found_by_its_number_its_control_file_and_its_wal() {
        for major in Major::all() {
            assert_eq!(SIGNATURES[major as usize].major, major);
            assert_eq!(Major::from_number(major.number()).unwrap(), major);
            assert_eq!(Major::from_control(major.control_version(), major.catalog_version()).unwrap(), major);
            assert_eq!(Major::from_wal_page_magic(major.wal_page_magic()), Some(major));
            assert_eq!(Major::from_pg_version_file(format!("{major}\n").as_bytes()).unwrap(), major);
        }
        assert_eq!(Major::all().count(), 6);
        assert_eq!(Major::V15.tablespace_directory(), "PG_15_202209061");
    }

    #[test]
    fn other_versions_are_refused_by_name() {
        assert_eq!(Major::from_pg_version_file(b"12\n").unwrap_err().message(), "PostgreSQL 12 is not supported");
        assert_eq!(Major::from_pg_version_file(b"9.6\n").unwrap_err().message(), "PostgreSQL 9.6 is not supported");
        assert_eq!(Major::from_number(19).unwrap_err().kind(), Kind::Unsupported);
        assert_eq!(Major::from_control(1300, 202_506_291).unwrap_err().kind(), Kind::Unsupported);
        for garbage in [&b""[..], b"\xff", b"+15", b"fifteen"] {
            assert_eq!(Major::from_pg_version_file(garbage).unwrap_err().kind(), Kind::Damaged);
        }
    }
}
