//! `keiki accept` and `keiki discard`: the decision about a clone in quarantine.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

use crate::cli::Outcome;
use crate::cli::connection::{Connection, expect_response};
use crate::cli::output::progress;
use crate::error::{Error, Kind, Result};
use crate::model::job::{JobState, Task};
use crate::peer::api::{Request, Response};

/// How often it is asked whether a clone is deleted.
const POLL: Duration = Duration::from_millis(100);

pub async fn accept(agent: &Connection, clone: String, as_json: bool) -> Result<Outcome> {
    let answer = agent.ask(Request::Accept { clone }).await?;
    let report = expect_response!(answer, "accept", Response::Job(report) => report);
    progress::follow(agent, agent.host(), report.order.id, as_json).await
}

pub async fn discard(agent: &Connection, clone: String, yes: bool, as_json: bool) -> Result<Outcome> {
    if !yes {
        confirm(&clone)?;
    }
    let answer = agent.ask(Request::Discard { clone: clone.clone() }).await?;
    let mut report = expect_response!(answer, "discard", Response::Job(report) => report);
    while report.state == JobState::Running {
        tokio::time::sleep(POLL).await;
        let answer = agent.ask(Request::ShowJob { id: report.order.id }).await?;
        report = expect_response!(answer, "show job", Response::Job(report) => report);
    }
    if let (JobState::Failed, Some(error)) = (report.state, &report.error) {
        return Err(error.clone());
    }
    match (as_json, &report.order.task) {
        (true, _) => println!("{}", crate::cli::output::json::job(&report)),
        (false, Task::CloneGroup(group)) => {
            println!("clones {} and their directories are deleted", group.member_names().join(", "));
        }
        (false, _) => println!("clone '{clone}' and its directory are deleted"),
    }
    Ok(Outcome::Good)
}

/// Deleting is asked for twice: on a terminal by a question, elsewhere by `--yes`.
fn confirm(clone: &str) -> Result<()> {
    let refusal = || {
        Error::new(Kind::Cancelled, format!("clone '{clone}' was not discarded"))
            .hint("type its name when asked, or add --yes in a script")
    };
    if !std::io::stdin().is_terminal() {
        return Err(refusal());
    }
    print!("delete clone '{clone}' and its data directory? type its name to confirm: ");
    std::io::stdout().flush().map_err(|error| Error::io("cannot ask for confirmation", error))?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(|error| Error::io("cannot read the confirmation", error))?;
    if line.trim() == clone { Ok(()) } else { Err(refusal()) }
}
