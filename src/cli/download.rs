//! `keiki backup download`: a backup set as plain files, in a directory or as a tar stream; or as links to its objects.
//!
//! The repository is read here, object by object through the agent, so that every byte is verified where it is written.

use std::io::{BufWriter, IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use jiff::{SignedDuration, Timestamp};

use crate::agent::config::parse_duration;
use crate::base::clock::{Clock, SystemClock};
use crate::cli::Outcome;
use crate::cli::arguments::{DownloadArguments, Place};
use crate::cli::connection::{Connection, expect_response};
use crate::cli::output::partial::PartialFile;
use crate::error::{Error, Kind, Result};
use crate::job::download::{
    DirectoryOutput, Downloaded, LinksMade, Output, Progress, TarOutput, download, write_links,
};
use crate::model::backup::Backup;
use crate::model::bytes_text::human_bytes;
use crate::model::id::{BackupId, IncarnationId};
use crate::model::target::utc_text;
use crate::peer::api::{Request, Response};
use crate::repo::incarnations::Incarnations;
use crate::repo::repository::Repository;

pub async fn run(agent: &Connection, arguments: DownloadArguments, as_json: bool) -> Result<Outcome> {
    let DownloadArguments { instance, backup, to, tar, link } = arguments;
    let id = BackupId::parse(&backup)?;
    let valid_for = link.as_deref().map(parse_duration).transpose()?;
    let answer = agent.ask(Request::ListBackups { instance: instance.clone() }).await?;
    let backups = expect_response!(answer, "list backups", Response::Backups(backups) => backups);
    let backup = backups.into_iter().find(|candidate| candidate.id == id).ok_or_else(|| {
        Error::new(Kind::NotFound, format!("'{instance}' has no backup '{id}'"))
            .hint(format!("'keiki backup list {instance}' shows what there is"))
    })?;
    if let Some(valid_for) = valid_for {
        return links(agent, &backup, valid_for, to.as_deref(), as_json).await;
    }
    // The place first: it is what is wrong most often.
    let (output, is_stdout) = output_at(&Place { to, tar }, backup.ended_at)?;
    let repository = Repository::open(agent.objects()).await?;
    let done = write(&repository, backup.incarnation, &id, output).await;
    let done = done.map_err(|error| error.while_doing(format!("cannot download backup '{id}'")))?;
    say(&id, &done, is_stdout, as_json);
    Ok(Outcome::Good)
}

/// Writes the files of a backup, with a bar where there is a terminal.
pub(super) async fn write(
    repository: &Arc<Repository>,
    incarnation: IncarnationId,
    backup: &BackupId,
    mut output: Box<dyn Output>,
) -> Result<Downloaded> {
    let incarnation = Incarnations::new(repository.clone()).get(incarnation).await?;
    let bar = Bar::new();
    let done = download(repository, &incarnation, backup, output.as_mut(), &bar).await;
    bar.0.finish_and_clear();
    done
}

/// Says what was written. Where the standard output is the archive, nothing else may go there.
pub(super) fn say(backup: &BackupId, done: &Downloaded, is_stdout: bool, as_json: bool) {
    let said = if as_json { json(backup, done) } else { text(done) };
    match is_stdout {
        true => eprintln!("{said}"),
        false => println!("{said}"),
    }
}

/// Writes links instead of files.
async fn links(
    agent: &Connection,
    backup: &Backup,
    valid_for: Duration,
    to: Option<&Path>,
    as_json: bool,
) -> Result<Outcome> {
    let failed = |error: Error| error.while_doing(format!("cannot make links to backup '{}'", backup.id));
    let file = to.map(PartialFile::begin).transpose()?;
    let mut writer: Box<dyn Write + Send> = match &file {
        Some(file) => Box::new(BufWriter::new(file.writer()?)),
        None => Box::new(std::io::stdout()),
    };
    let repository = Repository::open(agent.objects()).await?;
    let incarnation = Incarnations::new(repository.clone()).get(backup.incarnation).await?;
    let made_at = SystemClock.now();
    let made = write_links(&repository, &incarnation, &backup.id, valid_for, made_at, writer.as_mut()).await;
    let made = made.map_err(failed)?;
    drop(writer);
    let is_stdout = file.is_none();
    file.map_or(Ok(()), PartialFile::finish)?;
    let said = if as_json { links_json(backup, &made) } else { links_text(&made, made_at, valid_for, to) };
    match is_stdout {
        true => eprintln!("{said}"),
        false => println!("{said}"),
    }
    Ok(Outcome::Good)
}

fn links_text(made: &LinksMade, made_at: Timestamp, valid_for: Duration, to: Option<&Path>) -> String {
    let file = to.map_or(String::from("FILE"), |file| file.display().to_string());
    let end = utc_text(made.expires_at);
    let mut lines =
        vec![format!("links to {} objects of {}, which work until {end}", made.objects, human_bytes(made.bytes))];
    let wanted = SignedDuration::try_from(valid_for).unwrap_or(SignedDuration::MAX);
    if made.expires_at.duration_since(made_at) + SignedDuration::from_secs(60) < wanted {
        lines.push(String::from("that is earlier than asked for: the agent's credentials are temporary and end then"));
    } else if made.may_end_earlier {
        lines.push(String::from(
            "the agent's credentials are temporary: when they end, which may be earlier, the links stop working",
        ));
    }
    lines.push(String::from("until then whoever has them can read the backup: keep them as you keep the database"));
    lines.push(format!("on any host that reaches the server: keiki restore --from-links {file} --to DIR"));
    lines.join("\n")
}

fn links_json(backup: &Backup, made: &LinksMade) -> String {
    serde_json::json!({
        "backup": backup.id.to_string(),
        "objects": made.objects,
        "bytes": made.bytes,
        "expires_at": made.expires_at.to_string(),
        "may_end_earlier": made.may_end_earlier,
    })
    .to_string()
}

/// Where the files go, and whether that is the standard output. The files of an archive are from `modified_at`.
pub(super) fn output_at(place: &Place, modified_at: Timestamp) -> Result<(Box<dyn Output>, bool)> {
    let modified_at = u64::try_from(modified_at.as_second()).unwrap_or(0);
    match (&place.to, &place.tar) {
        (Some(directory), _) => Ok((Box::new(DirectoryOutput::begin(directory)?), false)),
        (None, Some(file)) if file == Path::new("-") => {
            if std::io::stdout().is_terminal() {
                return Err(Error::new(Kind::BadInput, "a tar stream does not go to a terminal")
                    .hint("add '> FILE' or '| tar -x -C DIR', or name a file"));
            }
            let to = Box::new(std::io::stdout());
            Ok((Box::new(TarOutput::new(to, modified_at, Box::new(|_| Ok(())))), true))
        }
        (None, Some(file)) => tar_file(file, modified_at).map(|output| (output, false)),
        (None, None) => Err(Error::new(Kind::BadInput, "it is not said where to").hint("add --to DIR or --tar FILE")),
    }
}

/// An archive in a file that gets its name when it is complete.
fn tar_file(place: &Path, modified_at: u64) -> Result<Box<dyn Output>> {
    let file = PartialFile::begin(place)?;
    let writer = Box::new(file.writer()?);
    Ok(Box::new(TarOutput::new(writer, modified_at, Box::new(move |_| file.finish()))))
}

fn text(done: &Downloaded) -> String {
    let log_files = if done.log_files == 1 { "log file" } else { "log files" };
    let bytes = human_bytes(done.bytes);
    let mut lines = vec![format!("{bytes} in {} files, and {} {log_files}", done.files, done.log_files)];
    lines.extend(done.left_out.iter().map(|what| format!("left out: {what}")));
    lines.push(done.advice.to_string());
    lines.join("\n")
}

fn json(backup: &BackupId, done: &Downloaded) -> String {
    serde_json::json!({
        "backup": backup.to_string(),
        "files": done.files,
        "bytes": done.bytes,
        "log_files": done.log_files,
        "left_out": done.left_out,
        "advice": done.advice,
    })
    .to_string()
}

/// A bar where there is a terminal, nothing elsewhere.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Bar {
        let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
        Bar(ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }
}

impl Progress for Bar {
    fn set(&self, done: u64, total: u64) {
        self.0.set_length(total.max(done));
        self.0.set_position(done);
    }

    fn note(&self, text: String) {
        self.0.set_message(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gets_links_is_told_how_long_they_work_and_when_that_may_be_shorter() {
        let made_at: Timestamp = "2026-11-21T10:00:00Z".parse().unwrap();
        let text = |expires_at: &str, may_end_earlier| {
            let made =
                LinksMade { objects: 7, bytes: 3 << 20, expires_at: expires_at.parse().unwrap(), may_end_earlier };
            links_text(&made, made_at, Duration::from_secs(7200), None)
        };
        insta::assert_snapshot!(text("2026-11-21T12:00:00Z", false), @r"
        links to 7 objects of 3.0 MiB, which work until 2026-11-21 12:00:00Z
        until then whoever has them can read the backup: keep them as you keep the database
        on any host that reaches the server: keiki restore --from-links FILE --to DIR
        ");
        assert!(text("2026-11-21T12:00:00Z", true).contains("credentials are temporary: when they end"));
        assert!(text("2026-11-21T11:00:00Z", true).contains("that is earlier than asked for"));
    }
}
