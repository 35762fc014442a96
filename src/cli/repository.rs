//! `keiki repository`: prepare the place where everything is kept.

use crate::cli::Outcome;
use crate::cli::arguments::RepositoryAction;
use crate::cli::connection::{Connection, expect_response};
use crate::error::Result;
use crate::peer::api::{Request, Response};

pub async fn run(agent: &Connection, action: RepositoryAction, as_json: bool) -> Result<Outcome> {
    match action {
        RepositoryAction::Init => {
            expect_response!(agent.ask(Request::InitRepository).await?, "init", Response::Done => ());
            if as_json {
                println!("{}", serde_json::json!({ "initialised": true }));
            } else {
                println!("the repository is ready");
            }
            Ok(Outcome::Good)
        }
    }
}
