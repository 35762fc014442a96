//! The check list of a group: those of all its members, and what only the group as a whole can fail in.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::{GroupWork, Member, TiedMember, Ties};
use crate::engine::log_counts_in_seconds;
use crate::error::{Context, Error, Kind, Result};
use crate::job::clone::check::{self as of_clone, Checked};
use crate::job::clone::space::space_item;
use crate::job::clone::{Place, free_ports, ports_of_jobs};
use crate::job::window::window_of;
use crate::model::backup::Backup;
use crate::model::check::{CheckItem, Verdict};
use crate::model::engine_kind::EngineKind;
use crate::model::group::GroupOrder;
use crate::model::id::JobId;
use crate::model::incarnation::Incarnation;
use crate::model::job::{JobState, Task};
use crate::model::target::{Target, utc_text};
use crate::repo::incarnations::Incarnations;

/// What the check of a group found out.
pub struct CheckedGroup {
    pub items: Vec<CheckItem>,
    /// The moment that all members will show, if they can.
    at: Option<Timestamp>,
    /// For each member what the others mean to it.
    ties: Vec<Ties>,
    /// The reason that a person reads first.
    refusal: Option<Error>,
}

impl CheckedGroup {
    /// The moment and the ties; the error that a failed list ends the job with if anything failed.
    pub fn into_outcome(self, order: &GroupOrder) -> Result<(Timestamp, Vec<Ties>)> {
        let cannot = format!("cannot clone group '{}'", order.group);
        let failed = self.items.iter().find(|item| item.verdict == Verdict::Fail);
        match (self.refusal, failed, self.at) {
            (Some(refusal), ..) => Err(refusal.while_doing(cannot)),
            (None, Some(item), _) => {
                let error = Error::new(Kind::BadInput, format!("{cannot}: {}: {}", item.what, item.found));
                Err(error.hint(item.hint.clone().unwrap_or_default()))
            }
            (None, None, Some(at)) => Ok((at, self.ties)),
            (None, None, None) => Err(Error::new(Kind::Internal, "a check list passed without a moment")),
        }
    }
}

impl GroupWork {
    /// Finds out what the sources are, and a free port for each member.
    pub(super) async fn find_members(&self) -> Result<Vec<Member>> {
        let cannot = || format!("cannot clone group '{}'", self.order.group);
        let incarnations = Incarnations::new(self.host.repository.repository().await?);
        let mut members: Vec<Member> = Vec::new();
        let mut taken = ports_of_jobs(&self.runner);
        for (name, clone_name) in self.order.sources.iter().zip(self.order.member_names()) {
            let found = incarnations.find(name).await.context(cannot)?;
            let source = format!("{}/{}", found.host, found.instance);
            if members.iter().any(|member| member.source == source) {
                let error = Error::new(Kind::BadInput, format!("{}: '{source}' is a member twice", cannot()));
                return Err(error.hint("correct [[group]] in the configuration"));
            }
            let port = free_ports(&self.host, &taken, found.engine).next();
            let port = port.ok_or_else(|| {
                let (from, to) = (self.host.ports.start(), self.host.ports.end());
                Error::new(Kind::Conflict, format!("{}: too few ports from {from} to {to} are free", cannot()))
                    .hint("widen '[clone] ports' in the configuration of this host")
            })?;
            taken.push(port);
            members.push(Member { source, clone_name, engine: found.engine, port });
        }
        Ok(members)
    }

    async fn incarnation_of(&self, member: &Member) -> Result<Incarnation> {
        Incarnations::new(self.host.repository.repository().await?).find(&member.source).await
    }
}

