//! `keiki agent`: runs the daemon in the foreground until it is told to stop.

use crate::agent;
use crate::agent::config::Config;
use crate::cli::Outcome;
use crate::cli::arguments::Connect;
use crate::error::Result;

pub fn run(connect: &Connect) -> Result<Outcome> {
    let config = Config::load(&connect.config)?;
    agent::run(config, &connect.config)?;
    Ok(Outcome::Good)
}
