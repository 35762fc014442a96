//! A group of three engines, cloned as one: PostgreSQL, MariaDB and Redis share one ledger, into which every number goes
//! three times, and clones of the group must hold exactly what was committed in each of them by one moment. They are held,
//! accepted and discarded as one, also when a member fails or the agent dies in between.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use keiki::engine::mysql::clone::{ACCOUNT, PASSWORD_FILE, SOCKET_FILE};
use keiki::engine::mysql::session::{Endpoint, Session};
use keiki::engine::mysql::source::read_password;
use serde_json::Value;

use super::support::hosts::{Host, HostOptions, KEIKI, Lab, free_port, instance_section, wait_for};
use super::support::ledger;
use super::support::mariadb::MariaServer;
use super::support::postgres::{TestServer, Version, server_user};
use super::support::redis::{Client, TestRedis, bin_dir};
use super::support::two_hosts::{SOON, job, sql_at, try_sql_at, wait_until_ended};

/// The members' instances, in the order of the ledger.
const MEMBERS: [&str; 3] = ["orders", "catalogue", "cart"];

/// One number of the ledger: around each of the three commits, in the order of [`MEMBERS`].
type Entry = [(Timestamp, Timestamp); 3];

struct Scene {
    a: Host,
    b: Host,
    postgres: TestServer,
    maria: MariaServer,
    redis: TestRedis,
    lab: Lab,
}

impl Scene {
    /// Three servers on host a, which knows them as group 'shop'; host b is for clones and reaches the repository through a.
    fn start() -> Scene {
        let lab = Lab::new();
        let repository = lab.path("repository");
        std::fs::create_dir(&repository).unwrap();
        let user = server_user().name;
        let postgres = TestServer::start(Version::V15, &[("wal_level", "replica")]);
        let maria = MariaServer::start(&[]);
        let redis = TestRedis::start(&[]);
        let of = |name: &str, engine: &str, data_dir: &Path, socket: &Path| {
            format!(
                "[[instance]]\nname = \"{name}\"\nengine = \"{engine}\"\ndata_dir = \"{}\"\nsocket = \"{}\"\n\
                 run_as = \"{user}\"\nship_every = \"1s\"\n",
                data_dir.display(),
                socket.display()
            )
        };
        let sections = [
            instance_section("orders", &postgres, "ship = \"slot\"\nship_every = \"1s\""),
            of("catalogue", "mariadb", &maria.data_dir, &maria.socket),
            of("cart", "redis", &redis.data_dir, &redis.socket),
            // Every spelling of a member.
            "[[group]]\nname = \"shop\"\nmembers = [\"orders\", \"a/catalogue\", \"cart@a\"]\n".to_string(),
            "[[group]]\nname = \"typo\"\nmembers = [\"orders\", \"a/catalog\"]\n".to_string(),
        ];
        let clones = format!(
            "[clone.mariadb]\nrun_as = \"{user}\"\n[clone.redis]\nrun_as = \"{user}\"\nbin_dir = \"{}\"\n",
            bin_dir().display()
        );
        let (port_a, port_b) = (free_port(), free_port());
        let options = |name, repository, peers, sections, listen_port| HostOptions {
            name,
            repository,
            peers,
            sections,
            listen_port,
            clone_bin_dir: &postgres.bin_dir,
        };
        let url = format!("file://{}", repository.display());
        let a = Host::start(&lab, &options("a", url, vec![("b", port_b)], sections.concat(), port_a));
        a.keiki_ok(&["repository", "init"]);
        let b = Host::start(&lab, &options("b", "peer://a".into(), vec![("a", port_a)], clones, port_b));
        for name in MEMBERS {
            wait_for("archiving to begin", SOON, || a.instance(name)["state"] == "archiving");
        }
        Scene { a, b, postgres, maria, redis, lab }
    }

