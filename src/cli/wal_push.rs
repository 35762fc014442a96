//! `keiki wal-push %p`: what PostgreSQL calls as its `archive_command`.
//!
//! PostgreSQL runs it in the data directory, once per segment, and recycles the segment only after exit code 0
//! (PostgreSQL manual, "Setting Up WAL Archiving"). This asks the agent whether the segment is durable in the
//! repository, and fails on any doubt: PostgreSQL then keeps the segment and asks again.

use std::path::PathBuf;

use crate::cli::Outcome;
use crate::cli::connection::{Connection, expect_response};
use crate::error::{Context, Error, Kind, Result};
use crate::peer::api::{Request, Response};

pub async fn run(agent: &Connection, path: PathBuf) -> Result<Outcome> {
    let file = path.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
        Error::new(Kind::BadInput, format!("cannot archive '{}': it is not the path of a segment", path.display()))
            .hint("this is for PostgreSQL: archive_command = 'keiki wal-push %p'")
    })?;
    let data_dir = std::env::current_dir().context(|| "cannot find out the data directory")?;
    let data_dir = data_dir.to_str().ok_or_else(|| {
        Error::new(Kind::BadInput, format!("cannot archive from '{}': the path is not UTF-8", data_dir.display()))
    })?;
    let request = Request::PushLog { data_dir: data_dir.to_string(), file: file.to_string() };
    expect_response!(agent.ask(request).await?, "wal-push", Response::Done => ());
    Ok(Outcome::Good)
}
