//! Groups on the screen: the order of one, and how its members stand.

use crate::cli::connection::{Connection, expect_response};
use crate::cli::output::{json, table};
use crate::error::{Error, Kind, Result};
use crate::model::group::{Group, member_ids};
use crate::model::job::{JobReport, StepReport, Task};
use crate::peer::api::{Request, Response};

/// Steps of a member that say nothing which the group's own do not say.
const STEPS_OF_GROUP: [&str; 2] = ["claim", "check"];

/// The group of this name in the configuration of the agent that the person meant, if there is one.
pub async fn find(agent: &Connection, name: &str) -> Result<Option<Group>> {
    // A name with a host is that of an instance.
    if name.contains('/') {
        return Ok(None);
    }
    let status = expect_response!(agent.ask(Request::Status).await?, "status", Response::Status(status) => status);
    Ok(status.groups.into_iter().find(|group| group.name == name))
}

/// The jobs of a group's members, as far as they have begun, in the order of the members; none for other jobs.
pub async fn members_of(agent: &Connection, host: Option<&str>, report: &JobReport) -> Result<Vec<JobReport>> {
    let mut members = Vec::new();
    for id in member_ids(&report.order) {
        match agent.ask_host(host, Request::ShowJob { id }).await {
            Ok(Response::Job(report)) => members.push(report),
            Ok(other) => return Err(crate::cli::connection::unexpected("show job", &other)),
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(members)
}

/// A group's job with the steps of its members among its own, where they belong.
pub fn with_steps_of_members(report: &JobReport, members: &[JobReport]) -> JobReport {
    let mut whole = report.clone();
    let at = whole.steps.iter().position(|step| step.name == "accept").unwrap_or(whole.steps.len());
    let steps = members.iter().flat_map(|member| {
        let name = name_of(member);
        let own = member.steps.iter().filter(|step| !STEPS_OF_GROUP.contains(&step.name.as_str()));
        own.map(move |step| StepReport { name: format!("{name} {}", step.name), ..step.clone() })
    });
    whole.steps.splice(at..at, steps.collect::<Vec<_>>());
    whole
}

/// What a group reached, member by member.
pub fn table_of(members: &[JobReport]) -> String {
    let rows = members.iter().map(|member| {
        let result = |name: &str| member.results.iter().find(|line| line.0 == name).map(|line| line.1.clone());
        let reached = result("reached").unwrap_or_else(|| "-".to_string());
        let (position, time) = reached.split_once(", ").unwrap_or((&reached, "-"));
        let time = time.strip_prefix("last transaction at ").unwrap_or(time);
        vec![
            name_of(member).to_string(),
            result("engine").unwrap_or_else(|| "-".to_string()),
            json::job_state_name(member.state).to_string(),
            position.to_string(),
            time.to_string(),
            result("port").unwrap_or_else(|| "-".to_string()),
        ]
    });
    table::render(&["MEMBER", "ENGINE", "STATE", "REACHED", "LAST TRANSACTION", "PORT"], rows.collect())
}

/// A group's job as JSON, with the jobs of its members.
pub fn json_of(report: &JobReport, members: &[JobReport]) -> serde_json::Value {
    let mut value = json::job(report);
    if matches!(report.order.task, Task::CloneGroup(_)) {
        value["members"] = members.iter().map(json::job).collect();
    }
    value
}

fn name_of(member: &JobReport) -> &str {
    member.order.task.clone_name().unwrap_or_default()
}

/// An error if something was typed that means nothing for a group.
pub fn refuse(group: &str, option: &str, hint: &str) -> Error {
    Error::new(Kind::BadInput, format!("cannot clone group '{group}' with {option}: it means one instance")).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::group::GroupOrder;
    use crate::model::id::JobId;
    use crate::model::job::{CloneOrder, JobState, Order, ProgressUnit, StepState};
    use crate::model::target::Target;

    fn job(task: Task, steps: &[&str], results: &[(&str, &str)]) -> JobReport {
        let step = |name: &&str| StepReport {
            name: name.to_string(),
            state: StepState::Done,
            done: 0,
            total: 0,
            unit: ProgressUnit::Items,
            note: String::new(),
            began_at: None,
            ended_at: None,
        };
        JobReport {
            order: Order { id: JobId::fresh(), by: "local:root".into(), task },
            state: JobState::Held,
            began_at: jiff::Timestamp::UNIX_EPOCH,
            ended_at: None,
            steps: steps.iter().map(step).collect(),
            results: results.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            checks: vec![],
            error: None,
        }
    }

    fn member(name: &str, results: &[(&str, &str)]) -> JobReport {
        let order = CloneOrder {
            source: "db1/x".into(),
            clone_name: name.into(),
            target: Target::Latest,
            data_dir: None,
            port: None,
            settings: Default::default(),
            hold: true,
            passwords_for: Default::default(),
            keep_expired: false,
            ties: Default::default(),
        };
        job(Task::Clone(order), &["claim", "check", "stage", "accept"], results)
    }

    #[test]
    fn a_group_is_shown_with_the_steps_and_the_results_of_its_members() {
        let order = GroupOrder {
            group: "shop".into(),
            clone_name: "check".into(),
            sources: vec!["orders".into(), "cart".into()],
            target: Target::Latest,
            hold: true,
        };
        let group = job(Task::CloneGroup(order), &["claim", "check", "grow", "accept"], &[]);
        let reached = "1@0/3000060, last transaction at 2026-11-21 14:03:19.5Z";
        let orders = member("check-orders", &[("engine", "postgres 15.18"), ("reached", reached), ("port", "5500")]);
        let cart = member("check-cart", &[("engine", "redis 7.0.15")]);
        let steps = with_steps_of_members(&group, &[orders.clone(), cart.clone()]).steps;
        let names: Vec<&str> = steps.iter().map(|step| step.name.as_str()).collect();
        let of_members = ["check-orders stage", "check-orders accept", "check-cart stage", "check-cart accept"];
        assert_eq!(names, [&["claim", "check", "grow"][..], &of_members, &["accept"]].concat());
        insta::assert_snapshot!(table_of(&[orders, cart]), @r"
        MEMBER        ENGINE          STATE  REACHED      LAST TRANSACTION        PORT
        check-orders  postgres 15.18  held   1@0/3000060  2026-11-21 14:03:19.5Z  5500
        check-cart    redis 7.0.15    held   -            -                       -
        ");
    }
}
