//! Redis 7 with an append-only file. The server deletes its log when it rewrites it; this row keeps a name of its own
//! for each increment, so that what was archived can be compared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use keiki::base::random::random_u64;

use super::{CloneAt, Contents, SourceServer, Writers, copy_tree};
use crate::support::hosts::Lab;
use crate::support::postgres::server_user;
use crate::support::redis::{Client, TestRedis, bin_dir};

const APPEND_DIR: &str = "appendonlydir";

impl SourceServer for TestRedis {
    const ENGINE: &'static str = "redis";
    // What is proved by counters of the server is one rewrite.
    const ENDS_UNSEEN: u32 = 1;
    const ALL_WRITES_PER_BYTE_LIMIT: f64 = 1.05;

    fn start(_lab: &Lab) -> TestRedis {
        let server = TestRedis::start(&[("auto-aof-rewrite-percentage", "0")]);
        server.run(&["SET", "first", "1"]);
        server
    }

    fn copy(&self) -> TestRedis {
        let copy = TestRedis::prepare(&[("auto-aof-rewrite-percentage", "0")]);
        copy_tree(&self.data_dir, &copy.data_dir);
        copy
    }

    fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    fn pid(&self) -> u32 {
        TestRedis::pid(self)
    }

    fn instance_section(&self, name: &str) -> String {
        format!(
            "[[instance]]\nname = \"{name}\"\nengine = \"redis\"\ndata_dir = \"{}\"\nsocket = \"{}\"\nrun_as = \"{}\"\n\
             ship_every = \"1s\"\n",
            self.data_dir.display(),
            self.socket.display(),
            server_user().name
        )
    }

    fn clone_sections(&self) -> String {
        format!("[clone.redis]\nrun_as = \"{}\"\nbin_dir = \"{}\"\n", server_user().name, bin_dir().display())
    }

    fn bin_dir(&self) -> PathBuf {
        bin_dir()
    }

    fn write(&self, number: u32) {
        self.run(&["RPUSH", "t", &number.to_string()]);
    }

    fn fill(&self, mebibytes: u32) {
        let mut client = self.client();
        // The server compresses what repeats when it saves, and then there would be little to restore.
        let mut state = random_u64() | 1;
        let mut word = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..mebibytes {
            let keys: Vec<String> = (0..1024).map(|_| format!("fill-{:016x}", word())).collect();
            let values: Vec<Vec<u8>> =
                (0..1024).map(|_| (0..128).flat_map(|_| word().to_le_bytes()).collect()).collect();
            let pairs = keys.iter().zip(&values).flat_map(|(key, value)| [key.as_bytes(), value.as_slice()]);
            let words: Vec<&[u8]> = std::iter::once(b"MSET".as_slice()).chain(pairs).collect();
            client.run_bytes(&words);
        }
    }

    fn load(&self) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..2)
            .map(|_| {
                let (mut client, stop) = (self.client(), stop.clone());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let key = format!("written-{}", random_u64() % 5000);
                        let value = format!("{:x}", random_u64()).repeat(60);
                        let commands: [&[&[u8]]; 3] =
                            [&[b"MULTI"], &[b"SET", key.as_bytes(), value.as_bytes()], &[b"EXEC"]];
                        // The server may be killed.
                        if commands.iter().any(|words| client.try_ask(words).is_none()) {
                            return;
                        }
                    }
                })
            })
            .collect();
        Box::new(Load { stop, threads })
    }

    fn end_log_file(&self) {
        keep_increments(self);
        self.rewrite();
        keep_increments(self);
    }

    fn contents(&self) -> Contents {
        contents(&mut self.client())
    }

    fn contents_of(&self, clone: &CloneAt) -> Contents {
        contents(&mut client_of(clone))
    }

    fn write_to(&self, clone: &CloneAt) {
        client_of(clone).run(&["RPUSH", "t", "written to the clone"]);
    }

    fn end_log_file_of(&self, clone: &CloneAt) {
        client_of(clone).rewrite();
    }

    fn own_log(&self) -> Vec<Vec<u8>> {
        keep_increments(self);
        let mut files: Vec<(u64, PathBuf)> = std::fs::read_dir(kept_dir(self))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.file_name().unwrap().to_str().unwrap().parse().unwrap(), path))
            .collect();
        files.sort();
        files.iter().map(|(_, path)| std::fs::read(path).unwrap()).collect()
    }

    fn stop(&mut self) {
        TestRedis::stop(self);
    }

    fn kill9(&mut self) {
        self.kill();
    }

    fn launch(&mut self) {
        self.start_again();
    }

    fn facts(&self) -> BTreeMap<String, String> {
        let settings = format!("{:?}", self.run(&["CONFIG", "GET", "*"]));
        BTreeMap::from([
            ("process".to_string(), self.pid().to_string()),
            ("run".to_string(), self.info("run_id")),
            ("settings".to_string(), settings),
            ("snapshots".to_string(), self.info("rdb_saves")),
            ("rewrites".to_string(), self.info("aof_rewrites")),
        ])
    }

    fn is_counter(fact: &str) -> bool {
        fact == "rewrites"
    }

    fn is_own_business(path: &str) -> bool {
        // Links hold what is not shipped yet; what stays of them is looked at on its own.
        path.starts_with(APPEND_DIR)
    }

    fn is_startable(data_dir: &Path) -> bool {
        let entries = std::fs::read_dir(data_dir.join(APPEND_DIR)).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(".manifest"))
    }

    fn after_power_cut(&self, _clone: &CloneAt) {}
}

fn kept_dir(server: &TestRedis) -> PathBuf {
    server.data_dir.with_file_name("kept")
}

/// Gives each increment that the server has now a name that the server does not know.
fn keep_increments(server: &TestRedis) {
    std::fs::create_dir_all(kept_dir(server)).unwrap();
    for entry in std::fs::read_dir(server.data_dir.join(APPEND_DIR)).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let Some(sequence) = name.strip_suffix(".incr.aof").and_then(|rest| rest.rsplit('.').next()) else { continue };
        let kept = kept_dir(server).join(sequence);
        if !kept.exists() {
            std::fs::hard_link(entry.path(), kept).unwrap();
        }
    }
}

/// Running writers.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

fn client_of(clone: &CloneAt) -> Client {
    Client::open(&clone.run_dir.join("redis.sock"))
}

fn contents(client: &mut Client) -> Contents {
    let keys = client.dump().into_iter();
    keys.map(|(key, value)| (String::from_utf8_lossy(&key).into_owned(), blake3::hash(&value).to_string())).collect()
}
