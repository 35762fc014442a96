//! Watching a job: a bar per step on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::cli::Outcome;
use crate::cli::connection::{Connection, expect_response};
use crate::cli::group;
use crate::cli::output::{checks, error};
use crate::error::Result;
use crate::model::bytes_text::human_bytes;
use crate::model::id::JobId;
use crate::model::job::{JobReport, JobState, ProgressUnit, StepReport, StepState};
use crate::peer::api::{Request, Response};

/// How often the agent is asked. Cheap: it answers from memory.
const POLL: Duration = Duration::from_millis(200);
/// How often a step that goes on says so where there is no terminal.
const PLAIN_LINE_EVERY_POLLS: u32 = 50;

/// Watches a job on the given host until it ends or waits for a decision, then prints what it reached.
pub async fn follow(agent: &Connection, host: Option<&str>, id: JobId, as_json: bool) -> Result<Outcome> {
    let mut view: Box<dyn View> = match (as_json, std::io::stderr().is_terminal()) {
        (true, _) => Box::new(Silent),
        (false, true) => Box::new(Bars::new()),
        (false, false) => Box::new(Lines::default()),
    };
    let mut warned = false;
    loop {
        let answer = agent.ask_host(host, Request::ShowJob { id }).await?;
        let report = expect_response!(answer, "show job", Response::Job(report) => report);
        let members = group::members_of(agent, host, &report).await?;
        view.show(&group::with_steps_of_members(&report, &members));
        // Early, while there is time to cancel: what is missing from a clone may not be seen later.
        if !warned && let Some(warnings) = checks::warnings(&report.checks) {
            view.say(&warnings);
            warned = true;
        }
        if report.state != JobState::Running {
            view.end();
            let outcome = print_end(&report, &members, as_json);
            if let (JobState::Held, Some(name), false) = (report.state, report.order.task.clone_name(), as_json) {
                println!("{}", held_text(name, host));
            }
            return Ok(outcome);
        }
        tokio::time::sleep(POLL).await;
    }
}

/// What can be done with a clone that waits in quarantine.
fn held_text(clone: &str, host: Option<&str>) -> String {
    let on = host.map(|host| format!(" --on {host}")).unwrap_or_default();
    format!("next: 'keiki accept {clone}{on}' opens it, 'keiki discard {clone}{on}' deletes it")
}

/// Prints the results of a job that has ended, with those of its members if it is that of a group; bad unless it is done
/// or held.
pub fn print_end(report: &JobReport, members: &[JobReport], as_json: bool) -> Outcome {
    let good = matches!(report.state, JobState::Done | JobState::Held);
    if as_json {
        println!("{}", group::json_of(report, members));
    } else {
        if report.state == JobState::Failed
            && report.checks.iter().any(|item| item.verdict == crate::model::check::Verdict::Fail)
        {
            anstream::eprintln!("{}", checks::text(&report.checks));
        }
        let is_in_table = |name: &str| members.iter().any(|member| member.order.task.clone_name() == Some(name));
        let results: Vec<_> = report.results.iter().filter(|(name, _)| !is_in_table(name)).collect();
        let width = results.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, value) in results {
            println!("{name:width$}  {value}");
        }
        if !members.is_empty() {
            println!("{}", group::table_of(members));
        }
        if let Some(cause) = &report.error {
            error::print(cause, false);
        }
        if report.state == JobState::Cancelled {
            eprintln!("job {} was cancelled", report.order.id);
        }
    }
    if good { Outcome::Good } else { Outcome::Bad }
}

trait View {
    fn show(&mut self, report: &JobReport);
    /// Prints lines that stay, beside the progress.
    fn say(&mut self, text: &str);
    fn end(&mut self);
}

struct Silent;

impl View for Silent {
    fn show(&mut self, _report: &JobReport) {}
    fn say(&mut self, _text: &str) {}
    fn end(&mut self) {}
}

