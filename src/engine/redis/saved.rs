//! Copies of its data that a server makes by itself, or because a person told it to: they cost the source nothing more.
//!
//! With an append-only file that is its base, which every rewrite makes anew and every backup takes. Without one it is the
//! snapshot that SAVE, BGSAVE and the server's own save points write. It says at which offset of the replication stream
//! the data were as they are in it, and in which database the stream was then (`repl-id`, `repl-offset`, `repl-stream-db`;
//! source: rdbSaveInfoAuxFields and rdbPopulateSaveInfo in `src/rdb.c` and `src/replication.c` of Redis 7.0 and Valkey 9),
//! so the log goes on exactly there, if the agent followed the stream at that time.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;

use crate::base::bulk::run_blocking;
use crate::engine::redis::Inner;
use crate::engine::redis::ondisk::rdb::{HEADER_BYTES_WANTED, RdbHeader};
use crate::engine::redis::stream_log::place_of;
use crate::error::{Context, Kind, Result};
use crate::model::position::Position;

/// An older snapshot makes a clone replay more than it is worth.
const AGE_MAX: Duration = Duration::from_secs(600);

/// A snapshot on the server's disk that a backup can be made of.
pub(super) struct Saved {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    /// Where the log goes on.
    pub(super) start: Position,
    /// The first moment that a clone of it can show.
    pub(super) shown_from: Timestamp,
    /// The database that the stream was in.
    pub(super) database: u32,
}

/// A snapshot as it lies there. The server replaces it as a whole, so an open one stays what it is.
struct OnDisk {
    file: File,
    bytes: u64,
    age: Duration,
    name: String,
    header: Option<RdbHeader>,
}

impl Inner {
    /// Remembers that a backup takes this copy, or that it was there from the beginning.
    pub(super) fn note_saved(&self, name: String) {
        *self.saved.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(name);
    }

    fn known_saved(&self) -> Option<String> {
        self.saved.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }
}

/// Whether there is a copy that no backup has taken yet. What is there when this is first asked is not new.
pub(super) async fn is_new(inner: &Inner) -> Result<bool> {
    let found = match inner.is_streamed() {
        true => on_disk(snapshot_path(inner).await?).await?.map(|found| found.name),
        false => inner.observe().await?.manifest.base.map(|base| base.name),
    };
    let known = inner.known_saved();
    match (known, found) {
        (Some(known), Some(found)) => Ok(known != found),
        (None, found) => {
            inner.note_saved(found.unwrap_or_default());
            Ok(false)
        }
        (Some(_), None) => Ok(false),
    }
}

/// The snapshot that a backup can be made of, if there is a new one whose place in the log is known.
pub(super) async fn find(inner: &Inner) -> Result<Option<Saved>> {
    let path = snapshot_path(inner).await?;
    let Some(found) = on_disk(path.clone()).await? else { return Ok(None) };
    if found.age > AGE_MAX || inner.known_saved().as_ref() == Some(&found.name) {
        return Ok(None);
    }
    let aux = |key: &str| found.header.as_ref().and_then(|header| header.aux.get(key));
    let number = |key: &str| aux(key).and_then(|text| text.parse::<u64>().ok());
    let database = number("repl-stream-db").and_then(|number| u32::try_from(number).ok());
    let (Some(history), Some(offset), Some(database)) = (aux("repl-id"), number("repl-offset"), database) else {
        return Ok(None);
    };
    let (now, _) = place_of(&inner.with_session(async |session| session.info(&["replication"]).await).await?)?;
    if now != *history {
        return Ok(None);
    }
    match inner.follower().locate(history, offset).await {
        Ok((start, shown_from)) => {
            // If it is damaged, the next backup is made in the other way.
            inner.note_saved(found.name);
            Ok(Some(Saved { file: found.file, path, bytes: found.bytes, start, shown_from, database }))
        }
        Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Server) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn snapshot_path(inner: &Inner) -> Result<PathBuf> {
    let name = inner.with_session(async |session| session.setting("dbfilename").await).await?;
    Ok(inner.source().data_dir.join(name))
}

/// Nothing where there is no snapshot.
async fn on_disk(path: PathBuf) -> Result<Option<OnDisk>> {
    run_blocking("saved snapshot", move || {
        let what = || format!("cannot read '{}'", path.display());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(what),
        };
        let metadata = file.metadata().context(what)?;
        let age = metadata.modified().context(what)?.elapsed().unwrap_or_default();
        let name = format!("{}:{}:{}", metadata.ino(), metadata.mtime(), metadata.mtime_nsec());
        let header = head(&file).context(what)?;
        Ok(Some(OnDisk { file, bytes: metadata.len(), age, name, header: RdbHeader::parse(&header).ok() }))
    })
    .await
}

/// The beginning of a file, whose cursor stays where it is.
fn head(file: &File) -> std::io::Result<Vec<u8>> {
    let mut head = vec![0; HEADER_BYTES_WANTED];
    let mut length = 0;
    while length < head.len() {
        match file.read_at(&mut head[length..], length as u64)? {
            0 => break,
            read => length += read,
        }
    }
    head.truncate(length);
    Ok(head)
}
