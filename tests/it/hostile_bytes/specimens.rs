//! What parsers are attacked with before it is changed: files of real servers (`tests/fixtures`) and messages of ours.

use std::path::PathBuf;

use jiff::Timestamp;
use keiki::engine::mysql::ondisk::binlog::{CHECKSUM_BYTES, EventHeader, HEADER_BYTES, event_type};
use keiki::error::{Error, Kind};
use keiki::format::container::{ContainerKind, read_whole};
use keiki::format::frame::ObjectSeal;
use keiki::format::layout::{log_chunk_key, manifest_key, pack_key};
use keiki::format::links::{LinkLine, LinksHeader, LinksWriter};
use keiki::model::backup::BackupKind;
use keiki::model::check::CheckItem;
use keiki::model::id::{BackupId, IncarnationId, JobId, PackId};
use keiki::model::job::{Order, Task};
use keiki::model::position::{Lsn, Position};
use keiki::peer::api::{ObjectFacts, PutWhen, Request, Response};
use keiki::peer::wire::{encode_answer, encode_request};

fn file(name: &str) -> Vec<u8> {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests/fixtures", name].iter().collect();
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    if name.ends_with(".zst") { zstd::decode_all(&bytes[..]).unwrap() } else { bytes }
}

fn files(names: &[&str]) -> Vec<Vec<u8>> {
    names.iter().map(|name| file(name)).collect()
}

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

/// The unchanged bytes for a target.
pub fn of(target: &str) -> Vec<Vec<u8>> {
    match target {
        "mysql_binlog" => files(&[
            "mariadb/binlog-checksums",
            "mariadb/binlog-second",
            "mariadb/binlog-no-checksums",
            "mysql/binlog-first",
            "mysql/binlog-second",
        ]),
        "mysql_mbstream" => files(&["mariadb/backup.mbstream"]),
        "mysql_gtid" => texts(&[
            "0-5-2257",
            "0-5-9,1-2-3, 7-4294967295-18446744073709551615",
            "0-5-1..0-5-99",
            "3e11fa47-71ca-11e1-9e33-c80aa9429562:23",
            "3e11fa47-71ca-11e1-9e33-c80aa9429562:abc_tag:5..9",
            "3e11fa47-71ca-11e1-9e33-c80aa9429562:1-20:22:abc_tag:1:zz:1-3,\na9efa202-e59e-11f1-a868-02fc00000001:5",
        ]),
        "mysql_backup_info" => [files(&["mariadb/xtrabackup_binlog_info"]), texts(&["binlog.000003\t4567\n"])].concat(),
        "mysql_aria_control" => files(&["mariadb/aria_log_control"]),
        "mysql_gtid_events" => mysql_gtid_events(),
        "mysql_auto_cnf" => texts(&["[auto]\nserver-uuid=a9efa202-e59e-11f1-a868-02fc00000001\n"]),
        "mysql_wire" => mysql_packets(),
        "redis_resp" => texts(&[
            "+OK\r\n:7\r\n-ERR no\r\n$-1\r\n$4\r\na\r\nb\r\n*2\r\n:7\r\n*0\r\n",
            "*4\r\n$3\r\nabc\r\n*2\r\n$0\r\n\r\n*1\r\n:-1\r\n+x\r\n$5\r\nhello\r\n",
        ]),
        "redis_aof" => files(&["redis/increment.aof"]),
        "redis_manifest" => files(&["redis/manifest"]),
        "redis_rdb" => files(&["redis/base.rdb"]),
        "redis_replication" => texts(&[
            "\n\n+FULLRESYNC 0123456789abcdef0123456789abcdef01234567 1234\r\n$89\r\nREDIS0010",
            "+CONTINUE 0123456789abcdef0123456789abcdef01234567\r\n",
            "$EOF:0123456789abcdef0123456789abcdef01234567\r\nREDIS0010\u{7f}0123456789abcdef0123456789abcdef01234567",
            "0123456789abcdef0123456789abcdef01234567REDIS0123456789abcdef0123456789abcdef01234567",
            "-NOPERM User weak has no permissions to run the 'psync' command\r\n",
        ]),
        "redis_spool" => [
            files(&["redis/increment.aof"]),
            texts(&[
                "*2\r\n$6\r\nSELECT\r\n$1\r\n3\r\n*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\n*1\r\n$\r\n*1\r\n$4\r\nPING\r\n",
                "*1\r\n$5\r\nMULTI\r\n*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n*1\r\n$4\r\nEXEC\r\n*3\r\n$8\r\nREPLCONF\r\n$6\r\n\
                 GETACK\r\n$1\r\n*\r\n",
                "#KEIKI-OF:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa:1000\r\n#KEIKI-AT:50000000:1000\r\n*1\r\n$4\r\nPING\r\n",
            ]),
        ]
        .concat(),
        "postgres_wal" => wal_pages(),
        "postgres_control" => files(&["postgres/15/pg_control.zst", "postgres/18/pg_control.zst"])
            .into_iter()
            .map(|bytes| bytes[..400].to_vec())
            .collect(),
        "postgres_backup_label" => files(&["postgres/15/backup_label", "postgres/18/backup_label"]),
        "postgres_history" => files(&["postgres/15/00000002.history", "postgres/18/00000002.history"]),
        "postgres_tablespace_map" => texts(&["16384 /srv/one\n16385 /srv/with\\\nline\n"]),
        "postgres_page" => files(&["postgres/15/relation.zst", "postgres/18/relation.zst"]),
        "postgres_names" => texts(&["000000010000000000000009\n00000002.history\n00000001000000000000000C.partial\n\
             000000010000000000000009.00000028.backup\nbase/5/16384_vm.1\nglobal/pg_control\npg_tblspc/1/PG_15_202209061/5/1"]),
        "format_container" => files(&["repository/v1-pack", "repository/v1-log-chunk", "repository/v1-manifest"]),
        "format_frame" => files(&["repository/v1-pack"]).into_iter().map(|bytes| bytes[16..].to_vec()).collect(),
        "format_manifest" => vec![records_and_summaries().0],
        "format_document" => files(&[
            "repository/v1-identity.json",
            "repository/v1-keiki.json",
            "repository/v1-lease.json",
            "repository/v1-work.json",
        ]),
        "format_summary" => records_and_summaries().1,
        "format_links" => vec![links()],
        "format_keys" => {
            texts(&["incarnations/01938c5e-0000-7000-8000-000000000001/log/000000010000000000000007/sealed\n\
             incarnations/01938c5e-0000-7000-8000-000000000001/log/000000010000000000000007/0000000000002000-0000000000004ee0\n\
             incarnations/01938c5e-0000-7000-8000-000000000001/backups/20261121T095900Z-k3xq/manifest\n\
             incarnations/01938c5e-0000-7000-8000-000000000001/identity.json"])
        }
        "peer_request" => requests(),
        "peer_answer" => answers(),
        other => panic!("nobody has given '{other}' anything to read"),
    }
}

