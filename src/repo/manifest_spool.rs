//! The manifest of a backup while it is being made: a container in a file that has no name, so that nothing remains of
//! it if the process dies, and memory does not grow with the number of files.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use crate::base::bulk::run_blocking;
use crate::error::{Context, Error, Kind, Result};
use crate::format::container::{ContainerKind, ContainerWriter};
use crate::format::frame::FRAME_PLAIN_BYTES_MAX;
use crate::format::manifest::{ManifestEntry, write_record};
use crate::format::summary::ManifestObject;
use crate::model::backup::Backup;
use crate::model::id::IncarnationId;

/// Hashes do not compress and names compress at any level.
const ZSTD_LEVEL: i32 = 1;

pub(super) struct ManifestSpool {
    incarnation: IncarnationId,
    file: Arc<File>,
    /// Gone when the manifest is complete.
    writer: Option<ContainerWriter>,
    /// Records that do not fill a frame yet.
    records: Vec<u8>,
    record_count: u64,
    file_count: u64,
    restored_bytes: u64,
}

/// A manifest that only needs to be stored.
#[derive(Clone)]
pub(super) struct FinishedManifest {
    pub backup: Backup,
    pub size_bytes: u64,
    /// Index and footer: with them the store's object can be compared with this one.
    pub end: Bytes,
    file: Arc<File>,
}

impl ManifestSpool {
    /// Begins the manifest that will be stored under `key`. The file lies in `directory` until it is dropped.
    pub fn begin(incarnation: IncarnationId, key: &str, directory: &Path) -> Result<ManifestSpool> {
        let file = tempfile::tempfile_in(directory)
            .context(|| format!("cannot make a temporary file in '{}'", directory.display()))?;
        let (writer, head) = ContainerWriter::begin(ContainerKind::Manifest, key, ZSTD_LEVEL)?;
        let mut spool = ManifestSpool {
            incarnation,
            file: Arc::new(file),
            writer: Some(writer),
            records: Vec::new(),
            record_count: 0,
            file_count: 0,
            restored_bytes: 0,
        };
        spool.append(&head)?;
        Ok(spool)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        (&*self.file).write_all(bytes).context(|| "cannot write the list of files of a backup to 'state_dir'")
    }

    /// Adds a record.
    pub fn add(&mut self, entry: &ManifestEntry) -> Result<()> {
        let before = self.records.len();
        write_record(self.incarnation, entry, &mut self.records)?;
        if self.records.len() > FRAME_PLAIN_BYTES_MAX {
            let last = self.records.split_off(before);
            self.flush()?;
            self.records = last;
        }
        self.record_count += 1;
        if let ManifestEntry::Part(part) = entry {
            self.restored_bytes += part.bytes;
            self.file_count += u64::from(part.is_last);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if self.records.is_empty() {
            return Ok(());
        }
        let writer = self.writer.as_mut().ok_or_else(|| Error::new(Kind::Internal, "the manifest is complete"))?;
        let (_, frame) = writer.frame(&self.records)?;
        self.append(&frame)?;
        self.records.clear();
        Ok(())
    }

    /// Completes the manifest. The counts in `backup` are replaced by what was added.
    pub fn finish(&mut self, backup: Backup, stored_bytes: u64) -> Result<FinishedManifest> {
        self.flush()?;
        let writer = self.writer.take().ok_or_else(|| Error::new(Kind::Internal, "the manifest is complete"))?;
        let backup = Backup {
            file_count: self.file_count,
            restored_bytes: self.restored_bytes,
            stored_bytes: stored_bytes + writer.stored_bytes(),
            ..backup
        };
        let frames_end = writer.stored_bytes();
        let object = ManifestObject { backup: backup.clone(), record_count: self.record_count };
        let end = writer.finish(&object.document())?;
        self.append(&end)?;
        Ok(FinishedManifest { backup, size_bytes: frames_end + end.len() as u64, end, file: self.file.clone() })
    }
}

impl FinishedManifest {
    /// The bytes from `at` on, at most 1 MiB.
    pub async fn read(&self, at: u64) -> Result<Bytes> {
        let length = (self.size_bytes - at.min(self.size_bytes)).min(1 << 20) as usize;
        let file = self.file.clone();
        run_blocking("manifest", move || {
            let mut piece = vec![0; length];
            file.read_exact_at(&mut piece, at).context(|| "cannot read the list of files of a backup again")?;
            Ok(Bytes::from(piece))
        })
        .await
    }
}
