//! What a repository holds, in numbers.

use crate::model::incarnation::Incarnation;

/// Objects and the bytes that they have together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Total {
    pub objects: u64,
    pub bytes: u64,
}

impl Total {
    /// One more object.
    pub fn add(&mut self, bytes: u64) {
        self.join(Total { objects: 1, bytes });
    }

    pub fn join(&mut self, other: Total) {
        self.objects = self.objects.saturating_add(other.objects);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// What lies below one incarnation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Holdings {
    pub log: Total,
    /// The content of backups; a clone's first backup uses packs of its parent.
    pub packs: Total,
    pub manifests: Total,
    /// Identity, lease, marks of work in progress, and what is not known.
    pub rest: Total,
}

impl Holdings {
    pub fn all(&self) -> Total {
        let mut all = Total::default();
        [self.log, self.packs, self.manifests, self.rest].into_iter().for_each(|one| all.join(one));
        all
    }
}

/// All that a repository holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Oldest first.
    pub incarnations: Vec<(Incarnation, Holdings)>,
    /// What belongs to no incarnation: the header, and what has lost its identity.
    pub rest: Total,
}
