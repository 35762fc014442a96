//! Groups: several instances that are cloned as one, to one moment.

use std::collections::BTreeSet;

use crate::error::{Error, Kind, Result};
use crate::model::id::{JobId, check_name};
use crate::model::job::{CloneOrder, Order, Task};
use crate::model::target::Target;

/// The fewest and the most members of a group.
pub const MEMBERS_MIN: usize = 2;
pub const MEMBERS_MAX: usize = 64;

/// What facts that the group gives to a member begin with: see [`CloneOrder::ties`].
pub const TIE_PREFIX: &str = "tie.";

/// A group as the configuration of a host names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub name: String,
    /// Instances as `keiki clone` takes them: `orders`, or `db1/orders`.
    pub members: Vec<String>,
}

/// A request to grow clones of several instances, to one moment, on the host that receives it, as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupOrder {
    /// What the group is called where it is configured. For people: the sources are what counts.
    pub group: String,
    /// What the clones are called together; see [`GroupOrder::member_names`].
    pub clone_name: String,
    /// As in [`CloneOrder::source`].
    pub sources: Vec<String>,
    /// A time, or the latest moment that all members can show.
    pub target: Target,
    /// Stop in quarantine and wait for `keiki accept` or `keiki discard` of all together.
    pub hold: bool,
}

impl GroupOrder {
    /// An error if this cannot be meant: too few or too many members, one twice, a name that is none, a target that
    /// means nothing to all of them.
    pub fn check(&self) -> Result<()> {
        check_name("a clone", &self.clone_name)?;
        check_members(&self.sources)?;
        for name in self.member_names() {
            check_name("a clone", &name).map_err(|error| error.hint("choose a shorter name with --as"))?;
        }
        match self.target {
            Target::Latest | Target::Time(_) => Ok(()),
            _ => Err(Error::new(
                Kind::BadInput,
                format!(
                    "cannot clone group '{}' to {}: that is a moment of one instance only",
                    self.group, self.target
                ),
            )
            .hint("choose a time with --at, or --latest")),
        }
    }

    /// What the clones of the members are called, in the order of the members: the name of the order, a dash, and the
    /// instance; where two instances have one name, with their hosts.
    pub fn member_names(&self) -> Vec<String> {
        let instance = |source: &str| source.rsplit('/').next().unwrap_or(source).to_string();
        let is_shared = |name: &str| self.sources.iter().filter(|source| instance(source) == name).count() > 1;
        let name_of = |source: &String| match instance(source) {
            shared if is_shared(&shared) => format!("{}-{}", self.clone_name, source.replace('/', "-")),
            own => format!("{}-{own}", self.clone_name),
        };
        self.sources.iter().map(name_of).collect()
    }
}

/// The ids of the members' orders, in the order of the members; none if this is not the order of a group.
pub fn member_ids(order: &Order) -> Vec<JobId> {
    match &order.task {
        // A number of at most MEMBERS_MAX fits.
        Task::CloneGroup(group) => (0..group.sources.len()).map(|index| order.id.sibling(index as u8 + 1)).collect(),
        Task::Clone(_) | Task::Backup { .. } => Vec::new(),
    }
}

/// The order of one member: the same each time, whoever asks, so that repeating it is harmless. It is always held, until
/// all members are accepted.
pub fn member_order(order: &Order, group: &GroupOrder, index: usize, clone: CloneOrder) -> Order {
    let hold = true;
    let by = format!("group {} of {}", group.clone_name, order.by);
    // The caller counts the members, of which there are at most MEMBERS_MAX.
    Order { id: order.id.sibling(index as u8 + 1), by, task: Task::Clone(CloneOrder { hold, ..clone }) }
}

/// Checks the members of a group: names as `keiki clone` takes them, each once, not too few and not too many.
pub fn check_members(members: &[String]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for member in members {
        for part in member.splitn(2, '/') {
            check_name("an instance", part)?;
        }
        if !seen.insert(member) {
            return Err(Error::new(Kind::BadInput, format!("'{member}' is a member twice")).hint("name it once"));
        }
    }
    match members.len() {
        MEMBERS_MIN..=MEMBERS_MAX => Ok(()),
        count => Err(Error::new(
            Kind::BadInput,
            format!("a group of {count} is none: it has {MEMBERS_MIN} to {MEMBERS_MAX} members"),
        )
        .hint("name the instances as 'keiki instances' shows them, as in [\"orders\", \"db2/cart\"]")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(sources: &[&str]) -> GroupOrder {
        GroupOrder {
            group: "shop".into(),
            clone_name: "check".into(),
            sources: sources.iter().map(|source| source.to_string()).collect(),
            target: Target::Latest,
            hold: false,
        }
    }

    #[test]
    fn clones_are_named_for_their_instances_and_for_hosts_where_that_is_not_enough() {
        assert_eq!(group(&["orders", "db2/cart"]).member_names(), ["check-orders", "check-cart"]);
        let names = group(&["db1/orders", "db2/orders", "cart"]).member_names();
        assert_eq!(names, ["check-db1-orders", "check-db2-orders", "check-cart"]);
    }

    #[test]
    fn what_is_no_group_is_refused() {
        group(&["a", "b"]).check().unwrap();
        let long = "x".repeat(60);
        for wrong in [group(&[]), group(&["a"]), group(&["a", "a"]), group(&["a", "../b"]), group(&["a", &long])] {
            let error = wrong.check().unwrap_err();
            assert!(error.kind() == Kind::BadInput && error.hint_text().is_some(), "{error:?}");
        }
        let point = GroupOrder { target: Target::Name("x".into()), ..group(&["a", "b"]) };
        assert!(point.check().unwrap_err().hint_text().unwrap().contains("--at"));
    }

    #[test]
    fn orders_of_members_are_the_same_each_time_and_differ_from_each_other() {
        let task = Task::CloneGroup(group(&["a", "b", "c"]));
        let order = Order { id: JobId::fresh(), by: "local:root".into(), task };
        let ids = member_ids(&order);
        assert_eq!(ids, member_ids(&order));
        let all: BTreeSet<JobId> = ids.iter().copied().chain([order.id]).collect();
        assert_eq!(all.len(), 4);
        let other = Order { id: JobId::fresh(), ..order };
        assert!(member_ids(&other).iter().all(|id| !all.contains(id)));
    }
}
