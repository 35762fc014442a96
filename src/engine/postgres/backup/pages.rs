//! Checks the pages of relation files while they are copied.
//!
//! A page that is read while the server writes it can be torn; that is not damage, because its last change lies in
//! the log of the backup. So a page that looks bad is read again: it is forgiven when it becomes good, when it
//! changes, or when its LSN is not older than the start of the backup. What stays bad and still is reported, and
//! copied as it is: a damaged page in one relation must not stop the backup of all the others.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use crate::engine::postgres::ondisk::page::{PageVerdict, verify_block};
use crate::engine::postgres::ondisk::relation_files::page_file;
use crate::engine::postgres::ondisk::versions::Major;
use crate::error::{Context, Result};
use crate::model::position::Lsn;

/// How often a bad page is read again, and how long is waited before each time: a write of one page takes far less.
const RE_READS: u32 = 8;
const RE_READ_WAIT: Duration = Duration::from_millis(15);
/// How many damaged blocks are reported one by one.
const BLOCKS_NAMED: usize = 200;

/// How to check the pages of a cluster with checksums.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageChecker {
    pub major: Major,
    pub block_bytes: u32,
    /// Blocks in a full file of a large relation.
    pub segment_blocks: u32,
    pub backup_start: Lsn,
}

/// How to check the pages of one file.
pub(super) struct FilePages<'a> {
    checker: &'a PageChecker,
    path: &'a Path,
    first_block: u32,
}

impl PageChecker {
    /// Nothing for files that hold no pages.
    pub fn for_file<'a>(&'a self, path: &'a Path) -> Option<FilePages<'a>> {
        let first_block = page_file(path, self.major)?.first_block(self.segment_blocks)?;
        Some(FilePages { checker: self, path, first_block })
    }
}

impl FilePages<'_> {
    /// Checks the whole pages in `piece`, which was read at `offset`, a multiple of the page size. A page that was torn
    /// is replaced by what was read the second time. Bytes behind the last whole page are of a file that is just
    /// growing.
    pub fn check(&self, file: &File, offset: u64, piece: &mut [u8], damage: &DamageReport) -> Result<()> {
        let size = self.checker.block_bytes as usize;
        for (index, page) in piece.chunks_exact_mut(size).enumerate() {
            let at = offset + (index * size) as u64;
            // A relation has at most 2^32 - 2 blocks (`src/include/storage/block.h`, MaxBlockNumber).
            let Some(block) =
                u32::try_from(at / size as u64).ok().and_then(|block| block.checked_add(self.first_block))
            else {
                continue;
            };
            let verdict = verify_block(page, block);
            if !verdict.is_good() && !verdict.is_repaired_by_log_from(self.checker.backup_start) {
                self.read_again(file, at, page, block, verdict, damage)?;
            }
        }
        Ok(())
    }

    fn read_again(
        &self,
        file: &File,
        at: u64,
        page: &mut [u8],
        block: u32,
        mut verdict: PageVerdict,
        damage: &DamageReport,
    ) -> Result<()> {
        let mut again = vec![0; page.len()];
        for _ in 0..RE_READS {
            std::thread::sleep(RE_READ_WAIT);
            match file.read_exact_at(&mut again, at) {
                Ok(()) => {}
                // The file was cut off before this page: nobody needs it any more.
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error).context(|| format!("cannot read block {block} again")),
            }
            let changed = again != page;
            verdict = verify_block(&again, block);
            page.copy_from_slice(&again);
            if changed || verdict.is_good() || verdict.is_repaired_by_log_from(self.checker.backup_start) {
                return Ok(());
            }
        }
        damage.add(format!("{} block {block}: {}", self.path.display(), describe(verdict)));
        Ok(())
    }
}

fn describe(verdict: PageVerdict) -> String {
    match verdict {
        PageVerdict::WrongChecksum { lsn, stored, computed } => {
            format!("checksum is {stored:04X} and should be {computed:04X} (page LSN {lsn})")
        }
        PageVerdict::BadHeader { lsn } => format!("impossible page header (page LSN {lsn})"),
        PageVerdict::NotAPage => String::from("not a whole page"),
        PageVerdict::New | PageVerdict::Sound { .. } => String::from("good"),
    }
}

/// Damaged blocks, collected from all threads.
#[derive(Debug, Default)]
pub(super) struct DamageReport(Mutex<(Vec<String>, u64)>);

impl DamageReport {
    fn add(&self, line: String) {
        // Held for a push only.
        let mut inner = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match inner.0.len() < BLOCKS_NAMED {
            true => inner.0.push(line),
            false => inner.1 += 1,
        }
    }

    /// The report: one line for each block, and a last line for those that were too many.
    pub fn into_lines(self) -> Vec<String> {
        let (mut lines, more) = self.0.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        lines.sort();
        if more > 0 {
            lines.push(format!("and {more} more blocks"));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checker() -> PageChecker {
        PageChecker { major: Major::V15, block_bytes: 8192, segment_blocks: 131_072, backup_start: Lsn(u64::MAX) }
    }

    #[test]
    fn a_page_that_stays_bad_is_named_and_copied_and_a_new_one_is_good() {
        let mut content = vec![0u8; 3 * 8192 + 100];
        content[8192 + 20] = 7;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &content).unwrap();
        let checker = checker();
        let pages = checker.for_file(Path::new("base/5/16384.1")).unwrap();
        let damage = DamageReport::default();
        let mut piece = content.clone();
        pages.check(&File::open(file.path()).unwrap(), 0, &mut piece, &damage).unwrap();
        assert_eq!(piece, content);
        assert_eq!(damage.into_lines(), ["base/5/16384.1 block 131073: impossible page header (page LSN 0/0)"]);
        assert!(checker.for_file(Path::new("base/5/PG_VERSION")).is_none());
    }

    #[test]
    fn a_torn_page_that_was_whole_the_second_time_is_replaced() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![0u8; 8192]).unwrap();
        let mut torn = vec![0u8; 8192];
        torn[5000] = 1;
        let damage = DamageReport::default();
        let checker = checker();
        let pages = checker.for_file(Path::new("base/5/16384")).unwrap();
        pages.check(&File::open(file.path()).unwrap(), 0, &mut torn, &damage).unwrap();
        assert_eq!(torn, vec![0u8; 8192]);
        assert!(damage.into_lines().is_empty());
    }

    #[test]
    fn very_many_damaged_blocks_are_counted() {
        let damage = DamageReport::default();
        for block in 0..BLOCKS_NAMED + 5 {
            damage.add(format!("block {block}"));
        }
        assert_eq!(damage.into_lines().last().unwrap(), "and 5 more blocks");
    }
}
