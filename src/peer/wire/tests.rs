//! Unit tests of `wire`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::model::backup::{Backup, BackupKind};
use crate::model::check::{CheckItem, Verdict};
use crate::model::cost::{Price, Prices, Reading, Usage};
use crate::model::engine_kind::EngineKind;
use crate::model::group::{Group, GroupOrder};
use crate::model::id::{BackupId, IncarnationId, JobId, RepositoryId};
use crate::model::incarnation::Incarnation;
use crate::model::inventory::{Holdings, Inventory, Total};
use crate::model::job::{CloneOrder, JobReport, JobState, Order, ProgressUnit, StepReport, StepState, Task};
use crate::model::password::{Password, Passwords};
use crate::model::position::{Lsn, Position};
use crate::model::target::Target;
use crate::model::window::{Hole, Reach, Window};
use crate::peer::api::{
    HostStatus, InstanceState, InstanceStatus, ObjectFacts, PeerFacts, PutWhen, RepositoryCost, RepositoryFacts,
};

// === values of every kind ===

fn text() -> impl Strategy<Value = String> {
    "\\PC{0,12}"
}

fn instant() -> impl Strategy<Value = Timestamp> {
    (-100_000_000_000i128..100_000_000_000, 0i128..1_000_000_000)
        .prop_map(|(seconds, nanoseconds)| Timestamp::from_nanosecond(seconds * 1_000_000_000 + nanoseconds).unwrap())
}

fn position() -> impl Strategy<Value = Position> {
    prop_oneof![
        (any::<u32>(), any::<u64>()).prop_map(|(timeline, lsn)| Position::Wal { timeline, lsn: Lsn(lsn) }),
        any::<u64>().prop_map(Position::Count),
        (any::<u64>(), any::<u64>()).prop_map(|(number, offset)| Position::File { number, offset }),
    ]
}

fn error() -> impl Strategy<Value = Error> {
    let kind = prop_oneof![Just(Kind::Forbidden), Just(Kind::Damaged), Just(Kind::Internal), Just(Kind::Full)];
    (kind, text(), option::of(text())).prop_map(|(kind, message, hint)| match hint {
        Some(hint) => Error::new(kind, message).hint(hint),
        None => Error::new(kind, message),
    })
}

fn check() -> impl Strategy<Value = CheckItem> {
    let verdict = prop_oneof![Just(Verdict::Pass), Just(Verdict::Warn), Just(Verdict::Fail)];
    (text(), verdict, text(), option::of(text())).prop_map(|(what, verdict, found, hint)| CheckItem {
        what,
        verdict,
        found,
        hint,
    })
}

fn backup_id() -> impl Strategy<Value = BackupId> {
    (instant(), any::<u64>()).prop_filter_map("years have four digits in the ids of backups", |(at, random)| {
        BackupId::parse(&BackupId::new(at, random).to_string()).ok()
    })
}

fn target() -> impl Strategy<Value = Target> {
    // Boxed: strategies of strategies are large, and a test's stack is not.
    prop_oneof![
        Just(Target::Latest),
        instant().prop_map(Target::Time),
        any::<u64>().prop_map(|lsn| Target::Lsn(Lsn(lsn))),
        position().prop_map(Target::Position),
        (text(), any::<bool>()).prop_map(|(id, included)| Target::Transaction { id, included }),
        text().prop_map(Target::Name),
        backup_id().prop_map(Target::Backup),
    ]
    .boxed()
}

fn settings() -> impl Strategy<Value = BTreeMap<String, String>> {
    btree_map(text(), text(), 0..4)
}

fn passwords() -> impl Strategy<Value = Passwords> {
    let password = "[ -~]{1,9}".prop_map(|text| Password::new(text).unwrap());
    btree_map(text(), password, 0..3)
}

