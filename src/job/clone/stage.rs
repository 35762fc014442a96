//! Fills the data directory of a clone from a backup: each frame is read and decoded once, each byte written once, at
//! its final place; holes stay holes. What makes the directory startable goes in last, when all else is durable.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};

use crate::base::bulk::run_on_thread;
use crate::base::durable;
use crate::base::ownership::give_to;
use crate::base::users::User;
use crate::engine::{CloneEngine, CloneSite};
use crate::error::{Context, Error, Kind, Result};
use crate::format::manifest::{Extent, FilePart, ManifestEntry};
use crate::job::StepContext;
use crate::job::clone::writers::{Landing, MadeFile, Writers};
use crate::model::backup::FileKind;
use crate::repo::backup_reader::BackupReader;
use crate::repo::restore_plan::{PackRead, plan_reads};

/// Below this a file is too small for its allocation to matter.
const ALLOCATE_BYTES_MIN: u64 = 1 << 20;
const MARKER_SUFFIX: &str = ".keiki-staged";

/// What a restore needs to know.
pub struct Staging<'a> {
    pub engine: &'a dyn CloneEngine,
    pub site: &'a CloneSite,
    pub owner: &'a User,
    /// Reads of packs, and threads that write, at the same time.
    pub lanes: usize,
}

/// Restores a backup into the empty data directory of the site, lets the engine prepare it, and makes it durable.
pub async fn stage(staging: &Staging<'_>, reader: &BackupReader, context: &StepContext) -> Result<()> {
    let progress = context.progress();
    let total = reader.backup().restored_bytes;
    let writers = Writers::start(staging.lanes)?;
    let mut entries = reader.entries();
    let mut markers = Vec::new();
    let mut hole_bytes = 0;
    while let Some(batch) = entries.next_batch().await? {
        context.go_on()?;
        let (late, now): (Vec<_>, Vec<_>) = batch.into_iter().partition(|entry| staging.engine.is_marker(entry.path()));
        markers.extend(late);
        hole_bytes += now.iter().map(hole_bytes_of).sum::<u64>();
        write_batch(staging, reader, &writers, &now, "", context, &|written| progress.set(written + hole_bytes, total))
            .await?;
    }
    let writers = finish(writers).await?;
    progress.note("making it durable".to_string());
    sync(&staging.site.data_dir).await?;
    staging.engine.prepare(staging.site).await?;
    sync(&staging.site.data_dir).await?;
    // From here on the directory can be started.
    let writers_of_markers = Writers::start(1)?;
    write_batch(staging, reader, &writers_of_markers, &markers, MARKER_SUFFIX, context, &|_| ()).await?;
    finish(writers_of_markers).await?;
    sync(&staging.site.data_dir).await?;
    for marker in &markers {
        if let Some(path) = place(staging, marker)? {
            let mut staged = path.clone().into_os_string();
            staged.push(MARKER_SUFFIX);
            durable::rename_durable(Path::new(&staged), &path)?;
        }
    }
    progress.set(total, total);
    context.result("restored", crate::model::bytes_text::human_bytes(writers + hole_bytes));
    Ok(())
}

async fn finish(writers: Writers) -> Result<u64> {
    run_on_thread("restore-end", move || {
        let counted = writers.written_counter();
        writers.finish()?;
        Ok(counted.load(std::sync::atomic::Ordering::Relaxed))
    })
    .await
}

async fn sync(data_dir: &Path) -> Result<()> {
    let data_dir = data_dir.to_path_buf();
    run_on_thread("sync", move || durable::sync_filesystem(&data_dir)).await
}

fn hole_bytes_of(entry: &ManifestEntry) -> u64 {
    let ManifestEntry::Part(part) = entry else { return 0 };
    part.extents.iter().map(|extent| if let Extent::Hole { bytes } = extent { *bytes } else { 0 }).sum()
}

/// Where an entry goes on this host, unless the engine leaves it out.
fn place(staging: &Staging, entry: &ManifestEntry) -> Result<Option<PathBuf>> {
    let placed = staging.engine.place(staging.site, &entry.meta())?;
    Ok(placed.map(|meta| staging.site.data_dir.join(meta.path)))
}

/// Makes the directories, links and files of some records, and writes the files' content. `suffix` is appended to the
/// names of files.
async fn write_batch(
    staging: &Staging<'_>,
    reader: &BackupReader,
    writers: &Writers,
    entries: &[ManifestEntry],
    suffix: &str,
    context: &StepContext,
    tell: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let mut files: HashMap<usize, Arc<MadeFile>> = HashMap::new();
    for (number, entry) in entries.iter().enumerate() {
        if let Some(file) = make(staging, entry, suffix)? {
            files.insert(number, Arc::new(file));
        }
    }
    let files = &files;
    stream::iter(plan_reads(entries).into_iter().map(Ok::<PackRead, Error>))
        .map_ok(|read| async move {
            context.go_on()?;
            write_read(reader, writers, files, read).await?;
            tell(writers.written_bytes());
            Ok(())
        })
        .boxed()
        .try_buffer_unordered(staging.lanes.max(1))
        .try_collect::<Vec<()>>()
        .await?;
    Ok(())
}