    /// Writes the ledger for a while, with a backup of each member soon after its beginning. What was committed, the first
    /// whole second that clones can show, and the last.
    fn write_history(&self, seconds: i64) -> (Vec<Entry>, i64, i64) {
        let ledger = Ledger::start(self);
        ledger.wait_for(20);
        for name in MEMBERS {
            self.a.keiki_ok(&["backup", "create", name]);
        }
        let first = Timestamp::now().as_second() + 1;
        wait_for("the ledger to grow", SOON, || Timestamp::now().as_second() > first + seconds);
        let entries = ledger.stop();
        // Nothing was written in the second that is not over yet.
        (entries, first, Timestamp::now().as_second())
    }

    fn clone_dir(&self, group: &str, member: &str) -> PathBuf {
        self.lab.path("clones-b").join(format!("{group}-{member}"))
    }

    /// What the ledger of each clone holds, in the order of the members. `ports` are those of the clones.
    fn found(&self, group: &str, job: &Value) -> [BTreeSet<i64>; 3] {
        let port = port_of(job, &format!("{group}-orders"));
        let orders = sql_at(&self.postgres, port, "SELECT n FROM ledger");
        let run_dir = |member: &str| self.clone_dir(group, member).with_extension("run");
        let catalogue = block_on(maria_ledger(&run_dir("catalogue")));
        let cart = Client::open(&run_dir("cart").join("redis.sock")).run(&["LRANGE", "ledger", "0", "-1"]).list();
        let number = |text: &str| text.parse::<i64>().unwrap();
        [
            orders.lines().map(number).collect(),
            catalogue,
            cart.into_iter().map(|item| number(std::str::from_utf8(&item.bytes()).unwrap())).collect(),
        ]
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

async fn maria_ledger(run_dir: &Path) -> BTreeSet<i64> {
    let endpoint = Endpoint {
        socket: run_dir.join(SOCKET_FILE),
        user: ACCOUNT.to_string(),
        password: Some(read_password(&run_dir.join(PASSWORD_FILE)).unwrap()),
        run_as: server_user().name,
    };
    let session = Session::open(&endpoint).await.unwrap();
    let rows = session.query_within(SOON, "SELECT n FROM shop.ledger").await.unwrap().rows;
    rows.into_iter().map(|row| row[0].as_deref().unwrap().parse().unwrap()).collect()
}

/// The port that a member's job has chosen.
fn port_of(group_job: &Value, member: &str) -> u16 {
    let members = group_job["members"].as_array().unwrap();
    let job = members.iter().find(|job| job["task"]["name"] == member).unwrap_or_else(|| panic!("{group_job:#}"));
    result(job, "port").parse().unwrap()
}

/// A line of a job's results.
fn result(job: &Value, name: &str) -> String {
    let lines = job["results"].as_array().unwrap();
    let line = lines.iter().find(|line| line["name"] == name).unwrap_or_else(|| panic!("no '{name}' in {job:#}"));
    line["value"].as_str().unwrap().to_string()
}

/// One writer that puts each number into all three servers, one after the other.
struct Ledger {
    entries: Arc<Mutex<Vec<Entry>>>,
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Ledger {
    fn start(scene: &Scene) -> Ledger {
        scene.postgres.sql("CREATE TABLE ledger (n bigint PRIMARY KEY)");
        block_on(async {
            scene.maria.sql("CREATE DATABASE shop").await;
            scene.maria.sql("CREATE TABLE shop.ledger (n BIGINT PRIMARY KEY)").await;
        });
        let (entries, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (socket_dir, port) = (scene.postgres.socket_dir.clone(), scene.postgres.port);
        let (endpoint, socket) = (scene.maria.endpoint(), scene.redis.socket.clone());
        let (written, stopped) = (entries.clone(), stop.clone());
        let work = async move {
            let orders = ledger::connect(&socket_dir, port).await.unwrap();
            let catalogue = Session::open(&endpoint).await.unwrap();
            let mut cart = Client::open(&socket);
            for number in 1i64.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let begun = Timestamp::now();
                orders.execute("INSERT INTO ledger VALUES ($1)", &[&number]).await.unwrap();
                let first = Timestamp::now();
                catalogue.execute(&format!("INSERT INTO shop.ledger VALUES ({number})")).await.unwrap();
                let second = Timestamp::now();
                cart.run(&["RPUSH", "ledger", &number.to_string()]);
                let third = Timestamp::now();
                written.lock().unwrap().push([(begun, first), (first, second), (second, third)]);
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        };
        Ledger { entries, stop, thread: std::thread::spawn(move || block_on(work)) }
    }

    fn wait_for(&self, count: usize) {
        wait_for("the ledger to grow", SOON, || self.entries.lock().unwrap().len() >= count);
    }

    fn stop(self) -> Vec<Entry> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.entries.lock().unwrap().clone()
    }
}

/// Complains about every number that must be there at a whole second and is not, or the other way round.
fn complaints(entries: &[Entry], at: Timestamp, found: &[BTreeSet<i64>; 3]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (member, (name, found)) in MEMBERS.iter().zip(found).enumerate() {
        for (entry, number) in entries.iter().zip(1i64..) {
            let (before, after) = entry[member];
            match found.contains(&number) {
                true if before > at => complaints.push(format!("{name} has {number}, begun at {before}, after {at}")),
                false if after < at => {
                    complaints.push(format!("{name} misses {number}, committed at {after}, by {at}"))
                }
                _ => {}
            }
        }
        // One writer: what is there begins at 1 and has no gap.
        if !found.iter().copied().eq(1..=found.len() as i64) {
            complaints.push(format!("{name} has a gap"));
        }
    }
    complaints
}

#[test]
fn a_missing_and_an_extra_number_are_both_found() {
    let at = |second: i64| Timestamp::from_second(second).unwrap();
    let entries: Vec<Entry> = (1..=3).map(|n| [(at(n * 10), at(n * 10 + 1)); 3]).collect();
    let all = |numbers: &[i64]| std::array::from_fn::<_, 3, _>(|_| numbers.iter().copied().collect());
    assert!(complaints(&entries, at(25), &all(&[1, 2])).is_empty());
    assert_eq!(complaints(&entries, at(25), &all(&[1])).len(), 3);
    assert_eq!(complaints(&entries, at(25), &all(&[1, 2, 3])).len(), 3);
    assert_eq!(complaints(&entries, at(25), &all(&[2])).len(), 6);
}

#[test]
fn story_group_of_three_engines_is_cloned_held_accepted_and_discarded_as_one() {
    let scene = Scene::start();
    let (entries, first, last) = scene.write_history(6);
    let (a, b) = (&scene.a, &scene.b);
    refuse_what_is_no_moment_of_all(&scene, last);

    // To a second, held.
    let at = Timestamp::from_second((first + last) / 2).unwrap();
    let time = at.to_string();
    let said = a.keiki_ok(&["clone", "shop", "--to", "b", "--as", "check", "--at", &time, "--check"]);
    for member in MEMBERS {
        assert!(said.contains(&format!("check-{member}: data directory")), "{said}");
    }
    assert!(!scene.clone_dir("check", "orders").exists(), "a check has touched something");
    let held = a.json(&["clone", "shop", "--to", "b", "--as", "check", "--at", &time, "--hold"]);
    assert_eq!(held["state"], "held", "{held:#}");
    let port = port_of(&held, "check-orders");
    assert!(try_sql_at(&scene.postgres, port, "SELECT 1").is_err(), "a held member listens");
    for member in MEMBERS {
        let name = format!("check-{member}");
        assert!(b.instance(&name).is_null(), "a held member is an instance");
        let refused = b.keiki_fails(&["accept", &name]);
        assert!(refused.contains("belongs to group 'check'"), "{refused}");
        assert!(b.keiki_fails(&["discard", &name, "--yes"]).contains("keiki discard check"));
    }
    let table = b.keiki_ok(&["accept", "check"]);
    for word in ["MEMBER", "check-orders", "postgres", "check-catalogue", "mariadb", "check-cart", "redis"] {
        assert!(table.contains(word), "{table}");
    }
    println!("{table}");
    let id = held["id"].as_str().unwrap();
    let done = job(b, id);
    assert_eq!(done["state"], "done", "{done:#}");
    each_member_reports_its_position_and_time(&done, &table, "check", at);
    let found = scene.found("check", &done);
    assert_eq!(complaints(&entries, at, &found), Vec::<String>::new());
    assert!(found.iter().all(|numbers| !numbers.is_empty() && numbers.len() < entries.len()), "{at} proves nothing");
    for member in MEMBERS {
        let name = format!("check-{member}");
        wait_for("the member to be archived", SOON, || b.instance(&name)["state"] == "archiving");
    }

    // The latest moment of all, beside it; nobody writes any more.
    let latest = a.json(&["clone", "shop", "--to", "b", "--as", "now", "--latest"]);
    assert_eq!(latest["state"], "done", "{latest:#}");
    let reached: Timestamp = result(&latest, "target").replacen(' ', "T", 1).parse().unwrap();
    let found = scene.found("now", &latest);
    assert_eq!(complaints(&entries, reached, &found), Vec::<String>::new());
    println!("latest is {reached}: {} of {} numbers", found[0].len(), entries.len());

    for group in ["check", "now"] {
        b.keiki_ok(&["discard", group, "--yes"]);
        for member in MEMBERS {
            assert!(!scene.clone_dir(group, member).exists(), "{group}-{member} left its directory");
        }
        assert!(b.keiki_fails(&["discard", group, "--yes"]).contains("no clone"));
    }
}

/// Where each member is in its own log, and when what it executed last was: in JSON, of the group as of the member, and in
/// the table.
fn each_member_reports_its_position_and_time(job: &Value, table: &str, group: &str, at: Timestamp) {
    let mut positions = BTreeSet::new();
    for member in MEMBERS {
        let name = format!("{group}-{member}");
        let members = job["members"].as_array().unwrap();
        let own = members.iter().find(|job| job["task"]["name"] == name.as_str()).unwrap();
        let reached = result(own, "reached");
        let (position, last) = reached.split_once(", last transaction at ").unwrap_or_else(|| panic!("{reached}"));
        assert!(position.chars().any(|letter| letter.is_ascii_digit()), "'{position}' is no position");
        let time: Timestamp = last.replacen(' ', "T", 1).parse().unwrap();
        // The ledger was written to all the time; on a busy machine with pauses.
        assert!(time <= at && at.duration_since(time).as_secs() < 5, "{name}: {reached} is not {at}");
        assert!(result(job, &name).contains(&reached), "{job:#}");
        let row = table.lines().find(|line| line.starts_with(&name)).unwrap_or_else(|| panic!("{table}"));
        assert!(row.contains(&format!(" {position} ")) && row.contains(last), "{reached} is not in {row}");
        positions.insert(position.to_string());
    }
    assert_eq!(positions.len(), MEMBERS.len(), "{positions:?} are not three places in three logs");
}

/// What means one member only is refused before anything starts, and says what to do.
fn refuse_what_is_no_moment_of_all(scene: &Scene, second: i64) {
    let order = ["clone", "shop", "--to", "b", "--as", "no"];
    for (option, value) in [("--position", "0/1"), ("--gtid", "0-5-1"), ("--name", "x"), ("--port", "5500")] {
        let said = scene.a.keiki_fails(&[order.as_slice(), &[option, value]].concat());
        assert!(said.contains(&format!("group 'shop' with {option}")) && said.contains("hint:"), "{said}");
    }
    let between = Timestamp::from_millisecond((second - 2) * 1000 + 250).unwrap().to_string();
    let said = scene.a.keiki_fails(&[order.as_slice(), &["--at", &between]].concat());
    assert!(said.contains("the log of 'a/catalogue' (mariadb) counts in whole seconds"), "{said}");
    let future = Timestamp::from_second(second + 86400).unwrap().to_string();
    let said = scene.a.keiki_fails(&[order.as_slice(), &["--at", &future]].concat());
    assert!(said.contains("cannot clone group 'shop'") && said.contains("its archive ends at"), "{said}");
    let status = scene.a.keiki_ok(&["status"]);
    assert!(status.contains("orders, a/catalogue, a/cart"), "{status}");
    // A member that nobody knows is named, with those that there are.
    let unknown = "the repository has no archive of instance 'a/catalog'";
    let said = scene.a.keiki_fails(&["clone", "typo", "--to", "b", "--as", "no", "--latest"]);
    assert!(said.contains(&format!("cannot clone group 'typo': {unknown}")), "{said}");
    assert!(said.contains("hint: there is 'a/cart', 'a/catalogue', 'a/orders'"), "{said}");
    let doctor = scene.a.keiki(&["--json", "doctor"]).stdout;
    let doctor: Value = serde_json::from_slice(&doctor).unwrap();
    let of_group = |name: &str| {
        let items = doctor.as_array().unwrap().iter();
        items.clone().find(|item| item["what"] == format!("group '{name}'")).unwrap_or_else(|| panic!("{doctor:#}"))
    };
    assert_eq!((&of_group("shop")["verdict"], &of_group("typo")["verdict"]), (&"pass".into(), &"fail".into()));
    assert_eq!(of_group("shop")["found"], "a/orders, a/catalogue, a/cart");
    assert_eq!(of_group("typo")["found"], unknown);
    assert!(!scene.clone_dir("no", "orders").exists());
}

/// Changes a byte in the middle of every pack of an incarnation, or changes it back.
fn flip_a_byte_of_each_pack(incarnation: &Path) {
    for entry in std::fs::read_dir(incarnation.join("packs")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        // A frame comes first in a pack, its index last.
        bytes[24] ^= 0x40;
        std::fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn story_group_whose_member_fails_stays_closed_and_goes_on_when_it_is_resumed() {
    let mut scene = Scene::start();
    let (entries, first, last) = scene.write_history(2);
    let at = Timestamp::from_second((first + last) / 2).unwrap();
    let incarnation = scene.a.instance("cart")["incarnation"].as_str().unwrap().to_string();
    let incarnation = scene.lab.path("repository/incarnations").join(incarnation);
    flip_a_byte_of_each_pack(&incarnation);

    let order = ["clone", "shop", "--to", "b", "--as", "check", "--at", &at.to_string()];
    let said = scene.a.keiki_fails(&order);
    println!("{said}");
    for word in ["cannot clone group 'shop': 'check-cart'", "wait closed", "keiki job resume", "keiki discard check"] {
        assert!(said.contains(word), "'{word}' is not in: {said}");
    }
    let jobs = scene.b.json(&["job", "list"]);
    let group = jobs.as_array().unwrap().iter().find(|job| job["task"]["kind"] == "clone-group").unwrap();
    let id = group["id"].as_str().unwrap().to_string();
    let members_held = |host: &Host| {
        let states: Vec<Value> =
            job(host, &id)["members"].as_array().unwrap().iter().map(|m| m["state"].clone()).collect();
        states == ["held", "held", "failed"]
    };
    wait_for("the other members to be ready", SOON, || members_held(&scene.b));
    let port = port_of(&job(&scene.b, &id), "check-orders");
    assert!(try_sql_at(&scene.postgres, port, "SELECT 1").is_err(), "a member of a failed group listens");
    assert!(scene.b.keiki_fails(&["accept", "check"]).contains("has failed"));
    assert!(scene.b.keiki_fails(&["accept", "check-orders"]).contains("belongs to group 'check'"));
    assert!(MEMBERS.iter().all(|member| scene.b.instance(&format!("check-{member}")).is_null()));

    // A restart changes nothing about that.
    scene.b.kill_agent();
    scene.b.start_agent();
    assert!(members_held(&scene.b), "{:#}", job(&scene.b, &id));
    flip_a_byte_of_each_pack(&incarnation);
    scene.b.keiki_ok(&["job", "resume", &id]);
    let done = job(&scene.b, &id);
    assert_eq!(complaints(&entries, at, &scene.found("check", &done)), Vec::<String>::new());

    scene.b.keiki_ok(&["discard", "check", "--yes"]);
    a_member_that_cannot_be_opened_is_opened_later(&scene, &entries, at);

    // The same failure as at first, and this time all of it is deleted.
    flip_a_byte_of_each_pack(&incarnation);
    let order = ["clone", "shop", "--to", "b", "--as", "other", "--at", &at.to_string()];
    assert!(scene.a.keiki_fails(&order).contains("'other-cart'"));
    scene.b.keiki_ok(&["discard", "other", "--yes"]);
    assert!(MEMBERS.iter().all(|member| !scene.clone_dir("other", member).exists()), "something was left");
}

/// Somebody takes the port of a member while the group is held: accepting fails and says what is open, and when the port
/// is free again, the group goes on to its end.
fn a_member_that_cannot_be_opened_is_opened_later(scene: &Scene, entries: &[Entry], at: Timestamp) {
    let time = at.to_string();
    let held = scene.a.json(&["clone", "shop", "--to", "b", "--as", "late", "--at", &time, "--hold"]);
    let id = held["id"].as_str().unwrap();
    let taken = std::net::TcpListener::bind(("127.0.0.1", port_of(&held, "late-cart"))).unwrap();
    let said = scene.b.keiki_fails(&["accept", "late"]);
    assert!(said.contains("cannot clone group 'shop': 'late-cart'") && said.contains("keiki job resume"), "{said}");
    drop(taken);
    wait_for("the other members to be open", SOON, || states(&scene.b, id)[..2] == ["done", "done"]);
    scene.b.keiki_ok(&["job", "resume", id]);
    assert_eq!(states(&scene.b, id), ["done"; 3]);
    assert_eq!(complaints(entries, at, &scene.found("late", &job(&scene.b, id))), Vec::<String>::new());
    scene.b.keiki_ok(&["discard", "late", "--yes"]);
    assert!(MEMBERS.iter().all(|member| !scene.clone_dir("late", member).exists()), "something was left");
}

/// What the members of a group are by now.
fn states(host: &Host, id: &str) -> Vec<String> {
    let members = job(host, id)["members"].as_array().cloned().unwrap_or_default();
    members.iter().map(|member| member["state"].as_str().unwrap().to_string()).collect()
}

#[test]
fn story_group_is_opened_as_a_whole_although_the_agent_dies_in_between() {
    let mut scene = Scene::start();
    let (entries, first, last) = scene.write_history(2);
    let at = Timestamp::from_second((first + last) / 2).unwrap();
    let opens = |host: &Host, id: &str| states(host, id).iter().any(|state| state == "done");
    let is_growing = |host: &Host, id: &str| states(host, id).len() == MEMBERS.len();
    type Moment<'m> = (&'m str, &'m dyn Fn(&Host, &str) -> bool);
    // Every boundary between steps is looked at with engines that cost nothing, in `jobs_fake::groups`.
    let moments: [Moment<'_>; 2] = [("grown", &is_growing), ("half-open", &opens)];
    for (name, has_come) in moments {
        let hold = name != "grown";
        let time = at.to_string();
        let mut order = vec!["clone", "shop", "--to", "b", "--as", name, "--at", &time];
        order.push(if hold { "--hold" } else { "--detach" });
        let id = scene.a.json(&order)["id"].as_str().unwrap().to_string();
        let accepting = hold.then(|| {
            let mut command = Command::new(KEIKI);
            command.arg("--config").arg(&scene.b.config).args(["accept", name]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        });
        wait_for(&format!("the group to be {name}"), SOON, || has_come(&scene.b, &id));
        println!("killed when it was {name}: {:?}", states(&scene.b, &id));
        scene.b.kill_agent();
        if let Some(mut accepting) = accepting {
            accepting.wait().unwrap();
        }
        scene.b.start_agent();
        let done = wait_until_ended(&scene.b, &id);
        assert_eq!(done["state"], "done", "{done:#}\n--- agent\n{}", scene.b.log());
        assert_eq!(states(&scene.b, &id), ["done"; 3]);
        assert_eq!(complaints(&entries, at, &scene.found(name, &done)), Vec::<String>::new());
        scene.b.keiki_ok(&["discard", name, "--yes"]);
        assert!(MEMBERS.iter().all(|member| !scene.clone_dir(name, member).exists()), "something was left");
    }
}