pub fn incarnation() -> IncarnationId {
    IncarnationId::parse("01938c5e-0000-7000-8000-000000000001").unwrap()
}

/// Kind, key and bytes of a container each.
fn containers() -> [(ContainerKind, String, Vec<u8>); 3] {
    let pack = PackId::parse("01938c5e-0000-7000-8000-00000000000a").unwrap();
    let log_key = log_chunk_key(incarnation(), "000000010000000000000007", 8192, 8192 + 12000).unwrap();
    let backup = BackupId::parse("20261121T095900Z-k3xq").unwrap();
    [
        (ContainerKind::Pack, pack_key(incarnation(), pack), file("repository/v1-pack")),
        (ContainerKind::Log, log_key, file("repository/v1-log-chunk")),
        (ContainerKind::Manifest, manifest_key(incarnation(), &backup), file("repository/v1-manifest")),
    ]
}

/// The records of a manifest, and the summary of each kind of container.
fn records_and_summaries() -> (Vec<u8>, Vec<Vec<u8>>) {
    let (mut records, mut summaries) = (Vec::new(), Vec::new());
    for (kind, key, bytes) in containers() {
        let (index, contents) = read_whole(&ObjectSeal::of(&key), kind, &bytes.into()).unwrap();
        summaries.push(serde_json::to_vec(&index.summary).unwrap());
        if kind == ContainerKind::Manifest {
            records = contents.concat();
        }
    }
    (records, summaries)
}

fn links() -> Vec<u8> {
    let at = Timestamp::UNIX_EPOCH;
    let header = LinksHeader {
        keiki: "0.1.0".into(),
        repository: "s3://b/p".into(),
        incarnation: incarnation(),
        backup: BackupId::parse("20261121T095900Z-k3xq").unwrap(),
        backup_ended_at: at,
        made_at: at,
        expires_at: at,
    };
    let mut writer = LinksWriter::default();
    let mut text = writer.header(&header).unwrap();
    for number in 0..3 {
        let link =
            LinkLine { key: format!("a/{number}"), bytes: number, etag: "\"t\"".into(), url: "https://x/".into() };
        text += &writer.link(&link).unwrap();
    }
    text += &writer.end().unwrap();
    text.into_bytes()
}

