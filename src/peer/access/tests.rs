//! Unit tests of `access`.

use proptest::prelude::*;

use super::*;
use crate::model::backup::BackupKind;
use crate::model::engine_kind::EngineKind;
use crate::model::group::GroupOrder;
use crate::model::id::JobId;
use crate::model::job::{CloneOrder, Order};
use crate::model::target::Target;
use crate::peer::api::PutWhen;

fn rule(who: &str, may: &[Permission], instances: &[&str]) -> AllowRule {
    let instances = instances.iter().map(|name| name.to_string()).collect();
    AllowRule { who: who.into(), may: may.into(), instances }
}

fn ann() -> Caller {
    Caller::Operator("ann".into())
}

fn root() -> Caller {
    Caller::Local { uid: 0, name: "root".into(), is_admin: true }
}

fn clone_of(source: &str) -> Request {
    let clone = CloneOrder {
        source: source.into(),
        clone_name: "copy".into(),
        target: Target::Latest,
        data_dir: None,
        port: None,
        settings: Default::default(),
        hold: false,
        passwords_for: Default::default(),
        keep_expired: false,
        ties: Default::default(),
    };
    let order = Order { id: JobId::fresh(), by: String::new(), task: Task::Clone(clone) };
    Request::Submit { order, passwords: Default::default() }
}

fn group_of(sources: &[&str]) -> Request {
    let group = GroupOrder {
        group: "shop".into(),
        clone_name: "copy".into(),
        sources: sources.iter().map(|source| source.to_string()).collect(),
        target: Target::Latest,
        hold: false,
    };
    let order = Order { id: JobId::fresh(), by: String::new(), task: Task::CloneGroup(group) };
    Request::Submit { order, passwords: Default::default() }
}

#[test]
fn a_group_may_be_cloned_by_whoever_may_clone_each_of_its_members() {
    let one = rule("operator:*", &[Permission::Clone], &["orders"]);
    let other = rule("operator:ann", &[Permission::Clone], &["cart*"]);
    let group = group_of(&["orders", "b/cart"]);
    decide(&ann(), &group, &[one.clone(), other.clone()]).unwrap();
    let refused = decide(&ann(), &group, std::slice::from_ref(&one)).unwrap_err();
    assert!(refused.message().contains("'b/cart'"), "{refused}");
    assert!(decide(&ann(), &group, &[other]).is_err());
    assert!(decide(&ann(), &group_of(&[]), &[]).is_err());
}

fn backup_of(instance: &str) -> Request {
    let task = Task::Backup { instance: instance.into(), kind: BackupKind::Manual };
    let order = Order { id: JobId::fresh(), by: String::new(), task };
    Request::Submit { order, passwords: Default::default() }
}

/// One of each; the compiler's exhaustive match in `need` keeps the decision complete, this list keeps the tests so.
fn every_request() -> Vec<Request> {
    let id = JobId::fresh();
    vec![
        Request::Hello,
        Request::Status,
        Request::Doctor,
        clone_of("orders"),
        group_of(&["orders", "b/cart"]),
        backup_of("orders"),
        Request::ListJobs,
        Request::ShowJob { id },
        Request::CancelJob { id },
        Request::ResumeJob { id },
        Request::Accept { clone: "c".into() },
        Request::Discard { clone: "c".into() },
        Request::ListBackups { instance: "orders".into() },
        Request::ShowWindow { instance: "orders".into() },
        Request::ShipNow { incarnation: IncarnationId::fresh() },
        Request::InitRepository,
        Request::ShowRepository,
        Request::ShowCost,
        Request::PushLog { data_dir: "/pg".into(), file: "f".into() },
        Request::Forward { host: "b".into(), request: Box::new(Request::Status) },
        Request::GetObject { key: "k".into(), range: None },
        Request::HeadObject { key: "k".into() },
        Request::ListObjects { prefix: String::new(), after: None, limit: 1 },
        Request::PutObject { key: "k".into(), condition: PutWhen::Create },
        Request::DeleteObjects { keys: vec![] },
        Request::LinkObjects { keys: vec![], valid_for_seconds: 1 },
    ]
}

