//! The ledger story on a real Redis or Valkey: writers on several connections change strings, hashes, lists, streams and keys that
//! expire, in plain commands, transactions and scripts, with binary values and one of 100 MB, while the append-only file is
//! rewritten, snapshots are saved and backups are taken. Then clones are made of many moments, and each must hold exactly
//! what was executed by then: every key is compared by DUMP with a model server that repeats the writers' operations.
//!
//! The log is the append-only file or, on a server that has none, the replication stream, whose times are finer: there a
//! clone says by itself up to which moment it holds everything, and must.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use keiki::base::random::random_u64;
use keiki::engine::redis::LogKind;

use super::story_cost::peak_bytes;
use super::support::hosts::{Host, HostOptions, Lab, free_port, wait_for};
use super::support::postgres::server_user;
use super::support::redis::{Answer, Client, Product, TestRedis};

const WRITERS: usize = 4;
const RANDOM_TIMES: usize = 8;
const BIG_VALUE_BYTES: usize = 100 << 20;
/// What an agent may take, whatever passes through it.
const AGENT_MIB_MAX: u64 = 400;
/// A moment far away, for keys that expire then.
const EXPIRES_AT_MILLIS: &str = "4102444800000";

/// From how many milliseconds on the server itself notes what delayed it.
const MONITOR: (&str, &str) = ("latency-monitor-threshold", "5");

/// One acknowledged operation of a writer.
#[derive(Debug, Clone, Copy)]
struct Done {
    before: Timestamp,
    after: Timestamp,
}

/// Operation number `number` (from 1) of a writer, on its own keys only. The same each time it is called.
fn operate(client: &mut Client, writer: usize, number: usize) {
    let key = |name: &str| format!("w{writer}:{name}");
    let (count, text) = (key("count"), number.to_string());
    let value = bytes_of(writer, number);
    match number % 5 {
        0 => {
            // One transaction, four types.
            client.run(&["MULTI"]);
            client.run_bytes(&[b"SET", key(&format!("s{}", number % 40)).as_bytes(), &value]);
            client.run(&["HSET", &key("h"), &format!("f{}", number % 30), &text]);
            client.run(&["XADD", &key("x"), &format!("{number}-1"), "field", &text]);
            client.run(&["SET", &count, &text]);
            client.run(&["EXEC"]);
        }
        1 => {
            let script = "redis.call('RPUSH', KEYS[1], ARGV[1]) redis.call('LTRIM', KEYS[1], -50, -1) \
                          redis.call('SET', KEYS[2], ARGV[1]) return 1";
            client.run(&["EVAL", script, "2", &key("l"), &count, &text]);
        }
        2 => {
            client.run(&["SET", &count, &text, "PXAT", EXPIRES_AT_MILLIS]);
        }
        3 => {
            // The key is gone soon; it tells nothing about the others.
            client.run(&["MULTI"]);
            client.run(&["SET", &key("volatile"), &text, "PX", "300"]);
            client.run(&["ZADD", &key("z"), &text, &format!("m{}", number % 25)]);
            client.run(&["SET", &count, &text]);
            client.run(&["EXEC"]);
        }
        _ => {
            client.run_bytes(&[b"MSET", count.as_bytes(), text.as_bytes(), key("binary").as_bytes(), &value]);
        }
    }
}

/// Bytes with everything in them that the log's own syntax is made of.
fn bytes_of(writer: usize, number: usize) -> Vec<u8> {
    let mut bytes = b"\r\n*1\r\n$5\r\nMULTI\r\n#TS:9999999999\r\n\0".to_vec();
    bytes.extend((0..number % 200).map(|at| (at * 7 + writer * 31 + number) as u8));
    bytes
}

/// Running writers.
struct Ledger {
    done: Arc<Vec<Mutex<Vec<Done>>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Ledger {
    fn start(socket: PathBuf) -> Ledger {
        let done: Arc<Vec<Mutex<Vec<Done>>>> = Arc::new((0..WRITERS).map(|_| Mutex::default()).collect());
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..WRITERS)
            .map(|writer| {
                let (socket, done, stop) = (socket.clone(), done.clone(), stop.clone());
                std::thread::spawn(move || {
                    let mut client = Client::open(&socket);
                    for number in 1.. {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let before = Timestamp::now();
                        operate(&mut client, writer, number);
                        done[writer].lock().unwrap().push(Done { before, after: Timestamp::now() });
                        std::thread::sleep(Duration::from_millis(2));
                    }
                })
            })
            .collect();
        Ledger { done, stop, threads }
    }