fn order() -> impl Strategy<Value = Order> {
    let kind = prop_oneof![Just(BackupKind::Automatic), Just(BackupKind::Manual)];
    let place = (option::of(text()), option::of(any::<u16>()));
    let more = (btree_set(text(), 0..3), any::<bool>());
    let clone = (text(), text(), target(), place, settings(), any::<bool>(), more);
    let task = prop_oneof![
        (text(), kind).prop_map(|(instance, kind)| Task::Backup { instance, kind }),
        clone.prop_map(|(source, clone_name, target, (data_dir, port), settings, hold, more)| {
            let (passwords_for, keep_expired) = more;
            Task::Clone(CloneOrder {
                source,
                clone_name,
                target,
                data_dir,
                port,
                settings,
                hold,
                passwords_for,
                keep_expired,
                ties: BTreeMap::new(),
            })
        }),
        (text(), text(), vec(text(), 0..4), target(), any::<bool>()).prop_map(
            |(group, clone_name, sources, target, hold)| Task::CloneGroup(GroupOrder {
                group,
                clone_name,
                sources,
                target,
                hold
            })
        ),
    ];
    (text(), task).prop_map(|(by, task)| Order { id: JobId::fresh(), by, task })
}

fn step() -> impl Strategy<Value = StepReport> {
    let state = prop_oneof![Just(StepState::Waiting), Just(StepState::Running), Just(StepState::Failed)];
    let unit = prop_oneof![Just(ProgressUnit::Bytes), Just(ProgressUnit::Items)];
    (text(), state, any::<u64>(), any::<u64>(), unit, text(), option::of(instant()), option::of(instant())).prop_map(
        |(name, state, done, total, unit, note, began_at, ended_at)| StepReport {
            name,
            state,
            done,
            total,
            unit,
            note,
            began_at,
            ended_at,
        },
    )
}

fn job() -> impl Strategy<Value = JobReport> {
    let state = prop_oneof![Just(JobState::Running), Just(JobState::Held), Just(JobState::Cancelled)];
    let results = vec((text(), text()), 0..3);
    (
        order(),
        state,
        instant(),
        option::of(instant()),
        vec(step(), 0..4),
        results,
        vec(check(), 0..3),
        option::of(error()),
    )
        .prop_map(|(order, state, began_at, ended_at, steps, results, checks, error)| JobReport {
            order,
            state,
            began_at,
            ended_at,
            steps,
            results,
            checks,
            error,
        })
}

fn backup() -> impl Strategy<Value = Backup> {
    (backup_id(), position(), position(), instant(), text(), any::<u64>(), settings()).prop_map(
        |(id, start, stop, at, engine_version, number, engine_facts)| Backup {
            id,
            incarnation: IncarnationId::fresh(),
            kind: BackupKind::Manual,
            start,
            stop,
            began_at: at,
            ended_at: at,
            engine_version,
            file_count: number,
            restored_bytes: number / 2,
            stored_bytes: number / 3,
            engine_facts,
        },
    )
}

fn window() -> impl Strategy<Value = Window> {
    let reach = (backup_id(), position(), position(), instant(), option::of(instant())).prop_map(
        |(backup, from, to, from_time, covered_until)| Reach {
            backup,
            from,
            from_time,
            to,
            last_commit_at: None,
            covered_until,
        },
    );
    let hole = (position(), position(), option::of(instant())).prop_map(|(from, to, from_time)| Hole {
        from,
        to,
        from_time,
        to_time: None,
    });
    (vec(reach, 0..3), vec(hole, 0..3)).prop_map(|(reaches, holes)| Window { reaches, holes })
}

fn status() -> impl Strategy<Value = HostStatus> {
    let state = prop_oneof![Just(InstanceState::Starting), Just(InstanceState::Quarantine), Just(InstanceState::Down)];
    let instance = (
        text(),
        state,
        option::of(position()),
        any::<u64>(),
        option::of((text(), instant())),
        option::of(error()),
        any::<u16>(),
    )
        .prop_map(|(name, state, shipped, backlog_bytes, last_backup, problem, port)| InstanceStatus {
            engine: name.clone(),
            engine_version: Some(name.clone()),
            data_dir: name.clone(),
            name,
            port,
            state,
            incarnation: Some(IncarnationId::fresh()),
            shipped,
            durable: None,
            durable_at: last_backup.as_ref().map(|(_, at)| *at),
            backlog_bytes,
            backlog_seconds: backlog_bytes / 7,
            last_backup,
            problem,
        });
    (text(), text(), instant(), option::of(error()), vec(instance, 0..3)).prop_map(
        |(host, version, now, repository_error, instances)| HostStatus {
            groups: vec![Group { name: version.clone(), members: vec![host.clone()] }],
            peers: vec![PeerFacts { name: host.clone(), address: version.clone() }],
            host,
            repository: version.clone(),
            version,
            began_at: now,
            now,
            repository_error,
            instances,
        },
    )
}