#[test]
fn without_a_rule_a_certificate_is_good_for_a_name_only() {
    for caller in [ann(), Caller::Host("b".into())] {
        for request in every_request() {
            let decision = decide(&caller, &request, &[]);
            assert_eq!(decision.is_ok(), request == Request::Hello, "{caller} {request:?}");
            if let Err(error) = decision {
                assert_eq!(error.kind(), Kind::Forbidden);
                assert!(error.message().contains(&caller.to_string()) && error.hint_text().is_some(), "{error:?}");
            }
        }
    }
}

#[test]
fn a_rule_for_everything_does_not_open_what_is_for_the_host_itself() {
    let names = Permission::names();
    let everything: Vec<Permission> = names.iter().map(|name| Permission::from_name(name).unwrap()).collect();
    let rules = [rule("operator:*", &everything, &["*"]), rule("host:*", &everything, &["*"])];
    for request in every_request() {
        let local_only = matches!(request, Request::InitRepository | Request::PushLog { .. } | Request::Forward { .. });
        assert_eq!(decide(&ann(), &request, &rules).is_err(), local_only, "{request:?}");
        assert_eq!(decide(&Caller::Host("b".into()), &request, &rules).is_err(), local_only, "{request:?}");
    }
}

#[test]
fn administrators_of_the_host_may_everything_and_other_users_push_only() {
    let user = Caller::Local { uid: 1000, name: "joe".into(), is_admin: false };
    for request in every_request() {
        decide(&root(), &request, &[]).unwrap();
        let allowed = matches!(request, Request::Hello | Request::PushLog { .. });
        assert_eq!(decide(&user, &request, &[]).is_ok(), allowed, "{request:?}");
    }
    insta::assert_snapshot!(refused(decide(&user, &Request::Status, &[])), @"user 'joe' may not see the status on this host | run it as root, or add the user to the group: usermod -aG keiki joe");
}

fn refused(decision: Result<()>) -> String {
    let error = decision.unwrap_err();
    format!("{error} | {}", error.hint_text().unwrap())
}

