//! What an object store can do beyond the least that each of them can. Found out once, when a repository is begun, and
//! recorded in its header, so that all agents of a repository agree on it.

/// The header of a put by which a store checks what arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChecksumKind {
    Crc32c,
    Sha256,
    Md5,
}

impl ChecksumKind {
    const TABLE: [(ChecksumKind, &'static str); 3] =
        [(ChecksumKind::Crc32c, "crc32c"), (ChecksumKind::Sha256, "sha256"), (ChecksumKind::Md5, "md5")];

    /// Every kind there is.
    pub fn all() -> impl Iterator<Item = ChecksumKind> {
        Self::TABLE.into_iter().map(|row| row.0)
    }

    /// The stable name.
    pub fn name(self) -> &'static str {
        Self::TABLE.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }

    pub fn from_name(name: &str) -> Option<ChecksumKind> {
        Self::TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }
}

/// See the module. Nothing known is the value in which nothing can be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Of racing puts that may only create, one succeeds.
    pub conditional_create: bool,
    /// Of racing puts that may only replace a certain version, one succeeds.
    pub conditional_replace: bool,
    /// The same for objects that are uploaded in parts.
    pub conditional_complete: bool,
    /// Listings are in the byte order of keys.
    pub ordered_listing: bool,
    /// Which checksums of a put it checks, or at least takes.
    pub checksums: Vec<ChecksumKind>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_checksum_has_its_own_name() {
        for kind in ChecksumKind::all() {
            assert_eq!(ChecksumKind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(ChecksumKind::from_name("none"), None);
    }
}
