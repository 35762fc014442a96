//! What the product's own tools say about the files of a clone.

use std::path::Path;

use tokio_util::sync::CancellationToken;

use crate::base::bulk::run_blocking;
use crate::base::child::ChildCommand;
use crate::engine::CloneSite;
use crate::engine::redis::backup::RDB_VERSION_FACT;
use crate::engine::redis::clone::Grounds;
use crate::engine::redis::ondisk::manifest::Manifest;
use crate::engine::redis::ondisk::rdb::{RdbFamily, RdbVersion};
use crate::engine::redis::settings::{APPEND_DIR, APPEND_FILE};
use crate::error::{Context, Error, Kind, Result};
use crate::model::check::CheckItem;

/// Has the product's own tools read everything, where they are installed.
///
/// The tool for the append-only file does not know a base in the format of Valkey 9 and calls it not valid
/// (valkey-check-aof 9.1): there the base is read by the tool for snapshots, and each increment by itself.
pub(super) async fn check_by_tool(
    grounds: &Grounds,
    site: &CloneSite,
    cancel: &CancellationToken,
) -> Result<Option<CheckItem>> {
    let programs = &grounds.server.programs;
    let Some(tool) = programs.check_tool("aof") else { return Ok(None) };
    let dir = grounds.server.data_dir.join(APPEND_DIR);
    let path = dir.join(format!("{APPEND_FILE}.manifest"));
    let format = site.facts.get(RDB_VERSION_FACT).and_then(|text| RdbVersion::parse_text(text));
    if format.is_none_or(|format| format.family == RdbFamily::Redis) {
        check_file(grounds, &tool, &path, cancel).await?;
        return Ok(Some(CheckItem::pass(programs.name_of_check("aof"), "found nothing wrong")));
    }
    let manifest = run_blocking("read manifest", move || {
        let what = || format!("cannot read '{}'", path.display());
        Manifest::parse(&std::fs::read(&path).context(what)?).context(what)
    })
    .await?;
    for part in manifest.increments {
        let path = dir.join(part.name);
        if std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() > 0) {
            check_file(grounds, &tool, &path, cancel).await?;
        }
    }
    if let (Some(base), Some(tool)) = (manifest.base, programs.check_tool("rdb")) {
        check_file(grounds, &tool, &dir.join(base.name), cancel).await?;
    }
    let names = format!("{} and {}", programs.name_of_check("rdb"), programs.name_of_check("aof"));
    Ok(Some(CheckItem::pass(names, "found nothing wrong")))
}

async fn check_file(grounds: &Grounds, tool: &Path, file: &Path, cancel: &CancellationToken) -> Result<()> {
    let finished = ChildCommand::new(tool).arg(file).as_user(&grounds.server.user).run(cancel).await?;
    if finished.status.success() {
        return Ok(());
    }
    let name = tool.file_name().unwrap_or_default().to_string_lossy();
    let said = finished.last_words().unwrap_or_else(|| finished.ending());
    Err(Error::new(Kind::Damaged, format!("{name} refuses '{}' of the clone: {said}", file.display()))
        .hint("choose another backup or target; 'keiki backup list' shows backups"))
}