/// One bar per step that has begun.
struct Bars {
    all: MultiProgress,
    bars: Vec<ProgressBar>,
}

impl Bars {
    fn new() -> Bars {
        Bars { all: MultiProgress::new(), bars: Vec::new() }
    }
}

impl View for Bars {
    fn show(&mut self, report: &JobReport) {
        let width = report.steps.iter().map(|step| step.name.chars().count()).max().unwrap_or(0);
        for (index, step) in report.steps.iter().enumerate() {
            if step.state == StepState::Waiting {
                continue;
            }
            while self.bars.len() <= index {
                self.bars.push(self.all.add(ProgressBar::new(0)));
            }
            let bar = &self.bars[index];
            if bar.is_finished() {
                continue;
            }
            bar.set_style(style(step));
            bar.set_prefix(format!("{:width$}", step.name));
            bar.set_message(step.note.clone());
            bar.set_length(step.total.max(step.done));
            bar.set_position(step.done);
            match step.state {
                StepState::Done => bar.finish_with_message(format!("done  {}", step.note)),
                StepState::Failed => bar.abandon_with_message("failed"),
                StepState::Running | StepState::Waiting => bar.tick(),
            }
        }
    }

    fn say(&mut self, text: &str) {
        self.all.suspend(|| anstream::eprintln!("{text}"));
    }

    fn end(&mut self) {
        for bar in &self.bars {
            if !bar.is_finished() {
                bar.abandon();
            }
        }
    }
}

fn style(step: &StepReport) -> ProgressStyle {
    let template = match (step.unit, step.total, step.state) {
        (_, _, StepState::Done | StepState::Failed) | (_, 0, _) => "{prefix}  {elapsed:>4}  {msg}",
        (ProgressUnit::Bytes, ..) => {
            "{prefix}  {elapsed:>4}  {bar:24}  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left  {msg}"
        }
        (ProgressUnit::Items, ..) => "{prefix}  {elapsed:>4}  {bar:24}  {pos} of {len}  {msg}",
    };
    // The templates are constants of this function; a mistake in one falls back to the default look.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A line when a step begins or ends, and now and then between.
#[derive(Default)]
struct Lines {
    shown: Vec<StepState>,
    polls: u32,
}

impl View for Lines {
    fn show(&mut self, report: &JobReport) {
        self.polls += 1;
        self.shown.resize(report.steps.len(), StepState::Waiting);
        for (step, shown) in report.steps.iter().zip(&mut self.shown) {
            let changed = *shown != step.state;
            let is_due = step.state == StepState::Running && self.polls.is_multiple_of(PLAIN_LINE_EVERY_POLLS);
            if changed || is_due {
                eprintln!("{}", plain_line(step));
                *shown = step.state;
            }
        }
    }

    fn say(&mut self, text: &str) {
        anstream::eprintln!("{text}");
    }

    fn end(&mut self) {}
}

/// One step as one line: `stage: 1.0 GiB of 3.0 GiB`.
fn plain_line(step: &StepReport) -> String {
    let state = match step.state {
        StepState::Waiting => "waiting".to_string(),
        StepState::Done => "done".to_string(),
        StepState::Failed => "failed".to_string(),
        StepState::Running if step.total == 0 => "running".to_string(),
        StepState::Running => match step.unit {
            ProgressUnit::Bytes => format!("{} of {}", human_bytes(step.done), human_bytes(step.total)),
            ProgressUnit::Items => format!("{} of {}", step.done, step.total),
        },
    };
    match step.note.as_str() {
        "" => format!("{}: {state}", step.name),
        note => format!("{}: {state}, {note}", step.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_clone_says_how_to_decide_about_it() {
        insta::assert_snapshot!(held_text("copy", None), @"next: 'keiki accept copy' opens it, 'keiki discard copy' deletes it");
        insta::assert_snapshot!(
            held_text("copy", Some("db7")),
            @"next: 'keiki accept copy --on db7' opens it, 'keiki discard copy --on db7' deletes it"
        );
    }
}
