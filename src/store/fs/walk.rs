//! Listing a directory tree in the byte order of whole keys.
//!
//! The order of names in a directory is not the order of keys: `a-b` comes before `a/b`, because `-` is less than `/`.
//! So a directory takes part in the order as its name with a slash, which is right for all keys below it at once: they
//! begin with that text, and no file beside it does. Only directories that can hold a wanted key are read. Memory is
//! bounded by the page and the depth, not by the number of files in a directory.

use std::collections::BinaryHeap;
use std::fs::Metadata;
use std::io::ErrorKind;
use std::path::Path;

use super::super::{Key, ObjectInfo, Tag};
use crate::error::{Context, Error, Result};

/// So many names of one directory are sorted at a time; with more, it is read again for the next ones.
const SORTED_NAMES_MAX: usize = 1000;

/// One page of objects below `root`, as [`Store::list`](super::super::Store::list) promises it. `tag_of` gives the tag
/// of a file. A start directory that is not there is an error of kind `NotFound`.
pub fn list_page(
    root: &Path,
    prefix: &str,
    after: Option<&str>,
    limit: usize,
    tag_of: fn(&Metadata) -> Tag,
) -> Result<Vec<ObjectInfo>> {
    let mut walk = Walk { root, prefix, after, limit, tag_of, found: Vec::new() };
    if limit == 0 {
        return Ok(walk.found);
    }
    let start = match prefix.rfind('/') {
        None => "",
        // No object can begin with what is no key, and a path made of it (`../`) must not be opened.
        Some(slash) if Key::parse(&prefix[..slash]).is_err() => return Ok(walk.found),
        Some(slash) => &prefix[..=slash],
    };
    walk.descend(start)?;
    Ok(walk.found)
}

struct Walk<'a> {
    root: &'a Path,
    prefix: &'a str,
    after: Option<&'a str>,
    limit: usize,
    tag_of: fn(&Metadata) -> Tag,
    found: Vec<ObjectInfo>,
}

impl Walk<'_> {
    /// Adds the wanted objects below a directory; `base` is empty or a key with a slash at the end.
    fn descend(&mut self, base: &str) -> Result<()> {
        let mut last: Option<String> = None;
        loop {
            let (names, is_cut) = self.smallest_names(base, last.as_deref())?;
            for name in &names {
                let path = format!("{base}{name}");
                if name.ends_with('/') {
                    match self.descend(&path) {
                        // It was empty and is gone, together with its last object.
                        Err(error) if error.kind() == crate::error::Kind::NotFound => {}
                        other => other?,
                    }
                } else {
                    self.add_file(&path)?;
                }
                if self.found.len() >= self.limit {
                    return Ok(());
                }
            }
            last = names.into_iter().next_back();
            if !is_cut {
                return Ok(());
            }
        }
    }

    fn add_file(&mut self, key: &str) -> Result<()> {
        match std::fs::symlink_metadata(self.root.join(key)) {
            Ok(known) => {
                let tag = (self.tag_of)(&known);
                self.found.push(ObjectInfo { key: Key::parse(key)?, size_bytes: known.len(), tag });
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io(format!("cannot look at '{}'", self.root.join(key).display()), error)),
        }
    }

    /// The wanted names of a directory that are greater than `last`, sorted, directories with a slash at their end; and
    /// whether there are more than came back.
    fn smallest_names(&self, base: &str, last: Option<&str>) -> Result<(Vec<String>, bool)> {
        let directory = self.root.join(base);
        let what = || format!("cannot list directory '{}'", directory.display());
        // A heap with the greatest on top keeps the smallest so many.
        let mut names = BinaryHeap::new();
        let mut is_cut = false;
        for entry in std::fs::read_dir(&directory).context(what)? {
            let entry = entry.context(what)?;
            // What has no name of a key was not put here by this store.
            let Ok(mut name) = entry.file_name().into_string() else { continue };
            let kind = match entry.file_type() {
                Ok(kind) => kind,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io(what(), error)),
            };
            if Key::parse(&name).is_err() || !(kind.is_dir() || kind.is_file()) {
                continue;
            }
            if kind.is_dir() {
                name.push('/');
            }
            if last.is_some_and(|last| name.as_str() <= last) || !self.may_hold_wanted(&format!("{base}{name}")) {
                continue;
            }
            names.push(name);
            if names.len() > SORTED_NAMES_MAX {
                names.pop();
                is_cut = true;
            }
        }
        Ok((names.into_sorted_vec(), is_cut))
    }

    /// Whether a file is wanted, or a directory (with a slash at its end) can have wanted objects below it.
    fn may_hold_wanted(&self, path: &str) -> bool {
        let is_directory = path.ends_with('/');
        let in_prefix = path.starts_with(self.prefix) || (is_directory && self.prefix.starts_with(path));
        let is_later = self.after.is_none_or(|after| path > after || (is_directory && after.starts_with(path)));
        in_prefix && is_later
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_with_more_names_than_are_sorted_at_once_is_listed_whole_and_in_order() {
        let root = tempfile::tempdir().unwrap();
        let mut expected = Vec::new();
        for number in 0..SORTED_NAMES_MAX * 2 + 7 {
            // Half of them are empty directories, which use up room in the heap and give no objects.
            let path = root.path().join(format!("d/{number:05}"));
            if number % 2 == 0 {
                std::fs::create_dir_all(path).unwrap();
            } else {
                std::fs::write(path, b"x").unwrap();
                expected.push(format!("d/{number:05}"));
            }
        }
        let page = list_page(root.path(), "", None, 5000, |_| Tag(String::new())).unwrap();
        let keys: Vec<String> = page.into_iter().map(|object| object.key.to_string()).collect();
        assert_eq!(keys, expected);
    }

    #[test]
    fn a_prefix_never_leads_out_of_the_root() {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(outer.path().join("secret"), b"x").unwrap();
        for prefix in ["../", "../s", "/", "a/../../", "//"] {
            assert!(list_page(&root, prefix, None, 10, |_| Tag(String::new())).unwrap().is_empty());
        }
    }

    #[test]
    fn what_is_not_an_object_is_not_listed() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join(".tmp")).unwrap();
        std::fs::write(root.path().join(".tmp/half"), b"x").unwrap();
        std::fs::write(root.path().join(".nfs0001"), b"x").unwrap();
        std::fs::write(root.path().join("not a key"), b"x").unwrap();
        std::fs::write(root.path().join("key"), b"x").unwrap();
        std::os::unix::fs::symlink("/etc", root.path().join("link")).unwrap();
        let page = list_page(root.path(), "", None, 10, |_| Tag(String::new())).unwrap();
        assert_eq!(page.len(), 1);
    }
}