    /// Lets the writers go on for a while.
    fn grow(&self, time: Duration) {
        std::thread::sleep(time);
        assert!(self.threads.iter().all(|thread| !thread.is_finished()), "a writer has died");
    }

    fn stop(self) -> Vec<Vec<Done>> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        self.done.iter().map(|done| done.lock().unwrap().clone()).collect()
    }
}

/// Until when the ledger is read: what was acknowledged at or before the first must be there, what began at or after the
/// second must not.
#[derive(Debug, Clone, Copy)]
struct Moment(Timestamp, Timestamp);

struct Trial {
    title: String,
    arguments: Vec<String>,
    moment: Moment,
}

struct Scene {
    a: Host,
    b: Host,
    source: TestRedis,
    lab: Lab,
    log: LogKind,
}

fn scene(product: Product, log: LogKind) -> Scene {
    let lab = Lab::new();
    let repository = lab.path("repository");
    std::fs::create_dir(&repository).unwrap();
    let (settings, log_line) = match log {
        LogKind::AppendOnlyFile => (&[("auto-aof-rewrite-percentage", "0"), MONITOR][..], ""),
        // So much is written while the agent is away; how long the server waits for other replicas says nothing here.
        LogKind::ReplicationStream => (
            &[("appendonly", "no"), ("repl-backlog-size", "64mb"), ("repl-diskless-sync-delay", "0"), MONITOR][..],
            "log = \"replication\"\n",
        ),
    };
    let source = TestRedis::start_of(product, settings);
    let (port_a, port_b) = (free_port(), free_port());
    let (bin_dir, engine) = (product.bin_dir(), product.engine().name());
    let instance = format!(
        "[[instance]]\nname = \"cart\"\nengine = \"{engine}\"\ndata_dir = \"{}\"\nsocket = \"{}\"\nrun_as = \"{}\"\nship_every = \"1s\"\n{log_line}",
        source.data_dir.display(),
        source.socket.display(),
        server_user().name
    );
    let a = Host::start(
        &lab,
        &HostOptions {
            name: "a",
            repository: format!("file://{}", repository.display()),
            peers: vec![("b", port_b)],
            sections: instance,
            listen_port: port_a,
            clone_bin_dir: &bin_dir,
        },
    );
    a.keiki_ok(&["repository", "init"]);
    let clone_section =
        format!("[clone.{engine}]\nrun_as = \"{}\"\nbin_dir = \"{}\"\n", server_user().name, bin_dir.display());
    let b = Host::start(
        &lab,
        &HostOptions {
            name: "b",
            repository: "peer://a".to_string(),
            peers: vec![("a", port_a)],
            sections: clone_section,
            listen_port: port_b,
            clone_bin_dir: &bin_dir,
        },
    );
    wait_for("archiving to begin", Duration::from_secs(30), || a.instance("cart")["state"] == "archiving");
    Scene { a, b, source, lab, log }
}

#[test]
fn story_redis_7_every_key_is_there_exactly_as_it_was_by_then() {
    tell(Product::Redis7, LogKind::AppendOnlyFile);
}

#[test]
fn story_redis_8_every_key_is_there_exactly_as_it_was_by_then() {
    tell(Product::Redis8, LogKind::AppendOnlyFile);
}

#[test]
fn story_redis_7_without_an_append_only_file_is_cloned_from_its_replication_stream() {
    tell(Product::Redis7, LogKind::ReplicationStream);
}

