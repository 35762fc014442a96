//! Reads the log on its way to the server and decides where it ends. No I/O.

use crate::engine::postgres::ondisk::control::RecoveryParameters;
use crate::engine::postgres::ondisk::wal::{
    Cut, Cutter, Decision, End, Event, Step, Stop, WalFormat, WalReader, decode,
};
use crate::error::{Error, Kind, Result};
use crate::model::position::Lsn;

/// `RM_TBLSPC_ID` and `XLOG_TBLSPC_CREATE` (`src/include/access/rmgrlist.h`, `src/include/commands/tablespace.h`).
const RESOURCE_MANAGER_TABLESPACE: u8 = 5;
const TABLESPACE_CREATE: u8 = 0x00;

/// Why no more log is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// The target was found.
    Cut(Cut),
    /// There is no further valid record.
    End(End),
}

/// Reader and cutter of one replay.
pub struct Walker {
    reader: WalReader,
    cutter: Cutter,
    format: WalFormat,
    /// The largest values that the log insists on so far.
    parameters: Option<RecoveryParameters>,
    finding: Option<Finding>,
}

impl Walker {
    /// Reads from `start` on, which is the start of a record or of a page.
    pub fn new(format: WalFormat, start: Lsn, newest_timeline: u32, stop: Stop) -> Result<Walker> {
        let reader = WalReader::new(format, start)?.with_newest_timeline(newest_timeline);
        Ok(Walker { reader, cutter: Cutter::new(stop, format), format, parameters: None, finding: None })
    }

    /// Where the next bytes belong.
    pub fn position(&self) -> Lsn {
        self.reader.position()
    }

    /// Log before this position may be given to the server; what lies behind it may still be cut away.
    pub fn decided_until(&self) -> Lsn {
        self.reader.undecided_from()
    }

    pub fn cutter(&self) -> &Cutter {
        &self.cutter
    }

    pub fn parameters(&self) -> Option<RecoveryParameters> {
        self.parameters
    }

    pub fn finding(&self) -> Option<Finding> {
        self.finding
    }

    /// Reads the bytes that follow those fed before. Nothing after a finding is read.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        while self.finding.is_none() {
            match self.reader.next(&mut rest) {
                Step::NeedMore => return Ok(()),
                Step::End(end) => self.finding = Some(Finding::End(end)),
                Step::Record(record) => {
                    let event = decode(&record, self.format.major)?;
                    match self.cutter.observe(&record, &event) {
                        Decision::CutAt(cut) => self.finding = Some(Finding::Cut(cut)),
                        Decision::Continue => {}
                    }
                    let is_kept = self.cutter.facts().last_end == Some(record.end);
                    if is_kept && record.resource_manager == RESOURCE_MANAGER_TABLESPACE {
                        refuse_new_tablespace(record.info, record.start)?;
                    }
                    if let (true, Event::ParameterChange { parameters, .. }) = (is_kept, &event) {
                        let larger = self.parameters.map_or(*parameters, |known| known.at_least(*parameters));
                        self.parameters = Some(larger);
                    }
                }
            }
        }
        Ok(())
    }
}

/// A tablespace that was created after the backup began would be created again by replay at the source's path: outside
/// the clone, and on the source's own host in the source's own directory, which replay may even empty first
/// (`src/backend/commands/tablespace.c`, create_tablespace_directories).
fn refuse_new_tablespace(info: u8, at: Lsn) -> Result<()> {
    if info & 0xf0 != TABLESPACE_CREATE {
        return Ok(());
    }
    Err(Error::new(
        Kind::Unsupported,
        format!("cannot replay the log: a tablespace was created at '{at}', after the base backup began"),
    )
    .hint("its path on the source must not be touched: clone from a backup that was taken after the tablespace was created"))
}
