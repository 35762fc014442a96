//! The fake database itself: a directory to which events are added.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::base::clock::Clock;
use crate::engine::ServerIdentity;
use crate::engine::fake::geometry::{EVENTS_PER_FILE, file_name, file_number};
use crate::engine::fake::record::{Event, RECORD_BYTES};
use crate::error::{Context, Error, Kind, Result};
use crate::model::engine_kind::EngineKind;

pub const VERSION: &str = "1";

/// A database in a directory. One value at a time writes it.
pub struct FakeDatabase {
    pub data_dir: PathBuf,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

struct State {
    count: u64,
    rows: File,
}

impl FakeDatabase {
    /// Makes a new empty database in a directory that must not exist, and starts it.
    pub fn create(data_dir: &Path, clock: Arc<dyn Clock>) -> Result<FakeDatabase> {
        let what = || format!("cannot create fake database '{}'", data_dir.display());
        std::fs::create_dir(data_dir).context(what)?;
        std::fs::create_dir(data_dir.join("log")).context(what)?;
        std::fs::write(data_dir.join("FAKE_VERSION"), VERSION).context(what)?;
        std::fs::write(data_dir.join("rows"), b"").context(what)?;
        let system_id = crate::base::random::random_u64().to_string();
        std::fs::write(data_dir.join("control"), system_id).context(what)?;
        FakeDatabase::start(data_dir, clock)
    }

    /// Starts the database in a directory, and goes on where it was left.
    pub fn start(data_dir: &Path, clock: Arc<dyn Clock>) -> Result<FakeDatabase> {
        let what = || format!("cannot start fake database '{}'", data_dir.display());
        std::fs::read(data_dir.join("control")).context(what)?;
        let rows = OpenOptions::new().read(true).write(true).open(data_dir.join("rows")).context(what)?;
        let count = rows.metadata().context(what)?.len() / 8;
        std::fs::write(data_dir.join("running"), std::process::id().to_string()).context(what)?;
        Ok(FakeDatabase { data_dir: data_dir.to_path_buf(), clock, state: Mutex::new(State { count, rows }) })
    }

    /// "The server is not running": identify and everything that asks it fails from now on.
    pub fn stop(&self) -> Result<()> {
        stop_in(&self.data_dir)
    }

    /// Commits an event and returns its number.
    pub fn write(&self, value: u64) -> Result<u64> {
        self.append(value, None)
    }

    /// Commits a named point, which is an event too.
    pub fn name_point(&self, name: &str) -> Result<u64> {
        self.append(0, Some(name.to_string()))
    }

    fn append(&self, value: u64, name: Option<String>) -> Result<u64> {
        let what = || format!("cannot write to fake database '{}'", self.data_dir.display());
        let mut state = self.state();
        let index = state.count + 1;
        let event = Event { index, at: self.clock.now(), value, name };
        let path = self.data_dir.join("log").join(file_name((index - 1) / EVENTS_PER_FILE));
        let log = OpenOptions::new().write(true).create(true).truncate(false).open(path).context(what)?;
        let offset = ((index - 1) % EVENTS_PER_FILE) * RECORD_BYTES as u64;
        log.write_all_at(&event.encode()?, offset).context(what)?;
        state.rows.write_all_at(&value.to_le_bytes(), (index - 1) * 8).context(what)?;
        state.count = index;
        Ok(index)
    }

    /// How many events there are.
    pub fn count(&self) -> u64 {
        self.state().count
    }

    /// The values of all events.
    pub fn rows(&self) -> Result<Vec<u64>> {
        rows_in(&self.data_dir)
    }

    pub fn now(&self) -> jiff::Timestamp {
        self.clock.now()
    }

    /// The numbers of the log files that are still there, ascending.
    pub fn log_files(&self) -> Result<Vec<u64>> {
        let directory = self.data_dir.join("log");
        let what = || format!("cannot read '{}'", directory.display());
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&directory).context(what)? {
            let name = entry.context(what)?.file_name();
            numbers.extend(file_number(&name.to_string_lossy()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Who the running server is.
    pub fn identity(&self) -> Result<ServerIdentity> {
        if !is_running_in(&self.data_dir) {
            let text = format!("no server is running in '{}'", self.data_dir.display());
            return Err(Error::new(Kind::Unreachable, text));
        }
        identity_of(&self.data_dir)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The identity of the database in a directory.
pub fn identity_of(data_dir: &Path) -> Result<ServerIdentity> {
    let what = || format!("cannot identify fake database '{}'", data_dir.display());
    let canonical = data_dir.canonicalize().context(what)?;
    let metadata = std::fs::metadata(&canonical).context(what)?;
    let system_id = std::fs::read_to_string(data_dir.join("control")).context(what)?;
    Ok(ServerIdentity {
        engine: EngineKind::Fake,
        version: VERSION.to_string(),
        system_id,
        data_dir: canonical,
        data_dir_inode: (metadata.dev(), metadata.ino()),
    })
}

/// The values of all events of the database in a directory.
pub fn rows_in(data_dir: &Path) -> Result<Vec<u64>> {
    let path = data_dir.join("rows");
    let bytes = std::fs::read(&path).context(|| format!("cannot read '{}'", path.display()))?;
    let word = |chunk: &[u8]| chunk.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    Ok(bytes.chunks(8).map(word).collect())
}

pub fn is_running_in(data_dir: &Path) -> bool {
    data_dir.join("running").exists()
}

pub fn stop_in(data_dir: &Path) -> Result<()> {
    crate::base::durable::remove_file_durable(&data_dir.join("running"))
}
