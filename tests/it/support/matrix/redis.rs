//! Redis 7 and Valkey 9 with an append-only file, and Redis 8 without one (`redis_stream`). The server deletes its log when
//! it rewrites it; this row keeps each increment open, so that what was archived can be compared.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use keiki::base::random::random_u64;

use super::{CloneAt, Contents, SourceServer, Writers, copy_tree, redis_stream};
use crate::support::hosts::Lab;
use crate::support::postgres::server_user;
use crate::support::redis::{Client, Product, TestRedis};

const APPEND_DIR: &str = "appendonlydir";

/// Which product it is.
pub trait Row: 'static {
    const PRODUCT: Product;
    /// As the configuration calls it.
    const ENGINE: &'static str;
    const SETTINGS: &'static [(&'static str, &'static str)] = &[("auto-aof-rewrite-percentage", "0")];
    /// Whether its log is what it sends to replicas.
    const IS_STREAMED: bool = false;
}

pub struct Redis7;

impl Row for Redis7 {
    const PRODUCT: Product = Product::Redis7;
    const ENGINE: &'static str = "redis";
}

pub struct Valkey9;

impl Row for Valkey9 {
    const PRODUCT: Product = Product::Valkey9;
    const ENGINE: &'static str = "valkey";
}

pub struct Redis8Streamed;

impl Row for Redis8Streamed {
    const PRODUCT: Product = Product::Redis8;
    const ENGINE: &'static str = "redis";
    const SETTINGS: &'static [(&'static str, &'static str)] = &redis_stream::SETTINGS;
    const IS_STREAMED: bool = true;
}

/// A server of this product.
pub struct Server<R: Row>(TestRedis, PhantomData<R>);

impl<R: Row> Deref for Server<R> {
    type Target = TestRedis;

    fn deref(&self) -> &TestRedis {
        &self.0
    }
}

impl<R: Row> SourceServer for Server<R> {
    const ENGINE: &'static str = R::ENGINE;
    // What is proved by counters of the server is one rewrite; of its stream it remembers one former id.
    const ENDS_UNSEEN: u32 = 1;
    const KEEPS_DATA_WHEN_KILLED: bool = !R::IS_STREAMED;
    const ALL_WRITES_PER_BYTE_LIMIT: f64 = 1.05;

    fn start(_lab: &Lab) -> Server<R> {
        let server = TestRedis::start_of(R::PRODUCT, R::SETTINGS);
        server.run(&["SET", "first", "1"]);
        Server(server, PhantomData)
    }

    fn copy(&self) -> Server<R> {
        let copy = TestRedis::prepare_of(R::PRODUCT, R::SETTINGS);
        copy_tree(&self.data_dir, &copy.data_dir);
        Server(copy, PhantomData)
    }

    fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    fn pid(&self) -> u32 {
        self.0.pid()
    }

    fn instance_section(&self, name: &str) -> String {
        let log = if R::IS_STREAMED { "log = \"replication\"\n" } else { "" };
        format!(
            "[[instance]]\nname = \"{name}\"\nengine = \"{}\"\ndata_dir = \"{}\"\nsocket = \"{}\"\nrun_as = \"{}\"\n\
             ship_every = \"1s\"\n{log}",
            R::ENGINE,
            self.data_dir.display(),
            self.socket.display(),
            server_user().name
        )
    }

    fn clone_sections(&self) -> String {
        let (user, bin_dir) = (server_user().name, self.bin_dir());
        format!("[clone.{}]\nrun_as = \"{user}\"\nbin_dir = \"{}\"\n", R::ENGINE, bin_dir.display())
    }

    fn bin_dir(&self) -> PathBuf {
        R::PRODUCT.bin_dir()
    }

    fn write(&self, number: u32) {
        self.run(&["RPUSH", "t", &number.to_string()]);
    }

    fn fill(&self, mebibytes: u32) {
        let mut client = self.client();
        // The server compresses what repeats when it saves, and then there would be little to restore.
        let mut random = File::open("/dev/urandom").unwrap();
        let mut block = vec![0; 1 << 20];
        for _ in 0..mebibytes {
            random.read_exact(&mut block).unwrap();
            let keys: Vec<String> = (0..128).map(|_| format!("fill-{:016x}", random_u64())).collect();
            let values = block.chunks_exact(8 << 10);
            let pairs = keys.iter().zip(values).flat_map(|(key, value)| [key.as_bytes(), value]);
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
        if R::IS_STREAMED {
            return redis_stream::end_log_file(self);
        }
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
        match R::IS_STREAMED {
            true => redis_stream::keep_log_files(self),
            false => keep_increments(self),
        }
        let increments = self.increments.lock().unwrap();
        increments.values().map(whole).collect()
    }

    fn stop(&mut self) {
        self.0.stop();
    }

    fn kill9(&mut self) {
        self.0.kill();
    }

    fn launch(&mut self) {
        self.0.start_again();
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
        // What is not shipped yet is held there; what stays of it is looked at on its own.
        path.starts_with(APPEND_DIR) || R::IS_STREAMED && path.starts_with(redis_stream::SPOOL_DIR)
    }

    fn held(&self) -> Vec<String> {
        if R::IS_STREAMED {
            return redis_stream::finished_files(self);
        }
        // Files that the server has deleted and that are there because of the agent alone.
        let entries =
            std::fs::read_dir(self.data_dir.join(APPEND_DIR).join("keiki-held")).into_iter().flatten().flatten();
        let logs = entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".aof"));
        let held = logs.filter(|log| log.metadata().is_ok_and(|metadata| metadata.nlink() == 1));
        held.map(|log| log.path().display().to_string()).collect()
    }

    fn is_startable(data_dir: &Path) -> bool {
        let entries = std::fs::read_dir(data_dir.join(APPEND_DIR)).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(".manifest"))
    }

    fn after_power_cut(&self, _clone: &CloneAt) {}
}

/// Opens each increment that the server has now. A second name would be seen by the agent, which counts names.
fn keep_increments(server: &TestRedis) {
    let mut increments = server.increments.lock().unwrap();
    for entry in std::fs::read_dir(server.data_dir.join(APPEND_DIR)).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let Some(sequence) = name.strip_suffix(".incr.aof").and_then(|rest| rest.rsplit('.').next()) else { continue };
        increments.entry(sequence.parse().unwrap()).or_insert_with(|| File::open(entry.path()).unwrap());
    }
}

fn whole(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
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
