//! Gives files that come mixed in one stream to a sink whose lanes take one file after the other.
//!
//! Each file that is open has a lane, on a thread of its own behind a short queue; when it ends, the lane takes the next
//! file. So there are as many lanes as files were ever open at the same time: the program's copying threads, its redo
//! log, and one more.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::engine::mysql::ondisk::backup_info::PREFIXES;
use crate::engine::mysql::ondisk::mbstream::Part;
use crate::engine::{BaseLane, BaseSink};
use crate::error::{Error, Kind, Result};
use crate::model::backup::{FileKind, FileMeta};

/// Pieces of up to 1 MiB that wait for a lane.
const QUEUE_PIECES: usize = 2;
const LANES_MAX: usize = 64;
/// The program's own small files are kept up to this.
const KEPT_BYTES_MAX: usize = 64 << 10;
const FILE_MODE: u32 = 0o660;
const DIRECTORY_MODE: u32 = 0o700;

enum Order {
    Begin(FileMeta),
    Write(Vec<u8>),
    End,
}

struct Lane {
    orders: SyncSender<Order>,
    thread: JoinHandle<Result<()>>,
}

/// See the module.
pub struct Demux {
    sink: Arc<dyn BaseSink>,
    lanes: Vec<Lane>,
    idle: Vec<usize>,
    open: HashMap<String, usize>,
    directories: BTreeSet<String>,
    kept: BTreeMap<String, Vec<u8>>,
}

impl Demux {
    pub fn new(sink: Arc<dyn BaseSink>) -> Demux {
        Demux {
            sink,
            lanes: Vec::new(),
            idle: Vec::new(),
            open: HashMap::new(),
            directories: BTreeSet::new(),
            kept: BTreeMap::new(),
        }
    }

    /// Takes what the stream says next. Waits while a lane is busy.
    pub fn take(&mut self, part: Part<'_>) -> Result<()> {
        match part {
            Part::Data { path, bytes } => {
                let lane = self.lane_of(path)?;
                if is_small(path) {
                    let kept = self.kept.entry(path.to_string()).or_default();
                    kept.extend_from_slice(&bytes[..bytes.len().min(KEPT_BYTES_MAX.saturating_sub(kept.len()))]);
                }
                if bytes.is_empty() { Ok(()) } else { self.send(lane, Order::Write(bytes.to_vec())) }
            }
            Part::End { path } => {
                let lane = self.lane_of(path)?;
                self.open.remove(path);
                self.idle.push(lane);
                self.send(lane, Order::End)
            }
        }
    }

    /// Ends the lanes: everything is stored when this returns. Returns the program's own small files by name.
    pub fn finish(mut self) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut first = Ok(());
        for lane in self.lanes.drain(..) {
            first = first.and(end_of(lane));
        }
        first.map(|()| self.kept)
    }

    fn lane_of(&mut self, path: &str) -> Result<usize> {
        if let Some(lane) = self.open.get(path) {
            return Ok(*lane);
        }
        let lane = match self.idle.pop() {
            Some(lane) => lane,
            None => self.start_lane()?,
        };
        self.open.insert(path.to_string(), lane);
        let parents = path.match_indices('/').map(|(at, _)| path[..at].to_string());
        for directory in parents.collect::<Vec<_>>() {
            if self.directories.insert(directory.clone()) {
                let meta = FileMeta { path: directory, kind: FileKind::Directory, mode: DIRECTORY_MODE };
                self.send(lane, Order::Begin(meta))?;
            }
        }
        let meta = FileMeta { path: path.to_string(), kind: FileKind::Regular, mode: FILE_MODE };
        self.send(lane, Order::Begin(meta))?;
        Ok(lane)
    }

    fn start_lane(&mut self) -> Result<usize> {
        if self.lanes.len() >= LANES_MAX {
            return Err(Error::new(Kind::Internal, "mariadb-backup streams too many files at the same time"));
        }
        let (orders, queue) = sync_channel(QUEUE_PIECES);
        let lane = self.sink.lane()?;
        let thread = std::thread::Builder::new()
            .name(String::from("base-lane"))
            .spawn(move || carry_out(lane, &queue))
            .map_err(|error| Error::io("cannot start a thread", error))?;
        self.lanes.push(Lane { orders, thread });
        Ok(self.lanes.len() - 1)
    }

    fn send(&mut self, lane: usize, order: Order) -> Result<()> {
        if self.lanes[lane].orders.send(order).is_ok() {
            return Ok(());
        }
        // Its thread has ended, which it does by itself only with an error. The others end when they are dropped.
        let lane = self.lanes.swap_remove(lane);
        end_of(lane).and_then(|()| Err(Error::new(Kind::Internal, "a lane of the backup ended too early")))
    }
}