/// Tells the whole story.
pub fn tell(product: Product, log: LogKind) {
    let mut scene = scene(product, log);
    let settings_before = settings_of(&scene.source);
    let (done, big, mut trials) = write_history(&mut scene);
    let operations: usize = done.iter().map(Vec::len).sum();
    println!("{operations} operations by {WRITERS} writers; {} clones to be made", trials.len() + 1);
    say_cost(&scene, &done, &trials);
    let now = Timestamp::now();
    trials.push(Trial { title: "latest".into(), arguments: vec!["--latest".into()], moment: Moment(now, now) });

    let model = TestRedis::start_of(product, &[("appendonly", "no")]);
    let (mut passed, mut failures) = (0, Vec::new());
    for (number, trial) in trials.iter().enumerate() {
        match clone_and_compare(&scene, &model, number, trial, &done, big) {
            Ok(found) => {
                passed += 1;
                println!("pass  {:44} {found}", trial.title);
            }
            Err(complaint) => {
                println!("FAIL  {:44} {complaint}", trial.title);
                failures.push(format!("{}: {complaint}", trial.title));
            }
        }
    }
    let mut settings_after = settings_of(&scene.source);
    settings_after.retain(|name, value| settings_before.get(name) != Some(value));
    match settings_after.is_empty() {
        true => passed += 1,
        false => failures.push(format!("settings of the source changed: {settings_after:?}")),
    }
    match held_for_nothing(&scene) {
        0 => passed += 1,
        bytes => failures.push(format!("{bytes} bytes of log are still held on the source, although they are shipped")),
    }
    let peak = peak_mib(&scene.a).max(peak_mib(&scene.b));
    println!("peak memory of the agents after all clones: {} and {} MiB", peak_mib(&scene.a), peak_mib(&scene.b));
    match peak < AGENT_MIB_MAX {
        true => passed += 1,
        false => {
            failures.push(format!("an agent took {peak} MiB, but a value of 100 MB must not be in memory as a whole"))
        }
    }
    println!("{passed} passed, {} failed", failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Every setting with its value. The server lists them in the order of a hash table, which changes.
fn settings_of(server: &TestRedis) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let words = server.run(&["CONFIG", "GET", "*"]).list().into_iter().map(Answer::bytes).collect::<Vec<_>>();
    words.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect()
}

/// Writes for a while; returns what was done, the value of 100 MB, and the moments to be cloned.
fn write_history(scene: &mut Scene) -> (Vec<Vec<Done>>, Done, Vec<Trial>) {
    let Scene { a, source, log, .. } = scene;
    let is_streamed = *log == LogKind::ReplicationStream;
    // The server makes a new base; or the replica link breaks.
    let disturb = |source: &TestRedis| match is_streamed {
        false => source.rewrite(),
        true => {
            source.run(&["CLIENT", "KILL", "TYPE", "replica"]);
        }
    };
    // Whoever calls changes nothing about the agent but its life.
    let a: &mut Host = a;
    let ledger = Ledger::start(source.socket.clone());
    let mut trials = Vec::new();
    let pause = Duration::from_millis(1500);
    ledger.grow(pause);
    trials.push(backup_trial(a, "first backup set"));
    let first_backup_ended = Timestamp::now();
    ledger.grow(pause);
    disturb(source);
    ledger.grow(pause);
    let before = Timestamp::now();
    source.client().run_bytes(&[b"SET", b"big", big_value()]);
    let big = Done { before, after: Timestamp::now() };
    ledger.grow(pause);
    source.run(&["BGSAVE"]);
    disturb(source);
    disturb(source);
    ledger.grow(pause);
    trials.push(backup_trial(a, "second backup set"));
    ledger.grow(pause);
    disturb(source);
    ledger.grow(pause);
    // The agent dies, and while it is dead the server deletes what was not shipped yet.
    a.kill_agent();
    ledger.grow(pause);
    disturb(source);
    ledger.grow(pause);
    a.start_agent();
    wait_for("archiving to go on", Duration::from_secs(60), || a.instance("cart")["state"] == "archiving");
    ledger.grow(pause);
    let last = Timestamp::now();
    let done = ledger.stop();
    let (from, to) = (first_backup_ended.as_second() + 2, last.as_second());
    for index in 0..RANDOM_TIMES {
        let second = from + (random_u64() % (to - from + 1) as u64) as i64;
        let whole = Timestamp::from_second(second).unwrap();
        // The append-only file counts in seconds: a time between two shows the second before it.
        let asked = match index % 4 {
            0 => whole,
            1 | 2 if !is_streamed => whole,
            _ => Timestamp::from_millisecond(second * 1000 + (random_u64() % 999) as i64 + 1).unwrap(),
        };
        trials.push(Trial {
            title: format!("time {asked}"),
            arguments: vec!["--at".into(), asked.to_string()],
            moment: if is_streamed { Moment(asked, asked) } else { Moment(whole, whole) },
        });
    }
    (done, big, trials)
}

/// Bytes on the source's disk that only the agent still holds, once it had time to let them go.
fn held_for_nothing(scene: &Scene) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let held = || -> u64 {
        if scene.log == LogKind::ReplicationStream {
            let entries = std::fs::read_dir(scene.source.data_dir.join("keiki-stream")).unwrap();
            let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
            files.retain(|path| path.extension().is_some_and(|extension| extension == "aof"));
            files.sort();
            // The newest is being written.
            files.pop();
            return files.iter().filter_map(|path| path.metadata().ok()).map(|metadata| metadata.len()).sum();
        }
        let entries = std::fs::read_dir(scene.source.data_dir.join("appendonlydir/keiki-held")).unwrap();
        let files = entries.filter_map(|entry| entry.ok()?.metadata().ok());
        // What is small is no log: notes of the agent's.
        files.filter(|metadata| metadata.nlink() == 1 && metadata.len() > 4096).map(|metadata| metadata.len()).sum()
    };
    let began = Instant::now();
    while held() > 0 && began.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(200));
    }
    held()
}