#[test]
fn a_refusal_names_the_lines_to_add() {
    insta::assert_snapshot!(refused(decide(&ann(), &clone_of("a/orders"), &[])), @r#"
    'operator:ann' may not order a clone of 'a/orders' on this host | to allow it, add to the configuration of that host:
    [[allow]]
    who = "operator:ann"
    may = ["clone"]
    instances = ["orders"]
    "#);
    insta::assert_snapshot!(refused(decide(&ann(), &Request::CancelJob { id: JobId::fresh() }, &[])), @r#"
    'operator:ann' may not cancel a job on this host | to allow it, add to the configuration of that host:
    [[allow]]
    who = "operator:ann"
    may = ["job"]
    "#);
    let host = Caller::Host("b".into());
    insta::assert_snapshot!(refused(decide(&host, &Request::HeadObject { key: "k".into() }, &[])), @r#"
    'host:b' may not read the repository on this host | to allow it, add to the configuration of that host:
    [[allow]]
    who = "host:b"
    may = ["read-repository"]
    "#);
    insta::assert_snapshot!(refused(decide(&host, &Request::InitRepository, &[])), @"'host:b' may not initialise the repository from another host | this can be done on the host itself only");
}

#[test]
fn a_rule_counts_for_its_callers_things_and_instances_only() {
    let rules = [rule("operator:a*", &[Permission::Clone], &["orders", "test-*"])];
    decide(&ann(), &clone_of("orders"), &rules).unwrap();
    decide(&ann(), &clone_of("b/test-7"), &rules).unwrap();
    for (caller, request) in [
        (ann(), clone_of("stock")),
        (ann(), clone_of("orders/stock")),
        (ann(), backup_of("orders")),
        (Caller::Operator("bob".into()), clone_of("orders")),
        (Caller::Host("ann".into()), clone_of("orders")),
        (Caller::Host("operator:ann".into()), clone_of("orders")),
    ] {
        assert!(decide(&caller, &request, &rules).is_err(), "{caller} {request:?}");
    }
}

#[test]
fn a_rule_without_instances_allows_nothing_about_one() {
    assert!(decide(&ann(), &clone_of("orders"), &[rule("operator:*", &[Permission::Clone], &[])]).is_err());
}

fn incarnation(id: IncarnationId, host: &str) -> Incarnation {
    Incarnation {
        id,
        engine: EngineKind::Postgres,
        engine_version: "15.18".into(),
        instance: "orders".into(),
        host: host.into(),
        system_id: "1".into(),
        began_at: jiff::Timestamp::UNIX_EPOCH,
        parent: None,
    }
}

#[test]
fn a_host_writes_below_its_own_incarnations_only() {
    let id = IncarnationId::fresh();
    let ours = incarnation(id, "b");
    let b = Caller::Host("b".into());
    let key = format!("incarnations/{id}/log/0001/sealed");
    may_write(&b, &key, Some(&ours)).unwrap();
    may_write(&b, &format!("incarnations/{id}/identity.json"), Some(&ours)).unwrap();
    may_write(&root(), "keiki.json", None).unwrap();

    let other = incarnation(IncarnationId::fresh(), "b");
    for (caller, key, identity) in [
        (&b, key.as_str(), None),
        (&b, key.as_str(), Some(&incarnation(id, "a"))),
        (&b, key.as_str(), Some(&other)),
        (&Caller::Host("a".into()), key.as_str(), Some(&ours)),
        (&Caller::Operator("b".into()), key.as_str(), Some(&ours)),
        (&Caller::Local { uid: 7, name: "b".into(), is_admin: false }, key.as_str(), Some(&ours)),
        (&b, "keiki.json", Some(&ours)),
        (&b, &format!("incarnations/{id}"), Some(&ours)),
        (&b, &format!("incarnations/{id}/"), Some(&ours)),
        (&b, &format!("other/{id}/log"), Some(&ours)),
    ] {
        assert_eq!(may_write(caller, key, identity).unwrap_err().kind(), Kind::Forbidden, "{caller} {key}");
    }
    insta::assert_snapshot!(
        may_write(&b, "keiki.json", Some(&ours)).unwrap_err(),
        @"'host:b' may not write 'keiki.json': it belongs to no incarnation"
    );
}

#[test]
fn patterns_match_whole_names() {
    for (pattern, text, fits) in [
        ("*", "", true),
        ("orders", "orders", true),
        ("orders", "orders-2", false),
        ("orders*", "orders-2", true),
        ("*2", "orders-2", true),
        ("o*s", "orders", true),
        ("o*x*s", "orders", false),
        ("?", "", false),
        ("or?ers", "orders", true),
        ("", "orders", false),
        ("operator:*", "host:operator:a", false),
    ] {
        assert_eq!(matches_pattern(pattern, text), fits, "{pattern} {text}");
    }
}

/// The plain definition, which takes exponential time.
fn matches_by_definition(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern, text) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => (0..=text.len()).any(|swallowed| matches_by_definition(rest, &text[swallowed..])),
        ([b'?', rest @ ..], [_, others @ ..]) => matches_by_definition(rest, others),
        ([letter, rest @ ..], [other, others @ ..]) => letter == other && matches_by_definition(rest, others),
        _ => false,
    }
}

proptest! {
    #[test]
    fn patterns_match_as_defined(pattern in "[ab*?]{0,7}", text in "[ab]{0,8}") {
        let defined = matches_by_definition(pattern.as_bytes(), text.as_bytes());
        prop_assert_eq!(matches_pattern(&pattern, &text), defined);
    }
}
