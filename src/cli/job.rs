//! `keiki job`: what is running, what has run.

use crate::cli::Outcome;
use crate::cli::arguments::JobAction;
use crate::cli::connection::{Connection, expect_response};
use crate::cli::group;
use crate::cli::output::{json, progress, table};
use crate::error::Result;
use crate::model::id::JobId;
use crate::model::job::{JobReport, Order, StepState, Task};
use crate::model::password::Passwords;
use crate::model::target::utc_text;
use crate::peer::api::{Request, Response};

pub async fn run(agent: &Connection, action: JobAction, as_json: bool) -> Result<Outcome> {
    match action {
        JobAction::List => list(agent, as_json).await,
        JobAction::Show { id } => {
            let report = ask(agent, Request::ShowJob { id: JobId::parse(&id)? }).await?;
            let members = group::members_of(agent, agent.host(), &report).await?;
            if as_json {
                println!("{}", group::json_of(&report, &members));
            } else {
                show(&group::with_steps_of_members(&report, &members), &members);
            }
            Ok(Outcome::Good)
        }
        JobAction::Follow { id } => progress::follow(agent, agent.host(), JobId::parse(&id)?, as_json).await,
        JobAction::Cancel { id } => {
            let report = ask(agent, Request::CancelJob { id: JobId::parse(&id)? }).await?;
            println!("job {} is {}", report.order.id, json::job_state_name(report.state));
            Ok(Outcome::Good)
        }
        JobAction::Resume { id } => {
            let report = ask(agent, Request::ResumeJob { id: JobId::parse(&id)? }).await?;
            progress::follow(agent, agent.host(), report.order.id, as_json).await
        }
    }
}

/// Gives an order to a host and watches it, unless `detach` is wanted: then the id is printed.
pub async fn submit_and_follow(
    agent: &Connection,
    host: Option<&str>,
    order: Order,
    passwords: Passwords,
    detach: bool,
    as_json: bool,
) -> Result<Outcome> {
    let answer = agent.ask_host(host, Request::Submit { order, passwords }).await?;
    let report = expect_response!(answer, "submit", Response::Job(report) => report);
    if !detach {
        return progress::follow(agent, host, report.order.id, as_json).await;
    }
    if as_json {
        println!("{}", json::job(&report));
    } else {
        let on = host.map(|name| format!(" --on {name}")).unwrap_or_default();
        println!("{}", report.order.id);
        eprintln!("watch it with: keiki job follow {}{on}", report.order.id);
    }
    Ok(Outcome::Good)
}

async fn ask(agent: &Connection, request: Request) -> Result<JobReport> {
    Ok(expect_response!(agent.ask(request).await?, "job", Response::Job(report) => report))
}

async fn list(agent: &Connection, as_json: bool) -> Result<Outcome> {
    let jobs = expect_response!(agent.ask(Request::ListJobs).await?, "list jobs", Response::Jobs(jobs) => jobs);
    if as_json {
        println!("{}", serde_json::Value::Array(jobs.iter().map(json::job).collect()));
        return Ok(Outcome::Good);
    }
    let rows = jobs
        .iter()
        .map(|job| {
            let step = job.steps.iter().find(|step| matches!(step.state, StepState::Running | StepState::Failed));
            vec![
                job.order.id.to_string(),
                title(&job.order.task),
                json::job_state_name(job.state).to_string(),
                step.map(|step| step.name.clone()).unwrap_or_default(),
                utc_text(job.began_at),
                job.order.by.clone(),
            ]
        })
        .collect();
    table::print(&["JOB", "WHAT", "STATE", "STEP", "BEGAN", "BY"], rows);
    Ok(Outcome::Good)
}

fn title(task: &Task) -> String {
    match task {
        Task::Backup { instance, .. } => format!("backup of {instance}"),
        Task::Clone(order) => format!("clone {} of {} at {}", order.clone_name, order.source, order.target),
        Task::CloneGroup(order) => format!("clones {} of group {} at {}", order.clone_name, order.group, order.target),
    }
}

fn show(report: &JobReport, members: &[JobReport]) {
    println!("job    {}", report.order.id);
    println!("what   {}", title(&report.order.task));
    println!("by     {}", report.order.by);
    println!("state  {}", json::job_state_name(report.state));
    println!("began  {}", utc_text(report.began_at));
    if let Some(ended_at) = report.ended_at {
        println!("ended  {}", utc_text(ended_at));
    }
    let rows = report
        .steps
        .iter()
        .map(|step| {
            let state = match step.state {
                StepState::Waiting => "waiting",
                StepState::Running => "running",
                StepState::Done => "done",
                StepState::Failed => "failed",
            };
            vec![step.name.clone(), state.to_string(), step.note.clone()]
        })
        .collect();
    table::print(&["STEP", "STATE", "NOTE"], rows);
    progress::print_end(report, members, false);
}
