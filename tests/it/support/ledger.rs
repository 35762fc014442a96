//! The ledger: writers commit numbered rows and note what they saw before and after each commit, so that for every
//! moment it is known which rows must be there, which must not, and which may be either.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use keiki::base::users::connect_unix_as;
use keiki::model::position::Lsn;
use tokio_postgres::{Client, Config, NoTls};

use super::postgres::server_user;

/// One committed row, with what its writer saw around the commit.
#[derive(Debug, Clone)]
pub struct Row {
    pub id: i64,
    pub time_before: Timestamp,
    pub lsn_before: Lsn,
    pub time_after: Timestamp,
    pub lsn_after: Lsn,
}

/// Until when a ledger is read.
#[derive(Debug, Clone, Copy)]
pub enum Moment {
    Time(Timestamp),
    Lsn(Lsn),
    /// Somewhere between the two instants: what was acknowledged before the first must be there, what began after the
    /// second must not.
    Between(Timestamp, Timestamp),
}

impl Moment {
    fn must_contain(&self, row: &Row) -> bool {
        match self {
            Moment::Time(time) => row.time_after <= *time,
            Moment::Lsn(lsn) => row.lsn_after <= *lsn,
            Moment::Between(from, _) => row.time_after <= *from,
        }
    }

    fn must_not_contain(&self, row: &Row) -> bool {
        match self {
            Moment::Time(time) => row.time_before > *time,
            Moment::Lsn(lsn) => row.lsn_before > *lsn,
            Moment::Between(_, to) => row.time_before > *to,
        }
    }
}

/// Connects to a server on its Unix socket as the user who runs it, which is also the name of the role.
pub async fn connect(socket_dir: &Path, port: u16) -> Result<Client, String> {
    let user = server_user();
    let socket =
        connect_unix_as(&user, &socket_dir.join(format!(".s.PGSQL.{port}"))).map_err(|error| error.to_string())?;
    socket.set_nonblocking(true).map_err(|error| error.to_string())?;
    let socket = tokio::net::UnixStream::from_std(socket).map_err(|error| error.to_string())?;
    let (client, connection) = Config::new()
        .user(&user.name)
        .dbname("postgres")
        .connect_raw(socket, NoTls)
        .await
        .map_err(|error| error.to_string())?;
    tokio::spawn(connection);
    Ok(client)
}

/// The position up to which the server has written, and what time it is.
pub async fn lsn_now(client: &Client, function: &str) -> Lsn {
    let row = client.query_one(&format!("SELECT {function}()::text"), &[]).await.unwrap();
    Lsn::parse(row.get(0)).unwrap()
}

/// Running writers.
pub struct Ledger {
    rows: Arc<Mutex<Vec<Row>>>,
    stop: Arc<AtomicBool>,
    writers: Vec<tokio::task::JoinHandle<()>>,
}

impl Ledger {
    /// Makes the table and starts `writers` connections that each commit one row after the other.
    pub async fn start(socket_dir: PathBuf, port: u16, writers: u32) -> Ledger {
        let client = connect(&socket_dir, port).await.unwrap();
        client
            .batch_execute("CREATE TABLE ledger (id bigint PRIMARY KEY, writer int NOT NULL, filler text NOT NULL)")
            .await
            .unwrap();
        let rows = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = Vec::new();
        for writer in 0..writers {
            let (rows, stop) = (rows.clone(), stop.clone());
            let client = connect(&socket_dir, port).await.unwrap();
            tasks.push(tokio::spawn(async move {
                let mut number = 0i64;
                while !stop.load(Ordering::Relaxed) {
                    let id = i64::from(writer) * 1_000_000_000 + number;
                    let lsn_before = lsn_now(&client, "pg_current_wal_insert_lsn").await;
                    let time_before = Timestamp::now();
                    let statement = "INSERT INTO ledger VALUES ($1::bigint, $2, repeat(md5(($1::bigint)::text), 20))";
                    client.execute(statement, &[&id, &(writer as i32)]).await.unwrap();
                    let time_after = Timestamp::now();
                    let lsn_after = lsn_now(&client, "pg_current_wal_insert_lsn").await;
                    rows.lock().unwrap().push(Row { id, time_before, lsn_before, time_after, lsn_after });
                    number += 1;
                }
            }));
        }
        Ledger { rows, stop, writers: tasks }
    }

    /// How many rows were committed so far.
    pub fn len(&self) -> usize {
        self.rows.lock().unwrap().len()
    }

    /// Stops the writers and returns what they committed.
    pub async fn stop(self) -> Vec<Row> {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.unwrap();
        }
        let rows = self.rows.lock().unwrap();
        rows.clone()
    }
}

/// What a copy holds, compared with what the moment asks for: a list of complaints, empty if the copy is exact.
pub fn compare(rows: &[Row], found: &HashSet<i64>, moment: Moment) -> Vec<String> {
    let known: HashSet<i64> = rows.iter().map(|row| row.id).collect();
    let mut complaints = Vec::new();
    for row in rows {
        if moment.must_contain(row) && !found.contains(&row.id) {
            complaints.push(format!("row {} was committed before {moment:?} and is missing: {row:?}", row.id));
        }
        if moment.must_not_contain(row) && found.contains(&row.id) {
            complaints.push(format!("row {} began after {moment:?} and is there: {row:?}", row.id));
        }
    }
    for id in found.difference(&known) {
        complaints.push(format!("row {id} was never written"));
    }
    complaints
}

/// All ids in the ledger of a server.
pub async fn ids(client: &Client) -> HashSet<i64> {
    client.query("SELECT id FROM ledger", &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// The comparison itself is tested: a missing and an extra row are both found.
#[test]
fn a_missing_and_an_extra_row_are_both_found() {
    let at = |second: i64| Timestamp::from_second(second).unwrap();
    let row = |id, before, after| Row {
        id,
        time_before: at(before),
        lsn_before: Lsn(before as u64),
        time_after: at(after),
        lsn_after: Lsn(after as u64),
    };
    let rows = [row(1, 10, 11), row(2, 19, 21), row(3, 30, 31)];
    let found = |ids: &[i64]| ids.iter().copied().collect::<HashSet<i64>>();
    for moment in [Moment::Time(at(20)), Moment::Lsn(Lsn(20)), Moment::Between(at(20), at(20))] {
        assert!(compare(&rows, &found(&[1]), moment).is_empty());
        assert!(compare(&rows, &found(&[1, 2]), moment).is_empty());
        assert_eq!(compare(&rows, &found(&[]), moment).len(), 1);
        assert_eq!(compare(&rows, &found(&[1, 3]), moment).len(), 1);
        assert_eq!(compare(&rows, &found(&[1, 9]), moment).len(), 1);
    }
}
