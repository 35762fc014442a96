//! `keiki backup download`: a backup set as plain files, in a directory or as a tar stream.
//!
//! The one verb that reads the repository itself, object by object through the agent, so that every byte is verified
//! here, where it is written.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};

use crate::base::durable::{fsync_dir, parent_of};
use crate::cli::Outcome;
use crate::cli::arguments::Place;
use crate::cli::connection::{Connection, expect_response};
use crate::error::{Context, Error, Kind, Result};
use crate::job::download::{DirectoryOutput, Downloaded, Output, Progress, TarOutput, download};
use crate::model::backup::Backup;
use crate::model::bytes_text::human_bytes;
use crate::model::id::BackupId;
use crate::peer::api::{Request, Response};
use crate::repo::incarnations::Incarnations;
use crate::repo::repository::Repository;

pub async fn run(agent: &Connection, instance: String, backup: String, place: Place, as_json: bool) -> Result<Outcome> {
    let id = BackupId::parse(&backup)?;
    let answer = agent.ask(Request::ListBackups { instance: instance.clone() }).await?;
    let backups = expect_response!(answer, "list backups", Response::Backups(backups) => backups);
    let backup = backups.into_iter().find(|candidate| candidate.id == id).ok_or_else(|| {
        Error::new(Kind::NotFound, format!("'{instance}' has no backup '{id}'"))
            .hint(format!("'keiki backup list {instance}' shows what there is"))
    })?;
    // The place first: it is what is wrong most often.
    let (mut output, is_stdout) = output_at(&place, &backup)?;
    let repository = Repository::open(agent.objects()).await?;
    let incarnation = Incarnations::new(repository.clone()).get(backup.incarnation).await?;
    let bar = Bar::new();
    let done = download(&repository, &incarnation, &id, output.as_mut(), &bar).await;
    bar.0.finish_and_clear();
    let done = done.map_err(|error| error.while_doing(format!("cannot download backup '{id}'")))?;
    let said = if as_json { json(&backup, &done) } else { text(&done) };
    // Where the standard output is the archive, nothing else may go there.
    match is_stdout {
        true => eprintln!("{said}"),
        false => println!("{said}"),
    }
    Ok(Outcome::Good)
}

fn output_at(place: &Place, backup: &Backup) -> Result<(Box<dyn Output>, bool)> {
    let modified_at = u64::try_from(backup.ended_at.as_second()).unwrap_or(0);
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

/// A file that gets its name when it is complete.
fn tar_file(file: &Path, modified_at: u64) -> Result<Box<dyn Output>> {
    if file.symlink_metadata().is_ok() {
        return Err(Error::new(Kind::Conflict, format!("'{}' is there already", file.display()))
            .hint("name a file that does not exist yet"));
    }
    let mut partial = file.as_os_str().to_os_string();
    partial.push(".keiki-partial");
    let absolute = |path: &Path| std::path::absolute(path).context(|| format!("cannot write '{}'", path.display()));
    let (partial, file) = (absolute(&PathBuf::from(partial))?, absolute(file)?);
    let what = || format!("cannot write '{}'", partial.display());
    let mut options = std::fs::OpenOptions::new();
    // Backups hold what the database holds: nobody else may read them.
    std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create(true).truncate(true), 0o600);
    let open = options.open(&partial).context(what)?;
    let handle = open.try_clone().context(what)?;
    let rename = move |_: &mut dyn Write| {
        handle.sync_all().context(|| format!("cannot write '{}'", partial.display()))?;
        std::fs::rename(&partial, &file).context(|| format!("cannot give '{}' its name", file.display()))?;
        fsync_dir(parent_of(&file))
    };
    Ok(Box::new(TarOutput::new(Box::new(open), modified_at, Box::new(rename))))
}

fn text(done: &Downloaded) -> String {
    let mut lines =
        vec![format!("{} in {} files, and {} log files", human_bytes(done.bytes), done.files, done.log_files)];
    lines.extend(done.left_out.iter().map(|what| format!("left out: {what}")));
    lines.push(done.advice.to_string());
    lines.join("\n")
}

fn json(backup: &Backup, done: &Downloaded) -> String {
    serde_json::json!({
        "backup": backup.id.to_string(),
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