fn end_of(lane: Lane) -> Result<()> {
    drop(lane.orders);
    lane.thread.join().unwrap_or_else(|_| Err(Error::new(Kind::Internal, "a lane of the backup panicked")))
}

fn carry_out(mut lane: Box<dyn BaseLane>, queue: &Receiver<Order>) -> Result<()> {
    let mut is_open = false;
    while let Ok(order) = queue.recv() {
        match order {
            Order::Begin(meta) => {
                is_open = meta.kind == FileKind::Regular;
                lane.begin(meta)?;
            }
            Order::Write(bytes) => lane.write(&bytes)?,
            Order::End => {
                is_open = false;
                lane.end()?;
            }
        }
    }
    match is_open {
        true => Err(Error::new(Kind::Cancelled, "the stream ended in the middle of a file")),
        false => lane.finish(),
    }
}

/// The files in which the program says what it did.
fn is_small(path: &str) -> bool {
    PREFIXES.iter().any(|prefix| path.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Remembers what each lane was told.
    #[derive(Default)]
    struct Memory {
        files: Mutex<BTreeMap<String, Vec<u8>>>,
        fails: bool,
    }

    struct MemorySink(Arc<Memory>);

    struct MemoryLane(Arc<Memory>, String, Vec<u8>);

    impl BaseSink for MemorySink {
        fn lane(&self) -> Result<Box<dyn BaseLane>> {
            Ok(Box::new(MemoryLane(self.0.clone(), String::new(), Vec::new())))
        }
        fn lanes_wanted(&self) -> usize {
            1
        }
        fn expect_bytes(&self, _bytes: u64) {}
        fn is_cancelled(&self) -> bool {
            false
        }
    }

    impl BaseLane for MemoryLane {
        fn begin(&mut self, meta: FileMeta) -> Result<()> {
            if meta.kind == FileKind::Directory {
                self.0.files.lock().unwrap().insert(format!("{}/", meta.path), Vec::new());
            }
            (self.1, self.2) = (meta.path, Vec::new());
            Ok(())
        }
        fn write(&mut self, bytes: &[u8]) -> Result<()> {
            self.2.extend_from_slice(bytes);
            if self.0.fails { Err(Error::new(Kind::Full, "no space")) } else { Ok(()) }
        }
        fn end(&mut self) -> Result<()> {
            self.0.files.lock().unwrap().insert(self.1.clone(), std::mem::take(&mut self.2));
            Ok(())
        }
        fn finish(self: Box<Self>) -> Result<()> {
            Ok(())
        }
    }

    fn parts() -> Vec<Part<'static>> {
        vec![
            Part::Data { path: "ib_logfile0", bytes: b"re" },
            Part::Data { path: "t/a.ibd", bytes: b"aaa" },
            Part::Data { path: "ib_logfile0", bytes: b"do" },
            Part::End { path: "t/a.ibd" },
            Part::End { path: "t/db.opt" },
            Part::Data { path: "xtrabackup_binlog_info", bytes: b"b.1\t4" },
            Part::End { path: "xtrabackup_binlog_info" },
            Part::End { path: "ib_logfile0" },
        ]
    }

    #[test]
    fn files_that_come_mixed_arrive_whole_and_small_ones_are_told() {
        let memory = Arc::new(Memory::default());
        let mut demux = Demux::new(Arc::new(MemorySink(memory.clone())));
        parts().into_iter().for_each(|part| demux.take(part).unwrap());
        assert_eq!(demux.lanes.len(), 2);
        let kept = demux.finish().unwrap();
        assert_eq!(kept.into_iter().collect::<Vec<_>>(), [("xtrabackup_binlog_info".into(), b"b.1\t4".to_vec())]);
        let files = memory.files.lock().unwrap();
        let names: Vec<&str> = files.keys().map(String::as_str).collect();
        assert_eq!(names, ["ib_logfile0", "t/", "t/a.ibd", "t/db.opt", "xtrabackup_binlog_info"]);
        assert_eq!((files["ib_logfile0"].as_slice(), files["t/db.opt"].as_slice()), (&b"redo"[..], &b""[..]));
    }

    #[test]
    fn a_lane_that_fails_ends_the_backup_with_its_reason() {
        let memory = Arc::new(Memory { fails: true, ..Memory::default() });
        let mut demux = Demux::new(Arc::new(MemorySink(memory)));
        let mut outcome = Ok(());
        for _ in 0..100 {
            outcome = outcome.and(demux.take(Part::Data { path: "a", bytes: b"x" }));
            if outcome.is_err() {
                break;
            }
        }
        let error = outcome.and_then(|()| demux.finish().map(|_| ())).unwrap_err();
        assert_eq!(error.kind(), Kind::Full);
    }
}