/// Boxed, as all that is made of many: strategies are values as large as everything in them, and a test's stack is small.
fn direct_request() -> BoxedStrategy<Request> {
    let put_when = prop_oneof![Just(PutWhen::Create), Just(PutWhen::Replace), text().prop_map(PutWhen::IfMatch)];
    let jobs = prop_oneof![
        Just(Request::ListJobs),
        Just(Request::ShowJob { id: JobId::fresh() }),
        Just(Request::CancelJob { id: JobId::fresh() }),
        Just(Request::ResumeJob { id: JobId::fresh() }),
        (order(), passwords()).prop_map(|(order, passwords)| Request::Submit { order, passwords }),
        order().prop_map(|order| Request::Check { order }),
    ]
    .boxed();
    let objects = prop_oneof![
        (text(), option::of(any::<std::ops::Range<u64>>())).prop_map(|(key, range)| Request::GetObject { key, range }),
        text().prop_map(|key| Request::HeadObject { key }),
        (text(), option::of(text()), any::<u32>()).prop_map(|(prefix, after, limit)| Request::ListObjects {
            prefix,
            after,
            limit
        }),
        (text(), put_when).prop_map(|(key, condition)| Request::PutObject { key, condition }),
        vec(text(), 0..5).prop_map(|keys| Request::DeleteObjects { keys }),
        (vec(text(), 0..5), any::<u64>())
            .prop_map(|(keys, valid_for_seconds)| Request::LinkObjects { keys, valid_for_seconds }),
    ]
    .boxed();
    prop_oneof![
        prop_oneof![Just(Request::Hello), Just(Request::Status), Just(Request::Doctor), Just(Request::InitRepository)],
        prop_oneof![Just(Request::ShowRepository), Just(Request::ShowCost)],
        jobs,
        objects,
        text().prop_map(|clone| Request::Accept { clone }),
        text().prop_map(|clone| Request::Discard { clone }),
        text().prop_map(|instance| Request::ListBackups { instance }),
        text().prop_map(|instance| Request::ShowWindow { instance }),
        Just(Request::ShipNow { incarnation: IncarnationId::fresh() }),
        (text(), text()).prop_map(|(data_dir, file)| Request::PushLog { data_dir, file }),
    ]
    .boxed()
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        3 => direct_request(),
        1 => (text(), direct_request())
            .prop_map(|(host, request)| Request::Forward { host, request: Box::new(request) }),
    ]
}

fn object() -> impl Strategy<Value = ObjectFacts> {
    (text(), any::<u64>(), text()).prop_map(|(key, size_bytes, tag)| ObjectFacts { key, size_bytes, tag })
}

fn response() -> BoxedStrategy<Response> {
    prop_oneof![
        Just(Response::Done),
        (text(), text(), instant()).prop_map(|(host, version, now)| Response::Hello { host, version, now }),
        status().prop_map(Response::Status).boxed(),
        vec(check(), 0..5).prop_map(Response::Checks),
        job().prop_map(Response::Job).boxed(),
        vec(job(), 0..4).prop_map(Response::Jobs),
        vec(backup(), 0..4).prop_map(Response::Backups),
        window().prop_map(|window| Response::Window { incarnation: IncarnationId::fresh(), window }),
        (position(), instant()).prop_map(|(position, observed_at)| Response::Shipped { position, observed_at }),
        any::<u64>().prop_map(|size_bytes| Response::Body { size_bytes }),
        option::of(object()).prop_map(Response::Object),
        vec(object(), 0..9).prop_map(Response::Objects),
        text().prop_map(|tag| Response::Stored { tag }),
        (vec(text(), 0..5), instant(), any::<bool>())
            .prop_map(|(urls, expires_at, may_end_earlier)| { Response::Links { urls, expires_at, may_end_earlier } }),
        cost().prop_map(Response::RepositoryCost).boxed(),
        facts().prop_map(Response::Repository).boxed(),
    ]
    .boxed()
}