fn big_value() -> &'static [u8] {
    static VALUE: OnceLock<Vec<u8>> = OnceLock::new();
    let byte = |at: usize| (at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()[7];
    VALUE.get_or_init(|| (0..BIG_VALUE_BYTES).map(byte).collect())
}

/// Takes a backup; its clone must hold what was done before it began and nothing that began after it ended.
fn backup_trial(a: &Host, title: &str) -> Trial {
    let from = Timestamp::now();
    a.keiki_ok(&["backup", "create", "cart"]);
    let to = Timestamp::now();
    let list = a.json(&["backup", "list", "cart"]);
    let id = list.as_array().unwrap().last().unwrap()["id"].as_str().unwrap().to_string();
    Trial { title: title.to_string(), arguments: vec!["--backup".into(), id], moment: Moment(from, to) }
}

/// What shipping and backing up cost the source, as it and its clients saw it.
fn say_cost(scene: &Scene, done: &[Vec<Done>], trials: &[Trial]) {
    let backups: Vec<Moment> =
        trials.iter().filter(|trial| trial.arguments[0] == "--backup").map(|trial| trial.moment).collect();
    let is_backed_up = |done: &&Done| backups.iter().any(|backup| done.before < backup.1 && done.after > backup.0);
    let (during, otherwise): (Vec<&Done>, Vec<&Done>) = done.iter().flatten().partition(is_backed_up);
    for (when, done) in [("a backup was taken", during), ("log was only shipped", otherwise)] {
        let mut micros: Vec<i64> =
            done.iter().map(|done| done.after.as_microsecond() - done.before.as_microsecond()).collect();
        micros.sort_unstable();
        let at = |part: usize| micros.get((micros.len().max(1) - 1) * part / 1000).copied().unwrap_or_default();
        println!(
            "while {when}, {} operations took {} us in the middle, {} us at the 99th part of 100, {} us at most",
            micros.len(),
            at(500),
            at(990),
            at(1000)
        );
    }
    println!("peak memory of the agents: {} and {} MiB", peak_mib(&scene.a), peak_mib(&scene.b));
    let mut client = scene.source.client();
    let info = String::from_utf8(client.run(&["INFO", "everything"]).bytes()).unwrap();
    let said = |key: &str| info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap_or("-");
    println!(
        "the source: memory {} now, {} at most, {} resident, {} for replicas; copied on write {} bytes for the last \
         snapshot and {} for the last rewrite; last fork {} us, {} rewrites, {} snapshots, {} delayed fsyncs",
        said("used_memory_human"),
        said("used_memory_peak_human"),
        said("used_memory_rss_human"),
        said("mem_total_replication_buffers"),
        said("rdb_last_cow_size"),
        said("aof_last_cow_size"),
        said("latest_fork_usec"),
        said("aof_rewrites"),
        said("rdb_saves"),
        said("aof_delayed_fsync")
    );
    for command in ["set", "exec", "eval", "mset"] {
        println!("the source's latency of {command} in us: {}", said(&format!("latency_percentiles_usec_{command}")));
    }
    for event in client.run(&["LATENCY", "LATEST"]).list() {
        if let [Answer::Bytes(name), _, Answer::Number(last), Answer::Number(most), ..] = &event.list()[..] {
            println!("the source's latency by {}: {last} ms last, {most} ms at most", String::from_utf8_lossy(name));
        }
    }
}

fn peak_mib(host: &Host) -> u64 {
    peak_bytes(host.agent_process_id()) >> 20
}