/// Reads consecutive frames of a pack and gives each to a writer.
async fn write_read(
    reader: &BackupReader,
    writers: &Writers,
    files: &HashMap<usize, Arc<MadeFile>>,
    read: PackRead,
) -> Result<()> {
    let mut frames = reader.read_run(read.pack, read.offsets.clone()).await?;
    let mut copies = read.copies.into_iter().peekable();
    while let Some(frame) = frames.next().await? {
        let mut landings = Vec::new();
        while let Some(copy) = copies.next_if(|copy| copy.frame_offset == frame.offset) {
            // An entry that the engine leaves out has no file.
            if let Some(file) = files.get(&copy.entry) {
                landings.push(Landing {
                    file: file.clone(),
                    at: copy.file_at,
                    skip_bytes: copy.skip_bytes as usize,
                    bytes: copy.bytes as usize,
                });
            }
        }
        if !landings.is_empty() {
            writers.write(frame, landings).await?;
        }
    }
    match copies.next() {
        None => Ok(()),
        Some(copy) => Err(Error::new(
            Kind::Damaged,
            format!("cannot restore: pack '{}' has no frame at byte {}", read.pack.pack, copy.frame_offset),
        )
        .hint("choose another backup: 'keiki backup list' shows them")),
    }
}

/// Makes what a record is about; returns the file if it has content to be written.
fn make(staging: &Staging, entry: &ManifestEntry, suffix: &str) -> Result<Option<MadeFile>> {
    let Some(meta) = staging.engine.place(staging.site, &entry.meta())? else { return Ok(None) };
    let path = staging.site.data_dir.join(&meta.path);
    match (&meta.kind, entry) {
        (FileKind::Directory, _) => {
            make_directory(staging, &path)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(meta.mode & 0o7777))
                .context(|| format!("cannot set the mode of '{}'", path.display()))?;
            Ok(None)
        }
        (FileKind::Link { to }, _) => {
            make_parent(staging, &path)?;
            match std::os::unix::fs::symlink(to, &path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                other => other.context(|| format!("cannot make the link '{}'", path.display()))?,
            }
            give_to(staging.owner, &path)?;
            Ok(None)
        }
        (FileKind::Regular, ManifestEntry::Part(part)) => {
            make_parent(staging, &path)?;
            let mut name = path.into_os_string();
            name.push(suffix);
            make_part(staging, Path::new(&name), meta.mode, part).map(Some)
        }
        (FileKind::Regular, _) => Err(Error::new(
            Kind::Internal,
            format!("the engine makes a file of '{}', which has no content", entry.path()),
        )),
    }
}

fn make_parent(staging: &Staging, path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if !parent.exists() => make_directory(staging, parent),
        _ => Ok(()),
    }
}

/// Makes a directory and those above it up to the data directory; records of a backup come in any order.
fn make_directory(staging: &Staging, path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    make_parent(staging, path)?;
    match std::fs::create_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        other => other.context(|| format!("cannot make directory '{}'", path.display()))?,
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
        .context(|| format!("cannot set the mode of '{}'", path.display()))?;
    give_to(staging.owner, path)
}

fn make_part(staging: &Staging, path: &Path, mode: u32, part: &FilePart) -> Result<MadeFile> {
    let what = || format!("cannot make '{}'", path.display());
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(mode & 0o7777)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .context(what)?;
    if part.at == 0 {
        file.set_permissions(std::fs::Permissions::from_mode(mode & 0o7777)).context(what)?;
        give_to(staging.owner, path)?;
    }
    allocate(&file, part);
    if part.is_last {
        file.set_len(part.at + part.bytes).context(what)?;
    }
    Ok(MadeFile { path: path.to_path_buf() })
}

/// Reserves the blocks of a part without holes, so that they lie together. A hint: a file system that cannot do it
/// allocates at the write, and one that is full says so there.
fn allocate(file: &File, part: &FilePart) {
    let has_holes = part.extents.iter().any(|extent| matches!(extent, Extent::Hole { .. }));
    if has_holes || part.bytes < ALLOCATE_BYTES_MIN {
        return;
    }
    let (Ok(at), Ok(bytes)) = (i64::try_from(part.at), i64::try_from(part.bytes)) else { return };
    let _ = nix::fcntl::fallocate(file, nix::fcntl::FallocateFlags::empty(), at, bytes);
}