fn usage() -> impl Strategy<Value = Usage> {
    any::<([u64; 6], u64, u64)>().prop_map(|(requests, received_bytes, sent_bytes)| Usage {
        requests,
        received_bytes,
        sent_bytes,
    })
}

fn prices() -> impl Strategy<Value = Prices> {
    (text(), vec(option::of(any::<u64>().prop_map(Price)), 7)).prop_map(|(currency, some)| Prices {
        currency,
        put_per_1000: some[0],
        list_per_1000: some[1],
        get_per_1000: some[2],
        delete_per_1000: some[3],
        stored_per_gib_month: some[4],
        received_per_gib: some[5],
        sent_per_gib: some[6],
    })
}

fn cost() -> impl Strategy<Value = RepositoryCost> {
    (text(), instant(), usage(), usage(), any::<u64>(), any::<u64>(), option::of(prices())).prop_map(
        |(repository, since, total, last_hour, last_hour_seconds, stored_bytes, prices)| RepositoryCost {
            repository,
            reading: Reading { since, total, last_hour, last_hour_seconds },
            stored_bytes,
            prices,
        },
    )
}

fn facts() -> impl Strategy<Value = RepositoryFacts> {
    let total = || any::<(u64, u64)>().prop_map(|(objects, bytes)| Total { objects, bytes });
    let holdings = (total(), total(), total(), total()).prop_map(|(log, packs, manifests, rest)| Holdings {
        log,
        packs,
        manifests,
        rest,
    });
    let incarnation =
        (text(), text(), instant(), option::of(position())).prop_map(|(instance, host, began_at, departed_at)| {
            Incarnation {
                id: IncarnationId::fresh(),
                engine: EngineKind::Postgres,
                engine_version: String::from("15.8"),
                instance,
                host,
                system_id: String::from("7"),
                began_at,
                parent: departed_at.map(|position| (IncarnationId::fresh(), position)),
            }
        });
    let pairs = vec((text(), text()), 0..3);
    (text(), any::<u16>(), instant(), pairs, vec((incarnation, holdings), 0..4), total()).prop_map(
        |(url, format_version, created_at, capabilities, incarnations, rest)| RepositoryFacts {
            url,
            id: RepositoryId::fresh(),
            format_version,
            created_at,
            capabilities,
            inventory: Inventory { incarnations, rest },
        },
    )
}

// === what a receiver does ===

fn read_request(framed: &[u8]) -> Result<Request> {
    let mut reader = MessageReader::default();
    reader.feed(framed);
    decode_request(&reader.next_message()?.expect("one whole message"))
}

