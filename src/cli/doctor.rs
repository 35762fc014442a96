//! `keiki doctor`: everything that could hurt later, looked at now.

use crate::cli::Outcome;
use crate::cli::connection::{Connection, expect_response};
use crate::cli::output::checks;
use crate::error::Result;
use crate::peer::api::{Request, Response};

pub async fn run(agent: &Connection, json: bool) -> Result<Outcome> {
    let items = expect_response!(agent.ask(Request::Doctor).await?, "doctor", Response::Checks(items) => items);
    Ok(checks::print(&items, json))
}