/// Looks at everything. `own_jobs` are those of the members, if they are there already.
pub(super) async fn check(group: &GroupWork, members: &[Member], own_jobs: &[JobId]) -> Result<CheckedGroup> {
    let mut checked = CheckedGroup { items: Vec::new(), at: None, ties: Vec::new(), refusal: None };
    match moment(group, members).await {
        Ok((at, item)) => {
            checked.at = Some(at);
            checked.items.push(item);
        }
        Err(error) => {
            let hint = error.hint_text().unwrap_or("see 'keiki window' of each member");
            checked.items.push(CheckItem::fail("moment", error.message(), hint));
            checked.refusal = Some(error);
            return Ok(checked);
        }
    }
    checked.items.extend(name_items(group, members, own_jobs));
    let mut of_members = Vec::new();
    for member in members {
        let one = check_member(group, member, checked.at.unwrap_or_default()).await?;
        let name =
            |item: &CheckItem| CheckItem { what: format!("{}: {}", member.clone_name, item.what), ..item.clone() };
        checked.items.extend(one.items.iter().map(name));
        if checked.refusal.is_none() {
            checked.refusal = one.refusal.clone();
        }
        of_members.push(one);
    }
    if of_members.iter().all(|one| one.choice.is_some()) {
        checked.items.push(space_item_of_all(group, &of_members)?);
        match ties(group, members, &of_members) {
            Ok((items, ties)) => {
                checked.items.extend(items);
                checked.ties = ties;
            }
            Err(error) => {
                let hint = error.hint_text().unwrap_or("clone the members one by one");
                checked.items.push(CheckItem::fail("members together", error.message(), hint));
            }
        }
    }
    Ok(checked)
}

async fn check_member(group: &GroupWork, member: &Member, at: Timestamp) -> Result<Checked> {
    let repository = group.host.repository.repository().await?;
    let source = group.incarnation_of(member).await?;
    let order = member.order(at, BTreeMap::new());
    let place = Place { data_dir: group.host.data_root.join(&member.clone_name), port: member.port };
    of_clone::check(&group.host, &repository, &source, &order, &place).await
}

/// The moment that the order means for all members: the time that it names, or the newest that all of them can show.
async fn moment(group: &GroupWork, members: &[Member]) -> Result<(Timestamp, CheckItem)> {
    let in_seconds = first_in_seconds(group, members).await?;
    if let Target::Time(at) = group.order.target {
        return match in_seconds.filter(|_| at.subsec_nanosecond() != 0) {
            Some(member) => Err(Error::new(
                Kind::BadInput,
                format!(
                    "{} lies between two seconds, and the log of '{}' ({}) counts in whole seconds",
                    utc_text(at),
                    member.source,
                    member.engine.name()
                ),
            )
            .hint("order a time without fractions of a second")),
            None => Ok((at, CheckItem::pass("moment", format!("{}, of all members", utc_text(at))))),
        };
    }
    let mut newest: Option<(Timestamp, &Member)> = None;
    for member in members {
        let at = newest_moment(group, member).await.context(|| format!("'{}'", member.source))?;
        if newest.is_none_or(|(before, _)| at < before) {
            newest = Some((at, member));
        }
    }
    let (at, last) = newest.ok_or_else(|| Error::new(Kind::Internal, "a group without members"))?;
    let at = match in_seconds {
        Some(_) => Timestamp::from_second(at.as_second()).unwrap_or(at),
        None => at,
    };
    let found = format!("{}, the latest that all members reach; '{}' reaches no later one", utc_text(at), last.source);
    Ok((at, CheckItem::pass("moment", found)))
}

/// The first member whose log tells whole seconds only, by the backup that its clone would begin with.
async fn first_in_seconds<'m>(group: &GroupWork, members: &'m [Member]) -> Result<Option<&'m Member>> {
    let repository = group.host.repository.repository().await?;
    for member in members {
        let source = group.incarnation_of(member).await?;
        let backups = group.host.backups_of(&repository, source.id).await.context(|| format!("'{}'", member.source))?;
        let is_before = |backup: &&Backup| match group.order.target {
            Target::Time(at) => backup.ended_at <= at,
            _ => true,
        };
        let first = backups.iter().rfind(is_before).or(backups.last());
        if first.is_some_and(|backup| log_counts_in_seconds(member.engine, &backup.engine_facts)) {
            return Ok(Some(member));
        }
    }
    Ok(None)
}