/// Feeds an answer in pieces of `piece_bytes` and gives it with the bytes that follow it.
fn read_answer(framed: &[u8], piece_bytes: usize) -> Result<(Result<Response>, Bytes)> {
    let mut reader = MessageReader::default();
    let mut answer = AnswerReader::default();
    let mut done = None;
    for piece in framed.chunks(piece_bytes) {
        reader.feed(piece);
        while done.is_none() {
            match reader.next_message()? {
                Some(message) => done = answer.take(&message)?,
                None => break,
            }
        }
    }
    match done {
        Some(answer) => Ok((answer, reader.into_rest())),
        None => Err(Error::new(Kind::Unreachable, "incomplete")),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_request_arrives_as_it_was_sent(request in request()) {
        prop_assert_eq!(read_request(&encode_request(&request).unwrap()).unwrap(), request);
    }

    #[test]
    fn every_answer_arrives_as_it_was_sent_and_the_body_after_it_is_untouched(
        response in response(), piece_bytes in 1usize..5000, body in vec(any::<u8>(), 0..50)
    ) {
        let mut framed = encode_answer(&Ok(response.clone())).unwrap().to_vec();
        framed.extend_from_slice(&body);
        let (answer, rest) = read_answer(&framed, piece_bytes).unwrap();
        prop_assert_eq!(answer.unwrap(), response);
        prop_assert_eq!(&rest[..], &body[..]);
    }

    #[test]
    fn an_error_arrives_with_kind_message_and_hint(error in error()) {
        let framed = encode_answer(&Err(error.clone())).unwrap();
        prop_assert_eq!(read_answer(&framed, 7).unwrap().0.unwrap_err(), error);
    }

    #[test]
    fn any_bytes_are_a_value_or_an_error(bytes in vec(any::<u8>(), 0..300)) {
        let _ = decode_request(&bytes);
        let _ = AnswerReader::default().take(&bytes);
        let mut reader = MessageReader::default();
        reader.feed(&bytes);
        while let Ok(Some(_)) = reader.next_message() {}
    }

    #[test]
    fn a_changed_byte_is_another_value_or_an_error(response in response(), at in any::<u16>(), bits in 1u8..) {
        let mut framed = encode_answer(&Ok(response)).unwrap().to_vec();
        let at = usize::from(at) % framed.len();
        framed[at] ^= bits;
        let _ = read_answer(&framed, 4096);
    }

    #[test]
    fn a_request_that_is_cut_off_is_not_taken_for_another(request in request(), cut in 1usize..50) {
        let framed = encode_request(&request).unwrap();
        let mut reader = MessageReader::default();
        reader.feed(&framed[..framed.len().saturating_sub(cut)]);
        prop_assert_eq!(reader.next_message().unwrap(), None);
        // The same bytes with a header that calls them whole.
        let payload = &framed[FRAME_HEADER_BYTES..];
        prop_assert!(decode_request(&payload[..payload.len().saturating_sub(cut)]).is_err());
    }
}

// === limits ===

#[test]
fn bytes_after_the_value_are_refused() {
    let mut message = encode(&request::to_wire(&Request::Hello).unwrap()).unwrap();
    decode_request(&message).unwrap();
    message.push(0);
    assert_eq!(decode_request(&message).unwrap_err().kind(), Kind::Damaged);
}

#[test]
fn a_variant_that_does_not_exist_is_refused() {
    let error = decode_request(&[0, 100]).unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged);
    assert!(error.message().contains("100"), "{error}");
    assert!(error.hint_text().unwrap().contains("version"));
}

#[test]
fn a_length_that_nobody_can_mean_is_refused_before_it_is_allocated() {
    // Direct, DeleteObjects, then the longest length that there is.
    let hostile = [&[0, 20, 253][..], &u64::MAX.to_le_bytes()].concat();
    assert_eq!(decode_request(&hostile).unwrap_err().kind(), Kind::Damaged);
    // One key of almost as many bytes.
    let hostile = [&[0, 20, 1, 253][..], &(u64::MAX - 1).to_le_bytes()].concat();
    assert_eq!(decode_request(&hostile).unwrap_err().kind(), Kind::Damaged);
}

#[test]
fn a_frame_of_a_wrong_length_is_refused_at_its_header() {
    for length in [0u32, FRAME_BYTES_MAX as u32 + 1, u32::MAX, CONTINUES] {
        let mut reader = MessageReader::default();
        reader.feed(&length.to_be_bytes());
        assert_eq!(reader.next_message().unwrap_err().kind(), Kind::Damaged, "{length}");
    }
}

#[test]
fn a_message_that_never_ends_is_refused() {
    let mut reader = MessageReader::default();
    let mut fed = 0;
    let error = loop {
        reader.feed(&(FRAME_BYTES_MAX as u32 | CONTINUES).to_be_bytes());
        reader.feed(&[0; FRAME_BYTES_MAX]);
        fed += FRAME_BYTES_MAX;
        match reader.next_message() {
            Ok(message) => assert_eq!(message, None),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), Kind::Damaged);
    assert!(fed <= MESSAGE_BYTES_MAX + FRAME_BYTES_MAX);
}

