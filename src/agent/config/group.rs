//! `[[group]]`: instances, of this host or of others, that are cloned as one.

use super::{Reader, Seen, raw};
use crate::error::{Error, Kind, Result};
use crate::model::group::{Group, check_members};

impl Reader<'_> {
    /// The groups. A name is that of one group or of one instance of this host and never of both, because `keiki clone`
    /// takes either.
    pub(super) fn groups(&self, groups: &[raw::RawGroup], instances: &[raw::RawInstance]) -> Result<Vec<Group>> {
        let mut names = Seen::default();
        let mut found = Vec::new();
        for group in groups {
            let name = self.name("a group", &group.name)?;
            names.check(self, &name, group.name.span())?;
            if instances.iter().any(|instance| *instance.name.get_ref() == name) {
                let error = Error::new(Kind::BadInput, format!("'{name}' is the name of an instance"));
                return Err(
                    self.wrong(group.name.span(), error.hint("'keiki clone' takes either: choose another name"))
                );
            }
            let members: Vec<String> = group.members.get_ref().iter().map(|member| as_source(member)).collect();
            check_members(&members).map_err(|error| self.wrong(group.members.span(), error))?;
            found.push(Group { name, members });
        }
        Ok(found)
    }
}

/// A member as `keiki clone` takes a source: `db1/orders`. `orders@db1` is how many people write the same.
fn as_source(member: &str) -> String {
    match member.split_once('@') {
        Some((instance, host)) => format!("{host}/{instance}"),
        None => member.to_string(),
    }
}