/// The newest moment that a member can show, after everything that it has was shipped.
async fn newest_moment(group: &GroupWork, member: &Member) -> Result<Timestamp> {
    let source = group.incarnation_of(member).await?;
    let repository = group.host.repository.repository().await?;
    // Without its agent the clone can reach what was shipped before; the member's own check list says so.
    let shipped = group.host.sources.ship_now(&source.host, source.id).await.ok().map(|end| end.position);
    let window = window_of(&repository, &source, shipped).await?;
    let newest = window.reaches.last().and_then(|reach| reach.covered_until.max(reach.last_commit_at));
    newest.ok_or_else(|| {
        Error::new(Kind::NotFound, "no moment of it can be reached yet")
            .hint(format!("take a backup of it: 'keiki backup create {}'", source.instance))
    })
}

/// Whether another job makes a clone of the same name just now.
fn name_items(group: &GroupWork, members: &[Member], own_jobs: &[JobId]) -> Vec<CheckItem> {
    let is_live = |state: JobState| matches!(state, JobState::Running | JobState::Held);
    let others = group.runner.list().into_iter().filter(|job| is_live(job.state) && !own_jobs.contains(&job.order.id));
    let clash = |job: crate::model::job::JobReport| {
        let Task::Clone(clone) = &job.order.task else { return None };
        let member = members.iter().find(|member| member.clone_name == clone.clone_name)?;
        let found = format!("job '{}' grows a clone of that name", job.order.id);
        let hint = format!("choose another name with --as, or decide about it: 'keiki job show {}'", job.order.id);
        Some(CheckItem::fail(format!("{}: name", member.clone_name), found, hint))
    };
    others.filter_map(clash).collect()
}

/// All members lie on one disk: each of them fitting is not enough.
fn space_item_of_all(group: &GroupWork, members: &[Checked]) -> Result<CheckItem> {
    let data_of = |one: &Checked| one.choice.as_ref().map_or(0, |choice| choice.backup.restored_bytes);
    let sum = |of: &dyn Fn(&Checked) -> u64| members.iter().fold(0u64, |sum, one| sum.saturating_add(of(one)));
    let (data_bytes, log_bytes) = (sum(&data_of), sum(&|one| one.log_bytes));
    let item = space_item(data_bytes, log_bytes, &group.host.data_root, group.host.keep_free_bytes)?;
    let hint =
        item.hint.map(|_| "free some space there, or set '[clone] data_root' to a directory on a larger disk".into());
    Ok(CheckItem { what: String::from("disk space of all"), hint, ..item })
}

/// What each member must be told of the others, engine by engine.
fn ties(group: &GroupWork, members: &[Member], checked: &[Checked]) -> Result<(Vec<CheckItem>, Vec<Ties>)> {
    let mut all = vec![BTreeMap::new(); members.len()];
    let mut items = Vec::new();
    let engines: std::collections::BTreeSet<EngineKind> = members.iter().map(|member| member.engine).collect();
    for engine in engines {
        let numbers: Vec<usize> = (0..members.len()).filter(|number| members[*number].engine == engine).collect();
        let tied: Vec<TiedMember> = numbers
            .iter()
            .filter_map(|number| {
                let choice = checked[*number].choice.as_ref()?;
                Some(TiedMember {
                    name: members[*number].clone_name.clone(),
                    source: members[*number].source.clone(),
                    port: members[*number].port,
                    facts: choice.backup.engine_facts.clone(),
                })
            })
            .collect();
        let (more, ties) = group.host.engine(engine)?.tie(&tied, &group.host.listen_addresses)?;
        items.extend(more);
        for (number, ties) in numbers.into_iter().zip(ties) {
            all[number] = ties;
        }
    }
    Ok((items, all))
}