/// The bodies of the events with GTIDs in the files of a real server.
fn mysql_gtid_events() -> Vec<Vec<u8>> {
    let mut bodies = Vec::new();
    for log in files(&["mysql/binlog-first", "mysql/binlog-second"]) {
        let mut rest = &log[4..];
        while let Some(header) = EventHeader::parse(rest) {
            let (event, later) = rest.split_at(header.bytes as usize);
            if [event_type::MYSQL_GTID, event_type::MYSQL_ANONYMOUS_GTID].contains(&header.kind)
                || [event_type::MYSQL_PREVIOUS_GTIDS, event_type::MYSQL_TAGGED_GTID].contains(&header.kind)
            {
                bodies.push(event[HEADER_BYTES..event.len() - CHECKSUM_BYTES].to_vec());
            }
            rest = later;
        }
    }
    bodies
}

/// What a server of MariaDB greets with and answers, as in `sql/sql_acl.cc` and the protocol's description.
fn mysql_packets() -> Vec<Vec<u8>> {
    let mut greeting =
        b"\x0a5.5.5-10.11.19-MariaDB-0+deb12u1-log\0\x09\0\0\0abcdefgh\0\xfe\xf7\x2d\x02\0\xff\x81\x15".to_vec();
    greeting.extend_from_slice(b"\0\0\0\0\0\0\x1d\0\0\0ijklmnopqrst\0mysql_native_password\0");
    let ask_other = b"\xfemysql_native_password\0abcdefghijklmnopqrst\0".to_vec();
    let refusal = b"\xff\x15\x04#28000Access denied for user".to_vec();
    let column = b"\x03def\0\0\0\x04name\0\x0c\x2d\0\0\x01\0\0\xfd\x01\0\x27\0\0".to_vec();
    let row = b"\x03one\xfb\xfc\x05\0three".to_vec();
    vec![
        greeting,
        ask_other,
        refusal,
        column,
        row,
        b"\x03".to_vec(),
        b"\xfe\0\0\x02\0".to_vec(),
        vec![0, 0, 0, 2, 0, 0, 0],
    ]
}

/// The first pages of segments of each version: enough for records of many kinds, and quick to read.
fn wal_pages() -> Vec<Vec<u8>> {
    let names = ["postgres/15/000000010000000000000009.zst", "postgres/18/000000010000000000000009.zst"];
    let first = names
        .iter()
        .filter(|name| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name).exists());
    first.flat_map(|name| file(name).chunks(24 << 10).take(1).map(<[u8]>::to_vec).collect::<Vec<_>>()).collect()
}

fn requests() -> Vec<Vec<u8>> {
    let order = Order {
        id: JobId::fresh(),
        by: "local:root".into(),
        task: Task::Backup { instance: "orders".into(), kind: BackupKind::Manual },
    };
    let requests = [
        Request::ListJobs,
        Request::ShowWindow { instance: "orders".into() },
        Request::Check { order },
        Request::ShipNow { incarnation: IncarnationId::fresh() },
        Request::GetObject { key: "keiki.json".into(), range: Some(3..99) },
        Request::PutObject { key: "a/b".into(), condition: PutWhen::IfMatch("tag".into()) },
        Request::DeleteObjects { keys: vec!["a".into(), "b".into(), "c".into()] },
        Request::Forward { host: "b".into(), request: Box::new(Request::ListJobs) },
    ];
    let framed = requests.iter().filter_map(|request| encode_request(request).ok()).map(|bytes| bytes.to_vec());
    // Once with frames and once without, as the two readers take them.
    framed.flat_map(|bytes| [bytes[4..].to_vec(), bytes]).collect()
}

fn answers() -> Vec<Vec<u8>> {
    let object = |number: u64| ObjectFacts { key: format!("a/{number}"), size_bytes: number, tag: "t".into() };
    let answers = [
        Ok(Response::Done),
        Ok(Response::Hello { host: "a".into(), version: "0.1.0".into(), now: Timestamp::UNIX_EPOCH }),
        Ok(Response::Checks(vec![CheckItem::pass("disk", "enough"), CheckItem::pass("port", "free")])),
        Ok(Response::Shipped {
            position: Position::Wal { timeline: 1, lsn: Lsn(77) },
            observed_at: Timestamp::UNIX_EPOCH,
        }),
        Ok(Response::Objects((0..20).map(object).collect())),
        Err(Error::new(Kind::Forbidden, "no").hint("ask")),
    ];
    let framed = answers.iter().map(|answer| encode_answer(answer).unwrap().to_vec());
    framed.flat_map(|bytes| [bytes[4..].to_vec(), bytes]).collect()
}