fn clone_and_compare(
    scene: &Scene,
    model: &TestRedis,
    number: usize,
    trial: &Trial,
    done: &[Vec<Done>],
    big: Done,
) -> Result<String, String> {
    let (name, port) = (format!("clone-{number}"), free_port());
    let port_text = port.to_string();
    let mut arguments = vec!["--json", "clone", "cart", "--to", "b", "--as", &name, "--port", &port_text];
    arguments.extend(trial.arguments.iter().map(String::as_str));
    let began = Instant::now();
    let output = scene.a.keiki(&arguments);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let job: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        return Err(format!("{}: {}{said}", job["error"]["message"], job["error"]["hint"]));
    }
    let took = began.elapsed();
    let socket = scene.lab.path("clones-b").join(format!("{name}.run")).join("redis.sock");
    let mut clone = Client::open(&socket);
    let mut moment = trial.moment;
    let mut said = String::new();
    if scene.log == LogKind::ReplicationStream && trial.arguments.first().is_some_and(|word| word == "--at") {
        // Nothing is said of a target so short behind a backup that the log between them notes no time of execution.
        let executed = executed_by(&String::from_utf8_lossy(&output.stdout))?;
        moment.0 = executed.unwrap_or(moment.1 - Duration::from_secs(20));
        said = format!(", all up to {} ms before", moment.1.as_millisecond() - moment.0.as_millisecond());
    }
    let outcome = compare(&mut clone, &mut model.client(), moment, done, big);
    clone.run(&["SET", "written by the clone", "1"]);
    let listens = std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
    let state = scene.b.instance(&name)["state"].clone();
    let removed = scene.b.keiki(&["discard", &name, "--yes"]);
    if !removed.status.success() {
        return Err(format!("cannot discard: {}", String::from_utf8_lossy(&removed.stderr)));
    }
    let found = outcome?;
    match (state.is_null(), listens) {
        (true, _) => Err("the clone is not an instance of host b".to_string()),
        (_, false) => Err(format!("the clone does not listen on port {port}")),
        _ => Ok(format!("{found}{said} in {:.1} s", took.as_secs_f64())),
    }
}

/// Up to when a clone says that it holds everything, if it does.
fn executed_by(report: &str) -> Result<Option<Timestamp>, String> {
    assert!(report.contains("nothing that was received at "), "the clone does not say what it holds: {report}");
    let Some((_, rest)) = report.split_once("everything that was executed by ") else { return Ok(None) };
    let (text, _) = rest.split_once("Z,").ok_or("the clone says no time")?;
    format!("{text}Z").parse().map(Some).map_err(|error| format!("'{text}' is no time: {error}"))
}

/// Compares a clone with the model.
fn compare(
    clone: &mut Client,
    model: &mut Client,
    moment: Moment,
    done: &[Vec<Done>],
    big: Done,
) -> Result<String, String> {
    let number = |answer: Answer| match answer {
        Answer::Bytes(bytes) => String::from_utf8(bytes).unwrap().parse::<usize>().unwrap(),
        _ => 0,
    };
    model.run(&["FLUSHALL"]);
    let mut counted = Vec::new();
    for (writer, done) in done.iter().enumerate() {
        let count = number(clone.run(&["GET", &format!("w{writer}:count")]));
        let must = done.iter().filter(|done| done.after <= moment.0).count();
        let may = done.iter().filter(|done| done.before < moment.1).count();
        if count < must || count > may {
            return Err(format!("writer {writer}: {count} operations, but it must be {must} to {may}"));
        }
        (1..=count).for_each(|number| operate(model, writer, number));
        counted.push(count.to_string());
    }
    let has_big = clone.run(&["EXISTS", "big"]).number() == 1;
    if big.after <= moment.0 && !has_big || big.before >= moment.1 && has_big {
        return Err(format!("the value of 100 MB: {has_big}"));
    }
    if has_big {
        model.run_bytes(&[b"SET", b"big", big_value()]);
    }
    let (found, wanted) = (without_volatile(clone.dump()), without_volatile(model.dump()));
    if let Some(key) = found.keys().chain(wanted.keys()).find(|key| found.get(*key) != wanted.get(*key)) {
        return Err(format!(
            "key '{}' is {} here and {} in the model",
            String::from_utf8_lossy(key),
            found.get(key).map_or("missing".to_string(), |value| format!("{} bytes", value.len())),
            wanted.get(key).map_or("missing".to_string(), |value| format!("{} bytes", value.len())),
        ));
    }
    for key in found.keys() {
        let ask = |client: &mut Client| client.run_bytes(&[b"PEXPIRETIME", key]);
        if ask(clone) != ask(model) {
            return Err(format!("key '{}' does not expire when it should", String::from_utf8_lossy(key)));
        }
    }
    Ok(format!("{} keys after {} operations", found.len(), counted.join(" + ")))
}

fn without_volatile(mut keys: BTreeMap<Vec<u8>, Vec<u8>>) -> BTreeMap<Vec<u8>, Vec<u8>> {
    keys.retain(|key, _| !key.ends_with(b":volatile"));
    keys
}
