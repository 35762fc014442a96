//! The command line: one file per verb, and how things look.
//!
//! Every verb takes typed arguments, asks an agent over the control socket, and prints. Nothing here touches a database;
//! two verbs read the repository: `download` through the agent, and `restore` by links alone.

use std::process::ExitCode;

use clap::Parser;

use crate::error::Result;

mod accept;
mod agent;
mod arguments;
mod backup;
mod ca;
mod clone;
mod connection;
mod doctor;
mod group;
mod download;
mod hosts;
mod instances;
mod job;
mod output;
mod passwords;
mod repository;
mod restore;
mod status;
mod wal_push;
mod window;

use arguments::{Arguments, Verb};
use connection::Connection;

/// What a verb ends with when nothing went wrong but the answer is "no": a failed check list, a failed job.
pub(crate) enum Outcome {
    Good,
    Bad,
}

/// Runs the command line of this process and returns its exit code: 0 good, 1 a check list or job that failed, and
/// the codes of [`crate::error::Kind`] for everything that could not be done.
pub fn run() -> ExitCode {
    let arguments = Arguments::parse();
    let json = arguments.json;
    let Some(verb) = arguments.verb else {
        arguments::print_overview();
        return ExitCode::SUCCESS;
    };
    match run_verb(verb, arguments.connect, json) {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Bad) => ExitCode::from(1),
        Err(error) => {
            output::error::print(&error, json);
            ExitCode::from(error.kind().exit_code())
        }
    }
}

fn run_verb(verb: Verb, connect: arguments::Connect, json: bool) -> Result<Outcome> {
    // The verbs that need no agent, and the agent itself, come first: they must work when nothing is configured.
    let verb = match verb {
        Verb::Agent => return agent::run(&connect),
        Verb::Ca { action } => return ca::run(action, json),
        other => other,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| crate::error::Error::io("cannot start the asynchronous runtime", error))?;
    if let Verb::Restore(arguments) = verb {
        return runtime.block_on(restore::run(arguments, json));
    }
    runtime.block_on(async {
        let agent = Connection::open(&connect)?;
        match verb {
            Verb::Agent | Verb::Ca { .. } | Verb::Restore(_) => Ok(Outcome::Good),
            Verb::Doctor => doctor::run(&agent, json).await,
            Verb::Status => status::run(&agent, json).await,
            Verb::Instances => instances::run(&agent, json).await,
            Verb::Hosts => hosts::run(&agent, json).await,
            Verb::Backup { action } => backup::run(&agent, action, json).await,
            Verb::Window { instance } => window::run(&agent, instance, json).await,
            Verb::Clone(order) => clone::run(&agent, order, json).await,
            Verb::Accept { name } => accept::accept(&agent, name, json).await,
            Verb::Discard { name, yes } => accept::discard(&agent, name, yes, json).await,
            Verb::Job { action } => job::run(&agent, action, json).await,
            Verb::Repository { action } => repository::run(&agent, action, json).await,
            Verb::WalPush { path } => wal_push::run(&agent, path).await,
        }
    })
}