#[test]
fn an_answer_that_never_ends_is_refused() {
    let long = ObjectFacts { key: "k".repeat(FRAME_BYTES_MAX), size_bytes: 0, tag: String::new() };
    let more = encode(&answer::to_wire(&Ok(Response::Objects(vec![long])))[0]).unwrap();
    let endless = [&more[..more.len() - 1], &[1]].concat();
    let framed = frame(&endless);
    let mut reader = MessageReader::default();
    let mut answer = AnswerReader::default();
    let refused = (0..ANSWER_BYTES_MAX).find_map(|_| {
        reader.feed(&framed);
        match reader.next_message() {
            Ok(message) => {
                assert!(answer.take(&message.unwrap()).unwrap().is_none());
                None
            }
            Err(error) => Some(error),
        }
    });
    assert_eq!(refused.unwrap().kind(), Kind::Damaged);
}

#[test]
fn a_long_list_travels_in_frames_and_arrives_whole() {
    let objects: Vec<ObjectFacts> = (0..20_000)
        .map(|number| ObjectFacts { key: format!("incarnations/{number:060}"), size_bytes: number, tag: "t".into() })
        .collect();
    let framed = encode_answer(&Ok(Response::Objects(objects.clone()))).unwrap();
    assert!(framed.len() > 20 * FRAME_BYTES_MAX);
    assert_eq!(read_answer(&framed, 10_000).unwrap().0.unwrap(), Response::Objects(objects));
}

#[test]
fn an_item_that_is_longer_than_a_frame_arrives_whole() {
    let item = CheckItem::pass("long", "x".repeat(5 * FRAME_BYTES_MAX));
    let response = Response::Checks(vec![CheckItem::pass("a", "b"), item, CheckItem::pass("c", "d")]);
    let framed = encode_answer(&Ok(response.clone())).unwrap();
    assert_eq!(read_answer(&framed, 1000).unwrap().0.unwrap(), response);
}

#[test]
fn what_is_too_long_for_a_message_is_an_error_of_the_sender() {
    let request = Request::Accept { clone: "x".repeat(MESSAGE_BYTES_MAX) };
    assert_eq!(encode_request(&request).unwrap_err().kind(), Kind::Unsupported);
}

#[test]
fn a_list_that_goes_on_as_something_else_is_refused() {
    let jobs = encode(&answer::to_wire(&Ok(Response::Jobs(vec![])))[0]).unwrap();
    let unfinished = [&jobs[..jobs.len() - 1], &[1]].concat();
    let mut answer = AnswerReader::default();
    assert!(answer.take(&unfinished).unwrap().is_none());
    let done = encode(&answer::to_wire(&Ok(Response::Done))[0]).unwrap();
    assert_eq!(answer.take(&done).unwrap_err().kind(), Kind::Damaged);
}

#[test]
fn a_request_can_be_forwarded_once() {
    let once = Request::Forward { host: "b".into(), request: Box::new(Request::Status) };
    let twice = Request::Forward { host: "a".into(), request: Box::new(once) };
    assert_eq!(encode_request(&twice).unwrap_err().kind(), Kind::BadInput);
}

/// Goal: agents of two builds understand each other as long as the protocol version is the same. If this test fails,
/// a message has changed: raise `PROTOCOL_VERSION`.
#[test]
fn messages_of_protocol_version_4_keep_their_bytes() {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(PROTOCOL_VERSION, 4);
    assert_eq!(hex(&encode_request(&Request::Hello).unwrap()), "000000020000");
    let get = Request::GetObject { key: "a/b".into(), range: Some(1..300) };
    assert_eq!(hex(&encode_request(&get).unwrap()), "0000000b001003612f620101fb2c01");
    let forward = Request::Forward { host: "b".into(), request: Box::new(Request::DeleteObjects { keys: vec![] }) };
    assert_eq!(hex(&encode_request(&forward).unwrap()), "000000050101621400");
    assert_eq!(hex(&encode_answer(&Ok(Response::Body { size_bytes: 70_000 })).unwrap()), "0000000607fc70110100");
    let refused = Err(Error::new(Kind::Forbidden, "no").hint("ask"));
    assert_eq!(hex(&encode_answer(&refused).unwrap()), "000000130009666f7262696464656e026e6f010361736b");
}
