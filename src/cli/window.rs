//! `keiki window`: the moments that a clone can be made of, with the holes.

use crate::cli::Outcome;
use crate::cli::connection::{Connection, expect_response};
use crate::cli::output::{json, table};
use crate::error::Result;
use crate::model::target::utc_text;
use crate::model::window::Window;
use crate::peer::api::{Request, Response};

pub async fn run(agent: &Connection, instance: String, as_json: bool) -> Result<Outcome> {
    let answer = agent.ask(Request::ShowWindow { instance: instance.clone() }).await?;
    let (incarnation, window) = expect_response!(
        answer, "window", Response::Window { incarnation, window } => (incarnation, window)
    );
    if as_json {
        println!("{}", json::window(incarnation, &window));
    } else {
        println!("{}", text(&instance, &window));
    }
    Ok(Outcome::Good)
}

fn text(instance: &str, window: &Window) -> String {
    if window.reaches.is_empty() {
        return format!(
            "nothing of '{instance}' can be reached yet; take a backup with 'keiki backup create {instance}'"
        );
    }
    let rows = window
        .reaches
        .iter()
        .map(|reach| {
            let last_commit = reach.last_commit_at.map_or("none".to_string(), utc_text);
            let until = reach.covered_until.or(reach.last_commit_at).map_or("-".to_string(), utc_text);
            vec![
                reach.backup.to_string(),
                utc_text(reach.from_time),
                until,
                last_commit,
                reach.from.to_string(),
                reach.to.to_string(),
            ]
        })
        .collect();
    let mut parts =
        vec![table::render(&["BACKUP", "FROM", "UNTIL", "LAST COMMIT", "FROM POSITION", "TO POSITION"], rows)];
    for hole in &window.holes {
        let times = match (hole.from_time, hole.to_time) {
            (Some(from), Some(to)) => format!(" ({} to {})", utc_text(from), utc_text(to)),
            _ => String::new(),
        };
        parts.push(format!("hole: no log from {} to {}{times}", hole.from, hole.to));
    }
    parts.join("\n")
}
